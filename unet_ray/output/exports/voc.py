"""Pascal VOC's folders, and CVAT's `Segmentation mask 1.1`, which are the same with another list of classes.

    SegmentationClass/drive07/000001.png       palette PNG in the frame's size, pixel = class id
    JPEGImages/drive07/000001.jpg              the frame, with --with-frames
    ImageSets/Segmentation/trainval.txt        voc: names without extension, one a line; written last
    class_id_to_name.json                      voc: {"0": "road", …}
    ImageSets/Segmentation/default.txt         cvat: the same list
    labelmap.txt                               cvat: `road:128,64,128::`, in the order of the class ids
    labels.json                                cvat: the labels that its task is to have, for the editor `Raw`

Folders in ids stay folders: labelformat, mmsegmentation, torchvision, Datumaro and CVAT read them so. There is no class
`background`: each pixel is of a class, and CVAT refuses labels that its task does not have.

Sources: docs.cvat.ai/docs/dataset_management/formats/format-smask, labelformat 0.1.17, datumaro 1.13.12.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from unet_ray.classes import ClassSet
from unet_ray.output.exports.export import Export, Format, frame_png
from unet_ray.output.exports.names import bare_name, listed_path
from unet_ray.output.exports.targets import Target

_LISTS = "ImageSets/Segmentation"


def _mask_path(frame_id: str, with_frames: bool = False) -> str:
    return f"SegmentationClass/{bare_name(frame_id)}.png"


def _frame_path(frame_id: str, ending: str, out_name: str) -> str:
    return f"JPEGImages/{listed_path(frame_id)}{ending}"


def _writer(list_path: str, class_files: Callable[[ClassSet], dict[str, str]]) -> Callable[[Export, Target], None]:
    def write(export: Export, target: Target) -> None:
        palette_K3 = export.class_set.palette_K3
        export.write_masks(target, _mask_path, lambda row: frame_png(row, palette_K3))
        target.write([(path, text.encode()) for path, text in class_files(export.class_set).items()])
        with target.pieces(list_path) as file:
            for rows in export.rows(["frame_id"]):
                file.writelines(f"{bare_name(row['frame_id'])}\n".encode() for row in rows)

    return write


def _voc_classes(class_set: ClassSet) -> dict[str, str]:
    names = {str(class_id): name for class_id, name in enumerate(class_set.names)}
    return {"class_id_to_name.json": json.dumps(names, indent=2) + "\n"}


def _cvat_classes(class_set: ClassSet) -> dict[str, str]:
    colors = {item.name: item.color for item in class_set.classes}
    lines = [f"{name}:{red},{green},{blue}::\n" for name, (red, green, blue) in colors.items()]
    labels = [
        {"name": name, "color": "#{:02x}{:02x}{:02x}".format(*color), "type": "mask", "attributes": []}
        for name, color in colors.items()
    ]
    return {
        "labelmap.txt": "# label:color_rgb:parts:actions\n" + "".join(lines),
        "labels.json": json.dumps(labels, indent=2) + "\n",
    }


def _format(list_name: str, class_files: Callable[[ClassSet], dict[str, str]]) -> Format:
    list_path = f"{_LISTS}/{list_name}"
    return Format(
        write=_writer(list_path, class_files),
        mask_path=_mask_path,
        frame_path=_frame_path,
        list_path=list_path,
        listed=lambda name: f"SegmentationClass/{name}.png",
    )


VOC = _format("trainval.txt", _voc_classes)
CVAT = _format("default.txt", _cvat_classes)

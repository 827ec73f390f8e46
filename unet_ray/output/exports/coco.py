"""COCO's annotations, one JSON file.

Categories are the classes, with id = class id + 1 (COCO counts from 1); images are the exported frames, numbered from 1
in the manifest's order; annotations are one for each frame and class in it, all its pixels as one compressed RLE.

`file_name` is the frame's id, which for a frame in a tar, zip or Parquet file is no file, and the size is the mask's.
With frames it is the path of the written frame below `NAME_frames/` beside `NAME.json`, the size is the frame's, and
`frame_id` is its id.

Shapes: `H` height px, `W` width px.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np

from unet_ray.output.exports.export import FRAME_MASK_COLUMNS, FRAME_SIZE, Export, Format, frame_mask
from unet_ray.output.exports.json_items import json_items
from unet_ray.output.exports.names import listed_path
from unet_ray.output.exports.targets import Target
from unet_ray.output.masks import mask_of
from unet_ray.progress import Progress


def _frame_path(frame_id: str, ending: str, out_name: str) -> str:
    return f"{out_name.removesuffix('.json')}_frames/{listed_path(frame_id)}{ending}"


def _write(export: Export, target: Target) -> None:
    """Two passes, since COCO lists all images before the first annotation, and neither list fits into memory."""
    progress = Progress(export.n_labelled, "masks")
    names = export.class_set.names
    categories = [{"id": k + 1, "name": name, "supercategory": export.class_set.name} for k, name in enumerate(names)]
    with target.pieces(export.file_name) as file:
        file.write(b'{"info": {"description": "masks of unet_ray"}, "licenses": [],\n"categories": [\n')
        file.writelines(json_items(categories))
        file.write(b'],\n"images": [\n')
        file.writelines(json_items(_images(export)))
        file.write(b'],\n"annotations": [\n')
        file.writelines(json_items(_annotations(export, progress)))
        file.write(b"]}\n")
    progress.finish()


def _images(export: Export) -> Iterator[dict[str, Any]]:
    image_ids = count(1)
    for rows in export.rows(("frame_id", "mask_height_px", "mask_width_px", *FRAME_SIZE)):
        for row in rows:
            frame_id, size = row["frame_id"], [row["mask_height_px"], row["mask_width_px"]]
            if not export.with_frames:
                yield {"id": next(image_ids), "file_name": frame_id, "height": size[0], "width": size[1]}
                continue
            height_px, width_px = size if row["height_px"] is None else (row["height_px"], row["width_px"])
            file_name = f"{listed_path(frame_id)}{row['ending']}"
            image = {"id": next(image_ids), "file_name": file_name, "height": height_px, "width": width_px}
            yield {**image, "frame_id": frame_id}


def _annotations(export: Export, progress: Progress) -> Iterator[dict[str, Any]]:
    image_ids, annotation_ids = count(1), count(1)
    for rows in export.rows(FRAME_MASK_COLUMNS, progress):
        for row in rows:
            image_id = next(image_ids)
            for region in regions(frame_mask(row) if export.with_frames else mask_of(row)):
                yield {"id": next(annotation_ids), "image_id": image_id, **region}


def regions(mask_HW: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields what COCO says of each class in a mask, in the order of their ids: all pixels of the class as one region.

    `segmentation` is COCO's compressed RLE, `area` in pixels, `bbox` (x, y, width, height) in pixels.
    """
    from pycocotools import mask as coco_mask  # of the extra `coco`

    for k in np.flatnonzero(np.bincount(mask_HW.ravel())).tolist():
        rle = coco_mask.encode(np.asfortranarray(mask_HW == k, np.uint8))
        yield {
            "category_id": k + 1,
            "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
            "area": int(coco_mask.area(rle)),
            "bbox": coco_mask.toBbox(rle).tolist(),
            "iscrowd": 0,
        }


COCO = Format(write=_write, mask_path=None, frame_path=_frame_path)

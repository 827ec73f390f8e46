"""A palette PNG for each label, pixel = class id: the mask of `cam0/7.jpg` is `cam0/7.jpg.png`, see `mask_path`.

With frames the masks lie in `masks/` and the frames in `frames/`, which is what `train` reads.
"""

from __future__ import annotations

from unet_ray.output.exports.export import Export, Format
from unet_ray.output.exports.names import frame_path, mask_path
from unet_ray.output.exports.targets import Target
from unet_ray.output.masks import mask_of
from unet_ray.pixels.mask_png import encode_mask_png


def _mask_path(frame_id: str, with_frames: bool) -> str:
    return f"masks/{mask_path(frame_id)}" if with_frames else mask_path(frame_id)


def _write(export: Export, target: Target) -> None:
    palette_K3 = export.class_set.palette_K3
    export.write_masks(
        target,
        lambda frame_id: _mask_path(frame_id, export.with_frames),
        lambda row: row["mask"] if row["mask_encoding"] == "png" else encode_mask_png(mask_of(row), palette_K3),
    )


PNG = Format(
    write=_write,
    mask_path=_mask_path,
    frame_path=lambda frame_id, ending, _: f"frames/{frame_path(frame_id)}{ending}",
)

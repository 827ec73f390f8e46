"""A dataset of FiftyOne: `fo.Dataset.from_dir(OUT, dataset_type=fo.types.FiftyOneDataset)`.

    data/drive07/000001.jpg                    the frame, with --with-frames
    fields/predictions/drive07/000001.png      grey PNG in the frame's size, pixel = class id + 1
    metadata.json                              names and colours of the classes
    samples.json                               a sample for each frame; written last

FiftyOne draws nothing for 0, and takes a palette's colours for the values. So class ids begin at 1, in grey. A sample
holds the mask as `predictions`, and figures of the row to sort by: `confidence`, `changed_share` and others.

The JSON has no `version`, as FiftyOne wrote it before 0.8 and has read it since: with one, it would be the database's
own documents of one release. Source: `LegacyFiftyOneDatasetImporter` of fiftyone 1.22.1, which a test lets read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from unet_ray.classes import ClassSet
from unet_ray.output.exports.export import Export, Format, frame_mask
from unet_ray.output.exports.json_items import json_items
from unet_ray.output.exports.names import bare_name, listed_path
from unet_ray.output.exports.targets import Target
from unet_ray.pixels.mask_png import encode_grey_png

_FIELD = "predictions"

_SAMPLES = "samples.json"

_FIGURES = (
    *("sequence", "camera", "frame_index", "timestamp_ns"),
    *("confidence", "expected_error_share", "low_margin_share", "changed_share"),
)
"""Columns that become fields of a sample, as far as an output has them."""


def _mask_path(frame_id: str, with_frames: bool = False) -> str:
    return f"fields/{_FIELD}/{bare_name(frame_id)}.png"


def _frame_path(frame_id: str, ending: str, out_name: str = "") -> str:
    return f"data/{listed_path(frame_id)}{ending}"


def _write(export: Export, target: Target) -> None:
    export.write_masks(target, _mask_path, lambda row: encode_grey_png(frame_mask(row) + np.uint8(1)))
    target.write([("metadata.json", json.dumps(_metadata(export.class_set), indent=2).encode())])
    with target.pieces(_SAMPLES) as file:
        file.write(b'{"samples": [\n')
        file.writelines(json_items(_samples(export)))
        file.write(b"]}\n")


def _metadata(class_set: ClassSet) -> dict[str, Any]:
    colors = [
        {"intTarget": class_id, "color": "#{:02x}{:02x}{:02x}".format(*item.color)}
        for class_id, item in enumerate(class_set.classes, start=1)
    ]
    info = {
        "classes": list(class_set.names),
        "default_mask_targets": {str(class_id): name for class_id, name in enumerate(class_set.names, start=1)},
        "app_config": {"color_scheme": {"_cls": "ColorScheme", "default_mask_targets_colors": colors}},
    }
    return {"media_type": "image", "info": info}


def _samples(export: Export) -> Iterator[dict[str, Any]]:
    figures = [name for name in _FIGURES if name in export.selection.columns]
    for rows in export.rows(("frame_id", "uri", *figures)):
        for row in rows:
            frame_id = row["frame_id"]
            path = row["uri"] if row["ending"] is None else _frame_path(frame_id, row["ending"])
            label = {"_cls": "Segmentation", "tags": [], "mask_path": _mask_path(frame_id)}
            yield {"filepath": path, "tags": [], "metadata": None, "frame_id": frame_id, _FIELD: label} | _plain(
                row, figures
            )


def _plain(row: Mapping[str, Any], figures: list[str]) -> dict[str, Any]:
    """Returns a row's figures as JSON has them; a NaN of an earlier version is none."""
    return {name: None if row[name] != row[name] else row[name] for name in figures}


FIFTYONE = Format(write=_write, mask_path=_mask_path, frame_path=_frame_path, list_path=_SAMPLES, needs_files=True)

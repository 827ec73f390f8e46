"""The masks of a published output: one row's pixels, and all of them as files for other tools (PNG, COCO).

Shapes: `H` height px, `W` width px.

`png`: the mask of the frame `cam0/7.jpg` is `cam0/7.jpg.png` below the folder, see `mask_path`.

`coco`: one JSON file. Categories are the classes, with id = class id + 1 (COCO counts from 1); images are the labelled
frames, numbered from 1 in the order of `frames/`, `file_name` the frame's id, height and width the mask's; annotations
are one for each frame and class in it, all its pixels as one compressed RLE.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_ray import images, storage
from unet_ray.classes import ClassSet
from unet_ray.config import ExportMasksConfig
from unet_ray.mask_png import encode_mask_png
from unet_ray.output import labels, plans, publish
from unet_ray.progress import Progress

MASK_COLUMNS = ("mask", "mask_encoding", "mask_height_px", "mask_width_px")
"""What `mask_of` looks at."""

_BATCH_ROWS = 64
_BUFFER_BYTES = 2**23
"""Of a column while it is read, instead of all of it in a row group; Arrow unpacks a page, up to 1,024 masks."""

_NAME_BYTES, _PATH_BYTES = 255, 4095
"""Of a file's name and of its whole path, on Linux' usual filesystems."""

# What a path or fsspec (`::`) would not take as a plain name.
_UNSAFE = re.compile(r"%|\0|:(?=:)")


class Exported(NamedTuple):
    """What became of the chosen frames."""

    written: int
    """Masks."""
    rejected: int
    """Frames without one."""


def export_masks(config: ExportMasksConfig) -> Exported:
    """Writes the masks of a finished output as files; run again, it writes the same files again.

    Raises:
        ValueError: no output, one that is not finished, a drive that it does not have, or pycocotools is missing.
        JobFailed: a file of it is damaged.
        StorageError: storage did not answer.
    """
    if config.format == "coco" and importlib.util.find_spec("pycocotools") is None:
        raise ValueError("the format coco needs the package pycocotools; pip install 'unet-ray[coco]'")
    plan = plans.read_plan(storage.resolve(config.labels))
    summary = publish.finished_summary(plan)
    if summary is None:
        raise ValueError(f"{config.labels} is not finished (or was found damaged); run segment again, then export")
    uris = [storage.join(plan.out, file["path"]) for file in summary["files"] if file["path"].startswith("frames/")]
    selection = _select(uris, config.sequence) if config.sequence else _select_all(uris, summary["listed"])
    out = storage.resolve(config.out)
    storage.require_writable(out if config.format == "png" else out.rpartition("/")[0] or "/", "--out")
    if config.format == "png":
        return _write_png(selection, out, plan.lineage.class_set)
    return _write_coco(selection, out, plan.lineage.class_set)


def mask_of(row: Mapping[str, Any]) -> np.ndarray:
    """Returns the mask of a row of `frames/` with `MASK_COLUMNS`, uint8 [H, W] of class ids; it may be read-only."""
    height_px, width_px = row["mask_height_px"], row["mask_width_px"]
    if row["mask_encoding"] == "png":
        return images.decode_mask(row["mask"], max_pixels=height_px * width_px)
    return np.frombuffer(row["mask"], np.uint8).reshape(height_px, width_px)


# --- which rows ---


@dataclass(frozen=True, kw_only=True)
class _Selection:
    groups: Sequence[tuple[str, Sequence[int]]]
    """Files of `frames/` and the row groups that are read of each."""
    n_rows: int
    sequences: tuple[str, ...] = ()
    """Only the rows of these; all where there is none."""


def _select_all(uris: Sequence[str], n_rows: int) -> _Selection:
    groups = []
    for uri in uris:
        with labels.opened(uri) as file:
            groups.append((uri, range(file.num_row_groups)))
    return _Selection(groups=groups, n_rows=n_rows)


def _select(uris: Sequence[str], sequences: tuple[str, ...]) -> _Selection:
    """Chooses the row groups with frames of these drives, by that one column.

    Raises:
        ValueError: a drive that the output does not have.
    """
    groups: list[tuple[str, Sequence[int]]] = []
    rows_of: Counter[str] = Counter()
    for uri in uris:
        chosen = []
        with labels.opened(uri) as file:
            for group in range(file.num_row_groups):
                column = file.read_row_group(group, columns=["sequence"])["sequence"]
                n_rows = Counter({drive["values"]: drive["counts"] for drive in pc.value_counts(column).to_pylist()})
                rows_of += n_rows
                if n_rows.keys() & set(sequences):
                    chosen.append(group)
        groups.append((uri, chosen))
    for sequence in sequences:
        if sequence not in rows_of:
            there = ", ".join(str(name) for name in list(rows_of)[:10]) + (", …" if len(rows_of) > 10 else "")
            raise ValueError(f"--sequence is {sequence!r}; the output's drives are {there}")
    return _Selection(groups=groups, n_rows=sum(rows_of[name] for name in set(sequences)), sequences=sequences)


def _batches(selection: _Selection, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yields the chosen rows in order, a few at a time; `sequence` is among the columns."""
    chosen = pa.array(selection.sequences, pa.string())
    for uri, groups in selection.groups:
        with labels.opened(uri, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=["sequence", *columns]):
                require_values(batch, columns)
                yield batch.filter(pc.is_in(batch["sequence"], value_set=chosen)) if selection.sequences else batch


def require_values(batch: pa.RecordBatch, columns: Sequence[str]) -> None:
    """Raises ValueError where a labelled frame has no id or no mask."""
    is_ok = pc.equal(batch["status"], "ok")
    for name in columns:
        if pc.any(pc.and_(is_ok, pc.is_null(batch[name]))).as_py():
            raise ValueError(f"a labelled frame has no {name}")


def _labelled(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    return batch.filter(pc.equal(batch["status"], "ok")).to_pylist()


# --- PNG ---


def mask_path(frame_id: str) -> str:
    """Returns the path of a frame's PNG: its id with `.png` at the end, so that no two frames share one.

    What could lead elsewhere is written with `%`: a part that is empty becomes `%`, `.` and `..` become `%2E` and
    `%2E%2E`, a `%` becomes `%25`, `::` becomes `%3A:`.

    >>> mask_path("drive07.tar!cam0/000001.jpg")
    'drive07.tar!cam0/000001.jpg.png'
    >>> mask_path("/log/../a.png")
    '%/log/%2E%2E/a.png.png'
    """
    plain = _UNSAFE.sub(lambda match: f"%{ord(match[0]):02X}", frame_id + ".png")
    return "/".join({"": "%", ".": "%2E", "..": "%2E%2E"}.get(part, part) for part in plain.split("/"))


def _require_file_names(selection: _Selection, folder: str) -> None:
    """Raises ValueError where the frames' names make no files on this machine: too long, or a file within a file."""
    if not storage.is_local(folder):
        return
    folders: set[str] = set()
    for frame_id in _labelled_ids(selection):
        parts = mask_path(frame_id).split("/")
        longest = max(len(os.fsencode(part)) for part in parts)
        if longest > _NAME_BYTES or len(os.fsencode(storage.join(folder, *parts))) > _PATH_BYTES:
            raise ValueError(
                f"the name of the frame {frame_id[:60]}… has {longest} bytes in one part; a file here may have "
                f"{_NAME_BYTES} (and {_PATH_BYTES} with its folders): export to a store, or as coco"
            )
        folders.update("/".join(parts[:n]) for n in range(1, len(parts)) if parts[n - 1].endswith(".png"))
    if folders and (twice := next((i for i in _labelled_ids(selection) if mask_path(i) in folders), None)) is not None:
        raise ValueError(
            f"the mask of the frame {twice} would be the file {mask_path(twice)}, which is the folder of another "
            "frame's: export as coco"
        )


def _labelled_ids(selection: _Selection) -> Iterator[str]:
    for batch in _batches(selection, ["frame_id", "status"]):
        yield from batch.filter(pc.equal(batch["status"], "ok"))["frame_id"].to_pylist()


def _write_png(selection: _Selection, folder: str, class_set: ClassSet) -> Exported:
    _require_file_names(selection, folder)
    progress = Progress(selection.n_rows, "frames")
    written = rejected = 0
    for batch in _batches(selection, ["frame_id", "status", *MASK_COLUMNS]):
        rows = _labelled(batch)
        storage.write_many([(storage.join(folder, mask_path(row["frame_id"])), _png(row, class_set)) for row in rows])
        written, rejected = written + len(rows), rejected + len(batch) - len(rows)
        progress.advance(len(batch))
    progress.finish()
    return Exported(written, rejected)


def _png(row: Mapping[str, Any], class_set: ClassSet) -> bytes:
    return row["mask"] if row["mask_encoding"] == "png" else encode_mask_png(mask_of(row), class_set.palette_K3)


# --- COCO ---


def _write_coco(selection: _Selection, uri: str, class_set: ClassSet) -> Exported:
    """Two passes, since COCO lists all images before the first annotation, and neither list fits into memory."""
    progress = Progress(selection.n_rows, "frames")
    n_images = 0

    def coco_images() -> Iterator[dict[str, Any]]:
        nonlocal n_images
        for batch in _batches(selection, ["frame_id", "status", "mask_height_px", "mask_width_px"]):
            for row in _labelled(batch):
                n_images += 1
                size = {"height": row["mask_height_px"], "width": row["mask_width_px"]}
                yield {"id": n_images, "file_name": row["frame_id"], **size}

    def annotations() -> Iterator[dict[str, Any]]:
        image_ids, annotation_ids = count(1), count(1)
        for batch in _batches(selection, ["status", *MASK_COLUMNS]):
            for row in _labelled(batch):
                image_id = next(image_ids)
                for region in regions(mask_of(row)):
                    yield {"id": next(annotation_ids), "image_id": image_id, **region}
            progress.advance(len(batch))

    categories = [
        {"id": k + 1, "name": name, "supercategory": class_set.name} for k, name in enumerate(class_set.names)
    ]
    with storage.write_pieces(uri) as file:
        file.write(b'{"info": {"description": "masks of unet_ray"}, "licenses": [],\n"categories": [\n')
        file.writelines(_json_items(categories))
        file.write(b'],\n"images": [\n')
        file.writelines(_json_items(coco_images()))
        file.write(b'],\n"annotations": [\n')
        file.writelines(_json_items(annotations()))
        file.write(b"]}\n")
    progress.finish()
    return Exported(n_images, selection.n_rows - n_images)


def _json_items(items: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """Yields the items of a JSON array, one a line."""
    separator = b""
    for item in items:
        yield separator + json.dumps(item, ensure_ascii=False).encode()
        separator = b",\n"


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

"""A small archive that is only listed, labels that are a function of a frame's name, and an output made of both."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from unet_ray import storage
from unet_ray.classes import ClassSet, SegmentationClass
from unet_ray.frames import MANIFEST_SCHEMA, Listing
from unet_ray.output import ledger, manifest, plans, publish, rejected, salvage
from unet_ray.output import rows as results
from unet_ray.output.chunks import Chunk, Cutting
from unet_ray.output.records import commit
from unet_ray.pixels.mask_png import encode_mask_png
from unet_ray.storage import files as storage_files
from unet_ray.storage import local_files

CLASS_SET = ClassSet(
    name="three",
    classes=(
        SegmentationClass(name="road", color=(128, 64, 128), values=(1,)),
        SegmentationClass(name="sky", color=(70, 130, 180), values=(2,)),
        SegmentationClass(name="pedestrian", color=(220, 20, 60), values=(3,)),
    ),
)
LINEAGE = plans.Lineage(bundle_digest="ab" * 32, class_set=CLASS_SET, options={"mask_size": "native", "stride": None})
CUTTING = Cutting(chunk_frames=3, shard_rows=5)

FIRST_DRIVES = {("a", ""): 5, ("b", "left"): 4, ("b", "right"): 2}
"""Sequence and camera, number of frames: chunks of 3, 2 | 3, 1, 2 frames in two shards."""
BROKEN = {"b/left/2.png": "truncated", "a//4.png": "crashed"}


def listing(
    drives: Mapping[tuple[str, str], int] = FIRST_DRIVES, *, versions: Mapping[str, str] | None = None
) -> Listing:
    rows = [
        {
            "frame_id": f"{sequence}/{camera}/{index}.png",
            "uri": f"/archive/{sequence}/{camera}/{index}.png",
            "kind": "file",
            "offset_bytes": None,
            "size_bytes": 100 + index,
            "version": (versions or {}).get(f"{sequence}/{camera}/{index}.png", f"v{index}"),
            "sequence": sequence,
            "camera": camera,
            "frame_index": index,
        }
        for (sequence, camera), n_frames in drives.items()
        for index in range(n_frames)
    ]
    return Listing(table=pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA), ignored={".json": 2}, unlistable=())


def mask_of(frame_id: str) -> np.ndarray:
    """A frame's mask, of 2 to 4 by 5 pixels, from its name."""
    seed = np.random.default_rng(zlib.crc32(frame_id.encode()))
    return seed.integers(0, 3, (int(seed.integers(2, 5)), 5), np.uint8)


def label(
    rows: pa.Table, broken: Mapping[str, str] = BROKEN, mask_encoding: str = "raw", *, neighbours: bool = True
) -> pa.Table:
    """The rows of a chunk; the network's grid is the mask."""
    ids = rows["frame_id"].to_pylist()
    reasons = [broken.get(frame_id) for frame_id in ids]
    masks = [mask_of(frame_id) for frame_id in ids]
    is_png = mask_encoding == "png"
    pixels_NK = np.stack([np.bincount(mask.ravel(), minlength=3) for mask in masks])
    labels = results.ChunkLabels(
        reason=reasons,
        error=[None if reason is None else f"it is {reason}" for reason in reasons],
        height_px=[480] * len(ids),
        width_px=[640] * len(ids),
        content_digest=[f"{zlib.crc32(frame_id.encode()):016x}" for frame_id in ids],
        mask=[encode_mask_png(mask, CLASS_SET.palette_K3) if is_png else mask.tobytes() for mask in masks],
        mask_encoding=mask_encoding,
        mask_height_px=[mask.shape[0] for mask in masks],
        mask_width_px=[mask.shape[1] for mask in masks],
        grids=[None if reason else mask for mask, reason in zip(masks, reasons, strict=True)] if neighbours else (),
        figures={
            "pixels_<class>": pixels_NK,
            "confidence_<class>": np.where(pixels_NK > 0, 0.5 + pixels_NK / 50, np.nan).astype(np.float32),
            "confidence": np.array([mask.mean() / 4 + 0.3 for mask in masks], np.float32),
            "low_margin_share": np.array([mask[0].mean() / 4 for mask in masks], np.float32),
        },
    )
    return results.result_table(rows, labels, CLASS_SET)


def make_plan(out: str, archive: Listing | None = None, **options: Any) -> plans.Plan:
    arguments = {"lineage": LINEAGE, "cutting": CUTTING, "config_yaml": "chunk_frames: 3\n", **options}
    return plans.plan(out, archive or listing(), arguments.pop("lineage"), arguments.pop("cutting"), **arguments)


def work(
    plan: plans.Plan,
    *,
    chunks: Sequence[Chunk] | None = None,
    broken: Mapping[str, str] = BROKEN,
    mask_encoding: str = "raw",
) -> list[str]:
    """Labels and commits what is pending, or some chunks; returns their ids."""
    chunks = ledger.pending(plan) if chunks is None else chunks
    for chunk in chunks:
        table = label(manifest.read_rows(chunk), broken, mask_encoding, neighbours=chunk.rows is None)
        commit(plan.out, chunk, table, writer="job-1")
    return [chunk.chunk_id for chunk in chunks]


def segment(
    out: str,
    archive: Listing | None = None,
    *,
    broken: Mapping[str, str] = BROKEN,
    retry: tuple[str, ...] | None = None,
    mask_encoding: str = "raw",
    **options: Any,
) -> list[str]:
    """All of the job: plan, work, publish; returns the chunks that it labelled."""
    plan = make_plan(out, archive, **options)
    if retry is not None:
        rejected.retry_rejected(plan, retry)
    salvage.look_after_damage(plan)
    labelled = work(plan, broken=broken, mask_encoding=mask_encoding)
    publish.publish(plan, max_rejected=0.5)
    return labelled


def contents(root: str) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    try:
        return {file.path: storage.read_bytes(file.uri) for file in storage.list_files(root)}
    except FileNotFoundError:
        return {}


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def killed_at(monkeypatch: Any, index: int, *, after: bool) -> Iterator[list[str]]:
    """Ends the process before or after its `index`-th change to the storage (from 0); a negative index: never.

    A tree's deletion is the deletions of its files, one after another, from the last to the first and so that odd ones
    come before even ones: no order may be relied on.
    """
    changes: list[str] = []

    def step(name: str, act: Callable[..., Any], *arguments: Any) -> Any:
        changes.append(f"{name} {arguments[0]}")
        is_last = len(changes) - 1 == index
        if is_last and not after:
            raise Killed
        result = act(*arguments)
        if is_last:
            raise Killed
        return result

    originals = {name: getattr(storage, name) for name in ("write_whole", "put_if_absent", "delete", "delete_tree")}

    def delete_tree(uri: str) -> None:
        try:
            files = sorted((file.uri for file in storage.list_files(uri)), reverse=True)
        except FileNotFoundError:
            files = []
        for file in files[1::2] + files[::2]:
            step("delete", originals["delete"], file)
        originals["delete_tree"](uri)

    with monkeypatch.context() as patch:
        for name in ("write_whole", "put_if_absent", "delete"):
            patch.setattr(storage, name, lambda *a, name=name: step(name, originals[name], *a))
            patch.setattr(storage_files, name, lambda *a, name=name: step(name, originals[name], *a))
        patch.setattr(storage, "delete_tree", delete_tree)
        yield changes


def flipped(data: bytes, index: int, bit: int = 0) -> bytes:
    """The bytes with one bit changed."""
    return data[:index] + bytes([data[index] ^ 1 << bit]) + data[index + 1 :]


_PROCESSES = multiprocessing.get_context("forkserver")
"""Of children of a process that has no threads: one of this process might find a lock or the heap as another thread,
of Arrow's or DuckDB's, has left it (`corrupted double-linked list`, once in some hundred, 2026-11-30)."""
_PROCESSES.set_forkserver_preload(["unet_ray.output.publish", "unet_ray.output.rejected", "unet_ray.output.salvage"])


def killed_inside(index: int, out: str, archive: Listing) -> bool:
    """Runs `segment` in a process that is gone at its `index`-th step (from 0) of writing or deleting local files.

    Nothing of it runs after that, as after SIGKILL. A file has none of its bytes after `open` and half before `fsync`.

    Returns:
        Whether it came so far.
    """
    child = _PROCESSES.Process(target=_segment_until, args=(index, out, archive))
    child.start()
    child.join()
    assert child.exitcode in (0, 9), f"step {index}: {child.exitcode}"
    return child.exitcode == 9


def _segment_until(index: int, out: str, archive: Listing) -> None:
    _die_at(index)
    segment(out, archive)


def _die_at(index: int) -> None:
    steps = itertools.count()

    def step(act: Callable[..., Any], *arguments: Any, before: Callable[[], Any] = int, **options: Any) -> Any:
        if next(steps) == index:
            before()
            os._exit(9)
        return act(*arguments, **options)

    def opened(*arguments: Any) -> Any:
        file = step(open, *arguments)
        step(int)
        return file

    def fsync(descriptor: int) -> None:  # none in truth: what the kernel has survives a process
        step(int, before=lambda: os.truncate(descriptor, os.fstat(descriptor).st_size // 2))

    for name in ("replace", "link", "unlink", "remove", "rmdir"):
        setattr(os, name, functools.partial(step, getattr(os, name)))
    local_files.open = opened  # type: ignore[attr-defined]
    os.fsync = fsync

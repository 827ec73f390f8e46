"""Pairs to uint8 blocks in Ray's object store, read and decoded once by all cores, and batches out of them.

Shapes: `B` batch, `H` height px, `W` width px, `C` colour, `K` classes.

A block is an Arrow table; one row a pair, bytes only, so that a worker's arrays are views into shared memory:

| column | content |
|---|---|
| `index` | place of the pair in its list |
| `image` | uint8 [height_px, width_px, C] |
| `mask` | uint8 [height_px, width_px], encoded; the frame's own size, or the network's |
| `height_px`, `width_px` | size of `image` and `mask` |
| `full_mask` | zlib of the mask in its own size, uint8 [full_height_px, full_width_px]; empty where not asked for |
| `pixels` | int64 [K]: how often each class occurs in the mask in its own size |
| `image_hash` | `splits.difference_hash` of the frame |
| `problem_uri`, `problem` | of a pair that cannot be used: which file, and why; else empty |
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from unet_ray.cluster.connection import limited
from unet_ray.cluster.tasks import data_context
from unet_ray.errors import JobFailed
from unet_ray.messages import count, say
from unet_ray.pairs.pairs import ImagePair, PairContent, PairProblem, load_pair, read_pairs
from unet_ray.pairs.splits import difference_hash
from unet_ray.pixels.images import ImageRefused, count_values, frame_size
from unet_ray.progress import Progress
from unet_ray.storage import read_many
from unet_ray.training.batches import BlockFrames, FileFrames, FrameSource, IngestPlan, at_size

BLOCK_BYTES = 16_000_000
"""Aim for a block's size: large against the 0.01 s of a task, small against a core's share of the object store."""

STORE_SHARE = 0.5
"""Blocks beyond this share of a node's object store are not kept: workers read the files again in every epoch."""

READ_TIMEOUT_S, PAIR_TIMEOUT_S = 600.0, 2.0
"""Reading is given up after the first and the second for each pair: a hundred times what a slow store needs."""

READ_RETRIES = 2
"""Times that a block is read again whose process died; Ray Data itself would go on for ever (Ray 2.60)."""

_SUMMARY = ("index", "pixels", "image_hash", "problem_uri", "problem")


@dataclass(frozen=True, kw_only=True)
class Ingested:
    """Pairs that were read, checked and found good."""

    frames: FrameSource
    """Their pixels; it may be handed to any process of the cluster."""
    pixels_NK: np.ndarray
    """Pixels of each class by pair, int64 [N, K], in the masks' own sizes."""
    hashes: dict[str, int]
    """`difference_hash` by `image_uri`."""
    kept_bytes: int
    """What the pixels take of the object store, by estimate."""


# --- reading pairs into blocks ---


def read_block(batch: dict[str, np.ndarray], plan: IngestPlan) -> pa.Table:
    """Reads the pairs of a batch of rows (`index`, `image_uri`, `mask_uri`) into a block."""
    pairs = [_pair(str(image), str(mask)) for image, mask in zip(batch["image_uri"], batch["mask_uri"], strict=True)]
    read = zip(batch["index"], pairs, read_pairs(pairs), strict=True)
    rows = [read_row(int(index), pair, plan, content) for index, pair, content in read]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


_SCHEMA = pa.schema(
    {
        "index": pa.int64(),
        "image": pa.large_binary(),
        "mask": pa.large_binary(),
        "height_px": pa.int32(),
        "width_px": pa.int32(),
        "full_mask": pa.large_binary(),
        "full_height_px": pa.int32(),
        "full_width_px": pa.int32(),
        "pixels": pa.list_(pa.int64()),
        "image_hash": pa.uint64(),
        "problem_uri": pa.string(),
        "problem": pa.string(),
    }
)


def _pair(image_uri: str, mask_uri: str) -> ImagePair:
    return ImagePair(pair_id="", image_uri=image_uri, mask_uri=mask_uri, sequence="", camera="", frame_index=None)


def read_row(index: int, pair: ImagePair, plan: IngestPlan, content: PairContent | None = None) -> dict[str, Any]:
    """Turns one pair into a block's row; a pair that cannot be used becomes a row that says why."""
    row: dict[str, Any] = {"index": index, "problem_uri": "", "problem": ""}
    row |= {"image": b"", "mask": b"", "full_mask": b"", "pixels": [], "image_hash": 0}
    row |= dict.fromkeys(("height_px", "width_px", "full_height_px", "full_width_px"), 0)
    content = content or next(read_pairs([pair]))
    try:
        image_HWC, full_mask_HW = load_pair(pair, plan.class_set, plan.mask_format, content)
    except PairProblem as problem:
        return row | {"problem_uri": problem.uri, "problem": problem.problem}
    image, mask = at_size(image_HWC, full_mask_HW, plan, content)
    row["pixels"] = count_values(full_mask_HW)[: plan.class_set.n_classes].tolist()
    row["image_hash"] = difference_hash(image_HWC)  # at its own size: the same whatever is kept of it
    row["full_height_px"], row["full_width_px"] = full_mask_HW.shape
    row["height_px"], row["width_px"] = mask.shape
    if plan.keep_pixels:
        row["image"], row["mask"] = image.tobytes(), mask.tobytes()
        if plan.keep_full_mask:
            row["full_mask"] = _pack(full_mask_HW)
    return row


def _pack(mask_HW: np.ndarray) -> bytes:
    # 480x640: 6 kB instead of 307, in 0.8 ms; a validation mask is unpacked once an epoch (2 cores, 2026-11-21).
    return zlib.compress(mask_HW.tobytes(), 1)


def ingest(pairs: Sequence[ImagePair], plan: IngestPlan, *, kept_bytes: int = 0, purpose: str = "") -> Ingested:
    """Reads, checks and keeps all pairs, on all cores of the cluster, and says so.

    Args:
        pairs: what to read.
        plan: what to keep of each pair.
        kept_bytes: what other pairs of the same run take of the object store.
        purpose: what they are for, in the line that says so.

    Raises:
        ValueError: pairs that cannot be used: how many, and the first of them.
        JobFailed: the processes that read died again and again.
        StorageError: the store did not answer.
    """
    names = tuple(pair.pair_id for pair in pairs)
    if not pairs:
        nothing = np.zeros((0, plan.class_set.n_classes), np.int64)
        return Ingested(frames=BlockFrames(names=(), blocks=()), pixels_NK=nothing, hashes={}, kept_bytes=0)
    row_bytes = _row_bytes(pairs, plan)
    n_bytes = len(pairs) * row_bytes
    fits = kept_bytes + n_bytes <= STORE_SHARE * _smallest_store_bytes()
    kept = plan if fits else dataclasses.replace(plan, keep_pixels=False)
    phase = f"reading {count(len(pairs), 'pair')}{f' {purpose}' if purpose else ''}"
    say(phase)
    with limited(phase, READ_TIMEOUT_S + PAIR_TIMEOUT_S * len(pairs)):
        blocks = _run(pairs, kept, row_bytes)
    summary = pa.concat_tables(ray.get([_summarize.remote(block) for block in blocks])).sort_by("index")
    _refuse_problems(summary)
    assert summary["index"].to_pylist() == list(range(len(pairs)))
    hashes = dict(zip((pair.image_uri for pair in pairs), summary["image_hash"].to_pylist(), strict=True))
    pixels_NK = np.array(summary["pixels"].to_pylist(), np.int64).reshape(len(pairs), plan.class_set.n_classes)
    if fits:
        frames = BlockFrames(names=names, blocks=tuple(blocks))
        return Ingested(frames=frames, pixels_NK=pixels_NK, hashes=hashes, kept_bytes=n_bytes)
    say(
        f"{count(len(pairs), 'frame')} of {row_bytes / 1e6:.1f} MB do not fit into {STORE_SHARE:.0%} of the object "
        "store: they are read and decoded again in every epoch"
    )
    files = FileFrames(names=names, pairs=tuple(pairs), plan=plan)
    return Ingested(frames=files, pixels_NK=pixels_NK, hashes=hashes, kept_bytes=0)


def _row_bytes(pairs: Sequence[ImagePair], plan: IngestPlan) -> int:
    """An estimate of a row's bytes: 4 a pixel, of the network's size or of the largest of some frames."""
    if plan.image_size is not None:
        return math.prod(plan.image_size) * 4
    uris = [pairs[index].image_uri for index in np.linspace(0, len(pairs) - 1, min(8, len(pairs))).astype(int)]
    sizes = [0]
    for content in read_many([(uri, 0, None) for uri in uris]):
        try:
            sizes += [math.prod(frame_size(content))] if isinstance(content, bytes) else []
        except ImageRefused:
            continue  # the block says so, with all other problems
    return 4 * max(sizes) or BLOCK_BYTES


def _run(pairs: Sequence[ImagePair], plan: IngestPlan, row_bytes: int) -> list[ray.ObjectRef]:
    n_cpus = int(ray.cluster_resources().get("CPU", 1))
    # Two tasks a core even out frames that take longer, more only cost their start; as many for each core.
    n_rounds = max(2, math.ceil(len(pairs) * row_bytes / BLOCK_BYTES / n_cpus))
    n_blocks = min(len(pairs), n_rounds * n_cpus)
    rows = pa.table(
        {
            "index": np.arange(len(pairs)),
            "image_uri": [pair.image_uri for pair in pairs],
            "mask_uri": [pair.mask_uri for pair in pairs],
        }
    )
    borders = np.linspace(0, len(pairs), n_blocks + 1).astype(int)
    parts = [rows.slice(start, end - start) for start, end in itertools.pairwise(borders)]
    # A table a block: cutting one in Ray (`repartition`) costs a stage of its own.
    read = partial(read_block, plan=plan)
    # All blocks are kept, so nothing is gained by handing out tasks one after the other: Ray Data would begin with one,
    # until it hears a second later what there is, and take 0.15 s from the end of each to the next (Ray 2.60).
    with data_context(raise_original_map_exception=True, op_resource_reservation_enabled=False):
        dataset = ray.data.from_arrow(parts).map_batches(
            read, batch_size=None, batch_format="numpy", max_retries=READ_RETRIES
        )
    blocks: list[ray.ObjectRef] = []
    try:
        with Progress(len(pairs), "pairs") as progress:
            for bundle in dataset.iter_internal_ref_bundles():
                blocks += bundle.block_refs
                progress.advance(bundle.num_rows() or 0)
        progress.finish()
        return blocks
    except ray.exceptions.RayTaskError as error:  # whose text is a stack trace
        raise error.cause from error
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise JobFailed(
            f"a process that reads pairs died {READ_RETRIES + 1} times ({type(error).__name__}); memory is short, or a "
            "file ends its decoder: `unet-ray check` reads them one by one"
        ) from error


@ray.remote
def _summarize(block: pa.Table) -> pa.Table:
    return block.select(_SUMMARY)


def _refuse_problems(summary: pa.Table) -> None:
    problems = [row for row in summary.select(["problem_uri", "problem"]).to_pylist() if row["problem"]]
    if problems:
        more = (
            f"; and {count(len(problems) - 1, 'other pair')} (unet-ray check lists them all)"
            if len(problems) > 1
            else ""
        )
        raise ValueError(f"{problems[0]['problem_uri']}: {problems[0]['problem']}{more}")


def _smallest_store_bytes() -> float:
    return min(node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"])


# --- pixels out of blocks, or out of the files themselves ---


# --- batches ---

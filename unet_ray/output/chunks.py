"""Chunks of a manifest: the frames that are labelled, recorded and published together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_ray import storage
from unet_ray.frames import MANIFEST_SCHEMA

CHUNK_SCHEMA = pa.schema([("chunk_id", pa.string()), ("chunk_key", pa.string()), ("shard", pa.int32())])
"""Columns of the manifest beside a frame's own."""
MAX_PIXELS = 200_000_000
"""Decoded pixels that a process holds at once (600 MB), by the frames' first sizes."""

_FILE_ROWS = 50_000
GROUP_ROWS = 1_024
"""Rows of a row group of the manifest: a chunk lies in one or two, of a file whose footer is small."""


def frames_together(n_frames: int, frame_pixels: int, max_pixels: int = MAX_PIXELS) -> int:
    """Returns how many frames a process may hold decoded, at least 1 and at most `n_frames`; 0 pixels: unknown."""
    return max(1, min(n_frames, max_pixels // frame_pixels if frame_pixels else n_frames))


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How new frames are cut into chunks and shards; frames that are planned already stay as they were cut."""

    chunk_frames: int
    """Most frames of a chunk."""
    shard_rows: int
    """Rows from which on a published file is full."""
    frame_pixels: Callable[[pa.Table], int] = lambda rows: 0
    """Finds out the pixels of a frame among new rows of the manifest, 0 where unknown."""
    max_chunk_pixels: int = MAX_PIXELS
    """Bound on the decoded pixels of a chunk."""

    def most_frames(self, frame_pixels: int) -> int:
        """Returns the most frames of a chunk, by both bounds, of frames with so many pixels (0: unknown)."""
        return frames_together(self.chunk_frames, frame_pixels, self.max_chunk_pixels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Frames of one sequence and camera that follow each other in the manifest: the unit of work and of commit."""

    chunk_id: str
    """Generation and place, `000-000012`."""
    key: str
    """Digest of its frames with their versions and of the lineage."""
    manifest_uri: str
    row_start: int
    n_rows: int
    shard: int
    """Number of the published file."""
    rows: tuple[int, ...] | None = None
    """Places within the chunk of the frames that are tried again, in order; None: all are to be done."""
    kept: str | None = None
    """Name of the file in `_work/kept/` with labels that a damaged file still had; see `salvage`."""

    @property
    def generation(self) -> str:
        """Of the plan, as it stands in the chunk's id."""
        return self.chunk_id.partition("-")[0]


def chunk_starts(rows: pa.Table, n_frames: int) -> np.ndarray:
    """Returns the first row of each chunk: where the drive or camera changes, and every `n_frames` from there."""
    drive_starts = np.zeros(len(rows), bool)
    drive_starts[0] = True
    for name in ("sequence", "camera"):
        codes = pc.dictionary_encode(rows[name].combine_chunks(), null_encoding="encode").indices.to_numpy()
        drive_starts[1:] |= codes[1:] != codes[:-1]
    positions = np.arange(len(rows))
    within = positions - np.maximum.accumulate(np.where(drive_starts, positions, 0))
    return np.flatnonzero(within % n_frames == 0)


def _fill(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the number of the shard of each chunk: a shard takes whole chunks until it has `capacity` rows."""
    shards, shard, filled = np.zeros(len(sizes), np.int64), 0, 0
    for index, size in enumerate(sizes):
        if filled >= capacity:
            shard, filled = shard + 1, 0
        shards[index], filled = shard, filled + size
    return shards


def file_spans(starts: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields first row and number of rows of each manifest file; no chunk lies in two."""
    files = _fill(sizes, _FILE_ROWS)
    for number in range(files[-1] + 1):
        chunks = np.flatnonzero(files == number)
        yield int(starts[chunks[0]]), int(sizes[chunks].sum())


def with_chunks(
    rows: pa.Table, starts: np.ndarray, sizes: np.ndarray, shards: np.ndarray, generation: int, lineage_digest: str
) -> pa.Table:
    """Returns rows of a manifest with `CHUNK_SCHEMA`'s columns: each chunk's id, key and shard."""
    keyed = [rows[name].to_pylist() for name in MANIFEST_SCHEMA.names if name not in ("sequence", "camera")]
    lines = [repr(row) for row in zip(*keyed, strict=True)]
    bounds = zip(starts, starts + sizes, strict=True)
    keys = [storage.sha256("\n".join([lineage_digest, *lines[a:b]]).encode())[:32] for a, b in bounds]
    ids = [f"{generation:03d}-{number:06d}" for number in range(len(starts))]
    columns: list[Sequence[Any] | np.ndarray] = [
        np.repeat(ids, sizes),
        np.repeat(keys, sizes),
        np.repeat(shards, sizes),
    ]
    for field, column in zip(CHUNK_SCHEMA, columns, strict=True):
        rows = rows.append_column(field, pa.array(column, field.type))
    return rows


KEY = re.compile("[0-9a-f]{32}")
"""A chunk's key; it becomes a part of file names, so nothing else is taken from a file for one."""
CHUNK_ID = re.compile(r"\d{3,}-\d{6,}")

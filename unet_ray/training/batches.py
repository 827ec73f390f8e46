"""Pixels by a pair's place in its list, out of blocks or files, and batches of them for each worker."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
import ray
import ray.data

from unet_ray.classes import IGNORED_ID, ClassSet
from unet_ray.pairs.pairs import ImagePair, PairContent, load_pair, read_pairs
from unet_ray.pixels.preprocessing import (
    DEFAULT_PREPROCESSING,
    Preprocessing,
    decode_input,
    network_input,
    network_mask,
)


@dataclass(frozen=True, kw_only=True)
class IngestPlan:
    """What a block holds of a pair."""

    class_set: ClassSet
    mask_format: str
    image_size: tuple[int, int] | None
    """Height and width to resize to; None keeps a frame's own size (augmentation crops from it)."""
    keep_full_mask: bool
    """Whether the mask is wanted in its own size too (validation)."""
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING
    """How to resize."""
    keep_pixels: bool = True
    """Whether pixels are kept at all: a block without them says whether the pairs can be used."""


class FrameSource(Protocol):
    """Pixels by a pair's place in its list."""

    @property
    def names(self) -> tuple[str, ...]:
        """The pairs' ids."""

    def open(self) -> FrameReader:
        """Returns the reader, in the process that reads."""


class FrameReader(Protocol):
    """An opened `FrameSource`."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns frame, uint8 [H, W, C], and encoded mask, uint8 [H, W]; views that nobody writes to."""

    def full_mask(self, index: int) -> np.ndarray:
        """Returns the encoded mask in its own size, uint8."""


def at_size(
    image_HWC: np.ndarray, mask_HW: np.ndarray, plan: IngestPlan, content: PairContent
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a frame and its mask as the network takes them, or as they are; `content` is what was read of them."""
    size, preprocessing = plan.image_size, plan.preprocessing
    if size is None:
        return image_HWC, mask_HW
    if preprocessing.resize == "area-dct" and isinstance(content[0], bytes):
        image_HWC = decode_input(content[0], size, preprocessing)[0]
    else:
        image_HWC = network_input(image_HWC, size, preprocessing)
    return image_HWC, network_mask(mask_HW, size, preprocessing)


@dataclass(frozen=True, kw_only=True)
class BlockFrames:
    """Frames in the object store."""

    names: tuple[str, ...]
    blocks: tuple[ray.ObjectRef, ...]

    def open(self) -> BlockReader:
        """Fetches the blocks to this node; processes of one node share them."""
        return BlockReader(ray.get(list(self.blocks)))


class BlockReader:
    """Rows of blocks, by index, without copying."""

    def __init__(self, blocks: Iterable[pa.Table]):
        self._columns = [
            {name: _one_chunk(block[name]) for name in block.column_names if name not in ("problem", "pixels")}
            for block in blocks
        ]
        self._position = {
            index: (block, row)
            for block, columns in enumerate(self._columns)
            for row, index in enumerate(columns["index"].to_pylist())
        }

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """See `FrameReader`."""
        block, row = self._position[index]
        columns = self._columns[block]
        size = columns["height_px"][row].as_py(), columns["width_px"][row].as_py()
        return _view(columns["image"][row]).reshape(*size, 3), _view(columns["mask"][row]).reshape(size)

    def full_mask(self, index: int) -> np.ndarray:
        """See `FrameReader`."""
        block, row = self._position[index]
        columns = self._columns[block]
        size = columns["full_height_px"][row].as_py(), columns["full_width_px"][row].as_py()
        return np.frombuffer(zlib.decompress(columns["full_mask"][row].as_buffer()), np.uint8).reshape(size)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies one chunk, too


def _view(value: pa.Scalar) -> np.ndarray:
    return np.frombuffer(value.as_buffer(), np.uint8)


@dataclass(frozen=True, kw_only=True)
class FileFrames:
    """Frames that are too many for the object store: read and decoded again whenever they are asked for."""

    names: tuple[str, ...]
    pairs: tuple[ImagePair, ...]
    plan: IngestPlan
    keep: bool = False
    """Whether a reader keeps what it has read: of a few frames that are asked for again and again."""

    def open(self) -> FileReader:
        """See `FrameSource`."""
        return (KeepingReader if self.keep else FileReader)(self.pairs, self.plan)


class FileReader:
    """Pairs by index, from storage."""

    def __init__(self, pairs: Sequence[ImagePair], plan: IngestPlan):
        self._pairs, self._plan = pairs, plan

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """See `FrameReader`."""
        (content,) = read_pairs([self._pairs[index]])
        return at_size(*self._load(index, content), self._plan, content)

    def full_mask(self, index: int) -> np.ndarray:
        """See `FrameReader`."""
        return self._load(index)[1]

    def _load(self, index: int, content: PairContent | None = None) -> tuple[np.ndarray, np.ndarray]:
        return load_pair(self._pairs[index], self._plan.class_set, self._plan.mask_format, content)


class KeepingReader(FileReader):
    """Pairs by index, each read from storage once."""

    def __init__(self, pairs: Sequence[ImagePair], plan: IngestPlan):
        super().__init__(pairs, plan)
        self._read: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._full_masks: dict[int, np.ndarray] = {}

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """See `FrameReader`."""
        if index not in self._read:
            self._read[index] = super().read(index)
        return self._read[index]

    def full_mask(self, index: int) -> np.ndarray:
        """See `FrameReader`."""
        if index not in self._full_masks:
            self.read(index)
        return self._full_masks[index]

    def _load(self, index: int, content: PairContent | None = None) -> tuple[np.ndarray, np.ndarray]:
        image_HWC, mask_HW = super()._load(index, content)
        self._full_masks[index] = mask_HW
        return image_HWC, mask_HW


View = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""Makes the network's view of a frame and its mask, given the frame's index: augmentation."""


def epoch_order(n_frames: int, seed: int, epoch: int, chances_N: np.ndarray | None = None) -> np.ndarray:
    """Returns the order of an epoch's frames, int64, a function of its arguments alone.

    A permutation; with the frames' chances, as many drawn with replacement.
    """
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(n_frames) if chances_N is None else rng.choice(n_frames, n_frames, p=chances_N)


def rare_class_chances(pixels_NK: np.ndarray, temperature: float) -> np.ndarray:
    """Returns each frame's chance to be drawn, float64 [N], where a class is drawn and then a frame that holds it.

    Class c has the chance exp((1 - f_c) / temperature), scaled, with f_c its share of all pixels (Hoyer et al. 2022,
    https://arxiv.org/abs/2111.14887, equation 7). A frame without a pixel that counts is never drawn.

    Args:
        pixels_NK: pixels of each class by frame.
        temperature: above 0; large ones draw all classes alike.

    Raises:
        ValueError: no frame has a pixel of any class.
    """
    frames_K = (pixels_NK > 0).sum(axis=0)
    share_K = pixels_NK.sum(axis=0)[frames_K > 0] / max(1, pixels_NK.sum())
    if not len(share_K):
        raise ValueError("--rare-class-sampling needs classes: no pixel of any was found in the training masks")
    weight_K = np.exp((share_K.min() - share_K) / temperature)
    chances_N = (pixels_NK[:, frames_K > 0] > 0) @ (weight_K / weight_K.sum() / frames_K[frames_K > 0])
    return chances_N / chances_N.sum()


def batch_slice(order: np.ndarray, batch: int, batch_size: int, rank: int, n_workers: int) -> np.ndarray:
    """Returns what one worker takes of global batch number `batch`; in a short last batch that may be nothing.

    The parts of all workers together are `order[batch * batch_size : (batch + 1) * batch_size]`, in this order.
    """
    part = rank_batch_size(batch_size, n_workers)
    whole = order[batch * batch_size : (batch + 1) * batch_size]
    return whole[rank * part : (rank + 1) * part]


def rank_batch_size(batch_size: int, n_workers: int) -> int:
    """Returns the frames of a worker's part of a batch, padding counted: the static shape of its step."""
    return math.ceil(batch_size / n_workers)


def gather(
    reader: FrameReader,
    indices: Sequence[int] | np.ndarray,
    n_frames: int,
    size: tuple[int, int],
    view: View | None = None,
    n_threads: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns frames, uint8 [n_frames, H, W, C], and masks, uint8 [n_frames, H, W]; missing ones are wholly ignored.

    Threads help where views are made: numpy lets others run meanwhile. A view of 1024x2048 at 512x1024 takes 11 ms.
    """
    image_BHWC = np.zeros((n_frames, *size, 3), np.uint8)
    mask_BHW = np.full((n_frames, *size), IGNORED_ID, np.uint8)

    def fill(slot: int) -> None:
        image, mask = reader.read(int(indices[slot]))
        image_BHWC[slot], mask_BHW[slot] = view(image, mask, int(indices[slot])) if view else (image, mask)

    if isinstance(reader, FileReader):
        n_threads = 32  # many requests in flight where the store answers late
    if n_threads > 1 and len(indices) > 1:
        with ThreadPoolExecutor(min(n_threads, len(indices))) as pool:
            list(pool.map(fill, range(len(indices))))
    else:
        for slot in range(len(indices)):
            fill(slot)
    return image_BHWC, mask_BHW


T = TypeVar("T")


def one_ahead(make: Callable[[int], T], n: int) -> Iterator[T]:
    """Yields `make(0)` to `make(n - 1)`; each is made in another thread while the one before it is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, 0)
        for number in range(1, n + 1):
            ready = coming.result()
            if number < n:
                coming = pool.submit(make, number)
            yield ready

"""What `class_statistics.parquet` says of an output, as arrays.

Shapes: `D` drives (a sequence and a camera each), `K` classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_ray import storage
from unet_ray.classes import ClassSet
from unet_ray.errors import JobFailed
from unet_ray.output import ledger, manifest
from unet_ray.output.rows import statistics_schema
from unet_ray.output.tables import UNREADABLE, read_parquet, require_columns


class Drive(NamedTuple):
    """Frames of one sequence and camera."""

    sequence: str
    camera: str

    @property
    def title(self) -> str:
        """As the page names it."""
        return " · ".join(part for part in self if part) or "(no name)"


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Counts of the labelled frames."""

    drives: tuple[Drive, ...]
    """Those with a labelled frame, in the order of the file."""
    frames_D: np.ndarray
    """Labelled frames, int64."""
    frames_with_class_DK: np.ndarray
    """Frames in which the class has a pixel, int64."""
    pixels_DK: np.ndarray
    """Pixels of the class, int64."""
    confidence_DK: np.ndarray
    """Mean over the class's pixels, float64; NaN where it has none."""

    @property
    def n_frames(self) -> int:
        """Labelled frames in all."""
        return int(self.frames_D.sum())

    @property
    def pixels_K(self) -> np.ndarray:
        """Pixels of each class."""
        return self.pixels_DK.sum(axis=0)

    @property
    def shares_K(self) -> np.ndarray:
        """Share of each class of all pixels, float64."""
        return shares(self.pixels_K[None])[0]

    @property
    def shares_DK(self) -> np.ndarray:
        """Share of each class of the pixels of each drive, float64."""
        return shares(self.pixels_DK)

    @property
    def confidence_K(self) -> np.ndarray:
        """Mean confidence over the pixels of each class, float64; NaN where none is known."""
        return self._confidence(axis=0)

    @property
    def confidence_D(self) -> np.ndarray:
        """Mean confidence over the pixels of each drive, float64; NaN where none is known."""
        return self._confidence(axis=1)

    def _confidence(self, axis: int) -> np.ndarray:
        known_DK = np.where(np.isnan(self.confidence_DK), 0, self.pixels_DK)
        sums = (np.nan_to_num(self.confidence_DK) * known_DK).sum(axis=axis)
        n_pixels = known_DK.sum(axis=axis)
        return np.divide(sums, n_pixels, out=np.full(len(n_pixels), np.nan), where=n_pixels > 0)


def shares(pixels_NK: np.ndarray) -> np.ndarray:
    """Returns the share of each class of the pixels of each row, float64; 0 where a row has none."""
    return pixels_NK / np.maximum(pixels_NK.sum(axis=1, keepdims=True), 1)


def read_statistics(out: str, class_set: ClassSet) -> Statistics:
    """Reads the statistics of an output.

    Raises:
        JobFailed: the file is damaged or gone.
        StorageError: storage did not answer.
    """
    uri = storage.join(out, ledger.STATISTICS)
    try:
        table = read_parquet(storage.read_bytes(uri))
        require_columns(table.schema, statistics_schema())
        return _arrays(table, class_set.n_classes)
    except (storage.StorageError, PermissionError):
        raise
    except UNREADABLE as error:
        what = "gone" if isinstance(error, FileNotFoundError) else f"damaged ({manifest.first_line(error)})"
        raise JobFailed(f"{uri} is {what}; unet-ray verify names all that is, then segment makes it again") from error


def _arrays(table: pa.Table, n_classes: int) -> Statistics:
    """Raises ValueError where a row is of no class."""
    codes = [table[name].combine_chunks().dictionary_encode() for name in ("sequence", "camera")]
    sequences, cameras = (code.dictionary.to_pylist() for code in codes)
    pairs = codes[0].indices.to_numpy().astype(np.int64) * max(1, len(cameras)) + codes[1].indices.to_numpy()
    values, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    order = np.argsort(first)  # of the file, which is the manifest's
    drive_of_row = np.argsort(order)[inverse]
    class_of_row = table["class_id"].to_numpy()
    if len(class_of_row) and not 0 <= class_of_row.min() <= class_of_row.max() < n_classes:
        raise ValueError("it names a class that the output does not have")
    by_name: dict[str, np.ndarray] = {}
    for name in ("frames", "frames_with_class", "pixels", "confidence"):
        dtype, empty = (np.float64, np.nan) if name == "confidence" else (np.int64, 0)
        by_name[name] = np.full((len(values), n_classes), empty, dtype)
        column = pc.fill_null(table[name], empty)
        by_name[name][drive_of_row, class_of_row] = column.to_numpy()
    return Statistics(
        drives=tuple(Drive(sequences[pair // len(cameras)], cameras[pair % len(cameras)]) for pair in values[order]),
        frames_D=by_name["frames"].max(axis=1, initial=0),
        frames_with_class_DK=by_name["frames_with_class"],
        pixels_DK=by_name["pixels"],
        confidence_DK=by_name["confidence"],
    )

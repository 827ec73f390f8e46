"""Pictures at another size by weights that are whole numbers: exact sums, rounded once, equal on every machine.

Shapes: `H`, `W` source px; `h`, `w` output px; `C` colour.

An output value is the weighted mean of source values p over rows j and columns l, each axis with weights of its own,

    floor(sum(y[i, j] * x[k, l] * p[j, l]) / (sum(y[i]) * sum(x[k])) + 1/2),

so it is the exact mean to the nearest whole number, halves up. BLAS adds the products, in floats; but every sum is a
whole number below 2^24 (float32) or 2^53 (float64), so no order of adding, number of threads or fused multiply-add can
change a bit. Weights with common divisors (1280 px to 96 px are 40 to 3) are small, and float32 does for most sizes.

ms of one core, beside Pillow 13.0 and OpenCV 5.0, which round more often (busy machine, AVX-512, 2026-11-30):

| source to output | filter | this module | Pillow | OpenCV |
|---|---|---|---|---|
| 1280x1920 to 96x128 | bilinear | 0.17 | | 0.02 |
| | bilinear-antialias | 3.9 | 7.6 | |
| | area | 2.9 | 4.2 (`BOX`, another filter) | 4.9 |
| 1280x1920 to 512x1024 | bilinear | 7.7 | | 1.0 |
| | bilinear-antialias | 8.4 | 11.9 | |
| | area | 7.7 | 8.9 (`BOX`) | 6.2 |
| 480x640 to 96x128 | bilinear | 0.11 | | 0.02 |
| | bilinear-antialias | 0.5 | 1.0 | |
| | area | 0.4 | 0.6 (`BOX`) | 0.2 |
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

Filter = Literal["bilinear", "bilinear-antialias", "area"]

_BAND = 8
"""Outputs of one product: fewer cost calls, more cost zeros among the weights."""

_CACHED_ROWS = 64
"""Rows of an output that are divided at once: so many fit into a core's cache."""

_TOTAL_BITS = 21
"""Bits of the sum of an output's weights on one axis, at most: two axes and a byte fit into a float64 exactly."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Band:
    """The weights of a few neighbouring outputs of one axis, on the samples that they need."""

    outputs: slice
    samples: slice
    weights: np.ndarray
    """Whole numbers, int64 [outputs, samples]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Axis:
    """All weights of one axis."""

    samples: np.ndarray | None
    """Those of the source that have a weight, int64; None stands for all."""
    bands: tuple[_Band, ...]
    totals: np.ndarray
    """The sum of each output's weights, int64 [outputs]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """What a picture of one size is multiplied by to become one of another."""

    rows: _Axis
    columns: _Axis
    row_products: tuple[np.ndarray, ...]
    column_products: tuple[np.ndarray, ...]
    """Those of the columns' bands, for rows of interleaved colours."""
    row_totals: np.ndarray
    """[h, 1], or [1, 1] where all are equal."""
    column_totals: np.ndarray
    """[1, w * C], or [1, 1]."""


def resample(
    image_HWC: np.ndarray,
    size: tuple[int, int],
    by: Filter,
    *,
    frame_size: tuple[int, int] | None = None,
    step: int = 1,
) -> np.ndarray:
    """A picture at another size, uint8 [h, w, C]; the picture itself where it has this size already.

    Args:
        image_HWC: uint8.
        size: (h, w).
        by: `bilinear`: the two nearest samples of each axis, with half-pixel centres; the edge is repeated.
            `bilinear-antialias`: the same tent, but as wide as an output pixel where that is wider than a sample.
            `area`: each sample by the share of the output pixel that it covers, smaller or larger.
        frame_size: (height, width) of the frame of which the picture shows every `step`-th pixel, by `area` only: each
            sample stands for `step` pixels, and the last of an axis for what is left.
        step: see `frame_size`.
    """
    frame_size = frame_size or (image_HWC.shape[0], image_HWC.shape[1])
    assert image_HWC.dtype == np.uint8 and (step == 1 or by == "area"), (image_HWC.dtype, by, step)
    assert image_HWC.shape[:2] == tuple(-(-side_px // step) for side_px in frame_size), (image_HWC.shape, frame_size)
    if frame_size == (size[0] * step, size[1] * step):
        return image_HWC
    n_colors = image_HWC.shape[2]
    plan = _plan(by, frame_size, size, step, n_colors)
    if plan.rows.samples is not None:
        image_HWC = image_HWC.take(plan.rows.samples, axis=0)
    if plan.columns.samples is not None:
        image_HWC = image_HWC.take(plan.columns.samples, axis=1)
    sums = _column_sums(_row_sums(image_HWC.reshape(len(image_HWC), -1), plan), plan)
    return _means(sums, plan).reshape(*size, n_colors)


def _row_sums(image: np.ndarray, plan: _Plan) -> np.ndarray:
    """[H, W * C] to weighted sums of rows, [h, W * C]."""
    dtype = plan.row_products[0].dtype
    sums = np.empty((len(plan.rows.totals), image.shape[1]), dtype)
    for band, product in zip(plan.rows.bands, plan.row_products, strict=True):
        np.matmul(product, image[band.samples].astype(dtype), out=sums[band.outputs])
    return sums


def _column_sums(image: np.ndarray, plan: _Plan) -> np.ndarray:
    """[h, W * C] to weighted sums of columns, [h, w * C]."""
    dtype, n_outputs = plan.column_products[0].dtype, len(plan.columns.totals)
    n_colors = plan.column_products[0].shape[1] // len(plan.columns.bands[0].weights)
    sums = np.empty((len(image), n_outputs * n_colors), dtype)
    for band, product in zip(plan.columns.bands, plan.column_products, strict=True):
        samples, outputs = (slice(n_colors * s.start, n_colors * s.stop) for s in (band.samples, band.outputs))
        np.matmul(image[:, samples].astype(dtype, copy=False), product, out=sums[:, outputs])
    return sums


def _means(sums: np.ndarray, plan: _Plan) -> np.ndarray:
    """Sums over the sums of their weights, to the nearest whole number, halves up, uint8; `sums` is written to."""
    means = np.empty(sums.shape, np.uint8)
    for start in range(0, len(sums), _CACHED_ROWS):
        rows = slice(start, start + _CACHED_ROWS)
        row_totals = plan.row_totals if len(plan.row_totals) == 1 else plan.row_totals[rows]
        denominators = row_totals * plan.column_totals
        sums[rows] += denominators / 2
        sums[rows] /= denominators
        means[rows] = sums[rows]  # positive: cut off is rounded down
    return means


@lru_cache(maxsize=32)
def _plan(by: Filter, frame_size: tuple[int, int], size: tuple[int, int], step: int, n_colors: int) -> _Plan:
    rows, columns = (_axis(by, *sides, step) for sides in zip(frame_size, size, strict=True))
    row_total, column_total = int(rows.totals.max()), int(columns.totals.max())
    row_dtype = np.float32 if 255 * row_total < 2**24 else np.float64
    # A quotient of float32 rounds to the right side of a whole number while 1 / (2 * denominator) > 2^-17.
    dtype = np.float32 if row_total * column_total <= 2**15 else np.float64
    every_color = np.eye(n_colors, dtype=dtype)
    return _Plan(
        rows=rows,
        columns=columns,
        row_products=tuple(band.weights.astype(row_dtype) for band in rows.bands),
        column_products=tuple(np.kron(band.weights.T.astype(dtype), every_color) for band in columns.bands),
        row_totals=_one_or_all(rows.totals).astype(dtype)[:, None],
        column_totals=_one_or_all(columns.totals.repeat(n_colors)).astype(dtype)[None, :],
    )


def _one_or_all(totals: np.ndarray) -> np.ndarray:
    return totals[:1] if np.ptp(totals) == 0 else totals


def _axis(by: Filter, frame_px: int, out_px: int, step: int) -> _Axis:
    """The weights of one axis of a frame."""
    first, stop = _reach(by, frame_px, out_px, step)
    is_used = np.zeros(-(-frame_px // step) + 1, np.int64)
    np.add.at(is_used, first, 1)
    np.add.at(is_used, stop, -1)
    used = np.flatnonzero(is_used.cumsum() > 0)
    bands = tuple(_bands(by, frame_px, out_px, step, used))
    return _Axis(
        samples=None if len(used) == -(-frame_px // step) else used,
        bands=bands,
        totals=np.concatenate([band.weights.sum(axis=1) for band in bands]),
    )


def _bands(by: Filter, frame_px: int, out_px: int, step: int, used: np.ndarray) -> Iterator[_Band]:
    first, stop = _reach(by, frame_px, out_px, step)
    for start in range(0, out_px, _BAND):
        outputs = slice(start, min(start + _BAND, out_px))
        samples = slice(*np.searchsorted(used, (first[outputs][0], stop[outputs][-1])).tolist())
        weights = _weights(by, frame_px, out_px, step, np.arange(out_px)[outputs, None], used[samples])
        yield _Band(outputs=outputs, samples=samples, weights=weights)


def _reach(by: Filter, frame_px: int, out_px: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """First sample with a weight, and the one behind the last, of each output."""
    outputs = np.arange(out_px)
    if by == "area":
        return outputs * frame_px // (out_px * step), -(-(outputs + 1) * frame_px // (out_px * step))
    reach_px = _half_width(by, frame_px, out_px)
    centers = (2 * outputs + 1) * frame_px - out_px
    first = (centers - 2 * reach_px) // (2 * out_px) + 1
    stop = -(-(centers + 2 * reach_px) // (2 * out_px))
    return np.maximum(first, 0), np.minimum(stop, frame_px)


def _half_width(by: Filter, frame_px: int, out_px: int) -> int:
    """Half the width of the tent, in parts of which a sample has `out_px`."""
    return max(frame_px, out_px) if by == "bilinear-antialias" else out_px


def _weights(by: Filter, frame_px: int, out_px: int, step: int, outputs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Weights of samples, int64 [samples], in outputs, int64 [outputs, 1]; an output has `frame_px` parts."""
    divisor = math.gcd(frame_px, out_px)
    n_in, n_out = frame_px // divisor, out_px // divisor
    if by == "area":
        ends = np.minimum((samples + 1) * step, frame_px)
        overlaps = np.minimum((outputs + 1) * n_in, ends * n_out) - np.maximum(outputs * n_in, samples * step * n_out)
        weights, most = np.maximum(overlaps, 0), n_in
    else:
        half_width = _half_width(by, n_in, n_out)
        distances = np.abs((2 * samples + 1) * n_out - (2 * outputs + 1) * n_in)
        weights = np.maximum(2 * half_width - distances, 0)
        most = 2 * half_width * (half_width // n_out + 2)
    surplus_bits = max(0, most.bit_length() - _TOTAL_BITS)  # a side of 16,000 px to one of 120, say
    return np.maximum(weights >> surplus_bits, weights > 0)

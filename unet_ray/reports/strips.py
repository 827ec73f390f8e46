"""A drive over time: the share of each class and the confidence, frame after frame, in a strip.

Shapes: `B` bins of frames that follow each other, `N` frames, `K` classes, `H` height px, `W` width px.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from unet_ray.classes import ClassSet

MAX_BINS = 240
"""A screen shows no more columns of a drive; a longer one has several frames in a bin."""

HEIGHT_PX = 64
_EMPTY = 255  # of no class, and see-through


class Strip:
    """Sums of one drive's frames by bins, as they come."""

    def __init__(self, n_frames: int, n_classes: int) -> None:
        """Makes a strip of a drive with so many labelled frames."""
        self.n_frames = n_frames
        n_bins = max(1, min(MAX_BINS, n_frames))
        self.shares_BK = np.zeros((n_bins, n_classes))
        self.frames_B = np.zeros(n_bins, np.int64)
        self.confidence_B = np.zeros(n_bins)
        """Sum over the frames that have one."""
        self.confident_B = np.zeros(n_bins, np.int64)
        """How many those are."""
        self.rejected_B = np.zeros(n_bins, np.int64)
        self._n_labelled = 0

    def add(self, labelled_N: np.ndarray, shares_NK: np.ndarray, confidence_N: np.ndarray) -> None:
        """Adds the next frames of the drive.

        Args:
            labelled_N: which of them have a label.
            shares_NK: of each class in a frame's pixels.
            confidence_N: of the frames, NaN where there is none.
        """
        ranks_N = self._n_labelled + np.cumsum(labelled_N) - labelled_N
        bins_N = np.minimum(ranks_N * len(self.frames_B) // max(1, self.n_frames), len(self.frames_B) - 1)
        np.add.at(self.rejected_B, bins_N[~labelled_N], 1)
        np.add.at(self.frames_B, bins_N[labelled_N], 1)
        np.add.at(self.shares_BK, bins_N[labelled_N], shares_NK[labelled_N])
        known_N = labelled_N & ~np.isnan(confidence_N)
        np.add.at(self.confidence_B, bins_N[known_N], confidence_N[known_N])
        np.add.at(self.confident_B, bins_N[known_N], 1)
        self._n_labelled += int(labelled_N.sum())

    @property
    def mean_shares_BK(self) -> np.ndarray:
        """Mean over a bin's frames."""
        return self.shares_BK / np.maximum(self.frames_B, 1)[:, None]

    @property
    def mean_confidence_B(self) -> np.ndarray:
        """Mean over a bin's frames, NaN where none has one."""
        return np.divide(
            self.confidence_B, self.confident_B, out=np.full(len(self.confident_B), np.nan), where=self.confident_B > 0
        )


def strip_png(strip: Strip, class_set: ClassSet, order: Sequence[int]) -> bytes:
    """Returns the shares of a strip as a PNG, a column a bin; what has no frame is see-through.

    Args:
        strip: of one drive.
        class_set: gives the colours.
        order: the classes as they are stacked, from the bottom up.
    """
    stacked_BK = strip.mean_shares_BK[:, list(order)]
    edges_BK = np.rint(np.cumsum(stacked_BK, axis=1) * HEIGHT_PX).astype(np.int64)
    index_HB = np.full((HEIGHT_PX, len(stacked_BK)), _EMPTY, np.uint8)
    levels_H = np.arange(HEIGHT_PX)[::-1, None]
    for position in range(len(order) - 1, -1, -1):
        index_HB[levels_H < edges_BK[None, :, position]] = order[position]
    palette = bytearray(768)
    palette[: 3 * class_set.n_classes] = bytes(part for item in class_set.classes for part in item.color)
    image = Image.fromarray(index_HB)
    image.putpalette(bytes(palette))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, transparency=_EMPTY)
    return buffer.getvalue()


LINE_WIDTH, LINE_HEIGHT = 1000, 100
"""Of the drawing that the points of `line_points` lie in."""


def line_points(values_B: np.ndarray, low: float) -> list[str]:
    """Returns a line through values from `low` to 1 as points of SVG polylines; NaN parts it."""
    lines: list[list[str]] = [[]]
    width = LINE_WIDTH / len(values_B)
    for index, value in enumerate(values_B.tolist()):
        if np.isnan(value):
            lines.append([])
            continue
        y = LINE_HEIGHT * (1 - (min(max(value, low), 1) - low) / (1 - low))
        # A point at each end of the bin: a bin alone is a line too.
        lines[-1] += [f"{index * width:.0f},{y:.0f}", f"{(index + 1) * width:.0f},{y:.0f}"]
    return [" ".join(points) for points in lines if points]


def lowest(values: Sequence[np.ndarray]) -> float:
    """Returns the foot of a scale for some lines: a tenth below all of their values, 0.9 at most."""
    smallest = min((float(np.nanmin(line)) for line in values if not np.isnan(line).all()), default=1.0)
    return max(0.0, min(0.9, np.floor(smallest * 10) / 10))

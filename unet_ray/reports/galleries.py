"""Which frames the galleries show, by the columns alone.

Shapes: `N` frames, `R` rare classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from unet_ray.reports.frame_facts import FrameFacts

_APART = (30, 10, 3, 1)
"""Frames between two of one drive in a gallery, as many as the output has room for: neighbours look alike."""

RARE_SHARE = 0.05
"""A class with more of the pixels is none that is hard to find."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A frame of a gallery."""

    row: int
    """Its place among all rows."""
    rare: int | None = None
    """Place of the rare class that it is chosen for."""


def rare_classes(pixels_K: np.ndarray, n_classes: int) -> list[int]:
    """Returns up to `n_classes` classes with the fewest pixels, the rarest first; none that has over 5% or nothing."""
    shares_K = pixels_K / max(1, int(pixels_K.sum()))
    candidates = np.flatnonzero((pixels_K > 0) & (shares_K <= RARE_SHARE))
    return candidates[np.argsort(pixels_K[candidates], kind="stable")][:n_classes].tolist()


def largest(values_N: np.ndarray, drive_N: np.ndarray, n_frames: int, *, each_drive: int | None = None) -> list[int]:
    """Returns the rows with the largest values, that are no close neighbours of each other; NaN is none.

    Args:
        values_N: a number of each frame.
        drive_N: its drive.
        n_frames: how many.
        each_drive: most frames of one drive, as long as others have some.
    """
    known = np.flatnonzero(~np.isnan(values_N))
    order = known[np.argsort(-values_N[known], kind="stable")]
    chosen: list[int] = []
    for apart in _APART:
        for most in dict.fromkeys((each_drive or n_frames, n_frames)):
            chosen = _add(chosen, order.tolist(), drive_N, n_frames, apart, most)
    return sorted(chosen, key=lambda row: -values_N[row])


def _add(
    chosen: Sequence[int], order: Iterable[int], drive_N: np.ndarray, n_frames: int, apart: int, most: int
) -> list[int]:
    chosen = list(chosen)
    of_drive = Counter(int(drive_N[row]) for row in chosen)
    for row in order:
        if len(chosen) >= n_frames:
            break
        drive = int(drive_N[row])
        if of_drive[drive] < most and all(drive_N[other] != drive or abs(other - row) >= apart for other in chosen):
            chosen.append(row)
            of_drive[drive] += 1
    return chosen


def typical(facts: FrameFacts, n_frames: int) -> list[int]:
    """Returns the rows whose class shares are nearest to those of all frames, of as many drives as there are."""
    n_drives = len(np.unique(facts.drive_N[~np.isnan(facts.unlikeness_N)]))
    each_drive = -(-n_frames // max(1, n_drives))
    return largest(-facts.unlikeness_N, facts.drive_N, n_frames, each_drive=each_drive)


def with_rare_classes(facts: FrameFacts, n_frames: int) -> list[Chosen]:
    """Returns the rows with most pixels of each rare class, class after class in turn."""
    n_rare = facts.rare_NR.shape[1]
    of_class = [
        [row for row in largest(facts.rare_NR[:, rare], facts.drive_N, n_frames) if facts.rare_NR[row, rare] > 0]
        for rare in range(n_rare)
    ]
    chosen: dict[int, Chosen] = {}
    for _ in range(n_frames):
        for rare, rows in enumerate(of_class):
            row = next((row for row in rows if row not in chosen), None)
            if row is not None and len(chosen) < n_frames:
                chosen[row] = Chosen(row=row, rare=rare)
    return sorted(chosen.values(), key=lambda frame: frame.rare or 0)

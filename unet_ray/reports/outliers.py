"""Drives whose classes or confidence differ from those of most drives.

Shapes: `D` drives, `K` classes.

A value is an outlier where its modified z-score, 0.6745 * (value - median) / MAD, is above 3.5 or below -3.5 (Iglewicz
and Hoaglin 1993, How to detect and handle outliers). MAD is the median distance from the median, at least
`SMALLEST_MAD`: where most drives have nothing of a class, each trace of it would count. So would 1% beside 0.2%;
therefore the difference has to be `SMALLEST_DIFFERENCE` at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LARGEST_SCORE = 3.5
SMALLEST_MAD = 0.005
SMALLEST_DIFFERENCE = 0.02
MIN_DRIVES = 5
"""Fewer have no median to speak of."""
MIN_FRAMES = 10
"""The mean of fewer frames says little of a drive."""

RULE = (
    f"A drive of {MIN_FRAMES} frames or more is marked where a class's share, or its mean confidence, lies more than "
    f"{LARGEST_SCORE} robust standard deviations and {100 * SMALLEST_DIFFERENCE:.0f} percentage points away from the "
    "median of all drives. A robust standard deviation is 1.4826 times the median distance from the median, at least "
    f"that of {SMALLEST_MAD:.1%}."
)
TOO_FEW = f"Drives are compared with each other where there are {MIN_DRIVES} or more."


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """One value of a drive that is far from those of most drives."""

    what: str
    """A class's name, or `confidence`."""
    value: float
    median: float
    score: float
    """The modified z-score."""


def find_outliers(
    shares_DK: np.ndarray, confidence_D: np.ndarray, frames_D: np.ndarray, names: Sequence[str]
) -> dict[int, list[Outlier]]:
    """Returns the outliers of each drive that has any; of drives and outliers the most extreme first.

    Args:
        shares_DK: share of each class of a drive's pixels.
        confidence_D: mean confidence of a drive's frames, NaN where there is none.
        frames_D: labelled frames of a drive.
        names: of the classes.
    """
    outliers: dict[int, list[Outlier]] = {}
    if len(shares_DK) < MIN_DRIVES:
        return outliers
    for what, values_D in zip((*names, "confidence"), (*shares_DK.T, confidence_D), strict=True):
        if np.isnan(values_D).all():
            continue
        median = float(np.nanmedian(values_D))
        mad = max(float(np.nanmedian(np.abs(values_D - median))), SMALLEST_MAD)
        scores_D = np.nan_to_num(0.6745 * (values_D - median) / mad)
        far_D = (np.abs(scores_D) > LARGEST_SCORE) & (np.abs(values_D - median) >= SMALLEST_DIFFERENCE)
        far_D &= frames_D >= MIN_FRAMES
        for drive in np.flatnonzero(far_D).tolist():
            outlier = Outlier(what=what, value=float(values_D[drive]), median=median, score=float(scores_D[drive]))
            outliers.setdefault(drive, []).append(outlier)
    ranked = {drive: sorted(of, key=lambda outlier: -abs(outlier.score)) for drive, of in outliers.items()}
    return dict(sorted(ranked.items(), key=lambda item: -abs(item[1][0].score)))

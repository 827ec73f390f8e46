"""Calibration: the temperature of a model's probabilities, how far its confidence is off, and of which frames.

Shapes: `T` temperatures that are tried, `M` bins of confidence, `P` pixels, `N` frames.

A network's largest probability is mostly higher than the share of pixels that are right. Probabilities are therefore
softmax(logits / temperature), with one temperature for the model: that of the smallest negative log likelihood over the
valid pixels of validation frames. No label changes. From Guo et al. 2017, On Calibration of Modern Neural Networks,
section 4.2, https://arxiv.org/abs/1706.04599.

All counts are integers, so that no order of adding, and no number of workers, changes a result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LARGEST_TEMPERATURE = 8.0
"""What is tried goes from 1 / this to this."""
N_TEMPERATURES = 41
TEMPERATURES_T = LARGEST_TEMPERATURE ** np.linspace(-1, 1, N_TEMPERATURES)
"""Steps of 11%, and 1 is one of them."""
UNIT = 2.0**-20
"""Of a pixel's negative log likelihood, where it is summed as an integer."""
N_BINS = 15
"""As in Guo et al. 2017."""
CONFIDENCE_UNIT = 2.0**-24
"""Of a pixel's confidence, where it is summed as an integer."""
MIN_FRAMES = 3
"""For a correlation: two frames always correlate perfectly."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was fitted on the validation frames."""

    temperature: float
    error_before: float
    """Expected calibration error at temperature 1."""
    error_after: float
    """The same at the temperature."""


def fit_temperature(units_T: np.ndarray) -> float:
    """Find the temperature of the smallest negative log likelihood, by its sums at each of `TEMPERATURES_T`.

    It is the lowest point of the parabola in log temperature through the three best sums. A smallest sum at an end of
    what is tried stands as it is; see `at_end`.

    Args:
        units_T: int64, in units of `UNIT`.

    Returns:
        The temperature, rounded to six decimals, `1 / LARGEST_TEMPERATURE` to `LARGEST_TEMPERATURE`.
    """
    best = int(np.argmin(units_T))
    if best in (0, N_TEMPERATURES - 1):
        return float(TEMPERATURES_T[best])
    below, middle, above = (int(units) for units in units_T[best - 1 : best + 2])
    curvature = below - 2 * middle + above
    steps = (below - above) / (2 * curvature) if curvature else 0.0
    step = 2 * math.log(LARGEST_TEMPERATURE) / (N_TEMPERATURES - 1)
    return round(float(TEMPERATURES_T[best]) * math.exp(steps * step), 6)


def at_end(temperature: float) -> bool:
    """Returns whether a fitted temperature is an end of what was tried: the best one may lie beyond."""
    return temperature in (TEMPERATURES_T[0], TEMPERATURES_T[-1])


# --- calibration error ---


def reliability(confidence_P: np.ndarray, correct_P: np.ndarray) -> np.ndarray:
    """Count pixels by their confidence; counts of several frames are added before anything is read from them.

    Args:
        confidence_P: the largest probability of each valid pixel, float, above 0 and at most 1.
        correct_P: whether the class of that probability is the true one, bool.

    Returns:
        int64 `[M, 3]`: pixels, correct pixels and the sum of confidences in units of `CONFIDENCE_UNIT`, for each bin;
        bin m is above m / M and at most (m + 1) / M.
    """
    bins_P = np.clip(np.ceil(confidence_P * N_BINS).astype(np.int64) - 1, 0, N_BINS - 1)
    units_P = np.rint(confidence_P.astype(np.float64) / CONFIDENCE_UNIT)
    columns = [np.bincount(bins_P, weights, N_BINS) for weights in (None, correct_P, units_P)]  # exact below 2^53
    return np.stack(columns, axis=1).astype(np.int64)


def calibration_error(counts_M3: np.ndarray) -> float | None:
    """Read the expected calibration error from summed `reliability`; None where no pixel was counted.

    It is the sum over the bins of (pixels of the bin / all pixels) x |share of correct pixels - mean confidence|:
    equation 3 of Guo et al. 2017, https://arxiv.org/abs/1706.04599, with 15 bins of equal width.
    """
    n_pixels = int(counts_M3[:, 0].sum())
    if not n_pixels:
        return None
    gaps_M = counts_M3[:, 1] - counts_M3[:, 2] * CONFIDENCE_UNIT
    return float(np.abs(gaps_M).sum() / n_pixels)


def error_metrics(before: float | None, after: float | None) -> dict[str, float | None]:
    """Returns the two expected calibration errors as `metrics.json` names them."""
    return {"val/expected_calibration_error/before": before, "val/expected_calibration_error/after": after}


# --- errors of frames ---


def correlation(expected_N: np.ndarray, true_N: np.ndarray) -> float | None:
    """Compute Pearson's correlation; None for fewer than `MIN_FRAMES` values, or where all of one side are equal."""
    if len(expected_N) < MIN_FRAMES or np.ptp(expected_N) == 0 or np.ptp(true_N) == 0:
        return None
    return float(np.corrcoef(expected_N, true_N)[0, 1])


def rank_correlation(expected_N: np.ndarray, true_N: np.ndarray) -> float | None:
    """Compute Spearman's rank correlation: Pearson's of the ranks; equal values share the mean of their ranks."""
    return correlation(_ranks(expected_N), _ranks(true_N))


def _ranks(values_N: np.ndarray) -> np.ndarray:
    _, inverse_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse_N]

"""Temperature, calibration error and correlations against naive loops and models whose calibration is known."""

import numpy as np
import pytest

from unet_ray.model.calibration import (
    LARGEST_TEMPERATURE,
    TEMPERATURES_T,
    at_end,
    calibration_error,
    correlation,
    fit_temperature,
    rank_correlation,
    reliability,
)
from unet_ray.training.calibrator import Calibrator, likelihood_units

UNIT = 2.0**-20


def calibrated(seed: int, n_frames: int = 3, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [3, 40, 56, 5] and masks that are drawn from their softmax: a model that is calibrated."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (n_frames, 40, 56, 5)).astype(np.float32)
    # The largest of logits plus Gumbel noise is drawn from the softmax.
    mask = (logits + rng.gumbel(size=logits.shape)).argmax(-1).astype(np.uint8)
    return logits, mask


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    shares = np.exp((logits.astype(np.float64) - logits.max(-1, keepdims=True)) / temperature)
    return shares / shares.sum(-1, keepdims=True)


def naive_error(logits: np.ndarray, mask: np.ndarray, temperature: float) -> float:
    """Pixel by pixel, as in the paper."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for shares, label in zip(softmax(logits, temperature).reshape(-1, 5), mask.ravel(), strict=True):
        if label != 255:
            confidence = float(np.float32(shares.max()))
            m = next(m for m in range(15) if confidence <= (m + 1) / 15 or m == 14)
            bins[m].append((confidence, bool(shares.argmax() == label)))
    n_pixels = sum(len(pixels) for pixels in bins)
    return sum(
        len(pixels) / n_pixels * abs(np.mean([hit for _, hit in pixels]) - np.mean([conf for conf, _ in pixels]))
        for pixels in bins
        if pixels
    )


@pytest.mark.parametrize("factor", [3.0, 1.0, 0.4])
def test_the_temperature_of_a_calibrated_model_whose_logits_were_multiplied_is_that_factor(factor):
    logits, mask = calibrated(1)
    units_T = likelihood_units(factor * logits, mask).numpy()
    temperature = fit_temperature(units_T)
    assert temperature == pytest.approx(factor, rel=0.05) and not at_end(temperature)
    assert temperature == round(temperature, 6)


def test_likelihoods_are_those_of_a_naive_loop_over_valid_pixels():
    logits, mask = calibrated(2, n_frames=2)
    mask[0, :7] = 255
    units_T = likelihood_units(logits, mask).numpy()
    assert units_T.dtype == np.int64 and units_T.shape == (41,) and TEMPERATURES_T[20] == 1
    for index in (0, 13, 20, 40):
        shares = softmax(logits, TEMPERATURES_T[index])
        expected = -sum(
            np.log(shares[b, y, x, mask[b, y, x]]) for b, y, x in np.ndindex(mask.shape) if mask[b, y, x] != 255
        )
        assert units_T[index] * UNIT == pytest.approx(expected, rel=1e-5)


def test_sums_are_equal_to_the_bit_however_frames_are_shared_out():
    logits, mask = calibrated(3, n_frames=5)
    mask[4] = 255  # padding
    whole_T = likelihood_units(logits, mask).numpy()
    parts_T = sum(likelihood_units(logits[part], mask[part]).numpy() for part in (slice(3), slice(3, 5)))
    np.testing.assert_array_equal(whole_T, parts_T)
    one, two, three = (Calibrator((1.0, 2.5)) for _ in range(3))
    predicted = logits.argmax(-1).astype(np.uint8)
    one.add(logits, mask, predicted)
    two.add(logits[:2], mask[:2], predicted[:2])
    three.add(logits[2:], mask[2:], predicted[2:])
    np.testing.assert_array_equal(one.counts_TM3, two.counts_TM3 + three.counts_TM3)
    assert one.expected_errors == two.expected_errors + three.expected_errors and len(one.expected_errors) == 4


def test_the_smallest_sum_between_two_steps_is_that_of_a_parabola():
    log_T = np.log(TEMPERATURES_T)
    units_T = np.rint(1e12 * (1 + (log_T - np.log(1.9)) ** 2)).astype(np.int64)
    assert fit_temperature(units_T) == pytest.approx(1.9, abs=2e-6)
    assert fit_temperature(np.zeros(41, np.int64) + (np.arange(41) != 7)) == round(TEMPERATURES_T[7], 6)


@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_a_temperature_beyond_what_is_tried_is_its_end(factor):
    logits, mask = calibrated(4)
    temperature = fit_temperature(likelihood_units(factor * logits, mask).numpy())
    assert temperature == (LARGEST_TEMPERATURE if factor > 1 else 1 / LARGEST_TEMPERATURE) and at_end(temperature)


def test_the_calibration_error_is_that_of_a_naive_loop():
    logits, mask = calibrated(5)
    mask[1, 3:9] = 255
    logits *= 3
    calibrator = Calibrator((1.0, 3.0))
    calibrator.add(logits, mask, logits.argmax(-1).astype(np.uint8))
    before, after = (calibration_error(counts) for counts in calibrator.counts_TM3)
    assert before == pytest.approx(naive_error(logits, mask, 1.0), abs=1e-4)
    assert after == pytest.approx(naive_error(logits, mask, 3.0), abs=1e-4)
    assert after is not None and before is not None and after < 0.03 < 0.1 < before
    metrics = calibrator.metrics()
    assert metrics["val/expected_calibration_error/before"] == before
    assert metrics["val/expected_calibration_error/after"] == after


def test_pixels_are_counted_in_the_bin_of_their_confidence():
    confidence = np.array([1.0, 0.5, 0.2, 0.05, 1 / 15], np.float64)
    counts = reliability(confidence, np.array([True, False, True, True, False]))
    expected = {14: (1, 1, 1.0), 7: (1, 0, 0.5), 2: (1, 1, 0.2), 0: (2, 1, 0.05 + 1 / 15)}  # above m/15, to (m+1)/15
    for m in range(15):
        pixels, correct, total = expected.get(m, (0, 0, 0.0))
        assert counts[m, :2].tolist() == [pixels, correct] and counts[m, 2] * 2.0**-24 == pytest.approx(total, abs=1e-6)
    by_hand = (0 + 0.5 + 0.8 + abs(1 - 0.05 - 1 / 15)) / 5
    assert calibration_error(counts) == pytest.approx(by_hand, abs=1e-6)
    assert calibration_error(np.zeros((15, 3), np.int64)) is None


def test_errors_of_frames_are_over_valid_pixels_at_the_last_temperature():
    logits, mask = calibrated(6)
    mask[0, :, 20:], mask[2] = 255, 255
    calibrator = Calibrator((1.0, 2.0))
    calibrator.add(logits, mask, logits.argmax(-1).astype(np.uint8))
    largest = softmax(logits, 2.0).max(-1)
    expected = [1 - largest[0, :, :20].mean(), 1 - largest[1].mean()]
    np.testing.assert_allclose(calibrator.expected_errors, expected, rtol=1e-5)
    wrong = [np.mean(logits[0, :, :20].argmax(-1) != mask[0, :, :20]), np.mean(logits[1].argmax(-1) != mask[1])]
    np.testing.assert_allclose(calibrator.true_errors, wrong)
    assert calibrator.metrics()["val/error_correlation/pearson"] is None  # of two frames


def test_correlations_by_hand():
    one, other = np.array([1.0, 2.0, 3.0, 10.0]), np.array([2.0, 2.0, 5.0, 1.0])
    assert correlation(one, other) == pytest.approx(-9 / np.sqrt(50 * 9), abs=1e-9)
    # Ranks 1, 2, 3, 4 and 2.5, 2.5, 4, 1.
    assert rank_correlation(one, other) == pytest.approx(-1.5 / np.sqrt(5 * 4.5), abs=1e-9)
    assert correlation(one[:2], other[:2]) is None and correlation(one, np.full(4, 0.5)) is None

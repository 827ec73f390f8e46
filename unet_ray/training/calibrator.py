"""How sure a network is, and how often it is right: what a temperature is fitted on, and what is reported of it.

Shapes: `B` batch, `H` height px, `W` width px, `K` classes, `T` temperatures that are tried, `M` bins of confidence,
`N` frames. All is counted over valid pixels, at the network's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from unet_ray.classes import IGNORED_ID
from unet_ray.model import calibration
from unet_ray.model.calibration import N_BINS, N_TEMPERATURES, TEMPERATURES_T, UNIT, Calibration

if TYPE_CHECKING:
    from unet_ray.training.evaluator import Evaluator, Predicted


def calibrate(
    evaluator: Evaluator, indices: Sequence[int], add_up: Callable[[np.ndarray], np.ndarray]
) -> Calibration | None:
    """Fits the temperature of a network on the frames of all workers, by two passes over them.

    Once, when a training ends, not in every validation: the likelihoods of a frame take as long as the network, 30 and
    32 ms of a core (16 filters, 4 levels, 23 classes, 96x128, 2026-11-30, AMD EPYC with AVX2, 2 cores, beside other
    work).

    Args:
        evaluator: the network and the frames.
        indices: this worker's frames.
        add_up: returns the sum of an array over all workers, each of which calls it equally often.

    Returns:
        The same on all workers; None where no pixel is valid.
    """
    units_T = np.zeros(N_TEMPERATURES, np.int64)
    for batch in evaluator.predictions(indices):
        units_T += likelihood_units(batch.logits, batch.mask_BHW).numpy()
    temperature = calibration.fit_temperature(add_up(units_T))
    calibrator = Calibrator((1.0, temperature))
    for batch in evaluator.predictions(indices):
        calibrator.add_batch(batch)
    before, after = (calibration.calibration_error(counts_M3) for counts_M3 in add_up(calibrator.counts_TM3))
    if before is None or after is None:
        return None
    return Calibration(temperature=temperature, error_before=before, error_after=after)


@tf.function(autograph=False)
def likelihood_units(logits_BHWK: tf.Tensor, mask_BHW: tf.Tensor) -> tf.Tensor:
    """Sums the negative log likelihood of the true classes at each of `TEMPERATURES_T`.

    Args:
        logits_BHWK: float32.
        mask_BHW: integer ids 0 to K-1, or `IGNORED_ID`.

    Returns:
        int64 `[T]`, in units of `UNIT`; each pixel is rounded before the sum, so that no order of adding changes it.
    """
    valid_BHW = tf.not_equal(mask_BHW, IGNORED_ID)
    label_BHW = tf.where(valid_BHW, tf.cast(mask_BHW, tf.int32), 0)
    below_BHWK = logits_BHWK - tf.reduce_max(logits_BHWK, axis=-1, keepdims=True)
    true_BHW = tf.gather(below_BHWK, label_BHW, batch_dims=3)

    def units(inverse: tf.Tensor) -> tf.Tensor:
        likelihood_BHW = inverse * true_BHW - tf.math.log(tf.reduce_sum(tf.exp(inverse * below_BHWK), axis=-1))
        units_BHW = tf.where(valid_BHW, tf.round(likelihood_BHW / -UNIT), 0.0)
        return tf.reduce_sum(tf.cast(units_BHW, tf.int64))

    inverses_T = tf.constant(1 / TEMPERATURES_T, tf.float32)
    # One after the other: together they would need the memory of the logits so many times.
    return tf.map_fn(units, inverses_T, fn_output_signature=tf.int64, parallel_iterations=1)


@tf.function(autograph=False)
def _confidence(logits_BHWK: tf.Tensor, temperature: tf.Tensor) -> tf.Tensor:
    """The largest probability of each pixel, float32 [B, H, W]."""
    below_BHWK = logits_BHWK - tf.reduce_max(logits_BHWK, axis=-1, keepdims=True)
    return 1 / tf.reduce_sum(tf.exp(below_BHWK / temperature), axis=-1)


class Calibrator:
    """Counts over batches of frames; those of other frames are added to `counts_TM3`.

    Attributes:
        counts_TM3: `calibration.reliability` at each of the temperatures that it was made with, int64.
        expected_errors: a value a frame with a valid pixel: 1 - mean confidence at the last temperature.
        true_errors: of the same frames, the share of pixels that are wrong.
    """

    def __init__(self, temperatures: Sequence[float]):
        self._temperatures = temperatures
        self.counts_TM3 = np.zeros((len(temperatures), N_BINS, 3), np.int64)
        self.expected_errors: list[float] = []
        self.true_errors: list[float] = []

    def add_batch(self, batch: Predicted) -> None:
        """Counts a batch; of a network that gives class ids there is nothing to count."""
        if batch.model_size_logits is not None:
            self.add(batch.model_size_logits, batch.mask_BHW, batch.predicted_BHW)

    def add(self, logits_BHWK: Any, mask_BHW: np.ndarray, predicted_BHW: np.ndarray) -> None:
        """Counts a batch; frames that are ignored wholly, such as padding, count nowhere.

        Args:
            logits_BHWK: float32, of the mask's size.
            mask_BHW: uint8, the true ids.
            predicted_BHW: uint8, the classes of the largest logits.
        """
        valid_BHW = mask_BHW != IGNORED_ID
        correct_BHW = predicted_BHW == mask_BHW
        confidence_BHW = np.zeros(mask_BHW.shape, np.float32)
        for number, temperature in enumerate(self._temperatures):
            confidence_BHW = _confidence(logits_BHWK, tf.constant(temperature, tf.float32)).numpy()
            self.counts_TM3[number] += calibration.reliability(confidence_BHW[valid_BHW], correct_BHW[valid_BHW])
        for valid_HW, confidence_HW, correct_HW in zip(valid_BHW, confidence_BHW, correct_BHW, strict=True):
            if valid_HW.any():
                self.expected_errors.append(1 - float(confidence_HW[valid_HW].mean(dtype=np.float64)))
                self.true_errors.append(1 - float(correct_HW[valid_HW].mean()))

    def metrics(self) -> dict[str, Any]:
        """Returns `val/expected_calibration_error/before` (first temperature) and `after` (the last), and
        `val/error_correlation/pearson` and `spearman` of the frames' errors; None where undefined."""
        expected_N, true_N = np.array(self.expected_errors), np.array(self.true_errors)
        before, after = (calibration.calibration_error(counts_M3) for counts_M3 in self.counts_TM3[[0, -1]])
        return calibration.error_metrics(before, after) | {
            "val/error_correlation/pearson": calibration.correlation(expected_N, true_N),
            "val/error_correlation/spearman": calibration.rank_correlation(expected_N, true_N),
        }

"""What training minimises, as sums over valid pixels that several workers add up before anything is divided.

Shapes: B batch, H height px, W width px, K classes, S sums. A pixel whose mask is `IGNORED_ID` counts in no sum.

A loss here is a function L of a short vector of sums S over all pixels of the *global* batch: cross-entropy is
S[0] / S[1], Dice a ratio by class. L is not linear in S, so a worker cannot take the gradient of a loss of its own
pixels. But S is the sum of the workers' S_r, hence dL/dw = sum over r of dL/dS(S) · dS_r/dw: each worker needs the
global S, which it takes as constant, and then differentiates its own S_r only. One mechanism for every loss and any
number of workers:

    sums_S = loss_sums(logits_BHWK, mask_BHW, loss="dice")           # this worker's pixels
    total_S = replica_context.all_reduce(tf.distribute.ReduceOp.SUM, tf.stop_gradient(sums_S))
    value = loss_from_sums(total_S, loss="dice")                     # to report: equal on all workers
    share = replica_share(sums_S, total_S, loss="dice")              # to differentiate
    gradients = tape.gradient(share, weights)                        # then all_reduce(SUM), clip, apply

A sample whose mask is all `IGNORED_ID` (the padding of a short batch) adds zero to every sum and to every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from unet_ray.classes import IGNORED_ID

LOSSES = ("ce", "focal", "dice", "jaccard", "ce+dice", "ce+jaccard")
CLASS_WEIGHTS = ("none", "log", "median")

# Lin et al. 2017, Focal Loss for Dense Object Detection, https://arxiv.org/abs/1708.02002, section 5.1.
FOCAL_GAMMA = 2.0
# Paszke et al. 2016, ENet, https://arxiv.org/abs/1606.02147, section 5.2: bounds the weights to about [1.4, 50.5].
ENET_C = 1.02


def loss_sums(
    logits_BHWK: tf.Tensor,
    mask_BHW: tf.Tensor,
    *,
    loss: str,
    class_weights_K: Sequence[float] | None = None,
    ohem_threshold: float = 1.0,
) -> tf.Tensor:
    """Sum what the loss needs over this worker's valid pixels.

    Args:
        logits_BHWK: any float dtype; computed in float32.
        mask_BHW: integer ids 0 to K-1, or `IGNORED_ID`. Other ids are an error on the CPU and NaN on a GPU.
        loss: one of `LOSSES`.
        class_weights_K: factor of a pixel by its true class in cross-entropy and focal loss; Dice and Jaccard, which
            count every class alike, do not use it. None is 1 for all.
        ohem_threshold: cross-entropy and focal loss count only pixels whose true class has a smaller probability;
            1 counts all. Online hard example mining (Shrivastava et al. 2016, https://arxiv.org/abs/1604.03540) by a
            threshold, so that what a worker counts waits for no other worker.

    Returns:
        float32 `[S]`: ce and focal `[weighted sum, sum of weights]`; dice and jaccard `[intersection_K, predicted_K,
        true_K]`; of two losses both, in their order.
    """
    logits_BHWK = tf.cast(logits_BHWK, tf.float32)
    sums = []
    for part in _parts(loss):
        if part in _OF_PIXELS:
            gamma = FOCAL_GAMMA if part == "focal" else 0.0
            sums.append(_pixel_sums(logits_BHWK, mask_BHW, class_weights_K, gamma=gamma, ohem_threshold=ohem_threshold))
        else:
            sums.append(_overlap_sums(logits_BHWK, mask_BHW))
    return tf.concat(sums, axis=0)


def n_sums(loss: str, n_classes: int) -> int:
    """Returns S, the number of sums that a loss needs."""
    return sum(2 if part in _OF_PIXELS else 3 * n_classes for part in _parts(loss))


def is_of_pixels(loss: str) -> bool:
    """Whether the slope of a loss by its sums is known before all pixels are: it is a mean over pixels."""
    return loss in _OF_PIXELS


_OF_PIXELS = ("ce", "focal")


def _parts(loss: str) -> list[str]:
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is not known; choose one of {', '.join(LOSSES)}")
    return loss.split("+")


def loss_from_sums(total_S: tf.Tensor, *, loss: str) -> tf.Tensor:
    """Compute the loss, a float32 scalar, from sums over the global batch (see `loss_sums`); 0 without a valid pixel.

    ce: weighted mean of -log p(true class). focal: of -(1-p)^2 log p. dice: 1 - mean of 2 intersection /
    (predicted + true) over the classes that the batch truly has, with probabilities as soft predictions (Milletari et
    al. 2016, https://arxiv.org/abs/1606.04797, without its squares). jaccard: the same of intersection / union (Rahman
    and Wang 2016, https://doi.org/10.1007/978-3-319-50835-1_22), which mean IoU measures. Of two losses the sum.
    """
    value, start = tf.constant(0.0), 0
    for part in _parts(loss):
        if part in _OF_PIXELS:
            value += tf.math.divide_no_nan(total_S[start], total_S[start + 1])
            start += 2
        else:  # the last part
            value += _overlap_loss(total_S[start:], part)
    return value


def replica_share(sums_S: tf.Tensor, total_S: tf.Tensor, *, loss: str) -> tf.Tensor:
    """Give the scalar whose gradient is this worker's share of the global loss's gradient.

    Its *value* means nothing; the gradients of all workers' shares add up to the gradient of `loss_from_sums(total_S)`.

    Args:
        sums_S: this worker's own sums, which the gradient flows through.
        total_S: the sums of all workers, taken as constant.
        loss: as in `loss_sums`.
    """
    return tf.reduce_sum(loss_slope(total_S, loss=loss) * sums_S)


def loss_slope(total_S: tf.Tensor, *, loss: str) -> tf.Tensor:
    """Compute the derivative of `loss_from_sums` by each of its sums, float32 `[S]`, as a constant."""
    total_S = tf.stop_gradient(total_S)
    with tf.GradientTape() as tape:
        tape.watch(total_S)
        value = loss_from_sums(total_S, loss=loss)
    return tf.stop_gradient(tape.gradient(value, total_S))


def _pixel_sums(logits_BHWK, mask_BHW, class_weights_K, *, gamma: float, ohem_threshold: float) -> tf.Tensor:
    valid_BHW = tf.not_equal(mask_BHW, tf.cast(IGNORED_ID, mask_BHW.dtype))
    label_BHW = tf.where(valid_BHW, tf.cast(mask_BHW, tf.int32), 0)
    if class_weights_K is None:
        weight_BHW = tf.cast(valid_BHW, tf.float32)
    else:
        weight_BHW = tf.where(valid_BHW, tf.gather(tf.constant(class_weights_K, tf.float32), label_BHW), 0.0)
    entropy_BHW = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=label_BHW, logits=logits_BHWK)
    if ohem_threshold < 1:
        is_hard_BHW = entropy_BHW > -math.log(ohem_threshold)
        weight_BHW = tf.where(is_hard_BHW, weight_BHW, 0.0)
    if gamma:
        entropy_BHW *= (-tf.math.expm1(-entropy_BHW)) ** gamma
    return tf.stack([tf.reduce_sum(weight_BHW * entropy_BHW), tf.reduce_sum(weight_BHW)])


def _overlap_sums(logits_BHWK, mask_BHW) -> tf.Tensor:
    # one_hot gives a row of zeros for IGNORED_ID, which is never a class.
    true_BHWK = tf.one_hot(tf.cast(mask_BHW, tf.int32), logits_BHWK.shape[-1])
    valid_BHW1 = tf.cast(tf.not_equal(mask_BHW, tf.cast(IGNORED_ID, mask_BHW.dtype)), tf.float32)[..., tf.newaxis]
    predicted_BHWK = tf.nn.softmax(logits_BHWK) * valid_BHW1
    pixels = [0, 1, 2]
    return tf.concat(
        [
            tf.reduce_sum(predicted_BHWK * true_BHWK, pixels),
            tf.reduce_sum(predicted_BHWK, pixels),
            tf.reduce_sum(true_BHWK, pixels),
        ],
        axis=0,
    )


def _overlap_loss(total_S, part: str) -> tf.Tensor:
    intersection_K, predicted_K, true_K = tf.split(total_S, 3)
    present_K = tf.cast(true_K > 0, tf.float32)
    if part == "dice":
        overlap_K = tf.math.divide_no_nan(2.0 * intersection_K, predicted_K + true_K)
    else:
        overlap_K = tf.math.divide_no_nan(intersection_K, predicted_K + true_K - intersection_K)
    n_present = tf.reduce_sum(present_K)
    return tf.math.divide_no_nan(n_present - tf.reduce_sum(present_K * overlap_K), n_present)


def class_weights(
    counts_K: np.ndarray, method: str, *, image_pixels_K: np.ndarray | None = None
) -> tuple[float, ...] | None:
    """Compute class weights from the training set's pixel counts; only their ratios matter to the loss.

    Args:
        counts_K: valid pixels of each class in the training set.
        method: `none` gives None. `log`: 1 / ln(1.02 + share of all pixels) (ENet, Paszke et al. 2016,
            https://arxiv.org/abs/1606.02147). `median`: median of the frequencies / frequency (Eigen and Fergus
            2015, https://arxiv.org/abs/1411.4734).
        image_pixels_K: for `median`, the valid pixels of the images that hold the class, which is what the paper
            divides by; without it, frequencies are shares of all pixels.

    Returns:
        One float a class. A class without a pixel, about which nothing is known, gets the median of the others'
        weights: training never meets it, a validation loss may.

    Raises:
        ValueError: an unknown method, or no pixel of any class.
    """
    if method == "none":
        return None
    if method not in CLASS_WEIGHTS:
        raise ValueError(f"class weights {method!r} are not known; choose one of {', '.join(CLASS_WEIGHTS)}")
    counts_K = np.asarray(counts_K, dtype=np.float64)
    present_K = counts_K > 0
    if not present_K.any():
        raise ValueError("class weights need pixel counts: no pixel of any class was found in the training masks")
    if method == "log":
        weights_K = 1.0 / np.log(ENET_C + counts_K / counts_K.sum())
    else:
        pixels_K = np.full_like(counts_K, counts_K.sum()) if image_pixels_K is None else np.asarray(image_pixels_K)
        frequency_K = np.divide(counts_K, pixels_K, out=np.ones_like(counts_K), where=present_K)
        weights_K = np.median(frequency_K[present_K]) / frequency_K
    weights_K = np.where(present_K, weights_K, np.median(weights_K[present_K]))
    return tuple(float(weight) for weight in weights_K)

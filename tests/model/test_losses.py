"""Losses against naive loops in float64, and their gradients against finite differences, for any split over workers."""

import math

import numpy as np
import pytest
import tensorflow as tf

from unet_ray.model.losses import CLASS_WEIGHTS, LOSSES, class_weights, loss_from_sums, loss_sums, replica_share

K = 4
WEIGHTS_K = (0.5, 3.0, 1.25, 2.0)
IGNORED = 255


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Four samples of 3x5 whose void is uneven: none, some, most, all; class 3 is absent."""
    rng = np.random.default_rng(5)
    logits_BHWK = rng.normal(scale=2.0, size=(4, 3, 5, K)).astype(np.float32)
    mask_BHW = rng.integers(0, K - 1, (4, 3, 5)).astype(np.uint8)
    mask_BHW[1, 0] = IGNORED
    mask_BHW[2, :, 1:] = IGNORED
    mask_BHW[3] = IGNORED
    return logits_BHWK, mask_BHW


def naive_loss(logits_BHWK, mask_BHW, loss: str, weights_K=None, ohem_threshold: float = 1.0) -> float:
    """The definition, pixel by pixel, in Python floats."""
    weights_K = weights_K or (1.0,) * K
    entropy = focal = weight = 0.0
    intersection, predicted, true = [0.0] * K, [0.0] * K, [0.0] * K
    for logits_K, label in zip(logits_BHWK.reshape(-1, K).tolist(), mask_BHW.ravel().tolist(), strict=True):
        if label == IGNORED:
            continue
        total = sum(math.exp(value) for value in logits_K)
        probability_K = [math.exp(value) / total for value in logits_K]
        p = probability_K[label]
        if p < ohem_threshold:
            entropy -= weights_K[label] * math.log(p)
            focal -= weights_K[label] * (1 - p) ** 2 * math.log(p)
            weight += weights_K[label]
        intersection[label] += p
        true[label] += 1
        predicted = [a + b for a, b in zip(predicted, probability_K, strict=True)]
    dice = [2 * intersection[k] / (predicted[k] + true[k]) for k in range(K) if true[k]]
    jaccard = [intersection[k] / (predicted[k] + true[k] - intersection[k]) for k in range(K) if true[k]]
    losses = {
        "ce": entropy / weight,
        "focal": focal / weight,
        "dice": 1 - sum(dice) / len(dice),
        "jaccard": 1 - sum(jaccard) / len(jaccard),
    }
    return sum(losses[part] for part in loss.split("+"))


def naive_gradient(logits_BHWK, mask_BHW, loss: str, weights_K, ohem_threshold: float = 1.0) -> np.ndarray:
    logits_BHWK = logits_BHWK.astype(np.float64)
    gradient, step = np.zeros_like(logits_BHWK), 1e-5
    for index in np.ndindex(*logits_BHWK.shape):
        for sign in (1, -1):
            moved = logits_BHWK.copy()
            moved[index] += sign * step
            gradient[index] += sign * naive_loss(moved, mask_BHW, loss, weights_K, ohem_threshold) / (2 * step)
    return gradient


def value_and_gradient(
    logits_BHWK, mask_BHW, workers: list[slice], loss: str, weights_K, ohem_threshold: float = 1.0
) -> tuple[float, np.ndarray]:
    """What several workers with a slice of the batch each compute by the way that the module's docstring shows."""
    options = {"loss": loss, "class_weights_K": weights_K, "ohem_threshold": ohem_threshold}
    sums = [loss_sums(tf.constant(logits_BHWK[worker]), mask_BHW[worker], **options) for worker in workers]
    total_S = tf.add_n(sums)
    gradients = []
    for worker in workers:
        logits = tf.Variable(logits_BHWK[worker])
        with tf.GradientTape() as tape:
            sums_S = loss_sums(logits, mask_BHW[worker], **options)
            share = replica_share(sums_S, total_S, loss=loss)
        gradients.append(tape.gradient(share, logits).numpy())
    return float(loss_from_sums(total_S, loss=loss)), np.concatenate(gradients)


@pytest.mark.parametrize("weights_K", [None, WEIGHTS_K])
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_are_the_definitions_for_any_split_over_workers(batch, loss, weights_K):
    expected_value = naive_loss(*batch, loss, weights_K)
    expected_gradient = naive_gradient(*batch, loss, weights_K)
    for workers in ([slice(0, 4)], [slice(0, 2), slice(2, 4)], [slice(0, 1), slice(1, 3), slice(3, 4)]):
        value, gradient = value_and_gradient(*batch, workers, loss, weights_K)
        assert value == pytest.approx(expected_value, rel=1e-6)
        np.testing.assert_allclose(gradient, expected_gradient, atol=2e-7)


@pytest.mark.parametrize("loss", ["ce", "focal", "ce+jaccard"])
def test_of_hard_pixels_alone_value_and_gradient_are_the_definitions(batch, loss):
    expected_value = naive_loss(*batch, loss, WEIGHTS_K, 0.4)
    assert expected_value > naive_loss(*batch, loss, WEIGHTS_K)
    for workers in ([slice(0, 4)], [slice(0, 1), slice(1, 3), slice(3, 4)]):
        value, gradient = value_and_gradient(*batch, workers, loss, WEIGHTS_K, 0.4)
        assert value == pytest.approx(expected_value, rel=1e-6)
        np.testing.assert_allclose(gradient, naive_gradient(*batch, loss, WEIGHTS_K, 0.4), atol=2e-7)
    surely = 20 * tf.one_hot(batch[1], K).numpy()
    value, gradient = value_and_gradient(surely, batch[1], [slice(0, 4)], "ce", None, 0.4)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_pixels_count_nowhere(batch, loss):
    logits_BHWK, mask_BHW = batch
    changed = logits_BHWK.copy()
    changed[mask_BHW == IGNORED] = 80.0 * np.arange(K)
    np.testing.assert_array_equal(loss_sums(changed, mask_BHW, loss=loss), loss_sums(logits_BHWK, mask_BHW, loss=loss))
    _, gradient = value_and_gradient(changed, mask_BHW, [slice(0, 4)], loss, WEIGHTS_K)
    assert not gradient[mask_BHW == IGNORED].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_changes_nothing_and_a_batch_of_padding_is_zero_not_nan(batch, loss):
    logits_BHWK, mask_BHW = batch
    without, with_padding = loss_sums(logits_BHWK[:3], mask_BHW[:3], loss=loss), loss_sums(*batch, loss=loss)
    np.testing.assert_allclose(with_padding, without, rtol=1e-6)
    value, gradient = value_and_gradient(logits_BHWK[3:], mask_BHW[3:], [slice(0, 1)], loss, None)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(logits_BHWK[3:]))


@pytest.mark.parametrize("loss", LOSSES)
def test_works_in_a_compiled_step_and_computes_in_float32(batch, loss):
    logits_BHWK, mask_BHW = tf.cast(batch[0], tf.bfloat16), batch[1]
    compiled = tf.function(lambda logits, mask: loss_sums(logits, mask, loss=loss, class_weights_K=WEIGHTS_K))
    sums_S = compiled(logits_BHWK, mask_BHW)
    assert sums_S.dtype == tf.float32
    rounded = logits_BHWK.numpy().astype(np.float32)
    assert float(loss_from_sums(sums_S, loss=loss)) == pytest.approx(
        naive_loss(rounded, mask_BHW, loss, WEIGHTS_K), rel=1e-5
    )
    for dtype in (np.int32, np.int64):
        np.testing.assert_array_equal(compiled(logits_BHWK, mask_BHW.astype(dtype)), sums_S)


def test_perfect_and_extreme_predictions_stay_finite():
    mask_BHW = np.array([[[0, 1, 2]]], np.uint8)
    for sign, expected in (
        (1.0, {"ce": 0, "dice": 0, "jaccard": 0, "focal": 0}),
        (-1.0, {"ce": 1e4, "dice": 1, "jaccard": 1, "focal": 1e4}),
    ):
        logits_BHWK = (sign * 1e4 * np.eye(K, dtype=np.float32)[:3])[np.newaxis, np.newaxis]
        for loss, value in expected.items():
            actual, gradient = value_and_gradient(logits_BHWK, mask_BHW, [slice(0, 1)], loss, None)
            assert actual == pytest.approx(value, rel=2e-4)
            assert np.isfinite(gradient).all()


def test_unknown_names_are_refused(batch):
    message = "loss 'mse' is not known; choose one of ce, focal, dice, jaccard, ce+dice, ce+jaccard"
    with pytest.raises(ValueError) as caught:
        loss_sums(*batch, loss="mse")
    assert str(caught.value) == message
    with pytest.raises(ValueError) as caught:
        loss_from_sums(tf.zeros(2), loss="mse")
    assert str(caught.value) == message
    with pytest.raises(ValueError) as caught:
        class_weights(np.array([1, 2]), "inverse")
    assert str(caught.value) == "class weights 'inverse' are not known; choose one of none, log, median"


def test_class_weights_by_hand():
    counts_K = np.array([700, 0, 200, 100])
    assert class_weights(counts_K, "none") is None
    logarithmic = [1 / math.log(1.02 + share) for share in (0.7, 0.2, 0.1)]
    assert class_weights(counts_K, "log") == pytest.approx(
        (logarithmic[0], logarithmic[1], logarithmic[1], logarithmic[2])
    )
    # Median of 0.7, 0.2, 0.1 is 0.2; the absent class has the median of the three weights.
    assert class_weights(counts_K, "median") == pytest.approx((2 / 7, 1.0, 1.0, 2.0))
    # Eigen and Fergus: by the pixels of the images that hold the class: 0.7, 0.5, 0.2.
    assert class_weights(counts_K, "median", image_pixels_K=np.array([1000, 0, 400, 500])) == pytest.approx(
        (5 / 7, 1.0, 1.0, 2.5)
    )


@pytest.mark.parametrize("method", [m for m in CLASS_WEIGHTS if m != "none"])
def test_class_weights_of_an_empty_data_set_are_refused(method):
    with pytest.raises(ValueError) as caught:
        class_weights(np.zeros(3, np.int64), method)
    assert str(caught.value) == "class weights need pixel counts: no pixel of any class was found in the training masks"

"""Batch normalisation in the train step: against plain Keras, against sums by hand, and one worker against two."""

from __future__ import annotations

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from ranks import of_one_and_of_two, relative_difference

from unet_ray.classes import IGNORED_ID
from unet_ray.training import batch_norm, steps
from unet_ray.training.exactness import require_trainable_exactly
from unet_ray.training.optimizer import make_optimizer

# The second worker's part of a batch is short, or nothing but padding, or whole.
RANK_PROGRAM = """
import sys
import keras, networks, numpy as np, tensorflow as tf
from unet_ray.model import devices
from unet_ray.training import steps
from unet_ray.training.exactness import require_trainable_exactly
from unet_ray.training.optimizer import make_optimizer

rank, n_workers, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
devices.configure_tensorflow("cpu", 1, op_threads=1)
strategy = steps.start_strategy(n_workers, "cpu")
rng = np.random.default_rng(3)
images = rng.integers(0, 256, (10, 16, *networks.SIZE, 3), np.uint8)
masks = rng.integers(0, 3, (10, 16, *networks.SIZE)).astype(np.uint8)
for frame in range(16):
    masks[:, frame, : round(networks.SIZE[0] * 0.9 * frame / 15)] = 255
for batch, n_frames in enumerate((11, 5, 16, 11, 5, 16, 11, 5, 16, 9)):
    images[batch, n_frames:], masks[batch, n_frames:] = 0, 255
part = 16 // n_workers
mine = slice(rank * part, (rank + 1) * part)
arrays = {}
for name, loss, compiled in [("ce", "ce", False), ("dice", "ce+dice", True), ("stem", "focal", False)]:
    norm = keras.layers.BatchNormalization(synchronized=True, momentum=0.8, name="norm")
    model = networks.stemmed(norm) if name == "stem" else networks.normalized()
    require_trainable_exactly(model)
    optimizer = keras.optimizers.SGD(0.1) if name == "stem" else make_optimizer("adam", 1e-3, 0.0)
    step = steps.TrainStep(model, optimizer, strategy, loss=loss, compiled=compiled)
    seeds = steps.dropout_seeds(0, 0, rank, step.n_dropouts)
    _, gradients = step.reduced_gradients(*map(tf.constant, (images[0, mine], masks[0, mine], seeds)))
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        arrays[f"{name}/gradient/{variable.path}"] = gradient.numpy()
    arrays[f"{name}/loss"] = np.array([float(step(images[t, mine], masks[t, mine], seeds).loss) for t in range(10)])
    for path, tensor in steps.state_tensors(model, optimizer).items():
        arrays[f"{name}/weight/{path}"] = tensor
np.savez(f"{out}/{n_workers}-{rank}.npz", **arrays)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What one worker with 16 frames, and each of two with 8, computed."""
    return of_one_and_of_two(RANK_PROGRAM, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["ce", "dice", "stem"])
def test_two_workers_with_8_frames_learn_what_one_with_16_does(ranks, name):
    one, two = ranks["1-0"], ranks["2-0"]
    np.testing.assert_allclose(one[f"{name}/loss"], two[f"{name}/loss"], rtol=1e-6)
    gradients = [key for key in one if key.startswith(f"{name}/gradient/")]
    assert max(relative_difference(one[key], two[key]) for key in gradients) < 1e-5
    weights = [key for key in one if key.startswith(f"{name}/weight/model/")]
    assert sum("moving" in key for key in weights) == (2 if name == "stem" else 4)
    assert max(relative_difference(one[key], two[key]) for key in weights) < 1e-4


def test_both_workers_end_with_equal_weights_and_statistics(ranks):
    first, second = ranks["2-0"], ranks["2-1"]
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key], err_msg=key)


def batch(n_frames: int = 3, seed: int = 0):
    rng = np.random.default_rng(seed)
    image_BHWC = rng.integers(0, 256, (n_frames, *networks.SIZE, 3), np.uint8)
    mask_BHW = rng.integers(0, 3, (n_frames, *networks.SIZE)).astype(np.uint8)
    mask_BHW[0, :5] = IGNORED_ID
    return image_BHWC, mask_BHW


def padded(image_BHWC: np.ndarray, mask_BHW: np.ndarray, n: int):
    blank = np.zeros((n, *networks.SIZE, 3), np.uint8), np.full((n, *networks.SIZE), IGNORED_ID, np.uint8)
    return np.concatenate([image_BHWC, blank[0]]), np.concatenate([mask_BHW, blank[1]])


def make_step(model: keras.Model, **options) -> steps.TrainStep:
    optimizer = options.pop("optimizer", None) or keras.optimizers.SGD(0.1)
    return steps.TrainStep(model, optimizer, tf.distribute.get_strategy(), loss="ce", **options)


def no_seeds(step: steps.TrainStep) -> np.ndarray:
    return steps.dropout_seeds(0, 0, 0, step.n_dropouts)


def state_of(model: keras.Model) -> dict[str, np.ndarray]:
    return {variable.path: variable.numpy() for variable in model.weights}


def assert_close(one: dict[str, np.ndarray], other: dict[str, np.ndarray], atol: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for path, value in one.items():
        np.testing.assert_allclose(value, other[path], atol=atol, rtol=1e-5, err_msg=path)


def test_a_step_is_what_plain_keras_does():
    image_BHWC, mask_BHW = batch()
    ours, plain = networks.normalized(), networks.normalized(synchronized=False)
    step, optimizer = make_step(ours), keras.optimizers.SGD(0.1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=IGNORED_ID, reduction="sum")
    for _ in range(3):
        result = step(image_BHWC, mask_BHW, no_seeds(step))
        with tf.GradientTape() as tape:
            value = loss(mask_BHW.astype(np.int32), plain(image_BHWC, training=True)) / np.sum(mask_BHW != IGNORED_ID)
        optimizer.apply(tape.gradient(value, plain.trainable_variables), plain.trainable_variables)
        assert float(result.loss) == pytest.approx(float(value), rel=1e-5)
    assert_close(state_of(ours), state_of(plain), atol=1e-5)
    np.testing.assert_allclose(ours(image_BHWC), plain(image_BHWC), atol=1e-4)  # in inference, by moving statistics
    assert "call" not in vars(ours.get_layer("norm"))


@pytest.mark.parametrize("compiled", [False, True])
def test_padding_is_in_no_statistic(compiled):
    image_BHWC, mask_BHW = batch()
    after = []
    for frames in ((image_BHWC, mask_BHW), padded(image_BHWC, mask_BHW, 3)):
        model = networks.normalized()
        step = make_step(model, compiled=compiled)
        for _ in range(3):
            step(*frames, no_seeds(step))
        after.append(state_of(model))
    assert_close(*after)
    assert np.abs(after[0]["norm/moving_mean"]).min() > 1e-4


@pytest.mark.parametrize("axis", [-1, 1])
def test_moments_are_those_of_numpy_and_do_not_cancel(axis):
    x_BHWC = np.random.default_rng(0).normal(1000.0, 0.5, (4, 6, 8, 5)).astype(np.float32)
    layer = keras.layers.BatchNormalization(axis=axis, momentum=0.0, synchronized=True, name="norm")
    layer.build(x_BHWC.shape)
    counted_B = tf.constant([1.0, 1.0, 0.0, 1.0])
    with batch_norm.over_workers([layer], counted_B, lambda part_N: part_N[tf.newaxis]):
        y = layer(x_BHWC, training=True).numpy()
    kept = x_BHWC[[0, 1, 3]].astype(np.float64)
    others = tuple(each for each in range(4) if each != axis % 4)
    mean, variance = kept.mean(others), kept.var(others)
    np.testing.assert_allclose(layer.moving_mean.numpy(), mean, rtol=1e-6)
    np.testing.assert_allclose(layer.moving_variance.numpy(), variance, rtol=1e-3)
    expected = (x_BHWC - kept.mean(others, keepdims=True)) / np.sqrt(kept.var(others, keepdims=True) + 1e-3)
    np.testing.assert_allclose(y[[0, 1, 3]], expected[[0, 1, 3]], atol=2e-3)


def test_a_batch_of_padding_alone_moves_nothing():
    model = networks.normalized()
    step = make_step(model)
    before = state_of(model)
    result = step(batch()[0], np.full((3, *networks.SIZE), IGNORED_ID, np.uint8), no_seeds(step))
    assert float(result.loss) == 0
    assert_close(before, state_of(model), atol=0)


def test_bfloat16_keeps_its_statistics_whole():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = networks.normalized()
    finally:
        keras.config.set_dtype_policy("float32")
    step, whole = make_step(model), networks.normalized()
    make_step(whole)(*batch(), no_seeds(step))
    step(*batch(), no_seeds(step))
    assert all(variable.dtype == "float32" for variable in model.weights)
    for path in ("norm/moving_mean", "norm/moving_variance"):
        np.testing.assert_allclose(state_of(model)[path], state_of(whole)[path], rtol=0.02, atol=1e-3)


def test_state_comes_back_to_the_bit():
    first, second = networks.normalized(rate=0.2), networks.normalized(rate=0.2)
    optimizers = [make_optimizer("adam", 1e-2, 0.0) for _ in range(2)]
    step, other = (make_step(m, optimizer=o) for m, o in zip((first, second), optimizers, strict=True))
    for number in range(3):
        step(*batch(seed=number), no_seeds(step))
    state = steps.state_tensors(first, optimizers[0])
    assert {name for name in state if "moving" in name} == {
        f"model/{layer}/moving_{what}" for layer in ("norm", "inner_norm") for what in ("mean", "variance")
    }
    steps.restore_state(second, optimizers[1], state)
    for each in (step, other):
        each(*batch(seed=3), no_seeds(each))
    for name, tensor in steps.state_tensors(first, optimizers[0]).items():
        np.testing.assert_array_equal(tensor, steps.state_tensors(second, optimizers[1])[name], err_msg=name)


def test_a_layer_of_the_users_own_is_reached():
    norm = keras.layers.BatchNormalization(synchronized=True, name="norm")
    model = networks.stemmed(norm)
    require_trainable_exactly(model)
    step = make_step(model)
    step(*batch(), no_seeds(step))
    assert np.abs(state_of(model)["stem/norm/moving_mean"]).min() > 1e-4

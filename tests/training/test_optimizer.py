"""The optimizer: against Keras' own, by hand where a part has its own learning rate, and its schedule."""

from __future__ import annotations

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from unet_ray.model.architecture import UnetConfig
from unet_ray.model.unet import build_unet
from unet_ray.training.optimizer import averaged, make_optimizer, make_schedule, take_averages

CONFIG = UnetConfig(image_height_px=24, image_width_px=32, n_classes=3, n_filters=4, depth=2, dropout=0.0)


def gradients_of(model: keras.Model, step: int) -> list[tf.Tensor]:
    rng = np.random.default_rng(step)
    return [tf.constant(rng.normal(size=v.shape).astype(np.float32)) for v in model.trainable_variables]


def apply_steps(model: keras.Model, optimizer: keras.Optimizer, n_steps: int = 4) -> dict[str, np.ndarray]:
    """Values of the weights after some steps with gradients that are the same for every optimizer."""
    apply = tf.function(lambda gradients: optimizer.apply(gradients, model.trainable_variables))
    optimizer.build(model.trainable_variables)
    for step in range(n_steps):
        apply(gradients_of(model, step))
    return {variable.path: variable.numpy() for variable in model.trainable_variables}


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_unet_takes_keras_own_steps_to_the_bit(kind):
    schedule = make_schedule("cosine", 0.01, total_steps=8, warmup_steps=2)
    plain = keras.optimizers.Adam(schedule, name="adam")
    if kind == "adamw":
        plain = keras.optimizers.AdamW(schedule, weight_decay=0.3, name="adamw")
        plain.exclude_from_weight_decay(var_names=["bias"])
    ours = make_optimizer(kind, schedule, 0.3)
    one, other = (apply_steps(build_unet(CONFIG, seed=1), optimizer) for optimizer in (ours, plain))
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path], err_msg=path)
    assert [v.path for v in ours.variables] == [v.path for v in plain.variables]


def test_averages_of_the_weights_serve_for_a_while_or_for_good():
    """The average starts at the weights after the first step, as Keras has it."""
    model = build_unet(CONFIG, seed=1)
    optimizer = make_optimizer("adamw", 0.01, 0.3, ema_momentum=0.75)
    variables = model.trainable_variables
    expected = None
    optimizer.build(variables)
    for step in range(4):
        optimizer.apply(gradients_of(model, step))
        now = [variable.numpy() for variable in variables]
        expected = now if expected is None else [0.75 * a + 0.25 * b for a, b in zip(expected, now, strict=True)]
    with averaged(optimizer, variables):
        for variable, average in zip(variables, expected, strict=True):
            np.testing.assert_allclose(variable.numpy(), average, rtol=1e-5, atol=1e-7, err_msg=variable.path)
    for variable, value in zip(variables, now, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    take_averages(optimizer, variables)
    for variable, average in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), average, rtol=1e-5, atol=1e-7, err_msg=variable.path)


def test_without_averages_the_weights_serve_themselves():
    model = build_unet(CONFIG, seed=1)
    optimizer = make_optimizer("adam", 0.01, 0.0)
    before = apply_steps(model, optimizer, 1)
    with averaged(optimizer, model.trainable_variables):
        take_averages(optimizer, model.trainable_variables)
        for variable in model.trainable_variables:
            np.testing.assert_array_equal(variable.numpy(), before[variable.path])
    assert not [variable.path for variable in optimizer.variables if "average" in variable.path]


def test_what_has_one_dimension_does_not_decay():
    attention = layers.MultiHeadAttention(2, 2, name="attention")
    image_BHWC, x = networks.frames()
    x = layers.GroupNormalization(2, name="group")(networks.convolution(4, name="conv")(x))
    x = layers.LayerNormalization(name="layer")(attention(x, x))
    model = networks.network(image_BHWC, layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x))
    optimizer = make_optimizer("adamw", 0.1, 0.5)
    optimizer.build(model.trainable_variables)
    for variable in model.trainable_variables:
        variable.assign(tf.ones_like(variable))
    optimizer.apply([tf.zeros(variable.shape) for variable in model.trainable_variables])
    decayed = {v.path for v in model.trainable_variables if not np.array_equal(v.numpy(), np.ones(v.shape))}
    assert decayed == {v.path for v in model.trainable_variables if v.name == "kernel"}
    assert {"conv/kernel", "depthwise/kernel"} < decayed and len(decayed) == 3 + 4
    for variable in model.trainable_variables:
        expected = 1 - 0.1 * 0.5 if variable.path in decayed else 1.0
        np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-6)


def test_a_factor_scales_the_whole_step_of_a_part():
    """As an optimizer of its own, with the lower rate, would step it: Adam's step and its decay."""
    factors = {"conv2d_1/": 0.1, "conv2d_1/bias": 0.5}
    ours = apply_steps(build_unet(CONFIG, seed=1), make_optimizer("adamw", 0.01, 0.3, factors))
    by_rate = {
        factor: apply_steps(build_unet(CONFIG, seed=1), make_optimizer("adamw", 0.01 * factor, 0.3))
        for factor in (1.0, 0.1, 0.5)
    }
    for path, value in ours.items():
        factor = {"conv2d_1/kernel": 0.1, "conv2d_1/bias": 0.5}.get(path, 1.0)
        np.testing.assert_allclose(value, by_rate[factor][path], rtol=1e-6, atol=1e-7, err_msg=path)
        if factor != 1.0:
            assert np.abs(value - by_rate[1.0][path]).max() > 1e-3


def test_factors_change_no_name():
    names = []
    for factors in (None, {"conv2d": 0.1}):
        optimizer = make_optimizer("adamw", 0.01, 0.3, factors)
        optimizer.build(build_unet(CONFIG, seed=1).trainable_variables)
        names.append([variable.path for variable in optimizer.variables])
    assert names[0] == names[1]


def test_a_part_that_is_not_there_is_named():
    optimizer = make_optimizer("adam", 0.01, 0.0, {"encoder/": 0.1})
    line = "no trained variable's path begins with 'encoder/', which is to have a learning rate of its own"
    with pytest.raises(ValueError, match=f"^{line}; the first path is conv2d/kernel$"):
        optimizer.build(build_unet(CONFIG).trainable_variables)


def test_cosine_rises_for_the_warm_up_and_ends_at_zero():
    schedule = make_schedule("cosine", 0.4, total_steps=30, warmup_steps=10)
    rates = [float(schedule(step)) for step in (0, 5, 10, 20, 30)]
    np.testing.assert_allclose(rates, [0.0, 0.2, 0.4, 0.2, 0.0], atol=1e-7)
    without = make_schedule("cosine", 0.4, total_steps=20, warmup_steps=0)
    np.testing.assert_allclose([float(without(step)) for step in (0, 10, 20)], [0.4, 0.2, 0.0], atol=1e-7)
    assert make_schedule("constant", 0.4, 30, 10) == 0.4

"""A network's variables in the train step: state is carried, seeds are given, frozen weights stay, paths are unique."""

from __future__ import annotations

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf

from unet_ray.training import steps
from unet_ray.training.optimizer import make_optimizer
from unet_ray.training.variables import NetworkVariables, require_own_paths


def batch(n_frames: int = 4):
    rng = np.random.default_rng(0)
    image_BHWC = rng.integers(0, 256, (n_frames, *networks.SIZE, 3), np.uint8)
    return image_BHWC, rng.integers(0, 3, (n_frames, *networks.SIZE)).astype(np.uint8)


def make_step(model: keras.Model, loss: str = "ce", **options) -> steps.TrainStep:
    return steps.TrainStep(model, keras.optimizers.SGD(0.1), tf.distribute.get_strategy(), loss=loss, **options)


def test_keras_tells_apart_what_is_not_trained():
    variables = NetworkVariables.of(networks.stateful())
    assert [v.path for v in variables.state] == ["counter/count"]
    assert len(variables.seeds) == 1 + 2 + 1  # of dropout, two of our own layer, of noise
    frozen = {"frozen/kernel", "frozen/bias", "frozen_norm/gamma", "frozen_norm/beta"}
    assert frozen < {v.path for v in variables.untrained}
    trained = {"conv/kernel", "group/gamma", "group/beta", "layer/gamma", "layer/beta", "classify/bias"}
    assert trained < {v.path for v in variables.trained}


def test_a_layer_within_a_frozen_one_is_frozen_by_itself():
    model = networks.stemmed(keras.layers.BatchNormalization(synchronized=True, name="norm"))
    stem = model.get_layer("stem")
    stem.trainable = False
    assert NetworkVariables.of(model).state == []
    stem.blocks[0]["norm"].trainable = True
    assert [v.path for v in NetworkVariables.of(model).state] == ["stem/norm/moving_mean", "stem/norm/moving_variance"]


@pytest.mark.parametrize("loss", ["ce", "dice"])
@pytest.mark.parametrize(
    ("n_micro", "compiled"),
    [
        (1, False),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(2, False, marks=pytest.mark.slow),
        (2, True),
    ],
)
def test_a_step_is_counted_once_and_nothing_frozen_moves(loss, n_micro, compiled):
    model = networks.stateful()
    step = make_step(model, loss, n_micro=n_micro, compiled=compiled)
    before = {v.path: v.numpy() for v in model.variables}
    for number in range(3):
        result = step(*batch(), steps.dropout_seeds(0, number, 0, step.n_dropouts, n_micro))
    assert np.isfinite(float(result.loss))
    changed = {v.path for v in model.variables if not np.array_equal(v.numpy(), before[v.path])}
    # Nothing depends on the bias of what is normalised by each channel's mean.
    trained = {v.path for v in model.trainable_variables} - {"conv/bias"}
    assert trained | {"counter/count"} <= changed <= trained | {"counter/count", "conv/bias"}
    assert float(model.get_layer("counter").count.value) == 3


def test_two_micro_batches_see_the_state_that_two_workers_see():
    """A micro-batch is divided by the count before the step, as a worker's part is."""
    whole, parts = (make_step(networks.with_layer(networks.Counter(name="counter")), n_micro=n) for n in (1, 2))
    for _ in range(3):
        losses = [float(step(*batch(), np.zeros((n, 0, 2), np.int64)).loss) for n, step in ((1, whole), (2, parts))]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_every_seed_is_a_function_of_seed_step_and_rank():
    step = make_step(networks.stateful())

    def loss(seeds_ML2: np.ndarray) -> float:
        return float(step.reduced_gradients(*map(tf.constant, (*batch(), seeds_ML2)))[0].loss)

    seeds_ML2 = steps.dropout_seeds(0, 5, 1, step.n_dropouts)
    losses = [loss(seeds_ML2), loss(steps.dropout_seeds(0, 6, 1, 4)), loss(steps.dropout_seeds(0, 5, 0, 4))]
    for index in range(step.n_dropouts):
        other_ML2 = seeds_ML2.copy()
        other_ML2[0, index] += 1
        losses.append(loss(other_ML2))
    assert len(set(losses)) == 3 + 4
    assert loss(seeds_ML2) == losses[0]


def test_state_comes_back_to_the_bit():
    models = [networks.stateful() for _ in range(2)]
    optimizers = [make_optimizer("adamw", 1e-2, 0.1) for _ in range(2)]
    first, second = (
        steps.TrainStep(model, optimizer, tf.distribute.get_strategy(), loss="ce")
        for model, optimizer in zip(models, optimizers, strict=True)
    )
    for number in range(3):
        first(*batch(), steps.dropout_seeds(0, number, 0, 4))
    state = steps.state_tensors(models[0], optimizers[0])
    assert state["model/counter/count"] == 3
    assert not any("seed" in name for name in state)
    steps.restore_state(models[1], optimizers[1], state)
    for step in (first, second):
        step(*batch(), steps.dropout_seeds(0, 3, 0, 4))
    for name, tensor in steps.state_tensors(models[0], optimizers[0]).items():
        np.testing.assert_array_equal(tensor, steps.state_tensors(models[1], optimizers[1])[name], err_msg=name)


def test_two_variables_of_one_path_are_one_line():
    model = networks.same_paths()
    lines = "conv/bias and conv/kernel name more than one variable of the network; give each layer a name of its own"
    with pytest.raises(ValueError) as caught:
        steps.state_tensors(model, make_optimizer("adam", 1e-3, 0.0))
    assert str(caught.value) == lines
    variables = [keras.Variable([1.0], name="kernel") for _ in range(2)]
    with pytest.raises(ValueError, match="^kernel names more than one variable of the network; "):
        require_own_paths(variables)

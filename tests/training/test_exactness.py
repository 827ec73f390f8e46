"""What trains alike on any number of workers is taken; all else is refused in one line, by the layer's name."""

from __future__ import annotations

import inspect

import keras
import networks
import numpy as np
import pytest
from keras import layers

from unet_ray.model.architecture import UnetConfig
from unet_ray.model.unet import build_unet
from unet_ray.training.exactness import require_trainable_exactly

UNET = UnetConfig(image_height_px=24, image_width_px=32, n_classes=3, n_filters=4, depth=2, dropout=0.5)


class OwnNormalization(layers.BatchNormalization):
    """Another way to normalise."""

    def call(self, x, training=None, mask=None):
        """See Keras."""
        return super().call(x - 1.0, training=training, mask=mask)


class Loss(layers.Layer):
    """Adds a loss of its own."""

    def call(self, x):
        """See Keras."""
        self.add_loss(keras.ops.mean(x))
        return x


class Setter(layers.Layer):
    """Sets its own trained weight."""

    def build(self, shape):
        """See Keras."""
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, x, training=None):
        """See Keras."""
        if training:
            self.scale.assign(self.scale * 0.5)
        return x * self.scale


def frozen(model: keras.Model) -> keras.Model:
    model.trainable = False
    return model


def spectral() -> layers.Layer:
    return layers.SpectralNormalization(layers.Conv2D(4, 1, name="inside"), name="spectral")


def norm(**options) -> layers.Layer:
    return layers.BatchNormalization(**{"name": "norm", "synchronized": True} | options)


def adapted() -> layers.Normalization:
    layer = layers.Normalization(name="whiten")
    layer.adapt(np.random.default_rng(0).normal(size=(4, 8, 4)))
    return layer


ACCEPTED = {
    "unet": lambda: build_unet(UNET, seed=1),
    "normalized": lambda: networks.normalized(rate=0.3),
    "in-a-layer": lambda: networks.stemmed(norm()),
    "stateful": networks.stateful,
    "frozen": lambda: networks.with_layer(norm(synchronized=False, trainable=False)),
    "frozen-mean": lambda: networks.with_layer(networks.MovingMean(name="mean", trainable=False)),
    "adapted": lambda: networks.with_layer(adapted()),
    "lambda": lambda: networks.with_layer(layers.Lambda(lambda x: x * 2.0), norm()),
    "group": lambda: networks.with_layer(layers.GroupNormalization(2), layers.LayerNormalization()),
}
REFUSED = {
    "plain": (
        lambda: networks.normalized(synchronized=False),
        "norm (BatchNormalization) takes statistics of one worker's part of a batch: build it with synchronized=True, "
        "freeze it (trainable=False) or take GroupNormalization",
    ),
    "plain-in-a-layer": (
        lambda: networks.stemmed(norm(synchronized=False)),
        "stem/norm (BatchNormalization) takes statistics of one worker's part",
    ),
    "renorm": (
        lambda: networks.with_layer(norm(renorm=True)),
        "norm (BatchNormalization) has renorm=True, whose corrections are not summed over workers",
    ),
    "own": (
        lambda: networks.with_layer(OwnNormalization(name="own", synchronized=True)),
        "own (OwnNormalization) computes in a way of its own",
    ),
    "spectral": (
        lambda: networks.with_layer(spectral()),
        "spectral (SpectralNormalization) sets a trained weight itself",
    ),
    "setter": (lambda: networks.with_layer(Setter(name="set")), "the network sets the trained weight set/scale in"),
    "folded": (networks.folded, "the first axis of what norm (BatchNormalization) normalises is not that of the"),
    "moving-mean": (
        lambda: networks.with_layer(networks.MovingMean(name="mean")),
        "what the network keeps in mean/mean depends on the frames that a worker sees",
    ),
    "mixing-operation": (
        networks.centred_by_the_batch,
        "one frame's logits change with another frame of its batch, which the operation mean or one of 1 more may mix",
    ),
    "mixing-lambda": (
        lambda: networks.with_layer(layers.Lambda(lambda x: x - keras.ops.mean(x, axis=0), name="centre")),
        "one frame's logits change with another frame of its batch, which centre (Lambda) may mix",
    ),
    "regularizer": (
        lambda: networks.with_layer(layers.Conv2D(4, 1, name="one", kernel_regularizer="l2")),
        "one/kernel has a regularizer, which is no part of the loss here",
    ),
    "activity": (
        lambda: networks.with_layer(layers.Conv2D(4, 1, name="one", activity_regularizer="l2")),
        "one (Conv2D) has a regularizer, which is no part of the loss here",
    ),
    "loss": (lambda: networks.with_layer(Loss()), "the network adds a loss of its own (add_loss)"),
    "all-frozen": (lambda: frozen(build_unet(UNET)), "the network unet has no weight that is trained"),
    "paths": (networks.same_paths, "conv/bias and conv/kernel name more than one variable"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    model = ACCEPTED[name]()
    before = [variable.numpy() for variable in model.variables]
    require_trainable_exactly(model)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value, err_msg=f"{variable.path}: looking changed it")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name):
    make, line = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        require_trainable_exactly(make())
    if name == "renorm" and "renorm" not in inspect.signature(layers.BatchNormalization).parameters:
        line = "Unrecognized keyword arguments"  # keras 3.12
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_parts_of_a_batch_and_its_statistics_exclude_each_other():
    line = "takes statistics of a whole batch, which --accumulate 4 computes in parts"
    with pytest.raises(ValueError, match=rf"norm \(BatchNormalization\) {line}"):
        require_trainable_exactly(networks.normalized(), accumulate=4)
    for name in ("unet", "stateful", "frozen"):
        require_trainable_exactly(ACCEPTED[name](), accumulate=4)


def test_what_takes_any_size_is_tried_at_one():
    image_BHWC, x = networks.frames(None, None)
    x = layers.Lambda(lambda x: x - keras.ops.mean(x, axis=0), name="centre")(networks.convolution(4)(x))
    with pytest.raises(ValueError, match=r"centre \(Lambda\) may mix"):
        require_trainable_exactly(networks.network(image_BHWC, x))

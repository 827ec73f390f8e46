"""The network: a `ModelConfig` becomes the notebook's U-Net as a `keras.Model`.

Shapes: B batch, H height px, W width px, C colour, K classes. The network takes `image_BHWC`, uint8 RGB at its own
size, divides by 255 inside, and gives `logits_BHWK`, float32 under every dtype policy.

U-Net: Ronneberger, Fischer, Brox 2015, https://arxiv.org/abs/1505.04597. Other than there, and as in the notebook,
convolutions are padded, so nothing is cropped, and the up-convolutions are 3x3.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import keras
import numpy as np

from unet_ray.model.architecture import ModelConfig

Shape = tuple[int, ...]


def build_unet(config: ModelConfig, *, seed: int | None = None, dtype_policy: str | None = None) -> keras.Model:
    """Build the U-Net with freshly drawn weights.

    Args:
        config: image size (divisible by `2 ** (depth - 1)`), classes, first filters, depth and dropout rate.
        seed: the same seed draws the same weights, in every process; None draws others each time.
        dtype_policy: a Keras policy such as `mixed_bfloat16`; None takes Keras' global one.

    Returns:
        A functional model, `[B, H, W, 3]` uint8 to `[B, H, W, K]` float32 logits (no softmax). Layers are named as
        Keras names them in a fresh process (`conv2d`, `conv2d_1`, …), whatever was built before.
    """
    layers = _Layers(seed, dtype_policy)
    image_BHWC = keras.Input((config.image_height_px, config.image_width_px, 3), dtype="uint8", name="image")
    # In float32 under every policy: 1/255 in bfloat16 is off by 0.4%, and training and segmenting would disagree.
    x = keras.layers.Rescaling(1 / 255, dtype="float32", name="rescaling")(image_BHWC)

    skips = []
    for level in range(config.depth):
        x = layers.convolve_twice(x, config.n_filters << level)
        if level >= config.depth - 2 and config.dropout > 0:
            x = layers.drop(x, config.dropout)
        if level < config.depth - 1:
            skips.append(x)
            x = layers.pool(x)

    for level in reversed(range(config.depth - 1)):
        x = layers.upsample_and_join(x, skips[level], config.n_filters << level)
        x = layers.convolve_twice(x, config.n_filters << level)

    x = layers.convolve(x, config.n_filters)
    return keras.Model(image_BHWC, layers.classify(x, config.n_classes), name="unet")


class _Layers:
    """Makes the layers in order: gives each its name of a fresh Keras process and a seed of its own."""

    def __init__(self, seed: int | None, dtype_policy: str | None) -> None:
        self._seeds = None if seed is None else np.random.default_rng(seed)
        self._dtype = dtype_policy
        self._names = {
            kind: _numbered(kind) for kind in ("conv2d", "max_pooling2d", "dropout", "conv2d_transpose", "concatenate")
        }
        # A stream of its own: with and without dropout, the same seed draws the same weights.
        self._dropout_seeds = None if seed is None else np.random.default_rng([seed, 1])

    def convolve(self, x, filters: int):
        return keras.layers.Conv2D(
            filters,
            3,
            padding="same",
            activation="relu",
            kernel_initializer=keras.initializers.HeNormal(seed=_draw(self._seeds)),
            dtype=self._dtype,
            name=next(self._names["conv2d"]),
        )(x)

    def convolve_twice(self, x, filters: int):
        return self.convolve(self.convolve(x, filters), filters)

    def drop(self, x, rate: float):
        seed = _draw(self._dropout_seeds)
        return keras.layers.Dropout(rate, seed=seed, dtype=self._dtype, name=next(self._names["dropout"]))(x)

    def pool(self, x):
        return keras.layers.MaxPooling2D(2, strides=2, dtype=self._dtype, name=next(self._names["max_pooling2d"]))(x)

    def upsample_and_join(self, x, skip, filters: int):
        upsampled = keras.layers.Conv2DTranspose(
            filters,
            3,
            strides=2,
            padding="same",
            kernel_initializer=keras.initializers.GlorotUniform(seed=_draw(self._seeds)),
            dtype=self._dtype,
            name=next(self._names["conv2d_transpose"]),
        )(x)
        join = keras.layers.Concatenate(axis=-1, dtype=self._dtype, name=next(self._names["concatenate"]))
        return join([upsampled, skip])

    def classify(self, x, n_classes: int):
        return keras.layers.Conv2D(
            n_classes,
            1,
            padding="same",
            kernel_initializer=keras.initializers.GlorotUniform(seed=_draw(self._seeds)),
            dtype="float32",  # of 5.02 GFLOP a 96x128 frame, 0.02 are here; the loss and the argmax want whole floats
            name=next(self._names["conv2d"]),
        )(x)


def _numbered(kind: str) -> Iterator[str]:
    return itertools.chain([kind], (f"{kind}_{number}" for number in itertools.count(1)))


def _draw(seeds: np.random.Generator | None) -> int | None:
    return None if seeds is None else int(seeds.integers(2**31))


def weight_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every weight that `build_unet(config)` would have, without building anything.

    Returns:
        `{"conv2d/kernel": (3, 3, 3, 32), "conv2d/bias": (32,), …}`, in the order of `named_weights`.
    """
    convolutions, transposes = _numbered("conv2d"), _numbered("conv2d_transpose")
    shapes: dict[str, Shape] = {}

    def add(names: Iterator[str], kernel: Shape, filters: int) -> None:
        name = next(names)
        shapes[f"{name}/kernel"], shapes[f"{name}/bias"] = kernel, (filters,)

    channels = 3
    for level in range(config.depth):
        filters = config.n_filters << level
        add(convolutions, (3, 3, channels, filters), filters)
        add(convolutions, (3, 3, filters, filters), filters)
        channels = filters
    for level in reversed(range(config.depth - 1)):
        filters = config.n_filters << level
        add(transposes, (3, 3, filters, channels), filters)  # Keras keeps a transposed kernel as (…, out, in)
        add(convolutions, (3, 3, 2 * filters, filters), filters)
        add(convolutions, (3, 3, filters, filters), filters)
        channels = filters
    add(convolutions, (3, 3, channels, config.n_filters), config.n_filters)
    add(convolutions, (1, 1, config.n_filters, config.n_classes), config.n_classes)
    return shapes


def named_weights(model: keras.Model) -> dict[str, np.ndarray]:
    """Copy the model's trained weights to numpy, as `layer/kernel` and `layer/bias`; no dropout or optimizer state."""
    return {
        f"{layer.name}/{variable.name}": variable.numpy().copy()
        for layer in model.layers
        for variable in layer.trainable_variables
    }


def set_named_weights(model: keras.Model, weights: dict[str, np.ndarray]) -> None:
    """Set every trained weight of the model from a dict as `named_weights` gives it.

    Raises:
        ValueError: the names or shapes are not the model's.
    """
    variables = {f"{layer.name}/{v.name}": v for layer in model.layers for v in layer.trainable_variables}
    check_weight_shapes({name: tuple(v.shape) for name, v in variables.items()}, weights)
    for name, variable in variables.items():
        variable.assign(weights[name])


def check_weight_shapes(expected: dict[str, Shape], weights: dict[str, np.ndarray]) -> None:
    """Raise a one-line ValueError unless the weights have exactly the expected names and shapes."""
    if missing := sorted(expected.keys() - weights.keys()):
        raise ValueError(f"the weights lack {_first_names(missing)}, which the network needs")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"the weights hold {_first_names(unknown)}, which the network does not have")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise ValueError(f"the weight {name} has shape {weights[name].shape}, the network needs {shape}")


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

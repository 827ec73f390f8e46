"""The built-in network: a `UnetConfig` becomes the notebook's U-Net, or a variant of it, as a `keras.Model`.

Shapes: B batch, H height px, W width px, C colour, K classes. The network takes `image_BHWC`, uint8 RGB at its own
size, divides by 255 inside, and gives `logits_BHWK`, float32 under every dtype policy.

U-Net: Ronneberger, Fischer, Brox 2015, https://arxiv.org/abs/1505.04597. Other than there, and as in the notebook,
convolutions are padded, so nothing is cropped, and the up-convolutions are 3x3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import keras
import numpy as np

from unet_ray.model.architecture import UnetConfig

MAX_GROUPS = 8
"""Groups of filters that are normalised together, where so many divide them: Wu, He 2018, arXiv:1803.08494."""


def build_unet(config: UnetConfig, *, seed: int | None = None, dtype_policy: str | None = None) -> keras.Model:
    """Build the U-Net with freshly drawn weights.

    Args:
        config: its shape; the image's sides are multiples of `config.size_step`.
        seed: the same seed draws the same weights, in every process; None draws others each time.
        dtype_policy: a Keras policy such as `mixed_bfloat16`; None takes Keras' global one.

    Returns:
        A functional model, `[B, H, W, 3]` uint8 to `[B, H, W, K]` float32 logits (no softmax). Layers are named as
        Keras names them in a fresh process (`conv2d`, `conv2d_1`, …), whatever was built before.
    """
    layers = _Layers(config, seed, dtype_policy)
    image_BHWC = keras.Input((config.image_height_px, config.image_width_px, 3), dtype="uint8", name="image")
    # In float32 under every policy: 1/255 in bfloat16 is off by 0.4%, and training and segmenting would disagree.
    x = keras.layers.Rescaling(1 / 255, dtype="float32", name="rescaling")(image_BHWC)

    skips = []
    for level in range(config.depth):
        x = layers.block(x, config.n_filters << level)
        if level >= config.depth - 2 and config.dropout > 0:
            x = layers.drop(x, config.dropout)
        if level < config.depth - 1:
            skips.append(x)
            x = layers.pool(x)

    for level in reversed(range(config.depth - 1)):
        x = layers.upsample_and_join(x, skips[level], config.n_filters << level)
        x = layers.block(x, config.n_filters << level)

    x = layers.convolve(x, config.n_filters)
    return keras.Model(image_BHWC, layers.classify(x, config.n_classes), name="unet")


class _Layers:
    """Makes the layers in order: gives each its name of a fresh Keras process and a seed of its own."""

    def __init__(self, config: UnetConfig, seed: int | None, dtype_policy: str | None) -> None:
        self._norm, self._residual = config.norm, config.residual
        self._seeds = None if seed is None else np.random.default_rng(seed)
        self._dtype = dtype_policy
        kinds = ("conv2d", "max_pooling2d", "dropout", "conv2d_transpose", "concatenate", "group_normalization")
        self._names = {kind: _numbered(kind) for kind in kinds}
        # A stream of its own: with and without dropout, the same seed draws the same weights.
        self._dropout_seeds = None if seed is None else np.random.default_rng([seed, 1])

    def convolve(self, x, filters: int, *, kernel_size: int = 3, activation: str | None = "relu"):
        x = keras.layers.Conv2D(
            filters,
            kernel_size,
            padding="same",
            activation=activation if self._norm == "none" else None,
            kernel_initializer=keras.initializers.HeNormal(seed=_draw(self._seeds)),
            dtype=self._dtype,
            name=next(self._names["conv2d"]),
        )(x)
        if self._norm == "none":
            return x
        groups = math.gcd(filters, MAX_GROUPS)
        name = next(self._names["group_normalization"])
        x = keras.layers.GroupNormalization(groups, dtype=self._dtype, name=name)(x)
        return self._activate(x) if activation else x

    def block(self, x, filters: int):
        """Two convolutions; a residual block adds what came in, projected where its channels are others."""
        if not self._residual:
            return self.convolve(self.convolve(x, filters), filters)
        shortcut = x if x.shape[-1] == filters else self.convolve(x, filters, kernel_size=1, activation=None)
        out = self.convolve(self.convolve(x, filters), filters, activation=None)
        return self._activate(keras.layers.Add(dtype=self._dtype)([out, shortcut]))

    def _activate(self, x):
        return keras.layers.Activation("relu", dtype=self._dtype)(x)

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

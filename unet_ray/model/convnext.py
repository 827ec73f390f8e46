"""The built-in network `unet_convnext`: a U-Net whose encoder is the ConvNeXtTiny of `keras.applications`.

Shapes: B batch, H height px, W width px, C colour, K classes. As `unet`, it takes `image_BHWC`, uint8 RGB, and gives
`logits_BHWK`, float32 under every dtype policy.

ConvNeXt: Liu and others 2022, https://arxiv.org/abs/2201.03545. Its four stages have a 4th, 8th, 16th and 32nd of the
image's sides. The decoder goes up to a half, with the features of the first three stages beside it, and the logits are
doubled bilinearly. All normalisation is by frame (LayerNorm, GroupNorm), so no frame changes another one's logits.

Keras' own function takes neither seeds nor a dtype policy, leaves two kinds of weights to its counters of names, has a
stochastic depth of 0, and convolves and normalises in ways that no ONNX converter takes. So its layers are made again
one by one, each with what it lacks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from unet_ray.model.architecture import ENCODER_PREFIX, IMAGENET_PREPROCESSING, ConvnextConfig
from unet_ray.model.unet import MAX_GROUPS

_STAGES = 4


def build_unet_convnext(
    config: ConvnextConfig, *, seed: int | None = None, dtype_policy: str | None = None
) -> keras.Model:
    """Builds the network with freshly drawn weights: 28 million in the encoder, 4 million in the default decoder.

    A CPU core takes 0.025 s for a 96x128 frame, 0.087 s forward and backward (`unet` 0.027 and 0.079 s; 2026-11-30,
    beside other work), and 1.4 s to build the network, of which half is Keras' own encoder that it is made after.

    Args:
        config: its shape; the image's sides are multiples of `config.size_step`.
        seed: the same seed draws the same weights, in every process; None draws others each time.
        dtype_policy: a Keras policy such as `mixed_bfloat16`; None takes Keras' global one.

    Returns:
        A functional model, `[B, H, W, 3]` uint8 to `[B, H, W, K]` float32 logits (no softmax). Names of layers are
        Keras' own in the encoder, and depend on nothing but the configuration.
    """
    image_BHWC = keras.Input((*config.image_size, 3), dtype="uint8", name="image")
    encoder = build_encoder(image_BHWC, drop_path=config.drop_path, seed=seed, dtype_policy=dtype_policy)
    skips = [encoder.get_layer(f"{ENCODER_PREFIX}downsampling_layernorm_{i}").input for i in range(_STAGES - 1)]
    decoder = _Decoder(seed, dtype_policy)
    x = encoder.output
    for level, skip in reversed(list(enumerate([None, *skips]))):
        x = decoder.block(x, skip, config.n_filters << level, f"decoder_{level}")
    logits_BHWK = keras.layers.Conv2D(
        config.n_classes,
        1,
        kernel_initializer=keras.initializers.GlorotUniform(seed=decoder.draw()),
        dtype="float32",  # as in `unet`
        name="classes",
    )(x)
    double = keras.layers.UpSampling2D(2, interpolation="bilinear", dtype="float32", name="logits")
    return keras.Model(image_BHWC, double(logits_BHWK), name=config.kind)


class _Decoder:
    """Makes the decoder's layers, each with a seed of its own."""

    def __init__(self, seed: int | None, dtype_policy: str | None) -> None:
        self._seeds = None if seed is None else np.random.default_rng([seed, 3])
        self._dtype = dtype_policy

    def draw(self) -> int | None:
        """The next layer's seed; None draws another each time."""
        return _draw(self._seeds)

    def block(self, x, skip, filters: int, name: str):
        """Doubles the sides, joins the encoder's features of that size, and convolves twice."""
        x = keras.layers.UpSampling2D(2, interpolation="nearest", dtype=self._dtype, name=f"{name}_upsampling")(x)
        if skip is not None:
            x = keras.layers.Concatenate(axis=-1, dtype=self._dtype, name=f"{name}_join")([x, skip])
        for index in range(2):
            x = self._convolve(x, filters, f"{name}_{index}")
        return x

    def _convolve(self, x, filters: int, name: str):
        initializer = keras.initializers.HeNormal(seed=self.draw())
        x = keras.layers.Conv2D(
            filters, 3, padding="same", kernel_initializer=initializer, dtype=self._dtype, name=f"{name}_conv"
        )(x)
        groups = math.gcd(filters, MAX_GROUPS)
        x = keras.layers.GroupNormalization(groups, dtype=self._dtype, name=f"{name}_norm")(x)
        return keras.layers.Activation("relu", dtype=self._dtype, name=f"{name}_relu")(x)


def build_encoder(
    image_BHWC: Any, *, drop_path: float = 0.0, seed: int | None = None, dtype_policy: str | None = None
) -> keras.Model:
    """Returns the layers of Keras' ConvNeXtTiny without its head, new ones, called on `image_BHWC`.

    Args:
        image_BHWC: a Keras tensor, uint8 or float of 0 to 255.
        drop_path: see `ConvnextConfig`; from 0 in the first block it grows to this in the last one.
        seed: see `build_unet_convnext`.
        dtype_policy: see there.
    """
    return copy_encoder(template(), image_BHWC, drop_path=drop_path, seed=seed, dtype_policy=dtype_policy)


def copy_encoder(
    keras_model: keras.Model, image_BHWC: Any, *, drop_path: float, seed: int | None, dtype_policy: str | None
) -> keras.Model:
    """The same of any ConvNeXt of Keras without its head, whose layers' names begin with `ENCODER_PREFIX`."""
    blocks = [layer.name for layer in keras_model.layers if layer.name.endswith("_identity")]
    rates = np.linspace(0.0, drop_path, len(blocks))
    copies = _Copies(dict(zip(blocks, map(float, rates), strict=True)), seed, dtype_policy)
    return keras.models.clone_model(keras_model, input_tensors=image_BHWC, clone_function=copies.copy)


@functools.cache
def template() -> keras.Model:
    """Returns Keras' own ConvNeXtTiny without its head, made in a graph: only the configurations of its layers count.

    Its weights take no memory.
    """
    with tf.Graph().as_default():
        image_BHWC = keras.Input((32, 32, 3), dtype="uint8", name="image")
        return keras.applications.ConvNeXtTiny(include_top=False, weights=None, input_tensor=image_BHWC)


def own_name(layer: keras.Layer) -> str:
    """Returns the name that a layer of Keras' ConvNeXt has here: its own, but for the last, which Keras numbers."""
    return layer.name if layer.name.startswith(ENCODER_PREFIX) else f"{ENCODER_PREFIX}layernorm"


class _Copies:
    """Makes layers of the encoder again, in order, each with a fixed name, a seed of its own and the dtype policy."""

    def __init__(self, drop_rates: dict[str, float], seed: int | None, dtype_policy: str | None) -> None:
        self._drop_rates = drop_rates
        self._dtype = dtype_policy or keras.config.dtype_policy().name
        self._seeds = None if seed is None else np.random.default_rng(seed)
        # A stream of its own: with and without stochastic depth, the same seed draws the same weights.
        self._drop_seeds = None if seed is None else np.random.default_rng([seed, 1])

    def copy(self, layer):
        """Returns a new layer in the place of the template's; for a `Sequential`, which knows no dtype, a chain."""
        if isinstance(layer, keras.Sequential):
            return _chain([self.copy(each) for each in layer.layers])
        if isinstance(layer, keras.layers.Normalization):
            return _chain(_normalization(layer.name))
        config = layer.get_config()
        if not isinstance(layer, keras.Layer):
            return type(layer).from_config(config)
        if rate := self._drop_rates.get(layer.name, 0.0):
            return self._stochastic_depth(layer.name, rate)
        config["dtype"] = self._dtype
        config["name"] = own_name(layer)
        if initializer := config.get("kernel_initializer"):
            initializer["config"]["seed"] = _draw(self._seeds)
        if config.get("groups", 1) > 1:
            return _depthwise(config)
        return _with_named_weights(type(layer).from_config(config))

    def _stochastic_depth(self, identity: str, rate: float) -> keras.Layer:
        """Drops a block for a whole frame. Keras' own layer for it draws from a seed that no train step can give."""
        name = identity.removesuffix("identity") + "stochastic_depth"
        seed = _draw(self._drop_seeds)
        return keras.layers.Dropout(rate, noise_shape=(None, 1, 1, 1), seed=seed, dtype=self._dtype, name=name)


def _chain(layers: list[keras.Layer]) -> Callable[..., Any]:
    return lambda x, mask=None: functools.reduce(lambda x, layer: layer(x), layers, x)


def _normalization(name: str) -> list[keras.Layer]:
    """`preprocessing.normalized`, to the bit, in float32 under every policy: 1/std in bfloat16 is off by 0.4%.

    Keras' layer holds tensors, which its ONNX export takes for inputs.
    """
    mean, std = np.array(IMAGENET_PREPROCESSING.mean), np.array(IMAGENET_PREPROCESSING.std)
    return [
        keras.layers.Rescaling(1.0, offset=(-mean).tolist(), dtype="float32", name=f"{name}_mean"),
        keras.layers.Rescaling((1 / std).tolist(), dtype="float32", name=f"{name}_std"),
    ]


def _depthwise(config: dict[str, Any]) -> keras.Layer:
    """The same convolution of each channel alone; its kernel has the same values in the same order.

    Keras computes a convolution in groups by XLA, also on CPUs. There it takes 10 to 40 times as long, and no ONNX
    converter knows it.
    """
    taken = ("name", "kernel_size", "strides", "padding", "data_format", "activation", "use_bias", "dtype")
    initializer = config["kernel_initializer"]
    return keras.layers.DepthwiseConv2D(**{key: config[key] for key in taken}, depthwise_initializer=initializer)


def _with_named_weights(layer: keras.Layer) -> keras.Layer:
    """LayerScale gives its weight no name, so Keras would number it by what the process made before."""
    if type(layer).__name__ == "LayerScale":
        add_weight: Callable[..., Any] = layer.add_weight
        layer.add_weight = functools.partial(add_weight, name="gamma")
    return layer


def _draw(seeds: np.random.Generator | None) -> int | None:
    return None if seeds is None else int(seeds.integers(2**31))

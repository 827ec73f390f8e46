"""Small networks of a user's own, with every kind of layer that a train step must tell apart."""

from __future__ import annotations

import itertools

import keras
from keras import layers

SIZE = 16, 24
N_CLASSES = 3


def frames(height_px: int = SIZE[0], width_px: int = SIZE[1]) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """The input, and the frames out of it as floats."""
    image_BHWC = keras.Input((height_px, width_px, 3), dtype="uint8")
    return image_BHWC, layers.Rescaling(1 / 255, dtype="float32")(image_BHWC)


def network(image_BHWC: keras.KerasTensor, x: keras.KerasTensor) -> keras.Model:
    """The model with an output of classes."""
    return keras.Model(image_BHWC, convolution(N_CLASSES, 1, name="classify", dtype="float32")(x), name="small")


def convolution(filters: int, size: int = 3, **options) -> layers.Conv2D:
    initializer = keras.initializers.GlorotUniform(seed=filters + size)
    return layers.Conv2D(filters, size, padding="same", kernel_initializer=initializer, **options)


def normalized(*, rate: float = 0.0, **options) -> keras.Model:
    """Convolution, batch normalisation, ReLU, twice; the second in a network within the network."""
    options = {"synchronized": True, "momentum": 0.9} | options
    inner_BHWC = keras.Input((*SIZE, 4))
    x = layers.BatchNormalization(name="inner_norm", **options)(
        convolution(6, name="inner_conv", use_bias=False)(inner_BHWC)
    )
    inner = keras.Model(inner_BHWC, layers.ReLU()(x), name="inner")
    image_BHWC, x = frames()
    x = layers.BatchNormalization(name="norm", **options)(convolution(4, name="conv", use_bias=False)(x))
    x = inner(layers.ReLU()(x))
    return network(image_BHWC, layers.SpatialDropout2D(rate)(x) if rate else x)


class Stem(layers.Layer):
    """A layer of the user's own that holds others."""

    def __init__(self, norm: layers.Layer, **options):
        super().__init__(**options)
        self.blocks = [{"conv": convolution(4, name="conv", use_bias=False), "norm": norm}]

    def build(self, shape) -> None:
        """Builds what it holds, so that its paths begin with its own."""
        for block in self.blocks:
            block["conv"].build(shape)
            block["norm"].build((*shape[:-1], 4))

    def call(self, x, training=None):
        """See Keras."""
        return self.blocks[0]["norm"](self.blocks[0]["conv"](x), training=training)


def stemmed(norm: layers.Layer) -> keras.Model:
    """A network whose normalisation is in a list of a dict of a layer."""
    image_BHWC, x = frames()
    return network(image_BHWC, Stem(norm, name="stem")(x))


class Counter(layers.Layer):
    """Counts the steps, and scales by 1 / (1 + steps)."""

    def __init__(self, **options):
        super().__init__(**options)
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")

    def call(self, x, training=None):
        """See Keras."""
        if training:
            self.count.assign_add(1.0)
        return x / (1.0 + self.count)


class TwoNoises(layers.Layer):
    """Two generators of its own, one of which draws twice."""

    def __init__(self, **options):
        super().__init__(**options)
        self.first, self.second = (keras.random.SeedGenerator(seed) for seed in (1, 2))

    def call(self, x, training=None):
        """See Keras."""
        if training:
            for seed in (self.first, self.second, self.first):
                x = x + keras.random.normal(keras.ops.shape(x), stddev=0.1, seed=seed)
        return x


def stateful() -> keras.Model:
    """A counter, four random generators, a frozen convolution, and normalisations that know nothing of a batch."""
    image_BHWC, x = frames()
    x = convolution(4, name="frozen", trainable=False)(x)
    x = layers.GroupNormalization(2, name="group")(convolution(4, name="conv")(x))
    x = layers.LayerNormalization(name="layer")(Counter(name="counter")(x))
    x = TwoNoises(name="noises")(layers.Dropout(0.2, name="dropout")(x))
    x = layers.BatchNormalization(name="frozen_norm", trainable=False)(layers.GaussianNoise(0.1, name="noise")(x))
    return network(image_BHWC, x)


class MovingMean(layers.Layer):
    """Keeps what it sees of frames, unless frozen."""

    def __init__(self, **options):
        super().__init__(**options)
        self.mean = self.add_weight(shape=(), initializer="zeros", trainable=False, name="mean")

    def call(self, x, training=None):
        """See Keras."""
        if training and self.trainable:
            self.mean.assign(0.9 * self.mean + 0.1 * keras.ops.mean(x))
        return x


def with_layer(*between: layers.Layer) -> keras.Model:
    """A network with these layers between two convolutions."""
    image_BHWC, x = frames()
    x = convolution(4, name="conv")(x)
    for layer in between:
        x = layer(x)
    return network(image_BHWC, x)


def centred_by_the_batch() -> keras.Model:
    """Subtracts the batch's mean by an operation, without a layer."""
    image_BHWC, x = frames()
    x = convolution(4, name="conv")(x)
    return network(image_BHWC, x - keras.ops.mean(x, axis=0, keepdims=True))


def folded() -> keras.Model:
    """Normalises halves of frames, each taken for a frame."""
    image_BHWC, x = frames()
    x = convolution(4, name="conv")(x)
    x = keras.ops.reshape(x, (-1, SIZE[0] // 2, SIZE[1], 4))
    x = layers.BatchNormalization(name="norm", synchronized=True)(x)
    return network(image_BHWC, keras.ops.reshape(x, (-1, *SIZE, 4)))


def same_paths() -> keras.Model:
    """Two networks within, whose layers have one name."""
    image_BHWC, x = frames()
    for number in itertools.count():
        inner_BHWC = keras.Input((*SIZE, x.shape[-1]))
        x = keras.Model(inner_BHWC, convolution(4, name="conv")(inner_BHWC), name=f"inner_{number}")(x)
        if number:
            return network(image_BHWC, x)

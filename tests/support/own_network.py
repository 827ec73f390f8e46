"""A network of a user's own, as text: the twenty lines of somebody who has one."""

SMALL = """
import keras
from keras import layers


def small(image_size, n_classes, width=8):
    image = keras.Input((*image_size, 3), dtype="uint8")
    x = layers.Rescaling(1 / 255)(image)
    for filters in (width, 2 * width):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(synchronized=True)(x)
        x = layers.Activation("relu")(x)
    return keras.Model(image, layers.Conv2D(n_classes, 1)(x))
"""

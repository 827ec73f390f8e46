"""A ConvNeXt of Keras with five blocks of a few filters: what is said of ConvNeXtTiny in a 20th of a second."""

from __future__ import annotations

import keras
from keras.src.applications.convnext import ConvNeXt  # its public functions have one size each

from unet_ray.classes import ClassSet
from unet_ray.model.convnext import copy_encoder

CLASSES = ClassSet.from_dict(
    {
        "name": "three",
        "classes": [{"name": f"class_{index}", "color": [index, 0, 0], "values": [index]} for index in range(3)],
    }
)


def keras_model(depths: tuple[int, ...] = (1, 1, 2, 1), filters: tuple[int, ...] = (4, 8, 8, 12)) -> keras.Model:
    """Keras' own, without its head."""
    return ConvNeXt(
        depths=depths,
        projection_dims=filters,
        name="convnext_tiny",
        weights_name="convnext_tiny",
        include_top=False,
        weights=None,
        input_shape=(32, 32, 3),
    )


def encoder(*, drop_path: float = 0.0) -> keras.Model:
    """Our copy of it."""
    image_BHWC = keras.Input((32, 32, 3), name="image")
    return copy_encoder(keras_model(), image_BHWC, drop_path=drop_path, seed=1, dtype_policy=None)

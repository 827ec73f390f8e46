"""A network's configuration becomes a Keras model: uint8 images of any size to float32 logits of the same.

Shapes: B batch, H height px, W width px, C colour, K classes.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras

from unet_ray.errors import UnusableNetwork
from unet_ray.messages import reason_of
from unet_ray.model.architecture import ConvnextConfig, KerasConfig, ModelConfig, PythonConfig, UnetConfig
from unet_ray.model.convnext import build_unet_convnext
from unet_ray.model.keras_network import build_graph
from unet_ray.model.unet import build_unet


def build_network(config: ModelConfig, *, seed: int | None = None, dtype_policy: str | None = None) -> keras.Model:
    """Builds a network with freshly drawn weights.

    Where its layers divide the image's sides (`config.size_step`), an image of another size is padded with black at
    the bottom and on the right, and the logits are cropped.

    Args:
        config: its shape.
        seed: the same seed draws the same weights, in every process; None draws others each time.
        dtype_policy: a Keras policy such as `mixed_bfloat16`; None takes Keras' global one.

    Returns:
        `[B, H, W, 3]` uint8 to `[B, H, W, K]` float32 logits (no softmax).

    Raises:
        UnusableNetwork: a function of the user's is not there, fails, or gives another network than this.
    """
    height_px, width_px = (side + -side % config.size_step for side in config.image_size)
    model = BUILDERS[config.kind](config.sized((height_px, width_px)), seed=seed, dtype_policy=dtype_policy)
    if (height_px, width_px) == config.image_size:
        return model
    missing = (0, height_px - config.image_height_px), (0, width_px - config.image_width_px)
    image_BHWC = keras.Input((*config.image_size, 3), dtype="uint8", name="image")
    padded = keras.layers.ZeroPadding2D(missing, dtype="float32", name="padding")(image_BHWC)
    logits_BHWK = keras.layers.Cropping2D(missing, dtype="float32", name="cropping")(model(padded))
    return keras.Model(image_BHWC, logits_BHWK, name=f"padded_{model.name}")


def _build_unet(config: ModelConfig, *, seed: int | None, dtype_policy: str | None) -> keras.Model:
    assert isinstance(config, UnetConfig)
    return build_unet(config, seed=seed, dtype_policy=dtype_policy)


def _build_unet_convnext(config: ModelConfig, *, seed: int | None, dtype_policy: str | None) -> keras.Model:
    assert isinstance(config, ConvnextConfig)
    return build_unet_convnext(config, seed=seed, dtype_policy=dtype_policy)


def _build_of_graph(config: ModelConfig, *, seed: int | None, dtype_policy: str | None) -> keras.Model:
    assert isinstance(config, KerasConfig)
    with _drawn_under_policy(seed, dtype_policy):  # its layers have names of their own
        return build_graph(config)


def _build_by_function(config: ModelConfig, *, seed: int | None, dtype_policy: str | None) -> keras.Model:
    """Calls the user's function in a state of Keras that depends on nothing but the arguments."""
    assert isinstance(config, PythonConfig)
    function = _imported(config.function)
    takes = inspect.signature(function).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    also = {"seed": seed, "dtype_policy": dtype_policy}
    given = {name: value for name, value in also.items() if anything or name in takes} | dict(config.arguments)
    with fresh_keras(seed, dtype_policy):
        try:
            model = function(image_size=config.image_size, n_classes=config.n_classes, **given)
        except Exception as error:
            raise UnusableNetwork(f"{config.function} failed: {type(error).__name__}: {reason_of(error)}") from error
        return _as_network(config, model)


def _imported(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise UnusableNetwork(
            f"the network {name} cannot be imported here: {error}; install its package on every node"
        ) from error
    except AttributeError as error:
        raise UnusableNetwork(f"the network {name} is not there: {module_name} has no {function_name}") from error
    except Exception as error:
        raise UnusableNetwork(
            f"the network {name} cannot be imported: {type(error).__name__}: {reason_of(error)}"
        ) from error
    if not callable(function):
        raise UnusableNetwork(f"the network {name} is a {type(function).__name__}; it must be a function")
    return function


def _as_network(config: PythonConfig, model: Any) -> keras.Model:
    """Checks what a function returned; logits in half precision are made float32."""
    if not isinstance(model, keras.Model):
        raise UnusableNetwork(f"{config.function} returned a {type(model).__name__}; it must return a keras.Model")
    height_px, width_px = config.image_size
    takes, gives = (None, height_px, width_px, 3), (None, height_px, width_px, config.n_classes)
    if not _has_shape(model, "input", takes) or not _has_shape(model, "output", gives):
        raise UnusableNetwork(
            f"{config.function} returned a network from {_shape(model, 'input')} to {_shape(model, 'output')}; for "
            f"--image-size {height_px} {width_px} it must be from {takes} to {gives}"
        )
    if model.input.dtype == "uint8" and model.output.dtype == "float32":
        return model
    image_BHWC = keras.Input(takes[1:], dtype="uint8", name="image")
    logits_BHWK = model(keras.ops.cast(image_BHWC, model.input.dtype))
    return keras.Model(image_BHWC, keras.ops.cast(logits_BHWK, "float32"), name=model.name)


def _shape(model: keras.Model, side: str) -> Any:
    return getattr(getattr(model, side, None), "shape", None)


def _has_shape(model: keras.Model, side: str, expected: tuple[int | None, ...]) -> bool:
    shape = _shape(model, side)
    if shape is None or len(shape) != len(expected):
        return False
    return all(actual in (None, wanted) for actual, wanted in zip(shape[:3], expected[:3], strict=True)) and (
        shape[3] == expected[3]
    )


@contextlib.contextmanager
def fresh_keras(seed: int | None, dtype_policy: str | None) -> Iterator[None]:
    """In the block Keras numbers its layers as in a new process, draws by the seed, and has this policy.

    What is built outside with names of its own is not touched; the policy of before comes back.
    """
    keras.utils.clear_session(free_memory=False)
    with _drawn_under_policy(seed, dtype_policy):
        yield


@contextlib.contextmanager
def _drawn_under_policy(seed: int | None, dtype_policy: str | None) -> Iterator[None]:
    before = keras.config.dtype_policy()
    if seed is not None:
        keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy(dtype_policy or before)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


BUILDERS: dict[str, Callable[..., keras.Model]] = {
    "unet": _build_unet,
    "unet_convnext": _build_unet_convnext,
    "python": _build_by_function,
    "keras": _build_of_graph,
}
"""What builds each kind of network."""

"""Whether a network that is not built in can be built: a child process tries it before Ray starts.

`python -m unet_ray.model.network_check` is that child: the process that asks need not load TensorFlow (2.6 s), nor run
code that is not ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unet_ray.messages import say
from unet_ray.model.architecture import KerasConfig, ModelConfig, PythonConfig, config_of
from unet_ray.model.child_process import answer_parent, ask_child
from unet_ray.pixels.preprocessing import Preprocessing

if TYPE_CHECKING:
    import keras


def check_network(
    config: ModelConfig,
    *,
    weights: Mapping[str, Sequence[int]] | None = None,
    child: str = "unet_ray.model.network_check",
    **more: Any,
) -> None:
    """Builds the network of a user's function, or of Keras' layers, in a child process; others are known to build.

    Args:
        config: the network.
        weights: shapes of the weights that it must have, by name; None where it shall be trained.
        child: the module that runs `answer` as its main program.
        more: what else that is asked.

    Raises:
        ValueError: the function is not there, fails, or gives a network that does not fit; one line.
    """
    if not isinstance(config, PythonConfig | KerasConfig):
        return
    say("building the network once, to see whether it can be built")
    title = config.function if isinstance(config, PythonConfig) else "the network"
    question = {
        "network": config.network(),
        "input": {name: getattr(config, name) for name in ("image_height_px", "image_width_px", "n_classes")},
        "preprocessing": config.preprocessing.to_dict(),
        "weights": None if weights is None else {name: list(shape) for name, shape in weights.items()},
    }
    ask_child(child, question | more, title, late="has built no network")


def answer(check: Callable[[keras.Model, Mapping[str, Any]], None] = lambda model, question: None) -> None:
    """Answers the question of `check_network`.

    Args:
        check: what else must hold of the built network, which it is given with the question; raises ValueError.
    """
    answer_parent(lambda question: check(_build(question), question))


def _build(question: Mapping[str, Any]) -> keras.Model:
    import tensorflow as tf

    from unet_ray.model import weights
    from unet_ray.model.networks import build_network

    tf.config.set_visible_devices([], "GPU")  # the driver's node may have one, and others use it
    preprocessing = Preprocessing.from_dict(question["preprocessing"])
    config = config_of(question["network"], **question["input"], preprocessing=preprocessing)
    if isinstance(config, KerasConfig) and question["weights"] is not None:
        weights.check_shapes(weights.weight_shapes(config), _shapes(question))
    model = build_network(config, seed=0)
    variables = weights.named_variables(model)
    if other := [name for name, variable in variables.items() if variable.dtype != "float32"]:
        raise ValueError(f"the weight {other[0]} is of the type {variables[other[0]].dtype}; weights must be float32")
    if question["weights"] is not None:
        shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
        weights.check_shapes(shapes, _shapes(question))
    return model


def _shapes(question: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in question["weights"].items()}


if __name__ == "__main__":
    answer()

"""The weights of any network by name: copied, set, and compared with what a network needs before it is built.

A weight's name is its variable's path in Keras, such as `conv2d/kernel`. Weights are trained (kernels, biases, gamma
and beta) or state (moving statistics); seeds of dropout are neither.
"""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from unet_ray.model.architecture import ModelConfig
from unet_ray.model.networks import build_network

Shape = tuple[int, ...]


def weight_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Returns name and shape of every weight that `build_network(config)` would have, in the network's order.

    The network is built in a graph, where variables take no memory: 0.2 s, however large it would be.
    """
    with tf.Graph().as_default():
        return {name: tuple(variable.shape) for name, variable in named_variables(build_network(config)).items()}


def named_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """Returns the variables of all weights by name. Raises ValueError where two have one name."""
    named: dict[str, keras.Variable] = {}
    for variable in model.weights:
        if variable.path in named:
            raise ValueError(
                f"the network has two weights of the name {variable.path}; give each of its layers a name of its own"
            )
        named[variable.path] = variable
    return named


def named_weights(model: keras.Model) -> dict[str, np.ndarray]:
    """Copies the model's weights to numpy, by name, in the network's order."""
    return {name: variable.numpy().copy() for name, variable in named_variables(model).items()}


def set_named_weights(model: keras.Model, weights: Mapping[str, np.ndarray]) -> None:
    """Sets every weight of the model from a dict as `named_weights` gives it.

    Raises:
        ValueError: the names or shapes are not the model's.
    """
    variables = named_variables(model)
    check_weight_shapes({name: tuple(variable.shape) for name, variable in variables.items()}, weights)
    for name, variable in variables.items():
        variable.assign(weights[name])


def classes_layer(model: keras.Model) -> list[str]:
    """Returns the names of the weights that make classes of features: those of the last layer that has any."""
    names = list(named_variables(model))
    last = names[-1].rpartition("/")[0]
    return [name for name in names if name.rpartition("/")[0] == last]


def check_weight_shapes(expected: Mapping[str, Shape], weights: Mapping[str, np.ndarray]) -> None:
    """Raises a one-line ValueError unless the weights have exactly the expected names and shapes."""
    check_shapes(expected, {name: tensor.shape for name, tensor in weights.items()})


def check_shapes(expected: Mapping[str, Shape], weights: Mapping[str, Shape]) -> None:
    """The same, of the weights' shapes."""
    if missing := sorted(expected.keys() - weights.keys()):
        raise ValueError(f"the weights lack {_first_names(missing)}, which the network needs")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"the weights hold {_first_names(unknown)}, which the network does not have")
    for name, shape in expected.items():
        if weights[name] != shape:
            raise ValueError(f"the weight {name} has shape {weights[name]}, the network needs {shape}")


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

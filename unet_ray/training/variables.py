"""A network's variables by what a train step does with them: trained weights, state, and seeds of stochastic layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras
    import tensorflow as tf


@dataclass(frozen=True, kw_only=True)
class NetworkVariables:
    """The variables of a built network, each list in Keras' order."""

    trained: list[keras.Variable]
    """What the optimizer changes."""
    state: list[keras.Variable]
    """What a forward pass in training changes: moving statistics, counters. Equal on all workers, in checkpoints.
    A frozen layer's weights (`trainable=False`) never change."""
    seeds: list[keras.Variable]
    """One for each random generator of a layer such as Dropout: given from outside at every step, in no checkpoint."""
    untrained: list[keras.Variable]
    """`state`, `seeds` and frozen weights, as `stateless_call` takes them."""

    @staticmethod
    def of(model: keras.Model) -> NetworkVariables:
        """Sorts a network's variables: Keras counts random seeds among its variables, but not among its weights."""
        weights = {id(weight) for weight in model.weights}
        frozen = {weight for layer in layers_of(model) if not layer.trainable for weight in _own_weights(layer)}
        untrained = model.non_trainable_variables
        return NetworkVariables(
            trained=model.trainable_variables,
            state=[v for v in untrained if id(v) in weights - frozen],
            seeds=[v for v in untrained if id(v) not in weights],
            untrained=untrained,
        )

    def untrained_values(self, seeds_L2: tf.Tensor) -> list[tf.Tensor]:
        """Returns a value for each of `untrained`: the seeds that are given, and what the others are now."""
        seed = {id(variable): seeds_L2[index] for index, variable in enumerate(self.seeds)}
        return [seed.get(id(variable), variable.value) for variable in self.untrained]

    def state_of(self, untrained_values: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the values of `state` out of those of `untrained`."""
        value = {id(variable): after for variable, after in zip(self.untrained, untrained_values, strict=True)}
        return [value[id(variable)] for variable in self.state]


def layers_of(model: keras.Model) -> list[keras.Layer]:
    """Returns the model and all layers in it: of networks within it, of wrappers, of layers of the user's own."""
    return model._flatten_layers()  # keras 3.15 lists those of a layer's attributes nowhere else


def _own_weights(layer: keras.Layer) -> set[int]:
    """Ids of a layer's weights without those of layers in it, which may be frozen, or not, by themselves."""
    inner = {id(weight) for within in layers_of(layer)[1:] for weight in within.weights}
    return {id(weight) for weight in layer.weights} - inner


def layer_name(layer: keras.Layer) -> str:
    """Returns how messages call a layer, such as `decoder/bn (BatchNormalization)`."""
    return f"{layer.path or layer.name} ({type(layer).__name__})"


def require_own_paths(variables: Iterable[keras.Variable]) -> None:
    """Raises a one-line ValueError where two variables share a path, by which checkpoints and models name them.

    An optimizer names its own after them with `_` for `/`, so two that differ in this alone share one, too.
    """
    counts = Counter(variable.path.replace("/", "_") for variable in variables)
    shared = sorted({v.path for v in variables if counts[v.path.replace("/", "_")] > 1})
    if shared:
        raise ValueError(
            f"{' and '.join(shared[:2])} name{'s' if len(shared) == 1 else ''} more than one variable of the network; "
            "give each layer a name of its own"
        )

"""Which networks train alike on any number of workers; the others are refused by a layer's name.

Shapes: `B` frames, `H` height px, `W` width px, `C` colour, `K` classes, `L` seeds of stochastic layers.

One worker with 16 frames computes what two with 8 do only where a frame's logits follow from this frame alone (or from
sums over all frames, as `batch_norm` takes them), and what the network keeps does not depend on which frames a worker
has. Keras' own layers are known; what the user wrote is tried: see `_require_frames_apart`.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from unet_ray.model.network_check import answer
from unet_ray.training import batch_norm
from unet_ray.training.variables import NetworkVariables, layer_name, layers_of, require_own_paths

_N_FRAMES = 3
"""Of a trial: two that count and one that pads. A number that no other axis is likely to have."""
_TOLERANCE = 1e-3
"""Of the largest logit; a frame that another one changes is changed by more."""
_ANY_SIDE_PX = 64
"""Of a trial's frames where the network takes any size."""


def require_trainable_exactly(model: keras.Model, *, accumulate: int = 1) -> None:
    """Raises ValueError unless the built network trains alike on any number of workers; the message is one line.

    Takes as long as it takes to trace the network forward where it has batch normalisation, and three times three
    frames forward where it has layers or operations that are not Keras' own layers; else nothing.

    Args:
        model: takes uint8 [B, H, W, 3] and gives logits [B, H, W, K].
        accumulate: micro-batches of a worker's part of a batch.
    """
    require_own_paths(model.weights)
    if not model.trainable_variables:
        raise ValueError(f"the network {model.name} has no weight that is trained: all its layers are frozen")
    _require_no_regularizer(model)
    for layer in layers_of(model):
        _require_known_statistics(layer)
    batch_norms = batch_norm.trained_layers(model)
    if batch_norms and accumulate > 1:
        raise ValueError(
            f"{layer_name(batch_norms[0])} takes statistics of a whole batch, which --accumulate {accumulate} computes "
            "in parts; give --accumulate 1, or take GroupNormalization"
        )
    unproven = _unproven(model, batch_norms)
    if batch_norms or unproven:
        trial = _Trial(model, batch_norms)
        if unproven:
            _require_frames_apart(trial, unproven)


def _require_no_regularizer(model: keras.Model) -> None:
    """It would be left out of the loss in silence."""
    regular = [v.path for v in model.trainable_variables if getattr(v, "regularizer", None) is not None]
    regular += [layer_name(layer) for layer in layers_of(model) if getattr(layer, "activity_regularizer", None)]
    if regular:
        raise ValueError(
            f"{regular[0]} has a regularizer, which is no part of the loss here; build it without, and give "
            "--optimizer adamw --weight-decay instead"
        )


def _require_known_statistics(layer: keras.Layer) -> None:
    if not layer.trainable:
        return
    if isinstance(layer, keras.layers.SpectralNormalization):
        raise ValueError(f"{layer_name(layer)} sets a trained weight itself in every forward pass; build it without")
    if not isinstance(layer, keras.layers.BatchNormalization):
        return
    if type(layer).call is not keras.layers.BatchNormalization.call:
        reason = "computes in a way of its own, which cannot be summed over workers: take Keras' BatchNormalization"
    elif getattr(layer, "renorm", False):  # keras 3.12 has no such option
        reason = "has renorm=True, whose corrections are not summed over workers: build it without"
    elif not layer.synchronized:
        reason = "takes statistics of one worker's part of a batch: build it with synchronized=True"
    else:
        return
    raise ValueError(f"{layer_name(layer)} {reason}, freeze it (trainable=False) or take GroupNormalization")


def _unproven(model: keras.Model, batch_norms: list[keras.layers.BatchNormalization]) -> list[str]:
    """Names of what may mix frames or keep what it saw of them: all but Keras' own layers without state."""
    names = []
    for layer in layers_of(model):
        module = type(layer).__module__
        foreign = not module.startswith("keras.") or "image_preprocessing" in module
        if foreign or isinstance(layer, keras.layers.Lambda | keras.layers.TFSMLayer):
            names.append(layer_name(layer))
        operations = getattr(layer, "operations", ())
        names += [f"the operation {each.name}" for each in operations if not isinstance(each, keras.Layer)]
    return names + [variable.path for variable in _own_state(NetworkVariables.of(model), batch_norms)]


def _own_state(variables: NetworkVariables, batch_norms: list[keras.layers.BatchNormalization]) -> list[keras.Variable]:
    """All state but that of batch normalisation."""
    summed = {id(weight) for layer in batch_norms for weight in layer.weights}
    return [variable for variable in variables.state if id(variable) not in summed]


class _Trial:
    """The network's forward pass in training, traced; raises ValueError for what the trace shows."""

    def __init__(self, model: keras.Model, batch_norms: list[keras.layers.BatchNormalization]):
        self._model, self._batch_norms = model, batch_norms
        self.variables = NetworkVariables.of(model)
        self.own_state = _own_state(self.variables, batch_norms)
        self._problems: list[str] = []
        self.size = [side or _ANY_SIDE_PX for side in model.input_shape[1:3]]
        self.forward = tf.function(self._run, autograph=False).get_concrete_function(
            tf.TensorSpec([_N_FRAMES, *self.size, 3], tf.uint8),
            tf.TensorSpec([len(self.variables.seeds), 2], tf.int64),
        )
        if self._problems:
            raise ValueError(self._problems[0])

    def _run(self, image_BHWC, seeds_L2):
        variables = self.variables
        given = [tf.convert_to_tensor(variable.value) for variable in variables.trained]
        untrained = variables.untrained_values(seeds_L2)
        mapping = [*zip(variables.trained, given, strict=True), *zip(variables.untrained, untrained, strict=True)]
        counted_B = tf.constant([1.0] * (_N_FRAMES - 1) + [0.0])
        with (
            batch_norm.over_workers(self._batch_norms, counted_B, _of_one_worker, self._problems.append),
            keras.StatelessScope(mapping, collect_losses=True) as scope,
        ):
            logits_BHWK = self._model(image_BHWC, training=True)
        for variable, value in zip(variables.trained, given, strict=True):
            if scope.get_current_value(variable) is not value:
                self._problems.append(f"the network sets the trained weight {variable.path} in its forward pass")
        if scope.losses:
            self._problems.append("the network adds a loss of its own (add_loss), which is no part of the loss here")
        return logits_BHWK, [scope.get_current_value(variable) for variable in self.own_state]


def _of_one_worker(part_N: tf.Tensor) -> tf.Tensor:
    return part_N[tf.newaxis]


def _require_frames_apart(trial: _Trial, unproven: list[str]) -> None:
    """Tries whether padding changes what other frames give, and whether frames change what the network keeps."""
    rng = np.random.default_rng(0)
    image_BHWC, others_BHWC = rng.integers(0, 256, (2, _N_FRAMES, *trial.size, 3), np.uint8)
    seeds_L2, others_L2 = rng.integers(0, 2**31, (2, len(trial.variables.seeds), 2))
    repadded_BHWC = np.concatenate([image_BHWC[:-1], others_BHWC[-1:]])
    logits_BHWK, state = trial.forward(tf.constant(image_BHWC), tf.constant(seeds_L2))
    again_BHWK, _ = trial.forward(tf.constant(repadded_BHWC), tf.constant(seeds_L2))
    _, state_of_others = trial.forward(tf.constant(others_BHWC), tf.constant(others_L2))
    largest = np.abs(logits_BHWK).max()
    if np.abs(logits_BHWK - again_BHWK)[:-1].max() > _TOLERANCE * largest:
        raise ValueError(
            f"one frame's logits change with another frame of its batch, which {_first(unproven)} may mix; then the "
            "number of workers would change what is learned"
        )
    for variable, one, other in zip(trial.own_state, state, state_of_others, strict=True):
        if not np.array_equal(one, other):
            raise ValueError(
                f"what the network keeps in {variable.path} depends on the frames that a worker sees, so that workers "
                "would differ; freeze that layer (trainable=False), or take BatchNormalization(synchronized=True)"
            )


def _first(names: list[str]) -> str:
    return names[0] + (f" or one of {len(names) - 1} more" if len(names) > 1 else "")


if __name__ == "__main__":  # the child of `check_network`, for a network that is to be trained
    answer(lambda model, question: require_trainable_exactly(model, accumulate=question["accumulate"]))

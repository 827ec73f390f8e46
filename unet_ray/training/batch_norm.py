"""Batch normalisation over the frames of all workers: exact, and without the frames that only pad a short batch.

Shapes: `B` this worker's part of a batch, `C` channels, `R` workers, `N` numbers.

Keras' own layer with `synchronized=True` sums over the workers, too, but it counts every frame, computes the variance
as E[x^2] - E[x]^2, which cancels, and sums three times (keras 3.15, backend/tensorflow/nn.py). While a train step is
traced, its layers' `call` is another, so that the network stays the user's: its variables, their paths and what it
computes in inference.

Workers meet once for each layer forward and once backward: TensorFlow keeps 1 KB of every sum, see
`steps.start_strategy`. So each gives the mean and the squares of its own frames, which are combined as in Chan, Golub,
LeVeque 1979, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, equation 2.1.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import keras
import tensorflow as tf

from unet_ray.classes import IGNORED_ID
from unet_ray.training.variables import layer_name, layers_of

Gather = Callable[[tf.Tensor], tf.Tensor]
"""Takes one worker's numbers, [N], and gives those of all, [R, N]; gradients flow through it."""


def trained_layers(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """Returns the layers that normalise by the batch in training; a frozen one does by its moving statistics."""
    kind = keras.layers.BatchNormalization
    return [layer for layer in layers_of(model) if isinstance(layer, kind) and layer.trainable]


def counted_frames(mask_BHW: tf.Tensor) -> tf.Tensor:
    """Returns 1 for a frame that enters the statistics, float32 [B], and 0 for one without a valid pixel: padding.

    A frame of the training set that is void wholly is such a one, too: what counts is a function of the frame alone,
    whatever part of a batch it is in.
    """
    return tf.cast(tf.reduce_any(tf.not_equal(mask_BHW, IGNORED_ID), axis=[1, 2]), tf.float32)


@contextlib.contextmanager
def over_workers(
    layers: Iterable[keras.layers.BatchNormalization],
    counted_B: tf.Tensor,
    gather: Gather,
    on_problem: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Within it, these layers take their statistics over all workers' frames that count.

    Args:
        layers: of `trained_layers`.
        counted_B: see `counted_frames`.
        gather: see `Gather`.
        on_problem: gets a line for a layer whose frames cannot be counted, which else raises ValueError, to which
            Keras adds lines.
    """
    layers = list(layers)
    for layer in layers:
        layer.call = functools.partial(_call, layer, counted_B, gather, on_problem)
    try:
        yield
    finally:
        for layer in layers:
            del layer.call


def _call(layer, counted_B, gather: Gather, on_problem, inputs, training=None, mask=None):
    """What `keras.layers.BatchNormalization.call` computes, but for the moments."""
    if not training:
        return type(layer).call(layer, inputs, training=training, mask=mask)
    if problem := _problem(layer, inputs, counted_B, mask):
        if on_problem is None:
            raise ValueError(problem)
        on_problem(problem)
        return inputs
    x = tf.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))
    mean_C, variance_C, n_frames = _moments(x, counted_B, layer.axis % len(x.shape), gather)
    momentum = tf.where(n_frames > 0, layer.momentum, 1.0)  # a batch of no frame moves nothing
    for moving_C, batch_C in ((layer.moving_mean, mean_C), (layer.moving_variance, variance_C)):
        moving_C.assign(moving_C.value * momentum + batch_C * (1.0 - momentum))
    offset_C = layer.beta.value if layer.center else None
    scale_C = layer.gamma.value if layer.scale else None
    y = keras.ops.batch_normalization(x, mean_C, variance_C, layer.axis, offset_C, scale_C, layer.epsilon)
    return tf.cast(y, layer.compute_dtype)


def _problem(layer, inputs, counted_B, mask) -> str | None:
    if mask is not None:
        return f"{layer_name(layer)} is called with a mask, which statistics over workers do not heed"
    if inputs.shape[0] == counted_B.shape[0]:
        return None
    return (
        f"the first axis of what {layer_name(layer)} normalises is not that of the frames, so that frames of padding "
        "would be counted; freeze it (trainable=False) or take GroupNormalization"
    )


def _moments(x, counted_B, axis: int, gather: Gather):
    """Mean and variance [C] over the frames that count, of all workers, and how many these are."""
    mean_C, squares_C, n_frames = _moments_of_part(x, counted_B, axis)
    parts_RN = gather(tf.concat([mean_C, squares_C, [n_frames]], 0))
    n_channels = x.shape[axis]
    mean_RC, squares_RC, n_R1 = tf.split(parts_RN, [n_channels, n_channels, 1], axis=1)
    n_frames = tf.reduce_sum(n_R1)
    mean_C = tf.math.divide_no_nan(tf.reduce_sum(n_R1 * mean_RC, 0), n_frames)
    squares_C = tf.reduce_sum(squares_RC + n_R1 * tf.square(mean_RC - mean_C), 0)
    return mean_C, tf.math.divide_no_nan(squares_C, n_frames), n_frames


def _moments_of_part(x, counted_B, axis: int):
    """Mean [C], sum of squared distances from it [C], a frame's being the mean of its pixels', and number of frames."""
    pixels = [other for other in range(1, len(x.shape)) if other != axis]
    per_channel = [-1 if other == axis else 1 for other in range(len(x.shape))]
    n_frames = tf.reduce_sum(counted_B)
    mean_BC = tf.reduce_mean(x, pixels)
    mean_C = tf.math.divide_no_nan(tf.linalg.matvec(mean_BC, counted_B, transpose_a=True), n_frames)
    # The sum of squares is least at the mean: its slope there is 0, so nothing flows back through it.
    distance = x - tf.reshape(tf.stop_gradient(mean_C), per_channel)
    squares_BC = tf.reduce_mean(tf.square(distance), pixels)
    return mean_C, tf.linalg.matvec(squares_BC, counted_B, transpose_a=True), n_frames

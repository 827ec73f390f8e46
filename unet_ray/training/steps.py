"""The arithmetic of training on one worker: the network's optimizer, its train step over all workers, its predictions.

Shapes: `B` this worker's part of a batch, `H` height px, `W` width px, `C` colour, `K` classes, `L` dropout layers.

Keras 3 does not support `model.fit` under `MultiWorkerMirroredStrategy` (keras#20585). The strategy serves for what
only it can do: sums over the workers. Variables are plain ones, outside of its scope: every worker draws the same
initial weights from the seed and adds the same reduced gradients, so that all stay equal to the bit. The optimizer runs
outside `strategy.run`, where Keras has nothing to reduce; inside, it would clip each worker's gradient *before* its own
reduction (keras 3.15, base_optimizer.py), and one worker with 16 frames and two with 8 would part.

Functions are traced without AutoGraph, which takes 0.6 s more and changes nothing: none branches on a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from unet_ray.classes import IGNORED_ID
from unet_ray.model import losses

_SUM = tf.distribute.ReduceOp.SUM


class StepResult(NamedTuple):
    """What one step gave, equal on all workers: float32 scalars over the whole batch."""

    loss: tf.Tensor
    correct_pixels: tf.Tensor
    valid_pixels: tf.Tensor


def start_strategy(n_workers: int) -> tf.distribute.Strategy:
    """Joins the workers named in `TF_CONFIG`; a single one needs no strategy. To be called before any operation.

    A worker that died or was stopped is noticed by TensorFlow's coordination service, in 1 s and 9 s. Sums have no
    timeout of their own (TensorFlow would keep 18 KB for each until it is over): `Watchdog` ends who waits too long.
    What TensorFlow keeps of every sum for ever, its name and members, is 1 KB, two sums a step (tensorflow 2.21:
    the instance table of collective_param_resolver_local.cc; 2026-11-24).
    """
    if n_workers == 1:
        return tf.distribute.get_strategy()
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    # Each worker feeds its own part of a batch, so a second replica in it would see the same frames again.
    assert strategy.num_replicas_in_sync == n_workers, (strategy.num_replicas_in_sync, n_workers)
    return strategy


def make_optimizer(
    kind: str, learning_rate: float | keras.optimizers.schedules.LearningRateSchedule, weight_decay: float
) -> keras.Optimizer:
    """Returns Adam, or AdamW whose weight decay leaves the biases out."""
    # A name of our own: Keras numbers its own by what the process made before, and a checkpoint's names must not vary.
    if kind == "adam":
        return keras.optimizers.Adam(learning_rate, name="adam")
    optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=weight_decay, name="adamw")
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def make_schedule(
    kind: str, learning_rate: float, total_steps: int, warmup_steps: int
) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """Returns a constant, or a cosine to zero at the last step, after a linear warm-up from zero."""
    if kind == "constant":
        return learning_rate
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup_steps else learning_rate,
        decay_steps=max(1, total_steps - warmup_steps),
        warmup_target=learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )


class TrainStep:
    """One optimizer step: the loss's sums and then the gradients are added over all workers, clipped, and applied."""

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.Optimizer,
        strategy: tf.distribute.Strategy,
        *,
        loss: str,
        class_weights_K: Sequence[float] | None = None,
        clip_norm: float = 0.0,
    ):
        self._model, self._optimizer, self._strategy = model, optimizer, strategy
        self._loss, self._class_weights_K, self._clip_norm = loss, class_weights_K, clip_norm
        self._variables = model.trainable_variables
        if not optimizer.built:
            optimizer.build(self._variables)
        self.n_dropouts = len(model.non_trainable_variables)
        self._step = tf.function(self._apply, autograph=False)
        self.reduced_gradients = tf.function(self._gradients, autograph=False)

    def trace(self, n_frames: int) -> None:
        """Traces the step for parts of so many frames, 2 s, so that the first of them need not wait."""
        size = self._model.input_shape[1:3]
        self._step.get_concrete_function(
            tf.TensorSpec([n_frames, *size, 3], tf.uint8),
            tf.TensorSpec([n_frames, *size], tf.uint8),
            tf.TensorSpec([self.n_dropouts, 2], tf.int64),
        )

    def __call__(self, image_BHWC: np.ndarray, mask_BHW: np.ndarray, seeds_L2: np.ndarray) -> StepResult:
        """Takes this worker's frames, uint8, with their encoded masks, and a seed for each dropout layer, int64."""
        return self._step(tf.constant(image_BHWC), tf.constant(mask_BHW), tf.constant(seeds_L2))

    def _apply(self, image_BHWC, mask_BHW, seeds_L2) -> StepResult:
        result, gradients = self._gradients(image_BHWC, mask_BHW, seeds_L2)
        if self._clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, self._clip_norm)
        self._optimizer.apply(gradients, self._variables)
        return result

    def _gradients(self, image_BHWC, mask_BHW, seeds_L2) -> tuple[StepResult, list[tf.Tensor]]:
        return self._strategy.run(self._replica_gradients, args=(image_BHWC, mask_BHW, seeds_L2))

    def _replica_gradients(self, image_BHWC, mask_BHW, seeds_L2) -> tuple[StepResult, list[tf.Tensor]]:
        replica = tf.distribute.get_replica_context()
        values = [tf.convert_to_tensor(variable.value) for variable in self._variables]
        with tf.GradientTape() as tape:
            tape.watch(values)
            # A dropout layer's state is its seed: given from outside, dropout is a function of seed, step and rank.
            logits_BHWK, _ = self._model.stateless_call(values, tf.unstack(seeds_L2), image_BHWC, training=True)
            sums_S = losses.loss_sums(logits_BHWK, mask_BHW, loss=self._loss, class_weights_K=self._class_weights_K)
            counts_2 = _pixel_counts(logits_BHWK, mask_BHW)
            # One sum over the workers, not two: a round trip costs more than its few numbers.
            total = replica.all_reduce(_SUM, tf.stop_gradient(tf.concat([sums_S, counts_2], axis=0)))
            total_S, correct, valid = total[:-2], total[-2], total[-1]
            share = losses.replica_share(sums_S, total_S, loss=self._loss)
        gradients = replica.all_reduce(_SUM, tape.gradient(share, values))
        return StepResult(losses.loss_from_sums(total_S, loss=self._loss), correct, valid), gradients


def _pixel_counts(logits_BHWK, mask_BHW) -> tf.Tensor:
    """Correct and valid pixels, float32 [2]."""
    valid_BHW = tf.not_equal(mask_BHW, IGNORED_ID)
    hits_BHW = tf.equal(tf.argmax(logits_BHWK, axis=-1, output_type=tf.int32), tf.cast(mask_BHW, tf.int32))
    counted = tf.stack([tf.logical_and(hits_BHW, valid_BHW), valid_BHW])
    return tf.reduce_sum(tf.cast(counted, tf.float32), axis=[1, 2, 3])


class Predictor:
    """The network as it is used: masks of its own size, and of each frame's size from logits resized bilinearly."""

    def __init__(self, model: keras.Model, *, loss: str = "ce", class_weights_K: Sequence[float] | None = None):
        self._model, self._loss, self._class_weights_K = model, loss, class_weights_K
        self._forward = tf.function(self._predict, autograph=False)
        size = tf.TensorSpec([2], tf.int32)
        logits_HWK = tf.TensorSpec([*model.output_shape[1:]], tf.float32)
        self._resize = tf.function(_resized_mask, input_signature=[logits_HWK, size], autograph=False)

    def __call__(self, image_BHWC: np.ndarray, mask_BHW: np.ndarray) -> tuple[tf.Tensor, np.ndarray, np.ndarray]:
        """Returns logits [B, H, W, K], the predicted mask uint8 [B, H, W] and the sums of the loss [S]."""
        logits_BHWK, predicted_BHW, sums_S = self._forward(tf.constant(image_BHWC), tf.constant(mask_BHW))
        return logits_BHWK, predicted_BHW.numpy(), sums_S.numpy()

    def resized_mask(self, logits_HWK: tf.Tensor, height_px: int, width_px: int) -> np.ndarray:
        """Returns a mask, uint8 [height_px, width_px]: logits resized bilinearly (half-pixel centres), then argmax."""
        return self._resize(logits_HWK, tf.constant([height_px, width_px])).numpy()

    def loss(self, total_S: np.ndarray) -> float:
        """Returns the loss of sums that were added over batches and workers."""
        return float(losses.loss_from_sums(tf.constant(total_S, tf.float32), loss=self._loss))

    def _predict(self, image_BHWC, mask_BHW):
        logits_BHWK = self._model(image_BHWC, training=False)
        sums_S = losses.loss_sums(logits_BHWK, mask_BHW, loss=self._loss, class_weights_K=self._class_weights_K)
        return logits_BHWK, tf.cast(tf.argmax(logits_BHWK, axis=-1), tf.uint8), sums_S


def _resized_mask(logits_HWK, size):
    resized = tf.image.resize(logits_HWK, size, method="bilinear")
    return tf.cast(tf.argmax(resized, axis=-1), tf.uint8)


class WorkerSum:
    """Adds up arrays of all workers. A barrier: every worker must come, with an array of one shape and type."""

    def __init__(self, strategy: tf.distribute.Strategy):
        self._strategy = strategy
        self._add = tf.function(self._run, autograph=False)  # one trace for each shape and type, kept

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """Returns the sum, on every worker; int64 stays exact."""
        return self._add(tf.constant(array)).numpy()

    def _run(self, array):
        def add(part):
            part = tf.identity(part)  # an argument has no device yet, and the sum is sent from one
            return tf.distribute.get_replica_context().all_reduce(_SUM, part)

        return self._strategy.run(add, args=(array,))


def dropout_seeds(seed: int, step: int, rank: int, n_dropouts: int) -> np.ndarray:
    """Returns the seeds of one step's dropout layers on one worker, int64 [L, 2]: a function of its arguments alone."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(2 * n_dropouts)
    return words.astype(np.int64).reshape(n_dropouts, 2) & 0x7FFFFFFF


def state_tensors(model: keras.Model, optimizer: keras.Optimizer) -> dict[str, np.ndarray]:
    """Returns copies of all variables of model and optimizer, but for dropout's seeds, which every step is given."""
    return {name: np.array(variable.numpy()) for name, variable in _variables(model, optimizer).items()}


def restore_state(model: keras.Model, optimizer: keras.Optimizer, tensors: dict[str, np.ndarray]) -> None:
    """Sets all variables of model and optimizer from what `state_tensors` gave."""
    for name, variable in _variables(model, optimizer).items():
        variable.assign(tensors[name])


def _variables(model: keras.Model, optimizer: keras.Optimizer) -> dict[str, keras.Variable]:
    named = {f"model/{v.path}": v for v in model.weights} | {f"optimizer/{v.path}": v for v in optimizer.variables}
    assert len(named) == len(model.weights) + len(optimizer.variables), "two variables share a path"
    return named

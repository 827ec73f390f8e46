"""The arithmetic of training on one worker: its train step over all workers, its predictions, its state.

Shapes: `B` this worker's part of a batch, `H` height px, `W` width px, `C` colour, `K` classes, `L` seeds of
stochastic layers, `M` micro-batches, `S` sums of the loss.

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
from unet_ray.errors import UnusableNetwork
from unet_ray.model import losses
from unet_ray.model.labels import label_frames, predicted_logits
from unet_ray.training import batch_norm
from unet_ray.training.variables import NetworkVariables, require_own_paths

_SUM = tf.distribute.ReduceOp.SUM


class StepResult(NamedTuple):
    """What one step gave, equal on all workers: float32 scalars over the whole batch."""

    loss: tf.Tensor
    correct_pixels: tf.Tensor
    valid_pixels: tf.Tensor


PACK_BYTES = 4 * 2**20
"""Of gradients that GPUs sum at once: the last layers' sums go out while the first layers' are still computed."""


def start_strategy(n_workers: int, device: str) -> tf.distribute.Strategy:
    """Joins the workers named in `TF_CONFIG`; a single one needs no strategy. To be called before any operation.

    GPUs sum by NCCL, which TensorFlow takes only where it is asked to; else sums go by gRPC through the host's memory.

    A worker that died or was stopped is noticed by TensorFlow's coordination service, in 1 s and 9 s. Sums have no
    timeout of their own (TensorFlow would keep 18 KB for each until it is over): `Watchdog` ends who waits too long.
    What TensorFlow keeps of every sum for ever, its name and members, is 1 KB, two sums a step (tensorflow 2.21:
    the instance table of collective_param_resolver_local.cc; 2026-11-24), and two more for each batch normalisation.
    """
    if n_workers == 1:
        return tf.distribute.get_strategy()
    options = None
    if device == "gpu":
        nccl = tf.distribute.experimental.CommunicationImplementation.NCCL
        options = tf.distribute.experimental.CommunicationOptions(implementation=nccl, bytes_per_pack=PACK_BYTES)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    # Each worker feeds its own part of a batch, so a second replica in it would see the same frames again.
    assert strategy.num_replicas_in_sync == n_workers, (strategy.num_replicas_in_sync, n_workers)
    return strategy


_Computed = tuple[StepResult, list[tf.Tensor], list[tf.Tensor]]
"""A step's result, its gradients added over the workers, and the network's state after it."""


class TrainStep:
    """One optimizer step: the loss's sums and then the gradients are added over all workers, clipped, and applied.

    With `n_micro` above 1, a worker's part goes through the network in so many micro-batches, whose sums and gradients
    are added as those of workers are: one worker with 2 micro-batches computes what two workers compute. The slopes of
    cross-entropy's and focal loss' sums wait for no pixel, but Dice's and Jaccard's need the sums of the whole batch:
    there each micro-batch goes forward twice. Two micro-batches cost 1.02 and, with Dice, 1.33 of one batch (CPU time
    of 16 frames of 96x128 in bfloat16, 2 cores, 2026-11-30).
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.Optimizer,
        strategy: tf.distribute.Strategy,
        *,
        loss: str,
        class_weights_K: Sequence[float] | None = None,
        ohem_threshold: float = 1.0,
        clip_norm: float = 0.0,
        n_micro: int = 1,
        compiled: bool = False,
    ):
        """Takes what a step is made of.

        Args:
            model: the network.
            optimizer: what applies the gradients.
            strategy: what sums over the workers.
            loss: one of `losses.LOSSES`.
            class_weights_K: see `losses.loss_sums`.
            ohem_threshold: see `losses.loss_sums`.
            clip_norm: largest norm of the gradient; 0 does not clip.
            n_micro: micro-batches of a worker's part.
            compiled: whether XLA compiles what a worker computes alone, forward and backward. Faster on GPUs, a third
                of the speed on CPUs. Not where several workers normalise by the batch: they sum in between.
        """
        self._model, self._optimizer, self._strategy = model, optimizer, strategy
        self._loss, self._class_weights_K, self._ohem_threshold = loss, class_weights_K, ohem_threshold
        self._clip_norm = clip_norm
        self._n_micro = n_micro
        self._variables = NetworkVariables.of(model)
        self._batch_norms = batch_norm.trained_layers(model)
        assert n_micro == 1 or not self._batch_norms, "statistics of whole batches"  # require_trainable_exactly
        if not optimizer.built:
            optimizer.build(self._variables.trained)
        self.n_dropouts = len(self._variables.seeds)
        compiled = compiled and not (self._batch_norms and strategy.num_replicas_in_sync > 1)
        self._local_sums = tf.function(self._sums, autograph=False, jit_compile=True) if compiled else self._sums
        self._step = tf.function(self._apply, autograph=False)
        self.reduced_gradients = tf.function(self._gradients, autograph=False)

    def trace(self, n_frames: int) -> tf.types.experimental.ConcreteFunction:
        """Traces the step for parts of so many frames, 2 s, so that the first of them need not wait."""
        size = self._model.input_shape[1:3]
        return self._step.get_concrete_function(
            tf.TensorSpec([n_frames, *size, 3], tf.uint8),
            tf.TensorSpec([n_frames, *size], tf.uint8),
            tf.TensorSpec([self._n_micro, self.n_dropouts, 2], tf.int64),
        )

    def __call__(self, image_BHWC: np.ndarray, mask_BHW: np.ndarray, seeds_ML2: np.ndarray) -> StepResult:
        """Takes this worker's frames, uint8, with their encoded masks, and `dropout_seeds`.

        `B` is a multiple of `n_micro`: a short part is padded with frames that are ignored wholly.
        """
        return self._step(tf.constant(image_BHWC), tf.constant(mask_BHW), tf.constant(seeds_ML2))

    def _apply(self, image_BHWC, mask_BHW, seeds_ML2) -> StepResult:
        result, gradients, state = self._forward_and_back(image_BHWC, mask_BHW, seeds_ML2)
        if self._clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, self._clip_norm)
        self._optimizer.apply(gradients, self._variables.trained)
        for variable, value in zip(self._variables.state, state, strict=True):
            variable.assign(value)
        return result

    def _gradients(self, image_BHWC, mask_BHW, seeds_ML2) -> tuple[StepResult, list[tf.Tensor]]:
        return self._forward_and_back(image_BHWC, mask_BHW, seeds_ML2)[:2]

    def _forward_and_back(self, image_BHWC, mask_BHW, seeds_ML2) -> _Computed:
        compute = self._whole_part if self._n_micro == 1 else self._micro_batches
        return self._strategy.run(compute, args=(image_BHWC, mask_BHW, seeds_ML2))

    def _whole_part(self, image_BHWC, mask_BHW, seeds_ML2) -> _Computed:
        values = self._values()
        with tf.GradientTape() as tape:
            tape.watch(values)
            sums_S, counts_2, state = self._local_sums(values, image_BHWC, mask_BHW, seeds_ML2[0])
            total_S, result = self._total(sums_S, counts_2)
            share = losses.replica_share(sums_S, total_S, loss=self._loss)
        return result, _add_over_workers(tape.gradient(share, values)), state

    def _micro_batches(self, image_BHWC, mask_BHW, seeds_ML2) -> _Computed:
        values = self._values()
        parts = _split(image_BHWC, self._n_micro), _split(mask_BHW, self._n_micro), seeds_ML2
        zeros = [tf.zeros_like(value) for value in values]
        n_sums = losses.n_sums(self._loss, self._model.output_shape[-1])
        none = tf.zeros([n_sums]), tf.zeros([2]), [tf.convert_to_tensor(v.value) for v in self._variables.state]
        if losses.is_of_pixels(self._loss):  # their slope is 1 / the weights' sum, by which the end divides
            (sums_S, counts_2, state), gradients = self._add_micro(values, parts, tf.constant([1.0, 0.0]), none, zeros)
            total_S, result = self._total(sums_S, counts_2)
            scale = losses.loss_slope(total_S, loss=self._loss)[0]
            return result, _add_over_workers([gradient * scale for gradient in gradients]), state
        (sums_S, counts_2, state), _ = self._add_micro(values, parts, None, none, [])
        total_S, result = self._total(sums_S, counts_2)
        slope_S = losses.loss_slope(total_S, loss=self._loss)
        return result, _add_over_workers(self._add_micro(values, parts, slope_S, none, zeros)[1]), state

    def _add_micro(self, values, parts, slope_S, none, zeros):
        """Adds up, over the micro-batches, the sums and, where a slope is given, the gradients of slope times sums.

        Each starts from the state before the step, as each worker does, and all leave the same one.
        """

        def body(micro, sums, gradients):
            with tf.GradientTape() as tape:
                tape.watch(values)
                sums_S, counts_2, state = self._local_sums(values, *(part[micro] for part in parts))
                share = tf.reduce_sum(slope_S * sums_S) if gradients else None
            if gradients:
                gradients = [one + other for one, other in zip(gradients, tape.gradient(share, values), strict=True)]
            return micro + 1, (sums[0] + sums_S, sums[1] + counts_2, state), gradients

        start = tf.constant(0), none, zeros
        _, sums, gradients = tf.while_loop(
            lambda micro, *_: micro < self._n_micro,
            body,
            start,
            parallel_iterations=1,
            maximum_iterations=self._n_micro,
        )
        return sums, gradients

    def _values(self) -> list[tf.Tensor]:
        return [tf.convert_to_tensor(variable.value) for variable in self._variables.trained]

    def _sums(self, values, image_BHWC, mask_BHW, seeds_L2) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """The sums of the loss, [S], of correct and valid pixels, [2], over these frames, and the state after them."""
        # A stochastic layer's variable is its seed: given from outside, what it draws is a function of seed and step.
        untrained = self._variables.untrained_values(seeds_L2)
        with batch_norm.over_workers(self._batch_norms, batch_norm.counted_frames(mask_BHW), _of_all_workers):
            logits_BHWK, untrained = self._model.stateless_call(values, untrained, image_BHWC, training=True)
        sums_S = losses.loss_sums(
            logits_BHWK,
            mask_BHW,
            loss=self._loss,
            class_weights_K=self._class_weights_K,
            ohem_threshold=self._ohem_threshold,
        )
        return sums_S, _pixel_counts(logits_BHWK, mask_BHW), self._variables.state_of(untrained)

    def _total(self, sums_S, counts_2) -> tuple[tf.Tensor, StepResult]:
        # One sum over the workers, not two: a round trip costs more than its few numbers.
        total = _add_over_workers(tf.stop_gradient(tf.concat([sums_S, counts_2], axis=0)))
        total_S, correct, valid = total[:-2], total[-2], total[-1]
        return total_S, StepResult(losses.loss_from_sums(total_S, loss=self._loss), correct, valid)


def _add_over_workers(value):
    return tf.distribute.get_replica_context().all_reduce(_SUM, value)


def _of_all_workers(part_N):
    """What each worker has, [R, N], by one sum: every worker fills its own row."""
    context = tf.distribute.get_replica_context()
    row_R1 = tf.one_hot(context.replica_id_in_sync_group, context.num_replicas_in_sync)[:, tf.newaxis]
    return _add_over_workers(row_R1 * part_N)


def _split(array_BX, n_parts: int):
    """Cuts a batch into parts, [M, B / M, ...]."""
    return tf.reshape(array_BX, [n_parts, -1, *array_BX.shape[1:]])


def _pixel_counts(logits_BHWK, mask_BHW) -> tf.Tensor:
    """Correct and valid pixels, float32 [2]."""
    valid_BHW = tf.not_equal(mask_BHW, IGNORED_ID)
    hits_BHW = tf.equal(tf.argmax(logits_BHWK, axis=-1, output_type=tf.int32), tf.cast(mask_BHW, tf.int32))
    counted = tf.stack([tf.logical_and(hits_BHW, valid_BHW), valid_BHW])
    return tf.reduce_sum(tf.cast(counted, tf.float32), axis=[1, 2, 3])


class Predictor:
    """The network as it is used: masks of its own size, and of each frame's size from logits resized bilinearly."""

    def __init__(
        self,
        model: keras.Model,
        *,
        loss: str = "ce",
        class_weights_K: Sequence[float] | None = None,
        tta: str = "none",
    ):
        self._model, self._loss, self._class_weights_K, self._tta = model, loss, class_weights_K, tta
        self._forward = tf.function(self._predict, autograph=False)

    def __call__(self, image_BHWC: np.ndarray, mask_BHW: np.ndarray) -> tuple[tf.Tensor, np.ndarray, np.ndarray]:
        """Returns logits [B, H, W, K], the predicted mask uint8 [B, H, W] and the sums of the loss [S]."""
        logits_BHWK, predicted_BHW, sums_S = self._forward(tf.constant(image_BHWC), tf.constant(mask_BHW))
        return logits_BHWK, predicted_BHW.numpy(), sums_S.numpy()

    def own_size_mask(self, logits_HWK: tf.Tensor, extent: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        """Returns a mask, uint8, of a frame's size, as labelling makes it on a CPU.

        `extent` is the part of the logits, from the top left, that shows the frame.
        """
        return label_frames(logits_HWK.numpy()[None], [size], [extent]).masks[0]

    def model_size_logits(self, logits_BHWK: tf.Tensor) -> tf.Tensor:
        """Returns the logits at the network's size, which they have."""
        return logits_BHWK

    def loss(self, total_S: np.ndarray) -> float:
        """Returns the loss of sums that were added over batches and workers."""
        return float(losses.loss_from_sums(tf.constant(total_S, tf.float32), loss=self._loss))

    def _predict(self, image_BHWC, mask_BHW):
        logits_BHWK = predicted_logits(self._model, image_BHWC, tta=self._tta)
        sums_S = losses.loss_sums(logits_BHWK, mask_BHW, loss=self._loss, class_weights_K=self._class_weights_K)
        return logits_BHWK, tf.cast(tf.argmax(logits_BHWK, axis=-1), tf.uint8), sums_S


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


def dropout_seeds(seed: int, step: int, rank: int, n_dropouts: int, n_micro: int = 1) -> np.ndarray:
    """Returns the seeds of one step's stochastic layers on one worker, int64 [M, L, 2], a function of the arguments.

    A micro-batch drops what a worker of its own would drop: micro-batch m of rank r is number r * n_micro + m.
    """
    numbers = range(rank * n_micro, (rank + 1) * n_micro)
    words = [np.random.SeedSequence([seed, step, number]).generate_state(2 * n_dropouts) for number in numbers]
    return np.stack(words).astype(np.int64).reshape(n_micro, n_dropouts, 2) & 0x7FFFFFFF


def state_tensors(model: keras.Model, optimizer: keras.Optimizer) -> dict[str, np.ndarray]:
    """Returns copies of all variables of model and optimizer, but for dropout's seeds, which every step is given."""
    return {name: np.array(variable.numpy()) for name, variable in _variables(model, optimizer).items()}


def restore_state(model: keras.Model, optimizer: keras.Optimizer, tensors: dict[str, np.ndarray]) -> None:
    """Sets all variables of model and optimizer from what `state_tensors` gave.

    Raises:
        UnusableNetwork: that was another network, or another optimizer.
    """
    variables = _variables(model, optimizer)
    for name, variable in variables.items():
        there = tensors[name].shape if name in tensors else None
        if there != tuple(variable.shape):
            what = "lacks it" if there is None else f"has {list(there)}"
            raise UnusableNetwork(
                f"the network has {name} of {list(variable.shape)}, the checkpoint {what}: the network was another one "
                "when the run began; bring that back, or give --overwrite to train anew"
            )
    for name, variable in variables.items():
        variable.assign(tensors[name])


def _variables(model: keras.Model, optimizer: keras.Optimizer) -> dict[str, keras.Variable]:
    require_own_paths(model.weights)
    named = {f"model/{v.path}": v for v in model.weights} | {f"optimizer/{v.path}": v for v in optimizer.variables}
    assert len(named) == len(model.weights) + len(optimizer.variables), "two variables of the optimizer share a path"
    return named

"""The training loop of one worker: join the others, restore, train epoch by epoch, validate, write checkpoints.

Shapes: `B` this worker's part of a batch, `H` height px, `W` width px, `C` colour, `K` classes.

Every decision that a worker takes (to stop, what is best, which checkpoint to start from) follows from numbers that are
equal on all workers. Only rank 0 writes, and tells the driver what happens; nobody waits for an answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from unet_ray import storage
from unet_ray.cluster.watchdog import Watchdog
from unet_ray.errors import JobFailed
from unet_ray.messages import count, reason_of
from unet_ray.model import losses
from unet_ray.model.calibration import Calibration
from unet_ray.model.devices import OutOfDeviceMemory, choose_policy, configure_tensorflow
from unet_ray.model.networks import build_network
from unet_ray.training import batches, checkpoints, evaluator, steps
from unet_ray.training.augmentation import augment, paste_classes
from unet_ray.training.calibrator import calibrate
from unet_ray.training.checkpoints import MODEL_SIZE, OWN_SIZE, Checkpoint
from unet_ray.training.events import (
    EpochDone,
    Event,
    Failed,
    Finished,
    PhaseBegun,
    Restored,
    Sampled,
    Started,
    StepDone,
    Stuck,
    Warned,
)
from unet_ray.training.initial import set_initial_weights
from unet_ray.training.optimizer import PartwiseAdam, averaged, make_optimizer, make_schedule, take_averages
from unet_ray.training.sample_log import is_shown
from unet_ray.training.task import Group, WorkerTask, frame_threads

PROGRESS_INTERVAL_S = 0.25
"""Least time between two reports of progress within an epoch."""


class Worker:
    """One worker of the group, from its start to the end of the run or its death."""

    def __init__(self, task: WorkerTask, group: Group):
        self.task, self.config, self.group = task, task.config, group
        self.rank, self.n_workers = group.rank, group.n_workers
        self.watchdog = self._watchdog(task.config.collective_timeout_s, "has got nowhere", " (--collective-timeout-s)")

    def _watchdog(self, timeout_s: float, what: str, option: str = "") -> Watchdog:
        line = f"worker {self.rank} {what} for {timeout_s:.0f} s{option} and ends itself; it was in"
        return Watchdog(timeout_s, lambda where: self.group.tell(Stuck(line=f"{line} {where}")))

    def _tell(self, event: Event) -> None:
        if self.rank == 0:
            self.group.tell(event)

    # --- the run ---

    def run(self) -> None:
        """Trains from the newest valid checkpoint to the last epoch; then shows what the best network sees."""
        with self._watchdog(self.task.start_timeout_s, "has come to no epoch").watching():
            self._join()
            state = self._restore()
        with self.watchdog.watching():
            try:
                self._train(state)
            except tf.errors.ResourceExhaustedError as error:
                raise self._out_of_memory(error) from error

    def _out_of_memory(self, error: tf.errors.ResourceExhaustedError) -> OutOfDeviceMemory:
        micro = f", {count(self.micro, 'frame')} at once" if self.config.accumulate > 1 else ""
        return OutOfDeviceMemory(
            f"worker {self.rank}'s {self.task.device} has not enough memory for its part of a batch of "
            f"{self.config.batch_size} frames on {count(self.n_workers, 'worker')}{micro}: {reason_of(error)}; give a "
            "smaller --batch-size, or a larger --accumulate, which computes the same"
        )

    def _join(self) -> None:
        """Meets the other workers, and builds what all of them have: the frames, the network, its step."""
        task, config = self.task, self.config
        _require_shared_storage(config.out)
        self._tell(PhaseBegun(line="compiling the network"))
        configure_tensorflow(task.device, task.cpus, op_threads=task.cpus)
        strategy = steps.start_strategy(self.n_workers, task.device)
        self.add_up = steps.WorkerSum(strategy)
        policy = self._common_policy()

        self.threads = frame_threads(task.device, task.cpus)
        self.train_reader = task.train.open()
        self.n_batches = math.ceil(len(task.train.names) / config.batch_size)
        part = batches.rank_batch_size(config.batch_size, self.n_workers)
        self.micro = math.ceil(part / config.accumulate)
        self.model_config = task.model_config
        self.model = build_network(self.model_config, seed=config.seed, dtype_policy=policy)
        self.optimizer = self._make_optimizer()
        weights_K = task.class_weights_K
        if config.class_weights in losses.CLASS_WEIGHTS:
            weights_K = losses.class_weights(task.pixels_K, config.class_weights, image_pixels_K=task.image_pixels_K)
        self.step = steps.TrainStep(
            self.model,
            self.optimizer,
            strategy,
            loss=config.loss,
            class_weights_K=weights_K,
            ohem_threshold=config.ohem_threshold,
            clip_norm=config.clip_norm,
            n_micro=config.accumulate,
            compiled=task.compiled,
        )
        self.step.trace(self.micro * config.accumulate)
        self.predict = steps.Predictor(self.model, loss=config.loss, class_weights_K=weights_K)
        self.evaluator = evaluator.Evaluator(
            self.predict,
            task.validation.open(),
            self.micro,
            self.model_config,
            n_threads=self.threads,
            on_batch=self.watchdog.beat,
        )
        self.sample_evaluator = evaluator.Evaluator(self.predict, task.samples.open(), self.micro, self.model_config)
        self._tell(Started(policy=policy, n_workers=self.n_workers))

    def _make_optimizer(self) -> PartwiseAdam:
        config = self.config
        total = config.epochs * self.n_batches
        schedule = make_schedule(
            config.schedule, config.learning_rate, total, round(config.warmup_epochs * self.n_batches)
        )
        return make_optimizer(
            config.optimizer, schedule, config.weight_decay, config.rate_factors(), config.ema_momentum
        )

    def _train(self, state: Checkpoint) -> None:
        while not self._is_done(state):
            row = self._train_epoch(state.epoch, state.step)
            if row is None:
                return  # the driver knows why
            row |= self._learning_rate()
            with self._averaged():
                metrics, tensors = self._validate()
            state = self._advance(state, row | metrics, tensors)
            self._tell(EpochDone(row=state.history[-1]))
            if self.rank == 0 and (is_shown(state.epoch, self.config.epochs) or self._is_done(state)):
                with self._averaged():
                    self._tell(Sampled(epoch=state.epoch, masks=self._predict_samples()))
                self.watchdog.beat()
        best = self._restore_best(state)
        take_averages(self.optimizer, self.model.trainable_variables)
        calibration = None
        if self.task.validation.names:
            frames = count(len(self.task.validation.names), "validation frame")
            self._tell(PhaseBegun(line=f"calibrating the confidence on {frames}"))
            calibration = calibrate(self.evaluator, self._own_validation(), self.add_up)
        if self.rank == 0:
            self._finish(best, calibration)

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return averaged(self.optimizer, self.model.trainable_variables)

    def _restore(self) -> Checkpoint:
        """Every worker starts from the checkpoint that rank 0 finds: the newest that verifies."""
        run, checkpoint = self.config.out, None
        if self.rank == 0:
            checkpoint = checkpoints.newest_valid(run, on_damaged=lambda line: self._tell(Warned(line=line)))
        epoch = self.group.agree(checkpoint.epoch if checkpoint else 0)
        if epoch == 0:
            set_initial_weights(self.model, self.task.initial_weights, drawn=self.task.drawn)
            return Checkpoint(epoch=0, step=0, tensors={}, history=(), best_epoch=0)
        checkpoint = checkpoint or checkpoints.read_checkpoint(checkpoints.checkpoint_uri(run, epoch))
        steps.restore_state(self.model, self.optimizer, checkpoint.tensors)
        self._tell(Restored(epoch=epoch, history=checkpoint.history))
        return checkpoint

    def _common_policy(self) -> str:
        """`--precision auto` is bfloat16 where the devices of all workers have it."""
        mine = choose_policy(self.config.precision, self.task.device)
        n_bfloat16 = int(self.add_up(np.array(mine == "mixed_bfloat16", np.int64)))
        return mine if n_bfloat16 == self.n_workers else "float32"

    def _is_done(self, state: Checkpoint) -> bool:
        patience = self.config.early_stopping_epochs
        stalled = 0 < patience <= state.epoch - state.best_epoch and bool(self.task.validation.names)
        return state.epoch >= self.config.epochs or stalled

    def _advance(self, state: Checkpoint, row: dict[str, Any], tensors: dict[str, np.ndarray]) -> Checkpoint:
        """Counts the epoch that is done, and writes it where it is due or the best."""
        epoch = state.epoch + 1
        history = (*state.history, {"epoch": epoch, **row})
        best = state.best_epoch
        if best == 0 or _is_better(row.get("val/mean_iou"), history[best - 1].get("val/mean_iou")):
            best = epoch
        if not self.task.validation.names:
            best = epoch
        done = Checkpoint(
            epoch=epoch, step=state.step + self.n_batches, tensors=tensors, history=history, best_epoch=best
        )
        due = epoch % self.config.checkpoint_every_epochs == 0 or self._is_done(done) or best == epoch
        if due:
            self.watchdog.beat()
            self._write(done, state)
            self.watchdog.beat()
        return done

    def _write(self, done: Checkpoint, state: Checkpoint) -> None:
        state_tensors = steps.state_tensors(self.model, self.optimizer)
        self._require_equal(state_tensors)
        if self.rank == 0:
            run = self.config.out
            checkpoints.write_checkpoint(run, dataclasses.replace(done, tensors=state_tensors | done.tensors))
            # The one before stays too: should the newest be damaged on its disk, one interval is lost, not the run.
            before = [older for older in checkpoints.list_epochs(run) if older < done.epoch][:1]
            checkpoints.delete_older(run, done.epoch, {done.best_epoch, state.best_epoch, *before})

    def _require_equal(self, tensors: dict[str, np.ndarray]) -> None:
        """Raises JobFailed where another worker's variables differ: the group then starts again from a checkpoint."""
        mine = 0
        for name in sorted(tensors):
            mine = zlib.crc32(tensors[name].tobytes(), mine)
        if int(self.add_up(np.array(mine, np.int64))) != self.n_workers * mine:
            raise JobFailed("the workers' weights differ; give the job machines of one kind, and look at their memory")

    # --- one epoch ---

    def _train_epoch(self, epoch: int, first_step: int) -> dict[str, Any] | None:
        started = time.time()
        order = batches.epoch_order(len(self.task.train.names), self.config.seed, epoch, self.task.chances_N)
        results, reported_at = [], 0.0
        for batch, (image_BHWC, mask_BHW) in enumerate(self._batches(order, epoch)):
            step = first_step + batch
            seeds = steps.dropout_seeds(self.config.seed, step, self.rank, self.step.n_dropouts, self.config.accumulate)
            results.append(self.step(image_BHWC, mask_BHW, seeds))
            self.watchdog.beat()
            # One step behind: the device works on this step while the last one's loss comes back.
            if not self._is_finite(results, batch - 1, order, step - 1):
                return None
            if time.time() - reported_at > PROGRESS_INTERVAL_S:
                reported_at = time.time()
                frames = min((batch + 1) * self.config.batch_size, len(order))
                seconds = reported_at - started
                self._tell(StepDone(epoch=epoch + 1, frames=frames, n_frames=len(order), seconds=seconds))
        last_step = first_step + len(results) - 1
        if not self._is_finite(results, len(results) - 1, order, last_step) or not self._stays_finite(order, last_step):
            return None
        seconds = time.time() - started
        correct, valid = (math.fsum(float(r[i]) for r in results) for i in (1, 2))
        return {
            "step": first_step + len(results),
            "loss": float(np.mean([float(result.loss) for result in results])),
            "accuracy": correct / max(1.0, valid),
            "seconds": round(seconds, 3),
            "images_per_s": round(len(order) / seconds, 2),
            "wall_time_s": round(time.time(), 3),
        }

    def _batches(self, order: np.ndarray, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields this worker's part of each batch; the next one is made while the network works on this one."""

        def make(batch: int) -> tuple[np.ndarray, np.ndarray]:
            mine = batches.batch_slice(order, batch, self.config.batch_size, self.rank, self.n_workers)
            padded = self.micro * self.config.accumulate
            return batches.gather(
                self.train_reader, mine, padded, self.config.network_size(), self._view(epoch), self.threads
            )

        return batches.one_ahead(make, self.n_batches)

    def _view(self, epoch: int) -> batches.View | None:
        if not self.config.augment:
            return None
        config, preprocessing = self.config, self.task.model_config.preprocessing

        def view(image_HWC: np.ndarray, mask_HW: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
            rng = np.random.default_rng([config.seed, epoch, index])
            varied = augment(image_HWC, mask_HW, config.network_size(), config, rng, preprocessing)
            if config.classmix == 0 or rng.random() >= config.classmix:
                return varied
            other = self.train_reader.read(int(rng.integers(len(self.task.train.names))))
            return paste_classes(*varied, *augment(*other, config.network_size(), config, rng, preprocessing), rng)

        return view

    def _is_finite(self, results: list[Any], batch: int, order: np.ndarray, step: int) -> bool:
        """Whether the loss of a batch is finite; else the driver is told. It is equal on all workers, so all stop."""
        if batch < 0 or math.isfinite(float(results[batch].loss)):
            return True
        self._tell_failed(f"the loss is {float(results[batch].loss)} at step", batch, order, step)
        return False

    def _stays_finite(self, order: np.ndarray, step: int) -> bool:
        """The same of the weights after an epoch's last step: no loss of that epoch shows what it made of them."""
        tensors = steps.state_tensors(self.model, self.optimizer).values()
        if all(np.isfinite(tensor).all() for tensor in tensors if tensor.dtype.kind == "f"):
            return True
        self._tell_failed("weights are not finite after step", self.n_batches - 1, order, step)
        return False

    def _tell_failed(self, what: str, batch: int, order: np.ndarray, step: int) -> None:
        size = self.config.batch_size
        names = ", ".join(self.task.train.names[index] for index in order[batch * size : (batch + 1) * size])
        remedy = "look at their masks, lower --learning-rate or set --clip-norm"
        self._tell(Failed(error=JobFailed(f"{what} {step + 1}; the frames of its batch: {names}; {remedy}")))

    def _learning_rate(self) -> dict[str, float]:
        return {"learning_rate": float(self.optimizer.learning_rate)}

    def _validate(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Counts every validation frame once, over all workers; returns metrics and the confusion matrices."""
        if not self.task.validation.names:
            return {}, {}
        mine = self.evaluator.count(self._own_validation())
        own_KK, model_KK = self.add_up(np.stack([mine.own_size_KK, mine.model_size_KK]))
        loss = self.predict.loss(self.add_up(mine.sums_S))
        metrics = evaluator.metrics_of(own_KK, model_KK, self.task.class_set.names)
        row = {key: value for key, value in metrics.items() if "precision" not in key and "recall" not in key}
        row = {key: value for key, value in row.items() if not isinstance(value, list)}
        return {"val/loss": loss} | row, {OWN_SIZE: own_KK, MODEL_SIZE: model_KK}

    def _own_validation(self) -> range:
        """This worker's part of the validation frames."""
        return range(self.rank, len(self.task.validation.names), self.n_workers)

    # --- the end ---

    def _restore_best(self, state: Checkpoint) -> int:
        """Every worker takes the weights that become the model's, which rank 0 finds; returns their epoch."""
        run, best = self.config.out, state
        if self.rank == 0:
            # What is damaged the driver will say, which reads it after this.
            best = checkpoints.best_or_this(run, state, on_damaged=lambda line: None)
        epoch = self.group.agree(best.epoch)
        if epoch != state.epoch:
            if self.rank != 0:
                best = checkpoints.read_checkpoint(checkpoints.checkpoint_uri(run, epoch))
            steps.restore_state(self.model, self.optimizer, best.tensors)
        self.watchdog.beat()
        return epoch

    def _finish(self, best_epoch: int, calibration: Calibration | None) -> None:
        """Tells the driver what the best network predicts on the frames to show, in the masks' own sizes."""
        self._tell(Finished(best_epoch=best_epoch, calibration=calibration, samples=self._predict_samples()))

    def _predict_samples(self) -> dict[int, np.ndarray]:
        return self.sample_evaluator.predict_masks(range(len(self.task.samples.names)))


def _is_better(value: float | None, best: float | None) -> bool:
    return value is not None and (best is None or value > best)


def _require_shared_storage(run: str) -> None:
    if not storage.exists(storage.join(run, "config.yaml")):
        raise ValueError(
            f"--out {run} is not seen by every node of the cluster; give a shared folder or a URI such as s3://bucket/run"
        )

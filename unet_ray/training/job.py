"""Pairs to a trained model: checks everything first, then Ray Data, then Ray Train's workers, then the bundle.

RUN/config.yaml     the resolved configuration          RUN/run.json      what the run is: data, classes, versions
RUN/checkpoints/    see `checkpoints`                   RUN/tensorboard/  event files
RUN/history.csv     a row an epoch                      RUN/curves.png, samples.png, confusion.png
RUN/model/          the best by validation mean IoU     RUN/metrics.json  written last: the run is finished
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from unet_ray import storage
from unet_ray.classes import ClassSet
from unet_ray.cluster.connection import (
    Room,
    connect,
    default_cpus,
    resolve_device,
    wait_for_first_node,
    wait_for_resources,
    worker_resources,
)
from unet_ray.cluster.shared_paths import require_seen_by_all, require_usable_gpu
from unet_ray.config import EvaluateConfig, TrainConfig
from unet_ray.errors import JobFailed
from unet_ray.messages import count, say
from unet_ray.model import bundle, metrics
from unet_ray.model.devices import UnusableGpu
from unet_ray.pairs.pairs import ImagePair, load_pair
from unet_ray.pairs.splits import leak_rate, leak_warning
from unet_ray.training import checkpoints, run_folder
from unet_ray.training import evaluator as evaluation
from unet_ray.training.blocks import FileFrames, FrameSource, IngestPlan, ingest
from unet_ray.training.checkpoints import Checkpoint
from unet_ray.training.data import TrainingData, complete_pairs, find_data, find_mask_format
from unet_ray.training.mlflow_record import MlflowRecord
from unet_ray.training.monitor import Mailbox, Monitor, write_history
from unet_ray.training.worker import MODEL_SIZE, OWN_SIZE, Group, Worker, WorkerTask

HEALTH_CHECK_TIMEOUT_S = 60
"""After which a worker that does not answer (stopped, or its node gone) is given up; Ray's default is 600."""

START_TIMEOUT_S = 600.0
"""After which a worker that has not come to its first epoch is given up, unless `--collective-timeout-s` is more: it
may have gigabytes to fetch before."""

RESIZE_INTERVAL_S = 60.0
"""How often a group of `--workers MIN:MAX` looks whether it may grow: growing starts it again from a checkpoint."""

POLL_INTERVAL_S = 0.2
"""How often the driver looks for the workers' events."""

LAST_WORD_S = 10.0
"""How long a worker that ends itself waits to be heard."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training made."""

    run: str
    """URI of the run's folder."""
    model: str
    """URI of the bundle."""
    metrics: dict[str, Any]
    """What `metrics.json` holds."""
    history: tuple[dict[str, Any], ...]
    """One row an epoch."""


def train(config: TrainConfig) -> TrainResult:
    """Trains a U-Net, or goes on where the same command stopped.

    Raises:
        ValueError: something that the user can mend: files, options, the output's folder.
        JobFailed: the loss became infinite, or workers were lost again and again.
        TryAgain: nodes were lost, and none came in their place.
        StorageError: trouble with storage that may be over when one tries again.
    """
    config.configure_storage()
    config = run_folder.resolved(config)
    if finished := run_folder.finished(config):
        say(f"{config.out} is finished already; --overwrite trains it anew")
        return _result(config.out, finished)
    data = find_data(config)
    about = run_folder.describe(data.split, data.class_set, data.mask_format, data.class_weights_K)
    run_folder.require_same_data(config, about)

    connect()
    launcher = _start_launcher()
    device = resolve_device(config.device)
    cpus = reserve(config, device)
    require_seen_by_all(_folders(config), config.out)
    require_usable_gpu(device, config.precision)
    task, hashes = _prepare(config, data, device, cpus)
    _say_plan(config, data, cpus, device, hashes)

    run_folder.begin(config, about)
    record = MlflowRecord(config) if config.mlflow else None
    monitor = _fit(config, task, launcher, record)
    found = _write_results(config, data, monitor.samples)
    if record:
        record.finish()
    say(f"model: {storage.join(config.out, 'model')}")
    return _result(config.out, found)


def _folders(config: TrainConfig) -> dict[str, list[str]]:
    """Returns what the cluster's tasks read, by option; the driver alone reads classes, weights and a manifest."""
    options = ("images", "masks", "val_images", "val_masks")
    return {f"--{name.replace('_', '-')}": [uri] for name in options if (uri := getattr(config, name)) is not None}


def reserve(config: TrainConfig, device: str) -> int:
    """Waits until the cluster has room for the workers (of a range: the fewest), and returns the CPUs of each."""
    fewest, most = config.worker_range()
    if config.cpus_per_worker is None:
        wait_for_first_node(device, config.wait_for_resources_s)
    cpus = config.cpus_per_worker or default_cpus(most, device)
    resources = [worker_resources(cpus, device)] * fewest
    wait_for_resources(resources, config.wait_for_resources_s, count(fewest, "training worker"))
    return cpus


def _prepare(config: TrainConfig, data: TrainingData, device: str, cpus: int) -> tuple[WorkerTask, dict[str, int]]:
    """Reads all pairs into the object store; returns the workers' task and the frames' hashes."""
    plan = IngestPlan(
        class_set=data.class_set, mask_format=data.mask_format, image_size=config.image_size, keep_full_mask=False
    )
    train_plan = dataclasses.replace(plan, image_size=None) if config.augment else plan
    trained = ingest(data.split.train, train_plan)
    whole_plan = dataclasses.replace(plan, keep_full_mask=True)
    validation = ingest(data.split.validation, whole_plan, kept_bytes=trained.kept_bytes)
    present_NK = trained.pixels_NK > 0
    task = WorkerTask(
        config=config,
        class_set=data.class_set,
        class_weights_K=data.class_weights_K,
        pixels_K=trained.pixels_NK.sum(axis=0),
        image_pixels_K=(present_NK * trained.pixels_NK.sum(axis=1, keepdims=True)).sum(axis=0),
        train=trained.frames,
        validation=validation.frames,
        shown=FileFrames(names=tuple(pair.pair_id for pair in data.shown), pairs=data.shown, plan=whole_plan),
        device=device,
        cpus=cpus,
        start_timeout_s=max(START_TIMEOUT_S, config.collective_timeout_s),
    )
    return task, trained.hashes | validation.hashes


def _say_plan(config: TrainConfig, data: TrainingData, cpus: int, device: str, hashes: dict[str, int]) -> None:
    n_train, n_validation = len(data.split.train), len(data.split.validation)
    steps, last = -(-n_train // config.batch_size), n_train % config.batch_size
    say(
        f"{_workers(*config.worker_range())} x {cpus} CPU{'s' * (cpus != 1)}"
        f"{' and a GPU' if device == 'gpu' else ''}; {n_train:,} frames in {steps:,} steps of {config.batch_size}"
        f"{f' (the last of {last})' if last else ''} x {config.epochs} epochs = {steps * config.epochs:,} steps; "
        f"{n_validation:,} frames validate"
    )
    if n_validation:
        rate = leak_rate(data.split, guard_frames=config.guard_frames, hashes=hashes)
        say(f"leak rate: {rate:.1%} of the validation frames have a neighbour in time or a near-duplicate in training")
        if warning := leak_warning(rate):
            say(f"warning: {warning}")


def _workers(fewest: int, most: int) -> str:
    return count(most, "worker") if fewest == most else f"{fewest} to {most} workers"


# --- the workers ---


def _work(told: dict[str, Any]) -> None:
    """What Ray Train calls on every worker."""
    context, mailbox = ray.train.get_context(), told["mailbox"]
    group = Group(
        rank=context.get_world_rank(),
        n_workers=context.get_world_size(),
        agree=broadcast_from_rank_zero,
        tell=lambda event: _tell(mailbox, event),
    )
    Worker(told["task"], group).run()


def _tell(mailbox: Any, event: dict[str, Any]) -> None:
    put = mailbox.put.remote(event)
    if event["kind"] in ("failed", "finished"):  # the last before the worker ends, and what it holds with it
        ray.get(put)
    if event["kind"] == "stuck":  # it ends whether it is heard or not
        ray.wait([put], timeout=LAST_WORD_S)


class Launcher(Mailbox):
    """An actor that runs Ray Train and takes what its workers tell, in one process, started beside the reading."""

    def __init__(self) -> None:
        super().__init__()
        # Ray Train's module looks whether TensorFlow is there, and names its types; only workers need it, of which this
        # is none. 3 to 6 s of a core, while all cores read frames (2 cores, 2026-11-25).
        sys.modules["tensorflow"] = _StandIn("tensorflow")
        try:
            import ray.train.tensorflow
        finally:
            del sys.modules["tensorflow"]
        # Else the controller would import TensorFlow, too, only to learn the name of this class.
        ray.cloudpickle.register_pickle_by_value(ray.train.tensorflow.config)

    @ray.method(concurrency_group="fit")
    def fit(self, task: WorkerTask, mailbox: Any, resize_interval_s: float) -> list[Exception]:
        """Runs the workers to the end; returns nothing, or what they died of the last time."""
        from ray.train.tensorflow import TensorflowTrainer

        # A process that asks every 5 s whether a node will go, and tells the workers, who do not ask.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(HEALTH_CHECK_TIMEOUT_S))
        # Of those that wait for a worker before the first epoch; Ray's default is for ever.
        os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(task.start_timeout_s))
        fewest, most = task.config.worker_range()
        with tempfile.TemporaryDirectory(prefix="unet-ray-") as folder:
            trainer = TensorflowTrainer(
                _work,
                train_loop_config={"task": task, "mailbox": mailbox},
                scaling_config=ScalingConfig(
                    num_workers=most if fewest == most else (fewest, most),
                    elastic_resize_monitor_interval_s=resize_interval_s,
                    use_gpu=task.device == "gpu",
                    resources_per_worker=worker_resources(task.cpus, task.device),
                    # A node's memory and its way to the storage are shared; GPUs of one node talk faster.
                    placement_strategy="PACK" if task.device == "gpu" else "SPREAD",
                ),
                run_config=_run_config(folder, task.config.max_failures),  # type: ignore[arg-type]  # of its version 1
            )
            try:
                trainer.fit()
            except TrainingFailedError as error:
                # As text, but for our own: TensorFlow's errors would make the driver load TensorFlow.
                if isinstance(final := getattr(error, "controller_failure", None), UnusableGpu):
                    return [final]
                causes = list(getattr(error, "worker_failures", {}).values()) or [error]
                return [cause if _is_ours(cause) else RuntimeError(_one_line(cause)) for cause in causes]
        return []


def _run_config(folder: str, max_failures: int) -> RunConfig:
    """Returns how Ray Train retries, and where its own notes go; checkpoints lie in RUN (see `checkpoints`)."""

    # Another group of workers would see no GPU either. Ray Train (2.60) retries every error of a worker and none of a
    # callback. This class is local so that it is sent as code, and the controller need not load this module.
    class FinalFailures(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, UnusableGpu):
                    raise error

    return RunConfig(
        name="run",
        storage_path=folder,
        failure_config=FailureConfig(max_failures=max_failures),
        callbacks=[FinalFailures()],
        logging_config=LoggingConfig(log_level="ERROR"),
    )


class _StandIn(types.ModuleType):
    """A module that has every name, each of them such a module."""

    def __getattr__(self, name: str) -> types.ModuleType:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(f"{self.__name__}.{name}")


def _start_launcher() -> Any:
    """Starts it on the driver's node: should another node be lost, it is not the one that holds the run."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote  # its annotations do not know of concurrency groups (Ray 2.60)
    return remote(num_cpus=0, scheduling_strategy=here, concurrency_groups={"fit": 1})(Launcher).remote()


def _is_ours(error: BaseException) -> bool:
    return isinstance(error, ValueError | JobFailed | OSError) and "\n" not in str(error)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no reason was given'}"


def _fit(config: TrainConfig, task: WorkerTask, launcher: Any, record: MlflowRecord | None) -> Monitor:
    """Runs Ray Train's workers to the end, and shows what they say meanwhile."""
    monitor = Monitor(config.out, config.epochs, record)
    fitting = launcher.fit.remote(task, launcher, RESIZE_INTERVAL_S)
    fewest, _ = config.worker_range()
    room = Room(
        [worker_resources(task.cpus, task.device)] * fewest, config.wait_for_resources_s, count(fewest, "worker")
    )
    done: list[Any] = []
    with monitor.gauges:
        while not done:
            room.look()
            done, _ = ray.wait([fitting], timeout=POLL_INTERVAL_S)
            for event in ray.get(launcher.take.remote()):
                monitor.handle(event)
    causes = ray.get(fitting)
    if monitor.error is not None:
        raise monitor.error
    for cause in causes:
        if _is_ours(cause):
            raise cause
    if causes:
        raise JobFailed(
            f"workers were lost more than {config.max_failures} times (--max-failures), the last time by {causes[0]}; "
            "the same command goes on from the last checkpoint"
        )
    return monitor


# --- the results ---


def _write_results(config: TrainConfig, data: TrainingData, samples: Mapping[int, np.ndarray]) -> dict[str, Any]:
    """Writes the bundle, the pictures and, last, `metrics.json`."""
    last, best = _last_and_best(config.out)
    row = last.history[best.epoch - 1]
    found: dict[str, Any] = {"epochs": last.epoch, "best_epoch": best.epoch}
    found |= {key: row[key] for key in ("loss", "accuracy", "val/loss") if key in row}
    own_KK = best.tensors.get(OWN_SIZE)
    if own_KK is not None:
        found |= evaluation.metrics_of(own_KK, best.tensors[MODEL_SIZE], data.class_set.names)
        say(metrics.class_table(own_KK, data.class_set.names))
    model_config = config.model_config(data.class_set.n_classes)
    weights = network_weights(best.tensors)
    bundle.write_bundle(storage.join(config.out, "model"), weights, model_config, data.class_set, found)
    write_history(config.out, last.history)
    _draw_curves(config.out, last.history)
    _draw_results(config.out, data.shown, data.class_set, data.mask_format, samples, own_KK)
    storage.write_whole(storage.join(config.out, run_folder.METRICS_FILE), json.dumps(found, indent=1).encode())
    return found


def _last_and_best(run: str) -> tuple[Checkpoint, Checkpoint]:
    last = checkpoints.newest_valid(run, on_damaged=lambda line: say(f"warning: {line}"))
    if last is None:
        raise JobFailed(f"{run} holds no checkpoint that verifies, though training ended; give the command again")
    return last, checkpoints.best_or_this(run, last, on_damaged=lambda line: say(f"warning: {line}"))


def network_weights(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the network's weights among a checkpoint's tensors, by the names that a bundle has."""
    named = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
    return {name: tensor for name, tensor in named.items() if name.endswith(("/kernel", "/bias"))}


def _draw_curves(run: str, history: Sequence[Mapping[str, Any]]) -> None:
    from unet_ray import pictures  # matplotlib takes a second, which a worker need not spend

    storage.write_whole(storage.join(run, "curves.png"), pictures.draw_curves(history))


def _draw_results(
    out: str,
    pairs: Sequence[ImagePair],
    class_set: ClassSet,
    mask_format: str,
    samples: Mapping[int, np.ndarray],
    confusion_KK: np.ndarray | None,
) -> None:
    """Draws samples (true and predicted masks of some frames) and the confusion matrix, where frames validated."""
    from unet_ray import pictures

    if confusion_KK is not None:
        picture = pictures.draw_confusion(confusion_KK, class_set.names)
        storage.write_whole(storage.join(out, "confusion.png"), picture)
    if samples:
        shown = [load_pair(pairs[place], class_set, mask_format) for place in samples]
        captions = [pairs[place].pair_id for place in samples]
        frames, true_masks = [frame for frame, _ in shown], [mask for _, mask in shown]
        picture = pictures.draw_samples(frames, true_masks, list(samples.values()), class_set, captions=captions)
        storage.write_whole(storage.join(out, "samples.png"), picture)


def _result(run: str, found: dict[str, Any]) -> TrainResult:
    last = checkpoints.newest_valid(run, on_damaged=lambda line: say(f"warning: {line}"))
    history = last.history if last else ()
    return TrainResult(run=run, model=storage.join(run, "model"), metrics=found, history=history)


# --- measuring a trained model ---


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measures a model on pairs and prints the table of its classes; `--out` gets metrics and pictures.

    Returns:
        `val/mean_iou`, `val/iou/<class>`, … at the masks' own sizes, the same under `val_model_size/`, `val/loss`, and
        `val/boundary_f1`, `val/boundary_f1/<class>` (see `metrics.boundary_counts`).

    Raises:
        ValueError: something that the user can mend.
        StorageError: trouble with storage that may be over when one tries again.
    """
    config.configure_storage()
    model = bundle.read_bundle(config.model)
    class_set = model.class_set
    pairs = complete_pairs(config, storage.resolve(config.images), storage.resolve(config.masks))
    mask_format = find_mask_format(config.mask_format, pairs, class_set)
    connect()
    require_seen_by_all({"--images": [pairs[0].image_uri], "--masks": [pairs[0].mask_uri]}, None)
    device = resolve_device(config.device)
    cpus = default_cpus(1, device)
    resources = worker_resources(cpus, device)
    wait_for_resources([resources], config.wait_for_resources_s, "the evaluation")
    require_usable_gpu(device, config.precision)
    size = (model.model_config.image_height_px, model.model_config.image_width_px)
    plan = IngestPlan(class_set=class_set, mask_format=mask_format, image_size=size, keep_full_mask=True)
    frames = ingest(pairs, plan).frames
    run = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))(_evaluate)
    try:
        found, samples, own_KK = ray.get(run.remote(model, frames, config, device, cpus))
    except ray.exceptions.RayTaskError as error:  # whose text is a stack trace
        raise error.cause from error
    say(metrics.class_table(own_KK, class_set.names))
    say(f"boundary F1 {found['val/boundary_f1'] or 0:.3f} within {metrics.BOUNDARY_TOLERANCE:.2%} of the diagonal")
    if config.out is not None:
        out = storage.resolve(config.out)
        _draw_results(out, pairs, class_set, mask_format, samples, own_KK)
        storage.write_whole(storage.join(out, "metrics.json"), json.dumps(found, indent=1).encode())
    return found


def _evaluate(
    model: bundle.Bundle, frames: FrameSource, config: EvaluateConfig, device: str, cpus: int
) -> tuple[dict[str, Any], dict[int, np.ndarray], np.ndarray]:
    """Runs where the device is: metrics, predicted masks of some frames, confusion matrix at the masks' own sizes."""
    from unet_ray.training import steps

    steps.configure(device, cpus)
    predict = steps.Predictor(model.build_model(dtype_policy=steps.choose_policy(config.precision, device)))
    reader = frames.open()
    evaluator = evaluation.Evaluator(predict, reader, config.batch_size, model.model_config)
    counted = evaluator.count(range(len(frames.names)), with_boundaries=True)
    samples = evaluator.predict_masks(evaluation.sample_places(len(frames.names)))
    names = model.class_set.names
    found = evaluation.metrics_of(counted.own_size_KK, counted.model_size_KK, names)
    found |= {f"val/{key}": value for key, value in metrics.boundary_f1(counted.boundary_K4, names).items()}
    return {"val/loss": predict.loss(counted.sums_S)} | found, samples, counted.own_size_KK

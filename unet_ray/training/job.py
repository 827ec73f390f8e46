"""Pairs to a trained model: checks everything first, then Ray Data, then Ray Train's workers, then the bundle.

RUN/config.yaml     the resolved configuration          RUN/run.json      what the run is: data, classes, versions
RUN/checkpoints/    see `checkpoints`                   RUN/tensorboard/  event files, pictures in samples/
RUN/history.csv     a row an epoch                      RUN/curves.png, samples.png, confusion.png, confusion.csv
RUN/report.html     all of it as a page
RUN/model/          the best by validation mean IoU     RUN/metrics.json  written last: the run is finished
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet_ray import storage
from unet_ray.cluster.connection import connect
from unet_ray.cluster.gpus import require_usable_gpu, try_xla
from unet_ray.cluster.resources import (
    default_cpus,
    resolve_device,
    wait_for_first_node,
    wait_for_resources,
    worker_resources,
)
from unet_ray.cluster.shared_paths import require_seen_by_all
from unet_ray.config import TrainConfig
from unet_ray.messages import count, reason_of, say, shown_path
from unet_ray.model.architecture import ModelConfig
from unet_ray.model.network_check import check_network
from unet_ray.pairs.splits import leak_rate, leak_warning
from unet_ray.storage.templates import split_template
from unet_ray.training import checkpoints, run_folder
from unet_ray.training.batches import FileFrames, IngestPlan, rare_class_chances
from unet_ray.training.blocks import ingest
from unet_ray.training.data import TrainingData, find_data, size_of_frames
from unet_ray.training.initial import InitialWeights, read_network
from unet_ray.training.launcher import run_workers, start_launcher
from unet_ray.training.mlflow_record import MlflowRecord
from unet_ray.training.results import write_results
from unet_ray.training.sample_log import SampleLog
from unet_ray.training.task import WorkerTask

START_TIMEOUT_S = 600.0
"""After which a worker that has not come to its first epoch is given up, unless `--collective-timeout-s` is more: it
may have gigabytes to fetch before."""


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
        _require_same_data(config)
        say(f"{config.out} is finished already; --overwrite trains it anew")
        return _result(config.out, finished)
    storage.require_writable(config.out, "--out")
    if config.image_size == "data":
        config = dataclasses.replace(config, image_size=size_of_frames(config))
    for line in run_folder.changes(config):
        say(line)
    data, network, initial, about = _describe(config)
    run_folder.require_same_data(config, about)

    connect()
    launcher = start_launcher()
    device = resolve_device(config.device)
    cpus = reserve(config, device)
    require_seen_by_all(_folders(config), config.out)
    require_usable_gpu(device, config.precision, config.wait_for_resources_s)
    compiled = device == "gpu" and try_xla(1.0, config.wait_for_resources_s)[0]
    task, hashes = _prepare(config, data, network, device, cpus)
    task = dataclasses.replace(task, compiled=compiled)
    if initial is not None:
        say(initial.as_text())
        task = dataclasses.replace(task, initial_weights=initial.weights, drawn=initial.drawn)
    leak = _say_plan(config, data, cpus, device, hashes)

    run_folder.begin(config, about | {"leak_rate": leak})
    record = MlflowRecord(config) if config.mlflow else None
    samples = SampleLog(config.out, data.samples, data.class_set, data.mask_format)
    monitor = run_workers(config, task, launcher, record, samples)
    assert monitor.finished, "the workers ended without a last word"
    say("writing the model and its pictures")
    metrics = write_results(config, data, network, monitor.finished)
    if record:
        record.finish()
    _show(config.out)
    return _result(config.out, metrics)


def _show(run: str) -> None:
    """Says where the model is, and writes the run's page; what goes wrong with that is a line and no more."""
    say(f"model: {storage.join(run, 'model')}")
    try:
        from unet_ray.reports.run_page import write_run_page  # loads matplotlib, which a worker need not

        say(f"report: {write_run_page(run, storage.join(run, 'report.html'))}")
    except Exception as error:  # noqa: BLE001  # the model is written, and whole without it
        again = f"`unet-ray report {shown_path(run)}` tries again"
        say(f"warning: report.html was not written: {type(error).__name__}: {reason_of(error)}; {again}")


def _describe(config: TrainConfig) -> tuple[TrainingData, ModelConfig, InitialWeights | None, dict[str, Any]]:
    """Returns what the training is about, found before Ray starts; the last is for `run.json`."""
    data = find_data(config)
    network, initial = read_network(config, data.class_set)
    check_network(network, child="unet_ray.training.exactness", accumulate=config.accumulate)
    about = run_folder.describe(data.split, data.class_set, data.mask_format, data.class_weights_K, initial)
    return data, network, initial, about


def _require_same_data(config: TrainConfig) -> None:
    """Refuses other data than those of a finished run; it stays finished where they are gone or incomplete."""
    try:
        about = _describe(config)[3]
    except ValueError as error:
        say(f"warning: whether this run was trained on the data as they are now is not known: {error}")
        return
    run_folder.require_same_data(config, about)


def _folders(config: TrainConfig) -> dict[str, list[str]]:
    """Returns what the cluster's tasks read, by option; the driver alone reads classes, weights and a manifest."""
    uris = {
        f"--{name}": getattr(config, name.replace("-", "_")) for name in ("images", "masks", "val-images", "val-masks")
    }
    return {option: [split_template(uri)[0]] for option, uri in uris.items() if uri is not None}


def reserve(config: TrainConfig, device: str) -> int:
    """Waits until the cluster has room for the workers (of a range: the fewest), and returns the CPUs of each."""
    fewest, most = config.worker_range()
    if config.cpus_per_worker is None:
        wait_for_first_node(device, config.wait_for_resources_s)
    cpus = config.cpus_per_worker or default_cpus(most, device)
    resources = [worker_resources(cpus, device)] * fewest
    wait_for_resources(resources, config.wait_for_resources_s, count(fewest, "training worker"))
    return cpus


def _prepare(
    config: TrainConfig, data: TrainingData, network: ModelConfig, device: str, cpus: int
) -> tuple[WorkerTask, dict[str, int]]:
    """Reads all pairs into the object store; returns the workers' task and the frames' hashes."""
    plan = IngestPlan(
        class_set=data.class_set,
        mask_format=data.mask_format,
        image_size=network.image_size,
        keep_full_mask=False,
        preprocessing=network.preprocessing,
    )
    train_plan = dataclasses.replace(plan, image_size=None) if config.augment else plan
    trained = ingest(data.split.train, train_plan, purpose="to train on")
    whole_plan = dataclasses.replace(plan, keep_full_mask=True)
    validation = ingest(data.split.validation, whole_plan, kept_bytes=trained.kept_bytes, purpose="to validate with")
    present_NK = trained.pixels_NK > 0
    task = WorkerTask(
        config=config,
        model_config=network,
        class_set=data.class_set,
        class_weights_K=data.class_weights_K,
        pixels_K=trained.pixels_NK.sum(axis=0),
        image_pixels_K=(present_NK * trained.pixels_NK.sum(axis=1, keepdims=True)).sum(axis=0),
        chances_N=_chances(config, trained.pixels_NK),
        train=trained.frames,
        validation=validation.frames,
        samples=FileFrames(
            names=tuple(pair.pair_id for pair in data.samples), pairs=data.samples, plan=whole_plan, keep=True
        ),
        device=device,
        cpus=cpus,
        start_timeout_s=max(START_TIMEOUT_S, config.collective_timeout_s),
    )
    return task, trained.hashes | validation.hashes


def _chances(config: TrainConfig, pixels_NK: np.ndarray) -> np.ndarray | None:
    """Returns each frame's chance to be drawn, and says how far they differ; None where each comes once an epoch."""
    if not config.rare_class_sampling:
        return None
    chances_N = rare_class_chances(pixels_NK, config.rare_class_sampling)
    times_N = chances_N * len(chances_N)
    most, fewest = times_N.max(), times_N.min()
    say(f"an epoch draws a frame of rare classes up to {most:.1f} times, one without {fewest:.2f} times")
    return chances_N


def _say_plan(config: TrainConfig, data: TrainingData, cpus: int, device: str, hashes: dict[str, int]) -> float | None:
    """Says what is about to be done, and returns the leak rate; None where no frame validates."""
    n_train, n_validation = len(data.split.train), len(data.split.validation)
    steps, last = -(-n_train // config.batch_size), n_train % config.batch_size
    each = f"{cpus} CPU{'s' * (cpus != 1)}{' and a GPU' if device == 'gpu' else ''}"
    short = f" (the last of {last})" if last else ""
    say(
        f"{_workers(*config.worker_range())} x {each}; {count(n_train, 'frame')} in {count(steps, 'step')} of "
        f"{config.batch_size}{short} x {count(config.epochs, 'epoch')} = {count(steps * config.epochs, 'step')}; "
        f"{count(n_validation, 'frame')} for validation"
    )
    if not n_validation:
        return None
    rate = leak_rate(data.split, guard_frames=config.guard_frames, hashes=hashes)
    say(f"leak rate: {rate:.1%} of the validation frames have a neighbour in time or a near-duplicate in training")
    if warning := leak_warning(rate):
        say(f"warning: {warning}")
    return rate


def _workers(fewest: int, most: int) -> str:
    return count(most, "worker") if fewest == most else f"{fewest} to {most} workers"


def _result(run: str, metrics: dict[str, Any]) -> TrainResult:
    last = checkpoints.newest_valid(run, on_damaged=lambda line: say(f"warning: {line}"))
    history = last.history if last else ()
    return TrainResult(run=run, model=storage.join(run, "model"), metrics=metrics, history=history)

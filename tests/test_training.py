"""Training on real Ray: what a run leaves, that it survives kills to the bit, and that it refuses in one line."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import scraping
import yaml
from PIL import Image
from safetensors.numpy import load_file

from unet_ray import checkpoints, config, faults, options, runs, training
from unet_ray.bundle import read_bundle
from unet_ray.config import EvaluateConfig, TrainConfig
from unet_ray.endings import JobFailed
from unet_ray.metrics import confusion_matrix
from unet_ray.monitor import Monitor
from unet_ray.pairs import ImagePair
from unet_ray.training import evaluate, train

CLASSES = {
    "classes": [
        {"name": "road", "color": [128, 64, 128], "values": [7]},
        {"name": "sky", "color": [70, 130, 180], "values": [13]},
        {"name": "car", "color": [0, 0, 142], "values": [10]},
    ],
    "ignore": [0],
}
RAW = np.array([7, 13, 10, 0], np.uint8)


def write_data(root: Path) -> None:
    """Four drives of 4 to 6 frames, 37x53: a bright half is sky, a dark half is road, a red box is a car."""
    (root / "classes.yaml").write_text(yaml.safe_dump(CLASSES))
    rng = np.random.default_rng(4)
    for drive, n_frames in enumerate((6, 4, 5, 4)):
        for folder in ("frames", "masks"):
            (root / folder / f"drive{drive}").mkdir(parents=True)
        for index in range(n_frames):
            image = rng.integers(0, 40, (37, 53, 3), np.uint8)
            mask = np.zeros((37, 53, 3), np.uint8)
            horizon, left = int(rng.integers(12, 24)), int(rng.integers(2, 40))
            image[:horizon] += 200
            mask[:horizon, :, 0], mask[horizon:, :, 0] = 13, 7
            image[-10:, left : left + 10, 0] = 255
            mask[-10:, left : left + 10, 0] = 10
            mask[:, : int(rng.integers(0, 9)), 0] = 0  # ignored
            Image.fromarray(image).save(root / "frames" / f"drive{drive}" / f"{index:04d}.png")
            Image.fromarray(mask).save(root / "masks" / f"drive{drive}" / f"{index:04d}.png")


def make_config(root: Path, out: Path, **changes) -> TrainConfig:
    told = {
        "images": str(root / "frames"),
        "masks": str(root / "masks"),
        "classes": str(root / "classes.yaml"),
        "out": str(out),
        "workers": 2,
        "cpus_per_worker": 1,
        "epochs": 12,
        "batch_size": 4,
        "image_size": (24, 32),
        "n_filters": 4,
        "depth": 2,
        "dropout": 0.3,
        "learning_rate": 1e-2,
        "val_fraction": 0.25,
        "seed": 5,
        "precision": "float32",
        "device": "cpu",
        "wait_for_resources_s": 0,
    }
    return TrainConfig(**(told | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    return root


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this module's own, so that a test may kill its workers."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in scraping.REPORT_INTERVAL.items():
            patch.setenv(name, value)
        training.connect()
        yield
        ray.shutdown()


def test_prometheus_reads_the_last_epoch(cluster, tmp_path):
    monitor = Monitor(str(tmp_path), 5)
    row = {"epoch": 3, "loss": 0.5, "images_per_s": 40.0, "seconds": 2.0, "wall_time_s": 1.0, "val/mean_iou": None}
    with monitor.gauges:
        monitor.handle({"kind": "epoch", "row": {**row, "epoch": 2, "loss": 0.75}})
        monitor.handle({"kind": "epoch", "row": row})
        found = {name: value for name, value in scraping.scrape().items() if "train" in name}
    assert found == {
        "ray_unet_ray_train_epoch": 3,
        "ray_unet_ray_train_loss": 0.5,
        "ray_unet_ray_train_images_per_second": 40,
    }


@pytest.fixture(scope="module")
def undisturbed(data, cluster, tmp_path_factory):
    """A run of two workers that nothing happened to."""
    told = make_config(data, tmp_path_factory.mktemp("runs") / "undisturbed")
    return told, train(told)


def final_weights(run: str | Path) -> dict[str, np.ndarray]:
    return load_file(Path(run) / "model" / "weights.safetensors")


def last_state(run: str | Path, epoch: int) -> dict[str, np.ndarray]:
    return checkpoints.read_checkpoint(checkpoints.checkpoint_uri(str(run), epoch)).tensors


def assert_same_end(one: str | Path, other: str | Path, epochs: int) -> None:
    """Model, optimizer and confusion matrices of the last epoch, and the best model, are equal to the bit."""
    first, second = last_state(one, epochs), last_state(other, epochs)
    assert first.keys() == second.keys() and any(name.startswith("optimizer/") for name in first)
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name], err_msg=name)
    for name, tensor in final_weights(one).items():
        np.testing.assert_array_equal(tensor, final_weights(other)[name], err_msg=name)


# --- what a run leaves ---


@pytest.mark.timeout(180)
def test_two_workers_learn_and_leave_everything(undisturbed):
    told, result = undisturbed
    run = Path(told.out)
    assert result.run == told.out and result.model == f"{told.out}/model"
    losses = [row["loss"] for row in result.history]
    assert len(losses) == 12 and losses[-1] < 0.5 * losses[0]
    assert result.metrics["val/mean_iou"] > 0.5
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("checkpoints", "config.yaml", "confusion.png", "curves.png", "history.csv", "metrics.json", "model"),
        *("run.json", "samples.png", "tensorboard"),
    }
    assert json.loads((run / "metrics.json").read_text()) == result.metrics
    with open(run / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    assert float(rows[3]["val/iou/road"]) == result.history[3]["val/iou/road"]
    assert [row["step"] for row in result.history] == [4 * (epoch + 1) for epoch in range(12)]  # 14 frames by 4
    assert json.loads((run / "run.json").read_text())["train_frames"] == 14
    assert yaml.safe_load((run / "config.yaml").read_text())["batch_size"] == 4


@pytest.mark.timeout(300)
def test_best_and_last_checkpoint_are_kept(undisturbed):
    told, result = undisturbed
    best = result.metrics["best_epoch"]
    values = [row["val/mean_iou"] for row in result.history]
    assert values[best - 1] == max(values) and best == values.index(max(values)) + 1
    assert set(checkpoints.list_epochs(told.out)) == {12, 11, best}


@pytest.mark.timeout(300)
def test_tensorboard_events_hold_the_history(undisturbed):
    from tensorflow.core.util import event_pb2
    from tensorflow.data import TFRecordDataset

    told, result = undisturbed
    (file,) = (Path(told.out) / "tensorboard").iterdir()
    events = [event_pb2.Event.FromString(record.numpy()) for record in TFRecordDataset(str(file))]
    found = {(v.tag, event.step): v.simple_value for event in events for v in event.summary.value}
    for row in result.history:
        assert found["loss", row["epoch"]] == pytest.approx(row["loss"], rel=1e-6)
        assert found["val/mean_iou", row["epoch"]] == pytest.approx(row["val/mean_iou"], rel=1e-6)


def validation_frames(told: TrainConfig) -> list[ImagePair]:
    return list(training.find_data(runs.resolved(told)).split.validation)


@pytest.mark.timeout(300)
def test_the_metrics_are_those_of_a_naive_count(undisturbed):
    """Five frames over two workers: each counted once, by the saved model, one frame at a time."""
    import tensorflow as tf

    told, result = undisturbed
    pairs = validation_frames(told)
    assert len(pairs) == 5
    model = read_bundle(told.out).build_model()
    own, small = np.zeros((3, 3), np.int64), np.zeros((3, 3), np.int64)
    for pair in pairs:
        image, raw = (np.asarray(Image.open(uri)) for uri in (pair.image_uri, pair.mask_uri))
        mask = np.select([raw.max(2) == 7, raw.max(2) == 13, raw.max(2) == 10], [0, 1, 2], 255)
        resized = tf.image.resize(image, (24, 32), method="nearest")
        logits = model(resized[None])[0]
        own += confusion_matrix(mask, tf.argmax(tf.image.resize(logits, (37, 53)), -1).numpy(), 3)
        small_mask = tf.image.resize(mask[..., None], (24, 32), method="nearest").numpy()[..., 0]
        small += confusion_matrix(small_mask, tf.argmax(logits, -1).numpy(), 3)
    for prefix, confusion in (("val", own), ("val_model_size", small)):
        iou = [confusion[k, k] / (confusion[k].sum() + confusion[:, k].sum() - confusion[k, k]) for k in range(3)]
        assert result.metrics[f"{prefix}/mean_iou"] == pytest.approx(np.mean(iou), abs=1e-3)
        assert result.metrics[f"{prefix}/pixel_accuracy"] == pytest.approx(
            np.trace(confusion) / confusion.sum(), abs=1e-3
        )
    total = last_state(told.out, result.metrics["best_epoch"])["confusion/own_size"].sum()
    assert total == own.sum()  # every valid pixel of every frame, once


@pytest.mark.timeout(300)
def test_evaluate_finds_what_training_found(undisturbed, data, tmp_path, capsys):
    told, result = undisturbed
    for pair in validation_frames(told):
        for folder, uri in (("frames", pair.image_uri), ("masks", pair.mask_uri)):
            target = tmp_path / folder / f"{pair.pair_id}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(Path(uri).read_bytes())
    found = evaluate(
        EvaluateConfig(
            model=told.out,
            images=str(tmp_path / "frames"),
            masks=str(tmp_path / "masks"),
            out=str(tmp_path / "out"),
            batch_size=3,
            precision="float32",
            device="cpu",
        )
    )
    assert found["val/mean_iou"] == pytest.approx(result.metrics["val/mean_iou"], abs=1e-3)
    assert found["val/loss"] == pytest.approx(result.metrics["val/loss"], rel=1e-3)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == found
    assert 0 < found["val/boundary_f1/car"] <= 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.json", "samples.png", "confusion.png"}
    assert f"mean IoU {found['val/mean_iou']:.3f} over 3 of 3 classes" in capsys.readouterr().out


# --- kills ---


def wait_for_epoch(run: str | Path, epoch: int, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not any(found >= epoch for found in checkpoints.list_epochs(str(run))):
        assert time.monotonic() < deadline, f"epoch {epoch} did not come"
        time.sleep(0.01)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_stops_costs_one_interval(undisturbed, data, tmp_path, capsys, how):
    told, _ = undisturbed
    victim: list[int] = []

    def kill() -> None:
        wait_for_epoch(tmp_path / "run", 3)
        victim.append(max(faults.titled_below(os.getpid(), "ray::RayTrainWorker")))
        os.kill(victim[0], how)

    thread = threading.Thread(target=kill)
    thread.start()
    train(make_config(data, tmp_path / "run"))
    thread.join()
    assert victim
    said = capsys.readouterr().out
    assert said.count("a worker was lost; the group has started again") == 1
    assert "going on after epoch " in said
    assert_same_end(tmp_path / "run", told.out, 12)


class HeldFrames:
    """Training frames whose reading `hold` may hold up; the worker's process lives on meanwhile."""

    def __init__(self, frames, marker: Path):
        self.frames, self.marker, self.n_reads = frames, marker, 0

    @property
    def names(self):
        return self.frames.names

    def open(self):
        self.reader = self.frames.open()
        return self

    def read(self, index: int):
        self.n_reads += 1
        self.hold()
        return self.reader.read(index)

    def hold(self) -> None:
        raise NotImplementedError


@contextlib.contextmanager
def held_up(kind: type[HeldFrames], marker: Path):
    """While the block runs, training reads its frames through `kind`, which the workers get by value."""
    prepare = training._prepare

    def prepare_held(*arguments):
        task, hashes = prepare(*arguments)
        return dataclasses.replace(task, train=kind(task.train, marker)), hashes

    modules = {sys.modules[HeldFrames.__module__], sys.modules[kind.__module__]}
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_prepare", prepare_held)
        yield
    for module in modules:
        ray.cloudpickle.unregister_pickle_by_value(module)


class StuckOnce(HeldFrames):
    """The first worker that asks for its 30th frame never gets it."""

    def hold(self) -> None:
        if self.n_reads == 30:
            with contextlib.suppress(FileExistsError):
                self.marker.touch(exist_ok=False)
                threading.Event().wait()


@pytest.mark.timeout(600)
def test_a_worker_that_lives_but_is_stuck_is_given_up(undisturbed, data, tmp_path, capsys):
    told, _ = undisturbed
    with held_up(StuckOnce, tmp_path / "stuck"):
        train(make_config(data, tmp_path / "run", collective_timeout_s=15))
    assert (tmp_path / "stuck").exists()
    assert capsys.readouterr().out.count("a worker was lost; the group has started again") == 1
    assert_same_end(tmp_path / "run", told.out, 12)


DRIVER = """
import sys, yaml
from unet_ray.config import TrainConfig
from unet_ray.training import train
options = yaml.safe_load(open(sys.argv[1]))
train(TrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}))
"""


@pytest.mark.timeout(900)
def test_a_driver_killed_goes_on_with_the_same_command_past_a_torn_checkpoint(undisturbed, data, tmp_path):
    told, _ = undisturbed
    run = tmp_path / "run"
    (tmp_path / "told.yaml").write_text(options.to_yaml(make_config(data, run)))
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "told.yaml")]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_epoch(run, 4)
    # With all that it started: Ray would end them too, some seconds later, when so small a run has finished.
    faults.kill([driver.pid, *faults.descendants(driver.pid)])
    driver.wait()
    epoch = checkpoints.list_epochs(str(run))[0]
    assert epoch < 12, "it finished before it was killed"
    if (manifest := run / "checkpoints" / f"epoch-{epoch:06d}" / "manifest.json").exists():
        (state,) = manifest.parent.glob("*.safetensors")
        state.write_bytes(state.read_bytes()[:1000])
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"going on after epoch {epoch - 1} of 12, from its checkpoint" in done.stdout
    assert_same_end(run, told.out, 12)


# --- the same command, another command ---


@pytest.mark.timeout(300)
def test_a_finished_run_is_left_as_it_is(undisturbed, capsys):
    told, result = undisturbed
    before = {path: path.stat().st_mtime_ns for path in Path(told.out).rglob("*")}
    again = train(told)
    assert capsys.readouterr().out == f"{told.out} is finished already; --overwrite trains it anew\n"
    assert again == result
    assert {path: path.stat().st_mtime_ns for path in Path(told.out).rglob("*")} == before
    train(dataclasses.replace(told, max_failures=9, collective_timeout_s=5))  # changes nothing in the result


@pytest.mark.timeout(300)
def test_another_configuration_is_refused_with_the_difference(undisturbed):
    told, _ = undisturbed
    with pytest.raises(ValueError) as caught:
        train(dataclasses.replace(told, seed=6, image_size=(32, 24)))
    assert str(caught.value) == (
        f"--out {told.out} holds a run of another configuration: --image-size was 24 32, now 32 24;"
        " --seed was 5, now 6; give the same options, another --out, or --overwrite to delete that run and start anew"
    )


@pytest.mark.timeout(300)
def test_other_data_are_refused(data, tmp_path):
    told = make_config(data, tmp_path / "run")
    about = runs.describe(training.find_data(told).split, config.load_class_set(told.classes), "channel-max")
    runs.begin(told, about | {"train_frames": 99, "frames_sha256": "0"})
    with pytest.raises(
        ValueError, match=r"holds a run that began with other data: train_frames was 99, now 14, frames_"
    ):
        train(told)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(data, tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(
        ValueError, match=r"holds files that are no training run, such as thesis\.tex; give another fold"
    ):
        train(make_config(data, tmp_path, overwrite=overwrite))
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.timeout(300)
def test_overwrite_deletes_the_run_and_nothing_else(undisturbed, data, tmp_path):
    told = make_config(data, tmp_path)
    checkpoints.write_checkpoint(
        told.out, checkpoints.Checkpoint(epoch=1, step=1, tensors={}, history=(), best_epoch=1)
    )
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "thesis.tex").write_text("mine")
    runs.begin(dataclasses.replace(told, overwrite=True), {})
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "run.json", "thesis.tex"}


# --- refusals ---


@pytest.mark.timeout(300)
def test_more_workers_than_the_cluster_has(data, cluster, tmp_path):
    with pytest.raises(ValueError, match=r"^9 training workers want 9 CPUs \(1 CPU each\); the cluster has 2 CPUs"):
        train(make_config(data, tmp_path / "run", workers=9, batch_size=9))
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(300)
def test_a_bad_mask_is_one_line_and_leaves_nothing(data, cluster, tmp_path):
    for file in [*(data / "frames").rglob("*.png"), *(data / "masks").rglob("*.png")]:
        target = tmp_path / file.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    bad = tmp_path / "masks" / "drive1" / "0002.png"
    mask = np.array(Image.open(bad))
    mask[3, 4:9, 0] = 200
    Image.fromarray(mask).save(bad)
    told = make_config(data, tmp_path / "run", images=str(tmp_path / "frames"), masks=str(tmp_path / "masks"))
    with pytest.raises(ValueError, match=rf"^{bad}: .*200 \(5 pixels\)"):
        train(dataclasses.replace(told, mask_format="channel-max"))
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(300)
def test_weights_that_are_not_finite_after_the_last_step_stop_the_job_too(data, cluster, tmp_path):
    told = make_config(data, tmp_path / "run", workers=1, learning_rate=1e39, batch_size=100)
    with pytest.raises(
        JobFailed, match="weights are not finite after step 1; the frames of its batch: drive.*--clip-n"
    ):
        train(told)
    assert checkpoints.list_epochs(str(tmp_path / "run")) == []


@pytest.mark.timeout(300)
def test_a_loss_that_is_not_finite_stops_with_step_and_frames(data, cluster, tmp_path):
    with pytest.raises(JobFailed) as caught:
        train(make_config(data, tmp_path / "run", workers=1, learning_rate=1e36))
    message = str(caught.value)
    step = int(message.split("at step ")[1].split(";")[0])
    assert 2 <= step <= 12 and message.startswith("the loss is ") and "\n" not in message
    frames = message.split("the frames of its batch: ")[1].split(";")[0].split(", ")
    assert 2 <= len(frames) <= 4 and all(name.startswith("drive") for name in frames)


def test_class_weights_from_a_file(data, tmp_path):
    class_set = config.load_class_set(str(data / "classes.yaml"))
    file = tmp_path / "weights.yaml"

    def read(text: str) -> tuple[float, ...] | None:
        file.write_text(text)
        return training.read_class_weights(str(file), class_set)

    assert read("{sky: 2, road: 0.5, car: 1}") == (0.5, 2.0, 1.0)
    with pytest.raises(
        ValueError, match=r"weights.yaml lacks car, sky; give one weight for each class of classes, no oth"
    ):
        read("{road: 1}")
    with pytest.raises(ValueError, match=r"weights.yaml names tree; give one weight"):
        read("{sky: 2, road: 0.5, car: 1, tree: 1}")
    with pytest.raises(ValueError, match=r"the weight of sky is -2; give a number from 0 to 1,000,000"):
        read("{sky: -2, road: 0.5, car: 1}")
    with pytest.raises(
        ValueError, match=r"--class-weights is 'square'; give none, log, median or the path of a .yaml fi"
    ):
        training.read_class_weights("square", class_set)
    assert training.read_class_weights("log", class_set) is None


@pytest.mark.timeout(180)
def test_everything_switched_on(data, cluster, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    told = make_config(
        data,
        tmp_path / "run",
        workers=1,
        epochs=40,
        augment=True,
        optimizer="adamw",
        schedule="cosine",
        warmup_epochs=1,
        loss="ce+dice",
        class_weights="log",
        clip_norm=1.0,
        early_stopping_epochs=3,
        checkpoint_every_epochs=2,
        precision="bfloat16",
        mlflow=True,
    )
    result = train(told)
    best = result.metrics["best_epoch"]
    assert result.metrics["epochs"] == len(result.history) == min(40, best + 3)
    assert result.history[0]["learning_rate"] == pytest.approx(1e-2)  # the warm-up is over
    recorded = json.loads((tmp_path / "run" / "mlflow.json").read_text())["run_id"]
    points = MlflowClient().get_metric_history(recorded, "loss")
    assert [point.step for point in points] == [row["epoch"] for row in result.history]


@pytest.mark.timeout(300)
def test_all_frames_can_train(data, cluster, tmp_path):
    result = train(make_config(data, tmp_path / "run", workers=1, epochs=2, val_fraction=0, loss="focal"))
    assert "val/mean_iou" not in result.metrics and result.metrics["best_epoch"] == 2
    assert not (tmp_path / "run" / "samples.png").exists()
    assert (tmp_path / "run" / "curves.png").exists()
    assert read_bundle(result.run).model_config.n_filters == 4

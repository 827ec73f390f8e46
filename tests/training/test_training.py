"""Training on real Ray: what a run leaves, what the same and another command do on it, what is refused in one line."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import phases
import prometheus
import pytest
import ray
import yaml
from phases import assert_in_order
from PIL import Image
from ray.util.placement_group import placement_group
from small_training import CLASSES, HeldFrames, final_weights, held_up, last_state, make_config, write_data

from unet_ray import cli
from unet_ray.chaos import faults
from unet_ray.config import EvaluateConfig, TrainConfig, load_class_set
from unet_ray.errors import JobFailed, TryAgain
from unet_ray.model.bundle import read_bundle
from unet_ray.model.metrics import confusion_matrix
from unet_ray.model.unet import build_unet
from unet_ray.options import config_files
from unet_ray.pairs.pairs import ImagePair
from unet_ray.pixels.images import resize_nearest
from unet_ray.training import batches, checkpoints, run_folder
from unet_ray.training import data as training_data
from unet_ray.training import job as training
from unet_ray.training.evaluation import evaluate
from unet_ray.training.events import EpochDone
from unet_ray.training.job import train
from unet_ray.training.monitor import Monitor


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    return root


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this module's own, so that a test may kill its workers."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in prometheus.REPORT_INTERVAL.items():
            patch.setenv(name, value)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            training.connect()
        assert_in_order(output.getvalue(), phases.RAY_STARTS)
        yield
        ray.shutdown()


def test_prometheus_reads_the_last_epoch(cluster, tmp_path):
    monitor = Monitor(str(tmp_path), 5)
    row = {"epoch": 3, "loss": 0.5, "images_per_s": 40.0, "seconds": 2.0, "wall_time_s": 1.0, "val/mean_iou": None}
    with monitor.gauges:
        monitor.handle(EpochDone(row={**row, "epoch": 2, "loss": 0.75}))
        monitor.handle(EpochDone(row=row))
        metrics = {name: value for name, value in prometheus.scrape().items() if "train" in name}
    assert metrics == {
        "ray_unet_ray_train_epoch": 3,
        "ray_unet_ray_train_loss": 0.5,
        "ray_unet_ray_train_images_per_second": 40,
    }


class Recorded(HeldFrames):
    """Each worker writes down the frames that it reads, in a file of its own in the folder `marker`."""

    def hold(self, index: int) -> None:
        with open(self.marker / f"rank{self.rank}.txt", "a") as file:
            file.write(f"{index}\n")


@pytest.fixture(scope="module")
def undisturbed(data, cluster, tmp_path_factory):
    """A run of two workers that nothing happened to; what they read is beside it in `read/`, openings in `opened`, and
    what was printed in `output.txt`."""
    root = tmp_path_factory.mktemp("runs")
    config = make_config(data, root / "undisturbed")
    (root / "read").mkdir()
    events = faults.FileEvents(folder for kind in ("frames", "masks") for folder in (data / kind).iterdir())
    output = io.StringIO()
    with held_up(Recorded, root / "read"), contextlib.redirect_stdout(output):
        result = train(config)
    (root / "output.txt").write_text(output.getvalue())
    opened = Counter(str(file) for what, file in events.seen if what == "opened")
    (root / "opened.json").write_text(json.dumps(opened))
    return config, result


# --- what a run leaves ---


@pytest.mark.timeout(180)
def test_two_workers_learn_and_leave_everything(undisturbed):
    config, result = undisturbed
    run = Path(config.out)
    assert result.run == config.out and result.model == f"{config.out}/model"
    losses = [row["loss"] for row in result.history]
    assert len(losses) == 12 and losses[-1] < 0.5 * losses[0]
    assert result.metrics["val/mean_iou"] > 0.5
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("checkpoints", "config.yaml", "confusion.csv", "confusion.png", "curves.png", "history.csv"),
        *("metrics.json", "model", "report.html", "run.json", "samples.png", "tensorboard"),
    }
    assert json.loads((run / "metrics.json").read_text()) == result.metrics
    assert read_bundle(config.out).temperature == result.metrics["temperature"]
    with open(run / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    assert float(rows[3]["val/iou/road"]) == result.history[3]["val/iou/road"]
    assert [row["step"] for row in result.history] == [4 * (epoch + 1) for epoch in range(12)]  # 14 frames by 4
    about = json.loads((run / "run.json").read_text())
    assert about["train_frames"] == 14 and 0 <= about["leak_rate"] <= 1
    assert yaml.safe_load((run / "config.yaml").read_text())["batch_size"] == 4


@pytest.mark.timeout(180)
def test_a_line_as_each_phase_begins(undisturbed):
    config, _ = undisturbed
    assert_in_order((Path(config.out).parent / "output.txt").read_text(), phases.TRAINING)


@pytest.mark.timeout(300)
def test_every_frame_is_read_once_an_epoch_in_the_order_of_seed_and_epoch(undisturbed):
    config, _ = undisturbed
    for rank in range(2):
        read = [int(line) for line in (Path(config.out).parent / "read" / f"rank{rank}.txt").read_text().split()]
        orders = [batches.epoch_order(14, config.seed, epoch) for epoch in range(12)]
        expected = [batches.batch_slice(order, batch, 4, rank, 2) for order in orders for batch in range(4)]
        assert read == np.concatenate(expected).tolist()


@pytest.mark.timeout(300)
def test_files_are_read_once_not_once_an_epoch(undisturbed, data):
    config, _ = undisturbed
    opened = json.loads((Path(config.out).parent / "opened.json").read_text())
    assert opened.keys() == {str(path) for kind in ("frames", "masks") for path in (data / kind).rglob("*.png")}
    validated = {uri for pair in validation_frames(config) for uri in (pair.image_uri, pair.mask_uri)}
    assert max(opened[file] for file in validated) <= 5  # for samples.png again, by the network and by what draws
    assert {opened[file] for file in opened if "/frames/" in file and file not in validated} == {1}
    # Some masks once more, to find out their format.
    assert {opened[file] for file in opened if "/masks/" in file and file not in validated} == {1, 2}


@pytest.mark.timeout(300)
def test_best_and_last_checkpoint_are_kept(undisturbed):
    config, result = undisturbed
    best = result.metrics["best_epoch"]
    values = [row["val/mean_iou"] for row in result.history]
    assert values[best - 1] == max(values) and best == values.index(max(values)) + 1
    assert set(checkpoints.list_epochs(config.out)) == {12, 11, best}


@pytest.mark.timeout(300)
def test_tensorboard_events_hold_the_history(undisturbed):
    from tensorflow.core.util import event_pb2
    from tensorflow.data import TFRecordDataset

    config, result = undisturbed
    (file,) = (Path(config.out) / "tensorboard").glob("*.unet_ray")
    events = [event_pb2.Event.FromString(record.numpy()) for record in TFRecordDataset(str(file))]
    recorded = {(v.tag, event.step): v.simple_value for event in events for v in event.summary.value}
    for row in result.history:
        assert recorded["loss", row["epoch"]] == pytest.approx(row["loss"], rel=1e-6)
        assert recorded["val/mean_iou", row["epoch"]] == pytest.approx(row["val/mean_iou"], rel=1e-6)


@pytest.mark.timeout(300)
def test_tensorboard_shows_the_samples_of_some_epochs(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, result = undisturbed
    folder = Path(config.out) / "tensorboard" / "samples"
    images = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload().Images("samples")
    assert [image.step for image in images] == [1, 2, 4, 6, 8, 10, 12]
    size = (Path(config.out) / "samples.png").stat().st_size
    assert all(len(image.encoded_image_string) < 2 * size for image in images)
    if result.metrics["best_epoch"] == 12:  # the same masks
        assert images[-1].encoded_image_string == (Path(config.out) / "samples.png").read_bytes()


def validation_frames(config: TrainConfig) -> list[ImagePair]:
    return list(training_data.find_data(run_folder.resolved(config)).split.validation)


@pytest.mark.timeout(300)
def test_the_metrics_are_those_of_a_naive_count(undisturbed):
    """Five frames over two workers: each counted once, by the saved model, one frame at a time."""
    import tensorflow as tf

    config, result = undisturbed
    pairs = validation_frames(config)
    assert len(pairs) == 5
    model = read_bundle(config.out).build_model()
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
    total = last_state(config.out, result.metrics["best_epoch"])["confusion/own_size"].sum()
    assert total == own.sum()  # every valid pixel of every frame, once


@pytest.mark.timeout(300)
def test_the_temperature_is_that_of_the_smallest_likelihood_of_the_models_own_validation(undisturbed):
    """By trying out, in float64, one frame at a time."""
    config, result = undisturbed
    model = read_bundle(config.out).build_model(dtype_policy="float32")
    logits, labels = [], []
    for pair in validation_frames(config):
        image, raw = (resize_nearest(np.asarray(Image.open(uri)), 24, 32) for uri in (pair.image_uri, pair.mask_uri))
        mask = np.select([raw.max(2) == 7, raw.max(2) == 13, raw.max(2) == 10], [0, 1, 2], 255)
        logits.append(np.asarray(model(image[None])[0], np.float64)[mask != 255])
        labels.append(mask[mask != 255])
    logits_PK, labels_P = np.concatenate(logits), np.concatenate(labels)

    def likelihood(temperature: float) -> float:
        scaled = (logits_PK - logits_PK.max(1, keepdims=True)) / temperature
        return float(np.mean(np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(labels_P)), labels_P]))

    temperature = result.metrics["temperature"]
    best = min(np.geomspace(1 / 8, 8, 1001), key=likelihood)
    assert temperature == pytest.approx(best, rel=0.06) and likelihood(temperature) < 1.01 * likelihood(best)
    assert 0 <= result.metrics["val/expected_calibration_error/after"] < 0.2
    assert result.metrics["val/expected_calibration_error/before"] >= 0


@pytest.mark.timeout(300)
def test_evaluate_finds_what_training_found(undisturbed, data, tmp_path, capsys):
    config, result = undisturbed
    for pair in validation_frames(config):
        for folder, uri in (("frames", pair.image_uri), ("masks", pair.mask_uri)):
            target = tmp_path / folder / f"{pair.pair_id}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(Path(uri).read_bytes())
    options = EvaluateConfig(
        model=config.out,
        images=str(tmp_path / "frames"),
        masks=str(tmp_path / "masks"),
        out=str(tmp_path / "out"),
        batch_size=3,
        precision="float32",
        device="cpu",
    )
    (tmp_path / "evaluate.yaml").write_text(config_files.to_yaml(options))
    assert cli.main(["evaluate", "--config", str(tmp_path / "evaluate.yaml")]) == 0
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert results["val/mean_iou"] == pytest.approx(result.metrics["val/mean_iou"], abs=1e-3)
    assert results["val/loss"] == pytest.approx(result.metrics["val/loss"], rel=1e-3)
    assert 0 < results["val/boundary_f1/car"] <= 1
    assert results["temperature"] == result.metrics["temperature"]
    for when in ("before", "after"):
        key = f"val/expected_calibration_error/{when}"
        assert results[key] == pytest.approx(result.metrics[key], abs=1e-4)
    assert all(-1 <= results[f"val/error_correlation/{kind}"] <= 1 for kind in ("pearson", "spearman"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"metrics.json", "samples.png", "confusion.csv", "confusion.png"}
    output = capsys.readouterr().out
    pictures = ", ".join(str(tmp_path / "out" / name) for name in ("metrics.json", "samples.png", "confusion.png"))
    following = f"Next: unet-ray segment --model {config.out} --frames … --out …"
    assert_in_order(output, (*phases.EVALUATION, f"Look at: {pictures}", following))
    assert f"mean IoU {results['val/mean_iou']:.3f} over 3 of 3 classes" in output
    before, after = (results[f"val/expected_calibration_error/{when}"] for when in ("before", "after"))
    temperature, pearson = results["temperature"], results["val/error_correlation/pearson"]
    assert (
        f"\nexpected calibration error {after:.4f}; {before:.4f} without the model's temperature of {temperature:.3f}\n"
        f"expected and true error of the frames correlate by {pearson:.3f}\n"
    ) in output
    flipped = evaluate(dataclasses.replace(options, out=None, tta="flip"))
    assert flipped.keys() == results.keys() and flipped["val/loss"] != results["val/loss"]
    assert (
        "\nthese are of the mean of a frame's logits and its mirror image's (--tta flip)\n" in capsys.readouterr().out
    )


# --- the same command, another command ---


@pytest.mark.timeout(300)
def test_a_finished_run_is_left_as_it_is(undisturbed, capsys):
    config, result = undisturbed
    before = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}
    again = train(config)
    assert capsys.readouterr().out.endswith(f"\n{config.out} is finished already; --overwrite trains it anew\n")
    assert again == result
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")} == before
    train(dataclasses.replace(config, max_failures=9, collective_timeout_s=5))  # changes nothing in the result
    capsys.readouterr()
    assert cli.main(["train", "--config", f"{config.out}/config.yaml"]) == 0
    names = ("report.html", "curves.png", "samples.png", "confusion.png")
    pictures = ", ".join(f"{config.out}/{name}" for name in names)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"Look at: {pictures}",
        f"Next: unet-ray segment --model {config.out} --frames … --out …",
    ]


def test_a_finished_run_says_that_its_data_have_changed(undisturbed, tmp_path, capsys):
    config, result = undisturbed
    data = Path(config.images).parent
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(config.out, tmp_path / "run")
    folders = {name: str(tmp_path / "data" / Path(getattr(config, name)).name) for name in ("images", "masks")}
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(written | folders))
    moved = dataclasses.replace(config, **folders, out=str(tmp_path / "run"))
    assert train(moved).metrics == result.metrics
    for folder in folders.values():
        first = min(path for path in Path(folder).rglob("*") if path.is_file())
        shutil.copy(first, first.with_stem(f"{first.stem}9"))
    with pytest.raises(
        ValueError, match=r"holds a run that began with other data: .*_frames was \d+, now \d+"
    ) as error:
        train(moved)
    assert "\n" not in str(error.value)
    capsys.readouterr()
    shutil.rmtree(folders["masks"])
    assert train(moved).metrics == result.metrics
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"listing {moved.images} and {moved.masks}",
        "warning: whether this run was trained on the data as they are now is not known: "
        f"{folders['masks']}: no such folder of masks",
        f"{moved.out} is finished already; --overwrite trains it anew",
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_finished_run_grows_with_other_workers(undisturbed, tmp_path, capsys):
    config, result = undisturbed
    shutil.copytree(config.out, tmp_path / "run")
    longer = dataclasses.replace(config, out=str(tmp_path / "run"), workers=1, epochs=config.epochs + 2)
    grown = train(longer)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "the run goes on otherwise than before, --workers was 2, now 1: the same mathematics, but sums are rounded in "
        "another order, and dropout drops other pixels",
        "the run goes on to epoch 14, before it was 12",
    ]
    assert grown.history[:12] == result.history and [row["epoch"] for row in grown.history[12:]] == [13, 14]
    assert grown.metrics["epochs"] == 14 and train(longer) == grown
    with pytest.raises(ValueError, match=r"another configuration: --epochs was 14, now 12;"):
        train(dataclasses.replace(longer, epochs=12))


def test_a_run_of_an_older_version_had_the_defaults_of_today(data, tmp_path):
    config = make_config(data, tmp_path / "run", workers=2)
    run_folder.begin(config, about_of(config))
    file = tmp_path / "run" / "config.yaml"
    before = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({key: value for key, value in before.items() if key not in ("init_from", "scale")}))
    assert run_folder.finished(config) is None and run_folder.changes(config) == []
    with pytest.raises(ValueError, match=r"--scale was 0\.5 1\.0, now 0\.4 1\.0; --init-from was None, now .*/m;"):
        run_folder.finished(dataclasses.replace(config, init_from=str(tmp_path / "m"), scale=(0.4, 1.0)))
    cosine = dataclasses.replace(config, schedule="cosine", epochs=20)
    before["schedule"] = "cosine"
    file.write_text(yaml.safe_dump(before))
    assert run_folder.changes(cosine) == [
        "the run goes on to epoch 20, before it was 12; the cosine is that of the whole, longer run from here on"
    ]


@pytest.mark.weekly
@pytest.mark.timeout(300)
def test_a_run_for_other_classes_starts_from_all_but_the_last_layer(undisturbed, data, cluster, tmp_path, capsys):
    config, _ = undisturbed
    still = {"workers": 1, "epochs": 1, "learning_rate": 1e-12, "dropout": 0.0, "seed": 77}
    classes = {**CLASSES, "classes": [{**CLASSES["classes"][0], "name": "street"}, *CLASSES["classes"][1:]]}
    (tmp_path / "others.yaml").write_text(yaml.safe_dump(classes))
    others = make_config(
        data, tmp_path / "others", init_from=config.out, classes=str(tmp_path / "others.yaml"), **still
    )
    train(others)
    assert "its classes are others, so the last layer starts anew" in capsys.readouterr().out
    kept = final_weights(others.out)
    for name, tensor in final_weights(config.out).items():
        equal = np.allclose(kept[name], tensor, atol=1e-6)
        assert equal == (name != "conv2d_7/kernel") or name == "conv2d_7/bias", name


def test_weights_that_do_not_fit_are_refused_before_ray_starts(undisturbed, data, tmp_path):
    config, _ = undisturbed
    with pytest.raises(ValueError) as caught:
        train(make_config(data, tmp_path / "deeper", init_from=config.out, depth=3, image_size=(24, 32)))
    assert str(caught.value) == (
        f"--init-from {config.out} is a network of another shape than this run's; give --depth 2, or another model"
    )
    assert not (tmp_path / "deeper").exists()
    with pytest.raises(ValueError, match=r"--init-from .* lies in --out"):
        make_config(data, config.out, init_from=str(Path(config.out) / "model"))


@pytest.mark.timeout(300)
def test_another_configuration_is_refused_with_the_difference(undisturbed):
    config, _ = undisturbed
    with pytest.raises(ValueError) as caught:
        train(dataclasses.replace(config, seed=6, image_size=(32, 24)))
    assert str(caught.value) == (
        f"--out {config.out} holds a run of another configuration: --image-size was 24 32, now 32 24;"
        " --seed was 5, now 6; give the same options, another --out, or --overwrite to delete that run and start anew"
    )


def about_of(config: TrainConfig) -> dict[str, Any]:
    inputs = training_data.find_data(config)
    return run_folder.describe(inputs.split, inputs.class_set, inputs.mask_format, inputs.class_weights_K)


@pytest.mark.timeout(300)
def test_other_data_are_refused(data, tmp_path):
    config = make_config(data, tmp_path / "run")
    about = about_of(config)
    run_folder.begin(config, about | {"train_frames": 99, "frames_sha256": "0"})
    with pytest.raises(
        ValueError, match=r"holds a run that began with other data: train_frames was 99, now 14, frames_"
    ):
        train(config)


@pytest.mark.timeout(300)
def test_files_of_classes_and_weights_that_were_edited_are_refused(data, tmp_path):
    weights, classes = tmp_path / "weights.yaml", tmp_path / "classes.yaml"
    weights.write_text("{sky: 2, road: 0.5, car: 1}")
    classes.write_text((data / "classes.yaml").read_text())
    config = make_config(data, tmp_path / "run", classes=str(classes), class_weights=str(weights))
    run_folder.begin(config, about_of(config))
    weights.write_text("{car: 1.0, sky: 2, road: 0.5} # as before")
    run_folder.require_same_data(config, about_of(config))
    weights.write_text("{sky: 3, road: 0.5, car: 1}")
    with pytest.raises(ValueError) as caught:
        train(config)
    assert str(caught.value) == (
        f"--out {config.out} holds a run that began with other data: class_weights/sky was 2.0, now 3.0; restore the"
        " data, give another --out, or --overwrite to delete that run and start anew"
    )
    weights.write_text("{sky: 2, road: 0.5, car: 1}")
    classes.write_text(classes.read_text().replace("142", "143"))
    with pytest.raises(ValueError, match=r"began with other data: classes_sha256 was [0-9a-f]{64}, now [0-9a-f]{64};"):
        train(config)


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
    config = make_config(data, tmp_path)
    checkpoints.write_checkpoint(
        config.out, checkpoints.Checkpoint(epoch=1, step=1, tensors={}, history=(), best_epoch=1)
    )
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "thesis.tex").write_text("mine")
    run_folder.begin(dataclasses.replace(config, overwrite=True), {})
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "run.json", "thesis.tex"}


# --- refusals ---


@pytest.mark.timeout(300)
def test_more_workers_than_the_cluster_has(data, cluster, tmp_path):
    with pytest.raises(ValueError, match=r"^9 training workers want 9 CPUs \(1 CPU each\); the cluster has 2 CPUs"):
        train(make_config(data, tmp_path / "run", workers=9, batch_size=9))
    assert not (tmp_path / "run").exists()


@pytest.mark.weekly
@pytest.mark.timeout(300)
def test_workers_that_other_jobs_leave_no_room_are_given_up(data, cluster, tmp_path, monkeypatch):
    """The cluster has 2 CPUs, so that the job begins; Ray Train would wait for the one that is held without a word."""
    monkeypatch.setattr(training, "START_TIMEOUT_S", 5.0)
    other = placement_group([{"CPU": 1}])
    ray.get(other.ready())
    config = make_config(data, tmp_path / "run", workers=2, collective_timeout_s=1)
    with pytest.raises(TryAgain, match="^no worker has started for 10 s; perhaps other jobs hold"):
        train(config)
    assert not ray.is_initialized()  # so that it holds nothing there any more
    monkeypatch.undo()
    train(dataclasses.replace(config, epochs=1, overwrite=True, collective_timeout_s=600))


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
    config = make_config(data, tmp_path / "run", images=str(tmp_path / "frames"), masks=str(tmp_path / "masks"))
    with pytest.raises(ValueError, match=rf"^{bad}: .*200 \(5 pixels\)"):
        train(dataclasses.replace(config, mask_format="channel-max"))
    assert not (tmp_path / "run").exists()


@pytest.mark.weekly
@pytest.mark.timeout(300)
def test_weights_that_are_not_finite_after_the_last_step_stop_the_job_too(data, cluster, tmp_path):
    config = make_config(data, tmp_path / "run", workers=1, learning_rate=1e39, batch_size=100)
    with pytest.raises(
        JobFailed, match="weights are not finite after step 1; the frames of its batch: drive.*--clip-n"
    ):
        train(config)
    assert checkpoints.list_epochs(str(tmp_path / "run")) == []


class FramesThatDoNotFit(HeldFrames):
    """Reading a frame asks TensorFlow for 64 TB, as a batch does that is too large for its device."""

    def hold(self, index: int) -> None:
        import tensorflow as tf

        tf.random.uniform([2**44])


@pytest.mark.timeout(300)
def test_a_batch_that_does_not_fit_ends_at_once_with_the_remedy(data, cluster, tmp_path, capsys):
    config = make_config(data, tmp_path / "run", workers=1, accumulate=2, max_failures=3)
    with held_up(FramesThatDoNotFit, tmp_path / "marker"), pytest.raises(JobFailed) as caught:
        train(config)
    assert re.fullmatch(
        r"worker 0's cpu has not enough memory for its part of a batch of 4 frames on 1 worker, 2 frames at once: "
        r"OOM when allocating tensor with shape\[17592186044416\] and type float on \S+ by allocator \w+; give a "
        r"smaller --batch-size, or a larger --accumulate, which computes the same",
        str(caught.value),
    )
    assert capsys.readouterr().out.count("precision: ") == 1  # no second group of them


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_loss_that_is_not_finite_stops_with_step_and_frames(data, cluster, tmp_path):
    with pytest.raises(JobFailed) as caught:
        train(make_config(data, tmp_path / "run", workers=1, learning_rate=1e36))
    message = str(caught.value)
    step = int(message.split("at step ")[1].split(";")[0])
    assert step == 2 and message.startswith("the loss is ") and "\n" not in message  # the first after an update
    frames = message.split("the frames of its batch: ")[1].split(";")[0].split(", ")
    trained = training_data.find_data(make_config(data, tmp_path / "run")).split.train
    assert frames == [trained[index].pair_id for index in batches.epoch_order(14, 5, 0)[4:8]]


def test_class_weights_from_a_file(data, tmp_path):
    class_set = load_class_set(str(data / "classes.yaml"))
    file = tmp_path / "weights.yaml"

    def read(text: str) -> tuple[float, ...] | None:
        file.write_text(text)
        return training_data.read_class_weights(str(file), class_set)

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
        training_data.read_class_weights("square", class_set)
    assert training_data.read_class_weights("log", class_set) is None


def cross_entropy(model, pairs: Sequence[ImagePair], weights: Sequence[float]) -> float:
    """Mean of -log p(true class) over the valid pixels at the network's size, weighted by their true class."""
    total = of = 0.0
    for pair in pairs:
        image, raw = (resize_nearest(np.asarray(Image.open(uri)), 24, 32) for uri in (pair.image_uri, pair.mask_uri))
        logits = np.asarray(model(image[None])[0], np.float64)
        for value, weight, logit in zip((7, 13, 10), weights, np.moveaxis(logits, -1, 0), strict=True):
            true = raw[..., 0] == value
            entropy = np.log(np.exp(logits).sum(axis=-1)) - logit
            total, of = total + weight * entropy[true].sum(), of + weight * true.sum()
    return total / of


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_class_weights_from_a_file_weigh_the_loss(data, cluster, tmp_path):
    """All frames are in one batch: the only step's loss is that of the untrained network."""
    (tmp_path / "weights.yaml").write_text("{sky: 2, road: 0.5, car: 8}")
    changes = {"workers": 1, "epochs": 1, "batch_size": 14, "dropout": 0.0}
    config = make_config(data, tmp_path / "run", class_weights=str(tmp_path / "weights.yaml"), **changes)
    result = train(config)
    split = training_data.find_data(config).split
    untrained = build_unet(config.model_config(3), seed=config.seed)
    losses = [cross_entropy(untrained, split.train, weights) for weights in ((0.5, 2, 8), (1, 1, 1))]
    assert result.history[0]["loss"] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)
    trained = read_bundle(result.run).build_model()
    assert result.metrics["val/loss"] == pytest.approx(cross_entropy(trained, split.validation, (0.5, 2, 8)), rel=1e-4)


class Weighed(HeldFrames):
    """Each worker writes down its own memory and the driver's, in MB, whenever it has read ten epochs' frames.

    `marker` is a folder with the driver's process id in the file `driver`.
    """

    def hold(self, index: int) -> None:
        if self.n_reads % (80, 60)[self.rank] == 0:  # of 14 frames by 4, rank 0 takes 8 an epoch
            pids = {"worker": os.getpid(), "driver": int((self.marker / "driver").read_text())}
            with open(self.marker / f"rank{self.rank}.jsonl", "a") as file:
                file.write(json.dumps({name: own_mb(pid) for name, pid in pids.items()}) + "\n")


def own_mb(pid: int) -> float:
    """A process's memory without shared pages, of which Ray's object store is made."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1000


@pytest.mark.weekly
@pytest.mark.timeout(300)
def test_memory_of_driver_and_workers_stays_flat_over_fifty_epochs(data, cluster, tmp_path):
    (tmp_path / "driver").write_text(str(os.getpid()))
    with held_up(Weighed, tmp_path):
        train(make_config(data, tmp_path / "run", epochs=70, augment=True))
    for rank in range(2):
        seen = [json.loads(line) for line in (tmp_path / f"rank{rank}.jsonl").read_text().splitlines()]
        for name in ("worker", "driver"):
            print(f"{name}, MB after 10, 20, … 70 epochs:", *(row[name] for row in seen))
            assert len(seen) == 7 and seen[6][name] - seen[1][name] < 10


class Measured(HeldFrames):
    """Writes down the sizes of the frames and masks that are read."""

    def read(self, index: int):
        image, mask = super().read(index)
        with open(self.marker, "a") as file:
            file.write(f"{image.shape} {mask.shape}\n")
        return image, mask

    def hold(self, index: int) -> None:
        pass


@pytest.mark.timeout(180)
def test_everything_switched_on(data, cluster, tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient

    write_data(tmp_path)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = make_config(
        data,
        tmp_path / "run",
        val_images=str(tmp_path / "frames"),
        val_masks=str(tmp_path / "masks"),
        workers=1,
        epochs=40,
        augment=True,
        optimizer="adamw",
        schedule="cosine",
        warmup_epochs=1,
        loss="ce+jaccard",
        class_weights="log",
        ohem_threshold=0.95,
        rare_class_sampling=1.0,
        classmix=0.5,
        ema_momentum=0.8,
        clip_norm=1.0,
        early_stopping_epochs=3,
        checkpoint_every_epochs=2,
        precision="bfloat16",
        mlflow=True,
    )
    with held_up(Measured, tmp_path / "sizes"):
        result = train(config)
    assert set((tmp_path / "sizes").read_text().splitlines()) == {"(37, 53, 3) (37, 53)"}  # crops are cut from these
    best = result.metrics["best_epoch"]
    assert result.metrics["epochs"] == len(result.history) == best + 3 < 40
    output = capsys.readouterr().out
    assert f"19 pairs; 19 other frames of {tmp_path / 'frames'} validate\n" in output
    assert "leak rate: 100.0% of the validation frames have a neighbour in time or a near-dup" in output
    assert "\nwarning: " in output
    assert result.history[0]["learning_rate"] == pytest.approx(1e-2)  # the warm-up is over
    assert "\nan epoch draws a frame of rare classes up to " in output
    tensors = last_state(result.run, best)
    for name, tensor in final_weights(result.run).items():  # the averages, which were validated
        average = tensors[f"optimizer/adamw/{name.replace('/', '_')}_average"]
        np.testing.assert_array_equal(tensor, average)
        assert (tensor != tensors[f"model/{name}"]).any()
    recorded = json.loads((tmp_path / "run" / "mlflow.json").read_text())["run_id"]
    points = MlflowClient().get_metric_history(recorded, "loss")
    assert [point.step for point in points] == [row["epoch"] for row in result.history]


@pytest.mark.timeout(300)
def test_all_frames_can_train_from_the_weights_of_another_run(undisturbed, data, cluster, tmp_path, capsys):
    config, start = undisturbed
    still = {"learning_rate": 1e-12, "dropout": 0.0, "seed": 77, "init_from": config.out}
    result = train(make_config(data, tmp_path / "run", workers=1, epochs=2, val_fraction=0, loss="focal", **still))
    output = capsys.readouterr().out
    assert f"the run starts from the weights of {start.model}\n" in output
    for name, tensor in final_weights(config.out).items():
        np.testing.assert_allclose(final_weights(result.run)[name], tensor, atol=1e-6, err_msg=name)
    assert "val/mean_iou" not in result.metrics and result.metrics["best_epoch"] == 2
    assert "\nconfidence is not calibrated: no frames validate\n" in output
    assert "temperature" not in result.metrics and not any("calibration" in key for key in result.metrics)
    assert "temperature" not in json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    names = {path.name for path in (tmp_path / "run").glob("*.png")}
    assert names == {"samples.png", "curves.png"}  # of frames that trained
    assert read_bundle(result.run).model_config.n_filters == 4

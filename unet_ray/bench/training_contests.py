"""The training contests of the benchmark: steps, whole trainings, two workers against one, ingest."""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from unet_ray.bench.arena import Arena, Contest, Contestant, precision_of
from unet_ray.bench.benchmark import Measurement, Round, Row, Skipped
from unet_ray.classes import PRESETS
from unet_ray.options.config_files import read_yaml

EQUAL_LOSS = 0.02
"""Largest relative difference of the losses of one batch, bfloat16 against float32."""

EQUAL_IOU = 0.1
"""Largest difference of mean IoU between two trainings of one round: seeds differ by some hundredths."""


def _step(program: str) -> Contestant:
    def run(arena: Arena) -> Measurement:
        if program == "torch_step":
            arena.require("torch")
        settings = arena.settings
        arguments: dict[str, Any] = {
            "images": arena.log() / "CameraRGB", "masks": arena.log() / "CameraMask", "model": arena.model(),
            "batch_size": settings.batch_size, "steps": settings.steps, "threads": settings.cores,
        }  # fmt: skip
        if program != "keras_step":
            arguments["precision"] = precision_of("cpu")
        if program == "our_step":
            arguments["device"] = "cpu"
        return arena.program(program, arguments).result

    return run


def _losses_agree(peer: str) -> Callable[[Round], tuple[bool, str]]:
    def look(measured: Round) -> tuple[bool, str]:
        ours, theirs = measured["ours"]["loss"], measured[peer]["loss"]
        return (
            abs(ours - theirs) <= EQUAL_LOSS * abs(theirs),
            f"loss of the first batch {ours:.4f} and {theirs:.4f} (within {EQUAL_LOSS:.0%})",
        )

    return look


def _train_options(arena: Arena, out: Path, images: Path, masks: Path, classes: object) -> dict[str, Any]:
    settings = arena.settings
    return {
        "--recipe": "notebook", "--images": images, "--masks": masks, "--classes": classes, "--out": out,
        "--n-filters": settings.network.n_filters, "--depth": settings.network.depth, "--device": "cpu",
    }  # fmt: skip


def _image_size(arena: Arena) -> list[str]:
    return ["--image-size", *map(str, arena.network_size)]


def _camvid_classes(arena: Arena) -> Path:
    """The notebook learns void as a class of its own; both sides do here."""
    class_set = PRESETS["camvid"].to_dict()
    names = [{**item, "values": [index]} for index, item in enumerate(class_set["classes"])]
    names.append({"name": "void", "color": [1, 1, 1], "values": [len(names)]})
    path = arena.data / "camvid12.yaml"
    path.write_text(yaml.safe_dump({"classes": names}))
    return path


def _training_ours(arena: Arena) -> Measurement:
    camvid, classes = arena.camvid(), _camvid_classes(arena)
    options = _train_options(arena, arena.output("training_ours"), camvid / "train", camvid / "trainannot", classes)
    options |= {"--mask-format": "ids", "--epochs": arena.settings.epochs}
    options["--seed"] = arena.round_number
    ended = arena.command("train", options, *_image_size(arena))
    return {"wall_s": ended.wall_s, "mean_iou": _evaluate(arena, Path(options["--out"]), classes)}


def _training_notebook(arena: Arena) -> Measurement:
    camvid, classes, out = arena.camvid(), _camvid_classes(arena), arena.output("training_notebook")
    settings = arena.settings
    arguments = {
        "images": camvid / "train", "masks": camvid / "trainannot", "classes": classes, "out": out,
        "size": arena.network_size, "epochs": settings.epochs, "batch_size": 32, "threads": settings.cores,
        "n_filters": settings.network.n_filters, "depth": settings.network.depth, "seed": arena.round_number,
    }  # fmt: skip
    ended = arena.program("keras_fit", arguments)
    return {"wall_s": ended.wall_s, "mean_iou": _evaluate(arena, out, classes)}


def _evaluate(arena: Arena, model: Path, classes: Path) -> float:
    """Mean IoU on `val/`, by our own measure for both; not part of the time."""
    camvid, out = arena.camvid(), arena.output("evaluated")
    options = {
        "--model": model, "--images": camvid / "val", "--masks": camvid / "valannot", "--out": out,
        "--mask-format": "ids", "--device": "cpu",
    }  # fmt: skip
    arena.command("evaluate", options)
    return camvid_mean_iou(read_yaml(str(out / "metrics.json")))


def camvid_mean_iou(metrics: Mapping[str, Any]) -> float:
    """Returns the mean IoU at the network's size over CamVid's 11 classes, void, which is learnt, left out of it."""
    ious = [metrics.get(f"val_model_size/iou/{name}") for name in PRESETS["camvid"].names]
    return statistics.fmean(iou for iou in ious if iou is not None)


def _trainings_agree(measured: Round) -> tuple[bool, str]:
    ours, theirs = measured["ours"]["mean_iou"], measured["notebook"]["mean_iou"]
    return abs(ours - theirs) <= EQUAL_IOU, f"mean IoU {ours:.3f} and {theirs:.3f} (within {EQUAL_IOU:g})"


def _workers(number: int) -> Contestant:
    """Training with a core for each worker and as many frames for each; the rate of an epoch after the first."""

    def run(arena: Arena) -> Measurement:
        if arena.settings.cores < 2:
            raise Skipped("two workers want two cores")
        log = arena.log()
        out = arena.output(f"workers_{number}")
        options = _train_options(arena, out, log / "CameraRGB", log / "CameraMask", "carla23")
        options |= {
            "--workers": number, "--cpus-per-worker": 1, "--batch-size": number * arena.settings.batch_size,
            "--epochs": 3,
        }  # fmt: skip
        arena.command("train", options, *_image_size(arena))
        return {"images_per_s": statistics.median(_history(out, "images_per_s")[1:])}

    return run


def _history(run: Path, column: str) -> list[float]:
    """Returns a column of a run's history, by epoch."""
    with (run / "history.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file)]


def _workers_apart(arena: Arena) -> Measurement:
    """The train step alone in two processes with nothing in common but the machine, and in two that sum gradients: what
    two workers can reach, and what summing costs of it."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise Skipped("two workers want two cores")
    arguments: dict[str, Any] = {
        "images": str(arena.log() / "CameraRGB"), "masks": str(arena.log() / "CameraMask"),
        "model": str(arena.model()), "batch_size": arena.settings.batch_size, "steps": arena.settings.steps,
        "device": "cpu", "precision": precision_of("cpu"), "cores": cores,
    }  # fmt: skip
    return arena.program("steps_apart", arguments).result


def _first_epoch(arena: Arena) -> Measurement:
    """A training of three epochs: seconds of reading, from the device's line to the plan's, and of each epoch."""
    images, masks = arena.pairs()
    out = arena.output("first_epoch")
    options = _train_options(arena, out, images, masks, "carla23")
    options |= {"--mask-format": "channel-max", "--batch-size": arena.settings.batch_size, "--epochs": 3}
    ended = arena.command("train", options, *_image_size(arena))
    began, read = (next(at for at, line in ended.lines if mark in line) for mark in ("device: ", " frames in "))
    first, *later = _history(out, "seconds")
    return {"read_s": read - began, "first_s": first, "later_s": statistics.median(later)}


def _decode_pairs(arena: Arena) -> Measurement:
    images, masks = arena.pairs()
    arguments = {"images": images, "masks": masks, "size": arena.network_size, "threads": arena.settings.cores}
    return arena.program("decode_pairs", arguments).result


def _ingest(program: str) -> Contestant:
    def run(arena: Arena) -> Measurement:
        if program == "torch_ingest":
            arena.require("torch")
        images, masks = arena.pairs()
        arguments: dict[str, Any] = {
            "images": images,
            "masks": masks,
            "size": arena.network_size,
            "threads": arena.settings.cores,
        }
        if program != "our_ingest":
            arguments["batch_size"] = arena.settings.batch_size
        return arena.program(program, arguments).result

    return run


def _ingests_agree(measured: Round) -> tuple[bool, str]:
    differ = [name for name in measured if measured[name]["digest"] != measured["ours"]["digest"]]
    return not differ, "frames and masks equal to the bit" if not differ else f"other pixels: {', '.join(differ)}"


CONTESTS = (
    Contest(
        name="step",
        contestants={"ours": _step("our_step"), "keras": _step("keras_step"), "torch": _step("torch_step")},
    ),
    Contest(name="training", contestants={"ours": _training_ours, "notebook": _training_notebook}),
    Contest(name="workers", contestants={"one": _workers(1), "two": _workers(2), "apart": _workers_apart}),
    Contest(name="first_epoch", contestants={"ours": _first_epoch, "decode": _decode_pairs}),
    Contest(
        name="ingest",
        contestants={
            "ours": _ingest("our_ingest"), "tfdata": _ingest("tfdata_ingest"), "torch": _ingest("torch_ingest"),
        },
    ),
)  # fmt: skip


def _step_row(peer: str, against: str, target: float) -> Row:
    return Row(
        name=f"step_{peer}",
        what="train step, batch 32",
        against=against,
        contest="step",
        needs=("ours", peer),
        figure=lambda measured: measured["ours"]["images_per_s"] / measured[peer]["images_per_s"],
        target=target,
        agreement=_losses_agree(peer),
        note=lambda measured: (
            f"ours {measured['ours']['images_per_s']:.1f} images/s, {peer} {measured[peer]['images_per_s']:.1f}"
        ),
    )


ROWS = (
    _step_row("keras", "the notebook's fit, float32", 1.75),
    _step_row("torch", "torch, bf16 channels_last", 1.05),
    Row(
        name="training_notebook",
        what="whole training on CamVid, disk to bundle",
        against="the notebook's fit",
        contest="training",
        needs=("ours", "notebook"),
        figure=lambda measured: measured["notebook"]["wall_s"] / measured["ours"]["wall_s"],
        target=1.7,
        agreement=_trainings_agree,
        note=lambda measured: (
            f"ours {measured['ours']['wall_s']:.0f} s, notebook {measured['notebook']['wall_s']:.0f} s"
        ),
    ),
    Row(
        name="training_iou",
        what="mean IoU of that training on val/, less the other's",
        against="the notebook's fit, the round's number as seed",
        contest="training",
        needs=("ours", "notebook"),
        figure=lambda measured: measured["ours"]["mean_iou"] - measured["notebook"]["mean_iou"],
        unit="",
        target=-0.02,
        note=lambda measured: _trainings_agree(measured)[1],
    ),
    Row(
        name="workers",
        what="2 workers with a core each, batch 32 each",
        against="twice 1 worker with a core, batch 32",
        contest="workers",
        needs=("one", "two"),
        figure=lambda measured: measured["two"]["images_per_s"] / measured["one"]["images_per_s"] / 2,
        target=0.92,
    ),
    Row(
        name="workers_apart",
        what="2 processes with a core each and nothing in common, the train step alone",
        against="twice 1 process with a core",
        contest="workers",
        needs=("apart",),
        figure=lambda measured: measured["apart"]["all_per_s"] / measured["apart"]["one_per_s"] / 2,
    ),
    Row(
        name="workers_summing",
        what="2 such processes that sum their gradients, without Ray",
        against="twice 1 process with a core",
        contest="workers",
        needs=("apart",),
        figure=lambda measured: measured["apart"]["summing_per_s"] / measured["apart"]["one_per_s"] / 2,
    ),
    Row(
        name="first_epoch",
        what="reading and the first epoch",
        against="decoding alone on all cores and a later epoch",
        contest="first_epoch",
        needs=("ours", "decode"),
        figure=lambda measured: (
            (measured["ours"]["read_s"] + measured["ours"]["first_s"])
            / (measured["decode"]["decode_s"] + measured["ours"]["later_s"])
        ),
        target=1.0,
        at_most=True,
        note=lambda measured: (
            f"reading {measured['ours']['read_s']:.1f} s, decoding alone {measured['decode']['decode_s']:.1f} s; "
            f"first epoch {measured['ours']['first_s']:.1f} s, a later one {measured['ours']['later_s']:.1f} s"
        ),
    ),
    Row(
        name="ingest",
        what="ingest alone, pairs a second",
        against="the better of tf.data AUTOTUNE and torch DataLoader",
        contest="ingest",
        needs=("ours", "tfdata", "torch"),
        figure=lambda measured: (
            measured["ours"]["pairs_per_s"] / max(measured[peer]["pairs_per_s"] for peer in ("tfdata", "torch"))
        ),
        target=0.95,
        agreement=_ingests_agree,
        note=lambda measured: ", ".join(
            f"{name} {measurement['pairs_per_s']:.1f}/s" for name, measurement in measured.items()
        ),
    ),
)

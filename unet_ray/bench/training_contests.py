"""The training contests of the benchmark: steps, whole trainings, two workers against one, ingest."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from unet_ray.bench.arena import Arena, Contest, Contestant, precision_of
from unet_ray.bench.benchmark import Measurement, Round, Row, Skipped
from unet_ray.classes import PRESETS
from unet_ray.options import read_yaml

EQUAL_LOSS = 0.02
"""Largest relative difference of the losses of one batch, bfloat16 against float32."""

EQUAL_IOU = 0.1
"""Largest difference of mean IoU between two trainings: seeds differ by some hundredths."""


def _step(program: str) -> Contestant:
    def run(arena: Arena) -> Measurement:
        if program == "torch_step":
            arena.require("torch")
        settings = arena.settings
        told: dict[str, Any] = {
            "images": arena.log() / "CameraRGB", "masks": arena.log() / "CameraMask", "model": arena.model(),
            "batch_size": settings.batch_size, "steps": settings.steps, "threads": settings.cores,
        }  # fmt: skip
        if program != "keras_step":
            told["precision"] = precision_of("cpu")
        if program == "our_step":
            told["device"] = "cpu"
        return arena.program(program, told).result

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
        "--images": images, "--masks": masks, "--classes": classes, "--out": out, "--val-fraction": 0,
        "--n-filters": settings.network.n_filters, "--depth": settings.network.depth, "--device": "cpu",
    }  # fmt: skip


def _image_size(arena: Arena) -> list[str]:
    return ["--image-size", *map(str, arena.network_size)]


def _camvid_classes(arena: Arena) -> Path:
    """The notebook learns void as a class of its own; both sides do here."""
    told = PRESETS["camvid"].to_dict()
    names = [{**item, "values": [place]} for place, item in enumerate(told["classes"])]
    names.append({"name": "void", "color": [1, 1, 1], "values": [len(names)]})
    path = arena.data / "camvid12.yaml"
    path.write_text(yaml.safe_dump({"classes": names}))
    return path


def _training_ours(arena: Arena) -> Measurement:
    camvid, classes = arena.camvid(), _camvid_classes(arena)
    options = _train_options(arena, arena.output("training_ours"), camvid / "train", camvid / "trainannot", classes)
    options |= {"--mask-format": "ids", "--epochs": arena.settings.epochs, "--recipe": "notebook"}
    ended = arena.command("train", options, *_image_size(arena))
    return {"wall_s": ended.wall_s, "mean_iou": _evaluate(arena, Path(options["--out"]), classes)}


def _training_notebook(arena: Arena) -> Measurement:
    camvid, classes, out = arena.camvid(), _camvid_classes(arena), arena.output("training_notebook")
    settings = arena.settings
    told = {
        "images": camvid / "train", "masks": camvid / "trainannot", "classes": classes, "out": out,
        "size": arena.network_size, "epochs": settings.epochs, "batch_size": 32, "threads": settings.cores,
        "n_filters": settings.network.n_filters, "depth": settings.network.depth,
    }  # fmt: skip
    ended = arena.program("keras_fit", told)
    return {"wall_s": ended.wall_s, "mean_iou": _evaluate(arena, out, classes)}


def _evaluate(arena: Arena, model: Path, classes: Path) -> float:
    """Mean IoU on `val/`, by our own measure for both; not part of the time."""
    camvid, out = arena.camvid(), arena.output("evaluated")
    options = {
        "--model": model, "--images": camvid / "val", "--masks": camvid / "valannot", "--out": out,
        "--mask-format": "ids", "--device": "cpu",
    }  # fmt: skip
    arena.command("evaluate", options)
    return float(read_yaml(str(out / "metrics.json"))["val/mean_iou"])


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
        header, *rows = (out / "history.csv").read_text().splitlines()
        column = header.split(",").index("images_per_s")
        return {"images_per_s": statistics.median(float(row.split(",")[column]) for row in rows[1:])}

    return run


def _ingest(program: str) -> Contestant:
    def run(arena: Arena) -> Measurement:
        if program == "torch_ingest":
            arena.require("torch")
        images, masks = arena.pairs()
        told: dict[str, Any] = {
            "images": images,
            "masks": masks,
            "size": arena.network_size,
            "threads": arena.settings.cores,
        }
        if program != "our_ingest":
            told["batch_size"] = arena.settings.batch_size
        return arena.program(program, told).result

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
    Contest(name="workers", contestants={"one": _workers(1), "two": _workers(2)}),
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
        name="workers",
        what="2 workers with a core each, batch 32 each",
        against="twice 1 worker with a core, batch 32",
        contest="workers",
        needs=("one", "two"),
        figure=lambda measured: measured["two"]["images_per_s"] / measured["one"]["images_per_s"] / 2,
        target=0.92,
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
        note=lambda measured: ", ".join(f"{name} {told['pairs_per_s']:.1f}/s" for name, told in measured.items()),
    ),
)

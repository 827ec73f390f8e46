"""A small training: its data, its options, what is compared of its end, and frames that may hold it up."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import yaml
from PIL import Image
from safetensors.numpy import load_file

from unet_ray.config import TrainConfig
from unet_ray.training import checkpoints
from unet_ray.training import job as training

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
    options = {
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
    return TrainConfig(**(options | changes))


def final_weights(run: str | Path) -> dict[str, np.ndarray]:
    return load_file(Path(run) / "model" / "weights.safetensors")


def last_state(run: str | Path, epoch: int) -> dict[str, np.ndarray]:
    return checkpoints.read_checkpoint(checkpoints.checkpoint_uri(str(run), epoch)).tensors


def assert_same_end(one: str | Path, other: str | Path, epochs: int) -> None:
    """Model, optimizer and confusion matrices of the last epoch, and the model folder, are equal to the bit."""
    first, second = last_state(one, epochs), last_state(other, epochs)
    assert first.keys() == second.keys() and any(name.startswith("optimizer/") for name in first)
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name], err_msg=name)
    for name, tensor in final_weights(one).items():
        np.testing.assert_array_equal(tensor, final_weights(other)[name], err_msg=name)
    folders = [json.loads((Path(run) / "model" / "model.json").read_text()) for run in (one, other)]
    assert folders[0]["temperature"] == folders[1]["temperature"] and folders[0]["digest"] == folders[1]["digest"]


def wait_for_epoch(run: str | Path, epoch: int, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not any(saved >= epoch for saved in checkpoints.list_epochs(str(run))):
        assert time.monotonic() < deadline, f"epoch {epoch} did not come"
        time.sleep(0.01)


class HeldFrames:
    """Frames whose reading `hold` may hold up; the worker's process lives on meanwhile."""

    PARTS = ("train",)
    """Of the task's frames, those that are read through it."""

    def __init__(self, frames, part: str, marker: Path):
        self.frames, self.part, self.marker, self.n_reads = frames, part, marker, 0

    @property
    def names(self):
        return self.frames.names

    def open(self):
        self.reader, self.rank = self.frames.open(), ray.train.get_context().get_world_rank()
        return self

    def read(self, index: int):
        self.n_reads += 1
        self.hold(index)
        return self.reader.read(index)

    def full_mask(self, index: int):
        return self.reader.full_mask(index)

    def hold(self, index: int) -> None:
        raise NotImplementedError


@contextlib.contextmanager
def held_up(kind: type[HeldFrames], marker: Path) -> Iterator[None]:
    """While the block runs, training reads its frames through `kind`, which the workers get by value."""
    prepare = training._prepare

    def prepare_held(*arguments):
        task, hashes = prepare(*arguments)
        parts = {part: kind(getattr(task, part), part, marker) for part in kind.PARTS}
        return dataclasses.replace(task, **parts), hashes

    modules = {sys.modules[HeldFrames.__module__], sys.modules[kind.__module__]}
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_prepare", prepare_held)
        yield
    for module in modules:
        ray.cloudpickle.unregister_pickle_by_value(module)

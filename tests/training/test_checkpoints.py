"""Checkpoints are whole or do not count, whatever tears them; local files and a store that has no folders."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from unet_ray import storage
from unet_ray.training import checkpoints
from unet_ray.training.checkpoints import Checkpoint, CheckpointDamaged


def make(epoch: int, best: int = 1) -> Checkpoint:
    rng = np.random.default_rng(epoch)
    return Checkpoint(
        epoch=epoch,
        step=epoch * 7,
        tensors={
            "model/conv2d/kernel": rng.normal(size=(3, 3, 2, 5)).astype(np.float32),
            "optimizer/adam/iteration": np.array(epoch * 7, np.int64),
            "confusion/own_size": rng.integers(0, 2**60, (3, 3)),
        },
        history=tuple({"epoch": e + 1, "loss": 1 / (e + 1), "val/mean_iou": None} for e in range(epoch)),
        best_epoch=best,
    )


def assert_equal(one: Checkpoint, other: Checkpoint) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype and tensor.shape == other.tensors[name].shape
        np.testing.assert_array_equal(tensor, other.tensors[name])
    for field in ("epoch", "step", "history", "best_epoch"):
        assert getattr(one, field) == getattr(other, field)


@pytest.fixture(params=["local", "memory"])
def run(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "run")
    else:
        yield "memory://checkpoints-test/run"
        storage.delete_tree("memory://checkpoints-test")


def test_what_is_written_comes_back(run):
    folder = checkpoints.write_checkpoint(run, make(3))
    assert folder == storage.join(run, "checkpoints", "epoch-000003")
    assert_equal(checkpoints.read_checkpoint(folder), make(3))
    before = {file.path: storage.read_bytes(file.uri) for file in storage.list_files(folder)}
    checkpoints.write_checkpoint(run, make(3))
    assert {file.path: storage.read_bytes(file.uri) for file in storage.list_files(folder)} == before


def test_no_checkpoints(run):
    assert checkpoints.list_epochs(run) == []
    assert checkpoints.newest_valid(run, on_damaged=pytest.fail) is None


def test_the_newest_by_number_is_taken(run):
    for epoch in (9, 10, 2):
        checkpoints.write_checkpoint(run, make(epoch))
    assert checkpoints.list_epochs(run) == [10, 9, 2]
    newest = checkpoints.newest_valid(run, on_damaged=pytest.fail)
    assert newest is not None and newest.epoch == 10


def state_file(folder: str) -> str:
    return next(file.uri for file in storage.list_files(folder) if file.path.endswith(".safetensors"))


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("state", lambda data: data[:-9], "the state has 671 of 680 bytes"),
        (
            "state",
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            "the state has another sha256 than its manifest says",
        ),
        ("state", None, "is missing"),
        ("manifest", lambda data: data[: len(data) // 2], "manifest.json is not whole JSON"),
        ("manifest", lambda data: data.replace(b'"step": 14', b'"step": 15'), "does not match its own digest"),
        ("manifest", lambda data: b"[]", "the format version is not 1"),
        ("manifest", None, "manifest.json is missing: it was never whole"),
    ],
)
def test_a_damaged_one_is_said_and_the_one_before_is_taken(run, part, damage, message):
    checkpoints.write_checkpoint(run, make(1))
    folder = checkpoints.write_checkpoint(run, make(2))
    uri = state_file(folder) if part == "state" else storage.join(folder, "manifest.json")
    if damage is None:
        storage.delete(uri)
    else:
        data = storage.read_bytes(uri)
        assert damage(data) != data
        storage.write_whole(uri, damage(data))
    with pytest.raises(CheckpointDamaged):
        checkpoints.read_checkpoint(folder)
    lines: list[str] = []
    newest = checkpoints.newest_valid(run, on_damaged=lines.append)
    assert newest is not None
    assert_equal(newest, make(1))
    assert len(lines) == 1 and "\n" not in lines[0]
    assert lines[0].startswith(folder + ": ") and message in lines[0]


def test_only_those_to_keep_stay(run):
    for epoch in range(1, 6):
        checkpoints.write_checkpoint(run, make(epoch))
    checkpoints.delete_older(run, 5, {2})
    assert checkpoints.list_epochs(run) == [5, 2]


def test_a_group_that_is_behind_another_deletes_none_of_its_checkpoints(run):
    for epoch in range(1, 6):
        checkpoints.write_checkpoint(run, make(epoch))
    checkpoints.delete_older(run, 3, {2})
    assert checkpoints.list_epochs(run) == [5, 4, 3, 2]


def test_what_appears_while_the_newest_is_looked_for_is_found(run):
    """Another writer deletes what was listed, and has written newer ones."""
    storage.delete(storage.join(checkpoints.write_checkpoint(run, make(1)), "manifest.json"))
    newest = checkpoints.newest_valid(run, on_damaged=lambda line: checkpoints.write_checkpoint(run, make(2)))
    assert newest is not None and newest.epoch == 2


def test_where_the_best_is_damaged_another_stands_for_it(run):
    best, last = make(3, best=3), make(5, best=3)
    warnings = []
    for checkpoint in (best, last):
        checkpoints.write_checkpoint(run, checkpoint)
    assert checkpoints.best_or_this(run, last, on_damaged=warnings.append).epoch == 3
    assert checkpoints.best_or_this(run, best, on_damaged=warnings.append) is best
    assert warnings == []
    checkpoints.delete_older(run, 5, ())
    assert checkpoints.best_or_this(run, last, on_damaged=warnings.append) is last
    (line,) = warnings
    assert line.endswith("; epoch 5 stands for the best, 3") and "epoch-000003" in line


def test_where_averages_are_kept_they_are_the_networks_weights():
    names = ["model/a/kernel", "model/a_kernel_average/bias", "model/norm/moving_mean"]
    names += ["optimizer/adamw/a_kernel_average", "optimizer/adamw/a_kernel_momentum", "confusion/own_size"]
    tensors = {name: np.array(number) for number, name in enumerate(names)}
    checkpoint = Checkpoint(epoch=1, step=1, tensors=tensors, history=(), best_epoch=1)
    assert {name: int(value) for name, value in checkpoints.network_weights(checkpoint).items()} == {
        "a/kernel": 3,
        "a_kernel_average/bias": 1,
        "norm/moving_mean": 2,
    }


def test_a_stranger_among_them_is_left_alone(run):
    checkpoints.write_checkpoint(run, make(1))
    stranger = storage.join(run, "checkpoints", "notes", "mine.txt")
    storage.write_whole(stranger, b"mine")
    checkpoints.delete_older(run, 2, ())
    assert checkpoints.list_epochs(run) == []
    assert storage.read_bytes(stranger) == b"mine"


WRITER = """
import sys
import numpy as np
from unet_ray.training.checkpoints import Checkpoint, delete_older, write_checkpoint
for epoch in range(1, 10000):
    tensors = {"model/x": np.full((700, 1000), epoch, np.float32)}
    write_checkpoint(sys.argv[1], Checkpoint(epoch=epoch, step=epoch, tensors=tensors, history=(), best_epoch=1))
    delete_older(sys.argv[1], epoch, {epoch - 1})
    print(epoch, flush=True)
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("delay_s", [0.003, 0.011, 0.029])
def test_a_writer_killed_at_any_moment_leaves_the_last_one_it_finished(tmp_path, delay_s):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(3):
        written = int(writer.stdout.readline())
    time.sleep(delay_s)
    os.kill(writer.pid, signal.SIGKILL)
    written = max(written, *(int(line) for line in writer.communicate()[0].split()), 0)
    newest = checkpoints.newest_valid(str(tmp_path), on_damaged=lambda line: None)
    assert newest is not None and newest.epoch in (written, written + 1)
    np.testing.assert_array_equal(newest.tensors["model/x"], np.full((700, 1000), newest.epoch, np.float32))
    shutil.rmtree(tmp_path)

"""Training goes on, to the bit, whatever happens to its workers, its driver and its newest checkpoint."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import ray
from commands import run_to_end
from gates import CHECKPOINTS, Gates
from small_training import HeldFrames, assert_same_end, held_up, make_config, wait_for_epoch, write_data

from unet_ray.chaos import faults
from unet_ray.config import TrainConfig
from unet_ray.options import config_files
from unet_ray.training import blocks, checkpoints
from unet_ray.training import job as training
from unet_ray.training.job import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    return root


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this module's own, so that a test may kill its workers."""
    training.connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(data, cluster, tmp_path_factory):
    """A run of two workers, with dropout and all that is drawn or kept beside the weights, that nothing happened to."""
    config = make_config(data, tmp_path_factory.mktemp("runs") / "undisturbed", **ALL_THAT_DRAWS)
    train(config)
    return config


ALL_THAT_DRAWS = {"augment": True, "classmix": 0.5, "rare_class_sampling": 1.0, "ema_momentum": 0.9}


class Fault(NamedTuple):
    """A signal that a worker gets when it asks for a frame."""

    rank: int
    part: str
    at_read: int
    """Of that part's frames, by this worker since it started."""
    after_epoch: int
    """The newest checkpoint must be of this epoch at least."""
    how: signal.Signals


BEFORE_A_CHECKPOINT = (Fault(rank=0, part="train", at_read=5, after_epoch=0, how=signal.SIGKILL),)
AFTER_ONE = (
    Fault(rank=1, part="train", at_read=9, after_epoch=1, how=signal.SIGSTOP),  # in the middle of an epoch
    Fault(rank=0, part="validation", at_read=2, after_epoch=6, how=signal.SIGKILL),
    Fault(rank=0, part="samples", at_read=1, after_epoch=12, how=signal.SIGKILL),  # for samples.png, after the end
)
STOPPED, KILLED, ALL = AFTER_ONE[:1], AFTER_ONE[1:2], BEFORE_A_CHECKPOINT + AFTER_ONE


class Struck(HeldFrames):
    """Every one of `faults` happens once, in this order.

    `marker` is a folder with a file for each that has happened, `fault0`, and one for the first frame that the next
    group read, `back0`.
    """

    PARTS = ("train", "validation", "samples")
    faults = KILLED

    def open(self):
        self.at_start = self.n_happened()
        return super().open()

    def n_happened(self) -> int:
        return len(list(self.marker.glob("fault*")))

    def hold(self, index: int) -> None:
        if self.at_start:
            with contextlib.suppress(FileExistsError):
                (self.marker / f"back{self.at_start - 1}").touch(exist_ok=False)
        happened = self.n_happened()
        if happened == len(self.faults):
            return
        fault = self.faults[happened]
        newest = max(checkpoints.list_epochs(str(self.marker.parent / "run")), default=0)
        is_due = self.n_reads >= fault.at_read and newest >= fault.after_epoch
        if (self.rank, self.part) == (fault.rank, fault.part) and is_due:
            (self.marker / f"fault{happened}").write_text(str(newest))
            os.kill(os.getpid(), fault.how)


class Stopped(Struck):
    faults = STOPPED


class StruckEverywhere(Struck):
    faults = ALL


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "frames",
    [
        Struck,
        pytest.param(Stopped, marks=pytest.mark.slow),
        pytest.param(StruckEverywhere, marks=pytest.mark.weekly),
    ],
)
def test_workers_that_die_or_stop_anywhere_change_nothing(undisturbed, data, tmp_path, capsys, monkeypatch, frames):
    """Here the frames are streamed from their files, there they were blocks in the object store.

    A group is to read again within 60 s of the detection of a fault, which takes 1 s after a kill, 9 s after a stop.
    From the fault itself it took 20 to 31 s on 2 free cores (2026-11-21), and 54 to 156 s in a suite on two slow and
    busy ones (2026-11-28): so it is printed here, and not asserted.
    """
    monkeypatch.setattr(blocks, "STORE_SHARE", 1e-9)
    struck = tmp_path / "faults"
    struck.mkdir()
    n_faults = len(frames.faults)
    with held_up(frames, struck):
        train(make_config(data, tmp_path / "run", **ALL_THAT_DRAWS, checkpoint_every_epochs=3, max_failures=n_faults))
    output = capsys.readouterr().out
    assert "are read and decoded again in every epoch" in output
    assert output.count("a worker was lost; the group has started again") == n_faults
    newest = [int(path.read_text()) for path in sorted(struck.glob("fault*"))]
    resumed = [int(epoch) for epoch in re.findall("going on after epoch ([0-9]+) of 12", output)]
    after_one = [epoch for epoch in newest if epoch]
    assert len(newest) - len(after_one) == frames.faults.count(BEFORE_A_CHECKPOINT[0])
    assert all(epoch >= at_least for epoch, at_least in zip(resumed, after_one, strict=True))
    took_s = [
        (struck / f"back{number}").stat().st_mtime - (struck / f"fault{number}").stat().st_mtime
        for number in range(n_faults)
    ]
    print("seconds from a fault to the next group's first frame:", *(round(seconds, 1) for seconds in took_s))
    assert_same_end(tmp_path / "run", undisturbed.out, 12)


class StuckOnce(HeldFrames):
    """The first worker that asks for its 30th frame never gets it."""

    def hold(self, index: int) -> None:
        if self.n_reads == 30:
            with contextlib.suppress(FileExistsError):
                self.marker.touch(exist_ok=False)
                threading.Event().wait()


@pytest.mark.weekly
@pytest.mark.timeout(600)
def test_a_worker_that_lives_but_is_stuck_is_given_up(undisturbed, data, tmp_path, capsys):
    with held_up(StuckOnce, tmp_path / "stuck"):
        train(make_config(data, tmp_path / "run", **ALL_THAT_DRAWS, collective_timeout_s=30))
    output = capsys.readouterr().out
    assert " has got nowhere for 30 s (--collective-timeout-s) and ends itself; it was in " in output
    assert "a worker was lost; the group has started again" in output
    assert_same_end(tmp_path / "run", undisturbed.out, 12)


@pytest.mark.weekly
@pytest.mark.timeout(600)
def test_a_worker_that_is_stuck_alone_ends_itself(data, cluster, tmp_path, capsys):
    with held_up(StuckOnce, tmp_path / "stuck"):
        result = train(make_config(data, tmp_path / "run", workers=1, epochs=4, collective_timeout_s=30))
    output = capsys.readouterr().out
    # On a busy machine another group may be too slow, too: elsewhere.
    lines = [line for line in output.splitlines() if line.startswith("warning: worker 0 has got nowhere for 30 s ")]
    pattern = r"\(--collective-timeout-s\) and ends itself; it was in training/batches.py:[0-9]+ \(one_ahead\) -> "
    assert sum(re.search(pattern, line) is not None for line in lines) == 1
    assert output.count("a worker was lost; the group has started again") == len(lines)
    assert "going on after epoch 2 of 4" in output
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4]


class StoppedOnce(HeldFrames):
    """The first worker that asks for its 30th frame is stopped."""

    def hold(self, index: int) -> None:
        if self.n_reads == 30:
            with contextlib.suppress(FileExistsError):
                self.marker.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGSTOP)


@pytest.fixture
def impatient_cluster(monkeypatch):
    """A cluster whose workers have 10 s to answer Ray Train, not 60."""
    ray.shutdown()
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "10")
    training.connect()
    yield
    ray.shutdown()


@pytest.mark.weekly
@pytest.mark.timeout(600)
def test_a_worker_that_is_stopped_alone_is_given_up(impatient_cluster, data, tmp_path, capsys):
    """No other worker waits for it, and what watches over it is stopped, too: Ray's own check is left."""
    with held_up(StoppedOnce, tmp_path / "stopped"):
        result = train(make_config(data, tmp_path / "run", workers=1, epochs=4))
    output = capsys.readouterr().out
    assert "a worker was lost; the group has started again" in output and "going on after epoch 2 of 4" in output
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4]


class StuckAtStart(HeldFrames):
    """The first worker that opens its frames never gets them."""

    def open(self):
        with contextlib.suppress(FileExistsError):
            self.marker.touch(exist_ok=False)
            threading.Event().wait()
        return super().open()

    def hold(self, index: int) -> None:
        pass


@pytest.mark.weekly
@pytest.mark.timeout(600)
def test_a_worker_that_is_stuck_before_its_first_epoch_ends_itself(data, cluster, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "START_TIMEOUT_S", 60.0)
    with held_up(StuckAtStart, tmp_path / "stuck"):
        result = train(make_config(data, tmp_path / "run", workers=1, epochs=2, collective_timeout_s=15))
    output = capsys.readouterr().out
    assert re.search(
        "warning: worker 0 has come to no epoch for 60 s and ends itself; it was in training/worker.py:.* -> ", output
    )
    assert [row["epoch"] for row in result.history] == [1, 2]


STUCK_S = 240.0
"""After which the drivers below give up a group that hangs; many times what its start takes."""

DRIVER = f"""
import sys, yaml
from unet_ray.training import job as training
from unet_ray.config import TrainConfig
training.START_TIMEOUT_S = {STUCK_S}
options = yaml.safe_load(open(sys.argv[1]))
training.train(TrainConfig(**{{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}}))
"""


def start_driver(folder: Path, config: TrainConfig) -> tuple[list[str], subprocess.Popen, Gates]:
    """Starts a training in a process of its own, which stands still when it has written four checkpoints.

    Returns the command, the process, and the gate that is in its way.
    """
    gates = Gates(folder, {CHECKPOINTS: {"write_checkpoint": math.inf}})
    gates.open_for("write_checkpoint", 4)
    (folder / "config.yaml").write_text(config_files.to_yaml(config))
    command = [sys.executable, "-c", DRIVER, str(folder / "config.yaml")]
    environment = {**os.environ, **gates.settings}
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    return command, driver, gates


@pytest.mark.timeout(8 * STUCK_S)
def test_a_driver_killed_goes_on_with_the_same_command_past_a_torn_checkpoint(undisturbed, data, tmp_path):
    run = tmp_path / "run"
    command, driver, _ = start_driver(tmp_path, make_config(data, run, **ALL_THAT_DRAWS, collective_timeout_s=STUCK_S))
    wait_for_epoch(run, 4)
    # With all that it started: Ray would end them too, some seconds later, when so small a run has finished.
    faults.kill([driver.pid, *faults.descendants(driver.pid)])
    driver.wait()
    (epoch, *_) = checkpoints.list_epochs(str(run))
    assert epoch == 4
    if (manifest := run / "checkpoints" / f"epoch-{epoch:06d}" / "manifest.json").exists():
        (state,) = manifest.parent.glob("*.safetensors")
        state.write_bytes(state.read_bytes()[:1000])
    done = run_to_end(command, 4 * STUCK_S)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"going on after epoch {epoch - 1} of 12, from its checkpoint" in done.stdout
    assert_same_end(run, undisturbed.out, 12)


@pytest.mark.weekly
@pytest.mark.timeout(8 * STUCK_S)
def test_a_driver_killed_alone_goes_on_while_its_workers_still_write(undisturbed, data, tmp_path):
    """They live until Ray misses the driver, 3 s on 2 busy cores (2026-11-24), and finished an epoch meanwhile."""
    run = tmp_path / "run"
    command, driver, gates = start_driver(
        tmp_path, make_config(data, run, **ALL_THAT_DRAWS, collective_timeout_s=STUCK_S)
    )
    wait_for_epoch(run, 4)
    left = faults.titled_below(driver.pid, "ray::")
    faults.kill([driver.pid])
    driver.wait()
    assert not faults.are_gone(left)
    gates.open("write_checkpoint")
    epoch = checkpoints.list_epochs(str(run))[0]  # which may not be whole yet
    done = run_to_end(command, 4 * STUCK_S)
    assert done.returncode == 0, done.stderr[-2000:]
    (resumed,) = re.findall("going on after epoch ([0-9]+) of 12", done.stdout)
    assert int(resumed) >= epoch - 1
    assert_same_end(run, undisturbed.out, 12)


# What is started in the background of a shell ignores Ctrl-C, and so would what it starts.
LISTENING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from unet_ray.cli import run
run()
"""


@pytest.mark.slow
@pytest.mark.timeout(3 * STUCK_S)
def test_ctrl_c_ends_a_training_with_130(data, tmp_path):
    """It reaches all processes of a terminal, Ray's too, and the driver while it waits for them."""
    (tmp_path / "config.yaml").write_text(config_files.to_yaml(make_config(data, tmp_path / "run", epochs=10_000)))
    command = [sys.executable, "-c", LISTENING, "train", "--config", str(tmp_path / "config.yaml")]
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert any("precision: " in line for line in driver.stdout)
        os.killpg(driver.pid, signal.SIGINT)
        _, errors = driver.communicate(timeout=STUCK_S)
    finally:
        faults.kill([driver.pid, *faults.descendants(driver.pid)])
    assert driver.returncode == 130
    assert errors == "unet-ray: error: interrupted; the same command goes on where this one stopped\n"

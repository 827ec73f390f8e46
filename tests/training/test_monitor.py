"""What a person sees of a training: a bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import sys
import time

import pytest

from unet_ray.training.events import EpochDone, PhaseBegun, Started, StepDone
from unet_ray.training.monitor import Monitor, Pace, bar, epoch_line

STEP = StepDone(epoch=3, frames=30, n_frames=120, seconds=2.0)
EPOCH = {"epoch": 3, "loss": 0.51234, "images_per_s": 15.2, "seconds": 8.0, "wall_time_s": 1e9}
VALIDATED = {"val/loss": 0.6, "val/mean_iou": 0.4321}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_bar_shows_the_epoch_its_frames_the_speed_and_the_time_that_all_epochs_need():
    text = bar(STEP, 5, 15.2, 22.4)
    assert text.startswith("epoch 3/5 ██████░")
    assert text.endswith("░ 30 of 120 frames, 15 images/s, 22 s left for all epochs")
    assert bar(STEP, 5, None, None).endswith("░ 30 of 120 frames")


def test_the_first_step_of_an_epoch_counts_in_no_speed():
    """Of the 62 s, 60 are the first step's, which waits for a compiler: 20 frames in 2 s."""
    pace = Pace(5)
    first, second = (StepDone(epoch=1, frames=10 * n, n_frames=120, seconds=58.0 + 2 * n) for n in (1, 2))
    pace.step(first)
    assert (pace.images_per_s(first), pace.left_s(first)) == (None, None)
    pace.step(second)
    assert pace.images_per_s(second) == 5.0
    assert pace.left_s(second) == (5 * 120 - 20) / 5.0


def test_the_time_left_is_that_of_whole_epochs_once_there_is_one_without_a_warm_up(clock):
    """The first epoch takes 100 s, the second 10 s with its validation."""
    pace = Pace(6)
    clock[0] = 200.0
    pace.end_epoch(1)
    assert pace.left_s() is None
    clock[0] = 210.0
    pace.end_epoch(2)
    assert pace.left_s() == 40.0
    assert pace.left_s(STEP) == (6 - 2 - 30 / 120) * 10.0
    clock[0] = 230.0
    pace.end_epoch(3)
    assert pace.left_s() == 60.0


def test_where_nobody_watches_a_long_epoch_has_a_line_every_30_s(clock, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    monitor = Monitor(str(tmp_path), 2)
    monitor.handle(PhaseBegun(line="compiling the network, on 1 worker"))
    for n in range(1, 8):
        clock[0] += 10.0
        monitor.handle(StepDone(epoch=1, frames=10 * n, n_frames=100, seconds=10.0 * n))
    assert capsys.readouterr().out.splitlines() == [
        "compiling the network, on 1 worker",
        "epoch 1/2  30 of 100 frames, 1 images/s, 2 min 50 s left for all epochs",
        "epoch 1/2  60 of 100 frames, 1 images/s, 2 min 20 s left for all epochs",
    ]


def test_a_line_of_an_epoch():
    assert epoch_line(EPOCH, 10) == "epoch  3/10  loss 0.5123  15 images/s  8 s"
    assert epoch_line(EPOCH, 10, 56.0) == "epoch  3/10  loss 0.5123  15 images/s  8 s  56 s left for all epochs"
    assert epoch_line(EPOCH | VALIDATED, 10) == (
        "epoch  3/10  loss 0.5123  val loss 0.6000  val mean IoU 0.432  15 images/s  8 s"
    )


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_bar_is_for_terminals_and_gives_way_to_lines(is_terminal, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monitor = Monitor(str(tmp_path), 5)
    monitor.handle(Started(policy="float32", n_workers=2))
    monitor.handle(STEP)
    monitor.handle(EpochDone(row=EPOCH))
    erase = "\r\x1b[K" if is_terminal else ""
    seen = f"{erase}precision: float32\n"
    if is_terminal:
        seen += erase + bar(STEP, 5, None, None)
    assert capsys.readouterr().out == f"{seen}{erase}{epoch_line(EPOCH, 5)}\n"
    assert (tmp_path / "history.csv").read_text().startswith("epoch,loss,images_per_s")

"""What a person sees of a training: a bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import sys

import pytest

from unet_ray.training.events import EpochDone, Started, StepDone
from unet_ray.training.monitor import Monitor, bar, epoch_line

STEP = StepDone(epoch=3, frames=30, n_frames=120, seconds=2.0)
EPOCH = {"epoch": 3, "loss": 0.51234, "images_per_s": 15.2, "seconds": 8.0, "wall_time_s": 1e9}
VALIDATED = {"val/loss": 0.6, "val/mean_iou": 0.4321}


def test_a_bar_shows_the_epoch_its_frames_the_speed_and_the_time_that_all_epochs_need():
    text = bar(STEP, 5)
    assert text.startswith("epoch 3/5 ")
    # 15 images/s; 90 frames of this epoch and 240 of the next two are left: 22 s.
    assert text.endswith(" 30/120 frames, 15 images/s, ETA 22 s")


def test_a_line_of_an_epoch():
    assert epoch_line(EPOCH, 10) == "epoch  3/10  loss 0.5123  15 images/s  8 s"
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
        seen += erase + bar(STEP, 5)
    assert capsys.readouterr().out == f"{seen}{erase}{epoch_line(EPOCH, 5)}\n"
    assert (tmp_path / "history.csv").read_text().startswith("epoch,loss,images_per_s")

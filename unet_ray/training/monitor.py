"""The driver's view of a running training: the workers' mailbox, a line or a bar, history and events.

`history.csv` and the TensorBoard event file are written whole after every epoch, from the checkpoints' own history:
they are right after a restart, and work at any URI. An event file only ever grows at its end, as TensorBoard expects.
Pictures have files of their own, see `sample_log`.
"""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Sequence
from typing import Any

from unet_ray import progress, storage
from unet_ray.cluster.gauges import Gauges
from unet_ray.messages import say
from unet_ray.pairs.pairs import PairProblem
from unet_ray.training.event_files import scalar_file
from unet_ray.training.events import (
    EpochDone,
    Event,
    Failed,
    Finished,
    PhaseBegun,
    Restored,
    Sampled,
    Started,
    StepDone,
    Stuck,
    Warned,
)
from unet_ray.training.mlflow_record import MlflowRecord
from unet_ray.training.sample_log import SampleLog

GAUGES = {
    "epoch": ("epoch", "Epochs done"),
    "loss": ("loss", "Training loss of the last epoch"),
    "val/loss": ("val_loss", "Validation loss after the last epoch"),
    "val/mean_iou": ("val_mean_iou", "Validation mean IoU after the last epoch"),
    "images_per_s": ("images_per_second", "Training speed of the last epoch, of all workers together"),
}
"""What the cluster's Prometheus gets of an epoch's row, as `ray_unet_ray_train_…`."""


EVENT_FILE = "events.out.tfevents.0000000000.unet_ray"


class Monitor:
    """Turns the workers' events into what a person sees, and keeps what the driver needs at the end.

    Attributes:
        history: the rows of all epochs that are done.
        error: what a worker said before it stopped for good.
        gauges: the last epoch's numbers for the cluster's Prometheus.
        n_workers: of the group, 0 until it has started.
        finished: what the workers said at the end of it all.
    """

    def __init__(self, run: str, n_epochs: int, record: MlflowRecord | None = None, samples: SampleLog | None = None):
        self.history: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.finished: Finished | None = None
        self._run, self._n_epochs, self._record, self._samples = run, n_epochs, record, samples
        self.n_workers = 0
        self._terminal = sys.stdout.isatty()
        self._pace = Pace(n_epochs)
        self._next_line_s = time.monotonic() + progress.LINE_EVERY_S
        self.gauges = Gauges("unet_ray_train", dict(GAUGES.values()))

    def handle(self, event: Event) -> None:
        """Takes one event of the mailbox."""
        match event:
            case PhaseBegun():
                self._say(event.line)
            case Started():
                self._pace = Pace(self._n_epochs)
                self._say(self._start_line(event.policy, event.n_workers))
                self.n_workers = event.n_workers
            case Restored():
                self.history = list(event.history)
                for row in self.history[-1:]:
                    self._set_gauges(row)
                self._say(f"going on after epoch {event.epoch} of {self._n_epochs}, from its checkpoint")
            case Warned() | Stuck():
                self._say(f"warning: {event.line}")
            case StepDone():
                self._pace.step(event)
                self._show_step(event)
            case EpochDone():
                self._add_row(event.row)
            case Sampled():
                self._add_samples(event)
            case Failed():
                self.error = event.error
            case Finished():
                self.finished = event

    def _add_row(self, row: dict[str, Any]) -> None:
        self.history = [*self.history[: row["epoch"] - 1], row]
        self._pace.end_epoch(row["epoch"])
        self._say(epoch_line(row, self._n_epochs, self._pace.left_s()))
        self._set_gauges(row)
        write_history(self._run, self.history)
        if self._record:
            self._record.log_epochs(self.history)

    def _add_samples(self, event: Sampled) -> None:
        if self._samples is None or len(self.history) < event.epoch:
            return
        try:
            self._samples.write(event.epoch, self.history[event.epoch - 1]["wall_time_s"], event.masks)
        except (PairProblem, storage.StorageError) as error:  # of a picture; the training goes on
            self._samples = None
            self._say(f"warning: TensorBoard gets no further samples: {error}")

    def _start_line(self, policy: str, n_workers: int) -> str:
        if self.n_workers == 0:
            return f"precision: {policy}"
        if n_workers > self.n_workers:
            return f"there is room for more workers; the group has started again with {n_workers}"
        with_fewer = f" with {n_workers}" if n_workers < self.n_workers else ""
        return f"a worker was lost; the group has started again{with_fewer}"

    def _set_gauges(self, row: dict[str, Any]) -> None:
        for key, (name, _) in GAUGES.items():
            if row.get(key) is not None:
                self.gauges.set(name, row[key])

    def _show_step(self, event: StepDone) -> None:
        """Draws the bar; where nobody watches, a line comes where an epoch takes long."""
        if self._terminal:
            drawn = bar(event, self._n_epochs, self._pace.images_per_s(event), self._pace.left_s(event))
            print("\r\x1b[K" + drawn, end="", flush=True)
        elif time.monotonic() >= self._next_line_s:
            self._say(step_line(event, self._n_epochs, self._pace.images_per_s(event), self._pace.left_s(event)))

    def _say(self, line: str) -> None:
        self._next_line_s = time.monotonic() + progress.LINE_EVERY_S
        if self._terminal:
            print("\r\x1b[K", end="")
        say(line)


class Pace:
    """The speed of a training and the time that it still needs, from what is behind it.

    The first step of an epoch, which may wait for a compiler, counts in no speed, and the first epoch of a group of
    workers in no time that an epoch takes.
    """

    def __init__(self, n_epochs: int) -> None:
        self._n_epochs = n_epochs
        self._first: StepDone | None = None
        self._ends: list[tuple[int, float]] = []
        """Of the last two epochs, and when they ended."""

    def step(self, event: StepDone) -> None:
        """Takes a report from within an epoch."""
        if self._first is None or self._first.epoch != event.epoch:
            self._first = event

    def end_epoch(self, epoch: int) -> None:
        """Takes the end of an epoch, validation and all."""
        self._ends = [*self._ends[-1:], (epoch, time.monotonic())]

    def images_per_s(self, event: StepDone) -> float | None:
        """Returns the speed of this epoch; None where it is not known yet."""
        if self._first is None or event.frames <= self._first.frames or event.seconds <= self._first.seconds:
            return None
        return (event.frames - self._first.frames) / (event.seconds - self._first.seconds)

    def left_s(self, event: StepDone | None = None) -> float | None:
        """Returns the seconds that all epochs still need; None where that is not known yet."""
        done: float = self._ends[-1][0] if self._ends else 0
        if event is not None:
            done = event.epoch - 1 + event.frames / event.n_frames
        left = self._n_epochs - done
        if len(self._ends) == 2:
            (before, began_s), (last, ended_s) = self._ends
            return left * (ended_s - began_s) / max(1, last - before)
        speed = self.images_per_s(event) if event else None
        return left * event.n_frames / speed if event and speed else None


def bar(event: StepDone, n_epochs: int, images_per_s: float | None, left_s: float | None) -> str:
    """Returns the progress within an epoch, as a bar."""
    drawn = progress.bar(event.frames / event.n_frames)
    return f"epoch {event.epoch}/{n_epochs} {drawn} {_frames(event, images_per_s, left_s)}"


def step_line(event: StepDone, n_epochs: int, images_per_s: float | None, left_s: float | None) -> str:
    """Returns the same as a line for a log."""
    return f"epoch {event.epoch}/{n_epochs}  {_frames(event, images_per_s, left_s)}"


def _frames(event: StepDone, images_per_s: float | None, left_s: float | None) -> str:
    speed = "" if images_per_s is None else f", {images_per_s:.0f} images/s"
    left = "" if left_s is None else f", {progress.time_left(left_s, 'epochs')}"
    return f"{event.frames:,} of {event.n_frames:,} frames{speed}{left}"


def epoch_line(row: dict[str, Any], n_epochs: int, left_s: float | None = None) -> str:
    """Returns one epoch as the line that is printed and logged."""
    parts = [f"epoch {row['epoch']:>{len(str(n_epochs))}}/{n_epochs}", f"loss {row['loss']:.4f}"]
    if row.get("val/mean_iou") is not None:
        parts += [f"val loss {row['val/loss']:.4f}", f"val mean IoU {row['val/mean_iou']:.3f}"]
    parts += [f"{row['images_per_s']:.0f} images/s", progress.duration(row["seconds"])]
    if left_s:
        parts.append(progress.time_left(left_s, "epochs"))
    return "  ".join(parts)


def write_history(run: str, history: Sequence[dict[str, Any]]) -> None:
    """Writes `history.csv` and the TensorBoard event file of all epochs so far."""
    storage.write_whole(storage.join(run, "history.csv"), history_csv(history))
    storage.write_whole(storage.join(run, "tensorboard", EVENT_FILE), scalar_file(history))


def history_csv(history: Sequence[dict[str, Any]]) -> bytes:
    """Returns a row an epoch, a column a number; empty where it is undefined."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in history for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()

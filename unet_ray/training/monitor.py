"""The driver's view of a running training: the workers' mailbox, a line or a bar, history and events.

`history.csv` and the TensorBoard event file are written whole after every epoch, from the checkpoints' own history:
they are right after a restart, and work at any URI. An event file only ever grows at its end, as TensorBoard expects.
Pictures have files of their own, see `sample_log`.
"""

from __future__ import annotations

import csv
import io
import sys
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
        self.gauges = Gauges("unet_ray_train", dict(GAUGES.values()))

    def handle(self, event: Event) -> None:
        """Takes one event of the mailbox."""
        match event:
            case Started():
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
                self._show_bar(event)
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
        self._say(epoch_line(row, self._n_epochs))
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

    def _show_bar(self, event: StepDone) -> None:
        if self._terminal:
            print("\r\x1b[K" + bar(event, self._n_epochs), end="", flush=True)

    def _say(self, line: str) -> None:
        if self._terminal:
            print("\r\x1b[K", end="")
        say(line)


def bar(event: StepDone, n_epochs: int) -> str:
    """Returns the progress within an epoch, and the time that all epochs still need at this speed."""
    share = event.frames / event.n_frames
    speed = event.frames / max(event.seconds, 1e-9)
    left = (n_epochs - event.epoch + 1) * event.n_frames - event.frames
    return (
        f"epoch {event.epoch}/{n_epochs} {progress.bar(share)} "
        f"{event.frames:,}/{event.n_frames:,} frames, {speed:.0f} images/s, ETA {progress.duration(left / speed)}"
    )


def epoch_line(row: dict[str, Any], n_epochs: int) -> str:
    """Returns one epoch as the line that is printed and logged."""
    parts = [f"epoch {row['epoch']:>{len(str(n_epochs))}}/{n_epochs}", f"loss {row['loss']:.4f}"]
    if row.get("val/mean_iou") is not None:
        parts += [f"val loss {row['val/loss']:.4f}", f"val mean IoU {row['val/mean_iou']:.3f}"]
    return "  ".join([*parts, f"{row['images_per_s']:.0f} images/s", progress.duration(row["seconds"])])


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

"""`report.html` of a training run: how good the model is, on which data, and how it came to be.

It is made of the run folder's own files: `metrics.json`, `history.csv`, `confusion.csv`, `samples.png`, `config.yaml`
and `run.json`. What a run of an earlier version lacks is left out.

Shapes: `K` classes.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

import unet_ray
from unet_ray import storage
from unet_ray.classes import ClassSet
from unet_ray.config import TrainConfig
from unet_ray.errors import JobFailed
from unet_ray.messages import count
from unet_ray.model.bundle import read_description
from unet_ray.model.metrics import read_confusion_csv
from unet_ray.options.config_files import read_mapping
from unet_ray.pairs.splits import leak_warning
from unet_ray.reports import pages, queries
from unet_ray.reports.class_rows import css_color
from unet_ray.reports.curves import draw_curves
from unet_ray.reports.samples import data_uri

MOST_CLASSES = 40
"""Of a confusion matrix: a larger one is no table any more."""

MOST_MISTAKES = 8
_SAMPLES_BYTES = 3_000_000


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """A class on the validation frames."""

    name: str
    color: str
    """As CSS has it; empty where it is not known."""
    share: float | None
    """Of the true pixels."""
    iou: float | None
    precision: float | None
    recall: float | None


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """Pixels of one class that were taken for another."""

    true: str
    predicted: str
    of_class: float
    """Of the true class's pixels."""
    of_all: float
    """Of all pixels."""


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """A confusion matrix: shares of each true class's pixels."""

    names: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float]]]
    n_left_out: int
    mistakes: Sequence[Mistake]


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """All that `run.html` shows."""

    title: str
    run: str
    summary: str
    tiles: Sequence[tuple[str, str]]
    """Figures, and what they are."""
    absent: Sequence[str]
    """Classes that no validation frame has and no mask of one names."""
    leak_warning: str | None
    scores: Sequence[ClassScore]
    confusion: Confusion | None
    curves: Sequence[Markup]
    samples: str | None
    changed: Sequence[tuple[str, str]]
    """Options that are not the defaults."""
    unchanged: Sequence[tuple[str, str]]
    data: Sequence[tuple[str, str]]
    versions: str
    commands: Sequence[str]
    command: str


def write_run_page(run: str, uri: str) -> str:
    """Writes the page of a finished run and returns its URI.

    Args:
        run: URI of the run's folder.
        uri: of the page.

    Raises:
        ValueError: the run is not finished.
        JobFailed: a file of it is damaged.
        StorageError: storage did not answer.
    """
    history = _history(run)
    metrics = _json(run, "metrics.json")
    config = _config(run)
    if metrics is None:
        epochs = config.get("epochs")
        of = f" of {epochs}" if isinstance(epochs, int) else ""
        raise ValueError(
            f"{run} is not finished: {len(history):,}{of} epochs are done; give its train command again, then report"
        )
    about = _json(run, "run.json") or {}
    confusion = _confusion(run)
    page = RunPage(
        title=storage.name(run) or run,
        run=run,
        summary=_summary(metrics, about),
        tiles=_tiles(metrics, about),
        absent=[str(name) for name in metrics.get("val/absent") or ()],
        leak_warning=leak_warning(about["leak_rate"]) if _number(about.get("leak_rate")) is not None else None,
        scores=_scores(metrics, confusion, _colors(run)),
        confusion=_shown_confusion(*confusion) if confusion else None,
        curves=draw_curves(history),
        samples=_samples(run),
        changed=_options(config, are_defaults=False),
        unchanged=_options(config, are_defaults=True),
        data=_data(config, about),
        versions=", ".join(f"{name} {version}" for name, version in (about.get("versions") or {}).items()),
        commands=(
            queries.command("segment", "--model", run, "--frames", "…", "--out", "…"),
            queries.command("evaluate", "--model", run, "--images", "…", "--masks", "…"),
        ),
        command=queries.command("report", run),
    )
    return pages.write(uri, pages.render("run.html", page=page, version=unet_ray.__version__))


# --- the run's files ---


def _read(run: str, name: str) -> bytes | None:
    try:
        return storage.read_bytes(storage.join(run, name))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _json(run: str, name: str) -> dict[str, Any] | None:
    data = _read(run, name)
    if data is None:
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(run, name) from error
    if not isinstance(value, dict):
        raise _damaged(run, name)
    return value


def _damaged(run: str, name: str) -> JobFailed:
    return JobFailed(f"{storage.join(run, name)} is damaged; restore it, or train again with --overwrite")


def _config(run: str) -> dict[str, Any]:
    try:
        return read_mapping(_read(run, "config.yaml") or b"{}", storage.join(run, "config.yaml"))
    except ValueError as error:
        raise _damaged(run, "config.yaml") from error


def _history(run: str) -> list[dict[str, float]]:
    """Returns the numbers of each epoch; those that are undefined are left out."""
    data = _read(run, "history.csv")
    try:
        rows = list(csv.DictReader(io.StringIO((data or b"").decode())))
        return [{key: float(value) for key, value in row.items() if value} for row in rows]
    except (ValueError, TypeError) as error:
        raise _damaged(run, "history.csv") from error


def _confusion(run: str) -> tuple[np.ndarray, list[str]] | None:
    data = _read(run, "confusion.csv")
    if data is None:
        return None
    try:
        return read_confusion_csv(data)
    except ValueError as error:
        raise _damaged(run, "confusion.csv") from error


def _colors(run: str) -> dict[str, str]:
    """Returns the colour of each class, as the model folder has it; none where that cannot be read."""
    try:
        class_set = ClassSet.from_dict(read_description(storage.join(run, "model")).document["classes"])
    except ValueError:
        return {}
    return {name: css_color(class_set, k) for k, name in enumerate(class_set.names)}


def _samples(run: str) -> str | None:
    data = _read(run, "samples.png")
    is_picture = data is not None and data.startswith(b"\x89PNG") and len(data) <= _SAMPLES_BYTES
    return data_uri(data) if data and is_picture else None


# --- what they say ---


def _summary(metrics: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    epochs, frames = metrics.get("epochs"), about.get("train_frames")
    of = f" of {count(epochs, 'epoch')}" if isinstance(epochs, int) else ""
    return f"A training run{of}" + (f" on {count(frames, 'frame')}." if isinstance(frames, int) else ".")


def _tiles(metrics: Mapping[str, Any], about: Mapping[str, Any]) -> list[tuple[str, str]]:
    iou, accuracy = (_number(metrics.get(f"val/{name}")) for name in ("mean_iou", "pixel_accuracy"))
    before, after = (_number(metrics.get(f"val/expected_calibration_error/{when}")) for when in ("before", "after"))
    leak, best = _number(about.get("leak_rate")), metrics.get("best_epoch")
    tiles = [
        (None if iou is None else pages.figure(iou), "mean IoU on validation frames"),
        (None if accuracy is None else pages.percent(accuracy), "of their pixels are right"),
        (None if after is None else pages.percent(after), f"calibration error, {pages.percent(before)} before"),
        (None if leak is None else pages.percent(leak), "of the validation frames leak from training"),
        (f"{best} of {metrics.get('epochs')}" if isinstance(best, int) else None, "is the epoch of the model"),
    ]
    return [(value, text) for value, text in tiles if value is not None]


def _scores(
    metrics: Mapping[str, Any], confusion: tuple[np.ndarray, list[str]] | None, colors: Mapping[str, str]
) -> list[ClassScore]:
    """Returns the classes of the validation frames, that with most pixels first, or as they stand in the metrics."""
    names = [key.removeprefix("val/iou/") for key in metrics if key.startswith("val/iou/")]
    shares: dict[str, float] = {}
    if confusion is not None:
        true_K = confusion[0].sum(axis=1)
        shares = dict(zip(confusion[1], (true_K / max(1, int(true_K.sum()))).tolist(), strict=True))
    rows = [
        ClassScore(
            name=name,
            color=colors.get(name, ""),
            share=shares.get(name),
            **{score: _number(metrics.get(f"val/{score}/{name}")) for score in ("iou", "precision", "recall")},
        )
        for name in names
    ]
    return sorted((row for row in rows if row.iou is not None), key=lambda row: -(row.share or 0))


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _shown_confusion(confusion_KK: np.ndarray, names: Sequence[str]) -> Confusion:
    present = np.flatnonzero(confusion_KK.sum(axis=0) + confusion_KK.sum(axis=1))
    true_K = confusion_KK.sum(axis=1)
    kept = np.sort(present[np.argsort(-true_K[present], kind="stable")][:MOST_CLASSES])
    shares_KK = confusion_KK / np.maximum(true_K, 1)[:, None]
    return Confusion(
        names=[names[k] for k in kept],
        rows=[(names[k], shares_KK[k, kept].tolist()) for k in kept],
        n_left_out=len(present) - len(kept),
        mistakes=_mistakes(confusion_KK, names),
    )


def _mistakes(confusion_KK: np.ndarray, names: Sequence[str]) -> list[Mistake]:
    """Returns the pairs of classes with most wrong pixels, the most first."""
    wrong_KK = confusion_KK * (1 - np.eye(len(names), dtype=np.int64))
    order = np.argsort(-wrong_KK, axis=None, kind="stable")[:MOST_MISTAKES]
    places = [divmod(int(index), len(names)) for index in order]
    n_pixels, true_K = max(1, int(confusion_KK.sum())), confusion_KK.sum(axis=1)
    return [
        Mistake(
            true=names[true],
            predicted=names[predicted],
            of_class=float(wrong_KK[true, predicted] / true_K[true]),
            of_all=float(wrong_KK[true, predicted] / n_pixels),
        )
        for true, predicted in places
        if wrong_KK[true, predicted]
    ]


def _options(config: Mapping[str, Any], *, are_defaults: bool) -> list[tuple[str, str]]:
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    return [
        (f"--{name.replace('_', '-')}", _text(value))
        for name, value in config.items()
        if (name in fields and value == _default(fields[name])) == are_defaults
    ]


def _default(field: dataclasses.Field) -> Any:
    return list(field.default) if isinstance(field.default, tuple) else field.default


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else "–" if value in (None, "") else str(value)


def _data(config: Mapping[str, Any], about: Mapping[str, Any]) -> list[tuple[str, str]]:
    frames = [about.get(f"{part}_frames") for part in ("train", "validation")]
    leak = _number(about.get("leak_rate"))
    weights = about.get("class_weights") or {}
    named = [
        ("frames", config.get("images")),
        ("masks", config.get("masks")),
        ("classes", config.get("classes")),
        ("masks hold", about.get("mask_format")),
        ("training", count(frames[0], "frame") if isinstance(frames[0], int) else None),
        ("validation", count(frames[1], "frame") if isinstance(frames[1], int) else None),
        ("split", about.get("split")),
        ("leak rate", None if leak is None else f"{leak:.1%} of the validation frames have a relative in training"),
        ("class weights", ", ".join(f"{name} {weight:g}" for name, weight in weights.items())),
    ]
    return [(name, str(value)) for name, value in named if value]

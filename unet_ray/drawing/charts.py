"""Charts of a training as PNG bytes: its curves by epoch, and the confusion matrix.

Shapes: `K` classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from unet_ray.classes import Color
from unet_ray.drawing.picture_grid import DPI, MARGIN_IN, QUIET, STYLE, hex_of, png_of, short_name

_TRAINING, _VALIDATION, _BEST = (154, 165, 177), (31, 95, 168), (209, 73, 91)


def draw_curves(history: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss, accuracy and the validation's mean IoU by epoch.

    Args:
        history: a row an epoch with `epoch`, `loss`, `accuracy` and, where there is a validation, `val/loss`,
            `val/pixel_accuracy`, `val/mean_iou`; a missing value or None leaves a gap.
    """
    panels: list[tuple[str, str | None, str]] = [
        ("Loss", "loss", "val/loss"),
        ("Accuracy", "accuracy", "val/pixel_accuracy"),
    ]
    if any(row.get("val/mean_iou") is not None for row in history):
        panels.append(("Mean IoU", None, "val/mean_iou"))
    with matplotlib.style.context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
        figure = Figure(figsize=(4.0 * len(panels), 3.5), dpi=DPI, layout=layout)
        for axes, (title, training, validation) in zip(
            np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
        ):
            _draw_curve(axes, history, training, "training", _TRAINING)
            _draw_curve(axes, history, validation, "validation", _VALIDATION)
            axes.set_title(title, loc="left")
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.set_ylim(0, None if title == "Loss" else 1)
        # One legend below all panels: within a panel it would lie over a curve sooner or later.
        handles = {handle.get_label(): handle for axes in figure.axes for handle in axes.get_lines()}
        figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=max(1, len(handles)))
        return png_of(figure, exact=[_TRAINING, _VALIDATION, _BEST])


def _draw_curve(axes: Axes, history: Sequence[Mapping[str, Any]], key: str | None, label: str, color: Color) -> None:
    values = [math.nan if key is None or row.get(key) is None else float(row[key]) for row in history]
    if all(map(math.isnan, values)):
        return
    epochs = [int(row["epoch"]) for row in history]
    marker = "o" if len(history) <= 20 else None
    axes.plot(epochs, values, color=hex_of(color), label=label, marker=marker, markersize=3.5)
    if key == "val/mean_iou":
        best = int(np.nanargmax(values))
        label = f"best mean IoU: {values[best]:.3f} in epoch {epochs[best]}"
        axes.plot(epochs[best], values[best], "o", color=hex_of(_BEST), markersize=6, zorder=5, label=label)


def draw_confusion(confusion_KK: np.ndarray, class_names: Sequence[str]) -> bytes:
    """The confusion matrix in percent of each true class: rows are true, columns predicted; rows add up to 100.

    Classes that occur neither in the true masks nor in the predicted ones are left out, and the picture says how many.

    Args:
        confusion_KK: pixels, whole numbers [K, K].
        class_names: K names.
    """
    assert confusion_KK.shape == (len(class_names), len(class_names))
    occurs_K = (confusion_KK.sum(axis=0) + confusion_KK.sum(axis=1)) > 0
    n_absent = int((~occurs_K).sum()) if occurs_K.any() else 0
    kept = (np.flatnonzero(occurs_K) if occurs_K.any() else np.arange(len(class_names))).tolist()
    confusion_KK, names = confusion_KK[np.ix_(kept, kept)], [short_name(class_names[index]) for index in kept]
    true_K = confusion_KK.sum(axis=1)
    percent_KK = 100 * confusion_KK / np.maximum(true_K, 1)[:, None]
    cell_in = min(0.42, 60 / len(names))
    label_in = 0.08 * max(map(len, names)) + 0.1
    side_in = max(cell_in * len(names), 2.6)
    left_in, bottom_in, top_in, right_in = label_in + 1.0, label_in + 0.4, 0.7 if n_absent else 0.5, 0.3
    width_in, height_in = max(left_in + side_in + right_in, 4.6), bottom_in + side_in + top_in
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(width_in, height_in), dpi=DPI)
        axes = figure.add_axes((left_in / width_in, bottom_in / height_in, side_in / width_in, side_in / height_in))
        axes.imshow(percent_KK, cmap="Blues", vmin=0, vmax=100, interpolation="nearest", aspect="auto")
        _label_confusion(axes, true_K, names)
        if len(names) <= 60:
            _write_percents(axes, percent_KK, true_K)
        at = MARGIN_IN / width_in, 1 - 0.3 / height_in
        figure.text(*at, "Where the pixels of each true class went, in %", fontsize=11, fontweight="bold")
        if n_absent:
            what = "class that occurs" if n_absent == 1 else "classes that occur"
            text = f"without {n_absent} {what} neither in the masks nor in the predictions"
            figure.text(MARGIN_IN / width_in, 1 - 0.5 / height_in, text, fontsize=8, color=QUIET)
        return png_of(figure)


def _label_confusion(axes: Axes, true_K: np.ndarray, class_names: Sequence[str]) -> None:
    shares = true_K / max(1, int(true_K.sum()))
    places = range(len(class_names))
    rows = [
        f"{name}  {'absent' if n == 0 else f'{share:.1%}'}"
        for name, n, share in zip(class_names, true_K, shares, strict=True)
    ]
    axes.set_xticks(places, class_names, rotation=90)
    axes.set_yticks(places, rows)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class and its share of the pixels", labelpad=10)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(len(class_names) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(class_names) + 1) - 0.5, minor=True)
    axes.grid(True, which="minor", color="#e4e4e4", linewidth=0.6)
    axes.tick_params(which="minor", length=0)


def _write_percents(axes: Axes, percent_KK: np.ndarray, true_K: np.ndarray) -> None:
    for row, column in zip(*np.nonzero(percent_KK >= 0.5), strict=True):
        value = percent_KK[row, column]
        color = "white" if value > 55 else "#222222"
        weight = "bold" if row == column else "normal"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color, fontweight=weight)
    for row in np.flatnonzero(true_K == 0):
        axes.axhspan(row - 0.5, row + 0.5, color="#f1f1f1", zorder=0.5)

"""The curves of a training as SVG that takes the colours of the page around it, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

_INK, _QUIET, _LINE, _TRAINING, _VALIDATION, _BEST = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_VARIABLES = {
    _INK: "var(--ink)",
    _QUIET: "var(--quiet)",
    _LINE: "var(--line)",
    _TRAINING: "var(--second)",
    _VALIDATION: "var(--accent)",
    _BEST: "var(--best)",
}
"""Colours that stand for the page's own, which change with its theme."""

_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _QUIET,
    "axes.labelcolor": _QUIET,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _LINE,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
_LEGEND = {"handlelength": 1.2, "columnspacing": 1.0, "handletextpad": 0.5}
_MARKED_EPOCHS = 20
"""With more, a curve has no points of its own."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One drawing: up to two curves over the epochs."""

    title: str
    training: str | None
    """Column of the history; None: there is none of the training."""
    validation: str
    is_share: bool = False
    best: bool = False
    """Whether the epoch with the largest value of the validation is marked."""


PANELS = (
    Panel(title="Loss", training="loss", validation="val/loss"),
    Panel(title="Accuracy", training="accuracy", validation="val/pixel_accuracy", is_share=True),
    Panel(title="Mean IoU", training=None, validation="val/mean_iou", is_share=True, best=True),
)


def draw_curves(history: Sequence[Mapping[str, float]]) -> list[Markup]:
    """Returns an SVG for each panel of which the history has a number.

    Args:
        history: a row an epoch, `epoch` among its columns; what is missing leaves a gap.
    """
    panels = [panel for panel in PANELS if any(panel.training in row or panel.validation in row for row in history)]
    return [_svg(panel, history) for panel in panels]


def _svg(panel: Panel, history: Sequence[Mapping[str, float]]) -> Markup:
    # The same history gives the same bytes, and two drawings of a page share no id.
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": panel.title}]):
        figure = Figure(figsize=(4.0, 2.7), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02))
        axes = figure.add_subplot()
        _draw_curve(axes, history, panel.training, "training", _TRAINING)
        values = _draw_curve(axes, history, panel.validation, "validation", _VALIDATION)
        if panel.best and any(map(math.isfinite, values)):
            _mark_best(axes, history, values)
        axes.set_title(panel.title, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_ylim(0, 1 if panel.is_share else None)
        # Beside the title, where it covers no line.
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0, fontsize=9, **_LEGEND)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Markup(_themed(buffer.getvalue()))  # numbers, and the words above


def _draw_curve(
    axes: Axes, history: Sequence[Mapping[str, float]], key: str | None, label: str, color: str
) -> list[float]:
    values = [row.get(key or "", math.nan) for row in history]
    if any(map(math.isfinite, values)):
        epochs = [row["epoch"] for row in history]
        marker = "o" if len(history) <= _MARKED_EPOCHS else None
        axes.plot(epochs, values, color=color, label=label, marker=marker, markersize=3.5)
    return values


def _mark_best(axes: Axes, history: Sequence[Mapping[str, float]], values: Sequence[float]) -> None:
    best = max((n for n, value in enumerate(values) if math.isfinite(value)), key=values.__getitem__)
    epoch = history[best]["epoch"]
    label = f"best {values[best]:.3f}, epoch {epoch:.0f}"
    axes.plot([epoch], [values[best]], "o", color=_BEST, markersize=6, zorder=5, label=label)


def _themed(svg: str) -> str:
    """Returns the drawing alone, with the page's colours and fonts, at the size that the page gives it."""
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, 'Liberation Sans', Arial, sans-serif", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # every drawing has the same
    opening = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg[: svg.index(">")])
    return opening + svg[svg.index(">") :]

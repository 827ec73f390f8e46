"""The page's first question: can I trust these labels?

Shapes: `N` frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet_ray.options.config_files import read_mapping
from unet_ray.output.plans import Plan
from unet_ray.reports import queries
from unet_ray.reports.class_rows import ClassRow
from unet_ray.reports.frame_facts import FrameFacts, RejectedExample
from unet_ray.reports.model_facts import ModelFacts
from unet_ray.reports.pages import figure, percent

N_BINS = 25
"""Of the histogram of confidences."""


@dataclass(frozen=True, kw_only=True)
class ReasonRow:
    """Frames that are rejected for one reason."""

    name: str
    n_frames: int
    examples: Sequence[RejectedExample]
    retry: str
    """The command that tries them again."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """A bar of the histogram."""

    height: float
    """0 to 1."""
    title: str


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What the page says of it."""

    rejected: Sequence[ReasonRow]
    """The most frequent reason first."""
    rejected_query: Sequence[str]
    confidence: float | None
    """Mean over the labelled frames."""
    is_calibrated: bool | None
    """None: it is not known."""
    calibration: str
    histogram: Sequence[Bin]
    low: float
    """Where the histogram begins; it ends at 1."""
    classes: Sequence[ClassRow]
    absent: Sequence[str]
    has_iou: bool
    mean_iou: float | None
    model: Sequence[tuple[str, str]]
    missing_model: str
    """Why nothing is known of it."""
    lineage: Sequence[tuple[str, str]]
    verify: str


def trust(
    plan: Plan,
    config_yaml: bytes | None,
    rejected: Mapping[str, int],
    facts: FrameFacts,
    classes: Sequence[ClassRow],
    model: tuple[ModelFacts | None, str],
) -> Trust:
    """Returns the first part of the page.

    Args:
        plan: of the output.
        config_yaml: of the output.
        rejected: number of rejected frames by reason.
        facts: of its frames.
        classes: of the output.
        model: what is known of the model, and why nothing is.
    """
    known, missing = model
    confidence_N = 1 - facts.expected_error_N[~np.isnan(facts.expected_error_N)]
    bins, low = histogram(confidence_N)
    return Trust(
        rejected=_reasons(plan.out, config_yaml, rejected, facts),
        rejected_query=queries.rejected(plan.out),
        confidence=float(confidence_N.mean(dtype=np.float64)) if len(confidence_N) else None,
        is_calibrated=None if known is None else known.temperature is not None,
        calibration=_calibration(known, missing),
        histogram=bins,
        low=low,
        classes=classes,
        absent=[row.name for row in classes if not row.pixels],
        has_iou=any(row.iou is not None for row in classes),
        mean_iou=known.metric("val/mean_iou") if known else None,
        model=_validation(known) if known else (),
        missing_model=missing,
        lineage=_lineage(plan, config_yaml),
        verify=queries.command("verify", plan.out),
    )


def _reasons(out: str, config_yaml: bytes | None, rejected: Mapping[str, int], facts: FrameFacts) -> list[ReasonRow]:
    return [
        ReasonRow(
            name=reason,
            n_frames=n_frames,
            examples=facts.examples.get(reason, ()),
            retry=queries.retry(out, config_yaml, reason),
        )
        for reason, n_frames in sorted(rejected.items(), key=lambda item: -item[1])
    ]


def histogram(confidence_N: np.ndarray) -> tuple[list[Bin], float]:
    """Returns the bars of frames by confidence and where they begin: a tenth below all of them."""
    if not len(confidence_N):
        return [], 0.0
    low = min(0.9, float(np.floor(confidence_N.min() * 10) / 10))
    counts, edges = np.histogram(np.clip(confidence_N, low, 1), N_BINS, (low, 1))
    return [
        Bin(height=float(n / counts.max()), title=f"{begin:.1%} to {end:.1%}: {n:,}")
        for n, begin, end in zip(counts, edges[:-1], edges[1:], strict=True)
    ], low


def _calibration(model: ModelFacts | None, missing: str) -> str:
    if model is None:
        return f"Whether the confidence is calibrated is not known: {missing}."
    if model.temperature is None:
        return (
            "The confidence is not calibrated: this model has no temperature. Compare frames with each other by it, "
            "and do not take it for the share of right pixels."
        )
    after = model.metric("val/expected_calibration_error/after")
    error = "" if after is None else f" On its validation frames it is off by {percent(after)} in the mean."
    return f"The confidence is calibrated: it stands for the share of pixels that are right.{error}"


_METRICS = (
    ("mean IoU", "val/mean_iou", figure),
    ("pixel accuracy", "val/pixel_accuracy", percent),
    ("boundary F1", "val/boundary_f1", figure),
    ("calibration error", "val/expected_calibration_error/after", percent),
    ("before calibration", "val/expected_calibration_error/before", percent),
)


def _validation(model: ModelFacts) -> list[tuple[str, str]]:
    facts = [(name, show(value)) for name, key, show in _METRICS if (value := model.metric(key)) is not None]
    if model.temperature is not None:
        facts.append(("temperature", figure(model.temperature)))
    best, epochs = model.metric("best_epoch"), model.metric("epochs")
    if best is not None and epochs is not None:
        facts.append(("epoch", f"{best:.0f} of {epochs:.0f}"))
    return [*facts, ("network", model.network), ("model folder", model.uri)]


def _lineage(plan: Plan, config_yaml: bytes | None) -> list[tuple[str, str]]:
    options = {name: value for name, value in plan.lineage.options.items() if value is not None}
    try:
        config = read_mapping(config_yaml or b"", "config.yaml")
    except ValueError:
        config = {}
    frames = config.get("frames")
    named = [
        ("frames", ", ".join(map(str, frames)) if isinstance(frames, list) else None),
        ("model", config.get("model")),
        ("model digest", plan.lineage.bundle_digest),
        ("class set", plan.lineage.class_set.name),
        ("options", ", ".join(f"{name.replace('_', '-')} {_text(value)}" for name, value in options.items())),
        ("result version", plan.lineage.result_version),
        ("made with", ", ".join(f"{name} {value}" for name, value in plan.recorded.items())),
    ]
    return [(name, str(value)) for name, value in named if value]


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)

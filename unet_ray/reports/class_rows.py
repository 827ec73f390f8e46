"""Classes as the page's tables and bars show them.

Shapes: `K` classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unet_ray.classes import ClassSet
from unet_ray.reports.statistics import Statistics

SMALLEST_PART = 0.001
"""Of a bar: a smaller part is not seen."""


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """A class of an output."""

    name: str
    color: str
    """As CSS has it."""
    pixels: int
    share: float
    """Of all pixels."""
    frames: int
    """Frames in which it has a pixel."""
    frames_share: float
    """Of all labelled frames."""
    confidence: float | None
    iou: float | None
    """On the model's validation frames."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A class's part of a bar."""

    name: str
    color: str
    share: float


def css_color(class_set: ClassSet, class_id: int) -> str:
    """Returns a class's colour as CSS has it."""
    return "#" + bytes(class_set.classes[class_id].color).hex()


def class_rows(statistics: Statistics, class_set: ClassSet, iou: Mapping[str, float | None]) -> list[ClassRow]:
    """Returns the classes, that with most pixels first.

    Args:
        statistics: of the output.
        class_set: of the output.
        iou: of a class by name, where it is known.
    """
    pixels_K, shares_K = statistics.pixels_K, statistics.shares_K
    confidence_K, frames_K = statistics.confidence_K, statistics.frames_with_class_DK.sum(axis=0)
    return [
        ClassRow(
            name=class_set.names[k],
            color=css_color(class_set, k),
            pixels=int(pixels_K[k]),
            share=float(shares_K[k]),
            frames=int(frames_K[k]),
            frames_share=float(frames_K[k]) / max(1, statistics.n_frames),
            confidence=None if math.isnan(confidence_K[k]) else float(confidence_K[k]),
            iou=iou.get(class_set.names[k]),
        )
        for k in by_share(shares_K)
    ]


def by_share(shares_K: np.ndarray) -> list[int]:
    """Returns the classes, that with the largest share first."""
    return np.argsort(-shares_K, kind="stable").tolist()


def parts(shares_K: np.ndarray, order: Sequence[int], class_set: ClassSet) -> list[Part]:
    """Returns the parts of a bar that are large enough to be seen, in an order that all bars share."""
    return [
        Part(name=class_set.names[k], color=css_color(class_set, k), share=float(shares_K[k]))
        for k in order
        if shares_K[k] >= SMALLEST_PART
    ]

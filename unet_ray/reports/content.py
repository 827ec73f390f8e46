"""The page's second question: what is in these labels?

Shapes: `D` drives, `K` classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unet_ray.classes import ClassSet
from unet_ray.reports import outliers, queries
from unet_ray.reports.class_rows import ClassRow, Part, by_share, parts
from unet_ray.reports.frame_facts import FrameFacts
from unet_ray.reports.outliers import Outlier
from unet_ray.reports.pages import percent
from unet_ray.reports.samples import data_uri
from unet_ray.reports.statistics import Drive, Statistics, shares
from unet_ray.reports.strips import LINE_WIDTH, MAX_BINS, Strip, line_points, lowest, strip_png

TABLE_DRIVES, STRIP_DRIVES, ASKED_DRIVES = 60, 24, 60
"""Most drives in the table, over time, and over time where they were asked for by name."""

_MARKS = 3
"""Of a drive that are named."""


@dataclass(frozen=True, kw_only=True)
class BarRow:
    """A drive or a camera in a table."""

    title: str
    frames: int
    confidence: float | None
    parts: Sequence[Part]
    marks: Sequence[str]
    """In what it is unlike the others."""


@dataclass(frozen=True, kw_only=True)
class StripRow:
    """A drive over time."""

    title: str
    frames: int
    n_rejected: int
    marks: Sequence[str]
    picture: str
    """A `data:` URI."""
    width_px: int
    text: str
    """What it shows, in words."""
    lines: Sequence[str]
    """The confidence, as points of SVG."""
    ticks: Sequence[str]
    """Where frames are rejected."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """What the page says of it."""

    classes: Sequence[ClassRow]
    largest_share: float
    legend: Sequence[ClassRow]
    """Those that have a pixel."""
    cameras: Sequence[BarRow]
    drives: Sequence[BarRow]
    n_drives: int
    are_compared: bool
    """Whether there are enough drives for that."""
    n_marked: int
    rule: str
    drives_query: Sequence[str]
    strips: Sequence[StripRow]
    low: float | None
    """Foot of the confidence's scale; None where there is no confidence."""
    max_bins: int
    has_ticks: bool
    """Whether a drive that is drawn has a rejected frame."""
    left_out: Drive | None
    """One of the drives that are not drawn."""
    strips_command: str
    n_unlabelled: int
    """Frames of drives without any label."""


def choose_strips(
    drives: Sequence[Drive], marked: Mapping[int, Sequence[Outlier]], sequences: Sequence[str] = ()
) -> list[int]:
    """Returns the drives that are shown over time, in their order.

    Args:
        drives: all of them.
        marked: those with outliers, the most extreme first.
        sequences: asked for by name.

    Raises:
        ValueError: there is no such drive.
    """
    if not sequences:
        return sorted(_most_telling(len(drives), marked, STRIP_DRIVES))
    names = list(dict.fromkeys(drive.sequence for drive in drives))
    for sequence in sequences:
        if sequence not in names:
            known = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
            raise ValueError(f"--sequence is {sequence!r}; the output's drives are {known}")
    return [n for n, drive in enumerate(drives) if drive.sequence in sequences][:ASKED_DRIVES]


def _most_telling(n_drives: int, marked: Mapping[int, object], limit: int) -> list[int]:
    """Returns up to so many drives: outliers, two thirds at most, and then others spread over all."""
    if n_drives <= limit:
        return list(range(n_drives))
    first = list(marked)[: 2 * limit // 3]
    others = [n for n in range(n_drives) if n not in marked] or [n for n in range(n_drives) if n not in first]
    spread = np.linspace(0, len(others) - 1, min(limit - len(first), len(others))).astype(int)
    return [*first, *(others[n] for n in spread.tolist())]


def content(
    out: str,
    class_set: ClassSet,
    statistics: Statistics,
    facts: FrameFacts,
    classes: Sequence[ClassRow],
    marked: Mapping[int, Sequence[Outlier]],
) -> Content:
    """Returns the second part of the page.

    Args:
        out: URI of the output.
        class_set: of the output.
        statistics: of the output.
        facts: of its frames.
        classes: of the output.
        marked: the drives with outliers, the most extreme first.
    """
    order = by_share(statistics.shares_K)
    n_drives = len(statistics.drives)
    left_out = next((drive for n, drive in enumerate(statistics.drives) if n not in facts.strips), None)
    low = lowest([strip.mean_confidence_B for strip in facts.strips.values()])
    return Content(
        classes=classes,
        largest_share=max((row.share for row in classes), default=0) or 1,
        legend=[row for row in classes if row.pixels],
        cameras=_camera_rows(statistics, order, class_set),
        drives=_drive_rows(statistics, order, class_set, marked),
        n_drives=n_drives,
        are_compared=n_drives >= outliers.MIN_DRIVES,
        n_marked=len(marked),
        rule=outliers.RULE if n_drives >= outliers.MIN_DRIVES else outliers.TOO_FEW,
        drives_query=queries.shares_by_drive(out),
        strips=[_strip_row(statistics, n, facts.strips[n], marked, order, class_set, low) for n in facts.strips],
        low=low if any(strip.confident_B.any() for strip in facts.strips.values()) else None,
        max_bins=MAX_BINS,
        has_ticks=any(strip.rejected_B.any() for strip in facts.strips.values()),
        left_out=left_out,
        strips_command=queries.strips(out, left_out) if left_out else "",
        n_unlabelled=int((facts.drive_N < 0).sum()),
    )


def _drive_rows(
    statistics: Statistics, order: Sequence[int], class_set: ClassSet, marked: Mapping[int, Sequence[Outlier]]
) -> list[BarRow]:
    confidence_D = statistics.confidence_D
    shares_DK = statistics.shares_DK
    return [
        BarRow(
            title=statistics.drives[n].title,
            frames=int(statistics.frames_D[n]),
            confidence=float(confidence_D[n]),
            parts=parts(shares_DK[n], order, class_set),
            marks=_marks(marked.get(n, ())),
        )
        for n in _most_telling(len(statistics.drives), marked, TABLE_DRIVES)
    ]


def _camera_rows(statistics: Statistics, order: Sequence[int], class_set: ClassSet) -> list[BarRow]:
    cameras = list(dict.fromkeys(drive.camera for drive in statistics.drives))
    camera_D = np.array([cameras.index(drive.camera) for drive in statistics.drives])
    rows = []
    for number, camera in enumerate(cameras[:TABLE_DRIVES]):
        of_camera_D = camera_D == number
        shares_K = shares(statistics.pixels_DK[of_camera_D].sum(axis=0)[None])[0]
        row = BarRow(
            title=camera or "(no name)",
            frames=int(statistics.frames_D[of_camera_D].sum()),
            confidence=None,
            parts=parts(shares_K, order, class_set),
            marks=(),
        )
        rows.append(row)
    return rows


def _marks(of_drive: Sequence[Outlier]) -> list[str]:
    marks = [f"{mark.what} {percent(mark.value)}, median {percent(mark.median)}" for mark in of_drive[:_MARKS]]
    return [*marks, f"and {len(of_drive) - _MARKS:,} more"] if len(of_drive) > _MARKS else marks


def _strip_row(
    statistics: Statistics,
    drive: int,
    strip: Strip,
    marked: Mapping[int, Sequence[Outlier]],
    order: Sequence[int],
    class_set: ClassSet,
    low: float,
) -> StripRow:
    largest = parts(statistics.shares_DK[drive], order, class_set)
    largest.sort(key=lambda part: -part.share)
    width = LINE_WIDTH / len(strip.rejected_B)
    return StripRow(
        title=statistics.drives[drive].title,
        frames=int(statistics.frames_D[drive]),
        n_rejected=int(strip.rejected_B.sum()),
        marks=_marks(marked.get(drive, ())),
        picture=data_uri(strip_png(strip, class_set, order)),
        width_px=len(strip.rejected_B),
        text=", ".join(f"{part.name} {percent(part.share)}" for part in largest[:5]),
        lines=line_points(strip.mean_confidence_B, low),
        ticks=[f"{(index + 0.5) * width:.0f}" for index in np.flatnonzero(strip.rejected_B).tolist()],
    )

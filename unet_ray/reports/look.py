"""The page's third question: what shall I look at?

Shapes: `R` rare classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from unet_ray.classes import ClassSet
from unet_ray.reports import galleries, queries
from unet_ray.reports.class_rows import by_share, css_color
from unet_ray.reports.frame_facts import FrameFacts
from unet_ray.reports.galleries import Chosen
from unet_ray.reports.pages import percent
from unet_ray.reports.samples import Sample, Sources, read_samples
from unet_ray.reports.statistics import Statistics

MOST_FRAMES = 24
"""Of a gallery; more make the page large, and nobody looks at them."""

_PICTURE_BYTES = 2_400_000
"""Of all pictures together; as text in the page they are a third more."""

_NEAREST_CLASSES = 5
"""By which the query for typical frames goes: all of a class set would fill a page."""


@dataclass(frozen=True, kw_only=True)
class GalleryFrame:
    """A frame of a gallery."""

    sample: Sample
    value: str
    """Why it is in it."""
    color: str
    """Of the class that it is in it for, as CSS has it; empty where that is none."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Frames that are worth a look for one reason."""

    title: str
    text: str
    frames: Sequence[GalleryFrame]
    query: Sequence[str]
    """SQL that shows more of them."""
    command: str
    """That does."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the page shows."""

    galleries: Sequence[Gallery]
    command: str
    """That shows more frames in each; empty where these are the most."""


@dataclass(frozen=True, kw_only=True)
class _Choice:
    title: str
    text: str
    frames: Sequence[Chosen]
    values: Sequence[str]
    query: Sequence[str]
    condition: str = ""
    """What more of these frames have in common, as `export-masks --where` takes it."""


def look(
    out: str,
    class_set: ClassSet,
    statistics: Statistics,
    facts: FrameFacts,
    rare: Sequence[int],
    sources: Sources,
    n_frames: int,
) -> Look:
    """Returns the third part of the page.

    Args:
        out: URI of the output.
        class_set: of the output.
        statistics: of the output.
        facts: of its frames.
        rare: the rare classes whose pixels the facts hold.
        sources: where frames come from.
        n_frames: in each gallery.

    Raises:
        JobFailed: a file of the output is damaged.
        StorageError: the output could not be read.
    """
    choices = [
        *_expected_error(out, facts, n_frames),
        *_changed(out, facts, n_frames),
        *_rare(out, class_set, facts, rare, n_frames),
        *_typical(out, class_set, statistics, facts, n_frames),
    ]
    rows = {frame.row for choice in choices for frame in choice.frames}
    limit = _PICTURE_BYTES // max(1, 2 * len(rows))
    samples = read_samples(rows, facts.group_rows, sources, class_set, picture_bytes=limit)
    return Look(
        galleries=[_gallery(out, choice, samples, class_set, rare) for choice in choices],
        command=queries.more_frames(out, MOST_FRAMES) if n_frames < MOST_FRAMES else "",
    )


def _gallery(
    out: str, choice: _Choice, samples: dict[int, Sample], class_set: ClassSet, rare: Sequence[int]
) -> Gallery:
    frames = [
        GalleryFrame(
            sample=samples[frame.row],
            value=value,
            color="" if frame.rare is None else css_color(class_set, rare[frame.rare]),
        )
        for frame, value in zip(choice.frames, choice.values, strict=True)
    ]
    command = queries.masks_where(out, choice.condition) if choice.condition else ""
    return Gallery(title=choice.title, text=choice.text, frames=frames, query=choice.query, command=command)


def _expected_error(out: str, facts: FrameFacts, n_frames: int) -> Iterator[_Choice]:
    rows = galleries.largest(facts.expected_error_N, facts.drive_N, n_frames)
    if rows:
        smallest = float(facts.expected_error_N[rows[-1]])
        yield _Choice(
            title="Largest expected error",
            text="Frames whose pixels the network is least sure of: the first to check, and to label by hand.",
            frames=[Chosen(row=row) for row in rows],
            values=[f"expected error {percent(float(facts.expected_error_N[row]))}" for row in rows],
            query=queries.largest(out, ["expected_error_share", "low_margin_share"])
            if facts.has_expected_error
            else queries.least_confident(out),
            condition=queries.at_least("expected_error_share", smallest)
            if facts.has_expected_error
            else queries.at_most("confidence", 1 - smallest),
        )


def _changed(out: str, facts: FrameFacts, n_frames: int) -> Iterator[_Choice]:
    rows = galleries.largest(facts.changed_N, facts.drive_N, n_frames)
    if rows:
        yield _Choice(
            title="Most changed",
            text="Frames labelled most unlike the frame before: a cut, a bump, or labels that flicker.",
            frames=[Chosen(row=row) for row in rows],
            values=[f"changed {percent(float(facts.changed_N[row]))}" for row in rows],
            query=queries.largest(out, ["changed_share"]),
            condition=queries.at_least("changed_share", float(facts.changed_N[rows[-1]])),
        )


def _rare(out: str, class_set: ClassSet, facts: FrameFacts, rare: Sequence[int], n_frames: int) -> Iterator[_Choice]:
    frames = galleries.with_rare_classes(facts, n_frames)
    if frames:
        names = [class_set.names[k] for k in rare]
        fewest = {
            names[of]: min(float(facts.rare_NR[frame.row, of]) for frame in frames if frame.rare == of)
            for of in dict.fromkeys(frame.rare or 0 for frame in frames)
        }
        yield _Choice(
            title="Rarest classes",
            text="Of each class with few pixels, the frames that have most of it: " + ", ".join(names) + ".",
            frames=frames,
            values=[
                f"{names[frame.rare or 0]} {facts.rare_NR[frame.row, frame.rare or 0]:,.0f} px" for frame in frames
            ],
            query=queries.largest(out, [f"pixels_{names[0]}"]),
            condition=" or ".join(f"pixels_{name} >= {number:.0f}" for name, number in fewest.items()),
        )


def _typical(
    out: str, class_set: ClassSet, statistics: Statistics, facts: FrameFacts, n_frames: int
) -> Iterator[_Choice]:
    rows = galleries.typical(facts, n_frames)
    if rows:
        shares_K = statistics.shares_K
        nearest = {class_set.names[k]: float(shares_K[k]) for k in by_share(shares_K)[:_NEAREST_CLASSES]}
        yield _Choice(
            title="Typical",
            text="Frames whose class shares are nearest to those of all frames.",
            frames=[Chosen(row=row) for row in rows],
            values=[f"unlike in {percent(float(np.abs(facts.unlikeness_N[row])))} of its pixels" for row in rows],
            query=queries.nearest(out, nearest),
        )

"""The report of `unet-ray check`: what it says, and its text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unet_ray.frames import HIDDEN_RULE
from unet_ray.messages import first_few, printable

LISTED = 10
"""Unknown values and frame sizes listed one by one, the most frequent first."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong or odd, over all files that have it."""

    what: str
    """A clause of which the files are the subject: `frames have no mask`."""
    n_files: int
    examples: tuple[str, ...]
    """The first few, relative to their folder, with what is particular to each in brackets."""
    refused: bool
    """Whether training refuses a data set with this; else it is only to be known."""


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """How much of a class there is."""

    name: str
    pixels: int
    n_masks: int


@dataclass(frozen=True, kw_only=True)
class SequenceCount:
    """The frames of one drive."""

    sequence: str
    n_frames: int
    n_cameras: int
    first_index: int | None
    last_index: int | None


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What a data set is and what is wrong with it."""

    images: str
    masks: str
    class_set: str
    mask_format: str
    n_pairs: int
    n_hidden: int = 0
    """Hidden files, which take no part."""
    findings: tuple[Finding, ...]
    """Those for which training refuses the data set first."""
    frame_sizes: Mapping[tuple[int, int], int]
    """Frames by (height, width)."""
    classes: tuple[ClassCount, ...]
    """Every class in the order of its output id, then what is ignored, over the masks that training would take."""
    n_masks_counted: int
    sequences: tuple[SequenceCount, ...]

    @property
    def refused(self) -> bool:
        """Whether training would refuse the data set."""
        return any(finding.refused for finding in self.findings)

    def as_text(self) -> str:
        """Returns the report as tables of fixed width for a terminal."""
        verdict = "Training would take this data set."
        if self.refused:
            n_refused = sum(finding.refused for finding in self.findings)
            verdict = f"Training would refuse this data set, because of the findings marked `refused` ({n_refused})."
        return "\n".join(
            [
                *_summary_lines(self),
                "",
                *_finding_lines(self.findings),
                "",
                *_class_lines(self.classes, self.n_masks_counted),
                "",
                *_sequence_lines(self.sequences),
                "",
                verdict,
            ]
        )


def size_text(size: tuple[int, ...]) -> str:
    """`480 x 640`, height first."""
    return f"{size[0]} x {size[1]}"


def _summary_lines(report: CheckReport) -> list[str]:
    sizes = [f"{size_text(size)} ({n_frames:,})" for size, n_frames in report.frame_sizes.items()]
    return [
        f"frames       {printable(report.images)}",
        f"masks        {printable(report.masks)}",
        f"pairs        {report.n_pairs:,}",
        f"frame sizes  {first_few(sizes, LISTED) or 'none could be read'} (height x width)",
        f"classes      {report.class_set}",
        f"mask format  {report.mask_format}",
        *([f"hidden       {report.n_hidden:,}: {HIDDEN_RULE}; --include-hidden takes them"] if report.n_hidden else []),
    ]


def _finding_lines(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return ["No findings."]
    lines = ["findings    files"]
    for finding in findings:
        lines.append(f"{'refused' if finding.refused else 'noted':8}{finding.n_files:9,}  {printable(finding.what)}")
        for example in finding.examples:
            lines += textwrap.wrap(
                printable(example),
                118,
                initial_indent=" " * 21,
                subsequent_indent=" " * 23,
                break_long_words=False,
                break_on_hyphens=False,
            )
        if finding.n_files > len(finding.examples):
            lines.append(f"{'':19}  and {finding.n_files - len(finding.examples):,} more")
    return lines


def _class_lines(classes: Sequence[ClassCount], n_masks: int) -> list[str]:
    width = max(len(item.name) for item in classes) + 2
    everything = max(1, sum(item.pixels for item in classes))
    lines = [f"{'class':{width}}{'pixels':>15}{'share':>9}{'masks':>9}  (of {n_masks:,} without a finding)"]
    for item in classes:
        lines.append(f"{item.name:{width}}{item.pixels:15,}{item.pixels / everything:9.2%}{item.n_masks:9,}")
    return lines


def _sequence_lines(sequences: Sequence[SequenceCount], limit: int = 20) -> list[str]:
    width = min(60, max([len(item.sequence) for item in sequences[:limit]] + [10])) + 2
    lines = [f"{'sequence':{width}}{'frames':>8}{'cameras':>9}  frame indices"]
    for item in sequences[:limit]:
        indices = "none" if item.first_index is None else f"{item.first_index} to {item.last_index}"
        lines.append(
            f"{printable(item.sequence) or '(no name)':{width}}{item.n_frames:8,}{item.n_cameras:9,}  {indices}"
        )
    if len(sequences) > limit:
        lines.append(f"and {len(sequences) - limit:,} more")
    return lines

"""Comparisons and what is known of them: rounds of measurements, ratios of a round, the table, one file over many runs.

A *contest* has contestants, programs that do the same work. A *round* runs each of them once, one after another, every
second round in the opposite order. A *row* of the table is one number of a round, most often a ratio of two of its
contestants: measured minutes apart on the same cores, they see the same machine. The row's figure is the median over
the rounds, its spread the smallest and the largest.

`benchmark.json` holds the rounds themselves, so that a run which is cut loses one measurement, and several runs make
one table. Rounds count together only where settings and source code are the same; others are dropped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unet_ray import storage

Measurement = Mapping[str, Any]
"""What one contestant gave in one round: plain JSON."""

Round = Mapping[str, Measurement]
"""Measurements by contestant."""


class Skipped(RuntimeError):
    """A contestant that cannot run here, with the reason: a library or a data set is not there."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    what: str
    against: str
    contest: str
    needs: tuple[str, ...]
    """Contestants whose measurements `figure` looks at."""
    figure: Callable[[Round], float]
    unit: str = "x"
    """`x` for a ratio, else the figure's unit."""
    target: float | None = None
    at_most: bool = False
    """Whether the target is the most that the figure may be; else it is the least."""
    agreement: Callable[[Round], tuple[bool, str]] | None = None
    """Whether the contestants gave the same, and how that was looked at; None where there is nothing to compare."""
    note: Callable[[Round], str] | None = None
    """What else of a round a person wants to know."""

    def reaches(self, figure: float) -> bool | None:
        """Whether a figure reaches the target; None without a target."""
        if self.target is None:
            return None
        return figure <= self.target if self.at_most else figure >= self.target


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row with what was measured."""

    row: Row
    figures: tuple[float, ...]
    """One a complete round, in order."""
    agrees: bool | None = None
    """Whether the contestants agreed in every round."""
    agreement: str = ""
    note: str = ""
    missing: str = ""
    """Why there is no figure."""

    @property
    def median(self) -> float:
        """The row's figure."""
        return statistics.median(self.figures)

    @property
    def verdict(self) -> str:
        """`reached`, `missed`, `outputs differ`, `not measured`, or `measured` where there is no target."""
        if not self.figures:
            return "not measured"
        if self.agrees is False:
            return "outputs differ"
        return {True: "reached", False: "missed", None: "measured"}[self.row.reaches(self.median)]

    def as_json(self) -> dict[str, Any]:
        """Returns the line as it stands in `benchmark.json`."""
        content: dict[str, Any] = {
            **{key: getattr(self.row, key) for key in ("name", "what", "against", "unit", "target", "at_most")},
            "verdict": self.verdict,
            **{key: getattr(self, key) for key in ("agrees", "agreement", "note", "missing")},
        }
        if self.figures:
            content |= {"median": self.median, "least": min(self.figures), "most": max(self.figures)}
        return content | {"figures": list(self.figures)}


def complete(row: Row, rounds: Sequence[Round]) -> list[Round]:
    """Returns the rounds in which all of a row's contestants were measured."""
    return [measured for measured in rounds if all(name in measured for name in row.needs)]


def line(row: Row, rounds: Sequence[Round], missing: str = "") -> Line:
    """Returns what the rounds of its contest say of a row."""
    usable = complete(row, rounds)
    if not usable:
        return Line(row=row, figures=(), missing=missing or "no round yet")
    agreements = [row.agreement(measured) for measured in usable] if row.agreement else []
    worst = next((words for agrees, words in agreements if not agrees), agreements[-1][1] if agreements else "")
    return Line(
        row=row,
        figures=tuple(float(row.figure(measured)) for measured in usable),
        agrees=all(agrees for agrees, _ in agreements) if agreements else None,
        agreement=worst,
        note=row.note(usable[-1]) if row.note else "",
    )


def bound(decode_per_s: float, network_per_s: float, *, shared: bool = True) -> float:
    """Returns the most frames a second that decoding and network allow.

    Args:
        decode_per_s: decoding alone, on all cores.
        network_per_s: the network alone.
        shared: whether both take turns on the same cores; else (a GPU) the slower one decides.
    """
    if not shared:
        return min(decode_per_s, network_per_s)
    return 1 / (1 / decode_per_s + 1 / network_per_s)


def steady_rate(
    committed: Sequence[tuple[float, int]], published_s: float, warm_up_share: float
) -> tuple[float, float, int]:
    """Returns frames a second after the warm-up, the moment at which that begins, and the frames that count.

    The warm-up is over when the first `warm_up_share` of the frames are committed. From then on every frame that is
    committed counts, and the time runs until all are published: the last frames' way through the pipeline and the
    publishing are part of it, the start of Ray and of the actors is not.

    Args:
        committed: the moment of each chunk's commit and its frames, in any order.
        published_s: the moment at which the output was whole.
        warm_up_share: 0 to 1, less than the last chunk leaves.
    """
    total = sum(frames for _, frames in committed)
    warm = 0
    for at_s, frames in sorted(committed):
        warm += frames
        if warm >= warm_up_share * total:
            if warm == total or published_s <= at_s:
                break
            return (total - warm) / (published_s - at_s), at_s, total - warm
    raise ValueError(f"{total} frames in {len(committed)} chunks are too few to tell a steady rate; give more --frames")


def late_over_early(counted: Sequence[tuple[float, float]]) -> float:
    """Returns how the rate of the second half of a count compares with that of the first.

    Args:
        counted: moment and count, in order, both growing; the first is where the work has begun.
    """
    if len(counted) < 3:
        raise ValueError(f"the count was seen at {len(counted)} moments, too few to tell whether its rate is steady")
    (start_s, first), (end_s, last) = counted[0], counted[-1]
    middle_s, middle = min(counted[1:-1], key=lambda seen: abs(seen[1] - (first + last) / 2))
    return (last - middle) / (end_s - middle_s) / ((middle - first) / (middle_s - start_s))


def slope_per_1000(points: Sequence[tuple[float, float]]) -> float:
    """Returns the growth of y for each 1,000 of x: least squares through (x, y)."""
    return 1000 * statistics.linear_regression(*zip(*points, strict=True)).slope


def bend(points: Sequence[tuple[float, float]]) -> float:
    """Returns how far three or more points (x, y) are from a line: the last slope over the first, less 1, absolute."""
    (x0, y0), (x1, y1), *_ = points
    (x2, y2), (x3, y3) = points[-2:]
    return abs((y3 - y2) / (x3 - x2) / ((y1 - y0) / (x1 - x0)) - 1)


def source_digest(package: Path) -> str:
    """Returns a digest of a package's source, by which rounds of other code are told apart."""
    hasher = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        hasher.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return hasher.hexdigest()[:16]


class Journal:
    """All rounds of all contests, in one file that is whole at any moment."""

    def __init__(self, path: Path, machine: Mapping[str, Any], rows: Sequence[Row], source: str) -> None:
        """Takes over what earlier runs have measured on a machine that says the same of itself.

        Args:
            path: the file.
            machine: what measurements depend on beside settings.
            rows: all rows that there are, in the table's order.
            source: digest of the code; a line says so where it was measured with other code.
        """
        self._path, self._machine, self._rows, self._source = path, dict(machine), rows, source
        self._contests: dict[str, dict[str, Any]] = {}
        if path.exists():
            before = json.loads(path.read_text())
            if before["machine"] == self._machine:
                self._contests = before["contests"]
        self.missing: dict[str, str] = {}
        """Why a contestant was not measured in this run, by `contest.contestant`."""

    def rounds(self, contest: str, settings: Mapping[str, Any]) -> list[dict[str, Measurement]]:
        """Returns the rounds of a contest under these settings; rounds under others are dropped."""
        plain_settings = json.loads(json.dumps(dict(settings)))
        known = self._contests.get(contest)
        if known is None or known["settings"] != plain_settings:
            known = self._contests[contest] = {"settings": plain_settings, "rounds": []}
        return known["rounds"]

    def lines(self) -> list[Line]:
        """Returns the table's lines for all that was measured by now, whichever run did it, and for what failed."""
        lines = []
        for row in self._rows:
            missing = [self.missing[key] for name in row.needs if (key := f"{row.contest}.{name}") in self.missing]
            if row.contest in self._contests or missing:
                rounds = self._contests.get(row.contest, {"rounds": []})["rounds"]
                if missing or complete(row, rounds):
                    lines.append(self._with_age(line(row, rounds, "; ".join(dict.fromkeys(missing)))))
        return lines

    def _with_age(self, entry: Line) -> Line:
        settings = self._contests.get(entry.row.contest, {"settings": {"source": self._source}})["settings"]
        if settings["source"] == self._source:
            return entry
        return dataclasses.replace(entry, note=f"measured with other code; {entry.note}".removesuffix("; "))

    def save(self) -> None:
        """Writes everything: the lines for a reader, the rounds for the next run."""
        document = {
            "machine": self._machine,
            "rows": [entry.as_json() for entry in self.lines()],
            "contests": self._contests,
        }
        storage.write_whole(str(self._path), (json.dumps(document, indent=1) + "\n").encode())


def table(lines: Sequence[Line]) -> str:
    """Returns the table as Markdown, and below it what is to be said of single rows."""
    cells = [["row", "what", "against", "median", "spread", "target", "verdict", "outputs"]]
    cells += [_cells(entry) for entry in lines]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([*text, *(f"{entry.row.name}: {entry.note}" for entry in lines if entry.note)])


def _cells(entry: Line) -> list[str]:
    row = entry.row
    target = "" if row.target is None else f"{'at most' if row.at_most else 'at least'} {_format(row.target, row.unit)}"
    if not entry.figures:
        return [row.name, row.what, row.against, "", "", target, entry.verdict, entry.missing]
    spread = f"{_format(min(entry.figures), '')} to {_format(max(entry.figures), '')}, n={len(entry.figures)}"
    outputs = entry.agreement or "not compared"
    return [row.name, row.what, row.against, _format(entry.median, row.unit), spread, target, entry.verdict, outputs]


def _format(value: float, unit: str) -> str:
    return f"{value:.3g}{unit}" if unit == "x" else f"{value:.3g} {unit}".strip()


def lacking(rows: Sequence[Row], rounds: Sequence[Round], repeats: int) -> list[Row]:
    """Returns the rows of a contest that have fewer complete rounds than asked for."""
    return [row for row in rows if len(complete(row, rounds)) < repeats]


def in_turn(names: Sequence[str], round_number: int) -> list[str]:
    """Returns the order of a round: every second one runs backwards, so that neither side always comes first."""
    return list(names) if round_number % 2 == 0 else list(reversed(names))

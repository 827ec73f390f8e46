"""Everything that is wrong or odd with a data set, in one report, before any training.

Every frame and mask is read and decoded, as training would. Shapes: `H` height px, `W` width px.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from unet_ray import storage
from unet_ray.classes import IGNORED_ID, ClassSet, Color, RawValue, UnknownValuesError
from unet_ray.config import CheckConfig, load_class_set
from unet_ray.frames import natural_key
from unet_ray.images import ImageHeader, ImageRefused, count_values, decode_frame, decode_mask, read_header
from unet_ray.messages import count, first_few
from unet_ray.pairs.pairs import (
    ImagePair,
    PairListing,
    PairProblem,
    detect_mask_format,
    encode_mask,
    find_pairs,
    guess_mask_format,
)
from unet_ray.progress import Progress

EXAMPLES = 3
"""Example files kept of a finding."""

LISTED = 10
"""Unknown values and frame sizes listed one by one, the most frequent first."""

_REFUSALS = {
    "not_an_image": "are no image",
    "truncated": "are cut short or damaged",
    "too_large": "have too many pixels",
    "unsupported": "are of a kind that is not read",
}
_ODD_MODES = {"P": "have a palette", "RGBA": "have an alpha channel", "LA": "have an alpha channel", "1": "have 1 bit"}

# Colours that a JPEG's noise or a smooth resize makes lie this near to a line between two known colours (0 to 255).
_BETWEEN_DISTANCE = 12.0
_BETWEEN_SHARE = 0.9
_BETWEEN_MIN_COLORS = 3


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


@dataclass
class _PairFacts:
    """What one pair shows; files under `frames have no mask`-like clauses, with a remark on each."""

    pair: ImagePair
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    """Clause, URI, remark: what training refuses."""
    remarks: list[tuple[str, str, str]] = field(default_factory=list)
    """Clause, URI, remark: what training takes."""
    unknown: dict[RawValue, int] = field(default_factory=dict)
    frame_size: tuple[int, int] | None = None
    frame_digest: str | None = None
    mask_is_jpeg: bool = False
    pixels_of: np.ndarray | None = None
    """int64 [256] by encoded id; None where training would refuse the mask."""


def check_data_set(config: CheckConfig) -> CheckReport:
    """Reads a whole data set and says what is wrong with it; progress goes to standard error.

    Raises:
        ValueError: folders in which there is nothing to check, a class set that is none.
        StorageError: the store did not answer.
    """
    images, masks = storage.resolve(config.images), storage.resolve(config.masks)
    class_set = load_class_set(config.classes)
    listing = find_pairs(
        images,
        masks,
        image_suffix=config.image_suffix,
        mask_suffix=config.mask_suffix,
        path_pattern=config.path_pattern,
    )
    findings = _Findings(roots=(images, masks))
    mask_format: str | None = config.mask_format
    if mask_format == "auto":
        mask_format = _detect(listing.pairs, class_set, findings)
    _add_orphans(findings, listing)
    _add_unmatched(findings, listing.pairs, config.path_pattern)
    facts = list(_inspect_all(listing.pairs, class_set, mask_format))
    frame_sizes = _add_facts(findings, facts)
    counted = [fact.pixels_of for fact in facts if fact.pixels_of is not None]
    return CheckReport(
        images=images,
        masks=masks,
        class_set=class_set.name,
        mask_format=mask_format or "not found out",
        n_pairs=len(listing.pairs),
        findings=findings.sorted(),
        frame_sizes=frame_sizes,
        classes=_class_counts(counted, class_set),
        n_masks_counted=len(counted),
        sequences=_sequence_counts(listing.pairs),
    )


class _Findings:
    """Findings as they gather: files by clause."""

    def __init__(self, roots: tuple[str, ...]):
        self._roots = roots
        self._files: dict[tuple[str, bool], list[str]] = defaultdict(list)

    def add(self, what: str, uri: str, remark: str = "", *, refused: bool) -> None:
        path = self.relative(uri)
        self._files[what, refused].append(f"{path} ({remark})" if remark else path)

    def relative(self, uri: str) -> str:
        for root in self._roots:
            uri = uri.removeprefix(root.rstrip("/") + "/")
        return uri

    def sorted(self) -> tuple[Finding, ...]:
        findings = [
            Finding(what=what, n_files=len(files), examples=tuple(files[:EXAMPLES]), refused=refused)
            for (what, refused), files in self._files.items()
        ]
        return tuple(sorted(findings, key=lambda finding: not finding.refused))


def _detect(pairs: Sequence[ImagePair], class_set: ClassSet, findings: _Findings) -> str | None:
    unreadable: set[str] = set()
    while len(unreadable) <= LISTED:
        readable = [pair for pair in pairs if pair.mask_uri not in unreadable]
        try:
            return detect_mask_format(readable, class_set) if readable else None
        except PairProblem as error:
            unreadable.add(error.uri)  # it becomes a finding when every file is read
        except ValueError as error:
            uri, _, problem = str(error).partition(": ")
            remark = problem.replace(" (unet-ray check shows the colours)", "")
            findings.add("masks leave open what their pixels mean", uri, remark, refused=True)
            break
    return None


def _add_orphans(findings: _Findings, listing: PairListing) -> None:
    for path in listing.images_without_mask:
        findings.add("frames have no mask", path, refused=True)
    for path in listing.masks_without_image:
        findings.add("masks have no frame", path, refused=True)


def _add_unmatched(findings: _Findings, pairs: Sequence[ImagePair], path_pattern: str | None) -> None:
    for pair in pairs:
        if path_pattern is not None and not re.search(path_pattern, findings.relative(pair.image_uri)):
            findings.add("frames do not match --path-pattern: their drive has no name", pair.image_uri, refused=False)


def _inspect_all(pairs: Sequence[ImagePair], class_set: ClassSet, mask_format: str | None) -> Iterator[_PairFacts]:
    at_once = 256  # so that a million pairs are not a million futures
    local = all(storage.is_local(pair.image_uri) for pair in pairs)
    n_threads = (os.cpu_count() or 1) + 4 if local else storage.REQUESTS_IN_FLIGHT
    with ThreadPoolExecutor(n_threads) as pool, Progress(len(pairs), "pairs", stream=sys.stderr) as progress:
        for start in range(0, len(pairs), at_once):
            batch = pairs[start : start + at_once]
            for facts in pool.map(lambda pair: _inspect(pair, class_set, mask_format), batch):
                progress.advance(1)
                yield facts
    progress.finish()


def _inspect(pair: ImagePair, class_set: ClassSet, mask_format: str | None) -> _PairFacts:
    facts = _PairFacts(pair)
    frame_bytes = _read(pair.image_uri, "frames", facts)
    mask_bytes = _read(pair.mask_uri, "masks", facts)
    if frame_bytes is not None:
        facts.frame_digest = storage.sha256(frame_bytes)
        frame = _decode(pair.image_uri, frame_bytes, "frames", facts, decode_frame)
        facts.frame_size = None if frame is None else (frame.shape[0], frame.shape[1])
    if mask_bytes is None:
        return facts
    raw = _decode(pair.mask_uri, mask_bytes, "masks", facts, decode_mask)
    if raw is None:
        return facts
    if facts.frame_size not in (None, raw.shape[:2]):
        mask_px, frame_px = (_size(size) for size in (raw.shape[:2], facts.frame_size or (0, 0)))
        facts.problems.append(("masks have another size than their frame", pair.mask_uri, f"{mask_px}, not {frame_px}"))
    mask_format = mask_format or guess_mask_format(raw)
    _encode(pair.mask_uri, decode_frame(mask_bytes) if mask_format == "colors" else raw, class_set, mask_format, facts)
    return facts


def _read(uri: str, what: str, facts: _PairFacts) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        facts.problems.append((f"{what} cannot be read", uri, error.strerror or type(error).__name__))
        return None


def _decode(
    uri: str, data: bytes, what: str, facts: _PairFacts, decode: Callable[[bytes], np.ndarray]
) -> np.ndarray | None:
    try:
        pixels = decode(data)
        header = read_header(data)
    except ImageRefused as error:
        facts.problems.append((f"{what} {_REFUSALS[error.reason]}", uri, str(error)))
        return None
    facts.mask_is_jpeg |= what == "masks" and header.format == "JPEG"
    facts.remarks += [(f"{what} {clause}", uri, remark) for clause, remark in _oddities(header, what)]
    return pixels


def _oddities(header: ImageHeader, what: str) -> Iterator[tuple[str, str]]:
    if header.mode in _ODD_MODES:
        meaning = ""
        if header.mode == "P":
            meaning = "its colours are taken" if what == "frames" else ""
        elif header.mode in ("RGBA", "LA"):
            meaning = "dropped"
        yield _ODD_MODES[header.mode], meaning
    if header.mode in ("L", "LA") and what == "frames":
        yield "are grey", ""
    if header.orientation != 1:
        yield "are turned by EXIF", f"orientation {header.orientation}, pixels are taken as stored"
    if header.format == "JPEG" and what == "masks":
        yield "are saved as JPEG", "which changes pixels; save masks as PNG"


def _encode(uri: str, raw: np.ndarray, class_set: ClassSet, mask_format: str, facts: _PairFacts) -> None:
    try:
        mask_HW = encode_mask(raw, class_set, mask_format)
    except UnknownValuesError as error:
        if facts.mask_is_jpeg or _lie_between(error.values, class_set):
            kind = "colour" if mask_format == "colors" else "id"
            clause = f"masks have {kind}s between those of classes: saved as JPEG or resized smoothly"
            remark = f"{count(len(error.values), kind)}, {count(sum(error.values.values()), 'pixel')}"
            facts.problems.append((clause, uri, remark))
        else:
            facts.unknown = error.values
    except ValueError as error:
        facts.problems.append((f"masks do not fit the format {mask_format}", uri, str(error)))
    else:
        facts.pixels_of = count_values(mask_HW)
        if facts.pixels_of[IGNORED_ID] == mask_HW.size:
            facts.remarks.append(("masks show no class: every pixel is ignored", uri, ""))


def _lie_between(values: Mapping[RawValue, int], class_set: ClassSet) -> bool:
    """Whether nearly all pixels of unknown colours lie on lines between two known colours, or next to a known one."""
    colors = [value for value in values if isinstance(value, tuple)]
    if len(colors) < _BETWEEN_MIN_COLORS:
        return False
    most = sorted(colors, key=lambda color: -values[color])[:64]
    known = np.array(sorted(_known_colors(class_set)), np.float64)
    starts, ends = (known[places] for places in np.triu_indices(len(known)))
    lines = ends - starts
    squares = np.maximum((lines**2).sum(axis=1), 1.0)
    near = 0
    for color in most:
        along = np.clip(((color - starts) * lines).sum(axis=1) / squares, 0, 1)
        distances = np.linalg.norm(starts + along[:, None] * lines - color, axis=1)
        near += values[color] if distances.min() <= _BETWEEN_DISTANCE else 0
    return near >= _BETWEEN_SHARE * sum(values[color] for color in most)


def _known_colors(class_set: ClassSet) -> set[Color]:
    values: set[RawValue] = {*class_set.ignore}
    for item in class_set.classes:
        values |= {item.color, *item.values}
    return {value for value in values if isinstance(value, tuple)}


def _add_facts(findings: _Findings, facts: Sequence[_PairFacts]) -> dict[tuple[int, int], int]:
    unknown: dict[RawValue, list[tuple[str, int]]] = defaultdict(list)
    doubles: dict[str, list[str]] = defaultdict(list)
    sizes: Counter[tuple[int, int]] = Counter()
    for fact in facts:
        for what, uri, remark in fact.problems:
            findings.add(what, uri, remark, refused=True)
        for what, uri, remark in fact.remarks:
            findings.add(what, uri, remark, refused=False)
        for value, n_pixels in fact.unknown.items():
            unknown[value].append((fact.pair.mask_uri, n_pixels))
        if fact.frame_digest is not None:
            doubles[fact.frame_digest].append(fact.pair.image_uri)
        if fact.frame_size is not None:
            sizes[fact.frame_size] += 1
    _add_unknown(findings, unknown)
    for first, *others in doubles.values():
        for other in others:
            findings.add("frames are doubles", other, f"the same bytes as {findings.relative(first)}", refused=False)
    return dict(sizes.most_common())


def _add_unknown(findings: _Findings, masks_of: Mapping[RawValue, Sequence[tuple[str, int]]]) -> None:
    frequent = sorted(masks_of, key=lambda value: -sum(n_pixels for _, n_pixels in masks_of[value]))
    for index, value in enumerate(frequent):
        kind = "colour" if isinstance(value, tuple) else "id"
        listed = f"masks have the unknown {kind} {value}"
        clause = listed if index < LISTED else f"masks have further unknown {kind}s ({len(frequent) - LISTED:,})"
        for uri, n_pixels in masks_of[value]:
            findings.add(clause, uri, count(n_pixels, "pixel"), refused=True)


def _class_counts(counted: Sequence[np.ndarray], class_set: ClassSet) -> tuple[ClassCount, ...]:
    pixels_of = np.zeros(256, np.int64)
    masks_of = np.zeros(256, np.int64)
    for pixels in counted:
        pixels_of += pixels
        masks_of += pixels > 0
    outputs = [*enumerate(class_set.names), (IGNORED_ID, "(ignored)")]
    return tuple(
        ClassCount(name=name, pixels=int(pixels_of[output]), n_masks=int(masks_of[output])) for output, name in outputs
    )


def _sequence_counts(pairs: Iterable[ImagePair]) -> tuple[SequenceCount, ...]:
    pairs_of: dict[str, list[ImagePair]] = defaultdict(list)
    for pair in pairs:
        pairs_of[pair.sequence].append(pair)
    counts = []
    for sequence in sorted(pairs_of, key=natural_key):
        indices = [pair.frame_index for pair in pairs_of[sequence] if pair.frame_index is not None]
        counts.append(
            SequenceCount(
                sequence=sequence,
                n_frames=len(pairs_of[sequence]),
                n_cameras=len({pair.camera for pair in pairs_of[sequence]}),
                first_index=min(indices, default=None),
                last_index=max(indices, default=None),
            )
        )
    return tuple(counts)


def _size(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"


def _summary_lines(report: CheckReport) -> list[str]:
    sizes = [f"{_size(size)} ({n_frames:,})" for size, n_frames in report.frame_sizes.items()]
    return [
        f"frames       {report.images}",
        f"masks        {report.masks}",
        f"pairs        {report.n_pairs:,}",
        f"frame sizes  {first_few(sizes, LISTED) or 'none could be read'} (height x width)",
        f"classes      {report.class_set}",
        f"mask format  {report.mask_format}",
    ]


def _finding_lines(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return ["No findings."]
    lines = ["findings    files"]
    for finding in findings:
        lines.append(f"{'refused' if finding.refused else 'noted':8}{finding.n_files:9,}  {finding.what}")
        for example in finding.examples:
            lines += textwrap.wrap(
                example,
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
        lines.append(f"{item.sequence or '(no name)':{width}}{item.n_frames:8,}{item.n_cameras:9,}  {indices}")
    if len(sequences) > limit:
        lines.append(f"and {len(sequences) - limit:,} more")
    return lines

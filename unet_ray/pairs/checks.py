"""Everything that is wrong or odd with a data set, in one report, before any training.

Every frame and mask is read and decoded, as training would. What is held of each pair is a digest of its frame: a data
set of a million pairs is checked in the time that its pixels take.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from unet_ray import storage
from unet_ray.classes import IGNORED_ID, PRESETS, ClassSet, RawValue, UnknownValuesError
from unet_ray.config import CheckConfig, load_class_set
from unet_ray.frames import natural_key
from unet_ray.messages import count, first_few, shown_path
from unet_ray.pairs.check_report import LISTED, CheckReport, ClassCount, Finding, SequenceCount
from unet_ray.pairs.drives import find_named_drives, suggest_path_pattern
from unet_ray.pairs.pair_facts import PairFacts, inspect_pair, look_swapped
from unet_ray.pairs.pairs import ImagePair, PairListing, PairProblem, detect_mask_format, find_pairs
from unet_ray.progress import Progress
from unet_ray.storage.templates import split_template

EXAMPLES = 3
"""Example files kept of a finding."""

MOSTLY_IGNORED = 0.5
"""Share of ignored pixels above which a data set is odd: masks of train ids under `cityscapes` come to 0.8."""

_MOST_UNKNOWN = 10_000  # different unknown values that are counted one by one


def check_data_set(config: CheckConfig, on_phase: Callable[[str], None] = lambda line: None) -> CheckReport:
    """Reads a whole data set and says what is wrong with it; progress goes to standard error.

    `on_phase` is called with a line as each part of the work begins.

    Raises:
        ValueError: folders in which there is nothing to check, a class set that is none.
        StorageError: the store did not answer.
    """
    images, masks = map(storage.resolve, config.folders())
    class_set = load_class_set(config.classes)
    on_phase(f"listing {shown_path(images)} and {shown_path(masks)}")
    listing = find_pairs(
        images,
        masks,
        image_suffix=config.image_suffix,
        mask_suffix=config.mask_suffix,
        path_pattern=config.path_pattern,
        include_hidden=config.include_hidden,
    )
    findings = _Findings(roots=(split_template(images)[0], split_template(masks)[0]))
    tally = _Tally(findings, class_set)
    mask_format: str | None = None
    if look_swapped(listing.pairs, class_set):
        clause = "frames look like masks, and masks like frames: give --images and --masks the other way round"
        for pair in listing.pairs:
            findings.add(clause, pair.image_uri, refused=True)
    else:
        mask_format = config.mask_format
        if mask_format == "auto":
            mask_format = _detect(listing.pairs, class_set, findings)
        _add_orphans(findings, listing)
        _add_names(findings, listing.pairs, config)
        on_phase(f"reading {count(len(listing.pairs), 'pair')}")
        for facts in _inspect_all(listing.pairs, class_set, mask_format):
            tally.add(facts)
        tally.finish()
    return CheckReport(
        images=images,
        masks=masks,
        class_set=class_set.name,
        mask_format=mask_format or "not found out",
        n_pairs=len(listing.pairs),
        n_hidden=listing.n_hidden,
        findings=findings.sorted(),
        frame_sizes=dict(tally.sizes.most_common()),
        classes=tally.class_counts(),
        n_masks_counted=tally.n_masks,
        sequences=_sequence_counts(listing.pairs),
    )


@dataclass
class _Files:
    """How many files have something, and the first few of them."""

    n_files: int = 0
    n_pixels: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, path: str, remark: str = "", n_pixels: int = 0) -> None:
        self.n_files += 1
        self.n_pixels += n_pixels
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{path} ({remark})" if remark else path)


class _Findings:
    """Findings as they gather: files by clause."""

    def __init__(self, roots: tuple[str, ...]):
        self._roots = roots
        self._files: dict[tuple[str, bool], _Files] = defaultdict(_Files)

    def add(self, what: str, uri: str, remark: str = "", *, refused: bool) -> None:
        self._files[what, refused].add(self.relative(uri), remark)

    def put(self, what: str, files: _Files, *, refused: bool) -> None:
        self._files[what, refused] = files

    def relative(self, uri: str) -> str:
        for root in self._roots:
            uri = uri.removeprefix(root.rstrip("/") + "/")
        return uri

    def sorted(self) -> tuple[Finding, ...]:
        findings = [
            Finding(what=what, n_files=files.n_files, examples=tuple(files.examples), refused=refused)
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
    for uri in listing.not_files:
        findings.add("are no files but pipes, sockets or devices: they are not read", uri, refused=False)
    for path in listing.images_without_mask:
        findings.add("frames have no mask", path, refused=True)
    for path in listing.masks_without_image:
        findings.add("masks have no frame", path, refused=True)


def _add_names(findings: _Findings, pairs: Sequence[ImagePair], config: CheckConfig) -> None:
    """What the frames' names say of drives, and whether `--path-pattern` is told."""
    paths = {findings.relative(pair.image_uri): pair for pair in pairs}
    suggested = suggest_path_pattern(list(paths), config.image_suffix)
    remedy = f"give --path-pattern {shlex.quote(suggested)}" if suggested else "give --path-pattern"
    if config.path_pattern is None:
        named = find_named_drives(list(paths), config.image_suffix)
        if named is not None:
            drives = first_few([repr(drive) for drive in named.drives])
            clause = f"frames of one folder look like several drives by their names ({drives}): {remedy}"
            for path in named.paths:
                findings.add(clause, path, refused=False)
        return
    pattern = re.compile(config.path_pattern)
    clause = "frames do not match --path-pattern: their drive has no name"
    clause += f"; {remedy}, which fits all" if suggested else ""
    for path, pair in paths.items():
        if not pattern.search(path) or ("sequence" in pattern.groupindex and not pair.sequence):
            findings.add(clause, path, refused=False)


def _inspect_all(pairs: Sequence[ImagePair], class_set: ClassSet, mask_format: str | None) -> Iterator[PairFacts]:
    at_once = 256  # so that a million pairs are not a million futures
    local = all(storage.is_local(pair.image_uri) for pair in pairs)
    n_threads = (os.cpu_count() or 1) + 4 if local else storage.REQUESTS_IN_FLIGHT
    with ThreadPoolExecutor(n_threads) as pool, Progress(len(pairs), "pairs", stream=sys.stderr) as progress:
        for start in range(0, len(pairs), at_once):
            batch = pairs[start : start + at_once]
            for facts in pool.map(lambda pair: inspect_pair(pair, class_set, mask_format), batch):
                progress.advance(1)
                yield facts
    progress.finish()


class _Tally:
    """What all pairs come to."""

    def __init__(self, findings: _Findings, class_set: ClassSet):
        self._findings, self._class_set = findings, class_set
        self.sizes: Counter[tuple[int, int]] = Counter()
        """Frames by (height, width)."""
        self.n_masks = 0
        """Masks that training would take, over which the classes are counted."""
        self._pixels_of, self._masks_of = np.zeros(256, np.int64), np.zeros(256, np.int64)
        self._pixels_of_id = np.zeros(256, np.int64)
        self._frame_of_digest: dict[str, str] = {}
        self._mostly_ignored = _Files()
        self._unknown: dict[RawValue, _Files] = defaultdict(_Files)
        self._masks_with_unknown = _Files()
        self._is_unknown_cut = False

    def add(self, facts: PairFacts) -> None:
        for what, uri, remark in facts.problems:
            self._findings.add(what, uri, remark, refused=True)
        for what, uri, remark in facts.remarks:
            self._findings.add(what, uri, remark, refused=False)
        path = self._findings.relative(facts.pair.mask_uri)
        if facts.unknown is not None:
            self._add_unknown(path, facts.unknown)
        if facts.frame_size is not None:
            self.sizes[facts.frame_size] += 1
        if facts.frame_digest is not None:
            first = self._frame_of_digest.setdefault(facts.frame_digest, facts.pair.image_uri)
            if first is not facts.pair.image_uri:
                remark = f"the same bytes as {self._findings.relative(first)}"
                self._findings.add("frames are doubles", facts.pair.image_uri, remark, refused=False)
        if facts.pixels_of_id is not None:
            self._pixels_of_id += facts.pixels_of_id
        if facts.pixels_of is not None:
            self.n_masks += 1
            self._pixels_of += facts.pixels_of
            self._masks_of += facts.pixels_of > 0
            share = facts.pixels_of[IGNORED_ID] / max(1, facts.pixels_of.sum())
            if share > MOSTLY_IGNORED:
                self._mostly_ignored.add(path, f"{share:.0%}")

    def _add_unknown(self, path: str, error: UnknownValuesError) -> None:
        self._masks_with_unknown.add(path, f"{error.n_values:,}")
        for value, n_pixels in error.values.items():
            self._unknown[value].add(path, count(n_pixels, "pixel"), n_pixels)
        self._is_unknown_cut |= error.n_values > len(error.values)
        if len(self._unknown) > 2 * _MOST_UNKNOWN:
            self._is_unknown_cut = True
            most = sorted(self._unknown.items(), key=lambda item: -item[1].n_pixels)[:_MOST_UNKNOWN]
            self._unknown = defaultdict(_Files, most)

    def finish(self) -> None:
        """Adds the findings of which all masks together are the reason."""
        frequent = sorted(self._unknown, key=lambda value: -self._unknown[value].n_pixels)
        kind = "colour" if frequent and isinstance(frequent[0], tuple) else "id"
        for value in frequent[:LISTED]:
            self._findings.put(f"masks have the unknown {kind} {value}", self._unknown[value], refused=True)
        if len(frequent) > LISTED:
            number = f"{'over ' * self._is_unknown_cut}{len(frequent):,}"
            self._findings.put(f"masks have {number} unknown {kind}s in all", self._masks_with_unknown, refused=True)
        files, n_pixels = self._masks_with_unknown, int(self._pixels_of.sum())
        if self._pixels_of[IGNORED_ID] > MOSTLY_IGNORED * n_pixels:
            share, files = self._pixels_of[IGNORED_ID] / n_pixels, self._mostly_ignored
            clause = f"masks are ignored for the most part: {share:.0%} of all pixels mean no class"
            self._findings.put(clause, files, refused=False)
        others = _same_classes_by_other_ids(self._class_set, self._pixels_of_id) if files.n_files else []
        if others:
            clause = f"masks fit --classes {' or '.join(others)}: the same classes by other ids"
            self._findings.put(clause, _Files(files.n_files), refused=False)

    def class_counts(self) -> tuple[ClassCount, ...]:
        outputs = [*enumerate(self._class_set.names), (IGNORED_ID, "(ignored)")]
        return tuple(
            ClassCount(name=name, pixels=int(self._pixels_of[output]), n_masks=int(self._masks_of[output]))
            for output, name in outputs
        )


def _same_classes_by_other_ids(class_set: ClassSet, pixels_of_id: np.ndarray) -> list[str]:
    """Presets with the same classes that know all ids of the masks and ignore fewer of their pixels."""
    alike = [preset for preset in PRESETS.values() if preset.names == class_set.names and preset != class_set]
    ignored = {preset.name: _ignored_pixels(preset, pixels_of_id) for preset in alike}
    now = _ignored_pixels(class_set, pixels_of_id)
    return [name for name, pixels in ignored.items() if pixels is not None and (now is None or pixels < now)]


def _ignored_pixels(class_set: ClassSet, pixels_of_id: np.ndarray) -> int | None:
    """None where an id is unknown, or there is none."""
    ids = np.flatnonzero(pixels_of_id).astype(np.uint8)
    try:
        encoded = class_set.encode_ids(ids[None])[0]
    except UnknownValuesError:
        return None
    return int(pixels_of_id[ids[encoded == IGNORED_ID]].sum()) if len(ids) else None


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

"""Which pairs train and which validate: whole drives apart, a guard band where one is cut, and how much leaks.

Names only; the one function of pixels is `difference_hash`. Shapes: `H` height px, `W` width px, `C` colour.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unet_ray import storage
from unet_ray.frames import natural_key
from unet_ray.messages import count, first_few
from unet_ray.pairs.names import partners
from unet_ray.pairs.pairs import ImagePair
from unet_ray.pixels.images import resize_nearest

NEAR_DUPLICATE_BITS = 3
"""Two frames are near-duplicates where at most so many of the 64 bits of their `difference_hash` differ.

CamVid, 367 frames: two drives differ in 8 bits or more, the next frame (a second later) in 16 at the median, and in 1
where the car stands (2026-11-21)."""

LEAK_WARNING_SHARE = 0.01
"""Leak rate above which the validation's numbers are said to flatter."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which pairs are for training and which for validation."""

    train: tuple[ImagePair, ...]
    validation: tuple[ImagePair, ...]
    left_out: tuple[ImagePair, ...] = ()
    """The guard band, or `none` in a manifest."""
    how: str
    """One line that says it to the user."""


def split_pairs(
    pairs: Sequence[ImagePair],
    *,
    val_fraction: float = 0.1,
    guard_frames: int = 30,
    manifest: str | None = None,
) -> Split:
    """Sets pairs aside for validation, in whole drives: neighbours in time are nearly the same picture.

    Drives are taken in an order that depends on their names alone, each where it brings the share nearer to
    `val_fraction`; at least one, and one stays for training. A single drive is cut: its last part in time, behind a
    guard band of `guard_frames` instants that are left out (fewer where that would cost training more than a quarter
    of its frames). A manifest decides instead: CSV with the columns `pair_id` and `split` (train, val, none).

    Raises:
        ValueError: a manifest that does not fit the pairs.
    """
    if manifest is not None:
        return _split_by_manifest(pairs, manifest)
    if val_fraction == 0 or len(pairs) < 2:
        return Split(train=tuple(pairs), validation=(), how=f"all {count(len(pairs), 'frame')} train, none validate")
    sequences = Counter(pair.sequence for pair in pairs)
    if len(sequences) == 1:
        return _cut_drive(pairs, val_fraction, guard_frames)
    chosen = _choose_drives(sequences, val_fraction * len(pairs))
    train = tuple(pair for pair in pairs if pair.sequence not in chosen)
    validation = tuple(pair for pair in pairs if pair.sequence in chosen)
    how = (
        f"{count(len(validation), 'frame')} of {len(pairs):,} ({len(validation) / len(pairs):.1%}) validate:"
        f" {len(chosen):,} of {len(sequences):,} drives, {first_few(sorted(chosen, key=natural_key))}"
    )
    return Split(train=train, validation=validation, how=how)


def _choose_drives(frames_of: Mapping[str, int], target: float) -> set[str]:
    in_order = sorted(frames_of, key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen: set[str] = set()
    taken = 0
    for name in in_order:
        nearer = abs(taken + frames_of[name] - target) < abs(taken - target)
        if nearer and len(chosen) < len(frames_of) - 1:
            chosen.add(name)
            taken += frames_of[name]
    return chosen or {min(in_order, key=lambda name: frames_of[name])}


def _cut_drive(pairs: Sequence[ImagePair], val_fraction: float, guard_frames: int) -> Split:
    instants = _instants(pairs)
    in_time = sorted(set(instants.values()))
    n_validation = min(max(1, round(val_fraction * len(in_time))), len(in_time) - 1)
    if n_validation < 1:
        return Split(train=tuple(pairs), validation=(), how="all frames are of one instant: none validate")
    before = len(in_time) - n_validation
    n_guard = min(guard_frames, before // 4)
    first_guard, first_validation = in_time[before - n_guard], in_time[before]
    train = tuple(pair for pair in pairs if instants[pair.pair_id] < first_guard)
    validation = tuple(pair for pair in pairs if instants[pair.pair_id] >= first_validation)
    left_out = tuple(pair for pair in pairs if first_guard <= instants[pair.pair_id] < first_validation)
    asked = f" (--guard-frames {guard_frames} would take more than a quarter)" if n_guard < guard_frames else ""
    how = (
        "all frames are of one drive (else give --path-pattern): its last"
        f" {count(len(validation), 'frame')} of {len(pairs):,}"
        f" ({len(validation) / len(pairs):.1%}) validate, {len(left_out):,} before them are left out{asked}"
    )
    return Split(train=train, validation=validation, left_out=left_out, how=how)


def _instants(pairs: Iterable[ImagePair]) -> dict[str, int]:
    """The place in time of each pair of one drive: its frame index, or its place among its camera's names."""
    pairs = list(pairs)
    if all(pair.frame_index is not None for pair in pairs):
        return {pair.pair_id: pair.frame_index or 0 for pair in pairs}
    cameras: defaultdict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        cameras[pair.camera].append(pair.pair_id)
    return {i: index for ids in cameras.values() for index, i in enumerate(sorted(ids, key=natural_key))}


def _split_by_manifest(pairs: Sequence[ImagePair], manifest: str) -> Split:
    splits = _read_manifest(manifest)
    line_of = partners((pair.pair_id for pair in pairs), splits)
    unlisted = [pair.pair_id for pair in pairs if pair.pair_id not in line_of]
    unknown = sorted(splits.keys() - set(line_of.values()), key=natural_key)
    if unlisted:
        raise ValueError(
            f"{manifest} lacks {count(len(unlisted), 'pair')}: {first_few(unlisted)}; give each train, val or none"
        )
    if unknown:
        raise ValueError(f"{manifest} names {count(len(unknown), 'pair')} not found: {first_few(unknown)}")
    train, validation, left_out = (
        tuple(pair for pair in pairs if splits[line_of[pair.pair_id]] == split) for split in ("train", "val", "none")
    )
    if not train:
        raise ValueError(f"{manifest} has no pair with split train; nothing could be learnt")
    how = f"by {manifest}: {len(train):,} train, {len(validation):,} validate, {len(left_out):,} are left out"
    return Split(train=train, validation=validation, left_out=left_out, how=how)


def _read_manifest(manifest: str) -> dict[str, str]:
    try:
        reader = csv.DictReader(io.StringIO(storage.read_bytes(manifest).decode("utf-8-sig"), newline=""))
    except FileNotFoundError as error:
        raise ValueError(f"{manifest}: no such file; --split-manifest is a CSV file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{manifest} is not UTF-8 text ({error}); --split-manifest is a CSV file") from error
    if not {"pair_id", "split"} <= set(reader.fieldnames or ()):
        raise ValueError(f"{manifest} has the columns {list(reader.fieldnames or ())}; it needs pair_id and split")
    splits: dict[str, str] = {}
    for row in reader:
        pair_id, split = row["pair_id"], row["split"]
        if split not in ("train", "val", "none"):
            raise ValueError(f"{manifest} line {reader.line_num}: split is {split!r}; allowed are train, val, none")
        if pair_id in splits:
            raise ValueError(f"{manifest} line {reader.line_num}: pair_id {pair_id!r} stands there twice")
        splits[pair_id] = split
    return splits


# --- what leaks from training into validation ---


def difference_hash(image_HWC: np.ndarray) -> int:
    """64 bits that say of 8 x 8 places of a thumbnail whether it is brighter to the right: alike for alike frames.

    Source: N. Krawetz, "Kind of Like That", 2013 (dHash).
    """
    height_px, width_px = image_HWC.shape[:2]
    image_HWC = resize_nearest(image_HWC, max(height_px, 8), max(width_px, 9))
    rows, columns = np.arange(9) * image_HWC.shape[0] // 8, np.arange(10) * image_HWC.shape[1] // 9
    # Rows first, as they lie in memory, in the smallest type: 0.1 ms for 360 x 480 instead of 2.8.
    small = np.uint16 if image_HWC.shape[0] <= 2048 else np.uint32
    bands = [image_HWC[start:end].sum(axis=0, dtype=small) for start, end in itertools.pairwise(rows)]
    sums = np.add.reduceat(np.stack(bands).sum(axis=2, dtype=np.int64), columns[:-1], axis=1)
    row_px, column_px = np.diff(rows), np.diff(columns)
    means = sums / np.outer(row_px, column_px)
    return int.from_bytes(np.packbits(means[:, 1:] > means[:, :-1]).tobytes(), "big")


def leak_rate(split: Split, *, guard_frames: int = 30, hashes: Mapping[str, int] | None = None) -> float:
    """Share of the validation frames that training knows already; 0 without validation.

    That is: the same file; a frame of the same sequence and camera within `guard_frames` of it (counted in the usual
    step of their frame indices); or, with `hashes`, a near-duplicate.

    Args:
        split: the split.
        guard_frames: how many frames away a neighbour in time can be.
        hashes: `difference_hash` by `image_uri`; frames that are not in it are not compared.
    """
    if not split.validation:
        return 0.0
    known = {pair.image_uri for pair in split.train}
    leaked = {pair.image_uri for pair in split.validation if pair.image_uri in known}
    leaked |= _neighbours_in_time(split, guard_frames)
    if hashes:
        leaked |= _near_duplicates(split, hashes)
    return len(leaked) / len({pair.image_uri for pair in split.validation})


def leak_warning(rate: float) -> str | None:
    """What to tell the user of a leak rate above `LEAK_WARNING_SHARE`, else None."""
    if rate <= LEAK_WARNING_SHARE:
        return None
    return (
        f"{rate:.1%} of the validation frames have a neighbour in time or a near-duplicate in training: their metrics"
        " flatter; split by whole drives (--path-pattern, --split-manifest, --val-images)"
    )


def _neighbours_in_time(split: Split, guard_frames: int) -> set[str]:
    tracks: defaultdict[tuple[str, str], list[ImagePair]] = defaultdict(list)
    for pair in (*split.train, *split.validation, *split.left_out):
        tracks[pair.sequence, pair.camera].append(pair)
    in_training = {pair.image_uri for pair in split.train}
    in_validation = {pair.image_uri for pair in split.validation}
    leaked = set()
    for track in tracks.values():
        instants = _instants(track)
        steps = np.diff(sorted(set(instants.values())))
        reach = guard_frames * (float(np.median(steps)) if len(steps) else 1.0)
        trained = sorted({instants[pair.pair_id] for pair in track if pair.image_uri in in_training})
        for pair in track:
            if pair.image_uri in in_validation:
                first = bisect_left(trained, instants[pair.pair_id] - reach)
                if first < len(trained) and trained[first] <= instants[pair.pair_id] + reach:
                    leaked.add(pair.image_uri)
    return leaked


def _near_duplicates(split: Split, hashes: Mapping[str, int]) -> set[str]:
    trained = np.array([hashes[pair.image_uri] for pair in split.train if pair.image_uri in hashes], np.uint64)
    if not len(trained):
        return set()
    return {
        pair.image_uri
        for pair in split.validation
        if pair.image_uri in hashes
        and count_ones(trained ^ np.uint64(hashes[pair.image_uri])).min() <= NEAR_DUPLICATE_BITS
    }


def count_ones(values: np.ndarray) -> np.ndarray:
    """Returns how many bits are 1 in each uint64.

    NumPy 1 has no function for that: 80,000 values take 3.5 ms instead of 0.12 (NumPy 2.4, a busy machine, 2026-11-30).
    """
    return np.bitwise_count(values) if hasattr(np, "bitwise_count") else _count_ones_by_hand(values)


def _count_ones_by_hand(values: np.ndarray) -> np.ndarray:
    """Adds neighbouring bits, pairs, fours, …, all numbers of a word at once (Hacker's Delight, 5-1)."""
    counts = values
    for width, mask in ((1, 0x5555555555555555), (2, 0x3333333333333333), (4, 0x0F0F0F0F0F0F0F0F)):
        counts = (counts & np.uint64(mask)) + (counts >> np.uint64(width) & np.uint64(mask))
    return counts * np.uint64(0x0101010101010101) >> np.uint64(56)  # the sum of its bytes comes out in the highest

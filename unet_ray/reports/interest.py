"""Which frames of an output are worth a look, by its columns alone: no mask is read.

Shapes: `N` frames, `K` classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_ray.classes import ClassSet
from unet_ray.messages import count
from unet_ray.output import labels

RARE_SHARE = 0.05
"""A class with more of all pixels is none that is hard to find."""
_SEEN_SHARE = 0.002
"""Of a frame's pixels: a class that has so many in no frame is mostly specks, and shown if there is no other."""
_APART = 10
"""Rows between two frames of one drive that are chosen for the same reason: neighbours look alike."""
_BATCH_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A frame to show, and why."""

    row: int
    """Its place among all rows of `frames/`."""
    reason: str
    """Such as `least confident: 0.71`; empty where it only fills up."""
    class_id: int | None = None
    """Of the class that has few pixels in it, which are worth a mark."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Interest:
    """What is kept of the columns: 16 bytes a frame, so that a million of them fit into 16 MB."""

    drive_N: np.ndarray
    """A number of its drive and camera, int32."""
    is_labelled_N: np.ndarray
    confidence_N: np.ndarray
    """Float32, NaN where it is rejected, or of a network that gives class ids alone."""
    unlikeness_N: np.ndarray
    """Share of its pixels that would have to be of other classes for the shares of all frames, float32; NaN where it is
    rejected."""
    shares_K: np.ndarray
    """Of all pixels, float64."""
    most_row_K: np.ndarray
    """The row with the largest share of the class; -1 where no frame has any."""
    most_share_K: np.ndarray
    least_row_K: np.ndarray
    """The row with the fewest pixels of the class, of those that have some."""
    least_pixels_K: np.ndarray


def read_interest(uris: Iterable[str], pixels_K: np.ndarray, class_set: ClassSet) -> Interest:
    """Reads the columns that say what is worth a look, some rows at a time.

    Args:
        uris: the files of `frames/` in their order.
        pixels_K: pixels of each class in all frames, int64.
        class_set: of the output.

    Raises:
        JobFailed: a file is damaged.
        StorageError: storage did not answer.
    """
    gathering = _Gathering(pixels_K)
    columns = ["sequence", "camera", "status", "confidence", *(f"pixels_{name}" for name in class_set.names)]
    for uri in uris:
        with labels.opened(uri) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                gathering.add(batch, class_set.names)
    return gathering.result()


class _Gathering:
    """What was read so far."""

    def __init__(self, pixels_K: np.ndarray):
        self._drives: dict[tuple[str, str], int] = {}
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in ("drive", "labelled", "confidence", "unlike")}
        self._n_rows = 0
        n_classes = len(pixels_K)
        self._shares_K = pixels_K / max(1, int(pixels_K.sum()))
        self._most_row_K, self._most_share_K = np.full(n_classes, -1), np.zeros(n_classes)
        self._least_row_K = np.full(n_classes, -1)
        self._least_pixels_K = np.full(n_classes, np.iinfo(np.int64).max)

    def add(self, rows: pa.RecordBatch, names: Sequence[str]) -> None:
        labelled_N = pc.equal(rows["status"], "ok").to_numpy(zero_copy_only=False)
        pixels = [pc.fill_null(rows[f"pixels_{name}"], 0).to_numpy(zero_copy_only=False) for name in names]
        pixels_NK = np.stack(pixels, axis=1)
        shares_NK = pixels_NK / np.maximum(1, pixels_NK.sum(axis=1, keepdims=True))
        unlike_N = np.abs(shares_NK - self._shares_K).sum(axis=1) / 2
        self._parts["drive"].append(self._drive_numbers(rows))
        self._parts["labelled"].append(labelled_N)
        confidence_N = rows["confidence"].to_numpy(zero_copy_only=False).astype(np.float32)
        self._parts["confidence"].append(np.where(labelled_N, confidence_N, np.float32(np.nan)))
        self._parts["unlike"].append(np.where(labelled_N, unlike_N, np.nan).astype(np.float32))
        if len(rows):
            self._add_extremes(pixels_NK, shares_NK)
        self._n_rows += len(rows)

    def _drive_numbers(self, rows: pa.RecordBatch) -> np.ndarray:
        pairs = zip(rows["sequence"].to_pylist(), rows["camera"].to_pylist(), strict=True)
        return np.array([self._drives.setdefault(pair, len(self._drives)) for pair in pairs], np.int32)

    def _add_extremes(self, pixels_NK: np.ndarray, shares_NK: np.ndarray) -> None:
        classes_K = np.arange(len(self._shares_K))
        row_K = shares_NK.argmax(axis=0)
        share_K = shares_NK[row_K, classes_K]
        is_more_K = share_K > self._most_share_K
        self._most_row_K = np.where(is_more_K, row_K + self._n_rows, self._most_row_K)
        self._most_share_K = np.maximum(self._most_share_K, share_K)
        present_NK = np.where(pixels_NK > 0, pixels_NK, np.iinfo(np.int64).max)
        row_K = present_NK.argmin(axis=0)
        is_less_K = present_NK[row_K, classes_K] < self._least_pixels_K
        self._least_row_K = np.where(is_less_K, row_K + self._n_rows, self._least_row_K)
        self._least_pixels_K = np.minimum(self._least_pixels_K, present_NK[row_K, classes_K])

    def result(self) -> Interest:
        whole = {name: np.concatenate([*parts, np.zeros(0)]) for name, parts in self._parts.items()}
        return Interest(
            drive_N=whole["drive"].astype(np.int32),
            is_labelled_N=whole["labelled"].astype(bool),
            confidence_N=whole["confidence"].astype(np.float32),
            unlikeness_N=whole["unlike"].astype(np.float32),
            shares_K=self._shares_K,
            most_row_K=self._most_row_K,
            most_share_K=self._most_share_K,
            least_row_K=self._least_row_K,
            least_pixels_K=self._least_pixels_K,
        )


def choose_frames(interest: Interest, names: Sequence[str], n_frames: int) -> list[Choice]:
    """Returns up to so many frames: least confident, most and least of the rarest classes, typical; each once.

    Args:
        interest: of all frames.
        names: of the classes.
        n_frames: the most. A quarter each is least confident and typical, at least one.
    """
    quarter = max(1, n_frames // 4)
    reasons: dict[int, list[str]] = {}
    marks: dict[int, int] = {}
    for row in _spread(interest.confidence_N, interest, quarter):
        reasons[row] = [f"least confident: {interest.confidence_N[row]:.2f}"]
    for class_id in rare_classes(interest)[: max(1, (n_frames - 2 * quarter) // 2)]:
        most, least = int(interest.most_row_K[class_id]), int(interest.least_row_K[class_id])
        reasons.setdefault(most, []).append(
            f"most {names[class_id]}: {interest.most_share_K[class_id]:.1%} of the frame"
        )
        if least != most:
            n_pixels = int(interest.least_pixels_K[class_id])
            reasons.setdefault(least, []).append(f"least {names[class_id]}: {count(n_pixels, 'pixel')}")
            marks[least] = class_id
    for row in _spread(interest.unlikeness_N, interest, quarter, apart_from=reasons):
        reasons[row] = ["typical" + _confidence_of(interest, row)]
    for row in _spread(interest.unlikeness_N, interest, max(0, n_frames - len(reasons)), apart_from=reasons):
        reasons[row] = [_confidence_of(interest, row).removeprefix(": ")]
    chosen = list(reasons.items())[:n_frames]
    return [Choice(row=row, reason=", ".join(texts), class_id=marks.get(row)) for row, texts in chosen]


def rare_classes(interest: Interest) -> list[int]:
    """Returns the classes with the fewest pixels, the rarest first; those that are specks alone come last.

    None has over 5% of all pixels, unless all have: then it is the one with the fewest.
    """
    present = [
        index for index in np.argsort(interest.shares_K, kind="stable").tolist() if interest.most_row_K[index] >= 0
    ]
    rare = [index for index in present if interest.shares_K[index] <= RARE_SHARE] or present[:1]
    return sorted(rare, key=lambda index: interest.most_share_K[index] < _SEEN_SHARE)


def _confidence_of(interest: Interest, row: int) -> str:
    confidence = float(interest.confidence_N[row])
    return "" if np.isnan(confidence) else f": confidence {confidence:.2f}"


def _spread(values_N: np.ndarray, interest: Interest, n_frames: int, *, apart_from: Iterable[int] = ()) -> list[int]:
    """Returns the rows with the least values: of drives that have been chosen least often, then no close neighbours."""
    taken = list(apart_from)
    chosen: list[int] = []
    n_drives = int(interest.drive_N.max(initial=0)) + 1
    known = np.flatnonzero(~np.isnan(values_N))
    order = known[np.argsort(values_N[known], kind="stable")]
    for _ in range(n_frames):
        others = np.array([*taken, *chosen], np.int64)
        left = order[~np.isin(order, others)]
        if not len(left):
            break
        times_of_drive = np.bincount(interest.drive_N[others], minlength=n_drives)
        times_N = times_of_drive[interest.drive_N[left]]
        rarely = left[times_N == times_N.min()]
        apart = rarely[np.abs(rarely[:, None] - others).min(axis=1, initial=_APART) >= _APART]
        chosen.append(int((apart if len(apart) else rarely)[0]))
    return chosen

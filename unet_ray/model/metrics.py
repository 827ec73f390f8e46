"""The confusion matrix and all that is read from it: pixel accuracy, IoU, precision, recall, and their table.

Shapes: H height px, W width px, K classes. A confusion matrix is `confusion_KK`, int64, rows are the true class and
columns the predicted one. Matrices of several frames, batches or workers are added before anything is read from them.
IoU (Jaccard index) is true positives / (true positives + false positives + false negatives), as in PASCAL VOC:
Everingham et al. 2010, https://doi.org/10.1007/s11263-009-0275-4.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from unet_ray.classes import IGNORED_ID


def confusion_matrix(true: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """Count pixels by true and predicted class; pixels whose true id is `IGNORED_ID` are left out.

    Args:
        true: integer ids of any shape, 0 to K-1 or `IGNORED_ID`.
        predicted: integer ids of the same shape, 0 to K-1 wherever the true id is not ignored.
        n_classes: K.

    Returns:
        `confusion_KK`, int64; row = true class, column = predicted class.

    Raises:
        ValueError: the shapes differ, or an id is out of range.
    """
    if true.shape != predicted.shape:
        raise ValueError(f"true mask {true.shape} and predicted mask {predicted.shape} must have one shape")
    if true.dtype != np.uint8 or predicted.dtype != np.uint8:
        _require_ids(true, predicted, n_classes)
    # By runs of pixels of one pair of ids: 1024x2048 in 1 to 3 ms of a core, pixel by pixel in 15 (2026-11-30).
    codes = (true.astype(np.uint16) << 8 | predicted.astype(np.uint16)).ravel()
    starts = np.concatenate(([0], np.flatnonzero(codes[1:] != codes[:-1]) + 1)) if codes.size else np.zeros(0, np.intp)
    pixels = np.bincount(codes[starts], np.diff(starts, append=codes.size), 2**16)
    confusion_KK = pixels.astype(np.int64).reshape(256, 256)[:n_classes, :n_classes]
    if confusion_KK.sum() != np.count_nonzero(true != IGNORED_ID):
        _require_ids(true, predicted, n_classes)
    return np.ascontiguousarray(confusion_KK)


def _require_ids(true: np.ndarray, predicted: np.ndarray, n_classes: int) -> None:
    valid = true != IGNORED_ID
    for what, ids_P in (("true", true[valid]), ("predicted", predicted[valid])):
        if ids_P.size and (ids_P.min() < 0 or ids_P.max() >= n_classes):
            raise ValueError(f"{what} ids run from {ids_P.min()} to {ids_P.max()}, allowed are 0 to {n_classes - 1}")


def class_scores(confusion_KK: np.ndarray) -> dict[str, np.ndarray]:
    """Per-class IoU, precision and recall as float64 `[K]` under `iou`, `precision`, `recall`; NaN where undefined.

    IoU is undefined for a class absent from truth and prediction, precision for one never predicted, recall for one
    that no pixel truly has.
    """
    hits_K = np.diag(confusion_KK).astype(np.float64)
    true_K = confusion_KK.sum(axis=1).astype(np.float64)
    predicted_K = confusion_KK.sum(axis=0).astype(np.float64)
    return {
        "iou": _ratio(hits_K, true_K + predicted_K - hits_K),
        "precision": _ratio(hits_K, predicted_K),
        "recall": _ratio(hits_K, true_K),
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def summarize(confusion_KK: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Read every reported metric from one confusion matrix; the result is plain JSON.

    Returns:
        `mean_iou` (mean over the classes present in truth or prediction), `pixel_accuracy`, `iou/<class>`,
        `precision/<class>`, `recall/<class>`: a float in [0, 1], or None where undefined (see `class_scores`); and
        `absent`, the names of the classes absent from truth and prediction, which the mean leaves out.
    """
    n_classes = len(class_names)
    if confusion_KK.shape != (n_classes, n_classes):
        raise ValueError(f"a confusion matrix of {confusion_KK.shape} does not fit {n_classes} class names")
    scores = class_scores(confusion_KK)
    present_K = ~np.isnan(scores["iou"])
    n_pixels = int(confusion_KK.sum())
    summary: dict[str, Any] = {
        "mean_iou": float(scores["iou"][present_K].mean()) if present_K.any() else None,
        "pixel_accuracy": float(np.trace(confusion_KK) / n_pixels) if n_pixels else None,
        "absent": [name for name, present in zip(class_names, present_K, strict=True) if not present],
    }
    for score, values_K in scores.items():
        for name, value in zip(class_names, values_K, strict=True):
            summary[f"{score}/{name}"] = None if np.isnan(value) else float(value)
    return summary


# --- as a file ---


def confusion_csv(confusion_KK: np.ndarray, class_names: Sequence[str]) -> bytes:
    """Write a confusion matrix as CSV: a row for each true class, a column for each predicted one, both with names."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true", *class_names])
    writer.writerows([name, *row] for name, row in zip(class_names, confusion_KK.tolist(), strict=True))
    return text.getvalue().encode()


def read_confusion_csv(data: bytes) -> tuple[np.ndarray, list[str]]:
    """Read what `confusion_csv` wrote: int64 `[K, K]` and the names of the classes. Raises ValueError for another."""
    header, *rows = list(csv.reader(io.StringIO(data.decode())))
    confusion_KK = np.array([row[1:] for row in rows], np.int64)
    n_classes = len(header) - 1
    if confusion_KK.shape != (n_classes, n_classes) or (confusion_KK < 0).any() or not n_classes:
        raise ValueError(f"it holds {confusion_KK.shape} numbers for {n_classes} classes")
    return confusion_KK, header[1:]


# --- boundaries ---

BOUNDARY_TOLERANCE = 0.0075
"""How far off a boundary may lie, as a share of the frame's diagonal (Csurka et al. 2013, see `boundary_counts`)."""


def boundary_tolerance_px(height_px: int, width_px: int) -> int:
    """Returns the tolerance for frames of this size, in pixels, rounded up: 6 for 480x640."""
    return math.ceil(BOUNDARY_TOLERANCE * math.hypot(height_px, width_px))


def boundary_counts(true_HW: np.ndarray, predicted_HW: np.ndarray, n_classes: int) -> np.ndarray:
    """Count how many boundary pixels of each class lie near a boundary of that class in the other mask.

    A pixel is on the boundary of its class where a pixel above, below, left or right of it has another class; pixels
    whose true id is `IGNORED_ID` are left out of both masks. Near is within `boundary_tolerance_px` rows and columns.
    After Csurka et al. 2013, What is a good evaluation measure for semantic segmentation?,
    https://doi.org/10.5244/C.27.32; counts are added over frames, where the paper averages scores of frames.

    Args:
        true_HW: integer ids, 0 to K-1 or `IGNORED_ID`.
        predicted_HW: integer ids of the same shape.
        n_classes: K.

    Returns:
        int64 `[K, 4]`: predicted boundary pixels near a true one, predicted ones, true ones near a predicted one, true
        ones. The sums of several frames may be added before anything is read from them.
    """
    valid_HW = true_HW != IGNORED_ID
    true_edges_HW = _edges(true_HW, valid_HW)
    predicted_edges_HW = _edges(predicted_HW, valid_HW)
    tolerance_px = boundary_tolerance_px(*true_HW.shape)
    counts_K4 = np.zeros((n_classes, 4), np.int64)
    for k in range(n_classes):
        true_k, predicted_k = true_edges_HW & (true_HW == k), predicted_edges_HW & (predicted_HW == k)
        for column, (edges, others) in enumerate(((predicted_k, true_k), (true_k, predicted_k))):
            n_edges = np.count_nonzero(edges)
            near = n_edges and others.any() and np.count_nonzero(edges & _grown(others, tolerance_px))
            counts_K4[k, 2 * column : 2 * column + 2] = near, n_edges
    return counts_K4


def _edges(ids_HW: np.ndarray, valid_HW: np.ndarray) -> np.ndarray:
    edges_HW = np.zeros(ids_HW.shape, bool)
    for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differ = (ids_HW[one] != ids_HW[other]) & valid_HW[one] & valid_HW[other]
        edges_HW[one] |= differ
        edges_HW[other] |= differ
    return edges_HW


def _grown(pixels_HW: np.ndarray, distance_px: int) -> np.ndarray:
    """The pixels within so many rows and columns of a set one: down, then across."""
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (distance_px + 1, distance_px)
        sums = np.pad(pixels_HW.astype(np.int32), padding).cumsum(axis)
        window, n = 2 * distance_px + 1, pixels_HW.shape[axis]
        pixels_HW = sums.take(range(window, window + n), axis) > sums.take(range(n), axis)
    return pixels_HW


def boundary_f1(counts_K4: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Read the boundary F1 of each class and their mean from summed `boundary_counts`; the result is plain JSON.

    Returns:
        `boundary_f1` and `boundary_f1/<class>`: 2 precision recall / (precision + recall), or None for a class without
        a boundary in either mask, which the mean leaves out.
    """
    near_predicted, predicted, near_true, true = counts_K4.astype(np.float64).T
    precision_K, recall_K = _ratio(near_predicted, predicted), _ratio(near_true, true)
    f1_K = np.nan_to_num(2 * _ratio(precision_K * recall_K, precision_K + recall_K))
    present_K = predicted + true > 0
    named = {
        f"boundary_f1/{name}": float(value) if present else None
        for name, value, present in zip(class_names, f1_K, present_K, strict=True)
    }
    return {"boundary_f1": float(f1_K[present_K].mean()) if present_K.any() else None} | named


# --- for people ---


def class_table(confusion_KK: np.ndarray, class_names: Sequence[str]) -> str:
    """Render IoU, precision, recall and true pixels by class as lines of fixed-width text; `-` where undefined.

    The last line holds the mean IoU, the pixel accuracy and the number of pixels.
    """
    summary = summarize(confusion_KK, class_names)
    width = max(len("class"), *(len(name) for name in class_names))
    lines = [f"{'class':<{width}}     IoU  precision  recall         pixels"]
    for name, pixels in zip(class_names, confusion_KK.sum(axis=1), strict=True):
        iou, precision, recall = (_cell(summary[f"{score}/{name}"]) for score in ("iou", "precision", "recall"))
        lines.append(f"{name:<{width}}  {iou:>6}  {precision:>9}  {recall:>6}  {pixels:>13,}")
    lines.append(
        f"mean IoU {_cell(summary['mean_iou'])} over {len(class_names) - len(summary['absent'])} of {len(class_names)} "
        f"classes, pixel accuracy {_cell(summary['pixel_accuracy'])}, {confusion_KK.sum():,} pixels"
    )
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

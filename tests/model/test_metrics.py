"""Metrics against a naive implementation that never builds a confusion matrix."""

import json
import re

import numpy as np
import pytest

from unet_ray.model.metrics import (
    boundary_counts,
    boundary_f1,
    boundary_tolerance_px,
    class_scores,
    class_table,
    confusion_matrix,
    summarize,
)

NAMES = ("road", "car", "sky", "pole", "train")
IGNORED = 255


@pytest.fixture
def masks() -> tuple[np.ndarray, np.ndarray]:
    """Three frames of 7x11; `pole` is never predicted, `sky` never true, `train` neither."""
    rng = np.random.default_rng(2)
    true = rng.choice(np.array([0, 1, 3, IGNORED], np.uint8), (3, 7, 11), p=[0.5, 0.3, 0.1, 0.1])
    predicted = rng.choice(np.array([0, 1, 2], np.uint8), (3, 7, 11), p=[0.6, 0.3, 0.1])
    return true, predicted


def naive_scores(true: np.ndarray, predicted: np.ndarray, label: int) -> dict[str, float | None]:
    """Pixel sets of one class, as in the textbook."""
    pairs = [(t, p) for t, p in zip(true.ravel().tolist(), predicted.ravel().tolist(), strict=True) if t != IGNORED]
    is_true = {index for index, (t, _) in enumerate(pairs) if t == label}
    is_predicted = {index for index, (_, p) in enumerate(pairs) if p == label}

    def share(part, whole):
        return len(part) / len(whole) if whole else None

    hits = is_true & is_predicted
    return {
        "iou": share(hits, is_true | is_predicted),
        "precision": share(hits, is_predicted),
        "recall": share(hits, is_true),
    }


def test_confusion_matrix_counts_every_valid_pixel_once(masks):
    true, predicted = masks
    expected_KK = np.zeros((5, 5), np.int64)
    for t, p in zip(true.ravel(), predicted.ravel(), strict=True):
        if t != IGNORED:
            expected_KK[t, p] += 1
    confusion_KK = confusion_matrix(true, predicted, 5)
    assert confusion_KK.dtype == np.int64
    np.testing.assert_array_equal(confusion_KK, expected_KK)
    by_frame_KK = sum(confusion_matrix(t, p, 5) for t, p in zip(true, predicted, strict=True))
    np.testing.assert_array_equal(by_frame_KK, expected_KK)


def test_large_ids_do_not_overflow():
    true = np.array([[253, 253, 0]], np.uint8)
    confusion_KK = confusion_matrix(true, np.array([[253, 1, 253]], np.uint8), 254)
    assert (confusion_KK[253, 253], confusion_KK[253, 1], confusion_KK[0, 253], confusion_KK.sum()) == (1, 1, 1, 3)


def test_a_mask_of_ignored_pixels_only_counts_nothing():
    mask = np.full((2, 3), IGNORED, np.uint8)
    confusion_KK = confusion_matrix(mask, mask, 5)
    assert not confusion_KK.any()
    summary = summarize(confusion_KK, NAMES)
    assert summary["mean_iou"] is None and summary["pixel_accuracy"] is None and summary["absent"] == list(NAMES)


def test_summary_agrees_with_the_naive_implementation(masks):
    true, predicted = masks
    summary = summarize(confusion_matrix(true, predicted, 5), NAMES)
    naive = [naive_scores(true, predicted, label) for label in range(5)]
    for score in ("iou", "precision", "recall"):
        for name, scores in zip(NAMES, naive, strict=True):
            assert summary[f"{score}/{name}"] == pytest.approx(scores[score])
    present = [scores["iou"] for scores in naive if scores["iou"] is not None]
    assert len(present) == 4
    assert summary["mean_iou"] == pytest.approx(sum(present) / 4)
    assert summary["pixel_accuracy"] == pytest.approx((true == predicted).sum() / (true != IGNORED).sum())
    assert summary["absent"] == ["train"]
    assert (summary["precision/pole"], summary["recall/sky"]) == (None, None)
    assert (summary["iou/pole"], summary["recall/pole"], summary["iou/sky"], summary["precision/sky"]) == (0, 0, 0, 0)
    assert len(summary) == 3 + 3 * 5
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_perfect_prediction_is_one(masks):
    true, _ = masks
    predicted = np.where(true == IGNORED, 0, true)
    summary = summarize(confusion_matrix(true, predicted, 5), NAMES)
    assert (summary["mean_iou"], summary["pixel_accuracy"], summary["absent"]) == (1.0, 1.0, ["sky", "train"])


def test_class_scores_mark_the_undefined(masks):
    scores = class_scores(confusion_matrix(*masks, 5))
    assert np.isnan(scores["iou"]).tolist() == [False, False, False, False, True]
    assert np.isnan(scores["precision"]).tolist() == [False, False, False, True, True]
    assert np.isnan(scores["recall"]).tolist() == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("true", "predicted", "message"),
    [
        ([[0, 5, IGNORED]], [[0, 0, 0]], "true ids run from 0 to 5, allowed are 0 to 4"),
        ([[0, 1, IGNORED]], [[0, IGNORED, 0]], "predicted ids run from 0 to 255, allowed are 0 to 4"),
        ([[0, -1]], [[0, 0]], "true ids run from -1 to 0, allowed are 0 to 4"),
        ([[0, 1]], [[0, 1, 2]], "true mask (1, 2) and predicted mask (1, 3) must have one shape"),
    ],
)
def test_ids_out_of_range_and_shapes_that_differ_are_refused(true, predicted, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        confusion_matrix(np.array(true), np.array(predicted), 5)


def test_a_matrix_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"^a confusion matrix of \(3, 3\) does not fit 5 class names$"):
        summarize(np.zeros((3, 3), np.int64), NAMES)


def test_table_by_hand():
    confusion_KK = np.array([[1500, 500, 0], [0, 2000, 0], [0, 0, 0]])
    assert class_table(confusion_KK, ("road", "pedestrian", "sky")) == (
        "class          IoU  precision  recall         pixels\n"
        "road         0.750      1.000   0.750          2,000\n"
        "pedestrian   0.800      0.800   1.000          2,000\n"
        "sky              -          -       -              0\n"
        "mean IoU 0.775 over 2 of 3 classes, pixel accuracy 0.875, 4,000 pixels"
    )


# --- boundaries ---


def naive_edges(mask: np.ndarray, valid: np.ndarray, label: int) -> set[tuple[int, int]]:
    height, width = mask.shape
    edges = set()
    for y in range(height):
        for x in range(width):
            beside = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            inside = [pixel for pixel in beside if 0 <= pixel[0] < height and 0 <= pixel[1] < width and valid[pixel]]
            if mask[y, x] == label and valid[y, x] and any(mask[pixel] != label for pixel in inside):
                edges.add((y, x))
    return edges


def test_boundary_counts_are_those_of_a_naive_search():
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 3, (2, 7, 9)).astype(np.uint8)
    true, predicted = (np.kron(block, np.ones((30, 30), np.uint8)) for block in blocks)
    predicted[:, :200] = np.roll(true, 1, axis=0)[:, :200]
    true[50:90, 100:190] = IGNORED
    near_px = boundary_tolerance_px(210, 270)
    assert near_px == 3  # 0.75% of 342 px
    counts = boundary_counts(true, predicted, 4)
    assert counts[3].tolist() == [0, 0, 0, 0]
    for label in range(3):
        edges = [naive_edges(mask, true != IGNORED, label) for mask in (predicted, true)]
        expected = []
        for own, others in (edges, edges[::-1]):
            near = [
                any(
                    (y + dy, x + dx) in others
                    for dy in range(-near_px, near_px + 1)
                    for dx in range(-near_px, near_px + 1)
                )
                for y, x in own
            ]
            expected += [sum(near), len(own)]
        assert counts[label].tolist() == expected


def test_boundary_f1_of_equal_masks_is_one_and_of_far_ones_is_zero():
    true = np.zeros((100, 100), np.uint8)
    true[:, 30:] = 1
    far = np.zeros_like(true)
    far[:, 60:] = 1
    one, zero = (boundary_f1(boundary_counts(true, mask, 3), ("road", "car", "sky")) for mask in (true, far))
    assert one == {"boundary_f1": 1.0, "boundary_f1/road": 1.0, "boundary_f1/car": 1.0, "boundary_f1/sky": None}
    assert zero == {"boundary_f1": 0.0, "boundary_f1/road": 0.0, "boundary_f1/car": 0.0, "boundary_f1/sky": None}
    assert json.loads(json.dumps(one)) == one
    assert boundary_f1(np.zeros((1, 4), np.int64), ("road",))["boundary_f1"] is None

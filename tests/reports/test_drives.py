"""What the page makes of numbers alone: outliers, strips, the choice of frames, many drives."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from unet_ray.classes import ClassSet, SegmentationClass
from unet_ray.reports import content, galleries, outliers
from unet_ray.reports.frame_facts import FrameFacts
from unet_ray.reports.statistics import Drive, Statistics
from unet_ray.reports.strips import HEIGHT_PX, MAX_BINS, Strip, line_points, lowest, strip_png

CLASSES = ClassSet(
    name="three",
    classes=tuple(
        SegmentationClass(name=name, color=color)
        for name, color in (("road", (128, 64, 128)), ("sky", (70, 130, 180)), ("car", (0, 0, 142)))
    ),
)


# --- outliers ---


def test_a_drive_is_marked_by_its_robust_distance_from_the_median():
    """By hand: of sky the median is 0.3 and the MAD 0.01, so 0.36 is 0.6745 * 0.06 / 0.01 = 4.05 away."""
    sky_D = np.array([0.29, 0.30, 0.31, 0.30, 0.36, 0.29, 0.31])
    shares_DK = np.stack([1 - sky_D, sky_D, np.zeros(7)], axis=1)
    confidence_D = np.array([0.9, 0.9, 0.9, 0.9, 0.9, 0.5, np.nan])
    marked = outliers.find_outliers(shares_DK, confidence_D, np.full(7, 10), CLASSES.names)
    assert list(marked) == [5, 4]  # that of the largest score first
    assert [(mark.what, mark.value, mark.median) for mark in marked[5]] == [("confidence", 0.5, 0.9)]
    assert {mark.what: mark.score for mark in marked[4]} == pytest.approx({"sky": 4.047, "road": -4.047})


def test_small_differences_few_drives_and_few_frames_are_no_outliers():
    shares_DK = np.array([[0.99, 0.01, 0.0]] * 6 + [[0.972, 0.01, 0.018]])  # 1.8 points where all others have nothing
    assert outliers.find_outliers(shares_DK, np.full(7, np.nan), np.full(7, 99), CLASSES.names) == {}
    assert outliers.find_outliers(np.eye(3)[[0, 0, 0, 1]], np.full(4, 0.9), np.full(4, 99), CLASSES.names) == {}
    frames_D = np.array([10, 10, 10, 10, 9, 10])
    shares_DK = np.eye(3)[[0, 0, 0, 0, 1, 1]]
    assert list(outliers.find_outliers(shares_DK, np.full(6, 0.9), frames_D, CLASSES.names)) == [5]


# --- strips ---


def test_a_strip_has_the_mean_of_each_bin_however_its_frames_come():
    rng = np.random.default_rng(3)
    n_frames = 700
    shares_NK = rng.dirichlet([1, 1, 1], n_frames)
    confidence_N = np.where(rng.random(n_frames) < 0.1, np.nan, rng.random(n_frames))
    labelled_N = rng.random(n_frames) > 0.2
    n_labelled = int(labelled_N.sum())
    strip = Strip(n_labelled, 3)
    for start, end in ((0, 1), (1, 333), (333, 333), (333, 700)):
        part = slice(start, end)
        strip.add(labelled_N[part], shares_NK[part], confidence_N[part])
    bins: list[list[int]] = [[] for _ in range(MAX_BINS)]
    rejected = [0] * MAX_BINS
    rank = 0
    for n in range(n_frames):
        bin_of_frame = min(rank * MAX_BINS // n_labelled, MAX_BINS - 1)
        if labelled_N[n]:
            bins[bin_of_frame].append(n)
            rank += 1
        else:
            rejected[bin_of_frame] += 1
    assert strip.frames_B.tolist() == [len(frames) for frames in bins] and min(strip.frames_B) >= 2
    assert strip.rejected_B.tolist() == rejected
    np.testing.assert_allclose(strip.mean_shares_BK, [shares_NK[frames].mean(axis=0) for frames in bins])
    means = [np.nanmean(confidence_N[frames]) if np.isfinite(confidence_N[frames]).any() else np.nan for frames in bins]
    np.testing.assert_allclose(strip.mean_confidence_B, means)


def test_a_strip_is_drawn_in_the_classes_colours_and_what_is_empty_is_seen_through():
    strip = Strip(3, 3)
    strip.add(np.array([True, True]), np.array([[0.25, 0.75, 0], [0, 0, 1.0]]), np.array([0.5, 1]))
    image = np.asarray(Image.open(io.BytesIO(strip_png(strip, CLASSES, [1, 0, 2]))).convert("RGBA"))
    assert image.shape == (HEIGHT_PX, 3, 4)
    assert (image[:16, 0, :3] == CLASSES.palette_K3[0]).all() and (image[16:, 0, :3] == CLASSES.palette_K3[1]).all()
    assert (image[:, 1, :3] == CLASSES.palette_K3[2]).all() and (image[:, :2, 3] == 255).all()
    assert (image[:, 2, 3] == 0).all()


def test_a_line_is_parted_where_there_is_no_number():
    assert line_points(np.array([0.5, 1.0, np.nan, 0.75]), 0.5) == ["0,100 250,100 250,0 500,0", "750,50 1000,50"]
    assert lowest([np.array([0.93, np.nan]), np.array([0.71])]) == pytest.approx(0.7)
    assert lowest([np.array([np.nan])]) == 0.9


# --- which frames ---


def test_the_largest_are_chosen_but_no_neighbours_while_there_are_others():
    values_N = np.full(100, 0.1)
    values_N[[10, 11, 12, 50, 90]] = [0.9, 0.95, 0.8, 0.5, np.nan]
    drive_N = np.repeat([0, 1], [80, 20])
    assert galleries.largest(values_N, drive_N, 3) == [11, 50, 80]
    assert galleries.largest(values_N[:3], drive_N[:3], 5) == [0, 1, 2]
    assert galleries.largest(np.full(4, np.nan), drive_N[:4], 2) == []


def facts(**changes) -> FrameFacts:
    values = {
        "drive_N": np.zeros(6, np.int32),
        "expected_error_N": np.full(6, 0.1, np.float32),
        "has_expected_error": True,
        "changed_N": np.full(6, np.nan, np.float32),
        "unlikeness_N": np.full(6, 0.1, np.float32),
        "rare_NR": np.zeros((6, 0), np.float32),
        "strips": {},
        "examples": {},
        "group_rows": [],
    }
    return FrameFacts(**(values | changes))


def test_rare_classes_come_in_turn_and_typical_frames_of_all_drives():
    pixels_K = np.array([1000, 0, 30, 20])
    assert galleries.rare_classes(pixels_K, 5) == [3, 2] and galleries.rare_classes(pixels_K, 1) == [3]
    rare_NR = np.array([[0, 5], [9, 8], [0, 7], [3, 0], [0, 0], [1, 0]], np.float32)
    chosen = galleries.with_rare_classes(facts(rare_NR=rare_NR), 4)
    assert [(frame.row, frame.rare) for frame in chosen] == [(1, 0), (3, 0), (2, 1), (0, 1)]
    unlikeness_N = np.array([0.01, 0.02, 0.03, 0.5, 0.6, np.nan], np.float32)
    drive_N = np.array([0, 0, 0, 1, 1, 1], np.int32)
    assert galleries.typical(facts(drive_N=drive_N, unlikeness_N=unlikeness_N), 2) == [0, 3]


# --- many drives ---


def many(n_drives: int) -> Statistics:
    rng = np.random.default_rng(5)
    pixels_DK = rng.multinomial(10_000, [0.5, 0.3, 0.2], n_drives).astype(np.int64)
    pixels_DK[7] = [1000, 8000, 1000]
    return Statistics(
        drives=tuple(Drive(f"drive{n:05d}", "front") for n in range(n_drives)),
        frames_D=np.full(n_drives, 30),
        frames_with_class_DK=np.full((n_drives, 3), 3),
        pixels_DK=pixels_DK,
        confidence_DK=np.full((n_drives, 3), 0.9),
    )


def test_of_ten_thousand_drives_the_marked_and_some_others_are_in_the_page():
    statistics = many(10_000)
    marked = outliers.find_outliers(statistics.shares_DK, statistics.confidence_D, statistics.frames_D, CLASSES.names)
    assert list(marked) == [7]
    drives = content.choose_strips(statistics.drives, marked)
    assert len(drives) == content.STRIP_DRIVES and 7 in drives and max(np.diff(drives)) < 600
    strips = {n: Strip(30, 3) for n in drives}
    page = content.content("out", CLASSES, statistics, facts(strips=strips), [], marked)
    assert len(page.drives) == content.TABLE_DRIVES and page.drives[0].title == "drive00007 · front"
    assert page.drives[0].marks[0].startswith("sky 80.0%, median 30.0%")
    assert page.n_drives == 10_000 and page.left_out == statistics.drives[1]
    assert page.strips_command == "unet-ray report out --sequence drive00001"
    assert content.choose_strips(statistics.drives, marked, ["drive09999", "drive00002"]) == [2, 9999]

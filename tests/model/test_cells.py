"""Masks by cells against the scan of every pixel, bit for bit; counts against a loop over pixels."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import tensorflow as tf
from scan import scanned_mask

from unet_ray.model.cells import cut_side
from unet_ray.model.gpu_labels import _lookups
from unet_ray.model.grid import CONFIDENCE_UNITS, LOW_MARGIN, read_grid
from unet_ray.model.interpolation import nearest
from unet_ray.model.labels import Labels, label_frames, label_fused

K = 5
SIZES = [(50, 70), (24, 48), (36, 16), (5, 7), (1, 1), (60, 90)]
"""Of 12x16 logits: odd and even ratios, smaller and larger, one side only, and the logits' own width."""


def random_logits(h: int = 12, w: int = 16, n_classes: int = K) -> np.ndarray:
    return np.random.default_rng(h * w).normal(0, 3, (h, w, n_classes)).astype(np.float32)


def blobs(h: int = 12, w: int = 16) -> np.ndarray:
    """Two classes that meet in a curve, and others that win nowhere: most cells are of one class."""
    y, x = np.mgrid[:h, :w]
    distance = np.hypot(y - 4.3, x - 7.7) - 3.9
    return np.stack([distance, -distance, *np.full((K - 2, h, w), -9.0)], axis=-1).astype(np.float32)


def near_ties(seed: int = 3, h: int = 12, w: int = 16) -> np.ndarray:
    """Class 2 leads everywhere, by one rounding before class 1."""
    leading = np.random.default_rng(seed).normal(0, 3, (h, w)).astype(np.float32)
    before = np.nextafter(leading, np.float32(-np.inf))
    return np.stack([leading - 9, before, leading, leading - 9, leading - 9], axis=-1)


def with_infinities() -> np.ndarray:
    logits = blobs()
    random = np.random.default_rng(4)
    for value in (np.inf, -np.inf, np.nan, 3e38, -3e38):
        logits[random.integers(0, 12, 4), random.integers(0, 16, 4), random.integers(0, K, 4)] = value
    return logits


LOGITS = {
    "random": random_logits(),
    "blobs": blobs(),
    "one class": np.full((12, 16, K), [0, 1, 0, 0, 0], np.float32),
    "all equal": np.zeros((12, 16, K), np.float32),
    "near ties": near_ties(),
    "infinities": with_infinities(),
}


def oracle(mask_HW: np.ndarray, logits_hwK: np.ndarray, extent: tuple[float, float]) -> tuple[list[int], list[int]]:
    """Pixels of each class and the sums of their confidences in units, pixel by pixel with exact fractions."""
    grid = read_grid(logits_hwK[None], 1.0)
    pixels, units = [0] * K, [0] * K
    rows, columns = (
        [int((Fraction(2 * index + 1, 2) * Fraction(in_px)) / out_px) for index in range(out_px)]
        for in_px, out_px in zip(extent, mask_HW.shape, strict=True)
    )
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            pixels[mask_HW[y, x]] += 1
            units[mask_HW[y, x]] += int(grid.units[0, row, column])
    return pixels, units


def assert_counts(labels: Labels, logits_hwK: np.ndarray, extent: tuple[float, float]) -> None:
    pixels, units = oracle(labels.masks[0], logits_hwK, extent)
    assert labels.pixels_NK[0].tolist() == pixels
    means = [unit / CONFIDENCE_UNITS / n if n else np.nan for unit, n in zip(units, pixels, strict=True)]
    np.testing.assert_array_equal(labels.confidence_NK[0], np.float32(means))
    assert labels.confidence_N[0] == np.float32(sum(units) / CONFIDENCE_UNITS / labels.masks[0].size)


@pytest.mark.parametrize("name", LOGITS)
def test_masks_by_cells_are_those_of_the_scan_bit_for_bit(name: str) -> None:
    logits = LOGITS[name]
    for size in SIZES:
        labels = label_frames(logits[None], [size])
        np.testing.assert_array_equal(labels.masks[0], scanned_mask(logits, size), f"{name} {size}")
        assert_counts(labels, logits, (12, 16))


@pytest.mark.parametrize("extent", [(12, 5), (7.5, 16), (11.2, 9.75), (1, 16), (0.4, 2.5)])
def test_only_the_part_that_shows_the_frame_counts(extent: tuple[float, float]) -> None:
    logits = random_logits()
    labels = label_frames(logits[None], [(41, 29)], [extent])
    np.testing.assert_array_equal(labels.masks[0], scanned_mask(logits, (41, 29), extent))
    assert_counts(labels, logits, extent)
    shown_hw = [int(np.ceil(px)) for px in extent]
    np.testing.assert_array_equal(labels.grids[0], logits[: shown_hw[0], : shown_hw[1]].argmax(-1))


def test_a_lead_of_a_rounding_at_all_corners_is_no_lead_between_them() -> None:
    logits = near_ties()[..., [0, 2, 1, 3, 4]]  # equals go to the first, which is the one that leads
    mask = label_frames(logits[None], [(50, 70)]).masks[0]
    assert (logits.argmax(-1) == 1).all() and (mask != 1).any()
    np.testing.assert_array_equal(mask, scanned_mask(logits, (50, 70)))


@pytest.mark.slow
def test_a_thousand_frames_of_near_ties_are_labelled_as_by_the_scan() -> None:
    for seed in range(1000):
        logits = near_ties(seed, 6, 8)
        np.testing.assert_array_equal(label_frames(logits[None], [(37, 45)]).masks[0], scanned_mask(logits, (37, 45)))


def test_large_cells_and_many_classes_are_those_of_the_scan() -> None:
    random = np.random.default_rng(1).normal(0, 1, (3, 4, 19)).astype(np.float32)
    for size in ((301, 217), (40, 300)):
        np.testing.assert_array_equal(label_frames(random[None], [size]).masks[0], scanned_mask(random, size))


def test_logits_of_the_masks_size_are_their_argmax() -> None:
    labels = label_frames(random_logits()[None], [(12, 16)])
    np.testing.assert_array_equal(labels.masks[0], random_logits().argmax(-1))
    np.testing.assert_array_equal(labels.masks[0], scanned_mask(random_logits(), (12, 16)))
    assert labels.grids[0] is labels.masks[0]
    assert_counts(labels, random_logits(), (12, 16))


def test_low_margins_are_those_of_the_nearest_logits() -> None:
    logits = LOGITS["random"]
    shares = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)
    ordered = np.sort(shares, -1)
    is_low = ordered[..., -1] - ordered[..., -2] <= LOW_MARGIN
    for height_px, width_px in SIZES:
        low = sum(
            is_low[(2 * y + 1) * 12 // (2 * height_px), (2 * x + 1) * 16 // (2 * width_px)]
            for y in range(height_px)
            for x in range(width_px)
        )
        labels = label_frames(logits[None], [(height_px, width_px)])
        assert labels.low_margin_share_N[0] == np.float32(low / (height_px * width_px))


def test_a_temperature_changes_confidences_and_no_mask() -> None:
    logits = random_logits()
    for size in ((12, 16), (50, 70)):
        plain, soft = (label_frames(logits[None], [size], temperature=t) for t in (1.0, 2.5))
        divided = label_frames(logits[None] / np.float32(2.5), [size])
        np.testing.assert_array_equal(soft.masks[0], plain.masks[0])
        np.testing.assert_array_equal(soft.grids[0], plain.grids[0])
        assert soft.confidence_N[0] < plain.confidence_N[0]
        np.testing.assert_allclose(soft.confidence_N, divided.confidence_N, rtol=1e-6)
        np.testing.assert_array_equal(soft.low_margin_share_N, divided.low_margin_share_N)


def test_a_logit_that_is_not_a_number_has_no_confidence() -> None:
    logits = np.full((2, 3, K), np.nan, np.float32)
    labels = label_frames(logits[None], [(7, 9)])
    assert labels.confidence_N[0] == 0 and (labels.masks[0] == 0).all()


@pytest.mark.parametrize(("size", "extent"), [((50, 70), (12, 16)), ((41, 29), (7, 16)), ((12, 16), (12, 16))])
def test_the_way_of_gpus_says_the_same(size: tuple[int, int], extent: tuple[int, int]) -> None:
    logits = random_logits()
    cpu = label_frames(logits[None], [size], [extent], temperature=1.7)
    arrays = label_fused(logits[None], *_lookups([(extent, size)]), np.float32(1.7))
    masks_GHW, pixels_GK, units_GK, low_margins_G, grids_Ghw = (array.numpy() for array in arrays)
    mask_HW = masks_GHW[0, : size[0], : size[1]]
    assert (mask_HW != cpu.masks[0]).mean() < 0.001
    np.testing.assert_array_equal(grids_Ghw[0, : extent[0], : extent[1]], cpu.grids[0])
    assert low_margins_G[0] / mask_HW.size == pytest.approx(cpu.low_margin_share_N[0])
    np.testing.assert_allclose(units_GK[0].sum() / 2**24 / mask_HW.size, cpu.confidence_N[0], rtol=1e-6)
    np.testing.assert_allclose(units_GK[0] / 2**24 / pixels_GK[0], cpu.confidence_NK[0], rtol=1e-3)


@pytest.mark.parametrize(("in_px", "out_px"), [(96, 1080), (128, 1920), (128, 2070), (12, 5), (1, 7), (23.4, 100)])
def test_each_pixel_of_a_side_is_in_one_cell(in_px: float, out_px: int) -> None:
    side = cut_side(in_px, out_px, 2)
    is_own = np.arange(side.pixels.shape[1]) < side.sizes[:, None]
    np.testing.assert_array_equal(side.pixels[is_own], np.arange(out_px))
    np.testing.assert_array_equal(side.halves.sum(1), side.sizes)
    own_cells, _ = np.nonzero(is_own)
    ends = np.clip(own_cells - 1 + side.nearer[is_own], 0, int(np.ceil(in_px)) - 1)
    np.testing.assert_array_equal(ends, nearest(in_px, out_px))


def test_threads_label_their_own_frames() -> None:
    frames = [random_logits(12, 16), blobs(), near_ties()] * 4
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda logits: label_frames(logits[None], [(50, 70)]), frames))
    for labels, logits in zip(together, frames, strict=True):
        alone = label_frames(logits[None], [(50, 70)])
        for field in dataclasses.fields(Labels):
            np.testing.assert_array_equal(getattr(labels, field.name), getattr(alone, field.name))


@pytest.mark.slow
def test_cells_take_less_time_than_a_scan_without_counts(capsys: pytest.CaptureFixture[str]) -> None:
    coarse = np.random.default_rng(0).normal(0, 3, (5, 7, 11)).astype(np.float32)
    logits = tf.image.resize(coarse, (96, 128), "bicubic").numpy()

    def seconds(label: Callable[[], object]) -> float:
        label()
        times = []
        for _ in range(5):
            start = time.process_time()
            label()
            times.append(time.process_time() - start)
        return min(times)

    for size in ((480, 640), (1080, 1920), (1280, 1920)):
        scan = seconds(lambda size=size: scanned_mask(logits, size))
        by_cells = seconds(lambda size=size: label_frames(logits[None], [size]))
        with capsys.disabled():
            print(f"{size}: scan of masks {scan * 1000:.1f} ms, masks and counts by cells {by_cells * 1000:.1f} ms")
    assert by_cells < scan

"""Exact resampling against naive fractions, and against the numbers of PyTorch, OpenCV and Pillow."""

from __future__ import annotations

import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from unet_ray.pixels.resampling import resample

FILTERS = ("bilinear", "bilinear-antialias", "area")
HALF = Fraction(1, 2)


def picture(height, width, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def naive_weight(by, scale, output, sample):
    """As the definition reads: a share of an output pixel, or a tent around its centre."""
    if by == "area":
        return max(Fraction(0), min((output + 1) * scale, sample + 1) - max(output * scale, sample))
    half_width = max(scale, 1) if by == "bilinear-antialias" else 1
    return max(Fraction(0), 1 - abs(sample + HALF - (output + HALF) * scale) / half_width)


def naive_axis(by, n_in, n_out):
    rows = [[naive_weight(by, Fraction(n_in, n_out), i, j) for j in range(n_in)] for i in range(n_out)]
    return [[weight / sum(row) for weight in row] for row in rows]


def naive(image_HWC, size, by):
    """Exact means of fractions, to the nearest whole number, halves up."""
    axes = [naive_axis(by, n_in, n_out) for n_in, n_out in zip(image_HWC.shape[:2], size, strict=True)]
    y, x = (np.array(axis, object) for axis in axes)
    means = np.einsum("ij,jlc,kl->ikc", y, image_HWC.astype(int).astype(object), x, optimize=True)
    return np.vectorize(lambda mean: int(mean + HALF))(means).astype(np.uint8)


@pytest.mark.parametrize("by", FILTERS)
@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((9, 13), (4, 5)),
        ((5, 7), (9, 8)),
        ((20, 9), (3, 17)),
        ((1, 1), (3, 2)),
        ((16, 24), (8, 8)),
        ((11, 17), (8, 12)),
    ],
)
def test_each_value_is_the_exact_mean_rounded_once(by, source, size):
    image = picture(*source)
    np.testing.assert_array_equal(resample(image, size, by), naive(image, size, by))


@pytest.mark.parametrize("by", FILTERS)
def test_halves_are_rounded_up(by):
    image = np.array([[[0], [1]], [[1], [2]], [[2], [3]], [[254], [255]]], np.uint8)
    assert resample(image, (4, 1), by).ravel().tolist() == [1, 2, 3, 255]


# --- other libraries: torch 2.13.0 and OpenCV 5.0.0, both in float32, of formula(*source) ---
# bilinear, bilinear-antialias: interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=...)
# area: cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA); its INTER_LINEAR is within 0.01 of torch's bilinear


def formula(height, width):
    i, j = np.ogrid[:height, :width]
    return ((37 * i * i + 101 * j * (i + 1)) % 256).astype(np.uint8)[..., None]


ENLARGED = [
    [0.0, 36.07, 93.79, 151.5, 190.93, 102.36, 47.0],
    [23.12, 81.74, 175.53, 189.31, 184.81, 132.31, 99.5],
    [78.62, 130.01, 212.22, 214.44, 198.37, 134.29, 94.25],
    [148.0, 164.79, 191.64, 218.5, 227.07, 107.64, 33.0],
]
PEERS = {
    ("bilinear", (7, 9)): [
        [69.42, 172.2, 121.38, 147.35, 115.73],
        [162.97, 187.1, 89.62, 164.95, 105.88],
        [84.57, 68.45, 65.12, 55.4, 45.67],
        [154.22, 149.05, 47.88, 170.7, 101.53],
    ],
    ("bilinear-antialias", (7, 9)): [
        [96.05, 154.9, 114.33, 157.57, 126.52],
        [157.87, 151.93, 84.09, 154.31, 136.21],
        [118.13, 92.6, 70.38, 86.6, 83.47],
        [162.12, 160.29, 70.82, 131.62, 104.65],
    ],
    ("area", (7, 9)): [
        [79.98, 153.63, 117.57, 154.65, 122.65],
        [155.41, 146.78, 85.32, 153.89, 129.0],
        [113.13, 83.16, 69.44, 84.17, 78.59],
        [164.43, 157.83, 69.95, 140.56, 101.44],
    ],
    ("bilinear", (3, 4)): ENLARGED,
    ("bilinear-antialias", (3, 4)): ENLARGED,
    ("area", (3, 4)): [
        [0.0, 25.25, 101.0, 151.5, 202.0, 85.75, 47.0],
        [24.67, 66.75, 193.0, 191.83, 190.67, 124.92, 103.0],
        [74.0, 111.58, 224.33, 214.17, 204.0, 124.75, 98.33],
        [148.0, 159.75, 195.0, 218.5, 242.0, 85.25, 33.0],
    ],
}


@pytest.mark.parametrize(("by", "source"), PEERS)
def test_pytorch_and_opencv_differ_by_the_rounding_alone(by, source):
    expected = np.array(PEERS[by, source])
    difference = resample(formula(*source), expected.shape, by)[..., 0] - expected
    assert np.abs(difference).max() <= 0.5 + 0.01  # the literals have two digits


@pytest.mark.parametrize(("source", "size"), [((97, 131), (24, 40)), ((300, 171), (96, 128)), ((24, 40), (97, 131))])
def test_pillow_in_floats_differs_by_the_rounding_alone(source, size):
    image = picture(*source)
    channels = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    floats = np.stack([np.asarray(c.resize(size[::-1], Image.Resampling.BILINEAR)) for c in channels], axis=-1)
    assert np.abs(resample(image, size, "bilinear-antialias") - floats).max() <= 0.5001


def test_pillow_in_bytes_rounds_twice():
    image = picture(300, 171)
    bytes_HWC = np.asarray(Image.fromarray(image).resize((128, 96), Image.Resampling.BILINEAR)).astype(int)
    differences = np.abs(resample(image, (96, 128), "bilinear-antialias") - bytes_HWC)
    assert differences.max() == 1 and 0.02 < differences.mean() < 0.3


# --- sizes of real frames ---


def dense(by, n_in, n_out):
    """The weights of `naive_axis` in float64."""
    i, j, scale = np.arange(n_out)[:, None], np.arange(n_in), n_in / n_out
    if by == "area":
        weights = np.minimum((i + 1) * scale, j + 1) - np.maximum(i * scale, j)
    else:
        weights = 1 - np.abs(j + 0.5 - (i + 0.5) * scale) / (max(scale, 1) if by == "bilinear-antialias" else 1)
    weights = np.maximum(weights, 0)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("by", FILTERS)
@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((360, 480), (96, 128)),  # float32 is enough
        ((359, 479), (97, 131)),  # nothing divides these
        ((3, 16_001), (2, 127)),  # weights of more than 21 bits
    ],
)
def test_large_frames_agree_with_float64(by, source, size):
    image = picture(*source)
    rows, columns = (dense(by, *sides) for sides in zip(source, size, strict=True))
    means = np.stack([rows @ image[..., c].astype(np.float64) @ columns.T for c in range(3)], axis=-1)
    assert np.abs(resample(image, size, by) - means).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(
    ("by", "sum_of_bytes"),
    [("bilinear", 1_628_281_556), ("bilinear-antialias", 3_316_107_087), ("area", 4_266_187_296)],
)
def test_every_machine_and_version_gives_these_bytes(by, sum_of_bytes):
    sizes = ((96, 128), (97, 131), (160, 240))
    frame = formula(359, 481).repeat(3, axis=2)
    assert zlib.crc32(b"".join(resample(frame, size, by).tobytes() for size in sizes)) == sum_of_bytes


# --- pictures of every so many pixels ---


@pytest.mark.parametrize("step", [2, 4, 8])
@pytest.mark.parametrize(
    ("frame_size", "size"), [((90, 61), (9, 6)), ((90, 64), (12, 8)), ((72, 17), (9, 3)), ((8, 9), (3, 5))]
)
def test_a_sample_stands_for_several_pixels_and_the_last_for_what_is_left(frame_size, size, step):
    samples = picture(*(-(-side // step) for side in frame_size))
    frame = samples.repeat(step, axis=0).repeat(step, axis=1)[: frame_size[0], : frame_size[1]]
    np.testing.assert_array_equal(
        resample(samples, size, "area", frame_size=frame_size, step=step), resample(frame, size, "area")
    )


def test_the_size_that_is_there_comes_back_itself():
    image = picture(5, 7)
    assert resample(image, (5, 7), "area") is image
    assert resample(image, (5, 7), "area", frame_size=(40, 56), step=8) is image
    assert resample(image, (5, 7), "area", frame_size=(33, 56), step=8) is not image

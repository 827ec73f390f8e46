"""The compiled network against naive NumPy and plain TensorFlow; a frame's labels depend on nothing but the frame."""

from __future__ import annotations

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from unet_ray.classes import ClassSet, SegmentationClass
from unet_ray.model.architecture import ModelConfig
from unet_ray.model.bundle import Bundle
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.labeler import Labeler
from unet_ray.model.labels import Labels, _count, interpolation, label_scanned
from unet_ray.model.tiling import Tiling, choose_tiling
from unet_ray.model.unet import build_unet, named_weights

K = 5
N_THREADS = len(os.sched_getaffinity(0))  # what TensorFlow takes where nobody tells it
CLASSES = ClassSet(
    name="five", classes=tuple(SegmentationClass(name=f"c{i}", color=(i, 2 * i, 7), values=(i,)) for i in range(K))
)
CONFIG = ModelConfig(image_height_px=24, image_width_px=32, n_classes=K, n_filters=4, depth=2)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    model = build_unet(CONFIG, seed=3)
    weights = {name: 3 * weight for name, weight in named_weights(model).items()}  # so that classes win and lose
    return Bundle(uri="x", model_config=CONFIG, class_set=CLASSES, metrics={}, weights=weights, digest="0" * 64)


def frames(n: int, height_px: int = 24, width_px: int = 32) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, height_px, width_px, 3), np.uint8)


def naive(logits_HWK: np.ndarray):
    """Mask, pixels, mean confidences and low margins by sorting the softmax of each pixel in float64."""
    logits = logits_HWK.astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    ordered = np.sort(p, -1)
    mask, best = p.argmax(-1), ordered[..., -1]
    pixels = np.array([(mask == k).sum() for k in range(K)])
    confidence_K = np.array([best[mask == k].mean() if (mask == k).any() else np.nan for k in range(K)])
    return mask, pixels, confidence_K, best.mean(), (best - ordered[..., -2] <= 0.2).mean()


def assert_equals_naive(labels: Labels, index: int, logits_HWK: np.ndarray) -> None:
    mask, pixels, confidence_K, confidence, low = naive(logits_HWK)
    actual = labels.masks[index]
    assert actual.dtype == np.uint8 and actual.shape == mask.shape
    np.testing.assert_array_equal(actual, mask)
    np.testing.assert_array_equal(labels.pixels_NK[index], pixels)
    np.testing.assert_allclose(labels.confidence_NK[index], confidence_K, rtol=1e-5)
    np.testing.assert_allclose(labels.confidence_N[index], confidence, rtol=1e-5)
    np.testing.assert_allclose(labels.low_margin_share_N[index], low, atol=2 / mask.size)


@pytest.mark.parametrize("run_px", [1, 7, 24 * 32])
def test_pixels_and_confidences_of_classes_are_counted_by_runs_to_the_same_bit(run_px):
    random = np.random.default_rng(run_px)
    mask = np.repeat(random.integers(0, K, -(-24 * 32 // run_px)), run_px)[: 24 * 32].reshape(24, 32).astype(np.uint8)
    confidence = random.uniform(1 / K, 1, (24, 32)).astype(np.float32)
    labels = _count(mask, confidence, 5, K)
    pixels = np.bincount(mask.ravel(), minlength=K)
    sums = np.bincount(mask.ravel(), confidence.ravel().astype(np.float64), K)
    np.testing.assert_array_equal(labels.pixels_NK, [pixels])
    means = np.where(pixels, sums / np.maximum(pixels, 1), np.nan).astype(np.float32)
    np.testing.assert_array_equal(labels.confidence_NK, [means])


def assert_same(one: Labels, index: int, other: Labels, other_index: int) -> None:
    """Bit for bit."""
    np.testing.assert_array_equal(one.masks[index], other.masks[other_index])
    for name in ("pixels_NK", "confidence_NK", "confidence_N", "low_margin_share_N"):
        assert getattr(one, name)[index].tobytes() == getattr(other, name)[other_index].tobytes(), name


def test_model_size_equals_naive(bundle: Bundle) -> None:
    images = frames(7)
    labels = Labeler(bundle, LabelOptions(precision="float32", batch_size=4, mask_size="model")).label(
        images, [(50, 70)] * 7
    )
    logits = bundle.build_model()(images, training=False).numpy()
    assert [mask.shape for mask in labels.masks] == [(24, 32)] * 7
    for index in range(7):
        assert_equals_naive(labels, index, logits[index])


@pytest.mark.parametrize("size", [(50, 70), (24, 32), (17, 65), (130, 20), (1, 1)])
def test_native_size_equals_resized_logits(bundle: Bundle, size: tuple[int, int]) -> None:
    images = frames(2)
    labels = Labeler(bundle, LabelOptions(precision="float32", batch_size=2)).label(images, [size] * 2)
    logits = tf.image.resize(bundle.build_model()(images, training=False), size, "bilinear").numpy()
    for index in range(2):
        assert_equals_naive(labels, index, logits[index])


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_flip_is_the_mean_with_the_mirrored_frames_logits(bundle: Bundle, device: str) -> None:
    images, network = frames(3), bundle.build_model()
    labeler = Labeler(bundle, LabelOptions(precision="float32", batch_size=4, tta="flip", device=device))
    labels = labeler.label(images, [(50, 70)] * 3)
    logits = (network(images).numpy() + network(images[:, :, ::-1]).numpy()[:, :, ::-1]) / 2
    for index, resized in enumerate(tf.image.resize(logits, (50, 70), "bilinear").numpy()):
        assert_equals_naive(labels, index, resized)


def test_flip_labels_a_mirrored_frame_with_the_mirrored_mask(bundle: Bundle) -> None:
    images = frames(2)
    images[1] = images[0, :, ::-1]
    masks = Labeler(bundle, LabelOptions(precision="float32", batch_size=2, tta="flip", mask_size="model")).label(
        images, [(24, 32)] * 2
    )
    np.testing.assert_array_equal(masks.masks[1], masks.masks[0][:, ::-1])


def test_native_sizes_may_differ_in_a_batch(bundle: Bundle) -> None:
    images, sizes = frames(3), [(48, 66), (33, 31), (48, 66)]
    labeler = Labeler(bundle, LabelOptions(precision="float32", batch_size=4))
    together = labeler.label(images, sizes)
    assert [mask.shape for mask in together.masks] == sizes
    for index in range(3):
        assert_same(together, index, labeler.label(images[index : index + 1], sizes[index : index + 1]), 0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask_size", ["native", "model"])
def test_neighbours_place_and_batch_change_no_bit(bundle: Bundle, precision: str, mask_size: str) -> None:
    images, size = frames(9), (40, 52)
    one = Labeler(
        bundle, LabelOptions(precision=precision, batch_size=4, mask_size=mask_size, n_threads=N_THREADS)
    ).label(images, [size] * 9)
    order = np.random.default_rng(1).permutation(9)
    other = Labeler(bundle, LabelOptions(precision=precision, batch_size=8, mask_size=mask_size, n_threads=N_THREADS))
    shuffled = other.label(images[order], [size] * 9)
    for position, index in enumerate(order):
        assert_same(one, index, shuffled, position)
        assert_same(one, index, other.label(images[index : index + 1], [size]), 0)


THREADS = """
import hashlib, sys
import numpy as np
from unet_ray.model import devices
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.labeler import Labeler
from unet_ray.model.bundle import Bundle
from unet_ray.config import ModelConfig
from unet_ray.model.unet import weight_shapes
n_threads, batch_size = int(sys.argv[1]), int(sys.argv[2])
devices.configure_tensorflow("cpu", n_threads, op_threads=1, reproducible=True)
config = ModelConfig(image_height_px=96, image_width_px=128, n_classes=12, n_filters=32)
random = np.random.default_rng(5)
weights = {n: random.normal(0, 0.05, s).astype(np.float32) for n, s in weight_shapes(config).items()}
bundle = Bundle(uri="", model_config=config, class_set=None, metrics={}, weights=weights, digest="")
images = random.integers(0, 256, (7, 96, 128, 3), np.uint8)
for precision in ("float32", "bfloat16", "float16"):
    labeler = Labeler(bundle, LabelOptions(precision=precision, batch_size=batch_size, n_threads=n_threads))
    labels = labeler.label(images, [(50, 170)] * 7)
    data = [*labels.masks, labels.confidence_NK, labels.confidence_N, labels.low_margin_share_N]
    print(hashlib.sha256(b"".join(array.tobytes() for array in data)).hexdigest())
"""


@pytest.mark.timeout(300)
def test_threads_and_batch_size_change_no_bit() -> None:
    """With threads in an operation instead of in the batch, 2 differ from 1: bfloat16 on AVX-512, float32 on AVX2."""
    runs = [("1", "4"), ("2", "3"), ("4", "4")]  # batches of 4, 2 and 1 in each thread
    outputs = [
        subprocess.run([sys.executable, "-c", THREADS, *arguments], capture_output=True, text=True, check=True).stdout
        for arguments in runs
    ]
    assert len(outputs[0].splitlines()) == 3 and len(set(outputs)) == 1


def test_float16_and_bfloat16_mostly_agree_with_float32(bundle: Bundle) -> None:
    images, sizes = frames(4), [(24, 32)] * 4
    masks = {
        precision: np.stack(Labeler(bundle, LabelOptions(precision=precision, batch_size=4)).label(images, sizes).masks)
        for precision in ("float32", "bfloat16", "float16")
    }
    assert (masks["float32"] == masks["float16"]).mean() > 0.99
    assert 0.9 < (masks["float32"] == masks["bfloat16"]).mean() < 1


def test_fused_equals_scanned(bundle: Bundle) -> None:
    """The code for GPUs, compiled for this CPU, against the code for CPUs."""
    images, sizes = frames(5), [(50, 70), (33, 31), (50, 70), (50, 70), (33, 31)]
    scanned = Labeler(bundle, LabelOptions(precision="float32", batch_size=4)).label(images, sizes)
    fused = Labeler(bundle, LabelOptions(precision="float32", batch_size=4, device="gpu")).label(images, sizes)
    for index in range(5):
        assert (scanned.masks[index] != fused.masks[index]).mean() < 0.001
        np.testing.assert_allclose(fused.pixels_NK[index], scanned.pixels_NK[index], atol=3)
    assert (fused.pixels_NK.sum(1) == [height * width for height, width in sizes]).all()
    np.testing.assert_allclose(fused.confidence_N, scanned.confidence_N, rtol=1e-3)
    np.testing.assert_allclose(fused.confidence_NK, scanned.confidence_NK, rtol=1e-2)
    np.testing.assert_allclose(fused.low_margin_share_N, scanned.low_margin_share_N, atol=2e-3)


def test_ties_go_to_the_first_class_and_are_low_margins() -> None:
    logits = np.zeros((24, 32, K), np.float32)
    labels = label_scanned(tf.constant(logits), (24, 32))
    assert (labels.masks[0] == 0).all()
    np.testing.assert_allclose(labels.confidence_N, [1 / K], rtol=1e-6)
    np.testing.assert_array_equal(labels.low_margin_share_N, [1.0])
    np.testing.assert_array_equal(np.isnan(labels.confidence_NK[0]), [False, True, True, True, True])


@pytest.mark.parametrize(("in_px", "out_px"), [(24, 50), (32, 32), (96, 480), (7, 3), (128, 1920), (96, 1080), (5, 1)])
def test_interpolation_equals_tensorflow(in_px: int, out_px: int) -> None:
    lower, upper, weight = interpolation(in_px, out_px)
    line = np.random.default_rng(0).normal(size=in_px).astype(np.float32)
    expected = tf.image.resize(line[None, :, None, None], (out_px, 1), "bilinear").numpy().ravel()
    np.testing.assert_allclose(line[lower] + (line[upper] - line[lower]) * weight, expected, rtol=0, atol=1e-6)


def test_tiled_equals_naive_blend(bundle: Bundle) -> None:
    tiling = Tiling(window=(16, 24), stride=(10, 14))
    images = [frames(1, 37, 55)[0], frames(2, 16, 24)[0], frames(3, 11, 60)[0]]
    labels = Labeler(bundle, LabelOptions(precision="float32", batch_size=4, tiling=tiling)).label(
        images, [i.shape[:2] for i in images]
    )
    model = build_unet(ModelConfig(image_height_px=16, image_width_px=24, n_classes=K, n_filters=4, depth=2))
    for weight, variable in zip(bundle.weights.values(), model.trainable_variables, strict=True):
        variable.assign(weight)
    for index, image in enumerate(images):
        padded = np.pad(image, ((0, max(0, 16 - image.shape[0])), (0, 0), (0, 0)), mode="edge")
        assert_equals_naive(labels, index, naive_blend(model, padded)[: image.shape[0]])


def naive_blend(model: keras.Model, image_HWC: np.ndarray) -> np.ndarray:
    height_px, width_px = image_HWC.shape[:2]
    total, weights = np.zeros((height_px, width_px, K)), np.zeros((height_px, width_px, 1))
    fall = [np.minimum(np.arange(n) + 1, n - np.arange(n)) for n in (16, 24)]
    weight_hw1 = (fall[0][:, None] * fall[1][None]).astype(float)[..., None]
    for y in sorted({*range(0, height_px - 16, 10), height_px - 16}):
        for x in sorted({*range(0, width_px - 24, 14), width_px - 24}):
            window = image_HWC[None, y : y + 16, x : x + 24]
            total[y : y + 16, x : x + 24] += model(window, training=False).numpy()[0] * weight_hw1
            weights[y : y + 16, x : x + 24] += weight_hw1
    return total / weights


def test_tiling_corners_cover_the_frame() -> None:
    corners = Tiling(window=(16, 24), stride=(10, 14)).corners(37, 24)
    assert corners == [(0, 0), (10, 0), (20, 0), (21, 0)]


def test_choose_tiling() -> None:
    assert choose_tiling("whole", None, None, CONFIG) is None
    assert choose_tiling("slide", None, None, CONFIG) == Tiling(window=(24, 32), stride=(12, 16))
    assert choose_tiling("slide", (10, 14), (3, 14), CONFIG) == Tiling(window=(10, 14), stride=(3, 14))
    with pytest.raises(ValueError) as caught:
        choose_tiling("slide", (10, 15), None, CONFIG)
    assert str(caught.value) == "--window is 10 15; for this network both must be multiples of 2"
    with pytest.raises(ValueError) as caught:
        choose_tiling("whole", (10, 14), None, CONFIG)
    assert str(caught.value) == "--window and --stride are for --inference slide; give that too, or leave them out"


def test_tiling_refuses_gaps() -> None:
    with pytest.raises(ValueError) as caught:
        Tiling(window=(16, 24), stride=(10, 25))
    assert str(caught.value) == (
        "--stride is 25 px in width for a window of 24; it must be 1 to 24, or pixels between the windows get no label"
    )

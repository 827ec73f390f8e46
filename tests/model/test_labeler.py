"""The compiled network against naive NumPy and plain TensorFlow; a frame's labels depend on nothing but the frame."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from unet_ray.classes import ClassSet, SegmentationClass
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.bundle import Bundle
from unet_ray.model.gpu_labels import GpuLabeler
from unet_ray.model.grid import LOW_MARGIN, read_grid
from unet_ray.model.interpolation import interpolation
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.labeler import Labeler
from unet_ray.model.labels import Labels, label_frames
from unet_ray.model.tiling import Tiling, choose_tiling
from unet_ray.model.unet import build_unet
from unet_ray.model.weights import named_weights
from unet_ray.pixels.preprocessing import Preprocessing

K = 5
SLOW = pytest.mark.slow
N_THREADS = len(os.sched_getaffinity(0))  # what TensorFlow takes where nobody tells it
CLASSES = ClassSet(
    name="five", classes=tuple(SegmentationClass(name=f"c{i}", color=(i, 2 * i, 7), values=(i,)) for i in range(K))
)
TILING = Tiling(window=(16, 24), stride=(10, 14))
CONFIG = UnetConfig(image_height_px=24, image_width_px=32, n_classes=K, n_filters=4, depth=2)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    model = build_unet(CONFIG, seed=3)
    weights = {name: 3 * weight for name, weight in named_weights(model).items()}  # so that classes win and lose
    return Bundle(uri="x", model_config=CONFIG, class_set=CLASSES, metrics={}, weights=weights, digest="0" * 64)


def frames(n: int, height_px: int = 24, width_px: int = 32) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, height_px, width_px, 3), np.uint8)


def naive(mask_HW: np.ndarray, grid_hwK: np.ndarray, temperature: float = 1.0):
    """Pixels, mean confidences, low margins: pixel by pixel, of the nearest logit's softmax in float64."""
    (height_px, width_px), (h, w) = mask_HW.shape, grid_hwK.shape[:2]
    logits = grid_hwK.astype(np.float64) / temperature
    p = np.exp(logits - logits.max(-1, keepdims=True))
    ordered = np.sort(p / p.sum(-1, keepdims=True), -1)
    pixels, sums, low = np.zeros(K, np.int64), np.zeros(K), 0
    for y in range(height_px):
        for x in range(width_px):
            *_, second, best = ordered[(2 * y + 1) * h // (2 * height_px), (2 * x + 1) * w // (2 * width_px)]
            pixels[mask_HW[y, x]] += 1
            sums[mask_HW[y, x]] += best
            low += best - second <= LOW_MARGIN
    means = np.where(pixels, sums / np.maximum(pixels, 1), np.nan)
    return pixels, means, sums.sum() / mask_HW.size, low / mask_HW.size


def assert_equals_naive(
    labels: Labels, index: int, logits_HWK: np.ndarray, grid_hwK: np.ndarray, temperature: float = 1.0
) -> None:
    """The mask is that of logits of its size; the rest is that of the network's grid."""
    mask = labels.masks[index]
    assert mask.dtype == np.uint8 and mask.shape == logits_HWK.shape[:2]
    np.testing.assert_array_equal(mask, logits_HWK.argmax(-1))
    np.testing.assert_array_equal(labels.grids[index], grid_hwK.argmax(-1))
    assert labels.grids[index].dtype == np.uint8
    pixels, confidence_K, confidence, low = naive(mask, grid_hwK, temperature)
    np.testing.assert_array_equal(labels.pixels_NK[index], pixels)
    np.testing.assert_allclose(labels.confidence_NK[index], confidence_K, rtol=1e-5)
    np.testing.assert_allclose(labels.confidence_N[index], confidence, rtol=1e-5)
    np.testing.assert_allclose(labels.low_margin_share_N[index], low, atol=1e-6)


@pytest.mark.parametrize("run_px", [1, 7, 24 * 32])
def test_pixels_and_confidences_of_classes_are_counted_by_runs_to_the_same_bit(run_px):
    random = np.random.default_rng(run_px)
    ids = np.repeat(random.integers(0, K, -(-24 * 32 // run_px)), run_px)[: 24 * 32].reshape(24, 32)
    logits = random.uniform(0, 1, (24, 32, K)).astype(np.float32) + 2 * np.eye(K, dtype=np.float32)[ids]
    labels = label_frames(logits[None], [(24, 32)])
    units = read_grid(logits[None], 1.0).units[0]
    pixels = np.bincount(ids.ravel(), minlength=K)
    sums = np.array([sum(int(unit) for unit in units[ids == k]) for k in range(K)])
    np.testing.assert_array_equal(labels.pixels_NK, [pixels])
    means = np.where(pixels, sums / 2**24 / np.maximum(pixels, 1), np.nan).astype(np.float32)
    np.testing.assert_array_equal(labels.confidence_NK, [means])


def assert_same(one: Labels, index: int, other: Labels, other_index: int) -> None:
    """Bit for bit."""
    np.testing.assert_array_equal(one.masks[index], other.masks[other_index])
    np.testing.assert_array_equal(one.grids[index], other.grids[other_index])
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
        assert_equals_naive(labels, index, logits[index], logits[index])


@pytest.mark.parametrize("size", [(50, 70), (24, 32), (17, 65), (130, 20), (1, 1)])
def test_native_size_equals_resized_logits(bundle: Bundle, size: tuple[int, int]) -> None:
    images = frames(2)
    labels = Labeler(bundle, LabelOptions(precision="float32", batch_size=2)).label(images, [size] * 2)
    grids = bundle.build_model()(images, training=False).numpy()
    logits = tf.image.resize(grids, size, "bilinear").numpy()
    for index in range(2):
        assert_equals_naive(labels, index, logits[index], grids[index])


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("mask_size", ["native", "model"])
def test_a_frame_that_keeps_its_aspect_ratio_is_labelled_without_what_was_added(bundle, device, mask_size) -> None:
    padded = Preprocessing(fit="pad")
    kept = dataclasses.replace(bundle, model_config=dataclasses.replace(CONFIG, preprocessing=padded))
    sizes = [(50, 70), (24, 32), (60, 20), (12, 64)]
    parts = [(23, 32), (24, 32), (24, 8), (6, 32)]
    options = LabelOptions(precision="float32", batch_size=4, mask_size=mask_size, device=device)
    images = frames(4)
    labels = Labeler(kept, options).label(images, sizes)
    logits = bundle.build_model()(images, training=False).numpy()
    for index, (size, (height_px, width_px)) in enumerate(zip(sizes, parts, strict=True)):
        part = logits[index, :height_px, :width_px]
        resized = tf.image.resize(part, size if mask_size == "native" else (height_px, width_px)).numpy()
        assert_equals_naive(labels, index, resized, part)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_flip_is_the_mean_with_the_mirrored_frames_logits(bundle: Bundle, device: str) -> None:
    images, network = frames(3), bundle.build_model()
    labeler = Labeler(bundle, LabelOptions(precision="float32", batch_size=4, tta="flip", device=device))
    labels = labeler.label(images, [(50, 70)] * 3)
    logits = (network(images).numpy() + network(images[:, :, ::-1]).numpy()[:, :, ::-1]) / 2
    for index, resized in enumerate(tf.image.resize(logits, (50, 70), "bilinear").numpy()):
        assert_equals_naive(labels, index, resized, logits[index])


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
from unet_ray.model.gpu_labels import GpuLabeler
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.labeler import Labeler
from unet_ray.model.bundle import Bundle
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.weights import weight_shapes
n_threads, batch_size = int(sys.argv[1]), int(sys.argv[2])
devices.configure_tensorflow("cpu", n_threads, op_threads=1, reproducible=True)
config = UnetConfig(image_height_px=96, image_width_px=128, n_classes=12, n_filters=32)
random = np.random.default_rng(5)
weights = {n: random.normal(0, 0.05, s).astype(np.float32) for n, s in weight_shapes(config).items()}
bundle = Bundle(uri="", model_config=config, class_set=None, metrics={}, weights=weights, digest="")
images = random.integers(0, 256, (7, 96, 128, 3), np.uint8)
for precision in ("float32", "bfloat16", "float16"):
    labeler = Labeler(bundle, LabelOptions(precision=precision, batch_size=batch_size, n_threads=n_threads))
    labels = labeler.label(images, [(50, 170)] * 7)
    data = [*labels.masks, *labels.grids, labels.confidence_NK, labels.confidence_N, labels.low_margin_share_N]
    print(hashlib.sha256(b"".join(array.tobytes() for array in data)).hexdigest())
"""


@pytest.mark.timeout(300)
def test_threads_and_batch_size_change_no_bit() -> None:
    """With threads in an operation instead of in the batch, 2 differ from 1: bfloat16 on AVX-512, float32 on AVX2."""
    runs = [("1", "4"), ("2", "3")]  # batches of 4, and of 2 and 1 in each of two threads
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


def gpu_labeler(bundle: Bundle, **options) -> GpuLabeler:
    """The code for GPUs, compiled for this CPU."""
    gpu = Labeler(bundle, LabelOptions(**{"precision": "float32", "batch_size": 4, "device": "gpu"} | options)).gpu
    assert gpu
    return gpu


SIZES = [(50, 70), (33, 65), (64, 128), (50, 70), (1, 100), (33, 30), (64, 64), (12, 1), (60, 127)]
"""Eight sizes in two steps of 64 px."""


@pytest.mark.parametrize("xla", [True, False])
def test_one_compiled_function_labels_all_sizes_of_a_step_as_a_cpu_does(bundle: Bundle, xla: bool) -> None:
    images = frames(len(SIZES))
    scanned = Labeler(bundle, LabelOptions(precision="float32", batch_size=4)).label(images, SIZES)
    gpu = gpu_labeler(bundle, xla=xla)
    fused = gpu.label(images, SIZES)
    assert gpu.label_logits.experimental_get_tracing_count() == 2
    for index, (height_px, width_px) in enumerate(SIZES):
        assert (scanned.masks[index] != fused.masks[index]).mean() < 0.001
        np.testing.assert_allclose(fused.pixels_NK[index], scanned.pixels_NK[index], atol=3)
        assert fused.pixels_NK[index].sum() == height_px * width_px
    np.testing.assert_allclose(fused.confidence_N, scanned.confidence_N, rtol=1e-3)
    np.testing.assert_allclose(fused.confidence_NK, scanned.confidence_NK, rtol=1e-2)
    np.testing.assert_allclose(fused.low_margin_share_N, scanned.low_margin_share_N, atol=2e-3)


def test_windows_of_frames_of_one_step_are_blended_by_one_compiled_function(bundle: Bundle) -> None:
    gpu = gpu_labeler(bundle, tiling=TILING, xla=False)
    images = [frames(index, height_px, width_px)[0] for index, (height_px, width_px) in enumerate(SIZES, start=1)]
    gpu.label(images, SIZES)
    assert gpu._compiled.blend.experimental_get_tracing_count() == 2


@pytest.mark.parametrize(
    ("xla", "tiling"), [(False, None), (False, TILING), *(pytest.param(True, t, marks=SLOW) for t in (None, TILING))]
)
def test_a_batchs_size_changes_no_bit_on_the_way_of_gpus(bundle: Bundle, xla: bool, tiling: Tiling | None) -> None:
    images = frames(9, *((40, 52) if tiling else (24, 32)))
    gpus = [gpu_labeler(bundle, batch_size=size, tiling=tiling, xla=xla) for size in (1, 4, 9)]
    labels = [gpu.label(images, [(40, 52)] * 9) for gpu in gpus]
    for index in range(9):
        assert_same(labels[0], index, labels[1], index)
        assert_same(labels[0], index, labels[2], index)


def made(kind: type[GpuLabeler], bundle: Bundle, batch_size: int) -> GpuLabeler:
    options = LabelOptions(precision="float32", batch_size=batch_size, device="gpu", xla=False)
    model = bundle.build_model()
    return kind(lambda images: model(images, training=False), (24, 32), K, options)


def test_a_batch_is_on_its_way_before_the_one_before_it_is_read(bundle: Bundle) -> None:
    events: list[tuple[str, int]] = []
    submitted = [threading.Event() for _ in range(4)]

    class Watched(GpuLabeler):
        """Reads a batch back when the next one has been submitted: none is to wait for the one before it."""

        def submit(self, compiled, images, sizes, extents):
            batch = sum(event == "submit" for event, _ in events)
            events.append(("submit", batch))
            submitted[batch].set()
            return batch, super().submit(compiled, images, sizes, extents)

        def read(self, pending):
            batch, arrays = pending
            assert submitted[min(batch + 1, 3)].wait(60)
            events.append(("read", batch))
            return super().read(arrays)

    images = frames(14)
    labels = made(Watched, bundle, 4).label(images, [(24, 32)] * 14)
    expected = gpu_labeler(bundle, xla=False).label(images, [(24, 32)] * 14)
    for index in range(14):
        assert_same(labels, index, expected, index)
    for batch in range(4):
        before = {number for event, number in events[: events.index(("submit", batch))] if event == "read"}
        assert before == set(range(batch - 1)), "no more than two batches are in memory"


def test_a_batch_that_does_not_fit_is_halved_once(bundle: Bundle) -> None:
    class Small(GpuLabeler):
        """Has memory for so many frames."""

        room = 4

        def submit(self, compiled, images, sizes, extents):
            if compiled.batch_size > self.room:
                raise tf.errors.ResourceExhaustedError(None, None, "failed to allocate 9.1GiB")
            return super().submit(compiled, images, sizes, extents)

    small, whole = made(Small, bundle, 9), made(GpuLabeler, bundle, 9)
    labels, expected = (gpu.label(frames(9), [(50, 70)] * 9) for gpu in (small, whole))
    for index in range(9):
        assert_same(labels, index, expected, index)
    assert whole.note is None and small.note == (
        f"a batch of 9 frames does not fit a GPU of node {socket.gethostname()}; there it is 4 from now on "
        "(--batch-size)"
    )
    small.room = 3
    with pytest.raises(tf.errors.ResourceExhaustedError):
        small.label(frames(9), [(50, 70)] * 9)


def test_ties_go_to_the_first_class_and_are_low_margins() -> None:
    logits = np.zeros((24, 32, K), np.float32)
    labels = label_frames(logits[None], [(24, 32)])
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


@pytest.mark.parametrize("how", [{}, pytest.param({"device": "gpu"}, marks=SLOW), {"device": "gpu", "xla": False}])
def test_tiled_equals_naive_blend(bundle: Bundle, how: dict) -> None:
    images = [frames(1, 37, 55)[0], frames(2, 16, 24)[0], frames(3, 11, 60)[0]]
    labels = Labeler(bundle, LabelOptions(precision="float32", batch_size=4, tiling=TILING, **how)).label(
        images, [i.shape[:2] for i in images]
    )
    model = build_unet(UnetConfig(image_height_px=16, image_width_px=24, n_classes=K, n_filters=4, depth=2))
    for weight, variable in zip(bundle.weights.values(), model.trainable_variables, strict=True):
        variable.assign(weight)
    for index, image in enumerate(images):
        padded = np.pad(image, ((0, max(0, 16 - image.shape[0])), (0, 0), (0, 0)), mode="edge")
        blend = naive_blend(model, padded)[: image.shape[0]]
        assert_equals_naive(labels, index, blend, blend)


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
        choose_tiling("slide", (10, 0), None, CONFIG)
    assert str(caught.value) == "--window is 10 0; both must be 1 to 8192"
    with pytest.raises(ValueError) as caught:
        choose_tiling("whole", (10, 14), None, CONFIG)
    assert str(caught.value) == "--window and --stride are for --inference slide; give that too, or leave them out"


def test_tiling_refuses_gaps() -> None:
    with pytest.raises(ValueError) as caught:
        Tiling(window=(16, 24), stride=(10, 25))
    assert str(caught.value) == (
        "--stride is 25 px in width for a window of 24; it must be 1 to 24, or pixels between the windows get no label"
    )

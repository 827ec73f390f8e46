"""What only a real GPU can show of labelling: `pytest -m gpu -n 0`. On a machine without one it is skipped.

Each part runs in a process of its own, as an actor is one: TensorFlow takes its options once.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from unet_ray.model import devices, xla_check

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]  # the first start compiles CUDA's kernels

PROGRAM = """
import hashlib, json, sys, time
import numpy as np
from unet_ray.model import devices
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.tiling import Tiling
options = json.loads(sys.argv[1])
processes = options.get("processes_per_gpu", 1)
devices.configure_tensorflow("gpu", 1, op_threads=1, reproducible=True, processes_per_gpu=processes)
import tensorflow as tf
from unet_ray.model.bundle import Bundle
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.labeler import Labeler
from unet_ray.model.weights import weight_shapes
config = UnetConfig(image_height_px=96, image_width_px=128, n_classes=12, n_filters=32)
random = np.random.default_rng(5)
weights = {n: random.normal(0, 0.05, s).astype(np.float32) for n, s in weight_shapes(config).items()}
bundle = Bundle(uri="", model_config=config, class_set=None, metrics={}, weights=weights, digest="")
n_frames = options.pop("n_frames", 40)
slide = options.pop("slide", False)
tiling = Tiling(window=(96, 128), stride=(48, 64)) if slide else None
side = (200, 300) if slide else (96, 128)
images = np.random.default_rng(6).integers(0, 256, (n_frames, *side, 3), np.uint8)
sizes = [(200 + index % 8, 300 + 7 * (index % 8)) for index in range(n_frames)] if not slide else [side] * n_frames
labeler = Labeler(bundle, LabelOptions(**{"precision": "float32", "device": "gpu", "tiling": tiling, **options}))
labeler.warm_up()
labels = labeler.label(images, sizes)
started = time.perf_counter()
labels = labeler.label(images, sizes)
seconds = time.perf_counter() - started
data = [*labels.masks, *labels.grids, labels.confidence_NK, labels.confidence_N, labels.low_margin_share_N]
print(json.dumps({
    "digest": hashlib.sha256(b"".join(array.tobytes() for array in data)).hexdigest(),
    "places": [gpu.device_type for gpu in tf.config.list_logical_devices()],
    "traces": labeler.gpu.label_logits.experimental_get_tracing_count(),
    "note": labeler.note,
    "frames_per_s": n_frames / seconds,
    "peak_mb": tf.config.experimental.get_memory_info("GPU:0")["peak"] >> 20,
    "gpu_mb": devices._gpu_memory_mb(0),
}))
"""


@pytest.fixture(autouse=True, scope="module")
def gpu() -> None:
    program = "from unet_ray.model import devices; print(len(devices.visible_gpus()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    if done.stdout.strip() == "0":
        pytest.skip("TensorFlow sees no GPU on this machine")


def label(**options) -> dict:
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(options)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(options, {name: result[name] for name in ("frames_per_s", "peak_mb", "note")})
    return result


def test_xla_works_here_or_what_fails_is_one_line() -> None:
    problem = xla_check.xla_problem()
    print("XLA:", problem or "works")
    assert problem is None or "\n" not in problem


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("slide", [False, True])
def test_a_frames_bytes_are_the_same_in_every_run_and_with_every_batch(precision: str, slide: bool) -> None:
    xla = xla_check.xla_problem() is None
    results = [
        label(precision=precision, slide=slide, xla=xla, batch_size=batch_size, n_frames=5 if slide else 40)
        for batch_size in (32, 32, 16, 64)
    ]
    assert "GPU" in results[0]["places"]
    assert results[0]["digest"] == results[1]["digest"], "two runs differ"
    assert len({result["digest"] for result in results}) == 1, "batches of other sizes differ"


def test_eight_sizes_of_a_step_are_compiled_once() -> None:
    assert label(batch_size=8)["traces"] == 3  # 300 to 320 px, 321 to 349, and the first of 128


def test_processes_that_share_a_gpu_stay_within_their_part() -> None:
    result = label(batch_size=32, processes_per_gpu=2)
    assert result["peak_mb"] <= devices.memory_limit_mb(result["gpu_mb"], 2)


def test_a_batch_that_does_not_fit_is_halved() -> None:
    """In the sixteenth part of a GPU: of a batch that takes 1.3 times that, by what a smaller one took."""
    small = label(batch_size=64)
    part_mb = devices.memory_limit_mb(small["gpu_mb"], 16)
    batch_size = 2 * round(1.3 * part_mb / (small["peak_mb"] / 64) / 2)
    result = label(batch_size=batch_size, processes_per_gpu=16, n_frames=batch_size)
    assert f"a batch of {batch_size:,} frames does not fit" in result["note"]

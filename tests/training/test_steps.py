"""The train step: against plain Keras on one worker, and one worker against two (separate processes, no Ray)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from unet_ray.classes import IGNORED_ID
from unet_ray.model import devices
from unet_ray.model.architecture import ModelConfig
from unet_ray.model.unet import build_unet
from unet_ray.training import steps

CONFIG = ModelConfig(image_height_px=24, image_width_px=32, n_classes=3, n_filters=4, depth=2, dropout=0.0)

# Each process writes what it saw; void covers 0 to 95% of a frame, unevenly over the workers.
RANK_PROGRAM = """
import json, sys
import keras, numpy as np, tensorflow as tf
from unet_ray.training import steps
from unet_ray.config import ModelConfig
from unet_ray.model import devices
from unet_ray.model.unet import build_unet

rank, n_workers, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
devices.configure_tensorflow("cpu", 1, op_threads=1)
strategy = steps.start_strategy(n_workers)
rng = np.random.default_rng(3)
images = rng.integers(0, 256, (10, 16, 24, 32, 3), np.uint8)
masks = rng.integers(0, 3, (10, 16, 24, 32)).astype(np.uint8)
for frame in range(16):
    masks[:, frame, : round(24 * 0.95 * frame / 15)] = 255
part = 16 // n_workers
mine = slice(rank * part, (rank + 1) * part)
config = ModelConfig(image_height_px=24, image_width_px=32, n_classes=3, n_filters=4, depth=2, dropout=0.0)
arrays = {}
for name, loss, clip_norm, weights in [
    ("ce", "ce", 0.0, None), ("clipped", "ce", 0.05, None), ("clipped-sgd", "ce", 0.05, None),
    ("dice", "ce+dice", 0.0, (1.0, 2.0, 0.5))
]:
    model = build_unet(config, seed=7)
    # Adam takes the same step with a gradient of any length; plain descent shows what was clipped.
    optimizer = keras.optimizers.SGD(0.1) if name == "clipped-sgd" else steps.make_optimizer("adam", 1e-3, 0.0)
    step = steps.TrainStep(model, optimizer, strategy, loss=loss, class_weights_K=weights, clip_norm=clip_norm)
    seeds = steps.dropout_seeds(0, 0, rank, step.n_dropouts)
    _, gradients = step.reduced_gradients(*map(tf.constant, (images[0, mine], masks[0, mine], seeds)))
    for index, gradient in enumerate(gradients):
        arrays[f"{name}/gradient/{index}"] = gradient.numpy()
    results = [step(images[t, mine], masks[t, mine], seeds) for t in range(10)]
    arrays[f"{name}/loss"] = np.array([float(result.loss) for result in results])
    arrays[f"{name}/valid"] = np.array([float(result.valid_pixels) for result in results])
    arrays[f"{name}/correct"] = np.array([float(result.correct_pixels) for result in results])
    for variable in model.trainable_variables:
        arrays[f"{name}/weight/{variable.path}"] = variable.numpy()
add_up = steps.WorkerSum(strategy)
arrays["sum"] = add_up(np.array([2**53 + 1 + rank, rank], np.int64))
np.savez(f"{out}/{n_workers}-{rank}.npz", **arrays)
"""


def start_ranks(program: str, *arguments: object) -> list[subprocess.Popen]:
    """Starts the program as each of two workers that know of each other."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in sockets]
    for listener in sockets:
        listener.close()
    processes = []
    for rank in range(2):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        processes.append(start_rank(program, rank, 2, *arguments, TF_CONFIG=json.dumps(task)))
    return processes


def start_rank(program: str, *arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What one worker with 16 frames, and each of two with 8, found."""
    out = tmp_path_factory.mktemp("ranks")
    for process in (start_rank(RANK_PROGRAM, 0, 1, out), *start_ranks(RANK_PROGRAM, out)):
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors[-3000:]
    return {name: dict(np.load(out / f"{name}.npz")) for name in ("1-0", "2-0", "2-1")}


def relative_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["ce", "clipped", "clipped-sgd", "dice"])
def test_two_workers_with_8_frames_learn_what_one_with_16_does(ranks, name):
    one, two = ranks["1-0"], ranks["2-0"]
    np.testing.assert_allclose(one[f"{name}/loss"], two[f"{name}/loss"], rtol=1e-6)
    np.testing.assert_array_equal(one[f"{name}/valid"], two[f"{name}/valid"])
    np.testing.assert_allclose(one[f"{name}/correct"], two[f"{name}/correct"], atol=3)  # argmax of near-equal logits
    gradients = [key for key in one if key.startswith(f"{name}/gradient/")]
    weights = [key for key in one if key.startswith(f"{name}/weight/")]
    assert len(gradients) == len(weights) == 18  # a kernel and a bias of each of 9 convolutions
    assert max(relative_difference(one[key], two[key]) for key in gradients) < 1e-5
    assert max(relative_difference(one[key], two[key]) for key in weights) < 1e-4


@pytest.mark.timeout(600)
def test_both_workers_end_with_equal_weights_and_sums(ranks):
    first, second = ranks["2-0"], ranks["2-1"]
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key], err_msg=key)
    np.testing.assert_array_equal(first["sum"], [2 * (2**53 + 1) + 1, 1])  # exact, where float64 would round
    np.testing.assert_array_equal(ranks["1-0"]["sum"], [2**53 + 1, 0])


GROWTH_PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from unet_ray.training import steps
from unet_ray.config import ModelConfig
from unet_ray.model import devices
from unet_ray.model.unet import build_unet

rank, n_workers, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
devices.configure_tensorflow("cpu", 1, op_threads=1)
strategy = steps.start_strategy(n_workers)
config = ModelConfig(image_height_px=8, image_width_px=8, n_classes=3, n_filters=2, depth=2, dropout=0.0)
step = steps.TrainStep(build_unet(config, seed=7), steps.make_optimizer("adam", 1e-3, 0.0), strategy, loss="ce")
image, mask, seeds = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 8, 8), np.uint8), np.zeros((0, 2), np.int64)
own_kb = []
for number in range(1501):
    if number in (500, 1500):
        own_kb += [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon:")]
    float(step(image, mask, seeds).loss)
Path(out, f"{rank}.txt").write_text(str((own_kb[1] - own_kb[0]) / 1000))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_memory_of_two_workers_grows_by_two_kilobytes_a_step(tmp_path):
    """Which TensorFlow keeps; with timeouts of its own it would be 36 KB until the first is over."""
    for process in start_ranks(GROWTH_PROGRAM, tmp_path):
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors[-3000:]
    growth_kb = [float((tmp_path / f"{rank}.txt").read_text()) for rank in range(2)]
    print("KB a step:", growth_kb)
    assert max(growth_kb) < 4


def batch(rng, n_frames: int = 3):
    image = rng.integers(0, 256, (n_frames, 24, 32, 3), np.uint8)
    mask = rng.integers(0, 3, (n_frames, 24, 32)).astype(np.uint8)
    mask[0, :5] = IGNORED_ID
    return image, mask


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_a_step_is_what_plain_keras_does(clip_norm):
    image, mask = batch(np.random.default_rng(0))
    ours, plain = build_unet(CONFIG, seed=1), build_unet(CONFIG, seed=1)
    step = steps.TrainStep(
        ours, steps.make_optimizer("adam", 1e-2, 0.0), tf.distribute.get_strategy(), loss="ce", clip_norm=clip_norm
    )
    optimizer = keras.optimizers.Adam(1e-2, global_clipnorm=clip_norm or None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=IGNORED_ID, reduction="sum")
    for _ in range(3):
        result = step(image, mask, steps.dropout_seeds(0, 0, 0, step.n_dropouts))
        with tf.GradientTape() as tape:
            value = loss(mask.astype(np.int32), plain(image, training=True)) / np.sum(mask != IGNORED_ID)
        optimizer.apply(tape.gradient(value, plain.trainable_variables), plain.trainable_variables)
        assert float(result.loss) == pytest.approx(float(value), rel=1e-5)
        assert float(result.valid_pixels) == np.sum(mask != IGNORED_ID)
    for one, other in zip(ours.trainable_variables, plain.trainable_variables, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=2e-4)


def test_clipping_shortens_the_whole_gradient_and_keeps_its_direction():
    """By plain gradient descent: Adam would take the same step with a gradient of any length."""
    image, mask = batch(np.random.default_rng(0))
    moved = []
    for clip_norm in (0.0, 0.05):
        model = build_unet(CONFIG, seed=1)
        before = [variable.numpy() for variable in model.trainable_variables]
        sgd = keras.optimizers.SGD(1.0)
        step = steps.TrainStep(model, sgd, tf.distribute.get_strategy(), loss="ce", clip_norm=clip_norm)
        step(image, mask, no_seeds(step))
        after = [variable.numpy() for variable in model.trainable_variables]
        moved.append(np.concatenate([(b - a).ravel() for a, b in zip(after, before, strict=True)]))
    whole, clipped = moved
    length = np.linalg.norm(whole)
    assert length > 0.1 and np.linalg.norm(clipped) == pytest.approx(0.05, rel=1e-4)
    np.testing.assert_allclose(clipped, whole * 0.05 / length, atol=1e-6)


def test_padding_changes_nothing():
    image, mask = batch(np.random.default_rng(5))
    padded_image = np.concatenate([image, np.zeros_like(image)])
    padded_mask = np.concatenate([mask, np.full_like(mask, IGNORED_ID)])
    results = []
    for frames in ((image, mask), (padded_image, padded_mask)):
        step = make_step(CONFIG)
        _, gradients = step.reduced_gradients(*map(tf.constant, (*frames, no_seeds(step))))
        results.append([gradient.numpy() for gradient in gradients])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def make_step(config: ModelConfig) -> steps.TrainStep:
    model = build_unet(config, seed=1)
    return steps.TrainStep(model, steps.make_optimizer("adam", 1e-3, 0.0), tf.distribute.get_strategy(), loss="ce")


def no_seeds(step: steps.TrainStep) -> np.ndarray:
    return steps.dropout_seeds(0, 0, 0, step.n_dropouts)


def test_the_first_frames_do_not_wait_for_a_trace(monkeypatch):
    traced = []
    loss_sums = steps.losses.loss_sums
    monkeypatch.setattr(
        steps.losses, "loss_sums", lambda *args, **options: (traced.append(1), loss_sums(*args, **options))[1]
    )
    step = make_step(CONFIG)
    step.trace(3)
    assert len(traced) == 1
    step(*batch(np.random.default_rng(0)), no_seeds(step))
    assert len(traced) == 1


def test_dropout_is_a_function_of_seed_step_and_rank():
    config = ModelConfig(image_height_px=24, image_width_px=32, n_classes=3, n_filters=4, depth=2, dropout=0.5)
    image, mask = batch(np.random.default_rng(0))
    step = make_step(config)
    assert step.n_dropouts == 2

    def loss(*key: int) -> float:
        seeds = steps.dropout_seeds(*key, step.n_dropouts)
        return float(step.reduced_gradients(*map(tf.constant, (image, mask, seeds)))[0].loss)

    assert loss(0, 5, 1) == loss(0, 5, 1)
    assert len({loss(0, 5, 1), loss(1, 5, 1), loss(0, 6, 1), loss(0, 5, 0)}) == 4


def test_dropout_seeds_never_repeat_between_layers_steps_and_ranks():
    seeds = [tuple(row) for step in range(50) for rank in range(4) for row in steps.dropout_seeds(0, step, rank, 2)]
    assert len(set(seeds)) == len(seeds)
    assert steps.dropout_seeds(3, 1, 1, 0).shape == (0, 2)


def test_adamw_leaves_biases_out():
    model = build_unet(CONFIG, seed=0)
    optimizer = steps.make_optimizer("adamw", 0.1, 0.5)
    optimizer.build(model.trainable_variables)
    for variable in model.trainable_variables:
        variable.assign(tf.ones_like(variable))
    optimizer.apply([tf.zeros(variable.shape) for variable in model.trainable_variables])
    for variable in model.trainable_variables:
        expected = 1.0 if variable.path.endswith("bias") else 1 - 0.1 * 0.5
        np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-6)


def test_cosine_rises_for_the_warm_up_and_ends_at_zero():
    schedule = steps.make_schedule("cosine", 0.4, total_steps=30, warmup_steps=10)
    rates = [float(schedule(step)) for step in (0, 5, 10, 20, 30)]
    np.testing.assert_allclose(rates, [0.0, 0.2, 0.4, 0.2, 0.0], atol=1e-7)
    without = steps.make_schedule("cosine", 0.4, total_steps=20, warmup_steps=0)
    np.testing.assert_allclose([float(without(step)) for step in (0, 10, 20)], [0.4, 0.2, 0.0], atol=1e-7)
    assert steps.make_schedule("constant", 0.4, 30, 10) == 0.4


def test_state_comes_back_to_the_bit():
    image, mask = batch(np.random.default_rng(2))
    first, second = build_unet(CONFIG, seed=1), build_unet(CONFIG, seed=2)
    optimizers = [steps.make_optimizer("adam", 1e-2, 0.0) for _ in range(2)]
    step = steps.TrainStep(first, optimizers[0], tf.distribute.get_strategy(), loss="ce")
    other = steps.TrainStep(second, optimizers[1], tf.distribute.get_strategy(), loss="ce")
    for _ in range(3):
        step(image, mask, no_seeds(step))
    state = steps.state_tensors(first, optimizers[0])
    assert int(state["optimizer/adam/iteration"]) == 3
    steps.restore_state(second, optimizers[1], state)
    one, two = (float(each(image, mask, no_seeds(each)).loss) for each in (step, other))
    assert one == two
    for name, tensor in steps.state_tensors(first, optimizers[0]).items():
        np.testing.assert_array_equal(tensor, steps.state_tensors(second, optimizers[1])[name])


def test_a_mask_of_another_size_comes_from_bilinear_logits():
    predict = steps.Predictor(build_unet(CONFIG, seed=1))
    logits = np.random.default_rng(0).normal(size=(24, 32, 3)).astype(np.float32)
    mask = predict.resized_mask(tf.constant(logits), 37, 53)

    def neighbours(out: int, n_in: int, n_out: int) -> tuple[int, int, float]:
        at = min(max((out + 0.5) * n_in / n_out - 0.5, 0.0), n_in - 1.0)
        return int(at), min(int(at) + 1, n_in - 1), at - int(at)

    for y in range(37):
        for x in range(53):
            (y0, y1, fy), (x0, x1, fx) = neighbours(y, 24, 37), neighbours(x, 32, 53)
            above = logits[y0, x0] * (1 - fx) + logits[y0, x1] * fx
            below = logits[y1, x0] * (1 - fx) + logits[y1, x1] * fx
            assert mask[y, x] == np.argmax(above * (1 - fy) + below * fy)


def test_policies():
    assert devices.choose_policy("float32", "cpu") == "float32"
    assert devices.choose_policy("bfloat16", "cpu") == "mixed_bfloat16"

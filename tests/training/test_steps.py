"""The train step: against plain Keras on one worker, and one worker against two (separate processes, no Ray)."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from ranks import of_one_and_of_two, relative_difference, run_to_end, start_ranks

from unet_ray.classes import IGNORED_ID
from unet_ray.errors import UnusableNetwork
from unet_ray.model import devices, losses
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.unet import build_unet
from unet_ray.training import steps
from unet_ray.training.evaluator import Evaluator
from unet_ray.training.optimizer import make_optimizer

CONFIG = UnetConfig(image_height_px=24, image_width_px=32, n_classes=3, n_filters=4, depth=2, dropout=0.0)

# Each process writes what it saw; void covers 0 to 95% of a frame, unevenly over the workers.
RANK_PROGRAM = """
import dataclasses, sys
import keras, numpy as np, tensorflow as tf
from unet_ray.training import steps
from unet_ray.training.calibrator import calibrate
from unet_ray.training.evaluator import Evaluator
from unet_ray.training.optimizer import make_optimizer
from unet_ray.model.architecture import UnetConfig
from unet_ray.model import devices
from unet_ray.model.unet import build_unet

rank, n_workers, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
devices.configure_tensorflow("cpu", 1, op_threads=1)
strategy = steps.start_strategy(n_workers, "cpu")
rng = np.random.default_rng(3)
images = rng.integers(0, 256, (10, 16, 24, 32, 3), np.uint8)
masks = rng.integers(0, 3, (10, 16, 24, 32)).astype(np.uint8)
for frame in range(16):
    masks[:, frame, : round(24 * 0.95 * frame / 15)] = 255
part = 16 // n_workers
mine = slice(rank * part, (rank + 1) * part)
config = UnetConfig(image_height_px=24, image_width_px=32, n_classes=3, n_filters=4, depth=2, dropout=0.0)
arrays = {}
for name, loss, clip_norm, weights, micro in [
    ("ce", "ce", 0.0, None, 1), ("clipped", "ce", 0.05, None, 1), ("clipped-sgd", "ce", 0.05, None, 1),
    ("dice", "ce+dice", 0.0, (1.0, 2.0, 0.5), 1),
    # What a micro-batch drops, a worker of its own would drop.
    ("micro-sgd", "ce", 0.05, (1.0, 2.0, 0.5), 2 // n_workers), ("micro-dice", "ce+dice", 0.0, None, 4 // n_workers)
]:
    dropout = 0.3 if name.startswith("micro") else 0.0
    model = build_unet(dataclasses.replace(config, dropout=dropout), seed=7)
    # Adam takes the same step with a gradient of any length; plain descent shows what was clipped.
    optimizer = keras.optimizers.SGD(0.1) if "sgd" in name else make_optimizer("adam", 1e-3, 0.0)
    step = steps.TrainStep(
        model, optimizer, strategy, loss=loss, class_weights_K=weights, clip_norm=clip_norm, n_micro=micro
    )
    seeds = steps.dropout_seeds(0, 0, rank, step.n_dropouts, micro)
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
network = build_unet(config, seed=7)
network.trainable_variables[-2].assign(20 * network.trainable_variables[-2])  # as sure as a trained one
predict = steps.Predictor(network)
guessed = rng.random(masks[0].shape) < 0.3
masks[0] = np.where(masks[0] == 255, 255, np.where(guessed, masks[0], predict(images[0], masks[0])[1]))

class Frames:
    def read(self, index):
        return images[0, index], masks[0, index]

fitted = calibrate(Evaluator(predict, Frames(), 5, config), range(rank, 16, n_workers), add_up)
arrays["calibration"] = np.array(dataclasses.astuple(fitted))
np.savez(f"{out}/{n_workers}-{rank}.npz", **arrays)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What one worker with 16 frames, and each of two with 8, found."""
    return of_one_and_of_two(RANK_PROGRAM, tmp_path_factory.mktemp("ranks"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["ce", "clipped", "clipped-sgd", "dice", "micro-sgd", "micro-dice"])
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


@pytest.mark.timeout(600)
def test_two_workers_fit_the_temperature_that_one_does_to_the_bit(ranks):
    temperature, before, after = ranks["1-0"]["calibration"]
    assert 1 / 8 < temperature < 8 and before != after
    np.testing.assert_array_equal(ranks["1-0"]["calibration"], ranks["2-0"]["calibration"])


GROWTH_PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from unet_ray.training import steps
from unet_ray.training.optimizer import make_optimizer
from unet_ray.model.architecture import UnetConfig
from unet_ray.model import devices
from unet_ray.model.unet import build_unet

rank, n_workers, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
devices.configure_tensorflow("cpu", 1, op_threads=1)
strategy = steps.start_strategy(n_workers, "cpu")
config = UnetConfig(image_height_px=8, image_width_px=8, n_classes=3, n_filters=2, depth=2, dropout=0.0)
step = steps.TrainStep(build_unet(config, seed=7), make_optimizer("adam", 1e-3, 0.0), strategy, loss="ce")
image, mask, seeds = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 8, 8), np.uint8), np.zeros((1, 0, 2), np.int64)
own_kb = []
for number in range(1501):
    if number in (500, 1500):
        own_kb += [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon:")]
    float(step(image, mask, seeds).loss)
Path(out, f"{rank}.txt").write_text(str((own_kb[1] - own_kb[0]) / 1000))
"""


@pytest.mark.weekly
@pytest.mark.timeout(600)
def test_the_memory_of_two_workers_grows_by_two_kilobytes_a_step(tmp_path):
    """Which TensorFlow keeps; with timeouts of its own it would be 36 KB until the first is over."""
    run_to_end(start_ranks(GROWTH_PROGRAM, tmp_path))
    growth_kb = [float((tmp_path / f"{rank}.txt").read_text()) for rank in range(2)]
    print("KB a step:", growth_kb)
    assert max(growth_kb) < 4


HINT_PROGRAM = """
import sys
import tensorflow as tf
from unet_ray.model import devices
from unet_ray.errors import UnusableNetwork
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.unet import build_unet
from unet_ray.training import steps
from unet_ray.training.optimizer import make_optimizer

rank, out = sys.argv[1], sys.argv[3]
devices.configure_tensorflow("cpu", 1, op_threads=1)
strategy = steps.start_strategy(2, "gpu")
model = build_unet(UnetConfig(image_height_px=24, image_width_px=32, n_classes=3, n_filters=32, depth=4), seed=1)
step = steps.TrainStep(model, make_optimizer("adam", 1e-3, 0.0), strategy, loss="ce", compiled=True)
graph = step.trace(2).graph.as_graph_def()
nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
hints = [node.attr["communication_hint"].s.decode() for node in nodes if node.op.startswith("Collective")]
bytes_ = sum(4 * variable.value.shape.num_elements() for variable in model.trainable_variables)
open(f"{out}/{rank}.txt", "w").write(f"{hints.count('nccl')} {len(hints)} {bytes_}")
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gpus_sum_by_nccl_in_several_packs(tmp_path):
    """Traced here for GPUs, without one: every sum of the step asks for NCCL, and the gradients are no single one."""
    run_to_end(start_ranks(HINT_PROGRAM, tmp_path))
    for rank in range(2):
        by_nccl, sums, gradient_bytes = map(int, (tmp_path / f"{rank}.txt").read_text().split())
        assert gradient_bytes > steps.PACK_BYTES and sums == by_nccl >= 1 + 2  # of the loss, and of two packs


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
        ours, make_optimizer("adam", 1e-2, 0.0), tf.distribute.get_strategy(), loss="ce", clip_norm=clip_norm
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


@pytest.mark.parametrize("loss", ["focal", "dice"])
@pytest.mark.parametrize(("n_micro", "compiled"), [(1, True), (3, False), (3, True)])
def test_micro_batches_and_a_compiled_step_give_the_same_gradients(loss, n_micro, compiled):
    image, mask = batch(np.random.default_rng(2), n_frames=6)
    mask[4:] = IGNORED_ID  # a micro-batch of padding alone
    results = []
    for options in ({}, {"n_micro": n_micro, "compiled": compiled}):
        model, sgd = build_unet(CONFIG, seed=1), keras.optimizers.SGD(1.0)
        step = steps.TrainStep(model, sgd, tf.distribute.get_strategy(), loss=loss, **options)
        seeds = steps.dropout_seeds(0, 0, 0, step.n_dropouts, options.get("n_micro", 1))
        result, gradients = step.reduced_gradients(*map(tf.constant, (image, mask, seeds)))
        assert float(result.valid_pixels) == np.sum(mask != IGNORED_ID)
        results.append((float(result.loss), np.concatenate([gradient.numpy().ravel() for gradient in gradients])))
    (loss_of_one, one), (loss_of_other, other) = results
    assert loss_of_other == pytest.approx(loss_of_one, rel=1e-5)
    assert relative_difference(one, other) < 1e-5


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


def make_step(config: UnetConfig) -> steps.TrainStep:
    model = build_unet(config, seed=1)
    return steps.TrainStep(model, make_optimizer("adam", 1e-3, 0.0), tf.distribute.get_strategy(), loss="ce")


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
    config = UnetConfig(image_height_px=24, image_width_px=32, n_classes=3, n_filters=4, depth=2, dropout=0.5)
    image, mask = batch(np.random.default_rng(0))
    step = make_step(config)
    assert step.n_dropouts == 2

    def loss(*key: int) -> float:
        seeds = steps.dropout_seeds(*key, step.n_dropouts)
        return float(step.reduced_gradients(*map(tf.constant, (image, mask, seeds)))[0].loss)

    assert loss(0, 5, 1) == loss(0, 5, 1)
    assert len({loss(0, 5, 1), loss(1, 5, 1), loss(0, 6, 1), loss(0, 5, 0)}) == 4


def test_dropout_seeds_never_repeat_between_layers_steps_and_ranks():
    seeds = [tuple(row) for step in range(50) for rank in range(4) for row in steps.dropout_seeds(0, step, rank, 2)[0]]
    assert len(set(seeds)) == len(seeds)
    assert steps.dropout_seeds(3, 1, 1, 0).shape == (1, 0, 2)
    two_of_rank_1 = steps.dropout_seeds(0, 7, 1, 2, n_micro=2)
    np.testing.assert_array_equal(two_of_rank_1, [steps.dropout_seeds(0, 7, rank, 2)[0] for rank in (2, 3)])


def test_state_comes_back_to_the_bit():
    image, mask = batch(np.random.default_rng(2))
    first, second = build_unet(CONFIG, seed=1), build_unet(CONFIG, seed=2)
    optimizers = [make_optimizer("adam", 1e-2, 0.0) for _ in range(2)]
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


def test_a_checkpoint_of_another_network_is_refused_by_name():
    optimizer = make_optimizer("adam", 1e-2, 0.0)
    steps.TrainStep(build_unet(CONFIG, seed=1), optimizer, tf.distribute.get_strategy(), loss="ce")
    state = steps.state_tensors(build_unet(CONFIG, seed=1), optimizer)
    wider, deeper = dataclasses.replace(CONFIG, n_filters=8), dataclasses.replace(CONFIG, depth=3)
    before = build_unet(wider, seed=1)
    kept = steps.state_tensors(before, optimizer)
    for config, line in (
        (
            wider,
            r"the network has model/conv2d/kernel of \[3, 3, 3, 8\], the checkpoint has \[3, 3, 3, 4\]: the network",
        ),
        (deeper, r"the network has model/\S+ of \[.*\], the checkpoint (has|lacks it)"),
    ):
        with pytest.raises(UnusableNetwork, match=line):
            steps.restore_state(build_unet(config, seed=1), optimizer, state)
    with pytest.raises(UnusableNetwork):
        steps.restore_state(before, optimizer, state)
    for name, tensor in steps.state_tensors(before, optimizer).items():
        np.testing.assert_array_equal(tensor, kept[name])  # nothing half-restored


def test_a_mask_of_another_size_comes_from_bilinear_logits():
    predict = steps.Predictor(build_unet(CONFIG, seed=1))
    logits = np.random.default_rng(0).normal(size=(24, 32, 3)).astype(np.float32)
    mask = predict.own_size_mask(tf.constant(logits), (24, 32), (37, 53))

    def neighbours(out: int, n_in: int, n_out: int) -> tuple[int, int, float]:
        at = min(max((out + 0.5) * n_in / n_out - 0.5, 0.0), n_in - 1.0)
        return int(at), min(int(at) + 1, n_in - 1), at - int(at)

    for y in range(37):
        for x in range(53):
            (y0, y1, fy), (x0, x1, fx) = neighbours(y, 24, 37), neighbours(x, 32, 53)
            above = logits[y0, x0] * (1 - fx) + logits[y0, x1] * fx
            below = logits[y1, x0] * (1 - fx) + logits[y1, x1] * fx
            assert mask[y, x] == np.argmax(above * (1 - fy) + below * fy)


def test_flip_is_the_mean_with_the_mirrored_frames_logits():
    model = build_unet(CONFIG, seed=1)
    image, mask = batch(np.random.default_rng(0), 2)
    mean = (model(image).numpy() + model(image[:, :, ::-1]).numpy()[:, :, ::-1]) / 2
    logits, predicted, sums = steps.Predictor(model, tta="flip")(image, mask)
    np.testing.assert_allclose(logits, mean, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(predicted, mean.argmax(-1))
    np.testing.assert_allclose(sums, losses.loss_sums(tf.constant(mean), mask, loss="ce"), rtol=1e-5)
    plain = steps.Predictor(model)(image, mask)[0]
    assert np.abs(plain - mean).max() > 1e-3  # else nobody could tell whether it was done


class Pairs:
    """Seven frames with masks of sizes of their own."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = batch(np.random.default_rng(index), 1)
        return image[0], mask[0]

    def full_mask(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 3, (30 + index, 41)).astype(np.uint8)


def test_threads_count_what_one_counts():
    predict = steps.Predictor(build_unet(CONFIG, seed=1))
    one, three = (Evaluator(predict, Pairs(), 3, CONFIG, n_threads=n).count(range(7)) for n in (1, 3))  # type: ignore[arg-type]
    for field in ("own_size_KK", "model_size_KK", "sums_S"):
        np.testing.assert_array_equal(getattr(one, field), getattr(three, field))
    assert one.own_size_KK.sum() == sum((30 + index) * 41 for index in range(7))


def test_policies():
    assert devices.choose_policy("float32", "cpu") == "float32"
    assert devices.choose_policy("bfloat16", "cpu") == "mixed_bfloat16"

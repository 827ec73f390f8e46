"""Networks made elsewhere in ONNX Runtime: what they compute, what a trial finds out, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper
from small_onnx import N_CLASSES, WEIGHTS_KC, as_model, scores_of, small_network

from unet_ray.model.devices import UnusableGpu
from unet_ray.model.onnx_file import find_facts, read_onnx
from unet_ray.model.onnx_network import OnnxNetwork
from unet_ray.model.onnx_trial import made_frames, try_network
from unet_ray.pixels.preprocessing import Preprocessing, normalized

SIZE = (24, 32)
FRAMES = np.random.default_rng(1).integers(0, 256, (5, *SIZE, 3), dtype=np.uint8)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
NORMAL = {"preprocessing": Preprocessing(mean=MEAN, std=STD)}


def parts_of(model, n_classes=N_CLASSES, **options):
    """A network's bytes and facts, as the functions below take them."""
    data = model.SerializeToString()
    return data, find_facts(data, "net.onnx", n_classes=n_classes, **options)


def softmax(logits_NhwK):
    shares = np.exp(logits_NhwK - logits_NhwK.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def refusal(*args, **options) -> str:
    with pytest.raises(ValueError) as caught:
        try_network(*args, **{"size": SIZE, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what it computes ---


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
@pytest.mark.parametrize("batch", ["n", 1, 3])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_logits_of_normalised_frames_in_any_layout_and_batch(layout, channels, batch, n_threads):
    data, facts = parts_of(small_network(layout=layout, batch=batch))
    preprocessing = Preprocessing(mean=MEAN, std=STD, channels=channels)
    logits_NhwK = OnnxNetwork(data, facts, size=SIZE, preprocessing=preprocessing, n_threads=n_threads)(FRAMES)
    ordered = FRAMES if channels == "RGB" else FRAMES[..., ::-1]
    assert (logits_NhwK.dtype, logits_NhwK.shape) == (np.float32, (5, 6, 8, N_CLASSES))
    np.testing.assert_allclose(logits_NhwK, scores_of((ordered - np.array(MEAN)) / STD), atol=1e-5)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_frames_are_normalised_as_for_every_other_network(layout, channels):
    data, facts = parts_of(small_network(layout=layout))
    preprocessing = Preprocessing(mean=MEAN, std=STD, channels=channels)
    inputs = OnnxNetwork(data, facts, size=SIZE, preprocessing=preprocessing).input_of(FRAMES)
    expected_NHWC = normalized(FRAMES, preprocessing)
    np.testing.assert_array_equal(inputs if layout == "nhwc" else inputs.transpose(0, 2, 3, 1), expected_NHWC)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_network_of_uint8_normalises_itself(layout):
    data, facts = parts_of(small_network(layout=layout, dtype="uint8"))
    np.testing.assert_allclose(OnnxNetwork(data, facts, size=SIZE)(FRAMES), scores_of(FRAMES), atol=1e-4)
    with pytest.raises(ValueError, match="takes uint8, which cannot be normalised; leave out --mean and --std"):
        OnnxNetwork(data, facts, size=SIZE, **NORMAL)


def test_logarithms_of_probabilities_are_logits():
    data, facts = parts_of(small_network(ending="probabilities"), kind="probabilities")
    logits_NhwK = OnnxNetwork(data, facts, size=SIZE, **NORMAL)(FRAMES)
    expected = softmax(scores_of((FRAMES - np.array(MEAN)) / STD))
    np.testing.assert_allclose(softmax(logits_NhwK), expected, atol=1e-6)
    certain = np.eye(N_CLASSES, dtype=np.float32)[:, :, None, None] * 1e6
    model = small_network(ending="probabilities")
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(certain, "weights"))
    data, facts = parts_of(model, kind="probabilities")
    assert np.isfinite(OnnxNetwork(data, facts, size=SIZE)(FRAMES)).all()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_class_ids_are_a_mask(layout):
    data, facts = parts_of(small_network(layout=layout, ending="ids"))
    ids_Nhw = OnnxNetwork(data, facts, size=SIZE, n_threads=2)(FRAMES)
    assert (ids_Nhw.dtype, ids_Nhw.shape) == (np.uint8, (5, 6, 8))
    np.testing.assert_array_equal(ids_Nhw, scores_of(FRAMES).argmax(-1))
    fewer = dataclasses.replace(facts, n_classes=2)
    with pytest.raises(ValueError, match="gives class ids from 0 to 2; the class set has 0 to 1: give the one of its"):
        OnnxNetwork(data, fewer, size=SIZE)(FRAMES)


def test_a_network_of_any_size_at_two_sizes():
    data, facts = parts_of(small_network(size=("h", "w")))
    for size in ((8, 12), (40, 20)):
        frames = made_frames(size, 3)
        np.testing.assert_allclose(OnnxNetwork(data, facts, size=size)(frames), scores_of(frames), atol=1e-4)


def test_several_threads_may_call_one_network():
    data, facts = parts_of(small_network())
    network = OnnxNetwork(data, facts, size=SIZE)
    expected = network(FRAMES)
    with ThreadPoolExecutor(4) as threads:
        for logits in threads.map(network, [FRAMES] * 40):
            np.testing.assert_array_equal(logits, expected)


def test_what_onnx_runtime_does_not_take_is_one_line():
    data, facts = parts_of(small_network())
    broken = as_model(
        [helper.make_node("Conv", ["image", "nowhere"], ["out"])],
        helper.make_tensor_value_info("image", TensorProto.FLOAT, ("n", 3, *SIZE)),
        helper.make_tensor_value_info("out", TensorProto.FLOAT, ("n", N_CLASSES, 6, 8)),
    ).SerializeToString()
    with pytest.raises(ValueError, match=r"^ONNX Runtime does not take the network: .*nowhere.*$"):
        OnnxNetwork(broken, facts, size=SIZE)
    with pytest.raises(
        UnusableGpu, match="ONNX Runtime cannot use the GPU of node .*: it is the one for CPUs; pip uninstall -y"
    ):
        OnnxNetwork(data, facts, size=SIZE, device="gpu")


def test_the_projects_own_network_by_way_of_onnx(tmp_path):
    """As `export-model --format onnx` writes it: its logits are those of Keras, and the trial knows what it is."""
    keras = pytest.importorskip("keras")
    pytest.importorskip("tf2onnx")
    from unet_ray.model.architecture import UnetConfig
    from unet_ray.model.export import _write_local
    from unet_ray.model.unet import build_unet

    config = UnetConfig(image_height_px=32, image_width_px=48, n_classes=4, n_filters=4)
    model = build_unet(config, seed=3)
    _write_local(model, tmp_path / "unet.onnx", "onnx")
    data = read_onnx(str(tmp_path / "unet.onnx"))
    facts = find_facts(data, "unet.onnx", n_classes=4)
    trial = try_network(data, facts, size=(32, 48))
    assert (trial.facts.dtype, trial.facts.layout, trial.facts.kind) == ("uint8", "nhwc", "logits")
    frames = made_frames((32, 48))
    logits = OnnxNetwork(data, trial.facts, size=(32, 48))(frames)
    np.testing.assert_allclose(logits, model(keras.ops.convert_to_tensor(frames)).numpy(), atol=1e-5)


# --- the trial ---


@pytest.mark.parametrize("ending", ["logits", "probabilities", "ids"])
@pytest.mark.parametrize("batch", ["n", 1, 3])
def test_a_trial_completes_the_facts(ending, batch):
    data, facts = parts_of(small_network(ending=ending, batch=batch, size=("h", "w")))
    trial = try_network(data, facts, size=SIZE, images_NHWC=FRAMES, **NORMAL)
    n_at_once = None if batch == "n" else batch
    expected = dataclasses.replace(facts, size=SIZE, output_size=(6, 8), kind=ending, batch=n_at_once)
    assert trial.facts == expected and json.loads(json.dumps(trial.record)) == trial.record
    differences = {name: value for name, value in trial.record.items() if name.startswith("difference")}
    assert differences == {
        "difference_between_runs": 0.0,
        "difference_between_batches": None if n_at_once else 0.0,
        "difference_between_threads": 0.0,
    }
    what = "class ids" if ending == "ids" else ending
    assert (
        trial.lines[0] == f"the network takes float32 frames of 24x32 (nchw) and gives {what} of 6x8, 1/4 of their size"
    )
    assert trial.lines[1:] == (("frames go through it one by one: it takes no more at once",) if n_at_once == 1 else ())


def with_nodes(*nodes, batch="n", out_type=TensorProto.FLOAT, n_outputs=N_CLASSES):
    """A network whose logits `scores` go through more operators, the last of which gives `out`."""
    conv = helper.make_node("Conv", ["image", "weights"], ["scores"], strides=[4, 4])
    return as_model(
        [conv, *nodes],
        helper.make_tensor_value_info("image", TensorProto.FLOAT, (batch, 3, *SIZE)),
        helper.make_tensor_value_info("out", out_type, (batch, n_outputs, 6, 8)),
    )


def constant(name, values):
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(values, np.int64)))


def test_a_frame_that_depends_on_its_batch_goes_alone():
    mean = helper.make_node("ReduceMean", ["scores"], ["mean"], axes=[0], keepdims=1)
    model = with_nodes(mean, helper.make_node("Add", ["scores", "mean"], ["out"]))
    trial = try_network(*parts_of(model), size=SIZE, **NORMAL)
    assert trial.facts.batch == 1 and trial.record["difference_between_batches"] > 0.1
    assert trial.lines[1].startswith("frames go through it one by one: alone and among 8 they differ by up to ")
    network = OnnxNetwork(model.SerializeToString(), trial.facts, size=SIZE, **NORMAL)
    np.testing.assert_array_equal(network(FRAMES)[3:4], network(FRAMES[3:4]))


def test_a_network_that_was_traced_with_one_frame_goes_alone():
    """Its file leaves the batch open, and an operator in it does not."""
    flat = helper.make_node("Reshape", ["scores", "flat_shape"], ["flat"])
    back = helper.make_node("Reshape", ["flat", "shape"], ["out"])
    model = with_nodes(constant("flat_shape", [1, N_CLASSES, 48]), flat, constant("shape", [1, N_CLASSES, 6, 8]), back)
    trial = try_network(*parts_of(model), size=SIZE, **NORMAL)
    assert (trial.facts.batch, trial.record["difference_between_batches"]) == (1, None)
    assert trial.lines[1] == "frames go through it one by one: it takes no more at once"


def test_a_network_that_draws_lots_is_said():
    noise = helper.make_node("RandomNormalLike", ["scores"], ["noise"])
    model = with_nodes(noise, helper.make_node("Add", ["scores", "noise"], ["out"]))
    trial = try_network(*parts_of(model), size=SIZE)
    assert trial.record["difference_between_runs"] > 0.1
    assert any(line.startswith("warning: two runs differ by up to ") for line in trial.lines)


def test_outputs_that_are_none_are_refused():
    log = with_nodes(helper.make_node("Log", ["scores"], ["out"]))
    assert refusal(*parts_of(log), **NORMAL) == (
        "the network gives values that are not finite for 8 of 8 frames; check --mean and --std, which are in units of "
        "0 to 255"
    )
    message = refusal(*parts_of(small_network(), kind="probabilities"), **NORMAL)
    assert message.endswith("that do not add up to 1 in a pixel; give --kind logits")
    data, facts = parts_of(small_network(ending="ids"))
    assert refusal(data, dataclasses.replace(facts, n_classes=2)) == (
        "the network gives class ids from 0 to 2; --classes has 0 to 1: give those that it was trained with"
    )
    liar = with_nodes(helper.make_node("Concat", ["scores", "scores"], ["out"], axis=1), n_outputs="k")
    assert refusal(*parts_of(liar)).startswith(
        "the network gives the shape [1, 6, 6, 8] for 1 frames; 3 channels and a"
    )
    assert refusal(*parts_of(small_network()), size=(32, 24)).startswith(
        "--image-size is 32 24, the network takes 24 32"
    )


def test_logits_may_be_taken_for_what_they_are():
    """Values that add up to 1 by chance: told what they are, nobody looks."""
    data, facts = parts_of(small_network(ending="probabilities"), kind="logits")
    assert try_network(data, facts, size=SIZE, **NORMAL).facts.kind == "logits"


def test_made_frames_are_the_same_every_time_and_not_alike():
    frames = made_frames((24, 32))
    assert (frames.dtype, frames.shape) == (np.uint8, (8, 24, 32, 3))
    np.testing.assert_array_equal(frames, made_frames((24, 32)))
    assert len({frame.tobytes() for frame in frames}) == 8
    assert (
        np.abs(np.diff(frames[0].astype(int), axis=1)).max()
        < 120
        < np.abs(np.diff(frames[7].astype(int), axis=1)).max()
    )
    assert WEIGHTS_KC.shape == (N_CLASSES, 3)


# --- networks that nobody here designed ---


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """SegFormer and MobileNetV2 with DeepLabV3+, as PyTorch exports them; takes a minute."""
    for package in ("torch", "onnxscript", "transformers"):
        pytest.importorskip(package, reason=f"{package} is missing; pip install -e '.[test-torch]'")
    folder = tmp_path_factory.mktemp("exported")
    program = Path(__file__).parents[1] / "support" / "torch_networks.py"
    subprocess.run([sys.executable, str(program), str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale"), [("segformer", 4), ("deeplab", 8)])
def test_networks_of_transformers_give_the_masks_of_pytorch(exported, name, scale):
    pytest.importorskip("tensorflow")
    from unet_ray.model.labels import label_frames

    expected = np.load(exported / f"{name}.npz")
    images_NHWC, logits_NhwK = expected["images_NHWC"], expected["logits_NKhw"].transpose(0, 2, 3, 1)
    size = images_NHWC.shape[1:3]
    assert (exported / f"{name}.onnx.data").exists()  # as the exporter does by default
    data = read_onnx(str(exported / f"{name}.onnx"))
    facts = find_facts(data, name, n_classes=logits_NhwK.shape[-1])
    trial = try_network(data, facts, size=size, images_NHWC=images_NHWC, **NORMAL)
    assert (trial.facts.kind, trial.facts.layout, trial.facts.output_size) == (
        *("logits", "nchw"),
        (size[0] // scale, size[1] // scale),
    )
    ours_NhwK = OnnxNetwork(data, trial.facts, size=size, n_threads=2, **NORMAL)(images_NHWC)
    np.testing.assert_allclose(ours_NhwK, logits_NhwK, atol=1e-4)

    wanted_NHWK = expected["logits_NKHW"].transpose(0, 2, 3, 1)  # PyTorch's own interpolation
    best_two = np.sort(wanted_NHWK, axis=-1)[..., -2:]
    clear_NHW = best_two[..., 1] - best_two[..., 0] > 1e-3
    wanted_NHW = wanted_NHWK.argmax(-1)
    masks_NHW = np.stack(label_frames(ours_NhwK, [size] * len(ours_NhwK)).masks)
    assert len(np.unique(wanted_NHW)) >= 5 and clear_NHW.mean() > 0.9
    np.testing.assert_array_equal(masks_NHW[clear_NHW], wanted_NHW[clear_NHW])

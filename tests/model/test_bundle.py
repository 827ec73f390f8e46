"""Bundles: round trips, the refusal of broken and hostile folders in one line, and exports for other tools."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save as save_tensors

from unet_ray import PACKAGE
from unet_ray.classes import ClassSet
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.bundle import read_bundle, save_bundle, write_bundle
from unet_ray.model.export import export_model
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.labeler import Labeler
from unet_ray.model.unet import build_unet
from unet_ray.model.weights import named_weights
from unet_ray.pixels.preprocessing import Preprocessing, network_input
from unet_ray.storage import files as storage_files

TINY = UnetConfig(image_height_px=24, image_width_px=32, n_classes=3, n_filters=4, depth=2, dropout=0.3)
CLASSES = ClassSet.from_dict(
    {
        "name": "tiny",
        "classes": [
            {"name": "road", "color": [128, 64, 128], "values": [7]},
            {"name": "car", "color": [0, 0, 142], "values": [10]},
            {"name": "sky", "color": [70, 130, 180], "values": [11]},
        ],
        "ignore": [0],
    }
)
METRICS = {"mean_iou": 0.5, "iou/road": 0.75, "iou/sky": None, "absent": ["sky"]}
FRAMES = np.random.default_rng(7).integers(0, 256, (3, 24, 32, 3), dtype=np.uint8)
DIGEST_OF_ZEROS = "af3fba90bab4843e271abeac6493ffb34b2bcb0488e7e3270e4971740fc734d5"
"""Of `TINY` with weights of zeros, as the version before calibration wrote it."""
RETRY = "; copy the whole folder again, or train again"


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return build_unet(TINY, seed=4)


@pytest.fixture
def folder(tmp_path: Path, model: keras.Model) -> Path:
    save_bundle(str(tmp_path / "run" / "model"), model, TINY, CLASSES, METRICS)
    return tmp_path / "run" / "model"


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_bundle(str(folder))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert message.startswith(str(folder))
    return message.removeprefix(f"{folder} ")


def resign(folder: Path, change=lambda document: None) -> None:
    """Change model.json as somebody would who knows the format: with digests that fit."""
    document = json.loads((folder / "model.json").read_bytes())
    for name in document["files"]:
        data = (folder / name).read_bytes()
        document["files"][name] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(document)
    content = {key: value for key, value in document.items() if key not in ("digest", "files")}
    content["weights_file"] = document["files"]["weights.safetensors"]
    document["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "model.json").write_text(json.dumps(document))


def to_format_1(document) -> None:
    """`model.json` as unet_ray wrote it at first."""
    height_px, width_px = document.pop("image_size")
    options = {name: document["network"][name] for name in ("n_filters", "depth", "dropout")}
    size = {"image_height_px": height_px, "image_width_px": width_px}
    classes = {"n_classes": len(document["classes"]["classes"])}
    preprocessing = {
        "channels": "RGB",
        "resize": "nearest",
        "network_input": "uint8, divided by 255 in the network",
    }
    document.update(format_version=1, network=options | size | classes, preprocessing=preprocessing)


def test_a_folder_of_format_1_keeps_its_digest(folder, model):
    """The digest was written by the version that wrote the format (weights of zeros, as those of TensorFlow differ)."""
    zeros = {name: np.zeros_like(tensor) for name, tensor in named_weights(model).items()}
    write_bundle(str(folder), zeros, TINY, CLASSES, METRICS)
    resign(folder, to_format_1)
    bundle = read_bundle(str(folder))
    assert bundle.model_config == TINY
    assert bundle.digest == "4dd691eb47661c2d3fe5ae78c8707045a328f1cefeb48140d935d524668a8398"


def test_round_trip(folder, model):
    for uri in (folder, folder.parent, f"{folder.parent}/"):
        bundle = read_bundle(str(uri))
        assert (bundle.model_config, bundle.class_set, bundle.metrics) == (TINY, CLASSES, METRICS)
        assert bundle.uri == str(folder)
        np.testing.assert_array_equal(bundle.build_model()(FRAMES).numpy(), model(FRAMES).numpy())
    assert bundle.build_model(dtype_policy="mixed_bfloat16").get_layer("conv2d").compute_dtype == "bfloat16"


def test_files_are_those_of_the_format(folder, model):
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "model.json", "weights.safetensors"]
    document = json.loads((folder / "model.json").read_text())
    assert document["format_version"] == 2
    options = {"n_filters": 4, "depth": 2, "dropout": 0.3, "norm": "none", "residual": False}
    assert (document["network"], document["image_size"]) == ({"kind": "unet"} | options, [24, 32])
    assert ClassSet.from_dict(document["classes"]) == CLASSES
    assert {entry["name"]: tuple(entry["shape"]) for entry in document["weights"]} == {
        name: tensor.shape for name, tensor in named_weights(model).items()
    }
    with safe_open(folder / "weights.safetensors", framework="numpy") as tensors:
        assert sorted(tensors.keys()) == sorted(named_weights(model))
        np.testing.assert_array_equal(tensors.get_tensor("conv2d_1/bias"), named_weights(model)["conv2d_1/bias"])


def test_equal_models_have_equal_bytes_and_the_digest_is_of_what_labels_depend_on(tmp_path, folder, model):
    digest = read_bundle(str(folder)).digest
    assert len(digest) == 64
    again = tmp_path / "again"
    assert save_bundle(str(again), build_unet(TINY, seed=4), TINY, CLASSES, METRICS) == digest
    for name in ("model.json", "weights.safetensors", "metrics.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    weights = named_weights(model)
    assert write_bundle(str(again), weights, TINY, CLASSES, {"mean_iou": 0.6}) == digest
    assert read_bundle(str(again)).metrics == {"mean_iou": 0.6}
    recolored = dataclasses.replace(
        CLASSES, classes=(dataclasses.replace(CLASSES.classes[0], color=(1, 2, 3)), *CLASSES.classes[1:])
    )
    other_network = dataclasses.replace(TINY, image_height_px=48)
    nudged = {**weights, "conv2d/bias": weights["conv2d/bias"] + np.float32(1e-6)}
    others = [
        write_bundle(str(again), weights, TINY, recolored, METRICS),
        write_bundle(str(again), weights, other_network, CLASSES, METRICS),
        write_bundle(str(again), nudged, TINY, CLASSES, METRICS),
    ]
    assert len({digest, *others}) == 4


def test_a_temperature_is_kept_and_changes_the_digest_only_where_there_is_one(tmp_path, model):
    weights = {name: np.zeros_like(tensor) for name, tensor in named_weights(model).items()}
    folder = str(tmp_path / "model")
    without = write_bundle(folder, weights, TINY, CLASSES, METRICS)
    assert without == DIGEST_OF_ZEROS  # as before there were temperatures
    assert read_bundle(folder).temperature is None
    assert "temperature" not in json.loads((tmp_path / "model" / "model.json").read_text())
    digests = [write_bundle(folder, weights, TINY, CLASSES, METRICS, temperature=value) for value in (1.5, 1.75)]
    assert len({without, *digests}) == 3
    bundle = read_bundle(folder)
    assert (bundle.temperature, bundle.digest) == (1.75, digests[1])


def test_a_bundle_goes_through_pickle_and_other_storage(folder, model):
    uri = "memory://bundles/run/model"
    save_bundle(uri, model, TINY, CLASSES, METRICS)
    bundle = pickle.loads(pickle.dumps(read_bundle("memory://bundles/run")))
    assert bundle.digest == read_bundle(str(folder)).digest
    np.testing.assert_array_equal(bundle.build_model()(FRAMES).numpy(), model(FRAMES).numpy())


def test_reading_imports_neither_keras_nor_tensorflow(folder):
    code = (
        "import sys; from unet_ray.model.bundle import read_bundle; read_bundle(sys.argv[1])\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'keras', 'tensorflow', 'ray', 'torch', 'jax'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert done.stdout.strip() == "[]"


def test_what_is_no_model_folder(tmp_path):
    assert refusal(tmp_path / "gone") == ("does not exist; give the folder that `unet-ray train` wrote, or its model/")
    assert refusal(tmp_path) == (
        "is not a model folder: model.json is missing; give the folder that `unet-ray train` wrote, or its model/ "
        "(a training that has not finished has none yet)"
    )


@pytest.mark.parametrize("name", ["weights.safetensors", "metrics.json"])
def test_every_missing_torn_and_altered_file_is_named(folder, name):
    path, whole = folder / name, (folder / name).read_bytes()
    path.unlink()
    assert refusal(folder) == f"is incomplete: {name} is missing; copy the whole folder, or train again"
    path.write_bytes(whole[:-7])
    assert refusal(folder) == (
        f"is incomplete: {name} ends after {len(whole) - 7:,} of {len(whole):,} bytes; copy the whole folder, "
        "or train again"
    )
    path.write_bytes(whole + b" ")
    assert refusal(folder) == (
        f"is altered or damaged: {name} has {len(whole) + 1:,} bytes, at most {len(whole):,} are allowed{RETRY}"
    )
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert refusal(folder) == f"is altered or damaged: {name} has another sha256 than model.json says{RETRY}"


def test_every_changed_byte_of_model_json_is_noticed(folder):
    path, whole = folder / "model.json", (folder / "model.json").read_bytes()
    intact = read_bundle(str(folder))
    for position in range(0, len(whole), 23):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            bundle = read_bundle(str(folder))
        except ValueError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
        else:  # white space
            assert (bundle.digest, bundle.model_config) == (intact.digest, intact.model_config)
        path.write_bytes(whole[:position])
        refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is altered or damaged: model.json is not whole JSON (Expecting value: line 1 column 1 (char 0))"),
        (b"[1, 2]", "is altered or damaged: model.json is not a JSON object"),
        (b"[" * 500_000, "is altered or damaged: model.json is not whole JSON (nested too deeply)"),
        (b"\xff\xfe{}", "is altered or damaged: model.json is not whole JSON"),
        (b" " * 4_000_001, "is altered or damaged: model.json has 4,000,001 bytes, at most 4,000,000 are allowed"),
        (b"{}", "has the model format version None, this unet_ray reads 1 to 2; use the unet_ray that wrote it"),
        (b'{"format_version": 3}', "has the model format version 3, this unet_ray reads 1 to 2; use the unet_ray that"),
        (
            b'{"format_version": true}',
            "has the model format version True, this unet_ray reads 1 to 2; use the unet_ray",
        ),
        (
            b'{"format_version": 1, "a": 0}',
            "is altered or damaged: model.json has the keys a, format_version, expected",
        ),
    ],
)
def test_a_model_json_that_is_none(folder, content, message):
    (folder / "model.json").write_bytes(content)
    assert refusal(folder).startswith(message)


def drop_key(document):
    del document["network"]["depth"]


OF_BOTH_FORMATS = [
    (lambda d: d.update(extra=1), "model.json has the keys classes, digest, extra, files, format_version, "),
    (lambda d: d.pop("classes"), "model.json has the keys digest, files, format_version, "),
    (lambda d: d["network"].update(depth=80), "model.json: --depth is 80; it must be 2 to 8"),
    (lambda d: d["network"].update(dropout=float("nan")), "model.json: --dropout is nan; it must be in [0, 1)"),
    (lambda d: d.update(network=[]), "model.json: the network is not a JSON object"),
    (lambda d: d["classes"].update(classes=[]), "model.json: "),
    (lambda d: d.update(classes=7), "model.json: "),
    (lambda d: d.update(weights={}), "model.json does not describe its files and weights as format "),
    (lambda d: d["weights"][0].update(shape=[-1]), "model.json does not describe its files and weights as format"),
    (lambda d: d["weights"][0].update(shape=[2] * 9), "model.json does not describe its files and weights as format"),
    (lambda d: d["weights"][0].update(dtype="object"), "model.json does not describe its files and weights as"),
    (lambda d: d["weights"][0].update(name=None), "model.json does not describe its files and weights as format"),
    (lambda d: d["weights"].append(d["weights"][0]), "model.json does not describe its files and weights as"),
    (lambda d: d["files"]["metrics.json"].update(size_bytes="9"), "model.json does not describe its files and"),
    (lambda d: d["weights"].pop(), "weights.safetensors has "),
    (lambda d: d["weights"][0].update(name="a/kernel"), "weights.safetensors holds other tensors than model.json"),
]
OF_FORMAT_1 = [
    (lambda d: d["preprocessing"].update(resize="area"), "model.json asks for a preprocessing that format 1 does"),
    (lambda d: d["network"].update(layer="Lambda"), "model.json: the network must have the keys depth, dropout,"),
    (drop_key, "model.json: the network must have the keys depth, dropout, image_height_px,"),
    (lambda d: d["network"].update(depth=2.0), "model.json: depth is '2.0', not a number of its kind"),
    (lambda d: d["network"].update(depth=True), "model.json: depth is 'True', not a number of its kind"),
    (lambda d: d["network"].update(n_classes=4), "model.json names 3 classes for 4 outputs"),
]
OF_FORMAT_2 = [
    (lambda d: d.update(temperature=0.0), "model.json has the temperature '0.0'"),
    (lambda d: d.update(temperature=float("inf")), "model.json has the temperature 'inf'"),
    (lambda d: d.update(temperature="hot"), "model.json has the temperature 'hot'"),
    (lambda d: d["preprocessing"].update(resize="cubic"), "model.json: resize is 'cubic'; allowed are nearest, "),
    (lambda d: d["preprocessing"].pop("fit"), "model.json: preprocessing has the keys "),
    (lambda d: d["preprocessing"].update(mean=[0, 0]), "model.json: mean is (0, 0); allowed are three numbers"),
    (lambda d: d.update(preprocessing=None), "model.json: preprocessing has the keys None"),
    (lambda d: d["network"].update(layer="Lambda"), "model.json: a network of the kind unet must have the keys depth,"),
    (drop_key, "model.json: a network of the kind unet must have the keys depth, dropout, n_filters, norm, residual"),
    (lambda d: d["network"].update(kind="pickle"), "model.json: the network is of the kind 'pickle'; this unet_ray"),
    (
        lambda d: d["network"].update(kind=["unet"]),
        "model.json: the network is of the kind \"['unet']\"; this unet_ray",
    ),
    (lambda d: d["network"].update(depth=2.0), "model.json: depth is '2.0', not a value of its type"),
    (lambda d: d["network"].update(depth=True), "model.json: depth is 'True', not a value of its type"),
    (lambda d: d["network"].update(residual=1), "model.json: residual is '1', not a value of its type"),
    (lambda d: d["network"].update(norm="batch"), "model.json: --norm is 'batch'; it must be none or group"),
    (lambda d: d.update(image_size=[24, 32.0]), "model.json: image_size is '[24, 32.0]', not [height, width]"),
    (lambda d: d.update(image_size=[24, 0]), "model.json: image width is 0; it must be 1 to 8192"),
    (
        lambda d: d.update(network={"kind": "python", "function": "os", "arguments": {}}),
        "model.json: the network is 'os'",
    ),
]


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [(2, *case) for case in OF_BOTH_FORMATS + OF_FORMAT_2] + [(1, *case) for case in OF_BOTH_FORMATS + OF_FORMAT_1],
)
def test_a_forged_model_json_is_refused_though_its_digest_fits(folder, version, change, message):
    if version == 1:
        resign(folder, to_format_1)
    resign(folder, change)
    assert refusal(folder).startswith(f"is altered or damaged: {message}")


def test_a_changed_model_json_is_refused(folder):
    path = folder / "model.json"
    path.write_text(path.read_text().replace('"sky"', '"sea"'))
    assert refusal(folder) == f"is altered or damaged: model.json does not match its own digest{RETRY}"


def header(tensors: dict, length: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"\x01",
        header({}, length=2**63),
        header({}, length=90_000_000),
        header({"conv2d/bias": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        save_tensors({"conv2d/bias": np.zeros(4, np.float32)}),
    ],
    ids=["empty", "short", "endless-header", "long-header", "huge-tensor", "other-tensors"],
)
def test_hostile_weights_are_refused_though_their_digest_fits(folder, hostile):
    (folder / "weights.safetensors").write_bytes(hostile)
    resign(folder)
    assert refusal(folder).startswith("is altered or damaged: weights.safetensors has ")


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (lambda data: b"\x00" * 40 + data[40:], "is altered or damaged: weights.safetensors has "),
        (lambda data: data[:8] + data[8:].replace(b'"F32"', b'"I32"'), "holds other tensors than model.json lists"),
        (lambda data: data[:8] + data[8:].replace(b'"F32"', b'"F99"'), "is altered or damaged: weights.safetensors: "),
        (
            lambda data: data[:8] + data[8:].replace(b'"dtype"', b'"dtypo"'),
            "is altered or damaged: weights.safetensors: ",
        ),
        (lambda data: data[:-4] + np.float32(np.nan).tobytes(), "weights.safetensors holds values that are not finite"),
    ],
    ids=["no-header", "dtype", "unknown-dtype", "header-key", "nan"],
)
def test_tampered_weights_of_the_right_size_are_refused(folder, replace, message):
    path = folder / "weights.safetensors"
    path.write_bytes(replace(path.read_bytes()))
    resign(folder)
    assert message in refusal(folder)


def test_a_network_larger_than_its_weights_is_refused_before_it_is_built(folder):
    resign(folder, lambda d: d["network"].update(depth=8, n_filters=1024))
    with pytest.raises(ValueError) as caught:
        read_bundle(str(folder)).build_model()
    assert str(caught.value).startswith(
        f"{folder} is not a model that fits together: the weights lack conv2d_10/bias, conv2d_10/kernel, conv2d_11/bias"
    )
    resign(folder, lambda d: d["network"].update(depth=2, n_filters=8))
    with pytest.raises(ValueError) as caught:
        read_bundle(str(folder)).build_model()
    assert str(caught.value) == (
        f"{folder} is not a model that fits together: the weight conv2d/kernel has shape (3, 3, 3, 4), the "
        "network needs (3, 3, 3, 8)"
    )


def test_a_folder_is_no_bundle_until_its_last_file_is_written(folder, model, monkeypatch):
    from unet_ray import storage

    written = []

    def dies_before_the_last(uri: str, data: bytes) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(uri)
        Path(uri).write_bytes(data)

    monkeypatch.setattr(storage, "write_whole", dies_before_the_last)
    monkeypatch.setattr(storage_files, "write_whole", dies_before_the_last)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(str(folder), build_unet(TINY, seed=9), TINY, CLASSES, METRICS)
    assert refusal(folder).startswith("is not a model folder: model.json is missing; ")


def test_an_export_to_onnx_gives_the_bundles_logits(folder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    expected_BHWK = read_bundle(str(folder)).build_model(dtype_policy="float32")(FRAMES).numpy()

    path = export_model(str(folder), str(tmp_path / "out" / "tiny.onnx"), "onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert (entry.type, entry.shape[1:]) == ("tensor(uint8)", [24, 32, 3])
    (logits_BHWK,) = session.run(None, {entry.name: FRAMES})
    np.testing.assert_allclose(logits_BHWK, expected_BHWK, atol=1e-5)
    np.testing.assert_array_equal(logits_BHWK.argmax(-1), expected_BHWK.argmax(-1))


@pytest.fixture(scope="module")
def onnx_export(tmp_path_factory, model) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with a model folder and `first.onnx`, which the command has made of it; and what the command wrote."""
    pytest.importorskip("tf2onnx")
    root = tmp_path_factory.mktemp("onnx")
    config = dataclasses.replace(TINY, preprocessing=Preprocessing(mean=(120.0, 110.0, 100.0), channels="BGR"))
    save_bundle(str(root / "run/model"), build_unet(config, seed=7), config, CLASSES, METRICS)
    arguments = ["export-model", "--model", "run", "--out", "first.onnx", "--format", "onnx"]
    command = [sys.executable, "-c", "from unet_ray.cli import run; run()", *arguments]
    return root, subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_the_command_writes_one_line_and_nothing_of_tensorflows(onnx_export):
    _, done = onnx_export
    lines = ["wrote first.onnx", "Next: in Python, onnxruntime.InferenceSession('first.onnx')"]
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, lines, "")


def test_an_onnx_file_says_what_it_takes_and_gives(onnx_export):
    import onnx

    root, _ = onnx_export
    metadata = {item.key: json.loads(item.value) for item in onnx.load(root / "first.onnx").metadata_props}
    bundle = read_bundle(str(root / "run"))
    assert metadata.pop("input").startswith("uint8 [N, height, width, 3], RGB")
    assert metadata.pop("output") == "float32 [N, height, width, classes], logits"
    assert metadata == {
        "class_names": ["road", "car", "sky"],
        "class_colors": [[128, 64, 128], [0, 0, 142], [70, 130, 180]],
        "image_size": [24, 32],
        **bundle.model_config.preprocessing.to_dict(),
        "temperature": None,
        "model_digest": bundle.digest,
    }


def test_the_lines_of_the_document_give_the_mask_of_segment(onnx_export, monkeypatch):
    root, _ = onnx_export
    document = (PACKAGE / "README.md").read_text().partition("### Exported networks")[2]
    lines = document.partition("```python\n")[2].partition("```")[0]
    pixels = np.random.default_rng(8).integers(0, 256, (7, 9, 3), np.uint8)
    frame = Image.fromarray(pixels).resize((101, 77), Image.Resampling.BICUBIC)
    frame.save(root / "frame.png")
    monkeypatch.chdir(root)
    names: dict = {}
    exec(lines, names)
    bundle = read_bundle(str(root / "run"))
    picture = network_input(np.asarray(frame), (24, 32), bundle.model_config.preprocessing)
    (expected,) = Labeler(bundle, LabelOptions(precision="float32", batch_size=1)).label([picture], [(77, 101)]).masks
    assert names["mask"].shape == (77, 101) and len(np.unique(expected)) == 3
    assert np.mean(names["mask"] == expected) > 0.999


# Keras 3.15.1 hands its variables to np.array when it saves them.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("global_policy", ["float32", "mixed_bfloat16"])
def test_exports_to_keras_and_savedmodel_give_the_bundles_logits(folder, tmp_path, global_policy):
    expected_BHWK = read_bundle(str(folder)).build_model(dtype_policy="float32")(FRAMES).numpy()
    before = keras.config.dtype_policy().name
    try:
        keras.config.set_dtype_policy(global_policy)
        keras_file = export_model(str(folder), str(tmp_path / "tiny.keras"), "keras")
        saved_folder = export_model(str(folder.parent), str(tmp_path / "saved"), "savedmodel")
    finally:
        keras.config.set_dtype_policy(before)
    np.testing.assert_array_equal(keras.saving.load_model(keras_file)(FRAMES).numpy(), expected_BHWK)
    saved = tf.saved_model.load(saved_folder)
    np.testing.assert_allclose(saved.serve(tf.constant(FRAMES)).numpy(), expected_BHWK, atol=1e-5)


def test_what_an_exported_network_cannot_keep_is_refused(tmp_path, model):
    config = dataclasses.replace(TINY, preprocessing=Preprocessing(resize="area-dct"))
    save_bundle(str(tmp_path / "model"), model, config, CLASSES, METRICS)
    with pytest.raises(ValueError, match="--resize area-dct.*, which an exported network cannot keep"):
        export_model(str(tmp_path / "model"), str(tmp_path / "tiny.keras"), "keras")
    assert not (tmp_path / "tiny.keras").exists()


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_exports_load_where_there_is_no_unet_ray(folder, tmp_path):
    export_model(str(folder), str(tmp_path / "tiny.keras"), "keras")
    export_model(str(folder), str(tmp_path / "saved"), "savedmodel")
    np.save(tmp_path / "frames.npy", FRAMES)
    program = """
import sys
sys.modules["unet_ray"] = None
import keras, numpy as np, tensorflow as tf
frames = np.load("frames.npy")
plain = keras.saving.load_model("tiny.keras")(frames).numpy().argmax(-1)
saved = tf.saved_model.load("saved")
served = saved.serve(tf.constant(frames)).numpy().argmax(-1)
np.savez("masks.npz", plain=plain, served=served)
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    expected_BHW = read_bundle(str(folder)).build_model(dtype_policy="float32")(FRAMES).numpy().argmax(-1)
    masks = np.load(tmp_path / "masks.npz")
    np.testing.assert_array_equal(masks["plain"], expected_BHW)
    np.testing.assert_array_equal(masks["served"], expected_BHW)


def test_exports_that_cannot_be(folder, tmp_path):
    taken = tmp_path / "taken.keras"
    shutil.copy(folder / "model.json", taken)
    for out, export_format, message in (
        ("m.pt", "torch", "--format is 'torch'; choose one of keras, savedmodel, onnx"),
        ("m.h5", "keras", "--out is {out}; a model of the format keras is a file whose name ends in .keras"),
        ("taken.keras", "keras", "{out} exists already; give a new path, or delete it first"),
    ):
        with pytest.raises(ValueError) as caught:
            export_model(str(folder), str(tmp_path / out), export_format)
        assert str(caught.value) == message.format(out=tmp_path / out)
    with pytest.raises(ValueError, match=r"is not a model folder: model\.json is missing"):
        export_model(str(tmp_path), str(tmp_path / "m.keras"), "keras")
    assert not (tmp_path / "m.keras").exists()

"""Networks made elsewhere as model folders: imported, read back, labelled with and measured."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from small_onnx import N_CLASSES, scores_of, small_network

from unet_ray import cli
from unet_ray.classes import ClassSet
from unet_ray.model.bundle import Bundle, read_bundle
from unet_ray.model.importing import import_onnx
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.labeler import Labeler
from unet_ray.model.onnx_labels import require_labelling_options
from unet_ray.model.tiling import choose_tiling
from unet_ray.pixels.images import resize_nearest
from unet_ray.pixels.preprocessing import Preprocessing, network_input
from unet_ray.training.calibrator import Calibrator
from unet_ray.training.evaluator import Evaluator
from unet_ray.training.onnx_predictor import OnnxPredictor

CLASSES = ClassSet.from_dict(
    {
        "name": "three",
        "classes": [{"name": f"c{index}", "color": [index, 0, 0], "values": [index]} for index in range(N_CLASSES)],
    }
)
PREPROCESSING = Preprocessing(resize="area", mean=(120.0, 110.0, 100.0), std=(60.0, 55.0, 50.0), channels="BGR")
FRAMES = np.random.default_rng(3).integers(0, 256, (5, 24, 32, 3), dtype=np.uint8)


def imported(folder, *, preprocessing=PREPROCESSING, **network) -> Bundle:
    onnx.save(small_network(**network), folder / "net.onnx")
    given = dataclasses.asdict(preprocessing)
    result = import_onnx(str(folder / "net.onnx"), str(folder / "model"), CLASSES, given, image_size=(24, 32))
    bundle = read_bundle(result.model)
    assert bundle.digest == result.digest and bundle.onnx == (folder / "net.onnx").read_bytes()
    return bundle


def normalised(images: np.ndarray) -> np.ndarray:
    return (images[..., ::-1].astype(np.float64) - PREPROCESSING.mean) / PREPROCESSING.std


def interpolated(logits_hwK: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, half-pixel centres, in float64."""
    for axis, out_px in enumerate(size):
        in_px = logits_hwK.shape[axis]
        at = (np.arange(out_px) + 0.5) * in_px / out_px - 0.5
        lower = np.clip(np.floor(at).astype(int), 0, in_px - 1)
        upper = np.clip(np.floor(at).astype(int) + 1, 0, in_px - 1)
        share = np.clip(at - np.floor(at), 0, 1).reshape([-1 if each == axis else 1 for each in range(3)])
        logits_hwK = logits_hwK.take(lower, axis) * (1 - share) + logits_hwK.take(upper, axis) * share
    return logits_hwK


@pytest.mark.parametrize("ending", ["logits", "probabilities"])
@pytest.mark.parametrize("tta", ["none", "flip"])
def test_labels_are_those_of_its_logits_at_each_frames_size(tmp_path, ending, tta):
    bundle = imported(tmp_path, ending=ending)
    sizes = [(24, 32), (48, 50), (24, 32), (7, 9), (30, 32)]
    labels = Labeler(bundle, LabelOptions(precision="float32", batch_size=4, n_threads=2, tta=tta)).label(FRAMES, sizes)
    scores = scores_of(normalised(FRAMES))
    if tta == "flip":
        scores = (scores + scores_of(normalised(FRAMES[:, :, ::-1]))[:, :, ::-1]) / 2
    for mask_HW, logits_hwK, size, confidence in zip(labels.masks, scores, sizes, labels.confidence_N, strict=True):
        expected = interpolated(logits_hwK, size)
        order = np.sort(expected, axis=-1)
        is_clear = order[..., -1] - order[..., -2] > 1e-4
        assert is_clear.mean() > 0.9
        np.testing.assert_array_equal(mask_HW[is_clear], expected.argmax(-1)[is_clear])
        if tta == "none":
            y, x = ((2 * np.arange(px) + 1) * n // (2 * px) for px, n in zip(size, logits_hwK.shape[:2], strict=True))
            nearest = logits_hwK[y[:, None], x]
            shares = np.exp(nearest) / np.exp(nearest).sum(-1, keepdims=True)
            assert confidence == pytest.approx(shares.max(-1).mean(), abs=1e-4)
    assert labels.pixels_NK.sum(axis=1).tolist() == [height_px * width_px for height_px, width_px in sizes]


def test_a_frame_that_keeps_its_aspect_ratio_is_found_again_in_a_quarter_of_the_pixels(tmp_path):
    padded = Preprocessing(resize="nearest", fit="pad", mean=PREPROCESSING.mean, std=PREPROCESSING.std, channels="BGR")
    bundle = imported(tmp_path, preprocessing=padded)
    frame = np.random.default_rng(1).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    image = network_input(frame, (24, 32), padded)
    labels = Labeler(bundle, LabelOptions(precision="float32", batch_size=4)).label(image[None], [(24, 16)])
    expected = interpolated(scores_of(normalised(frame[None]))[0], (24, 16))
    order = np.sort(expected, axis=-1)
    is_clear = order[..., -1] - order[..., -2] > 1e-4
    np.testing.assert_array_equal(labels.masks[0][is_clear], expected.argmax(-1)[is_clear])


def test_class_ids_have_no_confidence(tmp_path):
    bundle = imported(tmp_path, ending="ids")
    labels = Labeler(bundle, LabelOptions(precision="float32", batch_size=2)).label(FRAMES, [(48, 64)] * 5)
    ids = scores_of(normalised(FRAMES)).argmax(-1).astype(np.uint8)
    np.testing.assert_array_equal(labels.masks, [resize_nearest(each, 48, 64) for each in ids])
    assert np.isnan(labels.confidence_N).all() and np.isnan(labels.confidence_NK).all()
    assert np.isnan(labels.low_margin_share_N).all()
    np.testing.assert_array_equal(labels.grids, ids)
    for options, word in (({"slides": True}, "--inference slide"), ({"tta": "flip"}, "--tta flip")):
        with pytest.raises(ValueError, match=f"{word} takes the mean of logits, but the network of .* gives class ids"):
            require_labelling_options(bundle, **({"slides": False, "tta": "none", "precision": "auto"} | options))
    with pytest.raises(ValueError, match="--precision is bfloat16; .* is a network as ONNX, which brings its own"):
        require_labelling_options(bundle, slides=False, tta="none", precision="bfloat16")


def test_windows_have_the_size_that_the_network_takes(tmp_path):
    bundle = imported(tmp_path)
    with pytest.raises(ValueError, match="the network takes 24 32 only"):
        choose_tiling("slide", (16, 16), None, bundle.model_config)
    tiling = choose_tiling("slide", None, (12, 16), bundle.model_config)
    frame = np.random.default_rng(1).integers(0, 256, (24, 48, 3), dtype=np.uint8)
    labels = Labeler(bundle, LabelOptions(precision="float32", batch_size=2, tiling=tiling)).label([frame], [(24, 48)])
    assert labels.masks[0].shape == (24, 48) and 0 < labels.confidence_N[0] < 1


class Pairs:
    """Frames as an evaluation reads them, with masks of twice their size."""

    def __init__(self, masks):
        self.masks = masks

    def read(self, index):
        return FRAMES[index], resize_nearest(self.masks[index], 24, 32)

    def full_mask(self, index):
        return self.masks[index]


@pytest.mark.parametrize(("ending", "tta"), [("logits", "none"), ("ids", "none"), ("logits", "flip")])
def test_it_is_measured_on_the_masks_that_labelling_makes(tmp_path, ending, tta):
    bundle = imported(tmp_path, ending=ending)
    plain = LabelOptions(precision="float32", batch_size=2)
    options = dataclasses.replace(plain, tta=tta)
    masks, plain_masks = (Labeler(bundle, each).label(FRAMES, [(48, 64)] * 5).masks for each in (options, plain))
    assert np.array_equal(masks, plain_masks) == (tta == "none")
    predict = OnnxPredictor(bundle, options)
    counted = Evaluator(predict, Pairs(masks), 2, bundle.model_config).count(range(5))
    assert np.array_equal(counted.own_size_KK, np.diag(counted.own_size_KK.diagonal()))  # each pixel is right
    assert counted.own_size_KK.sum() == 5 * 48 * 64 and predict.loss(counted.sums_S) is None


@pytest.mark.parametrize("ending", ["logits", "probabilities", "ids"])
def test_its_confidence_is_measured_where_it_has_one(tmp_path, ending):
    bundle = imported(tmp_path, ending=ending)
    assert bundle.temperature is None
    options = LabelOptions(precision="float32", batch_size=2)
    labels = Labeler(bundle, dataclasses.replace(options, mask_size="model")).label(FRAMES, [(24, 32)] * 5)
    masks = [resize_nearest(mask, 48, 64) for mask in labels.masks]
    evaluator = Evaluator(OnnxPredictor(bundle, options), Pairs(masks), 2, bundle.model_config)
    calibrator = Calibrator((1.0, 1.0))
    evaluator.count(range(5), on_predicted=calibrator.add_batch)
    metrics = calibrator.metrics()
    before, after = (metrics[f"val/expected_calibration_error/{when}"] for when in ("before", "after"))
    assert before == after and (before is None) == (ending == "ids")
    if ending != "ids":  # all pixels are right, so that what lacks to 1 is the error
        np.testing.assert_allclose(calibrator.expected_errors, 1 - labels.confidence_N, atol=1e-5)
        assert after == pytest.approx(np.mean(1 - labels.confidence_N), abs=1e-5)
    assert metrics["val/error_correlation/pearson"] is None  # true errors are all 0


def test_a_temperature_for_class_ids_is_refused(tmp_path):
    bundle = imported(tmp_path, ending="ids")
    file = Path(bundle.uri) / "model.json"
    document = json.loads(file.read_text())
    document["temperature"] = 1.5
    content = {key: value for key, value in document.items() if key not in ("digest", "files")}
    content["weights_file"] = document["files"]["model.onnx"]
    document["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="model.json has a temperature for a network that gives class ids; copy the"):
        read_bundle(bundle.uri)


def test_the_command_says_what_it_has_found_and_the_folder_is_sealed(tmp_path, capsys):
    onnx.save(small_network(size=("height", "width")), tmp_path / "net.onnx")
    (tmp_path / "classes.yaml").write_text(json.dumps(CLASSES.to_dict()))
    (tmp_path / "frames").mkdir()
    Image.fromarray(FRAMES[0]).save(tmp_path / "frames" / "0.png")
    (tmp_path / "frames" / "notes.txt").write_text("no picture")
    command = ["import-model", "--onnx", str(tmp_path / "net.onnx"), "--classes", str(tmp_path / "classes.yaml")]
    command += ["--out", str(tmp_path / "model"), "--mean", "123.675", "116.28", "103.53"]
    assert cli.main(command) == 2
    assert (
        "the network takes images of several sizes (any any); choose one with --image-size" in capsys.readouterr().err
    )
    command += ["--image-size", "24", "32", "--frames", str(tmp_path / "frames")]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "the network takes float32 frames of 24x32 (nchw) and gives logits of 6x8, 1/4 of their size\n" in out
    assert f"model: {tmp_path}/model\n" in out
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["metrics.json", "model.json", "model.onnx"]
    assert cli.main(command) == 2
    assert f"{tmp_path}/model exists already; give a new path, or delete it first" in capsys.readouterr().err
    (tmp_path / "model" / "model.onnx").write_bytes((tmp_path / "net.onnx").read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match=r"model\.onnx has another sha256 than model\.json says"):
        read_bundle(str(tmp_path / "model"))


def test_a_network_that_takes_uint8_normalises_itself(tmp_path, capsys):
    onnx.save(small_network(dtype="uint8"), tmp_path / "net.onnx")
    (tmp_path / "classes.yaml").write_text(json.dumps(CLASSES.to_dict()))
    command = ["import-model", "--onnx", str(tmp_path / "net.onnx"), "--classes", str(tmp_path / "classes.yaml")]
    command += ["--image-size", "24", "32", "--out", str(tmp_path / "model")]
    assert cli.main([*command, "--std", "255", "255", "255"]) == 2
    assert "takes uint8, which cannot be normalised; leave out --mean and --std\n" in capsys.readouterr().err
    assert cli.main(command) == 0, capsys.readouterr().err
    bundle = read_bundle(str(tmp_path / "model"))
    labels = Labeler(bundle, LabelOptions(precision="float32", batch_size=4)).label(FRAMES, [(6, 8)] * 5)
    np.testing.assert_array_equal(labels.masks, scores_of(FRAMES).argmax(-1))


def test_the_digest_covers_file_and_preprocessing(tmp_path):
    digests = set()
    for index, options in enumerate([{}, {"preprocessing": Preprocessing()}, {"ending": "probabilities"}]):
        (tmp_path / str(index)).mkdir()
        digests.add(imported(tmp_path / str(index), **options).digest)
    (tmp_path / "again").mkdir()
    assert len(digests) == 3 and imported(tmp_path / "again").digest in digests


def test_what_cannot_be_made_of_it_is_one_line(tmp_path):
    bundle = imported(tmp_path)
    with pytest.raises(ValueError, match="is a network as ONNX, which is no Keras model; use its model.onnx as it is"):
        bundle.build_model()
    document = json.loads((tmp_path / "model" / "model.json").read_text())
    assert document["network"]["kind"] == "onnx" and document["weights"] == []
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/nothing.onnx does not exist; give the path of")):
        import_onnx(str(tmp_path / "nothing.onnx"), str(tmp_path / "other"), CLASSES, {})
    assert not (tmp_path / "other").exists()

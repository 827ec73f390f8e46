"""What `load` and `predict` refuse, and pictures as they may be given; `test_segmentation` compares masks."""

from __future__ import annotations

import dataclasses
import io
import types

import numpy as np
import onnx
import pytest
from PIL import Image
from predicting import predict_and_compare, require_same
from small_onnx import small_network

import unet_ray
from unet_ray.classes import ClassSet, SegmentationClass
from unet_ray.labelling import predictor
from unet_ray.labelling.decoding import DecodeOptions, decode
from unet_ray.labelling.predictor import Model, Prediction, load
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.bundle import Bundle, write_bundle
from unet_ray.model.importing import import_onnx
from unet_ray.model.label_options import LabelOptions
from unet_ray.pixels import images
from unet_ray.pixels.preprocessing import Preprocessing

CLASSES = ClassSet(
    name="two",
    classes=(
        SegmentationClass(name="road", color=(128, 64, 128), values=(1,)),
        SegmentationClass(name="sky", color=(70, 130, 180), values=(2,)),
    ),
)
CONFIG = UnetConfig(image_height_px=12, image_width_px=16, n_classes=2, n_filters=4, depth=2)
OPTIONS = DecodeOptions(network_size=(12, 16), max_pixels=10_000, timeout_s=60)
FRAME = np.random.default_rng(0).integers(0, 256, (24, 30, 3), np.uint8)


@pytest.fixture
def model() -> Model:
    """A model whose network is never reached."""
    bundle = Bundle(uri="m", model_config=CONFIG, class_set=CLASSES, metrics={}, weights={}, digest="")
    return Model(bundle, types.SimpleNamespace(), OPTIONS, LabelOptions(precision="float32", batch_size=1))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


PALETTE = Image.fromarray(FRAME).quantize(16)
ALPHA = Image.fromarray(np.dstack([FRAME, FRAME[..., 0]]))


@pytest.mark.parametrize(
    "image",
    [Image.fromarray(FRAME), Image.fromarray(FRAME[..., 0]), PALETTE, ALPHA, Image.fromarray(FRAME[..., 0] > 99)],
    ids=["RGB", "grey", "palette", "alpha", "1 bit"],
)
def test_a_pillow_image_is_the_frame_that_its_file_is(image):
    expected = decode(png(image), OPTIONS)
    given = predictor._opened(image)
    assert (given.decode(OPTIONS).height_px, given.decode(OPTIONS).width_px) == (24, 30)
    np.testing.assert_array_equal(given.decode(OPTIONS).image, expected.image)
    np.testing.assert_array_equal(given.read(), images.decode_frame(png(image)))


ALLOWED = "give a path, a Pillow image, or an array uint8 [height, width, 3] in RGB"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (FRAME / 255, f"the image is float64 of shape (24, 30, 3); {ALLOWED}"),
        (FRAME.astype(np.int64), f"the image is int64 of shape (24, 30, 3); {ALLOWED}"),
        (FRAME[..., 0], f"the image is uint8 of shape (24, 30); {ALLOWED}"),
        (np.zeros((4, 4, 4), np.uint8), f"the image is uint8 of shape (4, 4, 4); {ALLOWED}"),
        (np.zeros((2, 4, 4, 3), np.uint8), f"the image is uint8 of shape (2, 4, 4, 3); {ALLOWED}"),
        (np.zeros((0, 4, 3), np.uint8), f"the image is uint8 of shape (0, 4, 3); {ALLOWED}"),
        (7, f"int is no image; {ALLOWED}"),
        (None, f"NoneType is no image; {ALLOWED}"),
        ([], "the list of images is empty; give at least one"),
        ([FRAME, FRAME / 255], f"image 1: the image is float64 of shape (24, 30, 3); {ALLOWED}"),
        (
            Image.new("CMYK", (4, 4)),
            "image with pixels of kind CMYK; allowed are RGB, grey and palette, write it as RGB",
        ),
        (
            Image.new("I;16", (4, 4)),
            "image with pixels of kind I;16; allowed are RGB, grey and palette, write it as RGB",
        ),
        ("", "an empty path was given; give a local path or a URI such as s3://bucket/folder"),
    ],
)
def test_what_is_no_frame_is_one_line(model, image, message):
    with pytest.raises(ValueError) as caught:
        model.predict(image)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"hello", "not_an_image"),
        (b"", "not_an_image"),
        (png(Image.fromarray(FRAME))[:600], "truncated"),
        (png(Image.new("RGB", (200, 100))), "too_large"),
    ],
)
def test_a_file_that_segment_rejects_has_its_reason(model, tmp_path, content, reason):
    path = tmp_path / "frame.png"
    path.write_bytes(content)
    with pytest.raises(images.ImageRefused) as caught:
        model.predict(path)
    assert caught.value.reason == reason and str(caught.value) == f"{path}: {decode(content, OPTIONS).error}"
    with pytest.raises(FileNotFoundError):
        model.predict([tmp_path / "gone.png"])


def test_a_prediction_shows_itself():
    mask_HW = np.array([[0, 0, 1], [0, 0, 0]], np.uint8)
    frame_HWC = FRAME[:2, :3]
    prediction = Prediction(
        mask=mask_HW, confidence=0.75, class_pixels={"road": 5, "sky": 1}, class_set=CLASSES, frame=lambda: frame_HWC
    )
    assert repr(prediction) == "Prediction(2x3: road 83.3%, sky 16.7%, confidence 0.75)"
    mixed = frame_HWC * 0.45 + CLASSES.palette_K3[mask_HW] * 0.55
    assert np.abs(np.asarray(prediction.overlay()) - mixed).max() <= 0.5 + 1e-9
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(prediction._repr_png_()))), np.asarray(prediction.overlay())
    )
    html = prediction._repr_html_()
    assert (
        "road 83.3%" in html
        and 'color:rgb(128, 64, 128)">&#9632;</span> road' in html
        and 'src="data:image/png' in html
    )


def write_model(folder, **changes) -> str:
    """A random network in a model folder."""
    from unet_ray.model.weights import weight_shapes

    config, random = dataclasses.replace(CONFIG, **changes), np.random.default_rng(5)
    weights = {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in weight_shapes(config).items()}
    write_bundle(str(folder), weights, config, CLASSES, {}, temperature=1.7)
    return str(folder)


def write_frames(folder) -> str:
    """PNG and JPEG of several sizes, noise in blocks."""
    random = np.random.default_rng(2)
    for n, size in enumerate([(24, 30), (12, 16), (100, 130), (7, 90), (1, 1), (61, 40)]):
        blocks = random.integers(0, 256, (size[0] // 6 + 1, size[1] // 6 + 1, 3), np.uint8)
        image = Image.fromarray(blocks).resize(size[::-1], Image.Resampling.BICUBIC)
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{n}.png")
        image.save(folder / f"{n}.jpg", quality=88)
    return str(folder)


@pytest.mark.slow
def test_masks_are_those_of_a_labelling_with_any_options(tmp_path):
    """The labelling's own steps, with batches of three frames on one thread."""
    onnx.save(small_network(ending="logits"), tmp_path / "net.onnx")
    three = ClassSet(
        name="three", classes=(*CLASSES.classes, SegmentationClass(name="c", color=(1, 2, 3), values=(3,)))
    )
    import_onnx(str(tmp_path / "net.onnx"), str(tmp_path / "imported"), three, {"resize": "bilinear"})
    unet = write_model(tmp_path / "unet")
    padded = write_model(tmp_path / "padded", preprocessing=Preprocessing(resize="area", fit="pad"))
    questions = [
        (unet, {"precision": "bfloat16", "mask_encoding": "raw"}),
        (unet, {"precision": "float32", "tta": "flip"}),
        (unet, {"precision": "float32", "inference": "slide", "window": (8, 16), "stride": (5, 9)}),
        (padded, {"precision": "float32", "mask_size": "model"}),
        (padded, {"precision": "float32"}),
        (str(tmp_path / "imported"), {}),
    ]
    frames = write_frames(tmp_path / "frames")
    answers = predict_and_compare(
        [
            {
                "model": model,
                "frames": frames,
                "labels": str(tmp_path / f"labels{n}"),
                "options": options,
                "with_steps": True,
            }
            for n, (model, options) in enumerate(questions)
        ]
    )
    for answer in answers:
        require_same(answer)
        assert answer["confident"] == 12
    assert [len(answer["sizes"]) for answer in answers] == [6, 6, 6, 5, 6, 6]  # at the network's size two are alike


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "device is 'cuda'; it must be one of auto, gpu, cpu"),
        ({"precision": "int8"}, "precision is 'int8'; it must be one of auto, float32, bfloat16, float16"),
        ({"tta": "yes"}, "tta is 'yes'; it must be one of none, flip"),
        ({"window": (8, 8)}, "--window and --stride are for --inference slide; give that too, or leave them out"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, options, message):
    write_model(tmp_path / "model")
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "model", **options)
    assert str(caught.value) == message


def test_a_folder_that_is_no_model_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="is not a model folder: model.json is missing"):
        unet_ray.load(tmp_path)
    with pytest.raises(ValueError, match="does not exist; give the folder that `unet-ray train` wrote"):
        unet_ray.load(tmp_path / "gone")

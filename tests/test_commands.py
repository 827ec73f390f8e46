"""The commands as functions of Python, on small data: what each returns; Ray's own are tested beside their jobs."""

from __future__ import annotations

from pathlib import Path

import labelled
import numpy as np
import pytest
import small_output
from PIL import Image
from small_training import write_data

import unet_ray
from unet_ray.classes import ClassSet, SegmentationClass
from unet_ray.errors import JobFailed
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.bundle import write_bundle
from unet_ray.model.model_json import MODEL_FILE
from unet_ray.pixels import images

CONFIG = UnetConfig(image_height_px=12, image_width_px=16, n_classes=2, n_filters=4, depth=2)


@pytest.fixture
def output(tmp_path) -> tuple[str, Path]:
    """An archive and its labels."""
    root = labelled.write_archive(tmp_path / "log")
    labelled.run(root, str(tmp_path / "labels"), reject=("b/3.png",))
    return root, tmp_path / "labels"


def test_verify_returns_what_is_wrong(output):
    root, labels = output
    whole = unet_ray.verify(labels, sources=True)
    assert whole.is_whole and (whole.problems, whole.kept_labels) == ((), ())
    assert whole.sources is not None and whole.sources.n_frames == 12
    (Path(root) / "a" / "0.png").unlink()
    gone = unet_ray.verify(labels, sources=True)
    assert not gone.is_whole and gone.problems == () and len(gone.sources.problems) == 1
    assert (
        unet_ray.verify(out=labels) == unet_ray.verify(unet_ray.VerifyConfig(labels))
        and unet_ray.verify(labels).is_whole
    )
    (labels / "frames" / "part-00000.parquet").unlink()
    assert unet_ray.verify(labels).problems[0] == "frames/part-00000.parquet: missing"


def test_export_masks_returns_how_many(tmp_path):
    small_output.segment(str(tmp_path / "labels"), mask_encoding="png")
    done = unet_ray.export_masks(tmp_path / "labels", out=tmp_path / "masks", sequence="b")
    assert (done.written, done.rejected) == (5, 1)
    mask = images.decode_mask((tmp_path / "masks/b/right/1.png.png").read_bytes())
    np.testing.assert_array_equal(mask, small_output.mask_of("b/right/1.png"))


def test_check_returns_the_report(tmp_path):
    write_data(tmp_path)
    options = {"masks": tmp_path / "masks", "classes": tmp_path / "classes.yaml"}
    report = unet_ray.check(images=tmp_path / "frames", **options)
    assert report.n_pairs == 19 and not report.refused
    next((tmp_path / "frames").rglob("*.png")).write_bytes(b"no image")
    assert unet_ray.check(images=str(tmp_path / "frames"), **options).refused


def test_a_model_is_imported_and_exported(tmp_path):
    onnx = pytest.importorskip("onnx")
    from small_onnx import small_network

    write_data(tmp_path)
    onnx.save(small_network(), tmp_path / "net.onnx")
    imported = unet_ray.import_model(
        onnx=tmp_path / "net.onnx", classes=tmp_path / "classes.yaml", out=tmp_path / "model"
    )
    assert imported.model == str(tmp_path / "model") and (tmp_path / "model" / MODEL_FILE).is_file()
    with pytest.raises(ValueError, match="a model of the format keras is a file whose name ends in .keras"):
        unet_ray.export_model(model=tmp_path / "model", out=tmp_path / "net.onnx")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras 3.15 with numpy 2.4, in save
def test_an_exported_model_is_where_the_function_says(tmp_path):
    from unet_ray.model.weights import weight_shapes

    random = np.random.default_rng(0)
    weights = {name: random.normal(0, 1, shape).astype(np.float32) for name, shape in weight_shapes(CONFIG).items()}
    two = tuple(SegmentationClass(name=f"c{k}", color=(k, k, k), values=(k,)) for k in (1, 2))
    write_bundle(str(tmp_path / "model"), weights, CONFIG, ClassSet(name="two", classes=two), {})
    written = unet_ray.export_model(model=tmp_path / "model", out=tmp_path / "a.keras", format="keras")
    assert written == str(tmp_path / "a.keras") and Path(written).stat().st_size > 1000


@pytest.mark.parametrize("function", [unet_ray.evaluate, unet_ray.segment, unet_ray.train])
def test_what_needs_ray_is_refused_before_it_starts(function, tmp_path):
    Image.new("RGB", (16, 12)).save(tmp_path / "a.png")
    gone = tmp_path / "gone"
    pairs = {"images": gone, "masks": gone}
    options = {
        "evaluate": {"model": gone, **pairs},
        "segment": {"model": gone, "frames": tmp_path, "out": tmp_path.parent / "labels"},
        "train": {**pairs, "classes": "camvid", "out": tmp_path / "run"},
    }[function.__name__]
    with pytest.raises((ValueError, JobFailed), match=f"^{gone}"):
        function(**options)

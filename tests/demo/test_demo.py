from __future__ import annotations

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unet_ray.classes import PRESETS
from unet_ray.config import DemoConfig
from unet_ray.demo import run as demo
from unet_ray.demo import synthetic
from unet_ray.pixels.mask_png import encode_mask_png


def test_a_folder_that_is_no_demos_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds something that is not a demo; give another folder with --out$"):
            demo.run_demo(DemoConfig(out=str(tmp_path), overwrite=overwrite))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_tar_has_every_file_and_equal_bytes_each_time(tmp_path):
    for path in ("b/2.png", "a/1.png"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes(path.encode())
    packed = demo.pack_tar(str(tmp_path))
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert {name: tar.extractfile(name).read() for name in tar.getnames()} == {
            "a/1.png": b"a/1.png",
            "b/2.png": b"b/2.png",
        }
    assert demo.pack_tar(str(tmp_path)) == packed


def test_frames_are_drawn_once_and_those_that_are_missing_again(tmp_path):
    out = str(tmp_path)
    demo._draw(out, 3, range(1, 2), 2)
    mask = tmp_path / "CameraMask/drive01/000001.png"
    other = tmp_path / "CameraMask/drive01/000000.png"
    before, kept = mask.read_bytes(), other.stat().st_mtime_ns
    mask.unlink()
    demo._draw(out, 3, range(1, 2), 2)
    assert mask.read_bytes() == before and other.stat().st_mtime_ns == kept


def test_labels_are_scored_against_the_drives_own_masks(tmp_path):
    """Labels that are the true masks but for one frame that is all sky."""
    log, labels = tmp_path / "log", tmp_path / "labels"
    synthetic.write_log(str(log), seed=1, drives=1, frames_per_drive=2, height_px=32, width_px=48)
    classes = PRESETS["carla23"]
    true = [synthetic.draw_frame(1, 0, index, height_px=32, width_px=48)[1] for index in range(2)]
    masks = [true[0], np.full((32, 48), classes.names.index("sky"), np.uint8)]
    rows = {
        "frame_id": [f"archive.tar!drive00/{index:06d}.png" for index in range(2)],
        "mask": [encode_mask_png(mask, classes.palette_K3) for mask in masks],
    }
    (labels / "frames").mkdir(parents=True)
    pq.write_table(pa.table(rows), labels / "frames/part-00000.parquet")
    confusion = demo.score_labels(str(labels), str(log / "CameraMask"), classes)
    expected = np.zeros((23, 23), int)
    for mask, label in zip(true, masks, strict=True):
        for t, p in zip(mask.ravel(), label.ravel(), strict=True):
            expected[t, p] += 1
    assert (confusion == expected).all()


def test_the_class_table_is_read_back_from_the_statistics(tmp_path):
    rows = {"class_name": ["road", "sky", "road"], "pixels": [600, 300, 100], "frames_with_class": [2, 1, 1]}
    pq.write_table(pa.table(rows), tmp_path / "class_statistics.parquet")
    assert demo.class_pixel_table(str(tmp_path)).splitlines()[1:] == [
        "road                     700    70.0%       3",
        "sky                      300    30.0%       1",
    ]

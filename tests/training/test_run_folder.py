"""A run's folder and the options that it was begun with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import ray
from PIL import Image
from small_training import make_config, write_data

from unet_ray import cli
from unet_ray.config import TrainConfig
from unet_ray.model.calibration import Calibration
from unet_ray.options.config_files import to_yaml
from unet_ray.training.data import bounded_size, size_of_frames
from unet_ray.training.results import calibration_lines
from unet_ray.training.run_folder import CONFIG_FILE, finished, resolved


def test_a_run_of_a_version_without_an_option_is_one_without_it(tmp_path: Path) -> None:
    config = TrainConfig(images="rgb", masks="seg", classes="camvid", out=str(tmp_path))
    lines = [line for line in to_yaml(config).splitlines(keepends=True) if not line.startswith("include_hidden")]
    assert len(lines) == len(to_yaml(config).splitlines()) - 1
    (tmp_path / CONFIG_FILE).write_text("".join(lines))
    assert finished(config) is None
    with pytest.raises(ValueError, match="another configuration: --include-hidden was False, now True; give the same"):
        finished(dataclasses.replace(config, include_hidden=True))


@pytest.mark.parametrize(
    ("frame", "size"),
    [
        ((96, 128), (96, 128)),
        ((360, 480), (352, 480)),
        ((512, 1024), (512, 1024)),
        ((1080, 1920), (544, 960)),
        ((10, 5000), (32, 4992)),
        ((1, 1), (32, 32)),
    ],
)
def test_the_frames_own_size_is_rounded_and_bounded(frame, size):
    assert bounded_size(frame) == size


def test_a_run_keeps_the_size_that_was_looked_up_when_it_began(tmp_path, capsys):
    write_data(tmp_path)
    config = make_config(tmp_path, tmp_path / "run", image_size="data")
    with Image.open(next((tmp_path / "frames").rglob("*.png"))) as image:
        width_px, height_px = image.size
    assert size_of_frames(config) == bounded_size((height_px, width_px))
    assert f"for frames of {height_px}x{width_px} (--image-size data)" in capsys.readouterr().out
    assert resolved(config).image_size == "data"
    begun = dataclasses.replace(resolved(config), image_size=(64, 96))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG_FILE).write_text(to_yaml(begun))
    assert resolved(config) == begun and finished(resolved(config)) is None


@pytest.mark.parametrize("command", ["train", "evaluate", "export-model", "import-model"])
def test_a_folder_that_cannot_be_written_is_said_before_the_work(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = f"{tmp_path}/file/new"
    pairs = ["--images", str(tmp_path / "frames"), "--masks", str(tmp_path / "masks")]
    options = {
        "train": [*pairs, "--classes", "camvid", "--out", out],
        "evaluate": [*pairs, "--model", "nothing", "--out", out],
        "export-model": ["--model", "nothing", "--out", f"{out}.keras"],
        "import-model": ["--onnx", "nothing", "--classes", "camvid", "--out", out],
    }
    assert cli.main([command, *options[command]]) == 2
    line = f"cannot be written: {tmp_path}/file is a file; give another --out\n"
    assert capsys.readouterr().err.startswith(f"unet-ray: error: --out {out}") and not ray.is_initialized()
    assert cli.main([command, *options[command]]) == 2 and capsys.readouterr().err.endswith(line)


def test_what_is_said_of_a_calibration():
    fitted = Calibration(temperature=1.5, error_before=0.1, error_after=0.02)
    line = "temperature 1.500: the expected calibration error is 0.0200, 0.1000 without it"
    assert calibration_lines(fitted, validates=True) == [line]
    ends = [calibration_lines(dataclasses.replace(fitted, temperature=end), validates=True)[1] for end in (8.0, 0.125)]
    assert ends == [
        "that is the largest temperature that is tried; a better one may lie beyond it",
        "that is the smallest temperature that is tried; a better one may lie beyond it",
    ]
    assert calibration_lines(None, validates=False) == ["confidence is not calibrated: no frames validate"]
    assert calibration_lines(None, validates=True) == [
        "confidence is not calibrated: no pixel of the validation frames counts"
    ]

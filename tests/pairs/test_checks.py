"""The report on data sets that are broken on purpose: every finding by name, count and example."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_ray import cli
from unet_ray.config import CheckConfig
from unet_ray.pairs.checks import CheckReport, check_data_set

RNG = np.random.default_rng(0)
CAMVID_COLORS = np.array(
    [(128, 128, 128), (128, 0, 0), (128, 64, 128), (0, 0, 0)], np.uint8
)  # sky, building, road, void


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)


def random_frame(height_px: int = 12, width_px: int = 20) -> np.ndarray:
    return RNG.integers(0, 256, (height_px, width_px, 3), np.uint8)


def halves(left: int, right: int, height_px: int = 12, width_px: int = 20) -> np.ndarray:
    mask_HW = np.full((height_px, width_px), left, np.uint8)
    mask_HW[:, width_px // 2 :] = right
    return mask_HW


def write_pairs(root: Path, n_pairs: int, drive: str = "a") -> None:
    for index in range(n_pairs):
        save(root / "rgb" / drive / f"{index}.png", random_frame())
        save(root / "seg" / drive / f"{index}.png", halves(0, 3))


def check(root: Path, **options: str) -> CheckReport:
    return check_data_set(CheckConfig(images=str(root / "rgb"), masks=str(root / "seg"), classes="camvid", **options))


def findings(report: CheckReport, *, refused: bool) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {item.what: (item.n_files, item.examples) for item in report.findings if item.refused == refused}


def test_a_data_set_without_findings(tmp_path: Path) -> None:
    write_pairs(tmp_path, 3)
    save(tmp_path / "rgb" / "b" / "x7.png", random_frame(10, 14))
    save(tmp_path / "seg" / "b" / "x7.png", halves(11, 3, 10, 14))
    report = check(tmp_path)
    assert (report.findings, report.refused) == ((), False)
    assert report.as_text() == "\n".join(
        [
            f"frames       {tmp_path}/rgb",
            f"masks        {tmp_path}/seg",
            "pairs        4",
            "frame sizes  12 x 20 (3), 10 x 14 (1) (height x width)",
            "classes      camvid",
            "mask format  ids",
            "",
            "No findings.",
            "",
            "class                 pixels    share    masks  (of 4 without a finding)",
            "sky                      360   41.86%        3",
            "building                   0    0.00%        0",
            "pole                       0    0.00%        0",
            "road                     430   50.00%        4",
            "pavement                   0    0.00%        0",
            "tree                       0    0.00%        0",
            "sign_symbol                0    0.00%        0",
            "fence                      0    0.00%        0",
            "car                        0    0.00%        0",
            "pedestrian                 0    0.00%        0",
            "bicyclist                  0    0.00%        0",
            "(ignored)                 70    8.14%        1",
            "",
            "sequence      frames  cameras  frame indices",
            "a                  3        1  0 to 2",
            "b                  1        1  7 to 7",
            "",
            "Training would take this data set.",
        ]
    )


def test_all_that_training_refuses(tmp_path: Path) -> None:
    write_pairs(tmp_path, 12)
    rgb, seg = tmp_path / "rgb" / "a", tmp_path / "seg" / "a"
    (seg / "0.png").unlink()
    (rgb / "1.png").unlink()
    save(seg / "2.png", halves(0, 77))
    unknown = halves(0, 77)
    unknown[0, 0] = 99
    save(seg / "3.png", unknown)
    save(seg / "4.png", halves(0, 3, 6, 10))
    (rgb / "5.png").write_bytes((rgb / "5.png").read_bytes()[:300])
    (seg / "6.png").write_bytes(b"hello")
    save(rgb / "7.png", np.full((12, 20), 40_000, np.uint16))
    report = check(tmp_path)
    assert report.refused
    assert findings(report, refused=False) == {}
    refused = findings(report, refused=True)
    assert refused.pop("frames are cut short or damaged")[1][0].startswith(
        "a/5.png (PNG of 300 bytes that is cut short"
    )
    assert refused == {
        "frames have no mask": (1, ("a/0.png",)),
        "masks have no frame": (1, ("a/1.png",)),
        "masks have the unknown id 77": (2, ("a/2.png (120 pixels)", "a/3.png (120 pixels)")),
        "masks have the unknown id 99": (1, ("a/3.png (1 pixel)",)),
        "masks have another size than their frame": (1, ("a/4.png (6 x 10, not 12 x 20)",)),
        "masks are no image": (
            1,
            ("a/6.png (5 bytes that begin with 68 65 6c 6c 6f; allowed are PNG, JPEG, WebP, BMP, TIFF)",),
        ),
        "frames are of a kind that is not read": (
            1,
            ("a/7.png (PNG with 16 bits a channel; allowed are 8, write it with 8)",),
        ),
    }
    assert report.mask_format == "ids"  # one mask that cannot be read leaves the others to tell it
    assert (report.n_pairs, report.n_masks_counted) == (10, 7)
    assert report.as_text().endswith(
        "\n\nTraining would refuse this data set, because of the findings marked `refused` (8)."
    )


def test_the_exit_code_says_whether_training_would_take_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_pairs(tmp_path, 3)
    command = ["check", "--images", str(tmp_path / "rgb"), "--masks", str(tmp_path / "seg"), "--classes", "camvid"]
    assert cli.main(command) == 0
    (tmp_path / "seg" / "a" / "0.png").unlink()
    assert cli.main(command) == 1
    first, second = capsys.readouterr().out.split("Training would take this data set.")
    assert "No findings" in first and "frames have no mask" in second and "Training would refuse" in second


def test_all_that_is_only_to_be_known(tmp_path: Path) -> None:
    write_pairs(tmp_path, 8)
    rgb, seg = tmp_path / "rgb" / "a", tmp_path / "seg" / "a"
    save(rgb / "0.png", random_frame(), mode="P")
    save(rgb / "1.png", random_frame(), mode="RGBA")
    save(rgb / "2.png", random_frame(), mode="L")
    exif = Image.Exif()
    exif[0x0112] = 6
    (rgb / "3.png").unlink()
    save(rgb / "3.jpg", random_frame(), exif=exif)
    (rgb / "5.png").write_bytes((rgb / "4.png").read_bytes())
    save(seg / "6.png", halves(11, 11))
    report = check(tmp_path)
    assert not report.refused
    assert findings(report, refused=True) == {}
    assert findings(report, refused=False) == {
        "frames have a palette": (1, ("a/0.png (its colours are taken)",)),
        "frames have an alpha channel": (1, ("a/1.png (dropped)",)),
        "frames are grey": (1, ("a/2.png",)),
        "frames are turned by EXIF": (1, ("a/3.jpg (orientation 6, pixels are taken as stored)",)),
        "frames are doubles": (1, ("a/5.png (the same bytes as a/4.png)",)),
        "masks show no class: every pixel is ignored": (1, ("a/6.png",)),
    }


def test_colors_between_those_of_classes(tmp_path: Path) -> None:
    write_pairs(tmp_path, 5)
    seg = tmp_path / "seg" / "a"
    for index in range(5):
        colors_HWC = CAMVID_COLORS[halves(index % 2, 2)]
        save(seg / f"{index}.png", colors_HWC)
    smooth = Image.fromarray(CAMVID_COLORS[halves(1, 2, 3, 5)]).resize((20, 12), Image.Resampling.BILINEAR)
    smooth.save(seg / "2.png")
    (seg / "3.png").unlink()
    save(seg / "3.jpg", CAMVID_COLORS[halves(1, 2)], quality=60)
    stray = CAMVID_COLORS[halves(1, 2)]
    stray[4, 5:7] = (1, 250, 3)
    save(seg / "4.png", stray)
    report = check(tmp_path, mask_format="colors")
    refused = findings(report, refused=True)
    n_files, examples = refused.pop("masks have colours between those of classes: saved as JPEG or resized smoothly")
    assert n_files == 2
    assert [example.split(" (")[0] for example in examples] == ["a/2.png", "a/3.jpg"]
    assert refused == {"masks have the unknown colour (1, 250, 3)": (1, ("a/4.png (2 pixels)",))}
    assert findings(report, refused=False) == {
        "masks are saved as JPEG": (1, ("a/3.jpg (which changes pixels; save masks as PNG)",))
    }
    assert report.n_masks_counted == 2
    # Without the option nothing says for certain what the masks mean, but each is still looked at as what it resembles.
    by_itself = findings(check(tmp_path), refused=True)
    assert "masks leave open what their pixels mean" in by_itself
    assert {"masks have the unknown colour (1, 250, 3)"} <= by_itself.keys()


def test_many_unknown_values_are_summed_up(tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    save(tmp_path / "seg" / "a" / "0.png", np.arange(12 * 20, dtype=np.uint8).reshape(12, 20))
    what = [item.what for item in check(tmp_path).findings]
    assert what[0] == "masks have the unknown id 12"
    assert what[-1] == f"masks have further unknown ids ({240 - 12 - 10})"
    assert len(what) == 11


def test_names_that_a_pattern_does_not_match(tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    save(tmp_path / "rgb" / "cover.png", random_frame())
    save(tmp_path / "seg" / "cover.png", halves(0, 3))
    report = check(tmp_path, path_pattern=r"^(?P<sequence>[^/]+)/(?P<frame_index>\d+)")
    assert findings(report, refused=False) == {
        "frames do not match --path-pattern: their drive has no name": (1, ("cover.png",))
    }
    assert [(item.sequence, item.n_frames) for item in report.sequences] == [("", 1), ("a", 2)]


def test_progress_goes_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path, 3)
    check(tmp_path)
    captured = capsys.readouterr()
    assert captured.err.startswith("3 of 3 pairs (100%), ") and captured.out == ""


def test_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        check(tmp_path)
    assert str(error.value) == f"{tmp_path}/rgb: no such folder of frames"

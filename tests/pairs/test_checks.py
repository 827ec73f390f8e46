"""The report on data sets that are broken on purpose: every finding by name, count and example."""

from __future__ import annotations

import pickle
import shlex
from pathlib import Path

import numpy as np
import pytest
from phases import assert_in_order
from PIL import Image

from unet_ray import cli
from unet_ray.classes import PRESETS, UnknownValuesError
from unet_ray.config import CheckConfig
from unet_ray.pairs.check_report import CheckReport
from unet_ray.pairs.checks import check_data_set
from unet_ray.pairs.drives import find_named_drives

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
    output = capsys.readouterr().out
    root = tmp_path
    following = f"Next: unet-ray train --images {root}/rgb --masks {root}/seg --classes camvid --out …"
    phases = (f"listing {root}/rgb and {root}/seg", "reading 3 pairs", "frames  ", "No findings")
    assert_in_order(output, (*phases, "Training would take this data set.", following))
    (tmp_path / "seg" / "a" / "0.png").unlink()
    assert cli.main(command) == 1
    output = capsys.readouterr().out
    assert "frames have no mask" in output and "Training would refuse" in output
    assert output.endswith("\nNext: mend what is marked `refused`, and give the same command again\n")


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
    assert what[-1] == f"masks have {240 - 12} unknown ids in all"
    assert len(what) == 11
    assert check(tmp_path).findings[-1].examples == ("a/0.png (228)",)


def ids_of(share: float, value: int, other: int) -> np.ndarray:
    mask_HW = np.full((12, 20), other, np.uint8)
    mask_HW.reshape(-1)[: round(share * mask_HW.size)] = value
    return mask_HW


def cityscapes_pairs(root: Path, masks: list[np.ndarray]) -> None:
    for index, mask_HW in enumerate(masks):
        save(root / "rgb" / f"{index}.png", random_frame())
        save(root / "seg" / f"{index}.png", mask_HW)


def test_most_pixels_are_ignored_where_train_ids_are_taken_for_label_ids(tmp_path: Path) -> None:
    # Of the train ids 0 to 18, the label ids of classes are 7, 8, 11, 12, 13, 17: road (0) and car (13) here.
    cityscapes_pairs(tmp_path, [ids_of(0.8, 0, 13), ids_of(0.9, 0, 13), ids_of(0.7, 0, 8)])
    folders = ["--images", f"{tmp_path}/rgb", "--masks", f"{tmp_path}/seg", "--classes"]
    config = cli.parse("check", [*folders, "cityscapes"])
    report = check_data_set(config)
    assert not report.refused
    assert findings(report, refused=False) == {
        "masks are ignored for the most part: 80% of all pixels mean no class": (
            3,
            ("0.png (80%)", "1.png (90%)", "2.png (70%)"),
        ),
        "masks fit --classes bdd100k or cityscapes_train_ids: the same classes by other ids": (3, ()),
    }
    assert check_data_set(cli.parse("check", [*folders, "cityscapes_train_ids"])).findings == ()


def test_label_ids_that_are_taken_for_train_ids(tmp_path: Path) -> None:
    cityscapes_pairs(tmp_path, [ids_of(0.8, 7, 26), ids_of(0.8, 7, 33)])
    report = check_data_set(
        CheckConfig(images=f"{tmp_path}/rgb", masks=f"{tmp_path}/seg", classes="cityscapes_train_ids")
    )
    assert findings(report, refused=True).keys() == {"masks have the unknown id 26", "masks have the unknown id 33"}
    assert findings(report, refused=False) == {
        "masks fit --classes cityscapes or kitti: the same classes by other ids": (2, ())
    }


SWAPPED = "frames look like masks, and masks like frames: give --images and --masks the other way round"


def test_swapped_folders_are_the_only_finding(tmp_path: Path) -> None:
    for index in range(20):
        save(tmp_path / "seg" / "a" / f"{index}.png", random_frame())
        save(tmp_path / "rgb" / "a" / f"{index}.png", halves(0, 3))
    (tmp_path / "seg" / "a" / "0.png").write_bytes(b"")
    report = check(tmp_path)
    assert [(item.what, item.n_files) for item in report.findings] == [(SWAPPED, 20)]
    assert report.refused and report.n_masks_counted == 0


def test_photographs_for_masks_of_another_class_set_are_swapped_too(tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / "seg" / f"{index}.png", random_frame(40, 60))  # over 1,000 colours
        save(tmp_path / "rgb" / f"{index}.png", halves(200, 201, 40, 60))  # no ids of camvid
    assert [item.what for item in check(tmp_path).findings] == [SWAPPED]
    for index in range(3):
        save(tmp_path / "rgb" / f"{index}.png", random_frame(40, 60))
    assert SWAPPED not in [item.what for item in check(tmp_path).findings]


def test_an_error_about_a_photograph_holds_few_of_its_colours(tmp_path: Path) -> None:
    colors_HWC = np.arange(3 * 300 * 400).reshape(300, 400, 3)
    photograph = (colors_HWC * np.array([7, 13, 31]) % 251).astype(np.uint8)
    known = {tuple(item.color) for item in PRESETS["camvid"].classes} | {(0, 0, 0)}
    colors = {tuple(color) for color in photograph.reshape(-1, 3).tolist()} - known
    with pytest.raises(UnknownValuesError) as error:
        PRESETS["camvid"].encode_colors(photograph)
    assert (error.value.n_values, len(error.value.values)) == (len(colors), min(256, len(colors)))
    again = pickle.loads(pickle.dumps(error.value))
    assert (again.n_values, again.n_pixels, again.values) == (
        error.value.n_values,
        error.value.n_pixels,
        error.value.values,
    )


def drives_named(root: Path, drives: tuple[str, ...], n_frames: int = 4, end: str = "", start: int = 8) -> None:
    for drive in drives:
        for number in range(start, start + n_frames):
            save(root / "rgb" / f"{drive}{number:05d}{end}.png", random_frame())
            save(root / "seg" / f"{drive}{number:05d}.png", halves(0, 3))


@pytest.mark.parametrize(
    ("drives", "end", "expected"),
    [
        (("0001TP_", "0016E5_"), "", ["0001TP", "0016E5"]),
        (("F61-", "F62-"), "", ["F61", "F62"]),
        (("0001TP_", "0006R0_f"), "", ["0001TP_", "0006R0_f"]),
        (("run", "day"), "", ["day", "run"]),
        (("2018_cam0_", "2019_cam0_"), "_rgb8bit", ["2018_cam0", "2019_cam0"]),
        (("a/x_", "a/y_", "b/x_"), "", ["a/x", "a/y", "b/x"]),
    ],
)
def test_drives_that_only_names_tell_come_with_a_pattern_that_runs(
    drives: tuple[str, ...], end: str, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drives_named(tmp_path, drives, end=end)
    suffix = ["--image-suffix", end] if end else []
    command = ["check", "--images", f"{tmp_path}/rgb", "--masks", f"{tmp_path}/seg", "--classes", "camvid", *suffix]
    assert cli.main(command) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "look like several drives" in line)
    option, pattern = shlex.split(line[line.index("--path-pattern") :])
    assert cli.main([*command, option, pattern]) == 0
    assert "No findings." in capsys.readouterr().out
    report = check_data_set(cli.parse("check", [*command[1:], option, pattern]))
    assert [(item.sequence, item.n_frames, item.first_index) for item in report.sequences] == [
        (name, 4, 8) for name in expected
    ]


@pytest.mark.parametrize(
    "names",
    [
        [f"{number:06d}_10" for number in range(9)],  # KITTI
        [f"0a0a{number}b1a-7c39d{number}41" for number in range(9)],  # BDD100K
        [f"{side}_{number:04d}" for side in ("left", "right") for number in range(9)],
        [f"cam{camera}_{number:04d}" for camera in (0, 1) for number in range(9)],
        [f"aachen_{number:06d}_000019" for number in range(9)],  # Cityscapes: its drives are folders
        [f"{number}" for number in range(9)],
    ],
)
def test_other_names_are_no_drives(names: list[str]) -> None:
    assert find_named_drives([f"{name}.png" for name in names], "") is None


def test_a_pattern_that_misses_frames_comes_with_one_that_does_not(tmp_path: Path) -> None:
    drives_named(tmp_path, ("0001TP_", "Seq05VD_"))
    report = check(tmp_path, path_pattern=r"^(?P<sequence>\d+[A-Z]*)_(?P<frame_index>\d+)")
    (finding,) = report.findings
    assert finding.what == (
        "frames do not match --path-pattern: their drive has no name; give --path-pattern "
        r"'^(?P<sequence>.+)[_.-](?P<frame_index>\d+)\D*$', which fits all"
    )
    assert (finding.n_files, finding.examples[0]) == (4, "Seq05VD_00008.png")


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

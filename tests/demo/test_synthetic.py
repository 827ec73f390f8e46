from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_ray.demo import synthetic
from unet_ray.demo.synthetic import Tag, draw_frame

HEIGHT_PX, WIDTH_PX = 48, 80


def draw(drive: int, index: int, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    return draw_frame(seed, drive, index, height_px=HEIGHT_PX, width_px=WIDTH_PX)


def distance(left_HWC: np.ndarray, right_HWC: np.ndarray) -> float:
    return float(np.abs(left_HWC.astype(int) - right_HWC.astype(int)).mean())


def test_frame_and_mask_have_the_asked_size():
    frame_HWC, mask_HW = draw(0, 0)
    assert (frame_HWC.shape, frame_HWC.dtype) == ((48, 80, 3), np.uint8)
    assert (mask_HW.shape, mask_HW.dtype) == ((48, 80), np.uint8)


def test_the_default_size_is_the_notebooks():
    assert draw_frame(0, 0, 0)[0].shape == (480, 640, 3)


def test_the_same_numbers_draw_the_same_pixels_in_any_order():
    first = [draw(2, index) for index in (0, 9)]
    draw(3, 4)
    synthetic.street.lay_out_drive.cache_clear()
    synthetic.street._block.cache_clear()
    again = [draw(2, index) for index in (9, 0)][::-1]
    for (frame_HWC, mask_HW), (frame_again_HWC, mask_again_HW) in zip(first, again, strict=True):
        np.testing.assert_array_equal(frame_HWC, frame_again_HWC)
        np.testing.assert_array_equal(mask_HW, mask_again_HW)


def test_drawing_leaves_numpys_own_random_state_alone():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    draw(0, 3)
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_another_seed_and_another_drive_look_otherwise():
    assert distance(draw(0, 0, seed=5)[0], draw(0, 0, seed=6)[0]) > 10
    assert distance(draw(0, 0)[0], draw(1, 0)[0]) > 10


def test_no_two_drives_are_alike():
    frames = [draw(drive, 10)[0] for drive in range(12)]
    pairs = [(a, b) for a in range(12) for b in range(a)]
    assert min(distance(frames[a], frames[b]) for a, b in pairs) > 8


def test_frames_that_follow_each_other_are_more_alike_than_drives_are():
    frames = {(drive, index): draw(drive, index)[0] for drive in range(3) for index in (20, 21)}
    within = max(distance(frames[drive, 20], frames[drive, 21]) for drive in range(3))
    between = min(distance(frames[a, 20], frames[b, 21]) for a in range(3) for b in range(3) if a != b)
    assert 0 < within < between


@pytest.mark.parametrize("drive", [0, 1, 2, 3, 4, 17])
def test_every_drive_shows_every_class_and_no_other(drive):
    counts = sum(np.bincount(draw(drive, index)[1].ravel(), minlength=256) for index in range(0, 24, 2))
    assert set(np.flatnonzero(counts)) == set(Tag)
    assert len(Tag) >= 12
    assert set(Tag) <= set(range(23))
    assert counts[list(Tag)].min() >= 0.001 * counts.sum(), "a class that is hardly there cannot be learned"


def test_the_tags_are_those_of_the_class_set():
    from unet_ray.classes import PRESETS

    value_of = {one.name: one.values for one in PRESETS["carla23"].classes}
    for tag in Tag:
        assert value_of[tag.name.lower()] == (int(tag),)


@pytest.mark.parametrize("drive", range(5))
def test_the_frame_shows_what_the_mask_says(drive):
    drawn = [draw_frame(5, drive, index, height_px=96, width_px=128) for index in (0, 12, 24)]
    pixels = np.concatenate([frame_HWC.reshape(-1, 3) for frame_HWC, _ in drawn]).astype(float)
    tags = np.concatenate([mask_HW.ravel() for _, mask_HW in drawn])
    mean = {tag: pixels[tags == tag].mean(axis=0) for tag in Tag}
    brightness = {tag: mean[tag].mean() for tag in Tag}
    assert brightness[Tag.SKY] > brightness[Tag.ROAD] + 20
    assert brightness[Tag.ROAD_LINE] > brightness[Tag.ROAD] + 30
    assert brightness[Tag.SIDEWALK] > brightness[Tag.ROAD] + 15
    greenness = {tag: mean[tag][1] - (mean[tag][0] + mean[tag][2]) / 2 for tag in Tag}
    assert min(greenness[Tag.VEGETATION], greenness[Tag.TERRAIN]) > greenness[Tag.BUILDING] + 8
    redness = {tag: mean[tag][0] - mean[tag][2] for tag in Tag}
    assert min(redness[Tag.WALL], redness[Tag.FENCE]) > redness[Tag.ROAD] + 8


def test_a_classes_edge_in_the_mask_is_an_edge_in_the_frame():
    # Drive 0 of seed 0 is a clear day. Across the upper edge of the road lines the colour jumps where the mask does:
    # one pixel farther it does so much less.
    frame_HWC, mask_HW = draw_frame(0, 0, 6, height_px=240, width_px=320)
    gray_HW = frame_HWC.astype(float).mean(axis=2)
    step_HW = np.abs(np.diff(gray_HW, axis=1))
    line_HW = mask_HW == Tag.ROAD_LINE
    road_HW = mask_HW == Tag.ROAD
    edge_HW = (line_HW[:, :-1] & road_HW[:, 1:]) | (road_HW[:, :-1] & line_HW[:, 1:])
    assert edge_HW.sum() > 100
    at_edge = step_HW[edge_HW].mean()
    for shift in (-1, 1):
        beside_HW = np.roll(edge_HW, shift, axis=1) & ~edge_HW
        assert at_edge > 4 * step_HW[beside_HW].mean()


def test_the_road_is_below_the_sky():
    _, mask_HW = draw(0, 0)
    assert not np.isin(mask_HW[:16], (Tag.ROAD, Tag.SIDEWALK, Tag.TERRAIN)).any()
    assert not (mask_HW[-16:] == Tag.SKY).any()
    assert (mask_HW[-8:] == Tag.ROAD).mean() > 0.5


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_log_has_the_notebooks_layout_and_the_id_in_the_red_channel(tmp_path):
    size = {"height_px": 48, "width_px": 80}
    assert synthetic.write_log(str(tmp_path), seed=5, drives=2, frames_per_drive=3, first_drive=4, **size) == [
        "drive04",
        "drive05",
    ]
    names = [f"{drive}/{index:06d}.png" for drive in ("drive04", "drive05") for index in range(3)]
    files = written(tmp_path)
    assert sorted(files) == sorted(f"{folder}/{name}" for folder in ("CameraRGB", "CameraMask") for name in names)
    frame_HWC, mask_HW = draw(4, 2)
    frame_file = Image.open(io.BytesIO(files["CameraRGB/drive04/000002.png"]))
    mask_file = Image.open(io.BytesIO(files["CameraMask/drive04/000002.png"]))
    assert (frame_file.format, frame_file.mode) == (mask_file.format, mask_file.mode) == ("PNG", "RGB")
    np.testing.assert_array_equal(np.asarray(frame_file), frame_HWC)
    np.testing.assert_array_equal(np.asarray(mask_file)[..., 0], mask_HW)
    assert not np.asarray(mask_file)[..., 1:].any()


def test_a_log_is_the_same_bytes_however_it_is_written(tmp_path):
    size = {"height_px": 48, "width_px": 80}
    synthetic.write_log(str(tmp_path / "whole"), seed=1, drives=2, frames_per_drive=2, **size)
    for drive, index in ((1, 1), (0, 0), (1, 0), (0, 1)):
        synthetic.write_frame(str(tmp_path / "single"), seed=1, drive=drive, index=index, **size)
    assert written(tmp_path / "whole") == written(tmp_path / "single")


@pytest.mark.parametrize(
    ("numbers", "size", "message"),
    [
        ((0, -1, 0), (48, 80), "seed 0, drive -1, frame 0: none of them may be negative"),
        ((0, 0, 0), (8, 80), "a frame of 8x80 px is too small: draw at least 16 px a side"),
    ],
)
def test_what_cannot_be_drawn_is_refused(numbers, size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_frame(*numbers, height_px=size[0], width_px=size[1])


def test_an_empty_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match=re.escape("0 drives of 3 frames: at least one of each is needed")):
        synthetic.write_log(str(tmp_path), seed=0, drives=0, frames_per_drive=3)
    assert not list(tmp_path.iterdir())


def test_a_small_and_a_long_picture_are_drawn():
    for height_px, width_px in ((16, 16), (33, 201), (120, 17)):
        frame_HWC, mask_HW = draw_frame(3, 1, 5, height_px=height_px, width_px=width_px)
        assert frame_HWC.shape[:2] == mask_HW.shape == (height_px, width_px)

"""Pictures: size, what they show where, the legend's colours, and that no display or global state is needed."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from unet_ray import PACKAGE
from unet_ray.class_files import class_set_of
from unet_ray.classes import IGNORED_ID, PRESETS, ClassSet
from unet_ray.drawing.pictures import draw_confusion, draw_curves, draw_preview, draw_samples, overlay

CAMVID, CARLA = PRESETS["camvid"], PRESETS["carla23"]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def has(picture_HWC: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((picture_HWC == color).all(axis=2).sum())


def noise(height_px: int, width_px: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), np.uint8)


def test_samples_show_masks_in_their_columns_in_exact_colors() -> None:
    true = np.full((30, 40), 3, np.uint8)  # road
    predicted = np.full((15, 20), 8, np.uint8)  # car, at the network's size
    picture = pixels(draw_samples([noise(30, 40)], [true], [predicted], CAMVID, captions=["drive_01/000007.png"]))
    left, middle, right = np.array_split(picture[:260], 3, axis=1)
    road, car = CAMVID.classes[3].color, CAMVID.classes[8].color
    assert has(middle, road) > 60_000 > has(left, road)
    assert has(right, car) > 60_000 > has(middle, car)
    legend = picture[-50:]
    assert has(legend, road) and has(legend, car)
    assert not any(has(legend, item.color) for item in CAMVID.classes if item.name not in ("road", "car"))


@pytest.mark.parametrize(("class_set", "color"), [(CAMVID, (0, 0, 0)), (CARLA, (255, 255, 255))])
def test_ignored_pixels_look_like_no_class(class_set: ClassSet, color: tuple[int, int, int]) -> None:
    mask = np.full((30, 40), 7, np.uint8)
    mask[:15] = IGNORED_ID
    picture = pixels(draw_samples([np.full((30, 40, 3), 90, np.uint8)], [mask], [mask], class_set))
    middle = np.array_split(picture, 3, axis=1)[1]
    assert (middle[80, 50:-50] == color).all()
    assert (middle[220, 50:-50] == class_set.classes[7].color).all()


def test_samples_of_as_many_classes_as_there_can_be_are_drawn() -> None:
    classes = class_set_of([f"c{index}" for index in range(254)], source="names")
    mask = np.arange(254, dtype=np.uint8)[None].repeat(60, axis=0)
    frame = np.full((60, 254, 3), 128, np.uint8)
    picture = pixels(draw_samples([frame], [mask], [mask], classes))
    n_pixels = Counter(map(tuple, picture.reshape(-1, 3).tolist()))
    assert all(n_pixels[item.color] > 60 for item in classes.classes[:190])
    assert near(picture, classes.classes[-1].color, 40) > 60


def test_samples_of_many_classes_stay_small_and_exact() -> None:
    masks = [np.arange(23, dtype=np.uint8).repeat(4)[None].repeat(60, axis=0) for _ in range(4)]
    frames = [noise(60, 92, seed) for seed in range(4)]
    png = draw_samples(frames, masks, masks, CARLA, captions=["a/long/path/" * 20] * 4)
    assert len(png) < 500_000
    picture = pixels(png)
    assert all(has(picture, item.color) > 1000 for item in CARLA.classes)
    assert png == draw_samples(frames, masks, masks, CARLA, captions=["a/long/path/" * 20] * 4)


def near(picture_HWC: np.ndarray, color: tuple[int, ...], most: int = 2) -> int:
    return int((np.abs(picture_HWC.astype(int) - color).max(axis=2) <= most).sum())


def test_an_overlay_mixes_colours_and_leaves_ignored_pixels() -> None:
    frame = np.full((4, 6, 3), (200, 100, 0), np.uint8)
    mask = np.array([[1, 1, IGNORED_ID]] * 2, np.uint8)
    laid = overlay(frame, mask, CAMVID)
    assert laid.shape == (4, 6, 3) and (laid[:, 4:] == frame[:, 4:]).all()
    mixed = [round(0.45 * f + 0.55 * c) for f, c in zip((200, 100, 0), CAMVID.classes[1].color, strict=True)]
    assert (laid[:, :4] == mixed).all()


def test_a_preview_shows_each_frame_beside_itself_with_its_mask_over_it() -> None:
    frame = np.full((30, 50, 3), 200, np.uint8)
    mask = np.full((30, 50), 1, np.uint8)
    mask[:, 25:] = IGNORED_ID
    picture = pixels(draw_preview([frame] * 5, [mask] * 5, [f"{i}.png" for i in range(5)], CAMVID))
    laid = tuple(round(0.45 * 200 + 0.55 * part) for part in CAMVID.classes[1].color)
    cell_px = 240 * 144
    assert near(picture, laid) == pytest.approx(5 * cell_px / 2, rel=0.03)
    assert near(picture, (200, 200, 200)) == pytest.approx(5 * cell_px * 1.5, rel=0.03)
    left, right = picture[15:159, 15:255], picture[15:159, 259:499]
    assert near(left, (200, 200, 200)) == cell_px and near(right, laid) == cell_px / 2
    assert has(picture, (0, 0, 0)) < 1000  # text alone: ignored pixels show the frame


def test_a_mark_is_drawn_around_what_is_small_in_both_pictures() -> None:
    frame = np.full((30, 50, 3), 90, np.uint8)
    mask = np.full((30, 50), 1, np.uint8)
    mask[15, 25] = 8
    plain, marked = (
        pixels(draw_preview([frame], [mask], ["a.png"], CAMVID, marks=[mark]))
        for mark in (None, (15 / 30, 25 / 50, 16 / 30, 26 / 50))
    )
    differs = (np.abs(plain.astype(int) - marked) > 30).any(axis=2)  # a palette of more colours is another one
    rows, columns = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
    left = (plain.shape[1] - 484) // 2  # of the pair, in the middle above its legend
    assert (rows[0], rows[-1]) == (15 + 72 - 6, 15 + 77 + 5)
    assert (columns[0], columns[-1]) == (left + 120 - 6, left + 244 + 125 + 5)
    assert (
        not differs[:, left + 140 : left + 230].any() and not differs[15 + 72 : 15 + 77, left + 120 : left + 125].any()
    )


@pytest.mark.parametrize("n_frames", [1, 3, 8])
def test_a_preview_of_any_number_of_frames_of_any_size(n_frames: int) -> None:
    sizes = [(30, 50), (50, 30), (7, 9)]
    frames = [noise(*sizes[i % 3], i) for i in range(n_frames)]
    masks = [np.full(sizes[i % 3], i, np.uint8) for i in range(n_frames)]
    png = draw_preview(frames, masks, ["a/b.png"] * n_frames, CARLA, reasons=["typical"] * n_frames)
    assert len(png) < 500_000
    assert pixels(png).shape[1] >= 550


@pytest.mark.parametrize(("size", "n_pairs"), [((64, 96), 2), ((96, 32), 4), ((20, 90), 2), ((640, 10), 4)])
def test_previews_of_odd_shapes_are_no_larger_than_others(size: tuple[int, int], n_pairs: int) -> None:
    frames = [noise(*size, i) for i in range(n_pairs)]
    masks = [np.zeros(size, np.uint8)] * n_pairs
    picture = pixels(draw_preview(frames, masks, ["drive/" * 40] * n_pairs, CARLA, reasons=["why " * 40] * n_pairs))
    assert 200 < picture.shape[1] <= 1100 and picture.shape[0] < 420


def test_small_things_keep_their_colours_in_a_picture_of_many() -> None:
    """A traffic sign of some pixels among 23 classes of noisy frames, laid over white."""
    frame, mask = noise(120, 160), np.random.default_rng(2).integers(0, 12, (120, 160)).astype(np.uint8)
    mask[:, :120] = 7
    frame[50:56, 20:26], mask[50:56, 20:26] = 255, 12
    picture = pixels(draw_preview([frame] * 6, [mask] * 6, ["a.png"] * 6, CARLA))
    sign = tuple(round(0.45 * 255 + 0.55 * part) for part in CARLA.classes[12].color)
    assert near(picture, sign, 20) >= 6 * 60


def test_a_long_path_is_cut_at_its_start_and_a_reason_at_its_end() -> None:
    def text(reason: str, caption: str) -> np.ndarray:
        frame, mask = np.full((30, 50, 3), 128, np.uint8), np.zeros((30, 50), np.uint8)
        return pixels(draw_preview([frame] * 2, [mask] * 2, [caption] * 2, CAMVID, reasons=[reason] * 2))[159:-45]

    long_path, long_reason = text("a", "x/" * 300 + "7.png"), text("b " * 300, "a")
    assert (long_path == text("a", "y/" * 30 + "x/" * 270 + "7.png")).all()
    assert (long_path != text("a", "x/" * 300 + "8.png")).any()
    assert (long_reason == text("b " * 270 + "c " * 30, "a")).all()
    assert (long_reason[:, 515:523] == 255).all() and (long_path[:, 515:523] == 255).all()  # between the pairs


def test_names_that_the_font_lacks_are_drawn_without_a_warning() -> None:
    frame = noise(30, 50)
    assert draw_preview([frame], [np.zeros((30, 50), np.uint8)], ["街道/1.png"], CAMVID)


def history(n_epochs: int) -> list[dict[str, float | None]]:
    return [
        {
            "epoch": epoch,
            "loss": 2 / epoch,
            "accuracy": 1 - 1 / (epoch + 1),
            "val/loss": 3 / epoch,
            "val/pixel_accuracy": 0.5,
            "val/mean_iou": None if epoch == 2 else 0.6 - 0.3 / epoch,
        }
        for epoch in range(1, n_epochs + 1)
    ]


def test_curves_have_a_panel_more_with_validation() -> None:
    with_validation = pixels(draw_curves(history(40)))
    alone = pixels(draw_curves([{"epoch": 1, "loss": 2.0, "accuracy": 0.4}]))
    assert with_validation.shape == (350, 1200, 3)
    assert alone.shape == (350, 800, 3)
    assert has(with_validation, (255, 255, 255)) > 300_000


@pytest.mark.parametrize("value", [0.02, 0.5, 0.98])
def test_the_legend_of_curves_lies_below_all_of_them(value: float) -> None:
    """A flat curve at the bottom, in the middle, at the top: the same pixels of it are seen."""
    validated = {"val/loss": value, "val/pixel_accuracy": value, "val/mean_iou": value}
    rows = [{"epoch": epoch, "loss": 1.0, "accuracy": 0.25, **validated} for epoch in range(1, 41)]
    picture = pixels(draw_curves(rows))
    assert near(picture[:-40], (31, 95, 168), 40) > 3 * 290  # three curves, each as wide as its panel
    assert near(picture[-40:], (31, 95, 168), 40) > 20 and has(picture[-40:], (209, 73, 91)) > 10
    assert near(picture[-40:], (154, 165, 177), 40) > 20


def test_a_confusion_matrix_is_normalised_by_row() -> None:
    confusion_KK = np.array([[900_000, 100_000], [0, 1]])
    same = draw_confusion(confusion_KK // np.array([[1000], [1]]), ["road", "car"])
    rows, columns = pixels(draw_confusion(confusion_KK, ["road", "car"])), pixels(same)
    cells = [
        [
            tuple(int(part) for part in picture[60 + 130 * row, -280 + 130 * column])
            for row in (0, 1)
            for column in (0, 1)
        ]
        for picture in (rows, columns)
    ]
    assert cells[0] == cells[1]
    road_as_road, road_as_car, car_as_road, car_as_car = (sum(cell) for cell in cells[0])
    assert car_as_car < road_as_road < road_as_car < car_as_road  # 100, 90, 10 and 0 percent: the darker the more


def test_classes_that_occur_in_neither_are_left_out_of_a_confusion_matrix() -> None:
    names = ["road", "car", "sky", "tree", "water"]
    confusion_KK = np.zeros((5, 5), np.int64)
    confusion_KK[0, [0, 3]] = 90, 10  # trees are predicted and never true
    confusion_KK[2, 2] = 50
    kept = [0, 2, 3]
    alone = pixels(draw_confusion(confusion_KK[np.ix_(kept, kept)], [names[k] for k in kept]))
    picture = pixels(draw_confusion(confusion_KK, names))
    assert picture.shape == (alone.shape[0] + 20, alone.shape[1], 3)  # and a line that says that two are left out
    assert np.abs(picture[70:].astype(int) - alone[50:]).mean() < 1
    assert near(picture[40:60], (102, 102, 102), 40) > 20


def test_a_confusion_matrix_of_no_pixel_has_all_classes() -> None:
    empty = pixels(draw_confusion(np.zeros((3, 3), np.int64), ["road", "car", "sky"]))
    assert empty.shape == pixels(draw_confusion(np.diag([1, 1, 1]), ["road", "car", "sky"])).shape


@pytest.mark.parametrize("n_classes", [1, 23, 31])
def test_a_confusion_matrix_of_any_number_of_classes(n_classes: int) -> None:
    confusion_KK = np.diag(np.arange(n_classes))  # class 0 is absent
    png = draw_confusion(confusion_KK, [f"class_{i}" for i in range(n_classes)])
    assert len(png) < 500_000
    assert (np.abs(pixels(png).astype(int) - (8, 48, 107)).max(axis=2) <= 8).any() == (n_classes > 1)


@pytest.mark.parametrize("length", [41, 400])
def test_long_names_of_classes_are_cut(length: int) -> None:
    names = ["a" * length, "b" * length]
    assert pixels(draw_confusion(np.eye(2, dtype=int), names)).shape[1] < 900
    classes = class_set_of(names, source="names")
    mask = np.arange(2, dtype=np.uint8).repeat(20)[None].repeat(30, axis=0)
    assert pixels(draw_samples([noise(30, 40)], [mask], [mask], classes)).shape[1] < 1000


@pytest.mark.parametrize(("name", "least"), [("samples", 2000), ("preview", 100)])
def test_readmes_pictures_have_the_classes_own_colours(name: str, least: int) -> None:
    file = PACKAGE.parent / ".github" / "readme" / f"{name}.png"
    picture = pixels(file.read_bytes())
    seen = {item.name for item in CARLA.classes if has(picture, item.color) >= least}
    assert seen - {"unlabeled"} == {
        *("building", "fence", "pedestrian", "pole", "road_line", "road", "sidewalk", "vegetation", "vehicle", "wall"),
        *("traffic_sign", "sky", "traffic_light", "terrain"),
    }
    assert file.stat().st_size < 300_000


def test_no_pyplot() -> None:
    code = "import sys, unet_ray.drawing.pictures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0

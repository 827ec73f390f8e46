"""Pictures: size, what they show where, the legend's colours, and that no display or global state is needed."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from unet_ray.classes import IGNORED_ID, PRESETS, ClassSet
from unet_ray.pictures import draw_confusion, draw_curves, draw_preview, draw_samples

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


def test_samples_of_many_classes_stay_small_and_exact() -> None:
    masks = [np.arange(23, dtype=np.uint8).repeat(4)[None].repeat(60, axis=0) for _ in range(4)]
    frames = [noise(60, 92, seed) for seed in range(4)]
    png = draw_samples(frames, masks, masks, CARLA, captions=["a/long/path/" * 20] * 4)
    assert len(png) < 500_000
    picture = pixels(png)
    assert all(has(picture, item.color) > 1000 for item in CARLA.classes)
    assert png == draw_samples(frames, masks, masks, CARLA, captions=["a/long/path/" * 20] * 4)


def test_a_preview_lays_masks_over_frames() -> None:
    frame = np.full((30, 50, 3), 200, np.uint8)
    mask = np.full((30, 50), 1, np.uint8)
    mask[:, 25:] = IGNORED_ID
    picture = pixels(draw_preview([frame] * 5, [mask] * 5, [f"{i}.png" for i in range(5)], CAMVID))
    overlay = tuple(round(0.45 * 200 + 0.55 * part) for part in CAMVID.classes[1].color)
    near = (np.abs(picture.astype(int) - overlay).max(axis=2) <= 2).sum()
    assert near == pytest.approx(5 * 130 * 156, rel=0.05)
    assert (np.abs(picture.astype(int) - 200).max(axis=2) <= 2).sum() == pytest.approx(5 * 130 * 156, rel=0.05)
    assert has(picture, (0, 0, 0)) < 1000  # text alone: ignored pixels show the frame


@pytest.mark.parametrize("n_frames", [1, 3, 12])
def test_a_preview_of_any_number_of_frames_of_any_size(n_frames: int) -> None:
    sizes = [(30, 50), (50, 30), (7, 9)]
    frames = [noise(*sizes[i % 3], i) for i in range(n_frames)]
    masks = [np.full(sizes[i % 3], i, np.uint8) for i in range(n_frames)]
    png = draw_preview(frames, masks, ["a/b.png"] * n_frames, CARLA)
    assert len(png) < 500_000
    assert pixels(png).shape[1] >= 550


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
    assert with_validation.shape == (330, 1200, 3)
    assert alone.shape == (330, 800, 3)
    assert has(with_validation, (255, 255, 255)) > 300_000


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


@pytest.mark.parametrize("n_classes", [1, 23, 31])
def test_a_confusion_matrix_of_any_number_of_classes(n_classes: int) -> None:
    confusion_KK = np.diag(np.arange(n_classes))  # class 0 is absent
    png = draw_confusion(confusion_KK, [f"class_{i}" for i in range(n_classes)])
    assert len(png) < 500_000
    assert (np.abs(pixels(png).astype(int) - (8, 48, 107)).max(axis=2) <= 8).any() == (n_classes > 1)


def test_no_pyplot() -> None:
    code = "import sys, unet_ray.pictures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0

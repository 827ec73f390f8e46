from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_training import make_config

from unet_ray.classes import IGNORED_ID, PRESETS
from unet_ray.config import AugmentConfig
from unet_ray.pixels.images import resize_nearest
from unet_ray.pixels.preprocessing import Preprocessing, network_input, network_mask
from unet_ray.training.augmentation import augment, paste_classes
from unet_ray.training.task import Group, WorkerTask
from unet_ray.training.worker import Worker

HEIGHT, WIDTH = 33, 49
RGB = np.random.default_rng(7).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
IDS = np.random.default_rng(8).integers(0, 11, (HEIGHT, WIDTH)).astype(np.uint8)
STILL = AugmentConfig(flip=False, scale=(1.0, 1.0), brightness=0, contrast=0, saturation=0)


def test_augmentation_with_all_parts_off_is_the_resize():
    image, mask = augment(RGB, IDS, (20, 30), STILL, np.random.default_rng(0))
    np.testing.assert_array_equal(image, resize_nearest(RGB, 20, 30))
    np.testing.assert_array_equal(mask, resize_nearest(IDS, 20, 30))


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("resize", ["nearest", "bilinear", "bilinear-antialias", "area", "area-dct"])
def test_with_all_parts_off_a_view_is_what_the_model_is_shown_in_use(resize, fit):
    preprocessing = Preprocessing(resize=resize, fit=fit, mean=(120.0, 110.0, 100.0))
    image, mask = augment(RGB, IDS, (20, 60), STILL, np.random.default_rng(0), preprocessing)
    np.testing.assert_array_equal(image, network_input(RGB, (20, 60), preprocessing))
    np.testing.assert_array_equal(mask, network_mask(IDS, (20, 60), preprocessing))
    assert ((mask == IGNORED_ID).any()) == (fit == "pad")


@pytest.mark.parametrize("resize", ["bilinear", "area"])
def test_a_smooth_view_shows_the_same_places_as_its_mask(resize):
    rows, columns = np.mgrid[:64, :96]
    image = np.stack([2 * rows, 2 * columns, rows * 0 + 77], -1).astype(np.uint8)
    config = AugmentConfig(scale=(0.3, 2.0), brightness=0, contrast=0, saturation=0)
    rng, outside = np.random.default_rng(12), 0
    for _ in range(40):
        seen, places = augment(image, rows.astype(np.uint8), (20, 30), config, rng, Preprocessing(resize=resize))
        inside = places != IGNORED_ID
        assert (seen[inside][:, 2] == 77).all() and (seen[~inside] == 0).all()
        step = np.abs(np.diff(places.astype(int), axis=0))[inside[1:] & inside[:-1]].max(initial=0)
        assert np.abs(seen[..., 0].astype(int) - 2 * places)[inside].max() <= 2 * step + 2
        outside += not inside.all()
    assert 10 < outside < 35


def test_augmentation_is_a_function_of_the_seed():
    config = AugmentConfig(scale=(0.4, 1.5))
    first = augment(RGB, IDS, (20, 30), config, np.random.default_rng(3))
    again = augment(RGB, IDS, (20, 30), config, np.random.default_rng(3))
    other = augment(RGB, IDS, (20, 30), config, np.random.default_rng(4))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0] != other[0]).any()


def test_frame_and_mask_show_the_same_places_and_no_id_is_gained():
    # every pixel tells its own place: red = row, green = column, and the mask is a function of both
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    image = np.stack([rows, columns, rows * 0 + 77], -1).astype(np.uint8)
    mask = ((rows * 3 + columns) % 5 * 40).astype(np.uint8)
    config = AugmentConfig(scale=(0.3, 2.0), brightness=0, contrast=0, saturation=0)
    rng = np.random.default_rng(12)
    flipped = outside = 0
    for _ in range(60):
        seen, seen_mask = augment(image, mask, (20, 30), config, rng)
        inside = seen[..., 2] == 77
        row, column = seen[..., 0].astype(int), seen[..., 1].astype(int)
        np.testing.assert_array_equal(seen_mask[inside], mask[row[inside], column[inside]])
        assert (seen_mask[~inside] == IGNORED_ID).all() and (seen[~inside] == 0).all()
        middle = column[10, inside[10]]
        flipped += bool(len(middle) > 1 and middle[0] > middle[-1])
        outside += not inside.all()
    assert 15 < flipped < 45 and 20 < outside < 55


def test_flip_alone_mirrors():
    config = AugmentConfig(flip=True, scale=(1.0, 1.0), brightness=0, contrast=0, saturation=0)
    views = [augment(RGB, IDS, (HEIGHT, WIDTH), config, np.random.default_rng(seed)) for seed in range(12)]
    mirrored = [bool((image == RGB[:, ::-1]).all() and (mask == IDS[:, ::-1]).all()) for image, mask in views]
    straight = [bool((image == RGB).all() and (mask == IDS).all()) for image, mask in views]
    assert all(a != b for a, b in zip(mirrored, straight, strict=True))
    assert any(mirrored) and any(straight)


def test_a_part_that_is_off_leaves_the_others_as_they_were():
    full = AugmentConfig(scale=(0.4, 1.5))
    plain = AugmentConfig(scale=(0.4, 1.5), brightness=0, contrast=0, saturation=0)
    a = augment(RGB, IDS, (20, 30), full, np.random.default_rng(5))
    b = augment(RGB, IDS, (20, 30), plain, np.random.default_rng(5))
    np.testing.assert_array_equal(a[1], b[1])
    assert (a[0] != b[0]).any()


def colored(pixels, brightness, contrast, saturation):
    """Brightness, contrast and saturation one after the other, in float64, pixel by pixel."""
    pixels = pixels.reshape(-1, 3).astype(np.float64) * brightness
    grey = np.array([0.299, 0.587, 0.114])
    mean = np.mean([pixel @ grey for pixel in pixels])
    pixels = [mean + contrast * (pixel - mean) for pixel in pixels]
    pixels = [pixel @ grey + saturation * (pixel - pixel @ grey) for pixel in pixels]
    return np.clip(np.array(pixels), 0, 255)


@pytest.mark.parametrize("part", ["brightness", "contrast", "saturation", "all"])
def test_colors_change_as_three_steps_by_hand_do(part):
    changes = {name: 0.6 if part in (name, "all") else 0.0 for name in ("brightness", "contrast", "saturation")}
    config = AugmentConfig(flip=False, scale=(1.0, 1.0), **changes)
    image, mask = augment(RGB, IDS, (HEIGHT, WIDTH), config, np.random.default_rng(9))
    draw = np.random.default_rng(9).random(7)[4:]
    factors = [1 + change * (2 * at - 1) for change, at in zip(changes.values(), draw, strict=True)]
    expected = colored(RGB, *factors).reshape(RGB.shape)
    assert image.dtype == np.uint8
    assert np.abs(image - expected).max() < 0.51
    np.testing.assert_array_equal(mask, IDS)


def test_bad_augmentation_is_refused():
    with pytest.raises(ValueError, match=r"--scale is 1.0 0.5; give two numbers with 0 < smallest <= largest"):
        AugmentConfig(scale=(1.0, 0.5))
    with pytest.raises(ValueError, match="--contrast is -1; it must be at least 0"):
        AugmentConfig(contrast=-1)
    with pytest.raises(ValueError, match="--classmix is 2; it is a share, 0 to 1"):
        AugmentConfig(classmix=2)
    with pytest.raises(ValueError, match=r"the frame is \(33, 49\) and its mask \(32, 49\); they must be of one size"):
        augment(RGB, IDS[1:], (20, 30), STILL, np.random.default_rng(0))


def test_half_of_the_classes_of_another_view_are_pasted():
    mask_HW, other_HW = np.zeros((4, 6), np.uint8), np.array([[3, 5, 7, 9, 11, IGNORED_ID]] * 4, np.uint8)
    image_HWC, other_HWC = np.full((4, 6, 3), 10, np.uint8), np.full((4, 6, 3), 200, np.uint8)
    pasted = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image, mask = paste_classes(image_HWC, mask_HW, other_HWC, other_HW, rng)
        assert image.dtype == mask.dtype == np.uint8
        np.testing.assert_array_equal(image, np.where((mask == 0)[..., None], image_HWC, other_HWC))
        classes = set(np.unique(mask)) - {0}
        assert len(classes) == 3 and classes < {3, 5, 7, 9, 11}
        assert all((mask[other_HW == number] == number).all() for number in classes)
        pasted |= classes
    assert pasted == {3, 5, 7, 9, 11}
    nothing = paste_classes(image_HWC, mask_HW, other_HWC, np.full_like(other_HW, IGNORED_ID), np.random.default_rng(0))
    np.testing.assert_array_equal(nothing[0], image_HWC)
    np.testing.assert_array_equal(nothing[1], mask_HW)


OFF = {"flip": False, "scale": (1.0, 1.0), "brightness": 0, "contrast": 0, "saturation": 0, "classmix": 0}


OTHER_IMAGE = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
OTHER_MASK = np.where(np.arange(HEIGHT)[:, None] < HEIGHT // 2, 201, 202).repeat(WIDTH, axis=1).astype(np.uint8)


def views_of_a_worker(**changes) -> list[tuple[np.ndarray, np.ndarray]]:
    """A training worker's views, 24x32, of a dozen frames that tell their own places: red = row, green = column."""
    config = make_config(Path("data"), Path("run"), augment=True, **(OFF | changes))
    nothing = dict.fromkeys(("class_weights_K", "pixels_K", "image_pixels_K", "validation", "samples"))
    about = {"config": config, "model_config": config.model_config(1), "class_set": PRESETS["camvid"]}
    frames = SimpleNamespace(names=("a", "b"), read=lambda index: (OTHER_IMAGE, OTHER_MASK))
    task = WorkerTask(**about, device="cpu", cpus=1, start_timeout_s=600, train=frames, **nothing)
    worker = Worker(task, Group(rank=0, n_workers=1, agree=lambda value: value, tell=print))
    worker.train_reader = frames
    view = worker._view(epoch=3)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    image = np.stack([rows, columns, rows * 0 + 77], -1).astype(np.uint8)
    return [view(image, (rows + columns).astype(np.uint8), index) for index in range(12)]


def test_a_worker_with_all_parts_off_sees_the_resize():
    for image, mask in views_of_a_worker():
        rows, columns = (places.astype(np.uint8) for places in np.mgrid[:HEIGHT, :WIDTH])
        np.testing.assert_array_equal(image[..., 0], resize_nearest(rows, 24, 32))
        np.testing.assert_array_equal(image[..., 1], resize_nearest(columns, 24, 32))
        np.testing.assert_array_equal(mask, resize_nearest(rows + columns, 24, 32))


@pytest.mark.parametrize("part", OFF)
def test_a_worker_sees_each_part_that_is_switched_on_and_no_other(part):
    on = {"flip": True, "scale": (0.4, 0.6), "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "classmix": 0.5}[
        part
    ]
    stills, views = views_of_a_worker(), views_of_a_worker(**{part: on})
    changed = [(image != still).any() for (image, _), (still, _) in zip(views, stills, strict=True)]
    assert sum(changed) > 1
    for (image, mask), (still, still_mask) in zip(views, stills, strict=True):
        if part == "flip":
            assert (image == still).all() or ((image == still[:, ::-1]).all() and (mask == still_mask[:, ::-1]).all())
        elif part == "scale":
            assert np.ptp(image[..., 0]) <= 0.6 * HEIGHT and np.ptp(image[..., 1]) <= 0.6 * WIDTH
            assert (image[..., 2] == 77).all() and (mask == image[..., 0] + image[..., 1]).all()
        elif part == "classmix":
            is_pasted = mask > 200
            assert is_pasted.mean() == 0.5 or not is_pasted.any()
            assert (image[is_pasted] == 200).all() and (image[~is_pasted] == still[~is_pasted]).all()
            assert (mask[~is_pasted] == still_mask[~is_pasted]).all()
        else:
            assert (mask == still_mask).all()
    assert views_of_a_worker(**{part: on})[4][0].tobytes() == views[4][0].tobytes()

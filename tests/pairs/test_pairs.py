"""Pairs: names against hand-made folders, mask formats against arrays written by Pillow, messages word for word."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_ray.classes import IGNORED_ID, PRESETS, ClassSet, SegmentationClass
from unet_ray.pairs.pairs import (
    PairProblem,
    detect_mask_format,
    encode_mask,
    find_pairs,
    first_few,
    load_pair,
    require_complete,
)

TWO = ClassSet(
    name="two",
    classes=(
        SegmentationClass(name="road", color=(128, 64, 128), values=(7,)),
        SegmentationClass(name="car", color=(0, 0, 142), values=(10,)),
    ),
    ignore=(0, (0, 0, 0)),
)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def frame(height_px: int = 4, width_px: int = 6) -> np.ndarray:
    return np.arange(height_px * width_px * 3).reshape(height_px, width_px, 3)


def write_log(root: Path, masks: dict[str, np.ndarray]) -> tuple[str, str]:
    for name, mask in masks.items():
        write(root / "rgb" / f"{name}.png", frame(*np.shape(mask)[:2]))
        write(root / "seg" / f"{name}.png", mask)
    return str(root / "rgb"), str(root / "seg")


def test_pairs_are_found_by_relative_path_without_extension(tmp_path: Path) -> None:
    for name in ("a/10.jpg", "a/2.png", "b/2.png", "b/alone.png", "b/.hidden.png"):
        write(tmp_path / "rgb" / name, frame())
    for name in ("a/2.png", "a/10.PNG", "b/2.bmp", "c/alone.png", "c/11.png"):
        write(tmp_path / "seg" / name, frame())
    (tmp_path / "seg" / "notes.txt").write_text("no image")
    listing = find_pairs(str(tmp_path / "rgb"), str(tmp_path / "seg"))
    assert [pair.pair_id for pair in listing.pairs] == ["a/2", "a/10", "b/2"]
    assert [(pair.sequence, pair.frame_index) for pair in listing.pairs] == [("a", 2), ("a", 10), ("b", 2)]
    assert listing.pairs[1].image_uri == str(tmp_path / "rgb/a/10.jpg")
    assert listing.pairs[1].mask_uri == str(tmp_path / "seg/a/10.PNG")
    assert listing.images_without_mask == ("b/alone.png",)
    assert listing.masks_without_image == ("c/11.png", "c/alone.png")
    with pytest.raises(ValueError) as error:
        require_complete(listing)
    assert str(error.value) == (
        "1 frame without a mask: b/alone.png; 2 masks without a frame: c/11.png, c/alone.png; "
        "add what is missing or take these away (unet-ray check lists them all)"
    )


def test_a_complete_listing_is_required_and_passes(tmp_path: Path) -> None:
    require_complete(find_pairs(*write_log(tmp_path, {"1": frame()})))


def test_cityscapes_names(tmp_path: Path) -> None:
    stem = "aachen/aachen_000000_000019"
    write(tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png", frame())
    for kind in ("color", "instanceIds", "labelIds"):
        write(tmp_path / "gtFine" / f"{stem}_gtFine_{kind}.png", frame())
    listing = find_pairs(
        str(tmp_path / "leftImg8bit"),
        str(tmp_path / "gtFine"),
        image_suffix="_leftImg8bit",
        mask_suffix="_gtFine_labelIds",
    )
    (pair,) = listing.pairs
    assert (pair.pair_id, pair.sequence, pair.frame_index) == (stem, "aachen", 19)
    assert pair.mask_uri.endswith("_gtFine_labelIds.png")
    assert listing.images_without_mask == listing.masks_without_image == ()


def test_camvid_names_by_pattern(tmp_path: Path) -> None:
    images, masks = write_log(tmp_path, {"0001TP_006690": frame(), "0016E5_00390": frame()})
    listing = find_pairs(images, masks, path_pattern=r"(?P<sequence>[^/_]+)_(?P<frame_index>\d+)")
    assert [(pair.sequence, pair.frame_index) for pair in listing.pairs] == [("0001TP", 6690), ("0016E5", 390)]


@pytest.mark.parametrize("suffixes", [("", "_mask"), ("_rgb", ""), ("_rgb", "_mask")])
def test_frames_and_masks_in_one_folder(tmp_path: Path, suffixes: tuple[str, str]) -> None:
    for suffix in suffixes:
        write(tmp_path / f"7{suffix}.png", frame())
    listing = find_pairs(str(tmp_path), str(tmp_path), image_suffix=suffixes[0], mask_suffix=suffixes[1])
    (pair,) = listing.pairs
    assert (pair.image_uri, pair.mask_uri) == tuple(str(tmp_path / f"7{suffix}.png") for suffix in suffixes)
    assert listing.images_without_mask == listing.masks_without_image == ()


def test_one_folder_within_the_other(tmp_path: Path) -> None:
    write(tmp_path / "7.png", frame())
    write(tmp_path / "masks" / "7.png", frame())
    listing = find_pairs(str(tmp_path), str(tmp_path / "masks"))
    assert [pair.mask_uri for pair in listing.pairs] == [str(tmp_path / "masks/7.png")]
    assert listing.images_without_mask == ()


def test_folders_that_cannot_be_paired(tmp_path: Path) -> None:
    images, masks = write_log(tmp_path, {"1": frame(), "2": frame()})
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    write(tmp_path / "other" / "x.png", frame())
    allowed = "allowed are .png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff"

    def message(*folders: str, **options: str) -> str:
        with pytest.raises(ValueError) as error:
            find_pairs(*folders, **options)
        return str(error.value)

    gone, empty, texts, other = (str(tmp_path / name) for name in ("gone", "empty", "texts", "other"))
    assert message(gone, masks) == f"{gone}: no such folder of frames"
    assert message(images, gone) == f"{gone}: no such folder of masks"
    assert message(f"{images}/1.png", masks) == f"{images}/1.png is a file; give the folder of frames"
    assert message(images, empty) == f"the folder of masks {empty} holds nothing; {allowed}"
    assert message(texts, masks) == f"the folder of frames {texts} holds 1 file, but no image; {allowed}"
    assert message(images, images) == (
        f"{images} is the folder of frames and of masks; tell them apart by --image-suffix or --mask-suffix"
    )
    assert message(images, masks, mask_suffix="_id") == (
        f"--mask-suffix is '_id', but none of the 2 images in {masks} has a name that ends so; they are such as '1.png'"
    )
    assert message(images, other) == (
        f"no frame in {images} has a mask in {other}: frames are such as '1.png', masks such as 'x.png'; "
        "without extension they must be equal, or give --image-suffix and --mask-suffix, or patterns of both with {} "
        "for what is equal (--images 'camera/{}_camera_{}.png' --masks 'label/{}_label_{}.png')"
    )
    write(tmp_path / "rgb" / "1.bmp", frame())
    assert message(images, masks) == (f"two frames have the name '1': {images}/1.bmp and {images}/1.png; take one away")


def in_red(ids_HW: list[list[int]]) -> np.ndarray:
    mask = np.zeros((*np.shape(ids_HW), 3), np.uint8)
    mask[..., 0] = ids_HW
    return mask


def in_colors(ids_HW: list[list[int]]) -> np.ndarray:
    return np.array([(0, 0, 0), (128, 64, 128), (0, 0, 142)], np.uint8)[np.searchsorted([0, 7, 10], ids_HW)]


IDS = [[0, 7, 10], [7, 7, 10]]
ENCODED = [[IGNORED_ID, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("mask_format", "mask"),
    [
        ("ids", np.array(IDS)),
        ("channel-max", in_red(IDS)),
        ("channel-max", np.repeat(np.array(IDS)[..., None], 3, axis=2)),
        ("colors", in_colors(IDS)),
    ],
)
def test_a_mask_format_is_detected_and_encoded(tmp_path: Path, mask_format: str, mask: np.ndarray) -> None:
    black = np.zeros_like(mask)  # says nothing: in every format it is ignored
    listing = find_pairs(*write_log(tmp_path, {"0": black, "1": mask, "2": black}))
    assert detect_mask_format(listing.pairs, TWO) == mask_format
    image_HWC, mask_HW = load_pair(listing.pairs[1], TWO, mask_format)
    np.testing.assert_array_equal(mask_HW, ENCODED)
    assert mask_HW.dtype == np.uint8
    np.testing.assert_array_equal(image_HWC, frame(2, 3))


def palette_png(ids_HW: list[list[int]], palette: dict[int, tuple[int, int, int]]) -> bytes:
    image = Image.fromarray(np.array(ids_HW, np.uint8))
    image.putpalette([channel for index in range(256) for channel in palette.get(index, (1, 2, 3))])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mask_format", "indices", "palette"),
    [
        ("ids", [0, 7, 10], {0: (0, 0, 0), 7: (9, 9, 9), 10: (8, 8, 8)}),  # colours that mean nothing
        ("ids", [0, 7, 10], {0: (0, 0, 0), 7: (128, 64, 128), 10: (0, 0, 142)}),  # both say the same
        ("colors", [0, 1, 2], {0: (0, 0, 0), 1: (128, 64, 128), 2: (0, 0, 142)}),  # indices that mean nothing
    ],
)
def test_a_palette_is_ids_or_colors(tmp_path: Path, mask_format: str, indices: list[int], palette: dict) -> None:
    listing = find_pairs(*write_log(tmp_path, {"1": np.array(IDS)}))
    ids_HW = np.array(indices)[np.searchsorted([0, 7, 10], IDS)]
    Path(listing.pairs[0].mask_uri).write_bytes(palette_png(ids_HW.tolist(), palette))
    assert detect_mask_format(listing.pairs, TWO) == mask_format
    np.testing.assert_array_equal(load_pair(listing.pairs[0], TWO, mask_format)[1], ENCODED)


def test_mask_formats_that_contradict(tmp_path: Path) -> None:
    images, masks = write_log(tmp_path, {"1": in_red(IDS), "2": in_colors(IDS)})
    with pytest.raises(ValueError) as error:
        detect_mask_format(find_pairs(images, masks).pairs, TWO)
    assert str(error.value) == (
        f"{masks}/2.png: its pixels look like colors, those of {masks}/1.png like channel-max; "
        "give --mask-format (channel-max, ids, colors)"
    )
    write(tmp_path / "seg" / "2.png", frame(2, 3))
    with pytest.raises(ValueError) as error:
        detect_mask_format(find_pairs(images, masks).pairs, TWO)
    assert str(error.value) == (
        f"{masks}/2.png: no known mask format: several channels are in use, and not all colours are of the class set; "
        "give --mask-format (channel-max, ids, colors), or choose another class set (unet-ray check shows the colours)"
    )


def test_a_mask_that_means_two_things(tmp_path: Path) -> None:
    images, masks = write_log(tmp_path, {"1": np.zeros((2, 5, 3))})  # camvid: id 0 is sky, black is void
    with pytest.raises(ValueError) as error:
        detect_mask_format(find_pairs(images, masks).pairs, PRESETS["camvid"])
    assert str(error.value) == f"{masks}/1.png: its pixels can be read as channel-max and as colors; give --mask-format"


def test_unknown_ids_do_not_hide_the_format(tmp_path: Path) -> None:
    listing = find_pairs(*write_log(tmp_path, {"1": in_red([[7, 99, 99]])}))
    assert detect_mask_format(listing.pairs, TWO) == "channel-max"


def test_detection_reads_masks_spread_over_the_data_set(tmp_path: Path) -> None:
    listing = find_pairs(*write_log(tmp_path, {str(i): np.array([[0, 0]]) for i in range(40)}))
    assert detect_mask_format(listing.pairs, TWO) == "ids"
    write(Path(listing.pairs[-1].mask_uri), in_red([[7, 10]]))
    Path(listing.pairs[1].mask_uri).write_bytes(b"never read")  # the second of 40 is not among the 16
    assert detect_mask_format(listing.pairs, TWO) == "channel-max"


def test_ids_in_three_channels() -> None:
    grey = np.repeat(np.array(IDS, np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(encode_mask(grey, TWO, "ids"), ENCODED)
    with pytest.raises(ValueError) as error:
        encode_mask(in_red(IDS), TWO, "ids")
    assert str(error.value) == (
        "a mask of three channels that differ, where ids are in one; give --mask-format channel-max or colors"
    )


def test_a_pair_that_training_refuses(tmp_path: Path) -> None:
    images, masks = write_log(tmp_path, {"1": np.array([[7, 3, 3], [99, 7, 3]])})
    (pair,) = find_pairs(images, masks).pairs

    def message() -> str:
        with pytest.raises(PairProblem) as error:
            load_pair(pair, TWO, "ids")
        assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
        assert error.value.uri in (pair.image_uri, pair.mask_uri)
        return str(error.value)

    assert message() == (
        f"{masks}/1.png: 2 ids outside the class set 'two': 3 (3 pixels), 99 (1 pixel); allowed: ids 0, 7, 10; "
        "add what is missing to a class's values or to ignore, or choose another class set"
    )
    write(Path(pair.mask_uri), np.full((2, 4), 7))
    assert message() == (
        f"{masks}/1.png: the mask is 2 x 4 (height x width), its frame {images}/1.png is 2 x 3; "
        "they must be of one size"
    )
    Path(pair.image_uri).write_bytes(b"")
    assert message() == (f"{images}/1.png: not_an_image: empty file (0 bytes); allowed are PNG, JPEG, WebP, BMP, TIFF")
    Path(pair.mask_uri).unlink()
    assert message() == f"{masks}/1.png: the file is gone since it was listed; run again"


def test_first_few() -> None:
    assert first_few([]) == ""
    assert first_few(["a", "b"]) == "a, b"
    assert first_few(list("abcdefg"), limit=2) == "a, b and 5 more"

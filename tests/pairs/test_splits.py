"""Splits: by drive, by time, by manifest, and what leaks, against data small enough to count by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_ray.config import TrainConfig
from unet_ray.pairs.pairs import ImagePair
from unet_ray.pairs.splits import (
    Split,
    _count_ones_by_hand,
    count_ones,
    difference_hash,
    leak_rate,
    leak_warning,
    split_pairs,
)
from unet_ray.training.data import find_data


def pair(sequence: str, index: int | None, camera: str = "", name: str | None = None) -> ImagePair:
    pair_id = f"{sequence}/{camera}{name or index}"
    return ImagePair(
        pair_id=pair_id,
        image_uri=f"/rgb/{pair_id}.png",
        mask_uri=f"/seg/{pair_id}.png",
        sequence=sequence,
        camera=camera,
        frame_index=index,
    )


def drive(sequence: str, n_frames: int, step: int = 1, camera: str = "") -> list[ImagePair]:
    return [pair(sequence, index * step, camera) for index in range(n_frames)]


def ids(pairs: tuple[ImagePair, ...]) -> list[str]:
    return [item.pair_id for item in pairs]


def test_whole_drives_are_set_aside() -> None:
    pairs = [*drive("a", 7), *drive("b", 5), *drive("c", 4), *drive("d", 33)]
    split = split_pairs(pairs, val_fraction=0.1)
    sequences = {item.sequence for item in split.validation}
    assert sequences == {"b"} or sequences == {"c"} or sequences == {"a"}  # each alone is nearest to 4.9 of 49
    assert not sequences & {item.sequence for item in split.train}
    assert sorted(ids(split.train) + ids(split.validation)) == sorted(item.pair_id for item in pairs)
    assert split.left_out == ()
    assert split.how == f"{len(split.validation)} frames of 49 ({len(split.validation) / 49:.1%}) validate: " + (
        f"1 of 4 drives, {sequences.pop()}"
    )
    assert split_pairs(pairs[::-1], val_fraction=0.1).how == split.how
    assert leak_rate(split) == 0


@pytest.mark.parametrize("val_fraction", [0.001, 0.5, 0.99])
def test_one_drive_at_least_on_either_side(val_fraction: float) -> None:
    split = split_pairs([*drive("long", 31), *drive("short", 2), *drive("mid", 9)], val_fraction=val_fraction)
    assert {item.sequence for item in split.validation} and {item.sequence for item in split.train}
    if val_fraction == 0.001:
        assert {item.sequence for item in split.validation} == {"short"}


def test_a_single_drive_is_cut_in_time_behind_a_guard_band() -> None:
    pairs = [*drive("a", 50, camera="left_"), *drive("a", 50, camera="right_")]
    split = split_pairs(pairs[::-1], val_fraction=0.1, guard_frames=3)
    assert {item.frame_index for item in split.train} == set(range(42))
    assert {item.frame_index for item in split.left_out} == {42, 43, 44}
    assert {item.frame_index for item in split.validation} == {45, 46, 47, 48, 49}
    assert (len(split.train), len(split.left_out), len(split.validation)) == (84, 6, 10)
    assert split.how == (
        "all frames are of one drive (else give --path-pattern): its last 10 frames of 100 (10.0%) validate, "
        "6 before them are left out"
    )
    assert leak_rate(split, guard_frames=3) == 0
    assert leak_rate(split, guard_frames=5) == pytest.approx(2 / 5)  # 45 and 46 reach 41


def test_the_guard_band_shrinks_with_little_data_and_says_so() -> None:
    split = split_pairs(drive("a", 13), val_fraction=0.1, guard_frames=30)
    assert (len(split.train), len(split.left_out), len(split.validation)) == (9, 3, 1)
    assert split.how.endswith("3 before them are left out (--guard-frames 30 would take more than a quarter)")
    tiny = split_pairs(drive("a", 2), val_fraction=0.1)
    assert (ids(tiny.train), ids(tiny.left_out), ids(tiny.validation)) == (["a/0"], [], ["a/1"])


def test_names_without_numbers_are_cut_in_the_order_of_names() -> None:
    pairs = [pair("a", None, name=name) for name in ("x10", "x9", "y", "b", "c")]
    assert ids(split_pairs(pairs, val_fraction=0.4, guard_frames=0).validation) == ["a/x10", "a/y"]


def test_no_validation() -> None:
    assert split_pairs(drive("a", 5), val_fraction=0).how == "all 5 frames train, none validate"
    one = split_pairs(drive("a", 1), val_fraction=0.5)
    assert (len(one.train), one.validation, leak_rate(one)) == (1, (), 0.0)
    cameras = split_pairs([pair("a", 3, "left_"), pair("a", 3, "right_")], val_fraction=0.5)
    assert (cameras.validation, cameras.how) == ((), "all frames are of one instant: none validate")


def test_a_manifest_decides(tmp_path: Path) -> None:
    manifest = tmp_path / "split.csv"
    manifest.write_bytes(b"\xef\xbb\xbfsplit,pair_id,note\r\nval,a/1,\r\ntrain,a/0,x\r\nnone,a/2,\r\n")
    split = split_pairs(drive("a", 3), manifest=str(manifest))
    assert (ids(split.train), ids(split.validation), ids(split.left_out)) == (["a/0"], ["a/1"], ["a/2"])
    assert split.how == f"by {manifest}: 1 train, 1 validate, 1 are left out"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, ": no such file; --split-manifest is a CSV file"),
        ("pair_id,part\na/0,train\n", " has the columns ['pair_id', 'part']; it needs pair_id and split"),
        ("", " has the columns []; it needs pair_id and split"),
        (
            "pair_id,split\na/0,train\na/1,test\n",
            " line 3: split is 'test'; allowed are train, val, none",
        ),
        ("pair_id,split\na/0,train\na/0,val\n", " line 3: pair_id 'a/0' stands there twice"),
        ("pair_id,split\na/0,train\n", " lacks 1 pair: a/1; give each train, val or none"),
        ("pair_id,split\na/0,train\na/1,val\nb/0,val\n", " names 1 pair not found: b/0"),
        ("pair_id,split\na/0,val\na/1,val\n", " has no pair with split train; nothing could be learnt"),
    ],
)
def test_a_manifest_that_does_not_fit(tmp_path: Path, text: str | None, message: str) -> None:
    manifest = tmp_path / "split.csv"
    if text is not None:
        manifest.write_text(text)
    with pytest.raises(ValueError) as error:
        split_pairs(drive("a", 2), manifest=str(manifest))
    assert str(error.value) == f"{manifest}{message}"


def test_neighbours_in_time_leak() -> None:
    frames = drive("a", 20, step=30)
    split = Split(train=tuple(frames[:10]), validation=tuple(frames[12:]), left_out=tuple(frames[10:12]), how="")
    naive = [
        any(abs(unseen.frame_index - known.frame_index) <= 4 * 30 for known in split.train)
        for unseen in split.validation
    ]
    assert leak_rate(split, guard_frames=4) == pytest.approx(np.mean(naive)) == pytest.approx(2 / 8)
    assert leak_rate(split, guard_frames=2) == 0
    other_camera = tuple(pair("a", item.frame_index, "rear_") for item in frames[12:])
    assert leak_rate(Split(train=split.train, validation=other_camera, how=""), guard_frames=4) == 0


@pytest.mark.parametrize("below", ["", "day1/"])
def test_own_folders_with_equal_names_are_drives_of_their_own(tmp_path: Path, below: str) -> None:
    for town in ("town01", "town02"):
        for folder in ("rgb", "seg", "rgb/night", "seg/night"):
            (tmp_path / town / folder / below).mkdir(parents=True, exist_ok=True)
            for index in range(3):
                file = tmp_path / town / folder / below / f"{index:06d}.png"
                Image.fromarray(np.full((4, 5), 7, np.uint8)).save(file)

    def leaks(val_images: str, path_pattern: str | None = None) -> float:
        config = TrainConfig(
            images=str(tmp_path / "town01/rgb"),
            masks=str(tmp_path / "town01/seg"),
            val_images=str(tmp_path / val_images),
            val_masks=str(tmp_path / val_images.replace("rgb", "seg")),
            path_pattern=path_pattern,
            classes="carla23",
            out=str(tmp_path / "run"),
            mask_format="ids",
        )
        return leak_rate(find_data(config).split)

    assert leaks("town02/rgb") == 0
    assert leaks("town02/rgb", r"(?P<frame_index>\d+)\.png") == 0
    assert leaks("town02/rgb", r"^(?P<sequence>.*?)/?(?P<frame_index>\d+)\.png") == 1  # whose names are the user's
    assert leaks("town01/rgb/night") == 1  # one root within the other


def test_a_frame_in_both_leaks() -> None:
    assert leak_rate(Split(train=(pair("a", 1),), validation=(pair("a", 1), pair("b", 1)), how="")) == 0.5


def test_near_duplicates_leak() -> None:
    split = Split(train=(pair("a", 1), pair("a", 2)), validation=(pair("b", 1), pair("b", 2)), how="")
    hashes = {"/rgb/a/1.png": 0, "/rgb/a/2.png": 2**63 | 0xFF, "/rgb/b/1.png": 0b1110, "/rgb/b/2.png": 0b1111}
    assert leak_rate(split) == 0
    assert leak_rate(split, hashes=hashes) == 0.5
    assert leak_rate(split, hashes={"/rgb/b/1.png": 0}) == 0


@pytest.mark.parametrize("count", [count_ones, _count_ones_by_hand])
def test_bits_are_counted_as_python_counts_them(count) -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64)
    values[:3] = 0, 1, 2**64 - 1
    assert count(values).tolist() == [value.bit_count() for value in values.tolist()]


def test_difference_hash_sees_the_picture_not_its_noise() -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 200, (8, 9))
    image_HWC = np.repeat(np.repeat(coarse, 5, axis=0), 7, axis=1)[..., None].repeat(3, axis=2).astype(np.uint8)
    expected = int("".join(str(int(row[x + 1] > row[x])) for row in coarse for x in range(8)), 2)
    assert difference_hash(image_HWC) == expected
    brighter = (image_HWC + rng.integers(20, 24, image_HWC.shape)).astype(np.uint8)
    assert (difference_hash(brighter) ^ expected).bit_count() <= 3
    assert (difference_hash(image_HWC[:, ::-1]) ^ expected).bit_count() > 8
    assert 0 <= difference_hash(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)) < 2**64


def test_leak_warning() -> None:
    assert leak_warning(0.0) is None
    assert leak_warning(0.01) is None
    assert leak_warning(0.125) == (
        "12.5% of the validation frames have a neighbour in time or a near-duplicate in training: their metrics"
        " flatter; split by whole drives (--path-pattern, --split-manifest, --val-images)"
    )

"""Pairs by pattern and by Unicode form: trees with the names of real data sets, and names as file systems keep them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_ray import cli
from unet_ray.pairs.names import partners
from unet_ray.pairs.pairs import ImagePair, PairListing, find_pairs, require_complete
from unet_ray.pairs.splits import split_pairs

PIXELS = np.zeros((2, 3, 3), np.uint8)


def draw(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg"):
            Image.fromarray(PIXELS).save(path)
        else:
            path.write_bytes(b"no image")


def by_pattern(root: Path, images: str, masks: str, **options: str) -> PairListing:
    listing = find_pairs(f"{root}/{images}", f"{root}/{masks}", **options)
    require_complete(listing)
    return listing


def names_of(listing: PairListing, root: Path) -> list[tuple[str, str]]:
    return [(pair.image_uri.removeprefix(f"{root}/"), pair.mask_uri.removeprefix(f"{root}/")) for pair in listing.pairs]


def test_a2d2(tmp_path: Path) -> None:
    """Names: README-SemSeg.txt of the data set (aev-autonomous-driving-dataset on S3)."""
    drives = (("20180807_145028", "20180807145028"), ("20181016_125231", "20181016125231"))
    for drive, start in drives:
        for kind, end in (("camera", "png"), ("camera", "json"), ("label", "png"), ("lidar", "npz")):
            folder = f"a2d2/{drive}/{kind}/cam_front_center"
            draw(tmp_path, *(f"{folder}/{start}_{kind}_frontcenter_{number:09d}.{end}" for number in (91, 1617)))
    listing = by_pattern(tmp_path, "a2d2/{}/camera/{}/{}_camera_{}.png", "a2d2/{}/label/{}/{}_label_{}.png")
    assert names_of(listing, tmp_path) == [
        (
            f"a2d2/{drive}/camera/cam_front_center/{start}_camera_frontcenter_{number:09d}.png",
            f"a2d2/{drive}/label/cam_front_center/{start}_label_frontcenter_{number:09d}.png",
        )
        for drive, start in drives
        for number in (91, 1617)
    ]
    assert [(pair.sequence, pair.frame_index) for pair in listing.pairs][1:3] == [
        ("20180807_145028/camera/cam_front_center", 1617),
        ("20181016_125231/camera/cam_front_center", 91),
    ]
    assert listing.pairs[0].pair_id == (
        "20180807_145028/camera/cam_front_center/20180807145028_camera_frontcenter_000000091"
    )


def test_virtual_kitti_2(tmp_path: Path) -> None:
    """Names: vkitti_2.0.3_rgb and vkitti_2.0.3_classSegmentation, unpacked side by side (europe.naverlabs.com)."""
    for scene, variant in (("Scene01", "15-deg-left"), ("Scene20", "clone")):
        for number in (0, 1):
            draw(tmp_path, f"rgb/{scene}/{variant}/frames/rgb/Camera_0/rgb_{number:05d}.jpg")
            draw(tmp_path, f"seg/{scene}/{variant}/frames/classSegmentation/Camera_0/classgt_{number:05d}.png")
    listing = by_pattern(
        tmp_path,
        "rgb/{}/{}/frames/rgb/{}/rgb_{}.jpg",
        "seg/{}/{}/frames/classSegmentation/{}/classgt_{}.png",
        path_pattern=r"(?P<sequence>Scene\d+)/.*/(?P<camera>Camera_\d)/rgb_(?P<frame_index>\d+)",
    )
    assert names_of(listing, tmp_path)[3] == (
        "rgb/Scene20/clone/frames/rgb/Camera_0/rgb_00001.jpg",
        "seg/Scene20/clone/frames/classSegmentation/Camera_0/classgt_00001.png",
    )
    assert [(pair.sequence, pair.camera, pair.frame_index) for pair in listing.pairs] == [
        ("Scene01", "Camera_0", 0),
        ("Scene01", "Camera_0", 1),
        ("Scene20", "Camera_0", 0),
        ("Scene20", "Camera_0", 1),
    ]


def test_mapillary_vistas(tmp_path: Path) -> None:
    """Names: the folders of both parts (docs/dataset_prepare.md of mmsegmentation); all parts at once, by pattern."""
    for part, name in (("training", "__CRyFzoDOXn6unQ6a3DnQ"), ("validation", "_1Gn_xkw7sa_i9GU4mkxxQ")):
        draw(tmp_path, f"{part}/images/{name}.jpg")
        draw(tmp_path, *(f"{part}/{version}/{kind}/{name}.png" for version in ("v1.2", "v2.0") for kind in ("labels",)))
        draw(tmp_path, f"{part}/v1.2/instances/{name}.png", f"{part}/v2.0/polygons/{name}.json")
    draw(tmp_path, "testing/images/only_a_frame.jpg")
    whole = find_pairs(f"{tmp_path}/{{}}/images/{{}}.jpg", f"{tmp_path}/{{}}/v2.0/labels/{{}}.png")
    assert names_of(whole, tmp_path) == [
        ("training/images/__CRyFzoDOXn6unQ6a3DnQ.jpg", "training/v2.0/labels/__CRyFzoDOXn6unQ6a3DnQ.png"),
        ("validation/images/_1Gn_xkw7sa_i9GU4mkxxQ.jpg", "validation/v2.0/labels/_1Gn_xkw7sa_i9GU4mkxxQ.png"),
    ]
    assert whole.images_without_mask == ("testing/images/only_a_frame.jpg",)
    folders = find_pairs(f"{tmp_path}/training/images", f"{tmp_path}/training/v2.0/labels")
    assert len(folders.pairs) == 1 and folders.masks_without_image == ()


def test_bdd100k(tmp_path: Path) -> None:
    """Names: doc.bdd100k.com/download.html, and those of its first release."""
    for part in ("train", "val"):
        draw(tmp_path, f"images/10k/{part}/0a0a0b1a-7c39d841.jpg", f"labels/sem_seg/masks/{part}/0a0a0b1a-7c39d841.png")
        draw(tmp_path, f"labels/sem_seg/colormaps/{part}/0a0a0b1a-7c39d841.png")
        draw(tmp_path, f"seg/images/{part}/0a0a0b1a-7c39d841.jpg", f"seg/labels/{part}/0a0a0b1a-7c39d841_train_id.png")
    for images, masks in (
        ("images/10k/{}/{}.jpg", "labels/sem_seg/masks/{}/{}.png"),
        ("seg/images/{}/{}.jpg", "seg/labels/{}/{}_train_id.png"),
        ("images/10k/{}/{}", "labels/sem_seg/masks/{}/{}"),  # of any extension
    ):
        assert len(by_pattern(tmp_path, images, masks).pairs) == 2
    assert len(by_pattern(tmp_path, "images/10k", "labels/sem_seg/masks").pairs) == 2
    assert len(by_pattern(tmp_path, "seg/images", "seg/labels", mask_suffix="_train_id").pairs) == 2


def test_frames_and_masks_of_one_folder_by_pattern(tmp_path: Path) -> None:
    draw(tmp_path, "a_1.png", "a_1_mask.png", "a_2.PNG", "a_2_mask.png", "b[1].png", "b[1]_mask.png")
    listing = by_pattern(tmp_path, "{}.png", "{}_mask.png")  # the more particular pattern has a file that fits both
    assert [pair.pair_id for pair in listing.pairs] == ["a_1", "a_2", "b[1]"]
    with pytest.raises(ValueError) as error:
        find_pairs(f"{tmp_path}/{{}}.png", f"{tmp_path}/{{}}.png")
    assert str(error.value).endswith(
        "fits the pattern of the frames and that of the masks; give patterns that tell them apart"
    )


def test_patterns_that_find_nothing_say_what_is_there(tmp_path: Path) -> None:
    draw(tmp_path, "rgb/a/1.png", "seg/b/1.png")
    with pytest.raises(ValueError) as error:
        find_pairs(f"{tmp_path}/rgb/{{}}/{{}}.png", f"{tmp_path}/seg/{{}}/{{}}.png")
    assert str(error.value) == (
        f"no frame in {tmp_path}/rgb has a mask in {tmp_path}/seg: frames are such as 'a/1.png', masks such as "
        "'b/1.png'; the texts in place of {} must be equal"
    )
    with pytest.raises(ValueError) as error:
        find_pairs(f"{tmp_path}/rgb/{{}}.png", f"{tmp_path}/seg/{{}}.png")
    assert str(error.value) == (
        f"--images: none of the 1 images in {tmp_path}/rgb has a name like '{{}}.png'; they are such as 'a/1.png'"
    )


def test_a_folder_whose_name_has_braces_is_that_folder(tmp_path: Path) -> None:
    draw(tmp_path, "r{}/1.png", "s{}/1.png")
    assert [pair.pair_id for pair in by_pattern(tmp_path, "r{}", "s{}").pairs] == ["1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"--images": "a/{}/{}.png", "--masks": "b/{}.png"},
            "--images has 2 and --masks has 1 {}; a frame's mask has the same texts in place of them, so give both as "
            "many",
        ),
        (
            {"--images": "a", "--masks": "b/{}.png"},
            "--images has 0 and --masks has 1 {}; a frame's mask has the same texts in place of them, so give both as "
            "many",
        ),
        (
            {"--images": "a/{}.png", "--masks": "b/{}.png", "--mask-suffix": "_id"},
            "--images has {}; put --image-suffix and --mask-suffix into the two patterns",
        ),
        (
            {"--images": "a", "--masks": "b", "--val-images": "c/{}.png", "--val-masks": "d"},
            "--val-images has 1 and --val-masks has 0 {}; a frame's mask has the same texts in place of them, so give "
            "both as many",
        ),
        (
            {"--images": "run/{}/a/{}.png", "--masks": "b/{}/{}.png", "--out": "run"},
            "--images run/{}/a/{}.png lies in --out run; give an --out beside it",
        ),
        (
            {"--images": "{}/{}", "--masks": "b/{}_{}", "--out": "run"},
            "--out run lies in what --images {}/{} matches; give a place beside it",
        ),
    ],
)
def test_patterns_that_cannot_be_are_refused_in_one_line(
    options: dict[str, str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = {"--classes": "camvid", "--out": "elsewhere", **options}
    assert cli.main(["train", *(word for option in words.items() for word in option)]) == 2
    assert capsys.readouterr().err == f"unet-ray: error: {message}\n"


def test_an_output_may_lie_beside_what_a_pattern_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["--images", "{}/rgb/{}.png", "--masks", "{}/seg/{}.png", "--classes", "camvid", "--out", "runs/first"]
    assert cli.parse("train", command).out == "runs/first"


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Straße_Köln/ä_1") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("frame", "mask"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_that_differ_by_their_unicode_form_alone_are_pairs(frame: str, mask: str, tmp_path: Path) -> None:
    assert frame != mask
    draw(tmp_path, f"rgb/{frame}.jpg", f"seg/{mask}.png", "rgb/b.jpg", "seg/b.png")
    listing = by_pattern(tmp_path, "rgb", "seg")
    assert {pair.pair_id for pair in listing.pairs} == {frame, "b"}
    suffixes = by_pattern(tmp_path, "rgb", "seg", image_suffix="\u00e4_1", mask_suffix="a\u0308_1")
    assert [pair.image_uri for pair in suffixes.pairs] == [f"{tmp_path}/rgb/{frame}.jpg"]
    folder = unicodedata.normalize("NFC", "{}_Köln/{}_{}")
    assert len(find_pairs(f"{tmp_path}/rgb/{folder}.jpg", f"{tmp_path}/seg/{folder}.png").pairs) == 1


def test_two_names_of_one_unicode_form_are_no_pair_of_a_third(tmp_path: Path) -> None:
    third = "Straße_Ko\u0308ln/\u00e4_1"
    draw(tmp_path, f"rgb/{COMPOSED}.png", f"rgb/{DECOMPOSED}.png", f"seg/{third}.png", "rgb/b.png", "seg/b.png")
    listing = find_pairs(f"{tmp_path}/rgb", f"{tmp_path}/seg")
    assert [pair.pair_id for pair in listing.pairs] == ["b"]
    assert len(listing.images_without_mask) == 2 and listing.masks_without_image == (f"{third}.png",)
    draw(tmp_path, f"seg/{COMPOSED}.png")  # the one that is the same is its pair, and two are left
    listing = find_pairs(f"{tmp_path}/rgb", f"{tmp_path}/seg")
    assert {pair.pair_id for pair in listing.pairs} == {"b", COMPOSED, DECOMPOSED}


def test_partners() -> None:
    assert partners(["a", "b"], ["b", "c"]) == {"b": "b"}
    assert partners([COMPOSED], [DECOMPOSED]) == {COMPOSED: DECOMPOSED}
    assert partners([COMPOSED, DECOMPOSED], [DECOMPOSED]) == {DECOMPOSED: DECOMPOSED}


def test_a_split_manifest_names_pairs_in_either_form(tmp_path: Path) -> None:
    pairs = [
        ImagePair(pair_id=name, image_uri=name, mask_uri=name, sequence="", camera="", frame_index=None)
        for name in (DECOMPOSED, "b")
    ]
    manifest = tmp_path / "split.csv"
    manifest.write_text(f"pair_id,split\n{COMPOSED},val\nb,train\n", encoding="utf-8")
    split = split_pairs(pairs, manifest=str(manifest))
    assert [pair.pair_id for pair in split.validation] == [DECOMPOSED]

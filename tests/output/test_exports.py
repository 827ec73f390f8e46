"""Masks and frames as other tools read them: labelformat, pycocotools, Datumaro (in an environment of its own)."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, get_args, get_type_hints

import exported
import numpy as np
import pytest
import s3_server
import small_output
from exported import CLASS_SET, FRAMES, PEDESTRIANS, bare, frame_bytes, frame_name, mask_of
from PIL import Image
from pycocotools.coco import COCO

from unet_ray import cli, storage
from unet_ray.config import ExportMasksConfig
from unet_ray.output.exports import targets
from unet_ray.output.exports.formats import FORMATS

# pycocotools 2.0.11 hands numpy an array in the way of numpy 1, when a mask is decoded (which only this test does).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

NAMES = dict(enumerate(CLASS_SET.names))
ORIGINALS = {frame_name(frame_id): frame_bytes(frame_id, size) for frame_id, size in FRAMES.items()}
LISTS = {
    "voc": "ImageSets/Segmentation/trainval.txt",
    "cvat": "ImageSets/Segmentation/default.txt",
    "fiftyone": "samples.json",
}
FOLDERS = {"png": "frames", "voc": "JPEGImages", "cvat": "JPEGImages", "coco": "x_frames", "fiftyone": "data"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """A folder with the archives in `log` and an output of theirs in `labels`; no test changes them."""
    root = tmp_path_factory.mktemp("archive")
    exported.segment(exported.write_archives(root / "log"), str(root / "labels"))
    return root


@pytest.fixture
def own_archive(archive, tmp_path) -> Path:
    """A copy of both that a test may change: the output lists the frames where they lie now."""
    exported.segment(exported.write_archives(tmp_path / "log"), str(tmp_path / "labels"))
    return tmp_path


def export(root: Path, out: Path | str, *options: str) -> int:
    return cli.main(["export-masks", str(root / "labels"), "--out", str(out), *options])


def target(folder: Path, name: str) -> Path:
    return folder / ("x.json" if name == "coco" else name)


def contents(folder: Path | str) -> dict[str, bytes]:
    return small_output.contents(str(folder))


def test_the_formats_of_the_options_are_those_of_the_table():
    assert get_args(get_type_hints(ExportMasksConfig)["format"]) == tuple(FORMATS)


# --- Pascal VOC ---


def voc_reader() -> Any:
    """labelformat's; it is not among what the oldest versions are tried with."""
    module = pytest.importorskip("labelformat.formats.semantic_segmentation.pascalvoc")
    return module.PascalVOCSemanticSegmentationInput


def test_labelformat_reads_frames_and_masks_of_voc(archive, tmp_path, capsys):
    out = tmp_path / "voc"
    assert export(archive, out, "--format", "voc", "--with-frames") == 0
    assert capsys.readouterr().out.splitlines()[-2] == f"8 masks written to {out}; 1 rejected frame has none"
    classes = {int(k): name for k, name in json.loads((out / "class_id_to_name.json").read_text()).items()}
    assert classes == NAMES
    read = voc_reader().from_dirs(out / "JPEGImages", out / "SegmentationClass", classes)
    assert sorted(image.filename for image in read.get_images()) == sorted(map(frame_name, FRAMES))
    ids = {frame_name(frame_id): frame_id for frame_id in FRAMES}
    for label in read.get_labels():
        expected = mask_of(ids[label.image.filename])
        assert (label.image.height, label.image.width) == expected.shape
        assert [item.category.id for item in label.objects] == np.unique(expected).tolist()
        for item in label.objects:
            assert np.array_equal(item.segmentation.get_binary_mask(), expected == item.category.id)
    assert (out / LISTS["voc"]).read_text() == "".join(f"{bare(frame_id)}\n" for frame_id in FRAMES)


def test_masks_of_voc_are_palette_pngs_of_ids_in_the_classes_colors(archive, tmp_path):
    assert export(archive, tmp_path / "voc", "--format", "voc") == 0
    for frame_id in FRAMES:
        image = Image.open(tmp_path / "voc/SegmentationClass" / f"{bare(frame_id)}.png")
        assert image.mode == "P" and image.getpalette()[:9] == CLASS_SET.palette_K3.ravel().tolist()
        assert np.array_equal(np.asarray(image), mask_of(frame_id))
    assert not (tmp_path / "voc/JPEGImages").exists()


# --- CVAT ---


def test_a_zip_for_cvat_holds_what_the_folder_does(archive, tmp_path):
    for out in ("folder", "one.zip", "two.zip"):
        assert export(archive, tmp_path / out, "--format", "cvat", "--with-frames") == 0
    with zipfile.ZipFile(tmp_path / "one.zip") as file:
        assert file.testzip() is None
        assert {name: file.read(name) for name in file.namelist()} == contents(tmp_path / "folder")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    lines = (tmp_path / "folder/labelmap.txt").read_text().splitlines()
    assert lines[1:] == ["road:128,64,128::", "sky:70,130,180::", "pedestrian:220,20,60::"]
    labels = json.loads((tmp_path / "folder/labels.json").read_text())
    assert labels[2] == {"name": "pedestrian", "color": "#dc143c", "type": "mask", "attributes": []}
    assert (tmp_path / "folder" / LISTS["cvat"]).read_text().splitlines() == [bare(frame_id) for frame_id in FRAMES]


# --- COCO ---


def test_coco_with_frames_names_files_that_are_there(archive, tmp_path):
    out = tmp_path / "x.json"
    assert export(archive, out, "--format", "coco", "--with-frames") == 0
    coco = COCO(str(out))
    images = coco.loadImgs(coco.getImgIds())
    ids = {frame_name(frame_id): frame_id for frame_id in FRAMES}
    assert {image["file_name"]: image["frame_id"] for image in images} == ids
    for image in images:
        with Image.open(tmp_path / "x_frames" / image["file_name"]) as frame:
            assert frame.size == (image["width"], image["height"])
        for region in coco.loadAnns(coco.getAnnIds(image["id"])):
            expected = mask_of(image["frame_id"]) == region["category_id"] - 1
            assert np.array_equal(coco.annToMask(region).astype(bool), expected)
    read = pytest.importorskip("labelformat.formats.coco").COCOObjectDetectionInput(
        input_file=out
    )  # of masks it reads only polygons and uncompressed crowds
    assert [category.name for category in read.get_categories()] == list(CLASS_SET.names)
    for label in read.get_labels():
        assert (tmp_path / "x_frames" / label.image.filename).is_file()
        frame_id = ids[label.image.filename]
        for item in label.objects:
            rows, columns = np.nonzero(mask_of(frame_id) == item.category.id - 1)
            box = item.box
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert [box.xmin, box.ymin, box.xmax, box.ymax] == expected


# --- FiftyOne ---


def test_fiftyone_gets_grey_masks_from_1_on_and_names_and_colors(archive, tmp_path):
    out = tmp_path / "fiftyone"
    assert export(archive, out, "--format", "fiftyone", "--with-frames") == 0
    metadata = json.loads((out / "metadata.json").read_text())
    assert "version" not in metadata and metadata["media_type"] == "image"
    info = metadata["info"]
    assert info["default_mask_targets"] == {"1": "road", "2": "sky", "3": "pedestrian"}
    colors = info["app_config"]["color_scheme"]["default_mask_targets_colors"]
    assert colors[0] == {"intTarget": 1, "color": "#804080"} and len(colors) == 3
    samples = json.loads((out / "samples.json").read_text())["samples"]
    assert [sample["frame_id"] for sample in samples] == list(FRAMES)
    for sample in samples:
        frame_id, label = sample["frame_id"], sample["predictions"]
        assert (out / sample["filepath"]).read_bytes() == ORIGINALS[frame_name(frame_id)]
        assert label["_cls"] == "Segmentation" and label["mask_path"].startswith("fields/predictions/")
        with Image.open(out / label["mask_path"]) as image:
            assert image.mode == "L" and np.array_equal(np.asarray(image), mask_of(frame_id) + 1)
        assert sample["confidence"] + sample["expected_error_share"] == 1 and sample["changed_share"] is None


def test_without_frames_fiftyone_is_given_files_of_this_machine(archive, tmp_path, capsys):
    out = tmp_path / "fiftyone"
    assert export(archive, out, "--format", "fiftyone", "--sequence", "a") == 0
    samples = json.loads((out / "samples.json").read_text())["samples"]
    assert [sample["filepath"] for sample in samples] == [str(archive / "log" / i) for i in FRAMES if i[:2] == "a/"]
    assert export(archive, tmp_path / "all", "--format", "fiftyone") == 2
    assert capsys.readouterr().err == (
        f"unet-ray: error: fiftyone opens frames as files of this machine, and b.tar!cam0/0.jpg lies in "
        f"{archive}/log/b.tar; add --with-frames\n"
    )
    assert not (tmp_path / "all").exists()


# --- frames ---


@pytest.mark.parametrize("name", FORMATS)
def test_frames_are_the_bytes_that_were_labelled(name, archive, tmp_path):
    out = target(tmp_path, name)
    for _ in range(2):  # the second time over the same files
        assert export(archive, out, "--format", name, "--with-frames") == 0
        assert contents((tmp_path if name == "coco" else out) / FOLDERS[name]) == ORIGINALS


def test_png_with_frames_is_what_train_reads(archive, tmp_path):
    from unet_ray.pairs.pairs import find_pairs

    assert export(archive, tmp_path / "png", "--with-frames") == 0
    masks = contents(tmp_path / "png/masks")
    assert sorted(masks) == sorted(f"{frame_id}.png" for frame_id in FRAMES)
    folders = str(tmp_path / "png/frames/a"), str(tmp_path / "png/masks/a")
    assert [pair.pair_id for pair in find_pairs(*folders, mask_suffix=".png").pairs] == ["0"]


@pytest.mark.parametrize("name", FORMATS)
def test_frames_that_are_not_as_labelled_are_left_out_with_their_masks(name, own_archive, capsys):
    log, out = own_archive / "log", target(own_archive, name)
    (log / "a/1.PNG").unlink()
    status = os.stat(log / "a/0.png")
    data = bytearray((log / "a/0.png").read_bytes())
    data[-20] ^= 1  # in its last chunk's checksum: the same size, and below the same time
    (log / "a/0.png").write_bytes(data)
    os.utime(log / "a/0.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert export(own_archive, out, "--format", name, "--with-frames") == 0
    lines = capsys.readouterr().out.splitlines()[-3:-1]
    assert lines == [
        f"2 frames are not as labelled and left out with the mask: a/0.png: {log}/a/0.png holds other bytes than those "
        f"that were labelled, a/1.PNG: {log}/a/1.PNG is gone since it was listed",
        f"6 masks written to {out}; 1 rejected frame has none",
    ]
    files = contents(own_archive if name == "coco" else out)
    frames = {path for path in files if path.startswith(FOLDERS[name])}
    assert frames == {f"{FOLDERS[name]}/{frame_name(i)}" for i in FRAMES if i not in ("a/0.png", "a/1.PNG")}
    if name in ("voc", "cvat"):
        assert files[LISTS[name]].decode().splitlines() == [bare(i) for i in list(FRAMES)[2:]]
        assert sum(path.startswith("SegmentationClass/") for path in files) == 6
    if name == "coco":
        assert [image["id"] for image in json.loads(out.read_text())["images"]] == list(range(1, 7))


def test_where_no_frame_is_as_labelled_nothing_is_listed(own_archive, capsys):
    for frame_id in ("a/0.png", "a/1.PNG", "a/frame.0002.jpg"):
        (own_archive / "log" / frame_id).unlink()
    out = own_archive / "voc"
    assert export(own_archive, out, "--format", "voc", "--with-frames", "--sequence", "a") == 1
    assert capsys.readouterr().err == (
        f"unet-ray: error: none of 3 frames is as it was labelled: a/0.png: {own_archive}/log/a/0.png is gone since it "
        "was listed\n"
    )
    assert contents(out) == {}
    shutil.rmtree(own_archive / "log")
    assert export(own_archive, out, "--format", "voc", "--with-frames") == 75
    assert "does not see" in capsys.readouterr().err and contents(out) == {}
    assert export(own_archive, out, "--format", "voc") == 0  # masks alone need no archive


def test_masks_of_the_models_size_get_the_frames(tmp_path):
    log = exported.write_archives(tmp_path / "log")
    exported.segment(log, str(tmp_path / "labels"), lineage=exported.MODEL_LINEAGE, mask_encoding="raw")
    assert export(tmp_path, tmp_path / "voc", "--format", "voc", "--sequence", "a") == 0
    assert export(tmp_path, tmp_path / "png", "--sequence", "a") == 0
    for frame_id in ("a/0.png", "a/1.PNG", "a/frame.0002.jpg"):
        small = mask_of(frame_id, exported.MODEL_SIZE)
        height_px, width_px = FRAMES[frame_id]
        expected = [
            [small[int((y + 0.5) * 8 / height_px), int((x + 0.5) * 12 / width_px)] for x in range(width_px)]
            for y in range(height_px)
        ]
        assert np.asarray(Image.open(tmp_path / f"voc/SegmentationClass/{bare(frame_id)}.png")).tolist() == expected
        assert np.asarray(Image.open(tmp_path / f"png/{frame_id}.png")).tolist() == small.tolist()


# --- which rows ---


@pytest.mark.parametrize("name", FORMATS)
def test_a_condition_chooses_the_frames(name, archive, tmp_path):
    out, condition = target(tmp_path, name), "pixels_pedestrian > 0 and sequence <> 'a'"
    assert export(archive, out, "--format", name, "--with-frames", "--where", condition) == 0
    folder = (tmp_path if name == "coco" else out) / FOLDERS[name]
    expected = [i for i in PEDESTRIANS if not i.startswith("a/")]
    assert sorted(contents(folder)) == sorted(map(frame_name, expected)) and 0 < len(expected) < len(FRAMES)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (
            "pixels_pedestrain > 0",
            "there is no column pixels_pedestrain; perhaps you meant pixels_pedestrian; the colu",
        ),
        ("pixels_road = 'x'", "pixels_road is a number and 'x' is text, which do not compare"),
        ("pixels_road > 1000000", "--where: none of the labelled frames fits `pixels_road > 1000000`"),
    ],
)
def test_a_condition_that_chooses_nothing_is_one_line(condition, message, archive, tmp_path, capsys):
    assert export(archive, tmp_path / "out", "--format", "voc", "--where", condition) == 2
    error = capsys.readouterr().err
    assert error.startswith("unet-ray: error: --where: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unfinished_output_says_how_far_it_is(tmp_path, capsys):
    exported.segment(exported.write_archives(tmp_path / "log"), str(tmp_path / "labels"), n_chunks=1)
    assert export(tmp_path, tmp_path / "out", "--format", "cvat") == 2
    assert capsys.readouterr().err == (
        f"unet-ray: error: {tmp_path}/labels is not finished (or was found damaged), 3 of 9 frames are done; run "
        "segment again, then export\n"
    )
    assert not (tmp_path / "out").exists()


# --- names ---


@pytest.mark.parametrize("name", ["voc", "cvat", "fiftyone"])
def test_two_frames_that_would_meet_are_refused_before_anything_is_written(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(FRAMES, "a/0.jpg", (12, 14))
    log = exported.write_archives(tmp_path / "log")
    exported.segment(log, str(tmp_path / "labels"))
    assert export(tmp_path, tmp_path / name, "--format", name, "--with-frames") == 2
    folder = "fields/predictions" if name == "fiftyone" else "SegmentationClass"
    assert capsys.readouterr().err == (
        f"unet-ray: error: the frames a/0.jpg and a/0.png would share the file {folder}/a/0.png: this format drops the "
        "extension; export them apart by --sequence or --where, or as png\n"
    )
    assert not (tmp_path / name).exists()
    where = ("--where", "frame_id <> 'a/0.jpg'")
    assert export(tmp_path, tmp_path / name, "--format", name, "--with-frames", *where) == 0
    assert export(tmp_path, tmp_path / "png", "--with-frames") == 0
    assert export(tmp_path, tmp_path / "x.json", "--format", "coco", "--with-frames") == 0


@pytest.mark.parametrize(
    ("frame_id", "name"),
    [
        ("cam0/7.jpg", "cam0/7"),
        ("# a.png", "%23 a"),
        (" a b .png", "%20a b%20"),
        ("a\nb.png", "a%0Ab"),
        ("a\u2028b.png", "a%E2%80%A8b"),
        ("a\\b.png", "a%5Cb"),
        ("../a.png", "%2E%2E/a"),
        ("100%.png", "100%25"),
        ("frame.0012", "frame.0012"),
        ("d.parquet!000000", "d.parquet!000000"),
    ],
)
def test_a_name_is_one_line_of_a_list(frame_id, name):
    from unet_ray.output.exports.names import bare_name

    assert bare_name(frame_id) == name


@pytest.mark.parametrize("name", ["voc", "cvat"])
def test_an_export_of_other_frames_is_not_mixed_with_this_one(name, archive, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(archive, out, "--format", name, "--sequence", "a", "--with-frames") == 0
    assert export(archive, out, "--format", name, "--with-frames") == 0  # all of those, and more
    before = contents(out)
    assert export(archive, out, "--format", name, "--sequence", "b.tar!cam0") == 2
    assert capsys.readouterr().err == (
        f"unet-ray: error: {out} holds an export with 6 other frames; delete it, or give another --out\n"
    )
    assert contents(out) == before


# --- kills ---


def read_by_labelformat(out: Path) -> int | None:
    """Number of frames that a reader by folders finds, None where it finds one without its mask."""
    try:
        read = voc_reader().from_dirs(out / "JPEGImages", out / "SegmentationClass", NAMES)
    except ValueError as error:
        assert str(error).startswith("Missing mask PNG")
        return None
    return len(list(read.get_images()))


@pytest.mark.parametrize("name", ["voc", "cvat", "fiftyone"])
def test_a_killed_export_lists_nothing_and_is_finished_by_the_same_command(name, archive, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = ("--format", name, "--with-frames")
    assert export(archive, whole, *options) == 0
    write, left = targets.Folder.write, [0]

    def killed(folder: targets.Folder, files: list) -> None:
        left[0] -= 1
        if not left[0]:
            write(folder, files[: len(files) // 2])
            raise small_output.Killed
        write(folder, files)

    monkeypatch.setattr(targets.Folder, "write", killed)
    for number in itertools.count(1):
        left[0] = number
        try:
            assert export(archive, out, *options) == 0
            break
        except small_output.Killed:
            assert not (out / LISTS[name]).exists()
            if name == "voc" and (out / "SegmentationClass").exists() and not (out / "class_id_to_name.json").exists():
                assert read_by_labelformat(out) in (None, len(FRAMES))
    assert number > 3 and contents(out) == contents(whole)
    left[0] = 2  # beside the list of the export before
    with pytest.raises(small_output.Killed):
        export(archive, out, *options)
    assert not (out / LISTS[name]).exists()


def test_a_killed_zip_is_none(archive, tmp_path, monkeypatch):
    def killed(*arguments: object) -> None:
        raise small_output.Killed

    monkeypatch.setattr(targets.Zip, "write", killed)
    with pytest.raises(small_output.Killed):
        export(archive, tmp_path / "x.zip", "--format", "cvat")
    assert not (tmp_path / "x.zip").exists()


# --- object storage ---


def test_a_bucket_is_read_and_written(archive, tmp_path, monkeypatch):
    labels = str(tmp_path / "labels")
    with s3_server.run_server(str(tmp_path / "requests")) as server, s3_server.reach(server, monkeypatch):
        bucket = s3_server.make_bucket(server)
        for name in ("b.tar", "d.parquet"):
            storage.write_whole(f"{bucket}/log/{name}", (archive / "log" / name).read_bytes())
        exported.segment(f"{bucket}/log", labels)
        assert export(tmp_path, f"{bucket}/voc", "--format", "voc", "--with-frames") == 0
        assert export(tmp_path, f"{bucket}/x.zip", "--format", "cvat") == 0
        in_bucket = contents(f"{bucket}/voc")
        with zipfile.ZipFile(io.BytesIO(storage.read_bytes(f"{bucket}/x.zip"))) as file:
            assert len(file.namelist()) == 4 + 3
    where = ("--sequence", "b.tar!cam0", "d.parquet")
    assert export(archive, tmp_path / "voc", "--format", "voc", "--with-frames", *where) == 0
    assert in_bucket == contents(tmp_path / "voc")

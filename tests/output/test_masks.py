"""The masks of an output as files, against the masks that it was made of."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import small_output
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from unet_ray import cli, storage
from unet_ray.config import ExportMasksConfig
from unet_ray.output import plans
from unet_ray.output.chunks import Cutting
from unet_ray.output.exports.coco import regions
from unet_ray.output.exports.names import mask_path
from unet_ray.pairs.pairs import find_pairs
from unet_ray.storage.sealed import sealed

# pycocotools 2.0.11 hands numpy an array in the way of numpy 1, when a mask is decoded (which only this test does).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

FRAMES = [f"{s}/{c}/{i}.png" for (s, c), n_frames in small_output.FIRST_DRIVES.items() for i in range(n_frames)]
LABELLED = [frame_id for frame_id in FRAMES if frame_id not in small_output.BROKEN]


@pytest.fixture(params=["raw", "png"])
def labels(request, tmp_path) -> str:
    out = str(tmp_path / "labels")
    small_output.segment(out, mask_encoding=request.param)
    return out


def export(labels: str, out: str, *options: str) -> int:
    return cli.main(["export-masks", labels, "--out", out, *options])


def rename(labels: str, names: dict[str, str]) -> None:
    """Gives frames other names, as a catalogue may."""
    for file in storage.list_files(storage.join(labels, "frames")):
        table = pq.read_table(file.uri)
        ids = [names.get(frame_id, frame_id) for frame_id in table["frame_id"].to_pylist()]
        pq.write_table(table.set_column(0, "frame_id", [ids]), file.uri)
    summary = plans.read_summary(labels)
    for entry in summary["files"]:
        entry["bytes"] = len(storage.read_bytes(storage.join(labels, entry["path"])))
    storage.write_whole(storage.join(labels, "summary.json"), sealed(summary))


# --- PNG ---


def test_every_labelled_frame_gets_a_palette_png_of_its_class_ids(labels, tmp_path, capsys):
    out = str(tmp_path / "masks")
    for _ in range(2):  # the second time over the same files
        assert export(labels, out) == 0
        assert capsys.readouterr().out.splitlines()[-2:] == [
            f"9 masks written to {out}; 2 rejected frames have none",
            f"Look at: {out}",
        ]
        written = small_output.contents(out)
        assert sorted(written) == sorted(f"{mask_path(frame_id)}" for frame_id in LABELLED)
    for frame_id in LABELLED:
        image = Image.open(io.BytesIO(written[mask_path(frame_id)]))
        assert image.mode == "P" and image.getpalette()[:9] == small_output.CLASS_SET.palette_K3.ravel().tolist()
        assert np.array_equal(np.array(image), small_output.mask_of(frame_id))


def test_png_masks_are_copied_as_they_are(tmp_path):
    labels, out = str(tmp_path / "labels"), str(tmp_path / "masks")
    small_output.segment(labels, mask_encoding="png")
    assert export(labels, out) == 0
    rows = pq.read_table(storage.join(labels, "frames"), columns=["frame_id", "status", "mask"]).to_pylist()
    expected = {mask_path(row["frame_id"]): row["mask"] for row in rows if row["status"] == "ok"}
    assert small_output.contents(out) == expected


def test_only_the_chosen_drives_are_written(labels, tmp_path, capsys):
    out = str(tmp_path / "masks")
    assert export(labels, out, "--sequence", "b") == 0
    assert "5 masks written" in capsys.readouterr().out
    assert sorted(small_output.contents(out)) == sorted(mask_path(i) for i in LABELLED if i.startswith("b/"))
    coco = str(tmp_path / "a.json")
    assert export(labels, coco, "--format", "coco", "--sequence", "a", "b") == 0
    assert [image["file_name"] for image in json.loads(Path(coco).read_text())["images"]] == LABELLED


ODD = {
    "a//0.png": "../../escaped.png",
    "a//1.png": "/etc/passwd",
    "a//2.png": "s3://bucket/x.jpg",
    "a//3.png": "drive.tar!cam0/1.jpg",
    "b/left/0.png": "x::y.png",
    "b/left/1.png": "x",
    "b/left/3.png": "x.png",
    "b/right/0.png": "100%.png/.././y\0z",
    "b/right/1.png": "x.jpg",
}


def test_no_two_frames_share_a_file_and_none_leaves_the_folder(labels, tmp_path):
    rename(labels, ODD)
    out = tmp_path / "deep" / "masks"
    assert export(labels, str(out)) == 0
    written = small_output.contents(str(tmp_path / "deep"))
    assert sorted(written) == sorted(
        f"masks/{path}"
        for path in (
            "%2E%2E/%2E%2E/escaped.png.png",
            "%/etc/passwd.png",
            "s3:/%/bucket/x.jpg.png",
            "drive.tar!cam0/1.jpg.png",
            "x%3A:y.png.png",
            "x.png",
            "x.png.png",
            "100%25.png/%2E%2E/%2E/y%00z.png",
            "x.jpg.png",
        )
    )
    for before, now in ODD.items():
        image = Image.open(io.BytesIO(written[f"masks/{mask_path(now)}"]))
        assert np.array_equal(np.array(image), small_output.mask_of(before))


def test_different_ids_have_different_paths():
    pieces = ["", ".", "..", "a", "%", "%2E", "%25", ":", "::", "%3A", "a.png", ".png", "\0"]
    ids = {"/".join(parts) for parts in ((p, q) for p in pieces for q in pieces)} | set(pieces)
    ids |= {p + q for p in pieces for q in pieces}
    paths = {mask_path(frame_id) for frame_id in ids}
    assert len(paths) == len(ids)
    for path in paths:
        parts = path.split("/")
        assert not {"", ".", ".."} & set(parts) and "::" not in path and "\0" not in path


def test_frames_and_their_exported_masks_are_pairs_to_train_on(labels, tmp_path):
    for frame_id in FRAMES:
        storage.write_whole(str(tmp_path / "log" / frame_id), b"frame")
    assert export(labels, str(tmp_path / "masks")) == 0
    listing = find_pairs(str(tmp_path / "log"), str(tmp_path / "masks"), mask_suffix=".png")
    assert sorted(f"{pair.pair_id}.png" for pair in listing.pairs) == sorted(i for i in LABELLED if "//" not in i)


def test_any_storage_takes_the_masks(tmp_path):
    labels = str(tmp_path / "labels")
    small_output.segment(labels)
    fsspec.filesystem("memory").store.clear()
    assert export(labels, "memory://bucket/masks") == 0
    assert len(small_output.contents("memory://bucket/masks")) == 9
    assert export(labels, "memory://bucket/coco.json", "--format", "coco") == 0
    assert len(json.loads(storage.read_bytes("memory://bucket/coco.json"))["images"]) == 9


MEASURED = """
import sys, tracemalloc
import pyarrow
from unet_ray.output.exports.formats import export_masks
from unet_ray.config import ExportMasksConfig
tracemalloc.start()
for labels in sys.argv[1:]:
    export_masks(ExportMasksConfig(labels=labels, out=labels + ".json", format="coco"))  # the first also imports
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    export_masks(ExportMasksConfig(labels=labels, out=labels + ".json", format="coco"))
    print(pyarrow.default_memory_pool().max_memory(), tracemalloc.get_traced_memory()[1] - before)
"""


def test_six_times_the_frames_take_no_more_memory(tmp_path, monkeypatch):
    noise = np.random.default_rng(3).integers(0, 3, (600, 80, 80), np.uint8)
    monkeypatch.setattr(small_output, "mask_of", lambda frame_id: noise[int(frame_id.split("/")[2][:-4])])
    cutting = Cutting(chunk_frames=100, shard_rows=100)
    outs = [str(tmp_path / f"{n_frames}") for n_frames in (100, 600)]
    for out in outs:
        listing = small_output.listing({("a", ""): int(Path(out).name)})
        small_output.segment(out, listing, cutting=cutting)
    done = subprocess.run([sys.executable, "-c", MEASURED, *outs], capture_output=True, text=True, check=True)
    few, many = (list(map(int, line.split())) for line in done.stdout.splitlines() if "masks" not in line)
    assert many[0] < 1.3 * few[0] and many[1] < 1.3 * few[1], (few, many)


# --- COCO ---


def test_pycocotools_reads_every_mask_back(labels, tmp_path, capsys):
    out = str(tmp_path / "coco.json")
    assert export(labels, out, "--format", "coco") == 0
    assert capsys.readouterr().out.splitlines()[-2] == f"9 masks written to {out}; 2 rejected frames have none"
    coco = COCO(out)
    assert [(c["id"], c["name"]) for c in coco.loadCats(coco.getCatIds())] == [
        (1, "road"),
        (2, "sky"),
        (3, "pedestrian"),
    ]
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    images = coco.loadImgs(coco.getImgIds())
    assert [image["file_name"] for image in images] == LABELLED and sorted(coco.imgs) == list(range(1, 10))
    for image in images:
        expected = small_output.mask_of(image["file_name"])
        assert (image["height"], image["width"]) == expected.shape
        rebuilt = np.full(expected.shape, 255, np.uint8)
        regions = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert sorted(region["category_id"] - 1 for region in regions) == np.unique(expected).tolist()
        for region in regions:
            inside = coco.annToMask(region).astype(bool)
            assert (rebuilt[inside] == 255).all()
            rebuilt[inside] = region["category_id"] - 1
            rows, columns = np.nonzero(inside)
            assert region["area"] == inside.sum() and region["iscrowd"] == 0
            assert region["bbox"] == [
                columns.min(),
                rows.min(),
                np.ptp(columns) + 1,
                np.ptp(rows) + 1,
            ]
        assert np.array_equal(rebuilt, expected)


def test_a_region_is_every_pixel_of_a_class():
    mask_HW = np.array([[0, 2, 2], [0, 0, 2]], np.uint8)
    first, second = regions(mask_HW)
    assert (first["category_id"], first["area"], first["bbox"]) == (1, 3, [0, 0, 2, 2])
    assert (second["category_id"], second["area"], second["bbox"]) == (3, 3, [1, 0, 2, 2])
    assert np.array_equal(coco_mask.decode(second["segmentation"]), mask_HW == 2)


def test_without_pycocotools_one_line_says_what_to_install(labels, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert export(labels, str(tmp_path / "coco.json"), "--format", "coco") == 2
    assert capsys.readouterr().err == (
        "unet-ray: error: the format coco needs the package pycocotools; pip install 'unet-ray[coco]'\n"
    )


# --- what is refused ---


@pytest.mark.parametrize("export_format", ["png", "coco"])
def test_an_output_that_is_not_finished_is_refused(export_format, labels, tmp_path, capsys):
    storage.delete(storage.join(labels, "summary.json"))
    out = tmp_path / "masks.json"
    assert export(labels, str(out), "--format", export_format) == 2
    assert capsys.readouterr().err == (
        f"unet-ray: error: {labels} is not finished (or was found damaged), 11 of 11 frames are done; "
        "run segment again, then export\n"
    )
    assert not out.exists()


def test_a_missing_file_of_frames_is_refused(labels, tmp_path, capsys):
    storage.delete(storage.join(labels, "frames", "part-00001.parquet"))
    assert export(labels, str(tmp_path / "masks")) == 2
    assert "was found damaged" in capsys.readouterr().err


def test_a_folder_that_is_no_output_is_refused(tmp_path, capsys):
    assert export(str(tmp_path), str(tmp_path.parent / "masks")) == 2
    assert capsys.readouterr().err == (
        f"unet-ray: error: {tmp_path} is not an output of segment: run.json is missing\n"
    )


def test_a_drive_that_is_not_there_is_named_with_those_that_are(labels, tmp_path, capsys):
    assert export(labels, str(tmp_path / "masks"), "--sequence", "c") == 2
    assert capsys.readouterr().err == "unet-ray: error: --sequence is 'c'; the output's drives are a, b\n"


@pytest.mark.parametrize(
    "out, export_format, message",
    [
        ("labels", "png", "--out labels lies in the output labels itself; give a place beside it"),
        ("labels/frames", "png", "--out labels/frames lies in the output labels itself; give a place beside it"),
        ("x.zip", "voc", "--out is x.zip; only the format cvat is written as a zip, give a folder"),
        ("masks", "coco", "--out is masks; the format coco is one file, give a name that ends in .json"),
    ],
)
def test_unusable_places_are_one_line(out, export_format, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as refused:
        ExportMasksConfig(labels="labels", out=out, format=export_format)
    assert str(refused.value) == message
    ExportMasksConfig(labels="labels", out="labels-masks.json", format=export_format)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["x/" + "n" * 252 + ".png"],
            "has 260 bytes in one part; a file here may have 255 (and 4095 with its folders)",
        ),
        (["ä" * 126], "has 256 bytes in one part"),
        (["/".join(["n" * 200] * 21)], "(and 4095 with its folders)"),
        (["x", "x.png/y"], "the file x.png of the frame x would be the folder of another frame's: export as coco"),
    ],
)
def test_names_that_make_no_files_are_refused_before_one_is_written(names, message, tmp_path, capsys):
    labels = str(tmp_path / "labels")
    small_output.segment(labels, mask_encoding="raw")
    rename(labels, dict(zip(LABELLED, names, strict=False)))
    assert export(labels, str(tmp_path / "masks")) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "masks").exists()
    assert export(labels, str(tmp_path / "masks.json"), "--format", "coco") == 0

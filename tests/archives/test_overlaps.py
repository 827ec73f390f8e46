"""One place, one frame: roots in each other, outputs in inputs, rows that are one frame; through the command line."""

from __future__ import annotations

import copy
import os
import zipfile
from pathlib import Path

import fsspec
import labelled
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_output
from test_frames import write_folder, write_tar

from unet_ray import cli, storage
from unet_ray.archives.listing import list_archives
from unet_ray.archives.roots import find_roots
from unet_ray.config import ExportMasksConfig, SegmentConfig, VerifyConfig
from unet_ray.frames import IMAGE_EXTENSIONS
from unet_ray.storage import overlaps

TWICE = "its frames would be labelled twice; give each place once"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with a log `t` of two drives, a link to it and a tar beside it."""
    monkeypatch.chdir(tmp_path)
    for path in ("t/1.png", "t/sub/2.png", "t/other/3.png", "t-sub/4.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"frame")
    (tmp_path / "link").symlink_to("t")
    write_tar(tmp_path / "t/log.tar")
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command ends with, exit code 2; it has written nothing."""
    before = sorted(Path().rglob("*"))
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("unet-ray: error: ") and error.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return error.removeprefix("unet-ray: error: ").removesuffix("\n")


# --- roots ---


@pytest.mark.parametrize(
    ("roots", "message"),
    [
        (["t", "t/sub"], f"t/sub lies in t: {TWICE}"),
        (["t/sub", "t"], f"t/sub lies in t: {TWICE}"),
        (["t", "t"], f"t is given twice: {TWICE}"),
        (["t/", "./t"], f"t/ is given twice: {TWICE}"),
        (["t/sub/../sub", "t"], f"t/sub/../sub lies in t: {TWICE}"),
        (["t", "t/log.tar"], f"t/log.tar lies in t: {TWICE}"),
        (["t", "t/1.png"], f"t/1.png lies in t: {TWICE}"),
        (["t", "link"], f"link ({{here}}/t) is t: {TWICE}"),
        (["t", "link/sub"], f"link/sub ({{here}}/t/sub) lies in t: {TWICE}"),
        (["t/sub", "t/*"], f"t/sub is given twice: {TWICE}"),
        (["t/s*", "t/*b"], f"{{here}}/t/sub is given twice: {TWICE}"),
        (["t*", "t/other"], f"t/other lies in {{here}}/t: {TWICE}"),
        (["t/**"], f"{{here}}/t/1.png lies in {{here}}/t: {TWICE}"),
        (["lists/a.csv", "lists/a.csv"], f"lists/a.csv is given twice: {TWICE}"),
    ],
)
def test_roots_that_are_one_place_or_lie_in_each_other_are_refused(roots, message, folder, capsys):
    (folder / "lists").mkdir()
    (folder / "lists/a.csv").write_text("uri\n../t/1.png\n")
    error = refusal(capsys, "segment", "--model", "gone", "--frames", *roots, "--out", "labels")
    assert error == message.format(here=folder)


def test_roots_on_a_store_are_compared_by_their_text(capsys):
    bucket = fsspec.filesystem("memory")
    bucket.store.clear()
    for path in ("log/sub/1.png", "log-2/1.png"):
        storage.write_whole(f"memory://bucket/{path}", b"frame")
    command = ("segment", "--model", "gone", "--out", "labels", "--frames", "memory://bucket/log")
    error = refusal(capsys, *command, "memory://bucket/log/sub/")
    assert error == f"memory://bucket/log/sub/ lies in memory://bucket/log: {TWICE}"
    error = refusal(capsys, *command, "memory://bucket/*")
    assert error == f"memory://bucket/log is given twice: {TWICE}"
    beside = list_archives(["memory://bucket/log", "memory://bucket/log-2"]).table
    assert beside["frame_id"].to_pylist() == ["log-2/1.png", "log/sub/1.png"]
    assert (
        overlaps.real_uri("s3a://bucket/log/") == "s3://bucket/log" == overlaps.real_uri("filecache::s3://bucket/log")
    )


def test_places_beside_each_other_are_accepted(folder):
    assert [label for label, _ in find_roots(["t/sub", "t/other", "t-sub", "t/*.png"]).places] == [
        "sub",
        "other",
        "t-sub",
        "1.png",
    ]
    assert len(list_archives(["t", "t-sub"]).table) == 3 + 3 + 1


def test_a_hard_link_and_a_link_below_a_root_are_frames_of_their_own(folder):
    os.link("t/1.png", "t/5.png")
    os.link("t/1.png", "t-sub/1.png")
    (folder / "t/6.png").symlink_to("1.png")
    (folder / "t/again").symlink_to("sub")
    ids = list_archives(["t", "t-sub"]).table["frame_id"].to_pylist()
    assert {frame_id for frame_id in ids if "log.tar" not in frame_id} == {
        *("t/1.png", "t/5.png", "t/6.png", "t/again/2.png", "t/other/3.png", "t/sub/2.png"),
        *("t-sub/1.png", "t-sub/4.png"),
    }


# --- frames ---


@pytest.mark.parametrize(
    ("roots", "rows", "message"),
    [
        (["a.csv"], "t/1.png,x\nt/1.png,y", "{here}/t/1.png is listed twice: as 'x' and as 'y' it is one frame; name "),
        (["a.csv", "t"], "t/1.png,x", "{here}/t/1.png is listed twice: as 'x' and as 't/1.png' it is one frame; name "),
        (["t", "a.csv"], "t/sub/../1.png,x", "{here}/t/1.png is listed twice: as 't/1.png' and as 'x' it is one "),
        (["link", "a.csv"], "t/1.png,x", "{here}/link/1.png and {here}/t/1.png are one file, {here}/t/1.png; name "),
        (["a.csv"], "t/1.png,x\nlink/1.png,y", "{here}/t/1.png and {here}/link/1.png are one file, {here}/t/1.png; "),
        (["t-sub", "t/sub"], None, "{here}/t-sub/in/2.png and {here}/t/sub/2.png are one file, {here}/t/sub/2.png; "),
        (["t-sub/a.parquet", "t-sub"], None, "{here}/t-sub/a.parquet is listed twice: as 'a.parquet!000000' and as "),
    ],
)
def test_two_rows_that_are_one_frame_are_refused(roots, rows, message, folder):
    (folder / "a.csv").write_text(f"uri,frame_id\n{rows}\n")
    (folder / "t-sub/in").symlink_to("../t/sub")
    pq.write_table(pa.table({"image": [b"frame", b"another"]}), folder / "t-sub/a.parquet")
    with pytest.raises(ValueError) as caught:
        list_archives(roots)
    assert str(caught.value).startswith(message.format(here=folder)) and "\n" not in str(caught.value)


def test_a_zip_that_names_a_member_twice_is_refused(folder):
    with zipfile.ZipFile("log.zip", "w") as archive:
        archive.writestr("1.png", b"frame")
        again = copy.copy(archive.filelist[0])
        again.filename = "2.png"
        archive.filelist.append(again)
    with pytest.raises(ValueError, match=r"log.zip is listed twice: as 'log.zip!1.png' and as 'log.zip!2.png' it is "):
        list_archives(["log.zip"])


def test_a_catalogue_may_lie_in_a_folder_of_frames_that_it_does_not_name(folder):
    (folder / "t/more.csv").write_text("uri\n../t-sub/4.png\n")
    assert "../t-sub/4.png" in list_archives(["t", "t/more.csv"], allow_uris=["t-sub"]).table["frame_id"].to_pylist()


# --- outputs ---


@pytest.mark.parametrize(
    ("frames", "out", "message"),
    [
        ("t", "t/labels", "--out t/labels lies in --frames t itself; give a place beside it"),
        ("t", "t", "--out t lies in --frames t itself; give a place beside it"),
        ("t", "t/sub/../x/", "--out t/sub/../x/ lies in --frames t itself; give a place beside it"),
        ("t/", "link/new", "--out link/new ({here}/t/new) lies in --frames t/ itself; give a place beside it"),
        ("link", "t/new", "--out t/new lies in --frames link ({here}/t) itself; give a place beside it"),
        ("t/sub", "t", "--frames t/sub lies in --out t; give an --out beside it"),
        ("t/log.tar", "t", "--frames t/log.tar lies in --out t; give an --out beside it"),
        ("link/sub", "t", "--frames link/sub ({here}/t/sub) lies in --out t; give an --out beside it"),
        ("t/*", "t/labels", "--out t/labels lies in what --frames t/* matches; give a place beside it"),
        ("t/*", "t/labels/x/y", "--out t/labels/x/y lies in what --frames t/* matches; give a place beside it"),
        ("t/*/*.png", "t/labels", "--out t/labels lies in what --frames t/*/*.png matches; give a place beside it"),
        ("t/**/*.png", "t/labels", "--out t/labels lies in what --frames t/**/*.png matches; give a place beside it"),
        ("t/*/frames", "t/labels", "--out t/labels lies in what --frames t/*/frames matches; give a place beside it"),
        ("link/*", "t/labels", "--out t/labels lies in what --frames link/* matches; give a place beside it"),
        ("t/sub/*", "t", "--frames t/sub/* lies in --out t; give an --out beside it"),
        ("?/sub", "t", "--frames {here}/t/sub lies in --out t; give an --out beside it"),
        ("li*", "t/labels", "--out t/labels lies in --frames {here}/link ({here}/t) itself; give a place beside it"),
        ("s3://b/log/*", "s3a://b/log/x", "--out s3a://b/log/x lies in what --frames s3://b/log/* matches; give a "),
        ("s3://b/log", "s3://b/log/x", "--out s3://b/log/x lies in --frames s3://b/log itself; give a place beside it"),
        ("s3://b/log", "s3://b", "--frames s3://b/log lies in --out s3://b; give an --out beside it"),
    ],
)
def test_an_output_in_its_input_or_around_it_is_refused(frames, out, message, folder, capsys):
    error = refusal(capsys, "segment", "--model", "gone", "--frames", "t-sub", frames, "--out", out)
    assert error.startswith(message.format(here=folder))


@pytest.mark.parametrize(
    ("frames", "out"),
    [
        ("t", "t-labels"),
        ("t/*.tar", "t/labels"),
        ("t/*/cam0", "t/labels"),
        ("t/s*", "t/labels"),
        ("t/s*/**/*.png", "t/labels"),
        ("s3://b/log/*.tar", "s3://b/log/labels"),
        ("s3://b/log", "s3://b/log-labels"),
        ("s3://b/log", "b/log/labels"),
    ],
)
def test_an_output_beside_its_input_is_accepted(frames, out, folder):
    assert SegmentConfig(model="m", frames=(frames,), out=out).out == out


def test_a_folder_with_a_letter_of_globs_in_its_name_is_a_folder(folder):
    (folder / "log[1]").mkdir()
    (folder / "log[1]/1.png").write_bytes(b"frame")
    assert SegmentConfig(model="m", frames=("log[1]",), out="log1/labels").out == "log1/labels"


def test_the_names_of_an_output_are_those_that_it_has(tmp_path):
    small_output.segment(str(tmp_path / "labels"), mask_encoding="png")
    names = {path.name for path in (tmp_path / "labels").iterdir()}
    assert names and names <= set(overlaps.OUTPUT_NAMES)
    images = [path for path in (tmp_path / "labels").rglob("*") if path.suffix in IMAGE_EXTENSIONS]
    assert {path.name for path in images} <= set(overlaps.OUTPUT_NAMES)


PAIRS = ("--images", "t/sub", "--masks", "t/other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", *PAIRS, "--out", "t/sub/run"), "--out t/sub/run lies in --images t/sub itself; give a place beside"),
        (("train", *PAIRS, "--out", "link/other"), "--out link/other ({here}/t/other) lies in --masks t/other itself"),
        (("train", *PAIRS, "--out", "t"), "--images t/sub lies in --out t; give an --out beside it"),
        (
            ("train", *PAIRS, "--val-images", "v", "--val-masks", "w", "--out", "w/run"),
            "--out w/run lies in --val-masks w itself; give a place beside it",
        ),
        (("evaluate", "--model", "m", *PAIRS, "--out", "t/sub"), "--out t/sub lies in --images t/sub itself; give a "),
        (("export-masks", "t", "--out", "link/x"), "--out link/x ({here}/t/x) lies in the output t itself; give a "),
    ],
)
def test_other_commands_write_into_no_folder_that_they_read(arguments, message, folder, capsys):
    classes = ("--classes", "camvid") if arguments[0] == "train" else ()
    assert refusal(capsys, *arguments, *classes).startswith(message.format(here=folder))


def test_an_output_that_lies_in_its_input_already_stays_readable(folder, capsys):
    root = write_folder(folder / "log")
    labelled.run(root, "log/labels")
    assert cli.main(["verify", "log/labels"]) == 0
    assert cli.main(["export-masks", "log/labels", "--out", "masks"]) == 0
    assert len(list((folder / "masks").rglob("*.png"))) == 3
    assert ExportMasksConfig(labels="log/labels", out="log").labels == VerifyConfig(out="log/labels").out
    error = refusal(capsys, "segment", "--model", "gone", "--frames", "log", "--out", "log/labels")
    assert error == "--out log/labels lies in --frames log itself; give a place beside it"

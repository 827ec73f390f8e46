"""Pipes, sockets and devices are named and counted when they are listed, and opened nowhere: nothing hangs."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_ray import cli, storage
from unet_ray.archives.listing import list_archives
from unet_ray.archives.reading import FrameGone, read_frames
from unet_ray.config import CheckConfig
from unet_ray.labelling.planning import say_ignored
from unet_ray.model.bundle import read_bundle
from unet_ray.options.config_files import read_yaml
from unet_ray.pairs.checks import check_data_set
from unet_ray.pairs.pairs import find_pairs, require_complete

pytestmark = pytest.mark.timeout(60)  # each of them waited without end


def make(path: Path, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(path.parent):  # a socket's path is short
            listener.bind(path.name)
    elif kind == "device":
        path.symlink_to(
            {".parquet": "/dev/null", ".tar": "/dev/random", ".csv": "/dev/urandom"}.get(path.suffix, "/dev/zero")
        )
    else:
        target = path.parent.parent / f"{path.name}.pipe"
        os.mkfifo(target)
        path.symlink_to(target)


NAMES = {"pipe": "a pipe", "socket": "a socket", "device": "a device", "link to a pipe": "a pipe"}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", NAMES)
def test_in_a_folder(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("2.png", "x.parquet", "y.tar", "z.csv"):
        make(tmp_path / "in" / name, kind)
    (tmp_path / "in/1.jpg").write_bytes(b"1")
    for root in ("in", "in/*"):
        listing = list_archives([str(tmp_path / root)])
        assert list(read_frames(listing.table)) == [b"1"] and listing.unlistable == ()
        assert listing.ignored == {"pipe, socket or device": 4}
        say_ignored(listing)
        assert capsys.readouterr().out.startswith("ignored, as pipes, sockets or devices: in/2.png, in/")


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("name", ["a.png", "a.tar", "a.zip", "a.parquet", "a.csv"])
def test_named_itself(name: str, kind: str, tmp_path: Path) -> None:
    make(tmp_path / name, kind)
    with pytest.raises(ValueError, match=f"a.* is {NAMES[kind]}, not a file; give a folder, a file, or a glob of them"):
        list_archives([str(tmp_path / name)])


def test_named_by_a_catalogue(tmp_path: Path) -> None:
    make(tmp_path / "a.png", "pipe")
    make(tmp_path / "b.png", "socket")
    make(tmp_path / "c.png", "device")
    (tmp_path / "d.png").mkdir()
    (tmp_path / "e.png").write_bytes(b"e")
    (tmp_path / "c.csv").write_text("uri\n" + "".join(f"{letter}.png\n" for letter in "abcde"))
    *others, last = read_frames(list_archives([str(tmp_path / "c.csv")]).table)
    assert last == b"e"
    assert others == [
        FrameGone("not_an_image", f"{tmp_path}/{letter}.png is a folder, a pipe, a socket or a device, not a file")
        for letter in "abcd"
    ]


def test_what_was_a_frame_when_it_was_listed(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"x")
    rows = list_archives([str(tmp_path)]).table
    (tmp_path / "1.png").unlink()
    make(tmp_path / "1.png", "pipe")
    assert list(read_frames(rows)) == [
        FrameGone("changed", f"{tmp_path}/1.png has changed since it was listed"),
        b"x",
    ]


@pytest.mark.parametrize("kind", NAMES)
def test_files_of_the_programs_own(kind: str, tmp_path: Path) -> None:
    make(tmp_path / "a" / "model.json", kind)
    for read in (storage.read_bytes, storage.open_read, storage.info):
        with pytest.raises(storage.NotAFile, match=NAMES[kind]):
            read(str(tmp_path / "a/model.json"))
    with pytest.raises(ValueError, match=f"model.json: {NAMES[kind]}, not a file"):
        read_yaml(str(tmp_path / "a/model.json"))
    with pytest.raises(storage.NotAFile, match=NAMES[kind]):
        read_bundle(str(tmp_path / "a"))


@pytest.mark.parametrize(
    "command",
    [
        ["segment", "--config", "pipe"],
        ["check", "--images", "rgb", "--masks", "msk", "--classes", "pipe.yaml"],
        ["verify", "out"],
    ],
)
def test_commands_end_with_one_line(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("pipe", "pipe.yaml", "out/run.json", "out/manifest/_g000.json"):
        make(tmp_path / path, "pipe")
    assert cli.main(command) in (1, 2)
    lines = capsys.readouterr()
    assert "a pipe, not a file" in lines.err + lines.out and (lines.err + lines.out).count("\n") <= 2


def test_frames_and_masks(tmp_path: Path) -> None:
    for name in ("0000", "0009"):
        for folder, pixels in (("rgb", np.zeros((8, 9, 3), np.uint8)), ("msk", np.zeros((8, 9), np.uint8))):
            path = tmp_path / folder / "d0" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (tmp_path / "rgb/d0/0009.png").unlink()
    make(tmp_path / "rgb/d0/0009.png", "pipe")
    listing = find_pairs("rgb", "msk")
    assert listing.not_files == (f"{tmp_path}/rgb/d0/0009.png",)
    with pytest.raises(
        ValueError, match="1 mask without a frame: d0/0009.png; pipes, sockets or devices, which are no"
    ):
        require_complete(listing)
    report = check_data_set(CheckConfig(images="rgb", masks="msk", classes="camvid"))
    assert [(item.what, item.examples) for item in report.findings if "pipes" in item.what] == [
        ("are no files but pipes, sockets or devices: they are not read", ("d0/0009.png",))
    ]

"""What is hidden, or left by programs, is no frame unless it is asked for; what is planned or named stays."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import labelled
import numpy as np
import pytest
from PIL import Image

from unet_ray.archives.listing import list_archives
from unet_ray.config import CheckConfig
from unet_ray.frames import is_hidden
from unet_ray.labelling.planning import say_ignored
from unet_ray.output import plans
from unet_ray.pairs.checks import check_data_set
from unet_ray.pairs.pairs import find_pairs

STRAYS = [
    *("__MACOSX/._1.jpg", "._2.jpg", ".ipynb_checkpoints/1-checkpoint.jpg", "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg"),
    *("a/.hidden/3.jpg", "a/.4.jpg", "..5.jpg", "@__thumb/6.jpg", "$RECYCLE.BIN/7.jpg", ".DS_Store", ".x.tar"),
    *("lost+found/8.jpg", "a/__MACOSX/9.jpg", "#recycle/10.jpg", ".AppleDouble/11.jpg"),
]
FRAMES = [
    "1.jpg",
    "a/2.jpg",
    "a.b/3.jpg",
    "MACOSX/4.jpg",
    "eaDir/5.jpg",
    "x__MACOSX/6.jpg",
    "a/@eaDir.jpg",
    "thumbnails/7.jpg",
]


def write(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


@pytest.mark.parametrize("name", STRAYS)
def test_is_hidden(name: str) -> None:
    assert is_hidden(name) and is_hidden(f"a/{name}") and is_hidden(f"./{name}")


@pytest.mark.parametrize("name", [*FRAMES, "./1.jpg", "a/./1.jpg", "a/../1.jpg"])
def test_is_not_hidden(name: str) -> None:
    assert not is_hidden(name) and not is_hidden(f"./{name}")


@pytest.mark.parametrize("kind", ["folder", "glob", "tar", "zip"])
@pytest.mark.parametrize("include_hidden", [False, True])
def test_strays_are_counted(kind: str, include_hidden: bool, tmp_path: Path) -> None:
    names = [*FRAMES, *STRAYS]
    folder = tmp_path / ".data" / "in"  # above the root, a dot hides nothing
    folder.mkdir(parents=True)
    if kind == "tar":
        with tarfile.open(folder / "a.tar", "w") as tar:
            for name in names:
                member = tarfile.TarInfo(f"./{name}")
                member.size = len(name)
                tar.addfile(member, io.BytesIO(name.encode()))
    elif kind == "zip":
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            for name in names:
                archive.writestr(name, name)
    else:
        write(folder, [name for name in names if name != ".x.tar"])
        if include_hidden is False:
            (folder / ".x.tar").write_bytes(b"no tar at all")
    root = folder / {"folder": "", "glob": "*"}.get(kind, f"a.{kind}")
    listing = list_archives([str(root)], include_hidden=include_hidden)
    prefix = f"a.{kind}!" if kind in ("tar", "zip") else ""
    expected = {prefix + name for name in names if name.endswith(".jpg") and (include_hidden or name in FRAMES)}
    assert set(listing.table["frame_id"].to_pylist()) == expected and listing.unlistable == ()
    if include_hidden:
        assert "hidden" not in listing.ignored
    elif kind != "glob":  # a folder that a glob does not match is one
        assert listing.ignored == {"hidden": len(STRAYS)}


def test_the_rule_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, ["1.jpg", "._1.jpg"])
    say_ignored(list_archives([str(tmp_path)]))
    assert capsys.readouterr().out == (
        "ignored as hidden: 1 (a name that begins with a dot, or in a folder __MACOSX, @eaDir, @__thumb, @Recycle, "
        "#recycle, $RECYCLE.BIN, System Volume Information, lost+found; --include-hidden takes them)\n"
    )


def test_what_is_named_is_never_hidden(tmp_path: Path) -> None:
    write(tmp_path, [".a/1.jpg", ".a/.2.jpg", ".a/@eaDir/3.jpg"])
    (tmp_path / "c.csv").write_text("uri\n.a/1.jpg\n.a/.2.jpg\n.a/@eaDir/3.jpg\n")
    assert len(list_archives([str(tmp_path / "c.csv")]).table) == 3
    assert list_archives([str(tmp_path / ".a")]).table["frame_id"].to_pylist() == ["1.jpg"]
    assert list_archives([str(tmp_path / ".a/.2.jpg")]).table["frame_id"].to_pylist() == [".2.jpg"]
    assert list_archives([f"{tmp_path}/.*/1.jpg"]).table["frame_id"].to_pylist() == [".a/1.jpg"]
    assert list_archives([f"{tmp_path}/.a/@eaDir/*.jpg"]).table["frame_id"].to_pylist() == ["3.jpg"]
    with pytest.raises(ValueError, match=r"holds 1 \.csv, 3 hidden \(--include-hidden takes what is hidden\); "):
        list_archives([str(tmp_path)])
    with pytest.raises(ValueError, match="nothing matches"):
        list_archives([f"{tmp_path}/*/1.jpg"])


def test_a_broken_link_or_closed_folder_that_is_hidden_is_ignored(tmp_path: Path) -> None:
    write(tmp_path, ["1.jpg"])
    (tmp_path / ".#1.jpg").symlink_to("someone@host.1234")  # Emacs locks a file so
    os.mkfifo(tmp_path / ".pipe.jpg")
    listing = list_archives([str(tmp_path)])
    assert listing.unlistable == () and listing.ignored == {"hidden": 2} and listing.not_files == ()


def test_planned_before_is_not_gone(tmp_path: Path) -> None:
    """Half of the frames and more: `--keep-gone` is not asked for."""
    write(tmp_path / "in", ["1.jpg", ".2.jpg", "@eaDir/3.jpg", "a/.4.jpg"])
    with zipfile.ZipFile(tmp_path / "in" / "z.zip", "w") as archive:
        archive.writestr("__MACOSX/._1.jpg", "x")
        archive.writestr("5.jpg", "y")
    root, out = str(tmp_path / "in"), str(tmp_path / "out")
    for include_hidden, n_gone in ((True, 0), (False, 0), (False, 1), (True, 2)):
        listing = list_archives([root], include_hidden=include_hidden)
        plan = plans.plan(out, listing, labelled.LINEAGE, labelled.CUTTING, config_yaml="")
        assert (plan.n_frames, plan.origin.n_gone) == (6, n_gone)
        if (include_hidden, n_gone) == (False, 0):
            (tmp_path / "in/1.jpg").unlink()
        elif n_gone == 1:
            (tmp_path / "in/.2.jpg").unlink()


def test_frames_and_masks(tmp_path: Path) -> None:
    for folder, pixels in (("rgb", np.zeros((8, 9, 3), np.uint8)), ("msk", np.zeros((8, 9), np.uint8))):
        for name in ("0.png", "@eaDir/0.png", ".1.png"):
            path = tmp_path / folder / "d0" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (tmp_path / "rgb/d0/._0.png").write_bytes(b"\0\5\26\7")
    images, masks = str(tmp_path / "rgb"), str(tmp_path / "msk")
    listing = find_pairs(images, masks)
    assert [pair.pair_id for pair in listing.pairs] == ["d0/0"] and listing.n_hidden == 5
    hidden = [pair.pair_id for pair in find_pairs(images, masks, include_hidden=True).pairs]
    assert hidden == ["d0/.1", "d0/0", "d0/@eaDir/0"]
    report = check_data_set(CheckConfig(images=images, masks=masks, classes="camvid"))
    assert "\nhidden       5: a name that begins with a dot, or in a folder __MACOSX, " in report.as_text()
    assert report.n_pairs == 1

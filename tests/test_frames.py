from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from unet_ray import frames, storage
from unet_ray.frames import FrameGone, PathFields, list_archives, natural_key, parse_path, read_frames

FILES = {
    "drive2/cam/frame10.png": b"ten",
    "drive2/cam/frame2.PNG": b"two",
    "drive10/a.jpg": b"jpeg",
    "drive10/notes.json": b"{}",
    "drive10/sub/readme": b"",
}
IN_ORDER = ["drive2/cam/frame2.PNG", "drive2/cam/frame10.png", "drive10/a.jpg"]


def write_folder(root: Path) -> str:
    for path, data in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return str(root)


def write_tar(path: Path, files: dict[str, bytes] = FILES) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def write_zip(path: Path) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for place, (name, data) in enumerate(FILES.items()):
            archive.writestr(name, data, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[place % 2])
    return str(path)


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_an_archive_lists_its_frames_in_order_and_reads_them_back(kind, tmp_path):
    write, prefix = {
        "folder": (lambda: write_folder(tmp_path / "log"), ""),
        "tar": (lambda: write_tar(tmp_path / "log.tar"), "log.tar!"),
        "zip": (lambda: write_zip(tmp_path / "log.zip"), "log.zip!"),
    }[kind]
    listing = list_archives([write()])
    assert listing.table.schema == frames.MANIFEST_SCHEMA
    assert listing.table["frame_id"].to_pylist() == [prefix + path for path in IN_ORDER]
    assert read_frames(listing.table) == [FILES[path] for path in IN_ORDER]
    assert listing.table["frame_index"].to_pylist() == [2, 10, None]
    assert listing.ignored == {".json": 1, "no extension": 1}
    assert listing.unlistable == ()


def test_numbers_sort_by_value_and_texts_that_tie_by_themselves():
    names = ["frame10", "frame2", "frame02", "frame", "b1", "a100"]
    assert sorted(names, key=natural_key) == ["a100", "b1", "frame", "frame02", "frame2", "frame10"]


def test_a_path_says_its_drive_by_the_folder_or_by_a_pattern():
    assert parse_path("drive07/cam0/000012.png", None) == PathFields("drive07/cam0", "", 12, None)
    assert parse_path("log.tar!cam0/000012.png", None) == PathFields("log.tar!cam0", "", 12, None)
    assert parse_path("0001TP_006690.png", None) == PathFields("", "", 6690, None)
    pattern = r"(?P<sequence>[^/_]+)_(?P<frame_index>\d+)"
    assert parse_path("train/0001TP_006690.png", pattern) == PathFields("0001TP", "", 6690, None)
    pattern = r"^(?P<sequence>\w+)/(?P<camera>\w+)/(?P<timestamp_ns>\d+)"
    assert parse_path("d1/front/1700000000123456789.png", pattern) == PathFields(
        "d1", "front", None, 1700000000123456789
    )


def test_a_path_that_the_pattern_does_not_match_says_nothing():
    assert parse_path("a/b7.png", "^x(?P<sequence>.)") == PathFields("", "", None, None)
    with pytest.raises(ValueError, match="takes frame_index 'b' from 'a/b.png'; it must be a whole number of 63 bits"):
        parse_path("a/b.png", "/(?P<frame_index>[^.]+)")


def test_several_roots_and_globs_keep_equal_names_apart(tmp_path):
    for drive in ("a", "b"):
        (tmp_path / drive / "cam0").mkdir(parents=True)
        (tmp_path / drive / "cam0" / "1.png").write_bytes(drive.encode())
    two = list_archives([str(tmp_path / "a" / "cam0"), str(tmp_path / "b" / "cam0")]).table
    assert two["frame_id"].to_pylist() == ["a/cam0/1.png", "b/cam0/1.png"]
    matched = list_archives([str(tmp_path / "*" / "cam0")]).table
    assert matched["frame_id"].to_pylist() == ["a/cam0/1.png", "b/cam0/1.png"]
    with pytest.raises(ValueError, match="two frames have the id 'cam0/1.png'|give each root once"):
        list_archives([str(tmp_path / "a" / "cam0")] * 2)


def test_a_frame_that_changed_or_vanished_is_no_bytes(tmp_path):
    root = write_folder(tmp_path / "log")
    rows = list_archives([root]).table
    (tmp_path / "log" / IN_ORDER[0]).write_bytes(b"other content")
    (tmp_path / "log" / IN_ORDER[2]).unlink()
    first, second, third = read_frames(rows)
    assert first == FrameGone("changed", f"{root}/{IN_ORDER[0]} has changed since it was listed")
    assert second == b"ten"
    assert third == FrameGone("missing", f"{root}/{IN_ORDER[2]} is gone since it was listed")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gone", "gone: no such folder or file"),
        ("empty", "empty holds nothing; frames are .png, "),
        ("x*", "nothing matches"),
    ],
)
def test_roots_without_frames_are_refused(uri, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        list_archives([uri])


def test_members_that_would_escape_are_refused_by_name(tmp_path):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../up.png", "/root.png", "a/../../up.png"):
            tar.addfile(tarfile.TarInfo(name))
        for kind, name in (
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.LNKTYPE, "hard.png"),
            (tarfile.CHRTYPE, "device.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("good.png"))
    listing = list_archives([str(path)])
    assert listing.table["frame_id"].to_pylist() == ["evil.tar!good.png"]
    assert listing.unlistable == (
        (f"{path}!../up.png", "a name that leaves the archive"),
        (f"{path}!/root.png", "a name that leaves the archive"),
        (f"{path}!a/../../up.png", "a name that leaves the archive"),
        (f"{path}!link.png", "a link, device or sparse file"),
        (f"{path}!hard.png", "a link, device or sparse file"),
        (f"{path}!device.png", "a link, device or sparse file"),
    )


def test_a_tar_that_ends_early_is_unlistable_wherever_it_is_cut(tmp_path):
    whole = Path(write_tar(tmp_path / "whole.tar")).read_bytes()
    end = whole.rstrip(b"\0")
    last_data = (len(end) + 511) // 512 * 512
    for cut in range(256, last_data + 1, 256):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        listing = list_archives([str(path)])
        assert [uri for uri, _ in listing.unlistable] == [str(path)], f"cut at {cut} of {len(whole)}"


def test_compressed_tars_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "log.tar.gz").write_bytes(b"\x1f\x8b")
    assert list_archives([str(tmp_path)]).unlistable == (
        (
            str(tmp_path / "log.tar.gz"),
            "a compressed tar cannot be read by range; unpack it, or pack it again as a plain .tar",
        ),
    )


def test_a_zip_bomb_is_not_inflated(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(100_000))
    (gone,) = read_frames(list_archives([str(tmp_path / "bomb.zip")]).table)
    assert gone == FrameGone("too_large", "the zip's member inflates to more than 1,000 bytes")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_an_unreadable_folder_is_unlistable(tmp_path):
    root = write_folder(tmp_path / "log")
    os.chmod(tmp_path / "log" / "drive2", 0)
    try:
        assert list_archives([root]).unlistable == ((f"{root}/drive2", "Permission denied"),)
    finally:
        os.chmod(tmp_path / "log" / "drive2", 0o755)


def test_archives_are_read_at_any_uri():
    for path, data in FILES.items():
        storage.write_whole(f"memory://bucket/log/{path}", data)
    rows = list_archives(["memory://bucket/log"]).table
    assert rows["frame_id"].to_pylist() == IN_ORDER
    assert read_frames(rows) == [FILES[path] for path in IN_ORDER]

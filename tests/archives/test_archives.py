"""Archives that seem whole and are not, and names that cannot be told apart."""

from __future__ import annotations

import io
import tarfile

import pytest

from unet_ray.archives.listing import list_archives
from unet_ray.archives.reading import read_frames


def tar_of(*names: str, content: bytes = b"x" * 700) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def listed(path, data: bytes):
    path.write_bytes(data)
    listing = list_archives([str(path)])
    return listing.table["frame_id"].to_pylist(), [why for _, why in listing.unlistable]


def test_a_tar_with_a_lost_header_is_not_taken_for_a_shorter_one(tmp_path):
    whole = tar_of("0.png", "1.png", "2.png")
    names, problems = listed(tmp_path / "whole.tar", whole)
    assert len(names) == 3 and problems == []
    second = 512 + 1024  # header and padded content of the first
    names, problems = listed(tmp_path / "lost.tar", whole[:second] + bytes(512) + whole[second + 512 :])
    assert names == ["lost.tar!0.png"]
    (problem,) = problems
    assert problem == f"goes on behind its end at byte {second:,}: a header is lost, or several tars were put together"


@pytest.mark.parametrize("padding", [0, 512, 100 * 512, 9 * 2**20])
def test_several_tars_in_one_file_are_all_read(padding, tmp_path):
    names, problems = listed(tmp_path / "two.tar", tar_of("0.png") + bytes(padding) + tar_of("1.png", "2.png"))
    assert names == [f"two.tar!{index}.png" for index in range(3)] and problems == []
    contents = [tar_of("0.png", content=b"a"), tar_of("1.png", content=b"b" * 600), tar_of("2.png", content=b"c")]
    (tmp_path / "three.tar").write_bytes(bytes(padding).join(contents))
    assert list(read_frames(list_archives([str(tmp_path / "three.tar")]).table)) == [b"a", b"b" * 600, b"c"]


@pytest.mark.parametrize("behind", [b"x", b"\0" * 511 + b"x" + b"\0" * 511, b"x" * 512])
def test_what_is_no_header_behind_padding_is_no_padding(behind, tmp_path):
    names, problems = listed(tmp_path / "odd.tar", tar_of("0.png") + bytes(3 * 2**20) + behind)
    assert names == ["odd.tar!0.png"] and len(problems) == 1 and "a header is lost" in problems[0]


def test_links_of_a_tar(tmp_path):
    """As a folder that was unpacked from it has them: those with the name of a frame are frames."""
    links = [
        ("d/2.png", tarfile.LNKTYPE, "d/1.png"),
        ("d/3.png", tarfile.LNKTYPE, "./d//1.png"),
        ("e/4.png", tarfile.SYMTYPE, "../d/1.png"),
        ("e/5.png", tarfile.SYMTYPE, "4.png"),
        ("e/6.png", tarfile.LNKTYPE, "blobs/abc"),
        ("latest", tarfile.SYMTYPE, "d"),
        ("notes", tarfile.LNKTYPE, "d/1.png"),
        ("out.png", tarfile.SYMTYPE, "/etc/passwd"),
        ("up.png", tarfile.SYMTYPE, "../../d/1.png"),
        ("gone.png", tarfile.LNKTYPE, "d/none.png"),
        ("loop.png", tarfile.SYMTYPE, "loop.png"),
    ]
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        for name, content in (("blobs/abc", b"blob"), ("d/1.png", b"one")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    listing = list_archives([str(tmp_path / "links.tar")])
    contents = dict(zip(listing.table["frame_id"].to_pylist(), read_frames(listing.table), strict=True))
    assert contents == {
        f"links.tar!{name}": b"one" for name in ("d/1.png", "d/2.png", "d/3.png", "e/4.png", "e/5.png")
    } | {"links.tar!e/6.png": b"blob"}
    assert listing.ignored == {"link": 2, "no extension": 1}
    assert [(uri.rpartition("!")[2], why) for uri, why in listing.unlistable] == [
        (name, "a link, device or sparse file") for name in ("out.png", "up.png", "gone.png", "loop.png")
    ]


def test_members_that_are_no_frames_are_counted_whatever_they_are_called(tmp_path):
    names, problems = listed(
        tmp_path / "odd.tar", tar_of("../x.txt", "/y.json", "caf\udce9.txt", "0.png", "a." + "b" * 99)
    )
    assert names == ["odd.tar!0.png"] and problems == []
    ignored = list_archives([str(tmp_path / "odd.tar")]).ignored
    assert ignored == {".json": 1, ".txt": 2, "other extensions": 1}


def test_padding_of_any_length_is_no_trouble(tmp_path):
    names, problems = listed(tmp_path / "padded.tar", tar_of("0.png") + bytes(3 * 2**20))
    assert names == ["padded.tar!0.png"] and problems == []


def test_roots_whose_ids_would_be_the_same_are_refused(tmp_path):
    folder = tmp_path.relative_to("/")
    with pytest.raises(ValueError, match="has the path of another of --frames; their frames' ids would be the same"):
        list_archives([f"/{folder}/log", f"memory://{folder}/log"])


def test_what_else_a_glob_matches_is_ignored_and_counted(tmp_path):
    (tmp_path / "drive0").mkdir()
    (tmp_path / "drive0" / "0.png").write_bytes(b"x")
    (tmp_path / "notes.json").write_bytes(b"{}")
    listing = list_archives([f"{tmp_path}/*"])
    assert listing.table["frame_id"].to_pylist() == ["drive0/0.png"]
    assert listing.ignored == {".json": 1}
    with pytest.raises(ValueError, match=r"notes.json is not an archive; give a folder"):
        list_archives([f"{tmp_path}/notes.json"])

"""Archives that seem whole and are not, and names that cannot be told apart."""

from __future__ import annotations

import io
import tarfile

import pytest

from unet_ray.archives.listing import list_archives


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


def test_several_tars_in_one_file_are_not_taken_for_the_first(tmp_path):
    names, problems = listed(tmp_path / "two.tar", tar_of("0.png") + tar_of("1.png"))
    assert names == ["two.tar!0.png"] and len(problems) == 1 and "several tars were put together" in problems[0]


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

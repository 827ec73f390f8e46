"""What the doctor tries at a URI; S3 is in `test_s3`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from unet_ray.storage import filesystems
from unet_ray.storage.access import Access, try_access, without_credentials

ALL = ("list", "read", "write", "delete", "put if absent")
READ_ONLY = "/sys/kernel"  # root may not write there either


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive" / "1.png").write_bytes(b"frame")
    before = tree(tmp_path)
    assert try_access(str(tmp_path), writing=True) == Access(uri=str(tmp_path), works=ALL)
    assert try_access(str(tmp_path), writing=False).works == ("list", "read")
    assert try_access(str(tmp_path / "drive" / "1.png"), writing=False).works == ("list", "read")
    assert try_access(str(tmp_path / "*" / "1.png"), writing=False).works == ("list", "read")
    assert tree(tmp_path) == before


def test_folders_that_are_made_for_it_go_too(tmp_path):
    out = str(tmp_path / "runs" / "first")
    assert try_access(out, writing=True) == Access(uri=out, works=("list", "write", "delete", "put if absent"))
    assert tree(tmp_path) == set()


def test_a_folder_that_is_not_there_is_no_input(tmp_path):
    access = try_access(str(tmp_path / "drives"), writing=False)
    assert (access.works, access.fails) == ((), "list") and "drives" in access.problem
    assert access.remedy == "check the path, and that this node has it (a bucket, or a disk that all nodes share)"


def test_a_folder_that_is_read_only_is_no_output():
    assert try_access(READ_ONLY, writing=False).fails is None
    access = try_access(READ_ONLY, writing=True)
    assert (access.works, access.fails) == (("list", "read"), "write")
    assert access.remedy in (
        "give this node's user or role the right to write there",
        "the disk is mounted for reading only; give another --outputs",
    )


class _Careless(MemoryFileSystem):
    """A store that passes over the condition of a put, as an old S3 of another maker may."""

    protocol = "careless"
    store: ClassVar[dict[str, object]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: object) -> None:
        super().pipe_file(path, value, mode="overwrite", **options)


class _Keeping(MemoryFileSystem):
    """A store that lets nobody delete."""

    protocol = "keeping"
    store: ClassVar[dict[str, object]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def rm_file(self, path: str) -> None:
        raise PermissionError("not allowed")


@pytest.fixture
def stores():
    for store in (_Careless, _Keeping):
        fsspec.register_implementation(store.protocol, f"{__name__}.{store.__name__}", clobber=True)


def test_a_store_in_which_both_of_two_writers_win_is_named(stores):
    access = try_access("careless://labels", writing=True)
    assert (access.works, access.fails) == (("list", "write", "delete"), "put if absent")
    assert "2 of two writers at once were told that theirs is the file" in access.problem
    assert access.remedy == "the store does not keep its word: run one job at a time on an output there"
    assert _Careless.store == {}


def test_a_store_without_the_right_to_delete_is_named(stores):
    access = try_access("keeping://labels", writing=True)
    assert (access.works, access.fails) == (("list", "write"), "delete")
    assert access.remedy == "give this node's user or role the right to delete there"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("403 for wJalrXUtnFEMI/K7MDENG", "403 for $AWS_SECRET_ACCESS_KEY"),
        ("GET https://a/b?X-Amz-Signature=0123&x=1", "GET https://a/b?X-Amz-Signature=…&x=1"),
        ("AccountName=a;AccountKey=abc==;Endpoint=b", "AccountName=a;AccountKey=…;Endpoint=b"),
        ("no such bucket: drives", "no such bucket: drives"),
    ],
)
def test_no_credential_is_in_what_is_said(text, expected, monkeypatch):
    for name in [name for name in os.environ if filesystems.names_secret(name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    assert without_credentials(text) == expected

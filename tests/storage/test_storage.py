from __future__ import annotations

import errno
import os
import shutil
import threading
import time

import fsspec
import pytest

from unet_ray import storage
from unet_ray.storage import listings


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "root")
    else:
        fsspec.filesystem("memory").store.clear()
        yield "memory://bucket/root"


def test_written_files_are_listed_in_order_with_sizes_and_read_back(root):
    for path, data in (("b/2.png", b"22"), ("a.json", b"1"), ("b/.hidden", b"333"), ("b/c/d.png", b"")):
        storage.write_whole(storage.join(root, path), data)
    listed = list(storage.list_files(root))
    assert [(file.path, file.size_bytes) for file in listed] == [
        ("a.json", 1),
        ("b/.hidden", 3),
        ("b/2.png", 2),
        ("b/c/d.png", 0),
    ]
    assert [storage.read_bytes(file.uri) for file in listed] == [b"1", b"333", b"22", b""]


def test_a_range_is_read_and_ends_where_the_file_ends(root):
    uri = storage.join(root, "x")
    storage.write_whole(uri, b"0123456789")
    assert storage.read_bytes(uri, 3, 4) == b"3456"
    assert storage.read_bytes(uri, 8, 4) == b"89"
    assert storage.read_bytes(uri, 4) == b"456789"
    with storage.open_read(uri) as file:
        file.seek(7)
        assert file.read(2) == b"78"


def test_many_ranges_come_in_order_with_the_error_of_each(root):
    uri = storage.join(root, "x")
    storage.write_whole(uri, bytes(range(200)))
    gone = storage.join(root, "gone")
    ranges = [(uri, i, 1) for i in range(150)] + [(gone, 0, 1)]
    answers = storage.read_many(ranges)
    assert answers[:150] == [bytes([i]) for i in range(150)]
    assert isinstance(answers[150], FileNotFoundError)


def test_when_a_file_was_written_is_known(root):
    uri, before_s = storage.join(root, "x"), time.time()
    assert storage.modified_s(uri) is None
    storage.write_whole(uri, b"one")
    assert before_s - 1 <= storage.modified_s(uri) <= time.time() + 1


def test_the_version_changes_with_the_content(root):
    uri = storage.join(root, "x")
    storage.write_whole(uri, b"one")
    first = storage.info(uri)
    storage.write_whole(uri, b"three")
    assert storage.info(uri).version != first.version
    assert storage.info(uri).size_bytes == 5
    with pytest.raises(FileNotFoundError):
        storage.info(storage.join(root, "gone"))


def test_put_if_absent_keeps_the_first_and_accepts_the_same_again(root):
    uri = storage.join(root, "records", "k.json")
    assert storage.put_if_absent(uri, b"first")
    assert storage.put_if_absent(uri, b"first")  # a writer whose own first answer was lost
    assert not storage.put_if_absent(uri, b"second")
    assert storage.read_bytes(uri) == b"first"


def test_of_many_writers_at_once_exactly_one_wins(tmp_path):
    won, start = [], threading.Barrier(8)

    def write(writer: int) -> None:
        start.wait()
        for key in range(20):
            if storage.put_if_absent(str(tmp_path / f"{key}"), b"writer %d" % writer):
                won.append(key)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(20))
    assert not [file for file in os.listdir(tmp_path) if file.startswith(storage.TEMPORARY_PREFIX)]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    uri = str(tmp_path / "x")
    storage.write_whole(uri, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(storage.StorageError, match="No space left on device; trying again may help"):
        storage.write_whole(uri, b"new")
    assert storage.read_bytes(uri) == b"old"
    assert os.listdir(tmp_path) == ["x"]


WRITES = {"write_whole": "replace", "put_if_absent": "link"}


@pytest.mark.parametrize("write", WRITES)
def test_a_file_that_is_not_yet_whole_has_no_ending(write, tmp_path, monkeypatch):
    """DuckDB's `*.parquet` finds files that begin with a dot, too."""
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.extend(os.listdir(tmp_path)))
    getattr(storage, write)(str(tmp_path / "part.parquet"), b"whole")
    (name,) = seen
    assert name.startswith(storage.TEMPORARY_PREFIX) and "." not in name[1:]
    assert os.listdir(tmp_path) == ["part.parquet"]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("what", ["temporary", "folder"])
def test_what_another_job_clears_away_meanwhile_is_written_again(what, write, tmp_path, monkeypatch):
    folder = tmp_path / "_work"
    original = getattr(os, WRITES[write])
    cleared = []

    def clear_up_before(*arguments):
        if len(cleared) < 2:
            cleared.append(os.listdir(folder))
            storage.delete_unfinished(str(folder)) if what == "temporary" else shutil.rmtree(folder)
        return original(*arguments)

    monkeypatch.setattr(os, WRITES[write], clear_up_before)
    getattr(storage, write)(str(folder / "x"), b"whole")
    assert [len(names) for names in cleared] == [1, 1]
    assert (folder / "x").read_bytes() == b"whole" and os.listdir(folder) == ["x"]


def test_only_what_writers_left_is_unfinished(tmp_path):
    others = (".hidden", "x.parquet", f"{storage.TEMPORARY_PREFIX}{'0' * 32}", f"{storage.TEMPORARY_PREFIX}mine")
    left = (f"{storage.TEMPORARY_PREFIX}0123456789ab", f"{storage.TEMPORARY_PREFIX}0123456789ab-part-00000.parquet")
    for name in (*others, *left, "below/.tmp-0123456789ab"):
        storage.write_whole(str(tmp_path / name), b"1")
    storage.delete_unfinished(str(tmp_path))
    assert {file.path for file in storage.list_files(str(tmp_path))} == {*others, "below/.tmp-0123456789ab"}
    storage.delete_unfinished(str(tmp_path / "gone"))


def test_a_tree_is_deleted_but_for_what_is_written_there_meanwhile(tmp_path, monkeypatch):
    root, kept = tmp_path / "_work", tmp_path / "kept"
    for path in (root / "a/1", root / "b/2", root / "b/c/3", kept / "4"):
        storage.write_whole(str(path), b"1")
    (root / "b/link").symlink_to(kept)
    original = os.rmdir

    def late(path, **options):
        if str(path).endswith("b") and not (root / "b/late").exists():
            (root / "b/late").write_bytes(b"another job's")
        return original(path, **options)

    monkeypatch.setattr(os, "rmdir", late)
    storage.delete_tree(str(root))
    assert [file.path for file in storage.list_files(str(tmp_path))] == ["_work/b/late", "kept/4"]
    monkeypatch.undo()
    storage.delete_tree(str(root))
    assert os.listdir(tmp_path) == ["kept"]


def test_many_files_and_a_file_in_pieces_are_written_whole(root):
    storage.write_many([])
    storage.write_many([(storage.join(root, "a", f"{i}"), b"%d" % i) for i in range(70)])
    assert storage.read_bytes(storage.join(root, "a", "69")) == b"69"
    uri = storage.join(root, "b", "pieces")
    for size in (3, 2):  # the second time it is there already
        with storage.write_pieces(uri) as file:
            file.writelines([b"12"] * size)
        assert storage.read_bytes(uri) == b"12" * size
    assert len(list(storage.list_files(root))) == 71


def test_pieces_that_end_early_leave_the_old_content_and_nothing_else(root):
    uri = storage.join(root, "x")
    storage.write_whole(uri, b"old")
    with pytest.raises(KeyboardInterrupt), storage.write_pieces(uri) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert storage.read_bytes(uri) == b"old"
    assert [file.path for file in storage.list_files(root)] == ["x"]


def test_delete_is_repeatable(root):
    uri = storage.join(root, "a", "x")
    storage.write_whole(uri, b"1")
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)
    storage.write_whole(uri, b"1")
    storage.delete_tree(storage.join(root, "a"))
    storage.delete_tree(storage.join(root, "a"))
    assert not storage.exists(uri)


def test_listing_what_is_not_a_folder_says_so(root):
    with pytest.raises(FileNotFoundError):
        list(storage.list_files(storage.join(root, "gone")))
    storage.write_whole(storage.join(root, "x"), b"1")
    with pytest.raises(NotADirectoryError):
        list(storage.list_files(storage.join(root, "x")))


def test_linked_folders_are_followed_and_a_loop_ends(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1.png").write_bytes(b"1")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "data")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    assert [file.path for file in storage.list_files(str(tmp_path / "root"))] == ["link/1.png"]


def test_a_dangling_link_is_reported_not_passed_over(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    unreadable = []
    assert list(storage.list_files(str(tmp_path), on_unreadable=lambda uri, error: unreadable.append(uri))) == []
    assert unreadable == [str(tmp_path / "gone.png")]


def test_uris_resolve_to_what_every_process_understands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("data/log") == str(tmp_path / "data" / "log")
    assert storage.resolve("file:///data/log/") == "/data/log"
    assert storage.resolve("memory://bucket/log/") == "memory://bucket/log"


@pytest.mark.parametrize(
    "uri",
    ["s3://AKIA:hunter2@bucket/log", "https://host/log?X-Amz-Signature=hunter2", "https://host/x?a=1&token=hunter2"],
)
def test_a_uri_with_credentials_is_refused_without_repeating_them(uri):
    with pytest.raises(ValueError, match="the URI holds credentials; give them by environment variables") as caught:
        storage.resolve(uri)
    assert "hunter2" not in str(caught.value)


def test_an_azure_container_is_no_password():
    assert storage.resolve("abfs://container@account.dfs.core.windows.net/log") == (
        "abfs://container@account.dfs.core.windows.net/log"
    )


def test_unusable_uris_are_refused_in_one_line():
    with pytest.raises(
        ValueError, match="^an empty path was given; give a local path or a URI such as s3://bucket/folder$"
    ):
        storage.resolve(" ")
    with pytest.raises(ValueError, match="^nope://x: unknown protocol 'nope'; use a local path"):
        storage.resolve("nope://x")


class Elsewhere:
    """What fsspec's filesystems for SFTP, FTP and HDFS do with names: their host is not in them."""

    def _strip_protocol(self, uri):
        return "/" + uri.partition("://")[2].partition("/")[2] if "://" in uri else uri

    def unstrip_protocol(self, name):
        return f"sftp://{name}"

    def find(self, path, detail):
        return {f"{path}/a/{n}.png": {"name": f"{path}/a/{n}.png", "type": "file", "size": 3} for n in (1, 0)}

    def glob(self, path):
        return [path.replace("*", "0")]

    def info(self, path):
        return {"name": path, "type": "file", "size": 3, "mtime": 5}


def test_a_host_stays_in_the_uri(monkeypatch):
    fs = Elsewhere()
    monkeypatch.setattr(listings, "filesystem", lambda uri: (fs, fs._strip_protocol(uri)))
    files = list(storage.list_files("sftp://host/log"))
    assert [(file.path, file.uri) for file in files] == [
        ("a/0.png", "sftp://host/log/a/0.png"),
        ("a/1.png", "sftp://host/log/a/1.png"),
    ]
    assert storage.info("sftp://host/log/a/1.png").uri == "sftp://host/log/a/1.png"
    assert storage.glob("sftp://host/log/d*") == ["sftp://host/log/d0"]

"""Files of a web server of the tests' own: what it cannot be asked about is trouble, never a frame that is gone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from unet_ray import cli, storage
from unet_ray.archives.listing import list_archives
from unet_ray.archives.reading import FrameGone, read_frames
from unet_ray.storage import filesystems


class Server(ThreadingHTTPServer):
    """Serves a folder without ranges, or answers with a status where a path has a word in it."""

    def __init__(self, folder: Path):
        class Handler(SimpleHTTPRequestHandler):
            server: Server

            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def do_GET(self) -> None:
                status = next((code for word, code in self.server.statuses.items() if word in self.path), None)
                super().do_GET() if status is None else self.send_error(status)

            def do_HEAD(self) -> None:
                self.send_error(405)

            def end_headers(self) -> None:
                self.send_header("ETag", '"1"')
                super().end_headers()

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses: dict[str, int] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv(filesystems.RETRY_VARIABLE, "0.05")
    for path in ("log/a/1.jpg", "log/a/2.jpg", "log/b/c/3.jpg", "log/b::d/4 %#?.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    with Server(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def catalogue(tmp_path: Path, *uris: str) -> str:
    (tmp_path / "c.csv").write_text("\n".join(["uri", *uris, ""]))
    return str(tmp_path / "c.csv")


@pytest.mark.parametrize("status", [500, 429])
def test_a_server_in_trouble_is_no_missing_frame(status: int, web: Server, tmp_path: Path) -> None:
    frames = catalogue(tmp_path, f"{web.url}/log/a/1.jpg", f"{web.url}/log/a/2.jpg")
    web.statuses["2.jpg"] = status
    with pytest.raises(storage.StorageError, match=f"{status}, .*; trying again may help: '{web.url}/log/a/2.jpg'"):
        list_archives([frames], allow_uris=[web.url])
    web.statuses.clear()
    rows = list_archives([frames], allow_uris=[web.url]).table
    assert list(read_frames(rows)) == [b"log/a/1.jpg", b"log/a/2.jpg"]
    web.statuses["2.jpg"] = status
    with pytest.raises(storage.StorageError, match="trying again may help"):
        list(read_frames(rows))


def test_a_server_that_is_down_is_no_missing_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(filesystems.RETRY_VARIABLE, "0.05")
    with Server(tmp_path) as gone:
        url = gone.url
    for root in (catalogue(tmp_path, f"{url}/1.jpg"), f"{url}/1.jpg", f"{url}/log/", f"{url}/log.tar", f"{url}/*.jpg"):
        with pytest.raises(storage.StorageError, match="trying again may help"):
            list_archives([root], allow_uris=[url])
    command = ["verify", f"{url}/labels", "--storage-retry-s", "0.05"]
    assert cli.main(command) == 75


def test_a_host_without_address_is_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(filesystems.RETRY_VARIABLE, "0.05")
    with pytest.raises(storage.StorageError, match="trying again may help"):
        list_archives([catalogue(tmp_path, "http://nowhere.invalid/1.jpg")], allow_uris=["http://nowhere.invalid"])


@pytest.mark.parametrize(("status", "reason"), [(404, "missing"), (410, "missing"), (403, None), (401, None)])
def test_only_what_the_server_says_is_gone_is_missing(
    status: int, reason: str | None, web: Server, tmp_path: Path
) -> None:
    web.statuses["2.jpg"] = status
    frames = catalogue(tmp_path, f"{web.url}/log/a/1.jpg", f"{web.url}/log/a/2.jpg")
    listing = list_archives([frames], allow_uris=[web.url])
    if reason:
        first, second = read_frames(listing.table)
        assert first == b"log/a/1.jpg" and listing.unlistable == ()
        assert second == FrameGone("missing", f"{web.url}/log/a/2.jpg is not there")
    else:
        ((uri, why),) = listing.unlistable
        assert uri == f"{web.url}/log/a/2.jpg" and why.startswith(f"{status}, ")
        assert listing.table["uri"].to_pylist() == [f"{web.url}/log/a/1.jpg"]


def test_folders_are_listed_by_their_pages_and_read_without_ranges(web: Server, tmp_path: Path) -> None:
    listing = list_archives([f"{web.url}/log"])
    contents = dict(zip(listing.table["frame_id"].to_pylist(), read_frames(listing.table), strict=True))
    assert {name: content for name, content in contents.items() if "4" not in name} == {
        name: f"log/{name}".encode() for name in ("a/1.jpg", "a/2.jpg", "b/c/3.jpg")
    }
    assert b"log/b::d/4 %#?.jpg" in contents.values() and len(contents) == 4
    (tmp_path / "log/range").write_bytes(bytes(range(100)))
    for offset, size in ((0, 10), (50, 10), (90, 20), (95, 100), (200, 5), (3, None)):
        expected = bytes(range(100))[offset : None if size is None else offset + size]
        assert storage.read_bytes(f"{web.url}/log/range", offset, size) == expected
    assert storage.glob(f"{web.url}/log/*/*.jpg")[:2] == [f"{web.url}/log/a/1.jpg", f"{web.url}/log/a/2.jpg"]
    assert storage.glob(f"{web.url}/log/**/3.jpg") == [f"{web.url}/log/b/c/3.jpg"]
    assert storage.exists(f"{web.url}/log/range") and not storage.exists(f"{web.url}/log/no")


@pytest.mark.parametrize("word", ["/log/b/c/", "/log/b/c/3.jpg"])
def test_a_folder_or_file_that_cannot_be_listed_is_not_passed_over(word: str, web: Server) -> None:
    web.statuses[word] = 500
    for root in (f"{web.url}/log", f"{web.url}/log/**/*.jpg"):
        with pytest.raises(storage.StorageError, match="trying again may help"):
            list_archives([root])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_local_frames_behind_a_folder_that_nobody_may_look_into_are_unlistable(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "1.jpg").write_bytes(b"1")
    frames = catalogue(tmp_path, "closed/2.jpg", "1.jpg")
    (tmp_path / "closed").chmod(0)
    try:
        assert list_archives([frames]).unlistable == ((f"{tmp_path}/closed/2.jpg", "Permission denied"),)
        with pytest.raises(PermissionError):
            list_archives([f"{tmp_path}/*/*.jpg"])
    finally:
        (tmp_path / "closed").chmod(0o755)


def test_a_loop_of_links_is_unlistable(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"1")
    (tmp_path / "2.jpg").symlink_to("2.jpg")
    listing = list_archives([catalogue(tmp_path, "1.jpg", "2.jpg")])
    ((uri, why),) = listing.unlistable
    assert uri == f"{tmp_path}/2.jpg" and why.startswith("Too many levels of symbolic links")
    assert list(read_frames(listing.table)) == [b"1"]

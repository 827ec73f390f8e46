"""Object storage as it is: s3fs against a server of its own on loopback."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import threading
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import KEY_ID, SECRET, ask, make_bucket, reach, run_server

from unet_ray import storage
from unet_ray.archives.listing import list_archives
from unet_ray.archives.reading import FrameGone, read_frames
from unet_ray.storage.access import try_access


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    with run_server(str(tmp_path_factory.mktemp("moto") / "recording")) as url:
        yield url


@pytest.fixture
def bucket(server, monkeypatch) -> Iterator[str]:
    with reach(server, monkeypatch):
        yield make_bucket(server)


class Recorded:
    """Counts the requests by method, and the parts of files asked for, while the block runs."""

    def __init__(self, server: str):
        self._server, self.by_method, self.ranges = server, Counter[str](), list[str]()

    def __enter__(self) -> Recorded:
        ask(self._server, "recorder/reset-recording")
        ask(self._server, "recorder/start-recording")
        return self

    def __exit__(self, *_: object) -> None:
        ask(self._server, "recorder/stop-recording")
        with urllib.request.urlopen(f"{self._server}/moto-api/recorder/download-recording") as answer:
            requests = [json.loads(line) for line in answer.read().splitlines()]
        self.by_method.update(request["method"] for request in requests)
        headers = ({name.lower(): value for name, value in request["headers"].items()} for request in requests)
        self.ranges += [fields["range"] for fields in headers if "range" in fields]


def write_log(bucket: str, n_frames: int = 6) -> dict[str, bytes]:
    frames = {f"cam0/{index:04d}.png": bytes([index]) * (100 + index) for index in range(n_frames)}
    for path, content in frames.items():
        storage.write_whole(f"{bucket}/log/{path}", content)
    return frames


def test_files_are_written_listed_read_and_deleted(bucket):
    storage.write_whole(f"{bucket}/a/b.bin", b"0123456789")
    assert storage.read_bytes(f"{bucket}/a/b.bin", 2, 3) == b"234"
    (file,) = storage.list_files(f"{bucket}/a")
    assert (file.path, file.uri, file.size_bytes) == ("b.bin", f"{bucket}/a/b.bin", 10)
    assert storage.versions([file.uri, f"{bucket}/gone"]) == {file.uri: file.version, f"{bucket}/gone": None}
    storage.delete(file.uri)
    assert not storage.exists(file.uri)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(file.uri)


@pytest.mark.parametrize("strange", ["log//0.png", "log/drive//0.png", "log/drive", "log/drive/", "log/log", "log/x/"])
def test_keys_that_no_path_would_be_are_listed_once_and_read(bucket, strange):
    s3 = fsspec.filesystem("s3")
    for key in ("log/drive/1.png", "log/2.png", strange):
        s3.call_s3("put_object", Bucket=bucket.removeprefix("s3://"), Key=key, Body=key.encode())
    parts = storage.list_parts(f"{bucket}/log")
    files = {file.path: file for part in parts for file in part(None)}
    whole = {file.path: file for file in storage.list_files(f"{bucket}/log")}
    assert {path: file for path, file in files.items() if not path.endswith("/")} == {
        path: file for path, file in whole.items() if not path.endswith("/")
    }
    wanted = {"drive/1.png", "2.png", *([] if strange.endswith("/") else [strange.removeprefix("log/")])}
    assert wanted <= files.keys()
    for path in wanted:
        assert storage.read_bytes(files[path].uri) == f"log/{path}".encode()


def test_only_the_first_is_put(bucket):
    uri = f"{bucket}/records/1.json"
    assert storage.put_if_absent(uri, b"first")
    assert not storage.put_if_absent(uri, b"second")
    assert storage.read_bytes(uri) == b"first"


def test_of_many_writers_at_once_exactly_one_wins_and_its_content_stands(bucket):
    keys = [f"{bucket}/records/{number}.json" for number in range(10)]
    start = threading.Barrier(4)

    def write(writer: int) -> list[str]:
        start.wait()
        return [uri for uri in keys if storage.put_if_absent(uri, b"writer %d" % writer)]

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(write, range(4)))
    assert sorted(uri for uris in won for uri in uris) == keys
    for writer, uris in enumerate(won):
        assert all(storage.read_bytes(uri) == b"writer %d" % writer for uri in uris)


def test_a_version_is_read_in_one_request_or_not_at_all(bucket, server):
    frames = write_log(bucket)
    rows = list_archives([f"{bucket}/log"]).table
    with Recorded(server) as requests:
        assert list(read_frames(rows)) == list(frames.values())
    assert requests.by_method == {"GET": len(frames)}  # no look after it: the version is in the request
    storage.write_whole(f"{bucket}/log/cam0/0001.png", b"other content")
    storage.delete(f"{bucket}/log/cam0/0002.png")
    contents = list(read_frames(rows))
    assert [item.reason if isinstance(item, FrameGone) else item for item in contents] == [
        frames["cam0/0000.png"],
        "changed",
        "missing",
        *list(frames.values())[3:],
    ]


def test_frames_in_a_tar_are_read_by_range(bucket, server):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for index in range(4):
            member = tarfile.TarInfo(f"{index}.png")
            member.size = 1000
            tar.addfile(member, io.BytesIO(bytes([index]) * 1000))
    storage.write_whole(f"{bucket}/log.tar", file.getvalue())
    rows = list_archives([f"{bucket}/log.tar"]).table
    with Recorded(server) as requests:
        assert list(read_frames(rows.slice(1, 2))) == [b"\1" * 1000, b"\2" * 1000]
    assert requests.by_method == {"GET": 2}
    offsets = rows["offset_bytes"].to_pylist()[1:3]
    assert sorted(requests.ranges) == sorted(f"bytes={offset}-{offset + 999}" for offset in offsets)
    storage.write_whole(f"{bucket}/log.tar", file.getvalue() + b"\0")
    assert all(isinstance(item, FrameGone) and item.reason == "changed" for item in read_frames(rows))


def packed_log(bucket: str, frames: dict[str, bytes]) -> None:
    """Writes the frames of `write_log` once more: as a zip, a Parquet file and catalogues."""
    zipped, image = io.BytesIO(), [{"bytes": content, "path": path} for path, content in frames.items()]
    with zipfile.ZipFile(zipped, "w") as archive:
        for path, content in frames.items():
            archive.writestr(path, content)
    rows = pa.table({"uri": [f"log/{path}" for path in frames], "weather": ["rain"] * len(frames)})
    tables = {"log.parquet": pa.table({"image": image}), "catalogue.parquet": rows}
    for name, table in tables.items():
        pq.write_table(table, file := io.BytesIO())
        storage.write_whole(f"{bucket}/{name}", file.getvalue())
    storage.write_whole(f"{bucket}/log.zip", zipped.getvalue())
    whole = "".join(f"{bucket}/log/{path}\n" for path in frames)
    storage.write_whole(f"{bucket}/catalogue.csv", f"uri\n{whole}".encode())


@pytest.mark.parametrize(
    "archive", ["log", "log/cam0/*.png", "log.zip", "log.parquet", "catalogue.parquet", "catalogue.csv"]
)
def test_frames_of_every_kind_of_archive_are_listed_and_read(archive, bucket):
    frames = write_log(bucket)
    packed_log(bucket, frames)
    listing = list_archives([f"{bucket}/{archive}"])
    assert listing.unlistable == () and [row.rpartition("/")[2] for row in listing.table["frame_id"].to_pylist()] == [
        path.rpartition("/")[2] for path in frames
    ]
    assert list(read_frames(listing.table)) == list(frames.values())


def test_a_file_of_several_requests_is_written_whole(bucket):
    data = bytes(range(256)) * 480_000  # 123 MB
    storage.write_whole(f"{bucket}/large.bin", data)
    tag = fsspec.filesystem("s3").info(f"{bucket}/large.bin")["ETag"]
    assert int(tag.strip('"').partition("-")[2]) > 1  # S3 puts the number of parts there
    assert storage.read_bytes(f"{bucket}/large.bin") == data


def test_anonymous_access_by_the_environment(bucket, monkeypatch):
    storage.write_whole(f"{bucket}/public.bin", b"for all")
    fsspec.filesystem("s3").chmod(f"{bucket}/public.bin", acl="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    read = f"from unet_ray import storage; print(storage.read_bytes('{bucket}/public.bin').decode())"
    monkeypatch.setenv("FSSPEC_S3_ANON", "true")
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True)
    assert done.stdout == "for all\n", done.stderr


def test_missing_credentials_are_said_in_one_line(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(PermissionError, match="Unable to locate credentials; set them in the environment or a profile"):
        storage.read_bytes(f"{bucket}/a")


def test_a_server_that_is_gone_is_trouble_that_may_pass(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("UNET_RAY_STORAGE_RETRY_S", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(storage.StorageError, match="trying again may help"):
        storage.read_bytes(f"{bucket}/a")


def test_the_doctor_leaves_a_bucket_as_it_was(bucket):
    assert try_access(f"{bucket}/labels", writing=True).works == ("list", "write", "delete", "put if absent")
    assert fsspec.filesystem("s3").find(bucket) == []
    write_log(bucket)
    before = fsspec.filesystem("s3").find(bucket)
    assert try_access(f"{bucket}/log", writing=True).works == ("list", "read", "write", "delete", "put if absent")
    assert try_access(f"{bucket}/log/*.png", writing=False).works == ("list", "read")
    assert fsspec.filesystem("s3").find(bucket) == before
    assert try_access("s3://no-such-bucket/labels", writing=True).fails in ("list", "write")


def test_a_store_that_the_doctor_does_not_reach_is_named(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("UNET_RAY_STORAGE_RETRY_S", "0")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    access = try_access(bucket, writing=False)
    assert (access.works, access.fails) == ((), "list") and "http://127.0.0.1:9" in access.problem
    assert access.remedy.startswith("check from this node: endpoint, region, network, and the credentials")
    assert SECRET not in access.problem and KEY_ID not in access.problem

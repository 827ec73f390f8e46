"""Azure Blob Storage through adlfs, against Azurite: an optional job.

pip install -e '.[test,azure]' && npm install -g azurite && pytest tests/jobs/test_azure.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import ray
from bad_weather import Proxy
from other_stores import run, train_label_and_go_on
from test_s3_jobs import SEGMENT, make_log

from unet_ray import storage
from unet_ray.chaos.trials import wait_until
from unet_ray.storage import filesystems

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("azurite-blob") is None, reason="an optional job: npm install -g azurite"),
    pytest.mark.filterwarnings("ignore:Failed to fetch container properties"),  # adlfs, where the store is away
]

ACCOUNT, KEY = "unetray", "bm90IGEgc2VjcmV0IG9mIGFueWJvZHk="
BUCKET = "abfs://drives"


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """Azurite behind a proxy; `abfs://` means it."""
    pytest.importorskip("adlfs")
    folder = tmp_path_factory.mktemp("azurite")
    log = folder / "log.txt"
    options = ["--blobHost", "127.0.0.1", "--blobPort", "0", "--location", str(folder), "--disableTelemetry"]
    with log.open("wb") as file, pytest.MonkeyPatch.context() as patch:
        server = subprocess.Popen(
            ["azurite-blob", *options, "--skipApiVersionCheck"],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"},
        )  # fmt: skip
        try:
            assert wait_until(lambda: b"successfully listens" in log.read_bytes(), server), log.read_text()
            address = re.search(r"listens on (http://127.0.0.1:\d+)", log.read_text())
            assert address
            with Proxy(address[1]) as proxy:
                patch.delenv("RAY_ADDRESS", raising=False)
                parts = {"AccountName": ACCOUNT, "AccountKey": KEY, "BlobEndpoint": f"{proxy.url}/{ACCOUNT}"}
                text = ";".join(f"{name}={value}" for name, value in parts.items())
                patch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"DefaultEndpointsProtocol=http;{text};")
                filesystems.filesystem(BUCKET)[0].mkdir("drives")
                storage.write_many([(f"{BUCKET}/data/{path}", data) for path, data in make_log().items()])
                yield proxy
                ray.shutdown()
        finally:
            server.terminate()
            server.wait(60)


def test_files_are_listed_read_and_put_as_on_every_store(proxy):
    storage.write_whole(f"{BUCKET}/a/x", b"hello")
    assert storage.read_bytes(f"{BUCKET}/a/x") == b"hello"
    assert storage.read_bytes(f"{BUCKET}/a/x", 1, 2) == b"el"
    assert storage.read_bytes(f"{BUCKET}/a/x", 10, 2) == b""
    assert storage.open_read(f"{BUCKET}/a/x").read() == b"hello"
    for content, is_there in ((b"one", True), (b"one", True), (b"two", False)):
        assert storage.put_if_absent(f"{BUCKET}/a/y", content) == is_there
    (x, y) = storage.list_files(f"{BUCKET}/a")
    assert (x.path, x.size_bytes, x.version) == ("x", 5, storage.info(f"{BUCKET}/a/x").version)
    storage.write_whole(f"{BUCKET}/a/x", b"other")
    assert storage.info(f"{BUCKET}/a/x").version != x.version
    with pytest.raises(NotADirectoryError):
        list(storage.list_files(f"{BUCKET}/a/x"))
    for missing in ("nothing", "a/nothing"):
        with pytest.raises(FileNotFoundError):
            list(storage.list_files(f"{BUCKET}/{missing}"))
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(f"{BUCKET}/{missing}")
    storage.delete_many([x.uri, y.uri])
    storage.delete_many([x.uri, y.uri])
    assert list(storage.list_files(f"{BUCKET}/a", must_exist=False)) == []


def test_a_key_that_is_not_let_in_is_said_in_one_line(proxy, monkeypatch):
    connection = os.environ["AZURE_STORAGE_CONNECTION_STRING"].replace(KEY, "YW5vdGhlciBrZXk=")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
    type(filesystems.filesystem(BUCKET)[0]).clear_instance_cache()
    with pytest.raises(storage.StorageRefused) as caught:
        storage.read_bytes(f"{BUCKET}/data/classes.yaml")
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)
    monkeypatch.undo()
    type(filesystems.filesystem(BUCKET)[0]).clear_instance_cache()


def test_both_jobs_read_and_write_there_and_go_on_after_the_store_was_away(proxy):
    line = train_label_and_go_on(BUCKET, proxy, dark_on="PUT .*/records/", dark_at=4)
    assert "goes on" in line

    code, output = run(BUCKET, "segment", *SEGMENT, "--frames", "S3/data/log.tar", "--out", "S3/tarred")
    assert code == 0, output
    written = {file.uri: storage.read_bytes(file.uri) for file in storage.list_files(BUCKET)}
    assert len(written) > 50 and not any(KEY.encode() in content for content in written.values())

"""Google Cloud Storage through gcsfs, against an emulator in this process: an optional job.

pip install -e '.[test,gcs]' gcp-storage-emulator && pytest tests/jobs/test_gcs.py

The emulator passes over `ifGenerationMatch=0`, with which gcsfs puts a file only if there is none; nor are there keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from bad_weather import Proxy
from other_stores import train_label_and_go_on
from test_s3_jobs import make_log

from unet_ray import storage
from unet_ray.storage import filesystems

emulator = pytest.importorskip("gcp_storage_emulator.server", reason="pip install gcp-storage-emulator")
pytestmark = pytest.mark.timeout(1800)

BUCKET = "gs://drives"


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    """The emulator behind a proxy; `gs://` means it."""
    server = emulator.create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    host, port = server._api._httpd.server_address
    with Proxy(f"http://{host}:{port}") as proxy, pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        patch.setenv("FSSPEC_GS_TOKEN", "anon")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # else gcsfs asks by gRPC what kind of bucket it is
        filesystems.filesystem(BUCKET)[0].mkdir("drives")
        storage.write_many([(f"{BUCKET}/data/{path}", data) for path, data in make_log().items()])
        yield proxy
        ray.shutdown()
    server.stop()


def test_files_are_listed_and_read_as_on_every_store(proxy):
    storage.write_whole(f"{BUCKET}/a/x", b"hello")
    assert storage.read_bytes(f"{BUCKET}/a/x") == b"hello"
    assert storage.read_bytes(f"{BUCKET}/a/x", 1, 2) == b"el"
    assert storage.open_read(f"{BUCKET}/a/x").read() == b"hello"
    assert storage.put_if_absent(f"{BUCKET}/a/y", b"one")
    (x, y) = storage.list_files(f"{BUCKET}/a")
    assert (x.path, x.size_bytes, x.version) == ("x", 5, storage.info(f"{BUCKET}/a/x").version)
    storage.write_whole(f"{BUCKET}/a/x", b"other")
    assert storage.info(f"{BUCKET}/a/x").version != x.version
    for missing in ("nothing", "a/nothing"):
        with pytest.raises(FileNotFoundError):
            list(storage.list_files(f"{BUCKET}/{missing}"))
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(f"{BUCKET}/{missing}")
    storage.delete_many([x.uri, y.uri])
    storage.delete_many([x.uri, y.uri])
    assert list(storage.list_files(f"{BUCKET}/a", must_exist=False)) == []


def test_both_jobs_read_and_write_there_and_go_on_after_the_store_was_away(proxy):
    # What is written is named in the request's body: of 12 chunks some are done by then, each a part and a record.
    line = train_label_and_go_on(BUCKET, proxy, dark_on="POST /upload", dark_at=20)
    assert "no answer" in line

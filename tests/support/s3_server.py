"""An S3 of the tests' own on loopback (moto's server), and an environment in which it is the one that is meant."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest

from unet_ray.storage import filesystems

KEY_ID, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
"""The credentials of Amazon's own manual."""


@contextmanager
def run_server(recording: str) -> Iterator[str]:
    """Yields the URL of a server whose requests can be recorded in a file."""
    moto = pytest.importorskip("moto.server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOTO_RECORDER_FILEPATH", recording)
        server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


@contextmanager
def reach(endpoint: str | None, patch: pytest.MonkeyPatch, *, retry_s: float = 60) -> Iterator[None]:
    """While the block runs, `s3://` means this server (None: no server is named), by the usual variables."""
    filesystems.configure({}, retry_s)  # commands in this process may have been told `--storage-options`
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        patch.delenv(name)
    if endpoint:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        patch.setenv(name, os.devnull)
    patch.setenv(filesystems.RETRY_VARIABLE, str(float(retry_s)))
    s3 = fsspec.get_filesystem_class("s3")
    s3.clear_instance_cache()
    yield
    s3.clear_instance_cache()


def make_bucket(server: str, name: str = "drives") -> str:
    """Empties the server and returns the URI of a new bucket on it."""
    ask(server, "reset")
    fsspec.filesystem("s3", endpoint_url=server).mkdir(name)
    return f"s3://{name}"


def ask(server: str, what: str) -> bytes:
    """Tells moto itself something."""
    with urllib.request.urlopen(urllib.request.Request(f"{server}/moto-api/{what}", method="POST")) as answer:
        return answer.read()

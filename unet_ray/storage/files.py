"""Reads and writes files at any URI, whole or not at all; `listings` tells which files there are.

A URI is a local path or anything that fsspec opens (`s3://bucket/log`, `gs://…`, `memory://…`); `filesystems` says
with which options, and how often a store is asked again.

What counts on a store that has no rename: an object is there when its upload is complete, with all of its bytes; of
many writers one creates it (`put_if_absent`); and nothing depends on the order in which files are listed or were
written. An answer with fewer bytes than it announced is asked for again, and never taken for the file.

Errors: `FileNotFoundError` for what is not there; `ValueError` for a URI that cannot be used; `StorageRefused` for what
the store does not allow; `StorageError` for trouble that may be over when one tries again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeVar, cast

import fsspec.asyn
from fsspec.implementations.local import LocalFileSystem

from unet_ray.storage import local_files, web
from unet_ray.storage.filesystems import (
    FileChanged,
    StorageError,
    at_once,
    client_errors,
    filesystem,
    is_local,
    is_s3,
    naming,
    persistently,
)
from unet_ray.storage.listings import (
    FileInfo,
    info,
    is_pattern,
    list_files,
)

T = TypeVar("T")

_READ_AHEAD_BYTES = 2**20


def read_bytes(uri: str, offset: int = 0, size: int | None = None) -> bytes:
    """Returns a file's content, or `size` bytes from `offset` (fewer where it ends). Raises FileNotFoundError."""
    return _read(uri, offset, size, None)


def _read(uri: str, offset: int, size: int | None, version: str | None) -> bytes:
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):  # without fsspec's wrapper: 20 µs less a frame
        with naming(uri), local_files.open_regular(path) as file:
            file.seek(offset)
            return file.read(-1 if size is None else size)
    if is_s3(uri):
        return persistently(uri, lambda: _read_s3(fs, uri, path, (offset, size), version))
    if web.is_web(uri):
        return persistently(uri, lambda: web.read(fs, uri, offset, size))
    return persistently(uri, lambda: _read_other(fs, path, offset, None if size is None else offset + size))


def _read_other(fs: Any, path: str, begin: int, end: int | None) -> bytes:
    try:
        return fs.cat_file(path, start=begin or None, end=end)
    except client_errors() as error:
        if getattr(error, "status_code", None) == 416:  # adlfs: it ends before
            return b""
        raise


def _read_s3(fs: Any, uri: str, path: str, span: tuple[int, int | None], version: str | None) -> bytes:
    """Reads in one request, which s3fs's own `cat_file` precedes by another for the size."""
    offset, size = span
    if size == 0:
        return b""
    bucket, key, _ = fs.split_path(path)
    asked = {"Bucket": bucket, "Key": key} | ({"IfMatch": f'"{version}"'} if version else {})
    if offset or size is not None:
        asked["Range"] = f"bytes={offset}-" if size is None else f"bytes={offset}-{offset + size - 1}"

    async def fetch() -> tuple[int, bytes]:
        answer = await fs._call_s3("get_object", **asked)
        async with answer["Body"] as body:
            return answer["ContentLength"], await body.read()

    try:
        announced, data = fsspec.asyn.sync(fs.loop, fetch)
    except OSError as error:
        if "PreconditionFailed" in str(error.__cause__):  # s3fs makes an EINVAL of it
            raise FileChanged(errno.ESTALE, "another version than the one asked for", uri) from error
        if "InvalidRange" in str(error.__cause__):
            return b""  # it ends before
        raise
    if len(data) != announced:
        raise StorageError(errno.EIO, f"{len(data):,} of {announced:,} bytes came; trying again may help", uri)
    return data


def read_many(
    ranges: Sequence[tuple[str, int, int | None]], versions: Sequence[str | None] | None = None
) -> list[bytes | OSError]:
    """Reads many `(uri, offset, size)` with many requests in flight where the store is not local.

    Args:
        ranges: what to read.
        versions: the version that each must be, where `can_read_versions`; None for one that may be any.

    Returns:
        The content of each, in order, or the error that reading it gave (`FileNotFoundError`, `FileChanged`,
        `StorageError`, …).
    """

    def read(span: tuple[str, int, int | None, str | None]) -> bytes | OSError:
        try:
            return _read(*span)
        except OSError as error:
            return error

    versions = versions or [None] * len(ranges)
    spans = [(*span, version) for span, version in zip(ranges, versions, strict=True)]
    return at_once(read, spans, [uri for uri, _, _ in ranges])


def can_read_versions(uri: str) -> bool:
    """Whether a given version of a file, or an error, comes in one request: on S3, by If-Match."""
    return is_s3(uri)


def open_read(uri: str) -> BinaryIO:
    """Opens a file for reading at any place; read by ranges, never fetched whole. Raises FileNotFoundError.

    On S3 a file that changes while it is open raises `FileChanged`.
    """
    if is_local(uri):
        _, path = filesystem(uri)
        with naming(uri):
            return local_files.open_regular(path)
    return cast(BinaryIO, _RemoteFile(info(uri)))


class _RemoteFile(io.RawIOBase):
    """A file of a store as Arrow reads it: by ranges, with a little read-ahead, each as patiently as `read_bytes`.

    A filesystem's own file reads ahead 5 to 50 MB at every place that is read, and gives up after its own retries.
    """

    def __init__(self, file: FileInfo):
        self._file, self._at = file, 0
        self._version = file.version if can_read_versions(file.uri) else None
        self._window, self._window_at = b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._file.size_bytes)[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._file.size_bytes - self._at)
        n_bytes = left if size is None or size < 0 else min(left, size)
        begin = self._at - self._window_at
        if not 0 <= begin <= begin + n_bytes <= len(self._window):
            length = min(max(n_bytes, _READ_AHEAD_BYTES), left)
            self._window = _read(self._file.uri, self._at, length, self._version)
            self._window_at, begin = self._at, 0
        data = self._window[begin : begin + n_bytes]
        self._at += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def write_whole(uri: str, data: bytes) -> None:
    """Writes a file, replacing what was there: a reader sees the old content, none, or all of the new, never a part."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with naming(uri):
            local_files.write_whole(path, data)
    else:
        persistently(uri, lambda: fs.pipe_file(path, data))  # an object appears when its upload is complete


def write_many(files: Sequence[tuple[str, bytes]]) -> None:
    """As `write_whole` for many `(uri, data)`, with many requests in flight where the store is not local."""
    at_once(lambda file: write_whole(*file), files, [uri for uri, _ in files])


@contextmanager
def write_pieces(uri: str) -> Iterator[BinaryIO]:
    """As `write_whole` for what memory need not hold at once: the file to write to, under its name when the block ends.

    Where the store is not local, the pieces wait in a temporary file of this machine until then. A block that fails
    leaves nothing.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with naming(uri):
            with local_files.temporary_beside(path) as file:
                yield file
            os.replace(file.name, path)
    else:
        with tempfile.NamedTemporaryFile(prefix="unet_ray-") as waiting:
            yield cast(BinaryIO, waiting)
            waiting.flush()
            persistently(uri, lambda: fs.put_file(waiting.name, path))


def put_if_absent(uri: str, data: bytes) -> bool:
    """Creates a file unless it exists.

    Local files: a temporary file and a hard link, which exactly one writer wins. S3, Google Cloud Storage, Azure:
    the store's own condition (`If-None-Match`, `ifGenerationMatch=0`). A filesystem with neither looks first and then
    writes, and an old S3 of another maker may pass over the condition: two writers at the same moment may both succeed
    there, and the later one's content stands. So one job at a time may work on an output there; a killed one and its
    successor do no harm, since they write one after the other.

    Args:
        uri: where to.
        data: not empty (an empty body is not exclusive on S3).

    Returns:
        True where the file now holds `data`, False where it holds something else.
    """
    assert data, "an empty file cannot be put exclusively"
    fs, path = filesystem(uri)
    try:
        if isinstance(fs, LocalFileSystem):
            with naming(uri):
                local_files.create(path, data)
        else:
            persistently(uri, lambda: fs.pipe_file(path, data, mode="create"))
        return True
    except FileExistsError:
        # After a lost answer the request is sent again and meets its own first success.
        return read_bytes(uri) == data


def delete(uri: str) -> None:
    """Deletes a file; one that is gone already is no error."""
    fs, path = filesystem(uri)
    try:
        persistently(uri, lambda: fs.rm_file(path))
    except FileNotFoundError:
        return


def delete_many(uris: Sequence[str]) -> None:
    """As `delete` for many of one filesystem; in few requests where the store takes many names in one, as S3 does."""
    if not uris or any(map(is_local, uris)):
        at_once(delete, uris, uris)
        return
    fs = filesystem(uris[0])[0]
    if any(map(is_pattern, uris)):  # whose names fsspec's `rm` takes for those of other files
        at_once(delete, uris, uris)
        return
    try:
        persistently(uris[0], lambda: fs.rm([filesystem(uri)[1] for uri in uris]))
    except FileNotFoundError:
        at_once(delete, uris, uris)


def delete_tree(uri: str) -> None:
    """Deletes a folder and all below it; one that is gone already is no error, nor what another job adds meanwhile."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with naming(uri):
            local_files.delete_tree(path)
        return
    if is_pattern(path):
        delete_many([file.uri for file in list_files(uri, must_exist=False)])
        return
    try:
        persistently(uri, lambda: fs.rm(path, recursive=True))
    except FileNotFoundError:
        return


def delete_if_empty(folder: str) -> None:
    """Deletes a local folder if nothing is in it; stores have no empty folders."""
    fs, path = filesystem(folder)
    if isinstance(fs, LocalFileSystem):
        with contextlib.suppress(OSError):
            os.rmdir(path)


def delete_unfinished(folder: str) -> None:
    """Deletes what killed writers left of files in a folder, not below it; stores keep nothing of such a file.

    A writer that lives begins its file anew, but for `write_pieces`, which fails.
    """
    fs, path = filesystem(folder)
    if isinstance(fs, LocalFileSystem):
        with naming(folder):
            local_files.delete_unfinished(path)


def require_writable(folder: str, option: str) -> None:
    """Raises ValueError where a local folder certainly cannot be made or written in; of a store only a write tells."""
    fs, path = filesystem(folder)
    if isinstance(fs, LocalFileSystem) and (why := local_files.why_unwritable(path)) is not None:
        raise ValueError(f"{option} {folder} cannot be written: {why}; give another {option}")


def first_link(folder: str, names: Collection[str]) -> str | None:
    """Returns a symbolic link among some entries of a local folder or below them; None without one, or in a store."""
    fs, path = filesystem(folder)
    if not isinstance(fs, LocalFileSystem):
        return None
    with naming(folder):
        return local_files.first_link(path, names)


def sha256(data: bytes) -> str:
    """Returns the digest by which files are named and checked, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()

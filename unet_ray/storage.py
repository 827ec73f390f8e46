"""List, read and write files at any URI, whole or not at all.

A URI is a local path or anything that fsspec opens (`s3://bucket/log`, `gs://…`, `memory://…`); `filesystems` says
with which options, and how often a store is asked again.

What counts on a store that has no rename: an object is there when its upload is complete, with all of its bytes; of
many writers one creates it (`put_if_absent`); and nothing depends on the order in which files are listed or were
written. An answer with fewer bytes than it announced is asked for again, and never taken for the file.

Errors: `FileNotFoundError` for what is not there; `ValueError` for a URI that cannot be used; `StorageRefused` for what
the store does not allow; `StorageError` for trouble that may be over when one tries again.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import posixpath
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar, cast

import fsspec.asyn
from fsspec.implementations.local import LocalFileSystem

from unet_ray import local_files
from unet_ray.filesystems import (
    REQUESTS_IN_FLIGHT,
    FileChanged,
    StorageError,
    StorageRefused,
    client_errors,
    filesystem,
    is_local,
    is_s3,
    naming,
    persistently,
    resolve,
)
from unet_ray.local_files import TEMPORARY_PREFIX

__all__ = [
    "REQUESTS_IN_FLIGHT",
    "TEMPORARY_PREFIX",
    "FileChanged",
    "StorageError",
    "StorageRefused",
    "is_local",
    "resolve",
]  # what goes with all below

T = TypeVar("T")

_READ_AHEAD_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """One file as a listing saw it."""

    path: str
    """Path relative to the listed root, with `/` between its parts."""
    uri: str
    """The whole URI; an absolute path for a local file."""
    size_bytes: int
    """Size in bytes."""
    version: str
    """The entity tag where the store has one, else modification time (ns) and size: changes when the content does."""


def join(uri: str, *names: str) -> str:
    """Returns the URI of something below `uri`."""
    return posixpath.join(uri.rstrip("/") or "/", *names)


def name(uri: str) -> str:
    """Returns the last part of a URI."""
    return posixpath.basename(uri.rstrip("/"))


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = filesystem(uri)
    return persistently(uri, lambda: fs.exists(path))


def is_folder(uri: str) -> bool:
    """Whether a folder (on an object store: a prefix that something lies under) is there."""
    fs, path = filesystem(uri)
    return persistently(uri, lambda: fs.isdir(path))


def info(uri: str) -> FileInfo:
    """Returns size and version of one file, by a fresh look at the store. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with naming(uri):
            return _local_info(path, os.path.basename(path))
    return _remote_info(persistently(uri, lambda: fs.info(path)), name(path), uri)


def _local_info(path: str, relative: str) -> FileInfo:
    status = os.stat(path)
    return FileInfo(
        path=relative, uri=path, size_bytes=status.st_size, version=f"{status.st_mtime_ns}-{status.st_size}"
    )


def _remote_info(entry: dict[str, Any], relative: str, uri: str) -> FileInfo:
    tag = entry.get("ETag") or entry.get("etag") or entry.get("md5Hash")
    modified = next((entry[key] for key in ("LastModified", "last_modified", "mtime", "created") if entry.get(key)), "")
    if hasattr(
        modified, "timestamp"
    ):  # a listing and a look at one file may give a time in two types (fsspec's memory)
        modified = modified.timestamp()
    version = str(tag).strip('"') if tag else f"{modified}-{entry['size']}"
    return FileInfo(path=relative, uri=uri, size_bytes=entry["size"] or 0, version=version)


def list_files(
    root: str, *, on_unreadable: Callable[[str, OSError], None] | None = None, must_exist: bool = True
) -> Iterator[FileInfo]:
    """Yields every file below a folder, hidden ones too, in the order of their paths; links to folders are followed.

    Args:
        root: URI of the folder.
        on_unreadable: called with the URI and the error of what could not be listed; without it the error is raised.
        must_exist: whether it is an error that there is no such folder; else there is nothing in it.

    Raises:
        FileNotFoundError: no such folder.
        NotADirectoryError: it is a file.
        StorageError: the store did not answer.
    """
    fs, path = filesystem(root)
    if not isinstance(fs, LocalFileSystem):
        yield from _list_remote(root, fs, path, must_exist)
        return
    with naming(root):
        if not must_exist and not os.path.lexists(path):
            return
        if not fs.exists(path):
            raise FileNotFoundError(errno.ENOENT, "no such folder", root)
        if not fs.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", root)
        yield from _list_local(path, "", on_unreadable, frozenset())


def _list_remote(root: str, fs: Any, path: str, must_exist: bool) -> Iterator[FileInfo]:
    """Yields what is below a folder of a store: one listing, and a look at the folder only where that is empty."""
    base = fs._strip_protocol(path).rstrip("/")
    parent, _, last = base.rpartition("/")
    # s3fs itself looks twice at a folder in which it finds nothing.
    where = (parent, {"prefix": f"{last}/"}) if is_s3(root) and parent else (path, {})
    entries = persistently(root, lambda: fs.find(where[0], detail=True, **where[1]))
    # adlfs gives a list of its name for a file.
    if isinstance(entries, list) or (base in entries and entries[base]["type"] == "file" and len(entries) == 1):
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", root)
    if not entries and must_exist and not is_folder(root):
        if exists(root):
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", root)
        raise FileNotFoundError(errno.ENOENT, "no such folder", root)
    for key in sorted(entries):
        if entries[key]["type"] == "file" and key not in (base, f"{base}/"):  # the folder's own mark
            relative = key.removeprefix(f"{base}/")
            yield _remote_info(entries[key], relative, join(root, relative))


def _list_local(
    folder: str, relative: str, on_unreadable: Callable[[str, OSError], None] | None, above: frozenset[tuple[int, int]]
) -> Iterator[FileInfo]:
    """Yields what is below one local folder; `above` are the folders on the way to it, so that a loop of links ends."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        if on_unreadable is None:
            raise
        on_unreadable(folder, error)
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in entries:
        path = f"{relative}/{entry.name}" if relative else entry.name
        try:
            if entry.is_dir():
                yield from _list_local(entry.path, path, on_unreadable, above | {here})
            else:
                yield _local_info(entry.path, path)
        except OSError as error:
            if on_unreadable is None:
                raise
            on_unreadable(entry.path, error)


def glob(pattern: str) -> list[str]:
    """Returns the URIs of the files and folders that match `*`, `?`, `[…]` and `**`, sorted."""
    fs, path = filesystem(pattern)
    matches = persistently(pattern, lambda: fs.glob(path))
    folder = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
    if isinstance(fs, LocalFileSystem) or not folder.partition("://")[2]:
        return sorted(match if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(match) for match in matches)
    base = fs._strip_protocol(folder)  # what fsspec makes of a name alone lacks the host (sftp://host/log)
    return sorted(join(folder, match.removeprefix(base).lstrip("/")) for match in matches)


def versions(uris: Iterable[str]) -> dict[str, str | None]:
    """Returns each file's version by a fresh look, None where it is gone."""

    def look(uri: str) -> tuple[str, str | None]:
        try:
            return uri, info(uri).version
        except (FileNotFoundError, NotADirectoryError):  # the latter: a file stands where its folder was
            return uri, None

    uris = list(uris)
    return dict(_many(look, uris, uris))


def _many(act: Callable[[Any], T], items: Sequence[Any], uris: Sequence[str]) -> list[T]:
    """As `map`, with many requests in flight where something of it is not local."""
    if all(is_local(uri) for uri in uris):
        return list(map(act, items))
    with ThreadPoolExecutor(min(REQUESTS_IN_FLIGHT, len(items))) as pool:
        return list(pool.map(act, items))


def read_bytes(uri: str, offset: int = 0, size: int | None = None) -> bytes:
    """Returns a file's content, or `size` bytes from `offset` (fewer where it ends). Raises FileNotFoundError."""
    return _read(uri, offset, size, None)


def _read(uri: str, offset: int, size: int | None, version: str | None) -> bytes:
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):  # without fsspec's wrapper: 20 µs less a frame
        with naming(uri), open(path, "rb") as file:
            file.seek(offset)
            return file.read(-1 if size is None else size)
    if is_s3(uri):
        return persistently(uri, lambda: _read_s3(fs, uri, path, (offset, size), version))
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
    return _many(read, spans, [uri for uri, _, _ in ranges])


def can_read_versions(uri: str) -> bool:
    """Whether a given version of a file, or an error, comes in one request: on S3, by If-Match."""
    return is_s3(uri)


def open_read(uri: str) -> BinaryIO:
    """Opens a file for reading at any place; read by ranges, never fetched whole. Raises FileNotFoundError.

    On S3 a file that changes while it is open raises `FileChanged`.
    """
    if is_local(uri):
        fs, path = filesystem(uri)
        with naming(uri):
            return cast(BinaryIO, fs.open(path, "rb"))
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
    _many(lambda file: write_whole(*file), files, [uri for uri, _ in files])


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
    if any(map(is_local, uris)):
        _many(delete, uris, uris)
        return
    fs = filesystem(uris[0])[0]
    try:
        persistently(uris[0], lambda: fs.rm([filesystem(uri)[1] for uri in uris]))
    except FileNotFoundError:
        _many(delete, uris, uris)


def delete_tree(uri: str) -> None:
    """Deletes a folder and all below it; one that is gone already is no error."""
    fs, path = filesystem(uri)
    try:
        persistently(uri, lambda: fs.rm(path, recursive=True))
    except FileNotFoundError:
        return


def sha256(data: bytes) -> str:
    """Returns the digest by which files are named and checked, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()

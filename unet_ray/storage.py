"""List, read and write files at any URI, whole or not at all: the only module that knows fsspec.

A URI is a local path or anything that fsspec opens (`s3://bucket/log`, `gs://…`, `memory://…`). Options of a
filesystem (endpoint, profile, anonymous access) come from fsspec's own configuration, `FSSPEC_S3='{"anon": true}'` in
the environment, so that they reach every worker process without passing through our code.

Errors: `FileNotFoundError` for what is not there; `ValueError` for a URI that cannot be used; `StorageError` for
trouble that may be over when one tries again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import re
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec
import fsspec.asyn
from fsspec.implementations.local import LocalFileSystem

TEMPORARY_PREFIX = ".tmp-"
"""Start of the name of a file that is not yet whole. The dot hides it from every Parquet reader."""

READ_CONCURRENCY = 32
"""Requests in flight of one process on a filesystem that is not local."""


class FileChanged(OSError):
    """A file is no longer the version that was asked for."""


# A link to another folder or an unusable disk is not mended by trying again, everything else may be.
_NOT_TRANSIENT = (
    *(FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, FileExistsError),
    FileChanged,
)


class StorageError(OSError):
    """Trouble with storage that may be over when one tries again (exit code 75)."""


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


@contextmanager
def _naming(uri: str) -> Iterator[None]:
    """Turns an I/O error without a remedy in our hands into a `StorageError` that names the URI."""
    try:
        yield
    except (StorageError, *_NOT_TRANSIENT):
        raise
    except OSError as error:
        raise StorageError(
            error.errno or errno.EIO, f"{error.strerror or error}; trying again may help", uri
        ) from error
    except _client_errors() as error:
        if "Credentials" in type(error).__name__:
            raise PermissionError(errno.EACCES, f"{error}; set them in the environment or a profile", uri) from error
        raise StorageError(errno.EIO, f"{error}; trying again may help", uri) from error


def _client_errors() -> tuple[type[Exception], ...]:
    """What the clients of object stores raise that is no OSError; of those that are loaded."""
    known = (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError"))
    return tuple(getattr(sys.modules[module], name) for module, name in known if module in sys.modules)


def resolve(uri: str) -> str:
    """Returns the URI in the form that means the same on every process: an absolute path, or a URL without end slash.

    Raises:
        ValueError: empty, an unknown protocol, or with credentials in it (which would end up in logs and outputs).
    """
    if not uri.strip():
        raise ValueError("an empty path was given; give a local path or a URI such as s3://bucket/folder")
    protocol, separator, rest = uri.partition("://")
    if not separator or protocol in ("file", "local"):
        return os.path.abspath(os.path.expanduser(rest if separator else uri))
    _refuse_credentials(uri)
    if protocol.split("::")[0] not in fsspec.available_protocols():
        raise ValueError(
            f"{uri}: unknown protocol {protocol!r}; use a local path, s3://, gs://, abfs:// or another of fsspec's"
        )
    return uri.rstrip("/") if rest.strip("/") else uri


def _refuse_credentials(uri: str) -> None:
    parts = urlsplit(uri)
    has_password = "@" in parts.netloc and ":" in parts.netloc.rpartition("@")[0]
    if has_password or re.search(
        r"(?i)(^|[?&])[^=&]*(sig|signature|token|secret|password|credential|key)=", "?" + parts.query
    ):
        raise ValueError(
            f"{parts.scheme}://…: the URI holds credentials; give them by environment variables or a profile instead"
        )


def _filesystem(uri: str) -> tuple[Any, str]:
    """Returns the fsspec filesystem of a URI and the path within it."""
    try:
        return fsspec.core.url_to_fs(uri)
    except ImportError as error:
        extra = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
        hint = extra.get(uri.partition("://")[0])
        remedy = f"pip install 'unet-ray[{hint}]'" if hint else str(error)
        raise ValueError(f"{uri}: the package that reads it is not installed; {remedy}") from error


def is_local(uri: str) -> bool:
    """Whether the URI is a path of this machine's own file tree."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def join(uri: str, *names: str) -> str:
    """Returns the URI of something below `uri`."""
    return posixpath.join(uri.rstrip("/") or "/", *names)


def name(uri: str) -> str:
    """Returns the last part of a URI."""
    return posixpath.basename(uri.rstrip("/"))


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = _filesystem(uri)
    with _naming(uri):
        return fs.exists(path)


def is_folder(uri: str) -> bool:
    """Whether a folder (on an object store: a prefix that something lies under) is there."""
    fs, path = _filesystem(uri)
    with _naming(uri):
        return fs.isdir(path)


def info(uri: str) -> FileInfo:
    """Returns size and version of one file, by a fresh look at the store. Raises FileNotFoundError."""
    fs, path = _filesystem(uri)
    with _naming(uri):
        if isinstance(fs, LocalFileSystem):
            return _local_info(path, os.path.basename(path))
        fs.invalidate_cache(fs._parent(path))
        return _remote_info(fs, fs.info(path), name(path))


def _local_info(path: str, relative: str) -> FileInfo:
    status = os.stat(path)
    return FileInfo(
        path=relative, uri=path, size_bytes=status.st_size, version=f"{status.st_mtime_ns}-{status.st_size}"
    )


def _remote_info(fs: Any, entry: dict[str, Any], relative: str) -> FileInfo:
    tag = entry.get("ETag") or entry.get("etag") or entry.get("md5Hash")
    modified = next((entry[key] for key in ("LastModified", "last_modified", "mtime", "created") if entry.get(key)), "")
    if hasattr(
        modified, "timestamp"
    ):  # a listing and a look at one file may give a time in two types (fsspec's memory)
        modified = modified.timestamp()
    version = str(tag).strip('"') if tag else f"{modified}-{entry['size']}"
    uri = fs.unstrip_protocol(entry["name"])
    return FileInfo(path=relative, uri=uri, size_bytes=entry["size"] or 0, version=version)


def list_files(root: str, *, on_unreadable: Callable[[str, OSError], None] | None = None) -> Iterator[FileInfo]:
    """Yields every file below a folder, hidden ones too, in the order of their paths; links to folders are followed.

    Args:
        root: URI of the folder.
        on_unreadable: called with the URI and the error of what could not be listed; without it the error is raised.

    Raises:
        FileNotFoundError: no such folder.
        NotADirectoryError: it is a file.
        StorageError: the store did not answer.
    """
    fs, path = _filesystem(root)
    with _naming(root):
        if not fs.exists(path):
            raise FileNotFoundError(errno.ENOENT, "no such folder", root)
        if not fs.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", root)
        if isinstance(fs, LocalFileSystem):
            yield from _list_local(path, "", on_unreadable, frozenset())
        else:
            fs.invalidate_cache(path)
            base = fs._strip_protocol(path).rstrip("/") + "/"
            entries = fs.find(path, detail=True)
            for key in sorted(entries):
                if entries[key]["type"] == "file" and key != base:
                    yield _remote_info(fs, entries[key], key.removeprefix(base))


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
    fs, path = _filesystem(pattern)
    with _naming(pattern):
        local = isinstance(fs, LocalFileSystem)
        return sorted(match if local else fs.unstrip_protocol(match) for match in fs.glob(path))


def versions(uris: Iterable[str]) -> dict[str, str | None]:
    """Returns each file's version by a fresh look, None where it is gone."""

    def look(uri: str) -> tuple[str, str | None]:
        try:
            return uri, info(uri).version
        except (FileNotFoundError, NotADirectoryError):  # the latter: a file stands where its folder was
            return uri, None

    uris = list(uris)
    if all(is_local(uri) for uri in uris):
        return dict(map(look, uris))
    with ThreadPoolExecutor(min(READ_CONCURRENCY, len(uris))) as pool:
        return dict(pool.map(look, uris))


def read_bytes(uri: str, offset: int = 0, size: int | None = None) -> bytes:
    """Returns a file's content, or `size` bytes from `offset` (fewer where it ends). Raises FileNotFoundError."""
    fs, path = _filesystem(uri)
    with _naming(uri):
        if isinstance(fs, LocalFileSystem):  # without fsspec's wrapper: 20 µs less a frame
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(-1 if size is None else size)
        return fs.cat_file(path, start=offset or None, end=None if size is None else offset + size)


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

    def read(span: tuple[str, int, int | None], version: str | None) -> bytes | OSError:
        try:
            return read_bytes(*span) if version is None else _read_version(*span, version)
        except OSError as error:
            return error

    versions = versions or [None] * len(ranges)
    if all(is_local(uri) for uri, _, _ in ranges):
        return list(map(read, ranges, versions))
    with ThreadPoolExecutor(min(READ_CONCURRENCY, len(ranges))) as pool:
        return list(pool.map(read, ranges, versions))


def can_read_versions(uri: str) -> bool:
    """Whether a given version of a file, or an error, comes in one request: on S3, by If-Match."""
    return uri.startswith(("s3://", "s3a://"))


def _read_version(uri: str, offset: int, size: int | None, version: str) -> bytes:
    fs, path = _filesystem(uri)
    bucket, key, _ = fs.split_path(path)
    span = f"bytes={offset}-" if size is None else f"bytes={offset}-{offset + size - 1}"
    with _naming(uri):
        try:
            answer = fs.call_s3("get_object", Bucket=bucket, Key=key, IfMatch=f'"{version}"', Range=span)
        except OSError as error:
            if "PreconditionFailed" in str(error.__cause__):  # s3fs makes an EINVAL of it
                raise FileChanged(errno.ESTALE, "another version than the one asked for", uri) from error
            raise
        return fsspec.asyn.sync(fs.loop, answer["Body"].read)


def open_read(uri: str) -> BinaryIO:
    """Opens a file for reading at any place; read by ranges, never fetched whole. Raises FileNotFoundError."""
    fs, path = _filesystem(uri)
    with _naming(uri):
        return cast(BinaryIO, fs.open(path, "rb"))


def write_whole(uri: str, data: bytes) -> None:
    """Writes a file, replacing what was there: a reader sees the old content, none, or all of the new, never a part."""
    fs, path = _filesystem(uri)
    with _naming(uri):
        if isinstance(fs, LocalFileSystem):
            temporary = _write_temporary(path, data)
            os.replace(temporary, path)
        else:
            fs.pipe_file(path, data)  # an object appears when its upload is complete


def write_many(files: Sequence[tuple[str, bytes]]) -> None:
    """As `write_whole` for many `(uri, data)`, with many requests in flight where the store is not local."""
    if all(is_local(uri) for uri, _ in files):
        for uri, data in files:
            write_whole(uri, data)
        return
    with ThreadPoolExecutor(min(READ_CONCURRENCY, len(files))) as pool:
        list(pool.map(lambda file: write_whole(*file), files))


@contextmanager
def write_pieces(uri: str) -> Iterator[BinaryIO]:
    """As `write_whole` for what memory need not hold at once: the file to write to, under its name when the block ends.

    Where the store is not local, the pieces wait in a temporary file of this machine until then. A block that fails
    leaves nothing.
    """
    fs, path = _filesystem(uri)
    with _naming(uri):
        if isinstance(fs, LocalFileSystem):
            with _temporary_beside(path) as file:
                yield file
            os.replace(file.name, path)
        else:
            with tempfile.NamedTemporaryFile(prefix="unet_ray-") as waiting:
                yield cast(BinaryIO, waiting)
                waiting.flush()
                fs.put_file(waiting.name, path)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Creates a file unless it exists.

    Local files: a temporary file and a hard link, which exactly one writer wins. S3, Google Cloud Storage, Azure:
    the store's own condition (`If-None-Match`, `ifGenerationMatch=0`). A filesystem with neither looks first and then
    writes: two writers at the same moment may both succeed there, so records must be a pure function of their key.

    Args:
        uri: where to.
        data: not empty (an empty body is not exclusive on S3).

    Returns:
        True where the file now holds `data`, False where it holds something else.
    """
    assert data, "an empty file cannot be put exclusively"
    fs, path = _filesystem(uri)
    with _naming(uri):
        try:
            if isinstance(fs, LocalFileSystem):
                _link_if_absent(path, data)
            else:
                fs.pipe_file(path, data, mode="create")
            return True
        except FileExistsError:
            # After a lost answer the filesystem tries again and meets its own first success.
            return read_bytes(uri) == data


def _write_temporary(path: str, data: bytes) -> str:
    with _temporary_beside(path) as file:
        file.write(data)
    return file.name


@contextmanager
def _temporary_beside(path: str) -> Iterator[BinaryIO]:
    """A new file in the folder of `path`, on the disk when the block ends, gone where it fails."""
    folder, base = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}-{base}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _link_if_absent(path: str, data: bytes) -> None:
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        if os.path.exists(path):  # a disk without hard links (FAT, some network mounts)
            raise FileExistsError(errno.EEXIST, "exists", path) from None
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def delete(uri: str) -> None:
    """Deletes a file; one that is gone already is no error."""
    fs, path = _filesystem(uri)
    with _naming(uri):
        try:
            fs.rm_file(path)
        except FileNotFoundError:
            return


def delete_many(uris: Sequence[str]) -> None:
    """As `delete` for many, with many requests in flight where the store is not local."""
    if all(is_local(uri) for uri in uris):
        for uri in uris:
            delete(uri)
        return
    with ThreadPoolExecutor(min(READ_CONCURRENCY, len(uris))) as pool:
        list(pool.map(delete, uris))


def delete_tree(uri: str) -> None:
    """Deletes a folder and all below it; one that is gone already is no error."""
    fs, path = _filesystem(uri)
    with _naming(uri):
        try:
            fs.invalidate_cache()
            fs.rm(path, recursive=True)
        except FileNotFoundError:
            return


def sha256(data: bytes) -> str:
    """Returns the digest by which files are named and checked, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()

"""Lists storage: whether a file exists, its size and version, and whole folders.

A listing says of each file what later tells whether it has changed, so that no file is asked for that again.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from unet_ray.storage import web
from unet_ray.storage.filesystems import at_once, filesystem, is_s3, naming, persistently
from unet_ray.storage.local_files import TEMPORARY_PREFIX, NotAFile, require_regular

OnUnreadable = Callable[[str, OSError], None]
"""Called with the URI and the error of what could not be listed."""

_MOST_PARTS = 64  # of a folder that is listed in parts: each has a task and on S3 a request more


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


ListPart = Callable[[OnUnreadable | None], Iterator[FileInfo]]
"""Yields some of the files below a folder."""


def join(uri: str, *names: str) -> str:
    """Returns the URI of something below `uri`."""
    return posixpath.join(uri.rstrip("/") or "/", *names)


def name(uri: str) -> str:
    """Returns the last part of a URI."""
    return posixpath.basename(uri.rstrip("/"))


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return os.path.exists(path)
    if web.is_web(uri):
        try:
            persistently(uri, lambda: fs.info(path))
        except FileNotFoundError:
            return False
        return True
    return persistently(uri, lambda: fs.exists(path))


def is_folder(uri: str) -> bool:
    """Whether a folder (on an object store: a prefix that something lies under) is there."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return os.path.isdir(path)
    return persistently(uri, lambda: fs.isdir(path))


def info(uri: str) -> FileInfo:
    """Returns size and version of one file, by a fresh look at the store. Raises FileNotFoundError or NotAFile."""
    if "\0" in uri:
        raise FileNotFoundError(errno.ENOENT, "no file can have NUL in its name", uri)
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with naming(uri):
            try:
                return _local_info(path, os.path.basename(path))
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                raise FileNotFoundError(errno.ENOENT, "no file can have so long a name", uri) from error
    look = partial(web.look, fs) if web.is_web(uri) else fs.info
    return _remote_info(persistently(uri, lambda: look(path)), name(path), uri)


def _local_info(path: str, relative: str) -> FileInfo:
    status = os.stat(path)
    require_regular(status, path)
    return FileInfo(
        path=relative, uri=path, size_bytes=status.st_size, version=f"{status.st_mtime_ns}-{status.st_size}"
    )


def modified_s(uri: str) -> float | None:
    """Returns when a file was written, in s since 1970; None where it is not there or its store does not say."""
    fs, path = filesystem(uri)
    look = partial(web.look, fs) if web.is_web(uri) else fs.info
    try:
        modified = _modified(persistently(uri, lambda: look(path)))
    except FileNotFoundError:
        return None
    return modified if isinstance(modified, float) else None


def _modified(entry: dict[str, Any]) -> Any:
    """When a file was written, as its store says it: s since 1970, text, or nothing."""
    modified = next((entry[key] for key in ("LastModified", "last_modified", "mtime", "created") if entry.get(key)), "")
    # A listing and a look at one file may give a time in two types (fsspec's memory).
    return modified.timestamp() if hasattr(modified, "timestamp") else modified


def _remote_info(entry: dict[str, Any], relative: str, uri: str) -> FileInfo:
    tag = entry.get("ETag") or entry.get("etag") or entry.get("md5Hash")
    version = str(tag).strip('"') if tag else f"{_modified(entry)}-{entry['size']}"
    return FileInfo(path=relative, uri=uri, size_bytes=entry["size"] or 0, version=version)


def list_files(root: str, *, on_unreadable: OnUnreadable | None = None, must_exist: bool = True) -> Iterator[FileInfo]:
    """Yields every file below a folder, hidden ones too, in the order of their paths; links to folders are followed.

    Args:
        root: URI of the folder.
        on_unreadable: without it the error is raised.
        must_exist: whether it is an error that there is no such folder; else there is nothing in it.

    Raises:
        FileNotFoundError: no such folder.
        NotADirectoryError: it is a file.
        StorageError: the store did not answer.
    """
    fs, path = filesystem(root)
    if web.is_web(root):
        yield from _list_web(root, fs, on_unreadable)
        return
    if not isinstance(fs, LocalFileSystem):
        yield from _list_remote(root, fs, path, must_exist)
        return
    with naming(root):
        if not os.path.isdir(path):
            if not must_exist and not os.path.lexists(path):  # a link to a disk that is not there is no empty folder
                return
            if not os.path.exists(path):
                raise FileNotFoundError(errno.ENOENT, "no such folder", root)
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", root)
        yield from _list_local(path, "", on_unreadable, frozenset())


def list_parts(root: str) -> list[ListPart]:
    """Returns what together yields every file below a folder, as `list_files` does, in parts that may run at once.

    On a local file system and on S3 these are the folder's own files and the folders in it: over a network, the answers
    that each file or page of a listing waits for take longer than all else.
    """
    fs, path = filesystem(root)
    parts: list[ListPart] = []
    if isinstance(fs, LocalFileSystem):
        parts = _local_parts(path)
    elif is_s3(root):
        parts = persistently(root, lambda: _s3_parts(root, fs, path))
    return parts or [lambda on_unreadable: list_files(root, on_unreadable=on_unreadable)]


def _local_parts(folder: str) -> list[ListPart]:
    """None where it cannot be read; many folders share a part."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as scan:
            names = sorted(entry.name for entry in scan if entry.is_dir())
    except OSError:
        return []
    above = frozenset({(status.st_dev, status.st_ino)})

    def list_some(group: Sequence[str], on_unreadable: OnUnreadable | None) -> Iterator[FileInfo]:
        for name in group:
            yield from _list_local(os.path.join(folder, name), name, on_unreadable, above)

    def list_own(on_unreadable: OnUnreadable | None) -> Iterator[FileInfo]:
        return _list_local(folder, "", on_unreadable, frozenset(), into_folders=False)

    n_names = max(1, -(-len(names) // _MOST_PARTS))
    shared = [names[start : start + n_names] for start in range(0, len(names), n_names)]
    return [list_own, *(partial(list_some, group) for group in shared)]


def _s3_parts(root: str, fs: Any, path: str) -> list[ListPart]:
    """None where a request for each folder would be too many, or a path cannot name one (of the key `log//1.png`)."""
    base = fs._strip_protocol(path).rstrip("/")
    entries = fs.ls(path, detail=True)
    folders = sorted(entry["name"] for entry in entries if entry["type"] == "directory")
    if len(folders) > _MOST_PARTS or any(name.rstrip("/") in (base, "") or name.endswith("/") for name in folders):
        return []

    def list_own(on_unreadable: OnUnreadable | None) -> Iterator[FileInfo]:
        return _remote_files(root, base, {entry["name"]: entry for entry in entries if entry["type"] == "file"})

    def list_one(folder: str, on_unreadable: OnUnreadable | None) -> Iterator[FileInfo]:
        for file in list_files(_below(root, folder), must_exist=False):
            yield replace(file, path=f"{folder}/{file.path}")

    return [list_own, *(partial(list_one, name.removeprefix(f"{base}/")) for name in folders)]


def _remote_files(root: str, base: str, entries: Mapping[str, dict[str, Any]]) -> Iterator[FileInfo]:
    """The files among the entries of a store's listing, by the whole keys, which begin with `base`."""
    for key in sorted(entries):
        if entries[key]["type"] == "file" and key not in (base, f"{base}/"):  # the folder's own mark
            relative = key.removeprefix(f"{base}/")
            yield _remote_info(entries[key], relative, _below(root, relative))


def _below(root: str, relative: str) -> str:
    """As `join`, but a key may have a part that is empty, and is still one below the root."""
    return f"{root.rstrip('/')}/{relative}"


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
    yield from _remote_files(root, base, entries)


def _list_web(root: str, fs: Any, on_unreadable: OnUnreadable | None) -> Iterator[FileInfo]:
    """Yields what the pages of a web server link to below a folder; pages name no sizes, so each file is looked at."""

    def look(uri: str) -> FileInfo | OSError:
        try:
            return replace(info(uri), path=uri.removeprefix(f"{root.rstrip('/')}/"))
        except (FileNotFoundError, PermissionError) as error:
            return error

    uris, _ = web.walk(fs, root)
    for uri, file in zip(uris, at_once(look, uris, uris) if uris else (), strict=True):
        if isinstance(file, FileInfo):
            yield file
        elif on_unreadable is None:
            raise file
        else:
            on_unreadable(uri, file)


def _list_local(
    folder: str,
    relative: str,
    on_unreadable: OnUnreadable | None,
    above: frozenset[tuple[int, int]],
    *,
    into_folders: bool = True,
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
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    for entry in entries:
        path = f"{relative}/{entry.name}" if relative else entry.name
        try:
            if entry.is_dir():
                if into_folders:
                    yield from _list_local(entry.path, path, on_unreadable, above | {identity})
            else:
                yield _local_info(entry.path, path)
        except OSError as error:
            if on_unreadable is None:
                raise
            on_unreadable(entry.path, error)


def glob(pattern: str) -> list[str]:
    """Returns the URIs of the files and folders that match `*`, `?`, `[…]` and `**`, sorted."""
    fs, path = filesystem(pattern)
    folder, below = split_pattern(pattern)
    if isinstance(fs, LocalFileSystem):
        with naming(pattern):
            return sorted(_glob_local(path))
    if web.is_web(pattern):
        links = web.walk(fs, folder, None if "**" in below else below.count("/") + 1)
        return sorted(link for part in links for link in part if matches(below, link[len(folder) + 1 :]))
    paths = persistently(pattern, lambda: fs.glob(path))
    if not folder.partition("://")[2]:
        return sorted(fs.unstrip_protocol(path) for path in paths)
    base = fs._strip_protocol(folder)  # what fsspec makes of a name alone lacks the host (sftp://host/log)
    return sorted(join(folder, path.removeprefix(base).lstrip("/")) for path in paths)


def _glob_local(pattern: str) -> Iterator[str]:
    """As fsspec's `glob`, which passes over folders that cannot be read."""
    root, below = split_pattern(pattern)
    whole = re.compile(glob_translate(pattern))
    levels = None if "**" in below else [re.compile(glob_translate(part)) for part in below.split("/")]

    def look(folder: str, depth: int, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        status = os.stat(folder)
        with os.scandir(folder) as scan:
            entries = list(scan)
        for entry in entries:
            if levels is not None and not levels[depth].match(entry.name):
                continue
            is_dir = entry.is_dir()
            if whole.match(f"{entry.path}/" if is_dir and pattern.endswith("/**") else entry.path):
                yield entry.path
            is_new = (status.st_dev, status.st_ino) not in above
            if is_dir and is_new and (levels is None or depth + 1 < len(levels)):
                yield from look(entry.path, depth + 1, above | {(status.st_dev, status.st_ino)})

    if os.path.isdir(root or "/"):
        if whole.match(f"{root}/"):
            yield root
        yield from look(root or "/", 0, frozenset())


def is_pattern(uri: str) -> bool:
    """Whether a URI has what `glob` takes for more than a letter."""
    return re.search(r"[*?\[]", uri) is not None


def split_pattern(pattern: str) -> tuple[str, str]:
    """Returns the folder in which a pattern looks, and the pattern below it."""
    folder = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
    return folder, pattern[len(folder) :].removeprefix("/")


def matches(pattern: str, path: str) -> bool:
    """Whether `glob` would find a path by a pattern, both relative to one folder."""
    return re.compile(glob_translate(pattern)).match(path) is not None


def versions(uris: Iterable[str]) -> dict[str, str | None]:
    """Returns each file's version by a fresh look, None where it is gone, `""` for what is there and no file."""

    def look(uri: str) -> tuple[str, str | None]:
        try:
            return uri, info(uri).version
        except (FileNotFoundError, NotADirectoryError):  # the latter: a file stands where its folder was
            return uri, None
        except (IsADirectoryError, NotAFile):
            return uri, ""

    uris = list(uris)
    return dict(at_once(look, uris, uris))


def list_folder(folder: str) -> list[FileInfo]:
    """Returns the files below a folder but those that are not yet whole, or go just now; none where it is not there."""

    def unless_gone(uri: str, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    files = list_files(folder, must_exist=False, on_unreadable=unless_gone)
    return [file for file in files if not name(file.path).startswith(TEMPORARY_PREFIX)]

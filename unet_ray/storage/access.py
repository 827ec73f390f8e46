"""Whether a URI can be listed, read and written from this process, tried with files that go again."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from unet_ray.storage.files import delete, delete_if_empty, put_if_absent, read_bytes, write_whole
from unet_ray.storage.filesystems import StorageError, filesystem, is_local, names_secret, persistently, resolve
from unet_ray.storage.listings import exists, is_pattern, join, split_pattern

TRIAL_PREFIX = "unet-ray-doctor-"
"""Start of the names of the files that are written; the rest is chance."""

_MOST_LISTINGS = 20  # on the way down to a first file: a store of a million folders is not walked through


@dataclass(frozen=True, kw_only=True)
class Access:
    """What can be done at a URI."""

    uri: str
    works: tuple[str, ...]
    """Of `list`, `read`, `write`, `delete`, `put if absent`, those that worked before one did not."""
    fails: str | None = None
    """The first that did not work."""
    problem: str = ""
    """Why, in one line without credentials."""
    remedy: str = ""
    """What to do about it."""


class _NotKept(OSError):
    """The store has taken a request and did not do what it means."""


def try_access(uri: str, *, writing: bool) -> Access:
    """Lists and reads what lies at a URI; where `writing`, also writes files of its own there, and deletes them.

    Folders that were made for these go with them.
    """
    steps: list[str] = []
    try:
        for step in _steps(uri, writing):
            steps.append(step)
    except (OSError, ValueError) as error:
        *works, fails = steps
        problem = without_credentials(" ".join(str(error).split()))
        return Access(uri=uri, works=tuple(works), fails=fails, problem=problem, remedy=_remedy(error, fails))
    return Access(uri=uri, works=tuple(steps))


def _steps(uri: str, writing: bool) -> Iterator[str]:
    """Yields the name of each step before it is done."""
    yield "list"
    file = _first_file(uri, must_exist=not writing)
    if file is not None:
        yield "read"
        read_bytes(file, 0, 1)
    if writing:
        yield from _writing_steps(uri)


def _first_file(uri: str, *, must_exist: bool) -> str | None:
    """Returns a file at or below a URI, listed folder by folder; None where there is none so far."""
    folder, _ = split_pattern(uri) if is_pattern(uri) else (uri, "")
    fs, path = filesystem(folder)
    if persistently(uri, lambda: fs.isfile(path)):
        return uri
    folders = [path]
    for _ in range(_MOST_LISTINGS):
        if not folders:
            break
        below = folders.pop()
        try:
            entries = persistently(uri, lambda: fs.ls(below, detail=True))  # noqa: B023
        except FileNotFoundError:
            if must_exist:
                raise
            return None
        names = sorted(entry["name"] for entry in entries if entry["type"] == "file" and entry["name"] != below)
        if names:
            return names[0] if is_local(uri) else fs.unstrip_protocol(names[0])
        folders += sorted((entry["name"] for entry in entries if entry["type"] == "directory"), reverse=True)
    return None


def _writing_steps(folder: str) -> Iterator[str]:
    """As `_steps`. What was written is gone at the end, and after an error too where the store lets it be deleted."""
    yield "write"
    made = _missing_folders(folder)
    written, put = (join(folder, f"{TRIAL_PREFIX}{uuid.uuid4().hex}") for _ in range(2))
    try:
        write_whole(written, b"whole")
        if read_bytes(written) != b"whole":
            raise _NotKept(errno.EIO, "it reads as something else", written)
        yield "delete"
        delete(written)
        if exists(written):
            raise _NotKept(errno.EIO, "it is still there", written)
        yield "put if absent"
        _put_twice_at_once(put)
    finally:
        for file in (written, put):
            with contextlib.suppress(OSError):
                delete(file)
        for parent in made:
            delete_if_empty(parent)


def _put_twice_at_once(uri: str) -> None:
    """Raises OSError unless one of two writers at the same moment wins, its content stands, and a third one loses."""
    both_ready = threading.Barrier(2)

    def put(content: bytes) -> bool:
        both_ready.wait()
        return put_if_absent(uri, content)

    contents = [b"the first writer", b"the second writer"]
    with ThreadPoolExecutor(2) as pool:
        won = list(pool.map(put, contents))
    if sum(won) != 1 or put_if_absent(uri, b"the third writer") or read_bytes(uri) != contents[won.index(True)]:
        raise _NotKept(errno.EIO, f"{sum(won)} of two writers at once were told that theirs is the file", uri)


def _missing_folders(folder: str) -> list[str]:
    """Returns a local folder and those above it that are not there yet, the lowest first."""
    missing = []
    path = resolve(folder) if is_local(folder) else ""
    while path and not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


def _remedy(error: OSError | ValueError, step: str) -> str:
    """What to do about an error; a ValueError says so itself."""
    if isinstance(error, _NotKept):
        one_job = "run one job at a time on an output there" if step == "put if absent" else "give another --outputs"
        return f"the store does not keep its word: {one_job}"
    match error:
        case ValueError():
            return ""
        case FileNotFoundError() | NotADirectoryError():
            return "check the path, and that this node has it (a bucket, or a disk that all nodes share)"
        case PermissionError():
            return f"give this node's user or role the right to {step} there"
        case OSError(errno=errno.EROFS):
            return "the disk is mounted for reading only; give another --outputs"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return "free some room there"
        case StorageError():
            return "check from this node: endpoint, region, network, and the credentials of its environment or profile"
        case _:
            return "mend that"


def without_credentials(text: str) -> str:
    """Returns a text without the values of this process's variables that name a secret, and without signatures."""
    for name, value in sorted(os.environ.items()):
        if names_secret(name) and len(value) >= 8:
            text = text.replace(value, f"${name}")
    return re.sub(r"(?i)((?:signature|sig|token|key|keyid|secret|password|credential)=)[^&;\s'\"]+", r"\1…", text)

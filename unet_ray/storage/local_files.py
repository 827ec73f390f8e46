"""Files of this machine, written whole or not at all: on the disk under another name, before they get theirs."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import BinaryIO


class NotAFile(OSError):
    """A pipe, a socket or a device where a file is to be read."""


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_regular(status: os.stat_result, path: str) -> None:
    """Raises NotAFile or IsADirectoryError: a pipe would be waited for without end, and a device may never end."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise NotAFile(errno.EINVAL, f"{kind}, not a file", path)


def open_regular(path: str) -> BinaryIO:
    """Opens a file to read; never waits for the other end of a pipe. Raises as `require_regular` does."""
    if "\0" in path:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return _Closing(io.FileIO(path, "rb", opener=_open_unless_pipe))


class _Closing(io.BufferedReader):
    """Closes its file when nobody holds it any more, without a warning: a cache of open files lets them go so."""

    def __del__(self) -> None:
        self.close()


def _open_unless_pipe(path: str, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            require_regular(os.stat(path), path)
        raise
    try:
        require_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


TEMPORARY_PREFIX = ".tmp-"
"""Start of the name of a file that is not yet whole. It has no ending: DuckDB's `*.parquet` finds hidden files, too."""

_TEMPORARY = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}[0-9a-f]{{12}}(-.*)?")
# The file's own name, with its ending, was once behind it.

_TIMES = 4
"""That a file is written before it is an error that its folder or temporary is taken away each time."""


def write_whole(path: str, data: bytes) -> None:
    """Writes a file, replacing what was there."""

    def write() -> None:
        with _temporary(path, data) as temporary:
            os.replace(temporary, path)

    _though_cleared_up(write)


def create(path: str, data: bytes) -> None:
    """Writes a file that is not there yet: by a hard link, which exactly one of many writers wins.

    Raises:
        FileExistsError: it is there.
    """

    def write() -> None:
        with _temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                    raise
                if os.path.exists(path):  # a disk without hard links (FAT, some network mounts)
                    raise FileExistsError(errno.EEXIST, "exists", path) from None
                os.replace(temporary, path)

    _though_cleared_up(write)


def _though_cleared_up(write: Callable[[], None]) -> None:
    """Writes again where another process cleared the folder or the temporary away: a job that ends on this output."""
    for _ in range(_TIMES - 1):
        with contextlib.suppress(FileNotFoundError):
            return write()
    return write()


@contextmanager
def _temporary(path: str, data: bytes) -> Iterator[str]:
    with temporary_beside(path) as file:
        file.write(data)
    try:
        yield file.name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)


@contextmanager
def temporary_beside(path: str) -> Iterator[BinaryIO]:
    """Yields a new file in the folder of `path`, on the disk when the block ends, gone where it fails."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def delete_unfinished(folder: str) -> None:
    """Deletes the temporaries in a folder (not below it): a killed writer's for good, a live one writes its anew."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if _TEMPORARY.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, name))


def delete_tree(folder: str) -> None:
    """Deletes a folder and all that lies below it now; what another process writes there meanwhile stays."""

    def unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for parent, folders, files in os.walk(folder, topdown=False, onerror=unless_gone):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in [*files, *links]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(parent, name))
        try:
            os.rmdir(parent)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise


def why_unwritable(path: str) -> str | None:
    """Returns why a folder cannot be made, or written in where it is there; None where nothing speaks against it."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.exists(path):
        return f"{path} is a link to what is not there"
    if not os.path.isdir(path):
        return f"{path} is a file"
    if os.access(path, os.W_OK | os.X_OK):
        return None
    is_read_only = os.statvfs(path).f_flag & os.ST_RDONLY
    return f"{path} lies on a read-only file system" if is_read_only else f"{path} does not let us write in it"


def first_link(folder: str, names: Collection[str]) -> str | None:
    """Returns a symbolic link among the named entries of a folder and all that lies below them; None without one."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name not in names:
                continue
            if entry.is_symlink():
                return entry.path
            if entry.is_dir(follow_symlinks=False):
                for below, folders, files in os.walk(entry.path):
                    for name in (*folders, *files):
                        if os.path.islink(os.path.join(below, name)):
                            return os.path.join(below, name)
    return None

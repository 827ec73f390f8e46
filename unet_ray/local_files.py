"""Files of this machine, written whole or not at all: on the disk under another name, before they get theirs."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

TEMPORARY_PREFIX = ".tmp-"
"""Start of the name of a file that is not yet whole. The dot hides it from every Parquet reader."""


def write_whole(path: str, data: bytes) -> None:
    """Writes a file, replacing what was there."""
    os.replace(_write_temporary(path, data), path)


def create(path: str, data: bytes) -> None:
    """Writes a file that is not there yet: by a hard link, which exactly one of many writers wins.

    Raises:
        FileExistsError: it is there.
    """
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


def _write_temporary(path: str, data: bytes) -> str:
    with temporary_beside(path) as file:
        file.write(data)
    return file.name


@contextmanager
def temporary_beside(path: str) -> Iterator[BinaryIO]:
    """Yields a new file in the folder of `path`, on the disk when the block ends, gone where it fails."""
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

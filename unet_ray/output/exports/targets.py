"""Where an export goes: a folder at any URI, or one zip file; each file is whole or is not there."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from unet_ray import storage

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every file in a zip, so that the same export gives the same bytes; a zip knows no earlier one."""


class Folder:
    """Files below a folder, of this machine or a store."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def write(self, files: Sequence[tuple[str, bytes]]) -> None:
        """Writes files by their paths below the folder."""
        storage.write_many([(storage.join(self.uri, *path.split("/")), data) for path, data in files])

    @contextmanager
    def pieces(self, path: str) -> Iterator[IO[bytes]]:
        """Opens a file to write piece by piece; it is there when the block has ended."""
        with storage.write_pieces(storage.join(self.uri, *path.split("/"))) as file:
            yield file


class Zip:
    """Members of a zip file that is being written; they are PNGs and JPEGs, so stored as they are."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file

    def write(self, files: Sequence[tuple[str, bytes]]) -> None:
        """Adds members by their paths."""
        for path, data in files:
            self._file.writestr(zipfile.ZipInfo(path, _EPOCH), data)

    @contextmanager
    def pieces(self, path: str) -> Iterator[IO[bytes]]:
        """Opens a member to write piece by piece."""
        with self._file.open(zipfile.ZipInfo(path, _EPOCH), "w", force_zip64=True) as member:
            yield member


Target = Folder | Zip


@contextmanager
def opened_zip(uri: str) -> Iterator[Zip]:
    """Opens a zip file to write; it gets its name when the block has ended, and none if it fails."""
    with storage.write_pieces(uri) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        yield Zip(archive)

"""The frames of a tar: its headers are read by range, and say where each frame's bytes lie."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any, cast

from unet_ray import storage
from unet_ray.archives.members import NO_FILE, Broken, Findings, Member, RangeFile, accept, as_broken

_MAX_HEADER_BYTES = 2**20  # of a tar; its attributes take 24 times as much memory as room

_TAR_PADDING_BYTES = 2**20
"""What is looked at behind the end of a tar, which is padded to 10 KB, or to what `tar --blocking-factor` says."""


def list_tar(file: storage.FileInfo, findings: Findings) -> Iterator[Member]:
    """Yields the frames of a tar. Raises Broken where it cannot be read to its end."""
    source = RangeFile(file.uri, file.size_bytes, _MAX_HEADER_BYTES)
    with as_broken(), tarfile.open(fileobj=cast(Any, source), mode="r:") as tar:
        before = -1
        while (entry := _next_entry(tar)) is not None:
            if entry.offset_data <= before or entry.size < 0:
                raise Broken(f"its headers lead in a circle at byte {before:,}")
            before = entry.offset_data
            if entry.isdir():
                continue
            is_file = entry.isreg() and not entry.issparse()
            path = accept(entry.name, None if is_file else NO_FILE, file, findings)
            if path is not None and entry.offset_data + entry.size <= file.size_bytes:
                yield Member(path, entry.offset_data, entry.size)
        _require_end(source, cast(int, cast(Any, tar).offset))


def _require_end(source: RangeFile, end: int) -> None:
    """tarfile takes a header that is damaged, cut short or lost for the end: behind the true one are zeros alone."""
    source.seek(end)
    block, rest = source.read(tarfile.BLOCKSIZE), source.read(_TAR_PADDING_BYTES)
    if block != bytes(tarfile.BLOCKSIZE):
        raise Broken(f"ends early, at byte {end:,}")
    if rest != bytes(len(rest)):
        raise Broken(f"goes on behind its end at byte {end:,}: a header is lost, or several tars were put together")


def _next_entry(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    entry = tar.next()
    cast(Any, tar).members = []  # it keeps every header that it has met: 1 KB a frame
    return entry

"""Frame references to bytes, never those of another version than was listed, in little memory.

>>> for content in read_frames(rows): ...    # rows of the manifest to bytes, or FrameGone
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import pyarrow as pa

from unet_ray import storage
from unet_ray.archives import members
from unet_ray.archives.parquet import ParquetImages
from unet_ray.archives.parquet_files import open_parquet
from unet_ray.archives.zip import unpack_zip_member, zip_span
from unet_ray.frames import read_roots

_WINDOW_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True)
class FrameGone:
    """A frame whose bytes are not those that were listed."""

    reason: str
    """`missing`, `changed`, `truncated` or `too_large`."""
    error: str


_Content = bytes | OSError | members.BadMember
"""What a store answers."""


def read_frames(rows: pa.Table) -> Iterator[bytes | FrameGone]:
    """Reads the frames of manifest rows, many requests in flight, and never what is not as it was listed.

    On S3 the request names the version. Elsewhere a file is looked at once more after it was read: if its version is
    the listed one then, it was so before, too. The look costs one request a file (a tar with a thousand frames is one).
    What is read ahead is bounded: 128 MB as the frames lie there, of which one at a time is unpacked.

    A local file that is not there is `missing` only where this machine sees the archive at all: the folder that was
    given to `--frames`, or in which that file or glob lies, is there and is not empty, as the place of a disk is that
    is not mounted. (The same command, given again, refuses such a folder, too.) Of a catalogue's frame that lies
    elsewhere, and in a plan of an older version, it is the frame's own folder that must be there.

    Yields:
        In the order of the rows: the frame's file, or why its bytes are not those that were listed.

    Raises:
        StorageError: the store did not answer, or this machine does not see the archive; never a row.
    """
    roots = read_roots(rows)
    columns = rows.select(["uri", "kind", "offset_bytes", "size_bytes", "column", "row", "version"])
    refs = [_Reference(*row) for row in zip(*(column.to_pylist() for column in columns.columns), strict=True)]
    for ref, content in zip(refs, _read_listed(refs), strict=True):
        if isinstance(content, FrameGone) and content.reason == "missing" and ref.version:
            _require_seen(ref.uri, roots)
        yield content


def _require_seen(uri: str, roots: Sequence[str]) -> None:
    """Raises StorageError where this machine does not see the archive that a local file was listed in."""
    if not storage.is_local(uri):
        return
    root = next((root for root in roots if uri.startswith(storage.join(root, ""))), None)
    folder = os.path.dirname(uri) if root is None else root
    with suppress(OSError), os.scandir(folder) as entries:
        if root is None or any(entries):
            return
    raise storage.StorageError(
        errno.ENXIO,
        f"{os.uname().nodename} does not see {folder}, where it was listed, or sees it empty; mount that folder at the "
        "same place on each machine, or give a URI that all of them reach",
        uri,
    )


def _read_listed(refs: Sequence[_Reference]) -> Iterator[bytes | FrameGone]:
    for (uri, column), group in groupby(refs, lambda ref: (ref.uri, ref.column) if ref.column else (None, None)):
        if uri is None or column is None:
            yield from _read_windows(list(group), lambda ref: ref.size_bytes or 0, _read_spans)
        else:
            yield from _read_parquet(uri, column, list(group))


def _read_windows(
    refs: Sequence[_Reference],
    size_bytes: Callable[[_Reference], int],
    read: Callable[[Sequence[_Reference]], Sequence[_Content]],
) -> Iterator[bytes | FrameGone]:
    """Reads frames so many at once that they fill a window of the memory; `read` may answer for the first of them."""
    begin = 0
    while begin < len(refs):
        end, filled = begin, 0
        while end < len(refs) and (end == begin or filled + size_bytes(refs[end]) <= _WINDOW_BYTES):
            filled += size_bytes(refs[end])
            end += 1
        contents = read(refs[begin:end])
        window = refs[begin : begin + len(contents)]
        begin += len(window)
        seen = storage.versions({ref.uri for ref in window if not ref.is_read_by_version})
        for ref, content in zip(window, contents, strict=True):
            yield _checked(ref, content, seen.get(ref.uri, ref.version))


class _Reference(NamedTuple):
    """Where a frame's bytes are."""

    uri: str
    kind: str
    offset_bytes: int
    size_bytes: int | None
    column: str | None
    row: int | None
    version: str

    @property
    def is_read_by_version(self) -> bool:
        return self.is_span and bool(self.version) and storage.can_read_versions(self.uri)

    @property
    def is_span(self) -> bool:
        """Whether its bytes are read as they lie in the file; of an empty or too large one none are."""
        return self.row is None and 0 < (self.size_bytes or 0) <= members.MAX_FRAME_BYTES


def _read_spans(refs: Sequence[_Reference]) -> Sequence[_Content]:
    """Reads what is stored of each frame, or the error of that; of what is too large, nothing."""
    contents: list[_Content] = [b""] * len(refs)
    spans: dict[int, tuple[str, int, int]] = {}
    for index, ref in enumerate(refs):
        if ref.is_span and ref.size_bytes:
            span = zip_span(ref.offset_bytes, ref.size_bytes)
            spans[index] = (ref.uri, *(span if ref.kind == "zip" else (ref.offset_bytes, ref.size_bytes)))
    if spans:
        versions = [refs[index].version if refs[index].is_read_by_version else None for index in spans]
        for index, content in zip(spans, storage.read_many(list(spans.values()), versions), strict=True):
            contents[index] = content
    return contents


def _read_parquet(uri: str, column: str, refs: Sequence[_Reference]) -> Iterator[bytes | FrameGone]:
    with ExitStack() as open_files:
        try:
            images = ParquetImages(open_files.enter_context(open_parquet(uri)), column)
        except (OSError, pa.ArrowException) as error:
            failed = _parquet_trouble(uri, error)
            yield from _read_windows(refs, lambda ref: 0, lambda window: [failed] * len(window))
            return

        def read(window: Sequence[_Reference]) -> Sequence[_Content]:
            try:
                contents = images.read([ref.row or 0 for ref in window])
            except (OSError, pa.ArrowException) as error:
                return [_parquet_trouble(uri, error)] * len(window)
            return [content or b"" for content in contents]

        yield from _read_windows(refs, lambda ref: images.row_bytes(ref.row or 0), read)


def _parquet_trouble(uri: str, error: OSError | pa.ArrowException) -> OSError:
    """It was readable when it was listed: changed (which the look says), or trouble."""
    if isinstance(error, OSError):
        return error
    return storage.StorageError(errno.EIO, f"{' '.join(str(error).split())}; trying again may help", uri)


def _checked(ref: _Reference, content: _Content, version_now: str | None) -> bytes | FrameGone:
    uri, size = ref.uri, ref.size_bytes
    if version_now is None or isinstance(content, FileNotFoundError):
        return FrameGone("missing", f"{uri} is gone since it was listed" if ref.version else f"{uri} is not there")
    if not version_now and not ref.version:
        return FrameGone("not_an_image", f"{uri} is a folder, a pipe, a socket or a device, not a file")
    if version_now != ref.version or isinstance(content, storage.FileChanged):
        return FrameGone("changed", f"{uri} has changed since it was listed")
    if isinstance(content, members.BadMember):
        return FrameGone(content.reason, str(content))
    if isinstance(content, OSError):
        raise content
    size = len(content) if size is None else size
    if size > members.MAX_FRAME_BYTES:
        return FrameGone("too_large", f"the frame has {size:,} bytes; at most {members.MAX_FRAME_BYTES:,} are read")
    if len(content) < size:
        # The file is the listed one, so it was the answer that was cut short.
        raise storage.StorageError(errno.EIO, f"{len(content):,} of {size:,} bytes came; trying again may help", uri)
    if ref.kind != "zip" or not size:
        return content
    try:
        return unpack_zip_member(uri, content, ref.offset_bytes, size)
    except members.BadMember as error:
        return FrameGone(error.reason, str(error))

"""The frames of a zip: its directory says where each lies; a member is inflated when it is read."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, cast

from unet_ray import storage
from unet_ray.archives.members import (
    MAX_FRAME_BYTES,
    NO_FILE,
    BadMember,
    Broken,
    Findings,
    Member,
    RangeFile,
    accept,
    as_broken,
)
from unet_ray.frames import is_frame

_MAX_DIRECTORY_BYTES = 100 * 2**20  # of a zip, which is 1,000,000 members with 55 letters each
_MAX_ZIP_MEMBERS = 1_000_000  # of which zipfile holds 456 bytes each; 990,000 are listed in 0.6 GB (2026-11-22)

_ZIP_LOCAL_HEADER = struct.Struct("<4s4xH16xHH")  # magic, method, sizes of name and extra field (APPNOTE.TXT 4.3.7)
_ZIP_DIRECTORY_ENTRY = b"PK\1\2"
_ZIP_NAMES_BYTES = 1024  # read along with a member, so that name and extra field seldom cost a second request


class _ZipFile(RangeFile):
    """A zip's directory is read whole, and counted before zipfile makes an object of each member."""

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        if (n_members := data.count(_ZIP_DIRECTORY_ENTRY)) > _MAX_ZIP_MEMBERS:
            raise Broken(f"holds {n_members:,} members; at most {_MAX_ZIP_MEMBERS:,} are read, make several zips of it")
        return data


def list_zip(file: storage.FileInfo, findings: Findings) -> Iterator[Member]:
    """Yields the frames of a zip. Raises Broken where its directory is damaged."""
    source = _ZipFile(file.uri, file.size_bytes, _MAX_DIRECTORY_BYTES)
    with as_broken(), zipfile.ZipFile(cast(Any, source)) as archive:
        entries = archive.infolist()
        entries.reverse()
        archive.NameToInfo.clear()
        while entries:  # an entry is let go when its row is made
            entry = entries.pop()
            if entry.is_dir():
                continue
            path = accept(entry.filename, _why_refused_zip(entry), file, findings)
            if path is None:
                continue
            if entry.header_offset < 0 or entry.header_offset + entry.compress_size > file.size_bytes:
                raise Broken(f"{path} lies outside of the file")
            yield Member(path, entry.header_offset, entry.compress_size)


def _why_refused_zip(entry: zipfile.ZipInfo) -> str | None:
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
        return NO_FILE
    if not is_frame(entry.filename):
        return None
    if entry.flag_bits & 1:
        return "encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compressed by method {entry.compress_type}; stored and deflated are read"
    return None


def zip_span(offset_bytes: int, size_bytes: int) -> tuple[int, int]:
    """Returns offset and size of the range that (nearly always) holds a zip member's header and bytes."""
    return offset_bytes, size_bytes + _ZIP_LOCAL_HEADER.size + _ZIP_NAMES_BYTES


def unpack_zip_member(uri: str, span: bytes, offset_bytes: int, size_bytes: int) -> bytes:
    """Returns a zip member's content.

    Args:
        uri: the zip.
        span: what `zip_span` reads.
        offset_bytes: where the member's local header lies.
        size_bytes: size of its bytes as they lie in the zip.

    Raises:
        BadMember: `truncated` or `too_large`.
        StorageError: the store did not answer.
    """
    magic, method, n_name, n_extra = _ZIP_LOCAL_HEADER.unpack_from(span.ljust(_ZIP_LOCAL_HEADER.size, b"\0"))
    if magic != b"PK\3\4":
        raise BadMember("truncated", f"{uri}: no local header where the zip's directory says")
    begin = _ZIP_LOCAL_HEADER.size + n_name + n_extra
    data = span[begin : begin + size_bytes]
    if len(data) < size_bytes:
        data = storage.read_bytes(uri, offset_bytes + begin, size_bytes)
    if method == zipfile.ZIP_STORED:
        return data
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflater.decompress(data, MAX_FRAME_BYTES)
    except zlib.error as error:
        raise BadMember("truncated", f"{uri}: {error}") from error
    if inflater.unconsumed_tail:
        raise BadMember("too_large", f"the zip's member inflates to more than {MAX_FRAME_BYTES:,} bytes")
    return content

"""The frames of a zip: its directory says where each lies; a member is inflated when it is read."""

from __future__ import annotations

import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from unet_ray import storage
from unet_ray.archives.members import (
    LEAVES,
    LINK,
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

# Magic, flags, method, checksum, sizes packed and unpacked, lengths of name and extra field (APPNOTE.TXT 4.3.7).
_ZIP_LOCAL_HEADER = struct.Struct("<4s2xHH4xIIIHH")
_ZIP_DESCRIPTOR = b"PK\7\x08"  # may begin what follows a member's data where its header leaves sum and sizes open
_SUM_FOLLOWS = 8  # flag
_ZIP64_FIELD = 1
_IN_ZIP64 = 0xFFFFFFFF
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
            if entry.is_dir() or findings.hides(_path(entry)):
                continue
            if stat.S_ISLNK(entry.external_attr >> 16) and not is_frame(_path(entry)):
                findings.ignored[LINK] += 1
                continue
            path = accept(_path(entry), _why_refused_zip(entry), file, findings, entry.orig_filename)
            if path is None:
                continue
            if entry.header_offset < 0 or entry.header_offset + entry.compress_size > file.size_bytes:
                raise Broken(f"{path} lies outside of the file")
            yield Member(path, entry.header_offset, entry.compress_size)


def _path(entry: zipfile.ZipInfo) -> str:
    """The member's path. Programs of Windows write `\\` for `/`; zipfile cuts a name at NUL, which may hide its end."""
    return entry.orig_filename.replace("\\", "/")


def _why_refused_zip(entry: zipfile.ZipInfo) -> str | None:
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
        return NO_FILE
    if not is_frame(_path(entry)):
        return None
    if re.match(r"[A-Za-z]:/", _path(entry)):
        return LEAVES
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
    header = _LocalHeader(*_ZIP_LOCAL_HEADER.unpack_from(span.ljust(_ZIP_LOCAL_HEADER.size, b"\0")))
    if header.magic != b"PK\3\4":
        raise BadMember("truncated", f"{uri}: no local header where the zip's directory says")
    begin = _ZIP_LOCAL_HEADER.size + header.n_name + header.n_extra
    behind = _ZIP64_DESCRIPTOR_BYTES if header.flags & _SUM_FOLLOWS else 0
    data = span[begin : begin + size_bytes + behind]
    if len(data) < size_bytes + behind:
        extra_at = _ZIP_LOCAL_HEADER.size + header.n_name
        read = storage.read_bytes(uri, offset_bytes + extra_at, header.n_extra + size_bytes + behind)
        span, data = span[:extra_at] + read, read[header.n_extra :]
    data, descriptor = data[:size_bytes], data[size_bytes:]
    content = data if header.method == zipfile.ZIP_STORED else _inflate(uri, data)
    extra = span[begin - header.n_extra : begin]
    if not _agrees(content, size_bytes, header, extra, descriptor):
        raise BadMember("truncated", f"{uri}: the zip's sum or size of the member does not agree with its bytes")
    return content


_ZIP64_DESCRIPTOR_BYTES = 24


class _LocalHeader(NamedTuple):
    """What stands before a member's bytes."""

    magic: bytes
    flags: int
    method: int
    crc: int
    n_packed: int
    n_unpacked: int
    n_name: int
    n_extra: int


def _inflate(uri: str, data: bytes) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflater.decompress(data, MAX_FRAME_BYTES)
    except zlib.error as error:
        raise BadMember("truncated", f"{uri}: {error}") from error
    if inflater.unconsumed_tail or (not inflater.eof and len(content) >= MAX_FRAME_BYTES):
        raise BadMember("too_large", f"the zip's member inflates to more than {MAX_FRAME_BYTES:,} bytes")
    if not inflater.eof:
        raise BadMember("truncated", f"{uri}: the zip's member ends before its end")
    return content


def _agrees(content: bytes, n_packed: int, header: _LocalHeader, extra: bytes, descriptor: bytes) -> bool:
    """Whether a member's bytes have the sum and the sizes that stand before them, or behind."""
    true = (zlib.crc32(content), n_packed, len(content))
    if (header.crc, *_sizes(header, extra)) == true:
        return True
    if not header.flags & _SUM_FOLLOWS:
        return False
    starts = [len(_ZIP_DESCRIPTOR)] * descriptor.startswith(_ZIP_DESCRIPTOR) + [0]
    layouts = (struct.Struct("<III"), struct.Struct("<IQQ"))
    padded = descriptor.ljust(_ZIP64_DESCRIPTOR_BYTES, b"\0")
    return any(layout.unpack_from(padded, start) == true for start in starts for layout in layouts)


def _sizes(header: _LocalHeader, extra: bytes) -> tuple[int, int]:
    """Packed and unpacked size, which a header may leave to its extra field (APPNOTE.TXT 4.5.3)."""
    large = iter(())
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == _ZIP64_FIELD:
            large = iter(struct.unpack_from(f"<{min(length, len(extra) - 4) // 8}Q", extra, 4))
            break
        extra = extra[4 + length :]
    unpacked = next(large, -1) if header.n_unpacked == _IN_ZIP64 else header.n_unpacked
    packed = next(large, -1) if header.n_packed == _IN_ZIP64 else header.n_packed
    return packed, unpacked

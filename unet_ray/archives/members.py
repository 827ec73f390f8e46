"""What lies in one tar, zip or Parquet file: its frames' names and places, and their bytes out of the last two.

Nothing is unpacked: a lister reads headers by range and says where each frame's bytes are. What a hostile archive may
try ends in `Findings.unlistable`, by name: members with `..` or an absolute path, links, devices, names or directories
made to fill the memory, sizes that lead in circles.
"""

from __future__ import annotations

import posixpath
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, cast

import pyarrow as pa

from unet_ray import storage
from unet_ray.archives.parquet_files import Allowance, ParquetRows, TooMuch, is_plain, open_parquet
from unet_ray.frames import extension, is_frame

ARCHIVE_EXTENSIONS = (".tar", ".zip", ".parquet")
"""What is looked into, in a folder too."""

MAX_FRAME_BYTES = 256 * 2**20
"""A frame whose encoded bytes are more is never read, and a zip's member never inflated to more (`too_large`)."""

_COMPRESSED_TAR = re.compile(r"(?i)\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4))$")
_MAX_HEADER_BYTES = 2**20  # of a tar; its attributes take 24 times as much memory as room
_MAX_DIRECTORY_BYTES = 100 * 2**20  # of a zip, which is 1,000,000 members with 55 letters each
_MAX_ZIP_MEMBERS = 1_000_000  # of which zipfile holds 456 bytes each; 990,000 are listed in 0.6 GB (2026-11-22)
MAX_NAME_BYTES = 4096  # as Linux has it
_MAX_REFUSED = 1_000  # members, which are named each
_READ_AHEAD_BYTES = 128 * 2**10  # one request a tar header where frames are larger, several headers where smaller
_ZIP_LOCAL_HEADER = struct.Struct("<4s4xH16xHH")  # magic, method, sizes of name and extra field (APPNOTE.TXT 4.3.7)
_ZIP_DIRECTORY_ENTRY = b"PK\1\2"
_ZIP_NAMES_BYTES = 1024  # read along with a member, so that name and extra field seldom cost a second request
_PIECE_BYTES = 64 * 2**20  # of a Parquet file's images, unpacked at once
_NAMES_AT_ONCE = 256
_LEAVES = "a name that leaves the archive"
_NO_FILE = "a link, device or sparse file"


class Member(NamedTuple):
    """A frame in an archive, in the order of the manifest's columns."""

    path: str
    """Path within the archive."""
    offset_bytes: int | None = None
    size_bytes: int | None = None
    column: str | None = None
    row: int | None = None


@dataclass
class Findings:
    """What a lister met and did not list."""

    ignored: Counter[str] = field(default_factory=Counter)
    unlistable: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Takes over another lister's findings."""
        self.ignored.update(other.ignored)
        self.unlistable += other.unlistable

    def ignore(self, path: str) -> None:
        """Counts a file that is no frame."""
        self.ignored[extension(path) or "no extension"] += 1

    def refuse(self, uri: str, why: str) -> None:
        """Names what cannot be listed; a name that is not UTF-8 is shown with escapes."""
        self.unlistable.append((uri if is_utf8(uri) else ascii(uri)[1:-1], why))


class BadMember(ValueError):
    """A member whose bytes are not what the archive's directory says; `reason` as in `rows.REASONS`."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class _Broken(ValueError):
    """An archive whose listing cannot go on; the message says where."""


def is_archive(path: str) -> bool:
    """Whether a file is looked into by its name."""
    return extension(path) in ARCHIVE_EXTENSIONS


def why_unreadable(path: str) -> str | None:
    """Returns why an archive cannot be read by range and what to do, None where it can."""
    if _COMPRESSED_TAR.search(path) is None:
        return None
    return "a compressed tar cannot be read by range; unpack it, or pack it again as a plain .tar"


def is_utf8(text: str) -> bool:
    """Whether a name is text; bytes that are none come as lone surrogates from the file system and from tarfile."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


class _RangeFile:
    """A seekable file that is read by ranges with little read-ahead, and refuses reads made to fill the memory."""

    def __init__(self, uri: str, size_bytes: int, max_read_bytes: int):
        self._uri, self._size, self._at = uri, size_bytes, 0
        self._max_read_bytes = max_read_bytes
        self._window, self._window_at = b"", 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        place = offset + (0, self._at, self._size)[whence]
        if place < 0:
            raise _Broken(f"a header points to byte {place}")
        self._at = place
        return place

    def read(self, size: int = -1) -> bytes:
        n_bytes = max(0, min(self._size - self._at, self._size if size is None or size < 0 else size))
        if n_bytes > self._max_read_bytes:
            most = f"at most {self._max_read_bytes:,} are read"
            raise _Broken(f"headers of {n_bytes:,} bytes at byte {self._at:,}; {most}")
        begin = self._at - self._window_at
        if not 0 <= begin <= begin + n_bytes <= len(self._window):
            length = min(max(n_bytes, _READ_AHEAD_BYTES), self._size - self._at)
            self._window = storage.read_bytes(self._uri, self._at, length) if length > 0 else b""
            self._window_at, begin = self._at, 0
        data = self._window[begin : begin + n_bytes]
        self._at += len(data)
        return data


def list_members(file: storage.FileInfo, findings: Findings, image_column: str | None) -> Iterator[Member]:
    """Yields the frames of a tar, zip or Parquet file; what is not one goes to `findings`.

    Args:
        file: the archive.
        findings: where ignored members are counted, and what cannot be listed is named.
        image_column: the column of images in a Parquet file, None where it is to be found.

    Raises:
        StorageError: the store did not answer.
    """
    listers = {".tar": _list_tar, ".zip": _list_zip}
    lister = listers.get(extension(file.uri))
    try:
        if lister is None:
            yield from _list_parquet(file, findings, image_column)
        else:
            yield from lister(file, findings)
        if storage.info(file.uri).version != file.version:
            raise _Broken("changed while it was listed")
    except (_Broken, tarfile.TarError, zipfile.BadZipFile, pa.ArrowException, TooMuch) as error:
        findings.refuse(file.uri, " ".join(str(error).split()) or "damaged")
    except FileNotFoundError:
        findings.refuse(file.uri, "vanished while it was listed")


def _why_refused_name(path: str) -> str | None:
    if not is_utf8(path) or "\0" in path:
        return "a name that is not UTF-8"
    if len(path) > MAX_NAME_BYTES:
        return f"a name of more than {MAX_NAME_BYTES:,} letters"
    parts = path.replace("\\", "/").split("/")
    return _LEAVES if not parts[0] or ".." in parts or re.match(r"[A-Za-z]:", path) else None


def _accept(path: str, refused: str | None, file: storage.FileInfo, findings: Findings) -> str | None:
    """Returns the plainest form of a member's path where it is a frame; counts or names what is none."""
    refused = _why_refused_name(path) or refused
    if refused is not None:
        if len(findings.unlistable) == _MAX_REFUSED:
            raise _Broken(f"has more than {_MAX_REFUSED:,} members that cannot be listed")
        findings.refuse(f"{file.uri}!{path[:MAX_NAME_BYTES]}", refused)
    elif not is_frame(path):
        findings.ignore(path)
    else:
        return posixpath.normpath(path)  # `tar cf log.tar .` writes ./cam0/1.png
    return None


_TAR_PADDING_BYTES = 2**20
"""What is looked at behind the end of a tar, which is padded to 10 KB, or to what `tar --blocking-factor` says."""


def _list_tar(file: storage.FileInfo, findings: Findings) -> Iterator[Member]:
    source = _RangeFile(file.uri, file.size_bytes, _MAX_HEADER_BYTES)
    with _as_broken(), tarfile.open(fileobj=cast(Any, source), mode="r:") as tar:
        before = -1
        while (entry := _next_entry(tar)) is not None:
            if entry.offset_data <= before or entry.size < 0:
                raise _Broken(f"its headers lead in a circle at byte {before:,}")
            before = entry.offset_data
            if entry.isdir():
                continue
            is_file = entry.isreg() and not entry.issparse()
            path = _accept(entry.name, None if is_file else _NO_FILE, file, findings)
            if path is not None and entry.offset_data + entry.size <= file.size_bytes:
                yield Member(path, entry.offset_data, entry.size)
        _require_end(source, cast(int, cast(Any, tar).offset))


def _require_end(source: _RangeFile, end: int) -> None:
    """tarfile takes a header that is damaged, cut short or lost for the end: behind the true one are zeros alone."""
    source.seek(end)
    block, rest = source.read(tarfile.BLOCKSIZE), source.read(_TAR_PADDING_BYTES)
    if block != bytes(tarfile.BLOCKSIZE):
        raise _Broken(f"ends early, at byte {end:,}")
    if rest != bytes(len(rest)):
        raise _Broken(f"goes on behind its end at byte {end:,}: a header is lost, or several tars were put together")


def _next_entry(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    entry = tar.next()
    cast(Any, tar).members = []  # it keeps every header that it has met: 1 KB a frame
    return entry


@contextmanager
def _as_broken() -> Iterator[None]:
    """The ways in which tarfile and zipfile stumble over damaged headers, besides their own errors."""
    try:
        yield
    except _Broken:
        raise
    except (ValueError, OverflowError, EOFError, RecursionError, struct.error, NotImplementedError) as error:
        raise _Broken(f"has a damaged header: {error}") from error


class _ZipFile(_RangeFile):
    """A zip's directory is read whole, and counted before zipfile makes an object of each member."""

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        if (n_members := data.count(_ZIP_DIRECTORY_ENTRY)) > _MAX_ZIP_MEMBERS:
            raise _Broken(
                f"holds {n_members:,} members; at most {_MAX_ZIP_MEMBERS:,} are read, make several zips of it"
            )
        return data


def _list_zip(file: storage.FileInfo, findings: Findings) -> Iterator[Member]:
    source = _ZipFile(file.uri, file.size_bytes, _MAX_DIRECTORY_BYTES)
    with _as_broken(), zipfile.ZipFile(cast(Any, source)) as archive:
        entries = archive.infolist()
        entries.reverse()
        archive.NameToInfo.clear()
        while entries:  # an entry is let go when its row is made
            entry = entries.pop()
            if entry.is_dir():
                continue
            path = _accept(entry.filename, _why_refused_zip(entry), file, findings)
            if path is None:
                continue
            if entry.header_offset < 0 or entry.header_offset + entry.compress_size > file.size_bytes:
                raise _Broken(f"{path} lies outside of the file")
            yield Member(path, entry.header_offset, entry.compress_size)


def _why_refused_zip(entry: zipfile.ZipInfo) -> str | None:
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
        return _NO_FILE
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


def find_image_column(schema: pa.Schema, name: str | None) -> str | None:
    """Returns the path of the column that holds encoded images: `image`, or `image.bytes` as Hugging Face writes it.

    Without a name: the column `image`, else the only struct with a field `bytes`; None where there is none.
    """

    def path(column: pa.Field) -> str | None:
        if not is_plain(column.type):
            return None
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            return column.name
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            return f"{column.name}.bytes"
        return None

    if name is not None or "image" in schema.names:
        wanted = name or "image"
        return path(schema.field(wanted)) if wanted in schema.names else None
    structs = [found for column in schema if pa.types.is_struct(column.type) and (found := path(column))]
    return structs[0] if len(structs) == 1 else None


def _list_parquet(file: storage.FileInfo, findings: Findings, image_column: str | None) -> Iterator[Member]:
    """Yields one frame a row of a Parquet file with encoded images; a file without them is ignored and counted.

    A frame's path is the image's own where every row has one, none is too long and no two are the same, else the row's
    number.
    """
    with open_parquet(file.uri, as_dictionaries=True) as parquet:
        column = find_image_column(parquet.schema, image_column)
        if column is None:
            findings.ignored[".parquet without images"] += 1
            return
        n_rows = sum(parquet.rows_of_groups)
        Allowance().take(n_rows, 0)
        folder, dot, _ = column.rpartition(".")
        has_paths = bool(dot) and parquet.schema.field(folder).type.get_field_index("path") >= 0
        if has_paths and _all_differ(_paths(parquet, f"{folder}.path", file)):
            for row, path in enumerate(_paths(parquet, f"{folder}.path", file)):
                yield Member(path, column=column, row=row)
        else:
            for row in range(n_rows):
                yield Member(f"{row:06d}", column=column, row=row)


def _paths(parquet: ParquetRows, column: str, file: storage.FileInfo) -> Iterator[Any]:
    for piece in parquet.pieces(Allowance(), _NAMES_AT_ONCE, column, n_times=4):
        yield from piece.column(0).field("path").to_pylist()


def _all_differ(paths: Iterable[Any]) -> bool:
    seen: set[str] = set()
    for path in paths:
        if not path or len(path) > MAX_NAME_BYTES or path in seen:
            return False
        seen.add(path)
    return True


class ParquetImages:
    """The column of encoded images of an open Parquet file."""

    def __init__(self, parquet: ParquetRows, column: str) -> None:
        self._parquet, self._column = parquet, column
        self._ends = list(accumulate(parquet.rows_of_groups))

    def _group(self, row: int) -> int:
        return bisect_right(self._ends, row)

    def row_bytes(self, row: int) -> int:
        """Returns the size of an image, by the mean of its row group; 0 for one that is not read."""
        group = self._group(row)
        if self._parquet.why_too_much(group, self._column) is not None:
            return 0
        return self._parquet.packed_and_unpacked(group, self._column)[1] // self._parquet.rows_of_groups[group]

    def read(self, rows: Sequence[int]) -> list[bytes | BadMember | None]:
        """Returns the images of the first of some rows: of all, unless they turn out to be much larger than the mean.

        Each row group that holds one is read once, piece by piece.
        """
        while (found := self._read(rows)) is None:
            rows = rows[: len(rows) // 2]
        return [found[row] for row in rows]

    def _read(self, rows: Sequence[int]) -> dict[int, bytes | BadMember | None] | None:
        """Returns the images by their rows, None where several are too much for the memory together."""
        found: dict[int, bytes | BadMember | None] = {}
        of_group: dict[int, set[int]] = {}
        for row in rows:
            of_group.setdefault(self._group(row), set()).add(row)
        n_bytes = 0
        for group, wanted in of_group.items():
            if (why := self._parquet.why_too_much(group, self._column)) is not None:
                found |= dict.fromkeys(wanted, BadMember("too_large", why))
                continue
            try:
                for row, image in self._images(group, wanted):
                    n_bytes += image.size if image else 0
                    if n_bytes > 2 * _PIECE_BYTES and len(rows) > 1:
                        return None
                    found[row] = _bytes(image)
            except (pa.ArrowException, TooMuch) as error:
                reason = "too_large" if isinstance(error, TooMuch) else "truncated"
                damaged = BadMember(reason, " ".join(str(error).split()))
                found |= dict.fromkeys(wanted - found.keys(), damaged)
        return found

    def _images(self, group: int, wanted: set[int]) -> Iterator[tuple[int, pa.Buffer | None]]:
        row = self._ends[group] - self._parquet.rows_of_groups[group]
        most_rows = max(1, min(16, _PIECE_BYTES // max(1, self.row_bytes(row))))
        for batch in self._parquet.batches(group, most_rows, self._column):
            values = batch.column(0)
            values = values.field("bytes") if pa.types.is_struct(values.type) else values
            for place in range(len(values)):
                if row + place in wanted:
                    yield row + place, values[place].as_buffer()
            row += len(values)
            if row > max(wanted):
                return


def _bytes(image: pa.Buffer | None) -> bytes | BadMember | None:
    if image is not None and image.size > MAX_FRAME_BYTES:
        return BadMember("too_large", f"the frame has {image.size:,} bytes; at most {MAX_FRAME_BYTES:,} are read")
    return None if image is None else image.to_pybytes()

"""An archive of frames (folders, tar, zip) to frame references, and references to bytes: no pixels.

>>> listing = list_archives(["drives/", "more.tar"], path_pattern=None)
>>> listing.table.slice(0, 96)            # MANIFEST_SCHEMA, in the order of the output
>>> for data in read_frames(rows): ...    # bytes, or FrameGone

Everything below a root is accounted for: listed (a row of the table), ignored (counted by extension: what has no
image extension), or unlistable (an unreadable folder, a tar that ends early), which fails the job.
"""

from __future__ import annotations

import posixpath
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from unet_ray import storage

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""What is listed; compared without regard to case."""

MANIFEST_SCHEMA = pa.schema(
    [
        ("frame_id", pa.string()),
        ("uri", pa.string()),
        ("kind", pa.string()),  # file, tar, zip
        ("offset_bytes", pa.int64()),  # of the member's data (zip: of its local header); 0 for a file
        ("size_bytes", pa.int64()),  # of the data as it is stored
        ("version", pa.string()),  # of the file or archive, as `storage.FileInfo.version`
        ("sequence", pa.string()),
        ("camera", pa.string()),
        ("frame_index", pa.int64()),
        ("timestamp_ns", pa.int64()),
    ]
)

MAX_FRAME_BYTES = 256 * 2**20
"""A frame's file may have so many bytes; a member of a zip that would inflate to more is a bomb."""

_ARCHIVES = (".tar", ".zip")
_UNSEEKABLE = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_ROWS_A_BATCH = 50_000
_LOCAL_HEADER_BYTES = 30  # of a zip member, before its name and extra field (APPNOTE.TXT 4.3.7)
_EXTRA_SLACK_BYTES = 256  # a member's local extra field may be longer than the directory's


class PathFields(NamedTuple):
    """What a relative path says of a frame."""

    sequence: str
    camera: str
    frame_index: int | None
    timestamp_ns: int | None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What lies in the archives."""

    table: pa.Table
    """One row a frame, `MANIFEST_SCHEMA`, sorted by sequence, camera and name (frame 2 before frame 10)."""
    ignored: dict[str, int]
    """Files with other extensions, counted by extension."""
    unlistable: tuple[tuple[str, str], ...]
    """URI and reason of what could not be listed."""


@dataclass(frozen=True, slots=True)
class FrameGone:
    """A frame whose bytes are not those that were listed."""

    reason: str
    """`missing`, `changed`, `truncated` or `too_large`."""
    error: str


# --- names ---


def natural_key(text: str) -> str:
    """Returns a key by which frame 2 sorts before frame 10: numbers padded with zeros, the text itself on a tie."""
    return re.sub(r"\d+", lambda number: number[0].lstrip("0").zfill(20), text) + "\0" + text


def parse_path(relative_path: str, pattern: str | None) -> PathFields:
    """Returns what a path says: by the named groups of `--path-pattern`, else by the default rule.

    The default: the sequence is the folder (`drive07.tar!cam0` inside a tar), there is no camera, the frame's index is
    the last number in its name. A path that the pattern does not match says nothing: its drive has no name.

    Raises:
        ValueError: a group that means a number has none.
    """
    folder, stem = _split(relative_path)
    groups: dict[str, str | None] = {}
    if pattern is not None:
        match = _compiled(pattern).search(relative_path)
        if match is None:
            return PathFields("", "", None, None)
        groups = match.groupdict()
    index = groups["frame_index"] if "frame_index" in groups else _last_number(stem)
    return PathFields(
        groups.get("sequence") or ("" if "sequence" in groups else folder),
        groups.get("camera") or "",
        _number(index, "frame_index", relative_path),
        _number(groups.get("timestamp_ns"), "timestamp_ns", relative_path),
    )


def _split(relative_path: str) -> tuple[str, str]:
    """`a.tar!b/c1.png` to `a.tar!b` and `c1`."""
    cut = max(relative_path.rfind("/"), relative_path.rfind("!"))
    return relative_path[: max(cut, 0)], posixpath.splitext(relative_path[cut + 1 :])[0]


def _last_number(stem: str) -> str | None:
    numbers = re.findall(r"\d+", stem)
    return numbers[-1] if numbers and len(numbers[-1]) <= 18 else None


def _number(text: str | None, group: str, path: str) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 19 or int(text) >= 2**63:
        raise ValueError(f"--path-pattern takes {group} {text!r} from {path!r}; it must be a whole number of 63 bits")
    return int(text)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


# --- listing ---


@dataclass(frozen=True, slots=True)
class _Found:
    """A frame as a listing meets it."""

    path: str
    uri: str
    kind: str
    offset_bytes: int
    size_bytes: int
    version: str


class _Inventory:
    """What a listing has met so far, as Arrow batches: a million rows are 150 MB here and 1 GB as objects."""

    def __init__(self, path_pattern: str | None):
        self._pattern = path_pattern
        self._rows: list[tuple] = []
        self._batches: list[pa.RecordBatch] = []
        self.ignored: Counter[str] = Counter()
        self.unlistable: list[tuple[str, str]] = []

    def add(self, found: _Found) -> None:
        fields = parse_path(found.path, self._pattern)
        self._rows.append(
            (found.path, found.uri, found.kind, found.offset_bytes, found.size_bytes, found.version, *fields)
        )
        if len(self._rows) == _ROWS_A_BATCH:
            self._flush()

    def ignore(self, path: str) -> None:
        self.ignored[posixpath.splitext(path)[1].lower() or "no extension"] += 1

    def refuse(self, uri: str, why: str) -> None:
        self.unlistable.append((uri, why))

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(MANIFEST_SCHEMA)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, MANIFEST_SCHEMA, strict=True)]
        self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=MANIFEST_SCHEMA))
        self._rows = []

    def table(self) -> pa.Table:
        self._flush()
        return _sorted(pa.Table.from_batches(self._batches, MANIFEST_SCHEMA))


def _sorted(table: pa.Table) -> pa.Table:
    keys = {
        name: pa.array((natural_key(text) for text in table[name].to_pylist()), pa.large_string(), size=len(table))
        for name in ("sequence", "camera", "frame_id")
    }
    return table.take(pc.sort_indices(pa.table(keys), sort_keys=[(name, "ascending") for name in keys]))


def list_archives(uris: Sequence[str], *, path_pattern: str | None = None) -> Listing:
    """Lists folders (at any depth), tar and zip files, and globs of them.

    A frame's id is its path relative to its root: `drive07/000001.png`; inside an archive the member's name follows
    after `!`. Of several roots, the id begins with the root's name.

    Raises:
        ValueError: a root that does not exist or holds no frame, two frames with one id.
        StorageError: the store did not answer.
    """
    inventory = _Inventory(path_pattern)
    for label, uri in _roots([storage.resolve(uri) for uri in uris]):
        _list_root(label, uri, inventory)
    table = inventory.table()
    if len(table) == 0 and not inventory.unlistable:
        ignored = f"{sum(inventory.ignored.values()):,} other files" if inventory.ignored else "nothing"
        raise ValueError(f"{', '.join(uris)} holds {ignored}; frames are {', '.join(IMAGE_EXTENSIONS)}")
    _require_distinct(table)
    return Listing(table=table, ignored=dict(sorted(inventory.ignored.items())), unlistable=tuple(inventory.unlistable))


def _require_distinct(table: pa.Table) -> None:
    counts = pc.value_counts(table["frame_id"].combine_chunks())
    doubled = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(doubled):
        raise ValueError(f"two frames have the id {doubled[0]['values'].as_py()!r}; give each root once")


def _roots(uris: Sequence[str]) -> list[tuple[str, str]]:
    """Returns label and URI of every root; the label begins the frame ids below it."""
    roots: list[tuple[str, str]] = []
    plain = [uri for uri in uris if not _is_glob(uri)]
    depth = 1
    while len({_tail(uri, depth) for uri in plain}) < len(set(plain)):
        depth += 1  # roots with one name: `a/cam0` and `b/cam0`
    for uri in uris:
        if _is_glob(uri):
            base = uri[: re.search(r"[*?\[]", uri).start()].rpartition("/")[0]  # type: ignore[union-attr]
            matches = storage.glob(uri)
            if not matches:
                raise ValueError(f"{uri}: nothing matches")
            roots += [(match.removeprefix(base).strip("/"), match) for match in matches]
        else:
            roots.append(("" if len(uris) == 1 and storage.is_folder(uri) else _tail(uri, depth), uri))
    return roots


def _is_glob(uri: str) -> bool:
    return bool(re.search(r"[*?\[]", uri)) and not storage.exists(uri)


def _tail(uri: str, depth: int) -> str:
    return "/".join(uri.partition("://")[2 if "://" in uri else 0].strip("/").split("/")[-depth:])


def _list_root(label: str, uri: str, inventory: _Inventory) -> None:
    if storage.is_folder(uri):
        unreadable = lambda where, error: inventory.refuse(where, error.strerror or str(error))  # noqa: E731
        for file in storage.list_files(uri, on_unreadable=unreadable):
            _list_file(posixpath.join(label, file.path), file, inventory)
        return
    try:
        file = storage.info(uri)
    except FileNotFoundError as error:
        raise ValueError(f"{uri}: no such folder or file") from error
    lower = uri.lower()
    if not lower.endswith((*_ARCHIVES, *_UNSEEKABLE, *IMAGE_EXTENSIONS)):
        raise ValueError(f"{uri} is no archive; give a folder, a .tar or .zip file, or a glob of them")
    _list_file(label, file, inventory)


def _list_file(path: str, file: storage.FileInfo, inventory: _Inventory) -> None:
    lower = path.lower()
    if lower.endswith(IMAGE_EXTENSIONS):
        inventory.add(_Found(path, file.uri, "file", 0, file.size_bytes, file.version))
    elif lower.endswith(_UNSEEKABLE):
        inventory.refuse(
            file.uri, "a compressed tar cannot be read by range; unpack it, or pack it again as a plain .tar"
        )
    elif lower.endswith(_ARCHIVES):
        list_members = _list_tar if lower.endswith(".tar") else _list_zip
        try:
            for member, offset, size in list_members(file, inventory):
                if member.lower().endswith(IMAGE_EXTENSIONS):
                    kind = lower.rpartition(".")[2]
                    inventory.add(_Found(f"{path}!{member}", file.uri, kind, offset, size, file.version))
                else:
                    inventory.ignore(member)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            inventory.refuse(file.uri, str(error) or "ends early")
    else:
        inventory.ignore(path)


def _list_tar(file: storage.FileInfo, inventory: _Inventory) -> Iterator[tuple[str, int, int]]:
    """Yields name, offset and size of the files in a tar, reading nothing but its headers."""
    with storage.open_read(file.uri) as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile keeps every header it has met: 1 KB a frame
            if member.isdir():
                continue
            refusal = "" if member.isreg() and not member.issparse() else "a link, device or sparse file"
            refusal = _refused_name(member.name) or refusal
            if refusal:
                inventory.refuse(f"{file.uri}!{member.name}", refusal)
            else:
                yield member.name, member.offset_data, member.size
        # A tar ends with blocks of zeros; tarfile takes any end between two members for one.
        raw.seek(tar.offset)
        if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"ends early, at byte {tar.offset:,}")


def _list_zip(file: storage.FileInfo, inventory: _Inventory) -> Iterator[tuple[str, int, int]]:
    """Yields name, offset of the local header and stored size of the files in a zip, by its directory."""
    with storage.open_read(file.uri) as raw, zipfile.ZipFile(raw) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            is_link = (member.external_attr >> 16) & 0o170000 not in (0, 0o100000)
            refusal = _refused_name(member.filename) or ("a link or device" if is_link else "")
            if member.flag_bits & 1:
                refusal = "encrypted"
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                refusal = f"compressed by method {member.compress_type}; stored and deflated are read"
            if refusal:
                inventory.refuse(f"{file.uri}!{member.filename}", refusal)
            else:
                yield member.filename, member.header_offset, member.compress_size


def _refused_name(member: str) -> str:
    if member.startswith("/") or "\\" in member or ".." in member.split("/") or "\0" in member:
        return "a name that leaves the archive"
    return ""


# --- reading ---


def read_frames(rows: pa.Table) -> list[bytes | FrameGone]:
    """Reads the frames of manifest rows, many requests in flight, each file looked at once more after it was read.

    A file whose version is the listed one *after* it was read had it before, too: the look costs one request a file
    (a tar with a thousand frames is one file).

    Returns:
        In the order of the rows: the frame's file, or why its bytes are not those that were listed.

    Raises:
        StorageError: the store did not answer; never a row.
    """
    columns = [rows[name].to_pylist() for name in ("uri", "kind", "offset_bytes", "size_bytes", "version")]
    spans = [_span(uri, kind, offset, size) for uri, kind, offset, size, _ in zip(*columns, strict=True)]
    contents = storage.read_many(spans)
    versions = storage.versions(set(columns[0]))
    return [
        _checked(content, versions[uri], version, uri, kind, size)
        for content, uri, kind, size, version in zip(contents, *(columns[i] for i in (0, 1, 3, 4)), strict=True)
    ]


def _span(uri: str, kind: str, offset: int, size: int) -> tuple[str, int, int]:
    if kind == "zip":
        size += _LOCAL_HEADER_BYTES + 2 * _EXTRA_SLACK_BYTES
    return uri, offset, min(size, MAX_FRAME_BYTES)


def _checked(
    content: bytes | OSError, version_now: str | None, version: str, uri: str, kind: str, size: int
) -> bytes | FrameGone:
    if isinstance(content, FileNotFoundError) or version_now is None:
        return FrameGone("missing", f"{uri} is gone since it was listed")
    if isinstance(content, OSError):
        raise content
    if version_now != version:
        return FrameGone("changed", f"{uri} has changed since it was listed")
    if size > MAX_FRAME_BYTES:
        return FrameGone("too_large", f"the file has {size:,} bytes; at most {MAX_FRAME_BYTES:,} are read")
    return _inflate(content, uri, size) if kind == "zip" else content


def _inflate(content: bytes, uri: str, size: int) -> bytes | FrameGone:
    """Returns the data of a zip member from its local header on (APPNOTE.TXT 4.3.7)."""
    if content[:4] != b"PK\x03\x04":
        return FrameGone("truncated", f"{uri}: no local header where the zip's directory says")
    method = int.from_bytes(content[8:10], "little")
    start = _LOCAL_HEADER_BYTES + sum(int.from_bytes(content[at : at + 2], "little") for at in (26, 28))
    if start + size > len(content):
        return FrameGone("unsupported", f"{uri}: the member's extra field has more than {_EXTRA_SLACK_BYTES} bytes")
    data = content[start : start + size]
    if method == zipfile.ZIP_STORED:
        return data
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        plain = inflater.decompress(data, MAX_FRAME_BYTES)
    except zlib.error as error:
        return FrameGone("truncated", f"{uri}: {error}")
    if inflater.unconsumed_tail:
        return FrameGone("too_large", f"the zip's member inflates to more than {MAX_FRAME_BYTES:,} bytes")
    return plain

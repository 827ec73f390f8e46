"""What a frame reference is: the columns of the manifest, and what a frame's path says of it."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import pyarrow as pa

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""What is a frame, in a folder and in an archive, without regard to case; every other file is ignored and counted."""

MANIFEST_SCHEMA = pa.schema(
    [
        ("frame_id", pa.string()),
        ("uri", pa.string()),
        ("kind", pa.string()),  # file, tar, zip, parquet
        ("offset_bytes", pa.int64()),  # of the member's data (zip: of its local header); 0 for a file
        ("size_bytes", pa.int64()),  # of the data as it is stored; null in Parquet
        ("column", pa.string()),  # Parquet: which column holds the image
        ("row", pa.int64()),  # Parquet: in which row, from 0
        ("version", pa.string()),  # of the file or archive, as `storage.FileInfo.version`; "": was not there
        ("sequence", pa.string()),
        ("camera", pa.string()),
        ("frame_index", pa.int64()),
        ("timestamp_ns", pa.int64()),
    ]
)
"""The manifest: one row a listed frame. A catalogue's own columns follow behind these."""

ROOTS_KEY = b"unet_ray.roots"
"""In the metadata of a manifest's schema, as JSON: the local folders that the archives are or lie in. A machine that
does not see one of them says nothing of the frames below it."""


class Root(NamedTuple):
    """What was given to `--frames`."""

    uri: str
    """In the form of `storage.resolve`; a glob as it was given."""
    label: str
    """How the ids of its frames begin; a glob's go on with what its matches have of their own."""


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
    """One row a frame, `MANIFEST_SCHEMA` and a catalogue's own columns, sorted by sequence, camera and name (frame 2
    before frame 10)."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Files with other extensions, counted by extension; what is hidden, a link in an archive or no file, by that."""
    include_hidden: bool = False
    """Whether hidden files were listed."""
    not_files: tuple[str, ...] = ()
    """The first few pipes, sockets and devices."""
    unlistable: tuple[tuple[str, str], ...] = ()
    """URI and reason of what could not be listed."""
    roots: tuple[Root, ...] = ()
    """What was listed."""


def carried_schema(schema: pa.Schema) -> pa.Schema:
    """Returns the catalogue's own columns in a manifest's schema."""
    return pa.schema([column for column in schema if column.name not in MANIFEST_SCHEMA.names])


def read_roots(table: pa.Table) -> list[str]:
    """Returns what `ROOTS_KEY` says in the metadata of rows of a manifest; nothing where it is not there."""
    return json.loads((table.schema.metadata or {}).get(ROOTS_KEY, b"[]"))


def roots_metadata(folders: Iterable[str]) -> dict[bytes, bytes]:
    """Returns `ROOTS_KEY` for the metadata of a manifest's schema."""
    return {ROOTS_KEY: json.dumps(list(folders)).encode()}


# --- names ---

_NUMBER = re.compile(r"[0-9]+")
_MEMBER = re.compile(r"(?i)(.+?\.(?:tar|zip|parquet))!(.*)", re.DOTALL)


def extension(path: str) -> str:
    """Returns a file's extension in lower case with its dot, `""` where it has none."""
    stem, dot, end = posixpath.basename(path).rpartition(".")
    return f".{end.lower()}" if dot and stem else ""


def is_text(name: str) -> bool:
    """Whether a name can be written down: in UTF-8, without NUL.

    Bytes that are no text come as lone surrogates from the file system and from tarfile.
    """
    return not any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in name)


def is_frame(path: str) -> bool:
    """Whether a file counts as a frame by its name."""
    return extension(path) in IMAGE_EXTENSIONS


HIDDEN_FOLDERS = (
    *("__MACOSX", "@eaDir", "@__thumb", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information"),
    "lost+found",
)
"""Folders of copies, thumbnails and deleted files that programs leave beside a person's."""

HIDDEN_RULE = f"a name that begins with a dot, or in a folder {', '.join(HIDDEN_FOLDERS)}"

_HIDDEN = re.compile(rf"(?:^|/)(?:\.[^./]|\.\.[^/]|(?:{'|'.join(map(re.escape, HIDDEN_FOLDERS))})(?:/|$))")


def is_hidden(path: str) -> bool:
    """Whether a file below a root is hidden, or a program's own: resource forks, thumbnails, notebooks' checkpoints."""
    return _HIDDEN.search(path) is not None


def natural_key(text: str) -> str:
    """Returns a key by which frame 2 sorts before frame 10, the text itself on a tie (`01` and `1`).

    Each number is preceded by how many digits it has: `a2` becomes `a012`, `a10` becomes `a0210`.
    """
    return f"{with_digits(text)}\0{text}"


def with_digits(text: str) -> str:
    """Returns a text in which each number is preceded by how many digits it has."""
    return _NUMBER.sub(_number_key, text)


def _number_key(match: re.Match[str]) -> str:
    digits = match[0].lstrip("0")
    return f"{len(digits):02d}{digits}" if len(digits) < 99 else f"99{len(digits):09d}{digits}"


def parse_path(relative_path: str, pattern: str | None) -> PathFields:
    """Returns what a path says: by the named groups of `--path-pattern`, else by the default rule.

    The default: the sequence is the folder (`drive07.tar!cam0` inside a tar), there is no camera, the frame's index is
    the last number in its name. A path that the pattern does not match says nothing: its drive has no name.

    Raises:
        ValueError: a group that means a number has none.
    """
    groups: dict[str, str | None] = {}
    if pattern is not None:
        match = _compiled(pattern).search(relative_path)
        if match is None:
            return PathFields("", "", None, None)
        groups = match.groupdict()
    folder, name = _split(relative_path)
    index = groups["frame_index"] if "frame_index" in groups else _last_number(name)
    return PathFields(
        groups.get("sequence") or ("" if "sequence" in groups else folder),
        groups.get("camera") or "",
        _number(index, "frame_index", relative_path),
        _number(groups.get("timestamp_ns"), "timestamp_ns", relative_path),
    )


def archive_of(frame_id: str) -> str:
    """`a.tar` of `a.tar!b/c1.png`, `""` of a path without archive; a `!` elsewhere is a letter of a name."""
    match = _MEMBER.fullmatch(frame_id) if "!" in frame_id else None
    return match[1] if match else ""


def _split(relative_path: str) -> tuple[str, str]:
    """`a.tar!b/c1.png` to `a.tar!b` and `c1.png`."""
    archive = archive_of(relative_path)
    member = relative_path[len(archive) + 1 :] if archive else relative_path
    folder, _, name = member.rpartition("/")
    return "!".join(part for part in (archive, folder) if part), name


def _last_number(name: str) -> str | None:
    """The last number in a file's name without its extension (pairs are named without one: `frame.0012`)."""
    end = extension(name)
    numbers = _NUMBER.findall(name[: -len(end)] if end in IMAGE_EXTENSIONS else name)
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

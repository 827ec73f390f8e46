"""What lies in one tar, zip or Parquet file: its frames' names and places, and their bytes out of the last two.

Nothing is unpacked: a lister reads headers by range and says where each frame's bytes are. What a hostile archive may
try ends in `Findings.unlistable`, by name: frames with `..` or an absolute path, links that leave the archive, devices,
names or directories made to fill the memory, sizes that lead in circles.
"""

from __future__ import annotations

import posixpath
import re
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from unet_ray import storage
from unet_ray.frames import extension, is_frame, is_hidden, is_text
from unet_ray.messages import printable

ARCHIVE_EXTENSIONS = (".tar", ".zip", ".parquet")
"""What is looked into, in a folder too."""

MAX_FRAME_BYTES = 256 * 2**20
"""A frame whose encoded bytes are more is never read, and a zip's member never inflated to more (`too_large`)."""

_COMPRESSED_TAR = re.compile(r"(?i)\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4))$")
MAX_NAME_BYTES = 4096  # as Linux has it
_MAX_REFUSED = 1_000  # members, which are named each
_READ_AHEAD_BYTES = 128 * 2**10  # one request a tar header where frames are larger, several headers where smaller
LEAVES = "a name that leaves the archive"
NO_FILE = "a link, device or sparse file"

HIDDEN = "hidden"
LINK = "link"
NOT_A_FILE = "pipe, socket or device"
"""What is ignored and counted for what it is, not by its extension."""

_EXAMPLES = 3
_LONGEST_EXTENSION = 16  # letters, so that names do not fill the memory as kinds of their own


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

    include_hidden: bool = False
    ignored: Counter[str] = field(default_factory=Counter)
    unlistable: list[tuple[str, str]] = field(default_factory=list)
    not_files: list[str] = field(default_factory=list)
    """The first few pipes, sockets and devices."""

    def add(self, other: Findings) -> None:
        """Takes over another lister's findings."""
        self.ignored.update(other.ignored)
        self.unlistable += other.unlistable
        self.not_files = (self.not_files + other.not_files)[:_EXAMPLES]

    def hides(self, path: str) -> bool:
        """Whether a file is passed over as hidden; counts it if so."""
        if self.include_hidden or not is_hidden(path):
            return False
        self.ignored[HIDDEN] += 1
        return True

    def ignore(self, path: str) -> None:
        """Counts a file that is no frame."""
        kind = extension(path) or "no extension"
        self.ignored[kind if len(kind) <= _LONGEST_EXTENSION else "other extensions"] += 1

    def ignore_no_file(self, uri: str) -> None:
        """Counts a pipe, socket or device, and names the first few."""
        self.ignored[NOT_A_FILE] += 1
        self.not_files = [*self.not_files, printable(uri)][:_EXAMPLES]

    def refuse(self, uri: str, why: str) -> None:
        """Names what cannot be listed; what is no text in a name is shown with escapes."""
        self.unlistable.append((printable(uri), why))

    def refuse_frame(self, error: OSError) -> None:
        """Names a frame that could not be asked for. Raises the error where there are more of these than are named."""
        if len(self.unlistable) >= _MAX_REFUSED:
            raise error
        self.refuse(str(error.filename), error.strerror or type(error).__name__)


class BadMember(ValueError):
    """A member whose bytes are not what the archive's directory says; `reason` as in `rows.REASONS`."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Broken(ValueError):
    """An archive whose listing cannot go on; the message says where."""


def is_archive(path: str) -> bool:
    """Whether a file is looked into by its name."""
    return extension(path) in ARCHIVE_EXTENSIONS


def why_unreadable(path: str) -> str | None:
    """Returns why an archive cannot be read by range and what to do, None where it can."""
    if _COMPRESSED_TAR.search(path) is None:
        return None
    return "a compressed tar cannot be read by range; unpack it, or pack it again as a plain .tar"


class RangeFile:
    """A seekable file that is read by ranges with little read-ahead, and refuses reads made to fill the memory."""

    def __init__(self, uri: str, size_bytes: int, max_read_bytes: int):
        self._uri, self._size, self._at = uri, size_bytes, 0
        self._max_read_bytes = max_read_bytes
        self._window, self._window_at = b"", 0

    def seekable(self) -> bool:
        """See `io.IOBase`."""
        return True

    def tell(self) -> int:
        """See `io.IOBase`."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """See `io.IOBase`. Raises Broken for a place before the file."""
        position = offset + (0, self._at, self._size)[whence]
        if position < 0:
            raise Broken(f"a header points to byte {position}")
        self._at = position
        return position

    def read(self, size: int = -1) -> bytes:
        """See `io.RawIOBase`. Raises Broken for more bytes than are read at once."""
        n_bytes = max(0, min(self._size - self._at, self._size if size is None or size < 0 else size))
        if n_bytes > self._max_read_bytes:
            most = f"at most {self._max_read_bytes:,} are read"
            raise Broken(f"headers of {n_bytes:,} bytes at byte {self._at:,}; {most}")
        begin = self._at - self._window_at
        if not 0 <= begin <= begin + n_bytes <= len(self._window):
            length = min(max(n_bytes, _READ_AHEAD_BYTES), self._size - self._at)
            self._window = storage.read_bytes(self._uri, self._at, length) if length > 0 else b""
            self._window_at, begin = self._at, 0
        data = self._window[begin : begin + n_bytes]
        self._at += len(data)
        return data


def _why_refused_name(path: str) -> str | None:
    if not is_text(path):
        return "a name with NUL in it" if "\0" in path else "a name that is not UTF-8"
    if len(path) > MAX_NAME_BYTES:
        return f"a name of more than {MAX_NAME_BYTES:,} letters"
    parts = path.split("/")
    return LEAVES if not parts[0] or ".." in parts else None


def accept(
    path: str, refused: str | None, file: storage.FileInfo, findings: Findings, original: str | None = None
) -> str | None:
    """Returns the plainest form of a member's path where it is a frame; counts or names what is none.

    Args:
        path: within the archive.
        refused: why it is not listed, if that is so.
        file: the archive.
        findings: where it is counted or named.
        original: the name as it stands in the archive, where that is another.
    """
    if not is_frame(path):
        findings.ignore(path)
        return None
    refused = _why_refused_name(path) or refused
    if refused is None:
        return posixpath.normpath(path)  # `tar cf log.tar .` writes ./cam0/1.png
    if len(findings.unlistable) == _MAX_REFUSED:
        raise Broken(f"has more than {_MAX_REFUSED:,} members that cannot be listed")
    findings.refuse(f"{file.uri}!{(original or path)[:MAX_NAME_BYTES]}", refused)
    return None


@contextmanager
def as_broken() -> Iterator[None]:
    """The ways in which tarfile and zipfile stumble over damaged headers, besides their own errors."""
    try:
        yield
    except Broken:
        raise
    except (ValueError, OverflowError, EOFError, RecursionError, struct.error, NotImplementedError) as error:
        raise Broken(f"has a damaged header: {error}") from error

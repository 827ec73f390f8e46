"""The frames of a tar: its headers are read by range, and say where each frame's bytes lie.

Several tars in one file are read one after the other, however long the padding between them, as `tar -i` does. A link
with the name of a frame that leads to a member of the same tar is a frame with that member's bytes.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, cast

from unet_ray import storage
from unet_ray.archives.members import LINK, NO_FILE, Broken, Findings, Member, RangeFile, accept, as_broken
from unet_ray.frames import is_frame

_MAX_HEADER_BYTES = 2**20  # of a tar; its attributes take 24 times as much memory as room
_MAX_LINK_BYTES = 64 * 2**20  # of the names of links and of what they lead to, which are held
_MOST_LINKS_IN_A_ROW = 40  # as Linux has it
_PADDING_BYTES_AT_ONCE = 8 * 2**20
_ZEROS = bytes(tarfile.BLOCKSIZE)


def list_tar(file: storage.FileInfo, findings: Findings) -> Iterator[Member]:
    """Yields the frames of a tar. Raises Broken where it cannot be read to its end."""
    links: dict[str, str] = {}
    n_link_bytes = 0
    for entry in _entries(file):
        if entry.isdir() or findings.hides(entry.name):
            continue
        if (entry.islnk() or entry.issym()) and not is_frame(entry.name):
            findings.ignored[LINK] += 1
            continue
        target = _target(entry)
        is_file = entry.isreg() and not entry.issparse()
        path = accept(entry.name, None if is_file or target else NO_FILE, file, findings)
        if path is None:
            continue
        if target:
            links[path] = target
            n_link_bytes += len(path) + len(target)
            if n_link_bytes > _MAX_LINK_BYTES:
                raise Broken(f"has more than {_MAX_LINK_BYTES:,} letters in links; pack it with --hard-dereference")
        elif entry.offset_data + entry.size <= file.size_bytes:
            yield Member(path, entry.offset_data, entry.size)
    if links:
        yield from _linked(file, links, findings)


def _entries(file: storage.FileInfo) -> Iterator[tarfile.TarInfo]:
    """All headers of a file, of which every end but the last may be followed by another tar."""
    source = RangeFile(file.uri, file.size_bytes, _MAX_HEADER_BYTES)
    begin: int | None = 0
    while begin is not None:
        source.seek(begin)
        with as_broken(), tarfile.open(fileobj=cast(Any, source), mode="r:") as tar:
            before = begin - 1
            while (entry := _next_entry(tar)) is not None:
                if entry.offset_data <= before or entry.size < 0:
                    raise Broken(f"its headers lead in a circle at byte {before:,}")
                before = entry.offset_data
                yield entry
            begin = _next_tar(file, source, cast(int, cast(Any, tar).offset))


def _next_tar(file: storage.FileInfo, source: RangeFile, end: int) -> int | None:
    """Where the tar behind another one begins, None where nothing but padding follows.

    tarfile takes a header that is damaged, cut short or lost for the end: behind the true one, of two blocks of zeros,
    there are zeros alone or another header.
    """
    source.seek(end)
    if source.read(tarfile.BLOCKSIZE) != _ZEROS:
        raise Broken(f"ends early, at byte {end:,}")
    at = end + tarfile.BLOCKSIZE
    while at < file.size_bytes:
        data = storage.read_bytes(file.uri, at, min(_PADDING_BYTES_AT_ONCE, file.size_bytes - at))
        n_zeros = len(data) - len(data.lstrip(b"\0"))
        if n_zeros < len(data):
            at += n_zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            break
        at += len(data)
    else:
        return None
    source.seek(at)
    block = source.read(tarfile.BLOCKSIZE)
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        is_header = at - end >= 2 * tarfile.BLOCKSIZE
    except tarfile.HeaderError:
        is_header = False
    if not is_header:
        raise Broken(f"goes on behind its end at byte {end:,}: a header is lost, or several tars were put together")
    return at


def _next_entry(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    entry = tar.next()
    cast(Any, tar).members = []  # it keeps every header that it has met: 1 KB a frame
    return entry


def _target(entry: tarfile.TarInfo) -> str | None:
    """The path in the tar that a link leads to; None for what is no link, or leads out of it."""
    if not (entry.islnk() or entry.issym()) or entry.linkname.startswith("/"):
        return None
    if entry.islnk():
        return posixpath.normpath(entry.linkname)
    target = posixpath.normpath(posixpath.join(posixpath.dirname(entry.name), entry.linkname))
    return None if target.startswith("../") else target


def _linked(file: storage.FileInfo, links: Mapping[str, str], findings: Findings) -> Iterator[Member]:
    """Yields the frames that are links; what these lead to is found by reading the headers once more."""
    wanted = set(links.values())
    regular = {
        posixpath.normpath(entry.name): (entry.offset_data, entry.size)
        for entry in _entries(file)
        if entry.isreg()
        and not entry.issparse()
        and entry.offset_data + entry.size <= file.size_bytes
        and posixpath.normpath(entry.name) in wanted
    }
    for path, target in links.items():
        for _ in range(_MOST_LINKS_IN_A_ROW):
            if target in regular or target not in links:
                break
            target = links[target]
        if target in regular:
            yield Member(path, *regular[target])
        else:
            findings.refuse(f"{file.uri}!{path}", NO_FILE)

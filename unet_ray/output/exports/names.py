"""Names of exported files, from the frames' ids: none leads elsewhere, and no two frames share one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import xxhash

from unet_ray import storage
from unet_ray.frames import IMAGE_EXTENSIONS, extension

_NAME_BYTES, _PATH_BYTES = 255, 4095
"""Of a file's name and of its whole path, on Linux' usual filesystems."""

# What a path or fsspec (`::`) would not take as a plain name.
_UNSAFE = re.compile(r"%|\0|:(?=:)")

# And what a reader of lists would not take as one: ends of lines, a comment, blanks at an end, Windows' slash.
_UNLISTED = re.compile(r"%|:(?=:)|[\x00-\x1f\x7f-\x9f\u2028\u2029\\]|^#|^\s+|\s+$")


def mask_path(frame_id: str) -> str:
    """Returns the path of a frame's PNG: its id with `.png` at the end, so that no two frames share one.

    What could lead elsewhere is written with `%`: a part that is empty becomes `%`, `.` and `..` become `%2E` and
    `%2E%2E`, a `%` becomes `%25`, `::` becomes `%3A:`.

    >>> mask_path("drive07.tar!cam0/000001.jpg")
    'drive07.tar!cam0/000001.jpg.png'
    >>> mask_path("/log/../a.png")
    '%/log/%2E%2E/a.png.png'
    """
    return _plain(f"{frame_id}.png", _UNSAFE)


def frame_path(frame_id: str) -> str:
    """Returns the path of a frame beside masks of `mask_path`: its id, escaped as there."""
    return _plain(frame_id, _UNSAFE)


def bare_name(frame_id: str) -> str:
    """Returns a frame's id without its extension, as a path and as a line of a list; escaped as in `mask_path`.

    >>> bare_name("drive07.tar!cam0/000001.jpg")
    'drive07.tar!cam0/000001'
    """
    end = own_extension(frame_id)
    return _plain(frame_id[: -len(end)] if end else frame_id, _UNLISTED)


def listed_path(frame_id: str) -> str:
    """Returns `bare_name` with the id's own extension, where it has one."""
    return f"{bare_name(frame_id)}{own_extension(frame_id)}"


def own_extension(frame_id: str) -> str:
    """Returns the extension of an image that an id ends in, in its own letters; `""` where it has none."""
    end = extension(frame_id)
    return frame_id[-len(end) :] if end in IMAGE_EXTENSIONS else ""


def _plain(name: str, unsafe: re.Pattern[str]) -> str:
    plain = unsafe.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), name)
    return "/".join({"": "%", ".": "%2E", "..": "%2E%2E"}.get(part, part) for part in plain.split("/"))


def require_distinct(paths: Callable[[], Iterable[tuple[str, str]]], folder: str) -> np.ndarray:
    """Refuses names that make no files: too long for this machine, two of one name, or a file within a file.

    Args:
        paths: yields a frame's id and the path below the folder of each of its files; called up to three times.
        folder: URI of it.

    Returns:
        A digest of each path, uint64 [N], sorted.

    Raises:
        ValueError: one line that names the frame.
    """
    folders: set[str] = set()
    digests = np.sort(np.fromiter(_checked_digests(paths(), folder, folders), np.uint64))
    if len(twice := digests[1:][digests[1:] == digests[:-1]]):
        first, second, path = _two_of_one_path(paths(), set(twice.tolist()))
        raise ValueError(
            f"the frames {first} and {second} would share the file {path}: this format drops the extension; export "
            "them apart by --sequence or --where, or as png"
        )
    if folders and (inside := next(((i, path) for i, path in paths() if path in folders), None)) is not None:
        raise ValueError(
            f"the file {inside[1]} of the frame {inside[0]} would be the folder of another frame's: export as coco, "
            "without frames"
        )
    return digests


def path_digest(path: str) -> int:
    """Returns what `require_distinct` knows a path by."""
    return xxhash.xxh3_64_intdigest(path.encode("utf-8", "surrogatepass"))


def _checked_digests(paths: Iterable[tuple[str, str]], folder: str, folders: set[str]) -> Iterator[int]:
    """Yields the digest of each path, and adds the folders to `folders` that a file's name could have."""
    is_local = storage.is_local(folder)
    for frame_id, path in paths:
        parts = path.split("/")
        if is_local:
            _require_short(frame_id, parts, folder)
        folders.update("/".join(parts[:n]) for n in range(1, len(parts)) if own_extension(parts[n - 1]))
        yield path_digest(path)


def _require_short(frame_id: str, parts: Sequence[str], folder: str) -> None:
    longest = max(len(os.fsencode(part)) for part in parts)
    if longest > _NAME_BYTES or len(os.fsencode(storage.join(folder, *parts))) > _PATH_BYTES:
        raise ValueError(
            f"the name of the frame {frame_id[:60]}… has {longest} bytes in one part; a file here may have "
            f"{_NAME_BYTES} (and {_PATH_BYTES} with its folders): export to a store, or as coco"
        )


def _two_of_one_path(paths: Iterable[tuple[str, str]], twice: set[int]) -> tuple[str, str, str]:
    first: dict[str, str] = {}
    for frame_id, path in paths:
        if path_digest(path) in twice and first.setdefault(path, frame_id) != frame_id:
            return first[path], frame_id, path
    raise AssertionError("two different paths have one digest of 64 bits")

"""What catalogues may name: files of their own folders and of the job's roots; for any other place a person is asked.

A catalogue may come from somebody else, and name `/etc/passwd`, another store, or a server of the job's network.

| a catalogue's `uri` | |
|---|---|
| below the catalogue's folder, on the same filesystem | is read |
| below a root of `--frames`, or below `--allow-uri` | is read |
| anything else, be it by `..`, `file://`, `http://` or `simplecache::` | is refused, with the prefixes to allow |

Prefixes are compared by whole parts of a path, after `..`. Links are followed, as in a folder of `--frames`; a local
path is below a prefix also where its real path is below the prefix's real one.
"""

from __future__ import annotations

import itertools
import posixpath
import re
import shlex
from collections.abc import Iterable, Sequence
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from unet_ray import storage
from unet_ray.messages import count, first_few, shown_path
from unet_ray.storage import overlaps

_MAY_LEAVE = r"^/|://|(?:^|/)\.\.(?:/|$)"
_MAY_LEAVE_ON_WEB = rf"{_MAY_LEAVE}|%|\\"
"""Of a web server's names, an escape or a backslash may be a part of the path."""
_NAME = r"([^/:])/[^/.%?\\][^/%?\\]*$"
"""A file's name at the end of its path; not `..`, nor what may mean it, nor what may hold a credential."""
_WEB = re.compile(r"(?:[\w+.-]+::)*https?://")
_UP = re.compile(r"(^|/)\.\.(/|$)")


class Reach:
    """Where catalogues may lead, and what of them leads elsewhere."""

    def __init__(self, roots: Iterable[str], allowed: Iterable[str] = ()):
        """Of a job with these roots, resolved, and these values of `--allow-uri`."""
        self._prefixes = [_plain(uri) for uri in (*roots, *map(storage.resolve, allowed))]
        self._known: dict[str, str] = {}
        self._strays: dict[tuple[str, ...], tuple[tuple[str, ...], int]] = {}
        """By the first parts of their paths: the parts that all of them share, and how many they are."""
        self._catalogues: dict[str, None] = {}

    def look(self, catalogue: str, uris: pa.Array | pa.ChunkedArray) -> None:
        """Notes which of the files that a catalogue names lie elsewhere."""
        folder = catalogue.rpartition("/")[0] or "/"
        prefixes = [*self._prefixes, _plain(folder)]
        pattern = _MAY_LEAVE_ON_WEB if _WEB.match(catalogue) else _MAY_LEAVE
        strange = uris.filter(pc.match_substring_regex(uris, pattern))
        counted = pc.value_counts(pc.replace_substring_regex(strange, _NAME, r"\1"))
        for entry, number in zip(counted.field(0).to_pylist(), counted.field(1).to_pylist(), strict=True):
            if "\0" in entry:  # which names no file
                continue
            location = _plain(storage.resolve(storage.beside(folder, entry)))
            if not self._lies_in(location, prefixes):
                self._catalogues[catalogue] = None
                self._add(location, number)

    def require(self) -> None:
        """Raises ValueError where something lies elsewhere: how many frames below what, and the option for it."""
        if not self._strays:
            return
        locations = [("/".join(parts) or "/", number) for parts, number in self._strays.values()]
        locations.sort(key=lambda location: (-location[1], location[0]))
        catalogues = [shown_path(uri) for uri in self._catalogues]
        verb = "names" if len(catalogues) == 1 else "name"
        below = first_few([f"{count(number, 'frame')} below {location}" for location, number in locations])
        options = " ".join(["--allow-uri", *(shlex.quote(location) for location, _ in locations[:5])])
        more = "" if len(locations) <= 5 else " and the others"
        raise ValueError(f"{first_few(catalogues)} {verb} {below}; add {options}{more}")

    def _lies_in(self, location: str, prefixes: Sequence[str]) -> bool:
        if any(overlaps.lies_in(location, prefix) for prefix in prefixes):
            return True
        if not storage.is_local(location):
            return False
        real = overlaps.real_uri(location, self._known)
        return any(overlaps.lies_in(real, overlaps.real_uri(p, self._known)) for p in prefixes if storage.is_local(p))

    def _add(self, location: str, number: int) -> None:
        parts = tuple(location.split("/"))
        first = parts[: 2 if storage.is_local(location) else 3]
        shared, before = self._strays.get(first, (parts, 0))
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(shared, parts, strict=False))
        self._strays[first] = tuple(part for part, _ in alike), before + number


def _plain(uri: str) -> str:
    """A resolved URI after its `..`, as a server or a filesystem may read it."""
    if storage.is_local(uri):
        return uri
    protocol, separator, name = uri.partition("://")
    name = unquote(name).replace("\\", "/") if _WEB.match(uri) else name
    return f"{protocol}{separator}{posixpath.normpath(name) if _UP.search(name) else name}"

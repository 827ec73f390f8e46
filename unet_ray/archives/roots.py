"""The roots of a listing: what `--frames` names, globs resolved, and the label that the ids below each begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from unet_ray import storage
from unet_ray.frames import (
    Root,
    extension,
    is_hidden,
)
from unet_ray.storage import overlaps


class FoundRoots(NamedTuple):
    """Where to list."""

    places: list[tuple[str, str]]
    """Label and URI of every place, globs resolved; a label begins the ids of the frames below."""
    roots: tuple[Root, ...]
    n_hidden: int = 0
    """Of what globs matched, which are not among the places."""


def find_roots(
    uris: Sequence[str], labels: Mapping[str, str] | None = None, *, include_hidden: bool = False
) -> FoundRoots:
    """Returns the roots of a listing, and every place below them, with what globs match in their place.

    Args:
        uris: as they were given.
        labels: how the ids below some of the roots begin, by the root's resolved URI.
        include_hidden: a glob's `*` matches what is hidden, too.

    Raises:
        ValueError: a glob that matches nothing, roots that are equal or lie in each other.
    """
    given = {storage.resolve(uri): uri for uri in reversed(uris)}
    roots = _roots([storage.resolve(uri) for uri in uris], labels or {}, include_hidden)
    overlaps.require_distinct_roots([(given.get(uri, uri), uri) for _, uri in roots.places], _may_be_catalogue)
    return roots


def _may_be_catalogue(uri: str) -> bool:
    """Whether a root may name frames that lie elsewhere; those that it names twice are found in the listing."""
    return extension(uri) in (".csv", ".parquet")


def _roots(uris: Sequence[str], labels: Mapping[str, str], include_hidden: bool) -> FoundRoots:
    n_hidden = 0
    places: list[tuple[str, str]] = []
    roots: list[Root] = []
    plain = [uri for uri in dict.fromkeys(uris) if not is_glob(uri)]
    depth = 1
    while len({tail(uri, depth) for uri in plain}) < len(set(plain)):  # roots with one name: `a/cam0` and `b/cam0`
        depth += 1
        if depth > max(uri.count("/") for uri in plain) + 1:
            twice = next(uri for uri in plain if sum(tail(uri, depth) == tail(other, depth) for other in plain) > 1)
            raise ValueError(f"{twice} has the path of another of --frames; their frames' ids would be the same")
    for uri in uris:
        if uri not in plain:
            (base, below), matches, label = storage.split_pattern(uri), storage.glob(uri), labels.get(uri, "")
            if not include_hidden and not is_hidden(below):  # else the pattern itself names it
                hidden = [match for match in matches if is_hidden(match.removeprefix(base).strip("/"))]
                n_hidden += len(hidden)
                matches = sorted({*matches} - {*hidden})
            if not matches:
                raise ValueError(f"{uri}: nothing matches")
            for match in matches:
                places.append(("/".join(filter(None, (label, match.removeprefix(base).strip("/")))), match))
        else:
            natural = "" if len(uris) == 1 and storage.is_folder(uri) else tail(uri, depth)
            label = labels.get(uri, natural)
            places.append((label, uri))
        roots.append(Root(uri, label))
    return FoundRoots(places, tuple(roots), n_hidden)


def is_glob(uri: str) -> bool:
    """Whether a root is a pattern, not the name of something that is there."""
    return storage.is_pattern(uri) and not storage.exists(uri)


def _glob_base(uri: str) -> str:
    return storage.split_pattern(uri)[0]


def folder_of(uri: str) -> str:
    """Returns the folder that a root is or lies in."""
    if is_glob(uri):
        return _glob_base(uri)
    return uri if storage.is_folder(uri) else uri.rpartition("/")[0]


def tail(uri: str, depth: int) -> str:
    """Returns the last parts of a URI: `b/cam0` of `/logs/b/cam0` at depth 2."""
    return "/".join(uri.partition("://")[2 if "://" in uri else 0].strip("/").split("/")[-depth:])

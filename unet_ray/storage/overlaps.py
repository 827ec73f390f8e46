"""Folders that lie in each other: a root that is given twice, an output inside its input.

Local paths are compared by their real paths, after `..` and links; URIs of a store by their text.

>>> require_apart("drives/labels", [("--frames", "drives")])
ValueError: --out drives/labels lies in --frames drives itself; give a place beside it
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence

from unet_ray import storage

OUTPUT_NAMES = (
    *("run.json", "config.yaml", "summary.json", "class_statistics.parquet"),
    *("preview.png", "report.html", "rejected.csv"),
    *("frames", "frames/part-00000.parquet"),
    *("manifest", "manifest/g0-0.parquet", "manifest/_g0.json"),
    "_work",
)
"""What an output of `segment` holds, or its like: a glob that matches one of these below `--out` would match it."""

_FOLDERS_KEPT = 10_000  # a listing comes folder by folder, and may have a million of them

_SAME_STORE = {"s3a": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs"}


def real_uri(uri: str, known: dict[str, str] | None = None) -> str:
    """Returns one spelling of a resolved URI: of a local path the real path, else the URI with its usual protocol.

    Args:
        uri: as `storage.resolve` returns it.
        known: real paths of the folders that were met last, so that not each part of a path is looked at each time.
    """
    if not storage.is_local(uri):
        protocol, _, rest = uri.partition("://")
        protocol, rest = protocol.split("::")[-1], rest.strip("/")
        return f"{_SAME_STORE.get(protocol, protocol)}:/" + (f"/{rest}" if rest else "")
    known = {} if known is None else known
    folder, name = os.path.split(uri)
    if folder == uri:
        return uri
    if os.path.islink(uri):
        return os.path.realpath(uri)
    if folder not in known:
        if len(known) > _FOLDERS_KEPT:
            known.clear()
        known[folder] = real_uri(folder, known)
    return os.path.join(known[folder], name)


def lies_in(inner: str, outer: str) -> bool:
    """Whether one real URI is another, or lies below it."""
    return f"{inner}/".startswith(f"{outer.rstrip('/')}/")


def folders_above(uri: str) -> Iterator[str]:
    """Yields the folders that a URI lies in, from the nearest on."""
    while "/" in uri[1:]:
        uri = uri.rpartition("/")[0]
        yield uri
    if uri.startswith("/"):
        yield "/"


def require_apart(out: str, inputs: Iterable[tuple[str, str | None]], *, both_ways: bool = False) -> None:
    """Refuses an output that is one of its inputs, or lies in one: what is written there would be read as input.

    Args:
        out: the value of `--out`.
        inputs: the option and the URI of each; None for one that was not given.
        both_ways: whether an input inside the output is refused, too: `--overwrite` may delete there.

    Raises:
        ValueError: one line that names both.
    """
    known: dict[str, str] = {}
    real_out = real_uri(storage.resolve(out), known)
    for option, uri in inputs:
        if uri is None:
            continue
        real = real_uri(storage.resolve(uri), known)
        if lies_in(real_out, real):
            raise ValueError(
                f"--out {_with_real(out, real_out)} lies in {option} {_with_real(uri, real)} itself; "
                "give a place beside it"
            )
        if both_ways and lies_in(real, real_out):
            raise ValueError(
                f"{option} {_with_real(uri, real)} lies in --out {_with_real(out, real_out)}; give an --out beside it"
            )


def require_unmatched(out: str, option: str, patterns: Iterable[str]) -> None:
    """Refuses an output that a glob among the inputs matches, or would match once the output is there.

    `drives/*` matches `--out drives/labels`, and `drives/*/*.png` its preview; `drives/*.tar` matches neither.

    Raises:
        ValueError: one line that names both.
    """
    known: dict[str, str] = {}
    real_out = real_uri(storage.resolve(out), known)
    places = [real_out, *folders_above(real_out), *(posixpath.join(real_out, name) for name in OUTPUT_NAMES)]
    for pattern in patterns:
        if not storage.is_pattern(pattern) or (storage.is_local(pattern) and storage.exists(pattern)):
            continue
        whole = storage.resolve(pattern)
        folder, rest = storage.split_pattern(whole if storage.is_local(whole) else real_uri(whole))
        if storage.is_local(whole):
            folder = real_uri(folder or "/", known).rstrip("/")
        below = (path.removeprefix(f"{folder}/") for path in places if path.startswith(f"{folder}/"))
        if any(storage.matches(rest, path) for path in below):
            raise ValueError(f"--out {out} lies in what {option} {pattern} matches; give a place beside it")


def require_distinct_roots(roots: Sequence[tuple[str, str]], may_lie_inside: Callable[[str], bool]) -> None:
    """Refuses roots that are equal or lie in each other.

    Args:
        roots: the name by which the user knows each, and its resolved URI.
        may_lie_inside: whether a root is no place of frames and may lie in another, as a catalogue.

    Raises:
        ValueError: one line that names both.
    """
    known: dict[str, str] = {}
    reals = [real_uri(uri, known) for _, uri in roots]
    name_of: dict[str, str] = {}
    for (name, _), real in zip(roots, reals, strict=True):
        if real in name_of:
            other = name_of[real]
            problem = f"{name} is given twice" if name == other else f"{_with_real(name, real)} is {other}"
            raise ValueError(f"{problem}: its frames would be labelled twice; give each place once")
        name_of[real] = name
    for (name, uri), real in zip(roots, reals, strict=True):
        outer = next((name_of[folder] for folder in folders_above(real) if folder in name_of), None)
        if outer is not None and not may_lie_inside(uri):
            problem = f"{_with_real(name, real)} lies in {outer}"
            raise ValueError(f"{problem}: its frames would be labelled twice; give each place once")


def _with_real(uri: str, real: str) -> str:
    """A URI as it was given; behind it the real path where a link leads elsewhere."""
    leads_elsewhere = storage.is_local(uri) and storage.resolve(uri) != real
    return f"{uri} ({real})" if leads_elsewhere else uri

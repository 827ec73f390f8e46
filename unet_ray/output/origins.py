"""Which archives the frames of an output come from: a listing is of the same again, grown, moved, or of others.

An output holds the frames of its roots, the folders, files and globs that were given to `--frames`. Each root has a
label with which the ids of its frames begin, so that a root that is given alone later means the same frames.

| roots of a listing | frames that were planned | verdict |
|---|---|---|
| all known | at most half of theirs have gone | the archive as it is now |
| all known | more have gone | asks for `--keep-gone` |
| some unknown, `--add-root` | stay as they are | the new roots' frames are added under labels of their own |
| some unknown | at most half have gone or changed | grown, or moved: the same ids and versions elsewhere |
| some unknown | more | another archive: refused |
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_ray import storage
from unet_ray.archives.roots import folder_of, is_glob, tail
from unet_ray.frames import Listing, Root, archive_of, is_hidden, read_roots, roots_metadata
from unet_ray.messages import count, first_few, shown_path
from unet_ray.output import manifest


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What became of the planned frames, by a listing."""

    n_changed: int = 0
    """Of the listed roots, other files now."""
    n_gone: int = 0
    """Of the listed roots, no longer there."""
    moved: Mapping[str, str] = field(default_factory=dict)
    """Where an archive lies now, by where it lay: beginnings of URIs."""


def labels_for(out: str, uris: Sequence[str], *, add_root: bool, is_new: bool = False) -> dict[str, str]:
    """Returns how frame ids below roots are to begin, by resolved URI; a root without a label has that of `frames`.

    Args:
        out: the output that the frames are for; there may be none yet.
        uris: the roots.
        add_root: roots that the output does not know get a label that none of its ids begins with.
        is_new: what the output holds does not count.

    Raises:
        JobFailed: the output's plan is damaged.
    """
    uris = [storage.resolve(uri) for uri in uris]
    generations = [] if is_new else manifest.read_generations(out)
    labels = manifest.recorded_roots(generations)
    unknown = [uri for uri in uris if uri not in labels]
    if not unknown or not (add_root or _some_say_no_root(generations)):
        return {uri: labels[uri] for uri in uris if uri in labels}
    known = manifest.read_known(out, generations)
    for uri in unknown:
        label = _label_by_rows(known, uri) if _some_say_no_root(generations) else None
        if label is None and add_root:
            label = _new_label(uri, known["frame_id"], set(labels.values()))
        if label is not None:
            labels[uri] = label
    return {uri: labels[uri] for uri in uris if uri in labels}


def _some_say_no_root(generations: Sequence[Mapping[str, object]]) -> bool:
    return any("roots" not in generation for generation in generations)


def _label_by_rows(known: pa.Table, uri: str) -> str | None:
    """The label of a root in a plan that names none, by a frame that lies below it."""
    below = known.filter(pc.starts_with(known["uri"], storage.join(uri, ""))).slice(0, 1)
    for frame_id, file in zip(below["frame_id"].to_pylist(), below["uri"].to_pylist(), strict=True):
        label, separator, _ = frame_id.rpartition(file.removeprefix(storage.join(uri, "")))
        return label.rstrip("/") if separator else None
    return None


def _new_label(uri: str, known_ids: pa.ChunkedArray, taken: set[str]) -> str:
    """The shortest end of the root's path, its folder's for a glob, with which no planned id begins."""
    path = folder_of(uri) if is_glob(uri) else uri
    label = ""
    for depth in range(1, path.count("/") + 2):
        label = tail(path, depth)
        if label not in taken and not pc.any(_are_below(known_ids, label)).as_py():
            break
    return label


def _are_below(frame_ids: pa.ChunkedArray, label: str) -> pa.ChunkedArray:
    if not label:
        return pc.is_valid(frame_ids)
    return pc.or_(
        pc.equal(frame_ids, label),
        pc.or_(pc.starts_with(frame_ids, f"{label}/"), pc.starts_with(frame_ids, f"{label}!")),
    )


def compare(
    out: str,
    listing: Listing,
    known: pa.Table,
    generations: Sequence[Mapping[str, Any]],
    *,
    add_root: bool,
    keep_gone: bool,
) -> Comparison:
    """Compares what was planned with what is there now.

    Args:
        out: the output.
        listing: what is there now.
        known: id, version and URI of the planned frames.
        generations: the records of those that they were planned in.
        add_root: roots that the output does not know are added.
        keep_gone: more than half may have gone from the roots that are listed.

    Raises:
        ValueError: the listing is of another archive, or too much has gone from it.
    """
    recorded, is_old = manifest.recorded_roots(generations), _some_say_no_root(generations)
    unknown = [root for root in listing.roots if root.uri not in recorded and not (is_old and _holds(known, root))]
    rows = pc.index_in(known["frame_id"], listing.table["frame_id"])
    gone = pc.is_null(rows)
    if not listing.include_hidden:
        gone = pc.and_not(gone, _are_hidden(known["frame_id"], gone, {*recorded.values(), ""}))
    changed = pc.fill_null(pc.not_equal(known["version"], listing.table["version"].take(rows)), False)
    if unknown and not add_root and 2 * (_sum(gone) + _sum(changed)) > len(known):
        roots = first_few([shown_path(uri) for uri in recorded or [_common(known)]])
        raise ValueError(f"{shown_path(out)} holds {roots}; give another --out, or --add-root")
    _refuse_overlaps(out, unknown, recorded)
    _refuse_taken_ids(out, listing, known, rows, recorded)
    asked = _are_of_listed(known["frame_id"], listing.roots, recorded) if not unknown or add_root else None
    if asked is not None:
        gone, changed = pc.and_(gone, asked), pc.and_(changed, asked)
        n_asked = _sum(asked)
        if not keep_gone and 2 * _sum(gone) > n_asked:
            raise ValueError(
                f"{_sum(gone):,} of {count(n_asked, 'frame')} that {shown_path(out)} holds of "
                f"{first_few([shown_path(root.uri) for root in listing.roots])} are gone; give --keep-gone to keep "
                "what is labelled of them, or another --out"
            )
    return Comparison(n_changed=_sum(changed), n_gone=_sum(gone), moved=_moved(known, listing, rows, changed))


def _are_hidden(frame_ids: pa.ChunkedArray, asked: pa.ChunkedArray, labels: Collection[str]) -> pa.ChunkedArray:
    """Which of the frames that are asked for were planned when hidden files were listed, which they are not now."""
    are_hidden = asked.to_numpy().copy()
    for index in np.flatnonzero(are_hidden).tolist():
        frame_id = frame_ids[index].as_py()
        paths = [
            frame_id.removeprefix(f"{label}/") for label in labels if not label or frame_id.startswith(f"{label}/")
        ]
        path = min(paths, key=len)
        archive = archive_of(path)
        are_hidden[index] = is_hidden(archive) or is_hidden(path[len(archive) + 1 :] if archive else path)
    return pa.chunked_array([pa.array(are_hidden)])


def _refuse_overlaps(out: str, unknown: Sequence[Root], recorded: Mapping[str, str]) -> None:
    """Raises ValueError where a new root lies in one that the output holds, or around it: ids would be others there."""
    for root in unknown:
        for uri in recorded:
            if storage.join(root.uri, "").startswith(storage.join(uri, "")) or uri.startswith(
                storage.join(root.uri, "")
            ):
                raise ValueError(
                    f"{shown_path(out)} holds {shown_path(uri)}, and {shown_path(root.uri)} lies in it or around it; "
                    f"give {shown_path(uri)} as before, or another --out"
                )


def _refuse_taken_ids(
    out: str, listing: Listing, known: pa.Table, rows: pa.ChunkedArray, recorded: Mapping[str, str]
) -> None:
    """Raises ValueError where a listed frame has the id of one of another root that the output holds."""
    now = listing.table["uri"].take(rows)
    elsewhere = pc.fill_null(pc.not_equal(known["uri"], now), False)
    pairs = zip(known["uri"].filter(elsewhere).to_pylist(), now.filter(elsewhere).to_pylist(), strict=True)
    for before, after in pairs if len(recorded) > 1 else ():
        # An archive that has moved has its label at both places.
        labels = [
            {label for root, label in recorded.items() if uri == root or uri.startswith(storage.join(root, ""))}
            for uri in (before, after)
        ]
        if all(labels) and not labels[0] & labels[1]:
            raise ValueError(
                f"{shown_path(after)} has the id of {shown_path(before)}, which {shown_path(out)} holds; rename it, or "
                "give another --out"
            )


def _sum(which: pa.ChunkedArray) -> int:
    return pc.sum(which).as_py() or 0


def _common(known: pa.Table) -> str:
    return os.path.commonpath([known["uri"][0].as_py(), known["uri"][-1].as_py()])


def _holds(known: pa.Table, root: Root) -> bool:
    """Whether a frame was planned from a place below a root, as in plans that name no roots."""
    return bool(pc.any(_are_at(known["uri"], root.uri)).as_py())


def _are_at(uris: pa.ChunkedArray, root: str) -> pa.ChunkedArray:
    """Which URIs are a root or lie below it; below its folder for a glob."""
    folder = folder_of(root) if is_glob(root) else root
    return pc.or_(pc.equal(uris, folder), pc.starts_with(uris, storage.join(folder, "")))


def _are_of_listed(frame_ids: pa.ChunkedArray, roots: Sequence[Root], recorded: Mapping[str, str]) -> pa.ChunkedArray:
    """Which planned frames are of the roots that were listed now; those of other roots were not looked for."""
    listed = {root.label for root in roots if root.uri in recorded}
    others = {label for uri, label in recorded.items() if label not in listed}
    if not others:
        return pc.is_valid(frame_ids)
    of_listed = pa.chunked_array([pa.array(np.zeros(len(frame_ids), bool))])
    for label in listed:
        of_listed = pc.or_(of_listed, _are_below(frame_ids, label))
    for label in others:
        if label:  # an unlabelled root has all that no other has
            of_listed = pc.and_not(of_listed, _are_below(frame_ids, label))
    return of_listed


def _moved(known: pa.Table, listing: Listing, rows: pa.ChunkedArray, changed: pa.ChunkedArray) -> dict[str, str]:
    """Where archives lie now, by where they lay: what the URIs of frames with equal ids and versions begin with."""
    now = listing.table["uri"].take(rows)
    elsewhere = pc.and_not(pc.fill_null(pc.not_equal(known["uri"], now), False), changed)
    pairs = zip(known["uri"].filter(elsewhere).to_pylist(), now.filter(elsewhere).to_pylist(), strict=True)
    return dict({_without_common_end(before, after) for before, after in pairs})


def _without_common_end(before: str, now: str) -> tuple[str, str]:
    """`/mnt/a/log/1.png` and `/disk/log/1.png` to `/mnt/a` and `/disk`."""
    parts, other = before.split("/"), now.split("/")
    while len(parts) > 1 and len(other) > 1 and parts[-1] == other[-1]:
        parts.pop()
        other.pop()
    return "/".join(parts), "/".join(other)


def relocate(rows: pa.Table, moved: Mapping[str, str]) -> pa.Table:
    """Returns rows of the manifest with the places where their archives lie now."""
    if not moved:
        return rows
    uris = [_relocated(uri, moved) for uri in rows["uri"].to_pylist()]
    roots = [_relocated(uri, moved) for uri in read_roots(rows)]
    rows = rows.set_column(rows.column_names.index("uri"), "uri", pa.array(uris, pa.string()))
    return rows.replace_schema_metadata({**(rows.schema.metadata or {}), **roots_metadata(roots)})


def _relocated(uri: str, moved: Mapping[str, str]) -> str:
    for before in sorted(moved, key=len, reverse=True):
        if uri == before or uri.startswith(f"{before}/"):
            return moved[before] + uri.removeprefix(before)
    return uri


def are_own(rows: pa.Table, listing: Listing) -> pa.ChunkedArray:
    """Returns which frames lie below the roots that were listed, or are among the listed frames: no others are read.

    Args:
        rows: id and URI of frames of the manifest, which in an output that somebody else made may name any file.
        listing: what was listed.
    """
    uris = rows["uri"]
    own = pc.equal(uris, listing.table["uri"].take(pc.index_in(rows["frame_id"], listing.table["frame_id"])))
    own = pc.fill_null(own, False)
    for root in listing.roots:
        if not is_glob(root.uri):
            own = pc.or_(own, _are_at(uris, root.uri))
    globs = [root.uri for root in listing.roots if is_glob(root.uri)]
    if globs:
        own = pc.or_(own, pc.is_in(uris, value_set=pa.array(_matched(pc.unique(uris).to_pylist(), globs), pa.string())))
    return pc.and_not(own, pc.match_substring(uris, "/../"))


def _matched(uris: Sequence[str], globs: Sequence[str]) -> list[str]:
    """Those URIs that a glob matches, or a folder of theirs."""
    matched = []
    for glob in globs:
        folder, pattern = storage.split_pattern(glob)
        for uri in uris:
            parts = uri.removeprefix(f"{folder}/").split("/") if uri.startswith(f"{folder}/") else []
            if any(storage.matches(pattern, "/".join(parts[: n + 1])) for n in range(len(parts))):
                matched.append(uri)
    return matched


def require_own_frames(rows: pa.Table, listing: Listing) -> None:
    """Raises ValueError where frames that are to be read are not all `are_own`."""
    strange = rows["uri"].filter(pc.invert(are_own(rows, listing)))
    if len(strange):
        raise ValueError(
            f"{count(len(strange), 'frame')} of the output still to be labelled lie outside --frames, first "
            f"{shown_path(strange[0].as_py())}; give the folder that they lie in to --frames as well"
        )

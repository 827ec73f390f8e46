"""Mistakes in `--frames` that need no listing to be seen, so that a job says them before it starts anything."""

from __future__ import annotations

from collections.abc import Sequence

from unet_ray import storage
from unet_ray.archives.catalogues import require_readable
from unet_ray.archives.listing import look_at_file, no_frames
from unet_ray.archives.members import Findings, is_archive, why_unreadable
from unet_ray.archives.reach import Reach
from unet_ray.archives.roots import FoundRoots
from unet_ray.frames import is_frame

_FILES_LOOKED_AT = 1_000  # of a folder of this machine, until one of them is a frame or an archive


def require_usable_roots(
    uris: Sequence[str],
    roots: FoundRoots,
    image_column: str | None,
    *,
    include_hidden: bool = False,
    allow_uris: Sequence[str] = (),
) -> None:
    """Refuses roots that are not there, that no lister reads, or that hold a few files and no frame; and catalogues
    that name what nobody allowed.

    Args:
        uris: as they were given.
        roots: what `find_roots` made of them.
        image_column: see `list_archives`.
        include_hidden: see `list_archives`.
        allow_uris: see `list_archives`.

    Raises:
        ValueError: one line that names the root.
        StorageError: the store did not answer.
    """
    resolved = {storage.resolve(uri) for uri in uris}
    ignored = Findings(include_hidden)
    reach = Reach((uri for _, uri in roots.places), allow_uris)
    is_empty = True
    for _, uri in roots.places:
        if storage.is_folder(uri):
            is_empty &= _holds_no_frame(uri, ignored)
            continue
        is_empty = False
        try:
            _, is_catalogue = look_at_file(uri, image_column, is_named=uri in resolved)
        except storage.NotAFile:
            continue  # which is counted when all is listed
        if is_catalogue:
            require_readable(uri, reach)
    reach.require()
    if is_empty:
        raise ValueError(no_frames(uris, ignored.ignored))


def _holds_no_frame(folder: str, ignored: Findings) -> bool:
    """Whether a folder of this machine certainly holds no frame; folders of a store are listed only once, for all."""
    if not storage.is_local(folder):
        return False
    try:
        for n_before, file in enumerate(storage.list_files(folder)):
            if n_before == _FILES_LOOKED_AT:
                return False
            if ignored.hides(file.path):
                continue
            if is_frame(file.path) or is_archive(file.path) or why_unreadable(file.path) is not None:
                return False
            ignored.ignore(file.path)
    except OSError:
        return False  # what cannot be listed is named when all is
    return True

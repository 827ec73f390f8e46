"""Drives that stand in the frames' names and not in their folders, and the `--path-pattern` that tells them apart."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unet_ray.frames import parse_path

_FRAMES_A_DRIVE = 3  # at least, on average: of fewer, the first part of a name is rather a part of its number
_CAMERA = re.compile(r"(?i)[_.-]*(cam(era)?|front|rear|back|left|right|side|cent(er|re))[_.-]?(\d(?!\d))?")


@dataclass(frozen=True, kw_only=True)
class NamedDrives:
    """Drives that the names of one folder tell, though the folder counts as one drive."""

    drives: tuple[str, ...]
    """How the names of each begin."""
    paths: tuple[str, ...]
    """Their frames."""


def find_named_drives(paths: Sequence[str], suffix: str) -> NamedDrives | None:
    """Returns the drives that names tell within folders; None where each folder is one drive by its names, too.

    Names are taken apart before their last number: `0001TP_006690.png` is frame 6690 of `0001TP`. First parts that
    differ by a camera alone (`left_0001`, `right_0001`) are no drives.

    Args:
        paths: of frames, relative to their folder.
        suffix: end of a name before the extension, which says nothing of the frame.
    """
    folders: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        folder, _, name = path.rpartition("/")
        folders[folder][_first_part(name, suffix)].append(path)
    several = [parts for parts in folders.values() if _are_drives(parts)]
    if not several:
        return None
    return NamedDrives(
        drives=tuple(part for parts in several for part in parts),
        paths=tuple(path for parts in several for frames in parts.values() for path in frames),
    )


def _first_part(name: str, suffix: str) -> str:
    match = re.fullmatch(r"(.*?)[_.-]*\d+\D*", name.rpartition(".")[0].removesuffix(suffix))
    return match[1] if match else ""


def _are_drives(frames_of: Mapping[str, Sequence[str]]) -> bool:
    """Whether the first parts of one folder's names are drives, by how they differ and how many frames each has."""
    n_frames = sum(map(len, frames_of.values()))
    is_enough = "" not in frames_of and n_frames >= _FRAMES_A_DRIVE * len(frames_of)
    return is_enough and len({_CAMERA.sub("", part) for part in frames_of}) > 1


def suggest_path_pattern(paths: Sequence[str], suffix: str) -> str | None:
    """Returns a `--path-pattern` by which all of these paths have a drive and a number; None where none is known.

    Args:
        paths: as in `find_named_drives`.
        suffix: as there.
    """
    end = rf"{re.escape(suffix)}\.\w+$" if suffix else r"\D*$"
    for sequence in (r"(?P<sequence>.+)[_.-]", r"(?P<sequence>.*\D)"):
        pattern = rf"^{sequence}(?P<frame_index>\d+){end}"
        if _fits_all(pattern, paths):
            return pattern
    return None


def _fits_all(pattern: str, paths: Sequence[str]) -> bool:
    try:
        fields = [parse_path(path, pattern) for path in paths]
    except ValueError:  # a number of more than 63 bits
        return False
    n_drives = len({field.sequence for field in fields})
    return all(field.sequence for field in fields) and 1 < n_drives <= len(paths) / 2

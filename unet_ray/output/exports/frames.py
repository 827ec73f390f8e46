"""The frames of an export: read again where the manifest says that they lie, and written as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from unet_ray.archives.reading import FrameGone, read_frames
from unet_ray.digests import content_digest
from unet_ray.output.exports.names import own_extension
from unet_ray.output.exports.selection import Selection
from unet_ray.output.exports.targets import Target
from unet_ray.pixels import images
from unet_ray.progress import Progress

_BYTES_AT_ONCE, _FILES_AT_ONCE = 2**26, 64
"""That wait to be written together, beside what `read_frames` holds."""

EXTENSIONS = {"PNG": ".png", "JPEG": ".jpg", "WebP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}
"""By the content, of a frame whose id has none: a row of a Parquet file."""

_OWN = ""
_ENDINGS = (_OWN, *EXTENSIONS.values())
_GONE = 255
_EXAMPLES = 3


@dataclass(kw_only=True)
class Written:
    """What became of the frames of the chosen labels."""

    endings: bytearray = field(default_factory=bytearray)
    """What the name of each, in their order, got beside its id: an index into `_ENDINGS`, `_GONE` if it is left out."""
    n_gone: int = 0
    """Frames that are left out."""
    examples: list[str] = field(default_factory=list)
    """A line for each of the first few of those."""

    def leave_out(self, frame_id: str, why: str) -> None:
        """Counts a frame as left out."""
        self.endings.append(_GONE)
        self.n_gone += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{frame_id}: {why}")

    def ending(self, number: int) -> str | None:
        """Returns what a frame's name got beside its id; None of one that is left out."""
        code = self.endings[number]
        return None if code == _GONE else _ENDINGS[code]


def candidates(frame_id: str) -> tuple[str, ...]:
    """Returns the endings that a frame's name may get, before its bytes are known."""
    return (_OWN,) if own_extension(frame_id) else tuple(EXTENSIONS.values())


def write_frames(selection: Selection, target: Target, path_of: Callable[[str, str], str], n_frames: int) -> Written:
    """Writes the bytes of the chosen labelled frames; what is not what was labelled is left out.

    Args:
        selection: whose frames.
        target: where to.
        path_of: a frame's id and its ending (`candidates`) to its path there.
        n_frames: how many they are.

    Raises:
        StorageError: the store did not answer, or this machine does not see the archive; no verdict on a frame.
    """
    written = Written()
    waiting: list[tuple[str, bytes]] = []
    with Progress(n_frames, "frames") as progress:
        for row, content in _read(selection):
            if isinstance(content, str):
                written.leave_out(row["frame_id"], content)
            else:
                ending = _ending(row["frame_id"], content)
                written.endings.append(_ENDINGS.index(ending))
                waiting.append((path_of(row["frame_id"], ending), content))
            if len(waiting) >= _FILES_AT_ONCE or sum(len(data) for _, data in waiting) >= _BYTES_AT_ONCE:
                target.write(waiting)
                waiting = []
            progress.advance(1)
        target.write(waiting)
    return written


def _read(selection: Selection) -> Iterator[tuple[dict[str, Any], bytes | str]]:
    """Yields each chosen row and its frame's bytes, or why they are not those that were labelled."""
    for rows in selection.sources():
        for row, content in zip(rows.to_pylist(), read_frames(rows), strict=True):
            yield row, content.error if isinstance(content, FrameGone) else _checked(row, content)


def _checked(row: dict[str, Any], content: bytes) -> bytes | str:
    if row["content_digest"] not in (None, content_digest(content)):
        return f"{row['uri']} holds other bytes than those that were labelled"
    try:
        size = images.frame_size(content)
    except images.ImageRefused as error:  # an output of somebody else may name any file of this machine
        return str(error)
    if None not in (expected := (row.get("height_px"), row.get("width_px"))) and size != expected:
        return f"{row['uri']} has {size[0]}x{size[1]} pixels; the labelled frame had {expected[0]}x{expected[1]}"
    return content


def _ending(frame_id: str, content: bytes) -> str:
    return _OWN if own_extension(frame_id) else EXTENSIONS[images.read_header(content).format]

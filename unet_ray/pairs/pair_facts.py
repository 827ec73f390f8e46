"""What one frame and its mask show, and whether training would take them; no pair knows of another.

Shapes: `H` height px, `W` width px.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from unet_ray import storage
from unet_ray.classes import IGNORED_ID, ClassSet, Color, RawValue, UnknownValuesError
from unet_ray.messages import count
from unet_ray.pairs.check_report import size_text
from unet_ray.pairs.pairs import (
    ImagePair,
    PairProblem,
    encode_mask,
    fits_a_format,
    guess_mask_format,
    mask_ids,
    spread,
)
from unet_ray.pixels.images import ImageHeader, ImageRefused, count_values, decode_frame, decode_mask, read_header

_REFUSALS = {
    "not_an_image": "are no image",
    "truncated": "are cut short or damaged",
    "too_large": "have too many pixels",
    "unsupported": "are of a kind that is not read",
}
_ODD_MODES = {"P": "have a palette", "RGBA": "have an alpha channel", "LA": "have an alpha channel", "1": "have 1 bit"}

# Colours that a JPEG's noise or a smooth resize makes lie this near to a line between two known colours (0 to 255).
_BETWEEN_DISTANCE = 12.0
_BETWEEN_SHARE = 0.9
_BETWEEN_MIN_COLORS = 3


SWAPPED_PAIRS = 8
"""Pairs, spread over the data set, that are looked at in both ways."""

_FEW_COLORS, _MANY_COLORS = 64, 1_000  # of a mask at most, of a photograph at least


@dataclass
class PairFacts:
    """What one pair shows; files under `frames have no mask`-like clauses, with a remark on each."""

    pair: ImagePair
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    """Clause, URI, remark: what training refuses."""
    remarks: list[tuple[str, str, str]] = field(default_factory=list)
    """Clause, URI, remark: what training takes."""
    unknown: UnknownValuesError | None = None
    frame_size: tuple[int, int] | None = None
    frame_digest: str | None = None
    mask_is_jpeg: bool = False
    pixels_of: np.ndarray | None = None
    """int64 [256] by encoded id; None where training would refuse the mask."""
    pixels_of_id: np.ndarray | None = None
    """int64 [256] by the id in the file; None where a mask holds colours."""


def inspect_pair(pair: ImagePair, class_set: ClassSet, mask_format: str | None) -> PairFacts:
    """Reads and decodes a pair as training would.

    Args:
        pair: the pair.
        class_set: what the mask's values mean.
        mask_format: see `pairs.MASK_FORMATS`; None where each mask is to be taken for what it looks like.

    Raises:
        StorageError: the store did not answer.
    """
    facts = PairFacts(pair)
    frame_bytes = _read(pair.image_uri, "frames", facts)
    mask_bytes = _read(pair.mask_uri, "masks", facts)
    if frame_bytes is not None:
        facts.frame_digest = storage.sha256(frame_bytes)
        frame = _decode(pair.image_uri, frame_bytes, "frames", facts, decode_frame)
        facts.frame_size = None if frame is None else (frame.shape[0], frame.shape[1])
    if mask_bytes is None:
        return facts
    raw = _decode(pair.mask_uri, mask_bytes, "masks", facts, decode_mask)
    if raw is None:
        return facts
    if facts.frame_size not in (None, raw.shape[:2]):
        mask_px, frame_px = (size_text(size) for size in (raw.shape[:2], facts.frame_size or (0, 0)))
        facts.problems.append(("masks have another size than their frame", pair.mask_uri, f"{mask_px}, not {frame_px}"))
    mask_format = mask_format or guess_mask_format(raw)
    _encode(pair.mask_uri, decode_frame(mask_bytes) if mask_format == "colors" else raw, class_set, mask_format, facts)
    return facts


def _read(uri: str, what: str, facts: PairFacts) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except (FileNotFoundError, PermissionError, IsADirectoryError, storage.NotAFile) as error:
        facts.problems.append((f"{what} cannot be read", uri, error.strerror or type(error).__name__))
        return None


def _decode(
    uri: str, data: bytes, what: str, facts: PairFacts, decode: Callable[[bytes], np.ndarray]
) -> np.ndarray | None:
    try:
        pixels = decode(data)
        header = read_header(data)
    except ImageRefused as error:
        facts.problems.append((f"{what} {_REFUSALS[error.reason]}", uri, str(error)))
        return None
    facts.mask_is_jpeg |= what == "masks" and header.format == "JPEG"
    facts.remarks += [(f"{what} {clause}", uri, remark) for clause, remark in _oddities(header, what)]
    return pixels


def _oddities(header: ImageHeader, what: str) -> Iterator[tuple[str, str]]:
    if header.mode in _ODD_MODES:
        meaning = ""
        if header.mode == "P":
            meaning = "its colours are taken" if what == "frames" else ""
        elif header.mode in ("RGBA", "LA"):
            meaning = "dropped"
        yield _ODD_MODES[header.mode], meaning
    if header.mode in ("L", "LA") and what == "frames":
        yield "are grey", ""
    if header.orientation != 1:
        yield "are turned by EXIF", f"orientation {header.orientation}, pixels are taken as stored"
    if header.format == "JPEG" and what == "masks":
        yield "are saved as JPEG", "which changes pixels; save masks as PNG"


def _encode(uri: str, raw: np.ndarray, class_set: ClassSet, mask_format: str, facts: PairFacts) -> None:
    try:
        if mask_format != "colors":
            facts.pixels_of_id = count_values(mask_ids(raw, mask_format))
        mask_HW = encode_mask(raw, class_set, mask_format)
    except UnknownValuesError as error:
        if facts.mask_is_jpeg or _lie_between(error.values, class_set):
            kind = "colour" if mask_format == "colors" else "id"
            clause = f"masks have {kind}s between those of classes: saved as JPEG or resized smoothly"
            remark = f"{count(error.n_values, kind)}, {count(error.n_pixels, 'pixel')}"
            facts.problems.append((clause, uri, remark))
        else:
            facts.unknown = error
    except ValueError as error:
        facts.problems.append((f"masks do not fit the format {mask_format}", uri, str(error)))
    else:
        facts.pixels_of = count_values(mask_HW)
        if facts.pixels_of[IGNORED_ID] == mask_HW.size:
            facts.remarks.append(("masks show no class: every pixel is ignored", uri, ""))


def _lie_between(values: Mapping[RawValue, int], class_set: ClassSet) -> bool:
    """Whether nearly all pixels of unknown colours lie on lines between two known colours, or next to a known one."""
    colors = [value for value in values if isinstance(value, tuple)]
    if len(colors) < _BETWEEN_MIN_COLORS:
        return False
    most = sorted(colors, key=lambda color: -values[color])[:64]
    known = np.array(sorted(_known_colors(class_set)), np.float64)
    starts, ends = (known[places] for places in np.triu_indices(len(known)))
    lines = ends - starts
    squares = np.maximum((lines**2).sum(axis=1), 1.0)
    near = 0
    for color in most:
        along = np.clip(((color - starts) * lines).sum(axis=1) / squares, 0, 1)
        distances = np.linalg.norm(starts + along[:, None] * lines - color, axis=1)
        near += values[color] if distances.min() <= _BETWEEN_DISTANCE else 0
    return near >= _BETWEEN_SHARE * sum(values[color] for color in most)


def _known_colors(class_set: ClassSet) -> set[Color]:
    values: set[RawValue] = {*class_set.ignore}
    for item in class_set.classes:
        values |= {item.color, *item.values}
    return {value for value in values if isinstance(value, tuple)}


def look_swapped(pairs: Sequence[ImagePair], class_set: ClassSet) -> bool:
    """Whether the frames are masks and the masks are photographs, by a few pairs that can be read.

    Raises:
        StorageError: the store did not answer.
    """
    n_swapped = 0
    for index in spread(len(pairs), SWAPPED_PAIRS):
        try:
            if not _is_swapped(pairs[index], class_set):
                return False
            n_swapped += 1
        except (FileNotFoundError, PermissionError, IsADirectoryError, storage.NotAFile, PairProblem, ImageRefused):
            continue  # it becomes a finding when every file is read
    return n_swapped > 0


def _is_swapped(pair: ImagePair, class_set: ClassSet) -> bool:
    mask_bytes = storage.read_bytes(pair.mask_uri)
    if fits_a_format(pair.mask_uri, mask_bytes, class_set):
        return False
    frame_bytes = storage.read_bytes(pair.image_uri)
    if fits_a_format(pair.image_uri, frame_bytes, class_set):
        return True
    n_frame, n_mask = (_n_colors(decode_frame(data)) for data in (frame_bytes, mask_bytes))
    return n_frame <= _FEW_COLORS and n_mask >= _MANY_COLORS


def _n_colors(image_HWC: np.ndarray) -> int:
    packed = image_HWC.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    return len(np.unique(packed))

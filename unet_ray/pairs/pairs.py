"""Frames and masks to checked pairs: found by name, the meaning of their masks found out, read and compared.

Shapes: `H` height px, `W` width px, `C` colour (red, green, blue). An encoded mask is uint8 [H, W]: class ids 0 to K-1,
or `IGNORED_ID`. Pixels are read by `load_pair` and `detect_mask_format` only; all else is names.

>>> listing = find_pairs("log/CameraRGB", "log/CameraMask")
>>> require_complete(listing)
>>> mask_format = detect_mask_format(listing.pairs, PRESETS["carla23"])
>>> split = splits.split_pairs(listing.pairs, val_fraction=0.1)
>>> image_HWC, mask_HW = load_pair(split.train[0], PRESETS["carla23"], mask_format)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet_ray import storage
from unet_ray.classes import ClassSet, UnknownValuesError
from unet_ray.frames import IMAGE_EXTENSIONS, natural_key, parse_path
from unet_ray.images import ImageRefused, decode_frame, decode_mask
from unet_ray.messages import count, first_few

MASK_FORMATS = ("channel-max", "ids", "colors")
"""How a mask's pixels mean a class: the maximum over the channels, one channel's id, or the class set's colours."""

DETECTION_MASKS = 16
"""Masks, spread over the data set, from which its format is found out."""


@dataclass(frozen=True, kw_only=True)
class ImagePair:
    """A frame and its mask, not yet read."""

    pair_id: str
    """The frame's path relative to its folder, without suffix and extension."""
    image_uri: str
    mask_uri: str
    sequence: str
    """The drive."""
    camera: str
    frame_index: int | None
    """Place in time within sequence and camera; None where the name has no number."""


@dataclass(frozen=True, kw_only=True)
class PairListing:
    """What lies in a folder of frames and in a folder of masks; all sorted, frame 2 before frame 10."""

    pairs: tuple[ImagePair, ...]
    images_without_mask: tuple[str, ...]
    """Paths relative to the folder of frames."""
    masks_without_image: tuple[str, ...]
    """Paths relative to the folder of masks."""


class PairProblem(ValueError):
    """A pair that training refuses.

    Attributes:
        uri: the file.
        problem: what was found, what is allowed, what to do.
    """

    def __init__(self, uri: str, problem: str):
        super().__init__(uri, problem)  # both are arguments, so that it survives pickling between processes
        self.uri = uri
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.uri}: {self.problem}"


# --- finding pairs by name ---


def find_pairs(
    images: str,
    masks: str,
    *,
    image_suffix: str = "",
    mask_suffix: str = "",
    path_pattern: str | None = None,
) -> PairListing:
    """Pairs the files of two folders, at any depth, by relative path without suffix and extension.

    Files whose names do not end in the suffix take no part (Cityscapes has four kinds of masks in one folder), nor do
    hidden files.

    Args:
        images: URI of the folder of frames.
        masks: URI of the folder of masks; it may be the same folder where the suffixes tell them apart.
        image_suffix: end of a frame's name before the extension, which its mask's name lacks.
        mask_suffix: the same of a mask.
        path_pattern: see `frames.parse_path`; applied to the frame's relative path.

    Raises:
        ValueError: a folder that is missing or empty, two files with one pair id, or no pair at all.
        StorageError: the store did not answer.
    """
    frame_files = _images_below(images, image_suffix, "frames")
    mask_files = _images_below(masks, mask_suffix, "masks")
    for uri in frame_files.keys() & mask_files.keys():  # one folder within the other, or both the same
        frame_rank, mask_rank = (len(image_suffix), len(images)), (len(mask_suffix), len(masks))
        if frame_rank == mask_rank:
            raise ValueError(
                f"{images} is the folder of frames and of masks; tell them apart by --image-suffix or --mask-suffix"
            )
        del (frame_files if frame_rank < mask_rank else mask_files)[uri]
    frames_by_id = _by_pair_id(frame_files.values(), image_suffix, "frames")
    masks_by_id = _by_pair_id(mask_files.values(), mask_suffix, "masks")
    ids = sorted(frames_by_id.keys() & masks_by_id.keys(), key=natural_key)
    if not ids:
        first_frame, first_mask = (
            min((file.path for file in files.values()), default="none") for files in (frame_files, mask_files)
        )
        raise ValueError(
            f"no frame in {images} has a mask in {masks}: frames are such as {first_frame!r}, masks such as"
            f" {first_mask!r}; without extension they must be equal, or give --image-suffix and --mask-suffix"
        )
    pairs = tuple(_pair(i, frames_by_id[i], masks_by_id[i], path_pattern) for i in ids)
    return PairListing(
        pairs=pairs,
        images_without_mask=_paths_of(frames_by_id, masks_by_id),
        masks_without_image=_paths_of(masks_by_id, frames_by_id),
    )


def _images_below(root: str, suffix: str, what: str) -> dict[str, storage.FileInfo]:
    """The image files below a folder whose names end in the suffix, by URI."""
    try:
        listed = [file for file in storage.list_files(root) if not _is_hidden(file.path)]
    except FileNotFoundError as error:
        raise ValueError(f"{root}: no such folder of {what}") from error
    except NotADirectoryError as error:
        raise ValueError(f"{root} is a file; give the folder of {what}") from error
    image_files = [file for file in listed if file.path.lower().endswith(IMAGE_EXTENSIONS)]
    if not image_files:
        content = f"{count(len(listed), 'file')}, but no image" if listed else "nothing"
        raise ValueError(f"the folder of {what} {root} holds {content}; allowed are {', '.join(IMAGE_EXTENSIONS)}")
    files = {file.uri: file for file in image_files if _stem(file.path).endswith(suffix)}
    if not files:
        option = "--image-suffix" if what == "frames" else "--mask-suffix"
        raise ValueError(
            f"{option} is {suffix!r}, but none of the {len(image_files):,} images in {root} has a name that ends so;"
            f" they are such as {image_files[0].path!r}"
        )
    return files


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _by_pair_id(files: Iterable[storage.FileInfo], suffix: str, what: str) -> dict[str, storage.FileInfo]:
    by_id: dict[str, storage.FileInfo] = {}
    for file in files:
        pair_id = _stem(file.path).removesuffix(suffix)
        if pair_id in by_id:
            raise ValueError(
                f"two {what} have the name {pair_id!r}: {by_id[pair_id].uri} and {file.uri}; take one away"
            )
        by_id[pair_id] = file
    return by_id


def _pair(pair_id: str, frame: storage.FileInfo, mask: storage.FileInfo, path_pattern: str | None) -> ImagePair:
    # Without the suffix: the last number of `aachen_000000_000019_leftImg8bit` is not 8.
    without_suffix = f"{pair_id}.{frame.path.rpartition('.')[2]}"
    sequence, camera, frame_index, *_ = parse_path(without_suffix if path_pattern is None else frame.path, path_pattern)
    return ImagePair(
        pair_id=pair_id,
        image_uri=frame.uri,
        mask_uri=mask.uri,
        sequence=sequence,
        camera=camera,
        frame_index=frame_index,
    )


def _paths_of(files: Mapping[str, storage.FileInfo], without: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(sorted((file.path for pair_id, file in files.items() if pair_id not in without), key=natural_key))


def require_complete(listing: PairListing) -> None:
    """Raises ValueError, in one line with counts and the first names, where a frame or a mask has no partner."""
    problems = []
    for what, other, paths in (
        ("frame", "mask", listing.images_without_mask),
        ("mask", "frame", listing.masks_without_image),
    ):
        if paths:
            problems.append(f"{count(len(paths), what)} without a {other}: {first_few(paths)}")
    if problems:
        raise ValueError(
            "; ".join(problems) + "; add what is missing or take these away (unet-ray check lists them all)"
        )


# --- what a mask's pixels mean ---


def detect_mask_format(pairs: Sequence[ImagePair], class_set: ClassSet) -> str:
    """Finds out, from up to `DETECTION_MASKS` masks, how the masks of a data set mean their classes.

    One channel or a palette's indices: `ids`. Three channels of which at most one is not 0 in any pixel, or all are
    equal: `channel-max`. Nothing but colours of the class set: `colors`.

    Returns:
        One of `MASK_FORMATS`.

    Raises:
        ValueError: no format fits all masks, or two do and give different classes.
        PairProblem: a mask cannot be read.
    """
    spread = np.linspace(0, len(pairs) - 1, min(DETECTION_MASKS, len(pairs))).round().astype(int)
    uris = [pairs[index].mask_uri for index in spread]
    contents = storage.read_many([(uri, 0, None) for uri in uris])
    fits: dict[str, frozenset[str]] = {}
    encodings: dict[str, Mapping[str, np.ndarray]] = {}
    for uri, content in zip(uris, contents, strict=True):
        encodings[uri], fits[uri] = _mask_formats(uri, _content(uri, content), class_set)
    common = frozenset.intersection(*fits.values())
    if not common:
        raise ValueError(_contradiction(fits))
    if len(common) > 1 and "colors" in common:
        return _decide(common, encodings)
    return next(name for name in ("ids", "channel-max", "colors") if name in common)


def _mask_formats(uri: str, data: bytes, class_set: ClassSet) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """What a mask gives in each format in which all its values are known, and the formats that its pixels look like."""
    raw = _decoded(uri, decode_mask, data)
    encodings = {}
    for mask_format in MASK_FORMATS:
        try:
            values = _decoded(uri, decode_frame, data) if mask_format == "colors" else raw
            encodings[mask_format] = encode_mask(values, class_set, mask_format)
        except ValueError:
            continue  # the formats that are left say what the mask is
    looks = {"colors"} & encodings.keys()
    if raw.ndim == 2:
        looks |= {"ids", "channel-max"}
    elif _has_one_value_a_pixel(raw):
        looks.add("channel-max")
    return encodings, frozenset(looks)


def _has_one_value_a_pixel(raw_HWC: np.ndarray) -> bool:
    in_one_channel = bool(((raw_HWC != 0).sum(axis=2) <= 1).all())
    return in_one_channel or bool((raw_HWC == raw_HWC[..., :1]).all())


def guess_mask_format(raw: np.ndarray) -> str:
    """What one mask's raw values look like, whether the class set knows them or not."""
    if raw.ndim == 2:
        return "ids"
    return "channel-max" if _has_one_value_a_pixel(raw) else "colors"


def _contradiction(fits: Mapping[str, frozenset[str]]) -> str:
    remedy = f"give --mask-format ({', '.join(MASK_FORMATS)})"
    for uri, formats in fits.items():
        if not formats:
            return (
                f"{uri}: no known mask format: several channels are in use, and not all colours are of the class set;"
                f" {remedy}, or choose another class set (unet-ray check shows the colours)"
            )
    (first, first_fits), *others = fits.items()
    uri, other = next((uri, other) for uri, other in others if not other & first_fits)
    return (
        f"{uri}: its pixels look like {' or '.join(sorted(other))}, those of {first} like"
        f" {' or '.join(sorted(first_fits))}; {remedy}"
    )


def _decide(common: frozenset[str], encodings: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """Chooses between `colors` and a format of ids where the pixels look like both."""
    by_id = "ids" if "ids" in common else "channel-max"
    for uri, masks in encodings.items():
        if by_id not in masks:
            return "colors"  # as ids, some values would be unknown
        if not np.array_equal(masks[by_id], masks["colors"]):
            raise ValueError(f"{uri}: its pixels can be read as {by_id} and as colors; give --mask-format")
    return by_id


def encode_mask(raw: np.ndarray, class_set: ClassSet, mask_format: str) -> np.ndarray:
    """A mask's raw values, uint8 [H, W] or [H, W, C], to an encoded mask, uint8 [H, W].

    Raises:
        UnknownValuesError: ids or colours that the class set does not know.
        ValueError: channels that do not fit the format.
    """
    assert mask_format in MASK_FORMATS, mask_format
    if mask_format == "colors":
        return class_set.encode_colors(raw if raw.ndim == 3 else np.repeat(raw[..., None], 3, axis=2))
    if raw.ndim == 2:
        return class_set.encode_ids(raw)
    if mask_format == "channel-max":
        # Not max(axis=2), which takes 15 times as long: 7.2 ms for 480x640x3, this way 0.47 ms (numpy 2.4, 2026-11-21).
        return class_set.encode_ids(np.maximum(np.maximum(raw[..., 0], raw[..., 1]), raw[..., 2]))
    if not (raw == raw[..., :1]).all():
        raise ValueError(
            "a mask of three channels that differ, where ids are in one; give --mask-format channel-max or colors"
        )
    return class_set.encode_ids(np.ascontiguousarray(raw[..., 0]))


PairContent = tuple[bytes | OSError, bytes | OSError]
"""A frame's file and its mask's, or what reading it gave."""


def read_pairs(pairs: Sequence[ImagePair]) -> Iterator[PairContent]:
    """Yields the files of each pair, in order, with many requests in flight where the store is not local."""

    def read(batch: Sequence[ImagePair]) -> list[PairContent]:
        uris = [uri for pair in batch for uri in (pair.image_uri, pair.mask_uri)]
        contents = storage.read_many([(uri, 0, None) for uri in uris])
        return list(zip(contents[::2], contents[1::2], strict=True))

    if all(storage.is_local(pair.image_uri) for pair in pairs):
        for pair in pairs:
            yield from read([pair])
        return
    at_once = storage.REQUESTS_IN_FLIGHT // 2
    groups = [pairs[start : start + at_once] for start in range(0, len(pairs), at_once)]
    with ThreadPoolExecutor(1) as ahead:  # the next ones come while the caller decodes these
        soon = [ahead.submit(read, group) for group in groups[:2]]
        for group in groups[2:]:
            yield from soon.pop(0).result()
            soon.append(ahead.submit(read, group))
        for last in soon:
            yield from last.result()


def load_pair(
    pair: ImagePair, class_set: ClassSet, mask_format: str, content: PairContent | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads and checks a pair; its files are read here where `read_pairs` has not read them.

    Returns:
        The frame, uint8 [H, W, C], and its encoded mask, uint8 [H, W], both of the files' own size.

    Raises:
        PairProblem: a file that is missing or no image, two sizes, or values that the class set does not know.
        StorageError: the store did not answer.
    """
    frame, mask = content or next(read_pairs([pair]))
    frame_bytes, mask_bytes = _content(pair.image_uri, frame), _content(pair.mask_uri, mask)
    image_HWC = _decoded(pair.image_uri, decode_frame, frame_bytes)
    raw = decode_raw_mask(pair.mask_uri, mask_bytes, mask_format)
    if raw.shape[:2] != image_HWC.shape[:2]:
        raise PairProblem(
            pair.mask_uri,
            f"the mask is {raw.shape[0]} x {raw.shape[1]} (height x width), its frame {pair.image_uri} is"
            f" {image_HWC.shape[0]} x {image_HWC.shape[1]}; they must be of one size",
        )
    try:
        return image_HWC, encode_mask(raw, class_set, mask_format)
    except (UnknownValuesError, ValueError) as error:
        raise PairProblem(pair.mask_uri, str(error)) from error


def decode_raw_mask(uri: str, data: bytes, mask_format: str) -> np.ndarray:
    """A mask's bytes to what `encode_mask` takes; of a palette the colours for `colors`, else the indices."""
    return _decoded(uri, decode_frame if mask_format == "colors" else decode_mask, data)


def _content(uri: str, content: bytes | OSError) -> bytes:
    if isinstance(content, FileNotFoundError):
        raise PairProblem(uri, "the file is gone since it was listed; run again") from content
    if isinstance(content, OSError):
        raise content
    return content


def _decoded(uri: str, decode: Callable[[bytes], np.ndarray], data: bytes) -> np.ndarray:
    try:
        return decode(data)
    except ImageRefused as error:
        raise PairProblem(uri, f"{error.reason}: {error}") from error

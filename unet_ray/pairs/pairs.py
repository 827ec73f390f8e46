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

import numpy as np

from unet_ray import storage
from unet_ray.classes import ClassSet, UnknownValuesError
from unet_ray.frames import IMAGE_EXTENSIONS, is_hidden, natural_key, parse_path
from unet_ray.messages import count, first_few
from unet_ray.pairs.names import NameRule, partners
from unet_ray.pixels.images import ImageRefused, decode_frame, decode_mask

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
    not_files: tuple[str, ...] = ()
    """URIs of pipes, sockets and devices in either folder, which are never opened."""
    n_hidden: int = 0
    """Hidden files in either folder, which take no part (`frames.HIDDEN_RULE`)."""


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
    include_hidden: bool = False,
) -> PairListing:
    """Pairs the files of two folders, at any depth, by relative path without suffix and extension, or by patterns.

    Files whose names do not end in the suffix, or that the pattern does not fit, take no part (Cityscapes has four
    kinds of masks in one folder), nor do hidden files. Names that differ by their Unicode form alone are the same.

    Args:
        images: URI of the folder of frames, or of the frames with `{}` for what they have in common with their masks.
        masks: URI of the folder of masks; it may be the same folder where the suffixes tell them apart.
        image_suffix: end of a frame's name before the extension, which its mask's name lacks.
        mask_suffix: the same of a mask.
        path_pattern: see `frames.parse_path`; applied to the frame's path relative to its folder.
        include_hidden: whether hidden files take part.

    Raises:
        ValueError: a folder that is missing or empty, two files with one name, or no pair at all.
        StorageError: the store did not answer.
    """
    frame_rule = NameRule(uri=images, what="frames", suffix=image_suffix)
    mask_rule = NameRule(uri=masks, what="masks", suffix=mask_suffix)
    passed_over = _PassedOver(include_hidden)
    frame_files, mask_files = _images_below(frame_rule, passed_over), _images_below(mask_rule, passed_over)
    for uri in frame_files.keys() & mask_files.keys():  # one folder within the other, or both the same
        if frame_rule.rank == mask_rule.rank:
            raise ValueError(_not_apart(frame_rule, uri))
        del (frame_files if frame_rule.rank < mask_rule.rank else mask_files)[uri]
    frames_by_key, masks_by_key = _by_key(frame_files.values(), frame_rule), _by_key(mask_files.values(), mask_rule)
    mask_key = partners(frames_by_key, masks_by_key)
    if not mask_key:
        raise ValueError(_no_pair(frame_rule, mask_rule, frame_files.values(), mask_files.values()))
    ids = {key if frame_rule.template is None else _stem(frames_by_key[key].path): key for key in mask_key}
    return PairListing(
        pairs=tuple(
            _pair(pair_id, frames_by_key[ids[pair_id]], masks_by_key[mask_key[ids[pair_id]]], path_pattern)
            for pair_id in sorted(ids, key=natural_key)
        ),
        images_without_mask=_paths_of(frames_by_key, mask_key.keys()),
        masks_without_image=_paths_of(masks_by_key, mask_key.values()),
        not_files=tuple(dict.fromkeys(passed_over.not_files)),
        n_hidden=len(passed_over.hidden),
    )


class _PassedOver:
    """What lies in the folders and takes no part."""

    def __init__(self, include_hidden: bool):
        self._include_hidden = include_hidden
        self.hidden: set[str] = set()
        self.not_files: list[str] = []

    def hides(self, uri: str, path: str) -> bool:
        """Whether a file takes no part as it is hidden; notes it if so."""
        if self._include_hidden or not is_hidden(path):
            return False
        self.hidden.add(uri)
        return True


def _images_below(rule: NameRule, passed_over: _PassedOver) -> dict[str, storage.FileInfo]:
    """The image files below a folder that the rule fits, by URI."""
    root, what = rule.folder, rule.what

    def note(uri: str, error: OSError) -> None:
        if passed_over.hides(uri, uri.removeprefix(f"{root.rstrip('/')}/")):
            return
        if not isinstance(error, storage.NotAFile):
            raise error
        passed_over.not_files.append(uri)

    try:
        every = storage.list_files(root, on_unreadable=note)
        listed = [file for file in every if not passed_over.hides(file.uri, file.path)]
    except FileNotFoundError as error:
        raise ValueError(f"{root}: no such folder of {what}") from error
    except NotADirectoryError as error:
        raise ValueError(f"{root} is a file; give the folder of {what}") from error
    image_files = [file for file in listed if file.path.lower().endswith(IMAGE_EXTENSIONS)]
    if not image_files:
        content = f"{count(len(listed), 'file')}, but no image" if listed else "nothing"
        raise ValueError(f"the folder of {what} {root} holds {content}; allowed are {', '.join(IMAGE_EXTENSIONS)}")
    files = {file.uri: file for file in image_files if rule.key(file.path) is not None}
    if not files:
        such = f"they are such as {image_files[0].path!r}"
        if rule.template is not None:
            option = "--images" if what == "frames" else "--masks"
            raise ValueError(
                f"{option}: none of the {len(image_files):,} images in {root} has a name like {rule.template!r}; {such}"
            )
        option = "--image-suffix" if what == "frames" else "--mask-suffix"
        raise ValueError(
            f"{option} is {rule.suffix!r}, but none of the {len(image_files):,} images in {root} has a name that ends"
            f" so; {such}"
        )
    return files


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _not_apart(rule: NameRule, uri: str) -> str:
    if rule.template is not None:
        return f"{uri} fits the pattern of the frames and that of the masks; give patterns that tell them apart"
    return f"{rule.folder} is the folder of frames and of masks; tell them apart by --image-suffix or --mask-suffix"


def _no_pair(
    frame_rule: NameRule,
    mask_rule: NameRule,
    frame_files: Iterable[storage.FileInfo],
    mask_files: Iterable[storage.FileInfo],
) -> str:
    first_frame, first_mask = (
        min((file.path for file in files), default="none") for files in (frame_files, mask_files)
    )
    remedy = "the texts in place of {} must be equal"
    if frame_rule.template is None:
        remedy = (
            "without extension they must be equal, or give --image-suffix and --mask-suffix, or patterns of both with"
            " {} for what is equal (--images 'camera/{}_camera_{}.png' --masks 'label/{}_label_{}.png')"
        )
    return (
        f"no frame in {frame_rule.folder} has a mask in {mask_rule.folder}: frames are such as {first_frame!r}, masks"
        f" such as {first_mask!r}; {remedy}"
    )


def _by_key(files: Iterable[storage.FileInfo], rule: NameRule) -> dict[str, storage.FileInfo]:
    by_key: dict[str, storage.FileInfo] = {}
    for file in files:
        key = rule.key(file.path) or ""
        if key in by_key:
            raise ValueError(f"two {rule.what} have the name {key!r}: {by_key[key].uri} and {file.uri}; take one away")
        by_key[key] = file
    return by_key


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


def _paths_of(files: Mapping[str, storage.FileInfo], paired: Iterable[str]) -> tuple[str, ...]:
    unpaired = files.keys() - set(paired)
    return tuple(sorted((files[key].path for key in unpaired), key=natural_key))


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
        if listing.not_files:
            problems.append(f"pipes, sockets or devices, which are no files: {first_few(listing.not_files)}")
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
    uris = [pairs[index].mask_uri for index in spread(len(pairs), DETECTION_MASKS)]
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


def spread(n_pairs: int, most: int) -> list[int]:
    """Returns up to so many places, from the first pair to the last."""
    return np.linspace(0, n_pairs - 1, min(most, n_pairs)).round().astype(int).tolist()


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


def fits_a_format(uri: str, data: bytes, class_set: ClassSet) -> bool:
    """Whether an image is, by its values and their look, a mask of the class set. Raises PairProblem for no image."""
    encodings, looks = _mask_formats(uri, data, class_set)
    return bool(encodings.keys() & looks)


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
    return class_set.encode_ids(mask_ids(raw, mask_format))


def mask_ids(raw: np.ndarray, mask_format: str) -> np.ndarray:
    """A mask's raw values, uint8 [H, W] or [H, W, C], to the ids that they mean, uint8 [H, W].

    Args:
        raw: the values.
        mask_format: `channel-max` or `ids`.

    Raises:
        ValueError: channels that do not fit the format.
    """
    if raw.ndim == 2:
        return raw
    if mask_format == "channel-max":
        # Not max(axis=2), which takes 15 times as long: 7.2 ms for 480x640x3, this way 0.47 ms (numpy 2.4, 2026-11-21).
        return np.maximum(np.maximum(raw[..., 0], raw[..., 1]), raw[..., 2])
    if not (raw == raw[..., :1]).all():
        raise ValueError(
            "a mask of three channels that differ, where ids are in one; give --mask-format channel-max or colors"
        )
    return np.ascontiguousarray(raw[..., 0])


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

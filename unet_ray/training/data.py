"""The data of a training or an evaluation, looked up before Ray starts: classes, pairs, split, the masks' format."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from unet_ray.classes import ClassSet
from unet_ray.config import EvaluateConfig, TrainConfig, load_class_set
from unet_ray.frames import HIDDEN_RULE
from unet_ray.messages import count, first_few, say, shown_path
from unet_ray.options.config_files import read_yaml
from unet_ray.pairs.pairs import ImagePair, detect_mask_format, find_pairs, require_complete
from unet_ray.pairs.splits import Split, split_pairs
from unet_ray.pixels.images import ImageRefused, frame_size
from unet_ray.storage import read_many
from unet_ray.training import evaluator


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What is known of the data before a pixel is read, but for a few masks."""

    class_set: ClassSet
    mask_format: str
    split: Split
    class_weights_K: tuple[float, ...] | None
    """Weights from a file."""

    @property
    def samples(self) -> tuple[ImagePair, ...]:
        """The pairs of `samples.png`, spread over those that validate, or that train where none validates."""
        pairs = self.split.validation or self.split.train
        return tuple(pairs[index] for index in evaluator.sample_places(len(pairs)))


def find_data(config: TrainConfig) -> TrainingData:
    """Finds classes, pairs, split and mask format; everything that can be refused before Ray starts."""
    class_set = load_class_set(config.classes)
    pairs = complete_pairs(config, *config.folders())
    if config.val_images is not None and config.val_masks is not None:
        val_pairs = complete_pairs(config, config.val_images, config.val_masks)
        how = f"{count(len(val_pairs), 'other frame')} of {config.val_images} validate"
        trained, validation = (_with_whole_drives(group, config.path_pattern) for group in (pairs, val_pairs))
        split = Split(train=trained, validation=validation, how=how)
    else:
        split = split_pairs(
            pairs,
            val_fraction=config.val_fraction,
            guard_frames=config.guard_frames,
            manifest=config.split_manifest,
        )
    if not split.train:
        raise ValueError(f"no frame is left for training ({split.how}); lower --val-fraction or change the split")
    say(f"{count(len(pairs), 'pair')}; {split.how}")
    mask_format = find_mask_format(config.mask_format, (*split.train, *split.validation), class_set)
    weights_K = read_class_weights(config.class_weights, class_set)
    return TrainingData(class_set=class_set, mask_format=mask_format, split=split, class_weights_K=weights_K)


MOST_PIXELS = 512 * 1024
"""Of the network's input with `--image-size data`."""
_SIDE_STEP = 32
_FRAMES_LOOKED_AT = 8


def size_of_frames(config: TrainConfig) -> tuple[int, int]:
    """Returns the size for `--image-size data` and says it: that of most of some frames, in steps of 32 px.

    Raises:
        ValueError: none of these frames is an image.
    """
    pairs = complete_pairs(config, *config.folders())
    chosen = np.linspace(0, len(pairs) - 1, min(_FRAMES_LOOKED_AT, len(pairs))).astype(int)
    sizes: Counter[tuple[int, int]] = Counter()
    for content in read_many([(pairs[index].image_uri, 0, None) for index in chosen]):
        with contextlib.suppress(ImageRefused):
            sizes.update([frame_size(content)] if isinstance(content, bytes) else [])
    if not sizes:
        raise ValueError(
            f"--image-size data: {pairs[0].image_uri} and others are no images; `unet-ray check` lists them"
        )
    (frame, _), *_ = sizes.most_common(1)
    size = bounded_size(frame)
    say(f"image size: {size[0]}x{size[1]}, for frames of {frame[0]}x{frame[1]} (--image-size data)")
    return size


def bounded_size(frame: tuple[int, int]) -> tuple[int, int]:
    """Returns a frame's (height, width), scaled down to `MOST_PIXELS` where it is larger, in steps of 32 px."""
    scale = min(1.0, (MOST_PIXELS / (frame[0] * frame[1])) ** 0.5)
    height_px, width_px = (max(1, round(side * scale / _SIDE_STEP)) * _SIDE_STEP for side in frame)
    return height_px, width_px


def _with_whole_drives(pairs: Sequence[ImagePair], path_pattern: str | None) -> tuple[ImagePair, ...]:
    """Names a drive that is a folder by the folder's whole URI: `0001` below one root is not `0001` below another."""
    if path_pattern is not None and "sequence" in re.compile(path_pattern).groupindex:
        return tuple(pairs)
    return tuple(replace(pair, sequence=pair.image_uri.rpartition("/")[0]) for pair in pairs)


def complete_pairs(config: TrainConfig | EvaluateConfig, images: str, masks: str) -> tuple[ImagePair, ...]:
    """Returns the pairs of two folders.

    Raises:
        ValueError: a folder that has none, or frames and masks without a partner.
    """
    say(f"listing {shown_path(images)} and {shown_path(masks)}")
    listing = find_pairs(
        images,
        masks,
        image_suffix=config.image_suffix,
        mask_suffix=config.mask_suffix,
        path_pattern=config.path_pattern if isinstance(config, TrainConfig) else None,
        include_hidden=config.include_hidden,
    )
    if listing.n_hidden:
        say(f"ignored as hidden: {listing.n_hidden:,} ({HIDDEN_RULE}; --include-hidden takes them)")
    if listing.not_files:
        say(f"ignored, as pipes, sockets or devices: {first_few(listing.not_files)}")
    require_complete(listing)
    return listing.pairs


def find_mask_format(mask_format: str, pairs: Sequence[ImagePair], class_set: ClassSet) -> str:
    """Returns the format that was told or, for `auto`, the one that some of the masks show, and says so."""
    if mask_format != "auto":
        return mask_format
    detected = detect_mask_format(pairs, class_set)
    say(f"masks: {detected} (found out; --mask-format sets it)")
    return detected


def read_class_weights(source: str, class_set: ClassSet) -> tuple[float, ...] | None:
    """Returns the weights of a YAML file `{class: weight}` in the order of the classes; None for a way to compute them.

    Raises:
        ValueError: no such way and no such file, or not one weight for each class.
    """
    if source in ("none", "log", "median"):
        return None
    if not source.endswith((".yaml", ".yml")):
        raise ValueError(f"--class-weights is {source!r}; give none, log, median or the path of a .yaml file")
    weights = read_yaml(source)
    missing, unknown = set(class_set.names) - weights.keys(), weights.keys() - set(class_set.names)
    if missing or unknown:
        wrong = f"lacks {', '.join(sorted(missing))}" if missing else f"names {', '.join(map(str, unknown))}"
        raise ValueError(f"{source} {wrong}; give one weight for each class of {class_set.name}, no others")
    bad = [name for name, weight in weights.items() if type(weight) not in (int, float) or not 0 <= weight < 1e6]
    if bad:
        raise ValueError(f"{source}: the weight of {bad[0]} is {weights[bad[0]]!r}; give a number from 0 to 1,000,000")
    return tuple(float(weights[name]) for name in class_set.names)

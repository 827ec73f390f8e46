"""The samples of a run while it trains, as TensorBoard shows them: frame, true mask and predicted mask of some epochs.

RUN/tensorboard/samples/events.out.tfevents.0000000006.unet_ray    the picture of epoch 6

Each is a file of its own, which never changes: TensorBoard reads a folder's files in the order of their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from unet_ray import storage
from unet_ray.classes import ClassSet
from unet_ray.pairs.pairs import ImagePair, load_pair
from unet_ray.pixels.images import resize_nearest
from unet_ray.training.event_files import image_file

MOST_PICTURES = 10
"""About as many epochs of a run are shown."""

_WIDTH_PX = 640
"""Frames of twice that are kept smaller: a picture shows half of it."""


def is_shown(epoch: int, n_epochs: int) -> bool:
    """Whether the samples of an epoch, from 1, are shown: of the first, the last and evenly in between."""
    return epoch in (1, n_epochs) or epoch % -(-n_epochs // MOST_PICTURES) == 0


class SampleLog:
    """Writes the pictures of a run."""

    def __init__(self, run: str, pairs: Sequence[ImagePair], class_set: ClassSet, mask_format: str):
        self._run, self._pairs, self._class_set, self._mask_format = run, pairs, class_set, mask_format
        self._loaded: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def write(self, epoch: int, wall_time_s: float, masks: Mapping[int, np.ndarray]) -> None:
        """Writes the picture of an epoch.

        Args:
            epoch: from 1.
            wall_time_s: when it was done, seconds since 1970.
            masks: predicted masks, uint8 [H, W], by place among the samples.

        Raises:
            PairProblem: a sample can no longer be read.
            StorageError: storage did not answer.
        """
        from unet_ray.drawing import pictures  # matplotlib takes a second, which the start of a training need not spend

        pairs = [self._load(index) for index in masks]
        frames, true_masks = [frame for frame, _ in pairs], [mask for _, mask in pairs]
        captions = [self._pairs[index].pair_id for index in masks]
        png = pictures.draw_samples(frames, true_masks, list(masks.values()), self._class_set, captions=captions)
        name = f"events.out.tfevents.{epoch:010d}.unet_ray"
        uri = storage.join(self._run, "tensorboard", "samples", name)
        storage.write_whole(uri, image_file("samples", png, epoch, wall_time_s))

    def _load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A frame and its true mask, read once."""
        if index not in self._loaded:
            frame_HWC, mask_HW = load_pair(self._pairs[index], self._class_set, self._mask_format)
            small = np.asarray(Image.fromarray(frame_HWC).reduce(max(1, frame_HWC.shape[1] // _WIDTH_PX)))
            self._loaded[index] = small, resize_nearest(mask_HW, *small.shape[:2])
        return self._loaded[index]

"""What a training worker is told; light, so that the driver, which writes it, loads no TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet_ray.classes import ClassSet
from unet_ray.config import TrainConfig
from unet_ray.training.batches import FrameSource
from unet_ray.training.events import Event


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What the driver tells every worker."""

    config: TrainConfig
    class_set: ClassSet
    class_weights_K: tuple[float, ...] | None
    """Weights from a file; None where they come from the counts below, or there are none."""
    pixels_K: np.ndarray
    """Pixels of each class in the training masks."""
    image_pixels_K: np.ndarray
    """Valid pixels of the training masks in which the class occurs."""
    train: FrameSource
    validation: FrameSource
    samples: FrameSource
    """What `samples.png` will show, all of it."""
    device: str
    """`gpu` or `cpu`."""
    cpus: int
    """Threads for TensorFlow."""
    start_timeout_s: float
    """After which a worker that has not come to its first epoch is given up."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """A worker's place among the others."""

    rank: int
    n_workers: int
    agree: Callable[[Any], Any]
    """Returns rank 0's value on every worker; all must call it."""
    tell: Callable[[Event], None]
    """Sends an event to the driver."""

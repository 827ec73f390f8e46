"""The task of a training worker; light, so that the driver, which writes it, loads no TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unet_ray.classes import ClassSet
from unet_ray.config import TrainConfig
from unet_ray.model.architecture import ModelConfig
from unet_ray.training.batches import FrameSource
from unet_ray.training.events import Event
from unet_ray.training.initial import Drawn


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What the driver tells every worker."""

    config: TrainConfig
    model_config: ModelConfig
    """The network that is trained."""
    class_set: ClassSet
    class_weights_K: tuple[float, ...] | None
    """Weights from a file; None where they come from the counts below, or there are none."""
    pixels_K: np.ndarray
    """Pixels of each class in the training masks."""
    image_pixels_K: np.ndarray
    """Valid pixels of the training masks in which the class occurs."""
    chances_N: np.ndarray | None = None
    """Each training frame's chance to be drawn, see `batches.epoch_order`; None: each comes once an epoch."""
    initial_weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Weights of a trained model or encoder to start from, by name; none: all are drawn from the seed."""
    drawn: Drawn = "none"
    """Which weights are drawn from the seed nevertheless."""
    train: FrameSource
    validation: FrameSource
    samples: FrameSource
    """What `samples.png` will show, all of it."""
    device: str
    """`gpu` or `cpu`."""
    cpus: int
    """Threads for TensorFlow."""
    compiled: bool = False
    """Whether XLA compiles the step: on GPUs where it works."""
    start_timeout_s: float
    """After which a worker that has not come to its first epoch is given up."""


def frame_threads(device: str, cpus: int) -> int:
    """Returns the threads that make views and count pixels: a GPU's CPUs; on CPUs the network needs them itself."""
    return cpus if device == "gpu" else 1


@dataclass(frozen=True, kw_only=True)
class Group:
    """A worker's place among the others."""

    rank: int
    n_workers: int
    agree: Callable[[Any], Any]
    """Returns rank 0's value on every worker; all must call it."""
    tell: Callable[[Event], None]
    """Sends an event to the driver."""

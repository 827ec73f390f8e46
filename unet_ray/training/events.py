"""Events that training workers send to the driver: plain values, in the order in which they happen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet_ray.model.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class PhaseBegun:
    """The workers begin with something that may take a while."""

    line: str


@dataclass(frozen=True, kw_only=True)
class Started:
    """A group of workers has built its network."""

    policy: str
    """Keras' dtype policy of the network."""
    n_workers: int


@dataclass(frozen=True, kw_only=True)
class Restored:
    """It goes on from a checkpoint."""

    epoch: int
    """Epochs that are done."""
    history: tuple[dict[str, Any], ...]
    """One row an epoch."""


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """Progress within an epoch; not every step is told."""

    epoch: int
    """The one that is under way, from 1."""
    frames: int
    """Of this epoch, done."""
    n_frames: int
    seconds: float
    """Since the epoch began."""


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    """An epoch is trained, validated and, where it is due, written."""

    row: dict[str, Any]
    """Of the history; plain JSON types."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What the network of an epoch that is done predicts on the frames of `samples.png`; of some epochs."""

    epoch: int
    """From 1."""
    masks: Mapping[int, np.ndarray]
    """Uint8 [H, W], by place among these frames."""


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Something that the user should know; the training goes on."""

    line: str


@dataclass(frozen=True, kw_only=True)
class Stuck:
    """A worker gets nowhere and ends itself."""

    line: str
    """Which one, for how long, and where it was."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The training ends, and another group of workers would end like this one."""

    error: Exception


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last epoch is done."""

    best_epoch: int
    """Of which the weights are the model's; what follows is of them."""
    calibration: Calibration | None
    """None where no pixel validates."""
    samples: Mapping[int, np.ndarray]
    """Predicted masks, uint8 [H, W], by place among the frames of `samples.png`."""


Event = PhaseBegun | Started | Restored | StepDone | EpochDone | Sampled | Warned | Stuck | Failed | Finished

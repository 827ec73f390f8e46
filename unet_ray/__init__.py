"""Trains a U-Net on many machines, then labels millions of driving frames with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unet_ray.config import EvaluateConfig, SegmentConfig, TrainConfig
    from unet_ray.labelling.job import segment
    from unet_ray.saved_models import save_model
    from unet_ray.training.evaluation import evaluate
    from unet_ray.training.job import train

__version__ = "0.1.0"
PACKAGE = Path(__file__).parent
"""Where our code lies."""
__all__ = ["EvaluateConfig", "SegmentConfig", "TrainConfig", "evaluate", "save_model", "segment", "train"]

_HOMES = {
    "EvaluateConfig": "config",
    "SegmentConfig": "config",
    "TrainConfig": "config",
    "evaluate": "training.evaluation",
    "save_model": "saved_models",
    "segment": "labelling.job",
    "train": "training.job",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: Ray and TensorFlow take seconds, and `import unet_ray.classes` needs neither."""
    if name not in _HOMES:
        raise AttributeError(f"module 'unet_ray' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"unet_ray.{_HOMES[name]}"), name)

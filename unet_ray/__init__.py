"""Trains a U-Net on many machines, then labels millions of driving frames with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unet_ray.commands import (
        check,
        evaluate,
        export_masks,
        export_model,
        import_model,
        report,
        segment,
        train,
        verify,
    )
    from unet_ray.config import (
        CheckConfig,
        EvaluateConfig,
        ExportMasksConfig,
        ExportModelConfig,
        ImportModelConfig,
        ReportConfig,
        SegmentConfig,
        TrainConfig,
        VerifyConfig,
    )
    from unet_ray.labelling.predictor import Model, Prediction, load
    from unet_ray.output.opened import LabelledFrame, Labels, open_labels
    from unet_ray.saved_models import save_model

__version__ = "0.1.0"
PACKAGE = Path(__file__).parent
"""Where our code lies."""
__all__ = [
    "CheckConfig",
    "EvaluateConfig",
    "ExportMasksConfig",
    "ExportModelConfig",
    "ImportModelConfig",
    "LabelledFrame",
    "Labels",
    "Model",
    "Prediction",
    "ReportConfig",
    "SegmentConfig",
    "TrainConfig",
    "VerifyConfig",
    "check",
    "evaluate",
    "export_masks",
    "export_model",
    "import_model",
    "load",
    "open_labels",
    "report",
    "save_model",
    "segment",
    "train",
    "verify",
]

_OTHER_HOMES = {
    **dict.fromkeys(("Model", "Prediction", "load"), "labelling.predictor"),
    **dict.fromkeys(("LabelledFrame", "Labels", "open_labels"), "output.opened"),
    "save_model": "saved_models",
}
"""Modules of what is neither a command nor a configuration."""


def __getattr__(name: str) -> Any:
    """Imports on first use: Ray and TensorFlow take seconds, and `import unet_ray.classes` needs neither."""
    if name not in __all__:
        raise AttributeError(f"module 'unet_ray' has no attribute {name!r}")
    from importlib import import_module

    home = _OTHER_HOMES.get(name, "config" if name.endswith("Config") else "commands")
    return getattr(import_module(f"unet_ray.{home}"), name)


def __dir__() -> list[str]:
    """What there is to use: a notebook completes these names, and not those of modules that happen to be loaded."""
    return [*__all__, "__version__"]

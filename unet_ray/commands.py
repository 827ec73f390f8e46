"""The commands as functions of Python: each takes its configuration, or the same options as keywords.

>>> unet_ray.verify("labels").problems
()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    load_class_set,
)
from unet_ray.options.keywords import takes_options

if TYPE_CHECKING:
    from unet_ray.labelling.result import SegmentResult
    from unet_ray.model.importing import ImportedModel
    from unet_ray.output.exports.formats import Exported
    from unet_ray.output.sources import SourcesRead
    from unet_ray.pairs.check_report import CheckReport
    from unet_ray.training.job import TrainResult

# TensorFlow and Ray take seconds to import, so each function imports what it runs.


@takes_options(CheckConfig)
def check(config: CheckConfig) -> CheckReport:
    """Reads every pair of a data set and returns what is wrong with it; `print(report.as_text())` shows it.

    Raises:
        ValueError: folders in which there is nothing to check, or a class set that is none.
        StorageError: the store did not answer.
    """
    from unet_ray.pairs.checks import check_data_set

    config.configure_storage()
    return check_data_set(config)


@takes_options(TrainConfig)
def train(config: TrainConfig) -> TrainResult:
    """Trains a network into a model folder, or goes on where the same training stopped.

    The defaults are the notebook's. For those of `unet-ray train`, the best that were measured, give it
    `TrainConfig.from_recipe("default", images=…, masks=…, classes=…, out=…)`.

    Raises:
        ValueError: something that the user can mend: files, options, the output's folder.
        JobFailed: the loss became infinite, or workers were lost again and again.
        TryAgain: nodes were lost, and none came in their place.
        StorageError: trouble with storage that may be over when one tries again.
    """
    from unet_ray.training.job import train as run

    return run(config)


@takes_options(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measures a trained model on frame/mask pairs and returns the metrics by name, None where one is undefined.

    Raises:
        ValueError: something that the user can mend.
        StorageError: trouble with storage that may be over when one tries again.
    """
    from unet_ray.training.evaluation import evaluate as run

    return run(config)


@takes_options(SegmentConfig)
def segment(config: SegmentConfig) -> SegmentResult:
    """Labels every frame of some archives once, or lists it with the reason; goes on where an earlier run stopped.

    Raises:
        ValueError: the input, the model or the options are not usable.
        JobFailed: too many frames are rejected, or something of the archives could not be listed.
        StorageError: storage did not answer; the same call goes on later.
    """
    from unet_ray.labelling.job import segment as run

    return run(config)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Whether an output is what its own records say."""

    problems: tuple[str, ...]
    """A line for each thing that is damaged, missing or unfinished; `segment` makes it again."""
    kept_labels: tuple[str, ...]
    """A line for each file with labels that were kept from a damaged one."""
    sources: SourcesRead | None = None
    """What became of the frames that were labelled, where `sources` was asked for."""

    @property
    def is_whole(self) -> bool:
        """Whether every file and row agrees with its record, and every source that was read with its label."""
        return not self.problems and (self.sources is None or not self.sources.problems)


@takes_options(VerifyConfig)
def verify(config: VerifyConfig) -> Verification:
    """Checks an output of `segment` against its own records: every file, every digest, every row.

    Raises:
        ValueError: the folder is no output, or one that kept no digests of its sources.
        StorageError: the store did not answer.
    """
    from unet_ray import storage
    from unet_ray.output import plans, sources
    from unet_ray.output import verify as verification

    config.configure_storage()
    out = storage.resolve(config.out)
    if config.sources:
        sources.require_digests(plans.read_plan(out))
    problems = verification.verify(out)
    return Verification(
        problems=tuple(problems),
        kept_labels=() if problems else tuple(verification.kept_labels(out)),
        sources=sources.read_sources(plans.read_plan(out)) if config.sources else None,
    )


@takes_options(ExportMasksConfig)
def export_masks(config: ExportMasksConfig) -> Exported:
    """Writes the masks of a finished output as files for other tools, and returns how many.

    Raises:
        ValueError: no output, one that is not finished, or an option that does not fit it.
        JobFailed: a file of it is damaged.
        StorageError: the store did not answer.
    """
    from unet_ray.output.exports.formats import export_masks as run

    config.configure_storage()
    return run(config)


@takes_options(ReportConfig)
def report(config: ReportConfig) -> str:
    """Writes the page of a finished output or of a training run anew, and returns its URI.

    Raises:
        ValueError: the folder holds neither, or nothing that is finished.
        JobFailed: a file of it is damaged.
        StorageError: the store did not answer.
    """
    from unet_ray.reports.report import write_report

    config.configure_storage()
    return write_report(config)


@takes_options(ExportModelConfig)
def export_model(config: ExportModelConfig) -> str:
    """Writes a trained model for use without Ray and without this package, and returns its URI.

    Raises:
        ValueError: the model folder, the format or `out` cannot be used.
    """
    from unet_ray.model.export import export_model as run

    config.configure_storage()
    return run(config.model, config.out, config.format, allow_network=config.allow_network)


@takes_options(ImportModelConfig)
def import_model(config: ImportModelConfig) -> ImportedModel:
    """Makes a model folder of an ONNX file, which `load`, `segment` and `evaluate` take like any other.

    Raises:
        ValueError: the file, or what it gives, is not what can label frames.
        StorageError: the store did not answer.
    """
    from unet_ray.model.importing import import_onnx

    config.configure_storage()
    return import_onnx(
        config.onnx,
        config.out,
        load_class_set(config.classes),
        config.preprocessing(),
        image_size=config.image_size,
        layout=config.layout,
        output=config.output,
        kind=config.kind,
        frames=config.frames,
    )

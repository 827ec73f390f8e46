"""What a training leaves in its folder when it ends: model, history, pictures, metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unet_ray import storage
from unet_ray.classes import ClassSet
from unet_ray.config import TrainConfig
from unet_ray.errors import JobFailed
from unet_ray.messages import say
from unet_ray.model import bundle, metrics
from unet_ray.model.architecture import ModelConfig
from unet_ray.model.calibration import Calibration, at_end, error_metrics
from unet_ray.pairs.pairs import ImagePair, load_pair
from unet_ray.training import checkpoints, run_folder
from unet_ray.training import evaluator as evaluation
from unet_ray.training.checkpoints import MODEL_SIZE, OWN_SIZE, Checkpoint
from unet_ray.training.data import TrainingData
from unet_ray.training.events import Finished
from unet_ray.training.monitor import write_history


def write_results(
    config: TrainConfig, data: TrainingData, model_config: ModelConfig, finished: Finished
) -> dict[str, Any]:
    """Writes the bundle, the pictures and, last, `metrics.json`."""
    last, best = _last_and_best(config.out)
    if best.epoch != finished.best_epoch:
        raise JobFailed(
            f"the checkpoint of epoch {finished.best_epoch}, which the workers took for the model, was damaged "
            "meanwhile; give the command again"
        )
    row = last.history[best.epoch - 1]
    results: dict[str, Any] = {"epochs": last.epoch, "best_epoch": best.epoch}
    results |= {key: row[key] for key in ("loss", "accuracy", "val/loss") if key in row}
    own_KK = best.tensors.get(OWN_SIZE)
    if own_KK is not None:
        results |= evaluation.metrics_of(own_KK, best.tensors[MODEL_SIZE], data.class_set.names)
        say(*metrics.class_table(own_KK, data.class_set.names).splitlines())
    say(*calibration_lines(finished.calibration, validates=bool(data.split.validation)))
    temperature = None
    if finished.calibration is not None:
        temperature = results["temperature"] = finished.calibration.temperature
        results |= error_metrics(finished.calibration.error_before, finished.calibration.error_after)
    weights = checkpoints.network_weights(best)
    folder = storage.join(config.out, "model")
    bundle.write_bundle(folder, weights, model_config, data.class_set, results, temperature=temperature)
    write_history(config.out, last.history)
    _draw_curves(config.out, last.history)
    draw_results(config.out, data.samples, data.class_set, data.mask_format, finished.samples, own_KK)
    storage.write_whole(storage.join(config.out, run_folder.METRICS_FILE), json.dumps(results, indent=1).encode())
    return results


def _last_and_best(run: str) -> tuple[Checkpoint, Checkpoint]:
    last = checkpoints.newest_valid(run, on_damaged=lambda line: say(f"warning: {line}"))
    if last is None:
        raise JobFailed(f"{run} holds no checkpoint that verifies, though training ended; give the command again")
    return last, checkpoints.best_or_this(run, last, on_damaged=lambda line: say(f"warning: {line}"))


def calibration_lines(fitted: Calibration | None, *, validates: bool) -> list[str]:
    """Returns what is said of a training's calibration."""
    if fitted is None:
        reason = "no pixel of the validation frames counts" if validates else "no frames validate"
        return [f"confidence is not calibrated: {reason}"]
    lines = [
        f"temperature {fitted.temperature:.3f}: the expected calibration error is {fitted.error_after:.4f}, "
        f"{fitted.error_before:.4f} without it"
    ]
    if at_end(fitted.temperature):
        end = "largest" if fitted.temperature > 1 else "smallest"
        lines.append(f"that is the {end} temperature that is tried; a better one may lie beyond it")
    return lines


def _draw_curves(run: str, history: Sequence[Mapping[str, Any]]) -> None:
    from unet_ray.drawing import pictures  # matplotlib takes a second, which a worker need not spend

    storage.write_whole(storage.join(run, "curves.png"), pictures.draw_curves(history))


def draw_results(
    out: str,
    pairs: Sequence[ImagePair],
    class_set: ClassSet,
    mask_format: str,
    samples: Mapping[int, np.ndarray],
    confusion_KK: np.ndarray | None,
) -> None:
    """Draws samples (true and predicted masks of some frames) and, where frames validated, the confusion matrix."""
    from unet_ray.drawing import pictures

    if confusion_KK is not None:
        picture = pictures.draw_confusion(confusion_KK, class_set.names)
        storage.write_whole(storage.join(out, "confusion.png"), picture)
        numbers = metrics.confusion_csv(confusion_KK, class_set.names)
        storage.write_whole(storage.join(out, "confusion.csv"), numbers)
    if samples:
        loaded = [load_pair(pairs[index], class_set, mask_format) for index in samples]
        captions = [pairs[index].pair_id for index in samples]
        frames, true_masks = [frame for frame, _ in loaded], [mask for _, mask in loaded]
        picture = pictures.draw_samples(frames, true_masks, list(samples.values()), class_set, captions=captions)
        storage.write_whole(storage.join(out, "samples.png"), picture)

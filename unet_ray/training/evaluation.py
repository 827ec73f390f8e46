"""A trained model measured on frame/mask pairs: one task on the cluster, metrics and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import ray

from unet_ray import storage
from unet_ray.cluster.connection import connect
from unet_ray.cluster.gpus import require_usable_gpu
from unet_ray.cluster.resources import (
    default_cpus,
    resolve_device,
    wait_for_resources,
    worker_resources,
)
from unet_ray.cluster.shared_paths import require_seen_by_all
from unet_ray.config import EvaluateConfig
from unet_ray.messages import say
from unet_ray.model import bundle, metrics
from unet_ray.model.devices import choose_policy, configure_tensorflow
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.onnx_labels import require_labelling_options
from unet_ray.progress import Progress
from unet_ray.training import evaluator as evaluation
from unet_ray.training.batches import FrameSource, IngestPlan
from unet_ray.training.blocks import ingest
from unet_ray.training.data import complete_pairs, find_mask_format
from unet_ray.training.results import draw_results
from unet_ray.training.task import frame_threads

PROGRESS_INTERVAL_S = 0.5
"""Between two reports of the frames that are done."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measures a model on pairs and prints the table of its classes; `--out` gets metrics and pictures.

    Returns:
        `val/mean_iou`, `val/iou/<class>`, … at the masks' own sizes, the same under `val_model_size/`, `val/loss`,
        `val/boundary_f1`, `val/boundary_f1/<class>` (see `metrics.boundary_counts`), the model's `temperature`, and
        `val/expected_calibration_error/before` and `after` it, `val/error_correlation/pearson` and `spearman` (see
        `calibration`; at the network's size), None where undefined.

    Raises:
        ValueError: something that the user can mend.
        StorageError: trouble with storage that may be over when one tries again.
    """
    config.configure_storage()
    if config.out is not None:
        storage.require_writable(storage.resolve(config.out), "--out")
    model = bundle.read_bundle(config.model, allow_network=config.allow_network)
    model.require_buildable()
    require_labelling_options(model, slides=False, tta=config.tta, precision=config.precision)
    class_set = model.class_set
    pairs = complete_pairs(config, *map(storage.resolve, config.folders()))
    mask_format = find_mask_format(config.mask_format, pairs, class_set)
    connect()
    require_seen_by_all({"--images": [pairs[0].image_uri], "--masks": [pairs[0].mask_uri]}, None)
    device = resolve_device(config.device)
    cpus = default_cpus(1, device)
    resources = worker_resources(cpus, device)
    wait_for_resources([resources], config.wait_for_resources_s, "the evaluation")
    require_usable_gpu("cpu" if model.onnx else device, config.precision, config.wait_for_resources_s)
    plan = IngestPlan(
        class_set=class_set,
        mask_format=mask_format,
        image_size=model.model_config.image_size,
        keep_full_mask=True,
        preprocessing=model.model_config.preprocessing,
    )
    frames = ingest(pairs, plan).frames
    # A process of its own: TensorFlow takes its number of threads once, and another network's may be another.
    reserved: Any = {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0)}
    run: Any = ray.remote(max_calls=1, num_returns="streaming", **reserved)(_evaluate)
    say("loading and compiling the network")
    results, samples, own_KK = _wait(run.remote(model, frames, config, device, cpus), len(pairs))
    _say_results(config, results, own_KK, class_set.names)
    if config.out is not None:
        out = storage.resolve(config.out)
        draw_results(out, pairs, class_set, mask_format, samples, own_KK)
        storage.write_whole(storage.join(out, "metrics.json"), json.dumps(results, indent=1).encode())
    return results


def _say_results(config: EvaluateConfig, results: Mapping[str, Any], own_KK: np.ndarray, names: Sequence[str]) -> None:
    say(*metrics.class_table(own_KK, names).splitlines())
    if config.tta == "flip":
        say("these are of the mean of a frame's logits and its mirror image's (--tta flip)")
    say(f"boundary F1 {results['val/boundary_f1'] or 0:.3f} within {metrics.BOUNDARY_TOLERANCE:.2%} of the diagonal")
    say(*_calibration_lines(results))


Measured = tuple[dict[str, Any], dict[int, np.ndarray], np.ndarray]
"""Metrics, predicted masks of some frames, confusion matrix at the masks' own sizes."""


def _wait(answers: Iterable[ray.ObjectRef], n_frames: int) -> Measured:
    """Shows how many frames are done, as `_evaluate` says it, and returns what it ends with."""
    with Progress(n_frames, "frames") as progress:
        for answer in answers:
            try:
                value = ray.get(answer)
            except ray.exceptions.RayTaskError as error:  # whose text is a stack trace
                raise error.cause from error
            if isinstance(value, tuple):
                progress.finish()
                return value
            if value > progress.done:
                progress.advance(value - progress.done)
    raise AssertionError("the evaluation ended without a last word")


def _evaluate(
    model: bundle.Bundle, frames: FrameSource, config: EvaluateConfig, device: str, cpus: int
) -> Generator[int | Measured, None, None]:
    """Runs where the device is: yields the frames that are done now and then, and at last what was measured."""
    from unet_ray.training import steps
    from unet_ray.training.calibrator import Calibrator
    from unet_ray.training.onnx_predictor import OnnxPredictor

    predict: steps.Predictor | OnnxPredictor
    if model.onnx:
        configure_tensorflow("cpu", cpus, op_threads=1)
        options = LabelOptions(precision="float32", batch_size=config.batch_size, device=device, tta=config.tta)
        predict = OnnxPredictor(model, options)
    else:
        configure_tensorflow(device, cpus, op_threads=cpus)
        network = model.build_model(dtype_policy=choose_policy(config.precision, device))
        predict = steps.Predictor(network, tta=config.tta)
    reader = frames.open()
    evaluator = evaluation.Evaluator(
        predict, reader, config.batch_size, model.model_config, n_threads=frame_threads(device, cpus)
    )
    calibrator = Calibrator((1.0, model.temperature or 1.0))
    counted = yield from _count(evaluator, range(len(frames.names)), calibrator.add_batch)
    samples = evaluator.predict_masks(evaluation.sample_places(len(frames.names)))
    names = model.class_set.names
    results = evaluation.metrics_of(counted.own_size_KK, counted.model_size_KK, names)
    results |= {f"val/{key}": value for key, value in metrics.boundary_f1(counted.boundary_K4, names).items()}
    results |= {"temperature": model.temperature} | calibrator.metrics()
    yield {"val/loss": predict.loss(counted.sums_S)} | results, samples, counted.own_size_KK


def _count(
    evaluator: evaluation.Evaluator, indices: range, on_predicted: Callable[[evaluation.Predicted], None]
) -> Generator[int, None, evaluation.Evaluation]:
    """Counts frames in a thread of its own; yields now and then how many are done."""
    n_done = 0

    def add_batch(batch: evaluation.Predicted) -> None:
        nonlocal n_done
        on_predicted(batch)
        n_done += len(batch.chosen)

    with ThreadPoolExecutor(1) as beside:
        counting = beside.submit(evaluator.count, indices, with_boundaries=True, on_predicted=add_batch)
        while wait([counting], timeout=PROGRESS_INTERVAL_S).not_done:
            yield n_done
    yield n_done
    return counting.result()


def _calibration_lines(results: Mapping[str, Any]) -> list[str]:
    """What is said of the confidence; nothing of a network that gives class ids, which has none."""
    before, after = (results[f"val/expected_calibration_error/{when}"] for when in ("before", "after"))
    if before is None:
        return []
    temperature, correlation = results["temperature"], results["val/error_correlation/pearson"]
    calibrated = "this model's confidence is not calibrated"
    if temperature is not None:
        calibrated = f"{before:.4f} without the model's temperature of {temperature:.3f}"
    lines = [f"expected calibration error {after:.4f}; {calibrated}"]
    if correlation is not None:
        lines.append(f"expected and true error of the frames correlate by {correlation:.3f}")
    return lines

"""A trained model measured on frame/mask pairs: one task on the cluster, metrics and pictures."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import ray

from unet_ray import storage
from unet_ray.cluster.connection import connect
from unet_ray.cluster.resources import (
    default_cpus,
    resolve_device,
    wait_for_resources,
    worker_resources,
)
from unet_ray.cluster.shared_paths import require_seen_by_all, require_usable_gpu
from unet_ray.config import EvaluateConfig
from unet_ray.messages import say
from unet_ray.model import bundle, metrics
from unet_ray.model.devices import choose_policy, configure_tensorflow
from unet_ray.training import evaluator as evaluation
from unet_ray.training.batches import FrameSource, IngestPlan
from unet_ray.training.blocks import ingest
from unet_ray.training.data import complete_pairs, find_mask_format
from unet_ray.training.results import draw_results


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measures a model on pairs and prints the table of its classes; `--out` gets metrics and pictures.

    Returns:
        `val/mean_iou`, `val/iou/<class>`, … at the masks' own sizes, the same under `val_model_size/`, `val/loss`, and
        `val/boundary_f1`, `val/boundary_f1/<class>` (see `metrics.boundary_counts`).

    Raises:
        ValueError: something that the user can mend.
        StorageError: trouble with storage that may be over when one tries again.
    """
    config.configure_storage()
    model = bundle.read_bundle(config.model)
    class_set = model.class_set
    pairs = complete_pairs(config, storage.resolve(config.images), storage.resolve(config.masks))
    mask_format = find_mask_format(config.mask_format, pairs, class_set)
    connect()
    require_seen_by_all({"--images": [pairs[0].image_uri], "--masks": [pairs[0].mask_uri]}, None)
    device = resolve_device(config.device)
    cpus = default_cpus(1, device)
    resources = worker_resources(cpus, device)
    wait_for_resources([resources], config.wait_for_resources_s, "the evaluation")
    require_usable_gpu(device, config.precision)
    size = (model.model_config.image_height_px, model.model_config.image_width_px)
    plan = IngestPlan(class_set=class_set, mask_format=mask_format, image_size=size, keep_full_mask=True)
    frames = ingest(pairs, plan).frames
    run = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))(_evaluate)
    try:
        results, samples, own_KK = ray.get(run.remote(model, frames, config, device, cpus))
    except ray.exceptions.RayTaskError as error:  # whose text is a stack trace
        raise error.cause from error
    say(metrics.class_table(own_KK, class_set.names))
    say(f"boundary F1 {results['val/boundary_f1'] or 0:.3f} within {metrics.BOUNDARY_TOLERANCE:.2%} of the diagonal")
    if config.out is not None:
        out = storage.resolve(config.out)
        draw_results(out, pairs, class_set, mask_format, samples, own_KK)
        storage.write_whole(storage.join(out, "metrics.json"), json.dumps(results, indent=1).encode())
    return results


def _evaluate(
    model: bundle.Bundle, frames: FrameSource, config: EvaluateConfig, device: str, cpus: int
) -> tuple[dict[str, Any], dict[int, np.ndarray], np.ndarray]:
    """Runs where the device is: metrics, predicted masks of some frames, confusion matrix at the masks' own sizes."""
    from unet_ray.training import steps

    configure_tensorflow(device, cpus, op_threads=cpus)
    predict = steps.Predictor(model.build_model(dtype_policy=choose_policy(config.precision, device)))
    reader = frames.open()
    evaluator = evaluation.Evaluator(predict, reader, config.batch_size, model.model_config)
    counted = evaluator.count(range(len(frames.names)), with_boundaries=True)
    samples = evaluator.predict_masks(evaluation.sample_places(len(frames.names)))
    names = model.class_set.names
    results = evaluation.metrics_of(counted.own_size_KK, counted.model_size_KK, names)
    results |= {f"val/{key}": value for key, value in metrics.boundary_f1(counted.boundary_K4, names).items()}
    return {"val/loss": predict.loss(counted.sums_S)} | results, samples, counted.own_size_KK

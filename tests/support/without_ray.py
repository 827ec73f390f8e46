"""The steps of a labelling one after the other in this process: the same functions as on Ray, for many options."""

from __future__ import annotations

import contextlib
from typing import Any

from unet_ray.archives.listing import list_archives
from unet_ray.config import SegmentConfig
from unet_ray.labelling import stages
from unet_ray.labelling.decoding import DecodeOptions
from unet_ray.labelling.planning import lineage_of
from unet_ray.model.bundle import read_bundle
from unet_ray.model.devices import configure_tensorflow
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.tiling import choose_tiling
from unet_ray.output import plans, publish
from unet_ray.output.chunks import Cutting


def label(model: str, frames: str, out: str, **options: Any) -> None:
    """Labels an archive with a batch of three frames on one thread, and publishes it."""
    from unet_ray.model.labeler import Labeler  # loads TensorFlow

    with contextlib.suppress(RuntimeError):  # a second labelling has other threads than the loaded model of the first
        configure_tensorflow("cpu", 1, op_threads=1, reproducible=True)

    config = SegmentConfig(model=model, frames=frames, out=out, **options)
    bundle = read_bundle(config.model)
    tiling = choose_tiling(config.inference, config.window, config.stride, bundle.model_config)
    precision = "float32" if bundle.onnx or config.precision == "auto" else config.precision
    lineage = lineage_of(config, bundle, tiling, precision)
    plan = plans.plan(out, list_archives(config.frames), lineage, Cutting(chunk_frames=4, shard_rows=8), config_yaml="")
    labeler = Labeler(
        bundle,
        LabelOptions(precision=precision, batch_size=3, mask_size=config.mask_size, tiling=tiling, tta=config.tta),
    )
    network_size = None if tiling else bundle.model_config.image_size
    decode = DecodeOptions(
        network_size=network_size,
        preprocessing=bundle.model_config.preprocessing,
        max_pixels=round(config.max_frame_megapixels * 1e6),
        timeout_s=60,
    )
    for chunk in plan.chunks:
        table = stages.label_chunks(stages.decode_chunks([chunk], decode), labeler, network_size)
        written = stages.write_chunks(table, out, bundle.class_set, config.mask_encoding, "test")
        assert written["trouble"].null_count == 1, written["trouble"]
    publish.publish(plan, max_rejected=0)

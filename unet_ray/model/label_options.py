"""How a network labels frames; light, so that the driver, which chooses, loads no TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass

from unet_ray.model.tiling import Tiling


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """What a `Labeler` is made with, beside the model."""

    precision: str
    """`float32`, `bfloat16` or `float16`: of activations and weights; the last layer is float32."""
    batch_size: int
    """Frames (or windows) that are in the network at once; on a CPU, rounded up to a multiple of the threads, each of
    which takes its part."""
    mask_size: str = "native"
    """`native` (the frame's own size) or `model` (the network's)."""
    tiling: Tiling | None = None
    """Show the network windows of the frame at its own scale instead of the frame, resized."""
    tta: str = "none"
    """`flip` takes the mean of the logits with those of the mirrored images; `none` does not."""
    device: str = "cpu"
    """`gpu` or `cpu`: on the former, XLA compiles the network too."""
    n_threads: int = 1
    """Threads of a CPU, as given to `configure_tensorflow`."""

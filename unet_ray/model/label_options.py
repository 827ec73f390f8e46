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
    which takes its part; on a GPU halved once where they do not fit."""
    mask_size: str = "native"
    """`native` (the frame's own size) or `model` (the network's)."""
    tiling: Tiling | None = None
    """Show the network windows of the frame at its own scale instead of the frame, resized."""
    tta: str = "none"
    """`flip` takes the mean of the logits with those of the mirrored images; `none` does not."""
    device: str = "cpu"
    """`gpu` or `cpu`: the former has code of its own."""
    n_threads: int = 1
    """Threads of a CPU, as given to `configure_tensorflow`."""
    xla: bool = True
    """On a GPU: XLA compiles the network, and what makes labels of its logits."""
    allow_network: str | None = None
    """The function of the user's that the model folder may name as its network."""
    processes_per_gpu: int = 1
    """Processes that share a GPU and its memory."""


CPU_BATCH = 32
"""Frames of a batch on CPUs."""

GPU_BATCH_PIXELS, GPU_BATCH_FRAMES = 2**22, 256
"""Pixels of the network's input in a batch on a GPU, and frames at most: 256 of 96x128, 8 of 480x640. The activations
of one layer of 32 filters take 256 MB in bfloat16. Not measured: no GPU has run this yet."""


def default_batch_size(device: str, network_size: tuple[int, int]) -> int:
    """Returns the batch for a device; a power of two on a GPU, and the same on all: another batch is another order of
    adding, and the last bits of a label might differ."""
    if device == "cpu":
        return CPU_BATCH
    n_frames = max(1, GPU_BATCH_PIXELS // (network_size[0] * network_size[1]))
    return min(GPU_BATCH_FRAMES, 2 ** (n_frames.bit_length() - 1))

"""The shape of a network; light, so that a configuration loads no Keras."""

from __future__ import annotations

from dataclasses import dataclass

from unet_ray.errors import require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a U-Net: all that is needed to build it, and all that a bundle says of it."""

    image_height_px: int = 96
    """Height of the network's input, in pixels; a multiple of 2^(depth-1)."""
    image_width_px: int = 128
    """Width of the network's input, in pixels; a multiple of 2^(depth-1)."""
    n_classes: int = 23
    """Output channels."""
    n_filters: int = 32
    """Filters of the first block; each deeper block has twice as many."""
    depth: int = 5
    """Encoder blocks; between two of them the image is halved."""
    dropout: float = 0.3
    """Share of activations dropped in the last two encoder blocks while training."""

    def __post_init__(self) -> None:
        require(2 <= self.depth <= 8, f"--depth is {self.depth}; it must be 2 to 8")
        require(1 <= self.n_filters <= 1024, f"--n-filters is {self.n_filters}; it must be 1 to 1024")
        require(1 <= self.n_classes <= 254, f"{self.n_classes} classes; a mask of 8 bits holds 1 to 254")
        require(0 <= self.dropout < 1, f"--dropout is {self.dropout}; it must be in [0, 1)")
        step = 2 ** (self.depth - 1)
        for axis, size in (("height", self.image_height_px), ("width", self.image_width_px)):
            require(
                0 < size <= 8192 and size % step == 0,
                f"image {axis} is {size}; a network of depth {self.depth} halves it {self.depth - 1} times, so it must "
                f"be a multiple of {step} up to 8192: try {max(step, round(size / step) * step)}",
            )

"""Windows over a frame: where they lie and how much each counts where they overlap.

Shapes: `h`, `w` a window's height and width in px.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unet_ray.model.architecture import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Windows over a frame: their size and the step from one to the next, (height, width) in pixels."""

    window: tuple[int, int]
    stride: tuple[int, int]

    def __post_init__(self) -> None:
        for window_px, stride_px, axis in zip(self.window, self.stride, ("height", "width"), strict=True):
            if not 1 <= stride_px <= window_px:
                raise ValueError(
                    f"--stride is {stride_px} px in {axis} for a window of {window_px}; it must be 1 to {window_px}, "
                    "or pixels between the windows get no label"
                )

    def corners(self, height_px: int, width_px: int) -> list[tuple[int, int]]:
        """Upper left corners (y, x); the last window of a row or column is moved back into the frame."""
        rows, columns = (
            [*range(0, size_px - window_px, stride_px), size_px - window_px]
            for size_px, window_px, stride_px in zip((height_px, width_px), self.window, self.stride, strict=True)
        )
        return [(y, x) for y in rows for x in columns]

    def weights(self) -> np.ndarray:
        """Weight of each pixel of a window, float32 [h, w]: 1 in the middle, less towards the border, never 0."""
        return np.outer(*(self._fall(side_px) for side_px in self.window)).astype(np.float32)

    def totals(self, height_px: int, width_px: int) -> tuple[np.ndarray, np.ndarray]:
        """Weights of all windows over a frame: of each row [H] and of each column [W], float32; a pixel has the product
        of its row's and its column's."""
        sums = []
        corners = np.array(self.corners(height_px, width_px))
        for axis, size_px in enumerate((height_px, width_px)):
            side_px = self.window[axis]
            total = np.zeros(size_px, np.float32)
            for start in np.unique(corners[:, axis]):
                total[start : start + side_px] += self._fall(side_px)
            sums.append(total)
        return sums[0], sums[1]

    @staticmethod
    def _fall(side_px: int) -> np.ndarray:
        return np.minimum(np.arange(1, side_px + 1), np.arange(side_px, 0, -1)) / ((side_px + 1) // 2)


def choose_tiling(
    inference: str, window: tuple[int, int] | None, stride: tuple[int, int] | None, model: ModelConfig
) -> Tiling | None:
    """Returns the windows of `--inference slide`, None for `whole`.

    Raises:
        ValueError: `--window` or `--stride` without `slide`, or a size that the network does not take.
    """
    if inference == "whole":
        if window or stride:
            raise ValueError("--window and --stride are for --inference slide; give that too, or leave them out")
        return None
    window = window or model.image_size
    if not all(1 <= side <= 8192 for side in window):
        raise ValueError(f"--window is {window[0]} {window[1]}; both must be 1 to 8192")
    model.sized(window)
    return Tiling(window=window, stride=stride or ((window[0] + 1) // 2, (window[1] + 1) // 2))

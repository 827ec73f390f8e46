"""A network made elsewhere, measured on frames as a trained one is; the sums of its loss are 0, as it has none.

Shapes: `B` batch, `H` height px, `W` width px, `K` classes; `h`, `w` the size of its output.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from unet_ray.model.bundle import Bundle
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.labels import label_frames, label_ids
from unet_ray.model.onnx_labels import OnnxLogits


class OnnxPredictor:
    """As `steps.Predictor`: masks of the network's size, and of each frame's size as labelling makes them."""

    def __init__(self, bundle: Bundle, options: LabelOptions) -> None:
        """Loads a bundle's network."""
        self._size, self._n_classes = bundle.model_config.image_size, bundle.model_config.n_classes
        self._network = OnnxLogits(bundle, self._size, options)

    def __call__(self, image_BHWC: np.ndarray, mask_BHW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns what the network gives, the predicted mask uint8 [B, H, W], and no sums."""
        scores = self._network(image_BHWC)
        predicted = [self._mask(frame, self._size, scores.shape[1:3]) for frame in scores]
        return scores, np.stack(predicted), np.zeros(2, np.float32)

    def own_size_mask(self, scores_hwK: np.ndarray, extent: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        """Returns a mask, uint8, of a frame's size; `extent` is the part of the input that shows the frame."""
        pairs = zip(extent, scores_hwK.shape[:2], self._size, strict=True)
        height_px, width_px = (shown_px * out_px / in_px for shown_px, out_px, in_px in pairs)
        return self._mask(scores_hwK, size, (height_px, width_px))

    def model_size_logits(self, scores: np.ndarray) -> tf.Tensor | None:
        """Returns of each pixel of the input the nearest logits, [B, H, W, K]; None of a network that gives ids."""
        return None if self._network.gives_ids else tf.image.resize(scores, self._size, method="nearest")

    def loss(self, total_S: np.ndarray) -> float | None:
        """Nothing: of what it was trained on nobody knows."""
        return None

    def _mask(self, scores: np.ndarray, size: tuple[int, int], extent: tuple[float, float]) -> np.ndarray:
        if self._network.gives_ids:
            return label_ids(scores, size, extent, self._n_classes).masks[0]
        return label_frames(scores[None], [size], [extent]).masks[0]

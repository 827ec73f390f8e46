"""How well a network does on pairs: confusion matrices at each mask's own size and at the network's, and what they say.

Shapes: `B` batch, `H` height px, `W` width px, `K` classes, `S` sums of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from unet_ray.model.architecture import ModelConfig
from unet_ray.model.metrics import boundary_counts, confusion_matrix, summarize
from unet_ray.training.batches import FrameReader, gather

N_SAMPLES = 6
"""Frames of `samples.png`."""

if TYPE_CHECKING:
    from unet_ray.training.steps import Predictor


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Counts over some frames; those of other frames are added to them."""

    own_size_KK: np.ndarray
    """Confusion matrix at the masks' own sizes, int64: logits resized bilinearly, then argmax. The headline."""
    model_size_KK: np.ndarray
    """Confusion matrix at the network's size, int64: masks resized by nearest neighbour."""
    sums_S: np.ndarray
    """Sums of the loss at the network's size, float64."""
    boundary_K4: np.ndarray
    """`metrics.boundary_counts` at the masks' own sizes; zeros where they were not asked for."""


class Evaluator:
    """A network and the frames that it is measured on."""

    def __init__(
        self,
        predict: Predictor,
        reader: FrameReader,
        batch_size: int,
        config: ModelConfig,
        on_batch: Callable[[], None] = lambda: None,
    ):
        """Takes frames at the network's size with their masks in their own size too.

        Args:
            predict: the network.
            reader: the frames.
            batch_size: frames that the network takes at once; the last ones are padded.
            config: the network's shape.
            on_batch: called after every batch that was counted.
        """
        self._predict, self._reader, self._batch_size = predict, reader, batch_size
        self._on_batch = on_batch
        self._size = config.image_height_px, config.image_width_px
        self._n_classes = config.n_classes

    def count(self, indices: Sequence[int], *, with_boundaries: bool = False) -> Evaluation:
        """Counts each of the frames once; boundaries, which take as long as all else, where they are asked for."""
        n_classes = self._n_classes
        own_size_KK = np.zeros((n_classes, n_classes), np.int64)
        model_size_KK = np.zeros_like(own_size_KK)
        boundary_K4 = np.zeros((n_classes, 4), np.int64)
        sums: list[np.ndarray] = []
        # At least one batch: of padding alone it gives zeros, as many as this loss has sums.
        for start in range(0, max(1, len(indices)), self._batch_size):
            chosen = indices[start : start + self._batch_size]
            image_BHWC, mask_BHW = gather(self._reader, chosen, self._batch_size, self._size)
            logits_BHWK, predicted_BHW, sums_S = self._predict(image_BHWC, mask_BHW)
            sums.append(sums_S.astype(np.float64))
            model_size_KK += confusion_matrix(mask_BHW, predicted_BHW, n_classes)
            for position, index in enumerate(chosen):
                mask_HW = self._reader.full_mask(int(index))
                predicted_HW = self._predict.resized_mask(logits_BHWK[position], *mask_HW.shape)
                own_size_KK += confusion_matrix(mask_HW, predicted_HW, n_classes)
                if with_boundaries:
                    boundary_K4 += boundary_counts(mask_HW, predicted_HW, n_classes)
            self._on_batch()
        return Evaluation(
            own_size_KK=own_size_KK,
            model_size_KK=model_size_KK,
            sums_S=np.sum(sums, axis=0),
            boundary_K4=boundary_K4,
        )

    def predict_masks(self, indices: Sequence[int]) -> dict[int, np.ndarray]:
        """Returns the predicted masks of some frames by index, uint8, in their own sizes."""
        masks = {}
        for start in range(0, len(indices), self._batch_size):
            chosen = indices[start : start + self._batch_size]
            logits_BHWK, _, _ = self._predict(*gather(self._reader, chosen, self._batch_size, self._size))
            for position, index in enumerate(chosen):
                own_size = self._reader.full_mask(int(index)).shape
                masks[int(index)] = self._predict.resized_mask(logits_BHWK[position], *own_size)
        return masks


def sample_places(n_frames: int) -> list[int]:
    """Returns the frames to show, spread over all: of several batches."""
    return sorted({int(index) for index in np.linspace(0, n_frames - 1, N_SAMPLES)}) if n_frames else []


def metrics_of(own_size_KK: np.ndarray, model_size_KK: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Returns `val/mean_iou`, `val/iou/<class>`, … and the same under `val_model_size/`; plain JSON types."""
    sizes = {"val": own_size_KK, "val_model_size": model_size_KK}
    return {
        f"{prefix}/{key}": value
        for prefix, confusion_KK in sizes.items()
        for key, value in summarize(confusion_KK, names).items()
    }

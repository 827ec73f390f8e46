"""Measures a network on pairs: confusion matrices at each mask's own size and at the network's, and their metrics.

Shapes: `B` batch, `H` height px, `W` width px, `K` classes, `S` sums of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from unet_ray.model.architecture import ModelConfig
from unet_ray.model.metrics import boundary_counts, confusion_matrix, summarize
from unet_ray.pixels.preprocessing import frame_box
from unet_ray.training.batches import FrameReader, gather, one_ahead

N_SAMPLES = 6
"""Frames of `samples.png`."""

if TYPE_CHECKING:
    import tensorflow as tf

    from unet_ray.training.onnx_predictor import OnnxPredictor
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Predicted:
    """A batch of frames, and what the network says of them; padding comes last and is ignored wholly."""

    chosen: Sequence[int]
    """The frames."""
    logits: Any
    """As the network gives them."""
    model_size_logits: Any
    """Float32 [B, H, W, K] at the network's size; None of a network that gives class ids."""
    mask_BHW: np.ndarray
    """True ids at the network's size, uint8."""
    predicted_BHW: np.ndarray
    sums_S: np.ndarray
    """Sums of the loss."""


class Evaluator:
    """A network and the frames that it is measured on."""

    def __init__(
        self,
        predict: Predictor | OnnxPredictor,
        reader: FrameReader,
        batch_size: int,
        config: ModelConfig,
        *,
        n_threads: int = 1,
        on_batch: Callable[[], None] = lambda: None,
    ):
        """Takes frames at the network's size with their masks in their own size too.

        Args:
            predict: the network.
            reader: the frames.
            batch_size: frames that the network takes at once; the last ones are padded.
            config: the network's shape.
            n_threads: threads that count frames of a batch at once; for a GPU, which would wait for one.
            on_batch: called after every batch that was counted.
        """
        self._predict, self._reader, self._batch_size = predict, reader, batch_size
        self._n_threads, self._on_batch = n_threads, on_batch
        self._size, self._preprocessing = config.image_size, config.preprocessing
        self._n_classes = config.n_classes

    def predictions(self, indices: Sequence[int]) -> Iterator[Predicted]:
        """Yields each of the frames once, in batches."""
        for chosen, image_BHWC, mask_BHW in self._batches(indices):
            logits, predicted_BHW, sums_S = self._predict(image_BHWC, mask_BHW)
            yield Predicted(
                chosen=chosen,
                logits=logits,
                model_size_logits=self._predict.model_size_logits(logits),
                mask_BHW=mask_BHW,
                predicted_BHW=predicted_BHW,
                sums_S=sums_S,
            )
            self._on_batch()

    def count(
        self,
        indices: Sequence[int],
        *,
        with_boundaries: bool = False,
        on_predicted: Callable[[Predicted], None] = lambda batch: None,
    ) -> Evaluation:
        """Counts each of the frames once; boundaries, which take as long as all else, where they are asked for.

        `on_predicted` is called with each batch.
        """
        n_classes = self._n_classes
        own_size_KK = np.zeros((n_classes, n_classes), np.int64)
        model_size_KK = np.zeros_like(own_size_KK)
        boundary_K4 = np.zeros((n_classes, 4), np.int64)
        sums: list[np.ndarray] = []

        def count_frame(index: int, logits_HWK: tf.Tensor) -> tuple[np.ndarray, np.ndarray | int]:
            mask_HW = self._reader.full_mask(int(index))
            predicted_HW = self._at_own_size(logits_HWK, mask_HW.shape)
            near = boundary_counts(mask_HW, predicted_HW, n_classes) if with_boundaries else 0
            return confusion_matrix(mask_HW, predicted_HW, n_classes), near

        with ThreadPoolExecutor(self._n_threads) as pool:
            for batch in self.predictions(indices):
                sums.append(batch.sums_S.astype(np.float64))
                model_size_KK += confusion_matrix(batch.mask_BHW, batch.predicted_BHW, n_classes)
                for own_KK, near_K4 in pool.map(count_frame, batch.chosen, batch.logits):
                    own_size_KK += own_KK
                    boundary_K4 += near_K4
                on_predicted(batch)
        return Evaluation(
            own_size_KK=own_size_KK,
            model_size_KK=model_size_KK,
            sums_S=np.sum(sums, axis=0),
            boundary_K4=boundary_K4,
        )

    def _batches(self, indices: Sequence[int]) -> Iterator[tuple[Sequence[int], np.ndarray, np.ndarray]]:
        """Yields places, frames and masks of batches.

        At least one batch: of padding alone it gives zeros, as many as this loss has sums.
        """
        places = [indices[start : start + self._batch_size] for start in range(0, len(indices), self._batch_size)]
        places = places or [()]

        def make(batch: int) -> tuple[Sequence[int], np.ndarray, np.ndarray]:
            return places[batch], *gather(self._reader, places[batch], self._batch_size, self._size)

        return one_ahead(make, len(places))

    def predict_masks(self, indices: Sequence[int]) -> dict[int, np.ndarray]:
        """Returns the predicted masks of some frames by index, uint8, in their own sizes."""
        masks = {}
        for start in range(0, len(indices), self._batch_size):
            chosen = indices[start : start + self._batch_size]
            logits_BHWK, _, _ = self._predict(*gather(self._reader, chosen, self._batch_size, self._size))
            for position, index in enumerate(chosen):
                own_size = self._reader.full_mask(int(index)).shape
                masks[int(index)] = self._at_own_size(logits_BHWK[position], own_size)
        return masks

    def _at_own_size(self, logits_HWK: tf.Tensor, size: tuple[int, int]) -> np.ndarray:
        return self._predict.own_size_mask(logits_HWK, frame_box(size, self._size, self._preprocessing)[2:], size)


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

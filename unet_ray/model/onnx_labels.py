"""Frames to labels by a network made elsewhere: ONNX Runtime computes it, and the CPU makes labels of what it gives.

Shapes: `B` batch, `N` frames, `H` height px, `W` width px, `C` colour, `K` classes; `h`, `w` the size of the output.
"""

from __future__ import annotations

import numpy as np

from unet_ray.model.architecture import OnnxConfig
from unet_ray.model.bundle import Bundle
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.onnx_network import OnnxNetwork

Size = tuple[int, int]


def load_network(bundle: Bundle, size: Size, device: str) -> OnnxNetwork:
    """Returns a bundle's network for images of a (height, width); its callers bring the threads.

    Raises:
        ValueError: ONNX Runtime is missing, or does not take the network.
        unet_ray.model.devices.UnusableGpu: the device is `gpu` and ONNX Runtime cannot use it.
    """
    config = bundle.model_config
    assert isinstance(config, OnnxConfig), config
    return OnnxNetwork(bundle.onnx, config.facts, size=size, preprocessing=config.preprocessing, device=device)


class OnnxLogits:
    """A bundle's network as a function of uint8 images [B, H, W, C], with test-time augmentation."""

    def __init__(self, bundle: Bundle, size: Size, options: LabelOptions) -> None:
        """Loads the network for images of a (height, width)."""
        self._network = load_network(bundle, size, options.device)
        self._flip = options.tta == "flip"
        self.gives_ids = self._network.facts.gives_ids

    def __call__(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Returns logits [B, h, w, K], or of a network that gives class ids these, uint8 [B, h, w]."""
        scores = self._network(images_BHWC)
        if not self._flip:
            return np.ascontiguousarray(scores)
        mirrored_BhwK = self._network(np.ascontiguousarray(images_BHWC[:, :, ::-1]))
        return np.ascontiguousarray((scores + mirrored_BhwK[:, :, ::-1]) / 2)


def require_labelling_options(bundle: Bundle, *, slides: bool, tta: str, precision: str) -> None:
    """Raises ValueError where a network made elsewhere cannot label as it was asked to; others can."""
    config = bundle.model_config
    if not isinstance(config, OnnxConfig):
        return
    if precision not in ("auto", "float32"):
        raise ValueError(
            f"--precision is {precision}; {bundle.uri} is a network as ONNX, which brings its own: leave it out"
        )
    if config.facts.gives_ids and (slides or tta != "none"):
        option = "--inference slide" if slides else f"--tta {tta}"
        raise ValueError(
            f"{option} takes the mean of logits, but the network of {bundle.uri} gives class ids; leave it out, or "
            "export the network without its argmax"
        )

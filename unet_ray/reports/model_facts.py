"""What a model folder says of its network's quality, read without its weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from unet_ray import storage
from unet_ray.model.bundle import read_description
from unet_ray.options.config_files import read_mapping


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Of the model that labelled an output."""

    uri: str
    """Where it was read from."""
    network: str
    """Kind of the network."""
    temperature: float | None
    """None: its confidence is not calibrated."""
    metrics: dict[str, Any]
    """What its training measured on frames of its own."""

    def metric(self, key: str) -> float | None:
        """Returns a number that was measured; None where it was not."""
        value = self.metrics.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    def iou(self, class_names: Iterable[str]) -> dict[str, float | None]:
        """Returns the IoU of each class on the validation frames."""
        return {name: self.metric(f"val/iou/{name}") for name in class_names}


def model_of(config_yaml: bytes | None, digest: str, *, are_read: bool = True) -> tuple[ModelFacts | None, str]:
    """Returns what is known of the model that an output's `config.yaml` names, and why nothing is.

    Args:
        config_yaml: of the output.
        digest: of the model that labelled it, by its lineage: another model in that folder tells nothing.
        are_read: False: no folder is looked at that the output names.
    """
    if not are_read:
        return None, "the model was not read (--no-sources)"
    try:
        uri = read_mapping(config_yaml or b"", "config.yaml").get("model")
    except ValueError:
        uri = None
    if not isinstance(uri, str):
        return None, "the output's config.yaml names no model"
    try:
        description = read_description(storage.resolve(uri))
    except (ValueError, OSError):
        return None, f"{uri} cannot be read from this machine"
    if description.document["digest"] != digest:
        return None, f"{uri} holds another model now"
    network = description.document["network"]
    facts = ModelFacts(
        uri=description.uri,
        network=str(network.get("kind", "unet")) if isinstance(network, dict) else "unet",
        temperature=description.document.get("temperature"),
        metrics=description.metrics,
    )
    return facts, ""

"""What a new run starts from: its network, and weights of a trained model or a pretrained encoder, where they fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from unet_ray.classes import ClassSet
from unet_ray.config import TrainConfig
from unet_ray.model.architecture import KerasConfig, ModelConfig, UnetOptions
from unet_ray.model.bundle import Bundle, read_bundle
from unet_ray.model.encoder_weights import read_encoder_weights

if TYPE_CHECKING:
    import keras


Drawn = Literal["none", "classes", "decoder"]
"""Which weights are drawn from the seed all the same: none, those of the last layer, or all that were not given."""
_DRAWN = {
    "none": "",
    "classes": "; its classes are others, so the last layer starts anew",
    "decoder": "; they are the encoder's, all else is drawn from the seed",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialWeights:
    """Weights by name, as a bundle has them, and where they come from."""

    uri: str
    digest: str
    """Of the bundle or the file: a run goes on only with the weights that it began with."""
    weights: dict[str, np.ndarray]
    drawn: Drawn
    other_pictures: str = ""
    """How the model's own pictures differ from those of the run; empty where they do not, or the options make them."""

    def as_text(self) -> str:
        """One line for the log."""
        return f"the run starts from the weights of {self.uri}{_DRAWN[self.drawn]}{self.other_pictures}"


def read_network(config: TrainConfig, class_set: ClassSet) -> tuple[ModelConfig, InitialWeights | None]:
    """Returns the network to train, and the weights of `--init-from` or `--encoder-weights`, or None without them.

    The network is that of the options; where the model is one that `save_model` wrote, it is the model's own.

    Raises:
        ValueError: no model is there, or one of another network than the options ask for.
    """
    if config.encoder_weights is not None:
        tensors, digest = read_encoder_weights(config.encoder_weights)
        initial = InitialWeights(uri=config.encoder_weights, digest=digest, weights=tensors, drawn="decoder")
        return config.model_config(class_set.n_classes), initial
    if config.init_from is None:
        return config.model_config(class_set.n_classes), None
    model = read_bundle(config.init_from, allow_network=config.network)
    if isinstance(model.model_config, KerasConfig):
        model.require_buildable()
        network = _saved_network(config, model.model_config, class_set)
        return network, _weights_of(model, class_set, other_pictures=_difference(model.model_config, network))
    if model.onnx:
        raise ValueError(
            f"--init-from {config.init_from} is an ONNX file, which is not trained here; give another model"
        )
    network = config.model_config(class_set.n_classes)
    if not model.model_config.has_weights_of(network):
        raise ValueError(
            f"--init-from {config.init_from} is a network of another shape than this run's; give "
            f"{_as_options(model.model_config.network(), network.network())}, or another model"
        )
    return network, _weights_of(model, class_set)


def _weights_of(model: Bundle, class_set: ClassSet, *, other_pictures: str = "") -> InitialWeights:
    return InitialWeights(
        uri=model.uri,
        digest=model.digest,
        weights=model.weights,
        drawn="none" if model.class_set.names == class_set.names else "classes",
        other_pictures=other_pictures,
    )


def _saved_network(config: TrainConfig, saved: KerasConfig, class_set: ClassSet) -> ModelConfig:
    """The network of a folder, for the run's classes and pictures; what its first layer takes is its own."""
    names = ["network", *(field.name for field in dataclasses.fields(UnetOptions))]
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    if given := [name for name in names if getattr(config, name) != defaults[name]]:
        raise ValueError(
            f"--init-from {config.init_from} brings a network of its own; leave out --{given[0].replace('_', '-')}"
        )
    preprocessing = dataclasses.replace(saved.preprocessing, resize=config.resize, fit=config.fit)
    network = dataclasses.replace(saved.with_classes(class_set.n_classes), preprocessing=preprocessing)
    return network.sized(config.network_size())


def _difference(saved: ModelConfig, network: ModelConfig) -> str:
    own, now = (
        f"{config.image_height_px}x{config.image_width_px}, {config.preprocessing.resize}, {config.preprocessing.fit}"
        for config in (saved, network)
    )
    return "" if own == now else f"; its pictures were {own}, those of this run are {now}"


def _as_options(wanted: Mapping[str, object], given: Mapping[str, object]) -> str:
    """The options that make one network of another: `--n-filters 16 --depth 4`."""
    if wanted["kind"] != given["kind"]:
        return f"--network {wanted.get('function', wanted['kind'])}"
    different = [
        name for name, value in wanted.items() if value != given[name] and name not in ("dropout", "drop_path")
    ]
    return " ".join(_as_option(name, wanted[name]) for name in different)


def _as_option(name: str, value: object) -> str:
    option = {"function": "network", "arguments": "network-arguments"}.get(name, name.replace("_", "-"))
    return ("--" if value else "--no-") + option if isinstance(value, bool) else f"--{option} {value}"


def set_initial_weights(model: keras.Model, initial: Mapping[str, np.ndarray], *, drawn: Drawn) -> None:
    """Sets a new model's weights from others, but for those that stay as they were drawn.

    Raises:
        ValueError: the names or shapes are not the model's.
    """
    from unet_ray.model import weights  # TensorFlow, which the driver does not load

    if not initial:
        return
    own = weights.named_weights(model)
    kept = {"none": [], "classes": weights.classes_layer(model), "decoder": own.keys() - initial.keys()}[drawn]
    weights.set_named_weights(model, dict(initial) | {name: own[name] for name in kept})

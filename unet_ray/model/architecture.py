"""The shapes of networks: a frozen configuration a kind, light, so that a command line or a driver loads no Keras.

A network that is built in is a configuration here, a function that builds it, and a line in `networks.BUILDERS`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from unet_ray.errors import require
from unet_ray.model.keras_graph import check_graph, with_outputs
from unet_ray.model.onnx_facts import OnnxFacts
from unet_ray.pixels.preprocessing import DEFAULT_PREPROCESSING, Preprocessing

ENCODER_PREFIX = "convnext_tiny_"
"""With which the names of all weights of a ConvNeXt encoder begin."""
IMAGENET_PREPROCESSING = Preprocessing(
    mean=(0.485 * 255, 0.456 * 255, 0.406 * 255), std=(0.229 * 255, 0.224 * 255, 0.225 * 255)
)
"""Mean and standard deviation of ImageNet's pixels, with which pretrained encoders were trained."""
FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
"""`package.module:function`."""


@dataclass(frozen=True, kw_only=True)
class UnetOptions:
    """What one may choose of a U-Net; its input and its classes come from the data."""

    n_filters: int = 32
    """Filters of the first block; each deeper block has twice as many."""
    depth: int = 5
    """Encoder blocks; between two of them the image is halved."""
    dropout: float = 0.3
    """Share of activations dropped in the last two encoder blocks while training."""
    norm: Literal["none", "group"] = "none"
    """Normalisation after each convolution: none, as in the notebook, or group (of up to 8 groups of filters)."""
    residual: bool = False
    """Whether each block adds its input to its output."""

    def __post_init__(self) -> None:
        require(2 <= self.depth <= 8, f"--depth is {self.depth}; it must be 2 to 8")
        require(1 <= self.n_filters <= 1024, f"--n-filters is {self.n_filters}; it must be 1 to 1024")
        require(0 <= self.dropout < 1, f"--dropout is {self.dropout}; it must be in [0, 1)")
        require(self.norm in ("none", "group"), f"--norm is {self.norm!r}; it must be none or group")


@dataclass(frozen=True, kw_only=True)
class ConvnextOptions:
    """What one may choose of a U-Net with a ConvNeXt encoder."""

    n_filters: int = 32
    """Filters of the decoder's last block, at half the image's size; each deeper block has twice as many."""
    drop_path: float = 0.1
    """Share of frames for which unet_convnext drops its encoder's last block while training; earlier ones drop less."""

    def __post_init__(self) -> None:
        require(1 <= self.n_filters <= 1024, f"--n-filters is {self.n_filters}; it must be 1 to 1024")
        require(0 <= self.drop_path < 1, f"--drop-path is {self.drop_path}; it must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A network's input and output; its kinds add what else it takes to build it."""

    kind: ClassVar[str]
    """Its name in a model folder."""

    image_height_px: int = 96
    """Height of the network's input, in pixels."""
    image_width_px: int = 128
    """Width of the network's input, in pixels."""
    n_classes: int = 23
    """Output channels."""
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING
    """What becomes of a frame before the network."""

    def __post_init__(self) -> None:
        require(1 <= self.n_classes <= 254, f"{self.n_classes} classes; a mask of 8 bits holds 1 to 254")
        for axis, size in (("height", self.image_height_px), ("width", self.image_width_px)):
            require(0 < size <= 8192, f"image {axis} is {size}; it must be 1 to 8192")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the network's input, in pixels."""
        return self.image_height_px, self.image_width_px

    @property
    def size_step(self) -> int:
        """What the network's layers divide its sides by; other sizes are padded to a multiple of it, and cropped."""
        return 1

    def sized(self, image_size: tuple[int, int]) -> Self:
        """Returns the same network for another (height, width)."""
        height_px, width_px = image_size
        return dataclasses.replace(self, image_height_px=height_px, image_width_px=width_px)

    def network(self) -> dict[str, Any]:
        """Returns what a model folder says of it beside input and classes: its kind and options, plain JSON types."""
        common = {field.name for field in dataclasses.fields(ModelConfig)}
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"kind": self.kind} | {name: value for name, value in options.items() if name not in common}

    @classmethod
    def of_network(cls, options: Mapping[str, Any], **common: Any) -> Self:
        """Returns the configuration of what `network` returned but for the kind; `common` are the fields of all kinds.

        Raises:
            ValueError: other options than the kind has, or values that it does not take.
        """
        names = {field.name for field in dataclasses.fields(ModelConfig)}
        fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in names}
        if options.keys() != fields.keys():
            raise ValueError(f"a network of the kind {cls.kind} must have the keys {', '.join(sorted(fields))}")
        for name, field in fields.items():
            if not _is_of_its_type(options[name], str(field.type)):
                raise ValueError(f"{name} is {str(options[name])[:50]!r}, not a value of its type")
        return cls(**common, **options)

    def has_weights_of(self, other: ModelConfig) -> bool:
        """Whether weights of another network, but for those of its classes, are weights of this one."""
        return self.kind == other.kind and self._weights_depend_on() == other._weights_depend_on()

    def _weights_depend_on(self) -> dict[str, Any]:
        return self.network()


@dataclass(frozen=True, kw_only=True)
class UnetConfig(ModelConfig, UnetOptions):
    """The notebook's U-Net, and what one may change of it."""

    kind = "unet"

    def __post_init__(self) -> None:
        UnetOptions.__post_init__(self)
        ModelConfig.__post_init__(self)

    @property
    def size_step(self) -> int:
        """See `ModelConfig`: the image is halved between two blocks."""
        return 2 ** (self.depth - 1)

    def _weights_depend_on(self) -> dict[str, Any]:
        return self.network() | {"dropout": None}


@dataclass(frozen=True, kw_only=True)
class ConvnextConfig(ModelConfig, ConvnextOptions):
    """A U-Net whose encoder is the ConvNeXtTiny of `keras.applications`."""

    kind = "unet_convnext"

    preprocessing: Preprocessing = IMAGENET_PREPROCESSING
    """See `ModelConfig`; the network computes with ImageNet's mean and standard deviation."""

    def __post_init__(self) -> None:
        ConvnextOptions.__post_init__(self)
        ModelConfig.__post_init__(self)

    @property
    def size_step(self) -> int:
        """See `ModelConfig`: the encoder's last stage has a 32nd of the image's sides."""
        return 32

    def _weights_depend_on(self) -> dict[str, Any]:
        return self.network() | {"drop_path": None}


@dataclass(frozen=True, kw_only=True)
class PythonConfig(ModelConfig):
    """A network that somebody's own installed function builds."""

    kind = "python"

    function: str
    """`package.module:function`; imported only where a command line allows it by name."""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the function takes by name beside the size and the classes; plain JSON types."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            isinstance(self.function, str) and FUNCTION.fullmatch(self.function) is not None,
            f"the network is {str(self.function)[:100]!r}; it must be package.module:function",
        )
        require(
            isinstance(self.arguments, Mapping) and _is_plain(self.arguments),
            f"the arguments of {self.function} are not a mapping of names to values as JSON has them",
        )


@dataclass(frozen=True, kw_only=True)
class KerasConfig(ModelConfig):
    """A network of Keras' own layers, made elsewhere and saved by `save_model`."""

    kind = "keras"

    takes: Literal["uint8", "float32"]
    """What its first layer takes: the uint8 picture itself, or what `preprocessing.normalized` makes of it."""
    graph: Mapping[str, Any]
    """Its layers and calls: see `keras_graph`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.takes in ("uint8", "float32"), f"takes is {str(self.takes)[:50]!r}; it must be uint8 or float32")
        require(
            self.takes == "float32" or self.preprocessing.keeps_values,
            "the network takes uint8, so what becomes of the values is its own: mean must be 0, std 1, channels RGB",
        )
        check_graph(self.graph)

    def with_classes(self, n_classes: int) -> KerasConfig:
        """Returns the same network with another number of classes, whose last layer with a kernel is wider or narrower.

        Raises:
            ValueError: that layer's outputs are not the classes.
        """
        if n_classes == self.n_classes:
            return self
        graph = with_outputs(self.graph, self.n_classes, n_classes)
        return dataclasses.replace(self, n_classes=n_classes, graph=graph)


def _is_plain(value: Mapping[str, Any]) -> bool:
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        return False


@dataclass(frozen=True, kw_only=True)
class OnnxConfig(ModelConfig):
    """A network made elsewhere, which ONNX Runtime runs; its file is `model.onnx` in the model folder."""

    kind = "onnx"

    facts: OnnxFacts
    """What it takes and gives, found out when it was imported."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.facts.image_size(self.image_size)
        require(
            self.facts.n_classes == self.n_classes,
            f"the network gives {self.facts.n_classes} classes, {self.n_classes} are named",
        )

    def network(self) -> dict[str, Any]:
        """See `ModelConfig`."""
        return {"kind": self.kind, "facts": self.facts.to_dict()}

    @classmethod
    def of_network(cls, options: Mapping[str, Any], **common: Any) -> Self:
        """See `ModelConfig`."""
        require(options.keys() == {"facts"}, "a network of the kind onnx must have the key facts")
        return cls(**common, facts=OnnxFacts.from_dict(options["facts"]))


KINDS: dict[str, type[ModelConfig]] = {
    config.kind: config for config in (UnetConfig, ConvnextConfig, PythonConfig, KerasConfig, OnnxConfig)
}
"""The configuration of each kind of network that a model folder may name."""


def config_of(network: Mapping[str, Any], **common: Any) -> ModelConfig:
    """Returns the configuration of what `ModelConfig.network` returned, with the fields that all kinds have.

    Raises:
        ValueError: an unknown kind, other options than the kind has, or values that it does not take.
    """
    kind = network.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"the network is of the kind {str(kind)[:50]!r}; this unet_ray knows {', '.join(KINDS)}")
    options = {name: value for name, value in network.items() if name != "kind"}
    return KINDS[kind].of_network(options, **common)


def _is_of_its_type(value: Any, type_name: str) -> bool:
    """Whether a value of a JSON file is one of a field; `true` is no number."""
    types = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    if type_name.startswith("Mapping"):
        return isinstance(value, Mapping)
    return type(value) in types.get(type_name, (str,))

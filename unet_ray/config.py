"""The options of every job: frozen dataclasses, validated on construction.

The fields are the command line's options (`image_size` is `--image-size`); the text under a field is its help.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from unet_ray import storage
from unet_ray.class_files import class_set_of
from unet_ray.classes import PRESETS, ClassSet
from unet_ray.errors import require
from unet_ray.model.architecture import (
    ENCODER_PREFIX,
    FUNCTION,
    KINDS,
    ConvnextOptions,
    ModelConfig,
    PythonConfig,
    UnetOptions,
)
from unet_ray.options.config_files import MAPPING_TEXT, Positional, read_content, read_mapping
from unet_ray.options.config_types import (
    EMPTY,
    NOT_GIVEN,
    OptionalTexts,
    OptionalUri,
    Texts,
    Uri,
    Uris,
    configuration,
    keep_forms,
)
from unet_ray.options.keywords import C, P, recipe_options, show_signature
from unet_ray.pixels.preprocessing import Channels, Fit, Preprocessing, Resize
from unet_ray.storage import filesystems, overlaps, templates
from unet_ray.suggestions import closest, perhaps

Device = Literal["auto", "gpu", "cpu"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
MaskFormat = Literal["auto", "channel-max", "ids", "colors"]


def _require_at_least(config: Any, minimum: float, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        require(value >= minimum, f"{_option(field)} is {value}; it must be at least {minimum}")


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """How files are read and written that are not of this machine; shared by all commands."""

    storage_options: Annotated[Mapping[str, Any] | str | None, MAPPING_TEXT] = None
    """What fsspec's filesystem takes, as JSON or YAML: {"endpoint_url": "https://…"}, {"profile": "logs"} or
    {"anon": true}; by protocol, {"s3": {…}, "gs": {…}}, where there are several. Never written down; credentials are
    refused, they come from the environment or a profile."""
    storage_retry_s: float = 60.0
    """Seconds for which a store that does not answer is asked again, before the job ends with exit code 75."""

    def __post_init__(self) -> None:
        keep_forms(self)
        _require_at_least(self, 0, "storage_retry_s")
        for uri in self.uris():
            if uri is not None:
                storage.resolve(uri)
        self._storage_options()

    def _storage_options(self) -> dict[str, dict[str, Any]]:
        options = self.storage_options
        mapping = read_mapping(options, "--storage-options") if isinstance(options, str) else options
        return filesystems.options_by_protocol(mapping, self.uris())

    def uris(self) -> tuple[str | None, ...]:
        """Returns all URIs of the job; None for one that was not given."""
        raise NotImplementedError

    def configure_storage(self) -> None:
        """Makes these options count in this process and in those that it starts."""
        filesystems.configure(self._storage_options(), self.storage_retry_s)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(StorageConfig):
    """Where a job runs; shared by all jobs."""

    device: Device = "auto"
    """Where the network runs: `auto` takes a GPU where the cluster has one, or its autoscaler can add one."""
    wait_for_resources_s: float = 600.0
    """Seconds to wait for CPUs or GPUs that the cluster does not have yet, before the job ends with the reason."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(self, 0, "wait_for_resources_s")


@configuration
class PairsConfig(StorageConfig):
    """Which frames and masks belong together, and what the masks mean; shared by all jobs that read pairs."""

    images: Uri
    """URI of the folder of frames (searched at any depth), or a pattern with {} for what a frame and its mask have in
    common: 'a2d2/{}/camera/{}/{}_camera_{}.png'."""
    masks: Uri
    """URI of the folder of masks; a mask has its frame's relative path, but for extension and suffix. Or a pattern with
    as many {} as --images: 'a2d2/{}/label/{}/{}_label_{}.png'."""
    image_suffix: str = ""
    """End of a frame's name before the extension that its mask's name lacks (Cityscapes: _leftImg8bit)."""
    mask_suffix: str = ""
    """End of a mask's name before the extension that its frame's name lacks (Cityscapes: _gtFine_labelIds)."""
    mask_format: MaskFormat = "auto"
    """How a mask's pixels mean a class: the maximum over the channels, an id, or the class set's colours."""
    include_hidden: bool = False
    """Take hidden files too: names that begin with a dot, and what programs leave (__MACOSX, @eaDir, …)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for images, masks in self.sides():
            has_suffix = bool(self.image_suffix or self.mask_suffix)
            templates.require_alike(images, masks, has_suffix=has_suffix)

    def folders(self) -> tuple[str, str]:
        """Returns the URIs of frames and of masks."""
        return self.images, self.masks

    def sides(self) -> list[tuple[tuple[str, str], tuple[str, str]]]:
        """Returns option and URI of frames and of masks that belong together."""
        return [(("--images", self.images), ("--masks", self.masks))]

    def require_out_apart(self, out: str, *, both_ways: bool = False) -> None:
        """Raises ValueError where an output is part of the pairs, or (both ways) the pairs of an output."""
        for option, uri in (side for sides in self.sides() for side in sides):
            if templates.is_template(uri):
                templates.require_out_apart(out, option, uri)
            else:
                overlaps.require_apart(out, [(option, uri)], both_ways=both_ways)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training frames vary. A range without width, or a change of 0, switches a part off."""

    flip: bool = True
    """Augmentation: mirror left and right in half of the cases."""
    scale: tuple[float, float] = (0.5, 1.0)
    """Augmentation: smallest and largest share of the full-resolution frame's sides that a crop shows; above 1, what
    lies outside is ignored."""
    brightness: float = 0.2
    """Augmentation: largest relative change of brightness."""
    contrast: float = 0.2
    """Augmentation: largest relative change of the distance from the mean brightness."""
    saturation: float = 0.2
    """Augmentation: largest relative change of the distance from grey."""
    classmix: float = 0.0
    """Augmentation: share of the frames onto which the pixels of half of the classes of another frame are pasted."""

    def __post_init__(self) -> None:
        _require_at_least(self, 0, "brightness", "contrast", "saturation")
        low, high = self.scale
        require(0 < low <= high <= 4, f"--scale is {low} {high}; give two numbers with 0 < smallest <= largest <= 4")
        require(0 <= self.classmix <= 1, f"--classmix is {self.classmix}; it is a share, 0 to 1")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(UnetOptions):
    """Which network is trained."""

    network: str = "unet"
    """Which network: unet, unet_convnext or package.module:function. unet_convnext is a U-Net whose encoder is Keras'
    ConvNeXtTiny, of 32 million weights (see --encoder-weights). A function of your own takes image_size and n_classes
    and returns a keras.Model; its package must be installed on every node."""
    network_arguments: Annotated[Mapping[str, Any] | str | None, MAPPING_TEXT] = None
    """What your function takes beside them, as JSON or YAML: {"width": 64}."""
    drop_path: float = ConvnextOptions.drop_path
    """Share of frames for which unet_convnext drops its encoder's last block while training; earlier ones drop less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network not in _BUILT_IN:
            require(
                FUNCTION.fullmatch(self.network) is not None,
                f"--network is {self.network!r}; it must be {', '.join(_BUILT_IN)}, or package.module:function",
            )
        else:
            require(self.network_arguments is None, "--network-arguments are for a --network package.module:function")
        self._require_options_of_its_own()
        if self.network == "unet_convnext":
            ConvnextOptions(n_filters=self.n_filters, drop_path=self.drop_path)

    def _require_options_of_its_own(self) -> None:
        own = _BUILT_IN.get(self.network, ())
        for kind, options in _BUILT_IN.items():
            others = [option for option in options if option not in own and getattr(self, option) != _default(option)]
            if others:
                has = f"{self.network} has {', '.join(map(_option, own))}"
                remedy = has if own else f"give {self.network} its own by --network-arguments"
                raise ValueError(f"{_option(others[0])} is an option of --network {kind}; {remedy}")

    def network_config(self, **common: Any) -> ModelConfig:
        """Returns the configuration of the network; its size, classes and preprocessing are given."""
        options = {option: getattr(self, option) for option in _BUILT_IN.get(self.network, ())}
        if options:
            return KINDS[self.network](**common, **options)
        arguments = mapping_of(self.network_arguments, "--network-arguments")
        return PythonConfig(**common, function=self.network, arguments=arguments)


_BUILT_IN = {
    "unet": tuple(field.name for field in dataclasses.fields(UnetOptions)),
    "unet_convnext": tuple(field.name for field in dataclasses.fields(ConvnextOptions)),
}
"""The options of each built-in network."""


def _default(option: str) -> Any:
    return getattr(NetworkConfig, option)


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def mapping_of(value: Mapping[str, Any] | str | None, option: str) -> dict[str, Any]:
    """Returns an option that is a mapping, or its text. Raises ValueError where the text holds none."""
    return read_mapping(value, option) if isinstance(value, str) else dict(value or {})


@configuration
class TrainConfig(AugmentConfig, NetworkConfig, ClusterConfig, PairsConfig):
    """Trains a network on frame/mask pairs, on as many workers as asked for, into a model folder."""

    classes: Uri
    """What the classes are: the path of a YAML file (`classes: [sky, road]` is one), or one of a2d2, bdd100k,
    camvid, carla23, carla29, cityscapes, cityscapes_train_ids, kitti, mapillary_v1.2, mapillary_v2.0, nuimages,
    virtual_kitti_2."""
    out: Uri
    """URI of the run's folder: checkpoints, history, pictures and the model (in `model/`)."""

    path_pattern: str | None = None
    """Regular expression for relative paths with the named groups sequence, camera, frame_index, timestamp_ns."""
    val_images: OptionalUri = NOT_GIVEN
    """URI of a folder of validation frames of your own, or a pattern; without it whole drives are set aside."""
    val_masks: OptionalUri = NOT_GIVEN
    """URI of the masks of `--val-images`."""
    val_fraction: float = 0.1
    """Share of the frames to set aside for validation, in whole drives; 0 trains on everything."""
    guard_frames: int = 30
    """Where a single drive must be cut: frames left out on the border between training and validation."""
    split_manifest: OptionalUri = NOT_GIVEN
    """URI of a CSV file with the columns pair_id and split (train, val, none) that decides instead."""

    workers: int | str = 1
    """Training workers, each a process with a device (or CPU threads) of its own: N, or MIN:MAX to go on with those
    that are left when a node is lost, and to grow again when one comes."""
    cpus_per_worker: int | None = None
    """CPUs reserved for each worker, and threads it uses; by default what the cluster has, divided."""
    epochs: int = 40
    """Passes over the training frames."""
    batch_size: int = 32
    """Frames of a step, over all workers together."""
    accumulate: int = 1
    """Micro-batches that a worker's frames of a step go through the network in, one after the other, where they do not
    fit into its memory at once: the same step. With a Dice loss each goes forward twice."""
    image_size: tuple[int, int] | Literal["data"] = (96, 128)
    """Height and width of the network's input in pixels, or data: the frames' own size, of larger ones scaled down to
    512x1024 pixels' worth."""
    resize: Resize = "nearest"
    """How frames become images of that size, now and whenever the model is used: nearest neighbour, bilinear as OpenCV
    does it, bilinear-antialias as torchvision, area (the mean of what a pixel covers), or area-dct, which reads a JPEG
    at a part of its size: faster, but a PNG of the same picture may get another mask."""
    fit: Fit = "stretch"
    """Whether a frame fills the image (stretch) or keeps its aspect ratio and is padded on the right or below (pad)."""
    seed: int = 0
    """Decides initial weights, order of frames, dropout and augmentation."""
    init_from: OptionalUri = NOT_GIVEN
    """URI of a run's folder or of its model/, from whose weights the run starts; with other classes the last layer
    starts anew."""
    encoder_weights: OptionalUri = NOT_GIVEN
    """URI of pretrained weights for unet_convnext's encoder: a .weights.h5 or .h5 file of the ConvNeXtTiny of
    keras.applications, include_top=False. Nothing is downloaded."""
    encoder_learning_rate: float | None = None
    """What the learning rate is multiplied by for unet_convnext's encoder, 0 to 1; by default 0.1 with
    --encoder-weights, else 1."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the network; `auto` is bfloat16 where the device has it, else float32."""

    loss: Literal["ce", "focal", "dice", "jaccard", "ce+dice", "ce+jaccard"] = "ce"
    """Cross-entropy, focal loss (gamma 2), soft Dice, soft Jaccard, or cross-entropy and one of these two added."""
    class_weights: str = "none"
    """Weights of the classes in the loss: none, log, median, or the path of a YAML file {class: weight}."""
    ohem_threshold: float = 1.0
    """Cross-entropy and focal loss of training count only the pixels whose true class has a smaller probability (online
    hard example mining); 1 counts all."""
    rare_class_sampling: float = 0.0
    """Temperature with which frames that hold rare classes are drawn more often, with replacement: 0.01 much, 0.1 a
    little. 0: each frame once an epoch."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam, or Adam with decoupled weight decay."""
    learning_rate: float = 1e-3
    """Learning rate (after warm-up)."""
    weight_decay: float = 0.01
    """Decoupled weight decay of adamw; biases are left out."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the run: constant, or a cosine to zero after a linear warm-up."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up of the cosine schedule."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; above it the gradient is scaled down. 0: no clipping."""
    ema_momentum: float = 0.0
    """Share of itself that a moving average of the weights keeps at each step (0.999); the average is validated and
    becomes the model. 0: the weights themselves."""
    early_stopping_epochs: int = 0
    """Stop after so many epochs without a better validation mean IoU. 0: never."""
    augment: bool = False
    """Whether to vary the training frames; the options below say how."""

    checkpoint_every_epochs: int = 1
    """Epochs between two checkpoints; a killed run loses at most these."""
    max_failures: int = 3
    """Times that the group of workers is started again after one of them died."""
    collective_timeout_s: float = 600.0
    """Seconds after which a worker that lives but does not answer is given up."""
    mlflow: bool = False
    """Record the training in MLflow as well, at `MLFLOW_TRACKING_URI`."""
    overwrite: bool = False
    """Delete what lies in `--out` and start anew."""

    @classmethod
    def from_recipe(cls: Callable[P, C], recipe: str, /, *args: P.args, **options: P.kwargs) -> C:
        """Returns the options of a recipe, `default` or `notebook`, and over them those that are given here."""
        return cls(*args, **cast(Any, {**recipe_options(recipe, cls), **options}))

    def __post_init__(self) -> None:
        for options in (ClusterConfig, NetworkConfig, AugmentConfig):
            options.__post_init__(self)
        _require_at_least(self, 1, "epochs", "batch_size", "accumulate", "checkpoint_every_epochs")
        _require_at_least(
            self, 0, "seed", "guard_frames", "warmup_epochs", "clip_norm", "early_stopping_epochs", "weight_decay"
        )
        _require_at_least(self, 0, "rare_class_sampling")
        require(0 < self.ohem_threshold <= 1, f"--ohem-threshold is {self.ohem_threshold}; it must be in (0, 1]")
        require(0 <= self.ema_momentum < 1, f"--ema-momentum is {self.ema_momentum}; it must be in [0, 1)")
        _require_at_least(self, 0, "max_failures")
        _, most_workers = self.worker_range()
        require(
            self.batch_size >= most_workers,
            f"--batch-size is {self.batch_size} for {most_workers} workers; it is the batch of all of them together, "
            f"so give at least {most_workers}",
        )
        require(
            self.accumulate * most_workers <= self.batch_size,
            f"--accumulate is {self.accumulate}; a worker has {self.batch_size // most_workers} frames of a step "
            "(--batch-size, divided), so give at most that",
        )
        require(0 <= self.val_fraction < 1, f"--val-fraction is {self.val_fraction}; it must be in [0, 1)")
        require(self.learning_rate > 0, f"--learning-rate is {self.learning_rate}; it must be above 0")
        require(
            self.collective_timeout_s > 0, f"--collective-timeout-s is {self.collective_timeout_s}; it must be above 0"
        )
        require(
            self.cpus_per_worker is None or self.cpus_per_worker >= 1,
            f"--cpus-per-worker is {self.cpus_per_worker}; it must be at least 1",
        )
        require(
            (self.val_images is None) == (self.val_masks is None),
            "only one of --val-images and --val-masks was given; give both or neither",
        )
        check_path_pattern(self.path_pattern)
        self._check_encoder()
        self.model_config(n_classes=1)
        self.require_out_apart(self.out, both_ways=True)
        overlaps.require_apart(self.out, [("--init-from", self.init_from)], both_ways=True)

    def _check_encoder(self) -> None:
        for option in ("encoder_weights", "encoder_learning_rate"):
            value = getattr(self, option)
            require(
                value is None or self.network == "unet_convnext",
                f"{_option(option)} is {value}, which is for --network unet_convnext; --network is {self.network}",
            )
        require(
            self.encoder_weights is None or self.init_from is None,
            "both --init-from and --encoder-weights were given; a trained model has the encoder's weights, so give one",
        )
        factor = self.encoder_learning_rate
        require(factor is None or 0 <= factor <= 1, f"--encoder-learning-rate is {factor}; it must be 0 to 1")

    def rate_factors(self) -> dict[str, float]:
        """Returns what the learning rate is multiplied by for weights whose names begin so; for others it is 1."""
        default = 1.0 if self.encoder_weights is None else 0.1
        factor = default if self.encoder_learning_rate is None else self.encoder_learning_rate
        return {ENCODER_PREFIX: factor} if self.network == "unet_convnext" and factor != 1 else {}

    def sides(self) -> list[tuple[tuple[str, str], tuple[str, str]]]:
        """See `PairsConfig`."""
        validation = []
        if self.val_images is not None and self.val_masks is not None:
            validation = [(("--val-images", self.val_images), ("--val-masks", self.val_masks))]
        return [*super().sides(), *validation]

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        files = (name for name in (self.classes, self.class_weights) if name.endswith((".yaml", ".yml")))
        folders = (*self.folders(), self.out, self.val_images, self.val_masks)
        return (*folders, self.split_manifest, self.init_from, self.encoder_weights, *files)

    def worker_range(self) -> tuple[int, int]:
        """Returns the smallest and largest number of workers."""
        return _read_range(str(self.workers), "--workers", "N, or MIN:MAX with 1 <= MIN <= MAX")

    def model_config(self, n_classes: int) -> ModelConfig:
        """Returns the network that this run trains, for a class set of `n_classes`."""
        height_px, width_px = self.network_size()
        return self.network_config(
            image_height_px=height_px,
            image_width_px=width_px,
            n_classes=n_classes,
            preprocessing=self.preprocessing(),
        )

    def network_size(self) -> tuple[int, int]:
        """Returns height and width of the network's input; of `data`, before it was looked up, those of the default."""
        return (96, 128) if self.image_size == "data" else self.image_size

    def preprocessing(self) -> Preprocessing:
        """Returns what becomes of a frame before the network, in training and ever after."""
        # What a function of the user's does with the values of its images is its own.
        as_they_are = Preprocessing(std=(1.0, 1.0, 1.0))
        values = KINDS[self.network].preprocessing if self.network in _BUILT_IN else as_they_are
        return dataclasses.replace(values, resize=self.resize, fit=self.fit)


show_signature(TrainConfig.from_recipe, TrainConfig, before=("cls", "recipe"))


@dataclass(frozen=True, kw_only=True)
class ModelUseConfig:
    """What a model folder may do; shared by all jobs that build its network."""

    allow_network: str | None = None
    """package.module:function of a network of your own that the model folder may name: it is imported and called."""


@configuration
class EvaluateConfig(ModelUseConfig, ClusterConfig, PairsConfig):
    """Measures a trained model on frame/mask pairs."""

    model: Uri
    """URI of a run's folder or of its model/."""
    out: OptionalUri = NOT_GIVEN
    """URI of a folder for metrics.json and pictures; without it the result is only printed."""
    batch_size: int = 32
    """Frames of a step."""
    tta: Literal["none", "flip"] = "none"
    """Test-time augmentation: the mean of what the network says of a frame and of its mirror image; twice the time."""
    precision: Precision = "auto"
    """Arithmetic of the network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(self, 1, "batch_size")
        if self.out is not None:
            self.require_out_apart(self.out)

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        return (self.model, *self.folders(), self.out)


@configuration
class SegmentConfig(ModelUseConfig, ClusterConfig):
    """Labels an archive of frames with a trained model: masks and pixel statistics as Parquet."""

    model: Uri
    """URI of a run's folder or of its model/."""
    frames: Uris
    """URIs of the archives: folders, tar and zip files, Parquet, catalogues (CSV or Parquet with `uri`), globs."""
    out: Uri
    """URI of the output's folder."""

    path_pattern: str | None = None
    """Regular expression for relative paths with the named groups sequence, camera, frame_index, timestamp_ns."""
    image_column: str | None = None
    """Column of a Parquet archive that holds the encoded images; by default `image`."""
    include_hidden: bool = False
    """List hidden files too: names that begin with a dot, and what programs leave (__MACOSX, @eaDir, …)."""
    allow_uri: Uris = EMPTY
    """Places whose files catalogues may name: s3://drives. Without it, a catalogue names files below its own folder and
    below `--frames`."""
    actors: str = "auto"
    """Model actors: N, or MIN:MAX to let Ray grow and shrink the pool, and an autoscaling cluster with it; `auto` fits
    them to the nodes that are there, up to 16 where the cluster scales itself."""
    actors_per_gpu: int = 1
    """Model actors that share a GPU: each takes its part of the memory. More than one helps where a single actor leaves
    the GPU idle. Without effect on CPUs."""
    cpus_per_actor: int | None = None
    """Threads of each actor, and CPUs reserved for it; where the network itself runs on CPUs, three quarters of them:
    decoding takes turns with it. By default a node's CPUs, divided among its actors; on a GPU 1, or less where a node
    has few."""
    batch_size: int | None = None
    """Frames that the network takes at once; by default 32 on CPUs, and on a GPU up to 256, fewer of large ones. A
    batch that does not fit a GPU is halved once."""
    chunk_frames: int = 96
    """Most frames of a chunk, the unit of work and of commit; fewer where frames are large."""
    shard_rows: int = 50_000
    """Rows of a published Parquet file."""
    mask_size: Literal["native", "model"] = "native"
    """Size of the masks: the frame's own (logits resized bilinearly, then argmax) or the network's."""
    inference: Literal["whole", "slide"] = "whole"
    """Show the network the whole frame, resized, or windows of it at the frame's own scale."""
    window: tuple[int, int] | None = None
    """Height and width of a window of `slide` in pixels; by default the network's input."""
    stride: tuple[int, int] | None = None
    """Steps from window to window in pixels, down and across; by default half a window."""
    tta: Literal["none", "flip"] = "none"
    """Test-time augmentation: the mean of what the network says of a frame and of its mirror image; twice the time."""
    mask_encoding: Literal["png", "raw"] = "png"
    """How a mask is stored: 8-bit palette PNG (any viewer shows it) or the bare uint8 rows (faster)."""
    precision: Precision = "auto"
    """Arithmetic of the network; `auto` is that of the output where it goes on with one, else bfloat16 where the device
    has it, else float32."""
    max_frame_megapixels: float = 64.0
    """A frame with more pixels is rejected as too_large, before it is decoded."""
    frame_timeout_s: float = 60.0
    """Seconds after which the decoding of one frame is given up."""
    max_rejected: float = 0.01
    """Largest share of rejected frames with which the output is published."""
    retry_rejected: OptionalTexts = NOT_GIVEN
    """Try rejected frames again, and no others: all, or those rejected for the reasons that follow, such as crashed.
    One whose file is not what was listed is rejected as changed: another `--out` or `--overwrite` labels it as it is
    now."""
    add_root: bool = False
    """Add folders or files to an output that holds others: their frame ids begin with their names, and frames that are
    there keep their ids and labels."""
    keep_gone: bool = False
    """Go on although more than half of the frames that the output holds of `--frames` are gone; labels stay."""
    overwrite: bool = False
    """Delete what lies in `--out` and start anew; refused while another job works on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(self, 1, *(() if self.batch_size is None else ("batch_size",)), "chunk_frames", "shard_rows")
        require(1 <= self.actors_per_gpu <= 16, f"--actors-per-gpu is {self.actors_per_gpu}; it must be 1 to 16")
        require(
            self.actors_per_gpu == 1 or self.device != "cpu",
            f"--actors-per-gpu is {self.actors_per_gpu} and --device is cpu; leave one of them out",
        )
        require(len(self.frames) > 0, "--frames is empty; give at least one folder, tar file or glob")
        require(0 <= self.max_rejected <= 1, f"--max-rejected is {self.max_rejected}; it is a share, 0 to 1")
        require(self.max_frame_megapixels > 0, "--max-frame-megapixels must be above 0")
        require(self.frame_timeout_s > 0, "--frame-timeout-s must be above 0")
        self.actor_range()
        check_path_pattern(self.path_pattern)
        overlaps.require_apart(self.out, [("--frames", uri) for uri in self.frames], both_ways=True)
        overlaps.require_unmatched(self.out, "--frames", self.frames)

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        return (self.model, self.out, *self.frames, *self.allow_uri)

    def actor_range(self) -> tuple[int, int] | None:
        """Returns the smallest and largest number of actors, or None for `auto`."""
        if self.actors == "auto":
            return None
        return _read_range(self.actors, "--actors", "N, MIN:MAX with 1 <= MIN <= MAX, or auto")


@configuration
class CheckConfig(PairsConfig):
    """Says everything that is wrong with a data set, in one table, before any training."""

    classes: Uri
    """What the classes are: the path of a YAML file (`classes: [sky, road]` is one), or one of a2d2, bdd100k,
    camvid, carla23, carla29, cityscapes, cityscapes_train_ids, kitti, mapillary_v1.2, mapillary_v2.0, nuimages,
    virtual_kitti_2."""
    path_pattern: str | None = None
    """Regular expression for relative paths with the named groups sequence, camera, frame_index, timestamp_ns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path_pattern(self.path_pattern)

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        return (*self.folders(), *([self.classes] if self.classes.endswith((".yaml", ".yml")) else []))


@configuration
class VerifyConfig(StorageConfig):
    """Checks an output of `segment` against its own records: every file, every digest, every row."""

    out: Positional[Uri] = dataclasses.field(kw_only=False)
    """URI of the output's folder."""
    sources: bool = False
    """Also reads every labelled frame again, and names those that are gone or hold other bytes than were labelled."""

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        return (self.out,)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(StorageConfig):
    """Says what this machine, or each node of the cluster of RAY_ADDRESS, can do; where a bug report starts.

    Exit code 1 where something will not work; the remedy stands on its line, no credential anywhere.
    """

    inputs: tuple[str, ...] = ()
    """URIs of folders and files that each node lists and reads: frames, masks, models."""
    outputs: tuple[str, ...] = ()
    """URIs of folders in which each node also writes a small file, of its own and as one of two writers, and deletes
    it: runs and labels."""
    storage_retry_s: float = 10.0
    """Seconds for which a store that does not answer is asked again, before its line fails."""

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        return (*self.inputs, *self.outputs)


@configuration
class ExportModelConfig(ModelUseConfig, StorageConfig):
    """Writes a trained model for use without Ray."""

    model: Uri
    """URI of a run's folder or of its model/."""
    out: Uri
    """URI to write to: model.keras, a folder (savedmodel) or model.onnx."""
    format: Literal["keras", "savedmodel", "onnx"] = "keras"
    """Format of the exported model; each takes frames of the network's size, 0 to 255, and gives logits."""

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        return (self.model, self.out)


@configuration
class ImportModelConfig(StorageConfig):
    """Makes a model folder of a network made elsewhere, for `segment`, `evaluate` and `verify`."""

    onnx: Uri
    """URI of an ONNX file; weights that lie beside it are taken in. It is data: nothing in it runs as code."""
    classes: Uri
    """What its classes are, in their order: the path of a YAML file, or the name of a class set (see `train`)."""
    out: Uri
    """URI of the model folder to write."""
    image_size: tuple[int, int] | None = None
    """Height and width of its input in pixels; by default what the file says."""
    mean: tuple[float, float, float] | None = None
    """What is taken from each colour, in units of 0 to 255 and in the order of --channels: 123.675 116.28 103.53 for
    most networks made with PyTorch. By default nothing."""
    std: tuple[float, float, float] | None = None
    """What each colour is then divided by, in the same unit and order: 58.395 57.12 57.375 for most of them. By default
    255, and 1 for a network that takes uint8, which normalises itself."""
    channels: Channels = "RGB"
    """Order of the colours in its input."""
    resize: Resize = "bilinear"
    """How frames become images of its size, as in its training; see `train`."""
    fit: Fit = "stretch"
    """Whether a frame fills the image (stretch) or keeps its aspect ratio and is padded on the right or below (pad)."""
    layout: Literal["nchw", "nhwc"] | None = None
    """Order of its input's dimensions, where the file leaves it open."""
    output: str | None = None
    """Name of the output to use, where it has several."""
    kind: Literal["logits", "probabilities", "ids"] | None = None
    """What it gives, where the values leave it open."""
    frames: OptionalUri = NOT_GIVEN
    """URI of a folder of frames to try it on; by default made ones."""

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        return (self.onnx, self.out, self.frames)

    def preprocessing(self) -> dict[str, Any]:
        """Returns what was said of what becomes of a frame before the network: fields of `Preprocessing`."""
        fields = {name: getattr(self, name) for name in ("resize", "fit", "mean", "std", "channels")}
        return {name: value for name, value in fields.items() if value is not None}


@configuration
class ExportMasksConfig(StorageConfig):
    """Writes the masks of an output of `segment` as files for other tools, with the frames if asked for."""

    labels: Positional[Uri] = dataclasses.field(kw_only=False)
    """URI of the output's folder."""
    out: Uri
    """URI to write to: a folder; for `coco` a file that ends in .json; for `cvat` also one that ends in .zip."""
    format: Literal["png", "voc", "cvat", "coco", "fiftyone"] = "png"
    """A palette PNG for each frame, pixel = class id (png); folders as Pascal VOC has them (voc); CVAT's Segmentation
    mask 1.1 (cvat); COCO's JSON, an RLE for each frame and class (coco); a dataset of FiftyOne (fiftyone)."""
    sequence: Texts = EMPTY
    """Only the frames of these drives."""
    where: str | None = None
    """Only the frames that fit a condition on the output's columns, as SQL writes it: "pixels_pedestrian > 0 and
    confidence < 0.8"."""
    with_frames: bool = False
    """Write the frames too, byte by byte as they were labelled, out of archives too."""

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        return (self.labels, self.out)

    @property
    def is_zip(self) -> bool:
        """Whether `--out` is a zip file, which CVAT imports."""
        return self.format == "cvat" and storage.resolve(self.out).endswith(".zip")

    @property
    def is_one_file(self) -> bool:
        """Whether `--out` is a file, not a folder."""
        return self.format == "coco" or self.is_zip

    def __post_init__(self) -> None:
        super().__post_init__()
        overlaps.require_apart(self.out, [("the output", self.labels)])
        require(
            self.format != "coco" or storage.resolve(self.out).endswith(".json"),
            f"--out is {self.out}; the format coco is one file, give a name that ends in .json",
        )
        require(
            self.format == "cvat" or not storage.resolve(self.out).endswith(".zip"),
            f"--out is {self.out}; only the format cvat is written as a zip, give a folder",
        )


@configuration
class ReportConfig(StorageConfig):
    """Writes the page report.html of an output of `segment`, or of a training run, anew."""

    folder: Positional[Uri] = dataclasses.field(kw_only=False)
    """URI of the output's folder, or of the run's."""
    out: OptionalUri = NOT_GIVEN
    """URI of the page, a file that ends in .html; by default report.html in that folder."""
    gallery: int = 6
    """Frames in each gallery of an output, 1 to 24."""
    sequence: Texts = EMPTY
    """Drives of an output to show over time; by default outliers, and others spread over all."""
    sources: bool = True
    """Read frames and the model where the output says that they lie; without, masks are shown alone, and no file is
    opened that an output from a stranger may name."""

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        return (self.folder, self.out)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.gallery <= 24, f"--gallery is {self.gallery}; it must be 1 to 24")
        require(
            self.out is None or storage.resolve(self.out).endswith(".html"),
            f"--out is {self.out}; it is one file, give a name that ends in .html",
        )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Draws a driving log, trains on it with two workers, and labels a drive that training never saw."""

    out: str = "unet-ray-demo"
    """Folder for everything that the demo makes."""
    seed: int = 0
    """Decides the log and the training; the same seed draws the same bytes."""
    workers: int = 2
    """Training workers."""
    epochs: int = 24
    """Passes over the training frames."""
    overwrite: bool = False
    """Start anew where `--out` holds a demo already."""

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "workers", "epochs")
        _require_at_least(self, 0, "seed")


def _read_range(text: str, option: str, allowed: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    require(1 <= low <= high, f"{option} is {text!r}; give {allowed}")
    return low, high


def check_path_pattern(pattern: str | None) -> None:
    """Raises ValueError where `--path-pattern` is no regular expression, or has no group that means something."""
    if pattern is None:
        return
    try:
        groups = set(re.compile(pattern).groupindex)
    except re.error as error:
        raise ValueError(f"--path-pattern is not a regular expression: {error}") from error
    allowed = ("sequence", "camera", "frame_index", "timestamp_ns")
    unknown = sorted(groups - set(allowed))
    require(
        bool(groups) and not unknown,
        f"--path-pattern has the named groups {sorted(groups)}; use some of {', '.join(allowed)}: (?P<sequence>…)",
    )


def load_class_set(name_or_uri: str) -> ClassSet:
    """Returns a preset by name, or the class set of a YAML file, whose forms `class_files` has."""
    if name_or_uri in PRESETS:
        return PRESETS[name_or_uri]
    if not name_or_uri.endswith((".yaml", ".yml")):
        meant = perhaps(closest(name_or_uri, PRESETS))
        raise ValueError(
            f"--classes is {name_or_uri!r}; {meant}give one of {', '.join(PRESETS)} or the path of a .yaml file"
        )
    content = read_content(name_or_uri)
    return class_set_of(content, source=name_or_uri, name=storage.name(name_or_uri).rpartition(".")[0])

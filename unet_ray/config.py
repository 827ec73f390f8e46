"""What a job is told: frozen dataclasses, validated on construction.

The fields are the command line's options (`image_size` is `--image-size`); the text under a field is its help.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from unet_ray import storage
from unet_ray.classes import PRESETS, ClassSet
from unet_ray.config_files import MAPPING_TEXT, read_mapping, read_yaml
from unet_ray.errors import require
from unet_ray.model.architecture import ModelConfig
from unet_ray.storage import filesystems, overlaps

Device = Literal["auto", "gpu", "cpu"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
MaskFormat = Literal["auto", "channel-max", "ids", "colors"]


def _require_at_least(config: Any, minimum: float, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        option = "--" + field.replace("_", "-")
        require(value >= minimum, f"{option} is {value}; it must be at least {minimum}")


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
    """Where the network runs: `auto` takes a GPU where the cluster has one now; give gpu where they are yet to come."""
    wait_for_resources_s: float = 600.0
    """Seconds to wait for CPUs or GPUs that the cluster does not have yet, before the job ends with the reason."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(self, 0, "wait_for_resources_s")


@dataclass(frozen=True, kw_only=True)
class PairsConfig(StorageConfig):
    """Which frames and masks belong together, and what the masks mean; shared by all jobs that read pairs."""

    images: str
    """URI of the folder of frames (searched at any depth)."""
    masks: str
    """URI of the folder of masks; a mask has its frame's relative path, but for extension and suffix."""
    image_suffix: str = ""
    """End of a frame's name before the extension that its mask's name lacks (Cityscapes: _leftImg8bit)."""
    mask_suffix: str = ""
    """End of a mask's name before the extension that its frame's name lacks (Cityscapes: _gtFine_labelIds)."""
    mask_format: MaskFormat = "auto"
    """How a mask's pixels mean a class: the maximum over the channels, an id, or the class set's colours."""

    def folders(self) -> list[tuple[str, str | None]]:
        """Returns the option and the URI of both folders, of which no output may be a part."""
        return [("--images", self.images), ("--masks", self.masks)]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ClusterConfig, PairsConfig):
    """Trains a U-Net on frame/mask pairs, on as many workers as asked for, into a model folder."""

    classes: str
    """What the classes are: a preset (carla23, carla29, cityscapes, camvid) or the path of a YAML file."""
    out: str
    """URI of the run's folder: checkpoints, history, pictures and the model (in `model/`)."""

    path_pattern: str | None = None
    """Regular expression for relative paths with the named groups sequence, camera, frame_index, timestamp_ns."""
    val_images: str | None = None
    """URI of a folder of validation frames of your own; without it whole drives are set aside."""
    val_masks: str | None = None
    """URI of the masks of `--val-images`."""
    val_fraction: float = 0.1
    """Share of the frames to set aside for validation, in whole drives; 0 trains on everything."""
    guard_frames: int = 30
    """Where a single drive must be cut: frames left out on the border between training and validation."""
    split_manifest: str | None = None
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
    image_size: tuple[int, int] = (96, 128)
    """Height and width of the network's input in pixels."""
    n_filters: int = 32
    """Filters of the first block; each deeper block has twice as many."""
    depth: int = 5
    """Encoder blocks; between two of them the image is halved."""
    dropout: float = 0.3
    """Share of activations dropped in the last two encoder blocks while training."""
    seed: int = 0
    """Decides initial weights, order of frames, dropout and augmentation."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the network; `auto` is bfloat16 where the device has it, else float32."""

    loss: Literal["ce", "dice", "ce+dice", "focal"] = "ce"
    """Cross-entropy, soft Dice, their sum, or focal loss (gamma 2)."""
    class_weights: str = "none"
    """Weights of the classes in the loss: none, log, median, or the path of a YAML file {class: weight}."""
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
    early_stopping_epochs: int = 0
    """Stop after so many epochs without a better validation mean IoU. 0: never."""
    augment: bool = False
    """Whether to vary the training frames; the options below say how."""
    flip: bool = True
    """Augmentation: mirror left and right in half of the cases."""
    scale: tuple[float, float] = (0.5, 1.0)
    """Augmentation: smallest and largest share of the full-resolution frame's sides that a crop shows."""
    brightness: float = 0.2
    """Augmentation: largest relative change of brightness."""
    contrast: float = 0.2
    """Augmentation: largest relative change of contrast."""
    saturation: float = 0.2
    """Augmentation: largest relative change of saturation."""

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

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(self, 1, "epochs", "batch_size", "checkpoint_every_epochs")
        _require_at_least(
            self, 0, "seed", "guard_frames", "warmup_epochs", "clip_norm", "early_stopping_epochs", "weight_decay"
        )
        _require_at_least(self, 0, "brightness", "contrast", "saturation", "max_failures")
        _, most_workers = self.worker_range()
        require(
            self.batch_size >= most_workers,
            f"--batch-size is {self.batch_size} for {most_workers} workers; it is the batch of all of them together, "
            f"so give at least {most_workers}",
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
        low, high = self.scale
        require(0 < low <= high <= 4, f"--scale is {low} {high}; give two numbers with 0 < smallest <= largest <= 4")
        check_path_pattern(self.path_pattern)
        self.model_config(n_classes=1)
        validation = (("--val-images", self.val_images), ("--val-masks", self.val_masks))
        overlaps.require_apart(self.out, [*self.folders(), *validation], both_ways=True)

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        files = (name for name in (self.classes, self.class_weights) if name.endswith((".yaml", ".yml")))
        folders = (self.images, self.masks, self.out, self.val_images, self.val_masks)
        return (*folders, self.split_manifest, *files)

    def worker_range(self) -> tuple[int, int]:
        """Returns the smallest and largest number of workers."""
        return _read_range(str(self.workers), "--workers", "N, or MIN:MAX with 1 <= MIN <= MAX")

    def model_config(self, n_classes: int) -> ModelConfig:
        """Returns the network that this run trains, for a class set of `n_classes`."""
        return ModelConfig(
            image_height_px=self.image_size[0],
            image_width_px=self.image_size[1],
            n_classes=n_classes,
            n_filters=self.n_filters,
            depth=self.depth,
            dropout=self.dropout,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ClusterConfig, PairsConfig):
    """Measures a trained model on frame/mask pairs."""

    model: str
    """URI of a run's folder or of its model/."""
    out: str | None = None
    """URI of a folder for metrics.json and pictures; without it the result is only printed."""
    batch_size: int = 32
    """Frames of a step."""
    precision: Precision = "auto"
    """Arithmetic of the network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(self, 1, "batch_size")
        if self.out is not None:
            overlaps.require_apart(self.out, self.folders())

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        return (self.model, self.images, self.masks, self.out)


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(ClusterConfig):
    """Labels an archive of frames with a trained model: masks and pixel statistics as Parquet."""

    model: str
    """URI of a run's folder or of its model/."""
    frames: tuple[str, ...]
    """URIs of the archives: folders, tar and zip files, Parquet, catalogues (CSV or Parquet with `uri`), globs."""
    out: str
    """URI of the output's folder."""

    path_pattern: str | None = None
    """Regular expression for relative paths with the named groups sequence, camera, frame_index, timestamp_ns."""
    image_column: str | None = None
    """Column of a Parquet archive that holds the encoded images; by default `image`."""
    actors: str = "auto"
    """Model actors: N, or MIN:MAX to let Ray grow and shrink the pool, and an autoscaling cluster with it; `auto` fits
    them to the nodes that are there."""
    cpus_per_actor: int | None = None
    """Threads of each actor, and CPUs reserved for it; where the network itself runs on CPUs, three quarters of them:
    decoding takes turns with it. By default a node's CPUs, divided among its actors; on a GPU 1."""
    batch_size: int = 32
    """Frames that the network takes at once."""
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
    """8-bit palette PNG (any viewer shows it) or the bare uint8 rows (faster)."""
    precision: Precision = "auto"
    """Arithmetic of the network; `auto` is that of the output where it goes on with one, else bfloat16 where the device
    has it, else float32."""
    max_frame_megapixels: float = 64.0
    """A frame with more pixels is rejected as too_large, before it is decoded."""
    frame_timeout_s: float = 60.0
    """Seconds after which the decoding of one frame is given up."""
    max_rejected: float = 0.01
    """Largest share of rejected frames with which the output is published."""
    retry_rejected: tuple[str, ...] | None = None
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
        _require_at_least(self, 1, "batch_size", "chunk_frames", "shard_rows")
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
        return (self.model, self.out, *self.frames)

    def actor_range(self) -> tuple[int, int] | None:
        """Returns the smallest and largest number of actors, or None for `auto`."""
        if self.actors == "auto":
            return None
        return _read_range(self.actors, "--actors", "N, MIN:MAX with 1 <= MIN <= MAX, or auto")


@dataclass(frozen=True, kw_only=True)
class CheckConfig(PairsConfig):
    """Says everything that is wrong with a data set, in one table, before any training."""

    classes: str
    """What the classes are: a preset (carla23, carla29, cityscapes, camvid) or the path of a YAML file."""
    path_pattern: str | None = None
    """Regular expression for relative paths with the named groups sequence, camera, frame_index, timestamp_ns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path_pattern(self.path_pattern)

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        return (self.images, self.masks, *([self.classes] if self.classes.endswith((".yaml", ".yml")) else []))


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(StorageConfig):
    """Checks an output of `segment` against its own records: every file, every digest, every row."""

    out: Positional[str]
    """URI of the output's folder."""

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        return (self.out,)


@dataclass(frozen=True, kw_only=True)
class ExportModelConfig(StorageConfig):
    """Writes a trained model for use without Ray."""

    model: str
    """URI of a run's folder or of its model/."""
    out: str
    """URI to write to: model.keras, a folder (savedmodel) or model.onnx."""
    format: Literal["keras", "savedmodel", "onnx"] = "keras"
    """Format of the exported model; each takes frames of the network's size, 0 to 255, and gives logits."""

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        return (self.model, self.out)


@dataclass(frozen=True, kw_only=True)
class ExportMasksConfig(StorageConfig):
    """Writes the masks of an output of `segment` as PNG files, or as one file of COCO annotations."""

    labels: Positional[str]
    """URI of the output's folder."""
    out: str
    """URI to write to: a folder for `png`, a file that ends in .json for `coco`."""
    format: Literal["png", "coco"] = "png"
    """A palette PNG for each frame, pixel = class id; or COCO's JSON, an RLE for each frame and class."""
    sequence: tuple[str, ...] = ()
    """Only the frames of these drives."""

    def uris(self) -> tuple[str | None, ...]:
        """See `StorageConfig`."""
        return (self.labels, self.out)

    def __post_init__(self) -> None:
        super().__post_init__()
        overlaps.require_apart(self.out, [("the output", self.labels)])
        require(
            self.format != "coco" or storage.resolve(self.out).endswith(".json"),
            f"--out is {self.out}; the format coco is one file, give a name that ends in .json",
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
    """Returns a preset by name, or the class set of a YAML file.

    The file: `classes: [{name, color, values}]` and `ignore: [values]`; values are ids or colours.
    """
    if name_or_uri in PRESETS:
        return PRESETS[name_or_uri]
    if not name_or_uri.endswith((".yaml", ".yml")):
        raise ValueError(f"--classes is {name_or_uri!r}; give one of {', '.join(PRESETS)} or the path of a .yaml file")
    content = read_yaml(name_or_uri)
    return ClassSet.from_dict({"name": storage.name(name_or_uri).rpartition(".")[0], **content})

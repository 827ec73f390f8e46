"""The help of a command: its options in groups, those that have to be given first, with defaults and two examples.

`-h` is a screen of 50 lines at 100 columns: the options that people use, a line each. `--help` is whole.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable

from unet_ray.options import config_files
from unet_ray.options.cli_options import Command
from unet_ray.options.cli_values import NEVER, Option, value_text

_MOST_COLUMNS = 100
_INDENT = 30
"""Columns of an option's name and value, in `--help`; a longer one has its text below it."""

GROUPS = {
    "data": (
        *("folder", "images", "masks", "classes", "frames", "labels", "val_images", "val_masks", "val_fraction"),
        *("mask_format", "image_suffix", "mask_suffix", "path_pattern", "include_hidden", "guard_frames"),
        *("split_manifest", "image_column", "allow_uri", "max_frame_megapixels", "frame_timeout_s", "sequence"),
        *("where", "sources", "inputs", "outputs"),
    ),
    "model": (
        *("model", "onnx", "network", "image_size", "resize", "fit", "n_filters", "depth", "dropout", "norm"),
        *("residual", "init_from", "encoder_weights", "drop_path", "network_arguments", "allow_network"),
        *("mean", "std", "channels", "layout", "output", "kind", "inference", "window", "stride", "tta", "precision"),
    ),
    "training": (
        *("epochs", "batch_size", "learning_rate", "loss", "class_weights", "ohem_threshold"),
        *("rare_class_sampling", "optimizer", "schedule"),
        *("warmup_epochs", "weight_decay", "clip_norm", "ema_momentum", "early_stopping_epochs", "accumulate"),
        *("encoder_learning_rate", "seed"),
    ),
    "augmentation": ("augment", "flip", "scale", "brightness", "contrast", "saturation", "classmix"),
    "output": (
        *("out", "format", "with_frames", "mask_size", "mask_encoding", "overwrite", "retry_rejected"),
        *("max_rejected", "add_root", "gallery"),
        *("keep_gone", "chunk_frames", "shard_rows", "checkpoint_every_epochs", "mlflow"),
    ),
    "cluster": (
        *("device", "workers", "cpus_per_worker", "actors", "actors_per_gpu", "cpus_per_actor"),
        *("wait_for_resources_s", "max_failures", "collective_timeout_s"),
    ),
    "storage": ("storage_options", "storage_retry_s"),
}
"""The fields of all configurations, in the order of the help. A test fails where one has no group."""

_ELSEWHERE = {("segment", "batch_size"): "cluster", ("evaluate", "batch_size"): "cluster"}
"""Options that belong to another group where nothing is trained."""

BRIEF = {
    "train": (
        *("val_fraction", "val_images", "val_masks", "mask_format", "image_suffix", "mask_suffix", "path_pattern"),
        *("image_size", "network", "init_from", "epochs", "batch_size", "learning_rate", "loss", "class_weights"),
        *("early_stopping_epochs", "seed", "augment", "overwrite", "mlflow", "workers", "device", "precision"),
    ),
    "segment": (
        *("path_pattern", "include_hidden", "inference", "tta", "mask_size", "mask_encoding", "overwrite"),
        *("retry_rejected", "max_rejected", "add_root", "actors", "batch_size", "device", "precision"),
    ),
}
"""What `-h` shows of the commands that have more options than a screen has lines."""

EXAMPLES = {
    "demo": ("unet-ray demo", "unet-ray demo --out try --epochs 8"),
    "doctor": ("unet-ray doctor", "unet-ray doctor --inputs s3://bucket/drives --outputs s3://bucket/labels"),
    "check": (
        "unet-ray check --images data/CameraRGB --masks data/CameraMask --classes carla23",
        "unet-ray check --images leftImg8bit --masks gtFine --classes cityscapes --image-suffix _leftImg8bit "
        "--mask-suffix _gtFine_labelIds",
    ),
    "train": (
        "unet-ray train --images data/CameraRGB --masks data/CameraMask --classes carla23 --out runs/first",
        "unet-ray train --config runs/first/config.yaml --out runs/second --epochs 40 --workers 2",
    ),
    "evaluate": (
        "unet-ray evaluate --model runs/first --images data/CameraRGB --masks data/CameraMask",
        "unet-ray evaluate --model runs/first --images val/rgb --masks val/seg --tta flip --out scores",
    ),
    "export-model": (
        "unet-ray export-model --model runs/first --out first.onnx --format onnx",
        "unet-ray export-model --model runs/first --out first.keras",
    ),
    "import-model": (
        "unet-ray import-model --onnx net.onnx --classes cityscapes_train_ids --out models/net",
        "unet-ray import-model --onnx net.onnx --classes mine.yaml --out models/net --mean 123.675 116.28 103.53 "
        "--std 58.395 57.12 57.375",
    ),
    "segment": (
        "unet-ray segment --model runs/first --frames drives/ --out labels",
        "unet-ray segment --model s3://bucket/runs/first --frames drive07.tar drive08.tar --out s3://bucket/labels",
    ),
    "verify": ("unet-ray verify labels", "unet-ray verify s3://bucket/labels --sources"),
    "report": ("unet-ray report labels", "unet-ray report runs/first --out first.html"),
    "export-masks": (
        "unet-ray export-masks labels --out masks",
        "unet-ray export-masks labels --out cvat.zip --format cvat --where 'confidence < 0.8'",
    ),
}
"""Two command lines for each command."""


def help_text(name: str, command: Command, *, is_whole: bool) -> str:
    """Returns the help of a command, `--help` (whole) or `-h`, for the width of this terminal."""
    width = min(_MOST_COLUMNS, shutil.get_terminal_size((_MOST_COLUMNS, 24)).columns)
    groups = _groups(name, command, is_whole)
    n_shown = sum(map(len, groups.values()))
    entry = _entry if is_whole else _line
    sections = [
        f"{title}:\n" + "\n".join(entry(option, text, width) for option, text in options.items())
        for title, options in groups.items()
    ]
    n_all = len(command.options) + len(command.files)
    whole = f"`unet-ray {name} --help` explains {'these' if n_shown == n_all else f'all {n_all}'} options in full."
    rest = [] if is_whole else [whole]
    head = [_usage(name, command, width), *_description(command, width, is_whole)]
    return "\n\n".join([*head, ("\n\n" if is_whole else "\n").join(sections), _examples(name, width), *rest])


def group_of(name: str, field: str) -> str:
    """Returns the title of the group in which a command's option stands."""
    return _ELSEWHERE.get((name, field)) or next(title for title, fields in GROUPS.items() if field in fields)


def _groups(name: str, command: Command, is_whole: bool) -> dict[str, dict[Option, str]]:
    """Returns title, options and their defaults, in the order of the help."""
    order = [field for fields in GROUPS.values() for field in fields]
    optional = [option for option in command.options.values() if option.default is not NEVER]
    brief = None if is_whole else BRIEF.get(name)
    defaults = _defaults(command)
    groups: dict[str, dict[Option, str]] = {title: {} for title in ("required", *GROUPS, "options from files")}
    groups["required"] = {option: "" for option in command.options.values() if option.default is NEVER}
    for option in sorted(optional, key=lambda option: order.index(option.field)):
        if brief is None or option.field in brief:
            groups[group_of(name, option.field)][option] = defaults[option.field]
    groups["options from files"] = {option: value_text(option.default) for option in command.files.values()}
    return {title: options for title, options in groups.items() if options}


def _defaults(command: Command) -> dict[str, str]:
    """Returns the default of each option as one would type it; a recipe's counts, where the command starts from one."""
    recipe = config_files.read_recipe(command.recipe) if command.recipe else {}
    return {
        field: value_text(recipe[field]) if field in recipe else option.default_text()
        for field, option in command.options.items()
    }


def _usage(name: str, command: Command, width: int) -> str:
    required = [option for option in command.options.values() if option.default is NEVER]
    words = [option.title if option.is_positional else _title(option) for option in required]
    return _wrapped(" ".join(["usage: unet-ray", name, *words, "[OPTIONS]"]), width, indent=8)


def _description(command: Command, width: int, is_whole: bool) -> Iterable[str]:
    paragraphs = (command.config_type.__doc__ or "").strip().split("\n\n")
    if command.recipe and is_whole:
        paragraphs.append(
            f"Defaults below are those of `--recipe {command.recipe}`. An option given here wins over the file of "
            "--config, the file over the recipe."
        )
    return [_wrapped(" ".join(text.split()), width) for text in (paragraphs if is_whole else paragraphs[:1])]


def _examples(name: str, width: int) -> str:
    lines = [line for example in EXAMPLES[name] for line in _command_lines(example, width)]
    return "\n".join(["examples:", *lines])


def _command_lines(command: str, width: int) -> list[str]:
    """Returns a command as a shell takes it, over several lines where it is long."""
    lines = textwrap.wrap(command, width - 2, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
    return [*(f"{line} \\" for line in lines[:-1]), lines[-1]]


def _title(option: Option, default: str = "") -> str:
    """An option as it is given, with what stands for its value."""
    if option.is_switch:
        return f"{option.title}, --no-{option.title[2:]}" if default else option.title
    return " ".join(filter(None, [option.title, "" if option.is_positional else option.metavar()]))


def _entry(option: Option, default: str, width: int) -> str:
    """An option with its whole text, as `--help` has it."""
    title = f"  {_title(option, default)}"
    text = f"{option.text} (default: {default})" if default else option.text
    lines = textwrap.wrap(text, width - _INDENT, break_on_hyphens=False, break_long_words=False)
    if len(title) > _INDENT - 2:
        return "\n".join([title, *(" " * _INDENT + line for line in lines)])
    return "\n".join([f"{title:{_INDENT}}{lines[0]}", *(" " * _INDENT + line for line in lines[1:])])


def _line(option: Option, default: str, width: int) -> str:
    """An option in one line, as `-h` has it: as much of its text as makes sense by itself."""
    title = f"  {_title(option, default):{_INDENT}}  "
    tail = f" [{default}]" if default else ""
    return f"{title}{_beginning(option.text, width - len(title) - len(tail))}{tail}"


_ENDS = (r"[.;] |\.$", r": | \(")
"""Where a text may be cut, the best first; at a comma it would say something else."""


def _beginning(text: str, room: int) -> str:
    """Returns the longest beginning of a text that fits and ends where a clause does."""
    for end in _ENDS:
        beginnings = [text[: match.start()] for match in re.finditer(end, text)]
        fitting = [part for part in beginnings if len(part) <= room and _is_whole(part)]
        if fitting:
            return fitting[-1]
    return textwrap.shorten(text, room, placeholder=" …")


def _is_whole(text: str) -> bool:
    return all(text.count(opening) == text.count(closing) for opening, closing in ("()", "{}", "[]"))


def _wrapped(text: str, width: int, indent: int = 0) -> str:
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)

"""The folder of a training run: whose it is, whether it is finished, and what may be deleted in it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from unet_ray import storage
from unet_ray.classes import ClassSet
from unet_ray.config import TrainConfig, mapping_of
from unet_ray.options.config_files import to_plain, to_yaml
from unet_ray.pairs.splits import Split
from unet_ray.training import checkpoints
from unet_ray.training.initial import InitialWeights
from unet_ray.training.mlflow_record import MLFLOW_FILE

CONFIG_FILE, ABOUT_FILE, METRICS_FILE = "config.yaml", "run.json", "metrics.json"

_FILES = (
    *(METRICS_FILE, ABOUT_FILE, MLFLOW_FILE, "history.csv", "curves.png", "samples.png"),
    *("confusion.png", "confusion.csv", "report.html"),
)
_FOLDERS = (checkpoints.FOLDER, "model", "tensorboard")

_SAME_MATHEMATICS = ("workers", "cpus_per_worker", "device", "accumulate")
"""Options that change a result in its rounding only, and in the pixels that dropout drops."""
_MAY_DIFFER = frozenset(
    {"out", "overwrite", "max_failures", "collective_timeout_s", "wait_for_resources_s", "storage_retry_s", "mlflow"}
    | {*_SAME_MATHEMATICS}
)
"""Options with which a run may go on that began with others; `--epochs` may be more than before."""

_DATA_KEYS = ("train_frames", "validation_frames", "frames_sha256", "classes_sha256", "mask_format", "initial_weights")


def resolved(config: TrainConfig) -> TrainConfig:
    """Returns the configuration with absolute paths: what is compared and written, wherever a command was given."""
    of_data = ("images", "masks", "val_images", "val_masks", "split_manifest")
    uris = {
        name: storage.resolve(value)
        for name in (*of_data, "out", "init_from", "encoder_weights")
        if (value := getattr(config, name)) is not None
    }
    files = {
        name: storage.resolve(value)
        for name in ("classes", "class_weights")
        if (value := getattr(config, name)).endswith((".yaml", ".yml"))
    }
    arguments = config.network_arguments and mapping_of(config.network_arguments, "--network-arguments")
    size = {}
    if config.image_size == "data" and (before := _options_before(dataclasses.replace(config, out=uris["out"]))):
        size = {"image_size": tuple(before["image_size"])}  # what was found when the run began
    changes: dict[str, Any] = size | uris | files | {"network_arguments": arguments}
    return dataclasses.replace(config, **changes)


def describe(
    split: Split,
    class_set: ClassSet,
    mask_format: str,
    class_weights_K: Sequence[float] | None,
    initial: InitialWeights | None = None,
) -> dict[str, Any]:
    """Returns what a run is about, for `run.json`: a run goes on with the same data only.

    `class_weights_K` are those of a file, of which the options hold the path alone.
    """
    ids = {"train": [pair.pair_id for pair in split.train], "validation": [pair.pair_id for pair in split.validation]}
    versions = {name: importlib.metadata.version(name) for name in ("unet-ray", "ray", "tensorflow", "keras", "numpy")}
    return {
        "train_frames": len(split.train),
        "validation_frames": len(split.validation),
        "frames_sha256": storage.sha256(json.dumps(ids).encode()),
        "classes_sha256": storage.sha256(json.dumps(class_set.to_dict(), sort_keys=True).encode()),
        "mask_format": mask_format,
        "class_weights": dict(zip(class_set.names, class_weights_K, strict=True)) if class_weights_K else {},
        "initial_weights": initial.digest if initial else None,
        "split": split.how,
        "versions": versions,
    }


def finished(config: TrainConfig) -> dict[str, Any] | None:
    """Returns the metrics of the finished run of this configuration in `--out`, or None where there is work to do.

    Raises:
        ValueError: `--out` holds something that is no run, or, without `--overwrite`, a run of another configuration.
    """
    before = _options_before(config)
    if before is None:
        if not storage.exists(storage.join(config.out, CONFIG_FILE)):
            _require_no_strangers(config.out)
        return None
    _require_same_options(config, before)
    metrics = _read(config.out, METRICS_FILE)
    return None if metrics is None or config.epochs > before["epochs"] else json.loads(metrics)


def changes(config: TrainConfig) -> list[str]:
    """Returns a line for each way in which an unfinished run in `--out` goes on otherwise than it began."""
    before, now = _options_before(config), to_plain(config)
    if before is None:
        return []
    different = [name for name in _SAME_MATHEMATICS if now[name] != before[name]]
    lines = []
    if different:
        lines.append(
            f"the run goes on otherwise than before, {_differences(different, before, now)}: the same mathematics, but "
            "sums are rounded in another order, and dropout drops other pixels"
        )
    if config.epochs > before["epochs"]:
        cosine = "; the cosine is that of the whole, longer run from here on" * (config.schedule == "cosine")
        lines.append(f"the run goes on to epoch {config.epochs}, before it was {before['epochs']}{cosine}")
    return lines


def _options_before(config: TrainConfig) -> dict[str, Any] | None:
    """The options that the run in `--out` began with; None where there is none, or none that counts.

    An option that the version of then did not have is at its default, which means what that version did.
    """
    written = None if config.overwrite else _read(config.out, CONFIG_FILE)
    if written is None:
        return None
    before = yaml.safe_load(written)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    return defaults | (before if isinstance(before, dict) else {"epochs": 0})


def _require_same_options(config: TrainConfig, before: dict[str, Any]) -> None:
    now = to_plain(config)
    different = [key for key in now if key not in _MAY_DIFFER and now[key] != before[key]]
    if config.epochs > before["epochs"]:
        different.remove("epochs")
    if different:
        raise ValueError(
            f"--out {config.out} holds a run of another configuration: {_differences(different, before, now)}; give "
            "the same options, another --out, or --overwrite to delete that run and start anew"
        )


def _differences(keys: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return "; ".join(f"--{key.replace('_', '-')} was {_text(before[key])}, now {_text(now[key])}" for key in keys)


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def require_same_data(config: TrainConfig, about: dict[str, Any]) -> None:
    """Raises ValueError where the run in `--out` began with other frames, classes, weights or meaning of masks."""
    written = None if config.overwrite else _read(config.out, ABOUT_FILE)
    if written is None:
        return
    before, now = _data(json.loads(written)), _data(about)
    different = [key for key in now | before if before.get(key) != now.get(key)]
    if different:
        differences = ", ".join(f"{key} was {before.get(key)}, now {now.get(key)}" for key in different)
        raise ValueError(
            f"--out {config.out} holds a run that began with other data: {differences}; restore the data, give "
            "another --out, or --overwrite to delete that run and start anew"
        )


def _data(about: dict[str, Any]) -> dict[str, Any]:
    """What must be the same, one value a name."""
    weights = {f"class_weights/{name}": weight for name, weight in about.get("class_weights", {}).items()}
    return {key: about.get(key) for key in _DATA_KEYS} | weights


def begin(config: TrainConfig, about: dict[str, Any]) -> None:
    """Makes the folder this run's: with `--overwrite` deletes the run that is in it, and nothing else."""
    run = config.out
    if config.overwrite:
        _delete_run(run)
    storage.delete(storage.join(run, METRICS_FILE))  # of a run that was finished, and now grows
    storage.write_whole(storage.join(run, CONFIG_FILE), to_yaml(config).encode())
    storage.write_whole(storage.join(run, ABOUT_FILE), json.dumps(about, indent=1).encode())


def _delete_run(run: str) -> None:
    # The configuration goes last: until then a kill leaves what this function finishes the next time.
    for name in _FILES:
        storage.delete(storage.join(run, name))
    for name in _FOLDERS:
        storage.delete_tree(storage.join(run, name))
    storage.delete(storage.join(run, CONFIG_FILE))


def _require_no_strangers(run: str) -> None:
    try:
        first = next(iter(storage.list_files(run)), None)
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise ValueError(f"--out {run} is a file; give a folder") from error
    if first is not None:
        raise ValueError(
            f"--out {run} holds files that are no training run, such as {first.path}; give another folder (--overwrite "
            "deletes runs only)"
        )


def _read(run: str, name: str) -> bytes | None:
    try:
        return storage.read_bytes(storage.join(run, name))
    except (FileNotFoundError, NotADirectoryError):
        return None

"""Checkpoints of a training run: folders that are whole or do not count, each with a manifest that proves it.

    RUN/checkpoints/epoch-000012/state-<sha256>.safetensors     every tensor of model and optimizer
    RUN/checkpoints/epoch-000012/manifest.json                  written last; without it the folder does not count

The manifest holds `format_version`, `epoch`, `step`, `best_epoch`, `history`, the state's `file`, `size_bytes` and
`sha256`, and `digest`, the sha256 of all of that. The state's name holds its digest, so that a second writer (a driver
that was killed and its successor) never mixes its bytes with those of the first.

Ray Train's own `report(checkpoint=...)` is not used: it keeps its list of checkpoints in one file that it rewrites in
place, and `fit()` dies where a kill tore that file (Ray 2.60, 2026-11-21); and a report is a barrier over the workers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from unet_ray import storage

FORMAT_VERSION = 1
FOLDER = "checkpoints"
MANIFEST_FILE = "manifest.json"
OWN_SIZE, MODEL_SIZE = "confusion/own_size", "confusion/model_size"
"""Names of the validation's confusion matrices among a checkpoint's tensors."""
MODEL_PREFIX = "model/"
"""What the names of the network's weights begin with among them."""
AVERAGE_SUFFIX = "_average"
"""What the names of averaged weights end with among the optimizer's."""
_EPOCH_FOLDER = re.compile(r"epoch-(\d{6,})")


class CheckpointDamaged(ValueError):
    """A checkpoint that is not whole: torn, altered or of an unknown format; the message says what was found."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """All that a run needs to go on as if it had never stopped; order and dropout are functions of seed and step."""

    epoch: int
    """Epochs that are done."""
    step: int
    """Optimizer steps that are done."""
    tensors: dict[str, np.ndarray]
    """Every variable of model and optimizer by name, and the confusion matrices of the epoch."""
    history: tuple[dict[str, Any], ...]
    """One row an epoch, plain JSON types."""
    best_epoch: int
    """The epoch with the best validation mean IoU so far; without validation the last one."""


def checkpoint_uri(run: str, epoch: int) -> str:
    """Returns the folder of an epoch's checkpoint."""
    return storage.join(run, FOLDER, f"epoch-{epoch:06d}")


def write_checkpoint(run: str, checkpoint: Checkpoint) -> str:
    """Writes a checkpoint, whole or not at all, and returns its folder. Equal arguments, equal bytes."""
    folder = checkpoint_uri(run, checkpoint.epoch)
    state = safetensors_numpy.save({name: np.asarray(t, order="C") for name, t in sorted(checkpoint.tensors.items())})
    sha256 = storage.sha256(state)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "best_epoch": checkpoint.best_epoch,
        "history": list(checkpoint.history),
        "file": f"state-{sha256}.safetensors",
        "size_bytes": len(state),
        "sha256": sha256,
    }
    manifest["digest"] = _digest(manifest)
    storage.write_whole(storage.join(folder, manifest["file"]), state)
    storage.write_whole(storage.join(folder, MANIFEST_FILE), json.dumps(manifest, allow_nan=False, indent=1).encode())
    return folder


def read_checkpoint(folder: str) -> Checkpoint:
    """Reads and checks one checkpoint. Raises CheckpointDamaged where it is not whole, StorageError for the store."""
    manifest = read_manifest(folder)
    try:
        state = storage.read_bytes(storage.join(folder, manifest["file"]))
    except FileNotFoundError as error:
        raise CheckpointDamaged(f"{folder}: {manifest['file']} is missing") from error
    if len(state) != manifest["size_bytes"]:
        raise CheckpointDamaged(f"{folder}: the state has {len(state):,} of {manifest['size_bytes']:,} bytes")
    if storage.sha256(state) != manifest["sha256"]:
        raise CheckpointDamaged(f"{folder}: the state has another sha256 than its manifest says")
    try:
        tensors = safetensors_numpy.load(state)
    except (SafetensorError, KeyError) as error:
        raise CheckpointDamaged(f"{folder}: the state is no safetensors file: {error}") from error
    return Checkpoint(
        epoch=manifest["epoch"],
        step=manifest["step"],
        tensors=tensors,
        history=tuple(manifest["history"]),
        best_epoch=manifest["best_epoch"],
    )


def read_manifest(folder: str) -> dict[str, Any]:
    """Reads and checks a checkpoint's manifest alone. Raises CheckpointDamaged."""
    try:
        manifest = json.loads(storage.read_bytes(storage.join(folder, MANIFEST_FILE)))
    except FileNotFoundError as error:
        raise CheckpointDamaged(f"{folder}: {MANIFEST_FILE} is missing: it was never whole") from error
    except ValueError as error:
        raise CheckpointDamaged(f"{folder}: {MANIFEST_FILE} is not whole JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointDamaged(f"{folder}: the format version is not {FORMAT_VERSION}")
    if manifest.get("digest") != _digest(manifest):
        raise CheckpointDamaged(f"{folder}: {MANIFEST_FILE} does not match its own digest")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return storage.sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def list_epochs(run: str) -> list[int]:
    """Returns the epochs of which anything of a checkpoint is there, whole or not, the newest first."""
    try:
        files = list(storage.list_files(storage.join(run, FOLDER)))
    except FileNotFoundError:
        return []
    matches = (_EPOCH_FOLDER.fullmatch(file.path.partition("/")[0]) for file in files)
    return sorted({int(match[1]) for match in matches if match}, reverse=True)


def newest_valid(run: str, *, on_damaged: Callable[[str], None]) -> Checkpoint | None:
    """Returns the newest checkpoint that verifies, or None.

    Args:
        run: URI of the run's folder.
        on_damaged: called with one line for each newer one that does not.
    """
    tried: set[int] = set()
    # Listed again after each: a group whose driver was killed may still write newer ones and delete these.
    while epochs := [epoch for epoch in list_epochs(run) if epoch not in tried]:
        tried.add(epochs[0])
        try:
            return read_checkpoint(checkpoint_uri(run, epochs[0]))
        except CheckpointDamaged as error:
            on_damaged(str(error))
    return None


def best_or_this(run: str, this: Checkpoint, *, on_damaged: Callable[[str], None]) -> Checkpoint:
    """Returns the checkpoint of the best epoch; where that is damaged, one that is whole, and a line says so."""
    if this.best_epoch == this.epoch:
        return this
    try:
        return read_checkpoint(checkpoint_uri(run, this.best_epoch))
    except CheckpointDamaged as error:
        on_damaged(f"{error}; epoch {this.epoch} stands for the best, {this.best_epoch}")
        return this


def network_weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Returns the network's weights among a checkpoint's tensors, by the names that a model folder has.

    Of a weight whose average the optimizer keeps it is the average, which is what was validated.
    """
    tensors = checkpoint.tensors
    # Keras names an optimizer's variable after the weight with _ for /: `variables.require_own_paths` keeps them apart.
    averages = {name.rpartition("/")[2]: tensor for name, tensor in tensors.items() if _is_average(name)}
    names = [name.removeprefix(MODEL_PREFIX) for name in tensors if name.startswith(MODEL_PREFIX)]
    return {name: averages.get(name.replace("/", "_") + AVERAGE_SUFFIX, tensors[MODEL_PREFIX + name]) for name in names}


def _is_average(name: str) -> bool:
    return name.startswith("optimizer/") and name.endswith(AVERAGE_SUFFIX)


def delete_older(run: str, epoch: int, keep: Iterable[int]) -> None:
    """Deletes the checkpoints of the epochs before one, but those to keep; newer ones are another writer's.

    That is a group that went on where this one was given up. Manifests go first: a kill leaves none that looks whole.
    """
    kept = set(keep)
    for older in list_epochs(run):
        if older < epoch and older not in kept:
            folder = checkpoint_uri(run, older)
            storage.delete(storage.join(folder, MANIFEST_FILE))
            storage.delete_tree(folder)

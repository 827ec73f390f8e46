"""What a person may have meant by a name that is none: the closest one, or what another tool's word is called here."""

from __future__ import annotations

import difflib
from collections.abc import Collection

_SYNONYMS = {
    "b": "batch_size",
    "e": "epochs",
    "j": "workers actors",
    "m": "model",
    "o": "out",
    "actors": "workers",
    "amp": "precision",
    "arch": "network",
    "architecture": "network",
    "augmentation": "augment",
    "augmentations": "augment",
    "backbone": "network",
    "batch": "batch_size",
    "bs": "batch_size",
    "checkpoint": "model init_from",
    "ckpt": "model init_from",
    "cpus": "cpus_per_worker cpus_per_actor",
    "cuda": "device",
    "data": "images frames",
    "destination": "out",
    "dtype": "precision",
    "exist_ok": "overwrite",
    "filters": "n_filters",
    "fliplr": "flip",
    "force": "overwrite",
    "fp16": "precision",
    "frames": "images",
    "gpu": "device",
    "gpus": "workers actors device",
    "grad_accum": "accumulate",
    "grad_clip": "clip_norm",
    "gradient_accumulation_steps": "accumulate",
    "gradient_clip_val": "clip_norm",
    "half": "precision",
    "hflip": "flip",
    "images": "frames",
    "img_size": "image_size",
    "imgsz": "image_size",
    "input": "frames images",
    "input_size": "image_size",
    "labels": "masks",
    "load": "init_from model",
    "lr": "learning_rate",
    "lr0": "learning_rate",
    "lr_scheduler": "schedule",
    "max_epochs": "epochs",
    "max_grad_norm": "clip_norm",
    "mixed_precision": "precision",
    "model_name": "network",
    "n_epochs": "epochs",
    "name": "out",
    "names": "classes",
    "nc": "classes",
    "num_classes": "classes",
    "num_epochs": "epochs",
    "num_gpus": "workers actors device",
    "num_workers": "workers actors",
    "optim": "optimizer",
    "output": "out",
    "output_dir": "out",
    "patience": "early_stopping_epochs",
    "pretrained": "encoder_weights init_from",
    "project": "out",
    "random_seed": "seed",
    "run": "model out",
    "save_dir": "out",
    "save_freq": "checkpoint_every_epochs",
    "save_period": "checkpoint_every_epochs",
    "scheduler": "schedule",
    "source": "frames",
    "test_time_augmentation": "tta",
    "threads": "cpus_per_worker cpus_per_actor",
    "val_split": "val_fraction",
    "validation_split": "val_fraction",
    "warmup": "warmup_epochs",
    "wd": "weight_decay",
    "weights": "model init_from",
    "workers": "actors",
}
"""Options of Keras, PyTorch, Lightning, YOLO and of our other commands, and what they are called here: the first that a
command has."""

NEEDLESS = dict.fromkeys(("resume", "continue"), "the same command goes on where it was stopped")
"""Options of other tools that stand for what happens anyway, and what that is."""

COMMAND_SYNONYMS = {
    "convert": "import-model",
    "eval": "evaluate",
    "fit": "train",
    "infer": "segment",
    "inference": "segment",
    "label": "segment",
    "lint": "check",
    "predict": "segment",
    "test": "evaluate",
    "val": "evaluate",
    "validate": "check",
}
"""What other tools call a command."""


def closest(word: str, names: Collection[str]) -> str | None:
    """Returns the name that looks most like a word, or None where none does; upper and lower case are the same."""
    by_letters = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), by_letters, n=1)
    return by_letters[close[0]] if close else None


def option_meant(word: str, options: Collection[str]) -> str | None:
    """Returns which of a command's options a person may have meant; `_` and `-` are the same.

    >>> option_meant("lr", ["learning_rate", "epochs"])
    'learning_rate'
    """
    field = word.lower().replace("-", "_")
    called = _SYNONYMS.get(field, "").split()
    return next((name for name in called if name in options), None) or closest(field, options)


def perhaps(name: str | None) -> str:
    """Returns the clause of a message that offers a name: `perhaps you meant train; `, and nothing for None."""
    return f"perhaps you meant {name}; " if name else ""

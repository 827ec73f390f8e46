"""`unet-ray report`: the page of an output of `segment` or of a training run, whichever the folder holds."""

from __future__ import annotations

import json

from unet_ray import storage
from unet_ray.config import ReportConfig
from unet_ray.output import plans
from unet_ray.reports import pages
from unet_ray.reports.label_page import PageOptions, write_label_page


def write_report(config: ReportConfig) -> str:
    """Writes the page of a folder and returns its URI.

    Raises:
        ValueError: the folder holds neither, or nothing that is finished, or not the drive that was asked for.
        JobFailed: a file of it is damaged.
        StorageError: storage did not answer.
    """
    folder = storage.resolve(config.folder)
    uri = storage.join(folder, pages.NAME) if config.out is None else storage.resolve(config.out)
    if _is_run(folder):
        _refuse_options_of_an_output(config)
        from unet_ray.reports.run_page import write_run_page  # loads matplotlib, which an output's page need not

        return write_run_page(folder, uri)
    options = PageOptions(gallery=config.gallery, sequences=config.sequence, sources=config.sources)
    return write_label_page(_plan(folder), uri, options)


def _is_run(folder: str) -> bool:
    """Whether a folder's `run.json` is that of a training."""
    try:
        about = json.loads(storage.read_bytes(storage.join(folder, "run.json")))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return False
    return isinstance(about, dict) and "train_frames" in about


def _plan(folder: str) -> plans.Plan:
    try:
        return plans.read_plan(folder)
    except ValueError as error:
        if storage.exists(storage.join(folder, "run.json")) or not storage.exists(folder):
            raise
        raise ValueError(f"{folder} is neither an output of segment nor a training run: run.json is missing") from error


def _refuse_options_of_an_output(config: ReportConfig) -> None:
    defaults = ReportConfig(folder=config.folder)
    for name in ("gallery", "sequence", "sources"):
        if getattr(config, name) != getattr(defaults, name):
            option = "--no-sources" if name == "sources" else f"--{name}"
            raise ValueError(f"{option} is for an output of segment; {config.folder} is a training run")

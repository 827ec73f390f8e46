"""The SQL (DuckDB) and the commands that a page ends its sections with."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from unet_ray import storage
from unet_ray.config import SegmentConfig
from unet_ray.options.config_files import read_mapping
from unet_ray.reports.statistics import Drive

_OF_ONE_RUN = ("overwrite", "retry_rejected", "add_root", "keep_gone")
"""Options that a command is given once, and that would do harm when it is given again."""


def text(value: str) -> str:
    """Returns a text as SQL has it: `'it''s'`."""
    return "'" + value.replace("'", "''") + "'"


def name(column: str) -> str:
    """Returns a column's name as SQL has it; a plain one needs no quotes."""
    return column if re.fullmatch(r"[a-z_][a-z0-9_]*", column) else '"' + column.replace('"', '""') + '"'


def frames_of(out: str) -> str:
    """Returns the rows of an output for SQL's FROM; letters of its path that mean a pattern to DuckDB are escaped."""
    return text(_plain(storage.join(out, "frames")) + "/*.parquet")


def statistics_of(out: str) -> str:
    """Returns `class_statistics.parquet` of an output for SQL's FROM."""
    return text(_plain(storage.join(out, "class_statistics.parquet")))


def _plain(path: str) -> str:
    return re.sub(r"[\[*?]", lambda match: f"[{match[0]}]", path)


def largest(out: str, columns: Sequence[str], n_rows: int = 100) -> list[str]:
    """Returns a query for the frames with the largest values of the first of some columns, line by line."""
    selected = ", ".join(map(name, ("frame_id", *columns)))
    return [
        f"SELECT {selected} FROM {frames_of(out)}",
        f"WHERE status = 'ok' ORDER BY {name(columns[0])} DESC LIMIT {n_rows};",
    ]


def least_confident(out: str, n_rows: int = 100) -> list[str]:
    """As `largest`, in outputs of versions without `expected_error_share`."""
    return [
        f"SELECT frame_id, confidence FROM {frames_of(out)}",
        f"WHERE status = 'ok' ORDER BY confidence LIMIT {n_rows};",
    ]


def nearest(out: str, shares: Mapping[str, float], n_rows: int = 100) -> list[str]:
    """Returns a query for the frames whose class shares are nearest to some shares, by the classes that have most."""
    pixels = "(mask_height_px * mask_width_px)"
    terms = [f"abs({name(f'pixels_{key}')} / {pixels} - {share:.4f})" for key, share in shares.items()]
    return [
        f"SELECT frame_id, {' + '.join(terms)} AS unlikeness",
        f"FROM {frames_of(out)} WHERE status = 'ok' ORDER BY unlikeness LIMIT {n_rows};",
    ]


def shares_by_drive(out: str) -> list[str]:
    """Returns a query for the share of each class in each drive."""
    return [
        f"SELECT sequence, camera, class_name, share FROM {statistics_of(out)}",
        "WHERE pixels > 0 ORDER BY sequence, camera, share DESC;",
    ]


def rejected(out: str) -> list[str]:
    """Returns a query for the rejected frames."""
    return [
        f"SELECT frame_id, reason, error FROM {frames_of(out)}",
        "WHERE status = 'rejected' ORDER BY reason, frame_id;",
    ]


# --- commands ---


def command(*words: str) -> str:
    """Returns a line for a shell; `…` is what a person is to fill in."""
    return " ".join(word if word == "…" else shlex.quote(word) for word in ("unet-ray", *words))


def retry(out: str, config_yaml: bytes | None, reason: str) -> str:
    """Returns the command that tries frames again which were rejected for a reason.

    It is the output's own command: the options in its `config.yaml` that are not the defaults. Where that file is gone
    or holds something else, model and frames are left open.
    """
    options = _options(config_yaml)
    required = {"model": options.get("model", "…"), "frames": options.get("frames", ["…"]), "out": out}
    others = {
        field.name: options[field.name]
        for field in dataclasses.fields(SegmentConfig)
        if field.name in options.keys() - required.keys() - {*_OF_ONE_RUN} and options[field.name] != _default(field)
    }
    words = [word for key, value in (required | others).items() for word in _words(key, value)]
    return command("segment", *words, "--retry-rejected", reason)


def _options(config_yaml: bytes | None) -> dict[str, Any]:
    try:
        return read_mapping(config_yaml or b"", "config.yaml")
    except ValueError:
        return {}


def _default(field: dataclasses.Field) -> Any:
    return list(field.default) if isinstance(field.default, tuple) else field.default


def _words(option: str, value: Any) -> list[str]:
    flag = option.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]


def strips(folder: str, drive: Drive) -> str:
    """Returns the command that shows a drive over time."""
    return command("report", folder, "--sequence", drive.sequence)


def at_least(column: str, value: float) -> str:
    """Returns a condition that a value fits, and all above it."""
    return f"{column} >= {math.floor(value * 1000) / 1000:g}"


def at_most(column: str, value: float) -> str:
    """Returns a condition that a value fits, and all below it."""
    return f"{column} <= {math.ceil(value * 1000) / 1000:g}"


def masks_where(out: str, condition: str) -> str:
    """Returns the command that writes the masks of all frames that fit a condition."""
    return command("export-masks", out, "--out", "masks", "--where", condition)


def more_frames(folder: str, n_frames: int) -> str:
    """Returns the command that shows more frames in each gallery, in a file of its own."""
    return command("report", folder, "--gallery", str(n_frames), "--out", "more.html")

"""The columns of `frames/`: name, type, unit and meaning of each, and of each figure how it is made.

Schema, parts, README's table and its tests follow from `COLUMNS`. A further figure is one function and one line there;
what a row holds has then changed, so `rows.RESULT_VERSION` goes up and is the figure's `since`.

Shapes: `N` frames, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from unet_ray.output.changes import changed_share, changed_share_by_class

if TYPE_CHECKING:
    from unet_ray.model.labels import Labels

_CLASS = "<class>"
_SHARE = pa.float32()


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of `frames/`, or with `<class>` in its name one for each class."""

    name: str
    type: pa.DataType
    meaning: str
    """As README says it; columns that follow each other with the same meaning are one row there."""
    details: str = ""
    """What README has no room for."""
    unit: str = ""
    """`px`, `ns`, `1` for a share or a probability; empty where it is no number of anything."""
    since: int = 1
    """The `RESULT_VERSION` that brought it."""
    is_unproved: bool = False
    """Whether nothing else in a row of a label proves its value; see `rows.column_digests`."""

    @property
    def by_class(self) -> bool:
        """Whether it is one column a class."""
        return _CLASS in self.name

    def names(self, class_names: Iterable[str]) -> list[str]:
        """Returns the names of the columns that it stands for."""
        return [self.name.replace(_CLASS, name) for name in class_names] if self.by_class else [self.name]


@dataclass(frozen=True, kw_only=True)
class Figure(Column):
    """Numbers of each labelled frame, [N], or of each class in it, [N, K]; NaN is null. Mostly shares, of float32."""

    type: pa.DataType = _SHARE
    unit: str = "1"
    is_unproved: bool = True
    # One of these makes it:
    of_labels: Callable[[Labels], np.ndarray] | None = None
    """From what the network says of N frames."""
    of_figures: Callable[[Mapping[str, np.ndarray]], np.ndarray] | None = None
    """From the figures before it in the table, by their names."""
    of_grids: Callable[[np.ndarray, np.ndarray, int], float | np.ndarray] | None = None
    """From a frame's class ids on the network's grid, those of the frame before it, and K: a number, or [K]."""


def _column(name: str, dtype: pa.DataType, unit: str, meaning: str, *, is_unproved: bool = False) -> Column:
    return Column(name=name, type=dtype, unit=unit, meaning=meaning, is_unproved=is_unproved)


_DRIVE = "the drive and its camera"
_PLACE = "place and time within the drive; null if the name does not say"
_SIZE = "size of the frame"
_WHY = "why it is rejected, such as `truncated`; in words, or that a label was kept from damage"
_MASK_SIZE = "size of the mask"
_CONFIDENCE = "mean over the pixels of the largest class probability, and 1 - that"
_CHANGED = "share of grid points labelled otherwise than the frame before"

COLUMNS: tuple[Column, ...] = (
    _column(
        "frame_id", pa.string(), "", "path relative to the archive's root; inside a tar `drive07.tar!cam0/000001.png`"
    ),
    _column("uri", pa.string(), "", "the file, or the archive that holds the frame"),
    _column("sequence", pa.string(), "", _DRIVE),
    _column("camera", pa.string(), "", _DRIVE),
    _column("frame_index", pa.int64(), "1", _PLACE),
    _column("timestamp_ns", pa.int64(), "ns", _PLACE),
    _column("height_px", pa.int32(), "px", _SIZE, is_unproved=True),
    _column("width_px", pa.int32(), "px", _SIZE, is_unproved=True),
    Column(
        name="content_digest",
        type=pa.string(),
        meaning="XXH3 (64 bits) of the frame's bytes, 16 hex digits; null if they could not be read",
        since=5,
        is_unproved=True,
    ),
    _column("status", pa.string(), "", "`ok` or `rejected`"),
    _column("reason", pa.string(), "", _WHY),
    _column("error", pa.string(), "", _WHY),
    _column("mask", pa.binary(), "class id", "the mask; this and all below are null if rejected"),
    _column("mask_encoding", pa.string(), "", "`png` (8-bit palette, index = class id) or `raw` (uint8 rows)"),
    _column("mask_height_px", pa.int32(), "px", _MASK_SIZE),
    _column("mask_width_px", pa.int32(), "px", _MASK_SIZE),
    Figure(
        name="confidence",
        meaning=_CONFIDENCE,
        details="each pixel's is that of the nearest logit, divided by the model's temperature; null where a network "
        "gives class ids alone",
        of_labels=lambda labels: labels.confidence_N,
    ),
    Figure(
        name="expected_error_share",
        meaning=_CONFIDENCE,
        since=5,
        of_figures=lambda figures: 1 - figures["confidence"],
    ),
    Figure(
        name="low_margin_share",
        meaning="share of pixels whose two best classes lie within 0.2",
        details="by the probabilities of the nearest logit",
        of_labels=lambda labels: labels.low_margin_share_N,
    ),
    Figure(
        name="changed_share",
        meaning=_CHANGED,
        details="of the class ids on the network's grid, as far as it shows the frame (with `--inference slide` the "
        "mask); null where the previous row of the same drive, camera and generation is none, rejected or of another "
        "size, and of rows that were rejected and tried again",
        since=5,
        of_grids=changed_share,
    ),
    Figure(
        name="changed_share_<class>",
        meaning=_CHANGED,
        details="of the points that are of the class in this frame or in the one before, those that are not in both: 1 "
        "- intersection / union; null where neither has any, and where `changed_share` is null",
        since=5,
        of_grids=changed_share_by_class,
    ),
    Figure(
        name="pixels_<class>",
        type=pa.int64(),
        unit="px",
        meaning="pixels of the class in the mask",
        is_unproved=False,
        of_labels=lambda labels: labels.pixels_NK,
    ),
    Figure(
        name="confidence_<class>",
        meaning="mean probability over the class's pixels; null if it has none",
        of_labels=lambda labels: labels.confidence_NK,
    ),
)
"""In their order, but that all of the classes come last."""

FIGURES = tuple(column for column in COLUMNS if isinstance(column, Figure))

MEASURED = {figure: figure.of_labels for figure in FIGURES if figure.of_labels}
"""Those that a network gives, and how each is taken from `Labels`."""


def with_derived(figures: Mapping[str, np.ndarray]) -> dict[Figure, np.ndarray]:
    """Returns measured figures and those that follow from them."""
    values = dict(figures)
    for figure in FIGURES:
        if figure.of_figures:
            values[figure.name] = figure.of_figures(values)
    return {figure: values[figure.name] for figure in FIGURES if figure.name in values}


def fields(class_names: Sequence[str], result_version: int) -> list[tuple[Column, str]]:
    """Returns each column of `frames/` with its name, in order, as of a `RESULT_VERSION`."""
    columns = sorted(
        (column for column in COLUMNS if column.since <= result_version), key=lambda column: column.by_class
    )
    return [(column, name) for column in columns for name in column.names(class_names)]


def type_of(name: str) -> pa.DataType:
    """Returns the type of a column of `frames/` by its name."""
    types = {column.name.removesuffix(_CLASS): column.type for column in COLUMNS}
    return types[name] if name in types else types[max(filter(name.startswith, types), key=len)]


def since(name: str) -> int:
    """Returns the `RESULT_VERSION` that brought a column, by its name in the table."""
    (version,) = (column.since for column in COLUMNS if column.name == name)
    return version


def documented() -> list[tuple[list[str], str, str]]:
    """Returns the rows of README's table: names, type, meaning."""
    groups = [list(group) for _, group in groupby(COLUMNS, key=lambda column: (column.meaning, column.type))]
    return [([column.name for column in group], type_name(group[0].type), group[0].meaning) for group in groups]


def type_name(dtype: pa.DataType) -> str:
    """Returns a type as the documents call it; Arrow calls a float32 `float`."""
    return {"float": "float32", "double": "float64"}.get(str(dtype), str(dtype))

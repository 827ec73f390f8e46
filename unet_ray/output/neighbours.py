"""Figures that look at the frame before: within a chunk as it is written, at its border as it is published.

Chunks are labelled in any order, so a part keeps the first and the last grid of its chunk in its footer, `BORDERS_KEY`.
Publishing compares the first with the last one of the chunk before. A published file keeps the last grid of its last
chunk in its own footer, because the next file may be published, or made anew after damage, when the parts are gone.

A frame has no frame before it where that is of another drive, camera or generation, or is rejected. Rows that are tried
again have none either, and what is published of the next row stays.

Shapes: `N` frames of a chunk, `K` classes; `h`, `w` a frame's grid.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from unet_ray.classes import ClassSet
from unet_ray.output.columns import FIGURES, Figure
from unet_ray.storage.sealed import is_count, sealed, unsealed

BORDERS_KEY = "unet_ray.borders"
"""In the footer of a part, and of a published file."""

_MOST_POINTS = 2**28
"""Of a grid; no frame that is labelled has more, and a stranger's footer may say anything."""


def figures_of(
    grids: Sequence[np.ndarray | None], n_classes: int, class_names: Sequence[str]
) -> Iterator[tuple[Figure, str, np.ndarray]]:
    """Yields each figure that looks at the frame before, the name of its column and its values [N]; NaN: there is none.

    Args:
        grids: class ids of the frames of a chunk, uint8 [h, w] each, in order; None where a frame is rejected.
        n_classes: K.
        class_names: of the classes.
    """
    for figure in FIGURES:
        if figure.of_grids is None:
            continue
        values: np.ndarray = np.full((len(grids), n_classes if figure.by_class else 1), np.nan)
        for n, (previous_hw, grid_hw) in enumerate(pairwise(grids), start=1):
            if grid_hw is not None and previous_hw is not None and grid_hw.shape == previous_hw.shape:
                values[n] = figure.of_grids(grid_hw, previous_hw, n_classes)
        for name, values_N in zip(figure.names(class_names), values.T, strict=True):
            yield figure, name, values_N


@dataclass(frozen=True, kw_only=True, eq=False)
class Borders:
    """The ends of a chunk, or the end of a published file."""

    drive: tuple[str, str]
    """Sequence and camera."""
    first: np.ndarray | None
    """Class ids of the first frame, uint8 [h, w]; None where it is rejected, or of no interest any more."""
    last: np.ndarray | None

    @staticmethod
    def of(rows: pa.Table, grids: Sequence[np.ndarray | None]) -> Borders:
        """Returns those of the rows of a chunk."""
        drive = (rows["sequence"][0].as_py(), rows["camera"][0].as_py())
        return Borders(drive=drive, first=grids[0], last=grids[-1])

    def to_footer(self) -> dict[str, str]:
        """Returns what a footer says of them."""
        content = {"drive": list(self.drive), "first": _packed(self.first), "last": _packed(self.last)}
        return {BORDERS_KEY: sealed(content).decode()}

    @staticmethod
    def from_footer(metadata: Mapping[bytes, bytes] | None, n_classes: int) -> Borders:
        """Returns what a footer says. Raises ValueError where it says nothing, or nothing that this program wrote."""
        content = unsealed((metadata or {}).get(BORDERS_KEY.encode(), b""))
        try:
            sequence, camera = content["drive"]
            first, last = (_unpacked(content[name], n_classes) for name in ("first", "last"))
        except (KeyError, TypeError, OSError) as error:
            raise ValueError("its borders are none") from error
        return Borders(drive=(sequence, camera), first=first, last=last)


def _packed(grid_hw: np.ndarray | None) -> dict[str, Any] | None:
    if grid_hw is None:
        return None
    # Arrow brings its own zstd, so that all nodes write the same bytes; their zlibs may be others.
    data = pa.compress(np.ascontiguousarray(grid_hw).tobytes(), codec="zstd", asbytes=True)
    return {"size": list(grid_hw.shape), "zstd": base64.b64encode(data).decode()}


def _unpacked(grid: Any, n_classes: int) -> np.ndarray | None:
    if grid is None:
        return None
    height, width = grid["size"]
    if not is_count(height) or not is_count(width) or not 0 < height * width <= _MOST_POINTS:
        raise ValueError("its grid has no size")
    packed = base64.b64decode(grid["zstd"], validate=True)
    data = pa.decompress(packed, decompressed_size=height * width, codec="zstd", asbytes=True)
    grid_hw = np.frombuffer(data, np.uint8).reshape(height, width)
    if grid_hw.max() >= n_classes:
        raise ValueError("its grid has classes that there are not")
    return grid_hw


class Sewing:
    """Fills in the first row of each chunk of a published file, chunk after chunk in order."""

    def __init__(self, class_set: ClassSet, before: Borders | None) -> None:
        """`before` are the borders of what lies before the file; None where no frame before it counts."""
        self._class_set = class_set
        self.end = before
        """The borders that the file is to keep, once all of its chunks have been through `sewn`."""

    def sewn(self, rows: pa.Table) -> pa.Table:
        """Returns the rows of a part with the figures of its first one, where the part's end before it fits."""
        n_classes = self._class_set.n_classes
        before, borders = self.end, Borders.from_footer(rows.schema.metadata, n_classes)
        self.end = Borders(drive=borders.drive, first=None, last=borders.last)
        if before is None or before.drive != borders.drive or borders.first is None:
            return rows
        for figure, name, values_N in figures_of([before.last, borders.first], n_classes, self._class_set.names):
            first = pa.array(values_N[1:], figure.type, mask=np.isnan(values_N[1:]))
            index = rows.column_names.index(name)
            column = pa.chunked_array([first, *rows[name].slice(1).chunks], figure.type)
            rows = rows.set_column(index, rows.schema.field(index), column)
        return rows

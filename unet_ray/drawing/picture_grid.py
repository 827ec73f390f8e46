"""Pictures in rows with text and a legend, and a figure as PNG bytes: what `pictures` and `charts` are drawn with.

Shapes: `H` height px, `W` width px, `C` colour (red, green, blue). Figures are made without pyplot: no state is shared,
and nothing needs a display.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch
from PIL import Image

from unet_ray.classes import Color
from unet_ray.messages import printable

DPI = 100
MARGIN_IN = 0.15
QUIET, DARK = "#666666", "#222222"

STYLE: list[Any] = [
    "default",  # whatever the user's matplotlibrc says
    {
        "font.size": 9,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "text.parse_math": False,  # `$` is a letter of a name
    },
]
_LINE_IN = 0.18
_TEXT_PT = 9
_LEGEND_ROW_IN = 0.22
_LEGEND_WIDTH_IN = 5.5
_LEGEND_LOOK: dict[str, Any] = {"handlelength": 1.3, "handleheight": 1.0, "columnspacing": 1.4, "borderaxespad": 0.4}
_MOST_LETTERS = 40
"""Of a class's name in a legend or beside a matrix."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where pictures of one size lie, in inches."""

    cell_in: tuple[float, float]
    """Height and width of a picture."""
    gaps_in: tuple[float, ...]
    """Between the columns, from left to right."""
    n_lines: int
    """Lines of text below each row."""
    has_titles: bool = False
    """Whether a title stands above each column."""

    @property
    def n_columns(self) -> int:
        """Pictures of a row."""
        return len(self.gaps_in) + 1

    @property
    def width_in(self) -> float:
        """Of a row."""
        return self.left_in(self.n_columns - 1) + self.cell_in[1]

    @property
    def top_in(self) -> float:
        """Above the first row."""
        return 0.4 if self.has_titles else MARGIN_IN

    @property
    def step_in(self) -> float:
        """From one row to the next."""
        return self.cell_in[0] + (self.n_lines * _LINE_IN + 0.12 if self.n_lines else MARGIN_IN / 2)

    def left_in(self, column: int) -> float:
        """From the first column's left side to this one's."""
        return column * self.cell_in[1] + sum(self.gaps_in[:column])

    def room_in(self, index: int, starts: Sequence[int]) -> float:
        """Width of the text below a cell, which ends where the next of a row begins."""
        row, column = divmod(index, self.n_columns)
        after = [start - row * self.n_columns for start in starts if index < start < (row + 1) * self.n_columns]
        end_in = self.left_in(min(after)) - 0.1 if after else self.width_in
        return end_in - self.left_in(column)


class Line(NamedTuple):
    """A line of text below a picture."""

    text: str
    is_path: bool
    """Drawn in grey, and cut at its start where it is too long: the end of a path says more."""


def draw_grid(
    grid: Grid,
    cells: Sequence[np.ndarray],
    lines: Mapping[int, Sequence[Line]],
    legend: Sequence[tuple[str, Color]],
    *,
    titles: Sequence[str] = (),
) -> bytes:
    """Pictures in rows, lines of text below them, titles above the columns, the legend last.

    Args:
        grid: where they lie.
        cells: pictures of the right size, uint8 [H, W, C].
        lines: by the cell below which they begin; they reach to the next one that has some.
        legend: names with their colours.
        titles: one for each column, or none.
    """
    n_rows = math.ceil(len(cells) / grid.n_columns)
    width_in = max(grid.width_in, _LEGEND_WIDTH_IN) + 2 * MARGIN_IN
    names = [short_name(name, int((width_in - 1) / 0.085)) for name, _ in legend]
    legend_columns = _legend_columns(names, width_in)
    legend_in = math.ceil(len(legend) / legend_columns) * _LEGEND_ROW_IN + MARGIN_IN
    height_in = grid.top_in + n_rows * grid.step_in + legend_in
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(width_in, height_in), dpi=DPI)
        for column, title in enumerate(titles):
            middle_in = (width_in - grid.width_in) / 2 + grid.left_in(column) + grid.cell_in[1] / 2
            at = middle_in / width_in, 1 - 0.27 / height_in
            figure.text(*at, title, ha="center", fontsize=11, fontweight="bold")
        for index, cell in enumerate(cells):
            room_in = grid.room_in(index, list(lines))
            _draw_cell(figure, grid, index, cell, lines.get(index, ()), room_in)
        patches = [
            Patch(facecolor=hex_of(color), edgecolor="#888888", label=name)
            for name, (_, color) in zip(names, legend, strict=True)
        ]
        figure.legend(handles=patches, loc="lower center", ncols=legend_columns, **_LEGEND_LOOK)
        return png_of(figure, exact=[color for _, color in legend])


def _draw_cell(figure: Figure, grid: Grid, index: int, cell: np.ndarray, lines: Sequence[Line], room_in: float) -> None:
    """A picture in the middle of its cell, and its lines below."""
    width_in, height_in = figure.get_size_inches()
    row, column = divmod(index, grid.n_columns)
    left_in = (width_in - grid.width_in) / 2 + grid.left_in(column)
    top_in = height_in - grid.top_in - row * grid.step_in
    # In whole pixels from the lower left corner: nothing is resampled, class colours stay exact.
    left_px = left_in * DPI + (grid.cell_in[1] * DPI - cell.shape[1]) / 2
    figure.figimage(cell, round(left_px), round(top_in * DPI) - cell.shape[0], origin="upper")
    for number, line in enumerate(lines):
        bottom_in = top_in - grid.cell_in[0] - 0.16 - number * _LINE_IN
        text = _fitted(figure, printable(line.text), room_in * DPI, keeps_end=line.is_path)
        color = QUIET if line.is_path else DARK
        figure.text(left_in / width_in, bottom_in / height_in, text, fontsize=_TEXT_PT, color=color)


def _legend_columns(names: Sequence[str], width_in: float) -> int:
    entry_in = 0.085 * max(map(len, names), default=1) + 0.45
    most = max(1, min(len(names), int((width_in - 0.3) / entry_in)))
    return max(1, math.ceil(len(names) / math.ceil(len(names) / most))) if names else 1


def short_name(name: str, most: int = _MOST_LETTERS) -> str:
    """A class's name, of which the start says most."""
    most = min(most, _MOST_LETTERS)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _fitted(figure: Figure, text: str, width_px: float, *, keeps_end: bool) -> str:
    """The text, or as much of it as the width has room for."""
    renderer, font = FigureCanvasAgg(figure).get_renderer(), FontProperties(size=_TEXT_PT)
    short = text
    with _any_letters():
        while len(text) > 1 and renderer.get_text_width_height_descent(short, font, False)[0] > width_px:
            n_less = max(1, len(text) // 20)
            text = text[n_less:] if keeps_end else text[:-n_less]
            short = f"…{text}" if keeps_end else f"{text}…"
    return short


@contextlib.contextmanager
def _any_letters() -> Iterator[None]:
    """Letters that the font lacks are boxes in a picture, and no warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def hex_of(color: Color) -> str:
    """A colour as Matplotlib takes it."""
    return "#" + bytes(color).hex()


_MOST_EXACT = 208
"""Colours of a picture's 256 that are exact; of more classes than that, the last ones have near colours."""


def png_of(figure: Figure, exact: Sequence[Color] = ()) -> bytes:
    """The figure as a PNG of 256 colours, a third of the size of one in full colour; `exact` ones are among them."""
    canvas = FigureCanvasAgg(figure)
    with _any_letters():
        canvas.draw()
    image_HWC = np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
    greys = [(level, level, level) for level in range(0, 256, 17)]
    kept = list(dict.fromkeys((*greys, *exact)))[:_MOST_EXACT]
    n_rare = (256 - len(kept)) // 2
    free = _rare(image_HWC, n_rare) + _frequent(image_HWC, 256 - len(kept) - n_rare)
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for color in kept for part in color] + free)
    index_HW = np.array(Image.fromarray(image_HWC).quantize(palette=palette, dither=Image.Dither.NONE))
    packed_HW = image_HWC[..., 0].astype(np.uint32) << 16 | image_HWC[..., 1].astype(np.uint32) << 8 | image_HWC[..., 2]
    for index, (red, green, blue) in enumerate(kept):  # Pillow looks for the nearest colour with fewer bits
        index_HW[packed_HW == (red << 16 | green << 8 | blue)] = index
    image = Image.fromarray(index_HW)
    image.putpalette(palette.getpalette("RGB") or [])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _frequent(image_HWC: np.ndarray, n_colors: int) -> list[int]:
    """Colours near those that a picture has most of."""
    sparse = np.ascontiguousarray(image_HWC.reshape(1, -1, 3)[:, ::3])
    return Image.fromarray(sparse).quantize(n_colors, Image.Quantize.MEDIANCUT).getpalette("RGB") or []


def _rare(image_HWC: np.ndarray, n_colors: int) -> list[int]:
    """Colours that cover all that a picture has: a traffic sign of 20 pixels keeps its own.

    Of few pixels and 32 levels each: of all colours of a photograph it would take a minute.
    """
    sparse = np.ascontiguousarray(image_HWC.reshape(1, -1, 3)[:, ::7] & 0xF8 | 4)
    return Image.fromarray(sparse).quantize(n_colors, Image.Quantize.MAXCOVERAGE).getpalette("RGB") or []

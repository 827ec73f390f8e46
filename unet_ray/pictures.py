"""Pictures of what a job did, as PNG bytes: samples side by side, curves, the confusion matrix, a preview of labels.

Shapes: `H` height px, `W` width px, `C` colour (red, green, blue), `K` classes. Frames are uint8 [H, W, C], masks are
encoded, uint8 [H, W], and may have another size than their frame. Figures are made without pyplot: no state is shared,
and nothing needs a display.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from unet_ray.classes import IGNORED_ID, ClassSet, Color
from unet_ray.images import count_values, resize_nearest
from unet_ray.messages import printable

DPI = 100

_STYLE: list[Any] = [
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
_TRAINING_COLOR, _VALIDATION_COLOR, _QUIET = "#9aa5b1", "#1f5fa8", "#666666"
_MARGIN_IN = 0.15
_CAPTION_IN = 0.24
_LEGEND_ROW_IN = 0.22
_LEGEND_WIDTH_IN = 5.5
_SAMPLE_COLUMNS = ("Input Image", "True Mask", "Predicted Mask")


def draw_samples(
    frames: Sequence[np.ndarray],
    true_masks: Sequence[np.ndarray],
    predicted_masks: Sequence[np.ndarray],
    class_set: ClassSet,
    *,
    captions: Sequence[str] = (),
) -> bytes:
    """Input, true mask and predicted mask side by side, a row for each frame, with a legend of the classes shown.

    Args:
        frames: at least one; the picture of more than about eight is larger than 500 KB.
        true_masks: one for each frame; ignored pixels are black (white where a class is black).
        predicted_masks: one for each frame.
        class_set: gives names and colours.
        captions: one for each frame, or none.
    """
    assert frames and len(frames) == len(true_masks) == len(predicted_masks), "one mask of each kind for each frame"
    cells: list[np.ndarray] = []
    cell_in = (_cell_height(frames, 3.1), 3.1)
    for frame, true, predicted in zip(frames, true_masks, predicted_masks, strict=True):
        masks = (_colorized(_fitted_mask(mask, frame, cell_in), class_set) for mask in (true, predicted))
        cells += [_fitted_frame(frame, cell_in), *masks]
    row_captions = [caption for text in captions for caption in (text, "", "")]
    legend = _present((*true_masks, *predicted_masks), class_set)
    return _draw_grid(cells, 3, cell_in, row_captions, legend, titles=_SAMPLE_COLUMNS)


def draw_preview(
    frames: Sequence[np.ndarray], masks: Sequence[np.ndarray], captions: Sequence[str], class_set: ClassSet
) -> bytes:
    """Frames with their masks laid over them, four in a row, with a legend of the classes shown.

    Args:
        frames: at least one, a dozen at most for a picture below 500 KB.
        masks: one for each frame; ignored pixels show the frame alone.
        captions: one for each frame.
        class_set: gives names and colours.
    """
    assert frames and len(frames) == len(masks) == len(captions), "one mask and one caption for each frame"
    n_columns = min(4, len(frames))
    cell_in = (_cell_height(frames, 2.6), 2.6)
    cells = []
    for frame, mask in zip(frames, masks, strict=True):
        small = _fitted_frame(frame, cell_in)
        mask_HW = resize_nearest(mask, *small.shape[:2])
        overlay = (small * 0.45 + class_set.colorize(mask_HW) * 0.55).round().astype(np.uint8)
        cells.append(np.where((mask_HW == IGNORED_ID)[..., None], small, overlay))
    return _draw_grid(cells, n_columns, cell_in, captions, _present(masks, class_set, with_ignored=False))


def draw_curves(history: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss, accuracy and the validation's mean IoU by epoch.

    Args:
        history: a row an epoch with `epoch`, `loss`, `accuracy` and, where there is a validation, `val/loss`,
            `val/pixel_accuracy`, `val/mean_iou`; a missing value or None leaves a gap.
    """
    panels: list[tuple[str, str | None, str]] = [
        ("Loss", "loss", "val/loss"),
        ("Accuracy", "accuracy", "val/pixel_accuracy"),
    ]
    if any(row.get("val/mean_iou") is not None for row in history):
        panels.append(("Mean IoU", None, "val/mean_iou"))
    with matplotlib.style.context(_STYLE):
        figure = Figure(
            figsize=(4.0 * len(panels), 3.3), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
        )
        for axes, (title, training, validation) in zip(
            np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
        ):
            _draw_curve(axes, history, training, "training", _TRAINING_COLOR)
            _draw_curve(axes, history, validation, "validation", _VALIDATION_COLOR)
            axes.set_title(title, loc="left")
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            if title != "Loss":
                axes.set_ylim(0, 1)
            else:
                axes.set_ylim(bottom=0)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="upper right" if title == "Loss" else "lower right")
        return _png(figure)


def _draw_curve(axes: Axes, history: Sequence[Mapping[str, Any]], key: str | None, label: str, color: str) -> None:
    values = [math.nan if key is None or row.get(key) is None else float(row[key]) for row in history]
    if all(map(math.isnan, values)):
        return
    epochs = [int(row["epoch"]) for row in history]
    axes.plot(epochs, values, color=color, label=label, marker="o" if len(history) <= 20 else None, markersize=3.5)
    if key == "val/mean_iou":
        best = int(np.nanargmax(values))
        axes.plot(epochs[best], values[best], "o", color="#d1495b", markersize=6, zorder=5)
        axes.plot([], [], "o", color="#d1495b", label=f"best: {values[best]:.3f} in epoch {epochs[best]}")


def draw_confusion(confusion_KK: np.ndarray, class_names: Sequence[str]) -> bytes:
    """The confusion matrix in percent of each true class: rows are true, columns predicted; rows add up to 100.

    Args:
        confusion_KK: pixels, whole numbers [K, K].
        class_names: K names.
    """
    n_classes = len(class_names)
    assert confusion_KK.shape == (n_classes, n_classes)
    true_K = confusion_KK.sum(axis=1)
    percent_KK = 100 * confusion_KK / np.maximum(true_K, 1)[:, None]
    cell_in = min(0.42, 60 / n_classes)
    label_in = 0.08 * max(map(len, class_names)) + 0.1
    side_in = max(cell_in * n_classes, 2.6)
    left_in, bottom_in, top_in, right_in = label_in + 1.0, label_in + 0.4, 0.5, 0.3
    width_in, height_in = left_in + side_in + right_in, bottom_in + side_in + top_in
    with matplotlib.style.context(_STYLE):
        figure = Figure(figsize=(width_in, height_in), dpi=DPI)
        axes = figure.add_axes((left_in / width_in, bottom_in / height_in, side_in / width_in, side_in / height_in))
        axes.imshow(percent_KK, cmap="Blues", vmin=0, vmax=100, interpolation="nearest", aspect="auto")
        _label_confusion(axes, true_K, class_names)
        if n_classes <= 60:
            _write_percents(axes, percent_KK, true_K)
        figure.text(
            _MARGIN_IN / width_in, 1 - 0.3 / height_in, "Where the pixels of each true class went, in %",
            fontsize=11, fontweight="bold",
        )  # fmt: skip
        return _png(figure)


def _label_confusion(axes: Axes, true_K: np.ndarray, class_names: Sequence[str]) -> None:
    shares = true_K / max(1, int(true_K.sum()))
    places = range(len(class_names))
    rows = [
        f"{name}  {'absent' if n == 0 else f'{share:.1%}'}"
        for name, n, share in zip(class_names, true_K, shares, strict=True)
    ]
    axes.set_xticks(places, class_names, rotation=90)
    axes.set_yticks(places, rows)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class and its share of the pixels", labelpad=10)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(len(class_names) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(class_names) + 1) - 0.5, minor=True)
    axes.grid(True, which="minor", color="#e4e4e4", linewidth=0.6)
    axes.tick_params(which="minor", length=0)


def _write_percents(axes: Axes, percent_KK: np.ndarray, true_K: np.ndarray) -> None:
    for row, column in zip(*np.nonzero(percent_KK >= 0.5), strict=True):
        value = percent_KK[row, column]
        color = "white" if value > 55 else "#222222"
        weight = "bold" if row == column else "normal"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color, fontweight=weight)
    for row in np.flatnonzero(true_K == 0):
        axes.axhspan(row - 0.5, row + 0.5, color="#f1f1f1", zorder=0.5)


# --- frames and masks in a grid ---


def _cell_height(frames: Iterable[np.ndarray], width_in: float) -> float:
    return width_in * float(np.median([frame.shape[0] / frame.shape[1] for frame in frames]))


def _fitted_size(frame: np.ndarray, cell_in: tuple[float, float]) -> tuple[int, int]:
    """The size in which a frame fills its cell, [H, W] in pixels."""
    scale = min(cell_in[0] * DPI / frame.shape[0], cell_in[1] * DPI / frame.shape[1])
    return max(1, round(frame.shape[0] * scale)), max(1, round(frame.shape[1] * scale))


def _fitted_frame(frame: np.ndarray, cell_in: tuple[float, float]) -> np.ndarray:
    height_px, width_px = _fitted_size(frame, cell_in)
    filtering = Image.Resampling.BOX if height_px < frame.shape[0] else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(frame).resize((width_px, height_px), filtering))


def _fitted_mask(mask: np.ndarray, frame: np.ndarray, cell_in: tuple[float, float]) -> np.ndarray:
    return resize_nearest(mask, *_fitted_size(frame, cell_in))


def _present(masks: Iterable[np.ndarray], class_set: ClassSet, *, with_ignored: bool = True) -> list[tuple[str, Color]]:
    """Name and colour of each class that appears, in the order of the class set."""
    pixels = np.zeros(256, np.int64)
    for mask in masks:
        pixels += count_values(mask)
    present = [(item.name, item.color) for index, item in enumerate(class_set.classes) if pixels[index]]
    return [*present, ("(ignored)", _ignored_color(class_set))] if with_ignored and pixels[IGNORED_ID] else present


def _ignored_color(class_set: ClassSet) -> Color:
    """Black as everywhere, or white where a class is black."""
    return (255, 255, 255) if any(item.color == (0, 0, 0) for item in class_set.classes) else (0, 0, 0)


def _colorized(mask_HW: np.ndarray, class_set: ClassSet) -> np.ndarray:
    ignored_HW1 = (mask_HW == IGNORED_ID)[..., None]
    return np.where(ignored_HW1, np.array(_ignored_color(class_set), np.uint8), class_set.colorize(mask_HW))


def _draw_grid(
    cells: Sequence[np.ndarray],
    n_columns: int,
    cell_in: tuple[float, float],
    captions: Sequence[str],
    legend: Sequence[tuple[str, Color]],
    *,
    titles: Sequence[str] = (),
) -> bytes:
    """Pictures of the right size in rows, each with its caption below, titles above the columns, the legend last."""
    n_rows = math.ceil(len(cells) / n_columns)
    cell_height_in, cell_width_in = cell_in
    step_in = cell_height_in + (_CAPTION_IN if any(captions) else _MARGIN_IN / 2)
    grid_in = n_columns * (cell_width_in + _MARGIN_IN / 2) - _MARGIN_IN / 2
    width_in = max(grid_in, _LEGEND_WIDTH_IN) + 2 * _MARGIN_IN
    legend_columns = _legend_columns(legend, width_in)
    legend_in = math.ceil(len(legend) / legend_columns) * _LEGEND_ROW_IN + _MARGIN_IN
    top_in = 0.4 if titles else _MARGIN_IN
    height_in = top_in + n_rows * step_in + legend_in
    with matplotlib.style.context(_STYLE):
        figure = Figure(figsize=(width_in, height_in), dpi=DPI)
        for index, cell in enumerate(cells):
            row, column = divmod(index, n_columns)
            left_in = (width_in - grid_in) / 2 + column * (cell_width_in + _MARGIN_IN / 2)
            cell_top_in = height_in - top_in - row * step_in
            # In whole pixels from the lower left corner: nothing is resampled, class colours stay exact.
            left_px = left_in * DPI + (cell_width_in * DPI - cell.shape[1]) / 2
            figure.figimage(cell, round(left_px), round(cell_top_in * DPI) - cell.shape[0], origin="upper")
            if row == 0 and titles:
                middle_in = left_in + cell_width_in / 2
                figure.text(
                    middle_in / width_in,
                    1 - 0.27 / height_in,
                    titles[column],
                    ha="center",
                    fontsize=11,
                    fontweight="bold",
                )
            if index < len(captions):
                # Up to the next caption of the row, 15 characters of 8 points an inch.
                room_in = cell_width_in if any(captions[index + 1 : (row + 1) * n_columns]) else width_in - left_in
                text = _shortened(printable(captions[index]), int(room_in * 15))
                text_at = (left_in / width_in, (cell_top_in - cell_height_in - 0.15) / height_in)
                figure.text(*text_at, text, fontsize=8, color=_QUIET)
        patches = [Patch(facecolor=_hex(color), edgecolor="#888888", label=name) for name, color in legend]
        figure.legend(handles=patches, loc="lower center", ncols=legend_columns, **_LEGEND_LOOK)
        return _png(figure, exact=[color for _, color in legend])


_LEGEND_LOOK: dict[str, Any] = {"handlelength": 1.3, "handleheight": 1.0, "columnspacing": 1.4, "borderaxespad": 0.4}


def _legend_columns(legend: Sequence[tuple[str, Color]], width_in: float) -> int:
    entry_in = 0.085 * max((len(name) for name, _ in legend), default=1) + 0.45
    most = max(1, min(len(legend), int((width_in - 0.3) / entry_in)))
    return max(1, math.ceil(len(legend) / math.ceil(len(legend) / most))) if legend else 1


def _hex(color: Color) -> str:
    return "#" + bytes(color).hex()


def _shortened(text: str, limit: int) -> str:
    """The end of a long path says more than its start."""
    return text if len(text) <= limit else "…" + text[len(text) - limit + 1 :]


def _png(figure: Figure, exact: Sequence[Color] = ()) -> bytes:
    """The figure as a PNG of 256 colours, a third of the size of one in full colour; `exact` ones are among them."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image_HWC = np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
    greys = [(level, level, level) for level in range(0, 256, 17)]
    kept = list(dict.fromkeys((*exact, *greys)))
    free = Image.fromarray(image_HWC).quantize(256 - len(kept), Image.Quantize.MEDIANCUT).getpalette("RGB") or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for color in kept for part in color] + free[: 3 * (256 - len(kept))])
    index_HW = np.array(Image.fromarray(image_HWC).quantize(palette=palette, dither=Image.Dither.NONE))
    packed_HW = image_HWC[..., 0].astype(np.uint32) << 16 | image_HWC[..., 1].astype(np.uint32) << 8 | image_HWC[..., 2]
    for index, (red, green, blue) in enumerate(kept):  # Pillow looks for the nearest colour with fewer bits
        index_HW[packed_HW == (red << 16 | green << 8 | blue)] = index
    image = Image.fromarray(index_HW)
    image.putpalette(palette.getpalette("RGB") or [])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

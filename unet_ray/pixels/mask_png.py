"""Masks as palette PNGs, in a tenth of the time that Pillow takes.

One mask, milliseconds of a core and KB (maps of CamVid's classes, AMD EPYC with AVX2, 2026-11-30):

| | 480x640 | 1280x1920 |
|---|---|---|
| Pillow 13, level 1 | 2.1, 6.2 | 10.1, 22.2 |
| zlib-ng 1.1, level 2, each row less the row above | 0.35, 5.2 | 2.3, 15.4 |
| ISA-L (isal 1.9), level 1, rows as they are | 0.16, 6.8 | 1.1, 28.1 |
| the same, each row less the row above (this) | 0.19, 6.2 | 1.4, 25.0 |
| libdeflate (deflate 0.9), level 1 | | 9.8, 15.5 |
| kornia-rs 0.2 (image-rs) | | 12.7, 14.1 |

The bytes of a file depend on ISA-L's version and on the processor's family; the pixels do not.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from isal import isal_zlib

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PALETTE_8_BIT, _GREY_8_BIT = (struct.pack(">5B", 8, colors, 0, 0, 0) for colors in (3, 0))
"""Bits of a value, a palette or grey, and the only compression, filter and interlace that everybody reads."""
_UP = 2
"""A row is stored as its difference to the row above (PNG specification, third edition, 9.2)."""
_LEVEL = 1
"""Of ISA-L's 0 to 3; 3 takes eight times as long for a file that is a twentieth smaller."""


def encode_mask_png(mask_HW: np.ndarray, palette_K3: np.ndarray) -> bytes:
    """An encoded mask, uint8 [H, W], as an 8-bit palette PNG: index = class id, shown in the classes' colours.

    `images.decode_mask` gives the ids back. A mask with ids outside the palette (ignored pixels) shows them black.
    """
    _require_mask(mask_HW)
    n_colors = 256 if int(mask_HW.max()) >= len(palette_K3) else len(palette_K3)
    palette = _chunk(b"PLTE", palette_K3.astype(np.uint8).tobytes().ljust(n_colors * 3, b"\0"))
    return _png(mask_HW, _PALETTE_8_BIT, palette)


def encode_grey_png(mask_HW: np.ndarray) -> bytes:
    """A mask, uint8 [H, W], as an 8-bit grey PNG: for readers that would take a palette's colours for the values."""
    _require_mask(mask_HW)
    return _png(mask_HW, _GREY_8_BIT, b"")


def _require_mask(mask_HW: np.ndarray) -> None:
    if mask_HW.dtype != np.uint8 or mask_HW.ndim != 2 or not mask_HW.size:
        raise ValueError(f"a mask is {mask_HW.dtype} of shape {mask_HW.shape}, allowed is uint8 [H, W]")


def _png(mask_HW: np.ndarray, kind: bytes, palette: bytes) -> bytes:
    height_px, width_px = mask_HW.shape
    rows = np.empty((height_px, 1 + width_px), np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = mask_HW[0]
    np.subtract(mask_HW[1:], mask_HW[:-1], out=rows[1:, 1:])
    return b"".join(
        (
            _SIGNATURE,
            _chunk(b"IHDR", struct.pack(">2I", width_px, height_px) + kind),
            palette,
            _chunk(b"IDAT", isal_zlib.compress(rows, _LEVEL)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

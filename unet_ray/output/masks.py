"""The mask of a row of `frames/`. Shapes: `H` height px, `W` width px."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_ray.pixels import images

MASK_COLUMNS = ("mask", "mask_encoding", "mask_height_px", "mask_width_px")
"""What `mask_of` looks at."""


def mask_of(row: Mapping[str, Any]) -> np.ndarray:
    """Returns the mask of a row of `frames/` with `MASK_COLUMNS`, uint8 [H, W] of class ids; it may be read-only."""
    height_px, width_px = row["mask_height_px"], row["mask_width_px"]
    if row["mask_encoding"] == "png":
        return images.decode_mask(row["mask"], max_pixels=height_px * width_px)
    return np.frombuffer(row["mask"], np.uint8).reshape(height_px, width_px)


def require_values(rows: pa.RecordBatch | pa.Table, columns: Sequence[str]) -> None:
    """Raises ValueError where a labelled frame has no id or no mask."""
    is_ok = pc.equal(rows["status"], "ok")
    for name in columns:
        if pc.any(pc.and_(is_ok, pc.is_null(rows[name]))).as_py():
            raise ValueError(f"a labelled frame has no {name}")

"""A folder, tar, zip, Parquet file or catalogue, to frame references, to bytes."""

from __future__ import annotations

from unet_ray.archives.listing import list_archives
from unet_ray.archives.reading import FrameGone, read_frames

__all__ = ["FrameGone", "list_archives", "read_frames"]

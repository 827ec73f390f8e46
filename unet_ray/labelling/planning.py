"""An archive as a plan: what is listed becomes chunks, and what is ignored, new or changed is said."""

from __future__ import annotations

import functools
from importlib.metadata import version

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from unet_ray import storage
from unet_ray.archives.reading import read_frames
from unet_ray.config import SegmentConfig
from unet_ray.config_files import to_yaml
from unet_ray.errors import JobFailed
from unet_ray.frames import IMAGE_EXTENSIONS, Listing
from unet_ray.labelling.decoding import count_pixels
from unet_ray.messages import count, say
from unet_ray.model.bundle import Bundle
from unet_ray.model.tiling import Tiling
from unet_ray.output import plans, rejected, salvage
from unet_ray.output.chunks import Cutting
from unet_ray.output.plans import Lineage, Plan
from unet_ray.output.rows import RESULT_VERSION

_RECORDED_PACKAGES = ("unet-ray", "ray", "tensorflow", "keras", "pillow", "kornia-rs", "simplejpeg", "pyarrow")

SIZES_LOOKED_AT = 64
"""Frames that are read before the archive is cut into chunks: the first of so many drives and cameras."""


def refuse_unlistable(listing: Listing) -> None:
    """Raises JobFailed, by name, where something of the archive could not be listed."""
    if listing.unlistable:
        uri, why = listing.unlistable[0]
        more = f" (and {len(listing.unlistable) - 1:,} more)" if len(listing.unlistable) > 1 else ""
        raise JobFailed(
            f"{uri} could not be listed: {why}{more}; mend it or leave it out, so that no frame is passed over"
        )


def make_plan(
    config: SegmentConfig, bundle: Bundle, tiling: Tiling | None, precision: str, device: str, listing: Listing
) -> Plan:
    """Returns the plan of the output: the one that it has, with what is listed beyond that as a new generation."""
    options = {
        "inference": config.inference,
        "mask_encoding": config.mask_encoding,
        "mask_size": config.mask_size,
        "max_frame_megapixels": config.max_frame_megapixels,
        "path_pattern": config.path_pattern,
        "precision": precision,
        "stride": list(tiling.stride) if tiling else None,
        "tta": config.tta,
        "window": list(tiling.window) if tiling else None,
        **({"image_column": config.image_column} if config.image_column else {}),
    }
    plan = plans.plan(
        storage.resolve(config.out),
        listing,
        Lineage(
            bundle_digest=bundle.digest, class_set=bundle.class_set, options=options, result_version=RESULT_VERSION
        ),
        Cutting(
            chunk_frames=config.chunk_frames,
            shard_rows=config.shard_rows,
            frame_pixels=functools.partial(_frame_pixels, timeout_s=config.frame_timeout_s),
        ),
        config_yaml=to_yaml(config),
        recorded={"device": device, **{name: version(name) for name in _RECORDED_PACKAGES}},
        overwrite=config.overwrite,
        add_root=config.add_root,
        keep_gone=config.keep_gone,
    )
    for path in plan.mended:
        say(f"{path} was damaged or gone, and is written again")
    salvage.take_back_notes(plan)
    if config.retry_rejected is not None:
        say(f"rejected frames that are tried again: {rejected.retry_rejected(plan, config.retry_rejected):,}")
    return plan


def say_ignored(listing: Listing) -> None:
    """Says how many files are no frames, by their extensions."""
    if listing.ignored:
        counts = ", ".join(f"{number:,} {kind}" for kind, number in listing.ignored.items())
        say(f"ignored by their extension: {counts} (frames are {', '.join(IMAGE_EXTENSIONS)})")


def say_changes(plan: Plan) -> None:
    """What lies in the archives now and is not as it was planned."""
    if 0 < plan.n_new < plan.n_frames:
        say(f"{count(plan.n_new, 'frame')} {'is' if plan.n_new == 1 else 'are'} new since the last run")
    for before, now in plan.origin.moved.items():
        say(f"frames that were in {before} are read in {now}: they have the same names and versions there")
    if plan.origin.n_changed or plan.origin.n_gone:
        say(
            f"warning: since they were listed {count(plan.origin.n_changed, 'frame')} changed and "
            f"{count(plan.origin.n_gone, 'frame')} went; what is labelled stays, the rest is rejected as changed or "
            "missing (--overwrite labels all anew)"
        )


def _say_still_changed(rows: pa.Table, listing: Listing) -> None:
    """Frames that trying again does not help, as they are not again what was listed."""
    now = listing.table["version"].take(pc.index_in(rows["frame_id"], listing.table["frame_id"]))
    n_changed = pc.sum(pc.not_equal(rows["version"], now)).as_py()
    if n_changed:
        say(
            f"warning: {n_changed:,} of the frames to do are other files now than when they were listed, and will be "
            "rejected as changed; to label them as they are now, give another --out, or --overwrite for all of it"
        )


def _frame_pixels(rows: pa.Table, timeout_s: float) -> int:
    """Pixels of the largest first frame of a drive's camera, by which chunks are cut; 0 where none says its size.

    A frame may end the process that looks at its header, so that is a worker: one that runs already, as a rule.
    """
    numbered = rows.select(["sequence", "camera"]).append_column("row", pa.array(np.arange(len(rows))))
    firsts = numbered.group_by(["sequence", "camera"]).aggregate([("row", "min")])["row_min"].sort()
    examined = firsts.take(np.unique(np.linspace(0, len(firsts) - 1, SIZES_LOOKED_AT, dtype=np.int64)))
    count = ray.remote(num_cpus=0, max_retries=0)(count_pixels)
    pixels = [0]
    for content in read_frames(rows.take(examined)):
        if isinstance(content, bytes):
            try:
                pixels.append(ray.get(count.remote(content, timeout_s)))
            except ray.exceptions.RayTaskError:
                raise  # an error of this program's own
            except ray.exceptions.RayError:  # the worker has ended
                continue
    return max(pixels)

"""Plans a labelling: listed frames become chunks; ignored, new and changed files are reported."""

from __future__ import annotations

import contextlib
import functools
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from unet_ray import storage
from unet_ray.archives.members import HIDDEN, LINK, NOT_A_FILE
from unet_ray.archives.reading import read_frames
from unet_ray.cluster.resources import gpu_kinds
from unet_ray.config import SegmentConfig
from unet_ray.errors import JobFailed
from unet_ray.frames import HIDDEN_RULE, IMAGE_EXTENSIONS, Listing
from unet_ray.labelling.decoding import count_pixels
from unet_ray.messages import count, first_few, say, shown_path
from unet_ray.model.bundle import Bundle
from unet_ray.model.tiling import Tiling
from unet_ray.options.config_files import to_yaml
from unet_ray.output import plans, rejected, salvage
from unet_ray.output.chunks import Cutting
from unet_ray.output.plans import Lineage, Plan

_RECORDED_PACKAGES = ("unet-ray", "ray", "tensorflow", "keras", "pillow", "kornia-rs", "simplejpeg", "pyarrow")

KINDS_NAMED = 20
"""Extensions of ignored files that are said one by one."""

_DECIDING = ("device", "gpus", "tensorflow", "keras", "pillow", "kornia-rs", "simplejpeg")
"""What of a run's record decides the last bits of logits, and so a mask where two classes are equal."""

SIZES_LOOKED_AT = 64
"""Frames that are read before the archive is cut into chunks: the first of so many drives and cameras."""


def _installed_versions() -> dict[str, str]:
    """Returns the version of each package that a label may depend on; of those that are not there, nothing."""
    versions = {}
    for name in _RECORDED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # the code may have been sent to a node without the decoders
            versions[name] = version(name)
    return versions


def refuse_unlistable(listing: Listing) -> None:
    """Raises JobFailed, by name, where something of the archive could not be listed."""
    if listing.unlistable:
        uri, why = listing.unlistable[0]
        more = f" (and {len(listing.unlistable) - 1:,} more)" if len(listing.unlistable) > 1 else ""
        raise JobFailed(
            f"{uri} could not be listed: {why}{more}; mend it or leave it out, so that no frame is passed over"
        )


def lineage_of(config: SegmentConfig, bundle: Bundle, tiling: Tiling | None, precision: str) -> Lineage:
    """Returns what the labels of this configuration come from."""
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
    return Lineage(bundle_digest=bundle.digest, class_set=bundle.class_set, options=options)


def require_usable_output(config: SegmentConfig, bundle: Bundle, tiling: Tiling | None) -> None:
    """Raises ValueError where `--out` holds something else, or labels of another kind; needs no Ray, as `make_plan`."""
    out = storage.resolve(config.out)
    plans.require_free(out)
    before = None if config.overwrite else plans.options_of(out)
    if before is not None:
        precision = before.get("precision", "float32") if config.precision == "auto" else config.precision
        plans.require_same_kind(out, lineage_of(config, bundle, tiling, precision), bundle.uri)


def make_plan(
    config: SegmentConfig, bundle: Bundle, tiling: Tiling | None, precision: str, device: str, listing: Listing
) -> Plan:
    """Returns the plan of the output: the one that it has, with what is listed beyond that as a new generation."""
    say(f"planning the work on {count(len(listing.table), 'listed frame')}")
    plan = plans.plan(
        storage.resolve(config.out),
        listing,
        lineage_of(config, bundle, tiling, precision),
        Cutting(
            chunk_frames=config.chunk_frames,
            shard_rows=config.shard_rows,
            frame_pixels=functools.partial(_frame_pixels, timeout_s=config.frame_timeout_s),
        ),
        config_yaml=to_yaml(config),
        recorded=_machines(device),
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


def _machines(device: str) -> dict[str, str]:
    """Returns what labels now: the device, the kinds of GPUs where there are some yet, versions."""
    gpus = " and ".join(gpu_kinds()) if device == "gpu" else ""
    return {"device": device, **({"gpus": gpus} if gpus else {}), **_installed_versions()}


def say_other_machines(plan: Plan, n_left: int, device: str) -> None:
    """Says it before work begins on an output whose other labels come from another kind of device, or versions."""
    if n_left >= len(plan.chunks):
        return
    current = _machines(device)
    differences = [
        f"{name} was {plan.recorded[name]} and is {current[name]}"
        for name in _DECIDING
        if name in plan.recorded and name in current and plan.recorded[name] != current[name]
    ]
    if differences:
        say(
            f"warning: the labels so far come from another device or other versions: {', '.join(differences)}; between "
            "the two, a mask may differ in a few pixels"
        )


def say_ignored(listing: Listing) -> None:
    """Says how many files are no frames, by their extensions, and what is no file."""
    by_what_they_are = {kind: n for kind, n in listing.ignored.items() if kind in (HIDDEN, LINK, NOT_A_FILE)}
    by_extension = {kind: n for kind, n in listing.ignored.items() if kind not in by_what_they_are}
    if by_extension:
        counts = first_few([f"{number:,} {kind}" for kind, number in by_extension.items()], KINDS_NAMED)
        say(f"ignored by their extension: {counts} (frames are {', '.join(IMAGE_EXTENSIONS)})")
    if HIDDEN in by_what_they_are:
        say(f"ignored as hidden: {by_what_they_are[HIDDEN]:,} ({HIDDEN_RULE}; --include-hidden takes them)")
    if LINK in by_what_they_are:
        say(f"ignored: {count(by_what_they_are[LINK], 'link')} in archives")
    if NOT_A_FILE in by_what_they_are:
        names = first_few([shown_path(name) for name in listing.not_files], len(listing.not_files))
        number = by_what_they_are[NOT_A_FILE]
        more = f" and {number - len(listing.not_files):,} more" if number > len(listing.not_files) else ""
        say(f"ignored, as pipes, sockets or devices: {names}{more}")


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

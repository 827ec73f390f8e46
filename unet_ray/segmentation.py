"""Labels an archive on a Ray cluster: plan, work in waves, a careful pass over what crashed, publish."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.util import metrics

from unet_ray import cluster, images, ledger, publish, storage
from unet_ray.archives import IMAGE_EXTENSIONS
from unet_ray.bundle import Bundle, read_bundle
from unet_ray.cluster import say
from unet_ray.config import SegmentConfig
from unet_ray.contents import read_frames
from unet_ray.decoding import DecodeOptions
from unet_ray.devices import has_bfloat16
from unet_ray.endings import JobFailed
from unet_ray.frames import Listing, list_archives
from unet_ray.machines import require_seen_by_all
from unet_ray.options import to_yaml
from unet_ray.progress import Progress
from unet_ray.results import RESULT_VERSION
from unet_ray.tiling import Tiling, choose_tiling
from unet_ray.waves import TASK_RETRIES, Allocation, WaveJob, allocate, map_on_cluster, run_wave

WAVE_CHUNKS = 2000
"""Chunks that Ray Data gets at once. 16,000 read tasks delay the first block by 18 s, 500 by 4 s (Ray 2.60)."""

SIZES_LOOKED_AT = 64
"""Frames that are read before the archive is cut into chunks: the first of so many drives and cameras."""

HEARTBEAT_S = 15.0

HEARTBEAT_END_S = 5.0
"""For which the job waits until its sign of life is gone: a store that does not answer must not hold up its end."""

COUNTERS: Mapping[str, tuple[Any, ...]] = {
    "unet_ray_segment_frames_labelled": ("Frames labelled",),
    "unet_ray_segment_frames_rejected": ("Frames rejected", ("reason",)),
}
"""Description and tags. Ray puts `ray_` before a name, and `_total` behind a counter's."""

GAUGES = {
    "frames_listed": "Frames of the archives",
    "frames_left": "Frames that are neither labelled nor rejected",
}

TROUBLED_IN_A_ROW = 8
"""Chunks that could not be read or written, one after another and each after `--storage-retry-s`, after which the job
ends: the store is gone or the output's disk is full, and going on with the rest would be for nothing."""

_RECORDED_PACKAGES = ("unet-ray", "ray", "tensorflow", "keras", "pillow", "imagecodecs", "simplejpeg", "pyarrow")

FILES_LOOKED_FOR = 16
"""Files of the archives that every other machine is asked for, where they are local."""


@dataclass(frozen=True, kw_only=True)
class SegmentResult:
    """What became of an archive."""

    out: str
    """URI of the output."""
    listed: int
    """Frames in the archive; `ok` and all of `rejected` add up to it."""
    ok: int
    """Labelled frames."""
    rejected: Mapping[str, int]
    """Rejected frames by reason."""
    frames_per_s: float
    """Rate of this run; 0 where nothing was left to do."""
    class_pixels: Mapping[str, int]
    """Pixels by class."""


def segment(config: SegmentConfig) -> SegmentResult:
    """Labels every frame of the archives once, or lists it with the reason; goes on where an earlier run stopped.

    Raises:
        ValueError: the input, the model or the options are not usable.
        JobFailed: too many frames are rejected, or something of the archive could not be listed.
        StorageError: storage did not answer; the same command goes on later.
    """
    os.environ.setdefault("RAY_task_oom_retries", str(TASK_RETRIES))  # of its own, and endless by default
    config.configure_storage()
    bundle = read_bundle(config.model)
    tiling = choose_tiling(config.inference, config.window, config.stride, bundle.model_config)
    with ThreadPoolExecutor(1) as background:  # Ray's start takes 3 s
        listing_soon = background.submit(
            list_archives, config.frames, path_pattern=config.path_pattern, image_column=config.image_column
        )
        cluster.connect()
        listing = listing_soon.result()
    _refuse_unlistable(listing)
    _say_ignored(listing)
    device = cluster.resolve_device(config.device)
    precision = _precision(config, device)
    require_seen_by_all(_read_by_workers(config, listing), storage.resolve(config.out))

    plan = _plan(config, bundle, tiling, precision, device, listing)
    _say_changes(plan)
    chunks = ledger.pending(plan)
    if chunks:
        cluster.wait_for_first_node(device, config.wait_for_resources_s)
    allocation = allocate(config, device)
    say(_arithmetic(plan, chunks, config, precision, allocation))
    frames_per_s = 0.0
    if chunks:
        cluster.wait_for_resources(allocation.bundles(), config.wait_for_resources_s, "model actors")
        job = _wave_job(config, plan, bundle, tiling, precision, device, allocation)
        frames_per_s = _work(job, plan, chunks, config.max_rejected)
    is_news = bool(chunks) or publish.finished_summary(plan) is None
    figures = {"frames_per_s": round(frames_per_s, 1)}
    summary = publish.publish(plan, max_rejected=config.max_rejected, figures=figures, map_shards=map_on_cluster)
    result = _result(plan, summary, frames_per_s)
    _say_result(result)
    _show_preview(plan, is_news)
    return result


# --- before ---


def _refuse_unlistable(listing: Listing) -> None:
    if listing.unlistable:
        uri, why = listing.unlistable[0]
        more = f" (and {len(listing.unlistable) - 1:,} more)" if len(listing.unlistable) > 1 else ""
        raise JobFailed(
            f"{uri} could not be listed: {why}{more}; mend it or leave it out, so that no frame is passed over"
        )


def _read_by_workers(config: SegmentConfig, listing: Listing) -> dict[str, list[str]]:
    """Returns the model and some files of the archives, spread over the listing."""
    uris, n_rows = listing.table["uri"], len(listing.table)
    shown = {uris[row].as_py() for row in range(0, n_rows, max(1, n_rows // FILES_LOOKED_FOR))}
    return {"--model": [storage.resolve(config.model)], "--frames": sorted(shown)}


def _precision(config: SegmentConfig, device: str) -> str:
    """Returns the arithmetic: `auto` is what an output that is there was begun with, whatever nodes there are now."""
    if config.precision != "auto":
        return config.precision
    options = None if config.overwrite else ledger.options_of(storage.resolve(config.out))
    if options:
        return options["precision"]
    cluster.wait_for_first_node(device, config.wait_for_resources_s)
    return resolve_precision(config.precision, device)


def resolve_precision(precision: str, device: str) -> str:
    """Returns the arithmetic for `--precision`: `auto` is bfloat16 where every device has it, else float32."""
    if precision != "auto":
        return precision
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(device.upper(), 0) > 0]
    here = ray.get_runtime_context().get_node_id()
    if device == "cpu" and [node["NodeID"] for node in nodes] == [here]:
        return "bfloat16" if has_bfloat16(device) else "float32"
    look = ray.remote(has_bfloat16)
    pinned = [
        look.options(num_cpus=0, label_selector={"ray.io/node-id": node["NodeID"]}).remote(device) for node in nodes
    ]
    return "bfloat16" if pinned and all(ray.get(pinned)) else "float32"


def _plan(
    config: SegmentConfig, bundle: Bundle, tiling: Tiling | None, precision: str, device: str, listing: Listing
) -> ledger.Plan:
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
    plan = ledger.plan(
        storage.resolve(config.out),
        listing,
        ledger.Lineage(
            bundle_digest=bundle.digest, class_set=bundle.class_set, options=options, result_version=RESULT_VERSION
        ),
        ledger.Cutting(
            chunk_frames=config.chunk_frames,
            shard_rows=config.shard_rows,
            frame_pixels=partial(_frame_pixels, listing),
        ),
        config_yaml=to_yaml(config),
        recorded={"device": device, **{name: version(name) for name in _RECORDED_PACKAGES}},
        overwrite=config.overwrite,
    )
    if config.retry_rejected:
        say(f"rejected frames that are tried again: {publish.retry_rejected(plan, config.retry_rejected):,}")
    return plan


def _say_ignored(listing: Listing) -> None:
    if listing.ignored:
        counts = ", ".join(f"{number:,} {kind}" for kind, number in listing.ignored.items())
        say(f"ignored by their extension: {counts} (frames are {', '.join(IMAGE_EXTENSIONS)})")


def _say_changes(plan: ledger.Plan) -> None:
    """What lies in the archives now and is not as it was planned."""
    if 0 < plan.n_new < plan.n_frames:
        say(f"{plan.n_new:,} frames are new since the last run")
    if plan.n_changed or plan.n_vanished:
        say(
            f"warning: {plan.n_changed:,} frames have changed and {plan.n_vanished:,} are gone since they were listed; "
            "what is labelled stays, the rest is rejected as changed or missing (--overwrite labels all anew)"
        )


def _frame_pixels(listing: Listing) -> int:
    """Pixels of the largest first frame of a drive's camera, by which chunks are cut; 0 where none says its size."""
    numbered = listing.table.select(["sequence", "camera"]).append_column(
        "row", pa.array(np.arange(len(listing.table)))
    )
    firsts = numbered.group_by(["sequence", "camera"]).aggregate([("row", "min")])["row_min"].sort()
    looked_at = firsts.take(np.unique(np.linspace(0, len(firsts) - 1, SIZES_LOOKED_AT, dtype=np.int64)))
    pixels = [0]
    for content in read_frames(listing.table.take(looked_at)):
        if isinstance(content, bytes):
            with contextlib.suppress(images.ImageRefused):
                pixels.append(math.prod(images.frame_size(content)))
    return max(pixels)


def _arithmetic(
    plan: ledger.Plan, chunks: Sequence[ledger.Chunk], config: SegmentConfig, precision: str, allocation: Allocation
) -> str:
    left = sum(chunk.n_rows for chunk in chunks)
    low, high = allocation.actors
    actors = f"{low}" if low == high else f"{low} to {high}"
    return (
        f"{plan.n_frames:,} frames in {len(plan.chunks):,} chunks, {left:,} in {len(chunks):,} to do; {actors} model "
        f"actor{'s' * (high != 1)} x {allocation.threads} thread{'s' * (allocation.threads != 1)}, "
        f"batches of {config.batch_size}, {precision}"
    )


def _wave_job(
    config: SegmentConfig,
    plan: ledger.Plan,
    bundle: Bundle,
    tiling: Tiling | None,
    precision: str,
    device: str,
    allocation: Allocation,
) -> WaveJob:
    network_size = (bundle.model_config.image_height_px, bundle.model_config.image_width_px)
    return WaveJob(
        out=plan.out,
        class_set=bundle.class_set,
        model=storage.resolve(config.model),
        model_digest=bundle.digest,
        labeler={
            "precision": precision,
            "batch_size": config.batch_size,
            "mask_size": config.mask_size,
            "tiling": tiling,
            "tta": config.tta,
            "device": device,
            "n_threads": allocation.threads,
        },
        decode=DecodeOptions(
            network_size=None if tiling else network_size,
            max_pixels=round(config.max_frame_megapixels * 1e6),
            timeout_s=config.frame_timeout_s,
        ),
        mask_encoding=config.mask_encoding,
        writer=ledger.new_writer(),
        allocation=allocation,
    )


# --- work ---


def _work(job: WaveJob, plan: ledger.Plan, chunks: list[ledger.Chunk], max_rejected: float) -> float:
    """Labels the chunks; returns frames a second. What is left without a record is tried once more, carefully."""
    other = ledger.other_job(plan.out, job.writer)
    if other:
        say(
            f"warning: another job, {other}, worked on this output within the last minute; if it was killed, nothing is"
            " lost, and if it still works, both may go on: the result is the same"
        )
    started_s = time.monotonic()
    todo = sum(chunk.n_rows for chunk in chunks)
    tally = _Tally(plan.n_frames, max_rejected)
    if todo < plan.n_frames:
        _count_earlier(plan, tally)
    progress = Progress(plan.n_frames, "frames", done=plan.n_frames - todo)
    meters = _Meters(plan.n_frames, todo)
    with _heartbeat(plan.out, job.writer), meters.gauges, progress:
        _label(job, chunks, progress, tally, meters, carefully=False)
        left = ledger.pending(plan)
        if left:
            say(f"{len(left):,} chunks have no record; once more, each frame in a process of its own")
            _label(job, left, progress, tally, meters, carefully=True)
            left = ledger.pending(plan)
    progress.finish(tally.note())
    if left and tally.trouble:
        raise tally.trouble_error(f"{len(left):,} chunks are not done")
    if left:
        raise JobFailed(f"{len(left):,} chunks ended every process that labelled them, the first is {left[0].chunk_id}")
    return todo / (time.monotonic() - started_s)


def _label(
    job: WaveJob,
    chunks: Sequence[ledger.Chunk],
    progress: Progress,
    tally: _Tally,
    meters: _Meters,
    *,
    carefully: bool,
) -> None:
    """Sends chunks through the cluster, wave after wave, and counts their receipts."""
    for start in range(0, len(chunks), WAVE_CHUNKS):
        finished = troubled = in_a_row = 0
        for receipt in run_wave(job, chunks[start : start + WAVE_CHUNKS], carefully=carefully):
            if receipt["trouble"] is not None:
                tally.trouble, tally.is_refused = receipt["trouble"], receipt["refused"]
                troubled, in_a_row = troubled + 1, in_a_row + 1
                if in_a_row == TROUBLED_IN_A_ROW:
                    break
                continue
            finished, in_a_row = finished + 1, 0
            rejected: dict[str, int] = json.loads(receipt["rejected"])
            meters.add(rejected, receipt["n_rows"])
            tally.add(rejected, receipt["n_rows"])
            progress.advance(receipt["n_rows"], tally.note())
        if in_a_row == TROUBLED_IN_A_ROW or (troubled and not finished):
            raise tally.trouble_error("storage does not answer")


def _count_earlier(plan: ledger.Plan, tally: _Tally) -> None:
    """Counts what earlier runs rejected."""
    published, recorded = ledger.published_shards(plan.out), ledger.recorded_keys(plan.out)
    for file in published.values():
        tally.add(file["rejected"], file["rows"])
    keys = [chunk.key for chunk in plan.chunks if chunk.shard not in published and chunk.key in recorded]
    for receipt in ledger.read_receipts(plan.out, keys):
        tally.add(receipt.rejected, receipt.n_rows)


class _Tally:
    """What the receipts say so far, and whether the job can still succeed."""

    def __init__(self, n_frames: int, max_rejected: float) -> None:
        self._n_frames, self._max_rejected = n_frames, max_rejected
        self._n_done = 0
        self._rejected: Counter[str] = Counter()
        self.trouble: str | None = None
        self.is_refused = False

    def add(self, rejected: Mapping[str, int], n_rows: int) -> None:
        """Counts a chunk. Raises JobFailed once more frames are rejected than may be, whatever is still to come."""
        self._rejected.update(rejected)
        self._n_done += n_rows
        publish.require_share(self._rejected, self._n_done, self._n_frames, self._max_rejected)

    def trouble_error(self, what: str) -> Exception:
        """Returns what the job ends with; for want of rights, trying again would not help."""
        if self.is_refused:
            return JobFailed(f"{what}: {self.trouble}; give this job the right to it, then the same command goes on")
        return storage.StorageError(f"{what}: {self.trouble}; the same command goes on")

    def note(self) -> str:
        return f", {self._rejected.total():,} rejected"


class _Meters:
    """The same for the cluster's Prometheus, of this run alone: `ray_unet_ray_segment_…`."""

    def __init__(self, n_frames: int, n_left: int) -> None:
        self._labelled, self._rejected = (metrics.Counter(name, *about) for name, about in COUNTERS.items())
        self.gauges = cluster.Gauges("unet_ray_segment", GAUGES)
        self._n_left = n_left
        self.gauges.set("frames_listed", n_frames)
        self.gauges.set("frames_left", n_left)

    def add(self, rejected: Mapping[str, int], n_rows: int) -> None:
        """Counts a chunk."""
        for reason, count in rejected.items():
            self._rejected.inc(count, {"reason": reason})
        n_labelled = n_rows - sum(rejected.values())
        if n_labelled:  # Ray refuses to count 0
            self._labelled.inc(n_labelled)
        self._n_left -= n_rows
        self.gauges.set("frames_left", self._n_left)


@contextlib.contextmanager
def _heartbeat(out: str, writer: str) -> Iterator[None]:
    """A sign of life of this job while the block runs, so that a second one is warned."""
    over = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(OSError):  # it only serves to warn; the work itself will say what storage has
                ledger.heartbeat(out, writer)
            if over.wait(HEARTBEAT_S):
                break
        with contextlib.suppress(OSError):
            ledger.end_heartbeat(out, writer)

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join(HEARTBEAT_END_S)


# --- after ---


def _result(plan: ledger.Plan, summary: Mapping[str, Any], frames_per_s: float) -> SegmentResult:
    with storage.open_read(storage.join(plan.out, "class_statistics.parquet")) as file:
        statistics = pq.read_table(file, columns=["class_name", "pixels"])
    pixels: dict[str, int] = dict.fromkeys(plan.lineage.class_set.names, 0)
    for name, count in zip(statistics["class_name"].to_pylist(), statistics["pixels"].to_pylist(), strict=True):
        pixels[name] += count
    return SegmentResult(
        out=plan.out,
        listed=summary["listed"],
        ok=summary["ok"],
        rejected=summary["rejected"],
        frames_per_s=frames_per_s,
        class_pixels=pixels,
    )


def _show_preview(plan: ledger.Plan, is_news: bool) -> None:
    from unet_ray.preview import write_preview  # loads matplotlib, for which the first frame need not wait

    uri: str | None = storage.join(plan.out, "preview.png")
    if is_news or not storage.exists(storage.join(plan.out, "preview.png")):
        uri = write_preview(plan)
    if uri:
        say(f"preview: {uri}")


def _say_result(result: SegmentResult) -> None:
    rejected = sum(result.rejected.values())
    reasons = f" ({', '.join(f'{count:,} {reason}' for reason, count in result.rejected.items())})" if rejected else ""
    say(f"{result.listed:,} frames: {result.ok:,} labelled, {rejected:,} rejected{reasons}")
    total = sum(result.class_pixels.values())
    for name, count in sorted(result.class_pixels.items(), key=lambda item: -item[1]):
        if count:
            say(f"  {name:20}{count:16,} px {count / total:7.2%}")
    say(f"masks and statistics: {storage.join(result.out, 'frames')}")
    say(f"check them with: unet-ray verify {result.out}")

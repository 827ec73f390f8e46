"""Labels an archive on a Ray cluster: plan, work in waves, a careful pass over what crashed, publish."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import ray

from unet_ray import storage
from unet_ray.archives import doubles
from unet_ray.archives.listing import list_archives
from unet_ray.archives.roots import FoundRoots
from unet_ray.cluster.connection import connect, is_local
from unet_ray.cluster.gpus import all_have_bfloat16, try_xla
from unet_ray.cluster.resources import resolve_device, wait_for_first_node, wait_for_resources
from unet_ray.cluster.shared_paths import require_seen_by_all
from unet_ray.cluster.tasks import TASK_RETRIES, map_on_cluster, outcome
from unet_ray.config import SegmentConfig
from unet_ray.errors import JobFailed, TryAgain
from unet_ray.frames import Listing
from unet_ray.labelling.allocation import Allocation, allocate
from unet_ray.labelling.decoding import DecodeOptions
from unet_ray.labelling.inputs import read_inputs
from unet_ray.labelling.planning import (
    _say_still_changed,
    make_plan,
    refuse_unlistable,
    say_changes,
    say_ignored,
    say_other_machines,
)
from unet_ray.labelling.result import SegmentResult, result_of, say_result, show_preview, show_report
from unet_ray.messages import count, first_few, say, shown_path
from unet_ray.model.bundle import Bundle
from unet_ray.model.devices import has_bfloat16
from unet_ray.model.label_options import LabelOptions, default_batch_size
from unet_ray.model.tiling import Tiling
from unet_ray.output import heartbeats, ledger, origins, plans, publish, rejected_csv, salvage
from unet_ray.output.chunks import Chunk, frames_together
from unet_ray.output.manifest import known_and_new, read_rows
from unet_ray.output.plans import Plan
from unet_ray.output.rejected import TooManyRejected

if TYPE_CHECKING:
    from unet_ray.labelling.waves import WaveJob


FILES_LOOKED_FOR = 16  # of the archives, where they are local: every other machine is asked for these


def segment(config: SegmentConfig) -> SegmentResult:
    """Labels every frame of the archives once, or lists it with the reason; goes on where an earlier run stopped.

    Raises:
        ValueError: the input, the model or the options are not usable.
        JobFailed: too many frames are rejected, or something of the archive could not be listed.
        StorageError: storage did not answer; the same command goes on later.
    """
    os.environ.setdefault("RAY_task_oom_retries", str(TASK_RETRIES))  # of its own, and endless by default
    config.configure_storage()
    out = storage.resolve(config.out)
    published = _is_published(config)
    roots, bundle, tiling = read_inputs(config, is_published=published)
    published = published and is_local()
    say(f"listing {first_few([shown_path(uri) for uri in config.frames])}")
    listing = _list(config, roots) if published else _list_and_connect(config, roots)
    refuse_unlistable(listing)
    doubles.require_outside(listing.table["uri"], out)
    say_ignored(listing)
    if published:
        if result := _finished(config, bundle, tiling, listing):
            return result
        connect()
    device = resolve_device(config.device)
    precision = "float32" if bundle.onnx else _precision(config, device)
    look = functools.partial(require_seen_by_all, _read_by_workers(config, listing), storage.resolve(config.out))
    look()  # before anything is written

    job, watch = heartbeats.new_job(), _Watch()
    with heartbeats.beating(out, job, watch.look):
        plan = watch.plan = make_plan(config, bundle, tiling, precision, device, listing)
        say_changes(plan)
        _warn_of_another_job(out, job)
        network = _Network(bundle, tiling, precision, device)
        try:
            whole = _label_and_publish(config, plan, network, listing, _Run(job, look, watch))
        except (JobFailed, FileNotFoundError) as error:
            watch.look()
            watch.require_ours()  # what is damaged or gone may be so because another job has overwritten the output
            if isinstance(error, TooManyRejected):
                raise _with_names(error, watch.plan or plan) from error
            raise
    result = result_of(whole.plan, whole.summary, whole.frames_per_s)
    say_result(result, whole.plan)
    show_preview(whole.plan, listing, whole.is_news)
    show_report(whole.plan, listing, whole.is_news)
    return result


def _with_names(error: TooManyRejected, plan: Plan) -> JobFailed:
    """Writes the list of rejected frames, and returns the error with the first of them."""
    try:
        rejected_csv.write(plan)
        return JobFailed(f"{error}. Rejected: {rejected_csv.first_names(plan)}")
    except FileNotFoundError:  # another job, to which more is allowed, has just published, and written the list
        return error


def _warn_of_another_job(out: str, job: str) -> None:
    other = heartbeats.other_job(out, job)
    if other:
        say(
            f"warning: another job, {other}, worked on this output within the last minute; if it was killed, nothing is"
            " lost, and if it still works, both may go on: the result is the same"
        )


class _Published(NamedTuple):
    """An output that is whole."""

    plan: Plan
    summary: Mapping[str, Any]
    frames_per_s: float
    is_news: bool
    """Whether this run has done anything for it."""


class _Network(NamedTuple):
    """What labels frames."""

    bundle: Bundle
    tiling: Tiling | None
    precision: str
    device: str


class _Watch:
    """Looks beside the work whether the output is still this job's."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self._error: Exception | None = None

    def look(self) -> None:
        """Remembers what is wrong, for `require_ours`."""
        try:
            if self.plan is not None:
                plans.has_grown(self.plan)
        except (TryAgain, JobFailed, ValueError) as error:
            self._error = error

    def require_ours(self) -> None:
        """Raises TryAgain where the output was overwritten when it was last looked at, JobFailed for damage."""
        if self._error is not None:
            raise self._error


class _Run(NamedTuple):
    """This process's part in the work."""

    job: str
    """Its name."""
    require_seen: Callable[[], None]
    """Asks all machines for the archives and the model."""
    watch: _Watch


def _label_and_publish(config: SegmentConfig, plan: Plan, network: _Network, listing: Listing, run: _Run) -> _Published:
    """Labels what is not done and publishes it, with what other jobs add to the output meanwhile."""
    while True:
        frames_per_s = _label(config, plan, network, listing, run)
        figures = {"frames_per_s": round(frames_per_s, 1)}
        try:
            is_news = bool(frames_per_s) or publish.finished_summary(plan) is None
            summary = publish.publish(
                plan, max_rejected=config.max_rejected, figures=figures, map_shards=map_on_cluster
            )
            return _Published(plan, summary, frames_per_s, is_news)
        except plans.Grown as grown:
            say(f"another job has added {count(grown.plan.n_frames - plan.n_frames, 'frame')} to this output")
            plan = run.watch.plan = grown.plan


def _label(config: SegmentConfig, plan: Plan, network: _Network, listing: Listing, run: _Run) -> float:
    """Labels what is not done, and returns frames a second; 0 where nothing was to do."""
    for line in salvage.look_after_damage(plan):
        say(line)
    chunks = ledger.pending(plan)
    if chunks:
        rows = pa.concat_tables([read_rows(chunk).select(["frame_id", "uri", "version"]) for chunk in chunks])
        origins.require_own_frames(origins.relocate(rows, plan.origin.moved), listing)
        if config.retry_rejected is not None:
            _say_still_changed(rows, listing)
        wait_for_first_node(network.device, config.wait_for_resources_s)
        say_other_machines(plan, len(chunks), network.device)
    allocation = allocate(config, network.device)
    label = _label_options(config, plan, network, allocation)
    say(_arithmetic(plan, chunks, label, allocation))
    if not chunks:
        return 0.0
    wait_for_resources(allocation.bundles(), config.wait_for_resources_s, "model actors")
    run.require_seen()  # on the nodes that have come only now, too
    from unet_ray.labelling.work import work  # see `_list_and_connect`

    tried_nodes: Sequence[str] = ()
    if network.device == "gpu" and not network.bundle.onnx:
        works, tried_nodes = try_xla(allocation.actor_gpus, config.wait_for_resources_s)
        label = dataclasses.replace(label, xla=works)
    job = _wave_job(config, plan, network, run.job, label, allocation, tried_nodes)
    frames_per_s = work(job, plan, chunks, config.max_rejected, run.watch.require_ours)
    say("publishing the rows and their statistics")
    return frames_per_s


# --- before ---


def _list(config: SegmentConfig, roots: FoundRoots) -> Listing:
    return list_archives(
        config.frames,
        roots=roots,
        path_pattern=config.path_pattern,
        image_column=config.image_column,
        include_hidden=config.include_hidden,
        allow_uris=config.allow_uri,
    )


def _list_and_connect(config: SegmentConfig, roots: FoundRoots) -> Listing:
    """Ray's start takes 2.4 s, mostly waiting: meanwhile the archives are listed, and Ray Data loads (0.4 s)."""
    with ThreadPoolExecutor(2) as background:
        listing_soon = background.submit(_list, config, roots)
        background.submit(importlib.import_module, "unet_ray.labelling.work")
        connect()
        return listing_soon.result()


def _is_published(config: SegmentConfig) -> bool:
    """Whether an earlier run of this output has come to its end and nothing of it is to be done again."""
    is_kept = not config.overwrite and config.retry_rejected is None
    return is_kept and storage.exists(storage.join(storage.resolve(config.out), "summary.json"))


def _finished(config: SegmentConfig, bundle: Bundle, tiling: Tiling | None, listing: Listing) -> SegmentResult | None:
    """Says how an output ended if there is nothing to do, for which no Ray need start; else returns None."""
    out = storage.resolve(config.out)
    try:
        options = plans.options_of(out)
        if options is None or len(known_and_new(out, listing.table)[1]):
            return None
    except (ValueError, JobFailed):
        return None  # the way that all jobs go will say what is wrong
    precision = options.get("precision", "float32") if config.precision == "auto" else config.precision
    plan = make_plan(config, bundle, tiling, precision, config.device, listing)
    if publish.finished_summary(plan) is None or ledger.pending(plan):
        return None
    say_changes(plan)
    say(f"{count(plan.n_frames, 'frame')} in {count(len(plan.chunks), 'chunk')}, 0 in 0 to do")
    result = result_of(plan, publish.publish(plan, max_rejected=config.max_rejected), frames_per_s=0.0)
    say_result(result, plan)
    show_preview(plan, listing, is_news=False)
    show_report(plan, listing, is_news=False)
    return result


def _read_by_workers(config: SegmentConfig, listing: Listing) -> dict[str, list[str]]:
    """Returns the model and some files of the archives, spread over the listing."""
    uris, n_rows = listing.table["uri"], len(listing.table)
    sampled = {uris[row].as_py() for row in range(0, n_rows, max(1, n_rows // FILES_LOOKED_FOR))}
    return {"--model": [storage.resolve(config.model)], "--frames": sorted(sampled)}


def _precision(config: SegmentConfig, device: str) -> str:
    """Returns the arithmetic: `auto` is what an output that is there was begun with, whatever nodes there are now."""
    if config.precision != "auto":
        return config.precision
    options = None if config.overwrite else plans.options_of(storage.resolve(config.out))
    if options:
        return options.get("precision", "float32")
    wait_for_first_node(device, config.wait_for_resources_s)
    return resolve_precision(config.precision, device, 1 / config.actors_per_gpu, config.wait_for_resources_s)


def resolve_precision(precision: str, device: str, share: float = 1.0, wait_s: float = 0.0) -> str:
    """Returns the arithmetic for `--precision`: `auto` is bfloat16 where every device has it, else float32.

    Args:
        precision: as it was given.
        device: `gpu` or `cpu`.
        share: the GPUs, or part of one, that an actor reserves.
        wait_s: how long all GPUs may be in use.
    """
    if precision != "auto":
        return precision
    if device == "gpu":
        return "bfloat16" if all_have_bfloat16(share, wait_s) else "float32"
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    this_node = ray.get_runtime_context().get_node_id()
    if [node["NodeID"] for node in nodes] == [this_node]:
        return "bfloat16" if has_bfloat16(device) else "float32"
    look = ray.remote(has_bfloat16)
    pinned = [
        look.options(num_cpus=0, label_selector={"ray.io/node-id": node["NodeID"]}).remote(device) for node in nodes
    ]
    answers = [outcome(answer, pinned) for answer in pinned]
    return "bfloat16" if answers and all(answers) else "float32"


def _arithmetic(plan: Plan, chunks: Sequence[Chunk], label: LabelOptions, allocation: Allocation) -> str:
    left = sum(chunk.n_rows for chunk in chunks)
    low, high = allocation.actors
    actors = count(high, "model actor")
    return (
        f"{count(plan.n_frames, 'frame')} in {count(len(plan.chunks), 'chunk')}, {left:,} in {len(chunks):,} to do; "
        f"{actors if low == high else f'{low} to {actors}'} x {count(allocation.threads, 'thread')}, "
        f"batches of {label.batch_size}, {label.precision}"
    )


def _label_options(config: SegmentConfig, plan: Plan, network: _Network, allocation: Allocation) -> LabelOptions:
    """How actors label; a batch that nobody gave suits the device, and on a GPU what may go through Ray together."""
    model, tiling = network.bundle.model_config, network.tiling
    size = tiling.window if tiling else model.image_size
    batch_size = default_batch_size(network.device, size)
    if network.device == "gpu" and not tiling:
        batch_size = frames_together(batch_size, plan.frame_pixels)
    return LabelOptions(
        precision=network.precision,
        batch_size=config.batch_size or batch_size,
        mask_size=config.mask_size,
        tiling=tiling,
        tta=config.tta,
        device=network.device,
        n_threads=allocation.threads,
        allow_network=config.allow_network,
        processes_per_gpu=config.actors_per_gpu,
    )


def _wave_job(
    config: SegmentConfig,
    plan: Plan,
    network: _Network,
    writer: str,
    label: LabelOptions,
    allocation: Allocation,
    tried_nodes: Sequence[str],
) -> WaveJob:
    from unet_ray.labelling.waves import WaveJob

    return WaveJob(
        out=plan.out,
        class_set=network.bundle.class_set,
        model=storage.resolve(config.model),
        model_digest=network.bundle.digest,
        label=label,
        decode=DecodeOptions(
            network_size=None if label.tiling else network.bundle.model_config.image_size,
            preprocessing=network.bundle.model_config.preprocessing,
            max_pixels=round(config.max_frame_megapixels * 1e6),
            timeout_s=config.frame_timeout_s,
        ),
        mask_encoding=config.mask_encoding,
        writer=writer,
        allocation=allocation,
        tried_nodes=tuple(tried_nodes),
        moved=dict(plan.origin.moved),
    )


# --- after ---

"""`report.html` of an output of `segment`: can I trust it, what is in it, what shall I look at.

It is made of `class_statistics.parquet` and the columns of `frames/`; masks and frames are read for galleries alone.

A million frames of 200 drives and 23 classes, masks of 96x128: 12.1 s, of which 5.1 s of a core, and 296 MB; the page
has 1.5 MB (2 busy cores of an AMD EPYC, 2026-11-30; `python tests/support/drawn_output.py OUT 1000000`, then
`/usr/bin/time -v unet-ray report OUT/labels`). 10,000 drives in 100,000 frames: 2.3 s, 1.5 s of a core, 253 MB, 1.4 MB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import unet_ray
from unet_ray import storage
from unet_ray.frames import Listing
from unet_ray.messages import count
from unet_ray.output import ledger, publish, run_facts
from unet_ray.output.plans import Plan
from unet_ray.reports import content, frame_facts, galleries, look, model_facts, outliers, pages, queries, trust
from unet_ray.reports.class_rows import class_rows
from unet_ray.reports.samples import Sources
from unet_ray.reports.statistics import read_statistics

GALLERY_FRAMES = 6
"""Where nobody asks for another number."""


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """What of an output is shown."""

    gallery: int = GALLERY_FRAMES
    """Frames in each gallery."""
    sequences: tuple[str, ...] = ()
    """Drives that are shown over time; none: outliers, and others spread over all."""
    sources: bool = True
    """Whether frames and the model are read where the output says that they lie."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What the page begins and ends with."""

    title: str
    out: str
    class_set: str
    n_classes: int
    listed: int
    labelled: int
    n_rejected: int
    n_cameras: int
    command: str
    """That makes the page again."""


def write_label_page(
    plan: Plan, uri: str, options: PageOptions | None = None, *, listing: Listing | None = None
) -> str:
    """Writes the page of a published output and returns its URI.

    Args:
        plan: of the output.
        uri: of the page.
        options: what it shows.
        listing: of its archives, where they were listed just now: no other file is opened. None: the manifest is
            believed.

    Raises:
        ValueError: the output is not finished, or has no such drive.
        JobFailed: a file of it is damaged.
        StorageError: storage did not answer.
    """
    summary = publish.finished_summary(plan)
    if summary is None:
        n_done, _ = ledger.done_so_far(plan)
        raise ValueError(
            f"{plan.out} is not finished (or was found damaged): {n_done:,} of {count(plan.n_frames, 'frame')} are "
            "done; run segment again, then report"
        )
    return pages.write(uri, _page(plan, summary, options or PageOptions(), listing))


def _page(plan: Plan, summary: Mapping[str, Any], options: PageOptions, listing: Listing | None) -> bytes:
    class_set, config_yaml = plan.lineage.class_set, _config_yaml(plan.out)
    statistics = read_statistics(plan.out, class_set)
    marked = outliers.find_outliers(statistics.shares_DK, statistics.confidence_D, statistics.frames_D, class_set.names)
    rare = galleries.rare_classes(statistics.pixels_K, options.gallery)
    facts = frame_facts.read_frame_facts(
        [storage.join(plan.out, file["path"]) for file in summary["files"] if ledger.is_shard(file)],
        statistics,
        class_set,
        rare=rare,
        strip_drives=content.choose_strips(statistics.drives, marked, options.sequences),
    )
    model = model_facts.model_of(config_yaml, plan.lineage.bundle_digest, are_read=options.sources)
    classes = class_rows(statistics, class_set, model[0].iou(class_set.names) if model[0] else {})
    sources = Sources(plan, listing, are_read=options.sources)
    return pages.render(
        "labels.html",
        version=unet_ray.__version__,
        head=_head(plan, summary, len({drive.camera for drive in statistics.drives})),
        trust=trust.trust(plan, config_yaml, summary["rejected"], facts, classes, model),
        content=content.content(plan.out, class_set, statistics, facts, classes, marked),
        look=look.look(plan.out, class_set, statistics, facts, rare, sources, options.gallery),
    )


def _head(plan: Plan, summary: Mapping[str, Any], n_cameras: int) -> Head:
    return Head(
        title=storage.name(plan.out) or plan.out,
        out=plan.out,
        class_set=plan.lineage.class_set.name,
        n_classes=plan.lineage.class_set.n_classes,
        listed=summary["listed"],
        labelled=summary["ok"],
        n_rejected=sum(summary["rejected"].values()),
        n_cameras=n_cameras,
        command=queries.command("report", plan.out),
    )


def _config_yaml(out: str) -> bytes | None:
    try:
        return storage.read_bytes(storage.join(out, run_facts.CONFIG))
    except FileNotFoundError:
        return None

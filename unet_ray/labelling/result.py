"""The result of a labelling: its counts, its last line, its preview and its page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from unet_ray import storage
from unet_ray.frames import Listing
from unet_ray.messages import count, reason_of, say, shown_path
from unet_ray.output import ledger, rejected_csv
from unet_ray.output.labels import damaged, read_columns
from unet_ray.output.plans import Plan
from unet_ray.pixels.images import ImageRefused, decode_frame


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


def result_of(plan: Plan, summary: Mapping[str, Any], frames_per_s: float) -> SegmentResult:
    """Returns the result of a published output, from its summary and its statistics."""
    schema = pa.schema([("class_name", pa.string()), ("pixels", pa.int64())])
    statistics = pa.Table.from_batches(read_columns(plan.out, ledger.STATISTICS, schema.names), schema)
    pixels: dict[str, int] = dict.fromkeys(plan.lineage.class_set.names, 0)
    for name, n_pixels in zip(statistics["class_name"].to_pylist(), statistics["pixels"].to_pylist(), strict=True):
        if name not in pixels or n_pixels is None:
            raise damaged(plan.out, ledger.STATISTICS)
        pixels[name] += n_pixels
    return SegmentResult(
        out=plan.out,
        listed=summary["listed"],
        ok=summary["ok"],
        rejected=summary["rejected"],
        frames_per_s=frames_per_s,
        class_pixels=pixels,
    )


def show_preview(plan: Plan, listing: Listing, is_news: bool) -> None:
    """Draws the output's preview where it is not there or no picture any more, or something is new.

    It is made of the rows, so that no digest proves it.
    """
    from unet_ray.reports.preview import write_preview  # loads matplotlib, for which the first frame need not wait

    uri: str | None = storage.join(plan.out, "preview.png")
    if is_news or not _is_picture(storage.join(plan.out, "preview.png")):
        uri = write_preview(plan, listing)
    if uri:
        say(f"preview: {uri}")


def show_report(plan: Plan, listing: Listing, is_news: bool) -> None:
    """Writes the output's page, as `show_preview` draws its preview; what goes wrong with it is a line and no more."""
    uri = storage.join(plan.out, "report.html")
    try:
        if is_news or not _is_page(uri):
            from unet_ray.reports.label_page import write_label_page

            write_label_page(plan, uri, listing=listing)
    except Exception as error:  # noqa: BLE001  # the labels are published, and whole without it
        again = f"`unet-ray report {shown_path(plan.out)}` tries again"
        say(f"warning: report.html was not written: {type(error).__name__}: {reason_of(error)}; {again}")
        return
    say(f"report: {uri}")


def _is_page(uri: str) -> bool:
    try:
        return storage.read_bytes(uri).rstrip().endswith(b"</html>")
    except FileNotFoundError:
        return False


def _is_picture(uri: str) -> bool:
    try:
        decode_frame(storage.read_bytes(uri))
    except (FileNotFoundError, ImageRefused):
        return False
    return True


def say_result(result: SegmentResult, plan: Plan) -> None:
    """Says how many frames are labelled and rejected, which these are, and where the labels lie."""
    rejected = sum(result.rejected.values())
    reasons = f" ({', '.join(f'{count:,} {reason}' for reason, count in result.rejected.items())})" if rejected else ""
    say(f"{count(result.listed, 'frame')}: {result.ok:,} labelled, {rejected:,} rejected{reasons}")
    if rejected:
        say(f"rejected: {rejected_csv.first_names(plan)}")
    total = sum(result.class_pixels.values())
    for name, n_pixels in sorted(result.class_pixels.items(), key=lambda item: -item[1]):
        if n_pixels:
            say(f"  {name:20}{n_pixels:16,} px {n_pixels / total:7.2%}")
    say(f"masks and statistics: {storage.join(result.out, 'frames')}")

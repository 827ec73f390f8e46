"""The formats of `export-masks`, and how an output is exported in one of them.

Steps, after each of which a kill does no harm: (1) the names of all files are checked, and nothing is written that they
forbid; (2) the list of an earlier export goes; (3) frames; (4) masks; (5) the file that lists them. So what a reader
takes as whole is whole. Frames come before masks: a reader that goes by the frames finds one without its mask.

Run again, an export writes the same files again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from unet_ray import storage
from unet_ray.config import ExportMasksConfig
from unet_ray.errors import JobFailed
from unet_ray.frames import is_frame
from unet_ray.messages import count, first_few
from unet_ray.output import ledger, plans, publish
from unet_ray.output.exports import targets
from unet_ray.output.exports.coco import COCO
from unet_ray.output.exports.export import Export, Format
from unet_ray.output.exports.fiftyone import FIFTYONE
from unet_ray.output.exports.frames import Written, candidates, write_frames
from unet_ray.output.exports.names import path_digest, require_distinct
from unet_ray.output.exports.png import PNG
from unet_ray.output.exports.selection import Selection, select
from unet_ray.output.exports.voc import CVAT, VOC

FORMATS: Mapping[str, Format] = {"png": PNG, "voc": VOC, "cvat": CVAT, "coco": COCO, "fiftyone": FIFTYONE}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What became of the chosen frames."""

    written: int
    """Masks."""
    rejected: int
    """Frames without one."""
    n_gone: int = 0
    """Frames that are left out with their masks: their bytes are not those that were labelled."""
    gone: tuple[str, ...] = ()
    """A line for each of the first few of those."""

    def as_text(self, out: str) -> list[str]:
        """Returns what became of them, in one line or two."""
        is_one = self.rejected == 1
        missing = f"; {count(self.rejected, 'rejected frame')} {'has' if is_one else 'have'} none"
        lines = [f"{count(self.written, 'mask')} written to {out}{missing if self.rejected else ''}"]
        if self.n_gone:
            verb = "is" if self.n_gone == 1 else "are"
            why = first_few(self.gone, 3)
            lines.insert(0, f"{count(self.n_gone, 'frame')} {verb} not as labelled and left out with the mask: {why}")
        return lines


def export_masks(config: ExportMasksConfig) -> Exported:
    """Writes the masks of a finished output as files, and the frames if asked for.

    Raises:
        ValueError: no output, one that is not finished, a drive, column or frame that it does not have, names that make
            no files, another export at `--out`, or pycocotools is missing.
        JobFailed: a file of it is damaged, or none of the frames is as it was labelled.
        StorageError: storage did not answer, or an archive is not to be seen from this machine.
    """
    if config.format == "coco" and importlib.util.find_spec("pycocotools") is None:
        raise ValueError("the format coco needs the package pycocotools; pip install 'unet-ray[coco]'")
    plan = plans.read_plan(storage.resolve(config.labels))
    summary = publish.finished_summary(plan)
    if summary is None:
        n_done, _ = ledger.done_so_far(plan)
        progress = f"{n_done:,} of {count(plan.n_frames, 'frame')} are done"
        raise ValueError(
            f"{config.labels} is not finished (or was found damaged), {progress}; run segment again, then export"
        )
    paths = [file["path"] for file in summary["files"] if ledger.is_shard(file)]
    selection = select(plan, paths, config.sequence, config.where)
    out = storage.resolve(config.out)
    storage.require_writable(_folder_of(config, out), "--out")
    n_labelled, n_rejected = selection.counted()
    if config.where is not None and not n_labelled:
        raise ValueError(f"--where: none of the labelled frames fits `{config.where}`")
    with _checked_target(config, selection, out) as target:
        written = _write(config, selection, target, n_labelled)
    gone = Written() if written is None else written
    return Exported(
        written=n_labelled - gone.n_gone, rejected=n_rejected, n_gone=gone.n_gone, gone=tuple(gone.examples)
    )


# --- the steps ---


def _write(config: ExportMasksConfig, selection: Selection, target: targets.Target, n_labelled: int) -> Written | None:
    chosen, file_name = FORMATS[config.format], storage.name(storage.resolve(config.out))
    written = None
    if config.with_frames:
        written = write_frames(
            selection, target, lambda frame_id, ending: chosen.frame_path(frame_id, ending, file_name), n_labelled
        )
        if n_labelled and written.n_gone == n_labelled:
            raise JobFailed(f"none of {count(n_labelled, 'frame')} is as it was labelled: {written.examples[0]}")
    export = Export(
        selection=selection,
        class_set=selection.plan.lineage.class_set,
        n_labelled=n_labelled,
        file_name=file_name,
        written=written,
    )
    chosen.write(export, target)
    return written


@contextmanager
def _checked_target(config: ExportMasksConfig, selection: Selection, out: str) -> Iterator[targets.Target]:
    """Opens what is written to, once nothing forbids it; the list of an earlier export there is gone then."""
    chosen = FORMATS[config.format]
    if chosen.needs_files and not config.with_frames:
        _require_files(config, selection)
    folder = _folder_of(config, out)
    digests = require_distinct(lambda: _paths(config, selection), folder)
    if config.is_zip:
        with targets.opened_zip(out) as target:
            yield target
        return
    if chosen.list_path is not None:
        listed = storage.join(out, *chosen.list_path.split("/"))
        if chosen.listed is not None:
            _require_same_choice(listed, chosen.listed, digests, config.out)
        storage.delete(listed)
    yield targets.Folder(folder)


def _folder_of(config: ExportMasksConfig, out: str) -> str:
    return out.rpartition("/")[0] or "/" if config.is_one_file else out


def _paths(config: ExportMasksConfig, selection: Selection) -> Iterator[tuple[str, str]]:
    """Yields the id of each frame that is exported with the path of each of its files."""
    chosen, file_name = FORMATS[config.format], storage.name(storage.resolve(config.out))
    if chosen.mask_path is None and not config.with_frames:
        return
    for rows in selection.labelled(["frame_id"]):
        for row in rows:
            frame_id = row["frame_id"]
            if chosen.mask_path is not None:
                yield frame_id, chosen.mask_path(frame_id, config.with_frames)
            if config.with_frames:
                for ending in candidates(frame_id):
                    yield frame_id, chosen.frame_path(frame_id, ending, file_name)


def _require_files(config: ExportMasksConfig, selection: Selection) -> None:
    """Raises ValueError where a frame is no file of this machine, which the format's reader could open."""
    for rows in selection.labelled(["frame_id", "uri"]):
        for row in rows:
            if not storage.is_local(row["uri"]) or not is_frame(row["uri"]):
                raise ValueError(
                    f"{config.format} opens frames as files of this machine, and {row['frame_id']} lies in "
                    f"{row['uri']}; add --with-frames"
                )


def _require_same_choice(uri: str, path_of: Callable[[str], str], digests: np.ndarray, out: str) -> None:
    """Refuses a folder whose list names frames that this export has not: they would stay among the new ones.

    Raises:
        ValueError: one line.
    """
    if not storage.exists(uri):
        return
    with storage.open_read(uri) as file:
        names = [line.decode("utf-8", "replace").rstrip("\n") for line in file]
    known = np.array([path_digest(path_of(name)) for name in names], np.uint64)
    if n_others := int((~np.isin(known, digests)).sum()):
        raise ValueError(
            f"{out} holds an export with {count(n_others, 'other frame')}; delete it, or give another --out"
        )

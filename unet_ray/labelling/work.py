"""The work of a labelling: chunks go out in waves, what comes back is counted, and what left no record goes carefully.

While it works the job gives figures to the cluster's Prometheus, and a line to a person.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ray.util import metrics

from unet_ray import storage
from unet_ray.cluster.gauges import Gauges
from unet_ray.errors import JobFailed
from unet_ray.labelling.allocation import TASK_FRAMES, share_tasks
from unet_ray.labelling.stages import ChunkOutcome
from unet_ray.labelling.waves import WAVE_TASKS, WaveJob, run_wave
from unet_ray.messages import count, say
from unet_ray.output import ledger
from unet_ray.output.chunks import Chunk, frames_together
from unet_ray.output.plans import Plan
from unet_ray.output.rejected import require_share
from unet_ray.progress import Progress

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
"""Tasks that could not do their work, one after another, after which the job ends: the store is gone, the output's disk
is full or the network does not fit the device, and going on with the rest would be for nothing."""


def work(
    job: WaveJob,
    plan: Plan,
    chunks: list[Chunk],
    max_rejected: float,
    require_ours: Callable[[], None],
) -> float:
    """Labels the chunks; returns frames a second. What is left without a record is tried once more, carefully.

    `require_ours` is called with each answer; what it raises ends the work.
    """
    started_s = time.monotonic()
    todo = sum(chunk.n_rows for chunk in chunks)
    tally = _Tally(plan.n_frames, max_rejected)
    if todo < plan.n_frames:
        n_done, rejected = ledger.done_so_far(plan)
        tally.add(rejected, n_done)
    progress = Progress(plan.n_frames, "frames", done=plan.n_frames - todo)
    meters = _Meters(plan.n_frames, todo)
    send = functools.partial(run_wave, job)
    say(f"starting {count(job.allocation.actors[0], 'model actor')}; each loads and compiles the network")
    with meters.gauges, progress:
        blocks = _blocks(job, plan, chunks)
        _label(send, blocks, progress, tally, meters.add, require_ours, carefully=False)
        left = _left_of(chunks, plan)
        if left:
            say(f"{count(len(left), 'chunk')} without a record; once more, each frame in a process of its own")
            tally.troubles.clear()  # all that is left is tried again
            _label(send, [[chunk] for chunk in left], progress, tally, meters.add, require_ours, carefully=True)
            left = _left_of(chunks, plan)
    progress.finish(tally.note())
    if left and tally.troubles:
        raise tally.trouble_error(f"{count(len(left), 'chunk')} not done")
    if left:
        raise JobFailed(f"{count(len(left), 'chunk')} crashed every process, the first is {left[0].chunk_id}")
    return todo / (time.monotonic() - started_s)


def _blocks(job: WaveJob, plan: Plan, chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """The chunks that share a task: on a GPU never less than a batch, but of frames that would fill memory."""
    label = job.label
    batch = 1 if label.device == "cpu" or label.tiling else frames_together(label.batch_size, plan.frame_pixels)
    most = frames_together(max(TASK_FRAMES, batch), plan.frame_pixels)
    return share_tasks(chunks, most, job.allocation.actors[1], batch_frames=batch)


def _left_of(chunks: Sequence[Chunk], plan: Plan) -> list[Chunk]:
    """Which of some chunks are not done. Others may be pending by now, as of a file that was found to be damaged: what
    such a file still holds is kept before its chunks are labelled, at the next run."""
    keys = {chunk.key for chunk in chunks}
    return [chunk for chunk in ledger.pending(plan) if chunk.key in keys]


def _label(
    send: Callable[..., Iterator[list[ChunkOutcome]]],
    blocks: Sequence[Sequence[Chunk]],
    progress: Progress,
    tally: _Tally,
    measure: Callable[[Mapping[str, int], int], None],
    require_ours: Callable[[], None],
    *,
    carefully: bool,
) -> None:
    """Sends blocks of chunks through the cluster, wave after wave, and counts what became of them.

    Args:
        send: `run_wave` of a job: takes the blocks of a wave and `carefully`, and yields the outcomes of each.
        blocks: all there are.
        progress: moves on by each chunk that is done.
        tally: counts it too, and ends the work where it can no longer succeed.
        measure: gets the rejected frames by reason, and all frames, of each chunk that is done.
        require_ours: is called with each answer.
        carefully: this is the pass after which no other comes.
    """
    for start in range(0, len(blocks), WAVE_TASKS):
        finished = troubled = failed = in_a_row = 0
        for outcomes in send(blocks[start : start + WAVE_TASKS], carefully=carefully):
            require_ours()
            tally.say_notes(outcomes)
            for outcome in outcomes:
                if outcome.kind is not None:
                    tally.troubles[outcome.kind] = outcome.trouble or ""
                    continue
                measure(outcome.rejected, outcome.n_rows)
                tally.add(outcome.rejected, outcome.n_rows)
                progress.advance(outcome.n_rows, tally.note())
            kinds = {outcome.kind for outcome in outcomes if outcome.kind is not None}
            if not kinds:
                finished, in_a_row = finished + 1, 0
                continue
            if "unusable" in kinds:
                raise tally.trouble_error("1 task could not be done")  # nor any other on that node
            if kinds == {"failed"} and not carefully:
                failed += 1  # perhaps by a frame: the careful pass finds out
                continue
            troubled, in_a_row = troubled + 1, in_a_row + 1
            if in_a_row == TROUBLED_IN_A_ROW:
                break
        if in_a_row == TROUBLED_IN_A_ROW or (troubled and not finished):
            raise tally.trouble_error(f"{count(troubled, 'task')} could not be done")
        if failed and not finished:
            return  # more would fail, too


class _Tally:
    """What the outcomes say so far, and whether the job can still succeed."""

    def __init__(self, n_frames: int, max_rejected: float) -> None:
        self._n_frames, self._max_rejected = n_frames, max_rejected
        self._n_done = 0
        self._rejected: Counter[str] = Counter()
        self.troubles: dict[str, str] = {}
        """The last of each kind, by `stages.TROUBLES`."""
        self._notes: set[str] = set()

    def add(self, rejected: Mapping[str, int], n_rows: int) -> None:
        """Counts a chunk. Raises JobFailed once more frames are rejected than may be, whatever is still to come."""
        self._rejected.update(rejected)
        self._n_done += n_rows
        require_share(self._rejected, self._n_done, self._n_frames, self._max_rejected)

    def say_notes(self, outcomes: Sequence[ChunkOutcome]) -> None:
        """Says what a person should know, each thing once."""
        notes = {outcome.note for outcome in outcomes if outcome.note}
        for note in sorted(notes - self._notes):
            say(f"warning: {note}")
        self._notes |= notes

    def trouble_error(self, what: str) -> Exception:
        """Returns what the job ends with; only of storage that does not answer, trying again may help."""
        if message := self.troubles.get("unusable"):
            return JobFailed(f"{message}; then the same command goes on")
        if message := self.troubles.get("refused"):
            return JobFailed(f"{what}: {message}; give this job the right to it, then the same command goes on")
        if message := self.troubles.get("storage"):
            return storage.StorageError(f"{what}: {message}; the same command goes on")
        hint = "for want of memory, try a smaller --batch-size; once it is mended, the same command goes on"
        return JobFailed(f"{what}: {self.troubles['failed']}; {hint}")

    def note(self) -> str:
        return f", {self._rejected.total():,} rejected"


class _Meters:
    """The same for the cluster's Prometheus, of this run alone: `ray_unet_ray_segment_…`."""

    def __init__(self, n_frames: int, n_left: int) -> None:
        self._labelled, self._rejected = (metrics.Counter(name, *about) for name, about in COUNTERS.items())
        self.gauges = Gauges("unet_ray_segment", GAUGES)
        self._n_left = n_left
        self.gauges.set("frames_listed", n_frames)
        self.gauges.set("frames_left", n_left)

    def add(self, rejected: Mapping[str, int], n_rows: int) -> None:
        """Counts a chunk."""
        for reason, number in rejected.items():
            self._rejected.inc(number, {"reason": reason})
        n_labelled = n_rows - sum(rejected.values())
        if n_labelled:  # Ray refuses to count 0
            self._labelled.inc(n_labelled)
        self._n_left -= n_rows
        self.gauges.set("frames_left", self._n_left)

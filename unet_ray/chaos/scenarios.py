"""The labelling job under every fault it promises to live through; each a scenario whose output is compared.

A scenario is a function of a `Stage` that returns its `Trial`: what was done, how the jobs ended, what is wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from unet_ray.chaos import faults, overwrites
from unet_ray.chaos.trials import Stage, Trial, frames_of, rows_of, wait_until
from unet_ray.labelling.allocation import CPU_SHARE_OF_ACTORS, WRITE_CPUS
from unet_ray.output import plans, verify

# Titles that Ray Data gives to the tasks of `waves`. Not every `ray::` will do: with an agent goes the whole node.
_DECODER, _ACTOR, _WRITER = "ray::ReadFrames", "ray::MapWorker", "ray::MapBatches(write_chunks)"

_IN_WORDS = {_DECODER: "decode worker", _ACTOR: "actor", _WRITER: "writer"}

_SPOILT = ("--max-rejected", "0.5")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A line of the table."""

    scenario: str
    problems: tuple[str, ...]
    did: str = ""
    """What was done to the jobs."""
    exit_codes: tuple[int, ...] = ()
    """Of the jobs, in order; negative: the signal that ended it."""
    frames: int = 0
    """Rows of the output, 0 where none is published."""
    rejected: int = 0
    redone: str = ""
    """Parts written + frames opened once more although their chunk was done; empty where that was not watched."""
    same: str = "no"
    """`bytes` or `rows` of the undisturbed run, or `no`."""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """In a word."""
        return "FAIL" if self.problems else "pass"


# --- the driver ---


def driver_killed(stage: Stage) -> Trial:
    """SIGKILL at a random moment of planning, work or publishing, again and again.

    Of all its processes at once, as a power cut, and every second time of the driver alone: its Ray must go with it.
    """
    trial = Trial(stage, "driver_killed")
    events = trial.watch()
    for number in range(stage.size.n_kills):
        # The first ones come soon, so that there is work left for the last.
        latest = 2 * len(frames_of(trial.archive)) // (stage.size.n_kills - number)
        before, moment = len(events.seen), trial.random.randint(1, latest)
        with trial.started() as job:
            if wait_until(partial(events.are_more_than, before + moment), job):
                started = faults.descendants(job.pid)
                faults.kill([job.pid, *(() if number % 2 else started)])
                killed_s = time.monotonic()
                gone = wait_until(partial(faults.are_gone, started), timeout_s=180)
                trial.require(gone, "processes of a killed job still run")
                trial.did(f"SIGKILL, {len(trial.records())} done, all gone in {time.monotonic() - killed_s:.0f} s")
        if trial.exit_codes[-1] == 0:
            break
    trial.require(-signal.SIGKILL in trial.exit_codes, "no job was killed")
    if trial.exit_codes[-1] != 0:
        trial.run()
    trial.require_exit(0)
    trial.require(trial.redone() == (0, 0), "done chunks were done again")
    trial.require_same_bytes(stage.undisturbed)
    return trial


def driver_stopped(stage: Stage) -> Trial:
    """SIGTERM, then SIGINT, while chunks are being finished: out soon, nothing left running."""
    trial = Trial(stage, "driver_stopped")
    trial.watch()
    for sent in (signal.SIGTERM, signal.SIGINT):
        before = len(trial.records())
        with trial.started() as job:
            trial.require(wait_until(partial(trial.has_records, before + 1), job), "the job ended too early")
            trial.stop(job, sent)
        trial.require_exit(128 + sent, "the same command goes on where this one stopped")
    trial.run()
    trial.require_exit(0)
    trial.require(trial.redone() == (0, 0), "done chunks were done again")
    trial.require_same_bytes(stage.undisturbed)
    return trial


def two_jobs(stage: Stage) -> Trial:
    """Two jobs at once on one output."""
    trial = Trial(stage, "two_jobs")
    one_cpu = ("--actors", "1", "--cpus-per-actor", "1")
    with trial.started(*one_cpu, on_cluster=True) as first:
        wait_until(trial.is_planned, first)
        with trial.started(*one_cpu, on_cluster=True):
            trial.did("a second job, started when the first had planned")
    trial.require(trial.exit_codes == [0, 0], f"exit codes {trial.exit_codes}")
    trial.require("warning: another job, " in trial.output(), "the second job was not warned of the first")
    trial.require_same_bytes(stage.undisturbed)
    return trial


# --- its processes ---


def processes_killed(stage: Stage) -> Trial:
    """Decode workers, model actors and writers, five in one run."""
    trial = Trial(stage, "processes_killed")
    trial.watch()
    step = max(1, len(plans.read_plan(str(stage.undisturbed)).chunks) // 8)
    with trial.started() as job:
        for number, title in enumerate(_TO_KILL):
            wait_until(partial(trial.has_records, number * step), job)
            wait_until(partial(_kill_one, trial, job.pid, title), job, timeout_s=60)
    trial.require(trial.deeds == [_IN_WORDS[title] for title in _TO_KILL], f"only these were killed: {trial.deeds}")
    trial.require_exit(0)
    # A writer that dies between its record and its word to the driver is started again.
    trial.require(trial.redone()[0] <= len(trial.deeds), "more done chunks were done again than processes died")
    trial.require_same_bytes(stage.undisturbed)
    return trial


_TO_KILL = (_DECODER, _ACTOR, _WRITER, _ACTOR, _WRITER)


def _kill_one(trial: Trial, job: int, title: str) -> bool:
    """Kills one process of a job, and notes it, if there is one that has this title just now."""
    pids = faults.titled_below(job, title)
    if not pids:
        return False
    try:
        os.kill(trial.random.choice(pids), signal.SIGKILL)
    except ProcessLookupError:
        return False
    trial.did(_IN_WORDS[title])
    return True


def node_lost(stage: Stage) -> Trial:
    """One of three nodes dies with all of its processes, its actor and its share of the object store."""
    import ray

    trial = Trial(stage, "node_lost")
    events = trial.watch()
    with _cluster(stage, n_nodes=3, cpus=1) as raylets:
        ray.init(
            stage.address, log_to_driver=False, logging_level=logging.ERROR
        )  # only to see when the loss is noticed
        with trial.started(on_cluster=True) as job:
            working = wait_until(lambda: trial.has_records(3) and faults.titled_below(raylets[1], _ACTOR), job)
            lost = {raylets[1], *faults.descendants(raylets[1])}
            faults.kill(sorted(lost))
            killed_s, done, n_events = time.monotonic(), set(trial.records()), len(events.seen)
            noticed = wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2, timeout_s=600)
            noticed_s = time.monotonic() - killed_s
            trial.require(working and noticed, "the node was not lost while it worked")
        trial.did(f"a node's {len(lost)} processes with {len(done)} done; noticed in {noticed_s:.1f} s")
        ray.shutdown()
    trial.require_exit(0)
    in_flight = round((1 - CPU_SHARE_OF_ACTORS) / WRITE_CPUS)  # records of which the driver had not yet heard
    trial.require(trial.redone()[0] <= in_flight, "more done chunks were done again than the node was writing")
    begun = trial.begun(n_events).keys() - done
    again = [key for key, times in trial.begun().items() if times > 1]
    trial.require(
        len(again) <= len(begun) + in_flight,
        f"{len(again)} chunks were begun twice, of {len(begun)} begun and not done",
    )
    trial.require_same_bytes(stage.undisturbed)
    return trial


# --- the archive ---


def killer_frames(stage: Stage) -> Trial:
    """Frames that segfault, hang and eat memory, beside good ones."""
    trial = Trial(stage, "killer_frames", archive=stage.copy_archive("killers"))
    first, *others = frames_of(trial.archive)
    chosen = [first, *trial.random.sample(others, len(faults.KILLERS) - 1)]  # the first is looked at for the plan, too
    reasons = {}
    for frame, (data, reason) in zip(chosen, faults.KILLERS.items(), strict=True):
        frame.write_bytes(data)
        reasons[str(frame.relative_to(trial.archive))] = reason
    trial.did(", ".join(data.decode() for data in faults.KILLERS))
    trial.run(*_SPOILT, "--frame-timeout-s", "4", "--max-frame-megapixels", "1")
    trial.require_exit(0, "once more, each frame in a process of its own")
    trial.require_same_rows(stage.undisturbed, reasons)
    return trial


def one_percent_broken(stage: Stage) -> Trial:
    """One frame in a hundred is bad or odd, which is allowed."""
    archive, reasons = stage.spoil("one_percent", 100)
    trial = Trial(stage, "one_percent_broken", archive=archive)
    trial.did(f"{len(reasons)} of {len(frames_of(archive))} frames broken")
    trial.run()
    trial.require_exit(0)
    trial.require_same_rows(stage.undisturbed, reasons)
    return trial


def twenty_percent_broken(stage: Stage) -> Trial:
    """One frame in five is bad or odd: nothing is published until --max-rejected allows it; what is done stays done."""
    archive, reasons = stage.spoil("twenty_percent", 5)
    trial = Trial(stage, "twenty_percent_broken", archive=archive)
    trial.watch()
    trial.run()
    trial.require_exit(1, "nothing is published")
    trial.require(not (trial.out / "frames").exists(), "something is published although too much is rejected")
    trial.did(f"{len(reasons)} of {len(frames_of(archive))} frames broken; refused; --max-rejected 0.5")
    trial.run(*_SPOILT)
    trial.require_exit(0)
    trial.require(trial.redone() == (0, 0), "done chunks were done again")
    trial.require_same_rows(stage.undisturbed, reasons)
    return trial


def archive_changed(stage: Stage) -> Trial:
    """A frame changes and another vanishes after they were listed, before they are read."""
    trial = Trial(stage, "archive_changed", archive=stage.copy_archive("changed"))
    changed, vanished = trial.random.sample(frames_of(trial.archive), 2)
    with trial.started("--max-rejected", "0.05") as job:
        planned = wait_until(trial.is_planned, job)
        job.send_signal(signal.SIGSTOP)  # the next step, a thousand file and network calls long, reads the first frame
        changed.write_bytes(frames_of(stage.archive)[0].read_bytes()[::-1])
        vanished.unlink()
        trial.require(planned and not trial.records(), "the job was not stopped between listing and reading")
        job.send_signal(signal.SIGCONT)
    trial.did("one changed, one deleted after the listing")
    trial.require_exit(0)
    names = [str(frame.relative_to(trial.archive)) for frame in (changed, vanished)]
    trial.require_same_rows(stage.undisturbed, dict(zip(names, ("changed", "missing"), strict=True)))
    return trial


def archive_grown(stage: Stage) -> Trial:
    """A drive comes after the output was finished; the run over it is killed once. No old frame is read."""
    new = stage.copy_archive("new") / "drive1"
    target = stage.archive / "drive9"
    new.rename(target)
    try:
        undisturbed = Trial(stage, "archive_grown_undisturbed", start_from=stage.undisturbed)
        undisturbed.run()
        undisturbed.require_exit(0, f"{len(list(target.iterdir()))} frames are new since the last run")
        trial = Trial(stage, "archive_grown", start_from=stage.undisturbed, problems=undisturbed.problems)
        events = trial.watch()
        with trial.started() as job:
            wait_until(trial.records, job)
            faults.kill([job.pid])
            trial.did(f"{len(list(target.iterdir()))} frames more; SIGKILL with {len(trial.records())} done")
        trial.run()
        trial.require_exit(0)
        again = [path for kind, path in _until_summary(trial, events) if kind == "opened" and _is_old(path, trial)]
        trial.require(not again, f"{len(again)} frames of the finished output were read again, {again[:1]}")
        trial.require_same_bytes(undisturbed.out)
    finally:
        target.rename(stage.folder / "copies" / "drive9")
    return trial


def _until_summary(trial: Trial, events: faults.FileEvents) -> Iterator[tuple[str, Path]]:
    """What happened before the new summary; the preview comes after it."""
    for kind, path in events.seen:
        if kind == "appeared" and path == trial.out / "summary.json":
            return
        yield kind, path


def _is_old(path: Path, trial: Trial) -> bool:
    return path.parent.parent == trial.archive and path.parent.name != "drive9"


# --- the output ---


def output_damaged(stage: Stage) -> Trial:
    """A flipped byte and deleted files in a finished output: verify names them, segment mends them alone."""
    trial = Trial(stage, "output_damaged", start_from=stage.undisturbed)
    files = sorted((trial.out / "frames").iterdir())
    data = bytearray(files[0].read_bytes())
    data[trial.random.randrange(len(data))] ^= 1 << trial.random.randrange(8)
    files[0].write_bytes(data)
    files[-1].unlink()
    (trial.out / "class_statistics.parquet").unlink()
    problems = verify.verify(str(trial.out))
    for name in (files[0].name, files[-1].name, "class_statistics.parquet"):
        trial.require(any(name in problem for problem in problems), f"verify did not name {name}: {problems}")
    kept = {file: file.stat().st_mtime_ns for file in files[1:-1]}
    trial.did("a bit flipped in one file, two deleted; verify; segment")
    trial.run()
    trial.require_exit(0)
    trial.require(
        all(file.stat().st_mtime_ns == time_ns for file, time_ns in kept.items()), "whole files were written again"
    )
    trial.require_same_bytes(stage.undisturbed)
    return trial


def work_damaged(stage: Stage) -> Trial:
    """Of unpublished work a record is deleted, a part is deleted, a bit of another is flipped."""
    trial = Trial(stage, "work_damaged", start_from=stage.unpublished)
    records = sorted((trial.out / "_work" / "records").iterdir())
    parts = sorted((trial.out / "_work" / "parts").iterdir())
    record, deleted, flipped = trial.random.sample(range(len(parts)), 3)  # the same order: both begin with the key
    records[record].unlink()
    parts[deleted].unlink()
    data = bytearray(parts[flipped].read_bytes())
    data[trial.random.randrange(len(data))] ^= 1 << trial.random.randrange(8)
    parts[flipped].write_bytes(data)
    trial.did("a record and a part deleted, a bit flipped in another part; segment, twice")
    trial.run()
    trial.require_exit(75, "is damaged; run the same command again: its frames are done anew")
    trial.require("in 2 to do" in trial.output(), "not only the record and the part that are gone were done again")
    trial.run()
    trial.require_exit(0, "in 1 to do")
    trial.require_same_bytes(stage.undisturbed)
    return trial


def disk_full_working(stage: Stage) -> Trial:
    """The output's disk is full when the first chunk is done."""
    return _on_small_disk(Trial(stage, "disk_full_working"), _fill_while_working)


_SMALL_FILES_KB = 128
"""What is published beside frames/."""


def disk_full_publishing(stage: Stage) -> Trial:
    """All chunks are done, and the output's disk has room for no published file, then for a few."""
    trial = Trial(stage, "disk_full_publishing", start_from=stage.unpublished)
    return _on_small_disk(trial, _fill_before_publishing)


def _on_small_disk(trial: Trial, act: Callable[[Trial, faults.SmallDisk], None]) -> Trial:
    """Runs a scenario with the output on a disk of its own, and takes the output back from it."""
    kept = trial.out
    disk_folder = trial.log.parent / "disk"
    disk_folder.mkdir()
    with faults.SmallDisk(disk_folder, 64 * 1024) as disk:
        inside, outside = disk_folder / "out", disk.seen_from_here() / "out"
        if kept.exists():
            subprocess.run(["cp", "-a", str(kept), str(outside)], check=True)
            subprocess.run(["rm", "-r", str(kept)], check=True)
        trial.prefix, trial.out, trial.out_option = disk.command, outside, inside
        act(trial, disk)
        subprocess.run(["cp", "-a", str(outside), str(kept)], check=True)
    trial.prefix, trial.out, trial.out_option = list, kept, None
    trial.require_same_bytes(trial.stage.undisturbed)
    return trial


def _fill_while_working(trial: Trial, disk: faults.SmallDisk) -> None:
    with trial.started() as job:
        trial.require(wait_until(trial.records, job), "the job ended too early")
        disk.fill()
        trial.did(f"disk full with {len(trial.records())} done")
    trial.require_exit(75, "No space left on device")
    _require_place(trial)
    trial.require_nothing_torn()
    trial.require(not (trial.out / "summary.json").exists(), "it is published although chunks are missing")
    trial.require("once more" not in trial.output(), "chunks were labelled again although nothing could be stored")
    disk.free()
    trial.run()
    trial.require_exit(0)


def _require_place(trial: Trial) -> None:
    """In the one line that the job ended with."""
    (line,) = [line for line in trial.output().splitlines() if line.startswith("unet-ray: error: ")] or [""]
    trial.require(str(trial.out_option) in line, f"the error does not name the place: {line}")
    trial.require("Traceback" not in trial.output() and "Unhandled" not in trial.output(), "the error is not one line")


def _fill_before_publishing(trial: Trial, disk: faults.SmallDisk) -> None:
    sizes_kb = sorted(file.stat().st_size // 1024 for file in (trial.stage.undisturbed / "frames").iterdir())
    for leave_kb in (0, sizes_kb[0] // 2):
        disk.free()
        disk.fill(leave_kb=leave_kb)
        trial.run()
        trial.did(f"{leave_kb} KB left")
        trial.require_exit(75, "No space left on device")
        _require_place(trial)
        trial.require_nothing_torn()
        trial.require(not (trial.out / "summary.json").exists(), "the summary is there although files are missing")
    disk.free()
    leave_kb = sum(sizes_kb[-(os.cpu_count() or 1) :]) + _SMALL_FILES_KB  # written at once; then their parts go
    disk.fill(leave_kb=leave_kb)
    trial.run()
    trial.did(f"{leave_kb} KB left for {sum(sizes_kb)} KB")
    trial.require_exit(0, "0 in 0 to do")


SCENARIOS: dict[str, Callable[[Stage], Trial]] = {
    act.__name__: act
    for act in (
        driver_killed,
        driver_stopped,
        processes_killed,
        node_lost,
        two_jobs,
        killer_frames,
        one_percent_broken,
        twenty_percent_broken,
        archive_changed,
        archive_grown,
        output_damaged,
        work_damaged,
        disk_full_working,
        disk_full_publishing,
        *overwrites.SCENARIOS,
    )
}

_ON_A_SHARED_CLUSTER = ("two_jobs", "overwritten_beside_work")


# --- running them ---


@contextlib.contextmanager
def _cluster(stage: Stage, *, n_nodes: int, cpus: int) -> Iterator[list[int]]:
    """A Ray of several nodes on this machine, at `stage.address`; yields the process ids of the raylets, head first."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ.update(stage.environment)  # of every process of the cluster
    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
        nodes = [cluster.head_node, *(cluster.add_node(num_cpus=cpus) for _ in range(n_nodes - 1))]
    finally:
        os.environ.clear()
        os.environ.update(before)
    try:
        cluster.wait_for_nodes()
        stage.address = cluster.address
        yield [node.all_processes["raylet"][0].process.pid for node in nodes]
    finally:
        stage.address = None
        cluster.shutdown()


def run(stage: Stage, name: str) -> Outcome:
    """Plays one scenario; a fault that cannot be made here is a problem, too."""
    assert stage.undisturbed  # made with the first scenario, and not of its time
    started_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        if name in _ON_A_SHARED_CLUSTER:
            stack.enter_context(_cluster(stage, n_nodes=1, cpus=4))
        try:
            outcome = _outcome(name, SCENARIOS[name](stage))
        except ValueError as error:  # what should be an output is none: its job did not come to plan it
            outcome = Outcome(scenario=name, problems=(f"{error}; see stage/trials/{name}/log.txt",))
    return dataclasses.replace(outcome, seconds=round(time.monotonic() - started_s, 1))


def _outcome(name: str, trial: Trial) -> Outcome:
    finished = (trial.out / "frames").exists()
    rows = rows_of(trial.out) if finished else None
    redone = "+".join(map(str, trial.redone())) if trial.events else ""
    return Outcome(
        scenario=name,
        did="; ".join(trial.deeds),
        exit_codes=tuple(trial.exit_codes),
        frames=len(rows) if rows else 0,
        rejected=rows["status"].to_pylist().count("rejected") if rows else 0,
        redone=redone,
        same=trial.same,
        problems=tuple(trial.problems),
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns the outcomes as a table for a terminal."""
    head = ("scenario", "exit codes", "frames", "rejected", "redone", "same", "s", "verdict", "what was done")
    rows = [head] + [
        (
            outcome.scenario,
            " ".join(map(str, outcome.exit_codes)),
            f"{outcome.frames:,}",
            f"{outcome.rejected:,}",
            outcome.redone,
            outcome.same,
            f"{outcome.seconds:.0f}",
            outcome.verdict,
            outcome.did,
        )
        for outcome in outcomes
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    lines += [f"{outcome.scenario}: {problem}" for outcome in outcomes for problem in outcome.problems]
    return "\n".join(lines)


def as_json(outcomes: Sequence[Outcome]) -> list[dict]:
    """Returns the outcomes as plain JSON types."""
    return [{**dataclasses.asdict(outcome), "verdict": outcome.verdict} for outcome in outcomes]

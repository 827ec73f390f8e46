"""What a labelling job costs beside its work: the start, the overhead of a frame, memory, a rerun."""

from __future__ import annotations

from collections.abc import Callable

from unet_ray.bench.arena import Arena, Contest, Contestant, Ended
from unet_ray.bench.benchmark import Measurement, Round, Row, bend, slope_per_1000
from unet_ray.bench.labelling_contests import decoding, network, ours, segment
from unet_ray.bench.watchers import Growth, Memory, Watcher
from unet_ray.chaos import faults


def _start(arena: Arena) -> Measurement:
    """The moments of a short job, in seconds from the process' start."""
    archive, model = arena.archive("png", arena.settings.start_frames), arena.model()
    _, ended = segment(arena, "start", archive, model, moments=True)
    result, began_s = ended.result, ended.started_s
    moments = {
        "interpreter": result["began_s"],
        "Ray is up": _time_of_line(ended, "Ray "),
        "planned": _time_of_line(ended, f"{arena.settings.start_frames:,} frames in"),
        "model actor begins": result["actor_start"],
        "model is ready": result["actor_ready"],
        "first chunk begins to be decoded": result["decode_start"],
        "first chunk is decoded": result["decode_end"],
        "first frame is in the net": result["network"],
    }
    return {"moments": {name: at_s - began_s for name, at_s in moments.items()}, "wall_s": ended.wall_s}


def _time_of_line(ended: Ended, beginning: str) -> float:
    return next(at_s for at_s, line in ended.lines if line.startswith(beginning))


def _start_note(measured: Round) -> str:
    moments = sorted(measured["ours"]["moments"].items(), key=lambda moment: moment[1])
    return "seconds after the start: " + ", ".join(f"{name} {at_s:.1f}" for name, at_s in moments)


def _overhead_ms(measured: Round) -> float:
    """Core-milliseconds of a frame that neither the decoder nor the network takes."""
    cores = measured["ours"]["cores"]
    decode, network = measured["decode"]["ours_per_s"], measured["network"]["per_s"]
    return 1e3 * cores * (1 / measured["ours"]["steady_per_s"] - 1 / decode - 1 / network)


def _null(arena: Arena) -> Measurement:
    return {**ours("null_ours", "jpeg", model="null_model")(arena), "cores": arena.settings.cores}


def _counts(arena: Arena) -> list[int]:
    return [max(1, arena.settings.many_frames // part) for part in (100, 10, 1)]


def _many(index: int) -> Contestant:
    def run(arena: Arena) -> Measurement:
        n_frames = _counts(arena)[index]
        archive, model, name = arena.archive("jpeg", n_frames), arena.null_model(), _many_output(arena, n_frames)
        watchers: list[Watcher] = [Memory()]
        if n_frames == arena.settings.many_frames:
            watchers.append(Growth(arena.out / "outputs" / name))
        _, ended = segment(arena, name, archive, model, watchers=watchers)
        return {"frames": n_frames, "wall_s": ended.wall_s, **ended.watched}

    return run


def _many_output(arena: Arena, n_frames: int) -> str:
    return f"many_{arena.settings.size}_{n_frames}"


_MANY = ("hundredth", "tenth", "all")


def _slope(key: str) -> Callable[[Round], float]:
    return lambda measured: slope_per_1000([(measured[name]["frames"], measured[name][key]) for name in _MANY])


def _many_note(measured: Round) -> str:
    costs = [
        f"{m['frames']:,} frames: driver {m['driver_mb']:.0f} MB, largest worker {m['worker_mb']:.0f} MB, "
        f"{m['wall_s']:.1f} s"
        for m in (measured[name] for name in _MANY)
    ]
    late = measured[_MANY[-1]]["late_over_early"]
    return "; ".join([*costs, f"the second half of the last at {late:.3f} times the rate of its first"])


def _finished(arena: Arena) -> Measurement:
    """The command of the largest of `many` once more; labels first where that has not been done."""
    archive, model = arena.archive("jpeg", arena.settings.many_frames), arena.null_model()
    name = _many_output(arena, arena.settings.many_frames)
    if not (arena.out / "outputs" / name / "summary.json").exists():
        segment(arena, name, archive, model)
    events = faults.FileEvents(sorted(folder for folder in archive.iterdir() if folder.is_dir()))
    _, ended = segment(arena, name, archive, model, keep=True)
    overflow = any(kind == "overflow" for kind, _ in events.seen)
    opened = sum(kind == "opened" for kind, _ in events.seen)
    return {"wall_s": ended.wall_s, "opened": -1 if overflow else opened, "frames": arena.settings.many_frames}


def _nothing_opened(measured: Round) -> tuple[bool, str]:
    opened, frames = measured["ours"]["opened"], measured["ours"]["frames"]
    return opened == 0, f"{opened if opened >= 0 else 'too many to count'} of {frames:,} frames opened"


def _listing(arena: Arena) -> Measurement:
    settings = arena.settings
    archive, out = arena.archive("jpeg", settings.listed_frames), arena.output("listing")
    return arena.program("list_and_plan", {"frames": archive, "out": out, "chunk_frames": settings.chunk_frames}).result


def _listing_note(measured: Round) -> str:
    result = measured["ours"]
    return f"{result['frames']:,} files: listed in {result['list_s']:.1f} s, planned in {result['plan_s']:.1f} s"


def _chunks(arena: Arena) -> Measurement:
    archive, model, name = arena.specks(), arena.speck_model(), "chunks"
    options = ("--mask-size", "model", "--mask-encoding", "raw", "--chunk-frames", "1")
    watchers = [Memory(), Growth(arena.out / "outputs" / name)]
    _, ended = segment(arena, name, archive, model, *options, watchers=watchers)
    return {"wall_s": ended.wall_s, "per_s": arena.settings.chunks / ended.wall_s, **ended.watched}


def _chunks_note(measured: Round) -> str:
    result = measured["ours"]
    return (
        f"{result['per_s']:.0f} chunks/s, whole; driver {result['driver_mb']:.0f} MB, largest worker "
        f"{result['worker_mb']:.0f} MB"
    )


NULL = Contest(
    name="overhead",
    contestants={"decode": decoding("jpeg"), "network": network("null_model"), "ours": _null},
)
START = Contest(name="start", contestants={"ours": _start})
MANY = Contest(name="many", contestants={name: _many(index) for index, name in enumerate(_MANY)})
FINISHED = Contest(name="finished", contestants={"ours": _finished})
LISTING = Contest(name="listing", contestants={"ours": _listing})
CHUNKS = Contest(name="chunks", contestants={"ours": _chunks})

CONTESTS = (START, NULL, MANY, FINISHED, LISTING, CHUNKS)

ROWS = (
    Row(
        name="start",
        what="start-up until the first frame is in the net",
        against="",
        contest="start",
        needs=("ours",),
        figure=lambda measured: measured["ours"]["moments"]["first frame is in the net"],
        unit="s",
        target=10,
        at_most=True,
        note=_start_note,
    ),
    Row(
        name="overhead",
        what="all but decoding and net, a frame and core",
        against="null network, JPEG",
        contest="overhead",
        needs=("decode", "network", "ours"),
        figure=_overhead_ms,
        unit="ms",
        target=0.5,
        at_most=True,
    ),
    Row(
        name="memory_driver",
        what="growth of the driver's memory for 1,000 frames",
        against="",
        contest="many",
        needs=_MANY,
        figure=_slope("driver_mb"),
        unit="MB",
        target=1,
        at_most=True,
        note=_many_note,
    ),
    Row(
        name="memory_workers",
        what="growth of the largest worker's memory for 1,000 frames",
        against="",
        contest="many",
        needs=_MANY,
        figure=_slope("worker_mb"),
        unit="MB",
        target=1,
        at_most=True,
    ),
    Row(
        name="time_linear",
        what="seconds a frame, later against earlier, less 1",
        against="",
        contest="many",
        needs=_MANY,
        figure=lambda measured: bend([(measured[name]["frames"], measured[name]["wall_s"]) for name in _MANY]),
        unit="",
        target=0.05,
        at_most=True,
    ),
    Row(
        name="finished",
        what="the same command on a finished output",
        against="",
        contest="finished",
        needs=("ours",),
        figure=lambda measured: measured["ours"]["wall_s"],
        unit="s",
        target=10,
        at_most=True,
        agreement=_nothing_opened,
    ),
    Row(
        name="listing",
        what="memory of a process that lists and plans a million frames",
        against="",
        contest="listing",
        needs=("ours",),
        figure=lambda measured: measured["ours"]["memory_mb"],
        unit="MB",
        target=2_000,
        at_most=True,
        note=_listing_note,
    ),
    Row(
        name="chunks",
        what="memory of the driver at 200,000 chunks of a frame",
        against="",
        contest="chunks",
        needs=("ours",),
        figure=lambda measured: measured["ours"]["driver_mb"],
        unit="MB",
        target=2_000,
        at_most=True,
        note=_chunks_note,
    ),
    Row(
        name="chunks_rate",
        what="chunks a second, the second half of them",
        against="the first half",
        contest="chunks",
        needs=("ours",),
        figure=lambda measured: measured["ours"]["late_over_early"],
        target=0.9,
    ),
)

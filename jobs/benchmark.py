"""Measures unet_ray against what people would use instead, in the same run, and prints a table.

    pip install -e '.[bench]'                                             # PyTorch; without it, its rows are skipped
    python jobs/benchmark.py --out /data/bench --camvid /data/camvid      # all rows, 3 rounds: hours on two cores
    python jobs/benchmark.py --out /data/bench --only png_bound png_tfdata --frames 2000 --repeats 1
    python jobs/benchmark.py --out /data/bench --table                    # what is known by now, nothing is run
    python jobs/benchmark.py --out /data/bench --size tiny                # does it work? minutes; figures say nothing
    python jobs/benchmark.py --out /data/bench-gpu --device gpu           # what binds, and how busy the device is

Expect a line a measurement, then the table; the same goes to OUT/benchmark.json. Rows may be measured in several runs,
with the same settings, code and machine they make one table; a run that was cut goes on where it stopped. Exit code 1
where a contestant failed (OUT/logs says why); a row that misses its target or is skipped is no failure.

Each round runs both sides of a row one after another, every second round in the opposite order, in processes of their
own, on the same cores (`--cores`, by the scheduler's affinity, and as many threads). A row's figure is the median of
the rounds' ratios. The machine's ceilings (matrix product, decoding alone, network alone) are measured in each round.

"Steady" is the rate after warm-up: from the moment at which a tenth of the frames is committed (the time of the chunk's
record) until summary.json is there, frames committed in that time by its length. So the last frames' way through the
pipeline and the publishing count, the start of Ray and of the actors does not. "Whole" is from a process' start to its
exit. The bound 1/(1/decode + 1/net) takes the faster of our decoder and TensorFlow's, on all cores, and the network
with its argmax alone: confidences and counts are ours to pay. The row `onnx` is the processor time of one thread, the
least of 20 turns.

Frames are drawn by program, some hundreds, which many names are linked to: they come from memory, not from a disk.
"""

import argparse
import dataclasses
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Before TensorFlow is loaded below: its C++ notices name no trouble of the user's.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from unet_ray.bench import arena, benchmark, contests


def main() -> int:
    """Plays the contests and returns the exit code."""
    options = _parse()
    settings = arena.SIZES[options.size]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    changed: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "device": options.device}
    if options.frames:
        large = min(options.frames, settings.large_frames)  # of 25 times the network's work
        changed |= {"frames": options.frames, "large_frames": large, "many_frames": options.frames}
    if options.epochs:
        changed["epochs"] = options.epochs
    contest_arena = arena.Arena(options.out, dataclasses.replace(settings, **changed), options.camvid)
    journal = benchmark.Journal(
        options.out / "benchmark.json", machine(), list(contests.ROWS.values()), contest_arena.source
    )
    rows = [contests.ROWS[name] for name in options.only]
    went_well = True
    if not options.table and os.getloadavg()[0] > len(os.sched_getaffinity(0)) / 2:
        _say(f"warning: the load average is {os.getloadavg()[0]:.1f}; beside other work no figure means anything")
    for contest in contests.CONTESTS.values():
        asked = [row for row in rows if row.contest == contest.name]
        if asked and not options.table:
            went_well &= contests.play(contest, asked, contest_arena, journal, options.repeats, _say)
    print(benchmark.table(journal.lines()))
    return int(not went_well)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder for all that is made and measured")
    parser.add_argument("--only", nargs="+", choices=list(contests.ROWS), metavar="NAME", help="rows; by default all")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each contest")
    parser.add_argument("--frames", type=int, help="frames to label; by default 12,000, 480 and 100,000")
    parser.add_argument("--epochs", type=int, help="epochs of the whole training, instead of 40")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="cores of both sides")
    parser.add_argument("--size", choices=list(arena.SIZES), default="full")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--camvid", type=Path, help="folder with train, trainannot, val, valannot")
    parser.add_argument("--table", action="store_true", help="print what is known by now and end")
    options = parser.parse_args()
    options.only = options.only or list(contests.GPU_ROWS if options.device == "gpu" else contests.CPU_ROWS)
    for name in ("repeats", "frames", "epochs", "cores"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} is {value}; it must be at least 1")
    return options


def machine() -> dict[str, Any]:
    """What measurements depend on beside settings and code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return {"processor": model, "cores": os.cpu_count(), "python": platform.python_version()} | {
        name: _version(name) for name in ("tensorflow", "keras", "ray", "pillow", "pyarrow", "torch")
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())

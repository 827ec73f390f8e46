"""A labelling job under a fault: an archive and a model of its own, jobs as processes, and what they left compared.

The yardstick is the output of an undisturbed run over the same archive: equal bytes in every file but those that tell
of a run (`config.yaml`, `preview.png`, `report.html`, the figures in `summary.json`), or equal rows where the archive
lies elsewhere.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from unet_ray import storage
from unet_ray.chaos import faults
from unet_ray.classes import ClassSet, SegmentationClass
from unet_ray.digests import content_digest
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.bundle import write_bundle
from unet_ray.output import manifest, plans, verify
from unet_ray.output.tables import read_parquet

JOB_TIMEOUT_S = 900.0
"""A job that has not ended after this hangs, and is killed."""

STOP_WITHIN_S = 15.0
"""In which a job that is told to stop is gone, with all that it has started: after `cli.END_WITHIN_S` it is killed."""

_CLASSES = ClassSet(
    name="five", classes=tuple(SegmentationClass(name=f"c{i}", color=(i, 2 * i, 7), values=(i,)) for i in range(5))
)
_MODEL = UnetConfig(image_height_px=24, image_width_px=32, n_classes=5, n_filters=4, depth=2, dropout=0.0)
_MAIN = "import sys; from unet_ray.cli import main; sys.exit(main())"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much there is to label, and how often it goes wrong."""

    drives: tuple[int, ...]
    """Frames of each drive."""
    height_px: int
    width_px: int
    chunk_frames: int
    shard_rows: int
    n_kills: int
    """Times that the driver is killed before it may finish."""


SIZES = {
    "small": Size(
        drives=(37, 41, 26), height_px=48, width_px=66, chunk_frames=4, shard_rows=30, n_kills=3
    ),
    "large": Size(
        drives=(500, 700, 400, 400), height_px=240, width_px=320, chunk_frames=16, shard_rows=500, n_kills=20
    ),
}  # fmt: skip


class Stage:
    """What all trials share: an archive, a model, and the output of an undisturbed run."""

    def __init__(self, folder: Path, size: Size, seed: int = 0) -> None:
        """`folder` is emptied of an earlier stage."""
        self.folder, self.size, self.seed = folder, size, seed
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.archive = write_archive(folder / "archive", size, seed)
        self.model = _write_model(folder / "model", seed)
        with faults.killer_decoder(folder / "decoder") as path:
            self.environment = {**os.environ, "PYTHONPATH": path, "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
        self.environment.pop("RAY_ADDRESS", None)
        self.address: str | None = None
        """Of a cluster that trials may share."""

    def copy_archive(self, name: str) -> Path:
        """Returns a copy of the archive that a trial may spoil; the files keep their times."""
        return Path(shutil.copytree(self.archive, self.folder / "copies" / name))

    @cached_property
    def undisturbed(self) -> Path:
        """The output of a run to which nothing happened."""
        trial = Trial(self, "undisturbed")
        assert trial.run() == 0, trial.output()
        assert verify.verify(str(trial.out)) == []
        return trial.out

    def spoil(self, name: str, one_in: int) -> tuple[Path, dict[str, str]]:
        """Returns a copy of the archive with some frames broken or odd, and why each broken one is to be rejected."""
        archive = self.copy_archive(name)
        frames = frames_of(archive)
        reasons = {}
        chosen = random.Random(self.seed).sample(frames, max(1, len(frames) // one_in))
        for index, frame in enumerate(chosen):
            bad = faults.broken(index, frame.read_bytes())
            frame.write_bytes(bad.data)
            if bad.reason is not None:
                reasons[str(frame.relative_to(archive))] = bad.reason
        return archive, reasons

    @cached_property
    def other_model(self) -> Path:
        """Another network for the same archive."""
        return _write_model(self.folder / "other_model", self.seed + 1)

    @cached_property
    def undisturbed_by_other_model(self) -> Path:
        """The output of a run of the other model to which nothing happened."""
        trial = Trial(self, "undisturbed_by_other_model")
        assert trial.run("--model", str(self.other_model)) == 0, trial.output()
        return trial.out

    @cached_property
    def unpublished(self) -> Path:
        """An output with every chunk done and nothing published: the job was killed when the last record came."""
        trial = Trial(self, "unpublished")
        n_chunks = len(plans.read_plan(str(self.undisturbed)).chunks)
        with trial.started() as job:
            wait_until(lambda: trial.has_records(n_chunks), job)
            faults.kill([job.pid])
        assert trial.has_records(n_chunks) and not (trial.out / "frames").exists(), trial.output()
        return trial.out


def write_archive(folder: Path, size: Size, seed: int) -> Path:
    """Draws drives of noise that a network labels with more than one class."""
    for drive, n_frames in enumerate(size.drives):
        (folder / f"drive{drive}").mkdir(parents=True)
        for index in range(n_frames):
            noise = np.random.default_rng([seed, drive, index]).integers(
                0, 256, (-(-size.height_px // 3), -(-size.width_px // 2), 3), np.uint8
            )
            image_HWC = noise.repeat(3, 0).repeat(2, 1)[: size.height_px, : size.width_px]
            buffer = io.BytesIO()
            Image.fromarray(image_HWC).save(buffer, "PNG")
            (folder / f"drive{drive}" / f"{index:06d}.png").write_bytes(buffer.getvalue())
    return folder


def frames_of(archive: Path) -> list[Path]:
    """Returns the frames of an archive, in order."""
    return sorted(archive.glob("*/*.png"))


def _write_model(folder: Path, seed: int) -> Path:
    """A random network: a fault cares for no accuracy."""
    from unet_ray.model.weights import weight_shapes  # loads TensorFlow

    numbers = np.random.default_rng(seed)
    weights = {name: numbers.normal(0, 0.5, shape).astype(np.float32) for name, shape in weight_shapes(_MODEL).items()}
    write_bundle(str(folder), weights, _MODEL, _CLASSES, {})
    return folder


@dataclass
class Trial:
    """One output, the jobs that work on it, and what is found to be wrong with it."""

    stage: Stage
    name: str
    archive: Path = Path()
    """The stage's, unless another is given."""
    start_from: Path | None = None
    """An output that is copied to begin with."""
    out: Path = Path()
    """By default a folder of its own."""
    prefix: Callable[[Sequence[str]], list[str]] = list
    """Makes the command of a job run in another place."""
    out_option: Path | None = None
    """Where the output lies for the job, if that is not where it lies for us."""
    exit_codes: list[int] = field(default_factory=list)
    deeds: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    same: str = ""
    events: faults.FileEvents | None = None

    def __post_init__(self) -> None:
        folder = self.stage.folder / "trials" / self.name
        folder.mkdir(parents=True)
        self.log = folder / "log.txt"
        self.log.touch()
        if self.archive == Path():
            self.archive = self.stage.archive
        if self.out == Path():
            self.out = folder / "out"
        if self.start_from:
            shutil.copytree(self.start_from, self.out)
        self.random = random.Random(f"{self.stage.seed} {self.name}")

    # --- acting ---

    def command(self, *options: str) -> list[str]:
        """Returns the command of the job."""
        size = self.stage.size
        settings = {
            "--model": self.stage.model,
            "--frames": self.archive,
            "--out": self.out_option or self.out,
            "--chunk-frames": size.chunk_frames,
            "--shard-rows": size.shard_rows,
            "--batch-size": 4,
            "--device": "cpu",
            "--precision": "float32",
        }
        arguments = [str(word) for pair in settings.items() for word in pair]
        return self.prefix([sys.executable, "-c", _MAIN, "segment", *arguments, *options])

    @contextmanager
    def started(self, *options: str, on_cluster: bool = False) -> Iterator[subprocess.Popen[bytes]]:
        """A running job; it ends before the block is left, and its exit code is noted."""
        environment = dict(self.stage.environment)
        if on_cluster:
            assert self.stage.address is not None
            environment["RAY_ADDRESS"] = self.stage.address
        with self.log.open("ab") as log:
            log.write(f"--- {self.name}, job {len(self.exit_codes) + 1}\n".encode())
            log.flush()
            if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background, which a job would inherit
                signal.signal(signal.SIGINT, signal.default_int_handler)
            job = subprocess.Popen(
                self.command(*options), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
            try:
                yield job
                job.wait(JOB_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.problems.append(f"a job did not end within {JOB_TIMEOUT_S:g} s")
            finally:
                if job.poll() is None:
                    faults.kill([job.pid])
                self.exit_codes.append(job.wait())

    def stop(self, job: subprocess.Popen[bytes], sent: signal.Signals) -> None:
        """Tells a job to stop, and notes a problem unless it is soon gone with all that it has started."""
        started = faults.descendants(job.pid)
        sent_s = time.monotonic()
        job.send_signal(sent)
        gone = wait_until(lambda: job.poll() is not None and faults.are_gone(started), timeout_s=60)
        out_s = time.monotonic() - sent_s
        self.did(f"{sent.name}, out in {out_s:.1f} s with {len(self.records())} done")
        self.require(gone, f"processes still run a minute after {sent.name}")
        self.require(out_s < STOP_WITHIN_S, f"out {out_s:.1f} s after {sent.name}, not within {STOP_WITHIN_S:g}")

    def run(self, *options: str, on_cluster: bool = False) -> int:
        """Runs the job to its end and returns its exit code."""
        with self.started(*options, on_cluster=on_cluster):
            pass
        return self.exit_codes[-1]

    def output(self) -> str:
        """Returns what the last job has written."""
        return self.log.read_text(errors="replace").rpartition("--- ")[2]

    def did(self, deed: str) -> None:
        """Notes what was done to the job."""
        self.deeds.append(deed)

    # --- looking ---

    def watch(self) -> faults.FileEvents:
        """Watches archive and output from now on; makes the folders of work, as a job would."""
        folders = [self.out, self.out / "_work" / "parts", self.out / "_work" / "records", self.out / "manifest"]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        self.events = faults.FileEvents([*sorted({frame.parent for frame in frames_of(self.archive)}), *folders])
        return self.events

    def records(self) -> list[str]:
        """Returns the keys of the chunks that are done and not yet published."""
        try:
            names = os.listdir(self.out / "_work" / "records")
        except FileNotFoundError:
            return []
        return [name.removesuffix(".json") for name in names if not name.startswith(storage.TEMPORARY_PREFIX)]

    def has_records(self, number: int) -> bool:
        """Whether so many chunks are done, and not yet published."""
        return len(self.records()) >= number

    def is_planned(self) -> bool:
        """Whether the manifest is whole."""
        return any((self.out / "manifest").glob("_g*.json"))

    def redone(self) -> tuple[int, int]:
        """Returns how often a chunk's part was written, and how often a frame was opened, after the chunk was done.

        Up to the summary: the preview, which comes after it, looks at some frames.
        """
        key_of = self._chunks_of_frames()
        done: set[str] = set()
        parts = frames = 0
        for kind, path in self._until_summary():
            if kind == "appeared" and path.parent.name == "records":
                done.add(path.stem)
            elif kind == "appeared" and path.parent.name == "parts":
                parts += path.name.partition("-")[0] in done
            elif kind == "opened" and path in key_of:
                frames += key_of[path] in done
        return parts, frames

    def begun(self, n_events: int | None = None) -> Counter[str]:
        """Returns how often each chunk's frames were opened once there was a plan, by the chunk's key.

        Args:
            n_events: among the first so many events.
        """
        key_of = self._chunks_of_frames()
        opened: Counter[Path] = Counter()
        for kind, path in itertools.islice(self._until_summary(), n_events):
            if kind == "appeared" and path.parent.name == "manifest":
                opened.clear()  # what was looked at for the plan
            elif kind == "opened" and path in key_of:
                opened[path] += 1
        times: Counter[str] = Counter()
        for path, number in opened.items():
            times[key_of[path]] = max(times[key_of[path]], number)
        return times

    def _chunks_of_frames(self) -> dict[Path, str]:
        return {
            self.archive / frame_id: chunk.key
            for chunk in plans.read_plan(str(self.out)).chunks
            for frame_id in manifest.read_rows(chunk)["frame_id"].to_pylist()
        }

    def _until_summary(self) -> Iterator[tuple[str, Path]]:
        assert self.events is not None
        for kind, path in list(self.events.seen):
            self.require(kind != "overflow", "more happened to files than the kernel could tell")
            if kind == "appeared" and path == self.out / "summary.json":
                return
            yield kind, path

    # --- judging ---

    def require(self, holds: bool, problem: str) -> None:
        """Notes a problem unless something holds."""
        if not holds:
            self.problems.append(problem)

    def require_exit(self, code: int, says: str = "") -> None:
        """Notes a problem unless the last job ended with this code and said this."""
        self.require(
            self.exit_codes[-1] == code, f"exit code {self.exit_codes[-1]}, not {code}: {self.output()[-300:]}"
        )
        self.require(says in self.output(), f"the job did not say {says!r}")

    def require_same_bytes(self, expected: Path) -> None:
        """Notes a problem unless the output verifies and is, byte for byte, the expected one."""
        problems = verify.verify(str(self.out))
        actual, wanted = contents(self.out), contents(expected)
        problems += [
            f"{path}: other bytes" for path in sorted({*actual, *wanted}) if actual.get(path) != wanted.get(path)
        ]
        self.problems += problems
        self.same = "no" if problems else "bytes"

    def require_same_rows(self, expected: Path, reasons: dict[str, str]) -> None:
        """Notes a problem unless the output verifies, frames with a reason are rejected for it, and all else is equal.

        Args:
            expected: an output over an archive in which these frames are whole; where it lies may differ.
            reasons: of the frames that must be rejected.
        """
        problems = verify.verify(str(self.out))
        actual = {row["frame_id"]: row for row in rows_of(self.out).to_pylist()}
        wanted = {row["frame_id"]: row for row in beside_rejected(rows_of(expected).to_pylist(), reasons)}
        rejected = {frame_id: row["reason"] for frame_id, row in actual.items() if row["status"] != "ok"}
        if rejected != reasons:
            problems.append(f"rejected are {sorted(rejected.items())}, not {sorted(reasons.items())}")
        wrong = [i for i in wanted if i not in reasons and self._in_archive(wanted[i]) != actual.get(i)]
        problems += [f"{frame_id}: another row" for frame_id in wrong[:3]]
        if len(rows_of(self.out)) != len(actual) or actual.keys() != wanted.keys():
            problems.append("a frame is there twice, or not at all")
        self.problems += problems
        self.same = "no" if problems else "rows"

    def _in_archive(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row as it is of the same pixels in this trial's archive."""
        file = self.archive / row["frame_id"]
        return {**row, "uri": str(file), "content_digest": content_digest(file.read_bytes())}

    def require_nothing_torn(self) -> None:
        """Notes a problem unless every file that a reader sees is whole."""
        for path, data in contents(self.out, with_work=True).items():
            name = Path(path).name
            try:
                if path.endswith(".json"):
                    json.loads(data)
                elif path.endswith(".parquet"):
                    read_parquet(data)
            except (ValueError, pa.ArrowException) as error:
                self.problems.append(f"{path} is torn: {error}")
            if path.startswith("_work/parts/") and storage.sha256(data)[:16] not in name:
                self.problems.append(f"{path} is not what its name says")


def beside_rejected(rows: Sequence[dict[str, Any]], rejected: Container[str]) -> list[dict[str, Any]]:
    """Returns rows of whole frames as they are where others are rejected: without a change since the one before."""
    return [
        {name: None if name.startswith("changed_share") else value for name, value in row.items()}
        if before is not None and before["frame_id"] in rejected
        else row
        for before, row in zip([None, *rows], rows, strict=False)
    ]


def contents(out: Path, *, with_work: bool = False) -> dict[str, bytes]:
    """Returns the files of an output that must be the same however it came about, but for unfinished ones."""
    files = {}
    for file in sorted(out.rglob("*")):
        path = str(file.relative_to(out))
        if not file.is_file() or file.name.startswith(storage.TEMPORARY_PREFIX):
            continue
        if path in ("config.yaml", "preview.png", "report.html") or (path.startswith("_work/") and not with_work):
            continue
        files[path] = file.read_bytes()
    if not with_work and "summary.json" in files:
        summary: dict[str, Any] = json.loads(files["summary.json"])
        files["summary.json"] = json.dumps({**summary, "figures": {}}).encode()
    return files


def rows_of(out: Path) -> pa.Table:
    """Returns all rows of an output."""
    files = sorted((out / "frames").glob("*.parquet"))
    return pa.concat_tables(read_parquet(file.read_bytes()) for file in files)


def wait_until(happened: Callable[[], object], *jobs: subprocess.Popen[bytes], timeout_s: float = 300.0) -> bool:
    """Returns whether something happened before one of the jobs ended; what is slow to look at is looked at less."""
    deadline_s = time.monotonic() + timeout_s
    while (started_s := time.monotonic()) < deadline_s and all(job.poll() is None for job in jobs):
        if happened():
            return True
        time.sleep(max(0.002, 4 * (time.monotonic() - started_s)))
    return False

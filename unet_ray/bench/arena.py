"""Where contestants of the benchmark run: data and models made once, and child processes that are timed and watched.

All lies in one folder and is kept between runs: `data/` (frames, pairs, models), `outputs/` (what the contestants of
the last round wrote), `logs/`. Frames are drawn by `synthetic`; an archive with more frames than are drawn has each of
them under many names (hard links), so that 12,000 frames take the space of some hundreds and lie in memory: what is
measured is decoding, network and everything between, not the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unet_ray.bench.benchmark import Measurement, Skipped, source_digest
from unet_ray.bench.watchers import Watcher
from unet_ray.chaos import faults
from unet_ray.classes import PRESETS
from unet_ray.cluster.processes import KEEP_MEMORY
from unet_ray.demo import synthetic
from unet_ray.model import devices
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.bundle import read_bundle, write_bundle

JPEG_QUALITY = 90
_CLASSES = "carla23"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides a measurement; rounds with other settings are not put together."""

    size: str
    """Name of the settings that these were made from."""
    frame_size: tuple[int, int]
    """Height and width of a frame."""
    distinct: int
    """Frames that are drawn."""
    drive_frames: int
    """Frames of one drive, a folder."""
    network: UnetConfig
    large_network: tuple[int, int]
    """Height and width of the large network's input."""
    teaching_epochs: int
    """Epochs of the short training that the network has had: masks of a random one are noise, which no two agree on."""
    frames: int
    """Frames to label."""
    large_frames: int
    """Frames to label with the large network."""
    many_frames: int
    """The most frames in the measurement of memory; a tenth and a hundredth of them come before."""
    listed_frames: int
    """Frames of the archive that is only listed and planned."""
    chunks: int
    """Chunks of a frame each, of the measurement of many chunks."""
    start_frames: int
    photo_size: tuple[int, int]
    """Height and width of a photo, a JPEG frame of a camera's own size."""
    distinct_photos: int
    photos: int
    """Photos to label."""
    batch_size: int
    large_batch_size: int
    """Of the large network, whose logits are 25 times as many."""
    chunk_frames: int
    steps: int
    """Train steps that are timed."""
    pairs: int
    """Pairs to ingest."""
    epochs: int
    """Of a whole training."""
    cores: int
    device: str


FULL = Settings(
    size="full",
    frame_size=(480, 640),
    distinct=240,
    drive_frames=1000,
    network=UnetConfig(n_classes=23),
    large_network=(480, 640),
    teaching_epochs=6,
    frames=12_000,
    large_frames=480,
    many_frames=100_000,
    listed_frames=1_000_000,
    chunks=200_000,
    start_frames=192,
    photo_size=(1280, 1920),
    distinct_photos=48,
    photos=1_500,
    batch_size=32,
    large_batch_size=4,
    chunk_frames=96,
    steps=30,
    pairs=2_000,
    epochs=40,
    cores=os.cpu_count() or 1,
    device="cpu",
)
SIZES = {
    "full": FULL,
    "tiny": dataclasses.replace(
        FULL,
        size="tiny",
        frame_size=(48, 64),
        distinct=12,
        drive_frames=24,
        network=UnetConfig(image_height_px=16, image_width_px=24, n_classes=23, n_filters=4, depth=3),
        large_network=(48, 64),
        teaching_epochs=2,
        frames=48,
        large_frames=24,
        many_frames=400,
        listed_frames=300,
        chunks=90,
        start_frames=8,
        photo_size=(96, 144),
        distinct_photos=4,
        photos=32,
        batch_size=4,
        large_batch_size=2,
        chunk_frames=4,
        steps=3,
        pairs=20,
        epochs=2,
    ),
}
"""`tiny` shows that everything works, in seconds; its figures say nothing."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A child process that ended well."""

    started_s: float
    """Wall-clock time."""
    wall_s: float
    """From its start to its exit."""
    lines: tuple[tuple[float, str], ...]
    """What it said, with the wall-clock time of each line."""
    result: Any
    """What the program returned."""
    watched: dict[str, Any]
    """What the watcher found."""


class ContestantFailed(RuntimeError):
    """A contestant ended with an error; the message is the end of what it said."""


class Arena:
    """One folder, one set of settings."""

    def __init__(self, out: Path, settings: Settings, camvid: Path | None = None) -> None:
        """`camvid` is the folder with `train`, `trainannot`, `val` and `valannot`."""
        self.out, self.settings, self._camvid = out.resolve(), settings, camvid
        self.round_number = 0  # from 0: what draws numbers takes it for a seed
        self.source = source_digest(Path(__file__).parent.parent)
        self.data = self.out / "data" / settings.size
        for folder in (self.data, self.out / "logs", self.out / "outputs"):
            folder.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ,
            **KEEP_MEMORY,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            # Ray looks at the machine's cores, not at those that this process may use (Ray 2.60).
            "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": settings.cores}),
        }
        for name in ("RAY_ADDRESS", "OMP_NUM_THREADS"):
            self.environment.pop(name, None)

    # --- what there is to work on ---

    def log(self) -> Path:
        """The pairs that are drawn: `CameraRGB` and `CameraMask`."""
        return self._draw_log("log", self.settings.frame_size, self.settings.distinct)

    def _draw_log(self, name: str, size: tuple[int, int], n_frames: int) -> Path:
        per_drive = min(n_frames, 60)
        with self._made_once(name) as folder:
            if folder:
                synthetic.write_log(
                    str(folder),
                    seed=0,
                    drives=-(-n_frames // per_drive),
                    frames_per_drive=per_drive,
                    height_px=size[0],
                    width_px=size[1],
                )
        return self.data / name

    def archive(self, kind: str, n_frames: int) -> Path:
        """A folder of `png` or `jpeg` frames, or of `photo`s, which are larger JPEGs."""
        with self._made_once(f"{kind}_{n_frames}") as folder:
            if folder:
                self._link(self._drawn(kind), folder, n_frames)
        return self.data / f"{kind}_{n_frames}"

    def pairs(self) -> tuple[Path, Path]:
        """Folders of frames and of their masks, for ingest."""
        with self._made_once("pairs") as folder:
            if folder:
                for name in ("CameraRGB", "CameraMask"):
                    self._link(sorted((self.log() / name).rglob("*.png")), folder / name, self.settings.pairs)
        return self.data / "pairs" / "CameraRGB", self.data / "pairs" / "CameraMask"

    def _drawn(self, kind: str) -> list[Path]:
        if kind == "photo":
            log = self._draw_log("photo_log", self.settings.photo_size, self.settings.distinct_photos)
        else:
            log = self.log()
        frames = sorted((log / "CameraRGB").rglob("*.png"))
        if kind == "png":
            return frames
        with self._made_once(kind) as folder:
            for index, frame in enumerate(frames if folder else ()):
                assert folder is not None
                buffer = io.BytesIO()
                Image.open(frame).save(buffer, "JPEG", quality=JPEG_QUALITY)
                (folder / f"{index:06d}.jpg").write_bytes(buffer.getvalue())
        return sorted((self.data / kind).iterdir())

    def _link(self, drawn: Sequence[Path], folder: Path, number: int) -> None:
        for index in range(number):
            drive, frame = divmod(index, self.settings.drive_frames)
            source = drawn[index % len(drawn)]
            target = folder / f"drive{drive:03d}" / f"{frame:06d}{source.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:  # a filesystem without links, or with too many of one file
                shutil.copyfile(source, target)

    @contextlib.contextmanager
    def _made_once(self, name: str) -> Iterator[Path | None]:
        """Gives a folder to fill, or None where it is there; under its name only when it is whole."""
        if (self.data / name).exists():
            yield None
            return
        unfinished = self.data / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(self.data / name)

    # --- models ---

    def model(self) -> Path:
        """A network that has learnt a little, on the drawn log."""
        with self._made_once("model") as folder:
            if folder:
                height_px, width_px = self.network_size
                options = {
                    "--images": self.log() / "CameraRGB", "--masks": self.log() / "CameraMask", "--classes": _CLASSES,
                    "--out": folder, "--val-fraction": 0, "--epochs": self.settings.teaching_epochs,
                    "--batch-size": 8, "--n-filters": self.settings.network.n_filters,
                    "--depth": self.settings.network.depth, "--device": "cpu",
                }  # fmt: skip
                self.command("train", options, "--image-size", str(height_px), str(width_px))
        return self.data / "model" / "model"

    def large_model(self) -> Path:
        """The same weights for frames of the large size."""
        height_px, width_px = self.settings.large_network
        with self._made_once("large_model") as folder:
            if folder:
                bundle = read_bundle(str(self.model()))
                config = bundle.model_config.sized((height_px, width_px))
                write_bundle(str(folder), bundle.weights, config, bundle.class_set, {})
        return self.data / "large_model"

    def dct_model(self) -> Path:
        """The same weights for frames whose JPEG is decoded at a part of its size (`--resize area-dct`)."""
        with self._made_once("dct_model") as folder:
            if folder:
                bundle = read_bundle(str(self.model()))
                resized = dataclasses.replace(bundle.model_config.preprocessing, resize="area-dct")
                config = dataclasses.replace(bundle.model_config, preprocessing=resized)
                write_bundle(str(folder), bundle.weights, config, bundle.class_set, {})
        return self.data / "dct_model"

    def specks(self) -> Path:
        """A tar of JPEG frames of 16x16, as many as there are to be chunks."""
        with self._made_once(f"specks_{self.settings.chunks}") as folder:
            if folder:
                buffer = io.BytesIO()
                Image.fromarray(np.full((16, 16, 3), 99, np.uint8)).save(buffer, "JPEG")
                with tarfile.open(folder / "specks.tar", "w") as tar:
                    for index in range(self.settings.chunks):
                        member = tarfile.TarInfo(f"{index:06d}.jpg")
                        member.size = buffer.tell()
                        tar.addfile(member, io.BytesIO(buffer.getvalue()))
        return self.data / f"specks_{self.settings.chunks}" / "specks.tar"

    def null_model(self) -> Path:
        """A network that costs next to nothing: one filter, two levels, the same size and classes."""
        return self._write_null_model("null_model", self.settings.network.image_size)

    def speck_model(self) -> Path:
        """The same for frames of 16x16."""
        return self._write_null_model("speck_model", (16, 16))

    def _write_null_model(self, name: str, size: tuple[int, int]) -> Path:
        config = dataclasses.replace(self.settings.network.sized(size), n_filters=1, depth=2)
        with self._made_once(name) as folder:
            if folder:
                from unet_ray.model.weights import weight_shapes  # loads TensorFlow

                numbers = np.random.default_rng(0)
                shapes = weight_shapes(config).items()
                weights = {name: numbers.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes}
                write_bundle(str(folder), weights, config, PRESETS[_CLASSES], {})
        return self.data / name

    def batch_size(self, model: Path) -> int:
        """Frames that a model of this arena takes at once, in every contestant."""
        large = model == self.data / "large_model"
        return self.settings.large_batch_size if large else self.settings.batch_size

    @property
    def network_size(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return self.settings.network.image_size

    def camvid(self) -> Path:
        """The data set of the whole training.

        Raises:
            Skipped: it was not given.
        """
        if self._camvid is None or not (self._camvid / "trainannot").is_dir():
            raise Skipped("give --camvid, the folder with train/, trainannot/, val/ and valannot/")
        return self._camvid.resolve()

    def require(self, module: str, extra: str = "bench") -> None:
        """Raises Skipped where a library of an extra is not installed."""
        if importlib.util.find_spec(module) is None:
            raise Skipped(f"{module} is not installed (pip install 'unet-ray[{extra}]')")

    # --- running ---

    def output(self, name: str) -> Path:
        """An empty place for what a contestant writes."""
        folder = self.out / "outputs" / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def program(self, name: str, arguments: dict[str, Any], *watchers: Watcher) -> Ended:
        """Runs one of `contestants.PROGRAMS` in a process of its own.

        Raises:
            ContestantFailed: it ended with an error.
        """
        result = self.out / "logs" / f"{name}.json"
        result.unlink(missing_ok=True)
        arguments = {key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()}
        command = [sys.executable, "-m", "unet_ray.bench.contestants", name, json.dumps(arguments), str(result)]
        lines: list[tuple[float, str]] = []
        with (self.out / "logs" / f"{name}.log").open("w+") as log:
            started_s, started = time.time(), time.monotonic()
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, env=self.environment
            )
            try:
                with contextlib.ExitStack() as watching:
                    for watcher in watchers:
                        watching.enter_context(watcher.of(child.pid))
                    assert child.stdout is not None
                    with child.stdout:
                        lines += [(time.time(), line.rstrip("\n")) for line in child.stdout]
                    child.wait()
                    wall_s = time.monotonic() - started
            finally:
                if child.poll() is None:
                    faults.kill([child.pid, *faults.descendants(child.pid)])
                child.wait()
            if child.returncode or not result.exists():
                log.seek(0)
                last_lines = [*(text for _, text in lines[-3:]), *log.read().splitlines()[-3:]]
                raise ContestantFailed(f"{name} ended with exit code {child.returncode}: {' | '.join(last_lines)}")
        watched = {key: value for watcher in watchers for key, value in watcher.result().items()}
        returned = json.loads(result.read_text())
        return Ended(started_s=started_s, wall_s=wall_s, lines=tuple(lines), result=returned, watched=watched)

    def command(
        self,
        command: str,
        options: dict[str, Any],
        *more: str,
        watchers: Sequence[Watcher] = (),
        moments: bool = False,
    ) -> Ended:
        """Runs a command of `unet-ray` in a process of its own."""
        arguments = [*(str(word) for pair in options.items() for word in pair), *more]
        return self.program("ours", {"command": command, "arguments": arguments, "moments": moments}, *watchers)


Contestant = Callable[[Arena], Measurement]


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Programs that do the same work."""

    name: str
    contestants: Mapping[str, Contestant]
    compare: Callable[[Arena, dict[str, Any]], None] | None = None
    """Adds to a round's measurements how far they agree."""


def precision_of(device: str) -> str:
    """What `--precision auto` is on this machine; contestants on the same device compute in it, too."""
    return "bfloat16" if devices.has_bfloat16(device) else "float32"

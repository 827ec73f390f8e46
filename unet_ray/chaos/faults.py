"""Faults made on purpose, real ones: killed processes, a full disk, frames that break or kill; and what files tell.

Linux only: processes are found in /proc, files are watched by inotify, a small disk is a tmpfs in a mount namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import struct
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unet_ray.cluster.processes import descendants

# --- processes ---


def is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def are_gone(pids: Iterable[int]) -> bool:
    """Whether none of these processes runs any more."""
    return not any(map(is_running, pids))


def titled_below(pid: int, title: str) -> list[int]:
    """Returns the processes that one has started and whose command line, Ray's title, begins so (`ray::MapWorker`)."""
    processes = []
    for child in sorted(descendants(pid)):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ").startswith(title):
                processes.append(child)
    return processes


def kill(pids: Iterable[int]) -> None:
    """Kills processes without a word; those that are gone already are no error."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --- files ---

_OPENED, _MOVED_HERE, _CREATED, _OVERFLOW, _IS_FOLDER = 0x20, 0x80, 0x100, 0x4000, 0x4000_0000  # <sys/inotify.h>
_EVENT = struct.Struct("iIII")


class FileEvents:
    """Every opening, creation and renaming of a file in some folders, in order, as the kernel tells it."""

    def __init__(self, folders: Iterable[Path]) -> None:
        """Starts to watch; only what lies directly in a folder is seen."""
        libc = ctypes.CDLL(None, use_errno=True)
        self._queue = libc.inotify_init1(os.O_CLOEXEC)
        self._folders: dict[int, Path] = {}
        for folder in folders:
            watch = libc.inotify_add_watch(self._queue, os.fsencode(folder), _OPENED | _MOVED_HERE | _CREATED)
            if watch < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
            self._folders[watch] = folder
        self.seen: list[tuple[str, Path]] = []
        """`opened` or `appeared`, and the file."""
        self._wake, self._woken = os.pipe()
        threading.Thread(target=self._collect, daemon=True).start()  # the kernel's queue holds 16,384 events

    def are_more_than(self, number: int) -> bool:
        """Whether more has happened."""
        return len(self.seen) > number

    def _collect(self) -> None:
        while data := os.read(self._queue, 1 << 16):
            offset = 0
            while offset < len(data):
                watch, mask, _, length = _EVENT.unpack_from(data, offset)
                name = data[offset + _EVENT.size : offset + _EVENT.size + length].rstrip(b"\0")
                offset += _EVENT.size + length
                if mask & _OVERFLOW:
                    self.seen.append(("overflow", Path()))
                elif name and not mask & _IS_FOLDER and watch in self._folders:
                    kind = "opened" if mask & _OPENED else "appeared"
                    self.seen.append((kind, self._folders[watch] / os.fsdecode(name)))


class NoSmallDisk(RuntimeError):
    """This machine does not let us mount anything."""


class SmallDisk:
    """A disk of its own (a tmpfs) for the processes that are started through `command`; needs no root."""

    def __init__(self, path: Path, size_kb: int) -> None:
        """`path` is an empty folder; the disk lies over it."""
        self.path = path
        self._size_kb = size_kb

    def __enter__(self) -> SmallDisk:
        script = 'mount -t tmpfs -o "size=$2k" none "$1" && echo ready && exec sleep infinity'
        problem = ""
        for spaces in (["--user", "--map-root-user", "--mount"], ["--mount"]):
            self._holder = subprocess.Popen(
                ["unshare", *spaces, "sh", "-c", script, "sh", str(self.path), str(self._size_kb)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert self._holder.stdout is not None and self._holder.stderr is not None
            if self._holder.stdout.readline() == "ready\n":
                self._enter = ["--user", "--mount", "--preserve-credentials"] if "--user" in spaces else ["--mount"]
                return self
            problem = self._holder.stderr.read().strip()
            self.__exit__()
        raise NoSmallDisk(f"no disk of our own can be mounted here: {problem}")

    def __exit__(self, *_: object) -> None:
        self._holder.kill()
        self._holder.communicate()

    def command(self, command: Sequence[str]) -> list[str]:
        """Returns the command that runs another one with the disk in its place."""
        return ["nsenter", f"--target={self._holder.pid}", *self._enter, f"--wdns={os.getcwd()}", *command]

    def seen_from_here(self) -> Path:
        """Returns where this process sees the disk."""
        return Path(f"/proc/{self._holder.pid}/root") / self.path.relative_to("/")

    def fill(self, *, leave_kb: int = 0) -> None:
        """Fills the disk but for some KB."""
        disk = os.statvfs(self.seen_from_here())
        n_bytes = max(0, disk.f_bavail * disk.f_frsize - leave_kb * 1024)
        with (self.seen_from_here() / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            file.write(bytes(n_bytes))  # the job may have taken some of it meanwhile: then it is full, too

    def free(self) -> None:
        """Takes away what `fill` has put there."""
        (self.seen_from_here() / "filler").unlink(missing_ok=True)


# --- frames ---

# Python runs this in every process that Ray starts: a stand-in for a decoder that falls over some frame. The one that
# fills memory stops at 3 GB, so that the machine lives: the careful way's limit is reached before, elsewhere it ends as
# the kernel would end it.
KILLER_DECODER = '''
"""A decoder with faults, for `unet_ray.chaos.faults`."""
import ctypes, os, signal, time
try:
    from unet_ray.pixels import images
except ImportError:
    images = None
def faulty(read):
    def read_faultily(data, *arguments, **limits):
        if data.startswith(b"segfault"):
            ctypes.string_at(0)
        if data.startswith(b"hang"):
            time.sleep(100_000)
        if data.startswith(b"memory"):
            hoard = [bytearray(3 << 29) for _ in range(2)]
            os.kill(os.getpid(), signal.SIGKILL)
        return read(data, *arguments, **limits)
    return read_faultily
if images:
    for name in ("decode_frame", "decode_reduced_frame", "frame_size"):
        setattr(images, name, faulty(getattr(images, name)))
'''

KILLERS = {b"segfault": "crashed", b"hang": "timed_out", b"memory": "out_of_memory"}
"""Files that the decoder above falls over, and the reasons that they must be rejected with."""


@contextlib.contextmanager
def killer_decoder(folder: Path) -> Iterator[str]:
    """Puts the decoder with faults into a folder; yields the PYTHONPATH with which Python processes have it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(KILLER_DECODER)
    yield os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@dataclass(frozen=True)
class Broken:
    """One way in which a file can be bad, or only looks bad."""

    data: bytes
    reason: str | None
    """What the frame must be rejected with; None where it must be labelled as the good file is."""


def broken(index: int, good: bytes) -> Broken:
    """Returns a file that is bad or odd, each `index` in another way.

    Args:
        index: from 0; the ways begin anew after the last.
        good: a whole PNG, of which some of the ways are made.
    """
    middle = len(good) // 2
    image = Image.open(io.BytesIO(good)).convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter to the right
    bomb = partial(Image.new, "1", (20_000, 10_000))  # 200 megapixels in 25 KB
    ways: list[Callable[[], Broken]] = [
        lambda: Broken(good[:middle], "truncated"),
        lambda: Broken(b"", "not_an_image"),
        lambda: Broken(b"a line of text\n", "not_an_image"),
        lambda: Broken(_encoded(Image.fromarray(np.zeros((40, 50), np.uint16))), "unsupported"),
        lambda: Broken(good[:middle] + bytes(64) + good[middle + 64 :], "truncated"),
        lambda: Broken(_encoded(bomb()), "too_large"),
        lambda: Broken(_encoded(image.convert("RGBA")), None),
        lambda: Broken(_encoded(image.convert("CMYK"), "TIFF"), "unsupported"),
        lambda: Broken(_encoded(image, save_all=True, append_images=[image.rotate(180)]), "unsupported"),
        lambda: Broken(_encoded(image, exif=turned), None),
        lambda: Broken(_encoded(image, "BMP"), None),
        lambda: Broken(_encoded(image, "GIF"), "unsupported"),
    ]
    return ways[index % len(ways)]()


def _encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()

"""A frame's bytes become the network's input, or the reason why not: in this process, or carefully in one that may die.

Shapes: `H` height px, `W` width px, `C` colour; `h`, `w` the network's input.

The careful way is for frames that may have ended their process: each is decoded in a child process with limits on time
and memory, and a frame which alone has died `ATTEMPTS` times is rejected with what it died of.
"""

from __future__ import annotations

import faulthandler
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np

from unet_ray.digests import content_digest
from unet_ray.pixels import images
from unet_ray.pixels.preprocessing import DEFAULT_PREPROCESSING, Preprocessing, decode_input

ATTEMPTS = 3
"""Times that a frame may end a process in which no other frame was decoded, before it is rejected."""

_DEATHS = ("crashed", "timed_out", "out_of_memory")
"""Reasons that may be another frame's doing, or the machine's."""

_START_TIMEOUT_S = 120.0
"""Most that the import of NumPy and Pillow in a child may take; not the frame's fault, so not its `timeout_s`."""

_MEMORY_BESIDE_BYTES = 1 << 30
"""What a child may use beside the frame: libraries, the file's bytes, a decoder's working memory."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedFrame:
    """One frame as the network takes it, or why there is none."""

    image: np.ndarray | None = None
    """uint8 [h, w, 3], or [H, W, 3] where the network looks at windows of it."""
    height_px: int | None = None
    """The frame's own height; None where it was not found out."""
    width_px: int | None = None
    reason: str | None = None
    """Why it is rejected."""
    error: str | None = None
    """One line for a person."""
    content_digest: str | None = None
    """`digests.content_digest` of its bytes; None where they could not be read."""


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """What decoding depends on."""

    network_size: tuple[int, int] | None
    """(h, w) to resize to as in training; None keeps the frame as it is."""
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING
    """How to resize."""
    max_pixels: int
    """A frame with more is rejected by its header."""
    timeout_s: float
    """Time for one frame."""


def decode(data: bytes, options: DecodeOptions) -> DecodedFrame:
    """Decodes one frame; a refused one is a result, too."""
    try:
        if options.network_size:
            image_HWC, (height_px, width_px) = decode_input(
                data, options.network_size, options.preprocessing, max_pixels=options.max_pixels
            )
        else:
            image_HWC = images.decode_frame(data, max_pixels=options.max_pixels)
            height_px, width_px = image_HWC.shape[:2]
    except images.ImageRefused as refusal:
        return DecodedFrame(reason=refusal.reason, error=str(refusal))
    return DecodedFrame(image=image_HWC, height_px=height_px, width_px=width_px)


def decode_here(contents: Iterable[bytes | DecodedFrame], options: DecodeOptions) -> Iterator[DecodedFrame]:
    """Decodes frames in this process, which a frame that hangs ends: Ray has no time limit for a task, and a task whose
    process ends is seen.

    Args:
        contents: the bytes of each frame, or what is known of it already (that it is missing, say).
        options: as for `decode`.
    """
    for content in contents:
        if isinstance(content, DecodedFrame):
            yield content
            continue
        with _within(options.timeout_s):
            frame = decode(content, options)
        yield _with_digest(frame, content)


@contextmanager
def _within(timeout_s: float) -> Iterator[None]:
    """Ends this process where the block takes longer."""
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def count_pixels(data: bytes, timeout_s: float) -> int:
    """Returns a frame's pixels by its header, 0 where it is refused; one that hangs ends this process."""
    with _within(timeout_s), suppress(images.ImageRefused, MemoryError):
        return math.prod(images.frame_size(data))
    return 0


def decode_carefully(contents: Iterable[bytes | DecodedFrame], options: DecodeOptions) -> Iterator[DecodedFrame]:
    """As `decode_here`, but a frame that crashes, hangs or takes all memory is a rejected frame."""
    with _Child(options) as child:
        for content in contents:
            if isinstance(content, DecodedFrame):
                yield content
            else:
                yield _with_digest(_decode_in(child, content), content)


def _with_digest(frame: DecodedFrame, data: bytes) -> DecodedFrame:
    return replace(frame, content_digest=content_digest(data))


def _decode_in(child: _Child, data: bytes) -> DecodedFrame:
    """Decodes a frame behind others, and where that fails, of which these may be at fault, alone `ATTEMPTS` times."""
    answer = child.ask(data) if child.is_alive() else None
    for _ in range(ATTEMPTS):
        if answer is not None and answer.reason not in _DEATHS:
            break
        child.restart()
        answer = child.ask(data)
    assert answer is not None
    return answer


class _Child:
    """A process that decodes frames one by one; `ask` says what became of it."""

    def __init__(self, options: DecodeOptions) -> None:
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def restart(self) -> None:
        self._stop()
        ours, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "unet_ray.labelling.decoding", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._pipe = ours
        ours.send(self._options)
        if not ours.poll(_START_TIMEOUT_S):
            raise TimeoutError(f"a process for decoding did not start within {_START_TIMEOUT_S:g} s")
        ours.recv()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._pipe is not None:
            self._pipe.close()

    def ask(self, data: bytes) -> DecodedFrame:
        assert self._pipe is not None and self._process is not None
        try:
            self._pipe.send_bytes(data)
            if not self._pipe.poll(self._options.timeout_s):
                self._stop()
                took = f"took longer than {self._options.timeout_s:g} s (--frame-timeout-s)"
                return DecodedFrame(reason="timed_out", error=f"decoding {took}, {ATTEMPTS} times")
            return self._pipe.recv()
        except (EOFError, OSError):  # OSError: it ended in the middle of its answer
            return _death(self._process.wait())


def _death(exit_code: int) -> DecodedFrame:
    if exit_code == -signal.SIGKILL:  # nobody else kills it: the kernel or the container, for want of memory
        return DecodedFrame(
            reason="out_of_memory", error=f"decoding took so much memory that its process was killed, {ATTEMPTS} times"
        )
    how = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
    return DecodedFrame(reason="crashed", error=f"decoding ended its process with {how}, {ATTEMPTS} times")


def _serve(pipe: Connection) -> None:
    """Decodes what comes, until the other side goes away."""
    options: DecodeOptions = pipe.recv()
    _limit_memory(12 * options.max_pixels + _MEMORY_BESIDE_BYTES)
    pipe.send("ready")
    while True:
        try:
            data = pipe.recv_bytes()
        except EOFError:
            return
        try:
            pipe.send(decode(data, options))
        except MemoryError:
            pipe.send(DecodedFrame(reason="out_of_memory", error=f"decoding took too much memory, {ATTEMPTS} times"))


def _limit_memory(more_bytes: int) -> None:
    """Allows this process so much memory beside what it has mapped already."""
    with open("/proc/self/statm") as file:
        mapped_bytes = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = mapped_bytes + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    # Under its own name, so that what it sends is the class that the other side knows.
    from unet_ray.labelling import decoding

    decoding._serve(Connection(int(sys.argv[1])))

"""Frames become network inputs or reasons; a frame that ends its process is found out in a process of its own."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image

from unet_ray.digests import content_digest
from unet_ray.labelling import decoding
from unet_ray.labelling.decoding import DecodedFrame, DecodeOptions
from unet_ray.pixels import images

OPTIONS = DecodeOptions(network_size=(6, 10), max_pixels=10_000, timeout_s=20)

# Python runs this in every process it starts: a stand-in for a decoder with a fault.
FAULTS = """
import os, signal, time
from unet_ray.pixels import images
read = images.decode_reduced_frame
def faulty(data, *arguments, **limits):
    with open(os.environ["LOG"], "a") as log:
        log.write(f"{os.getpid()} {data[:5]}\\n")
    if data == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == b"hang":
        time.sleep(600)
    if data == b"hoard":
        bytearray(1 << 45)
    if data == b"killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if data == b"once":
        if not os.path.exists(os.environ["ONCE"]):
            open(os.environ["ONCE"], "w").close()
            os._exit(3)
        return read(open(os.environ["GOOD"], "rb").read(), *arguments, **limits)
    return read(data, *arguments, **limits)
images.decode_reduced_frame = faulty
"""


def png(height_px: int, width_px: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height_px, width_px, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("ONCE", str(tmp_path / "once"))
    (tmp_path / "good.png").write_bytes(png(18, 30))
    monkeypatch.setenv("GOOD", str(tmp_path / "good.png"))
    return tmp_path


def test_decode_resizes_to_the_network_and_keeps_the_size() -> None:
    frame = decoding.decode(png(18, 30), OPTIONS)
    assert (frame.height_px, frame.width_px, frame.reason) == (18, 30, None)
    assert frame.image is not None
    np.testing.assert_array_equal(frame.image, images.decode_frame(png(18, 30))[1::3, 1::3])


def test_decode_without_a_network_size_keeps_the_pixels() -> None:
    options = DecodeOptions(network_size=None, max_pixels=10_000, timeout_s=20)
    np.testing.assert_array_equal(decoding.decode(png(18, 30), options).image, images.decode_frame(png(18, 30)))


def test_refused_frames_are_results() -> None:
    frames = list(decoding.decode_here([b"text", png(200, 300), DecodedFrame(reason="missing", error="gone")], OPTIONS))
    assert [frame.reason for frame in frames] == ["not_an_image", "too_large", "missing"]
    assert all(frame.image is None and frame.error for frame in frames)


def test_the_digest_is_of_the_bytes_that_were_decoded_or_refused() -> None:
    contents = [png(18, 30), b"text", DecodedFrame(reason="missing", error="gone")]
    digests = [frame.content_digest for frame in decoding.decode_here(contents, OPTIONS)]
    assert digests == [xxhash.xxh3_64(png(18, 30)).hexdigest(), xxhash.xxh3_64(b"text").hexdigest(), None]
    assert xxhash.xxh3_64(b"").hexdigest() == content_digest(b"") == "2d06800538d394c2"  # of XXH3's own test vectors


@pytest.mark.timeout(300)
def test_careful_equals_plain_for_good_and_refused_frames() -> None:
    contents: list[bytes | DecodedFrame] = [png(18, 30), b"text", DecodedFrame(reason="changed"), png(40, 20)]
    plain, careful = (list(way(contents, OPTIONS)) for way in (decoding.decode_here, decoding.decode_carefully))
    for one, other in zip(plain, careful, strict=True):
        for name in ("reason", "error", "height_px", "width_px", "content_digest"):
            assert getattr(one, name) == getattr(other, name)
        assert (one.image is None) == (other.image is None)
        if one.image is not None:
            np.testing.assert_array_equal(one.image, other.image)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("data", "reason", "error"),
    [
        (b"crash", "crashed", "decoding ended its process with SIGSEGV, 3 times"),
        (b"hang", "timed_out", "decoding took longer than 2 s (--frame-timeout-s), 3 times"),
        (b"hoard", "out_of_memory", "decoding took too much memory, 3 times"),
        (b"killed", "out_of_memory", "decoding took so much memory that its process was killed, 3 times"),
    ],
)
def test_a_killer_is_rejected_and_its_neighbours_are_not(faults: Path, data: bytes, reason: str, error: str) -> None:
    options = DecodeOptions(network_size=(6, 10), max_pixels=10_000, timeout_s=2)
    frames = list(decoding.decode_carefully([png(18, 30), data, png(18, 30)], options))
    assert [frame.reason for frame in frames] == [None, reason, None]
    assert frames[1].error == error


@pytest.mark.timeout(300)
@pytest.mark.parametrize("data", [b"crash", b"hoard"])
def test_a_killer_is_rejected_after_three_processes_that_decoded_nothing_else(faults: Path, data: bytes) -> None:
    options = DecodeOptions(network_size=(6, 10), max_pixels=10_000, timeout_s=20)
    frames = list(decoding.decode_carefully([png(18, 30), data, png(20, 30), data, png(22, 30)], options))
    assert [frame.height_px for frame in frames] == [18, None, 20, None, 22]
    decoded: dict[str, list[str]] = {}
    for line in (faults / "log").read_text().splitlines():
        pid, _, what = line.partition(" ")
        decoded.setdefault(pid, []).append(what)
    alone = [whats for whats in decoded.values() if whats == [str(data)]]
    # Of `hoard` a process survives, and the third goes on with the next frames.
    assert len(alone) == (6 if data == b"crash" else 4)
    assert sum(whats[0] == str(data) for whats in decoded.values()) == 6


def test_pixels_are_counted_by_the_header_and_what_is_refused_has_none() -> None:
    assert decoding.count_pixels(png(18, 30)[:60], timeout_s=20) == 18 * 30
    assert decoding.count_pixels(b"text", timeout_s=20) == 0


@pytest.mark.timeout(300)
def test_a_frame_that_dies_once_is_decoded_at_the_second_try(faults: Path) -> None:
    (frame,) = decoding.decode_carefully([b"once"], OPTIONS)
    assert (faults / "once").exists()
    assert (frame.reason, frame.height_px, frame.width_px) == (None, 18, 30)


@pytest.mark.timeout(300)
def test_a_hang_ends_the_process(faults: Path) -> None:
    code = (
        "from unet_ray.labelling.decoding import *\n"
        "options = DecodeOptions(network_size=(6, 10), max_pixels=10000, timeout_s=1)\n"
        "print(list(decode_here([b'text'], options))[0].reason, flush=True)\n"
        "list(decode_here([b'hang'], options))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stdout == "not_an_image\n"
    assert "Timeout (0:00:01)!" in done.stderr

"""The progress line: what is done of the total, the rate of this run alone, the time left."""

from __future__ import annotations

import io
import re
import threading

import pytest

from unet_ray import progress
from unet_ray.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_every_30_s_and_the_last_one(clock: list[float]) -> None:
    stream = io.StringIO()
    line = Progress(2000, "frames", done=1000, stream=stream)
    for seconds, count in ((10, 100), (29, 100), (31, 110), (45, 90)):
        clock[0] = 100.0 + seconds
        line.advance(count, ", 3 rejected")
    assert stream.getvalue() == "1,310 of 2,000 frames (66%), 10.0 frames/s, 1 min 09 s left, 3 rejected\n"
    clock[0] = 150.0
    line.advance(600)
    line.finish()
    assert stream.getvalue().splitlines()[-1] == "2,000 of 2,000 frames (100%), 20.0 frames/s"


def test_a_line_comes_and_the_rate_falls_where_nothing_is_done(clock: list[float]) -> None:
    stream = io.StringIO()
    line = Progress(100, "frames", stream=stream)
    clock[0] = 110.0
    line.advance(50, ", 1 rejected")
    for clock[0] in (120.0, 200.0, 210.0):
        line.tick()
    assert stream.getvalue() == "50 of 100 frames (50%), 0.5 frames/s, 1 min 40 s left, 1 rejected\n"


def test_lines_come_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.01)
    came = threading.Event()

    class Log(io.StringIO):
        def flush(self) -> None:
            came.set()

    with Progress(100, "frames", stream=Log()):
        assert came.wait(60)


def test_a_bar_on_a_terminal_is_drawn_over(clock: list[float]) -> None:
    stream = Terminal()
    line = Progress(8, "frames", stream=stream)
    clock[0] = 101.0
    line.advance(2)
    assert re.fullmatch("\r\x1b\\[K█{6}░{18} 2 of 8 frames \\(25%\\), 2.0 frames/s, 3 s left", stream.getvalue())
    line.finish()
    assert stream.getvalue().endswith("\n")


def test_nothing_to_do_is_all_done(clock: list[float]) -> None:
    stream = io.StringIO()
    Progress(0, "frames", stream=stream).finish()
    assert stream.getvalue() == "0 of 0 frames (100%), 0.0 frames/s\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (7300, "2 h 01 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text

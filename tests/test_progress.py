"""The progress line: what is done of the total, the rate of this run alone, the time left."""

from __future__ import annotations

import io
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
    """210 frames in the 21 s since the first were done, at 10 s; 900 in the 40 s of the last minute since then."""
    stream = io.StringIO()
    line = Progress(2000, "frames", done=1000, stream=stream)
    for seconds, count in ((10, 100), (29, 100), (31, 110), (45, 90)):
        clock[0] = 100.0 + seconds
        line.advance(count, ", 3 rejected")
    assert stream.getvalue() == (
        "1,310 of 2,000 frames (66%), 10.0 frames/s, 1 min 09 s left for all frames, 3 rejected\n"
    )
    clock[0] = 150.0
    line.advance(600)
    line.finish()
    assert stream.getvalue().splitlines()[-1] == "2,000 of 2,000 frames (100%), 22.5 frames/s"


def test_a_line_comes_and_the_rate_falls_where_nothing_is_done(clock: list[float]) -> None:
    stream = io.StringIO()
    line = Progress(100, "frames", stream=stream)
    for clock[0], count in ((110.0, 10), (112.0, 40)):
        line.advance(count, ", 1 rejected")
    for clock[0] in (120.0, 190.0, 210.0):
        line.tick()
    # 40 in 80 s
    assert stream.getvalue() == ("50 of 100 frames (50%), 0.5 frames/s, 1 min 40 s left for all frames, 1 rejected\n")


def test_the_warm_up_counts_in_no_rate_and_until_it_is_over_there_is_none(clock: list[float]) -> None:
    """Two processes end their first pieces after 60 s, at once; then each piece takes a second."""
    stream = io.StringIO()
    line = Progress(100, "frames", stream=stream)
    clock[0] = 131.0
    line.tick()
    for clock[0] in (160.0, 160.1):
        line.advance(4)
    clock[0] = 162.0
    line.tick()
    for clock[0] in (164.0, 168.0, 172.0):
        line.advance(4)
    clock[0] = 192.0
    line.tick()
    assert stream.getvalue().splitlines() == [
        "0 of 100 frames (0%)",
        "8 of 100 frames (8%)",
        "20 of 100 frames (20%), 0.5 frames/s, 2 min 40 s left for all frames",
    ]


def test_a_job_of_one_piece_has_the_rate_of_the_whole(clock: list[float]) -> None:
    stream = io.StringIO()
    line = Progress(8, "frames", stream=stream)
    clock[0] = 104.0
    line.advance(8)
    line.finish(", 0 rejected")
    assert stream.getvalue() == "8 of 8 frames (100%), 2.0 frames/s, 0 rejected\n"


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
    for clock[0], count in ((101.0, 1), (106.0, 4)):
        line.advance(count)
    drawn = stream.getvalue().split("\r\x1b[K")[1:]
    assert drawn == [
        f"{'█' * 3}{'░' * 21} 1 of 8 frames (12%)",
        f"{'█' * 15}{'░' * 9} 5 of 8 frames (62%), 0.8 frames/s, 4 s left for all frames",
    ]
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

"""`rejected.csv`: which frames are rejected, beside an output that is published and beside one that is not."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from labelled import make_plan, published, run, write_archive

from unet_ray import storage
from unet_ray.errors import JobFailed
from unet_ray.output import plans, rejected, rejected_csv, verify


@pytest.fixture
def root(tmp_path: Path) -> str:
    return write_archive(tmp_path / "log")


def rows_of(out: str) -> list[tuple[str, ...]]:
    with open(f"{out}/rejected.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == rejected_csv.COLUMNS
    return [tuple(row) for row in rows]


def test_a_published_output_lists_its_rejected_frames_until_none_is(root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out, reject=("a/0.png", "b/6.png"))
    expected = [(frame, f"{root}/{frame}", "truncated", "ends early") for frame in ("a/0.png", "b/6.png")]
    assert rows_of(out) == expected and verify.verify(out) == []
    rejected.retry_rejected(make_plan(root, out))
    run(root, out, reject=("b/6.png",))
    assert rows_of(out) == expected[1:]
    rejected.retry_rejected(make_plan(root, out))
    run(root, out)
    assert not (tmp_path / "out/rejected.csv").exists() and verify.verify(out) == []


def test_a_list_that_is_gone_is_written_again_and_a_finished_output_leaves_it(root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out, reject=("c/0.png",))
    before = published(out)
    (tmp_path / "out/rejected.csv").unlink()
    assert verify.verify(out) == []
    run(root, out)
    assert published(out) == before


def test_where_nothing_is_published_rows_of_earlier_runs_count_too(root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out, reject=("a/0.png",))
    write_archive(tmp_path / "log", {"d": 5})
    reject = ("d/0.png", "d/2.png", "d/4.png")
    with pytest.raises(JobFailed):
        run(root, out, reject=reject, max_rejected=0.1)
    plan = plans.read_plan(out)
    rejected_csv.write(plan)
    assert [frame for frame, *_ in rows_of(out)] == ["a/0.png", *reject]
    first = "a/0.png (truncated), d/0.png (truncated), d/2.png (truncated)"
    assert rejected_csv.first_names(plan) == f"{first}; all in {out}/rejected.csv"
    rejected.retry_rejected(plan)
    with pytest.raises(JobFailed):
        run(root, out, reject=("d/4.png",), max_rejected=0)
    rejected_csv.write(plan)
    assert [frame for frame, *_ in rows_of(out)] == ["d/4.png"]


def test_names_stand_as_they_are_but_for_control_letters(tmp_path):
    """No spreadsheet's formulas are defused: the ids are those of `frames/`, for programs that join the two."""
    names = ("=1+1,x.png", "@a.png", 'quote".png', "line\nend.png", "\x1b[31m.png", "ü.png")
    (tmp_path / "log").mkdir()
    for name in names:
        (tmp_path / "log" / name).write_bytes(name.encode())
    out = str(tmp_path / "out")
    run(str(tmp_path / "log"), out, reject=names)
    written = {name.replace("\n", r"\n").replace("\x1b", r"\x1b") for name in names}
    assert {frame for frame, *_ in rows_of(out)} == written
    assert len((tmp_path / "out/rejected.csv").read_text().splitlines()) == 1 + len(names)


def test_overwriting_deletes_the_list(root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out, reject=("a/0.png",))
    make_plan(root, out, overwrite=True)
    assert not storage.exists(f"{out}/rejected.csv")

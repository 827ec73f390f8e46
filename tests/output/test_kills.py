"""A job killed before or after each of its changes to the storage, in every kind of run that changes something."""

from __future__ import annotations

import io
import os
import shutil

import duckdb
import fsspec
import pyarrow.parquet as pq
import pytest
from small_output import (
    BROKEN,
    CLASS_SET,
    FIRST_DRIVES,
    Killed,
    contents,
    flipped,
    killed_at,
    killed_inside,
    listing,
    make_plan,
    segment,
    work,
)

from unet_ray import storage
from unet_ray.output import ledger, plans, publish, verify
from unet_ray.output.records import part_uri, read_records

GROWN = {("a", ""): 7, ("b", "left"): 4, ("b", "right"): 2, ("c", ""): 4}
OTHER = plans.Lineage(bundle_digest="cd" * 32, class_set=CLASS_SET, options={"mask_size": "model"})
FEWER_BROKEN = {"b/left/2.png": "truncated"}


@pytest.fixture(params=["local", "memory"])
def base(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path)
    else:
        fsspec.filesystem("memory").store.clear()
        yield "memory://bucket"


def start_nothing(out):
    pass


def start_finished(out):
    segment(out)


def start_damaged(out):
    segment(out)
    path = storage.join(out, "frames/part-00001.parquet")
    data = storage.read_bytes(path)
    storage.write_whole(path, data[:60] + bytes([data[60] ^ 1]) + data[61:])
    assert len(verify.verify(out)) == 1


def run_first(out):
    return segment(out)


def run_grown(out):
    return segment(out, listing(GROWN))


def run_retry(out):
    return segment(out, broken=FEWER_BROKEN, retry=("crashed",))


def run_overwrite(out):
    return segment(out, lineage=OTHER, overwrite=True)


SCENARIOS = {
    "first": (start_nothing, run_first, 17),
    "grown": (start_finished, run_grown, 10),
    "mended": (start_damaged, run_first, 9),
    "retried": (start_finished, run_retry, 9),
    "overwritten": (start_finished, run_overwrite, 25),
}


def settled(out):
    """What a reader sees: all but unfinished files of a killed process."""
    return {path: data for path, data in contents(out).items() if storage.TEMPORARY_PREFIX not in path}


@pytest.mark.parametrize("base", ["memory"], indirect=True)  # on a disk: see test_publish; each fsync costs 5 ms
@pytest.mark.parametrize(  # a kill before a change leaves what one after the change before it leaves
    "after", [pytest.param(True, id="after"), pytest.param(False, marks=pytest.mark.weekly, id="before")]
)
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_next_run_gives_the_same_bytes(name, after, base, monkeypatch):
    start, run, at_least = SCENARIOS[name]
    undisturbed = storage.join(base, "undisturbed")
    start(undisturbed)
    with killed_at(monkeypatch, -1, after=after) as changes:
        run(undisturbed)
    expected = settled(undisturbed)
    assert len(changes) >= at_least, changes
    assert verify.verify(undisturbed) == []
    for index in range(len(changes)):
        out = storage.join(base, f"{name}-{index}")
        start(out)
        with pytest.raises(Killed), killed_at(monkeypatch, index, after=after):
            run(out)
        run(out)
        assert settled(out) == expected, (index, changes[index])
        assert verify.verify(out) == [], (index, changes[index])


@pytest.mark.parametrize("base", ["memory"], indirect=True)
@pytest.mark.parametrize("name", ["first", "grown"])
def test_a_committed_chunk_is_never_labelled_again(name, base, monkeypatch):
    start, run, _ = SCENARIOS[name]
    undisturbed = storage.join(base, "undisturbed")
    start(undisturbed)
    with killed_at(monkeypatch, -1, after=True) as changes:
        all_chunks = run(undisturbed)
    for index in range(len(changes)):
        out = storage.join(base, f"{name}-{index}")
        start(out)
        with pytest.raises(Killed), killed_at(monkeypatch, index, after=True) as done:
            run(out)
        n_committed = sum("/records/" in change and change.startswith("put_if_absent") for change in done)
        assert run(out) == all_chunks[n_committed:], (index, changes[index])


FEW = {("a", ""): 5, ("b", "left"): 1}
MORE = {**FEW, ("c", ""): 2}


def read_by_duckdb(out: str) -> list[tuple[int, int]]:
    """Rows and frames of `frames/` and of `manifest/`, as a user asks for them."""
    counts = []
    for folder in ("frames", "manifest"):
        files = f"{out}/{folder}/*.parquet"
        there = duckdb.sql(f"select * from glob('{files}')").fetchall()
        counted = f"select count(*), count(distinct frame_id) from '{files}'"
        counts += duckdb.sql(counted).fetchall() if there else [(0, 0)]
    return counts


@pytest.mark.parametrize(
    ("begun", "drives", "at_least"),
    [pytest.param(None, FEW, 90, id="first"), pytest.param(FEW, MORE, 45, marks=pytest.mark.slow, id="grown")],
)
def test_killed_inside_any_write_the_next_run_gives_the_same_bytes(begun, drives, at_least, tmp_path, monkeypatch):
    """Where a writer holds half a file, or a whole one without its name."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # 5 ms, and a kill takes nothing from the kernel
    start, undisturbed, out = (str(tmp_path / name) for name in ("start", "undisturbed", "out"))
    if begun:
        segment(start, listing(begun))
        shutil.copytree(start, undisturbed)
    segment(undisturbed, listing(drives))
    expected, n_frames = contents(undisturbed), sum(drives.values())
    index, killed = 0, True
    while killed:
        if begun:
            shutil.copytree(start, out)
        killed = killed_inside(index, out, listing(drives))
        for rows, frames in read_by_duckdb(out):
            assert rows == frames, f"a frame twice after a kill at step {index}"
        segment(out, listing(drives))
        assert contents(out) == expected, f"killed at step {index}"  # of all files: nothing unfinished is left
        assert verify.verify(out) == []
        assert read_by_duckdb(out) == [(n_frames, n_frames)] * 2
        shutil.rmtree(out)
        index += 1
    assert index > at_least


@pytest.mark.parametrize("left", ["temporary", "empty", "half", "flipped"])
def test_a_note_that_is_not_whole_is_none(left, base, monkeypatch):
    """A file of frames/ whose note is lost is written again, by the records that are not yet gone or by new ones."""
    segment(storage.join(base, "undisturbed"))
    out = storage.join(base, "out")
    plan = make_plan(out)
    work(plan)
    with monkeypatch.context() as patch:
        patch.setattr(ledger.storage, "delete_many", lambda uris: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):  # noted, and the records still there
            publish.publish(plan, max_rejected=0.5)
    uri = storage.join(out, "_work", "shards", "part-00000.parquet.json")
    note = storage.read_bytes(uri)
    storage.delete(uri)
    if left == "temporary":
        uri = storage.join(out, "_work", "shards", f"{storage.TEMPORARY_PREFIX}0123456789ab-part-00000.parquet.json")
    damaged = {"temporary": b"", "empty": b"", "half": note[: len(note) // 2], "flipped": flipped(note, 60, 3)}[left]
    storage.write_whole(uri, damaged)
    assert ledger.read_notes(plan) == []
    assert segment(out) == []
    assert settled(out) == settled(storage.join(base, "undisturbed"))


def test_killed_again_and_again_it_ends_with_the_same_bytes(base, monkeypatch):
    segment(storage.join(base, "undisturbed"))
    out = storage.join(base, "out")
    for n_kills in range(100):
        try:
            with killed_at(monkeypatch, 1 + n_kills % 3, after=n_kills % 2 == 0):
                segment(out)
            break
        except Killed:
            continue
    segment(out)
    assert settled(out) == settled(storage.join(base, "undisturbed"))


def test_a_kill_while_planning_and_an_archive_that_grew_meanwhile_list_no_frame_twice(base, monkeypatch):
    """`manifest/` is read as a whole by other tools: what is in it counts."""
    segment(storage.join(base, "undisturbed"))
    with killed_at(monkeypatch, -1, after=True) as changes:
        make_plan(storage.join(base, "planned"))
    for index in range(len(changes)):
        out = storage.join(base, f"out-{index}")
        with pytest.raises(Killed), killed_at(monkeypatch, index, after=True):
            make_plan(out)
        segment(out, listing({**FIRST_DRIVES, ("a", ""): 6}))
        ids = [
            frame_id
            for path, data in contents(storage.join(out, "manifest")).items()
            if path.endswith(".parquet")
            for frame_id in pq.read_table(io.BytesIO(data))["frame_id"].to_pylist()
        ]
        assert len(ids) == len(set(ids)) == 12, changes[index]
        assert verify.verify(out) == []


def test_several_lost_parts_are_named_and_mended_by_one_more_run(base):
    segment(storage.join(base, "undisturbed"))
    out = storage.join(base, "out")
    plan = make_plan(out)
    work(plan)
    parts = storage.join(out, "_work", "parts")
    for file in list(storage.list_files(parts))[::2]:
        storage.delete(file.uri)
    with pytest.raises(storage.StorageError, match="run the same command again"):
        publish.publish(plan, max_rejected=0.5)
    assert len(segment(out)) == 3
    assert settled(out) == settled(storage.join(base, "undisturbed"))


def test_a_torn_record_is_done_again(base):
    segment(storage.join(base, "undisturbed"))
    out = storage.join(base, "out")
    plan = make_plan(out)
    work(plan)
    storage.write_whole(storage.join(out, "_work", "records", f"{plan.chunks[1].key}.json"), b'{"chunk_id": "000')
    with pytest.raises(storage.StorageError):
        publish.publish(plan, max_rejected=0.5)
    assert segment(out) == ["000-000001"]
    assert settled(out) == settled(storage.join(base, "undisturbed"))


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_part_with_a_flipped_bit_is_noticed_before_it_is_published_and_its_chunk_done_again(at, base):
    segment(storage.join(base, "undisturbed"))
    out = storage.join(base, "out")
    plan = make_plan(out)
    work(plan)
    (record,) = read_records(out, [plan.chunks[2].key])
    uri = part_uri(out, record.part)
    data = storage.read_bytes(uri)
    storage.write_whole(uri, flipped(data, int(at * len(data)), 5))
    with pytest.raises(storage.StorageError, match="is damaged; run the same command again"):
        publish.publish(plan, max_rejected=0.5)
    assert segment(out) == ["000-000002"]
    assert settled(out) == settled(storage.join(base, "undisturbed"))
    assert verify.verify(out) == []


@pytest.mark.parametrize("path", ["manifest", "class_statistics.parquet", "run.json", "summary.json"])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_verify_names_every_damaged_file_of_the_output(path, how, base):
    out = storage.join(base, "out")
    segment(out)
    if path == "manifest":
        path = next(name for name in contents(out) if name.startswith("manifest/") and name.endswith(".parquet"))
    uri = storage.join(out, path)
    data = storage.read_bytes(uri)
    storage.delete(uri)
    if how != "delete":
        middle = len(data) // 2
        storage.write_whole(uri, data[:middle] if how == "truncate" else data[:middle] + b"\xff" + data[middle + 1 :])
    try:
        problems = verify.verify(out)
    except ValueError as error:  # a folder without its run.json is no output
        problems = [str(error)]
    assert any(path in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


def test_a_finished_output_is_published_by_a_stale_job_without_change(base):
    """A job that planned long ago wakes up when the other one has published and cleared the work away."""
    out = storage.join(base, "out")
    stale = make_plan(out)
    segment(out)
    before = settled(out)
    for chunk in stale.chunks[:2]:
        work(stale, chunks=[chunk])
    assert ledger.pending(stale) == []
    publish.publish(stale, max_rejected=0)
    assert segment(out) == []
    assert {path: data for path, data in settled(out).items() if not path.startswith("_work/")} == before
    assert verify.verify(out) == []


def test_frames_rejected_for_another_reason_are_left_as_they_are(base):
    out = storage.join(base, "out")
    segment(out)
    before = settled(out)
    assert segment(out, retry=("timed_out",)) == []
    assert settled(out) == before
    assert segment(out, retry=()) == ["000-000001", "000-000002"]  # with BROKEN as before: the same again
    assert settled(out) == before
    assert set(BROKEN.values()) == {"crashed", "truncated"}

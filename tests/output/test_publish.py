"""The ledger from plan to proof, without Ray: a labeller that a test can follow with its eyes."""

from __future__ import annotations

import json
import os

import duckdb
import pyarrow.parquet as pq
import pytest
from labelled import CLASSES, DRIVES, LINEAGE, label, make_plan, published, run, write_archive

from unet_ray import storage
from unet_ray.errors import JobFailed
from unet_ray.output import heartbeats, ledger, manifest, plans, publish, rejected, verify
from unet_ray.output.chunks import Cutting
from unet_ray.output.records import commit
from unet_ray.storage import files as storage_files


@pytest.fixture
def root(tmp_path) -> str:
    return write_archive(tmp_path / "log")


def test_every_frame_is_published_once_in_the_manifests_order(root, tmp_path):
    out = str(tmp_path / "out")
    summary = run(root, out, reject=("a/3.png",))
    rows = pq.read_table(out + "/frames")
    expected = [f"{drive}/{number}.png" for drive, n_frames in DRIVES.items() for number in range(n_frames)]
    assert rows["frame_id"].to_pylist() == expected
    assert pq.read_table(out + "/manifest")["frame_id"].to_pylist() == expected
    assert [rows["status"].to_pylist().count(status) for status in ("ok", "rejected")] == [12, 1]
    assert (summary["listed"], summary["ok"], summary["rejected"]) == (13, 12, {"truncated": 1})
    # shards take whole chunks (3, 2 | 3, 3 | 1, 1) until they have 5 rows
    assert [file["rows"] for file in summary["files"] if file["path"].startswith("frames/")] == [5, 6, 2]
    assert set(os.listdir(out)) == {
        "config.yaml", "run.json", "manifest", "frames", "class_statistics.parquet", "summary.json", "rejected.csv"
    }  # fmt: skip
    assert verify.verify(out) == []


def test_the_footer_says_what_the_labels_are(root, tmp_path):
    run(root, str(tmp_path / "out"))
    metadata = pq.read_schema(tmp_path / "out/frames/part-00000.parquet").metadata
    assert json.loads(metadata[b"unet_ray.class_set"]) == CLASSES.to_dict()
    assert json.loads(metadata[b"unet_ray.lineage"]) == LINEAGE.to_dict()
    assert metadata[b"unet_ray.format_version"] == b"1"


def test_the_statistics_equal_sql_over_the_frames(root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out, reject=("b/1.png",))
    sql = duckdb.sql(
        f"""select sequence, camera, count(*) as frames, count_if(pixels_sky > 0) as frames_with_class,
            sum(pixels_sky)::bigint as pixels, sum(pixels_sky) / sum(mask_height_px * mask_width_px) as share
            from '{out}/frames/*.parquet' where status = 'ok' group by all order by sequence"""
    ).fetchall()
    ours = pq.read_table(out + "/class_statistics.parquet").to_pylist()
    columns = ("sequence", "camera", "frames", "frames_with_class", "pixels", "share")
    assert [tuple(row[c] for c in columns) for row in ours if row["class_name"] == "sky"] == sql


def test_a_finished_output_is_neither_read_nor_written(root, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    first = run(root, out)
    before = published(out)
    seen: list[str] = []
    monkeypatch.setattr(storage, "write_whole", None)
    monkeypatch.setattr(storage_files, "write_whole", None)
    monkeypatch.setattr(storage, "put_if_absent", None)
    assert run(root, out, seen=seen) == first
    assert seen == [] and published(out) == before


MUTATIONS = ("write_whole", "put_if_absent", "delete", "delete_tree")


def killed_at(monkeypatch, number: int, moment: str, act) -> bool:
    """Runs `act`, killed before or after the `number`-th change of the store; says whether it came so far."""
    count = 0
    with monkeypatch.context() as patch:
        for name in MUTATIONS:
            original = getattr(storage, name)

            def mutate(*args, original=original):
                nonlocal count
                count += 1
                if count == number and moment == "before":
                    raise KeyboardInterrupt
                result = original(*args)
                if count == number and moment == "after":
                    raise KeyboardInterrupt
                return result

            patch.setattr(storage, name, mutate)
            patch.setattr(storage_files, name, mutate)
        try:
            act()
        except KeyboardInterrupt:
            return True
    return False


MOMENTS = ["after", pytest.param("before", marks=pytest.mark.weekly)]
"""A kill before a change leaves what one after the change before it leaves."""


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("where", ["local", "memory"])
def test_killed_between_any_two_steps_the_next_run_gives_the_same_bytes(where, moment, tmp_path, root, monkeypatch):
    base = str(tmp_path) if where == "local" else f"memory://{tmp_path.name}"
    run(root, f"{base}/undisturbed", reject=("b/6.png",))
    expected = published(f"{base}/undisturbed")
    number, killed = 0, True
    while killed:
        number += 1
        out = f"{base}/{moment}{number}"
        killed = killed_at(monkeypatch, number, moment, lambda out=out: run(root, out, reject=("b/6.png",)))
        run(root, out, reject=("b/6.png",))
        assert published(out) == expected, f"killed {moment} change {number}"
        assert verify.verify(out) == []
    assert number > 20  # 3 files of the plan, 2 a chunk, 3 shards, statistics, summary


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_publishing_a_rerun_labels_nothing(moment, tmp_path, root, monkeypatch):
    run(root, str(tmp_path / "undisturbed"))
    expected, number, killed = published(str(tmp_path / "undisturbed")), 0, True
    while killed:
        number += 1
        out = str(tmp_path / f"{number}")
        plan = make_plan(root, out)
        for chunk in plan.chunks:
            commit(out, chunk, label(chunk), writer="test")
        killed = killed_at(monkeypatch, number, moment, lambda plan=plan: publish.publish(plan, max_rejected=0))
        if killed and plans.read_summary(out) is None:
            assert verify.verify(out)[0].endswith(" 0 of 6 chunks still to be done; run segment again")
        seen: list[str] = []
        run(root, out, seen=seen)
        assert (seen, published(out)) == ([], expected), f"killed {moment} change {number}"
    assert number > 20  # a file, a note and a mark for each of 3 shards, 6 records, 6 parts, statistics, summary, work


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_retry_killed_anywhere_ends_as_one_that_was_not(moment, tmp_path, root, monkeypatch):
    def retry(out: str) -> list[str]:
        rejected.retry_rejected(make_plan(root, out), ["truncated"])
        seen: list[str] = []
        run(root, out, seen=seen)
        return seen

    run(root, str(tmp_path / "undisturbed"), reject=("b/4.png",))
    retry(str(tmp_path / "undisturbed"))
    expected, number, killed = published(str(tmp_path / "undisturbed")), 0, True
    while killed:
        number += 1
        out = str(tmp_path / f"{number}")
        run(root, out, reject=("b/4.png",))
        killed = killed_at(monkeypatch, number, moment, lambda out=out: retry(out))
        if killed:
            verify.verify(out)  # which marks what it takes for damage
        assert set(retry(out)) <= {"000-000003"}
        assert published(out) == expected, f"killed {moment} change {number}"
        assert verify.verify(out) == []
    assert number > 10


def test_parts_go_as_their_shards_are_published(root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    plan = make_plan(root, str(out))
    for chunk in plan.chunks:
        commit(str(out), chunk, label(chunk), writer="test")
    left = []

    def one_after_another(act, tasks):
        for task in tasks:
            yield act(task)
            left.append([len(list((out / "_work" / name).iterdir())) for name in ("parts", "records")])

    publish.publish(plan, max_rejected=0, map_shards=one_after_another)
    assert left == [[4, 4], [2, 2], [0, 0]]  # of 6 chunks, 2 a shard
    assert not (out / "_work").exists()


def test_a_job_that_finds_the_parts_gone_takes_the_file_that_another_published(root, tmp_path):
    run(root, str(tmp_path / "one"))
    out = str(tmp_path / "out")
    plan = make_plan(root, out)
    for chunk in plan.chunks:
        commit(out, chunk, label(chunk), writer="test")

    def after_another(act, tasks):
        other = [act(task) for task in tasks]
        assert [act(task) for task in tasks] == other
        return other

    publish.publish(plan, max_rejected=0, map_shards=after_another)
    assert published(out) == published(str(tmp_path / "one"))


def test_a_rerun_labels_only_chunks_without_a_record(root, tmp_path):
    out = str(tmp_path / "out")
    plan = make_plan(root, out)
    for chunk in plan.chunks[1:4]:
        commit(out, chunk, label(chunk), writer="test")
    seen: list[str] = []
    run(root, out, seen=seen)
    assert seen == ["000-000000", "000-000004", "000-000005"]


def test_of_two_records_of_one_chunk_the_first_stands(root, tmp_path):
    out = str(tmp_path / "out")
    chunk = make_plan(root, out).chunks[0]
    first = commit(out, chunk, label(chunk), writer="first")
    second = commit(out, chunk, label(chunk, reject=("a/0.png",)), writer="second")
    assert second == first and first.writer == "first"


def test_two_jobs_that_commit_the_same_chunks_give_the_same_bytes(root, tmp_path):
    run(root, str(tmp_path / "one"))
    out = str(tmp_path / "two")
    plans = [make_plan(root, out), make_plan(root, out)]
    for chunk in plans[0].chunks:
        for writer in ("x", "y"):
            commit(out, chunk, label(chunk), writer=writer)
    for plan in plans:
        publish.publish(plan, max_rejected=0)
    assert published(out) == published(str(tmp_path / "one"))


def test_an_archive_that_grew_gets_new_files_and_keeps_the_old_ones(root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out)
    before = published(out)
    write_archive(tmp_path / "log", {"a": 7, "d": 2})
    seen: list[str] = []
    summary = run(root, out, seen=seen)
    assert seen == ["001-000000", "001-000001"] and summary["listed"] == 17
    after = published(out)
    assert all(after[path] == data for path, data in before.items() if path.startswith(("frames/", "manifest/")))
    ids = pq.read_table(out + "/frames", columns=["frame_id"])["frame_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 17
    assert verify.verify(out) == []


def test_frames_that_changed_or_vanished_are_counted_and_stay(root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out)
    before = published(out)
    (tmp_path / "log/a/0.png").write_bytes(b"something else")
    (tmp_path / "log/a/1.png").unlink()
    plan = make_plan(root, out)
    assert (plan.n_new, plan.origin.n_changed, plan.origin.n_gone) == (0, 1, 1)
    assert ledger.pending(plan) == [] and published(out) == before


def test_too_many_rejected_publish_nothing_and_a_larger_share_needs_no_labelling(root, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(JobFailed) as caught:
        run(root, out, reject=("a/0.png", "b/0.png"), max_rejected=0.1)
    assert str(caught.value) == (
        "2 of 13 frames are rejected (15.4%: 2 truncated), more than --max-rejected 0.1 of 13; nothing is published. "
        "With a larger --max-rejected the same command publishes what is labelled; --retry-rejected tries those frames "
        "again"
    )
    assert not (tmp_path / "out/frames").exists()
    seen: list[str] = []
    assert run(root, out, max_rejected=0.2, seen=seen)["rejected"] == {"truncated": 2}
    assert seen == []


def rows_of(out: str) -> list[dict]:
    return pq.read_table(out + "/frames").to_pylist()


@pytest.mark.parametrize("when", ["before publishing", "after publishing"])
def test_rejected_frames_are_tried_again_and_no_others(when, root, tmp_path):
    run(root, str(tmp_path / "clean"))
    out = str(tmp_path / "out")
    if when == "after publishing":
        run(root, out, reject=("b/4.png",))
    else:
        with pytest.raises(JobFailed):
            run(root, out, reject=("b/4.png",), max_rejected=0)
    assert rejected.retry_rejected(make_plan(root, out), ["crashed"]) == 0
    assert rejected.retry_rejected(make_plan(root, out), ["truncated"]) == 1
    seen: list[str] = []
    run(root, out, seen=seen)
    assert seen == ["000-000003"]
    assert rows_of(out) == [
        # b/4 has no frame before it that counts, and the row of b/5 was there before
        {name: None if is_behind and name.startswith("changed_share") else value for name, value in row.items()}
        for row in rows_of(str(tmp_path / "clean"))
        for is_behind in [row["frame_id"] in ("b/4.png", "b/5.png")]
    ]
    statistics = [pq.read_table(tmp_path / name / "class_statistics.parquet") for name in ("out", "clean")]
    assert statistics[0].equals(statistics[1])


def test_an_unknown_reason_to_retry_is_refused(root, tmp_path):
    run(root, str(tmp_path / "out"))
    with pytest.raises(
        ValueError, match="--retry-rejected is 'crash'; the reasons are .*, out_of_memory; without one, all"
    ):
        rejected.retry_rejected(make_plan(root, str(tmp_path / "out")), ["changed", "crash"])


def test_another_lineage_is_refused_with_the_difference(root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out)
    before = published(out)
    other = plans.Lineage(bundle_digest="cd" * 32, class_set=CLASSES, options={"mask_size": "native", "window": None})
    with pytest.raises(ValueError) as caught:
        make_plan(root, out, lineage=other)
    assert str(caught.value) == (
        f"{out} holds labels of another kind: model is abababababab there and cdcdcdcdcdcd here; --mask-size is model "
        "there and native here; give another --out, or --overwrite"
    )
    assert published(out) == before
    plan = make_plan(root, out, lineage=other, overwrite=True)
    assert len(ledger.pending(plan)) == len(plan.chunks) == 6
    assert not any(path.startswith("frames/") for path in published(out))


def test_a_folder_with_something_else_is_refused_and_never_deleted(root, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(
            ValueError, match=r"holds files that are no output of segment \(thesis.txt\); give another --out$"
        ):
            make_plan(root, str(tmp_path / "out"), overwrite=overwrite)
    assert (tmp_path / "out/thesis.txt").read_text() == "years of work"


def test_chunks_hold_one_drive_and_keys_say_versions_and_options(root, tmp_path):
    plan = make_plan(root, str(tmp_path / "one"))
    assert [chunk.n_rows for chunk in plan.chunks] == [3, 2, 3, 3, 1, 1]
    drives = [set(manifest.read_rows(chunk)["sequence"].to_pylist()) for chunk in plan.chunks]
    assert drives == [{"a"}, {"a"}, {"b"}, {"b"}, {"b"}, {"c"}]
    other = plans.Lineage(bundle_digest="ab" * 32, class_set=CLASSES, options={"mask_size": "native", "window": None})
    keys = {chunk.key for chunk in plan.chunks}
    assert keys.isdisjoint(chunk.key for chunk in make_plan(root, str(tmp_path / "two"), lineage=other).chunks)
    (tmp_path / "log/b/3.png").write_bytes(b"another version")
    changed = [chunk.key for chunk in make_plan(root, str(tmp_path / "three")).chunks]
    assert [key in keys for key in changed] == [True, True, True, False, True, True]


@pytest.mark.parametrize(("pixels", "frames"), [(480 * 640, 96), (8_000_000, 25), (900_000_000, 1)])
def test_large_frames_make_small_chunks(pixels, frames):
    cutting = Cutting(chunk_frames=96, shard_rows=1)
    assert cutting.most_frames(pixels) == frames


def test_a_second_job_is_noticed(tmp_path):
    out = str(tmp_path)
    heartbeats.write(out, "one")
    assert heartbeats.other_job(out, "one") is None
    assert heartbeats.other_job(out, "two") == "one"
    assert heartbeats.other_job(out, "two", within_s=0) is None
    heartbeats.end(out, "one")
    assert heartbeats.other_job(out, "two") is None


def test_a_manifest_of_many_chunks_is_read_by_row_groups(tmp_path):
    root = write_archive(tmp_path / "many", {"long": 2100, "short": 5})
    plan = make_plan(root, str(tmp_path / "out"))
    ids = [i for chunk in plan.chunks for i in manifest.read_rows(chunk)["frame_id"].to_pylist()]
    assert ids == [f"long/{n}.png" for n in range(2100)] + [f"short/{n}.png" for n in range(5)]

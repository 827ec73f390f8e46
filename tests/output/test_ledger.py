from __future__ import annotations

import dataclasses
import io
import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_output import (
    BROKEN,
    CLASS_SET,
    CUTTING,
    FIRST_DRIVES,
    LINEAGE,
    contents,
    flipped,
    label,
    listing,
    make_plan,
    segment,
    work,
)

from unet_ray import storage
from unet_ray.classes import PRESETS
from unet_ray.errors import JobFailed
from unet_ray.frames import MANIFEST_SCHEMA, Listing
from unet_ray.output import heartbeats, ledger, manifest, plans, verify
from unet_ray.output.chunks import Cutting
from unet_ray.output.records import commit
from unet_ray.output.tables import parquet_bytes
from unet_ray.storage import listings


@pytest.fixture(params=["local", "memory"])
def out(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "out")
    else:
        fsspec.filesystem("memory").store.clear()
        yield "memory://bucket/out"


# --- the plan ---


def test_chunks_are_of_one_drive_and_camera_and_shards_of_whole_chunks(out):
    plan = make_plan(out)
    cut = [(chunk.chunk_id, chunk.n_rows, chunk.shard) for chunk in plan.chunks]
    assert cut == [
        ("000-000000", 3, 0),
        ("000-000001", 2, 0),
        ("000-000002", 3, 1),
        ("000-000003", 1, 1),
        ("000-000004", 2, 1),
    ]
    assert (plan.n_frames, plan.n_new, plan.origin.n_changed, plan.origin.n_gone) == (11, 11, 0, 0)
    assert plan.ignored == {".json": 2}
    assert pa.concat_tables([manifest.read_rows(chunk) for chunk in plan.chunks]).equals(listing().table)


def test_a_chunk_holds_fewer_frames_where_they_are_large(out):
    cutting = Cutting(chunk_frames=3, shard_rows=100, frame_pixels=lambda rows: 90, max_chunk_pixels=200)
    assert [chunk.n_rows for chunk in make_plan(out, cutting=cutting).chunks] == [2, 2, 1, 2, 2, 2]


def test_no_frame_is_looked_at_that_is_planned(out):
    seen: list[str] = []

    def look(rows):
        seen.extend(rows["frame_id"].to_pylist())
        return 0

    planned, cutting = make_plan(out), dataclasses.replace(CUTTING, frame_pixels=look)
    assert make_plan(out, cutting=cutting).chunks == planned.chunks
    assert seen == []
    make_plan(out, listing({("a", ""): 5, ("b", "left"): 4, ("b", "right"): 2, ("c", ""): 1}), cutting=cutting)
    assert seen == ["c//0.png"]


def test_a_large_manifest_is_read_by_the_rows_of_a_chunk(out):
    archive = listing({("a", ""): 2_500, ("b", ""): 3})
    plan = make_plan(out, archive, cutting=Cutting(chunk_frames=700, shard_rows=10_000))
    assert [chunk.n_rows for chunk in plan.chunks] == [700, 700, 700, 400, 3]
    assert pa.concat_tables([manifest.read_rows(chunk) for chunk in plan.chunks]).equals(archive.table)


def test_a_chunks_key_depends_on_its_frames_and_on_all_of_the_lineage(tmp_path):
    lineages = [
        LINEAGE,
        plans.Lineage(bundle_digest="cd" * 32, class_set=CLASS_SET, options=LINEAGE.options),
        plans.Lineage(bundle_digest="ab" * 32, class_set=PRESETS["camvid"], options=LINEAGE.options),
        plans.Lineage(bundle_digest="ab" * 32, class_set=CLASS_SET, options={"mask_size": "model", "stride": None}),
        plans.Lineage(bundle_digest="ab" * 32, class_set=CLASS_SET, options=LINEAGE.options, result_version=2),
    ]
    keys = {make_plan(str(tmp_path / f"{n}"), lineage=lineage).chunks[0].key for n, lineage in enumerate(lineages)}
    assert len(keys) == len(lineages)
    changed = make_plan(str(tmp_path / "changed"), listing(versions={"b/left/1.png": "v9"}))
    same = [a.key == b.key for a, b in zip(changed.chunks, make_plan(str(tmp_path / "0")).chunks, strict=True)]
    assert same == [True, True, False, True, True]


def test_a_second_plan_is_the_first_and_other_cutting_options_move_nothing(out):
    first = make_plan(out)
    before = contents(out)
    again = make_plan(out, cutting=Cutting(chunk_frames=2, shard_rows=1), config_yaml="chunk_frames: 2\n")
    assert again.chunks == first.chunks
    assert again.n_new == 0
    assert contents(out) == before


def test_found_frames_are_a_generation_of_their_own(out):
    first = make_plan(out)
    before = contents(out)
    grown = make_plan(out, listing({("a", ""): 7, ("b", "left"): 4, ("b", "right"): 2, ("c", ""): 1}))
    assert grown.chunks[:5] == first.chunks
    assert [(c.chunk_id, c.n_rows, c.shard) for c in grown.chunks[5:]] == [("001-000000", 2, 2), ("001-000001", 1, 2)]
    assert (grown.n_new, grown.n_frames) == (3, 14)
    after = contents(out)
    assert {path: after[path] for path in before} == before


def test_frames_that_changed_or_vanished_keep_their_place_and_are_counted(out):
    first = make_plan(out)
    plan = make_plan(out, listing({("a", ""): 4, ("b", "left"): 4}, versions={"a//0.png": "v7", "b/left/3.png": "v8"}))
    assert plan.chunks == first.chunks
    assert (plan.n_new, plan.origin.n_changed, plan.origin.n_gone) == (0, 2, 3)


def test_a_catalogues_columns_are_carried(out):
    archive = listing()
    weather = pa.array(["rain"] * 11)
    plan = make_plan(out, Listing(table=archive.table.append_column("weather", weather)))
    assert plan.carried.equals(pa.schema([("weather", pa.string())]))
    assert manifest.read_rows(plan.chunks[1]).schema.names == [*MANIFEST_SCHEMA.names, "weather"]


def test_a_catalogue_with_other_columns_cannot_be_appended(out):
    def carrying(name, drives):
        table = listing(drives).table
        return Listing(table=table.append_column(name, pa.array(["rain"] * len(table))))

    make_plan(out, carrying("weather", {("a", ""): 2}))
    before = contents(out)
    with pytest.raises(ValueError, match="own columns are weather string in the output and light string here; give"):
        make_plan(out, carrying("light", {("a", ""): 2, ("b", ""): 1}))
    assert contents(out) == before
    assert make_plan(out, carrying("weather", {("a", ""): 2, ("b", ""): 1})).n_new == 1


def test_frames_that_have_another_id_now_are_not_labelled_once_more(out):
    first = listing({("a", ""): 3}).table
    make_plan(out, Listing(table=first))
    ids = pa.array([f"log/{name}" for name in first["frame_id"].to_pylist()])
    renamed = first.set_column(0, "frame_id", ids)  # as when a second folder is given beside the first
    with pytest.raises(ValueError) as refusal:
        make_plan(out, Listing(table=renamed))
    uri = first["uri"][0].as_py()
    assert str(refusal.value).startswith(
        f"{uri} is planned in {out} as a//0.png and would be labelled once more as log/"
    )
    # An archive of the same name with other frames has places of the same name.
    tar = first.set_column(2, "kind", pa.array(["tar"] * 3))
    other = pa.array([f"other/{name}" for name in first["frame_id"].to_pylist()])
    out = storage.join(out, "tar")
    make_plan(out, Listing(table=tar))
    anew = tar.set_column(0, "frame_id", other).set_column(7, "version", pa.array(["other"] * 3))
    assert anew.column_names == first.column_names
    assert make_plan(out, Listing(table=anew), keep_gone=True).n_new == 3


def test_another_lineage_is_refused_and_the_difference_shown(out):
    make_plan(out)
    before = contents(out)
    other = plans.Lineage(
        bundle_digest="cd" * 32, class_set=PRESETS["camvid"], options={"mask_size": "model", "stride": None}
    )
    with pytest.raises(ValueError) as refusal:
        make_plan(out, lineage=other)
    message = str(refusal.value)
    assert "\n" not in message
    for part in ("abab", "cdcd", "three", "camvid", "--mask-size", "native", "model", "--out", "--overwrite"):
        assert part in message
    assert "--stride" not in message
    assert contents(out) == before


def test_a_lineage_with_tuples_among_its_options_is_that_of_the_next_run_too(out):
    lineage = plans.Lineage(bundle_digest="ab" * 32, class_set=CLASS_SET, options={"window": (32, 48)})
    first = make_plan(out, lineage=lineage)
    assert make_plan(out, lineage=lineage).chunks == first.chunks


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_something_else_is_refused_and_left_alone(out, overwrite):
    storage.write_whole(storage.join(out, "thesis.txt"), b"years of work")
    with pytest.raises(ValueError, match="thesis.txt"):
        make_plan(out, overwrite=overwrite)
    assert contents(out) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_folder_of_a_training_is_refused_and_left_alone(out, overwrite):
    for name, data in (("run.json", b'{"data": "x", "versions": {}}'), ("config.yaml", b"lr: 1\n"), ("model/w", b"1")):
        storage.write_whole(storage.join(out, name), data)
    before = contents(out)
    with pytest.raises(ValueError):
        make_plan(out, overwrite=overwrite)
    assert contents(out) == before


def damage(uri: str, how: str) -> None:
    data = storage.read_bytes(uri)
    position = data.index(b"\n") + 9
    torn = {
        "cut": data[:position],
        "0xff": data[:position] + b"\xff" + data[position + 1 :],
        "bit": flipped(data, position),
    }
    storage.delete(uri)
    if how != "gone":
        storage.write_whole(uri, torn[how])


@pytest.mark.parametrize("how", ["cut", "0xff", "bit", "gone"])
@pytest.mark.parametrize("name", ["_g000.json", "_g001.json"])
def test_a_generation_whose_mark_is_damaged_is_named_and_never_planned_anew(name, how, out):
    grown = listing({**FIRST_DRIVES, ("c", ""): 2})
    segment(out)
    segment(out, grown)
    uri = storage.join(out, "manifest", name)
    damage(uri, how)
    before = contents(out)
    reason = "missing" if how == "gone" else r"damaged \(.*\)"
    for archive in (grown, listing({**FIRST_DRIVES, ("c", ""): 4})):
        with pytest.raises(JobFailed, match=f"^{uri}: {reason}; restore it, or start anew with --overwrite$"):
            make_plan(out, archive)
    assert contents(out) == before
    assert any(f"manifest/{name}: {'missing' if how == 'gone' else 'damaged'}" in line for line in verify.verify(out))
    make_plan(out, grown, overwrite=True)
    segment(out, grown)
    assert verify.verify(out) == []


@pytest.mark.parametrize("when", ["planned", "published"])
@pytest.mark.parametrize("how", ["cut", "0xff", "bit", "gone"])
def test_a_damaged_run_json_is_named(how, when, out):
    make_plan(out) if when == "planned" else segment(out)
    uri = storage.join(out, "run.json")
    damage(uri, how)
    before = contents(out)
    message = f"^{uri}: {'missing' if how == 'gone' else 'damaged .*'}; restore it, or give another --out$"
    for options in ({}, {"overwrite": True}):
        with pytest.raises(JobFailed, match=message):
            make_plan(out, **options)
    if how != "gone":
        with pytest.raises(JobFailed, match=message):
            plans.options_of(out)
    assert contents(out) == before


def test_a_changed_byte_of_the_manifest_plans_no_frame_twice(out):
    """Arrow reads such a file without a word: its pages have no digests."""
    make_plan(out)
    before = contents(out)
    (file,) = (file for file in storage.list_folder(storage.join(out, "manifest")) if file.path.endswith("parquet"))
    table = pq.read_table(io.BytesIO(storage.read_bytes(file.uri)))
    ids = table["frame_id"].to_pylist()
    renamed = table.set_column(0, "frame_id", pa.array([ids[0].replace("0", "8"), *ids[1:]]))
    storage.write_whole(file.uri, parquet_bytes(renamed))
    changed = listing(versions={"b/left/1.png": "v9"})
    with pytest.raises(JobFailed, match="its content is not what was planned.*; restore it, or start anew with"):
        make_plan(out, changed)
    assert make_plan(out).mended == (
        f"manifest/{file.path}",
    )  # the archive is as it was, so the file can be made again
    assert contents(out) == before


def test_overwrite_starts_anew_and_leaves_what_is_not_ours(out):
    segment(out)
    storage.write_whole(storage.join(out, "notes.txt"), b"mine")
    storage.write_whole(storage.join(out, "frames/other.txt"), b"mine too")
    plan = make_plan(
        out, lineage=plans.Lineage(bundle_digest="cd" * 32, class_set=CLASS_SET, options={}), overwrite=True
    )
    assert len(ledger.pending(plan)) == 5
    after = contents(out)
    assert after["notes.txt"] == b"mine"
    assert after["frames/other.txt"] == b"mine too"
    assert not any(path.endswith((".parquet", "summary.json")) and path.startswith(("frames", "s")) for path in after)


def test_what_a_kill_leaves_of_the_very_first_write_does_not_block_the_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / f"{storage.TEMPORARY_PREFIX}0123-run.json").write_bytes(b'{"linea')
    assert make_plan(str(out)).n_new == 11


def test_a_sign_of_life_before_the_plan_does_not_block_the_folder(out):
    heartbeats.write(out, "job-1")
    assert make_plan(out).n_new == 11


def test_two_jobs_that_list_at_once_lose_no_frame(out, monkeypatch):
    """The other job appends its generation at the moment at which this one is about to."""
    make_plan(out)
    mine = listing({**FIRST_DRIVES, ("c", ""): 2, ("d", ""): 1})
    theirs = listing({**FIRST_DRIVES, ("c", ""): 2})
    original = storage.put_if_absent
    calls = []

    def put(uri, data):
        if not calls:
            calls.append(uri)
            with monkeypatch.context() as patch:
                patch.setattr(storage, "put_if_absent", original)
                make_plan(out, theirs)
        return original(uri, data)

    before = len(contents(out))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_if_absent", put)
        plan = make_plan(out, mine)
    assert len(contents(out)) > before
    ids = pa.concat_tables([manifest.read_rows(chunk) for chunk in plan.chunks])["frame_id"].to_pylist()
    assert sorted(ids) == sorted(mine.table["frame_id"].to_pylist())


# --- commits ---


def test_a_chunk_is_done_when_its_record_exists(out):
    plan = make_plan(out)
    chunk = plan.chunks[2]
    record = commit(out, chunk, label(manifest.read_rows(chunk)), writer="job-1")
    assert (record.chunk_id, record.key, record.n_rows) == ("000-000002", chunk.key, 3)
    assert (record.ok, dict(record.rejected), record.writer) == (2, {"truncated": 1}, "job-1")
    part = storage.read_bytes(storage.join(out, "_work", "parts", record.part))
    assert (record.size_bytes, record.sha256) == (len(part), storage.sha256(part))
    assert record.part.startswith(chunk.key)
    assert [c.chunk_id for c in ledger.pending(plan)] == [c.chunk_id for c in plan.chunks if c is not chunk]
    storage.delete(storage.join(out, "_work", "records", f"{chunk.key}.json"))
    assert ledger.pending(plan) == list(plan.chunks)


def test_of_two_records_of_one_chunk_the_first_stands(out):
    plan = make_plan(out)
    chunk = plan.chunks[2]
    rows = manifest.read_rows(chunk)
    first = commit(out, chunk, label(rows), writer="job-1")
    assert commit(out, chunk, label(rows, broken={}), writer="job-2") == first
    assert commit(out, chunk, label(rows), writer="job-2") == first
    assert storage.exists(storage.join(out, "_work", "parts", first.part))
    record = json.loads(storage.read_bytes(storage.join(out, "_work", "records", f"{chunk.key}.json")))
    assert (record["writer"], record["sha256"]) == ("job-1", first.sha256)


def test_the_same_rows_give_the_same_part(tmp_path):
    plans = [make_plan(str(tmp_path / name)) for name in ("x", "y")]
    for plan in plans:
        work(plan)
    x, y = ({p: d for p, d in contents(plan.out).items() if "/parts/" in p} for plan in plans)
    assert len(x) == 5
    assert x == y


def test_a_part_is_plain_parquet(tmp_path):
    plan = make_plan(str(tmp_path / "out"))
    chunk = plan.chunks[2]
    record = commit(plan.out, chunk, label(manifest.read_rows(chunk)), writer="job-1")
    table = pq.read_table(tmp_path / "out" / "_work" / "parts" / record.part)
    assert table["frame_id"].to_pylist() == [f"b/left/{n}.png" for n in range(3)]
    assert table["reason"].to_pylist() == [None, None, BROKEN["b/left/2.png"]]


# --- other jobs ---


def test_files_that_go_while_they_are_listed_are_passed_over(tmp_path, monkeypatch):
    """Another job publishes and clears its work away."""
    for name in "abc":
        storage.write_whole(str(tmp_path / "_work/records" / name), b"1")
    original = listings._local_info

    def look(path, relative):
        (tmp_path / "_work/records/b").unlink(missing_ok=True)
        return original(path, relative)

    monkeypatch.setattr(listings, "_local_info", look)
    assert [file.path for file in storage.list_folder(str(tmp_path / "_work/records"))] == ["a", "c"]


def test_another_jobs_sign_of_life_is_seen_while_it_is_fresh(out):
    make_plan(out)
    heartbeats.write(out, "job-1")
    assert heartbeats.other_job(out, "job-1") is None
    assert "job-1" in heartbeats.other_job(out, "job-2")
    assert heartbeats.other_job(out, "job-2", within_s=-1) is None

"""Outputs that somebody else prepared: no name in them leads out of the output, and no file of the user is touched."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labelled import label, make_plan, published, run, write_archive

from unet_ray import cli, storage
from unet_ray.errors import JobFailed
from unet_ray.output import heartbeats, labels, ledger, plans, publish, verify
from unet_ray.output.records import commit, record_uri
from unet_ray.output.tables import parquet_bytes
from unet_ray.storage.sealed import sealed, unsealed

ENTRY = {"rows": 1, "bytes": 3, "sha256": "0" * 64, "rejected": {}}


@pytest.fixture
def root(tmp_path: Path) -> str:
    return write_archive(tmp_path / "log")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    (tmp_path / "mine.parquet").write_bytes(b"mine")
    return tmp_path / "mine.parquet"


def reseal(path: Path, change) -> None:
    value = unsealed(path.read_bytes())
    change(value)
    path.write_bytes(sealed(value))


PATHS = (
    "frames/../../mine.parquet",
    "../mine.parquet",
    "frames/./part-00000.parquet",
    "frames/mine.parquet",
    "{victim}",
)


@pytest.mark.parametrize("path", PATHS)
def test_verify_writes_nothing_where_a_summary_leads(path, root, victim, tmp_path, capsys):
    out = tmp_path / "out"
    run(root, str(out))
    named = {**ENTRY, "path": path.format(victim=victim)}
    reseal(out / "summary.json", lambda summary: summary["files"].append(named))
    assert cli.main(["verify", str(out)]) == 1
    assert f"{out}/summary.json: missing or damaged" in capsys.readouterr().out
    assert victim.read_bytes() == b"mine" and sorted(os.listdir(tmp_path)) == ["log", "mine.parquet", "out"]
    seen: list[str] = []
    run(root, str(out), seen=seen)
    assert seen == [] and verify.verify(str(out)) == []


@pytest.mark.parametrize("path", PATHS)
def test_a_note_and_the_statistics_lead_nowhere(path, root, victim, tmp_path):
    out = tmp_path / "out"
    run(root, str(out))
    named = {**ENTRY, "path": path.format(victim=victim)}
    (out / "summary.json").unlink()
    table = pq.ParquetFile(out / "class_statistics.parquet").read()
    footer = {ledger.FILES_KEY: sealed({"files": [named]})}
    (out / "class_statistics.parquet").write_bytes(parquet_bytes(table.replace_schema_metadata(footer)))
    (out / "_work/shards").mkdir(parents=True)
    (out / "_work/shards/mine.parquet.json").write_bytes(sealed({"file": named, "n_retries": 0}))
    assert ledger.published_shards(plans.read_plan(str(out))) == {}
    run(root, str(out))
    assert victim.read_bytes() == b"mine" and verify.verify(str(out)) == []


@pytest.mark.parametrize("part", ["../../../mine.parquet", "{victim}", "x.parquet"])
def test_a_record_names_no_part_but_its_own(part, root, victim, tmp_path):
    out = str(tmp_path / "out")
    plan = make_plan(root, out)
    records = [commit(out, chunk, label(chunk), writer="test") for chunk in plan.chunks]
    strange = dataclasses.replace(
        records[0], part=part.format(victim=victim), sha256=storage.sha256(b"mine"), size_bytes=4
    )
    storage.write_whole(record_uri(out, plan.chunks[0].key), sealed(dataclasses.asdict(strange)))
    with pytest.raises(storage.StorageError, match=f"{plan.chunks[0].key}.json is damaged; run the same command again"):
        publish.publish(plan, max_rejected=1)
    assert victim.read_bytes() == b"mine"
    seen: list[str] = []
    run(root, out, seen=seen)
    assert seen == ["000-000000"] and verify.verify(out) == []


def test_a_manifest_names_no_file_but_its_own(root, victim, tmp_path, capsys):
    out = tmp_path / "out"
    run(root, str(out))
    mark = out / "manifest/_g000.json"
    whole = mark.read_bytes()
    reseal(mark, lambda value: value["files"][0].update(path="manifest/../../mine.parquet"))
    assert cli.main(["verify", str(out)]) == 1
    assert f"{mark}: damaged (it names 'manifest/../../mine.parquet'" in capsys.readouterr().out
    mark.write_bytes(whole)
    assert verify.verify(str(out)) == []


@pytest.mark.parametrize(
    ("column", "value"), [("chunk_key", "../../../mine"), ("chunk_id", "../x"), ("shard", -1), ("frame_id", None)]
)
def test_a_chunk_has_a_name_of_ours(column, value, root, victim, tmp_path):
    """Keys become names of files."""
    out = tmp_path / "out"
    make_plan(root, str(out))
    mark = unsealed((out / "manifest/_g000.json").read_bytes())
    (file,) = mark["files"]
    table = pq.ParquetFile(out / file["path"]).read()
    index = table.column_names.index(column)
    if value is None:
        table = table.drop_columns([column])
    else:
        table = table.set_column(index, table.schema.field(column), pa.array([value] * len(table), table[column].type))
    (out / file["path"]).unlink()
    data = parquet_bytes(table)
    path = f"manifest/g000-00000-{storage.sha256(data)[:16]}.parquet"
    (out / path).write_bytes(data)
    mark["files"] = [{**file, "path": path, "bytes": len(data), "sha256": storage.sha256(data)}]
    (out / "manifest/_g000.json").write_bytes(sealed(mark))
    with pytest.raises(JobFailed, match=f"{path}: damaged"):
        plans.read_plan(str(out))


@pytest.mark.parametrize(
    "name", ["summary.json", "frames", "manifest", "_work", "frames/part-00000.parquet", "run.json"]
)
def test_a_link_in_an_output_is_refused(name, root, tmp_path, capsys):
    out = tmp_path / "out"
    run(root, str(out))
    (out / "_work").mkdir()
    (out / name).rename(tmp_path / "elsewhere")
    (out / name).symlink_to(tmp_path / "elsewhere")
    assert cli.main(["verify", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"unet-ray: error: {out / name} is a link; an output of segment has none, so give another --out\n"
    )
    with pytest.raises(ValueError, match="is a link; an output of segment has none"):
        make_plan(root, str(out), overwrite=True)
    (out / name).unlink()
    (tmp_path / "elsewhere").rename(out / name)
    assert verify.verify(str(out)) == []


def test_a_retry_of_rows_that_there_are_not_is_none(root, tmp_path):
    out = tmp_path / "out"
    run(root, str(out), reject=("b/4.png",))
    plan = make_plan(root, str(out))
    for number, rows in enumerate(
        ({"000-000003": [7]}, {"000-000099": [0]}, {"000-000003": [-1]}, {"000-000003": [1, 0]})
    ):
        content = {"lineage": plan.lineage.digest, "rows": rows, "rejected": {}}
        storage.write_whole(str(out / f"_work/retries/{number:03d}.json"), sealed(content))
    assert ledger.pending(plan) == [] and publish.publish(plan, max_rejected=1)["rejected"] == {"truncated": 1}


def test_damage_that_cannot_be_noted_is_named_and_said_to_be_unknown_to_segment(root, tmp_path, capsys):
    """As on a mount to read from only, or a full disk."""
    out = tmp_path / "out"
    run(root, str(out))
    before = published(str(out))
    path = out / "frames/part-00001.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"?")
    (out / "_work").write_text("in the way")
    assert cli.main(["verify", str(out)]) == 1
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("frames/part-00001.parquet: its content is not what was published (sha256 differs); this ")
    assert line.endswith("): verify again where it can, or segment does not know of it")
    (out / "_work").unlink()
    assert cli.main(["verify", str(out)]) == 1
    path.write_bytes(data)  # and a copy of the file is put back: nothing is labelled
    seen: list[str] = []
    run(root, str(out), seen=seen)
    assert seen == [] and published(str(out)) == before


def test_every_damaged_file_is_named_whatever_else_is_unfinished(root, tmp_path, capsys):
    out = tmp_path / "out"
    run(root, str(out))
    write_archive(tmp_path / "log", {"a": 7, "d": 2})
    make_plan(root, str(out))
    frames, statistics = out / "frames/part-00001.parquet", out / "class_statistics.parquet"
    for path in (frames, statistics):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    lines = verify.verify(str(out))
    for path in (frames, statistics):
        assert any(line.startswith(f"{path.relative_to(out)}: its content is not") for line in lines)
    assert "frames/part-00003.parquet: not published yet; run segment again" in lines
    (planned,) = (path for path in (out / "manifest").glob("g000*"))
    whole = planned.read_bytes()
    planned.write_bytes(whole[:100] + b"?" + whole[101:])
    lines = verify.verify(str(out))
    assert planned.name in lines[0] and any(line.startswith("frames/part-00001.parquet") for line in lines[1:])
    seen: list[str] = []
    run(root, str(out), seen=seen)
    assert planned.read_bytes() == whole and verify.verify(str(out)) == []
    assert seen == ["000-000002", "000-000003", "001-000000", "001-000001"]


def test_two_jobs_on_input_that_grew_between_them_end_well(root, tmp_path):
    """The second lists more, and is done with all of it before the first publishes."""
    out = str(tmp_path / "out")
    first = make_plan(root, out)
    for chunk in ledger.pending(first):
        commit(out, chunk, label(chunk), writer="first")
    write_archive(tmp_path / "log", {"a": 7, "d": 2})
    assert run(root, out)["listed"] == 17
    before = published(out)
    with pytest.raises(plans.Grown) as grown:
        publish.publish(first, max_rejected=0)
    assert ledger.pending(grown.value.plan) == []
    assert publish.publish(grown.value.plan, max_rejected=0)["listed"] == 17
    assert published(out) == before and verify.verify(out) == []


def test_what_a_job_of_another_lineage_writes_is_not_believed(root, tmp_path):
    """Its output was overwritten, and it goes on for a moment: its mark, note, file and summary come last."""
    out = str(tmp_path / "out")
    run(root, str(tmp_path / "theirs"))
    lineage = dataclasses.replace(make_plan(root, str(tmp_path / "theirs")).lineage, bundle_digest="cd" * 32)
    plan = make_plan(root, out, lineage=lineage)
    (tmp_path / "out/frames").mkdir()
    theirs = tmp_path / "theirs/frames/part-00000.parquet"
    (file,) = (
        f
        for f in json.loads((tmp_path / "theirs/summary.json").read_text())["files"]
        if f["path"] == "frames/part-00000.parquet"
    )
    storage.write_whole(f"{out}/frames/part-00000.parquet", theirs.read_bytes())
    storage.write_whole(f"{out}/frames/part-00007.parquet", theirs.read_bytes())
    for entry in (file, {name: value for name, value in file.items() if name != "key"}):  # also as old versions note it
        ledger.note(out, entry, 0)
        assert ledger.published_shards(plan) == {} and len(ledger.pending(plan)) == 6
    assert [line.partition(":")[0] for line in verify.verify(out)] == [
        "frames/part-00000.parquet", "frames/part-00007.parquet", f"{out}/summary.json"
    ]  # fmt: skip
    for chunk in ledger.pending(plan):
        assert chunk.kept is None
        commit(out, chunk, label(chunk), writer="ours")
    publish.publish(plan, max_rejected=1)
    assert verify.verify(out) == [] and not storage.exists(f"{out}/frames/part-00007.parquet")
    storage.write_whole(f"{out}/summary.json", (tmp_path / "theirs/summary.json").read_bytes())
    assert verify.verify(out)
    publish.publish(make_plan(root, out, lineage=lineage), max_rejected=1)
    assert verify.verify(out) == []


@pytest.mark.parametrize("format_options", [[], ["--format", "coco"]])
def test_an_export_names_a_damaged_file(format_options, root, tmp_path, capsys):
    out = tmp_path / "out"
    run(root, str(out))
    path = out / "frames/part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-8] + b"12345678")
    target = tmp_path / ("masks.json" if format_options else "masks")
    assert cli.main(["export-masks", str(out), "--out", str(target), *format_options]) == 1
    assert capsys.readouterr().err.startswith(f"unet-ray: error: {path} is damaged (")
    assert not target.is_file()


def run_command(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and the whole of what a command says."""
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


JSON_FILES = (
    *("run.json", "summary.json", "manifest/_g000.json", "_work/shards/part-00000.parquet.json"),
    *("_work/retries/000.json", "_work/jobs/x.json", f"_work/records/{'0' * 32}.json"),
)


@pytest.mark.parametrize("path", JSON_FILES)
def test_brackets_without_end_are_damage(path, root, tmp_path, capsys):
    out = tmp_path / "out"
    run(root, str(out))
    storage.write_whole(str(out / path), b"[" * 200_000 + b"]" * 200_000)
    code, output = run_command(capsys, "verify", str(out))
    assert code in (0, 1) and len(output) < 2_000
    heartbeats.refuse_living(str(out))
    with contextlib.suppress(ValueError, JobFailed):
        run(root, str(out))


MARKS = (
    *({"roots": None}, {"roots": [[1, "a"]]}, {"roots": [["a"]]}, {"roots": {"a": "b"}}),
    *({"frame_pixels": "9"}, {"frame_pixels": True}, {"files": 5}, {"files": {}}, {"last_shard": None}),
    *({"last_shard": 2**31}, {"last_shard": -1}, {"ignored": None}, {"ignored": {"txt": "1"}}),
)


@pytest.mark.parametrize("change", MARKS, ids=str)
def test_a_mark_of_other_types_is_damaged(change, root, tmp_path, capsys):
    out = tmp_path / "out"
    run(root, str(out))
    reseal(out / "manifest/_g000.json", lambda mark: mark.update(change))
    code, output = run_command(capsys, "verify", str(out))
    assert code == 1 and f"{out}/manifest/_g000.json: damaged (" in output
    with pytest.raises(JobFailed, match=r"_g000.json: damaged \("):
        run(root, str(out))


def _without(*keys: str):
    def change(value):
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return change


RUNS = (
    *(_without(key) for key in ("format_version", "recorded", "lineage")),
    *(_without("lineage", key) for key in ("bundle_digest", "class_set", "options", "result_version")),
    _without("lineage", "class_set", "name"),
    *(lambda run, v=v: run["lineage"].update(result_version=v) for v in (1.0, True, "1", None)),
    *(lambda run, v=v: run["lineage"].update(options=v) for v in ([], None, 5)),
    *(lambda run, v=v: run.update(recorded=v) for v in ([], None, 5)),
    lambda run: run["lineage"].update(bundle_digest=None),
    lambda run: run.update(lineage=5),
)


@pytest.mark.parametrize("change", RUNS)
def test_a_run_of_other_types_is_damaged(change, root, tmp_path, capsys):
    out = tmp_path / "out"
    run(root, str(out))
    reseal(out / "run.json", change)
    code, output = run_command(capsys, "verify", str(out))
    assert code == 1 and f"{out}/run.json: damaged (" in output
    with pytest.raises(JobFailed, match=r"run.json: damaged \("):
        run(root, str(out))


def test_options_in_another_order_are_another_lineage(root, tmp_path):
    out = tmp_path / "out"
    run(root, str(out))
    reseal(out / "run.json", lambda run: run["lineage"].update(options={"window": None, "mask_size": "model"}))
    with pytest.raises(ValueError, match="its options stand in another order"):
        run(root, str(out))


def test_an_output_does_not_grow_by_files_without_frames(root, tmp_path):
    out = tmp_path / "out"
    plan = make_plan(root, str(out))
    data = parquet_bytes(pq.read_table(plan.chunks[0].manifest_uri).slice(0, 0))
    path = f"manifest/g001-00000-{storage.sha256(data)[:16]}.parquet"
    (out / path).write_bytes(data)
    mark = unsealed((out / "manifest/_g000.json").read_bytes())
    mark["files"] = [{"path": path, "rows": 0, "bytes": len(data), "sha256": storage.sha256(data)}]
    (out / "manifest/_g001.json").write_bytes(sealed(mark))
    with pytest.raises(JobFailed, match="it has grown by files without frames"):
        plans.require_whole(plan)
    reseal(out / "manifest/_g001.json", lambda mark: mark.update(lineage="another"))
    plans.require_whole(plan)


@pytest.mark.parametrize(
    "change",
    [
        *({"rows": value} for value in (None, [], {"000-000003": 1}, {"000-000003": [1.0]}, {"000-000003": [True]})),
        *({"rejected": value} for value in (None, [], {}, {"000-000003": {"truncated": "1"}}, {"000-000003": None})),
    ],
    ids=str,
)
def test_a_retry_of_other_types_is_none(change, root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out, reject=("b/4.png",))
    plan = make_plan(root, out)
    content = {
        "lineage": plan.lineage.digest,
        "rows": {"000-000003": [1]},
        "rejected": {"000-000003": {"truncated": 1}},
    }
    storage.write_whole(f"{out}/_work/retries/000.json", sealed({**content, **change}))
    assert ledger.pending(plan) == [] and ledger.done_so_far(plan)[0] == 13


@pytest.mark.parametrize(
    "change",
    [{"sha256": None}, {"rejected": {"truncated": "1"}}, {"rejected": None}, {"ok": None}, {"n_rows": 1.0},
     {"size_bytes": "1"}, {"part": 5}],
    ids=str,
)  # fmt: skip
def test_a_record_of_other_types_is_damaged(change, root, tmp_path):
    out = str(tmp_path / "out")
    plan = make_plan(root, out)
    commit(out, plan.chunks[0], label(plan.chunks[0]), writer="test")
    reseal(Path(record_uri(out, plan.chunks[0].key)), lambda record: record.update(change))
    with pytest.raises(storage.StorageError, match="is damaged; run the same command again"):
        ledger.done_so_far(plan)


@pytest.mark.parametrize("count", [None, "1", 1.0, True, -1, []], ids=str)
def test_a_note_and_a_summary_with_other_counts_are_none(count, root, tmp_path):
    out = tmp_path / "out"
    summary = run(root, str(out))
    file = next(file for file in summary["files"] if file["path"].startswith("frames/"))

    def change(value):
        next(f for f in value["files"] if f["path"] == file["path"])["rejected"]["truncated"] = count

    reseal(out / "summary.json", change)
    assert plans.read_summary(str(out)) is None
    plan = plans.read_plan(str(out))
    ledger.note(str(out), {**file, "rejected": {"truncated": count}}, 0)
    assert ledger.read_notes(plan) == []


@pytest.mark.parametrize("column", ["chunk_id", "chunk_key", "shard", "frame_id", "uri", "version", "kind"])
def test_a_null_in_the_manifest_is_damage(column, root, tmp_path, capsys):
    out = tmp_path / "out"
    make_plan(root, str(out))
    mark = unsealed((out / "manifest/_g000.json").read_bytes())
    (file,) = mark["files"]
    table = _set(pq.ParquetFile(out / file["path"]).read(), column, None)
    data = parquet_bytes(table)
    path = f"manifest/g000-00000-{storage.sha256(data)[:16]}.parquet"
    (out / path).write_bytes(data)
    mark["files"] = [{**file, "path": path, "bytes": len(data), "sha256": storage.sha256(data)}]
    (out / "manifest/_g000.json").write_bytes(sealed(mark))
    assert f"{path}: damaged (its column {column} has nulls)" in run_command(capsys, "verify", str(out))[1]


def _set(table: pa.Table, column: str, value, dtype: pa.DataType | None = None) -> pa.Table:
    field = pa.field(column, dtype or table.schema.field(column).type)
    values = pa.array([value] * len(table), field.type)
    return table.set_column(table.column_names.index(column), field, values)


def prepare(out: Path, path: str, table: pa.Table) -> None:
    """Puts a table in place of a published file, with the digest that summary.json says."""
    data = parquet_bytes(table)
    (out / path).write_bytes(data)
    size = {"bytes": len(data), "sha256": storage.sha256(data)}
    reseal(out / "summary.json", lambda value: next(f for f in value["files"] if f["path"] == path).update(size))


PREPARED = (
    *(("frames/part-00000.parquet", column, None) for column in ("frame_id", "status", "mask", "pixels_sky")),
    *(("frames/part-00000.parquet", column, pa.list_(pa.string())) for column in ("reason", "mask", "confidence_sky")),
    ("frames/part-00000.parquet", "mask", pa.binary()),
    ("frames/part-00000.parquet", "mask_encoding", pa.string()),
    ("class_statistics.parquet", "pixels", None),
    ("class_statistics.parquet", "share", pa.string()),
)


@pytest.mark.parametrize(("path", "column", "dtype"), PREPARED, ids=str)
def test_a_published_file_of_other_columns_is_named(path, column, dtype, root, tmp_path, capsys):
    """Without a type the column is missing, else it has nulls of that type."""
    out = tmp_path / "out"
    run(root, str(out))
    before = published(str(out))
    table = pq.ParquetFile(out / path).read()
    prepare(out, path, table.drop_columns([column]) if dtype is None else _set(table, column, None, dtype))
    if path.startswith("frames/") and not column.endswith("_sky"):
        for target in ([str(tmp_path / "masks")], [str(tmp_path / "masks.json"), "--format", "coco"]):
            code, output = run_command(capsys, "export-masks", str(out), "--out", *target)
            needs = dtype is None or column != "mask_encoding"
            assert code == 1 or not needs
            assert output.startswith(f"unet-ray: error: {out / path} is damaged (") and output.count("\n") == 1
    code, output = run_command(capsys, "verify", str(out))
    assert code == 1 and f"{path}: damaged (" in output
    run(root, str(out))
    assert verify.verify(str(out)) == [] and published(str(out)).keys() == before.keys()


@pytest.mark.parametrize("columns", [["pixels"], ["class_name"]])
def test_segment_notes_statistics_that_it_cannot_read(columns, root, tmp_path):
    out = tmp_path / "out"
    run(root, str(out))
    table = pq.ParquetFile(out / "class_statistics.parquet").read()
    prepare(out, "class_statistics.parquet", _set(table, columns[0], [], pa.list_(pa.string())))
    with pytest.raises(storage.StorageError, match=r"class_statistics.parquet is damaged"):
        list(labels.read_columns(str(out), ledger.STATISTICS, columns))
    run(root, str(out))
    assert verify.verify(str(out)) == []


@pytest.mark.parametrize(
    "change",
    [*({"interval_s": value} for value in ("x", None, [], -1, float("nan"), 1e9)), {"time_s": "x"},
     *({"process": value} for value in (None, [], "x", {}, {"pid": "../x"}))],
    ids=str,
)  # fmt: skip
def test_a_sign_of_life_may_say_anything(change, root, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    clock = iter(range(0, 10_000, 5))
    monkeypatch.setattr(heartbeats.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: next(clock))
    heartbeats.write(out, "x")
    path = Path(out, "_work/jobs/x.json")
    sign = {**unsealed(path.read_bytes()), "process": None, **change}
    path.write_bytes(sealed(sign))
    heartbeats.refuse_living(out)
    heartbeats.other_job(out, "y")
    assert next(clock) <= 2 * 60 + 15
    this_process = heartbeats._this_process()
    for process in (
        {name: this_process[name] for name in this_process if name != "pid"},
        {**this_process, "pid": "1\0"},
        {**this_process, "started": 1},
    ):
        assert heartbeats._lives({"process": process}) is None

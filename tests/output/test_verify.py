"""What `verify` finds in an output that was damaged, and that the job then does that again and nothing else."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from labelled import label, make_plan, published, run, write_archive
from small_output import flipped

from unet_ray import cli, storage
from unet_ray.output import heartbeats, ledger, publish, rejected, verify
from unet_ray.output.chunks import Chunk
from unet_ray.output.records import commit, part_uri, read_records, record_uri
from unet_ray.storage.sealed import json_bytes, sealed


@pytest.fixture
def root(tmp_path) -> str:
    return write_archive(tmp_path / "log")


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_found_and_only_that_file_is_done_again(damage, root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out)
    expected = published(out)
    victim = tmp_path / "out/frames/part-00001.parquet"
    data = victim.read_bytes()
    if damage == "flip":
        victim.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif damage == "truncate":
        victim.write_bytes(data[:-9])
    else:
        victim.unlink()
    problem = {
        "flip": "its content is not what was published (sha256 differs)",
        "truncate": f"{len(data) - 9:,} bytes, summary.json says {len(data):,}",
        "delete": "missing",
    }[damage]
    assert verify.verify(out) == [f"frames/part-00001.parquet: {problem}"]
    seen: list[str] = []
    run(root, out, seen=seen)
    assert seen == ["000-000002", "000-000003"]
    assert published(out) == expected


def test_damage_beside_the_frames_is_found_and_mended(root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out)
    expected = published(out)
    (tmp_path / "out/class_statistics.parquet").write_bytes(b"PAR1")
    (tmp_path / "out/frames/part-00009.parquet").write_bytes(b"PAR1")
    problems = verify.verify(out)
    assert problems[0].startswith("class_statistics.parquet: 4 bytes, summary.json says ")
    assert problems[1] == "frames/part-00009.parquet: not in summary.json; its rows would be read twice, delete it"
    (tmp_path / "out/frames/part-00009.parquet").unlink()
    seen: list[str] = []
    run(root, out, seen=seen)
    assert seen == [] and published(out) == expected


PROOFS = ("run.json", "manifest/_g000.json", "summary.json")


@pytest.mark.parametrize("name", PROOFS)
def test_any_flipped_bit_of_what_proves_the_output_is_named(name, root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out, reject=("b/4.png",))
    path = tmp_path / "out" / name
    data = path.read_bytes()
    for position in range(0, len(data), 5):
        path.write_bytes(flipped(data, position, position % 8))
        (problem,) = verify.verify(out)
        assert name in problem and "\n" not in problem, position
    path.write_bytes(data)
    assert verify.verify(out) == []


@pytest.mark.parametrize("after", ["listed", "files", "sha256", '"ok": 1', '"rows": 5', '"sha256": "', '"seal": "'])
def test_a_flipped_bit_of_the_summary_is_mended_and_no_frame_labelled(after, root, tmp_path):
    """Of its keys, its counts and its digests."""
    out = str(tmp_path / "out")
    run(root, out)
    expected = published(out)
    data = expected["summary.json"]
    position = data.index(after.encode()) + len(after) - (not after.endswith('"'))
    (tmp_path / "out/summary.json").write_bytes(flipped(data, position, 1))
    (problem,) = verify.verify(out)
    assert "/summary.json: missing or damaged" in problem
    seen: list[str] = []
    run(root, out, seen=seen)
    assert seen == [] and published(out) == expected


OUTPUT = (*PROOFS, "manifest/g000-00000-*.parquet", "frames/part-00001.parquet", "class_statistics.parquet")


@pytest.mark.parametrize("name", OUTPUT)
@pytest.mark.parametrize("how", ["flip", "0xff", "delete"])
def test_the_command_fails_for_damage_and_names_the_file(how, name, root, tmp_path, capsys):
    out = str(tmp_path / "out")
    run(root, out)
    assert cli.main(["verify", out]) == 0
    assert capsys.readouterr().out == (
        f"{out}: whole: every file and row agrees with its record\nNext: unet-ray export-masks {out} --out …\n"
    )
    (path,) = (tmp_path / "out").glob(name)
    data = path.read_bytes()
    middle = len(data) // 2
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(flipped(data, middle) if how == "flip" else data[:middle] + b"\xff" + data[middle + 1 :])
    assert cli.main(["verify", out]) == 1
    captured = capsys.readouterr()
    assert (
        f"{path.relative_to(out)}: " in captured.out
        and captured.out.endswith(
            f"\n{out}: damaged\nNext: the command that made these labels labels what is damaged again\n"
        )
        and not captured.err
    )


def test_a_folder_that_is_no_output_is_a_wrong_command(tmp_path, capsys):
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"unet-ray: error: {tmp_path} is not an output of segment: run.json is missing\n"


def test_the_command_names_the_first_chunk_whose_record_is_gone(root, tmp_path, capsys):
    out = str(tmp_path / "out")
    plan = make_plan(root, out)
    for chunk in plan.chunks:
        commit(out, chunk, label(chunk), writer="test")
    storage.delete(record_uri(out, plan.chunks[3].key))
    assert cli.main(["verify", out]) == 1
    assert ", 1 of 6 chunks still to be done (first 000-000003, from frame b/3.png on); run" in capsys.readouterr().out


def change_record(out: str, chunk: Chunk, write) -> None:
    """Makes a record tell of frames that were never rejected."""
    (record,) = read_records(out, [chunk.key])
    changed = dataclasses.replace(record, ok=record.ok - 2, rejected={"crashed": 2})
    storage.write_whole(record_uri(out, chunk.key), write(dataclasses.asdict(changed)))


def committed(root, tmp_path):
    """An output whose chunks are all done, and nothing is published: its path and plan."""
    out = str(tmp_path / "out")
    plan = make_plan(root, out)
    for chunk in plan.chunks:
        commit(out, chunk, label(chunk), writer="test")
    return out, plan


def test_a_record_whose_counts_were_changed_is_damaged(root, tmp_path):
    run(root, str(tmp_path / "undisturbed"))
    out, plan = committed(root, tmp_path)
    change_record(out, plan.chunks[1], json_bytes)
    with pytest.raises(storage.StorageError, match=f"{plan.chunks[1].key}.json is damaged; run the same command again"):
        publish.publish(plan, max_rejected=1)
    seen: list[str] = []
    run(root, out, seen=seen)
    assert seen == ["000-000001"] and published(out) == published(str(tmp_path / "undisturbed"))


def test_counts_that_are_not_those_of_the_rows_are_found_and_mended(root, tmp_path):
    """As a mistake of ours would give them, in a record that is whole."""
    run(root, str(tmp_path / "undisturbed"))
    out, plan = committed(root, tmp_path)
    change_record(out, plan.chunks[1], sealed)
    assert publish.publish(plan, max_rejected=1)["rejected"] == {"crashed": 2}
    assert verify.verify(out) == ["frames/part-00000.parquet: its rows are 5 ok; summary.json says 2 crashed, 3 ok"]
    seen: list[str] = []
    run(root, out, seen=seen)
    assert seen == ["000-000000", "000-000001"] and published(out) == published(str(tmp_path / "undisturbed"))


def test_sums_that_are_not_those_of_the_files_are_found(root, tmp_path):
    out = str(tmp_path / "out")
    summary = run(root, out, reject=("b/4.png",))
    wrong = {**summary, "ok": 11, "rejected": {"truncated": 2}}
    storage.write_whole(storage.join(out, "summary.json"), sealed(wrong))
    assert verify.verify(out) == [
        "summary.json: 13 frames listed, 11 ok, {'truncated': 2} rejected; the manifest lists 13, and of 13 rows "
        "{'truncated': 1} are rejected"
    ]


def test_what_another_job_writes_while_the_work_goes_does_no_harm(root, tmp_path, monkeypatch):
    run(root, str(tmp_path / "undisturbed"))
    out = str(tmp_path / "out")
    original = os.rmdir

    def late(path, **options):
        if str(path).endswith("_work"):
            heartbeats.write(out, "another-job")
        return original(path, **options)

    monkeypatch.setattr(os, "rmdir", late)
    assert run(root, out)["listed"] == 13
    monkeypatch.undo()
    assert storage.exists(storage.join(out, "_work/jobs/another-job.json"))
    assert verify.verify(out) == []
    run(root, out)
    assert published(out) == published(str(tmp_path / "undisturbed"))


@pytest.mark.parametrize("damage", [None, b"", b'{"listed": '])
def test_a_lost_summary_is_written_again_and_no_frame_is_labelled(damage, root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out)
    expected = published(out)
    summary = tmp_path / "out/summary.json"
    summary.unlink() if damage is None else summary.write_bytes(damage)
    (line,) = verify.verify(out)
    assert ", 0 of 6 chunks still to be done; " in line
    seen: list[str] = []
    run(root, out, seen=seen)
    assert seen == [] and published(out) == expected and verify.verify(out) == []


def test_with_the_statistics_lost_too_all_is_done_again(root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out)
    expected = published(out)
    (tmp_path / "out/summary.json").unlink()
    (tmp_path / "out/class_statistics.parquet").write_bytes(b"PAR1 and no more")
    seen: list[str] = []
    run(root, out, seen=seen)
    assert len(seen) == 6 and published(out) == expected


def test_an_unfinished_output_says_what_is_missing(root, tmp_path):
    out = str(tmp_path / "out")
    plan = make_plan(root, out)
    commit(out, plan.chunks[0], label(plan.chunks[0]), writer="test")
    assert verify.verify(out) == [
        f"{out}/summary.json: missing or damaged: the output is not finished, 5 of 6 chunks still to be done "
        "(first 000-000001, from frame a/3.png on); run segment again"
    ]


def test_a_deleted_record_or_part_costs_its_chunk_and_no_other(root, tmp_path):
    out = str(tmp_path / "out")
    plan = make_plan(root, out)
    records = [commit(out, chunk, label(chunk), writer="test") for chunk in plan.chunks]
    storage.delete(record_uri(out, plan.chunks[1].key))
    assert [chunk.chunk_id for chunk in ledger.pending(plan)] == ["000-000001"]
    commit(out, plan.chunks[1], label(plan.chunks[1]), writer="test")
    storage.delete(part_uri(out, records[3].part))
    with pytest.raises(storage.StorageError, match="are gone; run the same command again: their frames are done anew"):
        publish.publish(plan, max_rejected=0)
    assert [chunk.chunk_id for chunk in ledger.pending(plan)] == ["000-000003"]


def test_a_retry_of_a_damaged_file_does_it_again_whole(root, tmp_path):
    run(root, str(tmp_path / "clean"))
    out = str(tmp_path / "out")
    run(root, out, reject=("b/4.png",))
    (file,) = (
        file for file in Path(out, "frames").iterdir() if "b/4.png" in pq.read_table(file)["frame_id"].to_pylist()
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert rejected.retry_rejected(make_plan(root, out)) == 1
    seen: list[str] = []
    run(root, out, seen=seen)
    assert {"000-000003"} < set(seen)
    assert published(out) == published(str(tmp_path / "clean")) and verify.verify(out) == []


# --- what is none of the output, and what names the run ---

TWICE = "not in summary.json; its rows would be read twice, delete it"
UNFINISHED = "was never finished, or is being written; run segment again, and delete it if it stays"
PLANNED = "of no generation of the plan; run segment again, and delete it if it stays"
STRANGERS = {
    "frames/part-00009.parquet": (TWICE, True),
    "frames/sub/mine.parquet": (TWICE, True),
    "frames/.tmp-0123456789ab": (UNFINISHED, True),
    "frames/.tmp-mine.parquet": (UNFINISHED, False),
    "manifest/.tmp-0123456789ab": (UNFINISHED, True),
    "manifest/g000-00001-0123456789abcdef.parquet": (PLANNED, True),
    "manifest/copy.parquet": (PLANNED, False),
}
"""What is said of each, and whether `segment` takes it away."""


@pytest.mark.parametrize("path", STRANGERS)
def test_a_stranger_in_frames_or_manifest_is_named(path, root, tmp_path):
    out = tmp_path / "out"
    run(root, str(out))
    (out / path).parent.mkdir(exist_ok=True)
    source = next((out / path.partition("/")[0]).glob("*.parquet"))
    (out / path).write_bytes(source.read_bytes())
    why, goes = STRANGERS[path]
    assert verify.verify(str(out)) == [f"{path}: {why}"]
    expected = {name: data for name, data in published(str(out)).items() if name != path}
    run(root, str(out))
    assert {name: data for name, data in published(str(out)).items() if name != path} == expected
    assert verify.verify(str(out)) == ([] if goes else [f"{path}: {why}"])


def test_a_stranger_in_an_unfinished_output_is_named_too(root, tmp_path):
    out = tmp_path / "out"
    make_plan(root, str(out))
    (out / "manifest" / "g007-00000-0123456789abcdef.parquet").write_bytes(b"PAR1")
    first, second = verify.verify(str(out))
    assert first.startswith("manifest/g007-00000-0123456789abcdef.parquet: of no generation of the plan; ")
    assert "the output is not finished" in second


@pytest.mark.parametrize("damage", [b"frames: elsewhere\n", b"", None])
def test_a_changed_configuration_is_named_and_written_again(damage, root, tmp_path):
    out = tmp_path / "out"
    run(root, str(out))
    expected = published(str(out))
    file = out / "config.yaml"
    file.unlink() if damage is None else file.write_bytes(damage)
    why = "missing" if damage is None else "its content is not what was published"
    assert verify.verify(str(out)) == [f"config.yaml: {why}; run segment again"]
    seen: list[str] = []
    run(root, str(out), seen=seen)
    assert seen == [] and published(str(out)) == expected and verify.verify(str(out)) == []


def test_a_configuration_of_other_words_is_sealed_anew(root, tmp_path):
    """Whoever mends an output may do so with other options, of those that change no label."""
    out = str(tmp_path / "out")
    run(root, out)
    (tmp_path / "out" / "config.yaml").write_bytes(b"")
    plan = make_plan(root, out, config_yaml="frames: log\nactors: 2\n")
    assert publish.finished_summary(plan) is None
    publish.publish(plan, max_rejected=1)
    assert verify.verify(out) == [] and b"actors: 2" in (tmp_path / "out" / "config.yaml").read_bytes()


def test_changed_figures_are_named_and_only_they_are_written_again(root, tmp_path):
    out = str(tmp_path / "out")
    plan = make_plan(root, out)
    for chunk in plan.chunks:
        commit(out, chunk, label(chunk), writer="test")
    publish.publish(plan, max_rejected=1, figures={"frames_per_s": 12.5})
    file = tmp_path / "out" / "summary.json"
    assert verify.verify(out) == [] and b'"frames_per_s": 12.5' in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(b"12.5", b"99.5"))
    assert verify.verify(out) == ["summary.json: its figures are not what was published; run segment again"]
    seen: list[str] = []
    run(root, out, seen=seen)
    assert seen == [] and verify.verify(out) == []


def test_an_output_of_a_version_without_that_digest_is_whole(root, tmp_path):
    out = str(tmp_path / "out")
    summary = run(root, out)
    summary = {name: value for name, value in summary.items() if name != "figures_are_sealed"}
    older = {**summary, "figures": {"frames_per_s": 3.5}}
    storage.write_whole(storage.join(out, "summary.json"), sealed(older))
    (tmp_path / "out" / "config.yaml").write_bytes(b"another: 1\n")
    assert verify.verify(out) == []
    before = published(out)
    run(root, out)
    assert published(out) == before


@pytest.mark.parametrize("name", ["preview.png", "report.html"])
def test_a_preview_and_a_page_are_none_of_what_is_proved(name, root, tmp_path):
    out = tmp_path / "out"
    run(root, str(out))
    for data in (b"", b"no picture"):
        (out / name).write_bytes(data)
        assert verify.verify(str(out)) == []

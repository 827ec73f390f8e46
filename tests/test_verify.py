"""What `verify` finds in an output that was damaged, and that the job then does that again and nothing else."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from labelled import label, make_plan, published, run, write_archive

from unet_ray import ledger, publish, storage


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
    said = {
        "flip": "its content is not what was published (sha256 differs)",
        "truncate": f"{len(data) - 9:,} bytes, summary.json says {len(data):,}",
        "delete": "missing",
    }[damage]
    assert publish.verify(out) == [f"frames/part-00001.parquet: {said}"]
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
    problems = publish.verify(out)
    assert problems[0].startswith("class_statistics.parquet: 4 bytes, summary.json says ")
    assert problems[1] == "frames/part-00009.parquet: not in summary.json; its rows would be read twice, delete it"
    (tmp_path / "out/frames/part-00009.parquet").unlink()
    seen: list[str] = []
    run(root, out, seen=seen)
    assert seen == [] and published(out) == expected


@pytest.mark.parametrize("damage", [None, b"", b'{"listed": '])
def test_a_lost_summary_is_written_again_and_no_frame_is_labelled(damage, root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out)
    expected = published(out)
    summary = tmp_path / "out/summary.json"
    summary.unlink() if damage is None else summary.write_bytes(damage)
    (line,) = publish.verify(out)
    assert ", 0 of 6 chunks are to be done; " in line
    seen: list[str] = []
    run(root, out, seen=seen)
    assert seen == [] and published(out) == expected and publish.verify(out) == []


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
    ledger.commit(out, plan.chunks[0], label(plan.chunks[0]), writer="test")
    assert publish.verify(out) == [
        f"{out}/summary.json: missing or damaged: the output is not finished, 5 of 6 chunks are to be done; "
        "run segment again"
    ]


def test_a_deleted_record_or_part_costs_its_chunk_and_no_other(root, tmp_path):
    out = str(tmp_path / "out")
    plan = make_plan(root, out)
    receipts = [ledger.commit(out, chunk, label(chunk), writer="test") for chunk in plan.chunks]
    storage.delete(ledger.record_uri(out, plan.chunks[1].key))
    assert [chunk.chunk_id for chunk in ledger.pending(plan)] == ["000-000001"]
    ledger.commit(out, plan.chunks[1], label(plan.chunks[1]), writer="test")
    storage.delete(ledger.part_uri(out, receipts[3].part))
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
    assert publish.retry_rejected(make_plan(root, out), "truncated") == 1
    seen: list[str] = []
    run(root, out, seen=seen)
    assert {"000-000003"} < set(seen)
    assert published(out) == published(str(tmp_path / "clean")) and publish.verify(out) == []

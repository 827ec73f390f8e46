"""What becomes of a chunk whose model actor has trouble; and of what Ray gives up."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pyarrow as pa
import pytest
import ray

from unet_ray import storage
from unet_ray.chaos import trials
from unet_ray.classes import PRESETS
from unet_ray.cluster import tasks
from unet_ray.errors import JobFailed, TryAgain
from unet_ray.frames import MANIFEST_SCHEMA
from unet_ray.labelling import stages, waves
from unet_ray.labelling import work as labelling
from unet_ray.labelling.decoding import DecodeOptions
from unet_ray.model import devices
from unet_ray.model.bundle import read_bundle
from unet_ray.output.ledger import Chunk

CHUNK = Chunk(chunk_id="000-000000", key="k", manifest_uri="m", row_start=0, n_rows=1, shard=0)
LABELER = {
    **{"precision": "float32", "batch_size": 2, "mask_size": "model", "tiling": None, "tta": None},
    **{"device": "cpu", "n_threads": 1},
}


def decoded() -> pa.Table:
    """A chunk of one rejected frame, after decoding."""
    columns = dict.fromkeys(("_trouble", "_image", "_height_px", "_width_px"), None)
    row = {"frame_id": "0.png", "_chunk": json.dumps({}), "_reason": "missing", "_error": "gone", **columns}
    return pa.Table.from_pylist([row])


def test_an_actor_whose_store_is_away_says_so_chunk_by_chunk_and_starts_when_it_is_back(tmp_path, monkeypatch):
    model = trials.Stage(tmp_path / "stage", trials.SIZES["small"]).model
    digest = read_bundle(str(model)).digest

    def away(uri: str) -> None:
        raise storage.StorageError(5, "no answer; trying again may help", uri)

    monkeypatch.setattr(devices, "configure_tensorflow", lambda *arguments, **options: None)  # this process has begun
    with monkeypatch.context() as patch:
        patch.setattr(waves, "read_bundle", away)
        actor = waves._ModelActor(str(model), digest, LABELER, (24, 32))
        (row,) = actor(decoded()).to_pylist()
        assert row["_trouble"] == f"[Errno 5] no answer; trying again may help: '{model}'" and row["_kind"] == "storage"
    assert "_mask" in actor(decoded()).column_names
    other = waves._ModelActor(str(model), "another digest", LABELER, (24, 32))
    assert "the model has changed since this job began" in other(decoded())["_trouble"][0].as_py()


def test_a_frame_that_nobody_may_read_fails_the_job_and_is_not_tried_for_ever(monkeypatch):
    def refuse(rows: pa.Table) -> None:
        raise PermissionError(13, "Permission denied", "/log/0.png")

    monkeypatch.setattr(stages, "read_rows", lambda chunk: pa.table({"frame_id": ["0.png"]}))
    monkeypatch.setattr(stages, "read_frames", refuse)
    options = DecodeOptions(network_size=(24, 32), max_pixels=10_000, timeout_s=10)
    (row,) = stages.decode_chunks([CHUNK], options).to_pylist()
    assert row["_kind"] == "refused"
    tally = labelling._Tally(1, 0.0)
    tally.troubles = {"failed": "no", "storage": "no answer", row["_kind"]: row["_trouble"]}
    error = tally.trouble_error("1 chunks are not done")
    assert isinstance(error, JobFailed) and "'/log/0.png'; give this job the right to it" in str(error)
    del tally.troubles["refused"]
    assert isinstance(tally.trouble_error("1 chunks are not done"), storage.StorageError)


@pytest.mark.parametrize("step", ["decode", "label", "write"])
def test_a_step_that_fails_says_what_and_where(step, monkeypatch):
    """Ray would drop the block of a task that raises, and who had a batch too large for a GPU would not learn of it."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("OOM when allocating\n" + 1000 * "x ")

    monkeypatch.setattr(stages, "read_rows", fail)
    monkeypatch.setattr(stages, "label_chunks", fail)
    monkeypatch.setattr(stages, "chunk_labels", fail)
    if step == "decode":
        table = stages.decode_chunks([CHUNK], DecodeOptions(network_size=None, max_pixels=1, timeout_s=1))
    elif step == "label":
        monkeypatch.setattr(waves, "_load_labeler", lambda *arguments: None)
        table = waves._ModelActor("model", "digest", LABELER, None)(decoded())
    else:
        labelled = decoded().set_column(1, "_chunk", pa.array([json.dumps(dataclasses.asdict(CHUNK))]))
        table = stages.write_chunks(labelled, "out", PRESETS["camvid"], "raw", "me")
        table = table.rename_columns({"trouble": "_trouble", "kind": "_kind"})
    (row,) = table.to_pylist()
    assert re.fullmatch(
        r"RuntimeError in labelling/(stages|waves)\.py:\d+: OOM when allocating( x)+ …", row["_trouble"]
    )
    assert row["_kind"] == "failed" and len(row["_trouble"]) < 400
    tally = labelling._Tally(1, 0.0)
    tally.troubles[row["_kind"]] = row["_trouble"]
    error = tally.trouble_error("1 chunks are not done")
    assert isinstance(error, JobFailed) and str(error).endswith("; once it is mended, the same command goes on")


def test_chunks_that_share_a_task_are_written_apart_and_have_their_trouble_together(tmp_path, monkeypatch):
    first = dataclasses.replace(CHUNK, n_rows=2)
    chunks = [first, dataclasses.replace(CHUNK, chunk_id="000-000001", key="l", row_start=2)]
    written: list[tuple[str, list[str]]] = []

    def commit(out, chunk, table, *, writer):
        if chunk.key == "l" and not written[1:]:
            written.append((chunk.key, []))
            raise PermissionError(13, "Permission denied", "parts/l")
        written.append((chunk.key, table["frame_id"].to_pylist()))
        return SimpleNamespace(rejected={"missing": chunk.n_rows})

    def rows(chunk):
        missing = [dict.fromkeys(MANIFEST_SCHEMA.names) | {"frame_id": f"{chunk.key}{n}"} for n in range(chunk.n_rows)]
        return pa.Table.from_pylist(missing, MANIFEST_SCHEMA)

    monkeypatch.setattr(stages, "read_rows", rows)
    monkeypatch.setattr(stages.ledger, "commit", commit)
    gone = stages.FrameGone("missing", "it is not there")
    monkeypatch.setattr(stages, "read_frames", lambda rows: [gone] * len(rows))
    options = DecodeOptions(network_size=(24, 32), max_pixels=10_000, timeout_s=10)
    decoded = stages.decode_chunks(chunks, options)
    labelled = stages.label_chunks(decoded, None, (24, 32))
    receipts = stages.write_chunks(labelled, "out", PRESETS["camvid"], "raw", "me").to_pylist()
    assert [(row["chunk_id"], row["n_rows"], row["kind"]) for row in receipts] == [
        ("000-000000", 2, None),
        ("000-000001", 1, "refused"),
    ]
    assert receipts[0]["rejected"] == '{"missing": 2}' and "Permission denied" in receipts[1]["trouble"]
    assert written == [("k", ["k0", "k1"]), ("l", [])]
    troubled = stages.with_trouble(decoded, storage.StorageError(5, "no answer", "out"))
    receipts = stages.write_chunks(troubled, "out", PRESETS["camvid"], "raw", "me").to_pylist()
    assert [row["chunk_id"] for row in receipts] == ["000-000000", "000-000001"]
    assert all("no answer" in row["trouble"] for row in receipts)


@pytest.mark.timeout(300)
def test_what_ray_gives_up_may_be_tried_again():
    def die(_: int) -> None:
        import os

        os._exit(1)

    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(
            TryAgain, match=r"^Ray gave up work that it had begun \(WorkerCrashedError: .*; the same comman"
        ):
            list(tasks.map_on_cluster(die, [1]))
    finally:
        ray.shutdown()


def test_a_network_that_did_not_load_at_first_is_loaded_once_for_all_blocks_of_its_actor(monkeypatch):
    asked, loads = threading.Barrier(2), []

    def load(*_):
        loads.append(len(loads))
        if len(loads) == 1:
            raise OSError("the store does not answer")
        return "network"

    def label(table, labeler, network_size):
        asked.wait(60)  # both blocks are here at once
        return [table, labeler]

    monkeypatch.setattr(waves, "_load_labeler", load)
    monkeypatch.setattr(stages, "label_chunks", label)
    actor = waves._ModelActor("model", "digest", {}, None)
    with ThreadPoolExecutor(waves.BLOCKS_AT_ONCE) as pool:
        assert list(pool.map(actor, ["first", "second"])) == [["first", "network"], ["second", "network"]]
    assert loads == [0, 1]

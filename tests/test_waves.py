"""What becomes of a chunk whose model actor has trouble; and of what Ray gives up."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
import ray

from unet_ray import cluster, inference, segmentation, stages, storage, trials, waves
from unet_ray.bundle import read_bundle
from unet_ray.config import SegmentConfig
from unet_ray.decoding import DecodeOptions
from unet_ray.endings import JobFailed, NotNow
from unet_ray.ledger import Chunk

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

    monkeypatch.setattr(inference, "configure_tensorflow", lambda device, n_threads: None)  # this process has begun
    with monkeypatch.context() as patch:
        patch.setattr(waves, "read_bundle", away)
        actor = waves._ModelActor(str(model), digest, LABELER, (24, 32))
        (row,) = actor(decoded()).to_pylist()
        assert row["_trouble"] == f"[Errno 5] no answer; trying again may help: '{model}'" and not row["_refused"]
    assert "_mask" in actor(decoded()).column_names
    other = waves._ModelActor(str(model), "another digest", LABELER, (24, 32))
    assert "the model has changed since this job began" in other(decoded())["_trouble"][0].as_py()


def test_a_frame_that_nobody_may_read_fails_the_job_and_is_not_tried_for_ever(monkeypatch):
    def refuse(rows: pa.Table) -> None:
        raise PermissionError(13, "Permission denied", "/log/0.png")

    monkeypatch.setattr(stages.ledger, "read_rows", lambda chunk: pa.table({"frame_id": ["0.png"]}))
    monkeypatch.setattr(stages, "read_frames", refuse)
    options = DecodeOptions(network_size=(24, 32), max_pixels=10_000, timeout_s=10)
    (row,) = stages.decode_chunk(CHUNK, options).to_pylist()
    assert row["_refused"]
    tally = segmentation._Tally(1, 0.0)
    tally.trouble, tally.is_refused = row["_trouble"], row["_refused"]
    error = tally.trouble_error("1 chunks are not done")
    assert isinstance(error, JobFailed) and "'/log/0.png'; give this job the right to it" in str(error)
    tally.is_refused = False
    assert isinstance(tally.trouble_error("1 chunks are not done"), storage.StorageError)


def config(**options) -> SegmentConfig:
    return SegmentConfig(model="m", frames=("f",), out="o", **options)


def test_actors_leave_room_for_the_tasks_that_feed_them(monkeypatch):
    def on(nodes, device, **options):
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
        allocation = waves.allocate(config(**options), device)
        return allocation, cluster._fits(allocation.bundles())

    two = {"CPU": 2.0}
    for options in ({}, {"cpus_per_actor": 2}, {"actors": "2"}, {"actors": "2", "cpus_per_actor": 1}):
        allocation, fits = on([two], "cpu", **options)
        assert fits and allocation.actors[0] * allocation.actor_cpus + allocation.decode_cpus + waves.WRITE_CPUS <= 2
    assert not on([two], "cpu", cpus_per_actor=3)[1]
    allocation, fits = on([two, {"CPU": 8.0}], "cpu")
    assert fits and allocation.actors == (2, 2) and allocation.threads == 2
    allocation, fits = on([{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}], "gpu")
    assert fits and (allocation.actors, allocation.actor_cpus, allocation.actor_gpus) == ((1, 1), 1, 1)
    assert not on([{"CPU": 1.0, "GPU": 1.0}], "gpu")[1]  # nothing would decode
    assert on([{"CPU": 1.0, "GPU": 1.0}, {"CPU": 2.0}], "gpu")[1]


@pytest.mark.timeout(300)
def test_what_ray_gives_up_may_be_tried_again():
    def die(_: int) -> None:
        import os

        os._exit(1)

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(
            NotNow, match=r"^Ray gave up work that it had begun \(WorkerCrashedError: .*; the same comman"
        ):
            list(waves.map_on_cluster(die, [1]))
    finally:
        ray.shutdown()

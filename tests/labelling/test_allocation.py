"""Who reserves what of a cluster, and which chunks share tasks; no Ray is started."""

from __future__ import annotations

import dataclasses

from unet_ray.cluster import resources
from unet_ray.config import SegmentConfig
from unet_ray.labelling import allocation
from unet_ray.output.ledger import Chunk

CHUNK = Chunk(chunk_id="000-000000", key="k", manifest_uri="m", row_start=0, n_rows=1, shard=0)


def test_small_chunks_share_tasks_where_there_are_enough_of_them():
    def shared(sizes, most_frames=96, n_actors=1):
        chunks = [dataclasses.replace(CHUNK, row_start=index, n_rows=size) for index, size in enumerate(sizes)]
        blocks = allocation.share_tasks(chunks, most_frames, n_actors)
        assert [chunk for block in blocks for chunk in block] == chunks
        return [[chunk.n_rows for chunk in block] for block in blocks]

    assert shared([]) == []
    assert shared([1] * 24) == [[1]] * 24
    assert shared([1] * 40) == [[1, 1]] * 20
    assert shared([1] * 40, n_actors=2) == [[1]] * 40
    assert shared([1] * 2000)[:2] == [[1] * 96] * 2
    assert shared([1] * 2000, most_frames=10) == [[1] * 10] * 200
    assert shared([96] * 40, most_frames=allocation.TASK_FRAMES) == [[96, 96]] * 20
    assert shared([96, 96, 40, 40, 40, 96, 200, 1] * 5)[:6] == [[96], [96], [40, 40], [40], [96], [200]]


def test_tasks_that_feed_a_gpu_have_a_batch_of_frames():
    def shared(sizes, most_frames, batch_frames):
        chunks = [dataclasses.replace(CHUNK, row_start=index, n_rows=size) for index, size in enumerate(sizes)]
        blocks = allocation.share_tasks(chunks, most_frames, 4, batch_frames=batch_frames)
        assert [chunk for block in blocks for chunk in block] == chunks
        return [sum(chunk.n_rows for chunk in block) for block in blocks]

    assert shared([96] * 10, 256, 256) == [288, 288, 288, 96]
    assert shared([96] * 10, 192, 32) == [96] * 10  # all four actors get something
    assert shared([1] * 70, 192, 32) == [32, 32, 6]
    assert shared([300, 5, 300], 256, 256) == [300, 305]


def config(**options) -> SegmentConfig:
    return SegmentConfig(model="m", frames=("f",), out="o", **options)


def test_actors_leave_room_for_the_tasks_that_feed_them():
    def on(nodes, device, **options):
        shares = allocation.share_out(nodes, config(**options), device)
        return shares, resources.fits(nodes, shares.bundles())

    two = {"CPU": 2.0}
    for options in ({}, {"cpus_per_actor": 2}, {"actors": "2"}, {"actors": "2", "cpus_per_actor": 1}):
        shares, fits = on([two], "cpu", **options)
        assert fits and shares.actors[0] * shares.actor_cpus + shares.decode_cpus + allocation.WRITE_CPUS <= 2
    assert not on([two], "cpu", cpus_per_actor=3)[1]
    shares, fits = on([two, {"CPU": 8.0}], "cpu")
    assert fits and shares.actors == (2, 2) and shares.threads == 2
    shares, fits = on([{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}], "gpu")
    assert fits and (shares.actors, shares.actor_cpus, shares.actor_gpus) == ((1, 1), 1, 1)
    shares, fits = on([{"CPU": 2.0, "GPU": 1.0}], "gpu", actors_per_gpu=2)
    assert fits and (shares.actors, shares.actor_gpus, shares.actor_cpus) == ((2, 2), 0.5, 0.47)
    for per_gpu in range(1, 17):  # shares add up to a whole GPU, and no more
        shares, fits = on([{"CPU": 32.0, "GPU": 2.0}], "gpu", actors_per_gpu=per_gpu)
        assert fits and shares.actors == (2 * per_gpu, 2 * per_gpu) and shares.actor_gpus * per_gpu <= 1
    two_gpus = {"CPU": 16.0, "GPU": 2.0}
    for actors, expected in {"1": (1, 1), "1:9": (4, 9), "1:3": (3, 3), "6:9": (6, 9)}.items():
        shares, _ = on([two_gpus], "gpu", actors_per_gpu=2, actors=actors)
        assert shares.actors == expected
    assert on([two_gpus], "gpu", actors="1:9")[0].actors == (1, 9)  # Ray gives each a GPU of its own
    assert on([{"CPU": 8.0}], "gpu", actors_per_gpu=3)[0].actors == (3, 3)  # the GPU is yet to come
    assert not on([{"CPU": 1.0, "GPU": 1.0}], "gpu")[1]  # nothing would decode
    assert on([{"CPU": 1.0, "GPU": 1.0}, {"CPU": 2.0}], "gpu")[1]

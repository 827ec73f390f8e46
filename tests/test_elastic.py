"""`--workers MIN:MAX` on a cluster of real nodes: one is killed, another comes, and the result is the same training."""

from __future__ import annotations

import dataclasses
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from test_training import final_weights, make_config, write_data

from unet_ray import training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    return root


@pytest.fixture
def cluster(monkeypatch):
    """A head where no worker has room, and two nodes with a CPU each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


class Gated:
    """Frames of which each worker reads 28, two epochs alone or four with another, until the gate is opened."""

    def __init__(self, frames, gate: Path):
        self.frames, self.gate, self.n_reads = frames, gate, 0

    @property
    def names(self):
        return self.frames.names

    def open(self):
        self.reader = self.frames.open()
        return self

    def read(self, index: int):
        self.n_reads += 1
        while self.n_reads > 28 and not self.gate.exists():
            time.sleep(0.01)
        return self.reader.read(index)


def norm_of_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    return max(float(np.linalg.norm(one[name] - other[name]) / np.linalg.norm(one[name])) for name in one)


@pytest.mark.timeout(400)
def test_a_group_shrinks_when_a_node_is_killed_and_grows_when_one_comes(cluster, data, tmp_path, monkeypatch, capsys):
    """The batch is that of all workers together, so their number changes neither it nor the learning rate."""
    cluster, nodes = cluster
    options = {"dropout": 0.0, "epochs": 20, "learning_rate": 1e-3}
    heard: list[str] = []

    def wait_for_line(line: str, timeout_s: float = 180) -> None:
        deadline = time.monotonic() + timeout_s
        while line not in "".join(heard):
            assert time.monotonic() < deadline and not run.done(), "".join(heard)
            heard.append(capsys.readouterr().out)
            time.sleep(0.01)

    training.connect()
    prepare = training._prepare

    def prepare_gated(*arguments):
        task, hashes = prepare(*arguments)
        return dataclasses.replace(task, train=Gated(task.train, tmp_path / "gate")), hashes

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patch:  # Ray starts a node in the main thread only
        patch.setattr(training, "RESIZE_INTERVAL_S", 1.0)
        patch.setattr(training, "_prepare", prepare_gated)
        run = pool.submit(training.train, make_config(data, tmp_path / "run", workers="1:2", **options))
        wait_for_line("epoch  2/20")
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait_for_line("a worker was lost; the group has started again with 1")
        cluster.add_node(num_cpus=1)
        wait_for_line("there is room for more workers; the group has started again with 2")
        (tmp_path / "gate").touch()
        run.result()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert "1 to 2 workers x 1 CPU" in "".join(heard)
    training.train(make_config(data, tmp_path / "fixed", workers=1, **options))
    assert norm_of_difference(final_weights(tmp_path / "fixed"), final_weights(tmp_path / "run")) < 1e-4

"""`--workers MIN:MAX` on a cluster of real nodes: one is killed, another comes, and the result is the same training."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from small_training import HeldFrames, assert_same_end, final_weights, held_up, make_config, write_data

from unet_ray.errors import TryAgain
from unet_ray.training import checkpoints, launcher
from unet_ray.training import job as training


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


class Gated(HeldFrames):
    """Each worker reads 28 frames, two epochs alone or four with another, until the marker opens the gate."""

    def hold(self, index: int) -> None:
        while self.n_reads > 28 and not self.marker.exists():
            time.sleep(0.01)


def wait_for_line(line: str, run: Future[None], heard: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Adds what a training says to what was heard, until it says that."""
    while line not in "".join(heard):
        assert not run.done(), "".join(heard)
        heard.append(capsys.readouterr().out)
        time.sleep(0.01)


def norm_of_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    return max(float(np.linalg.norm(one[name] - other[name]) / np.linalg.norm(one[name])) for name in one)


@pytest.mark.weekly
@pytest.mark.timeout(400)
def test_workers_that_have_lost_their_node_do_not_wait_for_ever(cluster, data, tmp_path, capsys):
    cluster, nodes = cluster
    training.connect()
    config = make_config(data, tmp_path / "run", workers=2, wait_for_resources_s=5)
    with ThreadPoolExecutor(1) as pool, held_up(Gated, tmp_path / "gate"):
        run = pool.submit(training.train, config)
        while checkpoints.newest_valid(config.out, on_damaged=print) is None:
            assert not run.done(), run.result()
            time.sleep(0.05)
        cluster.remove_node(nodes[1], allow_graceful=False)
        with pytest.raises(
            TryAgain, match="a node was lost, and 2 workers had no room for 5 s .*; the same command goes"
        ):
            run.result()
    output = capsys.readouterr().out
    assert "warning: a node was lost, and 2 workers lack room; waiting up to 5 s for another\n" in output
    assert output.count(f"Ray {ray.__version__} at ") == 1


@pytest.mark.weekly
@pytest.mark.timeout(600)
def test_workers_that_have_lost_their_node_go_on_when_another_comes_in_time(cluster, data, tmp_path, capsys):
    cluster, nodes = cluster
    heard: list[str] = []
    training.connect()
    config = make_config(data, tmp_path / "run", workers=2, wait_for_resources_s=300)
    with ThreadPoolExecutor(1) as pool, held_up(Gated, tmp_path / "gate"):  # Ray starts a node in the main thread only
        run = pool.submit(training.train, config)
        wait_for_line("epoch  1/", run, heard, capsys)
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait_for_line("2 workers lack room; waiting up to 300 s for another", run, heard, capsys)
        cluster.add_node(num_cpus=1)
        (tmp_path / "gate").touch()
        run.result()
    training.train(make_config(data, tmp_path / "whole", workers=2))
    assert_same_end(tmp_path / "run", tmp_path / "whole", config.epochs)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_group_shrinks_when_a_node_is_killed_and_grows_when_one_comes(cluster, data, tmp_path, monkeypatch, capsys):
    """The batch is that of all workers together, so their number changes neither it nor the learning rate."""
    cluster, nodes = cluster
    options = {"dropout": 0.0, "epochs": 20, "learning_rate": 1e-3}
    heard: list[str] = []
    training.connect()
    monkeypatch.setattr(launcher, "RESIZE_INTERVAL_S", 1.0)
    with ThreadPoolExecutor(1) as pool, held_up(Gated, tmp_path / "gate"):  # Ray starts a node in the main thread only
        run = pool.submit(training.train, make_config(data, tmp_path / "run", workers="1:2", **options))
        wait_for_line("epoch  2/20", run, heard, capsys)
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait_for_line("a worker was lost; the group has started again with 1", run, heard, capsys)
        cluster.add_node(num_cpus=1)
        wait_for_line("there is room for more workers; the group has started again with 2", run, heard, capsys)
        (tmp_path / "gate").touch()
        run.result()
    assert "1 to 2 workers x 1 CPU" in "".join(heard)
    training.train(make_config(data, tmp_path / "fixed", workers=1, **options))
    assert norm_of_difference(final_weights(tmp_path / "fixed"), final_weights(tmp_path / "run")) < 1e-4

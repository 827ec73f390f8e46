"""Ray's autoscaler with nodes that are local processes: a job on a head alone gets nodes, uses them, lets them go."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from gates import STAGES, Gates
from ray_nodes import RayNodes

from unet_ray.chaos import trials
from unet_ray.chaos.trials import wait_until
from unet_ray.demo import synthetic
from unet_ray.output import verify

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RAYLET = f"{Path(ray.__file__).parent}/core/src/ray/raylet/raylet"
N_FRAMES = 64

MOST_S = {"decode_chunks": 0.5, "label_chunks": 4}
"""Before more nodes have come frames are decoded slowly, which keeps the first node busy, and labelled more slowly,
which makes the work wait for its actor."""


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Gates:
    return Gates(tmp_path_factory.mktemp("gates"), {STAGES: MOST_S})


@pytest.fixture(scope="module")
def nodes(gates: Gates) -> Iterator[RayNodes]:
    workers = {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 3}
    with RayNodes(autoscaling={"worker": workers}, settings=gates.settings) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = tmp_path_factory.mktemp("log")
    synthetic.write_log(str(log), seed=0, drives=4, frames_per_drive=N_FRAMES // 4, height_px=24, width_px=48)
    return log


def n_workers(nodes: RayNodes) -> int:
    """How many nodes there are beside the head."""
    return len(nodes.running(RAYLET)) - 1


def report(nodes: RayNodes, log_file: Path) -> str:
    """Returns what a failure is looked into with: the job's words and the autoscaler's."""
    return f"{log_file.read_text()}\n{nodes.autoscaler_output()}"


@contextmanager
def job(nodes: RayNodes, log_file: Path, name: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**nodes.environment, "RAY_ADDRESS": nodes.address}
    with log_file.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *options],
            env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        yield process
        process.wait()
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(1200)
def test_labelling_asks_for_nodes_uses_them_and_lets_them_go(nodes, gates, log, tmp_path):
    model, out, log_file = trials._write_model(tmp_path / "model", 0), tmp_path / "labels", tmp_path / "said"
    labels = ["--model", str(model), "--frames", f"{log}/CameraRGB", "--out", str(out), "--chunk-frames", "1"]
    pool = ["--actors", "1:3", "--cpus-per-actor", "1"]
    most_nodes, actors = 0, set[int]()
    with job(nodes, log_file, "segment", *labels, *pool) as process:
        while process.poll() is None:
            most_nodes = max(most_nodes, n_workers(nodes))
            actors.update(nodes.running("ray::MapWorker"))
            if most_nodes > 1 and len(actors) > 1:
                for function in MOST_S:
                    gates.open(function)
            time.sleep(0.5)
    lines = log_file.read_text().splitlines()
    assert process.returncode == 0, report(nodes, log_file)
    assert "the job wants 1 CPU; the cluster has 0 CPUs; waiting up to 600 s for more nodes" in lines, lines
    assert any(line.startswith(f"{N_FRAMES} frames in {N_FRAMES} chunks") for line in lines)
    assert most_nodes > 1 and len(actors) > 1, report(nodes, log_file)
    assert verify.verify(str(out)) == []
    assert wait_until(lambda: n_workers(nodes) == 0, timeout_s=600), report(nodes, log_file)


@pytest.mark.timeout(1200)
def test_training_waits_for_its_nodes_and_lets_them_go(nodes, log, tmp_path):
    log_file = tmp_path / "said"
    pairs = ["--images", f"{log}/CameraRGB", "--masks", f"{log}/CameraMask", "--classes", "carla23"]
    small = ["--epochs", "2", "--image-size", "16", "32", "--n-filters", "4", "--depth", "2"]
    with job(nodes, log_file, "train", *pairs, *small, "--out", str(tmp_path / "run"), "--workers", "3") as process:
        pass
    lines = log_file.read_text().splitlines()
    assert process.returncode == 0, report(nodes, log_file)
    lack = "3 training workers want 3 CPUs (1 CPU each); the cluster has 2 CPUs; waiting"
    assert any(line.startswith(lack) for line in lines), report(nodes, log_file)
    assert any(line.startswith("epoch 2/2") for line in lines)
    assert wait_until(lambda: n_workers(nodes) == 0, timeout_s=600), report(nodes, log_file)

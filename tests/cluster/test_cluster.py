from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.experimental.internal_kv import _internal_kv_get
from ray_nodes import RayNodes

from unet_ray import cli
from unet_ray.cluster import connection, resources

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def local():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        connection.connect()
        yield
        ray.shutdown()


def test_the_device_is_what_there_is_and_a_missing_gpu_is_said(local, capsys):
    assert resources.resolve_device("auto") == resources.resolve_device("cpu") == "cpu"
    assert capsys.readouterr().out == "device: cpu (auto)\ndevice: cpu\n"
    with pytest.raises(ValueError) as caught:
        resources.resolve_device("gpu")
    assert str(caught.value) == (
        "--device is gpu and this machine has no GPU; use --device cpu, or auto to take what there is"
    )


def test_more_than_this_machine_has_is_refused_at_once(local):
    n_cpus = int(ray.cluster_resources()["CPU"])
    resources.wait_for_resources([{"CPU": 1.0}] * n_cpus, 600, "workers")
    with pytest.raises(ValueError) as caught:
        resources.wait_for_resources([{"CPU": 1.0}] * (n_cpus + 1), 600, f"{n_cpus + 1} training workers")
    assert str(caught.value) == (
        f"{n_cpus + 1} training workers want {n_cpus + 1} CPUs (1 CPU each); the cluster has {n_cpus} "
        f"CPU{'s' * (n_cpus != 1)}; ask for fewer, or add nodes"
    )


def test_a_ray_that_was_started_here_with_other_storage_options_is_refused_and_one_of_the_users_own_is_not(
    local, monkeypatch
):
    connection.connect()
    monkeypatch.setenv("FSSPEC_S3", '{"anon": true}')
    with pytest.raises(ValueError, match="^Ray runs already, and its workers have other storage options; call ray"):
        connection.connect()
    monkeypatch.setattr(connection, "_handed", (("a node that", "is gone"), {}))
    connection.connect()


def requested() -> object:
    """Returns what the autoscaler would find that it is asked for."""
    request = _internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
    return None if request is None else json.loads(request)


def test_a_cluster_is_waited_for_and_then_the_reason_is_said(local, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    with pytest.raises(ValueError, match=r"the cluster has \d+ CPUs? after 0\.6 s \(--wait-for-resources-s\); ask for"):
        resources.wait_for_resources([{"CPU": 1.0}] * 100, 0.6, "100 model actors")
    output = capsys.readouterr().out
    assert output.startswith("100 model actors want 100 CPUs (1 CPU each); the cluster has ")
    assert output.endswith("; waiting up to 0.6 s for more nodes\n")
    assert requested() == []


WAIT_FOR_A_HUNDRED_CPUS = """
import json, threading
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.autoscaler.sdk import request_resources
from ray.experimental.internal_kv import _internal_kv_get
from unet_ray.chaos.trials import wait_until
from unet_ray.cluster import connection, resources

def requested():
    return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "null")

connection.connect()
actors = [{"CPU": 1.0}] * 100
waiting = threading.Thread(target=resources.wait_for_resources, args=[actors, 3600, "100 model actors"])
waiting.start()
for _ in range(2):
    assert wait_until(lambda: requested() == actors)
    request_resources(bundles=[])  # as Ray Data's AutoscalingCoordinator does every 20 s (Ray 2.60)
print("asked twice", flush=True)
waiting.join()
print(requested())
"""


def test_the_autoscaler_is_asked_again_when_another_asks_for_less_and_no_more_once_there_is_room():
    """The node that comes says that it has 100 CPUs."""
    with RayNodes() as nodes:
        job = subprocess.Popen(
            [sys.executable, "-c", WAIT_FOR_A_HUNDRED_CPUS],
            env={**nodes.environment, "RAY_ADDRESS": nodes.address}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert job.stdout
        assert any(line == "asked twice\n" for line in job.stdout)
        nodes.add(num_cpus=100)
        assert job.communicate()[0].splitlines()[-1] == "[]"
    assert job.returncode == 0


def test_a_bundle_must_fit_on_one_node():
    nodes = [{"CPU": 2.0}] * 2
    assert resources.fits(nodes, [{"CPU": 2.0}, {"CPU": 1.0}, {"CPU": 1.0}])
    assert not resources.fits(nodes, [{"CPU": 3.0}])
    assert not resources.fits(nodes, [{"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 1.0}])


@pytest.mark.parametrize(
    ("workers", "nodes", "cpus"),
    [
        (1, [{"CPU": 8.0}], 8),
        (3, [{"CPU": 8.0}, {"CPU": 4.0}], 4),
        (4, [{"CPU": 2.0}, {"CPU": 1.0}], 1),  # more than there is room for
        (2, [{"CPU": 16.0, "GPU": 1.0}, {"CPU": 12.0, "GPU": 1.0}, {"CPU": 64.0}], 12),
        (4, [{"CPU": 16.0, "GPU": 1.0}], 16),  # three nodes more are to come
        (4, [{"CPU": 64.0}, {"CPU": 48.0, "GPU": 2.0}], 24),
    ],
)
def test_a_worker_gets_its_share_of_the_nodes_that_are_there(workers, nodes, cpus):
    device = "gpu" if any("GPU" in node for node in nodes) else "cpu"
    assert resources.cpus_each(nodes, workers, device) == cpus


def test_the_cluster_of_ray_address_is_joined(local):
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-c", "from unet_ray.cluster import connection as cluster; cluster.connect()"],
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=300,
    )
    n_cpus = int(ray.cluster_resources()["CPU"])
    cpus = f"{n_cpus} CPU{'s' * (n_cpus != 1)}"
    expected = f"Ray {ray.__version__} at {address}, nodes: 1: {cpus}, 0 GPUs\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


def test_what_is_said_while_ray_starts_comes_through_but_for_its_notice(capfd):
    with pytest.raises(OSError, match="full"), connection._without_notice():
        os.write(2, b"logging.cc: Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL to 3\n")
        print("the disk is almost full", file=sys.stderr)
        raise OSError("full")
    print("after", file=sys.stderr)
    assert capfd.readouterr().err == "the disk is almost full\nafter\n"


def test_a_cluster_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    ray.shutdown()
    with pytest.raises(ValueError, match=r"^RAY_ADDRESS is 127\.0\.0\.1:1; no cluster lets us in there: ") as caught:
        connection.connect()
    assert "\n" not in str(caught.value)


def test_a_ray_that_does_not_start_is_one_line(tmp_path):
    """A file stands where Ray makes its folder."""
    (tmp_path / "file").touch()
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path / "file")}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", "from unet_ray.cluster.connection import connect; connect()"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("unet_ray.errors.TryAgain: Ray did not start on this machine: "), done.stderr
    assert error.endswith("; is it very busy? Try the same command again")


def test_the_cluster_file_is_valid_by_rays_own_loader_and_schema():
    from ray.autoscaler._private.util import prepare_config, validate_config

    file = Path(__file__).parents[2] / "cluster.yaml"
    config = prepare_config(yaml.safe_load(file.read_text()))
    validate_config(config)
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0
    workers = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers.values())
    starts = [line for key in ("head", "worker") for line in config[f"{key}_start_ray_commands"] if "ray start" in line]
    settings = (
        *("RAY_AUTH_MODE=token", "RAY_grpc_client_keepalive_time_ms=5000", "RAY_grpc_client_keepalive_timeout_ms=5000"),
        *("RAY_health_check_period_ms=1000", "RAY_health_check_timeout_ms=3000"),
        "RAY_health_check_failure_threshold=3",
    )
    assert len(starts) == 2 and all(setting in line for line in starts for setting in settings)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    markets = [kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") for kind in workers.values()]
    assert set(markets) == {"spot"}
    assert any("pip install" in line and "unet" in line for line in config["setup_commands"]), config["setup_commands"]


def test_a_cluster_without_authentication_is_warned_of_in_one_line():
    with RayNodes(settings={"RAY_AUTH_MODE": "disabled"}) as nodes:
        done = subprocess.run(
            [sys.executable, "-c", "from unet_ray.cluster import connection as cluster; cluster.connect()"],
            env={**nodes.environment, "RAY_ADDRESS": nodes.address},
            capture_output=True,
            text=True,
            timeout=300,
        )
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert done.returncode == 0 and warnings == [
        "warning: this Ray cluster has no authentication, whoever reaches it can run code; set RAY_AUTH_MODE=token"
    ], done


def test_the_kubernetes_job_gives_options_that_the_job_takes():
    jobs = Path(__file__).parents[2] / "jobs"
    document = yaml.safe_load((jobs / "rayjob.yaml").read_text())
    python, script, *arguments = document["spec"]["entrypoint"].split()
    assert python == "python" and (jobs / Path(script).name).is_file()
    assert cli.parse("segment", arguments).out == "s3://bucket/labels"
    groups = [
        document["spec"]["rayClusterSpec"]["headGroupSpec"],
        *document["spec"]["rayClusterSpec"]["workerGroupSpecs"],
    ]
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    assert len(images) == 1 and f"-t {images.pop()} " in (jobs / "Dockerfile").read_text()
    version = document["spec"]["rayClusterSpec"]["rayVersion"]
    assert version.split(".")[:2] == ray.__version__.split(".")[:2]
    assert f"rayproject/ray:{version}-" in (jobs / "Dockerfile").read_text()

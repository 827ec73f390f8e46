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
from s3_server import KEY_ID, SECRET

from unet_ray import cli, streams
from unet_ray.cluster import autoscaler, connection, probes, resources

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


def test_auto_asks_for_nothing_where_no_autoscaler_adds_nodes(local, monkeypatch, capsys):
    """Neither on this machine alone nor on nodes that were started by hand."""
    assert not autoscaler.adds_nodes()
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    before = requested()
    assert not autoscaler.adds_nodes() and resources.resolve_device("auto") == "cpu"
    assert requested() == before and capsys.readouterr().out == "device: cpu (auto)\n"


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
from unet_ray.cluster import autoscaler, connection, resources

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


@pytest.mark.slow
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
    joined = f"Ray {ray.__version__} at {address}, nodes: 1: {cpus}, 0 GPUs"
    expected = f"joining the Ray cluster at {address}\n{joined}\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


TOPICS = [
    *("versions", "devices", "capability", "bfloat16", "XLA", "NCCL", "ONNX", "memory", "threads", "storage"),
    "authentication",
]


def findings_of(lines: list[str]) -> list[tuple[str, str, str]]:
    """Verdict, topic and text of a node's lines."""
    return [(verdict, topic, text) for verdict, topic, text in (line.split(maxsplit=2) for line in lines)]


def test_the_doctor_says_line_by_line_what_this_machine_can_do(local, tmp_path, capsys):
    (tmp_path / "1.png").write_bytes(b"frame")
    assert cli.main(["doctor", "--outputs", str(tmp_path), "--storage-retry-s", "60"]) == 0
    node, *lines, last, following = capsys.readouterr().out.splitlines()
    (there,) = ray.nodes()
    assert node == f"node {there['NodeManagerAddress']} ({there['NodeManagerHostname']}, the head):"
    findings = findings_of(lines)
    assert [topic for _, topic, _ in findings] == TOPICS
    text = {topic: text for _, topic, text in findings}
    assert f"ray {ray.__version__}" in text["versions"]
    n_cpus = int(ray.cluster_resources()["CPU"])
    assert text["devices"] == f"Ray reserves {n_cpus} CPU{'s' * (n_cpus != 1)}, 0 GPUs; TensorFlow sees 0 GPUs"
    assert text["XLA"].startswith("compiles on the CPU (") and text["NCCL"] == "no GPU, so not needed"
    assert text["storage"] == f"{tmp_path}: list, read, write, delete, put if absent"
    assert text["authentication"] == "on: Ray refuses who has no token"
    assert [file.name for file in tmp_path.iterdir()] == ["1.png"]
    assert last == "nothing is in the way of a job"
    assert following == "Next: unet-ray check --images … --masks … --classes …"


def test_what_is_said_while_ray_starts_comes_through_but_for_its_notice(capfd):
    with pytest.raises(OSError, match="full"), streams.without_lines(connection._NOTICE):
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


@pytest.mark.parametrize("address", ["http://10.0.0.5:8265", "ray://10.0.0.5:10001", "10.0.0.5", ":6379", "head"])
def test_an_address_of_another_kind_is_refused(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    ray.shutdown()
    with pytest.raises(ValueError) as caught:
        connection.connect()
    assert str(caught.value) == (
        f"RAY_ADDRESS is {address}; give host:port of the cluster's head, such as 10.0.0.5:6379, or auto (http://… is "
        "its dashboard, which `ray job submit` takes)"
    )


@pytest.mark.slow
def test_the_doctor_looks_at_a_machine_on_which_no_ray_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    ray.shutdown()
    assert cli.main(["doctor", "--inputs", str(tmp_path / "none")]) == 1
    joining, node, ray_line, *lines, last, following = capsys.readouterr().out.splitlines()
    assert joining == "joining the Ray cluster at 127.0.0.1:1"
    assert following == "Next: mend what fails, as its line says, and give the same command again"
    assert node == "this machine, without Ray:" and last == "will not work on: this machine, without Ray"
    assert ray_line.startswith("FAIL  Ray             RAY_ADDRESS is 127.0.0.1:1; no cluster lets us in there: ")
    assert ray_line.endswith(" -> start it with `ray start --head`, or unset RAY_ADDRESS to use this machine alone")
    verdicts = {topic: verdict for verdict, topic, _ in findings_of(lines)}
    assert list(verdicts) == TOPICS and verdicts["storage"] == "FAIL" and verdicts["XLA"] == "ok"


@pytest.mark.slow
def test_the_doctor_asks_every_node_of_a_cluster_and_names_the_gpus_that_tensorflow_does_not_see(tmp_path):
    """The GPUs are Ray's alone; the store is one that no node reaches."""
    program = "from unet_ray import cli; raise SystemExit(cli.main())"
    store = ["--storage-options", '{"endpoint_url": "http://127.0.0.1:9"}', "--storage-retry-s", "0"]
    with RayNodes(settings={"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET}) as nodes:
        nodes.add("--num-gpus=2")
        done = subprocess.run(
            [sys.executable, "-c", program, "doctor", "--inputs", "s3://drives", *store, "--outputs", str(tmp_path)],
            env={**nodes.environment, "RAY_ADDRESS": nodes.address},
            capture_output=True,
            text=True,
            timeout=280,
        )
    assert (done.returncode, done.stderr) == (1, ""), done
    joining, joined, *lines, last, _ = done.stdout.splitlines()
    assert joining == f"joining the Ray cluster at {nodes.address}"
    assert joined == f"Ray {ray.__version__} at {nodes.address}, nodes: 2: 1 CPU, 2 GPUs"
    n_lines = len(TOPICS) + 1  # storage has two
    starts = (1, n_lines + 2)
    names = [lines[start - 1] for start in starts]
    of_nodes = {name: findings_of(lines[start : start + n_lines]) for name, start in zip(names, starts, strict=True)}
    (head,) = (name for name in names if name.endswith(", the head):"))
    assert last.startswith("will not work on: node ") and SECRET not in done.stdout and KEY_ID not in done.stdout
    for name, findings in of_nodes.items():
        assert [topic for _, topic, _ in findings] == [*TOPICS[:-1], *TOPICS[-2:]]
        by_topic = {topic: (verdict, text) for verdict, topic, text in findings}
        n_gpus = 0 if name == head else 2
        devices = f"Ray reserves {1 if n_gpus else 0} CPU{'s' * (not n_gpus)}, {n_gpus} GPUs; TensorFlow sees 0 GPUs"
        refused = ("FAIL", f"{devices}, the kernel 0 NVIDIA cards -> {probes.INSTALL_GPU}")
        assert by_topic["devices"] == (refused if n_gpus else ("ok", devices))
        assert by_topic["XLA"][0] == "ok" and by_topic["authentication"][1] == "on: Ray refuses who has no token"
        unreached, written = (text for _, topic, text in findings if topic == "storage")
        assert unreached.startswith("s3://drives: cannot list: ") and " -> check from this node: " in unreached
        assert "http://127.0.0.1:9/" in unreached, "options of the command reach the nodes"
        assert written == f"{tmp_path}: list, write, delete, put if absent"
    assert list(tmp_path.iterdir()) == []


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
    profiles = {
        name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in config["available_node_types"].items()
    }
    assert profiles == {"head": "unet-ray-head", "gpu_worker": "unet-ray-node", "cpu_worker": "unet-ray-node"}
    markets = [kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") for kind in workers.values()]
    assert set(markets) == {"spot"}
    assert any("pip install" in line and "unet" in line for line in config["setup_commands"]), config["setup_commands"]
    # Ray's own line for the head takes the newest boto3, which replaces the botocore that s3fs wants.
    assert [line for line in config["head_setup_commands"] if "boto3" in line] == config["head_setup_commands"][-1:]
    assert "boto3<=$(" in config["head_setup_commands"][-1]


def test_a_cluster_without_authentication_is_warned_of_in_one_line():
    with RayNodes(settings={"RAY_AUTH_MODE": "disabled"}) as nodes:
        done = subprocess.run(
            [sys.executable, "-c", "from unet_ray.cluster import connection as cluster; cluster.connect()"],
            env={**nodes.environment, "RAY_ADDRESS": nodes.address},
            capture_output=True,
            text=True,
            timeout=300,
        )
        look = probes.look_at_authentication(nodes.address)
    assert look.text == "off: whoever reaches the cluster can run code on it"
    assert look.remedy == "start it with RAY_AUTH_MODE=token"
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert done.returncode == 0 and warnings == [
        "warning: this Ray cluster has no authentication, whoever reaches it can run code; set RAY_AUTH_MODE=token"
    ], done

"""A head that is lost with Redis behind it: its node joins the new head, and works for the next job."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_nodes import RayNodes

from unet_ray.chaos.trials import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """The address of a Redis of this test's own."""
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("there is no redis-server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout and any("Ready to accept connections" in line for line in process.stdout)
    yield f"127.0.0.1:{port}"
    process.kill()
    process.wait()
    process.stdout.close()


WORK = """
import ray
from unet_ray.cluster import connection
connection.connect()
print(ray.get(ray.remote(lambda: ray.get_runtime_context().get_node_id()).options(num_cpus=1).remote(), timeout=120))
"""


def test_a_node_outlives_its_head_and_works_for_the_next(redis: str) -> None:
    behind = ["env", f"RAY_REDIS_ADDRESS={redis}", "RAY_external_storage_namespace=unet-ray"]
    with RayNodes(prefix=behind) as nodes:

        def worked() -> subprocess.CompletedProcess[str]:
            environment = {**nodes.environment, "RAY_ADDRESS": nodes.address}
            return subprocess.run([sys.executable, "-c", WORK], env=environment, capture_output=True, text=True)

        node = nodes.add(num_cpus=1)
        before = worked()
        assert before.returncode == 0, before.stderr
        nodes.replace_head()
        after: list[subprocess.CompletedProcess[str]] = []
        assert wait_until(lambda: after.append(worked()) or after[-1].returncode == 0, node, timeout_s=300), after
        assert after[-1].stdout.splitlines()[-1] == before.stdout.splitlines()[-1]
        assert node.poll() is None

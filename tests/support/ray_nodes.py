"""A Ray of several nodes by `ray start --block`, as on several machines: each node is a process that a test ends."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray.util

from unet_ray.chaos import faults
from unet_ray.chaos.trials import wait_until

WAITING = b"will now block forever"
START_TIMEOUT_S = 120.0
START_TRIES = 6
"""Ray 2.60 gives a node up whose agent, a Python process, needs more than 15 s to start: on a busy machine, often."""
_HEAD_ID = f"{0:056x}".replace("0", "f", 51)
"""By Ray's fake provider, with which the autoscaler knows the head."""
_FAKE = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_enable_autoscaler_v2": "1",  # as `ray up` and KubeRay have it
    "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
    "RAY_NODE_TYPE_NAME": "ray.head.default",
}
_COMMANDS = (
    *("cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands"),
    *("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
)
"""What Ray's autoscaler wants to find in its configuration, though these nodes need none of it."""


class RayNodes:
    """A head and nodes with token authentication; the block ends them and all that they have started."""

    def __init__(
        self,
        *,
        autoscaling: Mapping[str, Any] | None = None,
        settings: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        address: str | None = None,
    ) -> None:
        """Starts a head without CPUs.

        Args:
            autoscaling: `available_node_types` of Ray's autoscaler, beside the head's; its nodes are local processes.
            settings: environment variables of every node.
            prefix: makes the head's command run in another place.
            address: the head's address; None is this machine's.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # the name of a socket in it has at most 107 bytes
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            **os.environ,
            **(_FAKE if autoscaling else {}),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            **(settings or {}),
        }
        self.environment.pop("RAY_ADDRESS", None)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.port, dashboard_port = _free_ports(2)
        self.dashboard = f"http://127.0.0.1:{dashboard_port}"
        self.ray_folder = self.folder / "ray"
        self._head = (
            *prefix, "ray", "start", "--block",
            "--head", f"--port={self.port}", f"--temp-dir={self.ray_folder}", "--num-cpus=0",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}",
            *([f"--autoscaling-config={self._write_autoscaling(autoscaling)}"] if autoscaling else []),
            *([f"--node-ip-address={address}"] if address else []),
        )  # fmt: skip
        try:
            self.head = self._start(*self._head)
            self.address = (self.ray_folder / "ray_current_cluster").read_text().strip()
        except BaseException:
            self.stop()
            raise

    def _write_autoscaling(self, node_types: Mapping[str, Any]) -> Path:
        """Writes what `ray.cluster_utils.AutoscalingCluster` would; itself it runs `ray stop` for the whole machine."""
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        file = self.folder / "autoscaling.json"
        file.write_text(
            json.dumps(
                {
                    **{key: {} for key in ("file_mounts", "auth")},
                    **{key: [] for key in _COMMANDS},
                    "cluster_name": "fake",
                    "max_workers": 8,
                    "idle_timeout_minutes": 0.5,  # from the start of a node, which on a busy machine takes long
                    "upscaling_speed": 1.0,
                    "provider": {
                        "type": "external",  # with its own name Ray looks for an example that is not in the wheel
                        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                        "head_node_id": _HEAD_ID,
                        "launch_multiple": True,
                        "gcs_address": f"{ray.util.get_node_ip_address()}:{self.port}",
                        "use_node_id_as_ip": True,
                        "disable_node_updaters": True,
                        "disable_launch_config_check": True,
                    },
                    "available_node_types": {**node_types, "ray.head.default": head},
                    "head_node_type": "ray.head.default",
                }
            )
        )
        return file

    def add(self, *options: str, prefix: Sequence[str] = (), num_cpus: int = 1) -> subprocess.Popen[bytes]:
        """Starts a node; `prefix` makes its command run in another place."""
        join = ("ray", "start", "--block", f"--address={self.address}", f"--num-cpus={num_cpus}")
        # In one folder for all, each node deletes and unpacks the job's code again, under the feet of its driver.
        own = f"--temp-dir={self.folder / f'n{len(self.processes)}'}"
        return self._start(*prefix, *join, own, *options)

    def replace_head(self) -> None:
        """Kills the head, and starts another at its address."""
        below = faults.descendants(self.head.pid)
        faults.kill([self.head.pid])
        faults.kill(below)
        self.head.wait()
        (self.ray_folder / "ray_current_cluster").unlink()  # another machine has no note of the one that is lost
        self.head = self._start(*self._head)

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        """Starts a node and waits until it is there: two that start at once choose one name for a socket (Ray 2.60)."""
        for _ in range(START_TRIES):
            process, log = self._launch(command)
            if wait_until(lambda: WAITING in log.read_bytes(), process, timeout_s=START_TIMEOUT_S):  # noqa: B023
                return process
        raise AssertionError(self.output())

    def _launch(self, command: Sequence[str]) -> tuple[subprocess.Popen[bytes], Path]:
        settings = ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000"]
        path = self.folder / f"node-{len(self.processes)}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                [*command, "--dashboard-agent-listen-port=0", *settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,  # Ctrl-C is for the tests, which then end the nodes in order
            )
        self.processes.append(process)
        return process, path

    def output(self) -> str:
        """Returns what the `ray start` commands have written."""
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("node-*.log")))

    def autoscaler_output(self) -> str:
        """Returns the end of the autoscaler's log: what it has done, and its last look at nodes and requests."""
        log = self.ray_folder / "session_latest" / "logs" / "monitor.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else ["no autoscaler has written a log"]
        dated = [line for line in lines if line[:1].isdigit()]
        done = [line for line in dated if "The autoscaler took" not in line and not line.endswith("-- ")]
        return "\n".join([*done[-60:], "...", *lines[-30:]])

    def running(self, *titles: str) -> list[int]:
        """Returns the processes on all nodes whose command line begins with one of the titles (`ray::MapWorker`)."""
        return [
            pid for node in self.processes for title in titles for pid in faults.titled_below(node.pid, title)
        ]  # fmt: skip

    def stop(self) -> None:
        """Kills all nodes and what they have started; told to end, they take half a minute."""
        below = {pid for process in self.processes for pid in faults.descendants(process.pid)}
        faults.kill(process.pid for process in reversed(self.processes) if process.poll() is None)
        faults.kill(below)
        for process in self.processes:
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> RayNodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [server.getsockname()[1] for server in servers]

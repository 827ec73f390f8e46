"""A driver whose Ray loses a part that it cannot do without: one line, and the exit code that says to try again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unet_ray.chaos.faults import kill
from unet_ray.cluster.processes import descendants

pytestmark = pytest.mark.timeout(300)

IDLE = "import threading; threading.Event().wait()"
IN_C = (
    "import ctypes; lock = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in '12']"
)
"""Locks a mutex twice: no signal's handler runs in Python any more."""

DRIVER = """
import signal
from unet_ray import cli, stops
from unet_ray.cluster.connection import connect
stops.note_arrivals()
signal.signal(signal.SIGTERM, cli._stop)
connect()
print("ready", flush=True)
"""
SOMEBODYS = """
import ray
address = ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False).address_info["gcs_address"]
print("ready", address, flush=True)
"""
"""A Ray that others join; its own driver does not look whether it lives."""

ENDED = "Ray's process on this machine ({}) was ended, perhaps for want of memory"


LOST = "the cluster's head (gcs_server at {}) has not answered for 8 s"
GOES_ON = "; the same command goes on where this one stopped\n"


@contextlib.contextmanager
def driver(waits: str, starts: str = DRIVER, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process with a process group of its own that waits, and the line that it printed before.

    It has a Ray of its own, unless `variables` name another.
    """
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | variables
    command = [sys.executable, "-c", starts + waits]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            while not (line := process.stdout.readline()).startswith("ready") and line:
                pass
            assert process.poll() is None
            yield process, line.removeprefix("ready").strip()
        finally:
            kill([process.pid, *descendants(process.pid)])


def processes(pid: int, signs: list[str]) -> list[int]:
    """Those that a driver has started, by the beginning of their title or the end of a word of their commands."""
    commands = {}
    for below in descendants(pid):
        with contextlib.suppress(OSError):
            commands[below] = Path(f"/proc/{below}/cmdline").read_text().split("\0")
    title, program = signs[0], signs[-1]
    return [
        below
        for below, words in commands.items()
        if words[0].startswith(title) or any(word.endswith(program) for word in words)
    ]


@pytest.mark.parametrize(
    ("signs", "part"),
    [
        (["/raylet/raylet"], "raylet"),
        *(
            pytest.param(*signs_and_part, marks=pytest.mark.slow)
            for signs_and_part in (
                (["/gcs/gcs_server"], "gcs_server"),
                (["ray::DashboardAgent", "/dashboard/agent.py"], "dashboard agent"),
                (["ray::RuntimeEnvAgent", "/runtime_env/agent/main.py"], "runtime_env agent"),
            )
        ),
    ],
)
def test_a_part_of_ray_that_dies_ends_its_driver_by_name(signs: list[str], part: str) -> None:
    with driver(IDLE) as (process, _):
        (pid,) = processes(process.pid, signs)
        os.kill(pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (
        75,
        f"unet-ray: error: {ENDED.format(part)}{GOES_ON}",
    )


@pytest.mark.slow
def test_a_driver_on_a_cluster_ends_when_the_head_or_its_node_is_lost() -> None:
    with driver(IDLE, SOMEBODYS) as (cluster, address):
        joins = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"}
        with (
            driver(IDLE, **joins, RAY_gcs_rpc_server_reconnect_timeout_s="10") as (sooner, _),
            driver(IDLE, **joins, RAY_gcs_rpc_server_reconnect_timeout_s="600") as (later, _),
        ):
            kill(processes(cluster.pid, ["/gcs/gcs_server"]))
            _, errors = sooner.communicate(timeout=100)
            assert (sooner.returncode, errors) == (75, f"unet-ray: error: {LOST.format(address)}{GOES_ON}")
            kill(processes(cluster.pid, ["/raylet/raylet"]))
            _, errors = later.communicate(timeout=100)
            assert (later.returncode, errors) == (75, f"unet-ray: error: {ENDED.format('raylet')}{GOES_ON}")


LEFT = "import ray; ray.shutdown(); print('left', flush=True); "


@pytest.mark.slow
def test_a_driver_that_has_left_a_cluster_lives_on_without_it() -> None:
    with driver(IDLE, SOMEBODYS) as (cluster, address):
        joins = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
        with driver(f"{LEFT}import time; time.sleep(12)", **joins) as (process, _):
            assert process.stdout and process.stdout.readline() == "left\n"
            kill(processes(cluster.pid, ["/gcs/gcs_server"]) + processes(cluster.pid, ["/raylet/raylet"]))
            process.communicate(timeout=100)
            assert process.returncode == 0


def test_a_process_group_that_is_told_to_stop_is_stopped_also_where_ray_is_faster() -> None:
    with driver(IN_C) as (process, _):
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (
        143,
        "unet-ray: error: stopped; the same command goes on where this one stopped\n",
    )


ARRIVALS = """
import os, signal
from unet_ray import stops
stops.note_arrivals()
signal.signal(signal.SIGTERM, lambda *_: None)
answers = [stops.arrived()]
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.kill(os.getpid(), signal.SIGTERM)
answers.append(stops.arrived())
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
print([*answers, stops.arrived(), stops.arrived()])
"""


def test_a_signal_has_arrived_before_a_thread_takes_it_and_once_after() -> None:
    assert subprocess.check_output([sys.executable, "-c", ARRIVALS], text=True) == "[None, 15, 15, None]\n"

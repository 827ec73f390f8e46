"""Programs that run as the workers of a group: processes that know of each other by `TF_CONFIG`, without Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def start_ranks(program: str, *arguments: object) -> list[subprocess.Popen]:
    """Starts the program as each of two workers that know of each other."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in sockets]
    for listener in sockets:
        listener.close()
    processes = []
    for rank in range(2):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        processes.append(start_rank(program, rank, 2, *arguments, TF_CONFIG=json.dumps(task)))
    return processes


def start_rank(program: str, *arguments: object, **environment: str) -> subprocess.Popen:
    """Starts the program as a process of its own."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": paths, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def run_to_end(processes: Iterable[subprocess.Popen]) -> None:
    """Waits for all; raises AssertionError with the last lines of one that failed."""
    for process in processes:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors[-3000:]


def of_one_and_of_two(program: str, out: Path) -> dict[str, dict[str, np.ndarray]]:
    """What one worker (`1-0`), and each of two (`2-0`, `2-1`), wrote to OUT/WORKERS-RANK.npz."""
    run_to_end((start_rank(program, 0, 1, out), *start_ranks(program, out)))
    return {name: dict(np.load(out / f"{name}.npz")) for name in ("1-0", "2-0", "2-1")}


def relative_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))

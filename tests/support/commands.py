"""Commands in processes of their own that are to end: one that hangs tells where each of its processes is."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from unet_ray.chaos import faults
from unet_ray.cluster.processes import descendants


def run_to_end(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Runs a command and returns what it said; after a timeout raises AssertionError with all Python stacks."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            started = [process.pid, *sorted(descendants(process.pid))]
            stacks = "\n".join(map(_python_stacks, started))
            faults.kill(started)
            output, errors = process.communicate()
            raise AssertionError(f"not over after {timeout_s:.0f} s\n{output}\n{errors}\n{stacks}") from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _python_stacks(pid: int) -> str:
    done = subprocess.run(["py-spy", "dump", "--pid", str(pid)], capture_output=True, text=True)
    return done.stdout or f"process {pid}: {done.stderr.strip()}"

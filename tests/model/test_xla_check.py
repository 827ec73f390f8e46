"""A child that tries XLA: real programs that end in every way, and the one that is used, on this CPU."""

from __future__ import annotations

import socket
import sys

import pytest

from unet_ray.model import xla_check
from unet_ray.model.devices import UnusableGpu


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("import os; os.abort()", "XLA ended its process by SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "XLA ended its process by SIGSEGV"),
        (
            "raise RuntimeError('no kernel image is available')",
            "XLA failed: RuntimeError: no kernel image is available",
        ),
        ("import sys; sys.exit('it computes\\n something else\\n')", "XLA failed: something else"),
        ("raise SystemExit(3)", "XLA failed: exit code 3"),
        ("raise ValueError(100 * 'x ')", f"XLA failed: ValueError: {93 * 'x '}…"),
        ("import sys; print('a notice', file=sys.stderr)", None),
    ],
)
def test_how_a_child_ended_is_said_in_one_line(program, problem):
    assert xla_check.problem_of([sys.executable, "-c", program], 60) == problem


def test_a_child_that_does_not_end_is_a_gpu_that_cannot_be_used():
    with pytest.raises(
        UnusableGpu, match=f"node {socket.gethostname()}, but a tiny network that XLA compiles does not"
    ):
        xla_check.problem_of([sys.executable, "-c", "import time; time.sleep(600)"], 0.2)


@pytest.mark.slow
def test_xla_works_on_this_cpu():
    assert xla_check.xla_problem("cpu") is None

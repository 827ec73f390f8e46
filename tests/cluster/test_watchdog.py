"""A process that gets nowhere is ended, and says where it was."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

STUCK = """
import sys, threading
from unet_ray import storage
from unet_ray.cluster import watchdog

threading.Thread(target=threading.Event().wait, daemon=True).start()  # another thread, which nobody asked about
with watchdog.Watchdog(600, print).watching():
    print("in time")
with watchdog.Watchdog(0.2, print).watching():
    storage.read_bytes(sys.argv[1])
"""


LIMITED = """
import sys
from unet_ray import storage
from unet_ray.cluster.connection import limited

with limited("one read", 600):
    print("in time")
with limited("the other read", 0.2):
    storage.read_bytes(sys.argv[1])
"""


@pytest.fixture
def silent() -> Iterator[str]:
    """The URI of a file on a server that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/file"


def test_a_driver_that_is_stuck_says_in_which_phase_and_may_be_tried_again(silent):
    done = subprocess.run([sys.executable, "-c", LIMITED, silent], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "in time\n"), done.stderr
    pattern = (
        r"unet-ray: error: the other read took longer than 0 s; it was in storage/\w+\.py:[0-9]+ .+; the same .+\n"
    )
    assert re.fullmatch(pattern, done.stderr), done.stderr


def test_a_process_that_is_stuck_says_where_and_ends(silent):
    done = subprocess.run([sys.executable, "-c", STUCK, silent], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "in time" and len(lines) == 2
    assert re.fullmatch(r"storage/\w+\.py:[0-9]+ \(\w+\)( -> .+ \(\w+\))?", lines[1]), lines[1]

"""Commands whose standard output or error is closed, full or of few letters: their exit codes stay what they mean."""

import contextlib
import os
import subprocess
import sys

import pytest

from unet_ray import streams

pytestmark = pytest.mark.timeout(120)

COMMAND = [sys.executable, "-c", "from unet_ray.cli import run; run()"]
"""As the console script `unet-ray`."""


def ended(arguments: list[str], **streams) -> tuple[int, str]:
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, **streams)
    _, errors = process.communicate(timeout=100)
    return process.returncode, errors


def test_a_reader_that_has_left_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    assert ended(["train", "--help"], stdout=writing) == (0, "")
    os.close(writing)


def test_a_full_output_is_one_line_and_no_success():
    with open("/dev/full", "w") as full:
        assert ended(["train", "--help"], stdout=full) == (
            1,
            "unet-ray: error: standard output could not be written: No space left on device\n",
        )


def test_a_full_error_output_hides_no_exit_code():
    with open("/dev/full", "w") as full:
        process = subprocess.run([*COMMAND, "trian"], stderr=full, stdout=subprocess.PIPE)
    assert (process.returncode, process.stdout) == (2, b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams(closed, tmp_path):
    script = f'"$@" {closed}'
    done = subprocess.run(["bash", "-c", script, "bash", *COMMAND, "--version"], stdin=subprocess.DEVNULL, timeout=100)
    assert done.returncode == 0


def test_letters_that_the_terminal_lacks_are_escaped():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = subprocess.run([*COMMAND, "train", "--help"], env=environment, capture_output=True, timeout=100)
    assert process.returncode == 0 and process.stderr == b""
    assert b"\\u2026" in process.stdout


NOTICES = b"""WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1796075941.571640   30275 port.cc:153] oneDNN custom operations are on.
2026-11-30 22:00:00.123456: I tensorflow/core/util/port.cc:153] oneDNN custom operations are on.
W0000 00:00:1796075941.571640   30275 gpu_device.cc:2341] Cannot dlopen some GPU libraries.
"""


@pytest.mark.parametrize(
    ("error", "written"),
    [
        (None, b"a line of Python's\nanother's\n"),
        (ValueError("x"), b"a line of Python's\nanother's\n"),
        (RuntimeError("a bug"), b"a line of Python's\n" + NOTICES + b"another's\n"),
    ],
)
def test_notices_of_tensorflow_are_kept_back_unless_something_is_wrong(error, written, capfdbinary):
    with contextlib.suppress(ValueError, RuntimeError), streams.without_notices():
        print("a line of Python's", file=sys.stderr, flush=True)
        os.write(2, NOTICES + b"another's\n")
        if error:
            raise error
    assert capfdbinary.readouterr().err == written
    os.write(2, b"later\n")
    assert capfdbinary.readouterr().err == b"later\n"

"""TensorFlow tried in a process of its own, also where XLA ends it."""

from __future__ import annotations

import pytest

from unet_ray.model import device_trial
from unet_ray.model.device_trial import DeviceTrial, try_devices


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_xla_that_aborts_costs_its_line_only(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--no_such_flag")  # a fatal error of XLA's own, at its first use
    trial = try_devices()
    assert trial.gpus is not None and trial.built_for and trial.xla_s is None
    assert trial.ended == "exit code 1: Unknown flag in XLA_FLAGS: --no_such_flag"


def test_a_process_that_hangs_is_given_up():
    trial = try_devices(timeout_s=0.01)
    assert trial == DeviceTrial(ended="no end within 0.01 s: no word")


def test_a_process_that_a_signal_ends_is_named_by_it():
    assert [device_trial._ending(code) for code in (0, -6, -11, 3)] == ["", "SIGABRT", "SIGSEGV", "exit code 3"]


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ("", "no word"),
        ("Traceback:\nImportError: libcuda.so.1\n\n", "ImportError: libcuda.so.1"),
        (
            "I0000 00:00:1.2 7 a.cc:1] x\nF0000 00:00:1.2 7 b.cc:2] no such ISA\n*** stack trace ***\n@ 0x1",
            "no such ISA",
        ),
    ],
)
def test_the_last_words_are_those_of_the_fatal_error(errors, expected):
    assert device_trial._last_words(errors) == expected

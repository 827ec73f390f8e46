from __future__ import annotations

import builtins
import io
import subprocess

import pytest

from unet_ray.model import devices


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx512f avx512_bf16", True), ("fpu amx_bf16 amx_tile", True), ("fpu avx2 avx512f", False), (None, False)],
)
def test_a_processor_has_bfloat16_where_its_flags_say_so(flags, expected, monkeypatch):
    monkeypatch.setattr(devices.os.path, "exists", lambda path: flags is not None)
    cpuinfo = f"processor : 0\nflags\t\t: {flags}\n\nprocessor : 1\nflags\t\t: {flags}\n"
    opened = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda path, *rest, **more: io.StringIO(cpuinfo) if path == "/proc/cpuinfo" else opened(path)
    )
    assert devices.has_bfloat16("cpu") is expected
    assert devices.choose_policy("auto", "cpu") == ("mixed_bfloat16" if expected else "float32")


@pytest.mark.parametrize(("capabilities", "expected"), [("8.0\n9.0\n", True), ("7.5\n", False), ("9.0\n7.0\n", False)])
def test_all_gpus_must_have_it(capabilities, expected, monkeypatch):
    def answer(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command == ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        return subprocess.CompletedProcess(command, 0, stdout=capabilities)

    monkeypatch.setattr(devices.subprocess, "run", answer)
    assert devices.has_bfloat16("gpu") is expected

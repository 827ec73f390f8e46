from __future__ import annotations

import builtins
import io
import os

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


@pytest.mark.parametrize(
    ("capabilities", "expected"), [([(8, 0), (9, 0)], True), ([(7, 5)], False), ([(10, 0), (7, 0)], False)]
)
def test_all_gpus_must_have_it(capabilities, expected, monkeypatch):
    """On GPUs that TensorFlow is said to know."""
    known = {f"GPU:{index}": capability for index, capability in enumerate(capabilities)}
    monkeypatch.setattr(devices, "visible_gpus", lambda: list(known))
    monkeypatch.setattr(devices, "gpu_details", lambda name: {"compute_capability": known[name]})
    assert devices.has_bfloat16("gpu") is expected


def test_where_tensorflow_sees_no_gpu_the_error_names_the_node_and_the_remedy():
    with pytest.raises(devices.UnusableGpu, match="^Ray has a GPU on node .*, but TensorFlow sees none there; install"):
        devices.has_bfloat16("gpu")


@pytest.mark.parametrize(
    ("gpu_mb", "n_processes", "expected_mb"),
    [(16_384, 2, 7168), (16_384, 4, 3072), (4096, 4, 512), (143_771, 3, 46_899)],
)
def test_processes_that_share_a_gpu_share_its_memory(gpu_mb, n_processes, expected_mb):
    assert devices.memory_limit_mb(gpu_mb, n_processes) == expected_mb
    assert n_processes * expected_mb < gpu_mb


def test_compiled_kernels_are_kept_where_a_user_says_or_cuda_or_in_a_folder_of_this_users_own(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    for name in ("CUDA_CACHE_PATH", "CUDA_CACHE_MAXSIZE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(devices.tempfile, "tempdir", str(tmp_path))
    devices.keep_cuda_kernels()
    assert "CUDA_CACHE_PATH" not in os.environ and os.environ["CUDA_CACHE_MAXSIZE"] == "4294967296"
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    for _ in range(2):
        devices.keep_cuda_kernels()
        folder = tmp_path / f"unet_ray-cuda-{os.getuid()}"
        assert os.environ["CUDA_CACHE_PATH"] == str(folder) and folder.stat().st_mode & 0o777 == 0o700
        monkeypatch.delenv("CUDA_CACHE_PATH")
    monkeypatch.setenv("CUDA_CACHE_PATH", "/mnt/kernels")
    devices.keep_cuda_kernels()
    assert os.environ["CUDA_CACHE_PATH"] == "/mnt/kernels"

"""The doctor's lines from given facts, and a report of them as text; `test_cluster` asks real nodes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from unet_ray.cluster import probes
from unet_ray.cluster.findings import Finding, NodeReport, Verdict, report_text
from unet_ray.model.device_trial import DeviceTrial, Gpu
from unet_ray.storage.access import Access

H200, A100, T4, OLD = (
    Gpu(name=name, capability=capability)
    for name, capability in (("H200", (9, 0)), ("A100", (8, 0)), ("T4", (7, 5)), ("K80", (3, 7)))
)
BUILT_FOR = ("sm_60", "sm_70", "sm_80", "sm_89", "compute_90")  # as TensorFlow 2.21 says
NO_GPUS = DeviceTrial(gpus=(), built_for=BUILT_FOR, xla_s=1.0)


def test_a_report_as_text():
    fine = Finding(topic="devices", text="Ray reserves 2 CPUs")
    bad = Finding(topic="XLA", text="does not\ncompile", verdict=Verdict.FAILS, remedy="give --device cpu")
    reports = [NodeReport(node="node a", findings=(fine, bad)), NodeReport(node="node b", findings=(fine,))]
    assert report_text(reports).splitlines() == [
        "node a:",
        "ok    devices         Ray reserves 2 CPUs",
        "FAIL  XLA             does not compile -> give --device cpu",
        "node b:",
        "ok    devices         Ray reserves 2 CPUs",
        "will not work on: node a",
    ]
    assert report_text(reports[1:]).splitlines()[-1] == "nothing is in the way of a job"
    assert [report.fails for report in reports] == [True, False]


@pytest.mark.parametrize(
    ("seen", "reserved", "n_cards", "verdict", "text"),
    [
        (0, {"CPU": 2.0}, 0, Verdict.OK, "Ray reserves 2 CPUs, 0 GPUs; TensorFlow sees 0 GPUs"),
        (1, {"CPU": 8.0, "GPU": 1.0}, 1, Verdict.OK, "Ray reserves 8 CPUs, 1 GPU; TensorFlow sees 1 GPU"),
        (0, None, 0, Verdict.OK, "Ray does not run; TensorFlow sees 0 GPUs"),
        (1, {"CPU": 8.0, "GPU": 2.0}, 2, Verdict.FAILS, "sees 1 GPU, the kernel 2 NVIDIA cards"),
        (0, {"CPU": 8.0, "GPU": 1.0}, 0, Verdict.FAILS, "Ray reserves 8 CPUs, 1 GPU; TensorFlow sees 0 GPUs"),
        (0, {"CPU": 8.0}, 1, Verdict.FAILS, "sees 0 GPUs, the kernel 1 NVIDIA card"),
        (2, {"CPU": 8.0}, 2, Verdict.NOTE, "Ray reserves 8 CPUs, 0 GPUs; TensorFlow sees 2 GPUs"),
    ],
)
def test_what_ray_reserves_is_held_against_what_tensorflow_sees(seen, reserved, n_cards, verdict, text):
    finding = probes.look_at_devices(DeviceTrial(gpus=(A100,) * seen), reserved, n_cards)
    assert finding.verdict is verdict and text in finding.text
    assert (finding.remedy == "") == (verdict is Verdict.OK)
    assert verdict is not Verdict.FAILS or finding.remedy == probes.INSTALL_GPU


def test_a_tensorflow_that_does_not_load_is_said():
    finding = probes.look_at_devices(DeviceTrial(ended="exit code 1: ImportError: libm.so"), {"CPU": 1.0}, 0)
    assert finding.verdict is Verdict.FAILS
    assert finding.text == ("Ray reserves 1 CPU, 0 GPUs; TensorFlow does not load (exit code 1: ImportError: libm.so)")


@pytest.mark.parametrize(
    ("gpus", "verdict", "text"),
    [
        ((), Verdict.OK, "no GPU, so none"),
        ((A100, T4), Verdict.OK, "A100 8.0, T4 7.5"),
        ((A100, H200), Verdict.NOTE, "A100 8.0, H200 9.0"),
        ((Gpu(name="B200", capability=(10, 0)),), Verdict.NOTE, "B200 10.0"),
        ((H200, OLD), Verdict.FAILS, "H200 9.0, K80 3.7"),
    ],
)
def test_a_gpu_has_code_of_its_own_or_compiles_it_or_has_none(gpus, verdict, text):
    finding = probes.look_at_capability(gpus, BUILT_FOR)
    assert (finding.verdict, finding.text) == (verdict, text)


def test_all_gpus_must_have_bfloat16():
    assert probes.look_at_bfloat16((A100, H200)).text == "the GPUs multiply in it"
    assert probes.look_at_bfloat16((A100, T4)).text == "no; --precision auto takes float32, which is slower"


def test_an_xla_that_does_not_compile_fails_with_what_it_said():
    assert probes.look_at_xla(NO_GPUS).text == "compiles on the CPU (1 s)"
    finding = probes.look_at_xla(DeviceTrial(gpus=(H200,), ended="SIGABRT: no such ISA"))
    assert (finding.verdict, finding.text) == (Verdict.FAILS, "does not compile on 1 GPU: SIGABRT: no such ISA")


def test_nccl_is_needed_on_gpus_only():
    assert probes.look_at_nccl(NO_GPUS).text == "no GPU, so not needed"
    assert probes.look_at_nccl(DeviceTrial(gpus=(A100,), nccl="2.27.3")).text == "2.27.3 loads"
    assert probes.look_at_nccl(DeviceTrial(gpus=(A100,))).verdict is Verdict.FAILS


CPU_RUNTIME, GPU_RUNTIME = {"onnxruntime": "1.32.0"}, {"onnxruntime-gpu": "1.31.1"}
ANEW = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'unet-ray[{}]'"


@pytest.mark.parametrize(
    ("runtimes", "has_cuda", "n_gpus", "verdict", "text", "remedy"),
    [
        (CPU_RUNTIME, False, 0, Verdict.OK, "onnxruntime 1.32.0", ""),
        (GPU_RUNTIME, True, 1, Verdict.OK, "onnxruntime-gpu 1.31.1", ""),
        ({}, False, 1, Verdict.OK, "ONNX Runtime is not installed; only imported models need it", ""),
        (
            *(CPU_RUNTIME, False, 2, Verdict.NOTE, "onnxruntime 1.32.0 cannot use the GPUs"),
            f"for imported models: {ANEW.format('onnx-gpu')} (CUDA 13), or give them --device cpu",
        ),
        (
            *(CPU_RUNTIME | GPU_RUNTIME, True, 1, Verdict.FAILS),
            "onnxruntime 1.32.0, onnxruntime-gpu 1.31.1 exclude each other: both own the module onnxruntime",
            ANEW.format("onnx-gpu"),
        ),
        (CPU_RUNTIME, None, 0, Verdict.FAILS, "onnxruntime 1.32.0 does not load", ANEW.format("onnx")),
    ],
)
def test_one_onnx_runtime_and_on_gpus_the_one_for_them(runtimes, has_cuda, n_gpus, verdict, text, remedy):
    providers = () if has_cuda is None else ("CUDAExecutionProvider",) * has_cuda + ("CPUExecutionProvider",)
    finding = probes.look_at_onnx(runtimes, providers, n_gpus)
    assert (finding.verdict, finding.text, finding.remedy) == (verdict, text, remedy)


def test_the_onnx_runtime_of_this_machine():
    runtimes, providers = probes.onnx_runtimes(), probes.onnx_providers()
    assert bool(runtimes) == ("CPUExecutionProvider" in providers)


def test_versions_outside_what_is_declared_fail_and_others_than_the_drivers_are_noted():
    versions, ranges = probes.installed_versions(), probes.declared_ranges()
    assert set(ranges) >= set(probes.PACKAGES) and set(versions) >= {"unet-ray", "Python", *probes.PACKAGES}
    finding = probes.look_at_versions(versions, ranges, versions)
    assert finding.verdict is Verdict.OK and f"ray {versions['ray']}" in finding.text
    finding = probes.look_at_versions({**versions, "ray": "1.0"}, ranges, versions)
    assert (finding.verdict, finding.remedy) == (Verdict.FAILS, f"pip install 'ray{ranges['ray']}'")
    without = {name: version for name, version in versions.items() if name not in ("pillow", "kornia-rs")}
    finding = probes.look_at_versions(without, ranges, versions)
    assert finding.remedy == f"pip install 'pillow{ranges['pillow']}'" and "; no kornia-rs: Pillow" in finding.text
    finding = probes.look_at_versions({**versions, "numpy": "2.99"}, {}, versions)
    assert finding.verdict is Verdict.NOTE and f"numpy {versions['numpy']}; frames may get other" in finding.remedy


def test_a_small_shared_memory_and_a_full_disk_are_said(monkeypatch, tmp_path):
    total = probes.shutil.disk_usage("/dev/shm").total
    finding = probes.look_at_memory(2.0 * total, str(tmp_path))
    assert finding.verdict is Verdict.NOTE and re.search(r"--shm-size=[\d.]+g; ", finding.remedy)
    assert f"it spills to {tmp_path}, " in finding.text
    monkeypatch.setattr(probes, "FULL_SHARE", 0.0)
    assert probes.look_at_memory(1.0, str(tmp_path)).verdict is Verdict.FAILS


@pytest.mark.parametrize(("line", "cpus"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("", None), (None, None)])
def test_a_containers_limit_of_cpus(line, cpus, tmp_path):
    if line is not None:
        (tmp_path / "cpu.max").write_text(line)
    assert probes.cpu_quota(tmp_path / "cpu.max") == cpus


def test_more_cpus_of_ray_than_cores_are_noted():
    assert probes.look_at_threads(10_000.0).verdict is Verdict.NOTE
    finding = probes.look_at_threads(1.0)
    assert "1 CPU of Ray" in finding.text


def test_few_open_files_are_noted():
    """In a process of its own, whose limit cannot be raised again."""
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))\n"
        "from unet_ray.cluster.probes import look_at_threads; print(look_at_threads(1.0).remedy)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "ulimit -n 65536 before Ray starts\n"


def test_what_a_uri_allows_is_one_line():
    fine = Access(uri="s3://a", works=("list", "read"))
    assert probes.look_at_access(fine) == Finding(topic="storage", text="s3://a: list, read")
    refused = Access(uri="s3://a", works=("list",), fails="read", problem="Forbidden", remedy="ask for the right")
    assert probes.look_at_access(refused) == Finding(
        topic="storage",
        text="s3://a: list; cannot read: Forbidden",
        verdict=Verdict.FAILS,
        remedy="ask for the right",
    )


def test_the_readme_of_the_jobs_names_every_line():
    text = (Path(__file__).parents[2] / "jobs" / "README.md").read_text()
    for topic in (
        "versions",
        "devices",
        "capability",
        "bfloat16",
        "XLA",
        "NCCL",
        "ONNX",
        "memory",
        "threads",
        "storage",
    ):
        assert f"`{topic}`" in text

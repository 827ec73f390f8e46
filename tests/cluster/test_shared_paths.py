"""Local paths on a cluster of two machines: a second address, and a mount namespace in which a folder is another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from ray_nodes import RayNodes

from unet_ray.chaos import trials
from unet_ray.demo import synthetic
from unet_ray.output import verify

ROOT = Path(__file__).parents[2]
ADDRESS = "127.0.0.2"

ASK = """
import json, sys
from unet_ray.cluster import connection as cluster
from unet_ray.cluster import shared_paths as machines
cluster.connect()
for inputs, out in json.loads(sys.argv[1]):
    try:
        machines.require_seen_by_all(inputs, out)
        print("seen")
    except ValueError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder that both machines see, and one in the place of which the other has one of its own."""
    return tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def nodes(folders: tuple[Path, Path]) -> Iterator[RayNodes]:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace takes root")
    with RayNodes() as nodes:
        add_machine(nodes, ADDRESS, folders)
        yield nodes


def add_machine(nodes: RayNodes, address: str, folders: tuple[Path, Path]) -> Path:
    """Adds a machine with a folder and a processor of its own; returns the file that says what this can do."""
    shared, own = folders
    processor = shared / f"cpuinfo-{address}"
    processor.write_text(Path("/proc/cpuinfo").read_text())
    mounted = 'mount -t tmpfs none "$0" && mount --bind "$1" /proc/cpuinfo && shift && exec "$@"'
    other = ["unshare", "--mount", "sh", "-c", mounted, str(own), str(processor)]
    nodes.add(f"--node-ip-address={address}", prefix=other)
    return processor


@pytest.fixture(scope="module")
def model(folders: tuple[Path, Path]) -> Path:
    return trials._write_model(folders[0] / "random", 0)


@pytest.fixture(scope="module")
def log(folders: tuple[Path, Path]) -> Path:
    """A driving log that both machines see."""
    log = folders[0] / "log"
    synthetic.write_log(str(log), seed=0, drives=2, frames_per_drive=4, height_px=24, width_px=48)
    return log


def pairs(log: Path) -> list[str]:
    return ["--images", f"{log}/CameraRGB", "--masks", f"{log}/CameraMask", "--classes", "carla23"]


def run(
    nodes: RayNodes, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    variables = {**nodes.environment, "RAY_ADDRESS": nodes.address, **(environment or {})}
    return subprocess.run([sys.executable, *command], env=variables, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_path_that_another_machine_does_not_see_is_refused(nodes, folders):
    shared, own = folders
    (shared / "frames").mkdir()
    (own / "frames").mkdir()
    cases: list[tuple[dict[str, list[str]], str | None]] = [
        ({"--frames": [f"{shared}/frames"]}, f"{shared}/out/of/this"),
        ({"--frames": [f"{own}/frames"]}, None),
        ({"--model": [f"{shared}/frames"], "--frames": [f"{shared}/frames", f"{own}/frames"]}, f"{own}/out"),
        ({"--frames": ["s3://bucket/frames"]}, f"{own}/out"),
        ({"--frames": ["s3://bucket/frames"]}, "s3://bucket/out"),
    ]
    before = {folder: os.listdir(folder) for folder in folders}
    done = run(nodes, ["-c", ASK, json.dumps(cases)])
    this_address = nodes.address.partition(":")[0]

    def refused(option: str, path: str) -> str:
        return (
            f"{option} {path} is a path of {this_address} that the node {ADDRESS} does not see; with several machines, "
            "give a URI that all of them reach (s3://…), or mount that folder at the same place on each"
        )

    assert done.stdout.splitlines()[2:] == [
        "seen",
        refused("--frames", f"{own}/frames"),
        refused("--frames", f"{own}/frames"),
        refused("--out", f"{own}/out"),
        "seen",
    ], done.stderr
    assert {folder: os.listdir(folder) for folder in folders} == before


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_both_jobs_end_with_that_line_before_the_work_starts(nodes, folders, log, model):
    _, own = folders
    before = os.listdir(own)
    jobs = {
        "train": [*pairs(log), "--workers", "1", "--out", f"{own}/run"],
        "segment": ["--model", str(model), "--frames", f"{log}/CameraRGB", "--out", f"{own}/labels"],
    }
    for name, options in jobs.items():
        done = run(nodes, [f"jobs/{name}.py", *options])
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"unet-ray: error: --out {options[-1]} is a path of "), (
            done.stderr
        )
        assert " steps of " not in done.stdout and " to do; " not in done.stdout
    assert os.listdir(own) == before


@pytest.mark.weekly
@pytest.mark.timeout(1800)
def test_the_machines_share_nothing_but_the_paths_that_are_given(nodes, folders, log):
    """All work is the other machine's, and what the driver's puts into temporary files it does not see."""
    shared, own = folders
    small = ["--epochs", "1", "--image-size", "16", "32", "--n-filters", "4", "--depth", "2", "--workers", "1"]
    for command in (
        ["jobs/train.py", *pairs(log), *small, "--out", f"{shared}/run"],
        ["jobs/segment.py", "--model", f"{shared}/run", "--frames", f"{log}/CameraRGB", "--out", f"{shared}/labels"],
    ):
        done = run(nodes, command, {"TMPDIR": str(own)})
        assert done.returncode == 0, done.stdout + done.stderr
    assert verify.verify(f"{shared}/labels") == []


PRECISION = """
import os
import ray
from unet_ray.cluster import connection as cluster
from unet_ray.labelling import job as segmentation
cluster.connect()
print(segmentation.resolve_precision("auto", "cpu"))
print(ray.get(ray.remote(lambda: os.environ["CUDA_CACHE_PATH"]).remote()))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_auto_is_bfloat16_where_every_machine_that_works_has_it(nodes, folders):
    processors = folders[0] / f"cpuinfo-{ADDRESS}", add_machine(nodes, "127.0.0.3", folders)
    for flags, expected in ((("avx512_bf16", "avx2"), "float32"), (("avx512_bf16", "fpu amx_bf16"), "bfloat16")):
        for processor, of_processor in zip(processors, flags, strict=True):
            processor.write_text(f"flags : {of_processor}\n")
        done = run(nodes, ["-c", PRECISION], {"CUDA_CACHE_PATH": "/mnt/kernels"})
        # Where compiled kernels are kept is handed to the other machine's processes, too.
        assert done.stdout.splitlines()[-2:] == [expected, "/mnt/kernels"], done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_machine_that_comes_when_the_job_waits_for_it_is_asked_too(nodes, folders, model, tmp_path):
    shared, own = folders
    synthetic.write_log(f"{own}/log", seed=0, drives=1, frames_per_drive=3, height_px=24, width_px=48)
    options = [
        "--frames",
        f"{own}/log/CameraRGB",
        "--out",
        f"{shared}/late",
        "--precision",
        "float32",
        "--device",
        "cpu",
    ]
    with RayNodes() as growing, (tmp_path / "said").open("w+") as log_file:
        environment = {**growing.environment, "RAY_ADDRESS": growing.address}
        command = [sys.executable, str(ROOT / "jobs/segment.py"), "--model", str(model), *options]
        job = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file)
        try:
            waits = "the job wants 1 CPU; the cluster has 0 CPUs; waiting"
            assert trials.wait_until(lambda: waits in (tmp_path / "said").read_text(), job)
            add_machine(growing, ADDRESS, folders)
            assert job.wait() == 2, (tmp_path / "said").read_text()
        finally:
            job.kill()
            job.wait()
        lines = (tmp_path / "said").read_text().splitlines()
        assert lines[-1].startswith(f"unet-ray: error: --frames {own}/log/CameraRGB/"), lines
        assert f" that the node {ADDRESS} does not see; " in lines[-1]

"""The `ray job submit` lines of jobs/README.md, word for word, on a real head, two nodes with a token and an S3."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
from fsspec import AbstractFileSystem
from gates import CHECKPOINTS, STAGES, Gates
from ray._private.runtime_env.packaging import create_package
from ray_nodes import RayNodes
from s3_server import KEY_ID, SECRET, make_bucket, reach, run_server
from test_readme import blocks

from unet_ray.chaos.trials import wait_until
from unet_ray.demo import synthetic
from unet_ray.output import verify

ROOT = Path(__file__).parents[2]
PLANTED = (
    *("venv/lib/site.py", "env/pyvenv.cfg", ".venv/bin/python", ".git/config", ".env", "data/0.png", "drives.tar"),
    *("runs/first/model.bin", "labels/frames/part.parquet", "notes/train.py", "unet_ray/weights.bin", "jobs/out.log"),
    *("tests/test_x.py", "unet_ray/__pycache__/cli.pyc", "build/lib/x.py", "unet_ray.egg-info/PKG-INFO", "core.1"),
)
"""What lies about in a checkout that is worked in."""

TIMEOUT_S = 1800
"""Of a test with what it is the first to need; nothing in it has a shorter time of its own."""

SMALL = {
    "train": "--cpus-per-worker 1 --epochs 4 --batch-size 4 --val-fraction 0.34 --image-size 16 32 --n-filters 4",
    "segment": "--chunk-frames 1 --batch-size 1",
}
AT_WORK = ("ray::RayTrainWorker", "ray::_RayTrainWorker", "ray::MapWorker", "ray::Launcher", "ray::Read")
DECODERS = ("tasks", "name", "ReadFrames")
LABELERS = ("actors", "class_name", "MapWorker(MapBatches(_ModelActor")


def readme_line(job: str) -> str:
    """Returns the one submission of `jobs/<job>.py` that jobs/README.md shows."""
    lines = (line for block in blocks("sh", "jobs/README.md") for line in block.replace("\\\n", " ").splitlines())
    (line,) = (line for line in lines if line.startswith("ray job submit ") and f"jobs/{job}.py" in line)
    return line


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AbstractFileSystem]:
    """The README's `s3://bucket`, with its frames: all that the nodes have in common."""
    root = tmp_path_factory.mktemp("bucket")
    synthetic.write_log(str(root / "log"), seed=3, drives=3, frames_per_drive=4, height_px=24, width_px=48)
    synthetic.write_log(str(root / "new"), seed=4, drives=4, frames_per_drive=6, height_px=24, width_px=48)
    with pytest.MonkeyPatch.context() as patch, run_server(str(root / "recording")) as server, reach(server, patch):
        make_bucket(server, "bucket")
        s3 = fsspec.filesystem("s3")
        s3.put(f"{root}/log/", "bucket/log/", recursive=True)
        s3.put(f"{root}/new/CameraRGB/", "bucket/drives/", recursive=True)
        yield s3


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Gates:
    """Shut: this little work would be done before the last node has a part in it."""
    stages = {"decode_chunks": math.inf, "label_chunks": math.inf}
    return Gates(tmp_path_factory.mktemp("gates"), {STAGES: stages, CHECKPOINTS: {"write_checkpoint": math.inf}})


@pytest.fixture(scope="module")
def nodes(bucket: AbstractFileSystem, gates: Gates) -> Iterator[RayNodes]:
    with RayNodes(settings=gates.settings) as nodes:
        for _ in range(2):
            nodes.add(num_cpus=2)
        yield nodes


def code() -> set[str]:
    """What a submission is to take."""
    kinds = ("jobs/*.py", "unet_ray/**/*.py", "unet_ray/recipes/*.yaml", "unet_ray/class_sets/*.yaml")
    pages = ("unet_ray/reports/*.html", "unet_ray/reports/*.css")
    return {"cluster.yaml", *(str(file.relative_to(ROOT)) for kind in (*kinds, *pages) for file in ROOT.glob(kind))}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this repository with all that one has in it."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("unet_ray", "jobs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "README.md", "cluster.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout / name)
    for name in PLANTED:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(b"not code")
    return checkout


def test_the_code_is_what_ray_packs(checkout: Path, tmp_path: Path) -> None:
    create_package(str(checkout), tmp_path / "package.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        assert {name for name in package.namelist() if not name.endswith("/")} == code()


@dataclass
class Submission:
    """A running `ray job submit`."""

    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, happened: Callable[[], object]) -> None:
        assert wait_until(happened, self.process, timeout_s=TIMEOUT_S), self.output()

    def has_said(self, text: str) -> bool:
        return text in self.output()

    @property
    def job(self) -> str:
        match = re.search(r"Job '(\S+)' submitted successfully", self.output())
        assert match, self.output()
        return match[1]


@dataclass
class Desk:
    """Where the submissions are made."""

    nodes: RayNodes
    checkout: Path
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**self.nodes.environment, "RAY_ADDRESS": self.nodes.dashboard}

    @contextmanager
    def submitted(self, job: str) -> Iterator[Submission]:
        log = self.folder / f"{job}-{len(list(self.folder.iterdir()))}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*shlex.split(readme_line(job)), *SMALL[job].split()],
                cwd=self.checkout, env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        try:
            yield Submission(process, log)
        finally:
            process.kill()
            process.wait()

    def submit(self, job: str) -> str:
        """Submits a job, waits for its end and returns its log."""
        with self.submitted(job) as submission:
            submission.process.wait()
        assert submission.process.returncode == 0, submission.output()
        return submission.output()

    def stop(self, submission: Submission, *workers: str) -> None:
        """Stops a job in the middle of its work: its workers stand still until it is stopped."""
        frozen = self.nodes.running(*workers)
        assert frozen, submission.output()
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        done = subprocess.run(
            ["ray", "job", "stop", submission.job], env=self.environment, capture_output=True, text=True
        )
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        assert done.returncode == 0, done.stdout + done.stderr
        submission.process.wait()
        assert submission.has_said("unet-ray: error: stopped; the same command goes on where this one stopped")
        assert submission.has_said(f"Job '{submission.job}' was stopped")
        assert wait_until(lambda: not self.nodes.running(*AT_WORK, "python jobs/"), timeout_s=TIMEOUT_S)

    def nodes_of(self, kind: str, key: str, name: str) -> set[str]:
        """Returns the nodes on which the dashboard has seen `actors` or `tasks` whose name begins so."""
        url = f"{self.nodes.dashboard}/api/v0/{kind}?limit=10000&detail=1"
        with urllib.request.urlopen(authorized(url, self.nodes)) as answer:
            entries = json.load(answer)["data"]["result"]["result"]
        return {entry["node_id"] for entry in entries if entry[key].startswith(name) and entry["node_id"]}


def authorized(url: str, nodes: RayNodes) -> urllib.request.Request:
    token = Path(nodes.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    return urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})


@pytest.fixture(scope="module")
def desk(nodes: RayNodes, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(nodes, checkout, tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def trained(desk: Desk, gates: Gates) -> tuple[str, str]:
    """What a training said that was stopped in its third epoch, and what the same line said when submitted again."""
    with desk.submitted("train") as submission:
        gates.open_for("write_checkpoint", 2)
        submission.wait_until(lambda: submission.has_said("epoch 2/4"))
        desk.stop(submission, "ray::RayTrainWorker")
    gates.open("write_checkpoint")
    return submission.output(), desk.submit("train")


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_a_submitted_training_is_stopped_and_the_same_line_goes_on(trained):
    first, second = trained
    assert "2 workers x 1 CPU; 8 frames in 2 steps of 4 x 4 epochs = 8 steps; 4 frames for validation" in first
    assert "epoch 1/4  loss" in first
    assert "epoch 3/4  loss" not in first
    assert "going on after epoch 2 of 4, from its checkpoint" in second
    assert "epoch 2/4  loss" not in second
    assert "epoch 4/4  loss" in second
    assert "model: s3://bucket/runs/first/model" in second
    assert "no authentication" not in first + second


@pytest.fixture(scope="module")
def labelled(trained: tuple[str, str], desk: Desk, bucket: AbstractFileSystem, gates: Gates) -> str:
    """What a labelling said that was submitted again after it was stopped with all nodes at work and a chunk done."""

    def is_recorded() -> bool:
        bucket.invalidate_cache()
        return bool(bucket.find("bucket/labels/_work/records"))

    with desk.submitted("segment") as submission:
        submission.wait_until(lambda: len(desk.nodes_of(*DECODERS)) == 2)
        gates.open("decode_chunks")
        submission.wait_until(lambda: len(desk.nodes_of(*LABELERS)) == 2)
        gates.open_for("label_chunks", 1)
        submission.wait_until(is_recorded)
        desk.stop(submission, "ray::MapWorker")
    gates.open("label_chunks")
    return desk.submit("segment")


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_a_submitted_labelling_is_stopped_and_the_same_line_goes_on(labelled):
    output = labelled
    assert "24 frames in 24 chunks, 23 in 23 to do" in output
    assert "24 of 24 frames (100%), " in output
    assert "24 frames: 24 labelled, 0 rejected" in output
    assert verify.verify("s3://bucket/labels") == []


@pytest.mark.slow
def test_training_is_spread_and_all_nodes_decode_and_label(labelled, desk):
    """Though both workers would fit on one node, and all decoders."""
    assert len(desk.nodes_of("actors", "class_name", "RayTrainWorker")) == 2
    assert len(desk.nodes_of(*LABELERS)) == 2
    assert len(desk.nodes_of(*DECODERS)) == 2


@pytest.mark.slow
def test_only_the_code_has_travelled(trained, nodes):
    """Into the folder that Ray unpacks at each node, and in which the job runs."""
    (arrived,) = (nodes.ray_folder / "session_latest").glob("runtime_resources/working_dir_files/_ray_pkg_*/")
    files = {str(file.relative_to(arrived)) for file in arrived.rglob("*") if file.is_file()}
    assert {name for name in files if not name.endswith(".pyc")} == code()


@pytest.mark.slow
def test_without_the_token_the_job_api_answers_no(nodes):
    url = f"{nodes.dashboard}/api/jobs/"
    with urllib.request.urlopen(authorized(url, nodes)) as answer:
        assert answer.status == 200
    guess = urllib.request.Request(url, data=b'{"entrypoint": "true"}', headers={"Authorization": "Bearer guess"})
    for request, status in ((url, 401), (guess, 403)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == status
        caught.value.close()


@pytest.mark.slow
def test_neither_the_token_nor_a_key_is_in_a_log_an_output_or_the_jobs_records(labelled, desk, bucket):
    token = Path(desk.nodes.environment["RAY_AUTH_TOKEN_PATH"])
    with urllib.request.urlopen(authorized(f"{desk.nodes.dashboard}/api/jobs/", desk.nodes)) as answer:
        contents = {"the jobs' records": answer.read()}
    bucket.invalidate_cache()
    contents |= bucket.cat([path for path in bucket.find("bucket") if not path.endswith(".png")])
    for folder in (desk.nodes.folder, desk.folder):
        files = (file for file in folder.rglob("*") if file.is_file() and not file.is_symlink() and file != token)
        contents |= {str(file): file.read_bytes() for file in files}
    assert any("labels/config.yaml" in name for name in contents) and any("job-driver" in name for name in contents)
    for secret in (token.read_text(), SECRET, KEY_ID):
        assert [name for name, content in contents.items() if secret.encode() in content] == []

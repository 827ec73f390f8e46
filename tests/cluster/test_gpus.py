"""GPUs that only Ray knows of: the jobs refuse them at once, and work where TensorFlow is said to see them.

All computes on CPUs: the one look at what TensorFlow sees is replaced in the processes that Ray starts.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from small_training import CLASSES as PAIR_CLASSES
from small_training import write_data

from unet_ray import cli, images
from unet_ray.chaos import faults
from unet_ray.chaos.trials import wait_until
from unet_ray.classes import ClassSet, SegmentationClass
from unet_ray.cluster import connection as cluster
from unet_ray.errors import JobFailed
from unet_ray.labelling import work as labelling
from unet_ray.labelling.stages import ChunkOutcome
from unet_ray.model import devices
from unet_ray.model.architecture import ModelConfig
from unet_ray.model.bundle import write_bundle
from unet_ray.model.unet import weight_shapes
from unet_ray.output import verify
from unet_ray.progress import Progress

pytestmark = pytest.mark.timeout(300)

REFUSED = (
    f"unet-ray: error: Ray has a GPU on node {socket.gethostname()}, but {{}}; install TensorFlow's CUDA libraries "
    "there (pip install 'unet-ray[gpu]', which is tensorflow[and-cuda]) and an NVIDIA driver, or give --device cpu"
)
SEES_NONE = "TensorFlow sees none there"
NO_NVIDIA_SMI = "there is no nvidia-smi there, which --precision auto asks (other values do not)"

# Python runs this in every process that Ray starts. Each look leaves a line; the first so many, as the file `sees`
# says, see a GPU.
LOOK = """
import os
folder = os.path.dirname(__file__)
def faked(look):
    def look_or_fake():
        with open(os.path.join(folder, "looks"), "a+") as looks:
            looks.write(f"{os.getpid()}\\n")
            looks.seek(0)
            n_looks = len(looks.readlines())
        with open(os.path.join(folder, "sees")) as sees:
            return ["GPU:0"] if n_looks <= int(sees.read()) else look()
    return look_or_fake
try:
    from unet_ray.model import devices
except ImportError:
    devices = None
if devices:
    devices.visible_gpus = faked(devices.visible_gpus)
"""
ALWAYS = 10**6


class Looks:
    """What the processes of the cluster see, and how often they have looked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "sitecustomize.py").write_text(LOOK)

    def see(self, n_looks: int) -> None:
        """From now on so many looks see a GPU, and those after them what there is: none.

        First the model actors of an earlier job must have ended, which may still look.
        """
        assert wait_until(lambda: not faults.titled_below(os.getpid(), "ray::MapWorker"), timeout_s=60)
        (self._folder / "looks").write_text("")
        (self._folder / "sees").write_text(str(n_looks))

    def count(self) -> int:
        return len((self._folder / "looks").read_text().splitlines())


def _commands(folder: Path) -> Path:
    """A folder with all that Ray's processes need of this machine's commands (Ray 2.60)."""
    (folder / "bash").symlink_to(shutil.which("bash"))
    return folder


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory):
    """A cluster of this machine that has two GPUs and no `nvidia-smi`, as Ray is told."""
    folder = tmp_path_factory.mktemp("look")
    looks = Looks(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.setenv("PATH", f"{_commands(tmp_path_factory.mktemp('bin'))}{os.pathsep}{Path(sys.executable).parent}")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(ray, "init", functools.partial(ray.init, num_cpus=4, num_gpus=2))
        cluster.connect()
        yield looks
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random network for the classes of the pairs."""
    uri, random = str(tmp_path_factory.mktemp("model")), np.random.default_rng(5)
    class_set = ClassSet(
        name="three",
        classes=tuple(
            SegmentationClass(name=of["name"], color=tuple(of["color"]), values=tuple(of["values"]))
            for of in PAIR_CLASSES["classes"]
        ),
        ignore=tuple(PAIR_CLASSES["ignore"]),
    )
    config = ModelConfig(image_height_px=24, image_width_px=32, n_classes=3, n_filters=4, depth=2, dropout=0.0)
    weights = {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in weight_shapes(config).items()}
    write_bundle(uri, weights, config, class_set, {})
    return uri


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    write_data(root)
    return root


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven frames of three sizes in two drives."""
    root, random = tmp_path_factory.mktemp("frames"), np.random.default_rng(7)
    for drive, n_frames in {"a": 5, "b": 6}.items():
        (root / drive).mkdir()
        for index in range(n_frames):
            height_px, width_px = ((48, 66), (33, 52), (24, 32))[index % 3]
            blocks = random.integers(0, 256, (height_px // 3, width_px // 2, 3)).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(blocks).resize((width_px, height_px), Image.Resampling.NEAREST).save(buffer, "PNG")
            (root / drive / f"{index}.png").write_bytes(buffer.getvalue())
    return root


@pytest.fixture
def command(model: str, pairs: Path, frames: Path, tmp_path: Path) -> dict[str, list[str]]:
    """Of each job the command line without device and precision."""
    data = ["--images", f"{pairs}/frames", "--masks", f"{pairs}/masks"]
    shape = ["--image-size", "24", "32", "--n-filters", "4", "--depth", "2", "--batch-size", "4", "--epochs", "2"]
    chunks = ["--chunk-frames", "2", "--batch-size", "3"]
    return {
        "train": ["train", *data, *shape, "--classes", f"{pairs}/classes.yaml", "--out", f"{tmp_path}/run"],
        "evaluate": ["evaluate", "--model", model, *data, "--out", f"{tmp_path}/measured"],
        "segment": ["segment", "--model", model, "--frames", str(frames), "--out", f"{tmp_path}/labels", *chunks],
    }


def rows_of(out: Path) -> list[dict]:
    return pa.concat_tables(pq.read_table(file) for file in sorted((out / "frames").glob("*.parquet"))).to_pylist()


def test_what_is_labelled_on_gpus_is_what_cpus_label(looks: Looks, command, tmp_path: Path, capfd) -> None:
    looks.see(ALWAYS)
    for device in ("gpu", "cpu"):
        out = ["--out", str(tmp_path / device), "--device", device, "--precision", "float32"]
        assert cli.main([*command["segment"], *out]) == 0, capfd.readouterr().err
        output = capfd.readouterr().out
        assert f"device: {device}\n" in output and "11 frames: 11 labelled, 0 rejected\n" in output
        assert f"; {'2 model actors' if device == 'gpu' else '1 model actor'} x " in output
        assert looks.count() == 2, "each actor on a GPU looks once, and none on a CPU"
        assert verify.verify(str(tmp_path / device)) == []
    seen = set()
    for row, other in zip(rows_of(tmp_path / "gpu"), rows_of(tmp_path / "cpu"), strict=True):
        mask, expected = images.decode_mask(row["mask"]), images.decode_mask(other["mask"])
        # Other orders of the same float32 sums.
        assert mask.shape == expected.shape and (mask != expected).mean() < 0.002
        for name in [name for name in row if name.startswith("pixels_")]:
            assert abs(row[name] - other[name]) <= 0.002 * mask.size
        assert row["confidence"] == pytest.approx(other["confidence"], abs=1e-4)
        assert row["low_margin_share"] == pytest.approx(other["low_margin_share"], abs=0.002)
        same = ("frame_id", "status", "reason", "height_px", "width_px", "mask_height_px", "mask_width_px")
        assert [row[name] for name in same] == [other[name] for name in same] and row["status"] == "ok"
        seen |= set(np.unique(mask))
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("job", "n_looks"),
    [
        *(("segment", 0), ("train", 0)),
        *(pytest.param(job, n, marks=pytest.mark.slow) for job, n in (("train", 1), ("evaluate", 0), ("evaluate", 1))),
    ],
)
def test_a_gpu_that_tensorflow_does_not_see_ends_the_job_at_once(
    looks: Looks, command, job: str, n_looks: int, tmp_path: Path, capfd
) -> None:
    """Training and evaluation look before they read anything; where that node sees one, another may not."""
    looks.see(n_looks)
    assert cli.main([*command[job], "--device", "gpu", "--precision", "float32"]) == 1
    captured = capfd.readouterr()
    hint = "; then the same command goes on" if job == "segment" else ""
    assert captured.err == REFUSED.format(SEES_NONE) + hint + "\n"
    assert "Traceback" not in captured.out
    for second_try in ("once more", "a worker was lost", "the group has started again"):
        assert second_try not in captured.out
    if job == "segment":
        assert not list((tmp_path / "labels").rglob("part*")) and not (tmp_path / "labels/frames").exists()
    else:
        assert looks.count() == n_looks + 1
    assert job != "train" or (" steps of 4 " in captured.out) == bool(n_looks)


def test_the_first_outcome_that_tells_of_such_a_gpu_ends_the_labelling() -> None:
    asked: list[int] = []

    def outcomes(blocks: Sequence[int], *, carefully: bool) -> Iterator[list[ChunkOutcome]]:
        for block in blocks:
            asked.append(block)
            kind = ("storage", "failed", "unusable")[block]
            yield [ChunkOutcome(chunk_id=str(block), n_rows=4, rejected={}, trouble=f"{kind} on node-7", kind=kind)]

    with (
        Progress(40, "frames") as progress,
        pytest.raises(JobFailed, match="^unusable on node-7; then the same command goes on$"),
    ):
        labelling._label(outcomes, range(10), progress, labelling._Tally(40, 0.0), None, int, carefully=False)
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("job", ["segment", "train"])
def test_precision_auto_where_no_nvidia_smi_is_ends_the_job_at_once(looks: Looks, command, job: str, capfd) -> None:
    looks.see(ALWAYS)
    assert cli.main([*command[job], "--device", "gpu", "--precision", "auto"]) == 1
    captured = capfd.readouterr()
    assert captured.err == REFUSED.format(NO_NVIDIA_SMI) + "\n"
    assert "Traceback" not in captured.out and " steps of " not in captured.out and " to do; " not in captured.out


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (
            "exit 9",
            "nvidia-smi does not answer --precision auto there (Command '['nvidia-smi', '--query-gpu=compute_cap'",
        ),
        (
            "echo '[N/A]'",
            "nvidia-smi does not answer --precision auto there (could not convert string to float: '[N/A]')",
        ),
        ("exit 0", "nvidia-smi, which --precision auto asks, lists none there"),
        (None, NO_NVIDIA_SMI),
    ],
)
def test_an_nvidia_smi_that_does_not_tell_is_no_answer(script, problem, tmp_path, monkeypatch) -> None:
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(devices.UnusableGpu) as caught:
        devices.has_bfloat16("gpu")
    start, _, rest = REFUSED.removeprefix("unet-ray: error: ").partition("{}")
    assert str(caught.value).startswith(start + problem) and str(caught.value).endswith(rest)

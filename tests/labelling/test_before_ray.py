"""Mistakes in paths and options end a labelling before any Ray starts: exit code 2, one line, nothing written."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from unet_ray import cli
from unet_ray.archives.listing import list_archives
from unet_ray.classes import ClassSet, SegmentationClass
from unet_ray.config import SegmentConfig
from unet_ray.labelling.planning import lineage_of
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.bundle import read_bundle, write_bundle
from unet_ray.output import plans
from unet_ray.output.chunks import Cutting
from unet_ray.output.rows import RESULT_VERSION

CLASSES = ClassSet(name="one", classes=(SegmentationClass(name="road", color=(1, 2, 3), values=(0,)),))
CONFIG = UnetConfig(image_height_px=16, image_width_px=16, n_classes=1, n_filters=2, depth=2, dropout=0.0)


@pytest.fixture
def ray_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a Ray would leave its session; none does."""
    assert not ray.is_initialized()
    folder = tmp_path_factory.mktemp("ray")
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield folder
    assert not ray.is_initialized() and list(folder.iterdir()) == []


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Its weights are read by actors only, of which there are none."""
    write_bundle(str(tmp_path / "model"), {"w": np.zeros((1,), np.float32)}, CONFIG, CLASSES, {})
    return str(tmp_path / "model")


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, data: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def compressed_tar(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("1.png")
        member.size = len(png())
        archive.addfile(member, io.BytesIO(png()))


MISTAKES = {
    "gone": (lambda root: None, "gone", "{root}/gone: no such folder or file"),
    "log.tar.gz": (
        lambda root: compressed_tar(root / "log.tar.gz"),
        "log.tar.gz",
        "{root}/log.tar.gz: a compressed tar cannot be read by range; unpack it, or pack it again as a plain .tar",
    ),
    "drive.mp4": (
        lambda root: write(root / "drive.mp4"),
        "drive.mp4",
        "{root}/drive.mp4 is not an archive; give a folder, a tar, zip, Parquet or CSV file, or a glob of them",
    ),
    "a folder of mp4": (
        lambda root: [write(root / f"videos/{name}.mp4") for name in "abc"],
        "videos",
        "{root}/videos holds 3 .mp4; frames are .png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff",
    ),
    "a folder of hidden frames": (
        lambda root: write(root / "hidden/.thumbnails/1.png", png()),
        "hidden",
        "{root}/hidden holds 1 hidden (--include-hidden takes what is hidden); frames are .png, .jpg, .jpeg, .webp, "
        ".bmp, .tif, .tiff",
    ),
    "an empty folder": (
        lambda root: (root / "empty").mkdir(),
        "empty",
        "{root}/empty holds nothing; frames are .png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff",
    ),
    "a CSV without uri": (
        lambda root: write(root / "cat.csv", b"path,weather\na.png,rain\n"),
        "cat.csv",
        "{root}/cat.csv has no column 'uri'; its columns are path, weather",
    ),
    "a stranger's CSV": (
        lambda root: write(root / "cat.csv", b"uri\na.png\nfile:///etc/passwd\nhttp://169.254.169.254/latest/x.png\n"),
        "cat.csv",
        "{root}/cat.csv names 1 frame below /etc, 1 frame below http://169.254.169.254/latest; add --allow-uri /etc "
        "http://169.254.169.254/latest",
    ),
    "an empty CSV": (
        lambda root: write(root / "cat.csv", b""),
        "cat.csv",
        "{root}/cat.csv is no CSV file that can be read: Empty CSV file",
    ),
    "a Parquet file of neither": (
        lambda root: pq.write_table(pa.table({"x": [1]}), root / "x.parquet"),
        "x.parquet",
        "{root}/x.parquet has no column 'image' of encoded images, and no column 'uri'; its columns are x",
    ),
    "no Parquet file": (
        lambda root: write(root / "bad.parquet"),
        "bad.parquet",
        "{root}/bad.parquet is no Parquet file that can be read: Parquet file size is 1 bytes, smaller than the "
        "minimum file footer (8 bytes)",
    ),
    "a glob of nothing": (lambda root: None, "*.zip", "{root}/*.zip: nothing matches"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_frames_is_told_before_ray_starts(
    mistake: str, model: str, ray_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, name, message = MISTAKES[mistake]
    make(tmp_path)
    out = tmp_path / "labels"
    assert cli.main(["segment", "--model", model, "--frames", str(tmp_path / name), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"unet-ray: error: {message.format(root=tmp_path)}\n"
    assert not out.exists()


def begin(out: Path, model: str, frames: Path, *, result_version: int = RESULT_VERSION, **options: object) -> None:
    """An output that was planned and no more."""
    config = SegmentConfig(model=model, frames=(str(frames),), out=str(out), **options)
    lineage = dataclasses.replace(
        lineage_of(config, read_bundle(model), None, "bfloat16"), result_version=result_version
    )
    cutting = Cutting(chunk_frames=3, shard_rows=5)
    plans.plan(str(out), list_archives([str(frames)]), lineage, cutting, config_yaml="")


@pytest.mark.parametrize(
    ("mistake", "options", "message"),
    [
        (
            "strangers",
            [],
            "{out} holds files that are no output of segment (thesis.tex); give another --out",
        ),
        (
            "other options",
            ["--mask-size", "model", "--tta", "flip"],
            "{out} holds labels of another kind: --mask-size is native there and model here; --tta is none there and "
            "flip here; give another --out, or --overwrite",
        ),
        (
            "another precision",
            ["--precision", "float32"],
            "{out} holds labels of another kind: --precision is bfloat16 there and float32 here; give another --out, "
            "or --overwrite",
        ),
        (
            "an earlier version",
            [],
            "{out} holds labels of result version 4, and this release makes version 5: it can be read, verified and "
            "exported, but neither grown nor finished; give another --out, or --overwrite, or go on with the release "
            "that began it\n",
        ),
        (
            "another model",
            [],
            "{out} holds labels of another kind: model is {before} there (runs/first, labels begun 2001-09-09 01:46 "
            "UTC) and {now} here ({model}, written 2033-05-18 03:33 UTC); give another --out, or --overwrite\n",
        ),
        (
            "another model, of an output that does not say its name",
            [],
            "{out} holds labels of another kind: model is {before} there (labels begun 2001-09-09 01:46 UTC) and {now} "
            "here ({model}, written 2033-05-18 03:33 UTC); give another --out, or --overwrite\n",
        ),
    ],
)
def test_a_mistake_in_out_is_told_before_ray_starts(
    mistake: str,
    options: list[str],
    message: str,
    model: str,
    ray_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, frames = tmp_path / "labels", tmp_path / "log"
    write(frames / "1.png", png())
    before = read_bundle(model).digest
    if mistake == "strangers":
        write(out / "thesis.tex")
    else:
        begin(out, model, frames, result_version=4 if mistake == "an earlier version" else RESULT_VERSION)
    if mistake.startswith("another model"):
        write_bundle(model, {"w": np.ones((1,), np.float32)}, CONFIG, CLASSES, {})
        (out / "config.yaml").write_text("model: runs/first\n" if mistake == "another model" else "[torn")
        os.utime(out / "run.json", (1e9, 1e9))
        os.utime(f"{model}/model.json", (2e9, 2e9))
    there = sorted(path.relative_to(out) for path in out.rglob("*"))
    assert cli.main(["segment", "--model", model, "--frames", str(frames), "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    digests = {"before": before[:12], "now": read_bundle(model).digest[:12]}
    assert (
        error.startswith(f"unet-ray: error: {message.format(out=out, model=model, **digests)}")
        and error.count("\n") == 1
    )
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == there


UNUSABLE = {
    "a file": ("file", "--out {root}/file cannot be written: {root}/file is a file; give another --out"),
    "below a file": ("file/new", "--out {root}/file/new cannot be written: {root}/file is a file; give another --out"),
    "a cut link": (
        "cut",
        "--out {root}/cut cannot be written: {root}/cut is a link to what is not there; give another --out",
    ),
    "a part that is a file": (
        "odd",
        "{root}/odd/manifest is a file; an output of segment has a folder there, so give another --out",
    ),
    "a part that is a link": (
        "linked",
        "{root}/linked/_work is a link; an output of segment has none, so give another --out",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_output_that_cannot_be_made_is_told_before_ray_starts(
    name: str, model: str, ray_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "log/1.png", png())
    write(tmp_path / "file")
    (tmp_path / "cut").symlink_to("nowhere")
    write(tmp_path / "odd/manifest")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/_work").symlink_to(tmp_path / "log")
    path, message = UNUSABLE[name]
    out = str(tmp_path / path)
    assert cli.main(["segment", "--model", model, "--frames", str(tmp_path / "log"), "--out", out]) == 2
    assert capsys.readouterr().err == f"unet-ray: error: {message.format(root=tmp_path)}\n"
    if name in ("a part that is a file", "a part that is a link"):
        assert cli.main(["verify", out]) == 2
        assert capsys.readouterr().err == f"unet-ray: error: {message.format(root=tmp_path)}\n"


READ_ONLY = 'mount -t tmpfs none "$1" && mkdir "$1/begun" && mount -o remount,ro "$1" && shift && exec "$@"'
COMMAND = [sys.executable, "-c", "from unet_ray.cli import run; run()"]


def ended(command: list[str]) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_a_read_only_place_is_told_before_ray_starts(model: str, tmp_path: Path) -> None:
    write(tmp_path / "log/1.png", png())
    disk = tmp_path / "disk"
    disk.mkdir()
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    mounted = [*alone, "sh", "-c", READ_ONLY, "sh", str(disk)]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    for name, folder in (("new", disk), ("begun", disk / "begun")):
        out = str(disk / name)
        command = [*COMMAND, "segment", "--model", model, "--frames", str(tmp_path / "log"), "--out", out]
        assert ended([*mounted, *command]) == (
            2,
            f"unet-ray: error: --out {out} cannot be written: {folder} lies on a read-only file system; give another "
            "--out\n",
        )


def test_too_few_open_files_are_told_before_ray_starts(model: str, tmp_path: Path) -> None:
    write(tmp_path / "log/1.png", png())
    command = [*COMMAND, "segment", "--model", model, "--frames", str(tmp_path / "log"), "--out", str(tmp_path / "out")]
    assert ended(["sh", "-c", 'ulimit -n 100 && exec "$@"', "sh", *command]) == (
        2,
        "unet-ray: error: a process may have 100 open files here, and Ray needs 128; raise the limit (ulimit -n, "
        "LimitNOFILE of systemd)\n",
    )

"""Frames that are no longer what was labelled: `verify --sources`, which reads them again."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from labelled import make_plan, run, write_archive
from PIL import Image

from unet_ray import cli, storage
from unet_ray.labelling import stages
from unet_ray.labelling.decoding import DecodeOptions
from unet_ray.output import plans, sources, verify


@pytest.fixture
def root(tmp_path: Path) -> str:
    return write_archive(tmp_path / "log")


def swap(root: str, one: str, other: str) -> None:
    """Two files change places, each under the other's modification time."""
    paths = [Path(root) / one, Path(root) / other]
    contents, times_ns = [path.read_bytes() for path in paths], [path.stat().st_mtime_ns for path in paths]
    for path, content, time_ns in zip(paths, contents[::-1], times_ns, strict=True):
        path.write_bytes(content)
        os.utime(path, ns=(0, time_ns))


def test_two_files_that_were_swapped_under_one_time_are_named_by_the_command(root, tmp_path, capsys):
    out = str(tmp_path / "out")
    run(root, out)
    assert cli.main(["verify", out, "--sources"]) == 0
    whole = f"{out}: whole: every file and row agrees with its record"
    lines = capsys.readouterr().out.splitlines()
    following = f"Next: unet-ray export-masks {out} --out …"
    assert lines == [lines[0], whole, "sources: 13 of 13 labelled frames hold what was labelled", following]
    assert lines[0].startswith("13 of 13 frames (100%), ")
    swap(root, "b/1.png", "b/2.png")
    plan = make_plan(root, out)
    assert (plan.n_new, plan.origin.n_changed, plan.origin.n_gone) == (0, 0, 0) and verify.verify(out) == []
    assert cli.main(["verify", out, "--sources"]) == 1
    _, first, *lines = capsys.readouterr().out.splitlines()
    assert first == whole and lines == [
        f"b/1.png: {root}/b/1.png holds other bytes than those that were labelled",
        f"b/2.png: {root}/b/2.png holds other bytes than those that were labelled",
        "sources: 11 of 13 labelled frames hold what was labelled",
    ]
    assert cli.main(["verify", out]) == 0


def test_frames_that_are_gone_or_changed_are_named_and_rejected_ones_are_not_read(root, tmp_path):
    out = str(tmp_path / "out")
    run(root, out, reject=("b/4.png",))
    os.unlink(f"{root}/a/0.png")
    os.unlink(f"{root}/b/4.png")
    Path(f"{root}/c/0.png").write_bytes(b"longer than it was")
    read = sources.read_sources(plans.read_plan(out))
    assert (read.n_frames, read.n_unknown) == (12, 0)
    assert read.problems == (
        f"a/0.png: {root}/a/0.png is gone since it was listed",
        f"c/0.png: {root}/c/0.png has changed since it was listed",
    )


def test_an_archive_that_this_machine_does_not_see_is_no_verdict(root, tmp_path, capsys):
    out = str(tmp_path / "out")
    run(root, out)
    shutil.move(root, tmp_path / "elsewhere")
    with pytest.raises(storage.StorageError):
        sources.read_sources(plans.read_plan(out))
    assert cli.main(["verify", out, "--sources"]) == 75
    assert capsys.readouterr().err.startswith("unet-ray: error: ")


@pytest.mark.parametrize("kind", ["file", "tar", "zip", "parquet"])
def test_the_digest_is_that_of_the_frame_wherever_it_lies(kind, tmp_path):
    """Of a member its own bytes, unpacked; of a Parquet file the cell."""
    frames = {}
    for number in range(2):
        buffer = io.BytesIO()
        Image.fromarray(np.full((6 + number, 9, 3), 40 * number, np.uint8)).save(buffer, "PNG")
        frames[f"{number}.png"] = buffer.getvalue()
    root = tmp_path / "log"
    root.mkdir()
    if kind == "file":
        for name, data in frames.items():
            (root / name).write_bytes(data)
    elif kind == "tar":
        with tarfile.open(root / "drive.tar", "w") as tar:
            for name, data in frames.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    elif kind == "zip":
        with zipfile.ZipFile(root / "drive.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in frames.items():
                archive.writestr(name, data)
    else:
        pq.write_table(pa.table({"image": list(frames.values())}), root / "drive.parquet")
    plan = make_plan(str(root), str(tmp_path / "out"))
    decoded = stages.decode_chunks(plan.chunks, DecodeOptions(network_size=(4, 4), max_pixels=1000, timeout_s=20))
    assert decoded["_reason"].to_pylist() == [None, None]
    assert decoded["_content_digest"].to_pylist() == [xxhash.xxh3_64_hexdigest(data) for data in frames.values()]

"""Labelling on a real local Ray: equal rows from folder and tar, rejected frames, and a frame that kills."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import phases
import prometheus
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import small_output
from phases import assert_in_order
from PIL import Image
from predicting import predict_and_compare, require_same

from unet_ray import cli
from unet_ray.archives.listing import list_archives
from unet_ray.chaos import faults
from unet_ray.chaos.trials import beside_rejected, wait_until
from unet_ray.classes import ClassSet, SegmentationClass
from unet_ray.cluster.connection import connect
from unet_ray.cluster.gauges import Gauges
from unet_ray.config import SegmentConfig
from unet_ray.errors import JobFailed
from unet_ray.labelling import allocation, waves
from unet_ray.labelling import job as segmentation
from unet_ray.labelling import work as labelling
from unet_ray.labelling.job import segment
from unet_ray.labelling.planning import _frame_pixels, say_changes, say_ignored
from unet_ray.labelling.result import SegmentResult
from unet_ray.labelling.stages import ChunkOutcome
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.bundle import read_bundle, write_bundle
from unet_ray.output import ledger, manifest, plans, verify
from unet_ray.pixels import images
from unet_ray.progress import Progress

pytestmark = pytest.mark.timeout(300)

K = 5
CLASSES = ClassSet(
    name="five", classes=tuple(SegmentationClass(name=f"c{i}", color=(i, 2 * i, 7), values=(i,)) for i in range(K))
)
CONFIG = UnetConfig(image_height_px=24, image_width_px=32, n_classes=K, n_filters=4, depth=2, dropout=0.0)
SIZES = ((48, 66), (33, 52), (24, 32))

# Python runs this in every process that Ray starts: a stand-in for a decoder that falls over some frames.
FAULT = """
import os, signal, time
from unet_ray.pixels import images
def faulty(read):
    def read_faultily(data, *arguments, **limits):
        if data.startswith(b"segfault"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if data.startswith(b"hang"):
            time.sleep(600)
        return read(data, *arguments, **limits)
    return read_faultily
for name in ("decode_frame", "decode_reduced_frame", "frame_size"):
    setattr(images, name, faulty(getattr(images, name)))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    faults = tmp_path_factory.mktemp("faults")
    (faults / "sitecustomize.py").write_text(FAULT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(faults))
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in prometheus.REPORT_INTERVAL.items():
            patch.setenv(name, value)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random network, written without TensorFlow, so that this process stays a driver's."""
    from unet_ray.model.weights import weight_shapes

    uri = str(tmp_path_factory.mktemp("model"))
    random = np.random.default_rng(5)
    weights = {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in weight_shapes(CONFIG).items()}
    write_bundle(uri, weights, CONFIG, CLASSES, {})
    return uri


def png(seed: int, height_px: int, width_px: int) -> bytes:
    random = np.random.default_rng(seed)
    pixels = np.kron(random.integers(0, 256, (height_px // 3, width_px // 2, 3)), np.ones((3, 2, 1))).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.resize(pixels, (height_px, width_px, 3))).save(buffer, "PNG")
    return buffer.getvalue()


def write_archive(folder: Path, frames_of_drive: dict[str, int]) -> Path:
    for drive, n_frames in frames_of_drive.items():
        (folder / drive).mkdir(parents=True)
        for index in range(n_frames):
            (folder / drive / f"{index}.png").write_bytes(png(100 * len(drive) + index, *SIZES[index % 3]))
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 frames of three sizes; two are JPEG, which their first bytes say."""
    log = write_archive(tmp_path_factory.mktemp("archive") / "log", {"a": 7, "bb": 11})
    for path in ("a/1.png", "bb/9.png"):
        Image.open(log / path).save(log / path, "JPEG", quality=90)
    return log


def run(model: str, frames: Path, out: Path, **options) -> SegmentResult:
    options = {"chunk_frames": 4, "batch_size": 3, "device": "cpu", "precision": "float32", **options}
    return segment(SegmentConfig(model=model, frames=(str(frames),), out=str(out), **options))


def rows_of(out: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted((out / "frames").glob("*.parquet")))


def digests(out: Path) -> dict[str, str]:
    """Of all published files but those that name this run: summary.json holds its rate."""
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*"))
        if file.is_file() and file.name not in ("summary.json", "config.yaml", "preview.png", "report.html")
    }


@pytest.mark.slow
def test_chunks_are_cut_by_the_largest_camera(cluster, tmp_path: Path) -> None:
    """The frames of one camera are small, those of another large, and some drives begin with what is no image or ends
    the process that looks at it."""

    def frame_pixels(archive: Path) -> int:
        return _frame_pixels(list_archives([str(archive)]).table, timeout_s=5)

    for path, content in {
        "a/0.png": png(0, 24, 32),
        "b/0.png": b"no image",
        "b/1.png": png(1, 240, 320),
        "c/0.png": b"segfault",
        "d/0.png": b"hang",
        "e/0.png": png(2, 48, 66),
        "e/1.png": png(3, 96, 132),
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    connect()
    assert frame_pixels(tmp_path) == 48 * 66
    (tmp_path / "e/0.png").unlink()
    assert frame_pixels(tmp_path) == 96 * 132
    assert frame_pixels(tmp_path / "b/0.png") == frame_pixels(tmp_path / "c/0.png") == 0


@pytest.fixture(scope="module")
def labelled(cluster, model: str, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, output = tmp_path_factory.mktemp("labelled") / "out", io.StringIO()
    with contextlib.redirect_stdout(output):
        result = run(model, archive, out, shard_rows=10)
    (out.parent / "output.txt").write_text(output.getvalue())
    assert (result.listed, result.ok, result.rejected) == (18, 18, {})
    assert result.out == str(out) and result.frames_per_s > 0
    return out


def test_rows_are_the_frames_and_masks_agree_with_the_network(labelled: Path, model: str, archive: Path) -> None:
    import tensorflow as tf

    rows = rows_of(labelled).to_pylist()
    assert [row["frame_id"] for row in rows] == [f"a/{i}.png" for i in range(7)] + [f"bb/{i}.png" for i in range(11)]
    network = read_bundle(model).build_model()
    seen = set()
    for row in rows:
        image = images.decode_frame((archive / row["frame_id"]).read_bytes())
        assert (row["status"], row["reason"], row["height_px"], row["width_px"]) == ("ok", None, *image.shape[:2])
        logits = network(images.resize_nearest(image, 24, 32)[None], training=False)
        expected = tf.image.resize(logits, image.shape[:2]).numpy()[0].argmax(-1)
        mask = images.decode_mask(row["mask"])
        assert mask.shape == (row["mask_height_px"], row["mask_width_px"]) == image.shape[:2]
        assert (mask != expected).mean() < 0.002  # other order of the same float32 sums, where two classes are equal
        counts = [row[f"pixels_c{k}"] for k in range(K)]
        assert counts == np.bincount(mask.ravel(), minlength=K).tolist() and sum(counts) == mask.size
        assert [row[f"confidence_c{k}"] is None for k in range(K)] == [count == 0 for count in counts]
        seen |= {k for k in range(K) if counts[k]}
    assert len(seen) > 2


def test_a_model_loaded_in_python_gives_the_same_bytes(labelled: Path, model: str, archive: Path) -> None:
    question = {"model": model, "frames": str(archive), "labels": str(labelled), "options": {"precision": "float32"}}
    (answer,) = predict_and_compare([question])
    require_same(answer)
    assert answer["loaded"] == ["tensorflow"]
    assert answer["traces"] == 1 and len(answer["sizes"]) == 3  # the network is compiled once for all sizes
    assert answer["model"] == f"Model({model!r}: 24x32, classes five, float32 on cpu)"


def test_a_line_as_each_phase_begins(labelled: Path) -> None:
    assert_in_order((labelled.parent / "output.txt").read_text(), phases.LABELLING)


def test_the_output_verifies_and_the_result_names_the_classes(labelled: Path, model: str, archive: Path) -> None:
    assert verify.verify(str(labelled)) == []
    table = rows_of(labelled)
    again = run(model, archive, labelled, shard_rows=10)
    assert dict(again.class_pixels) == {f"c{k}": sum(table[f"pixels_c{k}"].to_pylist()) for k in range(K)}


def test_a_finished_output_is_left_alone_and_no_ray_is_asked_for(
    labelled: Path, model: str, archive: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmentation, "connect", None)
    before = {str(file): file.stat().st_mtime_ns for file in labelled.rglob("*") if file.is_file()}
    events = faults.FileEvents([archive / "a", archive / "bb"])
    result = run(model, archive, labelled, shard_rows=10)
    (archive / "bb/0.png").read_bytes()  # events come in order: with this one, all before it are there
    assert wait_until(lambda: events.are_more_than(0), timeout_s=30)
    assert events.seen == [("opened", archive / "bb/0.png")], "frames of a finished output were read"
    assert (result.listed, result.ok, result.frames_per_s) == (18, 18, 0.0)
    assert {str(file): file.stat().st_mtime_ns for file in labelled.rglob("*") if file.is_file()} == before
    output = capsys.readouterr().out
    assert "18 frames in 5 chunks, 0 in 0 to do" in output
    assert f"masks and statistics: {labelled}/frames" in output
    assert cli.main(["segment", "--config", str(labelled / "config.yaml")]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"Look at: {labelled}/report.html, {labelled}/preview.png",
        f"Next: unet-ray verify {labelled}",
    ]


@pytest.mark.weekly
def test_a_run_that_starts_while_the_last_night_is_at_work_leaves_what_one_after_the_other_would(
    cluster, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A drive has come meanwhile. The second is a process of its own on the same Ray, and ends first."""
    connect()
    one_cpu = {"actors": "1", "cpus_per_actor": 1}
    log, out = write_archive(tmp_path / "log", {"a": 7}), tmp_path / "overlapping"
    options = {"chunk_frames": 4, "batch_size": 3, "device": "cpu", "precision": "float32", "out": out, **one_cpu}
    line = ["segment", "--model", model, "--frames", str(log)]
    line += [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    second: list[subprocess.CompletedProcess[str]] = []

    def run_wave(job, blocks, *, carefully):
        outcomes = waves.run_wave(job, blocks, carefully=carefully)
        yield next(outcomes)
        if not second:
            write_archive(log, {"bb": 5})
            environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
            command = [sys.executable, "-c", "import sys; from unet_ray import cli; sys.exit(cli.main())", *line]
            second.append(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250))
        yield from outcomes

    with monkeypatch.context() as patch:
        patch.setattr(labelling, "run_wave", run_wave)
        first = run(model, log, out, **one_cpu)
    (done,) = second
    assert done.returncode == 0, done.stderr
    assert "warning: another job, " in done.stdout and "12 frames: 12 labelled, 0 rejected" in done.stdout
    assert "another job has added 5 frames to this output" in capsys.readouterr().out
    assert (first.listed, first.ok, first.rejected) == (12, 12, {})
    assert verify.verify(str(out)) == []
    nights = tmp_path / "nights"
    (log / "bb").rename(tmp_path / "bb")
    run(model, log, nights, **one_cpu)
    (tmp_path / "bb").rename(log / "bb")
    run(model, log, nights, **one_cpu)
    assert digests(out) == digests(nights)


def test_another_option_on_a_finished_output_is_refused(labelled: Path, model: str, archive: Path) -> None:
    with pytest.raises(ValueError, match="--mask-size is native there and model here"):
        run(model, archive, labelled, mask_size="model")


def test_auto_is_the_precision_that_an_output_was_begun_with(labelled, model, archive, monkeypatch) -> None:
    """Else nodes of another kind, on which it goes on, would make it another job."""
    monkeypatch.setattr(segmentation, "has_bfloat16", lambda device: True)
    assert run(model, archive, labelled, shard_rows=10, precision="auto").frames_per_s == 0
    with pytest.raises(ValueError, match="--precision is float32 there and bfloat16 here"):
        run(model, archive, labelled, shard_rows=10, precision="bfloat16")


def test_a_tar_gives_the_rows_of_its_folder_in_other_chunks_and_several_waves(
    cluster, labelled: Path, model: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def run_wave(job, blocks, *, carefully):
        seen.append([len(chunks) for chunks in blocks])
        return waves.run_wave(job, blocks, carefully=carefully)

    monkeypatch.setattr(labelling, "run_wave", run_wave)
    monkeypatch.setattr(labelling, "WAVE_TASKS", 2)
    monkeypatch.setattr(allocation, "BLOCKS_PER_ACTOR", 1)
    monkeypatch.setattr(labelling, "TASK_FRAMES", 7)
    with tarfile.open(tmp_path / "log.tar", "w") as tar:
        tar.add(archive, arcname=".", filter=lambda member: None if member.name.startswith("/") else member)
    run(model, tmp_path / "log.tar", tmp_path / "out", batch_size=5, chunk_frames=3)
    assert [sum(wave) for wave in seen] == [5, 2] and max(map(max, seen)) == 3
    folder, packed = rows_of(labelled), rows_of(tmp_path / "out")
    assert [name.rpartition("!")[2].removeprefix("./") for name in packed["frame_id"].to_pylist()] == folder[
        "frame_id"
    ].to_pylist()
    for name in folder.column_names:
        if name not in ("frame_id", "uri", "sequence"):
            assert packed[name].to_pylist() == folder[name].to_pylist(), name


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"mask_size": "model", "mask_encoding": "raw", "precision": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"mask_size": "model", "tta": "flip"}, marks=pytest.mark.slow),
        pytest.param({"inference": "slide", "window": (16, 24), "stride": (12, 20)}, marks=pytest.mark.slow),
    ],
)
def test_other_masks(cluster, model: str, archive: Path, tmp_path: Path, options) -> None:
    run(model, archive, tmp_path / "out", **options)
    network, n_unlike = read_bundle(model).build_model(), 0
    for row in rows_of(tmp_path / "out").to_pylist():
        if options.get("mask_encoding") == "raw":
            mask = np.frombuffer(row["mask"], np.uint8).reshape(24, 32)
        else:
            mask = images.decode_mask(row["mask"])
            assert mask.shape == (row["mask_height_px"], row["mask_width_px"])
        if "tta" in options:
            image = images.decode_frame((archive / row["frame_id"]).read_bytes())
            small = images.resize_nearest(image, 24, 32)
            whole, mirrored = network(np.stack([small, small[:, ::-1]]), training=False).numpy()
            assert (mask != (whole + mirrored[:, ::-1]).argmax(-1)).mean() < 0.002
            n_unlike += (mask != whole.argmax(-1)).sum()
        assert np.bincount(mask.ravel(), minlength=K).tolist() == [row[f"pixels_c{k}"] for k in range(K)]
    assert "tta" not in options or n_unlike > 0  # else nobody could tell whether it was done
    assert verify.verify(str(tmp_path / "out")) == []


def break_frames(archive: Path) -> dict[str, str]:
    """Breaks frames in ways of all kinds; returns the reason of each."""
    (archive / "a/0.png").write_bytes(b"")
    (archive / "a/1.png").write_bytes(png(1, 48, 66)[:700])
    (archive / "a/5.png").write_bytes(b"segfault")
    (archive / "bb/3.png").write_bytes(b"hello, this is text")
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((40, 50), np.uint16)).save(buffer, "PNG")
    (archive / "bb/4.png").write_bytes(buffer.getvalue())
    (archive / "bb/6.png").write_bytes(png(1, 150, 200))
    return {
        "a/0.png": "not_an_image",
        "a/1.png": "truncated",
        "a/5.png": "crashed",
        "bb/3.png": "not_an_image",
        "bb/4.png": "unsupported",
        "bb/6.png": "too_large",
    }


def test_an_archive_that_is_not_as_it_was_planned_is_said(tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "out")
    small_output.make_plan(out)
    drives = {("a", ""): 4, ("b", "left"): 4, ("b", "right"): 2, ("c", ""): 3}  # one frame of a gone, c new
    plan = small_output.make_plan(out, small_output.listing(drives, versions={"a//0.png": "another"}))
    say_changes(plan)
    assert capsys.readouterr().out == (
        "3 frames are new since the last run\n"
        "warning: since they were listed 1 frame changed and 1 frame went; what is labelled stays, the rest is "
        "rejected as changed or missing (--overwrite labels all anew)\n"
    )


def test_what_is_ignored_is_said_and_counted(tmp_path: Path, capsys) -> None:
    listing = small_output.listing()
    say_ignored(listing)
    assert capsys.readouterr().out == (
        "ignored by their extension: 2 .json (frames are .png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff)\n"
    )
    small_output.segment(str(tmp_path / "out"), listing)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["ignored"] == {".json": 2}


def test_a_column_of_a_parquet_file_gives_the_rows_of_its_frames(
    cluster, labelled: Path, model: str, archive: Path, tmp_path: Path
) -> None:
    good = rows_of(labelled)
    pictures = [(archive / frame_id).read_bytes() for frame_id in good["frame_id"].to_pylist()]
    table = pa.table({"thumbnail": [b"no picture"] * len(pictures), "picture": pictures})
    pq.write_table(table, tmp_path / "frames.parquet", row_group_size=5)
    run(model, tmp_path / "frames.parquet", tmp_path / "out", image_column="picture")
    rows = rows_of(tmp_path / "out")
    assert rows["mask"].equals(good["mask"]) and rows["confidence"].equals(good["confidence"])
    with pytest.raises(ValueError, match="--image-column is picture there and thumbnail here"):
        run(model, tmp_path / "frames.parquet", tmp_path / "out", image_column="thumbnail")


def test_bad_frames_are_rows_and_their_neighbours_are_labelled(
    cluster, labelled: Path, model: str, archive: Path, tmp_path: Path, capsys
) -> None:
    archive = Path(shutil.copytree(archive, tmp_path / "log"))
    reasons = break_frames(archive)
    options = {"max_frame_megapixels": 0.02}
    with pytest.raises(JobFailed, match="--max-rejected 0.1 of 18") as refused:
        run(model, archive, tmp_path / "out", max_rejected=0.1, **options)
    assert not (tmp_path / "out/frames").exists()
    with (tmp_path / "out/rejected.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert {row["frame_id"]: row["reason"] for row in listed}.items() <= reasons.items() and len(listed) > 1
    first = ", ".join(f"{row['frame_id']} ({row['reason']})" for row in listed[:3])
    assert str(refused.value).endswith(f" again. Rejected: {first}; all in {tmp_path}/out/rejected.csv")

    result = run(model, archive, tmp_path / "out", max_rejected=0.5, **options)
    output = capsys.readouterr().out
    assert "without a record; once more, each frame in a process of its own" in output
    first = ", ".join(f"{frame_id} ({reason})" for frame_id, reason in list(reasons.items())[:3])
    assert f"\nrejected: {first}; all in {tmp_path}/out/rejected.csv\n" in output
    assert (result.listed, result.ok) == (18, 12)
    assert result.rejected == {"crashed": 1, "not_an_image": 2, "too_large": 1, "truncated": 1, "unsupported": 1}
    rows, good = rows_of(tmp_path / "out").to_pylist(), beside_rejected(rows_of(labelled).to_pylist(), reasons)
    assert {row["frame_id"]: row["reason"] for row in rows if row["status"] == "rejected"} == reasons
    for row, other in zip(rows, good, strict=True):
        assert row["frame_id"] == other["frame_id"]
        if row["status"] == "ok":
            assert row == {**other, "uri": row["uri"]}
        else:
            assert row["mask"] is None and row["error"]
    errors = {row["frame_id"]: row["error"] for row in rows}
    assert errors["a/5.png"] == "decoding ended its process with SIGSEGV, 3 times"
    assert verify.verify(str(tmp_path / "out")) == []

    before, counted = digests(tmp_path / "out"), prometheus.scrape()
    with prometheus.watching() as seen:
        run(model, archive, tmp_path / "out", max_rejected=0.5, retry_rejected=("crashed",), **options)
    output = capsys.readouterr().out
    assert "rejected frames that are tried again: 1\n" in output and "18 frames in 5 chunks, 1 in 1 to do" in output
    assert digests(tmp_path / "out") == before

    now = prometheus.scrape()
    counters = [name for name in now if "_total" in name and now[name] != counted.get(name)]
    assert {name: now[name] - counted.get(name, 0) for name in counters} == {
        "ray_unet_ray_segment_frames_rejected_total crashed": 1,
    }
    assert seen["ray_unet_ray_segment_frames_listed"] == {18}
    assert 1 in seen["ray_unet_ray_segment_frames_left"] <= {0, 1}


class _DyingActor(waves._ModelActor):
    """A model actor that one frame ends, as a fault in the network's libraries would."""

    def __call__(self, table: pa.Table) -> pa.Table:
        if "a/5.png" in table["frame_id"].to_pylist():
            os._exit(1)
        return super().__call__(table)


@pytest.mark.slow
def test_a_chunk_that_ends_its_actor_also_alone_is_named_and_the_others_are_done(
    cluster, model: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waves, "_ModelActor", _DyingActor)
    monkeypatch.setattr(waves, "TASK_RETRIES", 0)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        with pytest.raises(JobFailed, match="^1 chunk crashed every process, the first is 000-000001$"):
            run(model, archive, tmp_path / "out")
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    (left,) = ledger.pending(plans.read_plan(str(tmp_path / "out")))
    assert "a/5.png" in manifest.read_rows(left)["frame_id"].to_pylist()


@pytest.fixture
def changed(cluster, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, dict[str, str]]:
    """An archive and an output of which `bb/4.png` is rejected, as it had changed when it was read; and the digests of
    an output without that."""
    archive, out = write_archive(tmp_path / "log", {"a": 7, "bb": 11}), tmp_path / "out"
    run(model, archive, tmp_path / "undisturbed")

    def change_and_run_wave(*arguments, **options):
        overwrite(archive / "bb/4.png", png(9, 33, 52), mtime_ns=0)
        return waves.run_wave(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(labelling, "run_wave", change_and_run_wave)
        assert run(model, archive, out, max_rejected=0.1).rejected == {"changed": 1}
    return archive, out, digests(tmp_path / "undisturbed")


def overwrite(frame: Path, data: bytes, mtime_ns: int) -> None:
    frame.write_bytes(data)
    os.utime(frame, ns=(mtime_ns, mtime_ns))


@pytest.mark.slow
def test_a_frame_that_is_again_as_it_was_listed_is_labelled_when_it_is_tried_again(
    changed, model: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    archive, out, _ = changed
    listed = {row["frame_id"]: row for row in manifest_of(out)}["bb/4.png"]
    overwrite(archive / "bb/4.png", png(204, *SIZES[4 % 3]), mtime_ns=int(listed["version"].partition("-")[0]))
    result = run(model, archive, out, max_rejected=0.1, retry_rejected=("truncated", "changed"))
    assert (result.ok, result.rejected) == (18, {})
    # What changed since the frame before stays unknown, of it and of the next: no published row changes.
    expected = beside_rejected(rows_of(out.parent / "undisturbed").to_pylist(), ["bb/3.png", "bb/4.png"])
    assert rows_of(out).to_pylist() == expected and verify.verify(str(out)) == []
    output = capsys.readouterr().out
    assert "rejected frames that are tried again: 1\n" in output and "other files now" not in output


@pytest.mark.slow
def test_a_frame_that_is_still_another_is_rejected_again_and_that_is_said_before(changed, model: str, capsys) -> None:
    archive, out, _ = changed
    before = digests(out)
    overwrite(archive / "bb/4.png", png(10, 33, 52), mtime_ns=1)
    result = run(model, archive, out, max_rejected=0.1, retry_rejected=())
    assert (result.ok, result.rejected) == (17, {"changed": 1})
    assert digests(out) == before and verify.verify(str(out)) == []
    (row,) = (row for row in rows_of(out).to_pylist() if row["frame_id"] == "bb/4.png")
    assert row["mask"] is None and row["error"] == f"{archive}/bb/4.png has changed since it was listed"
    output = capsys.readouterr().out
    assert (
        "warning: 1 of the frames to do are other files now than when they were listed, and will be rejected as "
        "changed; to label them as they are now, give another --out, or --overwrite for all of it\n" in output
    )


def manifest_of(out: Path) -> list[dict]:
    return pa.concat_tables(pq.read_table(file) for file in sorted((out / "manifest").glob("*.parquet"))).to_pylist()


def test_a_folder_that_cannot_be_listed_fails_the_job_by_its_name(
    cluster, model: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    scandir = os.scandir

    def refuse(folder: str):  # for root, who may read everything
        if folder == str(archive / "bb"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    arguments = ["--model", model, "--frames", str(archive), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(["segment", *arguments]) == 1
    assert capsys.readouterr().err == (
        f"unet-ray: error: {archive}/bb could not be listed: Permission denied; mend it or leave it out, so that no "
        "frame is passed over\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "log/a/0.png,x\nlog/a/0.png,y",
            "{here}/log/a/0.png is listed twice: as 'x' and as 'y' it is one frame; name ",
        ),
        (
            "link/preview.png,x",
            "--frames leads to {here}/link, which lies in --out {here}/out; give an --out beside it",
        ),
    ],
)
def test_a_catalogue_of_one_frame_twice_or_of_the_output_is_refused(
    rows: str, message: str, cluster, model: str, archive: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "log").symlink_to(archive)
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "all.csv").write_text(f"uri,frame_id\n{rows}\n")
    arguments = [
        "--model",
        model,
        "--frames",
        str(tmp_path / "all.csv"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert cli.main(["segment", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"unet-ray: error: {message.format(here=tmp_path)}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_too_many_rejected_frames_end_a_job_while_it_works() -> None:
    asked: list[int] = []
    measured: list[tuple[int, int]] = []

    def outcomes(blocks: Sequence[int], *, carefully: bool) -> Iterator[list[ChunkOutcome]]:
        for block in blocks:
            asked.append(block)
            yield [ChunkOutcome(chunk_id=str(block), n_rows=4, rejected={"truncated": block % 2})]

    def measure(rejected: Mapping[str, int], n_rows: int) -> None:
        measured.append((rejected["truncated"], n_rows))

    with (
        Progress(40, "frames") as progress,
        pytest.raises(JobFailed, match="^2 of 16 frames are rejected "),
    ):
        labelling._label(outcomes, range(10), progress, labelling._Tally(40, 0.025), measure, int, carefully=False)
    assert asked == [0, 1, 2, 3] and measured == [(0, 4), (1, 4), (0, 4), (1, 4)] and progress.done == 12


def test_tasks_that_all_fail_end_the_careful_pass_and_only_that() -> None:
    asked: list[int] = []

    def outcomes(blocks: Sequence[int], *, carefully: bool) -> Iterator[list[ChunkOutcome]]:
        for block in blocks:
            asked.append(block)
            trouble = "RuntimeError in labeler.py:1: OOM"
            yield [ChunkOutcome(chunk_id=str(block), n_rows=4, rejected={}, trouble=trouble, kind="failed")]

    tally = labelling._Tally(4000, 0.0)
    with Progress(4000, "frames") as progress:
        labelling._label(outcomes, range(3000), progress, tally, None, int, carefully=False)
        with pytest.raises(JobFailed, match="^8 tasks could not be done: RuntimeError in labeler.py:1: OOM; for "):
            labelling._label(outcomes, range(1000), progress, tally, None, int, carefully=True)
    assert asked == [*range(labelling.WAVE_TASKS), *range(8)]


def test_a_number_for_prometheus_stays_while_its_job_runs(labelled: Path) -> None:
    with Gauges("unet_ray_test", {"once": "Set once"}, every_s=0.2) as gauges:
        gauges.set("once", 2.5)
        for _ in range(3):  # each takes as long as Ray remembers a gauge
            assert prometheus.scrape()["ray_unet_ray_test_once"] == 2.5

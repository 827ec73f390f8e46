"""Labels that are there stay: retries, damage, other archives, overwriting, through the command line on a local Ray."""

from __future__ import annotations

import io
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from unet_ray import cli
from unet_ray.chaos import trials
from unet_ray.output import heartbeats, plans
from unet_ray.output.records import list_work
from unet_ray.storage.sealed import sealed, unsealed

pytestmark = pytest.mark.timeout(300)

SIZE = trials.Size(drives=(7, 5), height_px=48, width_px=66, chunk_frames=4, shard_rows=100, n_kills=0)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[trials.Stage]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        yield trials.Stage(tmp_path_factory.mktemp("stage") / "stage", SIZE)
        ray.shutdown()


@pytest.fixture
def archive(stage: trials.Stage, tmp_path: Path) -> Path:
    """Two drives, 12 frames."""
    return Path(shutil.copytree(stage.archive, tmp_path / "drives"))


def segment(stage: trials.Stage, frames: Path | Sequence[Path], out: Path, *options: str) -> int:
    roots = [str(root) for root in ([frames] if isinstance(frames, Path) else frames)]
    words = ["--chunk-frames", "4", "--batch-size", "4", "--device", "cpu", "--precision", "float32", *options]
    return cli.main(["segment", "--model", str(stage.model), "--frames", *roots, "--out", str(out), *words])


def rows_of(out: Path) -> dict[str, dict]:
    tables = [pq.ParquetFile(file).read() for file in sorted((out / "frames").glob("*.parquet"))]
    return {row["frame_id"]: row for row in pa.concat_tables(tables).to_pylist()}


def counts(out: Path) -> dict[str, int]:
    return dict(Counter(row["reason"] or "ok" for row in rows_of(out).values()))


def write_tar(path: Path, frames: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in frames.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.slow
def test_frames_that_are_tried_again_cost_no_other_label(stage, archive, tmp_path, capsys):
    """A tar of good frames and a cut one, to which one is appended: all of its versions are others now."""
    frames = {path.name: path.read_bytes() for path in trials.frames_of(archive)[:5]}
    cut = {"cut.png": frames["000000.png"][:200]}
    write_tar(tmp_path / "a.tar", {**frames, **cut})
    out = tmp_path / "labels"
    assert segment(stage, tmp_path / "a.tar", out, "--max-rejected", "0.5") == 0
    before = rows_of(out)
    assert counts(out) == {"ok": 5, "truncated": 1}
    write_tar(tmp_path / "a.tar", {**frames, **cut, "new.png": trials.frames_of(archive)[-1].read_bytes()})
    assert segment(stage, tmp_path / "a.tar", out, "--max-rejected", "0.5", "--retry-rejected") == 0
    assert counts(out) == {"ok": 6, "changed": 1}
    after = rows_of(out)
    assert {name: after[name] for name, row in before.items() if row["status"] == "ok"} == {
        name: row for name, row in before.items() if row["status"] == "ok"
    }
    assert segment(stage, tmp_path / "a.tar", out, "--max-rejected", "0.5") == 0
    assert cli.main(["verify", str(out)]) == 0


def test_labels_stay_when_their_frames_have_gone(stage, archive, tmp_path, capsys):
    """Neither trying others again nor damage that can be read gives them up; what was kept is named."""
    out = tmp_path / "labels"
    first, *others = trials.frames_of(archive)
    first.write_bytes(first.read_bytes()[:200])
    assert segment(stage, archive, out, "--max-rejected", "0.5") == 0
    before = rows_of(out)
    for frame in others[1:]:
        frame.unlink()
    capsys.readouterr()
    assert segment(stage, archive, out, "--max-rejected", "0.5", "--retry-rejected") == 2
    assert capsys.readouterr().err == (
        f"unet-ray: error: 10 of 12 frames that {out} holds of {archive} are gone; give --keep-gone to keep what is "
        "labelled of them, or another --out\n"
    )
    assert segment(stage, archive, out, "--max-rejected", "0.5", "--retry-rejected", "--keep-gone") == 0
    assert rows_of(out) == before

    path = out / "frames" / "part-00000.parquet"
    path.write_bytes(flip_in(path, "confidence"))
    assert cli.main(["verify", str(out)]) == 1
    assert "frames/part-00000.parquet: its content is not what was published" in capsys.readouterr().out
    assert segment(stage, archive, out, "--max-rejected", "0.5", "--keep-gone") == 0
    assert counts(out) == {"ok": 11, "truncated": 1}
    after = rows_of(out)
    for name, row in before.items():
        assert after[name]["mask"] == row["mask"] and after[name]["pixels_c1"] == row["pixels_c1"]
        if row["status"] == "ok" and not (archive / name).exists():
            assert after[name]["confidence"] is None  # the column has another digest
            assert after[name]["confidence_c1"] == row["confidence_c1"]
            assert after[name]["error"].startswith(
                "kept from a damaged file; the frame could not be labelled again: missing: "
            )
        else:
            assert after[name]["confidence"] == row["confidence"]
    capsys.readouterr()
    assert cli.main(["verify", str(out)]) == 0
    kept = [name for name in before if not (archive / name).exists()]
    assert capsys.readouterr().out.startswith(
        f"frames/part-00000.parquet: 10 labels kept from a damaged file: {', '.join(kept[:5])} and 5 more\n"
    )


def flip_in(path: Path, column: str) -> bytes:
    """The bytes of a Parquet file with one bit changed among a column's values."""
    data = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(0)
    (chunk,) = [c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column]
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start + chunk.total_compressed_size // 2] ^= 1
    return bytes(data)


def test_an_output_belongs_to_one_archive(stage, archive, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = archive / "drive0", archive / "drive1"
    out = tmp_path / "labels"
    assert segment(stage, a, out) == 0
    before = rows_of(out)
    refusal = "unet-ray: error: labels holds drives/drive0; give another --out, or --add-root\n"
    capsys.readouterr()
    assert segment(stage, b, out) == 2  # equal names, other frames
    assert capsys.readouterr().err == refusal
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for frame in sorted(b.iterdir()):
        shutil.copy2(frame, renamed / f"x{frame.name}")
    assert segment(stage, renamed, out) == 2  # other names
    assert capsys.readouterr().err == refusal and rows_of(out) == before

    assert segment(stage, b, out, "--add-root") == 0
    assert rows_of(out) == before | {name: row for name, row in rows_of(out).items() if name not in before}
    assert sorted(rows_of(out).keys() - before.keys()) == [f"drive1/{frame.name}" for frame in sorted(b.iterdir())]
    everything = rows_of(out)
    shutil.copy2(trials.frames_of(archive)[0], a / "new.png")
    for roots in (b, [a, b]):  # known roots mean what they meant, each alone too
        assert segment(stage, roots, out) == 0
    assert rows_of(out) == everything | {"new.png": rows_of(out)["new.png"]}
    assert cli.main(["verify", str(out)]) == 0


@pytest.mark.weekly
def test_an_archive_that_is_moved_back_has_the_same_frames(stage, archive, tmp_path, capsys):
    a, moved, only_a = archive / "drive0", tmp_path / "elsewhere", tmp_path / "only_a"
    a.rename(moved)
    assert segment(stage, moved, only_a) == 0
    before = counts(only_a)["ok"]
    moved.rename(a)
    (a / "newest.png").write_bytes(trials.frames_of(archive)[1].read_bytes())
    assert segment(stage, a, only_a) == 0  # the same ids and versions
    assert counts(only_a) == {"ok": before + 1}
    assert f"frames that were in {moved} are read in {a}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_moved_archive_is_read_where_it_lies_now(stage, archive, tmp_path, capsys):
    out = tmp_path / "labels"
    assert segment(stage, archive, out) == 0
    undisturbed = rows_of(out)
    (out / "frames" / "part-00000.parquet").unlink()
    moved = tmp_path / "moved"
    archive.rename(moved)
    assert segment(stage, moved, out) == 0
    assert rows_of(out) == undisturbed
    assert cli.main(["verify", str(out)]) == 0


@pytest.mark.slow
def test_overwriting_waits_for_no_dead_job_and_never_goes_beside_a_living_one(stage, archive, tmp_path, capsys):
    out = tmp_path / "labels"
    assert segment(stage, archive, out) == 0
    before = rows_of(out)
    heartbeats.write(str(out), "living")  # of this process
    capsys.readouterr()
    assert segment(stage, archive, out, "--overwrite") == 75
    assert capsys.readouterr().err == (
        f"unet-ray: error: job living works on {out}; stop it before --overwrite, wait for its end, or give another "
        "--out\n"
    )
    heartbeats.end(str(out), "living")
    beat_elsewhere(out, pid_namespace="another", time_s=1.0)
    over = threading.Event()
    beating = threading.Thread(
        target=lambda: over.wait(0.3) or beat_elsewhere(out, pid_namespace="another", time_s=2.0)
    )
    beating.start()
    assert segment(stage, archive, out, "--overwrite") == 75
    beating.join()
    assert rows_of(out) == before
    # The same sign for two intervals, and one of a process that is no longer: nobody works there.
    beat_elsewhere(out, pid_namespace="another", time_s=2.0)
    heartbeats.write(str(out), "dead")
    sign = unsealed((out / "_work/jobs/dead.json").read_bytes())
    sign["process"]["started"] = "0"
    (out / "_work/jobs/dead.json").write_bytes(sealed(sign))
    assert segment(stage, archive, out, "--overwrite", "--mask-size", "model") == 0
    assert rows_of(out).keys() == before.keys() and rows_of(out) != before


def beat_elsewhere(out: Path, *, pid_namespace: str, time_s: float) -> None:
    """A sign of life of a job in another container."""
    heartbeats.write(str(out), "elsewhere", interval_s=0.5)
    path = out / "_work/jobs/elsewhere.json"
    sign = unsealed(path.read_bytes())
    sign["process"]["pid_namespace"], sign["time_s"] = pid_namespace, time_s
    path.write_bytes(sealed(sign))


def test_a_job_whose_output_was_overwritten_says_so(stage, archive, tmp_path, capsys, monkeypatch):
    """Whose sign of life nobody saw: it was overwritten while it worked."""
    out, done = tmp_path / "labels", []
    commit = plans.has_grown

    def overwrite(plan: plans.Plan) -> bool:
        if not done and list_work(str(out), "records"):
            done.append(plan)
            shutil.rmtree(out / "_work" / "jobs", ignore_errors=True)
            run = plans.read_run(str(out))
            run["lineage"]["bundle_digest"] = "cd" * 32
            (out / "run.json").write_bytes(sealed(run))
            for mark in (out / "manifest").glob("_g*"):
                mark.unlink()
        return commit(plan)

    monkeypatch.setattr(plans, "has_grown", overwrite)
    assert segment(stage, archive, out) == 75
    assert done and capsys.readouterr().err.startswith(f"unet-ray: error: {out} was overwritten by another job while")
    assert not (out / "frames").exists() and not (out / "summary.json").exists()


@pytest.mark.slow
def test_a_new_frame_beside_a_damaged_file_is_labelled_and_the_damage_named(stage, archive, tmp_path, capsys):
    out = tmp_path / "labels"
    assert segment(stage, archive, out) == 0
    undisturbed = rows_of(out)
    path = out / "frames" / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[-200] ^= 0xFF  # in the footer
    path.write_bytes(bytes(data))
    shutil.copy2(trials.frames_of(archive)[0], archive / "drive1" / "new.png")
    capsys.readouterr()
    codes = [segment(stage, archive, out)]
    if codes == [75]:
        assert f"{path} is damaged; run the same command again" in capsys.readouterr().err
        codes.append(segment(stage, archive, out))
    assert codes[-1] == 0 and len(codes) == 2
    assert {name: row for name, row in rows_of(out).items() if name != "drive1/new.png"} == undisturbed
    assert cli.main(["verify", str(out)]) == 0


@pytest.mark.slow
def test_frames_that_a_strangers_output_names_are_not_read(stage, archive, tmp_path, capsys):
    """Its manifest is whole and sealed, and its frames lie outside what this run was given."""
    out, secret = tmp_path / "labels", tmp_path / "secret"
    shutil.copytree(archive, secret)
    assert segment(stage, secret, out) == 0
    shutil.rmtree(out / "frames")
    capsys.readouterr()
    assert segment(stage, archive, out, "--add-root") == 2
    assert capsys.readouterr().err.endswith(
        f"12 frames of the output still to be labelled lie outside --frames, first {secret}/drive0/000000.png; give "
        "the folder that they lie in to --frames as well\n"
    )

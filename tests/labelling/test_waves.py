"""What becomes of a chunk whose model actor has trouble; and of what Ray gives up."""

from __future__ import annotations

import dataclasses
import functools
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import labelled
import pyarrow as pa
import pytest
import ray

from unet_ray import storage
from unet_ray.chaos import trials
from unet_ray.cluster import tasks
from unet_ray.errors import JobFailed, TryAgain
from unet_ray.frames import MANIFEST_SCHEMA
from unet_ray.labelling import stages, waves
from unet_ray.labelling import work as labelling
from unet_ray.labelling.decoding import DecodeOptions
from unet_ray.model.bundle import Bundle, read_bundle
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.labeler import Labeler
from unet_ray.output import ledger, manifest, plans
from unet_ray.output.chunks import Chunk, Cutting
from unet_ray.output.records import part_uri, read_records, record_uri
from unet_ray.output.tables import read_parquet

LABELER = LabelOptions(precision="float32", batch_size=2, mask_size="model")
CHUNK = Chunk(chunk_id="000-000000", key="k", manifest_uri="m", row_start=0, n_rows=1, shard=0)
SIZE = (24, 32)
OPTIONS = DecodeOptions(network_size=SIZE, max_pixels=10_000, timeout_s=10)
DRIVES = {"a": 2, "b": 1}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> trials.Stage:
    """An archive of images, and a network for them."""
    return trials.Stage(tmp_path_factory.mktemp("stage"), trials.SIZES["small"])


@pytest.fixture(scope="module")
def bundle(stage: trials.Stage) -> Bundle:
    return read_bundle(str(stage.model))


@pytest.fixture(scope="module")
def decoded(stage: trials.Stage, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The first chunk of that archive, after decoding."""
    plan = labelled.make_plan(str(stage.archive), str(tmp_path_factory.mktemp("out")))
    return stages.decode_chunks(plan.chunks[:1], OPTIONS)


@pytest.fixture
def gone(tmp_path: Path) -> plans.Plan:
    """Chunks of 2 and of 1 frame that are no longer there."""
    log = tmp_path / "log"
    plan = labelled.make_plan(labelled.write_archive(log, DRIVES), str(tmp_path / "out"))
    for frame in log.glob("*/*.png"):
        frame.unlink()
    return plan


def test_an_actor_whose_store_is_away_says_so_chunk_by_chunk_and_starts_when_it_is_back(bundle, decoded):
    answers = iter([None, None, None, bundle])  # the first is asked for before there is a chunk

    def load() -> Labeler:
        answer = next(answers)
        if answer is None:
            raise storage.StorageError(5, "no answer; trying again may help", "s3://models/road")
        return Labeler(answer, LABELER)

    actor = waves._ModelActor(load, SIZE)
    for _ in range(2):
        (row,) = actor(decoded).to_pylist()
        assert row["_trouble"] == "[Errno 5] no answer; trying again may help: 's3://models/road'"
        assert row["_kind"] == "storage" and row["_chunk"] == decoded["_chunk"][0].as_py()
    masks = actor(decoded)["_mask"].to_pylist()
    assert [len(mask) for mask in masks] == 3 * [24 * 32]


def test_a_model_that_has_changed_since_its_job_began_labels_nothing(stage, decoded):
    load = functools.partial(waves._load_labeler, str(stage.model), "another digest", LABELER)
    with pytest.raises(storage.StorageError, match="the model has changed since this job began; trying again may help"):
        load()
    (row,) = waves._ModelActor(load, SIZE)(decoded).to_pylist()
    assert "the model has changed since this job began" in row["_trouble"] and row["_kind"] == "storage"


@pytest.fixture
def refusing_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store that this process has no right to: S3 without credentials, of which no request goes out."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield "s3://log"
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_frame_that_nobody_may_read_fails_the_job_and_is_not_tried_for_ever(refusing_store, tmp_path):
    frame = {"frame_id": "0.png", "uri": f"{refusing_store}/0.png", "kind": "file", "offset_bytes": 0}
    rows = [dict.fromkeys(MANIFEST_SCHEMA.names) | frame | {"size_bytes": 9, "version": "v", "sequence": ""}]
    cutting = Cutting(chunk_frames=3, shard_rows=5)
    manifest.append_generation(str(tmp_path), pa.Table.from_pylist(rows, MANIFEST_SCHEMA), "of", cutting, {})
    (file,) = (tmp_path / "manifest").glob("*.parquet")
    (row,) = stages.decode_chunks(list(manifest.read_chunks(str(file))), OPTIONS).to_pylist()
    assert row["_kind"] == "refused"
    tally = labelling._Tally(1, 0.0)
    tally.troubles = {"failed": "no", "storage": "no answer", row["_kind"]: row["_trouble"]}
    error = tally.trouble_error("1 chunks are not done")
    assert isinstance(error, JobFailed) and "'s3://log/0.png'; give this job the right to it" in str(error)
    del tally.troubles["refused"]
    assert isinstance(tally.trouble_error("1 chunks are not done"), storage.StorageError)


@pytest.mark.parametrize(
    ("error", "message", "kind"),
    [
        (PermissionError(13, "Permission denied", "/log"), "[Errno 13] Permission denied: '/log'", "refused"),
        (storage.StorageError(5, "no\nanswer", "/log"), "[Errno 5] no answer: '/log'", "storage"),
        (IsADirectoryError(21, "Is a directory", "/log"), "[Errno 21] Is a directory: '/log'", "storage"),
    ],
)
def test_trouble_with_storage_is_said_in_one_line(error, message, kind):
    assert stages._trouble(error) == (message, kind)


def step_on(step: str, decoded: pa.Table, folder: Path) -> pa.Table:
    """A step on what it cannot do."""
    if step == "decode":
        return stages.decode_chunks([dataclasses.replace(CHUNK, manifest_uri=str(folder / "g000.parquet"))], OPTIONS)
    if step == "label":
        return waves._ModelActor(lambda: None, SIZE)(decoded.drop_columns("_reason"))
    table = stages.write_chunks(decoded, str(folder / "out"), labelled.CLASSES, "raw", "me")
    return table.rename_columns({"trouble": "_trouble", "kind": "_kind"})


@pytest.mark.parametrize(
    ("step", "trouble"),
    [
        ("decode", r"JobFailed in output/manifest\.py:\d+: .*/g000\.parquet: missing; restore it, or start anew .*"),
        ("label", r"KeyError in labelling/stages\.py:\d+: .*_reason.*"),
        ("write", r"KeyError in labelling/stages\.py:\d+: .*_mask_height_px.*"),  # it is not labelled
    ],
)
def test_a_step_that_fails_says_what_and_where(step, trouble, decoded, tmp_path):
    """Ray would drop the block of a task that raises, and who had a batch too large for a GPU would not learn of it."""
    (row,) = step_on(step, decoded, tmp_path).to_pylist()
    assert re.fullmatch(trouble, row["_trouble"]) and row["_kind"] == "failed"
    tally = labelling._Tally(1, 0.0)
    tally.troubles[row["_kind"]] = row["_trouble"]
    error = tally.trouble_error("1 chunks are not done")
    assert isinstance(error, JobFailed) and str(error).endswith("; once it is mended, the same command goes on")


def test_of_an_error_of_pages_the_beginning_is_said(decoded):
    def load() -> Labeler:
        raise RuntimeError("OOM when allocating\n" + 1000 * "x ")

    (row,) = waves._ModelActor(load, SIZE)(decoded).to_pylist()
    assert re.fullmatch(r"RuntimeError in labelling/waves\.py:\d+: OOM when allocating( x)+ …", row["_trouble"])
    assert row["_kind"] == "failed" and len(row["_trouble"]) < 400


def test_what_a_person_should_know_of_a_labelling_is_said_once(bundle, decoded, tmp_path, capsys):
    class Noting(Labeler):
        note = "a batch of 64 frames does not fit"

    table = waves._ModelActor(lambda: Noting(bundle, LABELER), SIZE)(decoded)
    outcomes = stages.outcomes_of(stages.write_chunks(table, str(tmp_path / "out"), bundle.class_set, "raw", "me"))
    assert [(outcome.note, outcome.kind) for outcome in outcomes] == [("a batch of 64 frames does not fit", None)]
    tally = labelling._Tally(9, 0.0)
    tally.say_notes([*outcomes, *outcomes])
    tally.say_notes(outcomes)
    assert capsys.readouterr().out == "warning: a batch of 64 frames does not fit\n"


def test_chunks_that_share_a_task_are_written_apart_and_have_their_trouble_together(gone):
    first, second = gone.chunks
    decoded = stages.decode_chunks([first, second], OPTIONS)
    labels = stages.label_chunks(decoded, None, SIZE)  # of frames that are missing there is nothing for a network
    obstacle = Path(record_uri(gone.out, second.key))
    obstacle.mkdir(parents=True)
    outcomes = stages.outcomes_of(stages.write_chunks(labels, gone.out, labelled.CLASSES, "raw", "me"))
    assert [(outcome.chunk_id, outcome.n_rows, outcome.kind) for outcome in outcomes] == [
        ("000-000000", 2, None),
        ("000-000001", 1, "storage"),
    ]
    assert outcomes[0].rejected == {"missing": 2} and "Is a directory" in outcomes[1].trouble
    obstacle.rmdir()
    assert ledger.pending(gone) == [second]
    (record,) = read_records(gone.out, [first.key])
    part = read_parquet(storage.read_bytes(part_uri(gone.out, record.part)))
    assert part["frame_id"].to_pylist() == manifest.read_rows(first)["frame_id"].to_pylist() == ["a/0.png", "a/1.png"]
    troubled = stages.with_trouble(decoded, storage.StorageError(5, "no answer", "out"))
    outcomes = stages.outcomes_of(stages.write_chunks(troubled, gone.out, labelled.CLASSES, "raw", "me"))
    assert [outcome.chunk_id for outcome in outcomes] == ["000-000000", "000-000001"]
    assert all("no answer" in outcome.trouble for outcome in outcomes)


@pytest.mark.timeout(300)
def test_what_ray_gives_up_may_be_tried_again():
    def die(_: int) -> None:
        import os

        os._exit(1)

    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(
            TryAgain, match=r"^Ray gave up work that it had begun \(WorkerCrashedError: .*; the same comman"
        ):
            list(tasks.map_on_cluster(die, [1]))
    finally:
        ray.shutdown()


def test_a_network_that_did_not_load_at_first_is_loaded_once_for_all_blocks_of_its_actor(bundle, decoded):
    asked, labelling_both, loads = threading.Barrier(2), threading.Barrier(2), []

    class Together(Labeler):
        """The network, which two blocks must be in at once."""

        def label(self, images, sizes):
            labelling_both.wait(60)
            return super().label(images, sizes)

    def load() -> Labeler:
        loads.append(len(loads))
        if len(loads) == 1:
            raise OSError("the store does not answer")
        time.sleep(0.5)  # in which the other block asks for it, too
        return Together(bundle, LABELER)

    actor = waves._ModelActor(load, SIZE)

    def label(block: pa.Table) -> pa.Table:
        asked.wait(60)
        return actor(block)

    blocks = [decoded.slice(0, 1), decoded.slice(1)]
    with ThreadPoolExecutor(waves.BLOCKS_AT_ONCE) as pool:
        labels = pa.concat_tables(pool.map(label, blocks))
    assert loads == [0, 1]
    alone = Labeler(bundle, LABELER)
    expected = pa.concat_tables(stages.label_chunks(block, alone, SIZE) for block in blocks)
    assert labels.schema == expected.schema
    for name in ("frame_id", "_trouble", "_mask", "_pixels_<class>", "_confidence"):
        assert labels[name].to_pylist() == expected[name].to_pylist(), name

"""Every command on an object store: fair weather, bad weather, no answer at all; and no secret anywhere afterwards.

The endpoint is named by `--storage-options` alone, so whatever works here has reached the worker processes that way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from bad_weather import Proxy, Weather, shares
from PIL import Image
from s3_server import KEY_ID, SECRET, make_bucket, reach, run_server

from unet_ray import cli, errors, storage
from unet_ray.classes import ClassSet, SegmentationClass

pytestmark = pytest.mark.timeout(1800)

CLASSES = ClassSet(
    name="two",
    classes=(
        SegmentationClass(name="left", color=(200, 20, 20), values=(1,)),
        SegmentationClass(name="right", color=(20, 20, 200), values=(0,)),
    ),
)
DRIVES, FRAMES = 4, 12
Patience = Mapping[str, float]
IMPATIENT_S: Patience = {"retry": 20.0, "read_timeout": 6.0}
DEFAULTS_S: Patience = {"retry": 60.0, "read_timeout": 15.0}
"""What holds where a user says nothing."""
BAD = Weather(slow_down=0.05, reset=0.02, cut=0.02, wait=0.02, wait_s=10, dark_at=120, dark_s=30)
SHORTLY_BAD = dataclasses.replace(BAD, wait_s=3, dark_s=8)


class Store:
    """The store, how a command reaches it, and all that commands have said."""

    def __init__(self, proxy: Proxy, bucket: str):
        self.proxy, self.bucket, self.outputs = proxy, bucket, list[str]()

    def run(
        self,
        command: str,
        *arguments: str,
        weather: Weather | None = None,
        patience_s: Mapping[str, float] = IMPATIENT_S,
    ) -> tuple[int, str]:
        """Runs a command in some weather; returns its exit code and what it said."""
        self.proxy.reset_counts(weather or Weather())
        options = {"endpoint_url": self.proxy.url, "config_kwargs": {"read_timeout": patience_s["read_timeout"]}}
        storage_arguments = ("--storage-options", json.dumps(options), "--storage-retry-s", str(patience_s["retry"]))
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = cli.main(
                [command, *(argument.replace("S3", self.bucket) for argument in arguments), *storage_arguments]
            )
        self.outputs.append(output.getvalue())
        self.proxy.clear_up()
        return code, output.getvalue()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with (
            run_server(str(tmp_path_factory.mktemp("moto") / "recording")) as server,
            Proxy(server) as proxy,
            reach(None, patch, retry_s=IMPATIENT_S["retry"]),
        ):
            store = Store(proxy, make_bucket(server))
            upload(store, make_log())
            yield store
            ray.shutdown()


def make_log() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    files = {"classes.yaml": json.dumps(CLASSES.to_dict()).encode()}
    for drive in range(DRIVES):
        for index in range(FRAMES):
            mask_HW = np.zeros((36, 52), np.uint8)
            mask_HW[:, : 10 + 5 * drive + index] = 1
            image_HWC = np.where(mask_HW[..., None] == 1, (200, 20, 20), (20, 20, 200)).astype(np.uint8)
            image_HWC += random.integers(0, 30, image_HWC.shape, np.uint8)
            for folder, pixels in (("images", image_HWC), ("masks", mask_HW)):
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                files[f"{folder}/drive{drive}/{index:03d}.png"] = file.getvalue()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path, data in files.items():
            if path.startswith("images/drive0"):
                member = tarfile.TarInfo(path.removeprefix("images/"))
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return {**files, "log.tar": packed.getvalue()}


def upload(store: Store, files: dict[str, bytes]) -> None:
    fs = fsspec.filesystem("s3", endpoint_url=store.proxy.url)
    for path, data in files.items():
        fs.pipe_file(f"drives/data/{path}", data)


DATA = ("--images", "S3/data/images", "--masks", "S3/data/masks")
NETWORK = ("--image-size", "32", "48", "--n-filters", "4", "--depth", "2", "--precision", "float32", "--device", "cpu")
TIMES = ("--epochs", "3", "--batch-size", "16", "--val-fraction", "0.25", "--learning-rate", "0.01")
TRAIN = (*DATA, "--classes", "S3/data/classes.yaml", *NETWORK, *TIMES)
SEGMENT = ("--model", "S3/run", "--chunk-frames", "4", "--batch-size", "4", "--precision", "float32", "--device", "cpu")


def read_tree(uri: str) -> dict[str, bytes]:
    """Every file of an output but those that name this run, or their own folder."""
    named = ("summary.json", "config.yaml", "report.html")
    return {file.path: storage.read_bytes(file.uri) for file in storage.list_files(uri) if file.path not in named}


@pytest.fixture(scope="module")
def trained(store: Store) -> Store:
    code, output = store.run("train", *TRAIN, "--out", "S3/run")
    assert code == 0, output
    return store


@pytest.fixture(scope="module")
def labelled(trained: Store) -> tuple[Store, Counter[str]]:
    """The store, and the requests of a labelling in fair weather."""
    code, output = trained.run("segment", *SEGMENT, "--frames", "S3/data/images", "--out", "S3/labels")
    assert code == 0, output
    return trained, trained.proxy.methods.copy()


def test_a_data_set_is_checked(store: Store):
    code, output = store.run("check", *DATA, "--classes", "S3/data/classes.yaml")
    assert code == 0 and "Training would take this data set." in output
    n_frames = DRIVES * FRAMES
    assert store.proxy.methods["GET"] + store.proxy.methods["HEAD"] <= 2 * n_frames + 20


@pytest.mark.slow
def test_a_training_leaves_its_run_and_is_not_repeated(trained: Store):
    there = {file.path for file in storage.list_files(f"{trained.bucket}/run")}
    assert {"model/model.json", "history.csv", "metrics.json", "samples.png", "config.yaml"} <= there
    config = storage.read_bytes(f"{trained.bucket}/run/config.yaml").decode()
    assert "storage_options" not in config and trained.proxy.url not in config
    code, output = trained.run("train", *TRAIN, "--out", "S3/run")
    assert code == 0 and "is finished already" in output


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras 3.15 with numpy 2.4, in save
def test_an_evaluation_and_exports_read_and_write_there(labelled):
    store, _ = labelled
    code, output = store.run("evaluate", "--model", "S3/run", *DATA, "--out", "S3/eval", "--device", "cpu")
    assert code == 0, output
    assert storage.exists(f"{store.bucket}/eval/metrics.json")
    code, output = store.run("export-model", "--model", "S3/run", "--out", "S3/model.keras")
    assert code == 0 and storage.read_bytes(f"{store.bucket}/model.keras")[:2] == b"PK"
    code, output = store.run("export-masks", "S3/labels", "--out", "S3/masks-png")
    assert code == 0 and len(list(storage.list_files(f"{store.bucket}/masks-png"))) == DRIVES * FRAMES


def test_a_labelling_costs_a_request_a_frame_four_a_chunk_and_a_number_that_does_not_grow(labelled):
    store, methods = labelled
    n_frames, n_chunks = DRIVES * FRAMES, DRIVES * FRAMES // 4
    print(f"{n_frames} frames, {n_chunks} chunks: {dict(methods)}")
    # test_weather has the exact costs of frames and chunks. The rest was 194 where the job took a minute: four are for
    # each sign of life, every 15 s, so a slow machine has more of them.
    assert methods.total() <= n_frames + 4 * n_chunks + 400
    code, output = store.run("verify", "S3/labels")
    whole, following = output.splitlines()
    assert (code, whole) == (0, f"{store.bucket}/labels: whole: every file and row agrees with its record")
    assert following == f"Next: unet-ray export-masks {store.bucket}/labels --out …"
    assert storage.read_bytes(f"{store.bucket}/labels/preview.png")[1:4] == b"PNG"
    assert b"listed = <b>" in storage.read_bytes(f"{store.bucket}/labels/report.html")


def test_a_tar_is_read_by_range_and_gives_the_same_masks(labelled):
    store, _ = labelled
    code, output = store.run("segment", *SEGMENT, "--frames", "S3/data/log.tar", "--out", "S3/tarred")
    assert code == 0, output
    (folder, *_), (tar,) = (
        [pq.read_table(io.BytesIO(storage.read_bytes(file.uri))) for file in storage.list_files(uri)]
        for uri in (f"{store.bucket}/labels/frames", f"{store.bucket}/tarred/frames")
    )
    assert tar["mask"].to_pylist() == folder["mask"].to_pylist()[:FRAMES]
    code, output = store.run("segment", *SEGMENT, "--frames", "S3/data/log.tar", "--out", "S3/tarred")
    assert code == 0 and "0 in 0 to do" in output
    assert store.proxy.methods["PUT"] == 0


@pytest.mark.slow
def test_a_store_that_stays_away_ends_the_job_and_the_rerun_finishes(labelled):
    store, _ = labelled
    arguments = ("segment", *SEGMENT, "--frames", "S3/data/images", "--out", "S3/cut")
    gone = Weather(dark_on="PUT .*/records/", dark_at=4, dark_s=10_000)
    code, output = store.run(*arguments, weather=gone)
    assert code == errors.EXIT_TRY_AGAIN, output
    (line,) = [line for line in output.splitlines() if "error" in line]
    assert line.startswith("unet-ray: error: ") and "trying again may help" in line and "goes on" in line
    records = list(storage.list_files(f"{store.bucket}/cut/_work/records"))
    assert len(records) >= 3
    code, output = store.run(*arguments)
    assert code == 0 and f"{DRIVES * FRAMES - 4 * len(records)} in" in output, output
    assert read_tree(f"{store.bucket}/cut") == read_tree(f"{store.bucket}/labels")


@pytest.mark.weekly
def test_a_training_goes_on_after_its_store_was_gone_and_ends_with_the_same_weights(trained: Store):
    """The store is gone for good from the second checkpoint on; then the same command goes on in bad weather."""
    gone = Weather(dark_on="PUT .*epoch-000002/manifest", dark_at=1, dark_s=10_000)
    code, output = trained.run("train", *TRAIN, "--out", "S3/again", "--max-failures", "0", weather=gone)
    assert code == errors.EXIT_TRY_AGAIN, output
    (line,) = [line for line in output.splitlines() if "error" in line]
    assert line.startswith("unet-ray: error: ") and "trying again may help" in line
    code, output = trained.run("train", *TRAIN, "--out", "S3/again", weather=SHORTLY_BAD)
    assert code == 0 and "going on after epoch" in output, output
    print(shares(trained.proxy.seen))
    for name in ("model/weights.safetensors", "metrics.json"):
        first, second = (storage.read_bytes(f"{trained.bucket}/{run}/{name}") for run in ("run", "again"))
        assert first == second


def test_no_secret_is_left_anywhere(labelled):
    """In what the jobs said, in all that they wrote, and in the logs of Ray."""
    store, _ = labelled
    store.run("verify", "S3/labels")
    assert set(store.proxy.signers) == {KEY_ID}
    written = {file.uri: storage.read_bytes(file.uri) for file in storage.list_files(store.bucket)}
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    logs = {str(path): path.read_bytes() for path in session.rglob("*") if path.is_file()}
    assert len(written) > 50 and len(logs) > 10
    outputs = {"what was said": "".join(store.outputs).encode()}
    for name, content in {**written, **logs, **outputs}.items():
        assert SECRET.encode() not in content, name
        assert KEY_ID.encode() not in content, name


@pytest.mark.weekly
def test_labels_made_in_bad_weather_have_the_same_bytes_at_half_as_many_requests_more(labelled):
    store, fair = labelled
    ray.shutdown()  # its workers have the impatient options
    arguments = ("segment", *SEGMENT, "--frames", "S3/data/images", "--out", "S3/foul")
    code, output = store.run(*arguments, weather=BAD, patience_s=DEFAULTS_S)
    assert code == 0, output
    seen = store.proxy.seen.copy()
    print(f"{fair.total()} requests in fair weather, {seen.total()} in bad: {shares(seen)}")
    assert min(seen[name] for name in ("slow_down", "reset", "cut", "wait", "dark")) > 0
    assert read_tree(f"{store.bucket}/foul") == read_tree(f"{store.bucket}/labels")
    assert seen.total() <= 1.5 * fair.total()

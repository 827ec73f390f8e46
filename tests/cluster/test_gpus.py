"""GPUs that only Ray knows of: the jobs refuse them at once, and work where TensorFlow is said to see them.

All computes on CPUs: the one look at what TensorFlow sees is replaced in the processes that Ray starts.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from small_training import CLASSES as PAIR_CLASSES
from small_training import write_data

from unet_ray import cli
from unet_ray.chaos import faults
from unet_ray.chaos.trials import wait_until
from unet_ray.classes import ClassSet, SegmentationClass
from unet_ray.cluster import connection as cluster
from unet_ray.cluster import gpus
from unet_ray.errors import JobFailed, TryAgain
from unet_ray.labelling import job as labelling_job
from unet_ray.labelling import work as labelling
from unet_ray.labelling.stages import ChunkOutcome
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.bundle import write_bundle
from unet_ray.model.weights import weight_shapes
from unet_ray.output import plans, verify
from unet_ray.pixels import images
from unet_ray.progress import Progress

pytestmark = pytest.mark.timeout(300)

REFUSED = (
    f"unet-ray: error: Ray has a GPU on node {socket.gethostname()}, but {{}}; install TensorFlow's CUDA libraries "
    "there (pip install 'unet-ray[gpu]', which is tensorflow[and-cuda]) and an NVIDIA driver, or give --device cpu"
)
SEES_NONE = "TensorFlow sees none there"
UNKNOWN = "TensorFlow does not know its compute capability, which --precision auto asks"

# Python runs this in every process that Ray starts. Each look leaves a line; the first so many, as the file `sees`
# says, see the GPUs that Ray gave. Model actors wait until `together` of them have looked. The file `knows` has the
# compute capability of each GPU of the machine. Where there is a file `aborts`, so does what tries XLA.
LOOK = """
import json, os, sys, time
folder = os.path.dirname(__file__)
def read(name):
    with open(os.path.join(folder, name)) as file:
        return file.read()
def faked(look):
    def look_or_fake():
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        with open("/proc/self/cmdline") as title, open(os.path.join(folder, "looks"), "a") as looks:
            looks.write(json.dumps([title.read(), gpus]) + "\\n")
        n_looks = len(read("looks").splitlines())
        end_s = time.monotonic() + 100
        while read("/proc/self/cmdline").startswith("ray::MapWorker") and time.monotonic() < end_s:
            if read("looks").count("ray::MapWorker") >= int(read("together")):
                break
            time.sleep(0.05)
        return [f"GPU:{gpu}" for gpu in gpus.split(",")] if n_looks <= int(read("sees")) else look()
    return look_or_fake
def details(name):
    capability = json.loads(read("knows"))[int(name.rpartition(":")[2])]
    return {"compute_capability": tuple(capability)} if capability else {}
try:
    from unet_ray.model import devices
except ImportError:
    devices = None
if devices:
    devices.visible_gpus = faked(devices.visible_gpus)
    devices.gpu_details = details
    if "unet_ray.model.xla_check" in sys.orig_argv and os.path.exists(os.path.join(folder, "aborts")):
        devices.configure_tensorflow = lambda *arguments, **options: os.abort()
"""
ALWAYS = 10**6
KIND = {"accelerator_type:L4": 2}
"""As Ray notes it of a node with such GPUs."""
HOPPER, TURING = (9, 0), (7, 5)


SAME = ["--dropout", "0", "--precision", "float32"]
"""Options with which two workers learn what one learns: with dropout they would drop other pixels."""


class Looks:
    """What the processes of the cluster see, and how often they have looked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "sitecustomize.py").write_text(LOOK)

    def see(
        self, n_looks: int, knows: Sequence[tuple[int, int] | None] = (HOPPER, HOPPER), *, together: int = 0
    ) -> None:
        """From now on so many looks see a GPU, and those after them what there is: none. The first model actors go on
        when there are so many `together`.

        First the model actors of an earlier job must have ended, which may still look.
        """
        assert wait_until(lambda: not faults.titled_below(os.getpid(), "ray::MapWorker"), timeout_s=60)
        (self._folder / "looks").write_text("")
        (self._folder / "sees").write_text(str(n_looks))
        (self._folder / "together").write_text(str(together))
        (self._folder / "knows").write_text(json.dumps(knows))

    @contextlib.contextmanager
    def aborting_xla(self) -> Iterator[None]:
        """Meanwhile a process that tries XLA ends by SIGABRT."""
        (self._folder / "aborts").write_text("")
        yield
        (self._folder / "aborts").unlink()

    def count(self) -> int:
        return len(self._lines())

    def of_actors(self) -> list[str]:
        """The GPUs that each model actor was given."""
        return sorted(gpus for title, gpus in self._lines() if title.startswith("ray::MapWorker"))

    def _lines(self) -> list[list[str]]:
        return [json.loads(line) for line in (self._folder / "looks").read_text().splitlines()]


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory):
    """A cluster of this machine that has two GPUs, as Ray is told."""
    folder = tmp_path_factory.mktemp("look")
    looks = Looks(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(ray, "init", functools.partial(ray.init, num_cpus=4, num_gpus=2, resources=KIND))
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
    config = UnetConfig(image_height_px=24, image_width_px=32, n_classes=3, n_filters=4, depth=2, dropout=0.0)
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


def commands(model: str, pairs: Path, frames: Path, folder: Path) -> dict[str, list[str]]:
    """Of each job the command line without device and precision."""
    data = ["--images", f"{pairs}/frames", "--masks", f"{pairs}/masks"]
    shape = ["--image-size", "24", "32", "--n-filters", "4", "--depth", "2", "--batch-size", "4", "--epochs", "2"]
    chunks = ["--chunk-frames", "2", "--batch-size", "3"]
    return {
        "train": ["train", *data, *shape, "--classes", f"{pairs}/classes.yaml", "--out", f"{folder}/run"],
        "evaluate": ["evaluate", "--model", model, *data, "--out", f"{folder}/measured"],
        "segment": ["segment", "--model", model, "--frames", str(frames), "--out", f"{folder}/labels", *chunks],
    }


@pytest.fixture
def command(model: str, pairs: Path, frames: Path, tmp_path: Path) -> dict[str, list[str]]:
    return commands(model, pairs, frames, tmp_path)


@pytest.fixture(scope="module")
def loss_on_cpu(looks: Looks, model: str, pairs: Path, frames: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Of the last epoch of a training by one worker on CPUs."""
    folder = tmp_path_factory.mktemp("on_cpu")
    assert cli.main([*commands(model, pairs, frames, folder)["train"], *SAME, "--device", "cpu"]) == 0
    return json.loads((folder / "run" / "metrics.json").read_text())["loss"]


def rows_of(out: Path) -> list[dict]:
    return pa.concat_tables(pq.read_table(file) for file in sorted((out / "frames").glob("*.parquet"))).to_pylist()


OTHER_DEVICE = (
    "warning: the labels so far come from another device or other versions: device was gpu and is cpu; between the "
    "two, a mask may differ in a few pixels"
)


def test_what_is_labelled_on_gpus_is_what_cpus_label(
    looks: Looks, command, frames: Path, tmp_path: Path, capfd
) -> None:
    looks.see(ALWAYS, together=2)
    for device in ("gpu", "cpu"):
        out = ["--out", str(tmp_path / device), "--device", device, "--precision", "float32"]
        assert cli.main([*command["segment"], *out]) == 0, capfd.readouterr().err
        output = capfd.readouterr().out
        assert f"device: {device}\n" in output and "11 frames: 11 labelled, 0 rejected\n" in output
        assert f"; {'2 model actors' if device == 'gpu' else '1 model actor'} x " in output
        assert looks.of_actors() == ["0", "1"], "each actor on a GPU looks once, and none on a CPU"
        assert verify.verify(str(tmp_path / device)) == []
        recorded = plans.read_run(str(tmp_path / device))["recorded"]
        assert (recorded["device"], recorded.get("gpus")) == (device, "L4" if device == "gpu" else None)
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


@pytest.mark.slow
def test_an_output_of_gpus_that_goes_on_with_cpus_says_so(
    looks: Looks, command, frames: Path, tmp_path: Path, capfd
) -> None:
    looks.see(ALWAYS, together=2)
    log = shutil.copytree(frames, tmp_path / "log", copy_function=shutil.copy2)
    words = [str(log) if argument == str(frames) else argument for argument in command["segment"]]
    words += ["--out", str(tmp_path / "labels"), "--precision", "float32"]
    assert cli.main([*words, "--device", "gpu"]) == 0, capfd.readouterr().err
    capfd.readouterr()
    shutil.copytree(log / "a", log / "c")
    assert cli.main([*words, "--device", "cpu"]) == 0
    lines = capfd.readouterr().out.splitlines()
    (warning,) = (index for index, line in enumerate(lines) if line.startswith("warning: "))
    assert lines[warning] == OTHER_DEVICE and lines[warning + 1].startswith("16 frames in 9 chunks, 5 in 3 to do; ")
    assert verify.verify(str(tmp_path / "labels")) == []


@pytest.mark.weekly
@pytest.mark.parametrize("workers", ["2", "1:2"])
def test_a_training_and_an_evaluation_reserve_gpus(
    looks: Looks, command, loss_on_cpu: float, workers: str, tmp_path: Path, capfd
) -> None:
    looks.see(ALWAYS)
    each = ["--device", "gpu", "--precision", "float32"]
    assert cli.main([*command["train"], *SAME, "--device", "gpu", "--workers", workers]) == 0, capfd.readouterr().err
    output = capfd.readouterr().out
    amount = {"2": "2 workers x 2", "1:2": "1 to 2 workers x 2"}[workers]
    assert f"{amount} CPUs and a GPU; " in output and "epoch 2/2" in output
    on_gpus = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert on_gpus["loss"] == pytest.approx(loss_on_cpu, rel=1e-3)
    assert cli.main([*command["evaluate"], *each, "--model", f"{tmp_path}/run"]) == 0, capfd.readouterr().err
    assert json.loads((tmp_path / "measured/metrics.json").read_text())["val/mean_iou"] > 0


def test_a_training_that_wants_more_gpus_than_there_are_says_so(looks: Looks, command, capfd) -> None:
    looks.see(ALWAYS)
    options = ["--device", "gpu", "--workers", "3", "--cpus-per-worker", "1", "--wait-for-resources-s", "0"]
    assert cli.main([*command["train"], *options]) == 2
    assert capfd.readouterr().err == (
        "unet-ray: error: 3 training workers want 3 CPUs, 3 GPUs (1 CPU, 1 GPU each); the cluster has 4 CPUs, 2 GPUs; "
        "ask for fewer, or add nodes\n"
    )


@pytest.mark.parametrize(
    ("job", "n_looks"),
    [
        *(("segment", 0), ("train", 0)),
        *(
            pytest.param(job, n_looks, marks=pytest.mark.slow if n_looks == 0 else pytest.mark.weekly)
            for job, n_looks in (("segment", 3), ("train", 3), ("evaluate", 0), ("evaluate", 1))
        ),
    ],
)
def test_a_gpu_that_tensorflow_does_not_see_ends_the_job_at_once(
    looks: Looks, command, job: str, n_looks: int, tmp_path: Path, capfd
) -> None:
    """All look before they read anything; where that node sees one, another may not."""
    looks.see(n_looks)
    assert cli.main([*command[job], "--device", "gpu", "--precision", "float32"]) == 1
    captured = capfd.readouterr()
    hint = "; then the same command goes on" if job == "segment" and n_looks else ""
    assert captured.err == REFUSED.format(SEES_NONE) + hint + "\n"
    assert "Traceback" not in captured.out
    for second_try in ("once more", "a worker was lost", "the group has started again"):
        assert second_try not in captured.out
    if job == "segment":
        assert not list((tmp_path / "labels").rglob("part*")) and not (tmp_path / "labels/frames").exists()
    else:
        assert looks.count() in (n_looks + 1, n_looks + 2)  # a trial of XLA, before workers start, looks too
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
def test_precision_auto_on_a_gpu_that_does_not_tell_ends_the_job_at_once(
    looks: Looks, command, job: str, capfd
) -> None:
    looks.see(ALWAYS, [HOPPER, None] if job == "segment" else [None, None])
    assert cli.main([*command[job], "--device", "gpu", "--precision", "auto"]) == 1
    captured = capfd.readouterr()
    assert captured.err == REFUSED.format(UNKNOWN) + "\n"
    assert "Traceback" not in captured.out and " steps of " not in captured.out and " to do; " not in captured.out


@pytest.mark.parametrize(("knows", "expected"), [((HOPPER, HOPPER), True), ((HOPPER, TURING), False)])
def test_precision_auto_is_what_all_gpus_of_a_node_have(looks: Looks, knows, expected: bool) -> None:
    looks.see(ALWAYS, knows)
    assert gpus.all_have_bfloat16(1.0, 1.0) is expected


def hold(n_gpus: int) -> Callable[[], None]:
    """Other work takes so many GPUs; what is returned makes it give them back."""

    class Holder:  # here, as Ray's processes do not know this file
        def ready(self) -> None:
            pass

    holder = ray.remote(num_cpus=0, num_gpus=n_gpus)(Holder).remote()
    ray.get(holder.ready.remote())
    return functools.partial(ray.kill, holder)


def test_gpus_that_are_free_are_asked_and_those_in_use_are_waited_for(looks: Looks, monkeypatch) -> None:
    monkeypatch.setattr(gpus, "WHOLE_NODE_S", 100.0)
    node = ray.get_runtime_context().get_node_id()
    given = lambda: os.environ["CUDA_VISIBLE_DEVICES"]  # noqa: E731
    assert {key: sorted(value.split(",")) for key, value in gpus.ask_gpus(given, 1.0, 0.0).items()} == {
        node: ["0", "1"]
    }
    monkeypatch.setattr(gpus, "WHOLE_NODE_S", 0.5)
    give_back_one = hold(1)
    assert gpus.ask_gpus(given, 0.5, 60.0)[node] in ("0", "1")
    give_back_other = hold(1)
    with pytest.raises(TryAgain, match="^no GPU was free for 0.1 s "):
        gpus.ask_gpus(given, 0.5, 0.1)
    monkeypatch.setattr(gpus, "say", lambda line: give_back_one())  # when it says that it waits
    assert gpus.ask_gpus(given, 0.5, 60.0)[node] in ("0", "1")
    give_back_other()


@pytest.mark.parametrize("job", ["segment", "evaluate", "train"])
def test_a_job_for_which_no_gpu_is_left_says_so_and_may_be_tried_again(
    looks: Looks, command, job: str, monkeypatch, capfd
) -> None:
    looks.see(ALWAYS)
    monkeypatch.setattr(gpus, "WHOLE_NODE_S", 0.1)
    give_back = hold(2)
    options = ["--device", "gpu", "--precision", "float32", "--wait-for-resources-s", "0.2"]
    assert cli.main([*command[job], *options]) == 75
    give_back()
    captured = capfd.readouterr()
    assert "no GPU of 1 node is free yet; waiting up to 0.2 s for one\n" in captured.out
    assert captured.err == (
        "unet-ray: error: no GPU was free for 0.2 s (--wait-for-resources-s): other work on this cluster has them; the "
        "same command goes on where this one stopped\n"
    )


@pytest.mark.slow
def test_what_is_measured_on_a_gpu_is_what_a_cpu_measures(looks: Looks, command, tmp_path, monkeypatch, capfd) -> None:
    looks.see(ALWAYS)
    monkeypatch.setattr(gpus, "WHOLE_NODE_S", 0.5)
    results = {}
    give_back = hold(1)  # the other one is left
    for device in ("gpu", "cpu"):
        options = ["--device", device, "--precision", "float32"]
        assert cli.main([*command["evaluate"], *options]) == 0, capfd.readouterr().err
        assert f"device: {device}\n" in capfd.readouterr().out
        results[device] = json.loads((tmp_path / "measured/metrics.json").read_text())
    give_back()
    exact = [name for name, value in results["cpu"].items() if not isinstance(value, float)]
    assert [results["gpu"].pop(name) for name in exact] == [results["cpu"].pop(name) for name in exact]
    assert {"val/mean_iou", "val/expected_calibration_error/after"} <= results["cpu"].keys()
    assert results["gpu"] == pytest.approx(results["cpu"], rel=1e-4, abs=1e-4)


@pytest.mark.weekly
def test_actors_share_gpus_and_leave_none_idle(looks: Looks, command, capfd) -> None:
    """Four with half a GPU and less than a CPU each, on two GPUs and four CPUs; of a range, too."""
    looks.see(ALWAYS, together=4)
    options = ["--device", "gpu", "--precision", "float32", "--batch-size", "2"]  # a block for each actor
    assert cli.main([*command["segment"], *options, "--actors-per-gpu", "2", "--actors", "1:9"]) == 0
    output = capfd.readouterr().out
    assert "; 4 to 9 model actors x 1 thread, batches of 2, " in output
    assert "11 frames: 11 labelled, 0 rejected\n" in output
    assert looks.of_actors() == ["0", "0", "1", "1"]


@pytest.mark.weekly
def test_where_xla_aborts_the_job_goes_on_without_it_and_says_so(looks: Looks, command, tmp_path, capfd) -> None:
    looks.see(ALWAYS)
    with looks.aborting_xla():
        assert cli.main([*command["segment"], "--device", "gpu", "--precision", "float32", "--actors", "1"]) == 0
    output = capfd.readouterr().out
    assert (
        f"warning: XLA ended its process by SIGABRT on a GPU of node {socket.gethostname()}; the job goes on without "
        "XLA, which takes longer, and its labels may differ in a few pixels from those with it\n"
    ) in output
    assert "11 frames: 11 labelled, 0 rejected\n" in output
    assert verify.verify(str(tmp_path / "labels")) == []
    assert looks.of_actors() in (["0"], ["1"])


@pytest.mark.weekly
def test_a_node_that_came_after_the_job_began_and_on_which_xla_aborts_ends_the_job(
    looks: Looks, command, monkeypatch, capfd
) -> None:
    looks.see(ALWAYS)
    monkeypatch.setattr(labelling_job, "try_xla", lambda share, wait_s: (True, []))  # this node was not there yet
    with looks.aborting_xla():
        assert cli.main([*command["segment"], "--device", "gpu", "--precision", "float32", "--actors", "1"]) == 1
    assert capfd.readouterr().err == (
        f"unet-ray: error: XLA ended its process by SIGABRT on a GPU of node {socket.gethostname()}, which came after "
        "this job began; take that node out, or keep it, to go on without XLA; then the same command goes on\n"
    )

"""The benchmark: its arithmetic, its memory over several runs, its peers, and the job itself at a tiny setting."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unet_ray.bench import arena, benchmark, contests, peers, watchers
from unet_ray.bench.arena import Arena, Contest
from unet_ray.bench.benchmark import Journal, Round, Row, Skipped
from unet_ray.bench.native_peers import mask_png
from unet_ray.bench.training_contests import camvid_mean_iou
from unet_ray.bench.training_peers import digest_of
from unet_ray.classes import PRESETS
from unet_ray.labelling.decoding import DecodeOptions, decode
from unet_ray.model.bundle import read_bundle, write_bundle
from unet_ray.pixels.images import decode_mask

JOB = Path(__file__).parents[2] / "jobs" / "benchmark.py"
TINY = arena.SIZES["tiny"]


def ratio_row(name: str = "fast", against: str = "peer", **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "name": name, "what": "labelling", "against": "a peer", "contest": "race", "needs": ("ours", against),
        "figure": lambda measured: measured["ours"]["per_s"] / measured[against]["per_s"], "target": 1.5,
    }  # fmt: skip
    return Row(**fields | changes)


def rounds_of(*rates: tuple[float, float]) -> list[Round]:
    return [{"ours": {"per_s": ours}, "peer": {"per_s": peer}} for ours, peer in rates]


# --- arithmetic ---


def test_the_bound_is_what_taking_turns_allows():
    assert benchmark.bound(100, 25) == pytest.approx(20)  # 10 ms and 40 ms a frame
    assert benchmark.bound(100, 25, shared=False) == 25


def test_the_steady_state_begins_with_a_tenth_and_ends_when_all_is_published():
    committed = [(14.0, 40), (11.0, 4), (12.0, 16), (10.5, 5), (13.0, 35)]  # in any order; 100 frames
    # 5 and then 9 frames are too few, 25 are enough: from 12 s on, 75 frames until 17 s.
    assert benchmark.steady_rate(committed, 17.0, 0.1) == (15.0, 12.0, 75)


def test_too_few_chunks_tell_no_steady_rate():
    with pytest.raises(
        ValueError, match=r"^50 frames in 1 chunks are too few to tell a steady rate; give more --frames$"
    ):
        benchmark.steady_rate([(1.0, 50)], 2.0, 0.1)


def test_slope_and_bend():
    assert benchmark.slope_per_1000([(1_000, 50), (10_000, 59), (100_000, 149)]) == pytest.approx(1)
    assert benchmark.bend([(1_000, 12), (10_000, 30), (100_000, 210)]) == pytest.approx(0)
    assert benchmark.bend([(1_000, 12), (10_000, 30), (100_000, 228)]) == pytest.approx(0.1)


def test_the_rate_of_the_second_half_against_the_first():
    seen = [(10.0, 0), (11.0, 5), (20.0, 50), (21.0, 52), (30.0, 100)]
    assert benchmark.late_over_early(seen) == pytest.approx(1)
    assert benchmark.late_over_early([*seen[:-1], (45.0, 100)]) == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"^the count was seen at 2 moments, too few to tell whether its rate is st"):
        benchmark.late_over_early(seen[:2])


def test_a_line_is_the_median_of_ratios_within_rounds():
    """The machine is twice as fast in the second round: the ratio of medians would be another."""
    line = benchmark.line(ratio_row(), rounds_of((10, 5), (40, 10), (9, 6)))
    assert (line.figures, line.median, line.verdict) == ((2.0, 4.0, 1.5), 2.0, "reached")


@pytest.mark.parametrize(
    ("changes", "rounds", "verdict"),
    [
        ({"target": 2.5}, rounds_of((10, 5)), "missed"),
        ({"target": 2.5, "at_most": True}, rounds_of((10, 5)), "reached"),
        ({"target": None}, rounds_of((10, 5)), "measured"),
        ({"agreement": lambda _: (False, "other masks")}, rounds_of((10, 5)), "outputs differ"),
        ({}, [{"ours": {"per_s": 1}}], "not measured"),
    ],
)
def test_verdicts(changes: dict[str, Any], rounds: list[Round], verdict: str):
    assert benchmark.line(ratio_row(**changes), rounds).verdict == verdict


def test_outputs_that_differ_in_one_round_are_told():
    row = ratio_row(agreement=lambda measured: (measured["ours"]["per_s"] > 20, f"{measured['ours']['per_s']} seen"))
    line = benchmark.line(row, rounds_of((40, 10), (9, 6), (30, 10)))
    assert (line.agrees, line.agreement) == (False, "9 seen")


def test_the_table():
    noted = ratio_row(agreement=lambda _: (True, "all equal"), note=lambda measured: f"{len(measured)} sides")
    lines = [
        benchmark.line(noted, rounds_of((10, 5), (9, 6))),
        benchmark.line(ratio_row("slow", unit="s", at_most=True, target=10), [], "skipped: no library"),
    ]
    assert benchmark.table(lines).splitlines() == [
        "| row  | what      | against | median | spread        | target        | verdict      | outputs             |",
        "| ---- | --------- | ------- | ------ | ------------- | ------------- | ------------ | ------------------- |",
        "| fast | labelling | a peer  | 1.75x  | 1.5 to 2, n=2 | at least 1.5x | reached      | all equal           |",
        "| slow | labelling | a peer  |        |               | at most 10 s  | not measured | skipped: no library |",
        "fast: 2 sides",
    ]


def test_every_second_round_runs_backwards():
    assert [benchmark.in_turn("abc", number) for number in (0, 1, 2)] == [list("abc"), list("cba"), list("abc")]


def test_every_row_asks_for_contestants_that_there_are():
    assert list(contests.ROWS) == list(dict.fromkeys(contests.ROWS))
    for row in contests.ROWS.values():
        assert set(row.needs) <= set(contests.CONTESTS[row.contest].contestants), row.name


def test_the_mean_of_camvid_is_of_its_eleven_classes_at_the_networks_size():
    names = PRESETS["camvid"].names
    metrics = {f"val_model_size/iou/{name}": index / 100 for index, name in enumerate(names)}
    metrics |= {"val_model_size/iou/void": 0.9, f"val/iou/{names[0]}": 0.9, f"val_model_size/iou/{names[0]}": None}
    assert camvid_mean_iou(metrics) == pytest.approx(sum(range(1, 11)) / 1000)


def test_masks_are_compared_pixel_by_pixel():
    ours = {"a": bytes([1, 2, 3, 4]), "b": bytes([5, 5, 5, 5])}
    assert peers.equal_share(ours, {"a": bytes([1, 2, 0, 4]), "b": bytes([5, 5, 5, 5])}) == 7 / 8
    assert peers.equal_share(ours, {"a": bytes([1, 2, 3, 4])}) == 1 / 2
    assert peers.equal_share(ours, {"a": bytes([1, 2, 3]), "b": bytes([5, 5, 5, 5])}) == 1 / 2


# --- rounds over several runs ---


class Race:
    """Contestants that count their runs; one of them may end the run, be skipped or fail."""

    def __init__(self, folder: Path) -> None:
        self.arena = Arena(folder, TINY)
        self.path = folder / "benchmark.json"
        self.ran: list[str] = []
        self.round_numbers: list[int] = []
        self.ending: dict[str, BaseException] = {}
        self.rows = [ratio_row(), ratio_row("other", "second")]
        named = {"ours": 30.0, "peer": 10.0, "second": 20.0}
        self.contest = Contest(
            name="race",
            contestants={name: self._one(name, rate) for name, rate in named.items()},
            compare=lambda _, measured: (
                [measurement.setdefault("looked_at", 1) for measurement in measured.values()] and None
            ),
        )

    def _one(self, name: str, rate: float) -> Callable[[Arena], dict[str, float]]:
        def run(arena: Arena) -> dict[str, float]:
            if name in self.ending:
                raise self.ending.pop(name)
            self.ran.append(name)
            self.round_numbers.append(arena.round_number)
            return {"per_s": rate}

        return run

    def play(self, rows: list[Row], repeats: int, machine: str = "one") -> tuple[bool, list[benchmark.Line]]:
        """As a run of its own: with what the file says."""
        journal = Journal(self.path, {"processor": machine}, self.rows, self.arena.source)
        self.ran.clear()
        went_well = contests.play(self.contest, rows, self.arena, journal, repeats, lambda _: None)
        return went_well, journal.lines()


@pytest.fixture
def race(tmp_path: Path) -> Race:
    return Race(tmp_path)


def test_a_run_takes_only_those_that_its_rows_need_and_both_orders(race: Race):
    went_well, lines = race.play(race.rows[:1], 2)
    assert went_well and race.ran == ["ours", "peer", "peer", "ours"]
    assert race.round_numbers == [0, 0, 1, 1]
    assert [(line.row.name, line.figures) for line in lines] == [("fast", (3.0, 3.0))]


def test_rows_of_several_runs_make_one_table_and_nothing_is_measured_twice(race: Race):
    race.play(race.rows[:1], 1)
    _, lines = race.play(race.rows[1:], 1)
    assert set(race.ran) == {"ours", "second"}
    assert [(line.row.name, line.figures) for line in lines] == [("fast", (3.0,)), ("other", (1.5,))]
    race.play(race.rows, 1)
    assert race.ran == []
    race.play(race.rows[:1], 3)
    assert sorted(race.ran) == ["ours", "ours", "peer", "peer"]


def test_a_run_that_was_cut_goes_on(race: Race):
    race.ending["peer"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        race.play(race.rows[:1], 1)
    assert json.loads(race.path.read_text())["contests"]["race"]["rounds"] == [
        {"ours": {"per_s": 30.0, "looked_at": 1}}
    ]
    _, lines = race.play(race.rows[:1], 1)
    assert [line.figures for line in lines] == [(3.0,)]


def test_what_other_code_has_measured_is_shown_as_such_until_it_is_measured_again(race: Race):
    race.play(race.rows[:1], 1)
    race.arena.source = "changed"
    lines = Journal(race.path, {"processor": "one"}, race.rows, "changed").lines()
    assert [(line.figures, line.note) for line in lines] == [((3.0,), "measured with other code")]
    assert [(line.figures, line.note) for line in race.play(race.rows[:1], 1)[1]] == [((3.0,), "")]
    assert race.ran == ["ours", "peer"]


def test_other_settings_and_another_machine_begin_anew(race: Race):
    race.play(race.rows[:1], 2)
    race.arena.settings = dataclasses.replace(TINY, frames=13)
    assert [line.figures for line in race.play(race.rows[:1], 1)[1]] == [(3.0,)]
    assert [line.figures for line in race.play(race.rows[:1], 1, machine="two")[1]] == [(3.0,)]
    assert race.ran != []


@pytest.mark.parametrize(
    ("ending", "went_well", "missing"),
    [
        (Skipped("no library"), True, "skipped: no library"),
        (
            arena.ContestantFailed("peer ended with exit code 1: boom"),
            False,
            "failed: peer ended with exit code 1: boom",
        ),
    ],
)
def test_one_that_cannot_run_takes_its_row_with_it_and_no_other(race, ending, went_well, missing):
    race.ending["peer"] = ending
    well, lines = race.play(race.rows, 2)
    assert well == went_well
    assert [(line.row.name, line.verdict, line.missing) for line in lines] == [
        ("fast", "not measured", missing),
        ("other", "reached", ""),
    ]
    saved = json.loads(race.path.read_text())["rows"]
    assert [(row["name"], row["verdict"]) for row in saved] == [("fast", "not measured"), ("other", "reached")]
    assert [line.verdict for line in race.play(race.rows, 2)[1]] == ["reached", "reached"]


# --- programs, each in a process of its own ---


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    """An arena whose network has random weights instead of a short training."""
    tiny_arena = Arena(tmp_path_factory.mktemp("arena"), dataclasses.replace(TINY, cores=1, frames=14, pairs=9))
    from unet_ray.model.weights import weight_shapes

    numbers = np.random.default_rng(1)
    weights = {
        name: numbers.normal(0, 0.5, shape).astype(np.float32) for name, shape in weight_shapes(TINY.network).items()
    }
    write_bundle(str(tiny_arena.data / "model" / "model"), weights, TINY.network, PRESETS["carla23"], {})
    return tiny_arena


@pytest.fixture(scope="module")
def expected(tiny: Arena) -> dict[str, bytes]:
    """Masks of the archive by plain Keras."""
    net = read_bundle(str(tiny.model())).build_model(dtype_policy="float32")
    options = DecodeOptions(network_size=tiny.network_size, max_pixels=10**6, timeout_s=60)
    masks = {}
    for path in peers.list_frames(str(tiny.archive("png", 14))):
        image_HWC = decode(Path(path).read_bytes(), options).image
        assert image_HWC is not None
        mask_HW = np.asarray(net(image_HWC[None], training=False)).argmax(-1)[0].astype(np.uint8)
        masks[peers.frame_id(path)] = mask_HW.tobytes()
    assert len(masks) == 14 and len(set(masks.values())) > 6
    return masks


@pytest.mark.parametrize(
    "program", [pytest.param("notebook_loop", marks=pytest.mark.slow), "tfdata_loop", "torch_loop"]
)
def test_peers_label_every_frame_as_plain_keras_does(program: str, tiny: Arena, expected: dict[str, bytes]):
    options: dict[str, Any] = {} if program == "notebook_loop" else {"precision": "float32"}
    if program == "torch_loop":
        pytest.importorskip("torch")
    out = tiny.output(program)
    tiny.program(
        program,
        {
            "frames": tiny.archive("png", 14),
            "model": tiny.model(),
            "out": out,
            "batch_size": 4,
            "threads": 1,
            **options,
        },
    )
    number, masks = peers.read_masks(str(out), at_most=100)
    assert number == 14 and peers.equal_share(expected, masks) > 0.999
    number, first_masks = peers.read_masks(str(out), at_most=5)
    assert number == 14 and len(first_masks) == 5 and first_masks.items() <= masks.items()


@pytest.mark.parametrize("program", [pytest.param("tfdata_native", marks=pytest.mark.slow), "torch_native"])
def test_peers_masks_of_the_frames_own_size_are_ours(program: str, tiny: Arena):
    if program == "torch_native":
        pytest.importorskip("torch")
    from unet_ray.model.label_options import LabelOptions
    from unet_ray.model.labeler import Labeler

    photos, out = tiny.archive("photo", 6), tiny.output(program)
    paths = peers.list_frames(str(photos))
    options = LabelOptions(precision="float32", batch_size=6, mask_size="native", n_threads=1)
    decoding = DecodeOptions(network_size=tiny.network_size, max_pixels=10**6, timeout_s=60)
    frames = np.stack([decode(Path(path).read_bytes(), decoding).image for path in paths])
    masks = Labeler(read_bundle(str(tiny.model())), options).label(frames, [TINY.photo_size] * 6).masks
    arguments = {"frames": photos, "model": tiny.model(), "out": out, "batch_size": 4, "threads": 1}
    tiny.program(program, arguments | {"precision": "float32"})
    number, theirs = peers.read_masks(str(out), at_most=100)
    ours = {peers.frame_id(path): mask_png(mask) for path, mask in zip(paths, masks, strict=True)}
    # Another decoder of JPEG, and sums in another order, move pixels between two classes.
    assert number == 6 and peers.equal_share(ours, theirs, decode_mask) > 0.97


@pytest.mark.slow
def test_all_steps_compute_the_same_loss(tiny: Arena):
    arguments: dict[str, Any] = {
        "images": tiny.log() / "CameraRGB", "masks": tiny.log() / "CameraMask", "model": tiny.model(),
        "batch_size": 4, "steps": 2, "threads": 1,
    }  # fmt: skip
    programs: dict[str, dict[str, Any]] = {"our_step": {"precision": "float32", "device": "cpu"}, "keras_step": {}}
    if importlib.util.find_spec("torch"):
        programs["torch_step"] = {"precision": "float32"}
    losses = [tiny.program(name, arguments | more).result for name, more in programs.items()]
    assert all(result["images_per_s"] > 0 for result in losses)
    assert [result["loss"] for result in losses] == pytest.approx([losses[0]["loss"]] * len(losses), rel=1e-4)


@pytest.mark.slow
def test_steps_apart_and_decoding_of_pairs(tiny: Arena):
    images, masks = tiny.pairs()
    arguments = {"images": images, "masks": masks, "size": tiny.network_size, "threads": 1}
    assert tiny.program("decode_pairs", arguments).result["decode_s"] > 0
    log = {"images": str(tiny.log() / "CameraRGB"), "masks": str(tiny.log() / "CameraMask"), "model": str(tiny.model())}
    steps = {
        "batch_size": 4,
        "steps": 2,
        "device": "cpu",
        "precision": "float32",
        "cores": sorted(os.sched_getaffinity(0)),
    }
    result = tiny.program("steps_apart", log | steps).result
    assert set(result) == {"one_per_s", "all_per_s", "summing_per_s"} and min(result.values()) > 0


@pytest.mark.parametrize("program", ["tfdata_ingest", "torch_ingest"])
def test_ingests_give_the_same_pixels(program: str, tiny: Arena):
    if program == "torch_ingest":
        pytest.importorskip("torch")
    from unet_ray.bench.training_peers import some_pairs

    images, masks = map(str, tiny.pairs())
    arguments = {"images": images, "masks": masks, "size": tiny.network_size, "batch_size": 4, "threads": 1}
    result = tiny.program(program, arguments).result
    image_NHWC, mask_NHW = some_pairs(images, masks, 9, tiny.network_size, "carla23")
    assert result["digest"] == digest_of(zip(image_NHWC, mask_NHW, strict=True)) and result["pairs_per_s"] > 0


def test_a_network_as_onnx_computes_what_a_bare_session_does(tiny: Arena):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    measured = {"both": contests.CONTESTS["onnx"].contestants["both"](tiny)}
    assert contests.ROWS["onnx"].figure(measured) > 0
    assert contests.ROWS["onnx"].agreement(measured) == (True, "logits are equal to the bit")


def test_ceilings(tiny: Arena):
    frames = tiny.archive("png", 14)
    how = {"frames": frames, "size": tiny.network_size, "threads": 1}
    rates = tiny.program("decode", how).result
    assert set(rates) == {"ours_per_s", "tf_per_s"} and min(rates.values()) > 0


def test_a_program_that_ends_badly_is_told(tiny: Arena):
    with pytest.raises(arena.ContestantFailed, match=r"^decode ended with exit code 1: .* max_workers must be greater"):
        tiny.program("decode", {"frames": tiny.out / "nothing", "size": [4, 4], "threads": 0})


def test_memory_is_that_of_the_process_itself(tiny: Arena):
    code = "import sys; block = bytearray(b'x') * 120_000_000; print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == b"held\n"
        memory = watchers.Memory()
        with memory.of(process.pid):
            pass
        process.stdin.close()
    assert 110 < memory.result()["driver_mb"] < 200 and memory.result()["worker_mb"] == 0


# --- the job ---


@pytest.mark.weekly
@pytest.mark.timeout(600)
def test_the_job_measures_writes_and_shows(tmp_path: Path):
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(JOB), "--out", str(tmp_path), "--size", "tiny", "--repeats", "1", *options]
        return subprocess.run(command, capture_output=True, text=True)

    names = ["png_tfdata", "photo_tfdata", "listing", "chunks", "chunks_rate", "first_epoch"]
    done = run("--only", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "benchmark.json").read_text())["rows"]}
    assert list(rows) == names
    assert rows["png_tfdata"]["agrees"] and rows["photo_tfdata"]["agrees"]
    assert all(row["median"] > 0 for row in rows.values())
    assert rows["listing"]["note"].startswith("300 files: ")
    assert re.match(r"reading [\d.]+ s, decoding alone ", rows["first_epoch"]["note"])
    assert "| png_tfdata " in done.stdout
    table = run("--table")
    assert table.returncode == 0 and table.stdout == done.stdout[done.stdout.index("| row") :]
    usage = run("--only", "png_rain")
    assert usage.returncode == 2 and "invalid choice: 'png_rain'" in usage.stderr

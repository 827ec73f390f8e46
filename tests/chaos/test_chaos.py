"""Faults against real labelling jobs on a real Ray: each ends with the bytes of an undisturbed run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import labelled
import numpy as np
import pytest
import yaml
from network_namespaces import Network
from ray_nodes import RayNodes

from unet_ray.chaos import faults, scenarios, trials
from unet_ray.pixels import images

ROOT = Path(__file__).parents[2]
JOB = ROOT / "jobs" / "chaos.py"

SHOWN_ELSEWHERE = {
    "one_percent_broken": "test_segmentation: bad frames are rows",
    "twenty_percent_broken": "the same; the files are tested here",
    "archive_grown": "test_kills: killed at every change to the storage of a grown output",
    "output_damaged": "test_kills and test_publish: every file, flipped, cut and deleted",
    "work_damaged": "the same, for parts and records",
}
SHOWN_FIRST = {"processes_killed": pytest.mark.slow, "node_lost": pytest.mark.slow}
"""Beside a killed driver the smallest that show what a kill and a loss do; the others run once a week."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> trials.Stage:
    return trials.Stage(tmp_path_factory.mktemp("chaos") / "stage", trials.SIZES["small"])


@pytest.fixture(scope="module")
def can_mount(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        with faults.SmallDisk(tmp_path_factory.mktemp("disk"), 64):
            pass
    except faults.NoSmallDisk as error:
        pytest.skip(str(error))


def test_each_broken_or_odd_file_is_what_it_says(stage):
    good = trials.frames_of(stage.archive)[0].read_bytes()
    pixels = images.decode_frame(good, max_pixels=64_000_000)
    reasons = []
    for index in range(12):
        made = faults.broken(index, good)
        try:
            np.testing.assert_array_equal(images.decode_frame(made.data, max_pixels=64_000_000), pixels)
            reasons.append(None)
        except images.ImageRefused as refused:
            reasons.append(refused.reason)
        assert reasons[-1] == made.reason, index
    assert set(reasons) == {None, "truncated", "not_an_image", "unsupported", "too_large"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "n_kills"),
    [
        ("driver_killed", 1),
        pytest.param("driver_killed", 2, marks=pytest.mark.weekly),
        *(
            pytest.param(name, 1, marks=SHOWN_FIRST.get(name, pytest.mark.weekly))
            for name in scenarios.SCENARIOS
            if name not in {"driver_killed", *SHOWN_ELSEWHERE}
        ),
    ],
)
def test_a_job_lives_through(
    name: str, n_kills: int, stage: trials.Stage, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first a driver is killed with all of its processes, then alone."""
    if name.startswith("disk_full"):
        request.getfixturevalue("can_mount")
    monkeypatch.setattr(stage, "size", dataclasses.replace(stage.size, n_kills=n_kills))
    outcome = scenarios.run(stage, name)
    assert outcome.problems == ()
    assert outcome.same in ("bytes", "rows") and outcome.frames == sum(stage.size.drives)


@pytest.mark.weekly
@pytest.mark.timeout(600)
def test_a_job_whose_own_ray_is_killed_ends_at_once_and_the_rerun_finishes(stage):
    trial = trials.Trial(stage, "ray_killed")
    with trial.started() as job:
        assert trials.wait_until(lambda: trial.has_records(2), job), trial.output()
        below = set(faults.descendants(job.pid))
        (raylet,) = (pid for pid in below if Path(f"/proc/{pid}/comm").read_text() == "raylet\n")
        faults.kill([raylet])
    trial.require_exit(75, "raylet")
    assert trials.wait_until(lambda: faults.are_gone(below))
    trial.run()
    trial.require_exit(0)
    trial.require_same_bytes(stage.undisturbed)
    assert not trial.problems, trial.problems


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_that_is_told_to_stop_while_it_lists_does_not_wait_for_the_storage(stage):
    with socket.create_server(("127.0.0.1", 0)) as server:  # who asks it for a file waits for ever
        archive = f"http://127.0.0.1:{server.getsockname()[1]}/log.tar"
        trial = trials.Trial(stage, "stopped_listing", archive=archive)
        with trial.started() as job:
            server.settimeout(250)
            asked, _ = server.accept()
            trial.stop(job, signal.SIGTERM)  # SIGINT: `driver_stopped`
            asked.close()
    trial.require_exit(128 + signal.SIGTERM, "the same command goes on where this one stopped")
    print(*trial.deeds)
    assert not trial.problems, trial.problems


def keepalive() -> dict[str, str]:
    """The settings with which `cluster.yaml` starts every node."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    head, worker = (
        dict(re.findall(r"(RAY_(?:grpc|health)\w+)=(\S+)", config[f"{name}_start_ray_commands"][-1]))
        for name in ("head", "worker")
    )
    assert head == worker and len(head) == 5
    return head


@pytest.mark.weekly
@pytest.mark.timeout(900)
def test_a_job_goes_on_without_a_node_whose_link_is_cut(stage, monkeypatch, record_property):
    expected = stage.undisturbed
    with (
        Network(3) as network,
        RayNodes(settings=keepalive(), prefix=network.on(0), address=network.address(0)) as nodes,
    ):
        workers = [
            nodes.add(f"--node-ip-address={network.address(number)}", prefix=network.on(number), num_cpus=2)
            for number in (1, 2)
        ]
        monkeypatch.setattr(stage, "address", nodes.address)
        environment = {**stage.environment, **nodes.environment, "PYTHONPATH": stage.environment["PYTHONPATH"]}
        monkeypatch.setattr(stage, "environment", environment)
        trial = trials.Trial(stage, "cut_link", prefix=lambda command: [*network.on(0), *command])
        with trial.started("--actors", "2", on_cluster=True) as job:
            assert trials.wait_until(lambda: trial.has_records(3), job), trial.output()
            assert all(faults.titled_below(node.pid, "ray::MapWorker") for node in workers), "an actor on each node"
            network.cut(1)
            line = f"longest time without a finished chunk after a link was cut: {longest_gap_s(trial, job):.1f} s"
        faults.kill([workers[0].pid, *faults.descendants(workers[0].pid)])  # it would look for the others for a minute
    print(line)
    record_property("cut", line)
    trial.require_exit(0)
    trial.require_same_bytes(expected)
    assert not trial.problems, trial.problems


def longest_gap_s(trial: trials.Trial, job: subprocess.Popen[bytes]) -> float:
    """Looks on until all is labelled, and returns the longest time in which no chunk was finished."""
    seen, since_s, longest_s = len(trial.records()), time.monotonic(), 0.0
    while job.poll() is None and not (trial.out / "frames").exists():
        if len(trial.records()) != seen:
            seen, since_s = len(trial.records()), time.monotonic()
        longest_s = max(longest_s, time.monotonic() - since_s)
        time.sleep(0.05)
    return longest_s


def test_a_small_disk_is_full_for_those_inside_and_gone_afterwards(tmp_path: Path, can_mount: None) -> None:
    with faults.SmallDisk(tmp_path, 64) as disk:
        disk.fill(leave_kb=8)
        write = [sys.executable, "-c", "import sys; open(sys.argv[1], 'wb').write(bytes(int(sys.argv[2])))"]
        done = [
            subprocess.run(disk.command([*write, str(tmp_path / name), str(size)]), capture_output=True, text=True)
            for name, size in (("fits", 8_000), ("does not", 8_000))
        ]
        assert [process.returncode for process in done] == [0, 1] and "No space left on device" in done[1].stderr
        assert (disk.seen_from_here() / "fits").stat().st_size == 8_000
        disk.free()
        assert subprocess.run(disk.command([*write, str(tmp_path / "does not"), "8000"])).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_what_happens_to_files_is_seen_in_order(tmp_path: Path) -> None:
    events = faults.FileEvents([tmp_path])
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b").read_bytes()
    os.link(tmp_path / "b", tmp_path / "c")
    expected = [("appeared", "a"), ("opened", "a"), ("appeared", "b"), ("opened", "b"), ("appeared", "c")]
    assert trials.wait_until(lambda: events.are_more_than(len(expected) - 1), timeout_s=30)
    assert [(kind, path.name) for kind, path in events.seen] == expected


def test_processes_are_found_and_killed() -> None:
    shell = "sleep 600 & exec sleep 600"
    with subprocess.Popen(["sh", "-c", shell], stdin=subprocess.DEVNULL) as parent:
        assert trials.wait_until(lambda: faults.titled_below(parent.pid, "sleep 600"), parent, timeout_s=30)
        below = faults.descendants(parent.pid)
        faults.kill([parent.pid, *below])
        parent.wait()
    assert parent.returncode == -signal.SIGKILL
    assert trials.wait_until(lambda: faults.are_gone(below), timeout_s=30)


def test_a_trial_sees_what_is_not_as_it_should_be(tmp_path: Path) -> None:
    """Without this, a scenario could pass because nothing is compared."""
    stage = trials.Stage(tmp_path / "stage", trials.SIZES["small"])
    trial = trials.Trial(stage, "one")
    (trial.out / "_work/parts").mkdir(parents=True)
    (trial.out / "run.json").write_text('{"lineage": ')
    (trial.out / "_work/parts/key-0123456789abcdef.parquet").write_bytes(b"PAR1")
    (trial.out / "_work/parts/.tmp-1-key").write_bytes(b"half")
    trial.require_nothing_torn()
    assert [problem.partition(":")[0] for problem in trial.problems] == [
        "_work/parts/key-0123456789abcdef.parquet is torn",
        "_work/parts/key-0123456789abcdef.parquet is not what its name says",
        "run.json is torn",
    ]


def test_a_trial_counts_what_is_done_again(tmp_path: Path) -> None:
    """Chunks of a: 0 1 2, 3 4; of b: 0 1 2, 3 4 5, 6; of c: 0."""
    trial = trials.Trial(SimpleNamespace(folder=tmp_path, seed=0, archive=tmp_path / "log"), "counted")
    plan = labelled.make_plan(labelled.write_archive(trial.archive), str(trial.out))
    keys = [chunk.key for chunk in plan.chunks]

    def opened(*frames: str) -> list[tuple[str, Path]]:
        return [("opened", trial.archive / f"{frame}.png") for frame in frames]

    def appeared(*paths: str) -> list[tuple[str, Path]]:
        return [("appeared", trial.out / path) for path in paths]

    seen = [*opened("a/0", "b/0", "c/0"), *appeared("manifest/_g000.json"), *opened("a/0", "a/1", "a/2", "b/0")]
    seen += appeared(f"_work/parts/{keys[0]}-1.parquet", f"_work/records/{keys[0]}.json")
    trial.events = SimpleNamespace(seen=seen)
    assert trial.redone() == (0, 0)
    assert trial.begun() == {keys[0]: 1, keys[2]: 1}
    before = len(seen)
    seen += [*opened("a/1", "b/0", "b/1", "b/2"), *appeared(f"_work/parts/{keys[0]}-1.parquet")]
    seen += appeared(f"_work/records/{keys[2]}.json", f"_work/parts/{keys[2]}-2.parquet")
    assert trial.redone() == (2, 1)
    assert trial.begun() == {keys[0]: 2, keys[2]: 2} and trial.begun(before) == {keys[0]: 1, keys[2]: 1}
    seen += [*appeared("summary.json"), *opened("a/0", "b/1")]
    assert trial.redone() == (2, 1) and not trial.problems
    seen.insert(0, ("overflow", Path()))
    assert trial.redone() == (2, 1) and trial.problems == ["more happened to files than the kernel could tell"]


def test_a_scenario_without_an_output_fails_and_the_others_go_on(tmp_path: Path, monkeypatch) -> None:
    """As where Ray does not start, on a machine that is too busy."""

    def rain(stage: trials.Stage) -> trials.Trial:
        trial = trials.Trial(stage, "rain")
        trial.require_same_bytes(tmp_path)
        return trial

    monkeypatch.setitem(scenarios.SCENARIOS, "rain", rain)
    stage = SimpleNamespace(folder=tmp_path, seed=0, archive=tmp_path, undisturbed=tmp_path)
    outcome = scenarios.run(stage, "rain")
    assert outcome.verdict == "FAIL" and outcome.exit_codes == ()
    (problem,) = outcome.problems
    assert "is not an output of segment" in problem and problem.endswith("; see stage/trials/rain/log.txt")


@pytest.mark.timeout(300)
def test_the_job_prints_a_table_and_writes_it(tmp_path: Path) -> None:
    usage = subprocess.run(
        [sys.executable, str(JOB), "--out", str(tmp_path), "--scenarios", "rain"], capture_output=True
    )
    assert usage.returncode == 2 and b"invalid choice: 'rain'" in usage.stderr
    outcome = scenarios.Outcome(
        scenario="rain", did="it rained", exit_codes=(-9, 0), frames=1_000, rejected=2, redone="0+0", same="no",
        seconds=1.5, problems=("wet",),
    )  # fmt: skip
    assert scenarios.table([outcome]).splitlines() == [
        "scenario  exit codes  frames  rejected  redone  same  s  verdict  what was done",
        "rain      -9 0        1,000   2         0+0     no    2  FAIL     it rained",
        "rain: wet",
    ]
    assert json.loads(json.dumps(scenarios.as_json([outcome])))[0]["verdict"] == "FAIL"

"""The labelling job beside one that overwrites its output with another model's labels; scenarios as in `scenarios`."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from unet_ray.chaos import faults
from unet_ray.chaos.trials import Stage, Trial, wait_until

_ONE_CPU = ("--actors", "1", "--cpus-per-actor", "1")


def overwritten_beside_work(stage: Stage) -> Trial:
    """`--overwrite` is refused while a job works; of one whose sign of life was lost it takes the output over."""
    trial = Trial(stage, "overwritten_beside_work")
    overwrite = (*_ONE_CPU, "--overwrite", "--model", str(stage.other_model))
    with trial.started(*_ONE_CPU, on_cluster=True) as first:
        wait_until(partial(trial.has_records, 1), first)
        first.send_signal(signal.SIGSTOP)  # so that it gives no other sign
        trial.run(*overwrite, on_cluster=True)
        trial.require_exit(75, "stop it before --overwrite")
        shutil.rmtree(trial.out / "_work" / "jobs")
        before = (trial.out / "run.json").read_bytes()
        with trial.started(*overwrite, on_cluster=True) as second:
            wait_until(partial(_differs, trial.out / "run.json", before), second)
            first.send_signal(signal.SIGCONT)
            trial.did("--overwrite refused, then unseen beside a stopped job, which went on")
        trial.require_exit(0)
    trial.require_exit(75)
    trial.require("was overwritten by another job" in trial.log.read_text(), "the first job did not say what happened")
    trial.require_same_bytes(stage.undisturbed_by_other_model)
    return trial


def overwriting_killed(stage: Stage) -> Trial:
    """`--overwrite` is killed while it works; the same command, at once, takes the dead job for no living one."""
    trial = Trial(stage, "overwriting_killed", start_from=stage.undisturbed)
    overwrite = ("--overwrite", "--model", str(stage.other_model))
    with trial.started(*overwrite) as job:
        wait_until(partial(trial.has_records, 1), job)
        faults.kill([job.pid, *faults.descendants(job.pid)])
    trial.run()
    trial.require_exit(2, "holds labels of another kind: model is")
    trial.run(*overwrite)
    trial.did("--overwrite killed, refused to the first model, and repeated")
    trial.require_exit(0)
    trial.require_same_bytes(stage.undisturbed_by_other_model)
    return trial


def _differs(path: Path, before: bytes) -> bool:
    return os.path.exists(path) and path.read_bytes() != before


SCENARIOS: tuple[Callable[[Stage], Trial], ...] = (overwritten_beside_work, overwriting_killed)

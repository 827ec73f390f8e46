"""What TensorFlow can do with this machine's devices, tried in a process of its own, which XLA or a driver may end."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unet_ray import PACKAGE

TRIAL_TIMEOUT_S = 300.0
"""For one that hangs; a GPU for which TensorFlow has no code of its own compiles some for a minute and more."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as TensorFlow sees it."""

    name: str
    capability: tuple[int, int]
    """Compute capability; (0, 0) where TensorFlow does not say."""


@dataclass(frozen=True, kw_only=True)
class DeviceTrial:
    """What the process came to; None for what it did not."""

    gpus: tuple[Gpu, ...] | None = None
    built_for: tuple[str, ...] = ()
    """GPUs that this TensorFlow has code for: `sm_89` as it is, `compute_90` to be compiled for that and newer ones."""
    nccl: str | None = None
    """Version of NVIDIA's library for sums over GPUs."""
    xla_s: float | None = None
    """Seconds until XLA had compiled and run a small network on every device."""
    ended: str = ""
    """How the process ended before it was done, and its last words."""


def try_devices(timeout_s: float = TRIAL_TIMEOUT_S) -> DeviceTrial:
    """Returns what a new process finds out by and by; one that dies or hangs costs what was still to come."""
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TF_CPP_MIN_LOG_LEVEL": "1"}
    command = [sys.executable, "-m", "unet_ray.model.device_trial"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
        output, errors, how = done.stdout, done.stderr, _ending(done.returncode)
    except subprocess.TimeoutExpired as hung:
        output, errors = (_text(stream) for stream in (hung.stdout, hung.stderr))
        how = f"no end within {timeout_s:g} s"
    facts: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            facts.update(json.loads(line))
    return _trial(facts, ended=f"{how}: {_last_words(errors)}" if how else "")


def _text(stream: bytes | str | None) -> str:
    return stream.decode(errors="replace") if isinstance(stream, bytes) else stream or ""


def _trial(facts: Mapping[str, Any], ended: str) -> DeviceTrial:
    gpus = facts.get("gpus")
    return DeviceTrial(
        gpus=None if gpus is None else tuple(Gpu(name=name, capability=(*capability,)) for name, capability in gpus),
        built_for=tuple(facts.get("built_for", ())),
        nccl=facts.get("nccl"),
        xla_s=facts.get("xla_s"),
        ended=ended,
    )


def _ending(exit_code: int) -> str:
    if exit_code == 0:
        return ""
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"


def _last_words(errors: str) -> str:
    """Returns the line that C++ (glog) ended with, before its stack trace, else the last one."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    fatal = [line.partition("] ")[2] for line in lines if re.match(r"F\d{4} .*\] ", line)]
    return (fatal or lines or ["no word"])[-1]


# --- in the process of its own ---


def _tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def _try() -> None:
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    _tell(gpus=[(of.get("device_name", "GPU"), of.get("compute_capability", (0, 0))) for of in details])
    _tell(built_for=list(tf.sysconfig.get_build_info().get("cuda_compute_capabilities", ())))
    if gpus:
        _tell(nccl=_nccl_version())
    for gpu in gpus:  # another job may have most of its memory
        tf.config.experimental.set_memory_growth(gpu, True)
    started_s = time.monotonic()
    for device in [f"/GPU:{index}" for index in range(len(gpus))] or ["/CPU:0"]:
        with tf.device(device):
            _compile_network()
    _tell(xla_s=round(time.monotonic() - started_s, 1))


def _compile_network() -> None:
    """Compiles a convolution and what labelling does behind it; raises RuntimeError where the classes are wrong."""
    import tensorflow as tf

    @tf.function(jit_compile=True)
    def classes(frames_BHWC: Any, kernel: Any) -> Any:
        logits_BHWK = tf.nn.relu(tf.nn.conv2d(frames_BHWC, kernel, 1, "SAME"))
        return tf.argmax(tf.image.resize(logits_BHWK, (8, 12)), axis=-1)

    colors = tf.one_hot([[0, 1, 2], [2, 0, 1]], 3)[None]
    kernel = tf.eye(3)[None, None]  # each pixel's logits are its colour
    if classes(colors, kernel).numpy()[0, ::4, 2::4].tolist() != [[0, 1, 2], [2, 0, 1]]:
        raise RuntimeError("XLA's network gives other classes than those drawn")


def _nccl_version() -> str | None:
    """Returns the version of NVIDIA's NCCL that pip or the system has installed, None where it cannot be loaded."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    version = ctypes.c_int()
    for library in (*(str(folder / "nccl/lib/libnccl.so.2") for folder in folders), "libnccl.so.2"):
        try:
            ctypes.CDLL(library).ncclGetVersion(ctypes.byref(version))
        except OSError:
            continue
        return f"{version.value // 10_000}.{version.value // 100 % 100}.{version.value % 100}"
    return None


if __name__ == "__main__":
    _try()

"""Whether XLA works on this process' GPUs: a child process tries it, as XLA may abort the process that asks.

`python -m unet_ray.model.xla_check gpu` is that child. On a Blackwell GPU with CUDA 12's libraries XLA ends it by
SIGABRT (TensorFlow 2.21; tensorflow#111958, #89272).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from unet_ray.model import devices

FIRST_START_S = 1800.0
"""For the child: on a GPU for which TensorFlow has no machine code, the driver compiles all that it uses (see
`devices.CUDA_CACHE_BYTES`), and may share its cores with others that do the same."""

_PROBLEM_LETTERS = 200
_TOLERANCE = 0.05  # bfloat16 has 8 bits: of values about 1 it keeps two digits


def xla_problem(device: str = "gpu") -> str | None:
    """Returns what goes wrong when XLA compiles and runs a tiny network on this process' device; None: nothing does.

    Raises:
        UnusableGpu: TensorFlow sees no GPU, or the child does not end.
    """
    if device == "gpu":
        devices.keep_cuda_kernels()  # for the child, and for what comes after it
        devices.require_gpu()
    return problem_of([sys.executable, "-m", "unet_ray.model.xla_check", device], FIRST_START_S)


def problem_of(command: Sequence[str], timeout_s: float) -> str | None:
    """Returns how a program failed, in one line; None where it ended well.

    Raises:
        UnusableGpu: it does not end.
    """
    try:
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, errors="replace", timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise devices.unusable(f"a tiny network that XLA compiles does not end there in {timeout_s:g} s") from error
    if done.returncode < 0:
        return f"XLA ended its process by {signal.Signals(-done.returncode).name}"
    if done.returncode > 0:
        lines = done.stderr.split("\n")
        last = next((line for line in reversed(lines) if line.strip()), f"exit code {done.returncode}")
        return f"XLA failed: {textwrap.shorten(last, _PROBLEM_LETTERS, placeholder=' …')}"
    return None


def main(device: str) -> None:
    """Compiles and runs a tiny network on one GPU of each kind that this process has, in two precisions.

    Raises:
        SystemExit: XLA computes something else than TensorFlow itself.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import numpy as np
    import tensorflow as tf

    devices.configure_tensorflow(device, 1, op_threads=1, reproducible=True)
    kinds: dict[Any, str] = {}
    for gpu, name in zip(tf.config.list_logical_devices("GPU"), devices.visible_gpus(), strict=False):
        kinds.setdefault(devices.gpu_details(name).get("compute_capability"), gpu.name)
    random = np.random.default_rng(0)
    images_BHWC = random.normal(size=(2, 16, 24, 8)).astype(np.float32)
    filters = random.normal(0, 0.1, (3, 3, 8, 8)).astype(np.float32)

    def network(images_BHWC, filters):
        features = tf.nn.relu(tf.nn.conv2d(images_BHWC, filters, 1, "SAME"))
        features = tf.nn.max_pool2d(features, 2, 2, "VALID")
        return tf.nn.conv2d_transpose(features, filters, images_BHWC.shape, 2, "SAME")

    for device_name in kinds.values() or ["/CPU:0"]:
        with tf.device(device_name):
            for dtype in (tf.float32, tf.bfloat16):
                arguments = tf.cast(images_BHWC, dtype), tf.cast(filters, dtype)
                compiled = tf.function(network, jit_compile=True, autograph=False)(*arguments)
                actual, expected = (tf.cast(array, tf.float32) for array in (compiled, network(*arguments)))
                if not np.allclose(actual, expected, atol=_TOLERANCE):
                    sys.exit(f"it computes something else than TensorFlow itself, in {dtype.name}")


if __name__ == "__main__":
    main(sys.argv[1])

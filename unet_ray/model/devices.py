"""What the processor or GPU of this machine can compute in, and whether TensorFlow sees the GPU that Ray gives."""

from __future__ import annotations

import os
import socket
import subprocess

from unet_ray.errors import JobFailed

QUERY_TIMEOUT_S = 60.0
"""For `nvidia-smi`, which takes seconds where the driver is not kept loaded, and hangs on a GPU that is broken."""


class UnusableGpu(JobFailed):
    """Ray has a GPU on a node, and TensorFlow cannot use it; trying again changes nothing."""


def _unusable(problem: str) -> UnusableGpu:
    """Returns the error of this node; its own constructor takes the whole text, as it is sent from node to node."""
    return UnusableGpu(
        f"Ray has a GPU on node {socket.gethostname()}, but {problem}; install TensorFlow's CUDA libraries there "
        "(pip install 'unet-ray[gpu]', which is tensorflow[and-cuda]) and an NVIDIA driver, or give --device cpu"
    )


def visible_gpus() -> list[str]:
    """Returns the names of the GPUs that TensorFlow sees in this process; nothing else looks for them."""
    import tensorflow as tf  # here, as a driver does not load it (2.6 s)

    return [gpu.name for gpu in tf.config.list_physical_devices("GPU")]


def require_gpu() -> None:
    """Raises UnusableGpu where TensorFlow sees none: it would compute on the CPU without a word."""
    if not visible_gpus():
        raise _unusable("TensorFlow sees none there")


def has_bfloat16(device: str) -> bool:
    """Whether this machine's `cpu` or `gpu` multiplies in bfloat16: AVX512-BF16, AMX, or every GPU since Ampere.

    Raises:
        UnusableGpu: `nvidia-smi`, which comes with the driver, does not answer.
    """
    if device == "gpu":
        return all(capability >= 8 for capability in _compute_capabilities())
    if not os.path.exists("/proc/cpuinfo"):
        return False
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next((line for line in file if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _compute_capabilities() -> list[float]:
    """Returns those of this machine's GPUs, as `nvidia-smi` gives them."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=QUERY_TIMEOUT_S).stdout
        capabilities = [float(line) for line in answer.split()]
    except FileNotFoundError as error:
        raise _unusable("there is no nvidia-smi there, which --precision auto asks (other values do not)") from error
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise _unusable(f"nvidia-smi does not answer --precision auto there ({cause})") from error
    if not capabilities:
        raise _unusable("nvidia-smi, which --precision auto asks, lists none there")
    return capabilities

"""Which device TensorFlow computes on, with how many threads and in which precision; light until it is asked."""

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


def configure_tensorflow(device: str, n_threads: int, *, op_threads: int, reproducible: bool = False) -> None:
    """Sets the device and the threads of this process; must come before TensorFlow computes anything.

    Ray sets OMP_NUM_THREADS to an actor's CPUs and TensorFlow looks at all cores of the machine: neither is meant.

    Args:
        device: `gpu` or `cpu`.
        n_threads: threads that may run TensorFlow's operations.
        op_threads: threads of one operation. More than one, and some of its sums come out in an order that depends on
            how many: a frame's last bits would too. A `Labeler` spreads frames over its threads instead.
        reproducible: whether a GPU gives the same bits in every run, with float32 in full. It costs speed; a CPU does.

    Raises:
        UnusableGpu: the device is `gpu` and TensorFlow sees none.
    """
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(op_threads)
    tf.config.threading.set_inter_op_parallelism_threads(n_threads)
    if device == "cpu":
        tf.config.set_visible_devices([], "GPU")
        return
    require_gpu()
    for gpu in tf.config.get_visible_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    if reproducible:
        tf.config.experimental.enable_op_determinism()  # autotuning would choose another convolution in another run
        tf.config.experimental.enable_tensor_float_32_execution(False)


def choose_policy(precision: str, device: str) -> str:
    """Returns the Keras policy for `--precision`; `auto` is bfloat16 where this machine's `device` has it."""
    if precision == "auto":
        precision = "bfloat16" if has_bfloat16(device) else "float32"
    return precision if precision == "float32" else f"mixed_{precision}"


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

"""Which device TensorFlow computes on, with how many threads and in which precision; light until it is asked."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import tempfile
from typing import Any

from unet_ray.errors import JobFailed

BFLOAT16_CAPABILITY = (8, 0)
"""Compute capability from which on a GPU multiplies in bfloat16: Ampere."""

CUDA_CACHE_BYTES = 4 << 30
"""The most of compiled kernels that CUDA keeps on a node. TensorFlow 2.21 has machine code for compute capabilities
6.0, 7.0, 8.0 and 8.9; for Hopper and newer the driver compiles each kernel when it is first used, which takes minutes
in all. What CUDA keeps of its own accord may be 256 MB."""

CONTEXT_MB = 1024
"""Of a GPU's memory, what a process takes outside TensorFlow's limit: CUDA's context and the code of its libraries."""


class UnusableGpu(JobFailed):
    """Ray has a GPU on a node, and TensorFlow cannot use it; trying again changes nothing."""


class OutOfDeviceMemory(JobFailed):
    """What a device has to compute at once does not fit into its memory; trying again changes nothing."""


def unusable(problem: str) -> UnusableGpu:
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
        raise unusable("TensorFlow sees none there")


def configure_tensorflow(
    device: str, n_threads: int, *, op_threads: int, reproducible: bool = False, processes_per_gpu: int = 1
) -> None:
    """Sets the device and the threads of this process; must come before TensorFlow computes anything.

    Ray sets OMP_NUM_THREADS to an actor's CPUs and TensorFlow looks at all cores of the machine: neither is meant.

    Args:
        device: `gpu` or `cpu`.
        n_threads: threads that may run TensorFlow's operations.
        op_threads: threads of one operation. More than one, and some of its sums come out in an order that depends on
            how many: a frame's last bits would too. A `Labeler` spreads frames over its threads instead.
        reproducible: whether a GPU gives the same bits in every run. It costs speed; a CPU does.
        processes_per_gpu: how many processes share a GPU; each takes its part of the memory at once and no more.

    Raises:
        UnusableGpu: the device is `gpu` and TensorFlow sees none.
    """
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(op_threads)
    tf.config.threading.set_inter_op_parallelism_threads(n_threads)
    if device == "cpu":
        tf.config.set_visible_devices([], "GPU")
        return
    keep_cuda_kernels()
    require_gpu()
    tf.config.experimental.enable_tensor_float_32_execution(False)  # `--precision float32` means 24 bits, not 11
    for index, gpu in enumerate(tf.config.get_visible_devices("GPU")):
        if processes_per_gpu == 1:
            tf.config.experimental.set_memory_growth(gpu, True)
        else:
            limit_mb = memory_limit_mb(_gpu_memory_mb(index), processes_per_gpu)
            limited = tf.config.LogicalDeviceConfiguration(memory_limit=limit_mb)
            tf.config.set_logical_device_configuration(gpu, [limited])
    if reproducible:
        tf.config.experimental.enable_op_determinism()  # autotuning would choose another convolution in another run


def op_threads() -> int:
    """Returns the threads that TensorFlow takes for one operation in this process; 0: as many as there are cores."""
    import tensorflow as tf

    return tf.config.threading.get_intra_op_parallelism_threads()


def keep_cuda_kernels() -> None:
    """Makes CUDA keep on this node what it compiles, for the next process; must come before TensorFlow finds a GPU.

    Where `CUDA_CACHE_PATH` says, else where CUDA itself does (`~/.nv`), else in a folder of this user's for temporary
    files.
    """
    os.environ.setdefault("CUDA_CACHE_MAXSIZE", str(CUDA_CACHE_BYTES))
    if "CUDA_CACHE_PATH" in os.environ or os.access(os.path.expanduser("~"), os.W_OK):
        return
    folder = os.path.join(tempfile.gettempdir(), f"unet_ray-cuda-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, mode=0o700)
    if os.lstat(folder).st_uid == os.getuid():  # else a stranger's, whose kernels nobody should run
        os.environ["CUDA_CACHE_PATH"] = folder


def memory_limit_mb(gpu_mb: int, n_processes: int) -> int:
    """Returns TensorFlow's part of a GPU's memory in each of the processes that share it."""
    part_mb = gpu_mb // n_processes
    return max(part_mb - CONTEXT_MB, part_mb // 2)


def _gpu_memory_mb(index: int) -> int:
    """Asks CUDA's driver, as TensorFlow knows the memory of a GPU only once it has taken it."""
    number, n_bytes = ctypes.c_int(), ctypes.c_size_t()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise unusable(f"CUDA's driver does not load there ({error})") from error
    status = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(number), index)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(n_bytes), number)
    )
    if status:
        raise unusable(f"CUDA does not tell the GPU's memory there (error {status})")
    return n_bytes.value >> 20


def choose_policy(precision: str, device: str) -> str:
    """Returns the Keras policy for `--precision`; `auto` is bfloat16 where this machine's `device` has it."""
    if precision == "auto":
        precision = "bfloat16" if has_bfloat16(device) else "float32"
    return precision if precision == "float32" else f"mixed_{precision}"


def has_bfloat16(device: str) -> bool:
    """Whether this process' `cpu` or `gpu` multiplies in bfloat16: AVX512-BF16, AMX, or every GPU since Ampere.

    Raises:
        UnusableGpu: TensorFlow sees no GPU, or does not know one's compute capability.
    """
    if device == "gpu":
        return all(capability >= BFLOAT16_CAPABILITY for capability in compute_capabilities())
    if not os.path.exists("/proc/cpuinfo"):
        return False
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next((line for line in file if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def compute_capabilities() -> list[tuple[int, int]]:
    """Returns those of the GPUs that this process was given, as TensorFlow knows them: (9, 0) for Hopper.

    Raises:
        UnusableGpu: TensorFlow sees no GPU, or does not know one's compute capability.
    """
    require_gpu()
    capabilities = [gpu_details(name).get("compute_capability") for name in visible_gpus()]
    known = [capability for capability in capabilities if capability]
    if len(known) < len(capabilities):
        raise unusable("TensorFlow does not know its compute capability, which --precision auto asks")
    return known


def gpu_details(name: str) -> dict[str, Any]:
    """Returns what TensorFlow knows of a GPU of `visible_gpus`: `device_name`, `compute_capability`."""
    import tensorflow as tf

    gpus = {gpu.name: gpu for gpu in tf.config.list_physical_devices("GPU")}
    return tf.config.experimental.get_device_details(gpus[name])

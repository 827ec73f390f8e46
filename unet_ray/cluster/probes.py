"""One look a line of the doctor's report, on the node that it is about; each takes what it needs and returns a finding.

A finding fails where a job that needs it would: the remedy stands on its line.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import grpc
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import unet_ray
from unet_ray.cluster.findings import Finding, Verdict
from unet_ray.messages import amounts, count, first_few
from unet_ray.model.device_trial import DeviceTrial, Gpu
from unet_ray.model.devices import has_bfloat16
from unet_ray.storage.access import Access, without_credentials

PACKAGES = ("tensorflow", "keras", "ray", "pyarrow", "numpy", "pillow", "simplejpeg")
"""Whose versions a report names; `kornia-rs` only where it is missing."""

DECODERS = ("kornia-rs",)

FULL_SHARE = 0.95
"""Of a disk: above it Ray spills nothing there and ends tasks instead (its `local_fs_capacity_threshold`, Ray 2.60)."""

LEAST_OPEN_FILES = 4096
"""Ray warns below it: its processes hold a connection to each other."""

INSTALL_GPU = (
    "pip install 'unet-ray[gpu]' (TensorFlow's CUDA libraries) and an NVIDIA driver there, or give --device cpu"
)


# --- versions ---


def installed_versions() -> dict[str, str]:
    """Returns the versions of what decides on a job's bytes; a package that is missing is not in it."""
    versions = {"unet-ray": unet_ray.__version__, "Python": platform.python_version()}
    for name in (*PACKAGES, *DECODERS):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def declared_ranges() -> dict[str, str]:
    """Returns the versions that this package declares, by name; none where only its code is there, not its metadata."""
    try:
        requirements = [Requirement(line) for line in metadata.requires("unet-ray") or ()]
    except metadata.PackageNotFoundError:
        return {}
    plain = (of for of in requirements if of.marker is None and of.name not in DECODERS)
    return {of.name.lower(): str(of.specifier) for of in plain}


def look_at_versions(versions: Mapping[str, str], ranges: Mapping[str, str], of_driver: Mapping[str, str]) -> Finding:
    """Versions that are missing or outside the declared ranges fail; others than the driver's are noted."""
    text = ", ".join(f"{name} {version}" for name, version in versions.items() if name not in DECODERS)
    missing = [name for name in DECODERS if name not in versions]
    if missing:
        text += f"; no {' and no '.join(missing)}: Pillow decodes instead, in twice the time"
    wrong = [
        f"{name}{range_}"
        for name, range_ in ranges.items()
        if name in PACKAGES
        and (name not in versions or not SpecifierSet(range_).contains(versions[name], prereleases=True))
    ]
    if wrong:
        quoted = " ".join(f"'{requirement}'" for requirement in wrong)
        return Finding(topic="versions", text=text, verdict=Verdict.FAILS, remedy=f"pip install {quoted}")
    others = [f"{name} {version}" for name, version in of_driver.items() if versions.get(name) != version]
    if others:
        remedy = f"install the driver's on every node: {first_few(others)}; frames may get other labels there"
        return Finding(topic="versions", text=text, verdict=Verdict.NOTE, remedy=remedy)
    return Finding(topic="versions", text=text)


# --- devices ---


def look_at_devices(trial: DeviceTrial, reserved: Mapping[str, float] | None, n_cards: int) -> Finding:
    """What Ray reserves against what TensorFlow sees.

    Args:
        trial: TensorFlow's part.
        reserved: the node's resources as Ray names them, None where Ray does not run.
        n_cards: NVIDIA's devices that the kernel shows.
    """
    ray_part = "Ray does not run" if reserved is None else f"Ray reserves {_cpus_and_gpus(reserved)}"
    if trial.gpus is None:
        text = f"{ray_part}; TensorFlow does not load ({without_credentials(trial.ended)})"
        return Finding(topic="devices", text=text, verdict=Verdict.FAILS, remedy="pip install tensorflow anew there")
    n_seen = len(trial.gpus)
    text = f"{ray_part}; TensorFlow sees {amounts({'GPU': n_seen})}"
    n_reserved = 0 if reserved is None else int(reserved.get("GPU", 0))
    if n_reserved > n_seen or n_cards > n_seen:
        text += f", the kernel {count(n_cards, 'NVIDIA card')}"
        return Finding(topic="devices", text=text, verdict=Verdict.FAILS, remedy=INSTALL_GPU)
    if reserved is not None and n_reserved < n_seen:
        remedy = f"start Ray there with --num-gpus={n_seen}, or jobs leave them idle"
        return Finding(topic="devices", text=text, verdict=Verdict.NOTE, remedy=remedy)
    return Finding(topic="devices", text=text)


def _cpus_and_gpus(reserved: Mapping[str, float]) -> str:
    return amounts({name: reserved.get(name, 0) for name in ("CPU", "GPU")})


def count_cards() -> int:
    """Returns how many devices of NVIDIA's driver this machine shows, which needs no library."""
    return sum(1 for path in Path("/dev").glob("nvidia[0-9]*"))


def look_at_capability(gpus: tuple[Gpu, ...], built_for: Iterable[str]) -> Finding:
    """Whether TensorFlow has code for each GPU: ready, to be compiled at its first start, or none."""
    if not gpus:
        return Finding(topic="capability", text="no GPU, so none")
    text = ", ".join(f"{gpu.name} {gpu.capability[0]}.{gpu.capability[1]}" for gpu in gpus)
    kinds = {_code_for(gpu.capability, built_for) for gpu in gpus}
    if "none" in kinds:
        remedy = f"this TensorFlow has code for {' '.join(built_for)} only: take another one, or --device cpu"
        return Finding(topic="capability", text=text, verdict=Verdict.FAILS, remedy=remedy)
    if "compiled" in kinds:
        remedy = "TensorFlow compiles its kernels at the first start, for minutes: keep them, CUDA_CACHE_PATH=/a/disk"
        return Finding(topic="capability", text=text, verdict=Verdict.NOTE, remedy=remedy)
    return Finding(topic="capability", text=text)


def _code_for(capability: tuple[int, int], built_for: Iterable[str]) -> str:
    """`ready`, `compiled` (PTX, which newer GPUs can take) or `none`; `ready` where nothing is known."""
    major, minor = capability
    known = [(kind, divmod(int(number), 10)) for kind, _, number in (name.partition("_") for name in built_for)]
    if not known or any(kind == "sm" and of[0] == major and of[1] <= minor for kind, of in known):
        return "ready"
    return "compiled" if any(kind == "compute" and of <= (major, minor) for kind, of in known) else "none"


def look_at_bfloat16(gpus: tuple[Gpu, ...]) -> Finding:
    """Whether `--precision auto` takes bfloat16: GPUs since Ampere (8.0), CPUs with AVX512-BF16 or AMX."""
    has = all(gpu.capability >= (8, 0) for gpu in gpus) if gpus else has_bfloat16("cpu")
    what = "the GPUs" if gpus else "the CPU"
    return Finding(
        topic="bfloat16", text=f"{what} {'multiply' if gpus else 'multiplies'} in it" if has else _NO_BFLOAT16
    )


_NO_BFLOAT16 = "no; --precision auto takes float32, which is slower"


def look_at_xla(trial: DeviceTrial) -> Finding:
    """Whether XLA compiles, and what TensorFlow's process said where it died of it."""
    if trial.xla_s is not None:
        return Finding(topic="XLA", text=f"compiles on {_devices(trial)} ({trial.xla_s:g} s)")
    text = f"does not compile on {_devices(trial)}: {without_credentials(trial.ended)}"
    remedy = "take a TensorFlow that knows this device and its driver" + (", or --device cpu" if trial.gpus else "")
    return Finding(topic="XLA", text=text, verdict=Verdict.FAILS, remedy=remedy)


def _devices(trial: DeviceTrial) -> str:
    return count(len(trial.gpus), "GPU") if trial.gpus else "the CPU"


def look_at_nccl(trial: DeviceTrial) -> Finding:
    """Whether NVIDIA's library for sums over GPUs can be loaded; whether nodes reach each other shows a training."""
    if not trial.gpus:
        return Finding(topic="NCCL", text="no GPU, so not needed")
    if trial.nccl is None:
        remedy = "pip install 'unet-ray[gpu]' there; without it, training on several GPUs does not start"
        return Finding(topic="NCCL", text="libnccl.so.2 does not load", verdict=Verdict.FAILS, remedy=remedy)
    return Finding(topic="NCCL", text=f"{trial.nccl} loads")


ONNX_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
"""Both own the module `onnxruntime`: the one installed last has overwritten the other."""


def onnx_runtimes() -> dict[str, str]:
    """Returns the versions of the packages of ONNX Runtime that are installed, by name."""
    versions = {}
    for name in ONNX_RUNTIMES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def onnx_providers() -> tuple[str, ...]:
    """Returns the kinds of devices that this machine's ONNX Runtime was built for; none where it does not load."""
    try:
        import onnxruntime  # here, as few jobs need it
    except ImportError:
        return ()
    return tuple(getattr(onnxruntime, "get_available_providers", tuple)())


def look_at_onnx(runtimes: Mapping[str, str], providers: Iterable[str], n_gpus: int) -> Finding:
    """Whether models that `import-model` made run there: one ONNX Runtime, and on a GPU node the one for GPUs."""
    topic, wanted = "ONNX", "onnx-gpu" if n_gpus else "onnx"
    if not runtimes:
        return Finding(topic=topic, text="ONNX Runtime is not installed; only imported models need it")
    text = ", ".join(f"{name} {version}" for name, version in runtimes.items())
    anew = f"pip uninstall -y {' '.join(ONNX_RUNTIMES)} && pip install 'unet-ray[{wanted}]'"
    if len(runtimes) > 1:
        text += " exclude each other: both own the module onnxruntime"
        return Finding(topic=topic, text=text, verdict=Verdict.FAILS, remedy=anew)
    if not providers:
        return Finding(topic=topic, text=f"{text} does not load", verdict=Verdict.FAILS, remedy=anew)
    if n_gpus and "CUDAExecutionProvider" not in providers:
        text += f" cannot use the {'GPU' if n_gpus == 1 else 'GPUs'}"
        remedy = f"for imported models: {anew} (CUDA 13), or give them --device cpu"
        return Finding(topic=topic, text=text, verdict=Verdict.NOTE, remedy=remedy)
    return Finding(topic=topic, text=text)


# --- the machine ---


def look_at_memory(store_bytes: float | None, spill_folder: str) -> Finding:
    """Shared memory, Ray's object store in it, and the disk that it spills to."""
    shared, disk = (shutil.disk_usage(folder) for folder in ("/dev/shm", spill_folder))
    store = "Ray does not run" if store_bytes is None else f"object store {_gb(store_bytes)}"
    text = (
        f"/dev/shm {_gb(shared.free)} of {_gb(shared.total)} free; {store}; "
        f"it spills to {spill_folder}, {_gb(disk.free)} of {_gb(disk.total)} free"
    )
    if disk.used / (disk.used + disk.free) > FULL_SHARE:
        remedy = f"free some of that disk, or start Ray with another --temp-dir: above {FULL_SHARE:.0%} it ends tasks"
        return Finding(topic="memory", text=text, verdict=Verdict.FAILS, remedy=remedy)
    if store_bytes is not None and shared.total < store_bytes:
        remedy = (
            f"give the container --shm-size={_gb(store_bytes * 1.1).replace(' GB', 'g')}; Ray uses a slow disk instead"
        )
        return Finding(topic="memory", text=text, verdict=Verdict.NOTE, remedy=remedy)
    return Finding(topic="memory", text=text)


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


def look_at_threads(n_cpus: float | None) -> Finding:
    """The cores that this process may use against the CPUs that Ray hands out, and how many files it may open."""
    n_cores, quota = len(os.sched_getaffinity(0)), cpu_quota(Path("/sys/fs/cgroup/cpu.max"))
    n_usable = min(n_cores, quota or n_cores)
    n_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    ray_part = "" if n_cpus is None else f", {amounts({'CPU': n_cpus})} of Ray"
    limit = f"a container's limit of {quota:g}" if quota else "no container's limit"
    text = f"{count(n_cores, 'core')}, {limit}{ray_part}; {n_files:,} open files"
    if n_cpus is not None and n_cpus > n_usable:
        remedy = f"start Ray there with --num-cpus={max(1, int(n_usable))}; more processes than cores take turns"
        return Finding(topic="threads", text=text, verdict=Verdict.NOTE, remedy=remedy)
    if n_files < LEAST_OPEN_FILES:
        remedy = "ulimit -n 65536 before Ray starts"
        return Finding(topic="threads", text=text, verdict=Verdict.NOTE, remedy=remedy)
    return Finding(topic="threads", text=text)


def cpu_quota(file: Path) -> float | None:
    """Returns the CPUs that a container may use at once (cgroup v2's `cpu.max`), None without a limit."""
    try:
        limit, period = file.read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)


# --- storage and cluster ---


def look_at_access(access: Access) -> Finding:
    """What works at a URI, and the first thing that does not."""
    works = ", ".join(access.works)
    if access.fails is None:
        return Finding(topic="storage", text=f"{access.uri}: {works}")
    text = f"{access.uri}: {f'{works}; ' if works else ''}cannot {access.fails}: {access.problem}"
    return Finding(topic="storage", text=text, verdict=Verdict.FAILS, remedy=access.remedy)


NO_URI = Finding(topic="storage", text="no URI was given to try; --inputs are listed and read, --outputs written too")


def look_at_authentication(gcs_address: str | None) -> Finding:
    """Whether Ray answers who has no token, asked over its own protocol without one."""
    if gcs_address is None:
        return Finding(topic="authentication", text="Ray does not run")
    with grpc.insecure_channel(gcs_address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=10)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return Finding(topic="authentication", text="on: Ray refuses who has no token")
            return Finding(topic="authentication", text=f"not known: Ray answers with {error.code().name}")
    return Finding(
        topic="authentication",
        text="off: whoever reaches the cluster can run code on it",
        verdict=Verdict.NOTE,
        remedy="start it with RAY_AUTH_MODE=token",
    )

"""What runs in a process of its own: ours as a user runs it, ceilings of the machine, and the peers' programs.

python -m unet_ray.bench.contestants NAME ARGUMENTS.json-text RESULT-FILE
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unet_ray.output.chunks import Cutting
from unet_ray.pixels.preprocessing import Preprocessing, Resize

_TIMELINE_S = 30.0

_CEILING_S = 5.0
"""How long a ceiling is measured; shorter where there is less to do."""


def ours(*, command: str, arguments: list[str], moments: bool) -> dict[str, Any]:
    """A command of `unet-ray`, whole; then what Ray says of it.

    Returns:
        `began_s` (this program's first moment), `object_store_bytes` (of all objects ever made, but for those below
        100 KB that travel inside messages), and with `moments` the first start and end of some tasks, wall-clock time:
        `actor_start`, `actor_ready` (of the first model actor), `decode_start`, `decode_end` (of the first chunk) and
        `network` (the first chunk is in the network's process).
    """
    began_s = time.time()
    from unet_ray import cli

    code = cli.run_command(command, arguments)
    if code:
        raise SystemExit(code)
    import ray

    result: dict[str, Any] = {"began_s": began_s, "done_s": time.time()}
    if ray.is_initialized():
        from unet_ray.bench.peers import store_bytes

        result |= {"object_store_bytes": store_bytes(), **(_moments() if moments else {})}
    return result


def _moments() -> dict[str, float]:
    """By Ray's own timeline, which tells of a task up to a second after it (Ray 2.60)."""
    import ray

    deadline = time.monotonic() + _TIMELINE_S
    while len(moments := _read_moments(ray.timeline())) < 5 and time.monotonic() < deadline:
        time.sleep(0.2)
    return moments


def _read_moments(events: list[dict[str, Any]]) -> dict[str, float]:
    of_task = {
        "MapWorker(MapBatches(_ModelActor)).__init__": ("actor_start", "actor_ready"),
        "ReadFrames": ("decode_start", "decode_end"),
        "MapWorker(MapBatches(_ModelActor)).submit": ("network", ""),
    }
    moments: dict[str, float] = {}
    for event in sorted(events, key=lambda event: event["ts"]):
        start, end = of_task.get(event["cat"].removeprefix("task::"), ("", ""))
        if start and start not in moments:
            moments[start] = event["ts"] / 1e6
            if end:
                moments[end] = (event["ts"] + event["dur"]) / 1e6
    return moments


def list_and_plan(*, frames: str, out: str, chunk_frames: int) -> dict[str, float]:
    """Lists an archive and plans its chunks, as the driver of `segment` does before the first frame is read.

    Returns:
        Seconds of both, and the most memory of this process in MB.
    """
    import resource

    from unet_ray.archives.listing import list_archives
    from unet_ray.classes import PRESETS
    from unet_ray.output import plans

    started = time.monotonic()
    listing = list_archives([frames])
    listed = time.monotonic()
    lineage = plans.Lineage(bundle_digest="0" * 64, class_set=PRESETS["carla23"], options={})
    cutting = Cutting(chunk_frames=chunk_frames, shard_rows=50_000)
    plan = plans.plan(out, listing, lineage, cutting, config_yaml="")
    return {
        "frames": plan.n_frames,
        "list_s": listed - started,
        "plan_s": time.monotonic() - listed,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


# --- ceilings ---


def matrix_product(*, threads: int, side: int) -> dict[str, float]:
    """GFLOP/s of a product of square matrices, the best of many."""
    import tensorflow as tf

    from unet_ray.model.devices import configure_tensorflow

    configure_tensorflow("cpu", threads, op_threads=threads)
    rates = {}
    for name in ("float32", "bfloat16"):
        matrix = tf.cast(tf.random.normal((side, side)), name)
        product = tf.function(tf.matmul, autograph=False)
        rates[f"{name}_gflops"] = 2 * side**3 / min(_times(partial(_waited_for, product, matrix, matrix))) / 1e9
    return rates


def _waited_for(act: Callable[..., Any], *arguments: Any) -> np.ndarray:
    return act(*arguments).numpy()


def decode(*, frames: str, size: tuple[int, int], threads: int, resize: Resize = "nearest") -> dict[str, float]:
    """Frames a second from file to the network's size on all cores: our decoder, and TensorFlow's in `tf.data`.

    TensorFlow's resizes to the nearest pixel; it has no part in another `resize`.
    """
    from unet_ray.bench.peers import list_frames

    paths = list_frames(frames)
    rates = {"ours_per_s": _decode_ours(paths, (size[0], size[1]), threads, resize)}
    return rates | ({"tf_per_s": _decode_tf(paths, size, threads)} if resize == "nearest" else {})


def _decode_ours(paths: list[str], size: tuple[int, int], threads: int, resize: Resize) -> float:
    parts = [(paths[start::threads], size, resize) for start in range(threads)]
    done, took_s = _in_processes(_decode_part, parts, (paths[:2], size, resize), threads)
    return sum(done) / took_s


def _in_processes(act: Callable[[Any], Any], parts: list[Any], first: Any, n_processes: int) -> tuple[list[Any], float]:
    """What `act` gives for each part, and the seconds of all; `first` gives every process its libraries before."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(n_processes, get_context("spawn")) as pool:
        list(pool.map(act, [first] * n_processes * 2))
        started = time.perf_counter()
        return list(pool.map(act, parts)), time.perf_counter() - started


def _decode_part(part: tuple[list[str], tuple[int, int], Resize]) -> int:
    from unet_ray.labelling.decoding import DecodeOptions
    from unet_ray.labelling.decoding import decode as decode_one

    paths, size, resize = part
    options = DecodeOptions(
        network_size=size, preprocessing=Preprocessing(resize=resize), max_pixels=100_000_000, timeout_s=60
    )
    deadline = time.perf_counter() + _CEILING_S
    for number, path in enumerate(paths, start=1):
        decode_one(Path(path).read_bytes(), options)
        if time.perf_counter() > deadline:
            return number
    return len(paths)


def decode_pairs(*, images: str, masks: str, size: tuple[int, int], threads: int) -> dict[str, float]:
    """Seconds of decoding and resizing all pairs on all cores."""
    from unet_ray.bench.peers import list_frames

    pairs = list(zip(list_frames(images), list_frames(masks), strict=True))
    parts = [(pairs[start :: threads * 8], size) for start in range(threads * 8)]
    return {"decode_s": _in_processes(_decode_part_of_pairs, parts, (pairs[:2], size), threads)[1]}


def _decode_part_of_pairs(part: tuple[list[tuple[str, str]], tuple[int, int]]) -> None:
    from unet_ray.pixels.images import decode_frame, decode_mask, resize_nearest

    pairs, size = part
    for image, mask in pairs:
        resize_nearest(decode_frame(Path(image).read_bytes()), *size)
        resize_nearest(decode_mask(Path(mask).read_bytes()), *size)


def _decode_tf(paths: list[str], size: tuple[int, int], threads: int) -> float:
    import tensorflow as tf

    from unet_ray.bench.peers import load_frame
    from unet_ray.model.devices import configure_tensorflow

    configure_tensorflow("cpu", threads, op_threads=threads)
    dataset = tf.data.Dataset.from_tensor_slices(paths).repeat()
    frames = iter(dataset.map(lambda path: load_frame(path, size), num_parallel_calls=threads).batch(8))
    next(frames)
    n_batches, started = 0, time.perf_counter()
    while (took_s := time.perf_counter() - started) < _CEILING_S and n_batches * 8 < len(paths):
        next(frames)
        n_batches += 1
    return n_batches * 8 / max(took_s, 1e-9)


def network(*, model: str, batch_size: int, threads: int, precision: str, device: str) -> dict[str, Any]:
    """Frames a second of the network and its argmax alone; on a GPU that TensorFlow does not see, by JAX."""
    if device == "gpu" and not _tensorflow_sees_gpu():
        return {"per_s": _network_jax(model, batch_size, precision), "backend": "jax"}
    import tensorflow as tf

    from unet_ray.model.bundle import read_bundle
    from unet_ray.model.devices import configure_tensorflow

    configure_tensorflow(device, threads, op_threads=threads)
    net = read_bundle(model).build_model(dtype_policy=precision)
    frames = tf.constant(_random_frames(batch_size, net.input_shape[1:3]))
    label = tf.function(
        lambda image_BHWC: tf.cast(tf.argmax(net(image_BHWC, training=False), -1), tf.uint8),
        input_signature=[tf.TensorSpec(frames.shape, tf.uint8)],
        jit_compile=device == "gpu",
        autograph=False,
    )
    return {"per_s": batch_size / _median_time(lambda: label(frames).numpy()), "backend": "tensorflow"}


def _tensorflow_sees_gpu() -> bool:
    import subprocess

    # In another process: once loaded here, Keras could not be loaded for JAX any more.
    look = "from unet_ray.model import devices; print(len(devices.visible_gpus()))"
    answer = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    return answer.stdout.split()[-1:] not in ([], ["0"])


def _network_jax(model: str, batch_size: int, precision: str) -> float:
    import os

    os.environ["KERAS_BACKEND"] = "jax"
    import jax

    from unet_ray.model.bundle import read_bundle

    net = read_bundle(model).build_model(dtype_policy=precision)
    weights, state = [v.value for v in net.trainable_variables], [v.value for v in net.non_trainable_variables]

    @jax.jit
    def label(image_BHWC):
        logits_BHWK, _ = net.stateless_call(weights, state, image_BHWC, training=False)
        return logits_BHWK.argmax(-1).astype("uint8")

    frames = jax.device_put(_random_frames(batch_size, net.input_shape[1:3]))
    return batch_size / _median_time(lambda: np.asarray(label(frames)))


def _random_frames(n_frames: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n_frames, *size, 3), np.uint8)


def _times(act: Callable[[], Any]) -> list[float]:
    """Seconds of each call, after one that compiles, for some seconds and at least three times."""
    act()
    times: list[float] = []
    while len(times) < 3 or sum(times) < _CEILING_S:
        started = time.perf_counter()
        act()
        times.append(time.perf_counter() - started)
    return times


def _median_time(act: Callable[[], Any]) -> float:
    return float(np.median(_times(act)))


PROGRAMS = {
    **dict.fromkeys(("ours", "list_and_plan", "matrix_product", "decode", "decode_pairs", "network"), "contestants"),
    **dict.fromkeys(("notebook_loop", "tfdata_loop", "ray_pattern"), "peers"),
    "tfdata_native": "native_peers",
    **dict.fromkeys(("our_step", "steps_apart", "keras_step", "keras_fit"), "training_peers"),
    **dict.fromkeys(("our_ingest", "tfdata_ingest"), "training_peers"),
    "onnx_network": "onnx_contests",
    **dict.fromkeys(("torch_loop", "torch_native", "torch_step", "torch_ingest"), "torch_peers"),
}
"""The module of each program; one that is not asked for is not imported."""


def main(name: str, arguments: str, result: str) -> int:
    """Runs one program and writes what it returns."""
    program: Callable[..., Any] = getattr(importlib.import_module(f"unet_ray.bench.{PROGRAMS[name]}"), name)
    Path(result).write_text(json.dumps(program(**json.loads(arguments))))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""The labelling contests of the benchmark: who runs against whom, what counts, what is to be reached.

Frames are labelled with `--mask-size model --mask-encoding raw`, unless a row says otherwise. Rates are frames a
second: `per_s` of a whole process, from its start to its exit, `steady_per_s` as `benchmark.steady_rate` defines it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unet_ray.bench import peers
from unet_ray.bench.arena import Arena, Contest, Contestant, Ended, precision_of
from unet_ray.bench.benchmark import Measurement, Round, Row, Skipped, bound
from unet_ray.bench.watchers import Busy, Commits, Watcher

EQUAL_PIXELS = 0.97
"""Least share of pixels with equal classes in two contestants' masks: bfloat16 against float32, and one JPEG decoder
against another, move pixels that lie between two classes."""

COMPARED_MASKS = 500


def segment(
    arena: Arena,
    name: str,
    frames: Path,
    model: Path,
    *more: str,
    watchers: Sequence[Watcher] = (),
    keep: bool = False,
    moments: bool = False,
) -> tuple[Path, Ended]:
    """Runs `unet-ray segment` on an empty output, or on the one that is there; see `contestants.ours` for `moments`."""
    out = arena.out / "outputs" / name if keep else arena.output(name)
    settings = arena.settings
    options = {
        "--model": model, "--frames": frames, "--out": out, "--batch-size": arena.batch_size(model),
        "--chunk-frames": settings.chunk_frames, "--device": settings.device,
        "--precision": precision_of(settings.device),
    }  # fmt: skip
    if not more:
        more = ("--mask-size", "model", "--mask-encoding", "raw")
    return out, arena.command("segment", options, *more, watchers=watchers, moments=moments)


def ours(name: str, kind: str, *more: str, model: str = "model", frames: str = "frames") -> Contestant:
    """`unet-ray segment`, whole and in its steady state."""

    def run(arena: Arena) -> Measurement:
        archive = arena.archive(kind, getattr(arena.settings, frames))
        bundle = getattr(arena, model)()
        commits = Commits(arena.out / "outputs" / name)
        watchers: list[Watcher] = [commits, *([Busy()] if arena.settings.device == "gpu" else [])]
        out, ended = segment(arena, name, archive, bundle, *more, watchers=watchers)
        watched = dict(ended.watched)
        if busy := watched.pop("busy", None):
            steady = [share for at_s, share in busy if at_s >= watched["steady_from_s"]]
            watched["busy_share"] = statistics.mean(steady) if steady else None
        return {
            "out": str(out),
            "wall_s": ended.wall_s,
            "per_s": getattr(arena.settings, frames) / ended.wall_s,
            "object_store_bytes": ended.result["object_store_bytes"],
            **watched,
        }

    return run


def _peer(program: str, kind: str, **options: Any) -> Contestant:
    """A peer's program, whole."""

    def run(arena: Arena) -> Measurement:
        for library in {"torch_loop": ("torch",)}.get(program, ()):
            arena.require(library)
        if arena.settings.device == "gpu":
            raise Skipped("the peers run on CPUs")
        out = arena.output(f"{kind}_{program}")
        settings = arena.settings
        arguments = {
            "frames": arena.archive(kind, settings.frames), "model": arena.model(), "out": out,
            "batch_size": settings.batch_size, "threads": settings.cores, **options,
        }  # fmt: skip
        if program != "notebook_loop":
            arguments["precision"] = precision_of("cpu")
        ended = arena.program(program, arguments)
        return {"out": str(out), "wall_s": ended.wall_s, "per_s": settings.frames / ended.wall_s, **ended.result}

    return run


def decoding(kind: str, *, large: bool = False) -> Contestant:
    """Decoding alone."""

    def run(arena: Arena) -> Measurement:
        size = arena.settings.large_network if large else arena.network_size
        frames = arena.archive(kind, min(arena.settings.frames, 2_000))
        arguments = {"frames": frames, "size": size, "threads": arena.settings.cores}
        return arena.program("decode", arguments).result

    return run


def network(model: str = "model") -> Contestant:
    """The network alone, one of the arena's models."""

    def run(arena: Arena) -> Measurement:
        settings = arena.settings
        bundle: Path = getattr(arena, model)()
        arguments = {
            "model": bundle, "batch_size": arena.batch_size(bundle), "threads": settings.cores,
            "precision": precision_of(settings.device), "device": settings.device,
        }  # fmt: skip
        return arena.program("network", arguments).result

    return run


def _matrix(arena: Arena) -> Measurement:
    side = 2048 if arena.settings.size == "full" else 256
    return arena.program("matrix_product", {"threads": arena.settings.cores, "side": side}).result


def _compare_masks(arena: Arena, measured: dict[str, Any]) -> None:
    """Each labelling peer's masks with ours of the same round; what is compared already, is not again."""
    new = [
        measurement
        for name, measurement in measured.items()
        if name not in ("ours", "ours_native") and "out" in measurement and "equal_pixels" not in measurement
    ]
    if "ours" not in measured or not new:
        return
    n_ours, ours = peers.read_masks(labels_of(measured["ours"]["out"]), at_most=COMPARED_MASKS)
    for measurement in new:
        n_theirs, theirs = peers.read_masks(labels_of(measurement["out"]), at_most=COMPARED_MASKS)
        measurement["equal_pixels"] = peers.equal_share(ours, theirs) if n_ours == n_theirs else 0.0


def labels_of(out: str) -> str:
    """Returns the folder of a contestant's Parquet files."""
    return str(Path(out) / "frames") if (Path(out) / "frames").is_dir() else out


def _masks_agree(peer: str) -> Callable[[Round], tuple[bool, str]]:
    def look(measured: Round) -> tuple[bool, str]:
        share = measured[peer]["equal_pixels"]
        return share >= EQUAL_PIXELS, f"{share:.2%} of pixels equal (at least {EQUAL_PIXELS:.0%})"

    return look


def _steady_against_bound(measured: Round) -> float:
    return measured["ours"]["steady_per_s"] / _bound(measured)


def _bound(measured: Round) -> float:
    """By the faster of the two decoders."""
    decode = max(measured["decode"]["ours_per_s"], measured["decode"]["tf_per_s"])
    return bound(decode, measured["network"]["per_s"])


def _bound_note(measured: Round) -> str:
    decode = measured["decode"]
    own = bound(decode["ours_per_s"], measured["network"]["per_s"])
    flops = ""
    if matrix := measured.get("matrix"):
        flops = f"matrix product {matrix['bfloat16_gflops']:.0f} GFLOP/s bf16, {matrix['float32_gflops']:.0f} f32; "
    return (
        f"{flops}decoding alone {decode['tf_per_s']:.1f}/s by tf.io, {decode['ours_per_s']:.1f}/s by ours, network "
        f"alone {measured['network']['per_s']:.1f}/s, bound {_bound(measured):.1f}/s; ours steady "
        f"{measured['ours']['steady_per_s']:.1f}/s ({measured['ours']['steady_per_s'] / own:.2f} of the bound with our "
        f"own decoder), whole {measured['ours']['per_s']:.1f}/s"
    )


def _labelling(kind: str) -> Contest:
    return Contest(
        name=kind,
        contestants={
            "matrix": _matrix,
            "decode": decoding(kind),
            "network": network(),
            "ours": ours(f"{kind}_ours", kind),
            "ours_native": ours(f"{kind}_native", kind, "--mask-size", "native", "--mask-encoding", "png"),
            "notebook": _peer("notebook_loop", kind),
            "ray_predict": _peer("ray_pattern", kind, with_predict=True),
            "ray_function": _peer("ray_pattern", kind, with_predict=False),
            "tfdata": _peer("tfdata_loop", kind),
            "torch": _peer("torch_loop", kind),
        },
        compare=_compare_masks,
    )


def _whole(kind: str, name: str, peer: str, against: str, target: float) -> Row:
    return Row(
        name=f"{kind}_{name}",
        what=f"{kind.upper()} to masks, whole process",
        against=against,
        contest=kind,
        needs=("ours", peer),
        figure=lambda measured: measured["ours"]["per_s"] / measured[peer]["per_s"],
        target=target,
        agreement=_masks_agree(peer),
        note=lambda measured: f"ours {measured['ours']['per_s']:.1f}/s, {peer} {measured[peer]['per_s']:.1f}/s",
    )


def _of_bound(name: str, what: str, contest: str, target: float | None, matrix: bool = True) -> Row:
    return Row(
        name=name,
        what=what,
        against="1/(1/decode + 1/net)",
        contest=contest,
        needs=("decode", "network", "ours", *(["matrix"] if matrix else [])),
        figure=_steady_against_bound,
        target=target,
        note=_bound_note,
    )


def _gpu_bound(measured: Round) -> float:
    """Decoding and network have processors of their own here: the slower one decides."""
    decode = max(measured["decode"]["ours_per_s"], measured["decode"]["tf_per_s"])
    return bound(decode, measured["network"]["per_s"], shared=False)


def _ceilings_note(measured: Round) -> str:
    decode, network = measured["decode"]["ours_per_s"], measured["network"]
    binds = "decoding" if decode < network["per_s"] else "the device"
    return f"{binds} binds: decoding {decode:.0f}/s, network {network['per_s']:.0f}/s ({network['backend']})"


def _gpu_note(measured: Round) -> str:
    busy = measured["ours"].get("busy_share")
    share = "not told (no nvidia-smi)" if busy is None else f"{busy:.0%}"
    return (
        f"{_ceilings_note(measured)}; ours steady {measured['ours']['steady_per_s']:.0f}/s; busy share of the device "
        f"{share}"
    )


# --- the contests and their rows ---

LARGE = Contest(
    name="large",
    contestants={
        "decode": decoding("png", large=True),
        "network": network("large_model"),
        "ours": ours("large_ours", "png", model="large_model", frames="large_frames"),
    },
)
GPU = Contest(
    name="gpu", contestants={"decode": decoding("png"), "network": network(), "ours": ours("gpu_ours", "png")}
)

CONTESTS = (_labelling("png"), _labelling("jpeg"), LARGE)

ROWS = (
    _of_bound("png_bound", "PNG to published masks, steady", "png", 0.90),
    _of_bound("jpeg_bound", "JPEG to published masks, steady", "jpeg", 0.85),
    _whole("png", "notebook", "notebook", "the notebook's loop: map, predict, argmax", 2.0),
    _whole("jpeg", "notebook", "notebook", "the notebook's loop: map, predict, argmax", 2.3),
    _whole("png", "ray_predict", "ray_predict", "Ray's documented pattern, predict in float32", 1.8),
    Row(
        name="png_ray_bytes",
        what="bytes through the object store",
        against="Ray's documented pattern",
        contest="png",
        needs=("ours", "ray_predict"),
        figure=lambda measured: measured["ours"]["object_store_bytes"] / measured["ray_predict"]["object_store_bytes"],
        target=0.25,
        at_most=True,
    ),
    _whole("png", "ray_function", "ray_function", "Ray's documented pattern, our net function", 1.15),
    _whole("png", "tfdata", "tfdata", "tf.data, parallel, bf16 function", 0.88),
    _whole("png", "torch", "torch", "torch DataLoader, bf16 channels_last", 1.2),
    Row(
        name="png_native",
        what="--mask-size native, PNG masks, whole process",
        against="--mask-size model, raw",
        contest="png",
        needs=("ours", "ours_native"),
        figure=lambda measured: measured["ours_native"]["per_s"] / measured["ours"]["per_s"],
        target=0.95,
        note=lambda measured: (
            f"steady {measured['ours_native']['steady_per_s'] / measured['ours']['steady_per_s']:.2f}"
        ),
    ),
    _of_bound("large_bound", "PNG to masks, the network at the frames' size", "large", 0.95, matrix=False),
)

GPU_ROWS = (
    Row(
        name="gpu",
        what="PNG to published masks on the GPU, steady",
        against="min(decode, net)",
        contest="gpu",
        needs=("decode", "network", "ours"),
        figure=lambda measured: measured["ours"]["steady_per_s"] / _gpu_bound(measured),
        note=_gpu_note,
    ),
    Row(
        name="gpu_ceilings",
        what="the network alone on the GPU",
        against="decoding alone on all cores",
        contest="gpu",
        needs=("decode", "network"),
        figure=lambda measured: measured["network"]["per_s"] / measured["decode"]["ours_per_s"],
        note=_ceilings_note,
    ),
)

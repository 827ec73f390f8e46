"""The contest of photos: JPEG frames of a camera's own size, to PNG masks of that size, and what users would write.

Rates are frames a second, as in `labelling_contests`.
"""

from __future__ import annotations

from typing import Any

from unet_ray.bench import peers
from unet_ray.bench.arena import Arena, Contest, Contestant, precision_of
from unet_ray.bench.benchmark import Measurement, Round, Row, Skipped, bound
from unet_ray.bench.labelling_contests import EQUAL_PIXELS, labels_of, network, ours
from unet_ray.pixels import images
from unet_ray.pixels.preprocessing import Resize

NATIVE = ("--mask-size", "native", "--mask-encoding", "png")
COMPARED_MASKS = 20


def _peer(program: str) -> Contestant:
    def run(arena: Arena) -> Measurement:
        if program == "torch_native":
            arena.require("torch")
        if arena.settings.device == "gpu":
            raise Skipped("the peers run on CPUs")
        settings, out = arena.settings, arena.output(f"photo_{program}")
        arguments = {
            "frames": arena.archive("photo", settings.photos), "model": arena.model(), "out": out,
            "batch_size": settings.batch_size, "threads": settings.cores, "precision": precision_of("cpu"),
        }  # fmt: skip
        ended = arena.program(program, arguments)
        return {"out": str(out), "wall_s": ended.wall_s, "per_s": settings.photos / ended.wall_s}

    return run


def _decoding(resize: Resize) -> Contestant:
    def run(arena: Arena) -> Measurement:
        settings = arena.settings
        arguments = {
            "frames": arena.archive("photo", settings.photos), "size": arena.network_size, "threads": settings.cores,
            "resize": resize,
        }  # fmt: skip
        return arena.program("decode", arguments).result

    return run


def _compare_masks(arena: Arena, measured: dict[str, Any]) -> None:
    """The peers' masks with ours of the same round, pixel by pixel."""
    if "ours" not in measured:
        return
    n_ours, ours_by_name = peers.read_masks(labels_of(measured["ours"]["out"]), at_most=COMPARED_MASKS)
    for name in ("tfdata", "torch"):
        if name in measured and "equal_pixels" not in measured[name]:
            n_theirs, theirs = peers.read_masks(measured[name]["out"], at_most=COMPARED_MASKS)
            share = peers.equal_share(ours_by_name, theirs, images.decode_mask) if n_ours == n_theirs else 0.0
            measured[name]["equal_pixels"] = share


def _of_bound(name: str, contestant: str, decoder: str, resize: Resize) -> Row:
    def ceiling(measured: Round) -> float:
        return bound(max(measured[decoder].values()), measured["network"]["per_s"])

    def note(measured: Round) -> str:
        return (
            f"decoding alone {max(measured[decoder].values()):.1f}/s, network alone "
            f"{measured['network']['per_s']:.1f}/s, bound {ceiling(measured):.1f}/s; ours steady "
            f"{measured[contestant]['steady_per_s']:.1f}/s, whole {measured[contestant]['per_s']:.1f}/s"
        )

    return Row(
        name=name,
        what=f"large JPEG to native PNG masks, {resize}, steady",
        against="1/(1/decode + 1/net)",
        contest="photo",
        needs=(decoder, "network", contestant),
        figure=lambda measured: measured[contestant]["steady_per_s"] / ceiling(measured),
        target=0.85,
        note=note,
    )


def _against(peer: str, against: str) -> Row:
    def agreement(measured: Round) -> tuple[bool, str]:
        share = measured[peer]["equal_pixels"]
        return share >= EQUAL_PIXELS, f"{share:.2%} of pixels equal (at least {EQUAL_PIXELS:.0%})"

    return Row(
        name=f"photo_{peer}",
        what="large JPEG to native PNG masks, whole process",
        against=against,
        contest="photo",
        needs=("ours", peer),
        figure=lambda measured: measured["ours"]["per_s"] / measured[peer]["per_s"],
        agreement=agreement,
        note=lambda measured: f"ours {measured['ours']['per_s']:.1f}/s, {peer} {measured[peer]['per_s']:.1f}/s",
    )


CONTESTS = (
    Contest(
        name="photo",
        contestants={
            "decode": _decoding("nearest"),
            "decode_dct": _decoding("area-dct"),
            "network": network(),
            "ours": ours("photo_ours", "photo", *NATIVE, frames="photos"),
            "ours_dct": ours("photo_dct", "photo", *NATIVE, model="dct_model", frames="photos"),
            "tfdata": _peer("tfdata_native"),
            "torch": _peer("torch_native"),
        },
        compare=_compare_masks,
    ),
)

ROWS = (
    _of_bound("photo_bound", "ours", "decode", "nearest"),
    _of_bound("photo_dct_bound", "ours_dct", "decode_dct", "area-dct"),
    _against("tfdata", "tf.data, logits by tf.image.resize"),
    _against("torch", "torch DataLoader, logits by interpolate"),
)

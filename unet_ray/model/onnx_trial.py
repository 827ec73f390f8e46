"""A network made elsewhere, tried on a few frames before it becomes a model folder.

A frame's label should depend on the frame alone. Whether the network keeps that is computed here, not believed: the
same frames twice, alone and together, and on one thread and two. What its file leaves open is read off its output.

Shapes: `N` frames, `H` height px, `W` width px, `C` colour; `h`, `w` the size of the output.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np

from unet_ray.messages import count
from unet_ray.model.onnx_facts import OnnxFacts, Size
from unet_ray.model.onnx_network import OnnxNetwork
from unet_ray.pixels.preprocessing import AS_IT_IS, Preprocessing

N_FRAMES = 8
SUM_TOLERANCE = 1e-3
"""Of a pixel's probabilities to 1: in half precision they miss it by some 5e-4."""


@dataclass(frozen=True, kw_only=True)
class OnnxTrial:
    """What the trial came to."""

    facts: OnnxFacts
    """With all that was open: size, output size, kind, and batches of one where frames of a batch are not alone."""
    record: dict[str, Any]
    """Plain JSON types, for people; nothing that a label depends on. Differences are of scores, or of ids the share
    of pixels; None where one was not computed."""
    lines: tuple[str, ...]
    """What to say to the user."""


def try_network(
    data: bytes,
    facts: OnnxFacts,
    *,
    size: Size,
    preprocessing: Preprocessing = AS_IT_IS,
    device: str = "cpu",
    images_NHWC: np.ndarray | None = None,
) -> OnnxTrial:
    """Runs a network on a few frames.

    Args:
        data: an ONNX file that `onnx_file.find_facts` has checked.
        facts: what that found; a `kind` in it is kept, where the values do not speak against it.
        size: of the frames.
        preprocessing: as for `OnnxNetwork`.
        device: see there.
        images_NHWC: frames of the user's, uint8 and of that size; None for made ones.

    Raises:
        ValueError: one line: ONNX Runtime does not take the network, or its output is not what it should be.
    """
    images_NHWC = _eight_frames(images_NHWC, size)
    facts = dataclasses.replace(facts, size=facts.image_size(size))
    settings: dict[str, Any] = {"size": size, "preprocessing": preprocessing, "device": device}
    network = OnnxNetwork(data, facts, **settings)
    batch, scores_Nhw, between_batches = _try_batches(network, images_NHWC)
    _check_scores(scores_Nhw, facts)
    facts = dataclasses.replace(
        facts, batch=batch, kind=facts.kind or _kind(scores_Nhw), output_size=scores_Nhw.shape[1:3]
    )
    network.facts = facts
    first = network.scores(images_NHWC)
    between_runs = _difference(first, network.scores(images_NHWC))
    between_threads = None
    if device == "cpu":
        between_threads = _difference(first, OnnxNetwork(data, facts, **settings, n_threads=2).scores(images_NHWC))
    record = {
        "onnxruntime": _runtime_version(),
        "device": device,
        "frames": len(images_NHWC),
        "difference_between_runs": between_runs,
        "difference_between_batches": between_batches,
        "difference_between_threads": between_threads,
    }
    return OnnxTrial(facts=facts, record=record, lines=tuple(_lines(facts, record)))


def made_frames(size: Size, n_frames: int = N_FRAMES) -> np.ndarray:
    """Frames of no camera, the same every time: smooth ones, then noise, uint8 [N, H, W, 3]."""
    random = np.random.default_rng(0)
    height_px, width_px = size
    y_H1, x_W = np.linspace(0, 1, height_px)[:, None], np.linspace(0, 1, width_px)
    frames = []
    for _ in range(n_frames // 2):
        waves = [
            np.sin(random.uniform(2, 20) * y_H1 + random.uniform(2, 20) * x_W + random.uniform(0, 6)) for _ in "RGB"
        ]
        frames.append(np.stack(waves, axis=-1) * 127 + 128)
    noise = random.integers(0, 256, (n_frames - len(frames), height_px, width_px, 3))
    return np.concatenate([np.stack(frames).astype(np.uint8), noise.astype(np.uint8)])


def _eight_frames(images_NHWC: np.ndarray | None, size: Size) -> np.ndarray:
    if images_NHWC is None or not len(images_NHWC):
        return made_frames(size)
    return images_NHWC[np.arange(N_FRAMES) % len(images_NHWC)]


def _try_batches(network: OnnxNetwork, images_NHWC: np.ndarray) -> tuple[int | None, np.ndarray, float | None]:
    """The batch to use (None for any), the scores of all frames in it, and how far alone and together are apart."""
    if network.facts.batch is not None:
        return network.facts.batch, network.scores(images_NHWC), None
    alone = np.concatenate([network.scores(image_HWC[None]) for image_HWC in images_NHWC])
    try:
        together = network.scores(images_NHWC)
    except ValueError:  # its file leaves the batch open, and some operator in it does not
        return 1, alone, None
    difference = _difference(alone, together)
    return None if difference == 0 else 1, alone, difference


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference of two results; of class ids, the share of pixels that differ."""
    if one.dtype.kind != "f":
        return float((one != other).mean())
    return float(np.abs(one - other).max())


def _check_scores(scores: np.ndarray, facts: OnnxFacts) -> None:
    if facts.gives_ids:
        if scores.min() < 0 or scores.max() >= facts.n_classes:
            raise ValueError(
                f"the network gives class ids from {scores.min()} to {scores.max()}; --classes has 0 to "
                f"{facts.n_classes - 1}: give those that it was trained with"
            )
        return
    n_bad = int((~np.isfinite(scores)).any(axis=(1, 2, 3)).sum())
    if n_bad:
        raise ValueError(
            f"the network gives values that are not finite for {n_bad} of {count(len(scores), 'frame')}; check --mean "
            "and --std, which are in units of 0 to 255"
        )
    if facts.kind == "probabilities" and _kind(scores) != "probabilities":
        raise ValueError(
            f"the network gives values from {scores.min():.3g} to {scores.max():.3g} that do not add up to 1 in a "
            "pixel; give --kind logits"
        )


def _kind(scores_NhwK: np.ndarray) -> str:
    adds_up = np.abs(scores_NhwK.sum(axis=-1, dtype=np.float64) - 1).max() <= SUM_TOLERANCE
    return "probabilities" if scores_NhwK.min() >= 0 and adds_up else "logits"


def _lines(facts: OnnxFacts, record: dict[str, Any]) -> list[str]:
    (height_px, width_px), output_size = facts.size, facts.output_size
    assert output_size and facts.scale
    what = "class ids" if facts.gives_ids else facts.kind
    scales = " and ".join(dict.fromkeys(str(scale) for scale in facts.scale))
    lines = [
        f"the network takes {facts.dtype} frames of {height_px}x{width_px} ({facts.layout}) and gives {what} of "
        f"{output_size[0]}x{output_size[1]}, {scales} of their size"
    ]
    unit = "in a share of {} of the pixels" if facts.gives_ids else "by up to {}"
    difference = record["difference_between_batches"]
    if difference:
        lines.append(
            f"frames go through it one by one: alone and among {record['frames']} they differ "
            f"{unit.format(f'{difference:.2g}')}"
        )
    elif facts.batch == 1:
        lines.append("frames go through it one by one: it takes no more at once")
    for what, key in (("runs", "difference_between_runs"), ("counts of threads", "difference_between_threads")):
        if record[key]:
            lines.append(
                f"warning: two {what} differ {unit.format(f'{record[key]:.2g}')}; frames that are labelled again may "
                "get other labels in a few pixels"
            )
    return lines


def _runtime_version() -> str:
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"

"""The contest of networks made elsewhere: our session of ONNX Runtime against a bare one.

Both compute the arena's network, exported to ONNX, on one thread in one process, in turn. Ours gets uint8 frames and
normalises them; the bare one gets what ours made of them. A figure is processor time, the least of all rounds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from unet_ray.bench.arena import Arena, Contest
from unet_ray.bench.benchmark import Measurement, Round, Row

ROUNDS = 20


def onnx_network(*, model: str, batch_size: int) -> dict[str, Any]:
    """Milliseconds of a core a frame of both sides, and whether their logits are equal to the bit."""
    from unet_ray.model.bundle import read_bundle
    from unet_ray.model.export import export_model
    from unet_ray.model.onnx_file import find_facts
    from unet_ray.model.onnx_network import OnnxNetwork, open_session
    from unet_ray.model.onnx_trial import made_frames

    with tempfile.TemporaryDirectory() as folder:
        data = _of_float32(export_model(model, f"{folder}/model.onnx", "onnx"))
    facts = find_facts(data, "model.onnx", n_classes=read_bundle(model).class_set.n_classes)
    size = facts.image_size(None)
    images_BHWC = made_frames(size, batch_size)
    network = OnnxNetwork(data, facts, size=size)
    session, inputs_BHWC = open_session(data, "cpu"), network.input_of(images_BHWC)

    def bare() -> np.ndarray:
        return session.run([facts.output_name], {facts.input_name: inputs_BHWC})[0]

    is_equal = np.array_equal(network(images_BHWC), bare())
    rounds = [(_core_s(lambda: network(images_BHWC)), _core_s(bare)) for _ in range(ROUNDS)]
    ours_s, bare_s = map(min, zip(*rounds, strict=True))
    return {"ours_ms": 1e3 * ours_s / batch_size, "bare_ms": 1e3 * bare_s / batch_size, "is_equal": is_equal}


def _of_float32(path: str) -> bytes:
    """Ours takes uint8; with an input of float32 the same network is one that has to be normalised for."""
    import onnx

    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return model.SerializeToString()


def _core_s(act: Callable[[], Any]) -> float:
    started_s = time.process_time()
    act()
    return time.process_time() - started_s


def _both(arena: Arena) -> Measurement:
    arena.require("onnxruntime", "onnx")
    arena.require("tf2onnx", "onnx")
    model = arena.model()
    return arena.program("onnx_network", {"model": model, "batch_size": arena.batch_size(model)}).result


def _agreement(measured: Round) -> tuple[bool, str]:
    is_equal = measured["both"]["is_equal"]
    return is_equal, f"logits are {'equal to the bit' if is_equal else 'not equal'}"


CONTESTS = (Contest(name="onnx", contestants={"both": _both}),)

ROWS = (
    Row(
        name="onnx",
        what="a network as ONNX, core time a frame",
        against="bare ONNX Runtime",
        contest="onnx",
        needs=("both",),
        figure=lambda measured: measured["both"]["ours_ms"] / measured["both"]["bare_ms"],
        target=1.15,
        at_most=True,
        agreement=_agreement,
        note=lambda measured: f"{measured['both']['ours_ms']:.2f} and {measured['both']['bare_ms']:.2f} ms",
    ),
)

"""Small networks as ONNX, built operator by operator: scores are colours of every fourth pixel times weights."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

N_CLASSES = 3
WEIGHTS_KC = np.random.default_rng(0).normal(0, 0.02, (N_CLASSES, 3)).astype(np.float32)
TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}


def small_network(
    *,
    layout: str = "nchw",
    dtype: str = "float32",
    batch: int | str = "n",
    size: tuple[int | str, int | str] = (24, 32),
    ending: str = "logits",
) -> onnx.ModelProto:
    """A network whose output is a quarter of its input's size: logits, probabilities or ids."""
    to_nchw, to_nhwc = [0, 3, 1, 2], [0, 2, 3, 1]
    nodes = [helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT)]
    planes = "floats"
    if layout == "nhwc":
        nodes.append(helper.make_node("Transpose", ["floats"], ["planes"], perm=to_nchw))
        planes = "planes"
    nodes.append(helper.make_node("Conv", [planes, "weights"], ["scores"], strides=[4, 4]))
    last = "scores"
    if ending == "probabilities":
        nodes.append(helper.make_node("Softmax", ["scores"], ["shares"], axis=1))
        last = "shares"
    if ending == "ids":
        nodes.append(helper.make_node("ArgMax", ["scores"], ["out"], axis=1, keepdims=0))
    elif layout == "nhwc":
        nodes.append(helper.make_node("Transpose", [last], ["out"], perm=to_nhwc))
    else:
        nodes.append(helper.make_node("Identity", [last], ["out"]))
    small = [side if isinstance(side, str) else side // 4 for side in size]
    small = ["small_" + side if isinstance(side, str) else side for side in small]
    shapes = {
        "image": [batch, 3, *size] if layout == "nchw" else [batch, *size, 3],
        "out": [batch, N_CLASSES, *small] if layout == "nchw" else [batch, *small, N_CLASSES],
    }
    out_type, out_shape = (
        (TensorProto.INT64, [batch, *small]) if ending == "ids" else (TensorProto.FLOAT, shapes["out"])
    )
    return as_model(
        nodes,
        helper.make_tensor_value_info("image", TYPES[dtype], shapes["image"]),
        helper.make_tensor_value_info("out", out_type, out_shape),
    )


def as_model(nodes, image, *outputs, functions=(), opsets=(("", 17),), weights=None) -> onnx.ModelProto:
    weights = numpy_helper.from_array(WEIGHTS_KC[..., None, None], "weights") if weights is None else weights
    graph = helper.make_graph(nodes, "small", [image], list(outputs), [weights])
    imports = [helper.make_opsetid(*opset) for opset in opsets]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=9)


def scores_of(inputs_NHWC: np.ndarray) -> np.ndarray:
    """What the network computes, without it: logits [N, h, w, K] of its input with colours last."""
    return inputs_NHWC[:, ::4, ::4].astype(np.float64) @ WEIGHTS_KC.T.astype(np.float64)

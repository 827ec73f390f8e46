"""A network made elsewhere: its ONNX file read as a stranger's data, and what it takes and gives.

The model folder holds one file. So weights that lie beside it (PyTorch's exporter writes `net.onnx.data`) are taken in;
a file whose weights are inside stays as it is, byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from unet_ray import storage
from unet_ray.messages import first_few, printable
from unet_ray.model.onnx_facts import KINDS, LAYOUTS, OnnxFacts
from unet_ray.model.onnx_graph import check_graph, messages_in, parse

if TYPE_CHECKING:
    import onnx

MAX_ONNX_BYTES = 2_000_000_000
"""A protobuf message has 2 GiB at most, weights and graph together."""
_CHANNEL_AXIS = {"nchw": 1, "nhwc": 3}
_ITEM_BYTES = {"FLOAT": 4, "DOUBLE": 8, "FLOAT16": 2, "BFLOAT16": 2, "BOOL": 1} | {
    f"{sign}INT{bits}": bits // 8 for sign in ("", "U") for bits in (8, 16, 32, 64)
}
"""Of the types of tensors that may lie beside the file."""
_SCORES = ("FLOAT", "FLOAT16", "DOUBLE")
_IDS = ("INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8")

Dimensions = list[int | None]


# --- the file ---


def read_onnx(uri: str) -> bytes:
    """Returns an ONNX file with all its weights inside.

    Raises:
        ValueError: one line: it is missing, too large, no ONNX file, or its weights are not beside it.
        unet_ray.storage.StorageError: trouble with storage.
    """
    uri = storage.resolve(uri)
    data = _read_limited(uri, MAX_ONNX_BYTES)
    model = parse(data, uri)
    tensors = external_tensors(model)
    if not tensors:
        return data
    _take_in(model, tensors, uri)
    if model.ByteSize() > MAX_ONNX_BYTES:
        raise _too_large(uri, model.ByteSize())
    return model.SerializeToString(deterministic=True)


def external_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Returns the tensors whose content lies in another file, wherever in the model they stand."""
    import onnx

    tensors = (part for part in messages_in(model) if isinstance(part, onnx.TensorProto))
    return [of for of in tensors if of.data_location == onnx.TensorProto.EXTERNAL or of.external_data]


def _read_limited(uri: str, limit_bytes: int) -> bytes:
    try:
        size_bytes = storage.info(uri).size_bytes
        if size_bytes > limit_bytes:
            raise _too_large(uri, size_bytes)
        return storage.read_bytes(uri, 0, limit_bytes)
    except FileNotFoundError as error:
        raise ValueError(f"{uri} does not exist; give the path of an ONNX file") from error
    except (storage.NotAFile, IsADirectoryError) as error:
        raise ValueError(f"{uri} is not a file; give the path of an ONNX file") from error


def _too_large(uri: str, size_bytes: int) -> ValueError:
    return ValueError(
        f"{uri} has {size_bytes:,} bytes with its weights; {MAX_ONNX_BYTES:,} are the most that one ONNX file can "
        "hold: export it in half precision, or take a smaller network"
    )


def _take_in(model: onnx.ModelProto, tensors: Sequence[onnx.TensorProto], uri: str) -> None:
    """Puts weights that lie beside the file into it, never more bytes than one file can hold."""
    total_bytes = model.ByteSize() + sum(_content_bytes(tensor, uri) for tensor in tensors)
    if total_bytes > MAX_ONNX_BYTES:
        raise _too_large(uri, total_bytes)
    contents: dict[str, bytes] = {}
    for tensor in tensors:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = _location(entries, uri)
        if location not in contents:
            contents[location] = _read_beside(uri, location)
        tensor.raw_data = _content(tensor, entries, contents[location], uri)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")


def _location(entries: Mapping[str, str], uri: str) -> str:
    """The name of a file beside the network's, and nothing that leads elsewhere."""
    location = entries.get("location", "").removeprefix("./")
    if location in ("", ".", "..") or set(location) & set("/\\\0"):
        raise ValueError(
            f"{uri} keeps weights in {printable(location[:80])!r}; only a file beside it is taken: put it there and "
            "export again, or save the network with its weights inside"
        )
    return location


def _read_beside(uri: str, location: str) -> bytes:
    folder = uri.rpartition("/")[0] or "/"
    if storage.first_link(folder, [location]):
        raise ValueError(f"{uri} keeps weights in {printable(location)}, which is a link; put the file itself there")
    beside = storage.join(folder, location)
    if not storage.exists(beside):
        raise ValueError(f"{uri} keeps weights in {printable(location)}, which is not beside it; copy both files")
    return _read_limited(beside, MAX_ONNX_BYTES)


def _content_bytes(tensor: onnx.TensorProto, uri: str) -> int:
    item_bytes = _ITEM_BYTES.get(_type_name(tensor.data_type))
    if item_bytes is None or any(side < 0 for side in tensor.dims):
        raise ValueError(
            f"{uri} keeps a tensor of type {_type_name(tensor.data_type)} and shape {list(tensor.dims)} beside it; "
            "save the network with its weights inside"
        )
    return item_bytes * math.prod(tensor.dims)


def _content(tensor: onnx.TensorProto, entries: Mapping[str, str], content: bytes, uri: str) -> bytes:
    size_bytes = _content_bytes(tensor, uri)
    offset, length = entries.get("offset", "0"), entries.get("length", str(size_bytes))
    is_range = all(number.isascii() and number.isdigit() and len(number) < 16 for number in (offset, length))
    if not is_range or int(length) != size_bytes or int(offset) + size_bytes > len(content):
        raise ValueError(
            f"the weights beside {uri} do not fit it: {printable(tensor.name[:60])} has {size_bytes:,} bytes from "
            f"{printable(offset[:20])} on, the file {len(content):,}; copy both files again"
        )
    return content[int(offset) : int(offset) + size_bytes]


def _type_name(data_type: int) -> str:
    import onnx

    known = data_type in onnx.TensorProto.DataType.values()
    return onnx.TensorProto.DataType.Name(data_type) if known else str(data_type)


# --- what it takes and gives ---


def find_facts(
    data: bytes,
    name: str,
    *,
    n_classes: int,
    layout: str | None = None,
    output: str | None = None,
    kind: str | None = None,
) -> OnnxFacts:
    """Checks a network and returns what its file says of its input and output; a trial completes it.

    Args:
        data: an ONNX file with its weights inside.
        name: what messages call it.
        n_classes: classes that the network should tell apart.
        layout: `nchw` or `nhwc` where the file leaves it open; None to find out.
        output: name of the output to use where it has several.
        kind: one of `KINDS` for what the output is; None to find out.

    Raises:
        ValueError: one line: it is no network that can be run here as data, or it takes or gives something else.
    """
    for option, value, allowed in (("--layout", layout, LAYOUTS), ("--kind", kind, KINDS)):
        if value not in (None, *allowed):
            raise ValueError(f"{option} is {value!r}; choose one of {', '.join(allowed)}")
    model = parse(data, name)
    if external_tensors(model):
        raise ValueError(f"{name} keeps weights in another file; the file itself must hold them")
    check_graph(model, name)
    image = _only_input(model.graph, name)
    input_dims, dtype = _dims(image, name), _type_name(image.type.tensor_type.elem_type)
    if len(input_dims) != 4 or dtype not in ("FLOAT", "UINT8"):
        raise ValueError(
            f"{name} takes {_tensor_text(image, name)}; it must take images, float32 or uint8, of 4 dimensions"
        )
    layout = _layout(input_dims, layout, f"{name} takes {_tensor_text(image, name)}")
    scores = _chosen_output(model.graph, output, name)
    output_layout, kind = _output_layout(scores, n_classes, layout, kind, name)
    spatial = input_dims[2:] if layout == "nchw" else input_dims[1:3]
    return OnnxFacts(
        input_name=image.name,
        layout=layout,
        dtype="float32" if dtype == "FLOAT" else "uint8",
        batch=input_dims[0],
        size=(spatial[0], spatial[1]),
        output_name=scores.name,
        output_layout=output_layout,
        n_classes=n_classes,
        kind=kind,
    )


def _only_input(graph: onnx.GraphProto, name: str) -> onnx.ValueInfoProto:
    weights = {tensor.name for tensor in graph.initializer}  # old files list these as inputs, too
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise ValueError(f"{name} has the inputs {_quoted(inputs)}; it must take one, the images")
    return inputs[0]


def _chosen_output(graph: onnx.GraphProto, output: str | None, name: str) -> onnx.ValueInfoProto:
    matching = [value for value in graph.output if output in (None, value.name)]
    if len(matching) != 1:
        wanted = "choose one with --output" if output is None else f"--output is {output!r}"
        raise ValueError(f"{name} has the outputs {_quoted(graph.output)}; {wanted}")
    return matching[0]


def _layout(dims: Dimensions, layout: str | None, takes: str) -> str:
    """The layout of an input: where 3 colours are, or may be."""
    sure = [of for of, axis in _CHANNEL_AXIS.items() if dims[axis] == 3]
    possible = [of for of, axis in _CHANNEL_AXIS.items() if dims[axis] in (3, None)]
    if not possible:
        raise ValueError(f"{takes}; images have 3 colours, in the second or the last dimension")
    if layout is None:
        if len(sure) != 1 and len(possible) != 1:
            raise ValueError(f"{takes}, which leaves open where the colours are; give --layout nchw or --layout nhwc")
        return sure[0] if len(sure) == 1 else possible[0]
    if layout not in possible:
        raise ValueError(f"{takes}, which is not {layout}; give --layout {possible[0]}")
    return layout


def _output_layout(
    scores: onnx.ValueInfoProto, n_classes: int, layout: str, kind: str | None, name: str
) -> tuple[str, str | None]:
    """The output's layout, and that it is ids where it is."""
    dims, dtype = _dims(scores, name), _type_name(scores.type.tensor_type.elem_type)
    gives = f"{name} gives {_tensor_text(scores, name)}"
    if dtype in _IDS and kind in (None, "ids"):
        return _ids_layout(dims, gives), "ids"
    if dtype not in _SCORES or kind == "ids":
        raise ValueError(f"{gives}; {kind or 'scores'} are {'integers' if kind == 'ids' else 'floating point numbers'}")
    if len(dims) != 4:
        raise ValueError(f"{gives}; scores have 4 dimensions: frames, classes, height and width")
    same_first = sorted(LAYOUTS, key=lambda of: of != layout)
    sure = [of for of in same_first if dims[_CHANNEL_AXIS[of]] == n_classes]
    open_ = [of for of in same_first if dims[_CHANNEL_AXIS[of]] is None]
    if not sure and not open_:
        n_found = dims[_CHANNEL_AXIS[layout]]
        raise ValueError(f"{gives}: {n_found} classes; --classes has {n_classes}: give those that it was trained with")
    return (sure or open_)[0], kind


def _ids_layout(dims: Dimensions, gives: str) -> str:
    if len(dims) == 3:
        return "nhw"
    layouts = [of for of, axis in _CHANNEL_AXIS.items() if len(dims) == 4 and dims[axis] == 1]
    if not layouts:
        raise ValueError(f"{gives}; class ids have the shape [frames, height, width], or one channel beside")
    return layouts[0]


def _dims(value: onnx.ValueInfoProto, name: str) -> Dimensions:
    """The sides of a tensor; None for one that is a name, nothing, or 0 or less, as some exporters write it."""
    tensor_type = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor_type.HasField("shape"):
        raise ValueError(f"{name} does not tell the shape of {_quoted([value])}; export it with shapes")
    return [side.dim_value if side.dim_value > 0 else None for side in tensor_type.shape.dim]


def _tensor_text(value: onnx.ValueInfoProto, name: str) -> str:
    """`pixel_values float32 [?, 3, 96, 160]`."""
    sides = ", ".join("?" if side is None else str(side) for side in _dims(value, name))
    dtype = _type_name(value.type.tensor_type.elem_type).lower()
    return f"{_quoted([value])} {'float32' if dtype == 'float' else dtype} [{sides}]"


def _quoted(values: Sequence[onnx.ValueInfoProto]) -> str:
    return printable(first_few([value.name[:60] or "(no name)" for value in values])) or "(none)"

"""An ONNX file from a stranger, as a graph: whether what it would run is bounded, and ONNX's own operators only.

ONNX Runtime runs the operators; nothing of the file is code for Python. What is refused here could run for ever, grow
without end when functions are inlined, or need a library that the file's maker has and nobody else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from unet_ray.messages import first_few, printable

if TYPE_CHECKING:
    import onnx

MIN_OPSET = 7
"""ONNX Runtime takes no older one (its documentation of compatibility, 1.23)."""
MAX_NODES = 200_000
"""With every function inlined; a network of 100 layers has some 1,000."""
MAX_CALLS_IN_CALLS = 32
UNBOUNDED = ("Loop", "Scan", "SequenceMap")
"""How often these run is a matter of what flows through them; `If` runs one of two branches, once."""
STANDARD_DOMAINS = ("", "ai.onnx")

_Function = tuple[str, str, str]


def parse(data: bytes, name: str) -> onnx.ModelProto:
    """Returns the parsed file; `name` is what a message calls it.

    Raises:
        ValueError: it is no ONNX file, or the package that reads one is missing.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ValueError("networks as ONNX need the package onnx; pip install 'unet-ray[onnx]'") from error
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ValueError(f"{name} is no ONNX file, or not whole: it does not parse") from error
    if any(isinstance(text, bytes) for part in messages_in(model) for text in _texts(part)):  # protobuf lets it pass
        raise ValueError(f"{name} is no ONNX file, or damaged: a name in it is no text")
    if not model.HasField("graph") or not model.graph.node or not model.opset_import:
        raise ValueError(f"{name} is no ONNX network: it has no graph of operators, or does not name its opset")
    return model


def messages_in(message: Any) -> Iterator[Any]:
    """Yields a protobuf message and all that it is made of, at any depth."""
    from google.protobuf.message import Message

    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from messages_in(part)


def _texts(message: Any) -> Iterator[Any]:
    """The values of a message's own fields that should be text."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            yield from [value] if isinstance(value, str | bytes) else value


def nodes_in(message: Any) -> list[onnx.NodeProto]:
    """Returns all nodes of a model, graph or function, those of branches too."""
    import onnx

    return [part for part in messages_in(message) if isinstance(part, onnx.NodeProto)]


def check_graph(model: onnx.ModelProto, name: str) -> None:
    """Raises ValueError where the network asks for more than ONNX's own operators, each a bounded number of times."""
    functions = {(of.domain, of.name, getattr(of, "overload", "")): of for of in model.functions}
    _check_opsets(model, name)
    nodes = nodes_in(model)
    custom = sorted({f"{of.domain}.{of.op_type}" for of in nodes if _is_custom(of, functions)})
    if custom:
        raise ValueError(
            f"{name} uses operators that are not ONNX's own: {_names(custom)}; export it without extensions and "
            "without an optimiser of one runtime"
        )
    unbounded = sorted({of.op_type for of in nodes if of.domain in STANDARD_DOMAINS and of.op_type in UNBOUNDED})
    if unbounded:
        raise ValueError(
            f"{name} uses {_names(unbounded)}, which may run without end; export it for a fixed size, without loops"
        )
    if _n_inlined(model, functions, name) > MAX_NODES:
        raise ValueError(f"{name} has more than {MAX_NODES:,} nodes with its functions inlined, which no network needs")


def _check_opsets(model: onnx.ModelProto, name: str) -> None:
    import onnx

    imports = [*model.opset_import, *(entry for of in model.functions for entry in of.opset_import)]
    versions = [entry.version for entry in imports if entry.domain in STANDARD_DOMAINS]
    newest = onnx.defs.onnx_opset_version()
    if not versions or min(versions) < MIN_OPSET or max(versions) > newest:
        opsets = _names([str(version) for version in sorted(set(versions))]) or "none"
        raise ValueError(
            f"{name} has the ONNX opset {opsets}; {MIN_OPSET} to {newest} are read here: export it again with one of "
            "them, or install newer packages onnx and onnxruntime"
        )


def _is_custom(node: onnx.NodeProto, functions: Mapping[_Function, Any]) -> bool:
    return node.domain not in STANDARD_DOMAINS and _called(node) not in functions


def _called(node: onnx.NodeProto) -> _Function:
    return node.domain, node.op_type, getattr(node, "overload", "")


def _n_inlined(model: onnx.ModelProto, functions: Mapping[_Function, Any], name: str) -> int:
    """The nodes once every call is replaced by its function: each could call the next one twice, 60 times over."""
    sizes: dict[_Function, int] = {}

    def size(nodes: Iterable[onnx.NodeProto], calls: tuple[_Function, ...]) -> int:
        return sum(call_size(_called(node), calls) for node in nodes)

    def call_size(call: _Function, calls: tuple[_Function, ...]) -> int:
        if call not in functions:
            return 1
        if call in calls or len(calls) >= MAX_CALLS_IN_CALLS:
            raise ValueError(f"{name} has functions that call themselves, or each other too deep: {_names([call[1]])}")
        if call not in sizes:
            sizes[call] = size(nodes_in(functions[call]), (*calls, call))
        return sizes[call]

    return size(nodes_in(model.graph), ())


def _names(names: list[str]) -> str:
    """Names of a stranger in a message: short, one line, a few."""
    return printable(first_few([name[:60] for name in names]))

"""An ONNX file from a stranger: what is read off it, what is taken in, and what is refused."""

from __future__ import annotations

import dataclasses
import os
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("onnx")

import onnx
from onnx import TensorProto, helper, numpy_helper
from small_onnx import N_CLASSES, as_model, small_network

from unet_ray.model import onnx_file
from unet_ray.model.onnx_facts import OnnxFacts
from unet_ray.model.onnx_file import find_facts, read_onnx


def facts_of(model: onnx.ModelProto, **options) -> OnnxFacts:
    return find_facts(model.SerializeToString(), "net.onnx", **{"n_classes": N_CLASSES, **options})


def refusal(model: onnx.ModelProto | bytes, **options) -> str:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    with pytest.raises(ValueError) as caught:
        find_facts(data, "net.onnx", **{"n_classes": N_CLASSES, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def image(shape=("n", 3, 24, 32), dtype=TensorProto.FLOAT, name="image"):
    return helper.make_tensor_value_info(name, dtype, shape)


def out(shape=("n", N_CLASSES, 6, 8), dtype=TensorProto.FLOAT, name="out"):
    return helper.make_tensor_value_info(name, dtype, shape)


def conv():
    return helper.make_node("Conv", ["image", "weights"], ["out"], strides=[4, 4])


# --- facts ---


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize(
    ("batch", "size", "expected"),
    [("n", (24, 32), (None, (24, 32))), (1, ("height", "width"), (1, (None, None))), (4, (24, "w"), (4, (24, None)))],
)
def test_what_a_network_takes_and_gives(layout, dtype, batch, size, expected):
    facts = facts_of(small_network(layout=layout, dtype=dtype, batch=batch, size=size))
    assert facts == OnnxFacts(
        input_name="image",
        layout=layout,
        dtype=dtype,
        batch=expected[0],
        size=expected[1],
        output_name="out",
        output_layout=layout,
        n_classes=N_CLASSES,
        kind=None,
    )
    assert OnnxFacts.from_dict(facts.to_dict()) == facts


@pytest.mark.parametrize(
    ("shape", "output_layout"), [(("n", 6, 8), "nhw"), (("n", 1, 6, 8), "nchw"), (("n", 6, 8, 1), "nhwc")]
)
def test_integers_are_class_ids(shape, output_layout):
    facts = facts_of(as_model([conv()], image(), out(shape, TensorProto.INT64)))
    assert (facts.kind, facts.output_layout, facts.gives_ids) == ("ids", output_layout, True)


def test_a_layout_that_the_file_leaves_open_is_asked_for():
    model = as_model([conv()], image(("n", "a", "b", "c")), out())
    assert refusal(model) == (
        "net.onnx takes image float32 [?, ?, ?, ?], which leaves open where the colours are; give --layout nchw or "
        "--layout nhwc"
    )
    assert facts_of(model, layout="nhwc").size == (None, None)
    both = as_model([conv()], image((1, 3, 24, 3)), out())
    assert "leaves open where" in refusal(both) and facts_of(both, layout="nchw").size == (24, 3)
    assert refusal(as_model([conv()], image(), out()), layout="nhwc") == (
        "net.onnx takes image float32 [?, 3, 24, 32], which is not nhwc; give --layout nchw"
    )


def test_one_of_several_outputs_is_chosen_by_name():
    model = as_model([conv()], image(), out(), out(name="auxiliary"))
    assert refusal(model) == "net.onnx has the outputs out, auxiliary; choose one with --output"
    assert refusal(model, output="logits") == "net.onnx has the outputs out, auxiliary; --output is 'logits'"
    assert facts_of(model, output="auxiliary").output_name == "auxiliary"


def test_an_output_with_its_classes_last_behind_an_input_with_its_colours_first():
    assert facts_of(as_model([conv()], image(), out(("n", 6, 8, N_CLASSES)))).output_layout == "nhwc"
    assert facts_of(as_model([conv()], image(), out(("n", "k", "h", "w")))).output_layout == "nchw"


def test_old_files_list_their_weights_as_inputs():
    model = small_network()
    model.graph.input.append(helper.make_tensor_value_info("weights", TensorProto.FLOAT, [N_CLASSES, 3, 1, 1]))
    assert facts_of(model).input_name == "image"


def test_the_size_to_work_at():
    fixed, any_size = facts_of(small_network()), facts_of(small_network(size=("h", "w")))
    assert fixed.image_size(None) == fixed.image_size((24, 32)) == (24, 32) and any_size.image_size((40, 56)) == (
        40,
        56,
    )
    with pytest.raises(
        ValueError, match="--image-size is 32 24, the network takes 24 32 only; give that, or export it"
    ):
        fixed.image_size((32, 24))
    with pytest.raises(
        ValueError, match="the network takes images of several sizes .any any.; choose one with --image-"
    ):
        any_size.image_size(None)
    known = dataclasses.replace(fixed, output_size=(6, 8), kind="logits")
    assert known.scale == (Fraction(1, 4), Fraction(1, 4)) and fixed.scale is None


@pytest.mark.parametrize(
    "change",
    [
        {"layout": "chwn"},
        {"batch": 0},
        {"batch": True},
        {"size": [24, -1]},
        {"size": "24"},
        {"kind": "softmax"},
        {"n_classes": 300},
        {"output_size": [6, None]},
        {"input_name": None},
        {"more": 1},
    ],
)
def test_facts_of_an_altered_model_folder_are_refused(change):
    fields = facts_of(small_network()).to_dict()
    with pytest.raises(ValueError):
        OnnxFacts.from_dict({**fields, **change})


# --- what is refused ---


def test_what_is_no_onnx_file_is_refused():
    whole = small_network().SerializeToString()
    assert refusal(b"\x89PNG\r\n") == "net.onnx is no ONNX file, or not whole: it does not parse"
    assert refusal(whole[:-7]) == "net.onnx is no ONNX file, or not whole: it does not parse"
    assert refusal(b"") == "net.onnx is no ONNX network: it has no graph of operators, or does not name its opset"


def test_shapes_and_types_that_are_no_segmentation_are_refused():
    def of(first, second):
        return as_model([conv()], first, second)

    assert refusal(of(image((1, 3, 24)), out())).startswith(
        "net.onnx takes image float32 [1, 3, 24]; it must take images,"
    )
    assert "takes image float16 [?, 3, 24, 32]; it must take" in refusal(of(image(dtype=TensorProto.FLOAT16), out()))
    assert "[?, 1, 24, 32]; images have 3 colours" in refusal(of(image(("n", 1, 24, 32)), out()))
    assert refusal(of(image(), out(("n", 19, 6, 8)))) == (
        "net.onnx gives out float32 [?, 19, 6, 8]: 19 classes; --classes has 3: give those that it was trained with"
    )
    assert "scores have 4 dimensions" in refusal(of(image(), out(("n", N_CLASSES))))
    assert "class ids have the shape" in refusal(of(image(), out(("n", 2, 6, 8), TensorProto.INT64)))
    assert "out bool [?, 3, 6, 8]; scores are floating" in refusal(of(image(), out(dtype=TensorProto.BOOL)))
    assert "out float32 [?, 3, 6, 8]; ids are integers" in refusal(of(image(), out()), kind="ids")
    assert "[?, 6, 8]; logits are floating" in refusal(of(image(), out(("n", 6, 8), TensorProto.INT32)), kind="logits")
    assert "does not tell the shape of out" in refusal(of(image(), out(None)))
    assert refusal(of(image(), out()), kind="scores") == "--kind is 'scores'; choose one of logits, probabilities, ids"
    two = as_model([conv()], image(), out())
    two.graph.input.append(image(name="mask"))
    assert refusal(two) == "net.onnx has the inputs image, mask; it must take one, the images"


@pytest.mark.parametrize("opset", [6, 99])
def test_an_opset_that_nobody_reads_is_refused(opset):
    message = refusal(as_model([conv()], image(), out(), opsets=[("", opset)]))
    assert message.startswith(
        f"net.onnx has the ONNX opset {opset}; 7 to {onnx.defs.onnx_opset_version()} are read here"
    )


def test_custom_operators_are_refused_by_name_also_inside_a_branch():
    custom = helper.make_node("Deform\n", ["image"], ["out"], domain="mmcv")
    branch = helper.make_graph([custom], "then", [], [out()])
    inside = helper.make_node("If", ["image"], ["out"], then_branch=branch, else_branch=branch)
    for node in (custom, inside):
        assert refusal(as_model([node], image(), out(), opsets=[("", 17), ("mmcv", 1)])) == (
            "net.onnx uses operators that are not ONNX's own: mmcv.Deform\\n; export it without extensions and without "
            "an optimiser of one runtime"
        )


def test_loops_are_refused_and_branches_are_not():
    body = helper.make_graph([conv()], "body", [], [out()])
    loop = helper.make_node("Loop", ["", ""], ["out"], body=body)
    assert refusal(as_model([loop], image(), out())) == (
        "net.onnx uses Loop, which may run without end; export it for a fixed size, without loops"
    )
    branch = helper.make_node("If", ["image"], ["out"], then_branch=body, else_branch=body)
    assert facts_of(as_model([branch], image(), out())).kind is None
    function = helper.make_function("own", "Layer", ["x"], ["y"], [loop], [helper.make_opsetid("", 17)])
    call = helper.make_node("Layer", ["image"], ["out"], domain="own")
    assert "uses Loop" in refusal(as_model([call], image(), out(), functions=[function]))


def test_functions_of_the_file_are_its_own_unless_they_never_end_or_swell():
    def function(name, calls):
        nodes = [helper.make_node(callee, ["x"], ["y"], domain=domain) for domain, callee in calls]
        return helper.make_function("own", name, ["x"], ["y"], nodes, [helper.make_opsetid("", 17)])

    def model(*functions):
        call = helper.make_node("F0", ["image"], ["out"], domain="own")
        return as_model([call], image(), out(), functions=functions, opsets=[("", 17), ("own", 1)])

    assert facts_of(model(function("F0", [("", "Relu")]))).kind is None
    assert refusal(model(function("F0", [("own", "F1")]), function("F1", [("own", "F0")]))) == (
        "net.onnx has functions that call themselves, or each other too deep: F0"
    )
    doubling = [function(f"F{depth}", [("own", f"F{depth + 1}")] * 2) for depth in range(24)]
    message = refusal(model(*doubling, function("F24", [("", "Relu")])))
    assert message == "net.onnx has more than 200,000 nodes with its functions inlined, which no network needs"
    chain = [function(f"F{depth}", [("own", f"F{depth + 1}")]) for depth in range(3000)]
    assert "each other too deep" in refusal(model(*chain, function("F3000", [("", "Relu")])))


def test_no_altered_byte_leads_to_anything_but_facts_or_a_line():
    random = np.random.default_rng(0)
    whole = small_network(layout="nhwc", ending="probabilities").SerializeToString()
    outcomes = set()
    for _ in range(1000):
        data = bytearray(whole)
        for at in random.integers(0, len(data), random.integers(1, 4)):
            data[at] = random.integers(0, 256)
        try:
            outcomes.add(type(find_facts(bytes(data), "net.onnx", n_classes=N_CLASSES)))
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            outcomes.add(ValueError)
    assert outcomes == {OnnxFacts, ValueError}


# --- weights beside the file ---


@pytest.fixture
def beside(tmp_path):
    """A network whose weights lie beside it, as PyTorch's exporter writes them; changed as a stranger would."""
    path = tmp_path / "net" / "net.onnx"
    path.parent.mkdir()

    def write(**entries: str) -> str:
        model = small_network()
        weights = model.graph.initializer[0]
        (path.parent / "net.onnx.data").write_bytes(b"12345678" + weights.raw_data)
        described = {"location": "net.onnx.data", "offset": "8", "length": str(len(weights.raw_data)), **entries}
        weights.ClearField("raw_data")
        weights.data_location = TensorProto.EXTERNAL
        for key, value in described.items():
            if value is not None:
                weights.external_data.add(key=key, value=value)
        path.write_bytes(model.SerializeToString())
        return str(path)

    return write


def test_a_whole_file_stays_as_it_is(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(small_network().SerializeToString())
    assert read_onnx(str(path)) == path.read_bytes()


@pytest.mark.parametrize("entries", [{}, {"location": "./net.onnx.data"}, {"length": None}])
def test_weights_beside_the_file_are_taken_in(beside, entries):
    data = read_onnx(beside(**entries))
    assert data == read_onnx(beside(**entries))
    model = onnx.ModelProto.FromString(data)
    expected = small_network()
    np.testing.assert_array_equal(*(numpy_helper.to_array(of.graph.initializer[0]) for of in (model, expected)))
    onnx.checker.check_model(model, full_check=True)
    assert find_facts(data, "net.onnx", n_classes=N_CLASSES) == facts_of(expected)


@pytest.mark.parametrize("location", ["/etc/passwd", "../net.onnx.data", "more/net.onnx.data", "..", "", "a\\b"])
def test_weights_elsewhere_are_refused(beside, location):
    with pytest.raises(ValueError, match="keeps weights in '.*'; only a file beside it is taken: put it there and"):
        read_onnx(beside(location=location))


def test_weights_that_are_missing_or_a_link_or_do_not_fit_are_refused(beside, tmp_path):
    with pytest.raises(ValueError, match=r"net.onnx keeps weights in gone.data, which is not beside it; copy both"):
        read_onnx(beside(location="gone.data"))
    os.symlink("/etc/passwd", tmp_path / "net" / "link.data")
    with pytest.raises(ValueError, match=r"keeps weights in link.data, which is a link; put the file itself there"):
        read_onnx(beside(location="link.data"))
    for entries in ({"offset": "9"}, {"length": "35"}, {"offset": "-8"}, {"offset": "٣"}, {"offset": "9" * 30}):
        with pytest.raises(ValueError, match=r"do not fit it: weights has 36 bytes from .* on, the file 44; copy both"):
            read_onnx(beside(**entries))


def test_weights_beside_the_file_never_fill_the_memory(beside, tmp_path):
    path = beside()
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].dims[:] = [30_000, 30_000]
    (tmp_path / "net" / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"has 3,600,\d+,\d+ bytes with its weights; 2,000,000,000 are the most that"):
        read_onnx(path)
    model.graph.initializer[0].data_type = TensorProto.STRING
    (tmp_path / "net" / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"keeps a tensor of type STRING and shape \[30000, 30000\] beside it; save"):
        read_onnx(path)


def test_weights_in_another_file_are_found_wherever_they_stand(beside):
    model = onnx.load(beside(), load_external_data=False)
    assert refusal(model) == "net.onnx keeps weights in another file; the file itself must hold them"
    constant = helper.make_node("Constant", [], ["value"], value=model.graph.initializer[0])
    branch = helper.make_graph([constant], "then", [], [out()])
    node = helper.make_node("If", ["image"], ["out"], then_branch=branch, else_branch=branch)
    assert refusal(as_model([node], image(), out())).endswith("the file itself must hold them")


def test_files_that_are_too_large_or_not_there_are_refused(tmp_path):
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(onnx_file.MAX_ONNX_BYTES + 1)
    with pytest.raises(ValueError, match=r"large.onnx has 2,000,000,001 bytes with its weights; 2,000,000,000 are the"):
        read_onnx(str(path))
    with pytest.raises(ValueError, match=r"gone.onnx does not exist; give the path of an ONNX file"):
        read_onnx(str(tmp_path / "gone.onnx"))
    with pytest.raises(ValueError, match=r"is not a file; give the path of an ONNX file"):
        read_onnx(str(tmp_path))

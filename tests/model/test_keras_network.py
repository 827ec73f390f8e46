"""Models made of Keras' own layers: saved, read back, labelled with; and what is refused, by name and in one line."""

import copy
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import unet_ray
from unet_ray.model import keras_graph
from unet_ray.model.architecture import KerasConfig
from unet_ray.model.bundle import Bundle, read_bundle
from unet_ray.model.export import export_model
from unet_ray.model.keras_network import allowed_class
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.labeler import Labeler
from unet_ray.model.tiling import Tiling
from unet_ray.model.weights import weight_shapes
from unet_ray.pixels.preprocessing import Preprocessing, normalized

CLASSES = {
    "name": "three",
    "classes": [{"name": f"class_{index}", "color": [index, 0, 0], "values": [index]} for index in range(3)],
}
IMAGENET = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
FRAMES = np.random.default_rng(7).integers(0, 256, (2, 24, 32, 3), dtype=np.uint8)


def plain(x=None, size=(24, 32), **options) -> keras.Model:
    image = keras.Input((*size, 3))
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(image)
    return keras.Model(image, layers.Conv2D(3, 1, **options)(x))


def of_operations() -> keras.Model:
    """A model as people write them: arithmetic on tensors, a frozen part, indices, constants, one layer twice."""
    image = keras.Input((24, 32, 3))
    x = layers.Conv2D(4, 3, padding="same", activation="silu", name="two names?", kernel_regularizer="l2")(image)
    twice = layers.Conv2D(4, 3, padding="same", name="twice")
    x = ops.concatenate([twice(twice(x)), 2.0 - x * 0.5], axis=-1)
    x = layers.BatchNormalization(trainable=False, name="frozen")(ops.relu(x), training=False)
    x = ops.image.resize(x[:, ::2, ..., 1:], (24, 32), interpolation="bilinear") - np.arange(7, dtype="float32")
    x = x + layers.MultiHeadAttention(2, 3)(x, x) * ops.mean(x, axis=(1, 2), keepdims=True)
    return keras.Model(image, layers.Conv2D(3, 1)(x))


def nested() -> keras.Model:
    """Models in models, of any size, that take uint8."""
    image = keras.Input((None, None, 3), dtype="uint8")
    inner = keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(4, 3, padding="same", name="conv")])
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    features = keras.Input((None, None, 4))
    outer = keras.Model(features, layers.Conv2D(3, 1, name="conv")(layers.Dropout(0.5)(features)), name="head")
    return keras.Model(image, outer(inner(x)))


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(3)


def save(model: keras.Model, out: Path, **more) -> Bundle:
    more = {"preprocessing": IMAGENET} | more
    return read_bundle(unet_ray.save_model(model, str(out), classes=CLASSES, **more))


def refusal(model: keras.Model, out: Path, **more) -> str:
    with pytest.raises(ValueError) as caught:
        save(model, out, **more)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not (out / "model.json").exists()
    return str(caught.value)


@pytest.mark.parametrize("channels", [pytest.param("RGB", marks=pytest.mark.slow), "BGR"])
def test_a_model_is_saved_and_labels_as_it_did(tmp_path, channels):
    model = of_operations()
    bundle = save(model, tmp_path, preprocessing=IMAGENET | {"channels": channels, "resize": "bilinear-antialias"})
    assert bundle.model_config.preprocessing.resize == "bilinear-antialias"
    expected = model(normalized(FRAMES, bundle.model_config.preprocessing), training=False).numpy()
    network = bundle.build_model()
    assert (network.input.dtype, network.output.dtype, network.output_shape) == ("uint8", "float32", (None, 24, 32, 3))
    np.testing.assert_array_equal(network(FRAMES, training=False), expected)
    assert "two_names_/kernel" in bundle.weights and "twice/kernel" in bundle.weights
    assert network.get_layer("frozen").trainable is False
    labels = Labeler(bundle, LabelOptions(precision="float32", batch_size=2)).label(FRAMES, [(24, 32), (12, 20)])
    assert (labels.masks[0] == expected[0].argmax(-1)).mean() > 0.99 and labels.masks[1].shape == (12, 20)
    bundle.require_buildable()


def test_what_is_put_in_front_computes_normalized_to_the_bit(tmp_path):
    image = keras.Input((24, 32, 3))
    kernel = layers.Conv2D(3, 1, use_bias=False)
    kernel.build((None, 24, 32, 3))
    kernel.set_weights([np.eye(3)[None, None]])
    preprocessing = Preprocessing(mean=(1.1, 2.2, 3.3), std=(57.1, 58.2, 59.3), channels="BGR")
    bundle = save(keras.Model(image, kernel(image)), tmp_path, preprocessing=preprocessing)
    np.testing.assert_array_equal(bundle.build_model()(FRAMES), normalized(FRAMES, preprocessing))


def test_models_within_a_model_are_flattened_and_take_windows_of_another_size(tmp_path):
    model = nested()
    bundle = save(model, tmp_path, preprocessing=None, image_size=(24, 32))
    assert bundle.model_config.preprocessing == Preprocessing(std=(1, 1, 1))
    assert sorted(bundle.weights) == ["conv.1/bias", "conv.1/kernel", "conv/bias", "conv/kernel"]
    np.testing.assert_array_equal(bundle.build_model()(FRAMES), model(FRAMES))
    tiling = Tiling(window=(16, 24), stride=(10, 14))
    labels = Labeler(bundle, LabelOptions(precision="float32", batch_size=2, tiling=tiling)).label(
        FRAMES, [(24, 32)] * 2
    )
    assert labels.masks[0].shape == (24, 32)


def test_layers_may_have_the_names_of_operations_and_of_what_is_put_in_front(tmp_path):
    image = keras.Input((24, 32, 3))
    x = layers.Conv2D(4, 3, padding="same", name="scale")(image)
    for number in range(3):
        x = layers.Add(name=f"add_{number}" if number else "add")([x + 1.0, x])
    model = keras.Model(image, layers.Conv2D(3, 1, name="image")(ops.cast(x, "float32")))
    code = (
        "import sys; from unet_ray.model.bundle import read_bundle; print(read_bundle(sys.argv[1]).build_model().name)"
    )
    save(model, tmp_path)
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["network"]


def test_smaller_logits_are_resized_bilinearly(tmp_path):
    image = keras.Input((24, 32, 3))
    model = keras.Model(image, layers.Conv2D(3, 3, strides=4, padding="same")(image))
    bundle = save(model, tmp_path)
    logits = model(normalized(FRAMES, bundle.model_config.preprocessing))
    expected = tf.image.resize(logits, (24, 32), method="bilinear")
    np.testing.assert_allclose(bundle.build_model()(FRAMES), expected, atol=1e-6)


@pytest.mark.parametrize("end", ["activation", "layer", "softmax", "operation"])
def test_a_softmax_at_the_end_is_left_out(tmp_path, end):
    logits = plain()
    image = keras.Input((24, 32, 3))
    x = logits.layers[1](image)
    ends = {"layer": layers.Activation("softmax"), "softmax": layers.Softmax(), "operation": ops.softmax}
    last = layers.Conv2D(3, 1, activation="softmax" if end == "activation" else None)
    model = keras.Model(image, ends.get(end, layers.Identity())(last(x)) if end != "activation" else last(x))
    last.set_weights(logits.layers[2].get_weights())
    bundle = save(model, tmp_path)
    expected = logits(normalized(FRAMES, bundle.model_config.preprocessing))
    np.testing.assert_array_equal(bundle.build_model()(FRAMES), expected)


def test_half_precision_is_the_commands_but_for_the_first_and_the_last_layers(tmp_path):
    network = save(nested(), tmp_path, image_size=(24, 32), preprocessing=None).build_model(
        dtype_policy="mixed_bfloat16"
    )
    policies = {layer.name: layer.compute_dtype for layer in network.layers}
    (first,) = (name for name in policies if name.startswith("rescaling"))
    assert policies[first] == policies["conv.1"] == "float32"
    assert policies["conv"] == "bfloat16" and keras.config.dtype_policy().name == "float32"


def test_what_a_normalization_layer_was_adapted_to_is_saved(tmp_path):
    layer = layers.Normalization()
    layer.adapt(FRAMES.astype("float32"))
    image = keras.Input((24, 32, 3))
    model = keras.Model(image, layers.Conv2D(3, 1)(layer(image)))
    bundle = save(model, tmp_path, preprocessing={"mean": [0, 0, 0], "std": [1, 1, 1]})
    np.testing.assert_allclose(bundle.build_model()(FRAMES), model(FRAMES.astype("float32")), atol=1e-5)
    assert len(bundle.weights) == 2


OPTIONS_OF_CLASSES = {
    **{name: {"filters": 4, "kernel_size": 3, "padding": "same"} for name in ("Conv2D", "Conv2DTranspose")},
    "SeparableConv2D": {"filters": 4, "kernel_size": 3, "padding": "same"},
    "DepthwiseConv2D": {"kernel_size": 3, "padding": "same"},
    "Dense": {"units": 4, "activation": "gelu"},
    "EinsumDense": {"equation": "abcd,de->abce", "output_shape": (None, None, 4), "bias_axes": "e"},
    **{name: {"keepdims": True} for name in ("GlobalAveragePooling2D", "GlobalMaxPooling2D")},
    **{name: {"pool_size": 3, "strides": 1, "padding": "same"} for name in ("AveragePooling2D", "MaxPooling2D")},
    "GroupNormalization": {"groups": 2},
    "Normalization": {"mean": [1.0, 2, 3, 4], "variance": [1.0, 2, 3, 4]},
    "Rescaling": {"scale": [1.0, 2, 3, 4], "offset": 0.5},
    "Resizing": {"height": 24, "width": 32},
    "UpSampling2D": {"size": 1},
    "ZeroPadding2D": {"padding": 0},
    "Cropping2D": {"cropping": ((0, 0), (0, 0))},
    "Activation": {"activation": "mish"},
    "PReLU": {"shared_axes": [1, 2]},
    "ReLU": {"max_value": 6.0},
    "Permute": {"dims": (1, 2, 3)},
    "Reshape": {"target_shape": (24, 32, 4)},
    "LayerScale": {"init_values": 0.5, "projection_dim": 4},
    "StochasticDepth": {"drop_path_rate": 0.1},
    "MultiHeadAttention": {"num_heads": 2, "key_dim": 2},
    "GroupQueryAttention": {"head_dim": 2, "num_query_heads": 2, "num_key_value_heads": 1},
    **{name: {"rate": 0.1} for name in ("Dropout", "GaussianDropout", "SpatialDropout2D")},
    "GaussianNoise": {"stddev": 0.1},
}
OF_TWO = {"Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply", "Subtract"}
OF_ROWS = {"Conv1D", "RepeatVector", "Flatten", "Dot", "Attention", "AdditiveAttention", "GroupQueryAttention"}


@pytest.mark.parametrize("name", sorted({name for names in keras_graph.LAYERS.values() for name in names}))
def test_every_class_of_the_list_is_saved(tmp_path, name):
    if keras_graph.home_of(name, keras_graph.LAYERS) == "keras.layers" and not hasattr(layers, name):
        pytest.skip(f"Keras {keras.__version__} has no {name}")
    image = keras.Input((24, 32, 3))
    x = layers.Conv2D(4, 3, padding="same")(image)
    layer = allowed_class(name)(**OPTIONS_OF_CLASSES.get(name, {})) if name not in OF_ROWS else None
    if name in OF_TWO:
        x = layer([x, image if name == "Concatenate" else layers.Conv2D(4, 1)(image)])
    elif name == "MultiHeadAttention":
        x = layer(x, x)
    elif layer is not None:
        x = layer(x)
    else:
        x = of_rows(name, x)
    bundle = save(keras.Model(image, ops.image.resize(layers.Conv2D(3, 1)(x), (24, 32))), tmp_path)
    bundle.build_model()


def of_rows(name: str, x):
    """Layers that take other tensors than images."""
    rows = layers.Reshape((24 * 32, 4))(layers.AveragePooling2D(1)(x))
    vector = layers.GlobalAveragePooling2D()(x)
    if name == "Conv1D":
        rows = layers.Conv1D(4, 3, padding="same")(rows)
    elif name == "RepeatVector":
        rows = layers.RepeatVector(24 * 32)(vector)
    elif name == "Flatten":
        rows = layers.Reshape((24 * 32, 4))(layers.Flatten()(x))
    elif name == "Dot":
        rows = layers.RepeatVector(24 * 32)(layers.Dense(4)(layers.Dot(axes=1)([vector, vector])))
    elif name == "GroupQueryAttention":
        rows = layers.GroupQueryAttention(**OPTIONS_OF_CLASSES[name])(rows, rows)
    else:
        rows = getattr(layers, name)()([rows, rows])
    return layers.Reshape((24, 32, 4))(rows)


@pytest.mark.parametrize("name", sorted(name for names in keras_graph.OPERATIONS.values() for name in names))
def test_every_operation_of_the_list_is_saved(tmp_path, name):
    image = keras.Input((24, 32, 3))
    x = layers.Conv2D(3, 3, padding="same", activation="softplus")(image) + 0.1
    two = {"add", "subtract", "multiply", "divide", "true_divide", "power", "maximum", "minimum"}
    more = {
        "clip": (0.0, 1.0), "cast": ("float32",), "expand_dims": (1,), "flip": (1,), "moveaxis": (1, 1),
        "swapaxes": (2, 2), "reshape": ((-1, 24, 32, 3),), "transpose": ((0, 1, 2, 3),), "average_pool": (3, 1, "same"),
        "max_pool": (3, 1, "same"), "mean": (-1, True), "max": (-1, True), "min": (-1, True), "sum": (-1, True),
        "matmul": (np.eye(3, dtype="float32"),), "resize": ((24, 32),), **dict.fromkeys(two, (0.5,)),
    }  # fmt: skip
    if name == "get_item":
        x = x[..., ::-1]
    elif name in ("concatenate", "stack"):
        x = getattr(ops, name)([x, x], axis=1)
        x = x[:, 0] if name == "stack" else x[:, :24]
    elif name == "squeeze":
        x = ops.squeeze(ops.expand_dims(x, 1), 1)
    else:
        x = getattr(ops.image if name == "resize" else ops, name)(x, *more.get(name, ()))
        x = x[:, 0] if name == "expand_dims" else x
    save(keras.Model(image, layers.Conv2D(3, 1)(x)), tmp_path)


# Keras 3.15.1 hands its variables to np.array when it saves them.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_equal_models_have_one_digest_and_a_folder_goes_through_pickle_and_export(tmp_path):
    model = plain()
    first, second = save(model, tmp_path / "a"), save(model, tmp_path / "b")
    assert first.digest == second.digest and pickle.loads(pickle.dumps(first)).model_config == first.model_config
    assert save(model, tmp_path / "c", preprocessing={}).digest != first.digest
    path = export_model(str(tmp_path / "a"), str(tmp_path / "out.keras"), "keras")
    loaded = keras.models.load_model(path)
    np.testing.assert_allclose(loaded(FRAMES), first.build_model()(FRAMES), atol=1e-5)


@keras.saving.register_keras_serializable("somebody", "Conv2D")
class Conv2D(layers.Conv2D):
    """Has the name of one of Keras' layers."""


def an_activation(x):
    return x * 2


def with_layer(layer, **options) -> keras.Model:
    return keras.Sequential([keras.Input((24, 32, 3), **options), layer, layers.Conv2D(3, 1)])


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (lambda: with_layer(layers.Lambda(lambda x: x * 2, name="twice")), "the layer twice is a Lambda of keras.src"),
        (lambda: with_layer(Conv2D(3, 1, name="own")), "the layer own is a Conv2D of test_keras_network; only"),
        (
            lambda: with_layer(layers.Conv2D(3, 1, activation=an_activation, name="own")),
            "own is given an_activation, which is not saved: it is not Keras' own",
        ),
        (lambda: with_layer(layers.RandomFlip(name="random")), "the layer random is a RandomFlip of keras.src.layers"),
        (
            lambda: with_layer(layers.TimeDistributed(layers.Dense(3), name="rows")),
            "the layer rows is a TimeDistributed of keras.src.layers.rnn",
        ),
        (lambda: keras.Sequential([layers.Conv2D(3, 1)]), "the model takes nothing known yet: it has no Input;"),
        (lambda: plain(activation="sigmoid"), "the model ends in a sigmoid (conv2d_"),
        (lambda: with_layer(layers.Identity(), dtype="int32"), "the model takes int32; it must take uint8 or float32"),
        (
            lambda: keras.Sequential([plain(), layers.Softmax(), layers.AveragePooling2D(1)]),
            "the model gives probabilities; give the model up to its logits, before the softmax",
        ),
        (
            lambda: keras.Sequential([plain(), layers.Cropping2D(1)]),
            "the network gives 22x30 logits of an image of 24x32; both sides must be divided by one whole number",
        ),
    ],
)  # fmt: skip
def test_what_is_not_keras_own_is_refused_by_name(tmp_path, model, problem):
    assert refusal(model(), tmp_path).startswith(problem)


def test_arguments_that_do_not_fit_the_model_are_one_line(tmp_path):
    free, floats = nested(), plain()
    assert refusal(free, tmp_path, preprocessing=None) == (
        "the model takes images of any size; give image_size=(height, width)"
    )
    assert refusal(floats, tmp_path, image_size=(24, 30)) == "image_size is (24, 30); the model takes (24, 32)"
    assert refusal(floats, tmp_path, preprocessing=None).startswith("the model takes float images, so give preproc")
    assert refusal(floats, tmp_path, preprocessing={"men": 0}).startswith(
        "preprocessing has the key men; it takes resize"
    )
    assert refusal(free, tmp_path, image_size=(24, 32), preprocessing=IMAGENET) == (
        "the network takes uint8, so what becomes of the values is its own: mean must be 0, std 1, channels RGB"
    )
    with pytest.raises(ValueError, match="the network gives 3 classes; the class set has 19"):
        unet_ray.save_model(floats, str(tmp_path), classes="cityscapes_train_ids", preprocessing={})
    save(floats, tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} holds a model; give a new folder, or delete it first"):
        save(floats, tmp_path)


def resign(folder: Path, change) -> None:
    """Changes model.json as somebody would who knows the format: with digests that fit."""
    document = json.loads((folder / "model.json").read_bytes())
    change(document)
    content = {key: value for key, value in document.items() if key not in ("digest", "files")}
    content["weights_file"] = document["files"]["weights.safetensors"]
    document["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "model.json").write_text(json.dumps(document))


def change_of(part: str, **changes):
    """A change of the first layer's or call's keys, or of the whole graph's."""

    def change(document):
        graph = document["network"]["graph"]
        (graph if part == "graph" else graph[part][0]).update(changes)

    return change


CUSTOM = {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"}
DEEP = [[[[[[0]]]]]]
HOSTILE = [
    (change_of("layers", **{"class": "Lambda"}), "the layer conv is of the class 'Lambda', which is not allowed"),
    (change_of("layers", **{"class": "TFSMLayer"}), "the layer conv is of the class 'TFSMLayer', which is not"),
    (change_of("layers", **{"class": ["Conv2D"]}), "the layer conv is of the class \"['Conv2D']\", which is not"),
    (change_of("layers", module="os"), "a layer has the keys class, module, name, options, trainable; it must have"),
    (change_of("layers", name="image"), "a layer has the name 'image'; allowed are letters, digits, '_', '-' and '.'"),
    (change_of("layers", name="../conv"), "a layer has the name '../conv'; allowed are letters, digits"),
    (change_of("layers", options={"kernel_initializer": CUSTOM}), "the layer conv has the option 'kernel_initializer'"),
    (change_of("layers", options={"dtype": CUSTOM}), "the layer conv has the option 'dtype', which is not allowed"),
    (change_of("layers", options={"activation": CUSTOM}), "the layer conv has activation = \"{'module': 'os'"),
    (change_of("layers", options={"activation": "system"}), "the layer conv has activation = 'system', which is not"),
    (change_of("layers", options={"filters": 10**9}), "the layer conv has filters = '1000000000', which is"),
    (change_of("layers", options={"padding": DEEP}), "the layer conv has padding = '[[[[[[0]]]]]]', which is not"),
    (change_of("layers", options={"axis": list(range(5000))}), "the layer conv has axis = '[0, 1, 2, 3"),
    (change_of("layers", options={"scale": 1e999}), "the layer conv has scale = 'inf', which is not allowed"),
    (change_of("layers", options=[]), "the layer conv has no options, or does not say whether it is trained"),
    (change_of("calls", layer="nowhere"), "a call is of the layer 'nowhere', which is not there or not allowed"),
    (change_of("calls", operation="add"), "a call has the keys arguments, layer, named, operation; it must have"),
    (change_of("calls", arguments=[]), "the call of conv is given no tensor"),
    (change_of("calls", arguments=[{"tensor": 1}]), "the graph uses the tensor '1' before it is made"),
    (change_of("calls", arguments=[{"tensor": True}]), "the graph uses the tensor 'True' before it is made"),
    (change_of("calls", arguments=[CUSTOM]), "the call of conv has the argument \"{'module': 'os'"),
    (change_of("calls", arguments=[{"class_name": "__lambda__", "config": {}}]), "the call of conv has the argument"),
    (change_of("calls", named={"name": "x"}), "the call of conv has the argument 'name', which is not allowed"),
    (change_of("graph", calls=[]), "the graph's calls are not a list of 1 to 5,000"),
    (change_of("graph", output=9), "the graph uses the tensor '9' before it is made"),
    (change_of("graph", config={}), "the graph has the keys calls, config, layers, output; it must have calls"),
    (lambda d: d["network"]["graph"]["layers"].append(d["network"]["graph"]["layers"][0]), "two layers of the graph"),
    (lambda d: d["network"].update(takes="pickle"), "takes is 'pickle'; it must be uint8 or float32"),
    (lambda d: d["network"].update(graph=[]), "graph is '[]', not a value of its type"),
    (lambda d: d["network"].update(graph={"layers": 0}), "the graph has the keys layers; it must have calls, layers"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = keras.Sequential([keras.Input((24, 32, 3)), layers.Conv2D(3, 3, padding="same", name="conv")])
    out = tmp_path_factory.mktemp("model")
    save(model, out)
    return out


@pytest.fixture
def forged(folder):
    """The folder, to be changed; it is as it was afterwards."""
    whole = (folder / "model.json").read_bytes()
    yield folder
    (folder / "model.json").write_bytes(whole)


@pytest.mark.parametrize(("change", "problem"), HOSTILE)
def test_a_strangers_folder_names_nothing_but_what_is_allowed(forged, change, problem):
    resign(forged, change)
    with pytest.raises(ValueError) as caught:
        read_bundle(str(forged))
    assert str(caught.value).startswith(f"{forged} is altered or damaged: model.json: {problem}")
    assert "\n" not in str(caught.value)


def test_reading_loads_no_keras(folder):
    code = "import sys; from unet_ray.model.bundle import read_bundle; read_bundle(sys.argv[1])\n"
    code += "print(sorted({name.split('.')[0] for name in sys.modules} & {'keras', 'tensorflow', 'ray'}))"
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"


def append(name: str, class_name: str, **options):
    def change(document):
        graph = document["network"]["graph"]
        graph["layers"].append({"name": name, "class": class_name, "options": options, "trainable": True})
        graph["calls"].append({"layer": name, "arguments": [{"tensor": len(graph["calls"])}], "named": {}})
        graph["output"] = len(graph["calls"])

    return change


def both(document) -> None:
    append("wide", "Conv2D", filters=65536, kernel_size=24, padding="same")(document)
    append("narrow", "Conv2D", filters=3, kernel_size=24, padding="same")(document)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (both, "the weights lack narrow/bias, narrow/kernel, wide/bias and 1 more, which the network needs"),
        (
            append("wide", "UpSampling2D", size=30000),
            "UpSampling2D): ValueError: gives (None, 720000, 960000, 3) of one",
        ),
        (
            append("bad", "Conv2D", filters=-1, kernel_size=1),
            "does not make or call the layer bad (Conv2D): ValueError",
        ),
        (append("bad", "Conv2D", units=3), "does not make or call the layer bad (Conv2D): TypeError: "),
        (append("bad", "Dot"), "does not make or call the layer bad (Dot): TypeError: "),
        (
            append("bad", "Flatten"),
            "the network gives (None, 2304); it must give logits (None, height, width, classes)",
        ),
    ],
)
def test_a_network_larger_than_its_weights_or_that_keras_does_not_make_is_refused_unbuilt(forged, change, problem):
    resign(forged, change)
    bundle = read_bundle(str(forged))
    with pytest.raises(ValueError) as caught:
        bundle.build_model()
    assert problem in str(caught.value) and "\n" not in str(caught.value)
    if change is both:
        with pytest.raises(ValueError) as caught:
            bundle.require_buildable()
        assert problem in str(caught.value)


def test_shapes_are_known_without_memory(folder):
    config = read_bundle(str(folder)).model_config
    assert isinstance(config, KerasConfig)
    graph = copy.deepcopy(config.graph)
    graph["layers"][0]["options"]["filters"] = 60000
    wide = KerasConfig(image_height_px=24, image_width_px=32, n_classes=3, takes="uint8", graph=graph,
                       preprocessing=Preprocessing(std=(1, 1, 1)))  # fmt: skip
    with pytest.raises(ValueError, match="the network gives 60000 classes; the class set has 3"):
        weight_shapes(wide)

"""Networks as values: variants of the U-Net, images of any size, and functions of a user's own."""

import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from own_network import SMALL

from unet_ray.classes import ClassSet
from unet_ray.model.architecture import PythonConfig, UnetConfig
from unet_ray.model.bundle import read_bundle, save_bundle
from unet_ray.model.network_check import check_network
from unet_ray.model.networks import build_network
from unet_ray.model.weights import check_shapes, classes_layer, named_weights, weight_shapes

OPTIONS = {"n_classes": 3, "n_filters": 4, "depth": 3, "dropout": 0.3}
TINY = UnetConfig(image_height_px=24, image_width_px=32, **OPTIONS)
CLASSES = ClassSet.from_dict(
    {
        "name": "three",
        "classes": [{"name": f"class_{index}", "color": [index, 0, 0], "values": [index]} for index in range(3)],
    }
)

NETWORKS = """

def of_floats(image_size, n_classes, seed, dtype_policy):
    assert seed == 5 and dtype_policy == "mixed_bfloat16"
    image = keras.Input((*image_size, 3))
    return keras.Model(image, layers.Conv2D(n_classes, 3, padding="same")(image))


def of_half_the_size(image_size, n_classes):
    image = keras.Input((*image_size, 3), dtype="uint8")
    return keras.Model(image, layers.Conv2D(n_classes, 3, strides=2, padding="same")(layers.Rescaling(1.0)(image)))


def of_one_name(image_size, n_classes):
    image = keras.Input((*image_size, 3), dtype="uint8")
    inner = [keras.Sequential([layers.Conv2D(3, 1, name="c")], name=name) for name in ("a", "b")]
    x = inner[1](inner[0](layers.Rescaling(1.0)(image)))
    return keras.Model(image, layers.Conv2D(n_classes, 1, name="c")(x))


def that_prints(image_size, n_classes):
    print("hello")
    return small(image_size, n_classes)


def that_ends(image_size, n_classes):
    import os
    os._exit(3)


def that_fails(image_size, n_classes):
    raise RuntimeError("first\\nno luck")


def of_nothing():
    pass


def that_returns_nothing(image_size, n_classes):
    pass


a_number = 7
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch) -> str:
    """Name of a module with networks, as a user's package has it."""
    name = f"somebody_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SMALL + NETWORKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def python_config(function: str, **arguments) -> PythonConfig:
    size = {"image_height_px": 24, "image_width_px": 32, "n_classes": 3}
    return PythonConfig(**size, function=function, arguments=arguments)


def frames(height_px: int, width_px: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (2, height_px, width_px, 3), dtype=np.uint8)


@pytest.mark.parametrize("options", [{"norm": "group"}, {"residual": True}, {"norm": "group", "residual": True}])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_variants_of_the_u_net_round_trip_through_a_model_folder(tmp_path, options, policy):
    config = UnetConfig(image_height_px=24, image_width_px=32, **(OPTIONS | {"dropout": 0.0}), **options)
    model = build_network(config, seed=4)
    save_bundle(str(tmp_path), model, config, CLASSES, {})
    bundle = read_bundle(str(tmp_path))
    assert bundle.model_config == config and bundle.weights.keys() == weight_shapes(config).keys()
    plain = weight_shapes(UnetConfig(image_height_px=24, image_width_px=32, **OPTIONS)).keys()
    assert any("group_normalization/gamma" in name for name in bundle.weights) == (config.norm == "group")
    assert len(bundle.weights) > len(plain)
    logits = bundle.build_model(dtype_policy=policy)(frames(24, 32))
    assert logits.dtype == "float32"
    reference = bundle.build_model(dtype_policy=policy)(frames(24, 32))
    np.testing.assert_array_equal(logits, reference)
    if policy == "float32":
        np.testing.assert_array_equal(logits, model(frames(24, 32)))


@pytest.mark.parametrize("options", [{}, {"norm": "group", "residual": True}])
def test_an_image_of_any_size_is_padded_with_black_and_its_logits_are_cropped(options):
    config = UnetConfig(image_height_px=21, image_width_px=30, **OPTIONS, **options)
    model = build_network(config, seed=3)
    whole = build_network(config.sized((24, 32)), seed=3)
    images = frames(21, 30)
    padded = np.pad(images, ((0, 0), (0, 3), (0, 2), (0, 0)))
    np.testing.assert_array_equal(model(images), whole(padded)[:, :21, :30])
    assert list(named_weights(model)) == list(named_weights(whole))
    assert model.input_shape == (None, 21, 30, 3) and model.output_shape == (None, 21, 30, 3)
    assert build_network(config.sized((1, 1)))(frames(1, 1)).shape == (2, 1, 1, 3)


@pytest.mark.parametrize("size", [(360, 480), (1080, 1920)])
def test_the_sizes_of_cameras_are_taken(size):
    with tf.Graph().as_default():  # so that it takes no memory
        model = build_network(UnetConfig(n_classes=3).sized(size))
    assert model.input_shape == (None, *size, 3) and model.output_shape == (None, *size, 3)


def test_the_shape_of_every_weight_is_known_without_building():
    for config in (TINY, UnetConfig(image_height_px=21, image_width_px=30, **OPTIONS, norm="group", residual=True)):
        shapes = {name: tensor.shape for name, tensor in named_weights(build_network(config)).items()}
        assert weight_shapes(config) == shapes and list(weight_shapes(config)) == list(shapes)
    assert classes_layer(build_network(TINY)) == ["conv2d_11/kernel", "conv2d_11/bias"]


def test_a_network_of_a_users_own_is_the_same_in_every_process_and_after_any_other(user_module, tmp_path):
    config = python_config(f"{user_module}:small", width=4)
    model = build_network(config, seed=9)
    keras.Sequential([keras.layers.Conv2D(2, 1), keras.layers.Conv2D(2, 1)])
    again = build_network(config, seed=9)
    assert list(named_weights(model)) == list(named_weights(again))
    assert "batch_normalization_1/moving_variance" in named_weights(model)
    for tensor, other in zip(named_weights(model).values(), named_weights(again).values(), strict=True):
        np.testing.assert_array_equal(tensor, other)
    assert model.output_shape == (None, 24, 32, 3)
    save_bundle(str(tmp_path / "model"), model, config, CLASSES, {})
    with pytest.raises(ValueError) as caught:
        read_bundle(str(tmp_path / "model"))
    assert str(caught.value) == (
        f"{tmp_path}/model is a network that the function {user_module}:small builds; if you trust it, give "
        f"--allow-network {user_module}:small"
    )
    with pytest.raises(ValueError, match=f"builds, not {user_module}:other; if you trust it"):
        read_bundle(str(tmp_path / "model"), allow_network=f"{user_module}:other")
    bundle = read_bundle(str(tmp_path / "model"), allow_network=f"{user_module}:small")
    assert bundle.model_config == config
    np.testing.assert_array_equal(bundle.build_model()(frames(24, 32)), model(frames(24, 32)))
    bundle.require_buildable()


def test_a_model_folder_alone_causes_no_import(user_module, tmp_path):
    config = python_config(f"{user_module}:small")
    save_bundle(str(tmp_path / "model"), build_network(config), config, CLASSES, {})
    sys.modules.pop(user_module)
    with pytest.raises(ValueError, match="if you trust it"):
        read_bundle(str(tmp_path / "model"))
    read_bundle(str(tmp_path / "model"), allow_network=config.function).require_buildable()
    assert user_module not in sys.modules


def test_logits_are_float32_and_images_uint8_whatever_the_function_says(user_module):
    model = build_network(python_config(f"{user_module}:of_floats"), seed=5, dtype_policy="mixed_bfloat16")
    assert (model.input.dtype, model.output.dtype) == ("uint8", "float32")
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("missing", "the network {module}:missing is not there: {module} has no missing"),
        ("a_number", "the network {module}:a_number is a int; it must be a function"),
        ("that_fails", "{module}:that_fails failed: RuntimeError: no luck"),
        ("of_nothing", "{module}:of_nothing failed: TypeError: "),
        ("that_returns_nothing", "{module}:that_returns_nothing returned a NoneType; it must return a keras.Model"),
        (
            "of_half_the_size",
            "{module}:of_half_the_size returned a network from (None, 24, 32, 3) to (None, 12, 16, 3); for "
            "--image-size 24 32 it must be from (None, 24, 32, 3) to (None, 24, 32, 3)",
        ),
    ],
)
def test_a_function_that_gives_no_network_is_one_line(user_module, function, problem):
    with pytest.raises(ValueError) as caught:
        build_network(python_config(f"{user_module}:{function}"))
    assert str(caught.value).startswith(problem.format(module=user_module)) and "\n" not in str(caught.value)


def test_a_function_is_tried_in_a_process_of_its_own(user_module):
    check_network(python_config(f"{user_module}:that_prints"))
    with pytest.raises(ValueError, match=f"{user_module}:that_ends ended its process with exit code 3: without a word"):
        check_network(python_config(f"{user_module}:that_ends"))
    with pytest.raises(ValueError, match=f"{user_module}:that_fails failed: RuntimeError: no"):
        check_network(python_config(f"{user_module}:that_fails"))


def test_a_function_that_is_not_installed_or_takes_no_such_argument(user_module):
    with pytest.raises(ValueError, match="the network nowhere.at_all:net cannot be imported here: No module named"):
        build_network(python_config("nowhere.at_all:net"))
    with pytest.raises(ValueError, match=r"small failed: TypeError: .* unexpected keyword argument 'depth'"):
        build_network(python_config(f"{user_module}:small", depth=3))


def test_weights_that_are_not_the_functions_are_named(user_module):
    config = python_config(f"{user_module}:small")
    shapes = {name: tensor.shape for name, tensor in named_weights(build_network(config)).items()}
    with pytest.raises(ValueError, match=r"the weight conv2d/kernel has shape \(1, 2\), the network needs \(3, 3, 3"):
        check_network(config, weights=shapes | {"conv2d/kernel": (1, 2)})
    with pytest.raises(ValueError, match="the weights hold another, which the network does not have"):
        check_shapes(shapes, shapes | {"another": (1,)})


def test_two_weights_of_one_name_are_refused(user_module):
    model = build_network(python_config(f"{user_module}:of_one_name"))
    assert len(named_weights(model)) == 6  # paths tell sub-models apart


def test_the_options_of_a_function_are_plain_values(tmp_path: Path):
    assert python_config("a.b:c", width=[1, {"x": None}]).arguments == {"width": [1, {"x": None}]}
    for arguments in ({"width": {1}}, {"width": float("nan")}, {"width": (1,)}):
        with pytest.raises(ValueError, match="the arguments of a:b are not a mapping of names to values as JSON has"):
            python_config("a:b", **arguments)
    for function in ("os", "a.b", "a:b:c", "a.:b", ":b", "a: b", "a:b()"):
        with pytest.raises(ValueError, match="it must be package.module:function"):
            python_config(function)

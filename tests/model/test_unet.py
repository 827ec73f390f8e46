"""The network against the notebook's layer table, and the promises of its inputs, outputs, names and seeds."""

import hashlib
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from unet_ray.model.architecture import UnetConfig
from unet_ray.model.unet import build_unet
from unet_ray.model.weights import check_weight_shapes, named_weights, set_named_weights, weight_shapes

TINY = UnetConfig(image_height_px=24, image_width_px=32, n_classes=5, n_filters=4, depth=3, dropout=0.3)

# The notebook's own summary: name, output (height, width, channels), parameters.
NOTEBOOK_LAYERS = """
conv2d 96 128 32 896
conv2d_1 96 128 32 9248
max_pooling2d 48 64 32 0
conv2d_2 48 64 64 18496
conv2d_3 48 64 64 36928
max_pooling2d_1 24 32 64 0
conv2d_4 24 32 128 73856
conv2d_5 24 32 128 147584
max_pooling2d_2 12 16 128 0
conv2d_6 12 16 256 295168
conv2d_7 12 16 256 590080
dropout 12 16 256 0
max_pooling2d_3 6 8 256 0
conv2d_8 6 8 512 1180160
conv2d_9 6 8 512 2359808
dropout_1 6 8 512 0
conv2d_transpose 12 16 256 1179904
concatenate 12 16 512 0
conv2d_10 12 16 256 1179904
conv2d_11 12 16 256 590080
conv2d_transpose_1 24 32 128 295040
concatenate_1 24 32 256 0
conv2d_12 24 32 128 295040
conv2d_13 24 32 128 147584
conv2d_transpose_2 48 64 64 73792
concatenate_2 48 64 128 0
conv2d_14 48 64 64 73792
conv2d_15 48 64 64 36928
conv2d_transpose_3 96 128 32 18464
concatenate_3 96 128 64 0
conv2d_16 96 128 32 18464
conv2d_17 96 128 32 9248
conv2d_18 96 128 32 9248
conv2d_19 96 128 23 759
"""


def frames(config: UnetConfig, count: int = 2) -> np.ndarray:
    shape = (count, config.image_height_px, config.image_width_px, 3)
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def notebook_unet() -> keras.Model:
    return build_unet(UnetConfig(), seed=0)


def test_layers_are_the_notebooks_one_by_one(notebook_unet):
    expected = {}
    for line in NOTEBOOK_LAYERS.split("\n")[1:-1]:
        name, *numbers = line.split()
        expected[name] = tuple(map(int, numbers))
    built = {
        layer.name: (*layer.output.shape[1:], layer.count_params())
        for layer in notebook_unet.layers
        if layer.name not in ("image", "rescaling")
    }
    assert built == expected
    assert notebook_unet.count_params() == 8_640_471
    assert len(notebook_unet.trainable_variables) == 48


def test_layers_are_wired_as_in_the_notebook(notebook_unet):
    def inputs(name: str) -> list[str]:
        tensors = notebook_unet.get_layer(name).input
        return [t._keras_history.operation.name for t in (tensors if isinstance(tensors, list) else [tensors])]

    assert inputs("concatenate") == ["conv2d_transpose", "dropout"]
    assert inputs("concatenate_1") == ["conv2d_transpose_1", "conv2d_5"]
    assert inputs("concatenate_3") == ["conv2d_transpose_3", "conv2d_1"]
    assert inputs("max_pooling2d_3") == ["dropout"]
    assert inputs("conv2d_transpose") == ["dropout_1"]
    for layer in notebook_unet.layers:
        if isinstance(layer, keras.layers.Conv2D):
            last = layer.name == "conv2d_19"
            assert layer.activation.__name__ == ("linear" if last else "relu")
            assert type(layer.kernel_initializer).__name__ == ("GlorotUniform" if last else "HeNormal")
            assert layer.padding == "same"
        if isinstance(layer, keras.layers.Conv2DTranspose):
            assert layer.activation.__name__ == "linear"
            assert (layer.kernel_size, layer.strides, layer.padding) == ((3, 3), (2, 2), "same")


@pytest.mark.parametrize(
    "config",
    [
        UnetConfig(),
        TINY,
        UnetConfig(image_height_px=6, image_width_px=10, n_classes=1, n_filters=3, depth=2, dropout=0.0),
        UnetConfig(image_height_px=32, image_width_px=48, n_classes=254, n_filters=1, depth=4),
    ],
)
def test_weight_shapes_are_those_of_the_built_network(config):
    built = named_weights(build_unet(config))
    assert weight_shapes(config) == {name: tensor.shape for name, tensor in built.items()}
    assert list(weight_shapes(config)) == list(built)


def test_names_do_not_depend_on_what_was_built_before():
    assert [layer.name for layer in build_unet(TINY).layers] == [layer.name for layer in build_unet(TINY).layers]


def test_rescaling_is_inside_and_frames_may_have_any_dtype():
    model, image_BHWC = build_unet(TINY, seed=3), frames(TINY)
    logits_BHWK = model(image_BHWC).numpy()
    assert logits_BHWK.shape == (2, 24, 32, 5) and logits_BHWK.dtype == np.float32
    np.testing.assert_array_equal(logits_BHWK, model(image_BHWC.astype(np.float32)).numpy())
    np.testing.assert_array_equal(logits_BHWK, model(image_BHWC.astype(np.int64)).numpy())
    after_rescaling = keras.Model(model.input, model.get_layer("rescaling").output)
    np.testing.assert_allclose(after_rescaling(image_BHWC).numpy(), image_BHWC / 255, rtol=0, atol=1e-7)


def test_logits_weights_and_rescaling_stay_float32_under_mixed_bfloat16():
    image_BHWC = frames(TINY)
    mixed = build_unet(TINY, seed=3, dtype_policy="mixed_bfloat16")
    logits_BHWK = mixed(image_BHWC).numpy()
    assert logits_BHWK.dtype == np.float32
    assert {tensor.dtype for tensor in named_weights(mixed).values()} == {np.dtype(np.float32)}
    assert mixed.get_layer("rescaling").compute_dtype == "float32"
    assert mixed.get_layer("conv2d").compute_dtype == "bfloat16"
    exact_BHWK = build_unet(TINY, seed=3, dtype_policy="float32")(image_BHWC).numpy()
    np.testing.assert_allclose(logits_BHWK, exact_BHWK, atol=0.03)
    assert np.abs(logits_BHWK - exact_BHWK).max() > 0


def test_the_global_dtype_policy_is_the_default():
    before = keras.config.dtype_policy().name
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        model = build_unet(TINY)
    finally:
        keras.config.set_dtype_policy(before)
    assert model.get_layer("conv2d").compute_dtype == "bfloat16"
    assert model.output.dtype == "float32"


def test_a_seed_decides_the_weights_and_dropout_does_not_shift_them():
    weights = named_weights(build_unet(TINY, seed=11))
    without_dropout = UnetConfig(image_height_px=24, image_width_px=32, n_classes=5, n_filters=4, depth=3, dropout=0.0)
    for same in (build_unet(TINY, seed=11), build_unet(without_dropout, seed=11)):
        for name, tensor in named_weights(same).items():
            np.testing.assert_array_equal(tensor, weights[name])
    for other in (build_unet(TINY, seed=12), build_unet(TINY)):
        assert not np.array_equal(named_weights(other)["conv2d/kernel"], weights["conv2d/kernel"])
    kernels = [t.ravel()[:50].tobytes() for name, t in weights.items() if name.endswith("kernel")]
    assert len(set(kernels)) == len(kernels)


def test_another_process_draws_the_same_weights():
    code = (
        "import hashlib; from unet_ray.model.architecture import UnetConfig; "
        "from unet_ray.model.unet import build_unet; from unet_ray.model.weights import named_weights\n"
        "config = UnetConfig(image_height_px=24, image_width_px=32, n_classes=5, n_filters=4, depth=3)\n"
        "weights = named_weights(build_unet(config, seed=11))\n"
        "print(hashlib.sha256(b''.join(t.tobytes() for t in weights.values())).hexdigest())"
    )
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    weights = named_weights(build_unet(TINY, seed=11))
    assert done.stdout.strip() == hashlib.sha256(b"".join(t.tobytes() for t in weights.values())).hexdigest()


def test_dropout_acts_in_training_only_and_zero_leaves_it_out():
    image_BHWC = frames(TINY)
    model = build_unet(TINY, seed=5)
    np.testing.assert_array_equal(model(image_BHWC).numpy(), model(image_BHWC, training=False).numpy())
    assert not np.array_equal(model(image_BHWC, training=True).numpy(), model(image_BHWC, training=True).numpy())
    plain = build_unet(UnetConfig(image_height_px=24, image_width_px=32, n_filters=4, depth=3, dropout=0), seed=5)
    assert len(plain.variables) == len(plain.trainable_variables)
    np.testing.assert_array_equal(plain(image_BHWC, training=True).numpy(), plain(image_BHWC).numpy())


def test_named_weights_are_copies_and_go_back():
    model, other = build_unet(TINY, seed=1), build_unet(TINY, seed=2)
    weights = named_weights(model)
    set_named_weights(other, weights)
    np.testing.assert_array_equal(other(frames(TINY)).numpy(), model(frames(TINY)).numpy())
    weights["conv2d/kernel"][:] = 0
    assert named_weights(model)["conv2d/kernel"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": None}, "the weights lack a, which the network needs"),
        ({"c": (1,)}, "the weights hold c, which the network does not have"),
        ({"b": (3, 2)}, "the weight b has shape (3, 2), the network needs (2, 3)"),
        ({"c1": (1,), "c2": (1,), "c3": (1,), "c4": (1,)}, "the weights hold c1, c2, c3 and 1 more, which the network"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    expected = {"a": (4,), "b": (2, 3)}
    shapes = {name: shape for name, shape in {**expected, **change}.items() if shape is not None}
    with pytest.raises(ValueError) as caught:
        check_weight_shapes(expected, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    assert str(caught.value).startswith(message)

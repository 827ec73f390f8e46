"""`unet_convnext`: Keras' own ConvNeXtTiny as encoder, with names, seeds and arithmetic of its own accord."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import small_convnext
import tensorflow as tf

from unet_ray.model.architecture import ENCODER_PREFIX, ConvnextConfig
from unet_ray.model.bundle import read_bundle, save_bundle
from unet_ray.model.convnext import build_encoder, template
from unet_ray.model.export import export_model
from unet_ray.model.networks import build_network
from unet_ray.model.weights import classes_layer, named_variables, named_weights, weight_shapes
from unet_ray.pixels.preprocessing import normalized
from unet_ray.training.exactness import require_trainable_exactly
from unet_ray.training.optimizer import make_optimizer
from unet_ray.training.variables import NetworkVariables

TINY = ConvnextConfig(image_height_px=32, image_width_px=32, n_classes=3, n_filters=4)
FRAME = np.random.default_rng(7).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return build_network(TINY, seed=4)


def test_names_and_shapes_depend_on_the_configuration_alone(model):
    keras.Sequential([keras.layers.Conv2D(2, 1), keras.layers.LayerNormalization()]).build((None, 4, 4, 3))
    shapes = weight_shapes(ConvnextConfig(image_height_px=70, image_width_px=41, n_classes=3, n_filters=4, drop_path=0))
    assert list(shapes.items()) == [(name, tuple(v.shape)) for name, v in named_variables(model).items()]
    assert not [name for name in shapes if not name.startswith((ENCODER_PREFIX, "decoder_", "classes/"))]
    assert classes_layer(model) == ["classes/kernel", "classes/bias"]
    assert shapes[f"{ENCODER_PREFIX}stage_3_block_2_layer_scale/gamma"] == (768,)
    assert shapes[f"{ENCODER_PREFIX}layernorm/beta"] == (768,)
    sizes = [int(np.prod(shape)) for name, shape in shapes.items() if name.startswith(ENCODER_PREFIX)]
    assert (len(sizes), sum(sizes)) == (180, 27_820_128)


def test_the_seed_draws_the_weights_under_every_policy(model):
    assert keras.config.dtype_policy().name == "float32"
    again = build_network(TINY, seed=4, dtype_policy="mixed_bfloat16")
    same = named_weights(again)
    assert keras.config.dtype_policy().name == "float32"
    other = named_weights(build_network(TINY, seed=5))
    for name, tensor in named_weights(model).items():
        np.testing.assert_array_equal(tensor, same[name], err_msg=name)
        assert np.array_equal(tensor, other[name]) == (not name.endswith("kernel")), name
    assert again(FRAME).dtype == model(FRAME).dtype == "float32" and again(FRAME).shape == (2, 32, 32, 3)
    wide = {layer.name for layer in again.layers if layer.compute_dtype == "float32"}
    first = {f"{ENCODER_PREFIX}prestem_normalization_{part}" for part in ("mean", "std")}
    assert wide == {"image", "classes", "logits"} | first
    np.testing.assert_allclose(again(FRAME), model(FRAME), atol=0.1)


def test_a_model_folder_gives_the_same_logits(model, tmp_path):
    save_bundle(str(tmp_path), model, TINY, small_convnext.CLASSES, {})
    bundle = read_bundle(str(tmp_path))
    assert bundle.model_config == TINY
    np.testing.assert_array_equal(bundle.build_model()(FRAME), model(FRAME))


def test_the_frame_is_normalized_as_the_model_folder_says(model):
    image = keras.Model(model.input, model.get_layer(f"{ENCODER_PREFIX}prestem_normalization_std").output)
    np.testing.assert_array_equal(image(FRAME), normalized(FRAME, TINY.preprocessing))


def test_workers_share_a_batch_as_one_has_it(model):
    require_trainable_exactly(model)
    variables = NetworkVariables.of(model)
    assert not variables.state and len(variables.seeds) == 17  # of 18 blocks, the first is never dropped
    whole, alone = model(FRAME), model(FRAME[:1])
    np.testing.assert_allclose(whole[:1], alone, atol=1e-5)


def test_a_block_is_dropped_for_a_whole_frame():
    encoder = small_convnext.encoder(drop_path=0.5)
    drops = {layer.name: layer.rate for layer in encoder.layers if isinstance(layer, keras.layers.Dropout)}
    assert list(drops.values()) == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert next(iter(drops)) == f"{ENCODER_PREFIX}stage_1_block_0_stochastic_depth"
    last = encoder.get_layer(f"{ENCODER_PREFIX}stage_3_block_0_stochastic_depth")
    kept_BHWC = last(tf.ones([64, 2, 3, 4]), training=True).numpy()
    assert {tuple(np.unique(frame)) for frame in kept_BHWC} == {(0.0,), (2.0,)}
    np.testing.assert_array_equal(last(tf.ones([8, 2, 3, 4])), np.ones([8, 2, 3, 4]))


def test_the_encoder_learns_slowly_and_layer_scale_does_not_decay():
    encoder = small_convnext.encoder()
    x = keras.layers.Conv2D(3, 1, name="decoder")(encoder.output)
    network = keras.Model(encoder.input, x)
    optimizer = make_optimizer("adamw", 0.1, 0.5, {ENCODER_PREFIX: 0.1})
    optimizer.build(network.trainable_variables)
    before = named_weights(network)
    optimizer.apply([tf.zeros(variable.shape) for variable in network.trainable_variables])
    for name, tensor in named_weights(network).items():
        decay = 0.0 if tensor.ndim == 1 else 0.05 if name.startswith("decoder/") else 0.005
        np.testing.assert_allclose(tensor, before[name] * (1 - decay), rtol=1e-6, err_msg=name)
    optimizer.apply([tf.ones(variable.shape) for variable in network.trainable_variables])
    moved = {name: np.abs(tensor - before[name]).max() for name, tensor in named_weights(network).items()}
    assert moved["decoder/bias"] > 5 * moved[f"{ENCODER_PREFIX}stage_0_block_0_layer_scale/gamma"] > 0


@pytest.mark.weekly
@pytest.mark.timeout(600)
def test_an_exported_network_gives_the_same_logits(model, tmp_path):
    """TensorFlow's GELU and Keras' normalisation have no form in ONNX of themselves."""
    onnxruntime = pytest.importorskip("onnxruntime")
    save_bundle(str(tmp_path / "model"), model, TINY, small_convnext.CLASSES, {})
    path = export_model(str(tmp_path / "model"), str(tmp_path / "convnext.onnx"), "onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["image"]
    np.testing.assert_allclose(session.run(None, {"image": FRAME})[0], model(FRAME), atol=1e-4)


@pytest.mark.slow
def test_the_encoder_computes_what_keras_computes():
    """Builds Keras' ConvNeXtTiny of 28 million weights."""
    keras_model = keras.applications.ConvNeXtTiny(include_top=False, weights=None, input_shape=(32, 64, 3))
    encoder = build_encoder(keras.Input((32, 64, 3), dtype="uint8"))
    rng = np.random.default_rng(0)
    for variable, own in zip(keras_model.weights, encoder.weights, strict=True):
        value = rng.normal(0, 0.1, variable.shape).astype(np.float32)
        variable.assign(value)
        own.assign(value.reshape(own.shape))
    frame = rng.integers(0, 256, (1, 32, 64, 3), np.uint8)
    np.testing.assert_allclose(encoder(frame), keras_model(frame.astype(np.float32)), rtol=1e-4, atol=1e-4)
    assert [layer.name for layer in template().layers[:2]] == ["image", f"{ENCODER_PREFIX}prestem_normalization"]

"""Pretrained weights of an encoder: two kinds of files are read, and all that does not fit is named in one line."""

from __future__ import annotations

from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import small_convnext

from unet_ray import storage
from unet_ray.model.encoder_files import Encoder, read_encoder_file
from unet_ray.model.encoder_weights import MAX_FILE_BYTES, read_encoder_weights

DENSE = "convnext_tiny_stage_1_block_0_pointwise_conv_1"


@pytest.fixture(scope="module")
def keras_model() -> keras.Model:
    model = small_convnext.keras_model()
    rng = np.random.default_rng(3)
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape))
    return model


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(small_convnext.keras_model(), small_convnext.encoder(drop_path=0.3))


def weights_file(model: keras.Model, folder: Path) -> Path:
    """As Keras 3 writes weights."""
    model.save_weights(folder / "convnext.weights.h5")
    return folder / "convnext.weights.h5"


def legacy_file(model: keras.Model, folder: Path) -> Path:
    """As `keras.applications` publishes them: the part of weights of a whole model as Keras 2 wrote one."""
    model.save(folder / "whole.h5")
    with h5py.File(folder / "whole.h5") as whole, h5py.File(folder / "convnext.h5", "w") as file:
        for name in whole["model_weights"]:
            whole.copy(f"model_weights/{name}", file)
        for name, value in whole["model_weights"].attrs.items():
            file.attrs[name] = value
    return folder / "convnext.h5"


# Keras 3.15 writes TensorFlow's variables by `np.array`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
KINDS = pytest.mark.parametrize("written", [weights_file, legacy_file])


@KINDS
def test_every_tensor_has_its_weight(keras_model, encoder, written, tmp_path):
    tensors = read_encoder_file(str(written(keras_model, tmp_path)), encoder)
    own = small_convnext.encoder()
    assert list(tensors) == [variable.path for variable in own.weights]
    for variable in own.weights:
        variable.assign(tensors[variable.path])
    frame = np.random.default_rng(0).uniform(0, 255, (1, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(own(frame), keras_model(frame), rtol=1e-4, atol=1e-5)


def refusal(path: Path, encoder: Encoder) -> str:
    with pytest.raises(ValueError) as caught:
        read_encoder_file(str(path), encoder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tensor_that_is_missing_left_over_or_of_another_shape_is_named(keras_model, encoder, tmp_path):
    path = weights_file(keras_model, tmp_path)
    with h5py.File(path, "a") as file:
        kernel = file["layers/dense_2/vars/0"][()]
        del file["layers/dense_2/vars/0"]
    assert refusal(path, encoder) == f"it has no tensor for {DENSE}/kernel"
    with h5py.File(path, "a") as file:
        file["layers/dense_2/vars/0"] = kernel[:-1]
    assert refusal(path, encoder) == (
        f"its tensor layers/dense_2/vars/0 has the shape (7, 32), but {DENSE}/kernel has (8, 32)"
    )
    with h5py.File(path, "a") as file:
        file["layers/dense_10/vars/0"] = file["layers/dense_10/vars/1"] = kernel
    assert refusal(path, encoder) == (
        "its tensor layers/dense_10/vars/0 (and 1 more) belongs to no layer of the encoder"
    )


def test_the_same_of_a_file_that_lists_its_layers(keras_model, encoder, tmp_path):
    path = legacy_file(keras_model, tmp_path)
    with h5py.File(path, "a") as file:
        weights = list(file[DENSE].attrs["weight_names"])
        stored = file[f"{DENSE}/{weights[0].decode() if isinstance(weights[0], bytes) else weights[0]}"]
        name, kernel = stored.name.removeprefix("/"), stored[()]
        del file[name]
    assert refusal(path, encoder) == f"it lists the tensor {name}, which is not in it"
    with h5py.File(path, "a") as file:
        file[name] = kernel.T
    assert refusal(path, encoder) == f"its tensor {name} has the shape (32, 8), but {DENSE}/kernel has (8, 32)"
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = kernel
        file["head/kernel"] = kernel
    assert refusal(path, encoder) == "its tensor head/kernel belongs to no layer of the encoder"
    with h5py.File(path, "a") as file:
        del file["head"]
        file.attrs["layer_names"] = [each for each in file.attrs["layer_names"] if DENSE not in str(each)]
    assert refusal(path, encoder) == f"it has no tensor for {DENSE}/kernel (and 1 more)"


@KINDS
@pytest.mark.parametrize("shape", [{"depths": (1, 1, 1, 1)}, {"depths": (1, 1, 3, 1)}, {"filters": (4, 8, 8, 16)}])
def test_another_convnext_is_refused(encoder, written, shape, tmp_path):
    line = refusal(written(small_convnext.keras_model(**shape), tmp_path), encoder)
    assert line.startswith(("it has no tensor for convnext_tiny_stage_", "its tensor "))


def test_what_is_no_weight_is_refused(keras_model, encoder, tmp_path):
    path = weights_file(keras_model, tmp_path)
    (tmp_path / "text.h5").write_text("weights")
    assert refusal(tmp_path / "text.h5", encoder) == "it is no HDF5 file, or a damaged one"
    with h5py.File(path, "a") as file:
        file["layers/dense_2/vars/1"][3] = np.nan
    assert refusal(path, encoder) == (
        f"its tensor layers/dense_2/vars/1, for {DENSE}/bias, holds values that are not finite"
    )
    with h5py.File(path, "a") as file:
        del file["layers/dense_2/vars/1"]
        file["layers/dense_2/vars/1"] = np.zeros(32, np.int32)
    assert refusal(path, encoder) == "its tensor layers/dense_2/vars/1 is of the type int32; weights are floats"


def test_a_file_leads_to_no_other_file(keras_model, encoder, tmp_path):
    path = weights_file(keras_model, tmp_path)
    (tmp_path / "other.bin").write_bytes(np.ones(32, np.float32).tobytes())
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["bias"] = np.ones(32, np.float32)
    with h5py.File(path, "a") as file:
        del file["layers/dense_2/vars/1"]
        file["layers/dense_2/vars/1"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "bias")
    assert refusal(path, encoder) == f"it has no tensor for {DENSE}/bias"
    outside = [(str(tmp_path / "other.bin"), 0, 128)]
    with h5py.File(path, "a") as file:
        del file["layers/dense_2/vars/1"]
        file["layers/dense_2/vars"].create_dataset("1", (32,), np.float32, external=outside)
    assert refusal(path, encoder) == "its tensor layers/dense_2/vars/1 lies in another file"


def test_a_file_that_is_not_there_or_too_large_is_one_line(tmp_path):
    missing, large = tmp_path / "missing.h5", tmp_path / "large.h5"
    with pytest.raises(ValueError) as caught:
        read_encoder_weights(str(missing))
    assert str(caught.value) == f"--encoder-weights {missing} does not exist"
    with pytest.raises(ValueError) as caught:
        read_encoder_weights(str(tmp_path))
    assert str(caught.value) == f"--encoder-weights {tmp_path} is no file; give one file of weights"
    with large.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError) as caught:
        read_encoder_weights(str(large))
    assert str(caught.value) == (
        f"--encoder-weights {large} has 1,000,000,001 bytes; at most 1,000,000,000 are read, and a ConvNeXtTiny has "
        "111,000,000"
    )


def test_a_child_process_reads_it(keras_model, tmp_path):
    path = weights_file(keras_model, tmp_path)
    with pytest.raises(ValueError) as caught:
        read_encoder_weights(str(path))
    assert str(caught.value) == (
        f"--encoder-weights {path} cannot be used: it has no tensor for "
        "convnext_tiny_stage_1_block_2_depthwise_conv/kernel (and 116 more); give the file of a "
        "keras.applications.ConvNeXtTiny(include_top=False)"
    )


@pytest.mark.slow
def test_a_whole_convnext_tiny_is_read(tmp_path):
    """Writes and reads 111 MB."""
    keras_model = keras.applications.ConvNeXtTiny(include_top=False, weights=None, input_shape=(32, 32, 3))
    path = weights_file(keras_model, tmp_path)
    tensors, digest = read_encoder_weights(str(path))
    assert digest == storage.sha256(path.read_bytes())
    for variable, tensor in zip(keras_model.weights, tensors.values(), strict=False):
        assert tensor.dtype == np.float32 and tensor.size > 0, variable.path
    np.testing.assert_array_equal(tensors["convnext_tiny_stem_conv/kernel"], keras_model.weights[0])
    np.testing.assert_array_equal(tensors["convnext_tiny_layernorm/beta"], keras_model.weights[-1])

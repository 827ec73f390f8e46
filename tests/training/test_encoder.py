"""`--encoder-weights` on real Ray: a file's weights reach the workers, and the others are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import ray
from small_training import final_weights, make_config, write_data

from unet_ray import storage
from unet_ray.model.architecture import ENCODER_PREFIX, ConvnextConfig
from unet_ray.model.bundle import read_bundle
from unet_ray.model.networks import build_network
from unet_ray.model.weights import named_weights
from unet_ray.training import job
from unet_ray.training.initial import set_initial_weights
from unet_ray.training.job import train

TINY = ConvnextConfig(image_height_px=32, image_width_px=32, n_classes=3, n_filters=4)


@pytest.fixture
def cluster():
    job.connect()
    yield
    ray.shutdown()


def test_only_the_encoders_weights_are_set():
    model = build_network(TINY, seed=1)
    drawn = named_weights(model)
    given = {name: tensor + 1 for name, tensor in drawn.items() if name.startswith(ENCODER_PREFIX)}
    set_initial_weights(model, given, drawn="decoder")
    for name, tensor in named_weights(model).items():
        np.testing.assert_array_equal(tensor, given.get(name, drawn[name]), err_msg=name)
    with pytest.raises(ValueError, match="the weights hold another, which the network does not have"):
        set_initial_weights(model, {"another": np.zeros(1)}, drawn="decoder")


@pytest.mark.weekly
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_a_run_starts_from_the_encoder_of_a_file(cluster, tmp_path, capsys):
    """A file of 111 MB and an epoch of a worker; a factor of 0 keeps the encoder as it was given."""
    write_data(tmp_path)
    weights = tmp_path / "convnext.weights.h5"
    random_convnext(weights)
    options = {"network": "unet_convnext", "depth": 5, "image_size": (32, 32), "workers": 1, "epochs": 1}
    options |= {"encoder_weights": str(weights), "encoder_learning_rate": 0.0}
    config = make_config(tmp_path, tmp_path / "run", **options)
    result = train(config)
    assert f"the run starts from the weights of {weights}; they are the encoder's" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["initial_weights"] == storage.sha256(
        weights.read_bytes()
    )
    kept = {name: tensor for name, tensor in final_weights(config.out).items() if name.startswith(ENCODER_PREFIX)}
    expected = keras.applications.ConvNeXtTiny(include_top=False, weights=None, input_shape=(32, 32, 3))
    expected.load_weights(weights)
    np.testing.assert_array_equal(kept[f"{ENCODER_PREFIX}stem_conv/kernel"], expected.weights[0])
    np.testing.assert_array_equal(kept[f"{ENCODER_PREFIX}layernorm/beta"], expected.weights[-1])
    assert read_bundle(result.model).model_config == config.model_config(3)

    random_convnext(weights)
    with pytest.raises(ValueError, match=r"holds a run that began with other data: initial_weights was .*, now "):
        train(config)


def random_convnext(path: Path) -> None:
    keras.applications.ConvNeXtTiny(include_top=False, weights=None, input_shape=(32, 32, 3)).save_weights(path)

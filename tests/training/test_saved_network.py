"""A model of `save_model` is labelled with, measured and fine-tuned: its network and weights, the data of the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import keras
import numpy as np
import pytest
import ray
import yaml
from keras import layers
from safetensors.numpy import load_file
from small_training import CLASSES, final_weights, make_config, write_data

from unet_ray import save_model
from unet_ray.config import EvaluateConfig, SegmentConfig, load_class_set
from unet_ray.labelling.job import segment
from unet_ray.model.architecture import KerasConfig
from unet_ray.model.bundle import read_bundle
from unet_ray.model.networks import build_network
from unet_ray.output.verify import verify
from unet_ray.pixels.preprocessing import Preprocessing
from unet_ray.training import job as training
from unet_ray.training.evaluation import evaluate
from unet_ray.training.initial import read_network, set_initial_weights
from unet_ray.training.job import train

UNET = {"n_filters": 32, "depth": 5}
PREPROCESSING = {"mean": [100, 90, 80], "std": [50, 60, 70], "channels": "BGR", "resize": "area"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    save_model(network(), str(root / "model"), classes=str(root / "classes.yaml"), preprocessing=PREPROCESSING)
    return root


def network(n_classes: int = 3) -> keras.Model:
    keras.utils.set_random_seed(3)
    image = keras.Input((24, 32, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="frozen", trainable=False)(image)
    x = layers.Dropout(0.1)(layers.BatchNormalization(synchronized=True, name="norm")(x))
    return keras.Model(image, layers.Conv2D(n_classes, 1, activation="softmax", name="head")(x))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_is_fine_tuned_labels_and_is_measured(data, tmp_path, capsys):
    training.connect()
    config = make_config(data, tmp_path / "run", init_from=str(data / "model"), workers=1, epochs=2, **UNET)
    train(config)
    output = capsys.readouterr().out
    pictures = "its pictures were 24x32, area, stretch, those of this run are 24x32, nearest, stretch"
    assert f"the run starts from the weights of {data / 'model'}; {pictures}\n" in output
    before, after = load_file(data / "model" / "weights.safetensors"), final_weights(config.out)
    assert before.keys() == after.keys()
    np.testing.assert_array_equal(before["frozen/kernel"], after["frozen/kernel"])
    assert all((before[name] != after[name]).any() for name in ("head/kernel", "norm/gamma", "norm/moving_mean"))
    trained = read_bundle(config.out)
    assert trained.model_config.preprocessing == Preprocessing(
        mean=(100, 90, 80), std=(50, 60, 70), channels="BGR", resize="nearest"
    )
    options = {"model": config.out, "device": "cpu", "precision": "float32"}
    results = evaluate(EvaluateConfig(**options, images=str(data / "frames"), masks=str(data / "masks")))
    assert results["val/mean_iou"] > 0.4
    segment(SegmentConfig(**options, frames=(str(data / "frames"),), out=str(tmp_path / "labels")))
    assert verify(str(tmp_path / "labels")) == []
    ray.shutdown()


def test_other_classes_give_its_last_layer_other_outputs(data, tmp_path):
    fourth = {"name": "sign", "color": [220, 220, 0], "values": [12]}
    (tmp_path / "four.yaml").write_text(yaml.safe_dump(CLASSES | {"classes": [*CLASSES["classes"], fourth]}))
    four = {"classes": str(tmp_path / "four.yaml"), "init_from": str(data / "model")}
    config = make_config(data, tmp_path / "run", **four, **UNET)
    run_network, initial = read_network(config, load_class_set(config.classes))
    assert initial is not None and initial.drawn == "classes" and isinstance(run_network, KerasConfig)
    assert run_network.n_classes == 4 and run_network.image_size == (24, 32)
    model = build_network(run_network, seed=1)
    set_initial_weights(model, initial.weights, drawn="classes")
    assert model.output_shape == (None, 24, 32, 4)
    np.testing.assert_array_equal(model.get_layer("frozen").kernel, initial.weights["frozen/kernel"])


@pytest.mark.slow
def test_options_of_another_network_and_a_last_layer_that_cannot_change_are_refused(data, tmp_path):
    config = make_config(data, tmp_path / "run", init_from=str(data / "model"), n_filters=32, depth=2)
    class_set = load_class_set(config.classes)
    with pytest.raises(ValueError) as caught:
        read_network(config, class_set)
    assert str(caught.value) == f"--init-from {data / 'model'} brings a network of its own; leave out --depth"
    config = dataclasses.replace(config, depth=5, network="some.module:network")
    with pytest.raises(ValueError, match="leave out --network"):
        read_network(config, class_set)
    saved = read_bundle(str(data / "model")).model_config
    assert isinstance(saved, KerasConfig)
    graph = saved.graph | {"calls": saved.graph["calls"][:-1]}
    graph["output"] = len(graph["calls"])
    odd = dataclasses.replace(saved, graph=graph)
    with pytest.raises(ValueError, match=r"the network's last layer \(frozen\) has not 3 outputs, so it cannot get 4"):
        odd.with_classes(4)

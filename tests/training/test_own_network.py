"""A network that a user's own installed function builds, from training on several workers to labels and exports."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import ray
from own_network import SMALL
from predicting import predict_and_compare, require_same
from small_onnx import small_network
from small_training import final_weights, last_state, make_config, write_data

from unet_ray import cli
from unet_ray.config import EvaluateConfig, ExportModelConfig, SegmentConfig, TrainConfig, load_class_set
from unet_ray.labelling.job import segment
from unet_ray.model.bundle import read_bundle
from unet_ray.model.export import export_model
from unet_ray.model.importing import import_onnx
from unet_ray.output.verify import verify
from unet_ray.training import job as training
from unet_ray.training.evaluation import evaluate
from unet_ray.training.job import train

NETWORK = """

def of_one_worker(image_size, n_classes):
    image = keras.Input((*image_size, 3), dtype="uint8")
    x = layers.BatchNormalization(name="norm")(layers.Rescaling(1 / 255)(image))
    return keras.Model(image, layers.Conv2D(n_classes, 1)(x))
"""
MODULE = "somebodys_networks"
OWN = {"network": f"{MODULE}:small", "network_arguments": {"width": 4}, "n_filters": 32, "depth": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    return root


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster whose driver has the module on its path, as if it were installed on every node."""
    folder = tmp_path_factory.mktemp("site")
    (folder / f"{MODULE}.py").write_text(SMALL + NETWORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder))
        training.connect()
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def two(cluster, data, tmp_path_factory) -> TrainConfig:
    """A training by two workers."""
    config = make_config(data, tmp_path_factory.mktemp("two") / "run", workers=2, epochs=2, **OWN)
    train(config)
    return config


@pytest.mark.weekly  # beside `test_batch_norm`
@pytest.mark.timeout(900)
def test_two_workers_learn_what_one_does(two, data, tmp_path):
    one = make_config(data, tmp_path / "one", workers=1, epochs=2, **OWN)
    train(one)
    state, of_two = last_state(one.out, 2), last_state(two.out, 2)
    assert "model/batch_normalization_1/moving_variance" in state
    for name, tensor in state.items():
        np.testing.assert_allclose(of_two[name], tensor, rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras 3.15 with numpy 2.4, in save
def test_it_trains_labels_and_exports_like_any_other(two, data, tmp_path, capsys):
    assert MODULE not in sys.modules  # the driver's process runs no code of the user's
    moved = final_weights(two.out)["batch_normalization/moving_mean"]
    assert np.abs(moved).max() > 0

    frames = str(data / "frames")
    refused = ["segment", "--model", two.out, "--frames", frames, "--out", str(tmp_path / "labels")]
    assert cli.main(refused) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("unet-ray: error: ") and f"--allow-network {MODULE}:small" in error and error.count("\n") == 1
    )
    allowed = {"model": two.out, "allow_network": f"{MODULE}:small", "device": "cpu"}
    labels = SegmentConfig(**allowed, frames=(frames,), out=str(tmp_path / "labels"), precision="float32")
    segment(labels)
    (file,) = (tmp_path / "labels" / "frames").glob("*.parquet")
    assert pq.read_table(file)["status"].to_pylist() == ["ok"] * 19

    again = evaluate(
        EvaluateConfig(
            **allowed, images=frames, masks=str(data / "masks"), precision="float32", wait_for_resources_s=60
        )
    )
    assert 0 <= again["val/mean_iou"] <= 1

    exported = ExportModelConfig(model=two.out, out=str(tmp_path / "model.keras"), allow_network=f"{MODULE}:small")
    export_model(exported.model, exported.out, exported.format, allow_network=exported.allow_network)
    assert Path(exported.out).is_file()
    assert read_bundle(two.out, allow_network=f"{MODULE}:small").model_config.network() == {
        "kind": "python",
        "function": f"{MODULE}:small",
        "arguments": {"width": 4},
    }


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["ids", "logits"])
def test_a_network_made_elsewhere_labels_and_is_measured(cluster, data, tmp_path, ending):
    class_set = load_class_set(str(data / "classes.yaml"))
    onnx.save(small_network(ending=ending), tmp_path / "net.onnx")
    import_onnx(str(tmp_path / "net.onnx"), str(tmp_path / "model"), class_set, {}, image_size=(24, 32))
    options = {"model": str(tmp_path / "model"), "device": "cpu"}
    labels = tmp_path / "labels"
    segment(SegmentConfig(**options, frames=(str(data / "frames"),), out=str(labels)))
    (file,) = (labels / "frames").glob("*.parquet")
    table = pq.read_table(file)
    assert table["status"].to_pylist() == ["ok"] * 19
    confident = 0 if ending == "ids" else 19
    assert len(table["confidence"].drop_null()) == len(table["low_margin_share"].drop_null()) == confident
    statistics = pq.read_table(labels / "class_statistics.parquet")
    assert any(value is not None for value in statistics["confidence"].to_pylist()) == (ending == "logits")
    assert verify(str(labels)) == [] and (labels / "preview.png").is_file()
    question = {"model": options["model"], "frames": str(data / "frames"), "labels": str(labels), "options": {}}
    (answer,) = predict_and_compare([question])
    require_same(answer)
    assert answer["confident"] == confident
    page = (labels / "report.html").read_text()
    assert ("This network gives class ids alone" in page) == (ending == "ids")
    results = evaluate(EvaluateConfig(**options, images=str(data / "frames"), masks=str(data / "masks")))
    assert results["val/loss"] is None and 0 <= results["val/mean_iou"] <= 1


@pytest.mark.slow
def test_what_cannot_be_trained_alike_on_any_number_of_workers_is_refused(cluster, data, tmp_path):
    options = {"network": f"{MODULE}:of_one_worker", "n_filters": 32, "depth": 5}
    with pytest.raises(ValueError, match="norm .*build it with synchronized=True") as caught:
        train(make_config(data, tmp_path / "run", **options))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="takes statistics of a whole batch, which --accumulate 2 computes in parts"):
        train(make_config(data, tmp_path / "run", workers=1, accumulate=2, **OWN))
    with pytest.raises(ValueError, match=f"the network {MODULE}:none is not there: {MODULE} has no none"):
        train(make_config(data, tmp_path / "run", **(options | {"network": f"{MODULE}:none"})))

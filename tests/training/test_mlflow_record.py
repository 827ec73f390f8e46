from __future__ import annotations

import json

import pytest

from unet_ray import storage
from unet_ray.config import TrainConfig
from unet_ray.training.mlflow_record import MlflowRecord


@pytest.fixture
def config(tmp_path, monkeypatch) -> TrainConfig:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3.17: only then is a folder a server
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "drives")
    (tmp_path / "run").mkdir()
    return TrainConfig(images="i", masks="m", classes="camvid", out=str(tmp_path / "run"), image_size=(32, 48))


def row(epoch: int) -> dict[str, float | None]:
    return {"epoch": epoch, "loss": 1 / epoch, "val/iou/car": None, "val/mean_iou": epoch / 10, "wall_time_s": 1e9}


def test_a_training_that_is_killed_stays_one_mlflow_run(config):
    from mlflow import MlflowClient

    MlflowRecord(config).log_epochs([row(1), row(2)])
    record = MlflowRecord(config)  # the same command again
    record.log_epochs([row(1), row(2), row(3)])
    storage.write_whole(storage.join(config.out, "metrics.json"), b"{}")
    record.finish()
    client = MlflowClient()
    experiment = client.get_experiment_by_name("drives")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads(storage.read_bytes(storage.join(config.out, "mlflow.json")))["run_id"]
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["image_size"] == "[32, 48]" and run.data.params["optimizer"] == "adam"
    points = client.get_metric_history(run.info.run_id, "val/mean_iou")
    assert [(point.step, point.value) for point in points] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert set(run.data.metrics) == {"loss", "val/mean_iou"}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["metrics.json"]


def test_a_server_that_fails_costs_points_and_not_the_training(config, monkeypatch, capsys):
    from mlflow.exceptions import MlflowException

    record = MlflowRecord(config)

    def fail(*_, **__):
        raise MlflowException("http://user:secret@host is down")

    monkeypatch.setattr(record._client, "log_batch", fail)
    record.log_epochs([row(1)])
    assert capsys.readouterr().out == (
        "warning: MLflow did not take a record (MlflowException); the training goes on without it\n"
    )


def test_a_training_without_a_server_is_refused_in_one_line(config, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ValueError, match=r"^--mlflow needs MLFLOW_TRACKING_URI in the environment: where the tracking"):
        MlflowRecord(config)


def test_a_server_that_lets_nobody_in_is_said_in_one_line(config, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    with pytest.raises(ValueError, match=r"^MLflow does not let us in \(The filesystem .* updates\); look at MLFLOW"):
        MlflowRecord(config)

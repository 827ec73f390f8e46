"""A training in MLflow: one MLflow run for it however often it is killed, its options, a point an epoch, its results.

The tracking server and the experiment are MLflow's own settings, `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME`.
A server that fails later costs points in its record, never the training.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from unet_ray import storage
from unet_ray.config import TrainConfig
from unet_ray.messages import say
from unet_ray.options.config_files import to_plain

MLFLOW_FILE = "mlflow.json"
"""In a run's folder: the id of its MLflow run."""

_ARTIFACTS = ("config.yaml", "run.json", "history.csv", "metrics.json", "curves.png", "samples.png", "confusion.png")
_NO_METRICS = ("epoch", "wall_time_s")


class MlflowRecord:
    """The MLflow run of one training."""

    def __init__(self, config: TrainConfig):
        """Finds the MLflow run of the folder `config.out`, or begins it.

        Raises:
            ValueError: MLflow is not installed, is told no tracking server, or cannot reach it.
        """
        try:
            import mlflow
        except ImportError as error:
            raise ValueError("--mlflow needs MLflow: pip install 'unet-ray[mlflow]'") from error
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ValueError("--mlflow needs MLFLOW_TRACKING_URI in the environment: where the tracking server is")
        self._mlflow, self._out = mlflow, config.out
        try:
            self._client = mlflow.MlflowClient()
            self._run_id = self._find() or self._begin(config)
            points = self._client.get_metric_history(self._run_id, "loss")
        except mlflow.MlflowException as error:
            raise ValueError(
                f"MLflow does not let us in ({_reason(error)}); look at MLFLOW_TRACKING_URI and its credentials"
            ) from error
        self._last_epoch = max((point.step for point in points), default=0)

    def _find(self) -> str | None:
        try:
            return json.loads(storage.read_bytes(storage.join(self._out, MLFLOW_FILE)))["run_id"]
        except FileNotFoundError:
            return None

    def _begin(self, config: TrainConfig) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "unet-ray")
        existing = self._client.get_experiment_by_name(name)
        experiment = existing.experiment_id if existing else self._client.create_experiment(name)
        run_id = self._client.create_run(experiment, run_name=storage.name(config.out)).info.run_id
        for key, value in to_plain(config).items():
            self._client.log_param(run_id, key, value)
        storage.write_whole(storage.join(config.out, MLFLOW_FILE), json.dumps({"run_id": run_id}).encode())
        return run_id

    def log_epochs(self, history: Sequence[dict[str, Any]]) -> None:
        """Adds the epochs that are not in the record yet."""
        new = [row for row in history if row["epoch"] > self._last_epoch]
        for row in new:
            self._last_epoch = row["epoch"]
            self._try(partial(self._client.log_batch, self._run_id, metrics=self._points(row)))

    def _points(self, row: dict[str, Any]) -> list[Any]:
        at_ms = int(row["wall_time_s"] * 1000)
        return [
            self._mlflow.entities.Metric(key, float(value), at_ms, row["epoch"])
            for key, value in row.items()
            if value is not None and key not in _NO_METRICS
        ]

    def finish(self) -> None:
        """Adds the run's results as artifacts, and says that it ended well."""

        def add() -> None:
            with tempfile.TemporaryDirectory() as folder:
                for name in _ARTIFACTS:
                    if storage.exists(uri := storage.join(self._out, name)):
                        with open(os.path.join(folder, name), "wb") as file:
                            file.write(storage.read_bytes(uri))
                self._client.log_artifacts(self._run_id, folder)
            self._client.set_terminated(self._run_id)

        self._try(add)

    def _try(self, log: Callable[[], object]) -> None:
        try:
            log()
        except self._mlflow.MlflowException as error:
            say(f"warning: MLflow did not take a record ({_reason(error)}); the training goes on without it")


def _reason(error: Exception) -> str:
    """The first sentence of a message, unless it may hold an address with a password."""
    message = str(error).partition(". ")[0].strip()
    return type(error).__name__ if "@" in message else " ".join(message.split())

"""Numbers of a job for the cluster's Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Self

from ray.util.metrics import Gauge

GAUGES_EVERY_S = 5.0
"""Ray 2.60 forgets a gauge 20 s after it was set (twice its `metrics_report_interval_ms`)."""


class Gauges:
    """Numbers of a job that the cluster's Prometheus sees while the block runs, be they set once or often.

    Ray's agent on each node exports them, as `ray_<prefix>_<name>`.
    """

    def __init__(self, prefix: str, descriptions: Mapping[str, str], *, every_s: float = GAUGES_EVERY_S) -> None:
        self._gauges = {name: Gauge(f"{prefix}_{name}", text) for name, text in descriptions.items()}
        self._values: dict[str, float] = {}
        self._every_s = every_s
        self._over = threading.Event()
        self._repeating = threading.Thread(target=self._repeat, daemon=True)

    def set(self, name: str, value: float) -> None:
        """Sets one of the numbers."""
        self._values[name] = value
        self._gauges[name].set(value)

    def _repeat(self) -> None:
        while not self._over.wait(self._every_s):
            for name, value in list(self._values.items()):
                self._gauges[name].set(value)

    def __enter__(self) -> Self:
        self._repeating.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._repeating.join()

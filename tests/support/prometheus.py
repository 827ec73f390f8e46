"""What Prometheus would read of this node: the metrics that Ray's agent exports."""

from __future__ import annotations

import itertools
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.util.metrics import Gauge

REPORT_INTERVAL = {"RAY_metrics_report_interval_ms": "1000"}
"""For the environment of a test's cluster; Ray's own is 10 s. After twice as long a gauge is forgotten."""

_LINE = re.compile(r"^(ray_unet_ray_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_marks = itertools.count(1)


def scrape(deadline_s: float = 60) -> dict[str, float]:
    """Returns all that this process has counted and set up to now, by name (and reason) without Ray's other labels.

    A mark that is set now is exported with everything before it; when a second one is there, the first one's batch is.
    """
    gauge = Gauge("unet_ray_test_mark", "Set by a test")
    deadline = time.monotonic() + deadline_s
    for _ in range(2):
        mark = next(_marks)
        gauge.set(mark)
        while (metrics := _read()).get("ray_unet_ray_test_mark") != mark:
            assert time.monotonic() < deadline, f"mark {mark} is not there: {metrics}"
            time.sleep(0.05)
    return metrics


@contextmanager
def watching() -> Iterator[dict[str, set[float]]]:
    """All values that are exported under each name while the block runs, as they come."""
    seen: dict[str, set[float]] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            for name, value in _read().items():
                seen.setdefault(name, set()).add(value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def _read() -> dict[str, float]:
    (node,) = (node for node in ray.nodes() if node["Alive"])
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    metrics: dict[str, float] = {}
    for name, labels, value in _LINE.findall(text):
        reason = re.search(r'reason="(\w+)"', labels)
        metrics[f"{name} {reason[1]}" if reason else name] = float(value)
    return metrics

"""What names the run that finished an output, and so differs between two that are the same: its rate, its config.yaml.

`figures` in summary.json holds both, under a digest of their own: the seal of all else leaves them out (`sealed`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from unet_ray import storage

CONFIG = "config.yaml"
ARE_SEALED = "figures_are_sealed"
"""In summary.json, under its seal: outputs of earlier versions lack it, and a digest of their figures."""

_CONFIG_KEY, _SEAL_KEY = "config_sha256", "sha256"


def sealed_figures(out: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what summary.json says of a run: its figures and the digest of config.yaml, under a digest of both."""
    facts = {**figures, _CONFIG_KEY: _config_digest(out)}
    return {**facts, _SEAL_KEY: _digest(facts)}


def problems(out: str, summary: Mapping[str, Any]) -> list[str]:
    """Returns a line for figures or a config.yaml that are not what was written; none where that is not known."""
    if not _are_known(summary):
        return []
    facts = dict(summary["figures"]) if isinstance(summary.get("figures"), dict) else {}
    if facts.pop(_SEAL_KEY, None) != _digest(facts):
        return ["summary.json: its figures are not what was published; run segment again"]
    now = _config_digest(out)
    if now == facts.get(_CONFIG_KEY):
        return []
    return [f"{CONFIG}: {'missing' if now is None else 'its content is not what was published'}; run segment again"]


def config_is_whole(out: str, summary: Mapping[str, Any] | None) -> bool:
    """Whether config.yaml is there and is, as far as that is known, what was published."""
    if summary is None or not _are_known(summary):
        return _config_digest(out) is not None
    return not any(problem.startswith(CONFIG) for problem in problems(out, summary))


def _are_known(summary: Mapping[str, Any]) -> bool:
    return summary.get(ARE_SEALED) is True


def _config_digest(out: str) -> str | None:
    try:
        return storage.sha256(storage.read_bytes(storage.join(out, CONFIG)))
    except FileNotFoundError:
        return None


def _digest(facts: Mapping[str, Any]) -> str:
    return storage.sha256(json.dumps(facts).encode())

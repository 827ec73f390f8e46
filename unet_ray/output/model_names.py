"""The models of two labellings by name and date, for the message that refuses one beside the other.

What an output says of its model is text: it may be a stranger's, so nothing is read there.
"""

from __future__ import annotations

from datetime import UTC, datetime

from unet_ray import storage
from unet_ray.messages import shown_path
from unet_ray.model.model_json import MODEL_FILE
from unet_ray.options.config_files import read_yaml
from unet_ray.output.run_facts import CONFIG


def differences(out: str, before: str, model: str | None, now: str) -> list[str]:
    """Returns how the model of an output differs from another one, as a list of one line.

    Args:
        out: the output.
        before: the digest of its model.
        model: URI of the other model's folder; None: digests are enough.
        now: its digest.
    """
    names = (_there(out), _here(model)) if model else ("", "")
    return [f"model is {before[:12]} there{names[0]} and {now[:12]} here{names[1]}"]


def _there(out: str) -> str:
    """` (runs/first, labels begun 2026-11-20 14:03 UTC)`, as far as the output says it."""
    try:
        name = read_yaml(storage.join(out, CONFIG)).get("model")
    except (ValueError, OSError):  # damaged, or gone: `segment` writes it again
        name = None
    begun = _date(storage.join(out, "run.json"))
    return _bracketed([name] if isinstance(name, str) else [], [f"labels begun {begun}"] if begun else [])


def _here(model: str) -> str:
    written = _date(storage.join(model, MODEL_FILE))
    return _bracketed([shown_path(model)], [f"written {written}"] if written else [])


def _bracketed(*parts: list[str]) -> str:
    text = ", ".join(word for part in parts for word in part)
    return f" ({text})" if text else ""


def _date(uri: str) -> str | None:
    modified_s = storage.modified_s(uri)
    return None if modified_s is None else f"{datetime.fromtimestamp(modified_s, UTC):%Y-%m-%d %H:%M} UTC"

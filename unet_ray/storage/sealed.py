"""JSON with a digest of all that it says: damage is noticed when it is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from unet_ray.storage.files import sha256


def is_count(value: object, *, below: int = 2**63) -> bool:
    """Whether a value of a JSON file is a whole number from 0 on; `true` and 4.0 are none, though they equal one."""
    return type(value) is int and 0 <= value < below


def are_counts(value: object) -> bool:
    """Whether a value of a JSON file holds a count for each of its names."""
    return isinstance(value, dict) and all(map(is_count, value.values()))


def is_digest(value: object) -> bool:
    """Whether a value of a JSON file is a SHA-256 in hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def json_bytes(value: Any) -> bytes:
    """Returns a value as the JSON that the output holds."""
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


def sealed(value: Mapping[str, Any]) -> bytes:
    """Returns a value as JSON with the digest of all that it says, by which damage is noticed when it is read."""
    return json_bytes({**value, "seal": _seal(value)})


def unsealed(data: bytes) -> dict[str, Any]:
    """Returns the value that `sealed` was given. Raises ValueError where these are not its bytes any more."""
    try:
        value = json.loads(data)
        seal = value.pop("seal", None) if isinstance(value, dict) else None
        if seal is None or seal != _seal(value):
            raise ValueError("its content is not what was written")
    except RecursionError as error:
        raise ValueError("its brackets are too many, one in the other") from error
    return value


def same_json(data: bytes, value: Mapping[str, Any]) -> bool:
    """Whether JSON says a value."""
    try:
        return json.loads(data) == value
    except (ValueError, RecursionError):
        return False


def _seal(value: Mapping[str, Any]) -> str:
    # Outputs of two runs are the same but for the figures of summary.json: so they have the same seal.
    content = {name: part for name, part in value.items() if name != "figures"}
    return sha256(json.dumps(content).encode())  # without indent, a third of the time; jobs have many records

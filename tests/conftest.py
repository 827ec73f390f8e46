"""What holds for every file of tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from unet_ray.storage import filesystems

_STORAGE = ("AWS_", "FSSPEC_", "UNET_RAY_")


@pytest.fixture(autouse=True, scope="module")
def storage_environment() -> Iterator[None]:
    """A file leaves what the environment says of storage as it was: commands hand their options on by it.

    Nothing else: what Ray sets for a first cluster of this process it remembers elsewhere, too, and wants it to stay.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith(_STORAGE)}
    yield
    filesystems.configure({}, 60.0)  # it remembers what it was told, apart from the environment
    for name in [name for name in os.environ if name.startswith(_STORAGE)]:
        del os.environ[name]
    os.environ.update(before)

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


LONGEST = (
    "test_chaos",
    "test_training_faults",
    "test_elastic",
    "test_s3_jobs",
    "test_submit",
    "test_segmentation",
    "test_training",
)
"""Files that take longest come first, so that none of them is alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files: `LONGEST`, others that start a Ray, and then what takes seconds."""
    order = {name: index for index, name in enumerate(LONGEST)}
    with_ray = ("/jobs/", "/cluster/", "/training/", "/labelling/", "/bench/", "test_labels_stay", "test_weather")

    def position(item: pytest.Item) -> int:
        path = str(item.path)
        return order.get(item.path.stem, len(order) + (not any(part in path for part in with_ray)))

    items.sort(key=position)

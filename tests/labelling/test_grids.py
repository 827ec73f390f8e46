"""What changed between frames, through the steps of a labelling: on the network's own grid."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import labelled
import numpy as np
import pytest

from unet_ray import storage
from unet_ray.chaos import trials
from unet_ray.labelling import stages
from unet_ray.labelling.decoding import DecodeOptions
from unet_ray.model.bundle import read_bundle
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.labeler import Labeler
from unet_ray.output import neighbours
from unet_ray.output.records import part_uri, read_records
from unet_ray.output.tables import read_parquet

SIZE = (24, 32)
OPTIONS = DecodeOptions(network_size=SIZE, max_pixels=100_000, timeout_s=20)


class Thinned(Labeler):
    """A network whose grid is every third row and every second column of the mask; on request the mask itself."""

    def label(self, views: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> Any:
        """As the network, with grids."""
        labels = super().label(views, sizes)
        self.grids = [mask[::3, ::2].copy() for mask in labels.masks] if self.thins else labels.masks
        return types.SimpleNamespace(**{**vars(labels), "grids": self.grids})

    thins = True
    grids: Sequence[np.ndarray] = ()


@pytest.mark.parametrize("thins", [True, False])
def test_rows_and_borders_are_those_of_the_grids_chunk_by_chunk(thins, tmp_path):
    stage = trials.Stage(tmp_path / "stage", trials.SIZES["small"])
    bundle = read_bundle(str(stage.model))
    plan = labelled.make_plan(str(stage.archive), str(tmp_path / "out"))
    first, second = plan.chunks[:2]
    again = dataclasses.replace(first, rows=(0, 1), n_rows=2, key="f" * 32)
    labeler = Thinned(bundle, LabelOptions(precision="float32", batch_size=2, mask_size="native"))
    labeler.thins = thins
    table = stages.label_chunks(stages.decode_chunks([first, second, again], OPTIONS), labeler, SIZE)
    assert table["_grid"].null_count == (0 if thins else len(table))
    outcomes = stages.outcomes_of(stages.write_chunks(table, plan.out, bundle.class_set, "raw", "me"))
    assert [outcome.trouble for outcome in outcomes] == [None] * 3
    start = 0
    for chunk in (first, second, again):
        (record,) = read_records(plan.out, [chunk.key])
        part = read_parquet(storage.read_bytes(part_uri(plan.out, record.part)))
        grids = list(labeler.grids[start : start + chunk.n_rows])
        start += chunk.n_rows
        shares = part["changed_share"].to_pylist()
        if chunk is again:
            assert shares == [None, None] and neighbours.BORDERS_KEY.encode() not in (part.schema.metadata or {})
            continue
        assert shares[0] is None
        assert shares[1:] == pytest.approx([(b != a).mean() for a, b in pairwise(grids)])
        borders = neighbours.Borders.from_footer(part.schema.metadata, bundle.class_set.n_classes)
        np.testing.assert_array_equal(borders.first, grids[0])
        np.testing.assert_array_equal(borders.last, grids[-1])
        assert part["content_digest"].null_count == 0
        error = part["expected_error_share"].to_numpy()
        np.testing.assert_allclose(error, 1 - part["confidence"].to_numpy(), atol=1e-7)

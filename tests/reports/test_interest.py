"""Which frames a preview shows: against columns written by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_output import CLASS_SET, segment

from unet_ray.output.rows import FRAME_COLUMNS, frames_schema
from unet_ray.reports.interest import Choice, Interest, choose_frames, rare_classes, read_interest

NAMES = CLASS_SET.names  # road, sky, pedestrian


def write_rows(path, drives, pixels_NK, confidences) -> str:
    """A file of `frames/` with the columns that matter; a confidence of None is a rejected frame's."""
    n_frames = len(drives)
    values = {
        "frame_id": [f"{index}.png" for index in range(n_frames)],
        "sequence": drives,
        "camera": [""] * n_frames,
        "status": ["rejected" if one is None else "ok" for one in confidences],
        "confidence": confidences,
        **{
            f"pixels_{name}": [None if one is None else int(n) for n, one in zip(column, confidences, strict=True)]
            for name, column in zip(NAMES, np.array(pixels_NK).T, strict=True)
        },
    }
    schema = frames_schema(CLASS_SET)
    arrays = [pa.array(values.get(field.name, [None] * n_frames), field.type) for field in schema]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)
    return str(path)


def test_the_columns_are_read_over_files(tmp_path, monkeypatch):
    pixels_NK = [[90, 10, 0], [50, 50, 0], [0, 0, 0], [80, 15, 5], [60, 0, 40], [100, 100, 2]]
    confidences = [0.9, 0.5, None, 0.7, 0.8, 0.6]
    drives = ["a", "a", "a", "b", "b", "a"]
    parts = [slice(0, 4), slice(4, 6)]
    uris = [
        write_rows(tmp_path / f"{n}.parquet", drives[part], pixels_NK[part], confidences[part])
        for n, part in enumerate(parts)
    ]
    monkeypatch.setattr("unet_ray.reports.interest._BATCH_ROWS", 3)
    pixels_K = np.array(pixels_NK).sum(axis=0)
    facts = read_interest(uris, pixels_K, CLASS_SET)
    assert facts.drive_N.tolist() == [0, 0, 0, 1, 1, 0]
    assert facts.is_labelled_N.tolist() == [True, True, False, True, True, True]
    np.testing.assert_allclose(facts.confidence_N, [0.9, 0.5, np.nan, 0.7, 0.8, 0.6], rtol=1e-6)
    shares_K = pixels_K / pixels_K.sum()
    by_hand = [
        sum(abs(n / sum(row) - share) for n, share in zip(row, shares_K, strict=True)) / 2
        for row in pixels_NK
        if sum(row)
    ]
    np.testing.assert_allclose(facts.unlikeness_N[[0, 1, 3, 4, 5]], by_hand, rtol=1e-5)
    assert np.isnan(facts.unlikeness_N[2])
    assert facts.most_row_K.tolist() == [0, 1, 4] and facts.most_share_K.tolist() == [0.9, 0.5, 0.4]
    assert facts.least_row_K.tolist() == [1, 0, 5] and facts.least_pixels_K.tolist() == [50, 10, 2]


def facts_of(drives, confidence, unlike, shares, **extremes) -> Interest:
    n_classes = len(shares)
    rows = {"most_row": [-1] * n_classes, "most_share": [0.0] * n_classes, "least_row": [-1] * n_classes}
    rows |= {"least_pixels": [0] * n_classes} | extremes
    return Interest(
        drive_N=np.array(drives, np.int32),
        is_labelled_N=~np.isnan(unlike),
        confidence_N=np.array(confidence, np.float32),
        unlikeness_N=np.array(unlike, np.float32),
        shares_K=np.array(shares),
        most_row_K=np.array(rows["most_row"]),
        most_share_K=np.array(rows["most_share"]),
        least_row_K=np.array(rows["least_row"]),
        least_pixels_K=np.array(rows["least_pixels"]),
    )


def test_eight_frames_are_the_least_confident_the_most_and_least_of_two_classes_and_typical_ones():
    n_frames = 200
    drives = np.repeat([0, 1, 2, 3], 50)
    confidence = np.full(n_frames, 0.9)
    confidence[[3, 4, 5, 60]] = 0.1, 0.11, 0.12, 0.4
    unlike = np.full(n_frames, 0.5)
    unlike[[110, 115, 160]] = 0.01, 0.02, 0.03
    facts = facts_of(
        drives, confidence, unlike, [0.9, 0.06, 0.03, 0.01, 0.0],
        most_row=[0, 20, 70, 75, -1], most_share=[1, 0.5, 0.3, 0.25, 0], least_row=[9, 9, 80, 180, -1],
        least_pixels=[1, 2, 3, 1, 0],
    )  # fmt: skip
    chosen = choose_frames(facts, ["road", "sky", "car", "pole", "bus"], 8)
    assert chosen == [
        Choice(row=3, reason="least confident: 0.10"),
        Choice(row=60, reason="least confident: 0.40"),  # of another drive
        Choice(row=75, reason="most pole: 25.0% of the frame"),
        Choice(row=180, reason="least pole: 1 pixel", class_id=3),
        Choice(row=70, reason="most car: 30.0% of the frame"),
        Choice(row=80, reason="least car: 3 pixels", class_id=2),
        Choice(row=110, reason="typical: confidence 0.90"),  # of the drive that nothing was chosen of
        Choice(row=160, reason="typical: confidence 0.90"),
    ]


def test_a_frame_that_is_chosen_twice_says_both_and_others_fill_up():
    facts = facts_of(
        [0] * 30, [0.5, *[0.9] * 29], np.linspace(0.1, 0.4, 30), [0.99, 0.01],
        most_row=[5, 0], most_share=[1.0, 0.3], least_row=[0, 0], least_pixels=[10, 40],
    )  # fmt: skip
    chosen = choose_frames(facts, ["road", "car"], 8)
    assert chosen[0].reason == "least confident: 0.50, most car: 30.0% of the frame" and chosen[0].class_id is None
    assert len(chosen) == 8 == len({choice.row for choice in chosen})
    assert [choice.reason for choice in chosen[1:4]] == ["least confident: 0.90", *["typical: confidence 0.90"] * 2]
    assert {choice.reason for choice in chosen[4:]} == {"confidence 0.90"}
    rows = sorted(choice.row for choice in chosen[:3])
    assert min(np.diff(rows)) >= 10  # neighbours look alike


def test_rejected_frames_are_never_chosen_and_few_are_shown_once_each():
    unlike = [0.2, np.nan, 0.1]
    facts = facts_of([0, 0, 0], [0.5, np.nan, 0.7], unlike, [1.0], most_row=[2], most_share=[1.0], least_row=[2])
    assert sorted(choice.row for choice in choose_frames(facts, ["road"], 8)) == [0, 2]
    nothing = facts_of([0], [np.nan], [np.nan], [0.0])
    assert choose_frames(nothing, ["road"], 8) == []
    assert choose_frames(facts_of([], [], [], [0.0]), ["road"], 8) == []


def test_of_a_network_without_confidence_the_others_are_shown():
    facts = facts_of(
        np.arange(40) // 10, [np.nan] * 40, np.linspace(0, 1, 40), [0.98, 0.02],
        most_row=[0, 30], most_share=[1, 0.2], least_row=[0, 12], least_pixels=[1, 7],
    )  # fmt: skip
    reasons = [choice.reason for choice in choose_frames(facts, ["road", "car"], 8)]
    assert reasons == ["most car: 20.0% of the frame", "least car: 7 pixels", "typical", "typical", *[""] * 4]


@pytest.mark.parametrize(
    ("shares", "most_share", "rare"),
    [
        ([0.5, 0.46, 0.03, 0.01], [1, 1, 0.2, 0.1], [3, 2]),
        ([0.5, 0.46, 0.03, 0.01], [1, 1, 0.2, 0.001], [2, 3]),  # specks alone
        ([0.6, 0.4, 0.0, 0.0], [1, 1, 0, 0], [1]),  # all have more than 5%
    ],
)
def test_rare_classes_have_few_pixels(shares, most_share, rare):
    rows = [0 if share else -1 for share in most_share]
    facts = facts_of([0], [0.5], [0.1], shares, most_row=rows, most_share=most_share, least_row=rows)
    assert rare_classes(facts) == rare


def test_an_output_of_a_job_is_read(tmp_path):
    segment(str(tmp_path / "out"))
    uris = [str(path) for path in sorted((tmp_path / "out/frames").iterdir())]
    facts = read_interest(uris, np.array([50, 50, 50]), CLASS_SET)
    table = pa.concat_tables([pq.read_table(uri) for uri in uris])
    assert facts.is_labelled_N.tolist() == [status == "ok" for status in table["status"].to_pylist()]
    for class_id, name in enumerate(NAMES):
        counts = table[f"pixels_{name}"].to_numpy()
        assert facts.least_pixels_K[class_id] == counts[counts > 0].min() == counts[facts.least_row_K[class_id]]
    assert set(FRAME_COLUMNS.names) <= set(table.column_names)

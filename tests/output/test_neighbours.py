"""What changed since the frame before: against a naive count, and the same however it is cut or mended."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_output
from small_output import CLASS_SET, listing, make_plan, mask_of, segment, work

from unet_ray import storage
from unet_ray.output import ledger, plans, publish, verify
from unet_ray.output.changes import changed_share, changed_share_by_class
from unet_ray.output.chunks import Cutting
from unet_ray.output.neighbours import Borders

DRIVES = {("a", ""): 11, ("b", "left"): 7, ("b", "right"): 1, ("c", ""): 6}
BROKEN = {"a//4.png": "truncated", "a//10.png": "crashed", "b/left/0.png": "truncated"}
COLUMNS = ["changed_share", *(f"changed_share_{name}" for name in CLASS_SET.names)]


def naive(grid: np.ndarray, previous: np.ndarray, k: int | None = None) -> float | None:
    """Point by point: of all, or of those that are of class k in either, the share that differs."""
    of_interest = differ = 0
    for row, row_before in zip(grid.tolist(), previous.tolist(), strict=True):
        for now, before in zip(row, row_before, strict=True):
            if k is None or k in (now, before):
                of_interest += 1
                differ += now != before
    return differ / of_interest if of_interest else None


def expected(drives: dict[tuple[str, str], int], broken: dict[str, str]) -> dict[str, list[float | None]]:
    """The figures of each frame of a generation, as `COLUMNS`, by the frame's id."""
    figures: dict[str, list[float | None]] = {}
    for (sequence, camera), n_frames in drives.items():
        previous = None
        for number in range(n_frames):
            frame_id = f"{sequence}/{camera}/{number}.png"
            grid = None if frame_id in broken else mask_of(frame_id)
            figures[frame_id] = [None] * len(COLUMNS)
            if grid is not None and previous is not None and grid.shape == previous.shape:
                figures[frame_id] = [naive(grid, previous, k) for k in (None, 0, 1, 2)]
            previous = grid
    return figures


def published(out: str) -> dict[str, list[float | None]]:
    files = sorted(file.uri for file in storage.list_files(storage.join(out, "frames")))
    rows = pa.concat_tables([pq.ParquetFile(file).read(columns=["frame_id", *COLUMNS]) for file in files]).to_pylist()
    return {row["frame_id"]: [row[name] for name in COLUMNS] for row in rows}


def same(ours: dict[str, list[float | None]], theirs: dict[str, list[float | None]]) -> bool:
    return ours.keys() == theirs.keys() and all(
        one == other if one is None or other is None else math.isclose(one, other, rel_tol=1e-6)
        for frame_id in ours
        for one, other in zip(ours[frame_id], theirs[frame_id], strict=True)
    )


def test_the_figures_are_those_of_a_naive_count():
    rng = np.random.default_rng(5)
    for _ in range(20):
        grid, previous = rng.integers(0, 4, (2, 5, 7), np.uint8)
        assert changed_share(grid, previous, 6) == pytest.approx(naive(grid, previous))
        by_class = [None if math.isnan(share) else share for share in changed_share_by_class(grid, previous, 6)]
        assert by_class == pytest.approx([naive(grid, previous, k) for k in range(6)])
        assert by_class[4:] == [None, None]


@pytest.mark.parametrize(("chunk_frames", "shard_rows"), [(100, 100), (3, 5), (1, 1), (2, 3), (4, 1)])
def test_they_are_the_same_however_the_archive_is_cut_and_in_whatever_order_it_is_labelled(
    chunk_frames, shard_rows, tmp_path
):
    out = str(tmp_path / "out")
    plan = make_plan(out, listing(DRIVES), cutting=Cutting(chunk_frames=chunk_frames, shard_rows=shard_rows))
    work(plan, chunks=plan.chunks[::-1], broken=BROKEN)
    publish.publish(plan, max_rejected=0.5, map_shards=lambda act, tasks: [act(task) for task in tasks[::-1]][::-1])
    figures = expected(DRIVES, BROKEN)
    assert same(published(out), figures)
    assert {frame_id for frame_id, shares in figures.items() if shares[0] is None} > {
        *("a//0.png", "a//4.png", "a//5.png", "a//10.png", "b/left/0.png", "b/left/1.png", "b/right/0.png", "c//0.png")
    }
    assert sum(shares[0] is not None for shares in figures.values()) >= 5  # of equal size
    assert verify.verify(out) == []


def test_the_first_frames_of_a_generation_have_none_before_them(tmp_path):
    out = str(tmp_path / "out")
    segment(out, listing(DRIVES), broken=BROKEN)
    before = published(out)
    grown = {("a", ""): 14, ("b", "left"): 7, ("b", "right"): 1, ("c", ""): 6}
    segment(out, listing(grown), broken=BROKEN)
    after = published(out)
    assert {frame_id: after[frame_id] for frame_id in before} == before
    assert after["a//11.png"] == [None] * 4
    for number in (12, 13):
        one, other = mask_of(f"a//{number}.png"), mask_of(f"a//{number - 1}.png")
        share = naive(one, other) if one.shape == other.shape else None
        assert after[f"a//{number}.png"][0] == (share if share is None else pytest.approx(share))


@pytest.mark.parametrize("when", ["before publishing", "after publishing"])
def test_a_frame_that_is_tried_again_changes_no_other_row(when, tmp_path):
    """Its own figures stay null and so do those of the frame behind it, though that may be in another file."""
    out = str(tmp_path / "out")
    if when == "after publishing":
        segment(out, listing(DRIVES), broken=BROKEN)
    else:
        work(make_plan(out, listing(DRIVES)), broken=BROKEN)
    segment(out, listing(DRIVES), broken={}, retry=())
    rows = pa.concat_tables([pq.ParquetFile(path).read() for path in sorted(Path(out, "frames").iterdir())])
    assert set(rows["status"].to_pylist()) == {"ok"}
    assert same(published(out), expected(DRIVES, BROKEN))
    assert verify.verify(out) == []


@pytest.mark.parametrize("damage", ["gone", "another byte"])
def test_each_file_is_made_again_to_the_same_bytes_by_the_end_of_the_one_before(damage, tmp_path):
    out = str(tmp_path / "out")
    segment(out, listing(DRIVES), broken=BROKEN)
    whole = small_output.contents(out)
    files = [path for path in sorted(whole) if path.startswith("frames/")]
    assert len(files) == 5
    for damaged in [*([path] for path in files), files[:2], files[1:4:2], files]:
        for path in damaged:
            data = whole[path]
            if damage == "gone":
                storage.delete(storage.join(out, path))
            else:
                storage.write_whole(storage.join(out, path), data[:90] + bytes([data[90] ^ 1]) + data[91:])
        assert len(verify.verify(out)) == len(damaged)
        segment(out, listing(DRIVES), broken=BROKEN)
        assert small_output.contents(out) == whole


def test_an_end_that_was_damaged_meanwhile_is_noticed_and_one_more_run_mends_it(tmp_path):
    out = str(tmp_path / "out")
    segment(out, listing(DRIVES), broken=BROKEN)
    whole = small_output.contents(out)
    path = "frames/part-00002.parquet"  # which ends within b/left
    at = whole[path].index(b'"zstd"') + 15
    storage.write_whole(storage.join(out, path), small_output.flipped(whole[path], at))
    storage.delete(storage.join(out, "frames/part-00003.parquet"))
    with pytest.raises(storage.StorageError, match=r"part-00002.parquet is damaged; run the same command again"):
        segment(out, listing(DRIVES), broken=BROKEN)
    segment(out, listing(DRIVES), broken=BROKEN)
    assert small_output.contents(out) == whole


def test_what_is_no_border_is_refused():
    rows = pa.table({"sequence": ["a", "a"], "camera": ["", ""]})
    grids = [np.array([[0, 1, 2]], np.uint8), None]
    footer = {key.encode(): value.encode() for key, value in Borders.of(rows, grids).to_footer().items()}
    borders = Borders.from_footer(footer, 3)
    assert borders.drive == ("a", "") and borders.last is None and borders.first.tolist() == [[0, 1, 2]]
    (key,) = footer
    for metadata in (None, {}, {key: b""}, {key: footer[key].replace(b"drive", b"drift")}):
        with pytest.raises(ValueError, match="."):
            Borders.from_footer(metadata, 3)
    with pytest.raises(ValueError, match="its grid has classes that there are not"):
        Borders.from_footer(footer, 2)
    for size in ([2, 3], [1, 2], [0, 3], [2**20, 2**20], [1, 3.0], [3]):
        content = plans.unsealed(footer[key])
        content["first"]["size"] = size
        with pytest.raises(ValueError, match="its grid has no size|its borders are none|unpack"):
            Borders.from_footer({key: plans.sealed(content)}, 3)


def test_labels_that_were_kept_from_damage_keep_what_changed_and_the_next_frame_knows_nothing(tmp_path):
    out = str(tmp_path / "out")
    segment(out, listing(DRIVES), broken=BROKEN)
    before = published(out)
    path = storage.join(out, "frames/part-00000.parquet")
    data = storage.read_bytes(path)
    storage.write_whole(path, data[:90] + bytes([data[90] ^ 1]) + data[91:])
    verify.verify(out)
    gone = {**BROKEN, "a//2.png": "missing"}
    segment(out, listing(DRIVES), broken=gone)
    after, fresh = published(out), expected(DRIVES, gone)
    assert after["a//2.png"] == before["a//2.png"]
    assert {i: shares for i, shares in after.items() if i not in ("a//2.png",)} == {
        i: before[i] if i != "a//3.png" else fresh[i] for i in before if i != "a//2.png"
    }
    assert ledger.published_shards(plans.read_plan(out))[0]["rejected"] == {"truncated": 1}

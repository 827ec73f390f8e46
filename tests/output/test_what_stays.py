"""Labels that stay and archives that are kept apart, where outsiders once got past the ledger; no Ray here."""

from __future__ import annotations

import os
from pathlib import Path

import labelled
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labelled import label, make_plan, run, write_archive

from unet_ray import storage
from unet_ray.archives.listing import list_archives
from unet_ray.archives.roots import find_roots
from unet_ray.output import ledger, manifest, origins, plans, publish, salvage, verify
from unet_ray.output.chunks import Chunk
from unet_ray.output.records import commit
from unet_ray.pixels.mask_png import encode_mask_png


@pytest.fixture
def root(tmp_path: Path) -> str:
    return write_archive(tmp_path / "log")


def damaged_and_gone(root: str, out: Path, column: str, at: float = 1.0) -> list[str]:
    """Flips a bit in a published file whose frames are gone; returns their ids."""
    path = out / "frames/part-00001.parquet"
    group = pq.ParquetFile(path).metadata.row_group(0)
    (chunk,) = [c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column]
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start + int(at * (chunk.total_compressed_size - 3))] ^= 1
    path.write_bytes(data)
    assert verify.verify(str(out))
    ids = pq.ParquetFile(path).read(columns=["frame_id"])["frame_id"].to_pylist()
    for frame_id in ids:
        os.unlink(os.path.join(root, frame_id))
    return ids


def label_what_is_there(root: str, chunk: Chunk) -> pa.Table:
    ids = manifest.read_rows(chunk)["frame_id"].to_pylist()
    return label(chunk, reject=tuple(i for i in ids if not os.path.exists(os.path.join(root, i))))


def test_a_kill_while_labels_are_kept_costs_none(root, tmp_path, monkeypatch):
    """Of a damaged file of two chunks, the first one's labels are kept when the job dies."""
    out = tmp_path / "out"
    run(root, str(out))
    ids = damaged_and_gone(root, out, "confidence")
    plan = make_plan(root, str(out), keep_gone=True)
    with monkeypatch.context() as patch:
        write = storage.write_whole
        patch.setattr(storage, "write_whole", lambda uri, data: write(uri, data) or (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            salvage.look_after_damage(plan)
    assert len(list((out / "_work/kept").iterdir())) == 1
    assert salvage.look_after_damage(plan)
    for chunk in ledger.pending(plan):
        commit(str(out), chunk, label_what_is_there(root, chunk), writer="test")
    assert publish.publish(plan, max_rejected=0)["rejected"] == {}
    assert verify.verify(str(out)) == [] and verify.kept_labels(str(out))[0].startswith(
        f"frames/part-00001.parquet: {len(ids)} labels kept from a damaged file: b/0.png"
    )


PNG = plans.Lineage(
    bundle_digest="ab" * 32, class_set=labelled.CLASSES, options={"mask_size": "model", "mask_encoding": "png"}
)


FLIPS = [("mask", 0.5, 5), ("mask", 1, 6), ("pixels_sky", 1, 6), ("mask_width_px", 1, 6), ("height_px", 1, 6)]


@pytest.mark.parametrize(("column", "at", "n_kept"), FLIPS)
def test_a_bit_of_a_published_file_costs_at_most_the_label_that_it_is_in(column, at, n_kept, root, tmp_path):
    out = tmp_path / "out"
    plan = make_plan(root, str(out), lineage=PNG)
    for chunk in plan.chunks:
        commit(str(out), chunk, with_png_masks(label(chunk)), writer="test")
    publish.publish(plan, max_rejected=0)
    before = {row["frame_id"]: row for row in pq.ParquetFile(out / "frames/part-00001.parquet").read().to_pylist()}
    ids = damaged_and_gone(root, out, column, at)
    plan = make_plan(root, str(out), lineage=PNG, keep_gone=True)
    salvage.look_after_damage(plan)
    for chunk in ledger.pending(plan):
        commit(str(out), chunk, label_what_is_there(root, chunk), writer="test")
    publish.publish(plan, max_rejected=1)
    after = {row["frame_id"]: row for row in pq.ParquetFile(out / "frames/part-00001.parquet").read().to_pylist()}
    kept = [frame_id for frame_id in ids if after[frame_id]["status"] == "ok"]
    assert len(kept) == n_kept
    for frame_id in kept:
        for name in ("mask", "mask_encoding", "mask_height_px", "mask_width_px", "pixels_sky", "confidence_sky"):
            assert after[frame_id][name] == before[frame_id][name], name


def with_png_masks(table: pa.Table) -> pa.Table:
    masks = [
        encode_mask_png(np.frombuffer(mask, np.uint8).reshape(2, 3), labelled.CLASSES.palette_K3)
        for mask in table["mask"].to_pylist()
    ]
    columns = {"mask": pa.array(masks, pa.binary()), "mask_encoding": pa.array(["png"] * len(masks))}
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def test_a_damaged_manifest_of_an_archive_that_grew_is_written_again(root, tmp_path):
    out = tmp_path / "out"
    run(root, str(out))
    (planned,) = (out / "manifest").glob("g000*")
    whole = planned.read_bytes()
    planned.write_bytes(whole[:100] + b"?" + whole[101:])
    write_archive(tmp_path / "log", {"a": 7, "d": 2})
    assert run(root, str(out))["listed"] == 17
    assert planned.read_bytes() == whole and verify.verify(str(out)) == []


def test_of_two_archives_planned_at_the_same_time_one_is_refused(root, tmp_path, monkeypatch):
    """The other job's generation comes at the moment at which this one writes its own."""
    other, out = write_archive(tmp_path / "other", {"x": 4}), str(tmp_path / "out")
    put, calls = storage.put_if_absent, []

    def late(uri: str, data: bytes) -> bool:
        if uri.endswith("_g000.json") and not calls:
            calls.append(uri)
            make_plan(other, out)
        return put(uri, data)

    monkeypatch.setattr(storage, "put_if_absent", late)
    with pytest.raises(ValueError, match="other; give another --out, or --add-root"):
        make_plan(root, out)
    assert plans.read_plan(out).n_frames == 4


def test_roots_around_a_root_or_beside_it_are_refused_by_name(root, tmp_path):
    out = str(tmp_path / "out")
    make_plan(f"{root}/a", out)
    for number in range(5):
        os.utime(f"{root}/a/{number}.png", ns=(1, 1))
    with pytest.raises(
        ValueError, match="log/a/0.png is planned in .* as 0.png and would be labelled once more as a/0"
    ):
        make_plan(root, out)
    with pytest.raises(ValueError, match="log/a; give another --out, or --add-root"):
        make_plan(f"{root}/b*", out)
    write_archive(tmp_path / "log/a", {"deep": 2})
    with pytest.raises(ValueError, match="is planned in|lies in it or around it|give another --out, or --add-root"):
        make_plan(f"{root}/a/deep", out)


def test_a_frame_with_the_id_of_another_roots_frame_is_refused(root, tmp_path):
    out = str(tmp_path / "out")
    make_plan(f"{root}/a", out)
    labels = origins.labels_for(out, [f"{root}/c"], add_root=True)
    listing = list_archives([f"{root}/c"], roots=find_roots([f"{root}/c"], labels))
    plan = plans.plan(out, listing, labelled.LINEAGE, labelled.CUTTING, config_yaml="", add_root=True)
    assert plan.n_new == 1
    write_archive(tmp_path / "log/a", {"c": 1})
    with pytest.raises(
        ValueError, match="log/a/c/0.png has the id of .*log/c/0.png, which .* holds; rename it, or give"
    ):
        make_plan(f"{root}/a", out)


def test_frames_beside_what_a_glob_matches_are_not_its_own(root, tmp_path):
    rows = list_archives([root]).table.select(["frame_id", "uri"])
    listing = list_archives([f"{root}/a*"])
    own = origins.are_own(rows, listing).to_pylist()
    assert own == [frame_id.startswith("a/") for frame_id in rows["frame_id"].to_pylist()]

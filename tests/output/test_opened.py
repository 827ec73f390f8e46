"""A finished output from Python: its frames in order and by id, views by conditions, tables, pictures."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import labelled
import numpy as np
import old_outputs
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import s3_server
import small_output
from PIL import Image

import unet_ray
from unet_ray import storage
from unet_ray.digests import content_digest
from unet_ray.errors import JobFailed
from unet_ray.output import opened, plans, publish
from unet_ray.output.opened import Labels, open_labels

IDS = [
    *(f"a//{n}.png" for n in range(5)),
    *(f"b/left/{n}.png" for n in range(4)),
    *(f"b/right/{n}.png" for n in range(2)),
]


@pytest.fixture(scope="module", params=["png", "raw"])
def output(request, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("output") / "labels")
    small_output.segment(out, mask_encoding=request.param)
    return out


def rows_of(out: str) -> list[dict]:
    files = sorted(Path(out, "frames").glob("*.parquet"))
    return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


def test_frames_come_in_the_manifests_order_with_their_columns_and_masks(output):
    labels = open_labels(output)
    assert len(labels) == 11 and [frame.frame_id for frame in labels] == IDS
    assert repr(labels) == f"Labels({output!r}: 11 frames)" and labels.class_set == small_output.CLASS_SET
    for frame, row in zip(labels, rows_of(output), strict=True):
        assert dict(frame) == {name: value for name, value in row.items() if name != "mask"}
        if frame["status"] == "ok":
            assert frame.mask.dtype == np.uint8
            np.testing.assert_array_equal(frame.mask, small_output.mask_of(frame.frame_id))
            pixels = np.bincount(frame.mask.ravel(), minlength=3).tolist()
            assert frame.class_pixels == dict(zip(("road", "sky", "pedestrian"), pixels, strict=True))
            assert frame.confidence == row["confidence"]


def test_a_frame_is_found_by_its_id_in_any_order(output):
    labels = open_labels(Path(output))
    for frame_id in [*reversed(IDS), *IDS[::3]]:
        frame = labels[frame_id]
        assert frame.frame_id == frame_id and frame_id in labels
        if frame_id not in small_output.BROKEN:
            np.testing.assert_array_equal(frame.mask, small_output.mask_of(frame_id))
    assert "c/0.png" not in labels and 7 not in labels


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("b/left/22.png", KeyError, "no frame 'b/left/22.png' here; perhaps you meant 'b/left/2.png'"),
        ("zzz", KeyError, "no frame 'zzz' here"),
        (3, TypeError, "a frame is looked up by its id, a text, not by 3; iterate for the first ones"),
    ],
)
def test_an_id_that_is_not_there_is_one_line(output, key, kind, message):
    with pytest.raises(kind) as caught:
        open_labels(output)[key]
    assert caught.value.args == (message,)


def test_a_rejected_frame_has_no_mask_and_says_why(output):
    frame = open_labels(output)["b/left/2.png"]
    assert repr(frame) == "LabelledFrame('b/left/2.png': rejected as truncated)" and frame._repr_png_() is None
    with pytest.raises(ValueError) as caught:
        frame.mask  # noqa: B018
    assert str(caught.value) == "b/left/2.png was rejected as truncated, so it has no mask: it is truncated"
    with pytest.raises(KeyError) as missing:
        frame["confidenc"]
    assert missing.value.args == ("no column 'confidenc'; perhaps you meant 'confidence'",)


def test_tables_are_those_of_the_files_without_masks(output):
    labels = open_labels(output)
    expected = pa.concat_tables(pq.ParquetFile(file).read() for file in sorted(Path(output, "frames").glob("*")))
    assert labels.frames.equals(expected.drop_columns(["mask"]).replace_schema_metadata())
    assert labels.statistics.equals(
        pq.ParquetFile(Path(output, "class_statistics.parquet")).read().replace_schema_metadata()
    )


# --- conditions ---

CONDITIONS = [
    ("pixels_pedestrian > 3", lambda row: (row["pixels_pedestrian"] or 0) > 3),
    (
        "pixels_pedestrian > 3 and sequence == 'b'",
        lambda row: (row["pixels_pedestrian"] or 0) > 3 and row["sequence"] == "b",
    ),
    ("not (status == 'ok')", lambda row: row["status"] != "ok"),
    ("reason is not null or camera in ('right')", lambda row: row["reason"] is not None or row["camera"] == "right"),
    ("camera not in ('right', 'left') and reason is null", lambda row: row["camera"] == "" and row["reason"] is None),
    (
        "0.3 <= confidence and confidence < 0.6",
        lambda row: row["confidence"] is not None and 0.3 <= row["confidence"] < 0.6,
    ),
    (
        "pixels_road + pixels_sky * 2 >= 12",
        lambda row: row["pixels_road"] is not None and row["pixels_road"] + 2 * row["pixels_sky"] >= 12,
    ),
    (
        "pixels_road / mask_width_px > 1",
        lambda row: row["pixels_road"] is not None and row["pixels_road"] / row["mask_width_px"] > 1,
    ),
    (
        "frame_id LIKE 'b/left/%' and frame_index <> 1",
        lambda row: row["frame_id"].startswith("b/left/") and row["frame_index"] != 1,
    ),
    ("\"camera\" = 'left' or frame_index > -1", lambda row: True),
    ("sequence == 'nowhere'", lambda row: False),
]


@pytest.mark.parametrize(("condition", "is_meant"), CONDITIONS, ids=[condition for condition, _ in CONDITIONS])
def test_a_view_has_the_frames_that_meet_a_condition(output, condition, is_meant):
    expected = [row["frame_id"] for row in rows_of(output) if is_meant(row)]
    view = open_labels(output).where(condition)
    assert isinstance(view, Labels) and len(view) == len(expected)
    assert [frame.frame_id for frame in view] == view.frames["frame_id"].to_pylist() == expected
    for frame_id in IDS:
        assert (frame_id in view) == (frame_id in expected)
    for frame in view:
        if frame["status"] == "ok":
            np.testing.assert_array_equal(view[frame.frame_id].mask, small_output.mask_of(frame.frame_id))


def test_a_condition_may_be_pyarrows_and_views_of_views_meet_both(output):
    labels = open_labels(output)
    by_expression = (
        labels.where(pc.field("sequence") == "b").where("camera == 'left'").where(pc.field("status") == "ok")
    )
    assert [frame.frame_id for frame in by_expression] == ["b/left/0.png", "b/left/1.png", "b/left/3.png"]
    assert "where" in repr(by_expression) and "3 frames" in repr(by_expression)
    with pytest.raises(KeyError, match="no frame 'a//0.png' here"):
        by_expression["a//0.png"]


def test_the_statistics_of_a_view_are_its_own(output):
    view = open_labels(output).where("camera == 'left'")
    rows = [row for row in rows_of(output) if row["camera"] == "left" and row["status"] == "ok"]
    statistics = view.statistics.to_pylist()
    assert [(row["camera"], row["class_name"]) for row in statistics] == [
        ("left", n) for n in ("road", "sky", "pedestrian")
    ]
    assert [row["frames"] for row in statistics] == [3] * 3
    assert statistics[0]["pixels"] == sum(row["pixels_road"] for row in rows)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("pixels_pedestrians > 0", "pixels_pedestrian"),
        ("", "cannot be used: it is empty"),
        ("__import__('os').system('true') = 0", "cannot be used: "),
        ("mask = 'x'", "cannot be used: "),
    ],
)
def test_a_text_that_is_no_condition_is_one_line(output, condition, message):
    with pytest.raises(ValueError) as caught:
        open_labels(output).where(condition)
    text = str(caught.value)
    assert message in text and "\n" not in text


def test_an_expression_of_pyarrow_that_does_not_fit_is_one_line(output):
    with pytest.raises(ValueError, match=r"No match for FieldRef.Name\(nothing\)"):
        open_labels(output).where(pc.field("nothing") > 1)


# --- pictures ---


@pytest.fixture
def with_frames(tmp_path) -> tuple[str, dict[str, np.ndarray]]:
    """An output whose frames are there, as files and in a tar, and are what was labelled."""
    frames: dict[str, np.ndarray] = {}
    random = np.random.default_rng(1)
    (tmp_path / "log" / "a").mkdir(parents=True)
    for name in ("a/0.png", "a/1.png"):
        frames[name] = random.integers(0, 256, (2, 3, 3), np.uint8)
        Image.fromarray(frames[name]).save(tmp_path / "log" / name)
    with tarfile.open(tmp_path / "log" / "b.tar", "w") as tar:
        for name in ("0.png", "1.png"):
            frames[f"b.tar!{name}"] = random.integers(0, 256, (2, 3, 3), np.uint8)
            Image.fromarray(frames[f"b.tar!{name}"]).save(tmp_path / name)
            tar.add(tmp_path / name, arcname=name)
    return str(tmp_path / "log"), frames


def label_with_digests(log: str, out: str) -> None:
    """`labelled` makes digests of what its own archive holds: here of the bytes that are there."""
    plan = labelled.make_plan(log, out)
    for chunk in plan.chunks:
        rows = labelled.manifest.read_rows(chunk)
        digests = [content_digest(content) for content in opened.read_frames(rows)]
        table = labelled.label(chunk)
        column = table.column_names.index("content_digest")
        labelled.commit(out, chunk, table.set_column(column, "content_digest", pa.array(digests)), writer="test")
    publish.publish(plan, max_rejected=1.0)


def test_a_frame_is_read_again_from_file_and_tar_and_shown_with_its_mask(with_frames, tmp_path):
    log, frames = with_frames
    label_with_digests(log, str(tmp_path / "out"))
    labels = open_labels(tmp_path / "out")
    assert [frame.frame_id for frame in labels] == list(frames)
    palette = labelled.CLASSES.palette_K3
    for frame in labels:
        np.testing.assert_array_equal(np.asarray(frame.image()), frames[frame.frame_id])
        mixed = frames[frame.frame_id] * 0.45 + palette[frame.mask] * 0.55
        overlay = frame.overlay()
        assert overlay.mode == "RGB" and np.abs(np.asarray(overlay) - mixed).max() <= 0.5 + 1e-9
        assert Image.open(io.BytesIO(frame._repr_png_())).size == (3, 2)


def test_a_view_shows_its_first_frames_and_leaves_out_those_that_are_gone(with_frames, tmp_path):
    label_with_digests(with_frames[0], str(tmp_path / "out"))
    view = open_labels(tmp_path / "out").where("pixels_sky >= 0")
    assert Image.open(io.BytesIO(view._repr_png_())).size == (4 * 240 + 3 * 4, 160)
    os.remove(tmp_path / "log" / "a" / "0.png")
    assert Image.open(io.BytesIO(view._repr_png_())).size == (3 * 240 + 2 * 4, 160)
    assert open_labels(tmp_path / "out").where("sequence == 'nowhere'")._repr_png_() is None


def test_a_frame_that_is_gone_or_holds_other_bytes_is_one_line(with_frames, tmp_path):
    label_with_digests(with_frames[0], str(tmp_path / "out"))
    labels = open_labels(tmp_path / "out")
    first, second = tmp_path / "log" / "a" / "0.png", tmp_path / "log" / "a" / "1.png"
    os.remove(first)
    with pytest.raises(ValueError) as caught:
        labels["a/0.png"].image()
    assert str(caught.value) == f"a/0.png: {first} is gone since it was listed"
    mtime_ns, data = second.stat().st_mtime_ns, second.read_bytes()
    second.write_bytes(data[:-1] + b"?")
    os.utime(second, ns=(mtime_ns, mtime_ns))
    with pytest.raises(ValueError) as caught:
        labels["a/1.png"].overlay()
    assert str(caught.value) == f"a/1.png: {second} holds other bytes than those that were labelled"


def test_a_notebook_shows_the_preview(output, tmp_path):
    assert open_labels(output)._repr_png_() is None
    copy = shutil.copytree(output, tmp_path / "copy")
    Image.new("RGB", (4, 3)).save(copy / "preview.png")
    assert open_labels(copy)._repr_png_() == (copy / "preview.png").read_bytes()


# --- which outputs ---


def test_an_output_that_is_not_finished_says_how_far_it_is(tmp_path):
    out = str(tmp_path / "labels")
    plan = small_output.make_plan(out)
    small_output.work(plan, chunks=plan.chunks[:2])
    with pytest.raises(ValueError) as caught:
        open_labels(out)
    assert str(caught.value) == f"{out} is not finished: 5 of 11 frames are done; run segment again, then open it"


def test_what_is_no_output_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="is not an output of segment: run.json is missing"):
        open_labels(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    out = tmp_path / "labels"
    small_output.segment(str(out))
    file = out / "frames" / "part-00001.parquet"
    file.write_bytes(small_output.flipped(file.read_bytes(), 60))
    with pytest.raises(JobFailed, match=f"{file} is damaged"):
        list(open_labels(out))
    statistics = out / "class_statistics.parquet"
    statistics.write_bytes(b"PAR1" + bytes(statistics.stat().st_size - 8) + b"PAR1")
    with pytest.raises(JobFailed, match=f"{statistics} is damaged"):
        open_labels(out).statistics  # noqa: B018
    assert not (out / "_work").exists()  # to look at an output changes nothing in it


def test_an_output_of_an_earlier_version_opens(tmp_path):
    root, out = labelled.write_archive(tmp_path / "log"), str(tmp_path / "out")
    old_outputs.write_version_4(root, out, reject=("b/3.png",))
    labels = open_labels(out)
    assert len(labels) == 13 and labels.frames.column_names == [
        name for name in old_outputs.COLUMNS_4 if name != "mask"
    ]
    assert [frame.frame_id for frame in labels.where("status != 'ok'")] == ["b/3.png"]
    assert labels["a/0.png"].mask.shape == (2, 3) and "content_digest" not in labels["a/0.png"]
    with pytest.raises(ValueError, match="not_an_image|bytes that begin with"):
        labels["a/0.png"].image()


def test_an_output_in_a_bucket_opens(tmp_path):
    small_output.segment(str(tmp_path / "labels"), mask_encoding="png")
    with (
        s3_server.run_server(str(tmp_path / "requests")) as server,
        pytest.MonkeyPatch.context() as patch,
        s3_server.reach(server, patch),
    ):
        bucket = s3_server.make_bucket(server)
        for path, content in small_output.contents(str(tmp_path / "labels")).items():
            storage.write_whole(f"{bucket}/labels/{path}", content)
        labels = open_labels(f"{bucket}/labels")
        np.testing.assert_array_equal(labels["b/right/1.png"].mask, small_output.mask_of("b/right/1.png"))
        view = labels.where("camera == 'left'")
        assert [frame.frame_id for frame in view] == [frame_id for frame_id in IDS if "left" in frame_id]
        assert labels.statistics.num_rows == 9 and view.statistics.num_rows == 3
        del labels, view


def test_no_file_stays_open(output):
    """Warnings are errors in these tests: a file that Python closes by itself is one."""
    labels = open_labels(output)
    next(iter(labels)).mask  # noqa: B018
    del labels
    gc.collect()
    open_files = [
        os.readlink(f"/proc/self/fd/{number}")
        for number in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{number}")
    ]
    assert [path for path in open_files if path.startswith(os.path.join(output, "frames"))] == []


def test_the_index_is_the_ids_of_row_groups(tmp_path, monkeypatch):
    """Row groups that cannot hold an id are not read."""
    monkeypatch.setattr(publish, "GROUP_ROWS", 2)
    small_output.segment(str(tmp_path / "labels"), mask_encoding="raw")
    labels = open_labels(tmp_path / "labels")
    groups = labels._output.groups
    assert [(group.start, group.n_rows) for group in groups] == [(0, 2), (2, 2), (4, 1), (5, 2), (7, 2), (9, 2)]
    assert [sum(group.may_hold(frame_id) for group in groups) for frame_id in IDS] == [1] * 11
    for frame_id in IDS:
        if frame_id not in small_output.BROKEN:
            np.testing.assert_array_equal(labels[frame_id].mask, small_output.mask_of(frame_id))
    assert json.loads(json.dumps([group.ids for group in groups]))[0] == ["a//0.png", "a//1.png"]
    assert plans.read_plan(labels.uri).n_frames == len(unet_ray.open_labels(labels.uri)) == 11

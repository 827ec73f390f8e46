"""`report.html` of an output: what it says, against SQL and the archive itself, and what it must not do."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import duckdb
import labelled
import numpy as np
import pyarrow.parquet as pq
import pytest
from drawn_output import CLASSES, ODD_DRIVE, draw_output
from html_page import HtmlPage
from PIL import Image

from unet_ray import cli, storage
from unet_ray.archives.listing import list_archives
from unet_ray.config import SegmentConfig
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.bundle import write_bundle
from unet_ray.options.config_files import to_yaml
from unet_ray.output import plans, publish, verify
from unet_ray.output.records import commit
from unet_ray.reports import pages
from unet_ray.reports.label_page import PageOptions, write_label_page

CONFIG = SegmentConfig(
    model="runs/first run", frames=("drives/a b", "more.tar"), out="elsewhere", mask_size="model", overwrite=True
)
"""What began the output: with `--overwrite`, which no command of the page may repeat."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """2,600 frames of 12 drives in two files of many row groups."""
    folder = tmp_path_factory.mktemp("drawn")
    options = {"n_drives": 12, "size": (48, 64), "shard_rows": 1_300, "group_rows": 128, "rejected_share": 0.004}
    draw_output(str(folder), 2_600, **options, config_yaml=to_yaml(CONFIG))
    return folder


@pytest.fixture(scope="module")
def page(folder) -> HtmlPage:
    assert cli.main(["report", str(folder / "labels")]) == 0
    return HtmlPage(folder / "labels" / "report.html")


def rows_of(folder: Path, query: str) -> list[tuple]:
    return duckdb.sql(query.replace("FRAMES", f"'{folder}/labels/frames/*.parquet'")).fetchall()


# --- can I trust it? ---


def test_the_command_says_where_the_page_is_and_the_output_is_whole_with_it(folder, page, capsys):
    assert cli.main(["report", str(folder / "labels")]) == 0
    assert capsys.readouterr() == (f"Look at: {folder}/labels/report.html\n", "")
    assert verify.verify(str(folder / "labels")) == []


def test_listed_frames_are_labelled_or_rejected_and_each_reason_has_examples(folder, page):
    counts = dict(rows_of(folder, "SELECT reason, count(*) FROM FRAMES WHERE reason IS NOT NULL GROUP BY reason"))
    n_rejected = sum(counts.values())
    assert n_rejected > 5 and f"2,600 listed = {2600 - n_rejected:,} labelled + {n_rejected} rejected" in page.text
    for reason, number in counts.items():
        first = rows_of(folder, f"SELECT frame_id FROM FRAMES WHERE reason = '{reason}' LIMIT 3")
        examples = " ".join(f"{frame_id} it is {reason}" for (frame_id,) in first)
        assert f"{reason} {number} {examples}" in page.text


def test_the_command_of_a_reason_tries_those_frames_of_this_output_again(folder, page):
    (line,) = (line for line in page.blocks["shell"] if line.endswith("--retry-rejected truncated"))
    config = cli.parse("segment", shlex.split(line)[2:])
    assert config == SegmentConfig(
        model="runs/first run",
        frames=("drives/a b", "more.tar"),
        out=str(folder / "labels"),
        mask_size="model",
        retry_rejected=("truncated",),
    )


def test_confidence_of_a_class_is_the_mean_over_its_pixels(folder, page):
    ((confidence,),) = rows_of(folder, "SELECT sum(confidence_road * pixels_road) / sum(pixels_road) FROM FRAMES")
    ((pixels, frames),) = rows_of(folder, "SELECT sum(pixels_road), count_if(pixels_road > 0) FROM FRAMES")
    assert f"road {confidence:.1%} {pixels:,} {frames:,}" in page.text
    assert (
        "Whether the confidence is calibrated is not known: runs/first run cannot be read from this machine"
        in page.text
    )


def test_lineage_and_options_are_named(page):
    assert f"model digest {'cd' * 32}" in page.text and "options mask-encoding png" in page.text
    assert "frames drives/a b, more.tar" in page.text and "made with unet-ray 0.1.0" in page.text


def test_a_model_that_can_be_read_tells_its_temperature_and_validation(tmp_path, capsys):
    root, out, model = labelled.write_archive(tmp_path / "log"), str(tmp_path / "out"), str(tmp_path / "run" / "model")
    metrics = {"val/mean_iou": 0.7251, "val/iou/road": 0.815, "val/expected_calibration_error/after": 0.0123}
    network = UnetConfig(image_height_px=8, image_width_px=8, n_classes=2)
    weights = {"kernel": np.zeros((2, 2), np.float32)}
    digest = write_bundle(model, weights, network, labelled.CLASSES, metrics, temperature=1.25)
    lineage = plans.Lineage(bundle_digest=digest, class_set=labelled.CLASSES, options={"mask_size": "model"})
    plan = labelled.make_plan(root, out, lineage=lineage, config_yaml=f"model: {tmp_path}/run\nframes: [log]\n")
    for chunk in plan.chunks:
        commit(out, chunk, labelled.label(chunk), writer="test")
    publish.publish(plan, max_rejected=0)
    page = HtmlPage(write_label_page(plan, f"{out}/report.html"))
    assert (
        "0.725 mean IoU of the model" in page.text
        and "road 75.0% 0.815" in page.text
        and "temperature 1.250" in page.text
    )
    assert "75.0% mean confidence, calibrated" in page.text and "it is off by 1.2% in the mean" in page.text
    write_bundle(model, weights, network, labelled.CLASSES, {}, temperature=None)
    other = HtmlPage(write_label_page(plan, f"{out}/report.html"))
    assert "run holds another model now" in other.text and "mean IoU" not in other.text


# --- what is in it? ---


def test_shares_are_those_of_the_pixels(folder, page):
    total = " + ".join(f"sum(pixels_{name})" for name in CLASSES.names)
    for name in ("road", "sky", "fence"):
        ((share, frames),) = rows_of(
            folder, f"SELECT sum(pixels_{name}) / ({total}), count_if(pixels_{name} > 0) / count(mask) FROM FRAMES"
        )
        assert f"{name} {pages.percent(share)} {pages.percent(frames)}" in page.text


def test_the_drive_that_is_unlike_the_others_is_marked_and_no_other(page):
    marked = re.findall(r"(drive\d+ · cam\d) [\d,]+ frames(?:, \d+ rejected)? \S+ [\d.]+%, median", page.text)
    assert marked == [f"drive{ODD_DRIVE // 2:05d} · cam{ODD_DRIVE % 2}"]


def test_a_strip_has_the_colours_of_its_drive(folder, page):
    strips = {alt: image for alt, image in page.images.items() if not alt.startswith(("frame ", "mask of "))}
    odd = next(image for image in strips.values() if len(np.unique(image[20, :, :3], axis=0)) == 1)
    shares = rows_of(folder, "SELECT " + ", ".join(f"sum(pixels_{name})" for name in CLASSES.names) + " FROM FRAMES "
        f"WHERE sequence = 'drive{ODD_DRIVE // 2:05d}' AND camera = 'cam{ODD_DRIVE % 2}'")[0]  # fmt: skip
    for k in np.argsort(shares)[-3:]:
        is_class = (odd[..., :3] == CLASSES.palette_K3[k]).all(axis=2)
        assert abs(is_class.mean() - shares[k] / sum(shares)) < 1.5 / 64


# --- what shall I look at? ---


def gallery_ids(page: HtmlPage, title: str) -> list[str]:
    section = page.source[page.source.index(f"<h3>{title}</h3>") :].partition("</pre>")[0]
    return re.findall(r'<span class="id">(.*?)</span>', section)


def test_every_query_runs_and_begins_with_the_first_frame_of_its_gallery(page):
    assert len(page.blocks["sql"]) == 6
    results = [duckdb.sql(query).fetchall() for query in page.blocks["sql"]]
    assert all(results)
    error, changed, rare, typical = results[2:]
    assert gallery_ids(page, "Largest expected error")[0] == error[0][0]
    assert gallery_ids(page, "Most changed")[0] == changed[0][0]
    # Several frames are the same picture.
    assert gallery_ids(page, "Rarest classes")[0] in {frame_id for frame_id, pixels in rare if pixels == rare[0][1]}
    assert gallery_ids(page, "Typical")[0] in {frame_id for frame_id, _ in typical}


def test_every_command_is_one(page):
    for line in page.blocks["shell"]:
        _, name, *words = shlex.split(line)
        assert cli.parse(name, words)


def test_the_command_of_a_gallery_writes_the_masks_of_its_frames_and_of_more(folder, page, tmp_path):
    lines = [shlex.split(line) for line in page.blocks["shell"] if " export-masks " in line]
    titles = ("Largest expected error", "Most changed", "Rarest classes")
    for title, (_, *words) in zip(titles, lines, strict=True):
        words[words.index("masks")] = str(tmp_path / title)
        assert cli.main(words) == 0
        written = {str(path.relative_to(tmp_path / title)) for path in (tmp_path / title).rglob("*.png")}
        assert {f"{frame_id}.png" for frame_id in gallery_ids(page, title)} <= written
        assert len(written) >= 6


def test_each_rare_class_has_the_frame_with_most_of_it(folder, page):
    sums = rows_of(folder, "SELECT " + ", ".join(f"sum(pixels_{name})" for name in CLASSES.names) + " FROM FRAMES")[0]
    rarest = [name for n, name in sorted(zip(sums, CLASSES.names, strict=True)) if n][:6]
    rare_pixels = re.findall(r"(\w+) ([\d,]+) px", page.text)
    assert [name for name, _ in rare_pixels] == rarest
    ((most,),) = rows_of(folder, f"SELECT max(pixels_{rarest[0]}) FROM FRAMES")
    assert rare_pixels[0][1] == f"{most:,}"


def test_a_gallery_shows_frames_and_masks_of_their_own_and_no_neighbours(folder, page):
    ids = gallery_ids(page, "Largest expected error")
    assert len(ids) == 6
    with tarfile.open(folder / "frames.tar") as tar:
        frames = {m.name: np.asarray(Image.open(io.BytesIO(tar.extractfile(m).read()))) for m in tar}
    for frame_id in ids:
        query = f"SELECT uri, mask, sequence, frame_index FROM FRAMES WHERE frame_id = '{frame_id}'"
        ((uri, mask, *_),) = rows_of(folder, query)
        assert uri == f"{folder}/frames.tar"
        colors_HWC = CLASSES.colorize(np.asarray(Image.open(io.BytesIO(mask))))
        frame, overlay = (page.images[f"{kind} {frame_id}"][..., :3].astype(float) for kind in ("frame", "mask of"))
        small = [
            np.asarray(Image.fromarray(o).resize((64, 48))).astype(float)
            for o in (frame.astype(np.uint8), overlay.astype(np.uint8))
        ]
        nearest = min(frames, key=lambda name: np.abs(frames[name] - small[0]).mean())
        assert np.abs(frames[nearest] - small[0]).mean() < 10
        assert np.abs(0.45 * frames[nearest] + 0.55 * colors_HWC - small[1]).mean() < 12
    places = [re.match(r"(.*)/(\d+)\.jpg", frame_id).groups() for frame_id in ids]
    apart = [abs(int(a[1]) - int(b[1])) for a in places for b in places if a is not b and a[0] == b[0]]
    assert all(distance >= 30 for distance in apart)


def test_masks_are_read_for_galleries_alone_and_of_few_row_groups(folder, page, tmp_path):
    """The masks of all other row groups are made unreadable: whoever reads one of them fails."""
    out = tmp_path / "labels"
    shutil.copytree(folder / "labels", out)
    used = {
        path
        for title in ("Largest expected error", "Most changed", "Rarest classes", "Typical")
        for path in gallery_ids(page, title)
    }
    n_spoilt = n_groups = 0
    for path in sorted((out / "frames").iterdir()):
        file, data = pq.ParquetFile(path), bytearray(path.read_bytes())
        column = file.schema_arrow.get_field_index("mask")
        for group in range(file.num_row_groups):
            n_groups += 1
            if used & set(file.read_row_group(group, columns=["frame_id"])["frame_id"].to_pylist()):
                continue
            chunk = file.metadata.row_group(group).column(column)
            start = chunk.data_page_offset
            data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
            n_spoilt += 1
        path.write_bytes(data)
    assert n_spoilt > n_groups // 3
    before = page.source
    assert cli.main(["report", str(out)]) == 0
    assert (out / "report.html").read_text().replace(str(out), str(folder / "labels")) == before


def test_more_frames_are_shown_where_they_are_asked_for_below_5_mb(folder, page, tmp_path):
    line = page.blocks["shell"][-1]
    assert line.endswith(" --gallery 24 --out more.html")
    words = shlex.split(line)[1:-1]
    assert cli.main([*words, str(tmp_path / "more.html")]) == 0
    more = HtmlPage(tmp_path / "more.html")
    assert len(gallery_ids(more, "Most changed")) == 24 and line not in more.blocks["shell"]
    assert len(page.source) < len(more.source) < pages.MAX_BYTES


def test_drives_that_are_asked_for_are_drawn(folder, tmp_path):
    words = ["report", str(folder / "labels"), "--out", str(tmp_path / "a.html"), "--sequence"]
    assert cli.main([*words, "drive00004"]) == 0
    strips = re.findall(r'<div class="title"><b>(.*?)</b>', (tmp_path / "a.html").read_text())
    assert strips == ["drive00004 · cam0", "drive00004 · cam1"]


# --- frames that are not there ---


def test_frames_that_have_gone_or_changed_leave_their_masks_and_a_word(folder, tmp_path):
    shutil.copytree(folder / "labels", tmp_path / "labels")
    plan = plans.read_plan(str(tmp_path / "labels"))
    tar = folder / "frames.tar"
    kept, times = tar.read_bytes(), tar.stat()
    try:
        tar.write_bytes(kept + b"\0")
        changed = HtmlPage(write_label_page(plan, str(tmp_path / "changed.html")))
        tar.unlink()
        gone = HtmlPage(write_label_page(plan, str(tmp_path / "gone.html")))
    finally:
        tar.write_bytes(kept)
        os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))  # which is its version
    assert "the frame has changed" in changed.text and "the frame has gone" in gone.text
    for page in (changed, gone):
        assert not any(alt.startswith("frame ") for alt in page.images)
    (name, image), *_ = ((alt, image) for alt, image in gone.images.items() if alt.startswith("mask of "))
    ((mask,),) = rows_of(folder, f"SELECT mask FROM FRAMES WHERE frame_id = '{name.removeprefix('mask of ')}'")
    colors = {tuple(color) for color in CLASSES.colorize(np.asarray(Image.open(io.BytesIO(mask)))).reshape(-1, 3)}
    assert {tuple(color) for color in image[..., :3].reshape(-1, 3)} <= colors


def test_without_sources_no_file_outside_the_output_is_opened(folder, tmp_path, monkeypatch):
    opened: list[str] = []
    read_bytes = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri, *a: opened.append(uri) or read_bytes(uri, *a))
    words = ["report", str(folder / "labels"), "--no-sources", "--out", str(tmp_path / "a.html")]
    (folder / "frames.tar").rename(folder / "kept.tar")
    try:
        assert cli.main(words) == 0
    finally:
        (folder / "kept.tar").rename(folder / "frames.tar")
    page = HtmlPage(tmp_path / "a.html")
    assert "frames are not read (--no-sources)" in page.text and "the model was not read (--no-sources)" in page.text
    assert opened and all(uri.startswith(str(folder / "labels")) for uri in opened)


def test_a_job_opens_no_frame_outside_its_own_listing(folder, tmp_path):
    plan = plans.read_plan(str(folder / "labels"))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "x.png")
    listing = list_archives([str(tmp_path)])
    page = HtmlPage(write_label_page(plan, str(tmp_path / "a.html"), PageOptions(gallery=1), listing=listing))
    assert "the frame lies outside --frames" in page.text

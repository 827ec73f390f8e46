"""Outputs of result version 4: read, verified and exported as ever, and neither grown nor finished."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from labelled import CLASSES, label, make_plan, published, run, write_archive
from old_outputs import COLUMNS_4, write_version_4
from PIL import Image

from unet_ray import cli
from unet_ray.archives.listing import list_archives
from unet_ray.output import plans, verify
from unet_ray.output.rows import RESULT_VERSION
from unet_ray.reports import interest, preview

REFUSAL = (
    "{out} holds labels of result version 4, and this release makes version 5: it can be read, verified and exported, "
    "but neither grown nor finished; give another --out, or --overwrite, or go on with the release that began it "
    "(unet-ray 0.0.9)"
)


@pytest.fixture
def root(tmp_path: Path) -> str:
    return write_archive(tmp_path / "log")


def test_it_is_verified_and_its_masks_are_exported(root, tmp_path, capsys):
    out = str(tmp_path / "out")
    write_version_4(root, out, reject=("b/4.png",))
    before = published(out)
    assert cli.main(["verify", out]) == 0 and published(out) == before
    assert pq.read_schema(tmp_path / "out/frames/part-00000.parquet").names == list(COLUMNS_4)
    assert cli.main(["export-masks", out, "--out", str(tmp_path / "masks")]) == 0
    assert capsys.readouterr().out.endswith(
        f"12 masks written to {tmp_path}/masks; 1 rejected frame has none\nLook at: {tmp_path}/masks\n"
    )
    rows = [row for chunk in plans.read_plan(out).chunks for row in label(chunk, reject=("b/4.png",)).to_pylist()]
    for row in (row for row in rows if row["status"] == "ok"):
        mask = np.asarray(Image.open(tmp_path / "masks" / f"{row['frame_id']}.png"))
        assert mask.ravel().tolist() == list(row["mask"])


def test_its_masks_are_exported_for_other_tools(root, tmp_path, capsys):
    out, voc = str(tmp_path / "out"), tmp_path / "voc"
    write_version_4(root, out)
    options = ("--format", "voc", "--where", "confidence > 0.5 and sequence = 'b'")
    assert cli.main(["export-masks", out, "--out", str(voc), *options]) == 0
    assert (voc / "ImageSets/Segmentation/trainval.txt").read_text() == "".join(f"b/{n}\n" for n in range(7))
    assert cli.main(["export-masks", out, "--out", str(voc), "--where", "content_digest is null"]) == 2
    assert "there is no column content_digest" in capsys.readouterr().err
    # Its frames are no images: a version without digests is asked by what the files are.
    assert cli.main(["export-masks", out, "--out", str(tmp_path / "frames"), "--with-frames"]) == 1
    assert "none of 13 frames is as it was labelled: a/0.png: 2 bytes that begin with" in capsys.readouterr().err


def test_damage_of_it_is_named(root, tmp_path):
    out = tmp_path / "out"
    write_version_4(root, str(out))
    path = out / "frames/part-00001.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    assert verify.verify(str(out)) == [
        "frames/part-00001.parquet: its content is not what was published (sha256 differs)"
    ]


def test_its_preview_is_drawn(root, tmp_path):
    for path in sorted((tmp_path / "log").rglob("*.png")):
        Image.new("RGB", (3, 2)).save(path)
    out = str(tmp_path / "out")
    write_version_4(root, out)
    uris = [str(path) for path in sorted((tmp_path / "out/frames").iterdir())]
    facts = interest.read_interest(uris, np.array([40, 38]), CLASSES)
    assert len(facts.drive_N) == 13 and facts.confidence_N.tolist() == [0.75] * 13 and facts.is_labelled_N.all()
    plan = plans.read_plan(out)
    assert preview.write_preview(plan, list_archives([root])) == f"{out}/preview.png"
    with Image.open(f"{out}/preview.png") as picture:
        assert picture.size[0] > 1000


@pytest.mark.parametrize("state", ["finished", "unfinished", "grown"])
def test_it_is_neither_grown_nor_finished_and_both_versions_are_named(state, root, tmp_path):
    assert RESULT_VERSION == 5
    out = str(tmp_path / "out")
    write_version_4(root, out, finished=state != "unfinished")
    if state == "grown":
        write_archive(tmp_path / "log", {"a": 7})
    before = published(out)
    with pytest.raises(ValueError) as caught:
        run(root, out)
    assert str(caught.value) == REFUSAL.format(out=out)
    assert published(out) == before
    assert json.loads(before["run.json"])["lineage"]["result_version"] == 4
    plan = make_plan(root, out, overwrite=True)
    assert plan.lineage.result_version == 5


def test_it_has_no_digests_to_compare_sources_with(root, tmp_path, capsys):
    out = str(tmp_path / "out")
    write_version_4(root, out)
    assert cli.main(["verify", out, "--sources"]) == 2
    assert capsys.readouterr() == (
        "",
        f"unet-ray: error: {out} has result version 4, which kept no digests of frames; --sources needs 5 or later: "
        "verify without it, or label the frames anew with another --out\n",
    )

"""`unet-ray report`: outputs of every kind and state, names that mean something, and the page beside a job."""

from __future__ import annotations

import re

import duckdb
import labelled
import pytest
from html_page import HtmlPage
from old_outputs import write_version_4

from unet_ray import cli, storage
from unet_ray.archives.listing import list_archives
from unet_ray.labelling.result import show_report
from unet_ray.output import plans

# --- other outputs ---


def test_an_output_of_version_4_has_its_page_without_what_it_lacks(tmp_path, capsys):
    root, out = labelled.write_archive(tmp_path / "log"), str(tmp_path / "out")
    write_version_4(root, out, reject=("b/4.png",))
    assert cli.main(["report", out]) == 0
    page = HtmlPage(tmp_path / "out" / "report.html")
    assert "13 listed = 12 labelled + 1 rejected" in page.text and "result version 4" in page.text
    assert "Most changed" not in page.text and "expected error 25.0%" in page.text
    assert all(duckdb.sql(query).fetchall() for query in page.blocks["sql"])
    assert "the frame cannot be decoded" in page.text  # the archive's files are no images


def test_an_output_without_a_label_has_a_page(tmp_path):
    root, out = labelled.write_archive(tmp_path / "log", {"a": 2}), str(tmp_path / "out")
    labelled.run(root, out, reject=("a/0.png", "a/1.png"))
    assert cli.main(["report", out]) == 0
    page = HtmlPage(tmp_path / "out" / "report.html")
    assert "2 listed = 0 labelled + 2 rejected" in page.text and "No frame is labelled" in page.text


def test_an_output_in_a_store_has_its_page_there(tmp_path):
    out = "memory://page/out"
    labelled.run(labelled.write_archive(tmp_path / "log"), out, reject=("b/2.png",))
    assert cli.main(["report", out]) == 0
    page = storage.read_bytes(f"{out}/report.html").decode()
    assert "FROM &#39;memory://page/out/frames/*.parquet&#39;" in page and "13</b> listed" in page
    storage.delete_tree("memory://page")


NASTY = ('<script>alert(1)</script>"', "' onerror=alert(1) x='", "a\u202eb\nc", "{{ 7 * 7 }}", "%{x}&amp;")


def test_names_that_mean_something_to_html_are_letters(tmp_path):
    """Of frames and drives, of the output's folder, of its configuration and of errors."""
    root, out = str(tmp_path / "log"), str(tmp_path / "<b>o[u]t'&")
    names = [name.replace("/", "_") for name in NASTY]
    labelled.write_archive(tmp_path / "log", dict.fromkeys(names, 3))
    plan = labelled.make_plan(root, out, config_yaml="model: '<img src=x onerror=alert(2)>'\nframes: ['<i>']\n")
    assert plan.n_frames == 15
    labelled.run(root, out, reject=(f"{names[0]}/1.png",))
    assert cli.main(["report", out]) == 0
    page = HtmlPage(f"{out}/report.html")
    text = " ".join(page.text.split())
    assert f"{names[0]}/1.png" in text and "{{ 7 * 7 }}" in text and "<img src=x onerror=alert(2)>" in text
    assert r"a\u202eb\nc" in text and "\u202e" not in page.source
    assert all(duckdb.sql(query).fetchall() for query in page.blocks["sql"])
    assert re.search(r"http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'", page.source)


# --- what is refused ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gallery", "0"], "--gallery is 0; it must be 1 to 24"),
        (["--out", "page.pdf"], "--out is page.pdf; it is one file, give a name that ends in .html"),
        (["--sequence", "none"], "--sequence is 'none'; the output's drives are a, b, c"),
    ],
)
def test_bad_options_are_one_line(words, message, tmp_path, capsys):
    out = str(tmp_path / "out")
    labelled.run(labelled.write_archive(tmp_path / "log"), out)
    assert cli.main(["report", out, *words]) == 2
    assert capsys.readouterr() == ("", f"unet-ray: error: {message}\n")
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    message = f"{tmp_path} is neither an output of segment nor a training run: run.json is missing"
    assert capsys.readouterr() == ("", f"unet-ray: error: {message}\n")
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    message = f"{tmp_path}/none is not an output of segment: run.json is missing"
    assert capsys.readouterr().err == f"unet-ray: error: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_output_says_how_far_it_is(tmp_path, capsys):
    out = str(tmp_path / "out")
    write_version_4(labelled.write_archive(tmp_path / "log"), out, finished=False)
    assert cli.main(["report", out]) == 2
    message = f"{out} is not finished (or was found damaged): 3 of 13 frames are done; run segment again, then report"
    assert capsys.readouterr() == ("", f"unet-ray: error: {message}\n")
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("name", ["frames/part-00000.parquet", "class_statistics.parquet"])
def test_damage_is_one_line_and_leaves_no_page(name, tmp_path, capsys):
    out = tmp_path / "out"
    labelled.run(labelled.write_archive(tmp_path / "log"), str(out))
    data = (out / name).read_bytes()
    (out / name).write_bytes(b"\0" * (len(data) - 8) + data[-8:])
    assert cli.main(["report", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"unet-ray: error: {out}/{name} is damaged (") and error.count("\n") == 1
    assert error.endswith("; unet-ray verify names all that is, then segment makes it again\n")
    assert not (out / "report.html").exists()


# --- beside a job ---


def test_a_job_writes_it_where_it_is_missing_or_something_is_new(tmp_path, capsys):
    root, out = labelled.write_archive(tmp_path / "log"), str(tmp_path / "out")
    labelled.run(root, out)
    plan, listing, path = plans.read_plan(out), list_archives([root]), tmp_path / "out" / "report.html"
    for old in (None, b"", b"<html>"):
        if old is not None:
            path.write_bytes(old)
        show_report(plan, listing, False)
        assert path.read_text().endswith("</html>\n")
    path.write_text("mine</html>")
    show_report(plan, listing, False)
    assert path.read_text() == "mine</html>"
    show_report(plan, listing, True)
    assert path.read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out == f"report: {path}\n" * 5


def test_a_page_that_cannot_be_written_fails_no_job(tmp_path, capsys):
    root, out = labelled.write_archive(tmp_path / "log"), str(tmp_path / "out")
    labelled.run(root, out)
    (tmp_path / "out" / "report.html").mkdir()
    show_report(plans.read_plan(out), list_archives([root]), True)
    output = capsys.readouterr().out
    assert output.startswith("warning: report.html was not written: ") and output.count("\n") == 1
    assert output.endswith(f"; `unet-ray report {out}` tries again\n")


def test_overwrite_deletes_it(tmp_path):
    root, out = labelled.write_archive(tmp_path / "log"), str(tmp_path / "out")
    labelled.run(root, out)
    assert cli.main(["report", out]) == 0
    labelled.make_plan(root, out, overwrite=True)
    assert not (tmp_path / "out" / "report.html").exists()

"""`report.html` of a training run, from the files that a training leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from html_page import HtmlPage

from unet_ray import cli
from unet_ray.classes import ClassSet, SegmentationClass
from unet_ray.config import TrainConfig
from unet_ray.drawing import pictures
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.bundle import write_bundle
from unet_ray.model.metrics import confusion_csv, read_confusion_csv, summarize
from unet_ray.options.config_files import to_yaml
from unet_ray.reports.curves import draw_curves
from unet_ray.training.monitor import history_csv

CLASSES = ClassSet(
    name="three",
    classes=(
        SegmentationClass(name="road", color=(128, 64, 128)),
        SegmentationClass(name="sky", color=(70, 130, 180)),
        SegmentationClass(name="car", color=(0, 0, 142)),
    ),
)
CONFUSION = np.array([[90, 8, 2], [5, 45, 0], [30, 0, 20]])
CONFIG = TrainConfig(images="<img>", masks="m", classes="c.yaml", out="o", epochs=3, learning_rate=2e-3, augment=True)
HISTORY = [
    {
        "epoch": n,
        "loss": 1.0 / n,
        "accuracy": 0.5,
        "val/loss": 2.0 / n,
        "val/pixel_accuracy": 0.6,
        "val/mean_iou": 0.2 * n,
    }
    for n in (1, 2, 3)
]


def write_run(run: Path, *, leak_rate: float | None = 0.31) -> None:
    run.mkdir()
    metrics = {"epochs": 3, "best_epoch": 2, "temperature": 1.5, "val/expected_calibration_error/after": 0.02}
    metrics |= {"val/expected_calibration_error/before": 0.09}
    metrics |= {f"val/{key}": value for key, value in summarize(CONFUSION, CLASSES.names).items()}
    about = {"train_frames": 240, "validation_frames": 48, "split": "2 of 12 drives", "mask_format": "ids"}
    about |= {"versions": {"unet-ray": "0.1.0"}, "class_weights": {}}
    (run / "run.json").write_text(json.dumps(about | ({} if leak_rate is None else {"leak_rate": leak_rate})))
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "config.yaml").write_text(to_yaml(CONFIG))
    (run / "history.csv").write_bytes(history_csv(HISTORY))
    (run / "confusion.csv").write_bytes(confusion_csv(CONFUSION, CLASSES.names))
    mask = np.zeros((6, 8), np.uint8)
    (run / "samples.png").write_bytes(pictures.draw_samples([np.zeros((6, 8, 3), np.uint8)], [mask], [mask], CLASSES))
    network = UnetConfig(image_height_px=8, image_width_px=8, n_classes=3)
    write_bundle(str(run / "model"), {"kernel": np.zeros(1, np.float32)}, network, CLASSES, metrics, temperature=1.5)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> HtmlPage:
    run = tmp_path_factory.mktemp("training") / "first run"
    write_run(run)
    assert cli.main(["report", str(run)]) == 0
    return HtmlPage(run / "report.html")


def test_scores_are_those_of_the_confusion_matrix(page):
    assert "0.609 mean IoU on validation frames" in page.text  # the mean of 90 / 135, 45 / 58 and 20 / 52
    assert "road 0.667 0.720 0.900 50.0%" in page.text and "car 0.385 0.909 0.400 25.0%" in page.text
    assert "car road 60.0% 15.0%" in page.text  # 30 of 50 pixels, and of 200
    assert "77.5% of their pixels are right" in page.text and "2.0% calibration error, 9.0% before" in page.text
    assert "#00008e" in page.source  # the colour of car, as the model folder has it


def test_rows_of_the_matrix_are_shares_of_the_true_class(page):
    rows = re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', page.source, re.DOTALL)
    cells = {name: re.findall(r"<td[^>]*>(.*?)</td>", row) for name, row in rows}
    assert cells == {"road": ["90", "8", "2"], "sky": ["10", "90", ""], "car": ["60", "", "40"]}


def test_data_split_leak_rate_and_options_are_named(page):
    assert "training 240 frames validation 48 frames split 2 of 12 drives" in page.text
    assert "31.0% of the validation frames leak from training" in page.text and "their metrics flatter" in page.text
    assert "--learning-rate 0.002" in page.text and "frames <img> masks m" in page.text
    changed, _, unchanged = page.text.partition("All others")
    assert "--augment yes" in changed and "--batch-size 32" in unchanged and "--epochs 3" in changed
    assert set(page.images) == {"frames, true masks and predicted masks"}


def test_curves_take_the_colours_of_the_page(page):
    drawings = draw_curves(HISTORY)
    assert [re.findall(r">(Loss|Accuracy|Mean IoU)<", svg) for svg in drawings] == [
        ["Loss"],
        ["Accuracy"],
        ["Mean IoU"],
    ]
    for svg in drawings:
        assert not re.findall(r"#[0-9a-f]{6}", re.sub(r'(href="|url\()#\w+', "", svg)) and "DejaVu" not in svg
        assert "var(--accent)" in svg and str(svg) in page.source
    assert ">best 0.600, epoch 3<" in drawings[2]
    ids = re.findall(r' id="(.*?)"', "".join(drawings))
    assert len(ids) == len(set(ids))
    assert draw_curves(HISTORY) == drawings
    assert draw_curves([{"epoch": 1, "loss": 0.5}])[0].count("<svg") == 1


def test_a_run_of_an_earlier_version_has_a_page_without_what_it_lacks(tmp_path):
    run = tmp_path / "run"
    write_run(run, leak_rate=None)
    for name in ("confusion.csv", "samples.png", "history.csv"):
        (run / name).unlink()
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({k: v for k, v in metrics.items() if "calibration" not in k}))
    assert cli.main(["report", str(run)]) == 0
    page = HtmlPage(run / "report.html")
    assert "road 0.667 0.720 0.900" in page.text
    assert not [word for word in ("leak", "Confusion", "How did it train?", "calibration") if word in page.text]


def test_an_unfinished_run_says_how_far_it_is(tmp_path, capsys):
    run = tmp_path / "run"
    write_run(run)
    (run / "metrics.json").unlink()
    (run / "history.csv").write_bytes(history_csv(HISTORY[:2]))
    assert cli.main(["report", str(run)]) == 2
    message = f"{run} is not finished: 2 of 3 epochs are done; give its train command again, then report"
    assert capsys.readouterr() == ("", f"unet-ray: error: {message}\n")
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["metrics.json", "config.yaml", "history.csv", "confusion.csv"])
def test_a_damaged_file_of_a_run_is_named(name, tmp_path, capsys):
    run = tmp_path / "run"
    write_run(run)
    (run / name).write_bytes(b"epoch\n[\xff1")
    assert cli.main(["report", str(run)]) == 1
    message = f"{run}/{name} is damaged; restore it, or train again with --overwrite"
    assert capsys.readouterr().err == f"unet-ray: error: {message}\n"
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("words", [["--sequence", "a"], ["--gallery", "3"], ["--no-sources"]])
def test_options_of_an_output_are_refused_for_a_run(words, tmp_path, capsys):
    run = tmp_path / "run"
    write_run(run)
    assert cli.main(["report", str(run), *words]) == 2
    message = f"{words[0]} is for an output of segment; {run} is a training run"
    assert capsys.readouterr().err == f"unet-ray: error: {message}\n"


def test_a_confusion_matrix_is_read_as_it_was_written():
    matrix_KK, names = read_confusion_csv(confusion_csv(CONFUSION, CLASSES.names))
    assert matrix_KK.tolist() == CONFUSION.tolist() and names == list(CLASSES.names)
    with pytest.raises(ValueError, match="it holds"):
        read_confusion_csv(b"true,a,b\na,1,2\n")

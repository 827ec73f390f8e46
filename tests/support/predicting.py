"""A model's predictions in a process of its own, compared with what `segment` wrote of the same frames."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from unet_ray import PACKAGE

PROGRAM = """
import json, sys, time, warnings
warnings.simplefilter("error")
import unet_ray
import numpy as np
import pyarrow.parquet as pq
from pathlib import Path
from PIL import Image
from unet_ray.mask_png import encode_mask_png

question = json.loads(sys.argv[1])
answers = {"differences": [], "others": []}
model = unet_ray.load(question["model"], **question["options"])
labels = unet_ray.open_labels(question["labels"])
paths = [Path(question["frames"], label.frame_id) for label in labels]
predictions = []
for label, path in zip(labels, paths):
    predictions.append(prediction := model.predict(path))
    answers.setdefault("first_cpu_s", time.process_time())
    same = [
        prediction.mask.shape == label.mask.shape and prediction.mask.tobytes() == label.mask.tobytes(),
        prediction.confidence == label.confidence,
        prediction.class_pixels == label.class_pixels,
    ]
    if not all(same):
        answers["differences"].append([label.frame_id, *same])

files = sorted(Path(question["labels"], "frames").glob("*.parquet"))
rows = [row for file in files for row in pq.ParquetFile(file).read(["mask", "mask_encoding"]).to_pylist()]
assert {row["mask_encoding"] for row in rows} == {"png"}
written = [encode_mask_png(prediction.mask, model.class_set.palette_K3) for prediction in predictions]
answers["files"] = written == [row["mask"] for row in rows]

pillow = []
for path in paths:
    with Image.open(path) as image:
        image.load()
        pillow.append(image)
arrays = [np.asarray(image.convert("RGB")) for image in pillow]
for name, given in {"paths": [str(path) for path in paths], "Pillow": pillow, "arrays": arrays}.items():
    of_list = model.predict(given)
    same = all(one.mask.tobytes() == other.mask.tobytes() for one, other in zip(of_list, predictions, strict=True))
    answers["others"].append([name, same and of_list[-1].confidence == predictions[-1].confidence])
overlay = predictions[0].overlay()
answers["overlay"] = [overlay.mode, *overlay.size]
answers["html"] = predictions[0]._repr_html_()
answers["text"] = [repr(predictions[0]), repr(model)]
answers["loaded"] = [name for name in ("ray", "tensorflow") if name in sys.modules]
network = model._labeler._network
answers["traces"] = network.experimental_get_tracing_count() if network else None
print(json.dumps(answers))
"""


def predict_and_compare(model: Path | str, frames: Path | str, labels: Path | str, **options: Any) -> dict[str, Any]:
    """Predicts every frame of an output, alone and in lists, and returns what the program found."""
    question = {"model": str(model), "frames": str(frames), "labels": str(labels), "options": options}
    command = [sys.executable, "-c", PROGRAM, json.dumps(question)]
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr  # of Python; TensorFlow 2.21 has lines of its own
    return json.loads(done.stdout)


def require_same(answers: dict[str, Any]) -> None:
    """Every mask, confidence and count is the output's, to the bit, in whatever form the frame was given."""
    assert answers["differences"] == [] and answers["files"]
    assert answers["others"] == [["paths", True], ["Pillow", True], ["arrays", True]]
    assert answers["loaded"] == ["tensorflow"]

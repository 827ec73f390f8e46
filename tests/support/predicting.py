"""A model's predictions in a process of its own, compared with what a labelling wrote of the same frames."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

import unet_ray
from unet_ray import PACKAGE
from unet_ray.pixels.mask_png import encode_mask_png

PROGRAM = """
import json, sys, time, warnings
warnings.simplefilter("error")
import unet_ray
import predicting

answers = []
for question in json.loads(sys.argv[1]):
    if question["with_steps"]:
        import without_ray

        without_ray.label(question["model"], question["frames"], question["labels"], **question["options"])
    answers.append(predicting.compare(**question))
print(json.dumps(answers))
"""


def predict_and_compare(questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers `compare` of each question in one new process."""
    paths = [str(PACKAGE.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", PROGRAM, json.dumps([{"with_steps": False, **question} for question in questions])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr  # of Python; TensorFlow 2.21 has lines of its own
    return json.loads(done.stdout)


def compare(model: str, frames: str, labels: str, options: Mapping[str, Any], **_: Any) -> dict[str, Any]:
    """Predicts every frame of an output, alone and in lists; returns what is not the output's, and other facts."""
    answer: dict[str, Any] = {"differences": []}
    network = unet_ray.load(model, device="cpu", **{k: v for k, v in options.items() if k != "mask_encoding"})
    rows = list(unet_ray.open_labels(labels))
    paths = [Path(frames, row.frame_id) for row in rows]
    predictions = [network.predict(path) for path in paths]
    for row, prediction in zip(rows, predictions, strict=True):
        same = [
            prediction.mask.shape == row.mask.shape and prediction.mask.tobytes() == row.mask.tobytes(),
            prediction.confidence == row.confidence,
            prediction.class_pixels == row.class_pixels,
        ]
        if not all(same):
            answer["differences"].append([row.frame_id, *same])
    answer["files"] = _written(labels) == [
        _encoded(row["mask_encoding"], p) for row, p in zip(rows, predictions, strict=True)
    ]
    pillow = [_opened(path) for path in paths]
    arrays = [np.asarray(image.convert("RGB")) for image in pillow]
    for name, given in {"paths": [*map(str, paths)], "Pillow": pillow, "arrays": arrays}.items():
        others = network.predict(given)
        are_same = [a.mask.tobytes() == b.mask.tobytes() for a, b in zip(others, predictions, strict=True)]
        answer[name] = all(are_same) and [p.confidence for p in others] == [p.confidence for p in predictions]
    function = network._labeler._network
    return answer | {
        "loaded": [name for name in ("ray", "tensorflow") if name in sys.modules],
        "traces": function.experimental_get_tracing_count() if function else None,
        "sizes": sorted({row.mask.shape for row in rows}),
        "model": repr(network),
        "confident": sum(p.confidence is not None for p in predictions),
    }


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def _written(labels: str) -> list[bytes]:
    files = sorted(Path(labels, "frames").glob("*.parquet"))
    return [mask for file in files for mask in pq.ParquetFile(file).read(["mask"])["mask"].to_pylist()]


def _encoded(encoding: str, prediction: Any) -> bytes:
    is_png = encoding == "png"
    return encode_mask_png(prediction.mask, prediction.class_set.palette_K3) if is_png else prediction.mask.tobytes()


def require_same(answer: Mapping[str, Any]) -> None:
    """Every mask, confidence and count is the output's, to the bit, in whatever form the frame was given."""
    assert answer["differences"] == [] and answer["files"]
    assert answer["paths"] and answer["Pillow"] and answer["arrays"]

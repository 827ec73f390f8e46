"""What a command says while it works: the beginnings of its lines, in their order."""

from __future__ import annotations

from collections.abc import Sequence


def assert_in_order(output: str, beginnings: Sequence[str]) -> None:
    """Some lines of an output begin so, one after another; others may stand between them."""
    lines = iter(output.splitlines())
    for beginning in beginnings:
        assert any(line.startswith(beginning) for line in lines), f"no line {beginning!r} in its place:\n{output}"


RAY_STARTS = ("starting Ray on this machine", "Ray ")

TRAINING = (
    *("listing ", "19 pairs; ", "masks: ", "device: "),
    *("reading 14 pairs to train on", "14 of 14 pairs (100%), "),
    *("reading 5 pairs to validate with", "5 of 5 pairs (100%), ", "2 workers x 1 CPU; ", "leak rate: "),
    *("starting the workers", "loading TensorFlow, in 2 workers", "compiling the network", "precision: "),
    *("epoch  1/12  ", "epoch 12/12  ", "calibrating the confidence on 5 validation frames"),
    *("writing the model and its pictures", "mean IoU ", "temperature ", "model: "),
)
"""Of a training of `small_training`, on a Ray that runs."""

LABELLING = (
    *("listing ", "device: ", "planning the work on 18 listed frames"),
    *("18 frames in 5 chunks, 18 in 5 to do", "starting ", "18 of 18 frames (100%), "),
    *("publishing the rows and their statistics", "18 frames: 18 labelled", "masks and statistics: ", "preview: "),
)
"""Of the archive of `test_segmentation`, on a Ray that runs."""

EVALUATION = (
    *("listing ", "masks: ", "device: ", "reading 5 pairs", "5 of 5 pairs (100%), "),
    *("loading and compiling the network", "5 of 5 frames (100%), ", "mean IoU ", "boundary F1 "),
)
"""Of the validation frames of `small_training`, on a Ray that runs."""

"""TensorBoard reads what a training writes for it: numbers by epoch, and the samples as pictures."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_training import CLASSES, write_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c, masked_crc32c

from unet_ray.classes import ClassSet
from unet_ray.pairs.pairs import find_pairs, load_pair
from unet_ray.training import event_files, sample_log
from unet_ray.training.batches import FileFrames, IngestPlan
from unet_ray.training.event_files import image_file, scalar_file
from unet_ray.training.events import EpochDone, Restored, Sampled
from unet_ray.training.monitor import EVENT_FILE, Monitor
from unet_ray.training.sample_log import SampleLog, is_shown

CLASS_SET = ClassSet.from_dict(CLASSES)
HISTORY = [
    {"epoch": 1, "loss": 0.75, "val/mean_iou": None, "step": 4, "wall_time_s": 1.8e9 + 0.25},
    {"epoch": 2, "loss": math.nan, "val/mean_iou": 0.1, "step": 8, "wall_time_s": 1.8e9 + 9},
    {"epoch": 300, "loss": 1e-7, "val/mean_iou": 0.7, "step": 123_456, "wall_time_s": 1.8e9 + 99},
]


def read(folder: Path) -> EventAccumulator:
    """A folder of event files as TensorBoard sees it; pictures all."""
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


def scalars(events: EventAccumulator) -> dict[str, list[tuple[int, float, float]]]:
    tags = events.Tags()["scalars"]
    return {tag: [(one.step, one.wall_time, one.value) for one in events.Scalars(tag)] for tag in tags}


def test_numbers_are_read_back(tmp_path):
    (tmp_path / EVENT_FILE).write_bytes(scalar_file(HISTORY))
    read_back = scalars(read(tmp_path))
    assert read_back.keys() == {"loss", "val/mean_iou", "step"}
    for tag, values in read_back.items():
        rows = [row for row in HISTORY if row[tag] is not None]
        assert [(step, time) for step, time, _ in values] == [(row["epoch"], row["wall_time_s"]) for row in rows]
        assert [value for *_, value in values] == pytest.approx([row[tag] for row in rows], rel=1e-6, nan_ok=True)


def test_a_file_only_grows_at_its_end():
    files = [scalar_file(HISTORY[:n_epochs]) for n_epochs in (1, 2, 3)]
    assert files[1].startswith(files[0]) and files[2].startswith(files[1]) and len(files[2]) > len(files[1])


@pytest.mark.parametrize("data", [b"", b"\0", b"123456789", bytes(range(256)) * 5])
def test_checksums_are_tensorboards(data):
    assert event_files._checksum(data) == masked_crc32c(data).to_bytes(4, "little")
    assert crc32c(b"123456789") == 0xE3069283  # of RFC 3720's polynomial


def test_a_picture_is_read_back(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 200, 3), np.uint8)).save(buffer, "PNG")
    (tmp_path / EVENT_FILE).write_bytes(image_file("samples", buffer.getvalue(), 12, 1.8e9))
    (image,) = read(tmp_path).Images("samples")
    assert (image.step, image.wall_time, image.height, image.width) == (12, 1.8e9, 30, 200)
    assert image.encoded_image_string == buffer.getvalue()


@pytest.mark.parametrize(
    ("n_epochs", "epochs"),
    [(1, [1]), (4, [1, 2, 3, 4]), (24, [1, 3, 6, 9, 12, 15, 18, 21, 24]), (118, [1, *range(12, 118, 12), 118])],
)
def test_about_ten_epochs_are_shown(n_epochs, epochs):
    assert [epoch for epoch in range(1, n_epochs + 1) if is_shown(epoch, n_epochs)] == epochs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    return root


def pairs_of(data: Path):
    return find_pairs(str(data / "frames"), str(data / "masks")).pairs[:2]


def test_samples_are_pictures_of_their_epochs(data, tmp_path, monkeypatch):
    """Frame, true mask and predicted mask, as in samples.png; each file is read once."""
    pairs = pairs_of(data)
    loads = []
    monkeypatch.setattr(sample_log, "load_pair", lambda *arguments: loads.append(1) or load_pair(*arguments))
    log = SampleLog(str(tmp_path), pairs, CLASS_SET, "channel-max")
    for epoch, predicted in ((1, 0), (10, 2)):
        log.write(epoch, 1.8e9 + epoch, {0: np.full((37, 53), predicted, np.uint8), 1: np.zeros((37, 53), np.uint8)})
    assert len(loads) == 2
    names = sorted(path.name for path in (tmp_path / "tensorboard/samples").iterdir())
    assert names == [f"events.out.tfevents.{epoch:010d}.unet_ray" for epoch in (1, 10)]
    images = read(tmp_path / "tensorboard/samples").Images("samples")
    assert [(image.step, image.wall_time) for image in images] == [(1, 1.8e9 + 1), (10, 1.8e9 + 10)]
    for image, color in zip(images, (CLASS_SET.classes[0].color, CLASS_SET.classes[2].color), strict=True):
        picture = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
        assert picture.shape == (image.height, image.width, 3)
        right = picture[40:250, -325:-15]
        assert (right == color).all()


def test_a_frame_of_many_pixels_is_kept_small(tmp_path):
    for folder, pixels in (
        ("frames", np.zeros((1000, 2000, 3), np.uint8)),
        ("masks", np.full((1000, 2000), 7, np.uint8)),
    ):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "1.png")
    log = SampleLog(str(tmp_path / "run"), pairs_of(tmp_path), CLASS_SET, "ids")
    log.write(1, 1.8e9, {0: np.zeros((1000, 2000), np.uint8)})
    ((frame_HWC, mask_HW),) = log._loaded.values()
    assert frame_HWC.shape == (334, 667, 3) and mask_HW.shape == (334, 667)


def test_the_monitor_writes_them_and_a_sample_that_is_gone_ends_no_training(data, tmp_path, capsys):
    row = {"loss": 0.5, "images_per_s": 9.0, "seconds": 2.0, "wall_time_s": 1.8e9}
    masks = {0: np.zeros((37, 53), np.uint8)}
    monitor = Monitor(str(tmp_path), 3, None, SampleLog(str(tmp_path), pairs_of(data), CLASS_SET, "channel-max"))
    monitor.handle(EpochDone(row={"epoch": 1, **row}))
    monitor.handle(Sampled(epoch=1, masks=masks))
    assert [image.step for image in read(tmp_path / "tensorboard/samples").Images("samples")] == [1]
    assert scalars(read(tmp_path / "tensorboard"))["loss"] == [(1, 1.8e9, 0.5)]
    before = capsys.readouterr().out

    gone = pairs_of(data)[0].__class__(**{**vars(pairs_of(data)[0]), "image_uri": str(tmp_path / "gone.png")})
    monitor = Monitor(str(tmp_path), 3, None, SampleLog(str(tmp_path), [gone], CLASS_SET, "channel-max"))
    monitor.handle(Restored(epoch=1, history=({"epoch": 1, **row},)))
    for epoch in (2, 3):
        monitor.handle(EpochDone(row={"epoch": epoch, **row}))
        monitor.handle(Sampled(epoch=epoch, masks=masks))
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "warning" not in before and len(lines) == 1
    assert lines[0].startswith(f"warning: TensorBoard gets no further samples: {tmp_path}/gone.png: ")
    assert [row["epoch"] for row in monitor.history] == [1, 2, 3]


def test_a_worker_reads_its_samples_once(data, tmp_path):
    (pair, _) = pairs_of(data)
    plan = IngestPlan(class_set=CLASS_SET, mask_format="channel-max", image_size=(24, 32), keep_full_mask=True)
    frames = FileFrames(names=(pair.pair_id,), pairs=(pair,), plan=plan, keep=True)
    expected = FileFrames(names=(pair.pair_id,), pairs=(pair,), plan=plan).open()
    reader = frames.open()
    first = reader.read(0)
    Path(pair.mask_uri).rename(tmp_path / "away.png")
    try:
        again, full = reader.read(0), reader.full_mask(0)
    finally:
        (tmp_path / "away.png").rename(pair.mask_uri)
    for one, other, plain in zip(first, again, expected.read(0), strict=True):
        assert one is other and (one == plain).all()
    assert (full == expected.full_mask(0)).all() and full.shape == (37, 53)

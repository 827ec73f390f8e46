"""The main job on a log drawn by program: draw, train with two workers, pack, label, and read the labels back."""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pyarrow.dataset as ds

from unet_ray import storage
from unet_ray.classes import PRESETS, ClassSet
from unet_ray.config import DemoConfig, SegmentConfig, TrainConfig
from unet_ray.demo import synthetic
from unet_ray.messages import count
from unet_ray.model import metrics
from unet_ray.output.tables import read_parquet
from unet_ray.pixels import images

HEIGHT_PX, WIDTH_PX = 240, 320
TRAINING_DRIVES, TRAINING_FRAMES = 12, 24
ARCHIVE_DRIVES, ARCHIVE_FRAMES = 2, 40
MARK = "demo.txt"
"""File by which a folder is known as a demo's, so that nothing else is ever overwritten."""


def run_demo(config: DemoConfig) -> None:
    """Does the whole of it and prints what was made.

    Raises:
        ValueError: the folder holds something else.
    """
    from unet_ray.labelling.job import segment
    from unet_ray.training.job import train

    started = time.monotonic()
    out = storage.resolve(config.out)
    _claim(out, config.overwrite)
    log, archive = storage.join(out, "log"), storage.join(out, "archive")
    print(f"1. Drawing {TRAINING_DRIVES} drives to train on and {ARCHIVE_DRIVES} that training never sees", flush=True)
    _draw(log, config.seed, range(TRAINING_DRIVES), TRAINING_FRAMES)
    _draw(archive, config.seed, range(TRAINING_DRIVES, TRAINING_DRIVES + ARCHIVE_DRIVES), ARCHIVE_FRAMES)

    print(f"\n2. Training with {count(config.workers, 'worker')}", flush=True)
    run = storage.join(out, "run")
    train(training_config(config, log, run))

    print("\n3. Packing the unseen drives into a tar and labelling it", flush=True)
    tar, labels = storage.join(out, "archive.tar"), storage.join(out, "labels")
    if not storage.exists(tar):  # written anew, its frames would count as changed since they were listed
        storage.write_whole(tar, pack_tar(storage.join(archive, "CameraRGB")))
    segment(SegmentConfig(model=run, frames=(tar,), out=labels, device="cpu", actors="2", chunk_frames=10))

    print("\n4. Reading the labels back", flush=True)
    classes = PRESETS["carla23"]
    print(class_pixel_table(labels))
    confusion = score_labels(labels, storage.join(archive, "CameraMask"), classes)
    summary = metrics.summarize(confusion, classes.names)
    print(f"mean IoU {summary['mean_iou']:.2f} of these masks, against the drives' own, at {HEIGHT_PX}x{WIDTH_PX}")
    print("\nLook at:")
    for name in ("run/report.html", "labels/report.html", "run/samples.png", "labels/preview.png"):
        print(f"  {config.out}/{name}")
    print("Next, with data of your own: unet-ray check --images … --masks … --classes …")
    print(f"Done in {time.monotonic() - started:.0f} s.")


def training_config(config: DemoConfig, log: str, run: str) -> TrainConfig:
    """Returns the demo's training: a U-Net of 16 filters, so that two cores train it in about a minute."""
    return TrainConfig(
        images=storage.join(log, "CameraRGB"),
        masks=storage.join(log, "CameraMask"),
        classes="carla23",
        out=run,
        workers=config.workers,
        device="cpu",
        epochs=config.epochs,
        batch_size=4,
        n_filters=16,
        depth=4,
        dropout=0.1,
        seed=config.seed,
        val_fraction=1 / 6,
        loss="ce+dice",
        class_weights="log",
        learning_rate=2e-3,
        schedule="cosine",
        warmup_epochs=1,
        augment=True,
        scale=(0.7, 1.0),
    )


def _claim(out: str, overwrite: bool) -> None:
    mark = storage.join(out, MARK)
    if storage.exists(mark) and overwrite:
        storage.delete_tree(out)
    elif storage.exists(out) and not storage.exists(mark) and any(True for _ in storage.list_files(out)):
        raise ValueError(f"{out} holds something that is not a demo; give another folder with --out")
    storage.write_whole(mark, b"Made by unet-ray demo; may be deleted.\n")


def _draw(out: str, seed: int, drives: range, frames: int) -> None:
    """Draws what is not there yet, on every core."""
    there = {file.path for file in storage.list_files(out)} if storage.exists(out) else set()
    missing = [
        (out, seed, drive, index)
        for drive in drives
        for index in range(frames)
        if f"CameraMask/{synthetic.drive_name(drive)}/{index:06d}.png" not in there
    ]
    # `spawn`: a fork of a process with TensorFlow's or Ray's threads may hang.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(_draw_frame, missing, chunksize=8))


def _draw_frame(task: tuple[str, int, int, int]) -> None:
    out, seed, drive, index = task
    synthetic.write_frame(out, seed=seed, drive=drive, index=index, height_px=HEIGHT_PX, width_px=WIDTH_PX)


def pack_tar(folder: str) -> bytes:
    """Returns a tar of all files below a folder; the same files give the same bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for file in storage.list_files(folder):
            member = tarfile.TarInfo(file.path)
            member.size = file.size_bytes
            tar.addfile(member, io.BytesIO(storage.read_bytes(file.uri)))
    return packed.getvalue()


def class_pixel_table(labels: str) -> str:
    """Returns the per-class pixels of an output of `segment`, read from its class_statistics.parquet, as text."""
    statistics = read_parquet(storage.read_bytes(storage.join(labels, "class_statistics.parquet")))
    totals = statistics.group_by("class_name").aggregate([("pixels", "sum"), ("frames_with_class", "sum")]).to_pylist()
    everything = sum(row["pixels_sum"] for row in totals)
    lines = [f"{'class':16}{'pixels':>12}{'share':>9}{'frames':>8}"]
    for row in sorted(totals, key=lambda row: -row["pixels_sum"]):
        if row["pixels_sum"]:
            share = row["pixels_sum"] / everything
            lines.append(f"{row['class_name']:16}{row['pixels_sum']:12,}{share:9.1%}{row['frames_with_class_sum']:8}")
    return "\n".join(lines)


def score_labels(labels: str, masks: str, classes: ClassSet) -> np.ndarray:
    """Returns the confusion matrix int64 [K,K] of published masks against true ones in the notebook's layout."""
    confusion = np.zeros((classes.n_classes, classes.n_classes), np.int64)
    for frame_id, predicted_HW in _read_masks(labels):
        true_HWC = images.decode_mask(storage.read_bytes(storage.join(masks, frame_id.partition("!")[2])))
        confusion += metrics.confusion_matrix(true_HWC.max(axis=2), predicted_HW, classes.n_classes)
    return confusion


def _read_masks(labels: str) -> Iterator[tuple[str, np.ndarray]]:
    rows = ds.dataset(storage.join(labels, "frames")).to_batches(columns=["frame_id", "mask"], batch_size=64)
    for batch in rows:
        for row in batch.to_pylist():
            yield row["frame_id"], images.decode_mask(row["mask"])

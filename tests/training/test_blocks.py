"""Pairs to blocks and blocks to batches: nothing lost, nothing doubled, and what the files hold to the bit."""

from __future__ import annotations

import dataclasses
import shutil
import threading

import numpy as np
import pyarrow as pa
import pytest
import ray
import tensorflow as tf
from PIL import Image

from unet_ray.chaos import faults
from unet_ray.classes import IGNORED_ID, ClassSet, SegmentationClass
from unet_ray.errors import JobFailed
from unet_ray.labelling import decoding
from unet_ray.labelling.decoding import DecodeOptions
from unet_ray.pairs.pairs import find_pairs
from unet_ray.pixels import images
from unet_ray.pixels.preprocessing import Preprocessing, network_input
from unet_ray.training import batches, blocks
from unet_ray.training.batches import IngestPlan

CLASSES = ClassSet(
    name="three",
    classes=(
        SegmentationClass(name="road", color=(128, 64, 128), values=(7,)),
        SegmentationClass(name="sky", color=(70, 130, 180), values=(13,)),
        SegmentationClass(name="car", color=(0, 0, 142), values=(10, 11)),
    ),
    ignore=(0,),
)
PLAN = IngestPlan(class_set=CLASSES, mask_format="channel-max", image_size=(24, 32), keep_full_mask=True)
SIZES = [(48, 60), (37, 53), (24, 32), (50, 60), (61, 47)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five pairs of different sizes, with the arrays that were written."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    arrays = []
    for index, (height, width) in enumerate(SIZES):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        ids = rng.choice(np.array([0, 7, 10, 11, 13], np.uint8), (height, width))
        mask = np.zeros((height, width, 3), np.uint8)
        mask[..., 0] = ids
        for folder, array in (("frames", image), ("masks", mask)):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(root / folder / f"{index:03d}.png")
        arrays.append((image, np.select([ids == 7, ids == 13, ids >= 10, ids == 0], [0, 1, 2, 255]).astype(np.uint8)))
    return root, find_pairs(str(root / "frames"), str(root / "masks")).pairs, arrays


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with faults.killer_decoder(tmp_path_factory.mktemp("decoder")) as path, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
        yield
        ray.shutdown()


def test_a_row_holds_the_pair(data):
    _, pairs, arrays = data
    row = blocks.read_row(1, pairs[1], PLAN)
    image, mask = arrays[1]
    assert (row["height_px"], row["width_px"], row["full_height_px"], row["full_width_px"]) == (24, 32, 37, 53)
    expected = tf.image.resize(image, (24, 32), method="nearest").numpy()
    np.testing.assert_array_equal(np.frombuffer(row["image"], np.uint8).reshape(24, 32, 3), expected)
    assert row["pixels"] == [int(np.sum(mask == k)) for k in range(3)]
    assert row["problem"] == ""


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("resize", ["nearest", "bilinear", "bilinear-antialias", "area", "area-dct"])
@pytest.mark.parametrize("extension", [".png", ".jpg"])
def test_training_validation_and_labelling_show_the_network_the_same_image(tmp_path, resize, fit, extension):
    noise = np.random.default_rng(1).integers(0, 256, (40, 150, 3), np.uint8)
    image, mask = noise.repeat(4, 0).repeat(2, 1), np.full((160, 300), 7, np.uint8)
    for folder, array, end in (("frames", image, extension), ("masks", mask, ".png")):
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / f"0{end}")
    (pair,) = find_pairs(str(tmp_path / "frames"), str(tmp_path / "masks")).pairs
    preprocessing = Preprocessing(resize=resize, fit=fit)
    plan = dataclasses.replace(PLAN, mask_format="ids", preprocessing=preprocessing)
    row = blocks.read_row(0, pair, plan)
    from_block = np.frombuffer(row["image"], np.uint8).reshape(24, 32, 3)
    streamed, small_mask = batches.FileReader([pair], plan).read(0)
    data = (tmp_path / "frames" / f"0{extension}").read_bytes()
    options = DecodeOptions(network_size=(24, 32), preprocessing=preprocessing, max_pixels=10**6, timeout_s=60)
    labelled = decoding.decode(data, options)
    np.testing.assert_array_equal(from_block, labelled.image)
    np.testing.assert_array_equal(streamed, labelled.image)
    assert (labelled.height_px, labelled.width_px) == (160, 300)
    assert (small_mask == IGNORED_ID).any() == (fit == "pad")
    whole = network_input(images.decode_frame(data), (24, 32), preprocessing)
    assert np.array_equal(labelled.image, whole) == (resize != "area-dct" or extension == ".png")


def test_the_hash_is_of_the_frame_whatever_is_kept_of_it(data):
    _, pairs, _ = data
    plans = (PLAN, dataclasses.replace(PLAN, image_size=None), dataclasses.replace(PLAN, keep_pixels=False))
    for pair in pairs:
        assert len({blocks.read_row(0, pair, plan)["image_hash"] for plan in plans}) == 1


@pytest.mark.timeout(300)
def test_a_reader_copies_no_pixels(cluster):
    rows = [{"index": index, "image": bytes(300_000), "mask": bytes(100_000)} for index in range(40)]
    rows = [row | {"height_px": 100, "width_px": 1000} for row in rows]
    frames = batches.BlockFrames(names=("",) * 40, blocks=(ray.put(pa.Table.from_pylist(rows)),))
    before = pa.total_allocated_bytes()
    reader = frames.open()
    assert reader.read(39)[0].shape == (100, 1000, 3)
    assert pa.total_allocated_bytes() - before < 1_000_000  # of 16 MB


@pytest.mark.timeout(300)
def test_what_training_keeps_counts_for_validation_too(data, cluster, monkeypatch):
    _, pairs, _ = data
    kept = blocks.ingest(pairs, PLAN)
    share = 1.5 * kept.kept_bytes / blocks._smallest_store_bytes()
    monkeypatch.setattr(blocks, "STORE_SHARE", share)
    assert isinstance(blocks.ingest(pairs, PLAN).frames, batches.BlockFrames)
    more = blocks.ingest(pairs, PLAN, kept_bytes=kept.kept_bytes)
    assert isinstance(more.frames, batches.FileFrames) and more.kept_bytes == 0


@pytest.mark.timeout(300)
def test_a_frame_that_ends_its_process_ends_the_job_with_a_line(data, cluster, tmp_path):
    for folder in ("frames", "masks"):
        shutil.copytree(data[0] / folder, tmp_path / folder)
    (tmp_path / "frames" / "002.png").write_bytes(b"segfault")
    with pytest.raises(JobFailed, match="a process that reads pairs died 3 times .*`unet-ray check` reads them one by"):
        blocks.ingest(find_pairs(str(tmp_path / "frames"), str(tmp_path / "masks")).pairs, PLAN)


@pytest.mark.timeout(300)
def test_blocks_and_files_give_the_same_pixels(data, cluster, capsys, monkeypatch):
    _, pairs, arrays = data
    kept = blocks.ingest(pairs, PLAN)
    assert isinstance(kept.frames, batches.BlockFrames)
    monkeypatch.setattr(blocks, "STORE_SHARE", 1e-9)
    streamed = blocks.ingest(pairs, PLAN)
    assert isinstance(streamed.frames, batches.FileFrames)
    assert "are read and decoded again in every epoch" in capsys.readouterr().out
    np.testing.assert_array_equal(kept.pixels_NK, [[np.sum(mask == k) for k in range(3)] for _, mask in arrays])
    np.testing.assert_array_equal(kept.pixels_NK, streamed.pixels_NK)
    assert kept.hashes == streamed.hashes and set(kept.hashes) == {pair.image_uri for pair in pairs}
    assert kept.frames.names == streamed.frames.names == ("000", "001", "002", "003", "004")
    readers = [ingested.frames.open() for ingested in (kept, streamed)]
    for index, (image, mask) in enumerate(arrays):
        small = [tf.image.resize(array, (24, 32), method="nearest").numpy() for array in (image, mask[..., None])]
        for reader in readers:
            np.testing.assert_array_equal(reader.full_mask(index), mask)
            for one, other in zip(reader.read(index), (small[0], small[1][..., 0]), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.timeout(300)
def test_without_a_size_frames_keep_their_own(data, cluster):
    _, pairs, arrays = data
    reader = blocks.ingest(pairs, dataclasses.replace(PLAN, image_size=None, keep_full_mask=False)).frames.open()
    for index in (4, 0):
        for one, other in zip(reader.read(index), arrays[index], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.timeout(300)
def test_pairs_that_cannot_be_used_are_one_line(data, cluster, tmp_path):
    root = data[0]
    for folder in ("frames", "masks"):
        (tmp_path / folder).mkdir()
        for index in range(5):
            (tmp_path / folder / f"{index:03d}.png").write_bytes((root / folder / f"{index:03d}.png").read_bytes())
    bad = np.full((*SIZES[1], 3), 0, np.uint8)
    bad[:2, :3, 0] = 99
    Image.fromarray(bad).save(tmp_path / "masks" / "001.png")
    (tmp_path / "frames" / "003.png").write_bytes(b"no image")
    pairs = find_pairs(str(tmp_path / "frames"), str(tmp_path / "masks")).pairs
    with pytest.raises(ValueError) as caught:
        blocks.ingest(pairs, PLAN)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/masks/001.png: ")
    assert "99 (6 pixels)" in message and "\n" not in message
    assert message.endswith("; and 1 other pair (unet-ray check lists them all)")


def test_nothing_to_ingest():
    nothing = blocks.ingest((), PLAN)
    assert nothing.frames.names == () and nothing.pixels_NK.shape == (0, 3) and nothing.hashes == {}


@pytest.mark.parametrize(
    ("n_frames", "batch_size", "n_workers"), [(103, 16, 2), (7, 4, 3), (5, 8, 2), (1, 4, 4), (32, 8, 1), (17, 5, 4)]
)
def test_an_epoch_holds_every_frame_once(n_frames, batch_size, n_workers):
    order = batches.epoch_order(n_frames, 3, 11)
    seen: list[int] = []
    for batch in range(-(-n_frames // batch_size)):
        parts = [batches.batch_slice(order, batch, batch_size, rank, n_workers) for rank in range(n_workers)]
        assert max(map(len, parts)) <= batches.rank_batch_size(batch_size, n_workers)
        # Together they are the global batch, whatever the number of workers.
        np.testing.assert_array_equal(np.concatenate(parts), order[batch * batch_size : (batch + 1) * batch_size])
        seen += np.concatenate(parts).tolist()
    assert sorted(seen) == list(range(n_frames))


def test_an_epochs_order_is_a_function_of_seed_and_epoch():
    orders = {batches.epoch_order(40, seed, epoch).tobytes() for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6
    np.testing.assert_array_equal(batches.epoch_order(40, 1, 2), batches.epoch_order(40, 1, 2))


class Frames:
    """Frames whose pixels are their index."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full((24, 32, 3), index, np.uint8), np.full((24, 32), index % 3, np.uint8)


def test_frames_of_rare_classes_are_drawn_more_often():
    """Of 200 frames each has roads, every tenth signs, and one a bus: of a thousand pixels."""
    pixels_NK = np.zeros((200, 4), np.int64)
    pixels_NK[:, 0], pixels_NK[::10, 1], pixels_NK[7, 2] = 1000, 10, 5
    alike = batches.rare_class_chances(pixels_NK, 1e9)
    of_signs, of_the_bus = (np.arange(200) % 10 == 0) / 20, np.arange(200) == 7
    np.testing.assert_allclose(alike, (1 / 200 + of_signs + of_the_bus) / 3, rtol=1e-6)
    chances_N = batches.rare_class_chances(pixels_NK, 0.1)
    assert chances_N.sum() == pytest.approx(1) and chances_N[1] < alike[1] / 1000 and chances_N[7] > alike[7]
    order = batches.epoch_order(200, 3, 5, chances_N)
    assert len(order) == 200 and set(order) <= {7, *range(0, 200, 10)} | set(np.flatnonzero(chances_N > 1e-5))
    assert 80 < (order == 7).sum() < 120  # half of the draws are of the bus
    np.testing.assert_array_equal(order, batches.epoch_order(200, 3, 5, chances_N))
    assert not np.array_equal(order, batches.epoch_order(200, 3, 6, chances_N))
    assert batches.rare_class_chances(np.array([[0, 5], [0, 0]]), 0.1).tolist() == [1, 0]
    with pytest.raises(ValueError, match="--rare-class-sampling needs classes: no pixel of any was found"):
        batches.rare_class_chances(np.zeros((3, 2), np.int64), 0.1)


def test_a_short_batch_is_padded_with_frames_that_count_nothing():
    image, mask = batches.gather(Frames(), [5, 1], 4, (24, 32))  # type: ignore[arg-type]
    assert image.shape == (4, 24, 32, 3) and image.dtype == np.uint8
    assert [int(frame.max()) for frame in image] == [5, 1, 0, 0]
    assert [set(frame.ravel().tolist()) for frame in mask] == [{2}, {1}, {IGNORED_ID}, {IGNORED_ID}]


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_view_is_told_the_frames_index(n_threads):
    def view(image, mask, index):
        return image + 1, mask * 0 + index

    image, mask = batches.gather(Frames(), [5, 1], 2, (24, 32), view, n_threads)  # type: ignore[arg-type]
    assert image[0, 0, 0, 0] == 6 and mask[1, 0, 0] == 1


def test_the_next_batch_is_made_while_one_is_used():
    began, may_end = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]

    def make(batch: int) -> int:
        began[batch].set()
        assert may_end[batch].wait(60)
        return batch

    numbers = batches.one_ahead(make, 3)
    may_end[0].set()
    assert next(numbers) == 0 and began[1].wait(60)  # while 0 is used
    assert not began[2].is_set()  # one ahead, not all
    may_end[1].set()
    may_end[2].set()
    assert list(numbers) == [1, 2]

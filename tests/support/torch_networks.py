"""Two networks that nobody here designed, trained a little and exported by PyTorch, with what it says of frames.

Run as a program of its own, as TensorFlow and PyTorch need not share a process: `python torch_networks.py FOLDER`
writes `NAME.onnx` (its weights beside it, as the exporter does by default) and `NAME.npz`: `images_NHWC` uint8,
PyTorch's `logits_NKhw`, and the same at the frames' size, `logits_NKHW`. Without pretrained weights a network tells
nothing apart: both learn the colours of drawn frames first, in training mode, so that moving statistics are real and
pixels have a margin.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

N_CLASSES = 7
SIZE = (96, 160)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
N_STEPS = {"segformer": 20, "deeplab": 40}


class Logits(torch.nn.Module):
    """The network without the dictionary that transformers puts around its output."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, pixel_values):
        return self.network(pixel_values=pixel_values).logits


def draw(n_frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames of boxes, one colour a class, with noise on them; their class ids."""
    random = np.random.default_rng(seed)
    colors = np.random.default_rng(0).integers(20, 236, (N_CLASSES, 3))
    ids_NHW = np.zeros((n_frames, *SIZE), np.int64)
    for ids_HW in ids_NHW:
        ids_HW[:] = random.integers(N_CLASSES)
        for class_id in random.permutation(N_CLASSES):
            y, x = random.integers(0, SIZE[0] - 32), random.integers(0, SIZE[1] - 32)
            height, width = random.integers(32, 96, 2)
            ids_HW[y : y + height, x : x + width] = class_id
    noisy = colors[ids_NHW] + random.normal(0, 12, (n_frames, *SIZE, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8), ids_NHW


def pixel_values(images_NHWC: np.ndarray) -> torch.Tensor:
    normal = (images_NHWC.astype(np.float32) - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(np.ascontiguousarray(normal.transpose(0, 3, 1, 2)))


def train(network: torch.nn.Module, n_steps: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network.train()
    for step in range(n_steps):
        images_NHWC, ids_NHW = draw(4, seed=step + 1)
        logits = network(pixel_values(images_NHWC))
        logits = torch.nn.functional.interpolate(logits, SIZE, mode="bilinear", align_corners=False)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids_NHW))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()


def networks() -> dict[str, torch.nn.Module]:
    segformer = transformers.SegformerConfig(num_labels=N_CLASSES)  # the defaults are B0's
    mobile = transformers.MobileNetV2Config(num_labels=N_CLASSES, output_stride=8)
    return {
        "segformer": Logits(transformers.SegformerForSemanticSegmentation(segformer)),
        "deeplab": Logits(transformers.MobileNetV2ForSemanticSegmentation(mobile)),
    }


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # beside other tests, threads that wait for each other take 40 times as long
    images_NHWC, _ = draw(8, seed=0)
    for name, network in networks().items():
        train(network, N_STEPS[name])
        inputs = pixel_values(images_NHWC)
        with torch.no_grad():
            logits_NKhw = network(inputs)
        torch.onnx.export(
            network,
            (inputs[:2],),
            folder / f"{name}.onnx",
            dynamo=True,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        logits_NKHW = torch.nn.functional.interpolate(logits_NKhw, SIZE, mode="bilinear", align_corners=False)
        arrays = {"logits_NKhw": logits_NKhw.numpy(), "logits_NKHW": logits_NKHW.numpy()}
        np.savez(folder / f"{name}.npz", images_NHWC=images_NHWC, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

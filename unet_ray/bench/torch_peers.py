"""The same network in PyTorch, with a bundle's weights: labelling with a DataLoader, the train step, ingest.

bfloat16 and channels_last, which on CPUs is the fastest that it does without a compiler. Needs the extra `bench`.

Shapes: `B` batch, `H` height px, `W` width px, `C` colour, `K` classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler

from unet_ray.bench.native_peers import mask_png
from unet_ray.bench.peers import MaskFile, list_frames
from unet_ray.bench.training_peers import WARM_UP_STEPS, digest_of, some_pairs
from unet_ray.labelling.decoding import DecodeOptions, decode
from unet_ray.model.architecture import UnetConfig
from unet_ray.model.bundle import Bundle, read_bundle
from unet_ray.pixels.images import decode_mask, resize_nearest

_PADDED = "same"


class TorchUnet(nn.Module):
    """`unet.build_unet` layer by layer: uint8 [B, H, W, 3] to float32 logits [B, K, H, W]."""

    def __init__(self, config: UnetConfig) -> None:
        super().__init__()
        self._config = config
        widths = [config.n_filters << level for level in range(config.depth)]
        self.convolutions = nn.ModuleList()
        self.transposes = nn.ModuleList()
        channels = 3
        for width in widths:
            self._add_two(channels, width)
            channels = width
        for width in reversed(widths[:-1]):
            self.transposes.append(nn.ConvTranspose2d(channels, width, 3, stride=2))
            self._add_two(2 * width, width)
            channels = width
        self.convolutions.append(nn.Conv2d(channels, config.n_filters, 3, padding=_PADDED))
        self.classify = nn.Conv2d(config.n_filters, config.n_classes, 1)

    def _add_two(self, channels: int, width: int) -> None:
        self.convolutions.append(nn.Conv2d(channels, width, 3, padding=_PADDED))
        self.convolutions.append(nn.Conv2d(width, width, 3, padding=_PADDED))

    def forward(self, image_BHWC: torch.Tensor) -> torch.Tensor:
        """See the class."""
        config, layers = self._config, iter(self.convolutions)
        x = (image_BHWC.float() / 255).permute(0, 3, 1, 2)  # of a [B, H, W, C] array this is channels_last
        x = x.to(self.convolutions[0].weight.dtype)
        skips = []
        for level in range(config.depth):
            x = _two(layers, x)
            if level >= config.depth - 2:
                x = functional.dropout(x, config.dropout, self.training)
            if level < config.depth - 1:
                skips.append(x)
                x = functional.max_pool2d(x, 2)
        for transpose, skip in zip(self.transposes, reversed(skips), strict=True):
            x = transpose(x)[..., :-1, :-1]  # "same" of stride 2 in Keras: what is too much ends below and right
            x = _two(layers, torch.cat([x, skip], dim=1))
        x = functional.relu(next(layers)(x))
        with torch.autocast("cpu", enabled=False):
            return self.classify(x.float())


def _two(layers: Iterator[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        x = functional.relu(next(layers)(x))
    return x


def build(bundle: Bundle) -> TorchUnet:
    """Returns the network with a bundle's weights, float32, channels_last."""
    assert isinstance(bundle.model_config, UnetConfig), bundle.model_config
    net = TorchUnet(bundle.model_config)
    with torch.no_grad():
        for number, layer in enumerate([*net.convolutions, net.classify]):
            _set(layer, bundle.weights, f"conv2d_{number}" if number else "conv2d")
        for number, layer in enumerate(net.transposes):
            _set(layer, bundle.weights, f"conv2d_transpose_{number}" if number else "conv2d_transpose")
    return net.to(memory_format=torch.channels_last)


def _set(layer: Any, weights: Mapping[str, np.ndarray], name: str) -> None:
    # (height, width, in, out) to (out, in, height, width); a transposed one: (…, out, in) to (in, out, …).
    layer.weight.copy_(torch.from_numpy(weights[f"{name}/kernel"].transpose(3, 2, 0, 1).copy()))
    layer.bias.copy_(torch.from_numpy(weights[f"{name}/bias"]))


class _Frames(Dataset):  # type: ignore[type-arg]
    def __init__(self, paths: Sequence[str], size: Sequence[int]) -> None:
        self._paths = paths
        self._options = DecodeOptions(network_size=(size[0], size[1]), max_pixels=100_000_000, timeout_s=60)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> np.ndarray:
        with open(self._paths[index], "rb") as file:
            image_HWC = decode(file.read(), self._options).image
        assert image_HWC is not None, self._paths[index]
        return image_HWC


def _predictor(model: str, threads: int, precision: str) -> tuple[TorchUnet, tuple[int, int]]:
    """The network of a bundle, all but its last layer in `precision`, and the height and width of its input."""
    torch.set_num_threads(threads)
    bundle = read_bundle(model)
    net = build(bundle).eval()
    net.convolutions.to(getattr(torch, precision))
    net.transposes.to(getattr(torch, precision))
    return net, bundle.model_config.image_size


class _SizedFrames(_Frames):
    """Frames of the network's size, each with its own height and width."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[override]
        with open(self._paths[index], "rb") as file:
            decoded = decode(file.read(), self._options)
        assert decoded.image is not None, self._paths[index]
        return decoded.image, np.array([decoded.height_px, decoded.width_px])


def torch_loop(*, frames: str, model: str, out: str, batch_size: int, threads: int, precision: str) -> dict[str, Any]:
    """A DataLoader with a worker a core, the network in `precision` and channels_last, inference mode."""
    net, size = _predictor(model, threads, precision)
    paths = list_frames(frames)
    file, done = MaskFile(out), 0
    with torch.inference_mode():
        for image_BHWC in DataLoader(_Frames(paths, size), batch_size=batch_size, num_workers=threads):
            masks_BHW = net(image_BHWC).argmax(1).to(torch.uint8).numpy()
            file.add(paths[done : done + len(masks_BHW)], masks_BHW)
            done += len(masks_BHW)
    file.close()
    return {}


def torch_native(*, frames: str, model: str, out: str, batch_size: int, threads: int, precision: str) -> dict[str, Any]:
    """The same, with masks of the frames' own size: logits by `interpolate`, the largest, PNG by Pillow."""
    net, size = _predictor(model, threads, precision)
    paths = list_frames(frames)
    file, done = MaskFile(out, encode=mask_png), 0
    with torch.inference_mode():
        for image_BHWC, size_B2 in DataLoader(_SizedFrames(paths, size), batch_size=batch_size, num_workers=threads):
            logits_BKhw = net(image_BHWC)
            masks = [
                functional.interpolate(logits_BKhw[i : i + 1], size=tuple(size.tolist()), mode="bilinear")
                .argmax(1)[0]
                .to(torch.uint8)
                .numpy()
                for i, size in enumerate(size_B2)
            ]
            file.add(paths[done : done + len(masks)], masks)
            done += len(masks)
    file.close()
    return {}


def torch_step(
    *, images: str, masks: str, model: str, batch_size: int, steps: int, threads: int, precision: str
) -> dict[str, float]:
    """Adam on float32 weights, the network in `precision` by autocast, channels_last."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    bundle = read_bundle(model)
    net = build(bundle)
    size = bundle.model_config.image_size
    image_BHWC, mask_BHW = map(
        torch.from_numpy, some_pairs(images, masks, batch_size, size, bundle.class_set.name)
    )  # masks without ignored pixels: carla23 ignores none that is drawn
    target_BHW = mask_BHW.long()
    how: dict[str, Any] = {"dtype": getattr(torch, precision), "enabled": precision != "float32"}
    with torch.inference_mode(), torch.autocast("cpu", **how):
        loss = float(functional.cross_entropy(net.eval()(image_BHWC), target_BHW))
    net.train()
    optimizer = torch.optim.Adam(net.parameters())
    started = 0.0
    for number in range(WARM_UP_STEPS + steps):
        if number == WARM_UP_STEPS:
            started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", **how):
            step_loss = functional.cross_entropy(net(image_BHWC), target_BHW)
        step_loss.backward()
        optimizer.step()
        float(step_loss.detach())
    return {"images_per_s": steps * batch_size / (time.perf_counter() - started), "loss": loss}


class _Pairs(Dataset):  # type: ignore[type-arg]
    def __init__(self, images: Sequence[str], masks: Sequence[str], size: Sequence[int]) -> None:
        self._frames, self._masks, self._size = _Frames(images, size), masks, size

    def __len__(self) -> int:
        return len(self._masks)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        from unet_ray.classes import PRESETS

        with open(self._masks[index], "rb") as file:
            mask_HWC = decode_mask(file.read())
        mask_HW = resize_nearest(mask_HWC.max(axis=-1), self._size[0], self._size[1])
        return self._frames[index], PRESETS["carla23"].encode_ids(mask_HW)


class _FirstSome(Sampler):  # type: ignore[type-arg]
    """The first frames only, until told otherwise: the loader's workers are up before the clock starts."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.number))


def torch_ingest(*, images: str, masks: str, size: Sequence[int], batch_size: int, threads: int) -> dict[str, Any]:
    """Pairs by a DataLoader with a worker a core; its workers are up before."""
    paths = (list_frames(images), list_frames(masks))
    sampler = _FirstSome(2 * threads)
    loader: Any = DataLoader(
        _Pairs(*paths, size), batch_size=batch_size, sampler=sampler, num_workers=threads, persistent_workers=True
    )
    list(loader)
    sampler.number = len(paths[0])
    started = time.perf_counter()
    blocks = list(loader)
    rate = len(paths[0]) / (time.perf_counter() - started)
    pairs = ((i.numpy(), m.numpy()) for images_B, masks_B in blocks for i, m in zip(images_B, masks_B, strict=True))
    return {"pairs_per_s": rate, "digest": digest_of(pairs)}

"""A network made elsewhere, run by ONNX Runtime: uint8 frames to logits or class ids.

Shapes: `B` batch, `H` height px, `W` width px, `C` colour, `K` classes; `h`, `w` the size of the output.

On a CPU a batch is cut into a part for each thread, and one thread computes each part: sums cut by the number of
threads would give a frame other last bits on another machine.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np

from unet_ray.messages import printable
from unet_ray.model.devices import UnusableGpu
from unet_ray.model.onnx_facts import OnnxFacts, Size
from unet_ray.pixels.preprocessing import AS_IT_IS, Preprocessing

CUDA = "CUDAExecutionProvider"
_LEAST = np.finfo(np.float32).tiny
"""Stands for a probability of 0, whose logarithm a sum cannot take."""


class OnnxNetwork:
    """A session of ONNX Runtime and what goes before and after it; several threads may call it at once."""

    def __init__(
        self,
        data: bytes,
        facts: OnnxFacts,
        *,
        size: Size,
        preprocessing: Preprocessing = AS_IT_IS,
        device: str = "cpu",
        n_threads: int = 1,
    ) -> None:
        """Loads the network.

        Args:
            data: an ONNX file that `onnx_file.find_facts` has checked.
            facts: what it takes and gives.
            size: of the frames that it will get.
            preprocessing: how these become the network's input: `mean`, `std` and `channels` of it.
            device: `cpu` or `gpu`.
            n_threads: of a CPU: parts of a batch that are computed at once.

        Raises:
            ValueError: one line: ONNX Runtime is missing or does not take the network, or it gets what it cannot take.
            unet_ray.model.devices.UnusableGpu: the device is `gpu` and ONNX Runtime cannot use it.
        """
        facts.image_size(size)
        mean, std = preprocessing.mean, preprocessing.std
        if facts.dtype == "uint8" and (any(mean) or any(value != 1 for value in std)):
            raise ValueError("the network takes uint8, which cannot be normalised; leave out --mean and --std")
        self.facts, self.size = facts, size
        self._channels = preprocessing.channels
        scale = 1 / np.asarray(std, np.float64)  # as `preprocessing.normalized` has it, to the bit
        self._mean_C11, self._scale_C11 = (np.asarray(of, np.float32).reshape(3, 1, 1) for of in (mean, scale))
        self._session = open_session(data, device)
        self._n_parts = n_threads
        self._threads = ThreadPoolExecutor(n_threads) if n_threads > 1 else None

    def __call__(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Returns float32 logits [B, h, w, K], or class ids uint8 [B, h, w] of a network that gives them.

        Of probabilities the logarithms, which are logits: their softmax is the probabilities, and interpolating them
        gives the same classes as interpolating the logits that they were made of. May be a view of other strides.

        Raises:
            ValueError: ids that are no class, or ONNX Runtime could not compute it.
        """
        scores = self.scores(images_BHWC)
        if self.facts.gives_ids:
            return _checked_ids(scores, self.facts.n_classes)
        return np.log(np.maximum(scores, _LEAST)) if self.facts.kind == "probabilities" else scores

    def scores(self, images_BHWC: np.ndarray) -> np.ndarray:
        """As `__call__`, but what the network itself gives: probabilities stay, ids are integers of its own type."""
        n_frames = len(images_BHWC)
        n_at_once = self.facts.batch or -(-n_frames // self._n_parts)
        parts = [images_BHWC[start : start + n_at_once] for start in range(0, n_frames, n_at_once)]
        results = list(self._threads.map(self._part, parts) if self._threads else map(self._part, parts))
        return results[0] if len(results) == 1 else np.concatenate(results)

    def input_of(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Frames as the network takes them: its order of colours and dimensions, normalised.

        In the order of memory, 0.9 ms a frame of 512x1024; with `astype` first 3.0 (numpy 2.4, 2026-11-30).
        """
        images_BCHW = images_BHWC.transpose(0, 3, 1, 2)
        images_BCHW = images_BCHW[:, ::-1] if self._channels == "BGR" else images_BCHW
        n_frames, _, height_px, width_px = images_BCHW.shape
        is_nchw = self.facts.layout == "nchw"
        shape = (n_frames, 3, height_px, width_px) if is_nchw else (n_frames, height_px, width_px, 3)
        inputs = np.empty(shape, self.facts.dtype)
        inputs_BCHW = inputs if is_nchw else inputs.transpose(0, 3, 1, 2)
        if self.facts.dtype == "uint8":
            inputs_BCHW[...] = images_BCHW
        else:
            np.subtract(images_BCHW, self._mean_C11, out=inputs_BCHW)
            np.multiply(inputs_BCHW, self._scale_C11, out=inputs_BCHW)
        return inputs

    def _part(self, images_BHWC: np.ndarray) -> np.ndarray:
        n_frames = len(images_BHWC)
        assert images_BHWC.dtype == np.uint8 and images_BHWC.shape[1:] == (*self.size, 3), images_BHWC.shape
        if self.facts.batch and n_frames < self.facts.batch:
            images_BHWC = np.pad(images_BHWC, ((0, self.facts.batch - n_frames), (0, 0), (0, 0), (0, 0)))
        try:
            (output,) = self._session.run([self.facts.output_name], {self.facts.input_name: self.input_of(images_BHWC)})
        except runtime_errors() as error:
            raise ValueError(f"ONNX Runtime cannot compute the network: {_reason(error)}") from error
        return self._with_classes_last(output, len(images_BHWC))[:n_frames]

    def _with_classes_last(self, output: np.ndarray, n_frames: int) -> np.ndarray:
        facts = self.facts
        axis = {"nchw": 1, "nhwc": 3}.get(facts.output_layout)
        n_channels = 1 if facts.gives_ids else facts.n_classes
        fits = output.ndim == (3 if axis is None else 4) and (axis is None or output.shape[axis] == n_channels)
        if not fits or len(output) != n_frames:
            raise ValueError(
                f"the network gives the shape {list(output.shape)} for {n_frames} frames; {n_channels} channels and a "
                f"row a frame ({facts.output_layout}) were expected: give the classes and the layout of its training"
            )
        if facts.gives_ids:
            return output if axis is None else output.squeeze(axis)
        return np.moveaxis(output, axis or -1, -1).astype(np.float32, copy=False)


def _checked_ids(ids_Bhw: np.ndarray, n_classes: int) -> np.ndarray:
    lowest, highest = int(ids_Bhw.min()), int(ids_Bhw.max())
    if lowest < 0 or highest >= n_classes:
        raise ValueError(
            f"the network gives class ids from {lowest} to {highest}; the class set has 0 to {n_classes - 1}: give the "
            "one of its training"
        )
    return ids_Bhw.astype(np.uint8, copy=False)


def open_session(data: bytes, device: str, n_op_threads: int = 1) -> Any:
    """Returns a session of ONNX Runtime that computes an operator with so many threads.

    Raises:
        ValueError: ONNX Runtime is missing, or does not take the network.
        UnusableGpu: the device is `gpu` and ONNX Runtime does not use it.
    """
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = n_op_threads, 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # what it logs it raises, too
    providers = _providers(runtime, device)
    try:
        session = runtime.InferenceSession(data, options, providers=providers)
    except runtime_errors() as error:
        raise ValueError(f"ONNX Runtime does not take the network: {_reason(error)}") from error
    if device == "gpu" and CUDA not in session.get_providers():  # it would go on with the CPU without a word
        raise _unusable("its CUDA libraries do not load; pip install 'unet-ray[onnx-gpu]' there (CUDA 13)")
    return session


def _providers(runtime: Any, device: str) -> list[Any]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if CUDA not in runtime.get_available_providers():
        raise _unusable(
            "it is the one for CPUs; pip uninstall -y onnxruntime && pip install 'unet-ray[onnx-gpu]' there"
        )
    runtime.preload_dlls(directory="")  # those that pip has installed
    # Trying out convolutions could choose another one in another run, and TF32 has 11 bits.
    return [(CUDA, {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}), "CPUExecutionProvider"]


def _unusable(problem: str) -> UnusableGpu:
    return UnusableGpu(
        f"ONNX Runtime cannot use the GPU of node {socket.gethostname()}: {problem}, or give --device cpu"
    )


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            "networks as ONNX need ONNX Runtime; pip install 'unet-ray[onnx]', or 'unet-ray[onnx-gpu]' for GPUs"
        ) from error
    return onnxruntime


@lru_cache(maxsize=1)
def runtime_errors() -> tuple[type[Exception], ...]:
    """Returns what ONNX Runtime raises, which has no class in common."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*own, RuntimeError)


def _reason(error: Exception) -> str:
    """`… : FAIL : Load model failed` without the place in its source, one line."""
    text = " ".join(str(error).split()).partition(" : ")[2] or str(error)
    return printable(text[:300])

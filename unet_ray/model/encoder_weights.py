"""Pretrained weights of an encoder, from a file that the user gives: a child process reads and compares it.

`python -m unet_ray.model.encoder_weights` is that child: the process that asks loads no TensorFlow, and no library that
reads HDF5. `encoder_files` says what is compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import numpy as safetensors_numpy

from unet_ray import storage
from unet_ray.model.child_process import answer_parent, ask_child

MAX_FILE_BYTES = 1_000_000_000
"""A file of ConvNeXtTiny has 111 MB."""
_OPTION = "--encoder-weights"


def read_encoder_weights(uri: str) -> tuple[dict[str, np.ndarray], str]:
    """Returns weights by name, as `convnext.build_encoder` has them, and the file's sha256.

    Args:
        uri: a `.weights.h5` or `.h5` file of `keras.applications.ConvNeXtTiny(include_top=False)`.

    Raises:
        ValueError: one line: no such file, too large a one, or one that does not hold just the encoder's weights.
        StorageError: trouble with storage that may be over when one tries again.
    """
    data = _file_bytes(uri)
    with tempfile.TemporaryDirectory(prefix="unet_ray-encoder-") as folder:
        source, target = Path(folder) / "encoder.h5", Path(folder) / "encoder.safetensors"
        source.write_bytes(data)
        question = {"source": str(source), "target": str(target)}
        try:
            ask_child("unet_ray.model.encoder_weights", question, "what reads it", late="has not ended")
        except ValueError as error:
            raise ValueError(
                f"{_OPTION} {uri} cannot be used: {error}; give the file of a "
                "keras.applications.ConvNeXtTiny(include_top=False)"
            ) from error
        return safetensors_numpy.load_file(target), storage.sha256(data)


def _file_bytes(uri: str) -> bytes:
    try:
        size = storage.info(uri).size_bytes
        if size > MAX_FILE_BYTES:
            raise ValueError(
                f"{_OPTION} {uri} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read, and a ConvNeXtTiny has "
                "111,000,000"
            )
        return storage.read_bytes(uri)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{_OPTION} {uri} does not exist") from error
    except (IsADirectoryError, storage.NotAFile) as error:
        raise ValueError(f"{_OPTION} {uri} is no file; give one file of weights") from error


def _convert(question: Mapping[str, Any]) -> None:
    import keras
    import tensorflow as tf

    from unet_ray.model import convnext, encoder_files

    tf.config.set_visible_devices([], "GPU")  # the driver's node may have one, and others use it
    with tf.Graph().as_default():
        image_BHWC = keras.Input((32, 32, 3), dtype="uint8")
        expected = encoder_files.Encoder(convnext.template(), convnext.build_encoder(image_BHWC))
    safetensors_numpy.save_file(encoder_files.read_encoder_file(question["source"], expected), question["target"])


if __name__ == "__main__":
    answer_parent(_convert)

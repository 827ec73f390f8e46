"""TensorBoard's event files as bytes: numbers and PNG pictures by step, without TensorFlow or TensorBoard.

A file is a list of records: length (8 bytes), its checksum (4), an `Event` message, its checksum (4); little-endian
numbers, CRC-32C that is rotated and shifted (TensorFlow's core/lib/io/record_writer.h and core/lib/hash/crc32c.h). The
messages are those of its core/util/event.proto and core/framework/summary.proto:

| message | fields that are written |
|---|---|
| `Event` | 1 `wall_time` (double), 2 `step`, 3 `file_version` or 5 `summary` |
| `Summary` | 1 `value`, of which there may be several |
| `Summary.Value` | 1 `tag`, 2 `simple_value` (float) or 4 `image` |
| `Summary.Image` | 1 `height`, 2 `width`, 3 `colorspace` (3 is RGB), 4 `encoded_image_string` |
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

_VERSION = b"brain.Event:2"
_RGB = 3


def scalar_file(history: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns the event file of a history: one scalar a number, at the epochs' own times.

    Args:
        history: a row an epoch with `epoch`, `wall_time_s` and numbers by name; None is left out.
    """
    records = [_first_record(history[0]["wall_time_s"] if history else 0.0)]
    for row in history:
        for key, value in row.items():
            if value is not None and key not in ("epoch", "wall_time_s"):
                summary = _bytes(1, key.encode()) + b"\x15" + struct.pack("<f", value)
                records.append(_record(_event(row["wall_time_s"], row["epoch"], summary)))
    return b"".join(records)


def image_file(tag: str, png: bytes, step: int, wall_time_s: float) -> bytes:
    """Returns the event file of one picture."""
    width_px, height_px = struct.unpack(">2I", png[16:24])
    image = _number(1, height_px) + _number(2, width_px) + _number(3, _RGB) + _bytes(4, png)
    summary = _bytes(1, tag.encode()) + _bytes(4, image)
    return _first_record(wall_time_s) + _record(_event(wall_time_s, step, summary))


def _first_record(wall_time_s: float) -> bytes:
    return _record(b"\x09" + struct.pack("<d", wall_time_s) + _bytes(3, _VERSION))


def _event(wall_time_s: float, step: int, value: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", wall_time_s) + _number(2, step) + _bytes(5, _bytes(1, value))


def _number(field: int, value: int) -> bytes:
    return bytes([field << 3]) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_OF_BYTE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ 0x82F63B78 * (byte & 1)
    return byte


_CRC_OF_BYTE = [_crc_of_byte(byte) for byte in range(256)]

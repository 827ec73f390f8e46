"""The digest of a frame's bytes, by which one sees later whether they are still what was labelled."""

from __future__ import annotations

import xxhash


def content_digest(data: bytes) -> str:
    """Returns XXH3 of some bytes in 64 bits, as 16 hexadecimal digits: no proof against malice, and almost free.

    0.008 ms of a PNG of 273 KB, which takes 17 ms to decode beside that much other work; BLAKE2b in 8 bytes takes 7% of
    the decoding, SHA-256 3.0, SHA-1 2.7, and CRC-32 1.2 (2026-11-30, AMD EPYC with AVX2, 2 cores, beside other work).
    """
    return xxhash.xxh3_64_hexdigest(data)

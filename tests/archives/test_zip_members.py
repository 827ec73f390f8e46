"""A zip's member is the frame only where its bytes have the sum and the sizes that the zip says."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path

import pytest

from unet_ray.archives.listing import list_archives
from unet_ray.archives.reading import FrameGone, read_frames

CONTENT = os.urandom(400) + bytes(400)


class Stream(io.RawIOBase):
    """Cannot be sought in, so that zipfile puts sums and sizes behind the data."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        self.data += data
        return len(data)


def packed(method: int, *, stream: bool = False, zip64: bool = False) -> bytes:
    target = Stream() if stream else io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        with archive.open("1.jpg", "w", force_zip64=zip64) as member:
            member.write(CONTENT)
        archive.writestr("2.jpg", b"second")
    return bytes(target.data) if isinstance(target, Stream) else target.getvalue()


def read(path: Path, data: bytes) -> bytes | FrameGone:
    path.write_bytes(data)
    first, second = read_frames(list_archives([str(path)]).table)
    assert second == b"second"
    return first


KINDS = [
    (method, stream, zip64)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    for stream in (False, True)
    for zip64 in (False, True)
]


@pytest.mark.parametrize(("method", "stream", "zip64"), KINDS)
def test_a_whole_member_is_read_and_any_flipped_byte_of_it_is_noticed(
    method: int, stream: bool, zip64: bool, tmp_path: Path
) -> None:
    data = packed(method, stream=stream, zip64=zip64)
    assert read(tmp_path / "a.zip", data) == CONTENT
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        info = archive.getinfo("1.jpg")
    n_name, n_extra = struct.unpack_from("<HH", data, 26)
    begin = 30 + n_name + n_extra
    for at in range(begin, begin + info.compress_size, 37):
        damaged = bytearray(data)
        damaged[at] ^= 0x55
        gone = read(tmp_path / "a.zip", bytes(damaged))
        assert isinstance(gone, FrameGone) and gone.reason == "truncated", at


@pytest.mark.parametrize("signature", [True, False])
def test_the_sum_behind_the_data_may_have_a_signature(signature: bool, tmp_path: Path) -> None:
    data = packed(zipfile.ZIP_DEFLATED, stream=True)
    at = data.index(b"PK\7\10")
    if not signature:  # as APPNOTE.TXT 4.3.9.3 allows; the directory is said to be where it was
        data = data[:at] + data[at + 4 : at + 16] + bytes(4) + data[at + 16 :]
    assert read(tmp_path / "a.zip", data) == CONTENT
    damaged = bytearray(data)
    damaged[at + 5] ^= 1
    assert isinstance(read(tmp_path / "a.zip", bytes(damaged)), FrameGone)


@pytest.mark.parametrize("field", [14, 18, 22])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_sum_or_size_that_is_another_is_noticed(field: int, method: int, tmp_path: Path) -> None:
    data = bytearray(packed(method))
    data[field] ^= 3
    gone = read(tmp_path / "a.zip", bytes(data))
    message = "the zip's sum or size of the member does not agree with its bytes"
    assert gone == FrameGone("truncated", f"{tmp_path}/a.zip: {message}")


def test_a_stream_that_has_no_end_is_noticed(tmp_path: Path) -> None:
    """The directory says fewer bytes than there are: the rest of the stream is not read."""
    data = bytearray(packed(zipfile.ZIP_DEFLATED))
    entry = data.index(b"PK\1\2")
    size = struct.unpack_from("<I", data, entry + 20)[0]
    struct.pack_into("<I", data, entry + 20, size - 2)
    gone = read(tmp_path / "a.zip", bytes(data))
    assert gone == FrameGone("truncated", f"{tmp_path}/a.zip: the zip's member ends before its end")


def test_no_flipped_bit_of_a_zip_gives_other_bytes(tmp_path: Path) -> None:
    data = packed(zipfile.ZIP_DEFLATED)
    n_damaged = 0
    for at in range(0, data.index(b"PK\1\2"), 11):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        (tmp_path / "a.zip").write_bytes(damaged)
        for content, whole in zip(
            read_frames(list_archives([str(tmp_path / "a.zip")]).table), (CONTENT, b"second"), strict=True
        ):
            assert isinstance(content, FrameGone) or content == whole, at
            n_damaged += isinstance(content, FrameGone)
    assert n_damaged > 20


def test_a_folder_of_windows_is_a_folder_and_a_link_is_counted(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("drive07\\cam0\\0.jpg", "drive08\\cam0\\0.jpg", "drive08/cam0/1.jpg"):
            info = zipfile.ZipInfo("x")
            info.filename = name
            archive.writestr(info, name)
        link = zipfile.ZipInfo("latest")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "drive08")
    listing = list_archives([str(tmp_path / "a.zip")])
    assert listing.unlistable == () and listing.ignored == {"link": 1}
    assert listing.table.select(["frame_id", "sequence"]).to_pylist() == [
        {"frame_id": f"a.zip!{drive}/cam0/{frame}.jpg", "sequence": f"a.zip!{drive}/cam0"}
        for drive, frame in (("drive07", 0), ("drive08", 0), ("drive08", 1))
    ]

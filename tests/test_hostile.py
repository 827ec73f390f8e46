"""Archives made to fill the memory or to run code: read in under 1 GB, nothing runs, and a reason is given."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unet_ray.frames import list_archives

MB = 2**20

READ = """
import json, sys
from collections import Counter
from unet_ray.contents import FrameGone, read_frames
from unet_ray.frames import list_archives

listing = list_archives(sys.argv[1:])
found = Counter()
for content in read_frames(listing.table):
    found[f"{content.reason}: {content.error}" if isinstance(content, FrameGone) else f"{len(content) >> 20} MB"] += 1
# ru_maxrss would be that of the process that started this one, if it was larger.
peak_mb = next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([found, [why for _, why in listing.unlistable], peak_mb]))
"""


def read(path: Path) -> tuple[dict[str, int], list[str]]:
    """Lists and reads an archive in a process of its own, which stays under 1 GB."""
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    found, unlistable, peak_mb = json.loads(done.stdout)
    assert peak_mb < 1000
    return found, unlistable


def write_parquet(path: Path, schema: pa.Schema, rows: int, row: dict[str, object]) -> Path:
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        table = pa.Table.from_pylist([row], schema)
        for _ in range(rows):
            writer.write_table(table)
    return path


def test_a_zip_whose_members_inflate_a_thousand_times(tmp_path: Path) -> None:
    path = tmp_path / "bombs.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for index in range(6):
            with archive.open(f"{index}.png", "w") as member:
                for _ in range(260 if index == 0 else 200):
                    member.write(bytes(MB))
    assert path.stat().st_size < 10 * MB
    message = "too_large: the zip's member inflates to more than 268,435,456 bytes"
    assert read(path) == ({message: 1, "200 MB": 5}, [])


def test_a_tar_of_many_large_frames(tmp_path: Path) -> None:
    path = tmp_path / "large.tar"
    with path.open("wb") as file:
        for index in range(20):
            member = tarfile.TarInfo(f"{index}.bmp")
            member.size = 100 * MB
            file.write(member.tobuf())
            file.seek(member.size, 1)  # a hole, which costs no disk
        file.write(bytes(2 * tarfile.BLOCKSIZE))
    assert read(path) == ({"100 MB": 20}, [])


@pytest.mark.parametrize("size_mb", [20, 300])
def test_a_parquet_file_whose_images_unpack_ten_thousand_times(size_mb: int, tmp_path: Path) -> None:
    schema = pa.schema([("image", pa.large_binary())])
    path = write_parquet(tmp_path / "bombs.parquet", schema, 600 // size_mb, {"image": bytes(size_mb * MB)})
    assert path.stat().st_size < MB
    found, unlistable = read(path)
    assert unlistable == []
    if size_mb == 20:
        assert found == {"20 MB": 30}
    else:
        (reason,) = found
        assert reason.startswith("too_large: its row group unpacks from ") and found[reason] == 2


def test_a_parquet_file_whose_names_unpack_ten_thousand_times(tmp_path: Path) -> None:
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    path = write_parquet(tmp_path / "names.parquet", schema, 1, {"image": {"bytes": b"x", "path": "a" * 300 * MB}})
    found, unlistable = read(path)
    assert found == {} and len(unlistable) == 1
    assert unlistable[0].endswith(" bytes in a row group; at most 104,857,600 are read")


class Payload:
    """Touches a file where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["image", "image.bytes", "image.path", "weather", "weather.of_the_day"])
def test_a_parquet_file_with_pickled_objects_runs_nothing(place: str, tmp_path: Path) -> None:
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType  # which every Ray Data process knows

    kind = ArrowPythonObjectType()
    payload = pa.array([pickle.dumps(Payload(tmp_path / "ran"))], kind.storage_type)
    evil = pa.ExtensionArray.from_storage(kind, payload)
    name, _, field = place.partition(".")
    plain = {"bytes": pa.array([b"x"]), "path": pa.array(["1.png"])} if name == "image" else {}
    fields = {**plain, field: evil}
    column = pa.StructArray.from_arrays(list(fields.values()), list(fields)) if field else evil
    pq.write_table(pa.table({name: column, "uri": ["1.png"]}), tmp_path / "evil.parquet")
    try:
        listing = list_archives([str(tmp_path / "evil.parquet")])
        carried = listing.table.to_pylist()[0]
        assert carried.get("weather") in (None, payload[0].as_py())  # the bytes, as which they lie in the file
    except ValueError as error:
        assert field and "only Arrow's own types are carried" in str(error)
    assert not (tmp_path / "ran").exists()

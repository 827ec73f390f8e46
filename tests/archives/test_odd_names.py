"""A listed name is a name: no letter in it means a protocol, a pattern, a query or a command to a terminal."""

from __future__ import annotations

import csv
import io
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import make_bucket, reach, run_server

from unet_ray import cli, storage
from unet_ray.archives.listing import list_archives
from unet_ray.archives.reading import FrameGone, read_frames
from unet_ray.messages import printable

NAMES = [
    *("a::b.jpg", "drive::1/1.jpg", "s3::x/2.jpg", "simplecache::a.jpg", "file:x.jpg", "data:x.jpg", "http:/x.jpg"),
    *("h#a.jpg", "q?a.jpg", "q?versionId=3.jpg", "st*ar.jpg", "br[1].jpg", "br1.jpg", "{a,b}.jpg", "p%2Fq.jpg"),
    *("esc\x1b[31mx.jpg", "tab\tx.jpg", "nl\nx.jpg", "\u202egpj.jpg", "\x7f.jpg", " lead.jpg", "trail /1.jpg"),
    *("~t.jpg", "-dash.jpg", "e:1.jpg", "ä日本.jpg", "$a$b.jpg", "'q\".jpg", "x" * 240 + ".jpg"),
]


def read(root: str, *allowed: str) -> dict[str, bytes | FrameGone]:
    listing = list_archives([root], allow_uris=allowed)
    assert listing.unlistable == () and listing.ignored == {}
    return dict(zip(listing.table["frame_id"].to_pylist(), read_frames(listing.table), strict=True))


def expected(prefix: str = "") -> dict[str, bytes]:
    return {prefix + name: name.encode() for name in NAMES}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / "drive::0" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "drive::0"


def test_files_of_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(str(folder)) == expected()
    monkeypatch.chdir(folder.parent)
    assert read("drive::0") == expected()
    for name in NAMES:
        assert list(read(f"drive::0/{name}").values()) == [name.encode()]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_of_a_catalogue(folder: Path, kind: str) -> None:
    catalogue = folder / f"cat::1.{kind}"
    if kind == "csv":
        with catalogue.open("w", newline="") as file:
            csv.writer(file).writerows([["uri"], *([name] for name in NAMES)])
    else:
        pq.write_table(pa.table({"uri": NAMES}), catalogue)
    assert read(str(catalogue)) == expected()


def test_members_of_archives(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t::1.tar", "w") as tar:
        for name in [*NAMES, "C:/d.jpg", "a\\b.jpg"]:  # letters like others, in a tar
            member = tarfile.TarInfo(name)
            member.size = len(name.encode())
            tar.addfile(member, io.BytesIO(name.encode()))
    more = {f"t::1.tar!{name}": name.encode() for name in ("C:/d.jpg", "a\\b.jpg")}
    assert read(str(tmp_path / "t::1.tar")) == expected("t::1.tar!") | more
    with zipfile.ZipFile(tmp_path / "z::1.zip", "w") as archive:
        for name in [*NAMES, "drive07\\cam0\\1.jpg"]:
            member = zipfile.ZipInfo("x")
            member.filename = name
            archive.writestr(member, name.encode())
    folders = {"z::1.zip!drive07/cam0/1.jpg": b"drive07\\cam0\\1.jpg"}
    assert read(str(tmp_path / "z::1.zip")) == expected("z::1.zip!") | folders
    pq.write_table(
        pa.table({"image": [{"bytes": name.encode(), "path": name} for name in NAMES]}), tmp_path / "p::1.parquet"
    )
    assert read(str(tmp_path / "p::1.parquet")) == expected("p::1.parquet!")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_server(str(tmp_path_factory.mktemp("moto") / "recording")) as url:
        yield url


def test_keys_of_a_store(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with reach(server, monkeypatch):
        root = f"{make_bucket(server)}/drive::0"
        keys = [name for name in NAMES if "\n" not in name]  # moto's server has no such keys
        keys += [
            "http://y.jpg",
            "s3://other/y.jpg",
            "x//y.jpg",
            "a+b c.jpg",
            "a&b=c;d.jpg",
            "<x>&amp;.jpg",
            "cr\rx.jpg",
        ]
        for key in keys:
            storage.write_whole(f"{root}/{key}", key.encode())
        whole = {key: key.encode() for key in keys}
        assert read(root) == whole
        with (tmp_path / "c.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["uri"], *([f"{root}/{key}"] for key in keys)])
        assert read(str(tmp_path / "c.csv"), root) == {f"{root}/{key}": data for key, data in whole.items()}
        with storage.open_read(f"{root}/q?versionId=3.jpg") as file:
            assert file.read() == b"q?versionId=3.jpg"


@pytest.mark.parametrize("delete", ["delete_tree", "delete_many"])
def test_what_is_deleted_in_a_store_is_no_pattern(delete: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with reach(server, monkeypatch):
        root = make_bucket(server)
        for key in ("x[1]/a", "x1/a", "y*/a", "yy/a", "z/a", "z/b"):
            storage.write_whole(f"{root}/{key}", b"1")
        if delete == "delete_tree":
            for key in ("x[1]", "y*", "z"):
                storage.delete_tree(f"{root}/{key}")
        else:
            storage.delete_many([f"{root}/{key}" for key in ("x[1]/a", "y*/a", "z/a", "z/b")])
        assert [file.path for file in storage.list_files(root)] == ["x1/a", "yy/a"]


def test_names_that_no_file_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["a\0b.jpg", "x" * 300 + ".jpg"]}), tmp_path / "c.parquet")
    assert {gone.reason for gone in read(str(tmp_path / "c.parquet")).values()} == {"missing"}
    with pytest.raises(ValueError, match="a name that is not UTF-8, or has NUL in it; rename it, or give a link to it"):
        storage.resolve("a\0b")
    with pytest.raises(ValueError, match="a name that is not UTF-8, or has NUL in it; rename it, or give a link to it"):
        storage.resolve(os.fsdecode(b"caf\xe9"))


def test_a_zips_name_with_nul_does_not_hide_a_frame(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("aXb.jpg", b"x")
    packed = (tmp_path / "z.zip").read_bytes().replace(b"aXb.jpg", b"a\0b.jpg")
    (tmp_path / "z.zip").write_bytes(packed)
    assert list_archives([str(tmp_path / "z.zip")]).unlistable == (
        (f"{tmp_path}/z.zip!a\\x00b.jpg", "a name with NUL in it"),
    )


def test_text_of_a_parquet_file_that_is_no_utf8(tmp_path: Path) -> None:
    latin = pa.array([b"caf\xe9.jpg", b"b.jpg"]).view(pa.string())
    images = pa.StructArray.from_arrays([pa.array([b"1", b"2"]), latin], ["bytes", "path"])
    pq.write_table(pa.table({"image": images}), tmp_path / "p.parquet")
    assert read(str(tmp_path / "p.parquet")) == {"p.parquet!000000": b"1", "p.parquet!000001": b"2"}
    for column in ("uri", "frame_id", "weather"):
        columns = {"uri": pa.array(["a.jpg", "b.jpg"])} | {column: latin}
        pq.write_table(pa.table(columns), tmp_path / "c.parquet")
        with pytest.raises(ValueError, match=f"{tmp_path}/c.parquet: column '{column}' is not UTF-8; write it so"):
            list_archives([str(tmp_path / "c.parquet")])
    (tmp_path / "c.csv").write_bytes(b"uri\ncaf\xe9.jpg\n")
    with pytest.raises(ValueError, match=f"{tmp_path}/c.csv is no CSV file that can be read: .*UTF8"):
        list_archives([str(tmp_path / "c.csv")])


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("zip://a.png::s3://drives/x.zip", "may stand before another protocol; give the file itself"),
        ("zip::s3://drives/x.zip", "may stand before another protocol; give the file itself"),
        ("simplecache::nope://x", "unknown protocol 'nope'"),
    ],
)
def test_chains_that_are_not_read(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        storage.resolve(uri)


def test_a_cache_before_a_store_keeps_the_names(tmp_path: Path) -> None:
    storage.write_whole("memory://bucket/a::b/1?2.jpg", b"1")
    uri = storage.resolve("simplecache::memory://bucket/a::b/1?2.jpg")
    assert storage.read_bytes(uri) == b"1"


def test_nothing_of_a_name_reaches_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b[2J\r\n\x9b\u202e\u2066\udce9 ä日\u3000") == (
        "a\\x1b[2J\\r\\n\\x9b\\u202e\\u2066\\udce9 ä日\u3000"
    )
    odd = "esc\x1b]0;x\x07\n"
    assert cli.main(["verify", str(tmp_path / odd)]) != 0
    assert cli.main(["check", "--images", str(tmp_path / odd), "--masks", str(tmp_path), "--classes", "camvid"]) == 2
    printed = capsys.readouterr()
    assert "esc\\x1b]0;x\\x07\\n" in printed.err and "\x1b" not in printed.out + printed.err
    assert printed.err.count("\n") == 2

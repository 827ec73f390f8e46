from __future__ import annotations

import io
import os
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import fsspec
import labelled
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unet_ray import frames, storage
from unet_ray.archives import members
from unet_ray.archives import zip as zip_files
from unet_ray.archives.listing import list_archives
from unet_ray.archives.reading import FrameGone, read_frames
from unet_ray.frames import PathFields, natural_key, parse_path
from unet_ray.output import manifest, plans
from unet_ray.storage import files as storage_files

FILES = {
    "drive2/cam/frame10.png": b"ten",
    "drive2/cam/frame2.PNG": b"two",
    "drive10/a.jpg": b"jpeg",
    "drive10/notes.json": b"{}",
    "drive10/sub/readme": b"",
}
IN_ORDER = ["drive2/cam/frame2.PNG", "drive2/cam/frame10.png", "drive10/a.jpg"]


def write_folder(root: Path) -> str:
    for path, data in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return str(root)


def write_tar(path: Path, files: dict[str, bytes] = FILES) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def write_zip(path: Path) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for index, (name, data) in enumerate(FILES.items()):
            archive.writestr(name, data, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[index % 2])
    return str(path)


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_an_archive_lists_its_frames_in_order_and_reads_them_back(kind, tmp_path):
    write, prefix = {
        "folder": (lambda: write_folder(tmp_path / "log"), ""),
        "tar": (lambda: write_tar(tmp_path / "log.tar"), "log.tar!"),
        "zip": (lambda: write_zip(tmp_path / "log.zip"), "log.zip!"),
    }[kind]
    listing = list_archives([write()])
    assert listing.table.schema == frames.MANIFEST_SCHEMA
    assert listing.table["frame_id"].to_pylist() == [prefix + path for path in IN_ORDER]
    assert list(read_frames(listing.table)) == [FILES[path] for path in IN_ORDER]
    assert listing.table["frame_index"].to_pylist() == [2, 10, None]
    assert listing.ignored == {".json": 1, "no extension": 1}
    assert listing.unlistable == ()


def test_numbers_sort_by_value_and_texts_that_tie_by_themselves():
    names = ["frame10", "frame2", "frame02", "frame", "b1", "a100", "b" + 21 * "9", "b1" + 21 * "0", "b" + 120 * "1"]
    expected = ["a100", "b1", "b" + 21 * "9", "b1" + 21 * "0", "b" + 120 * "1", "frame", "frame02", "frame2", "frame10"]
    assert sorted(names, key=natural_key) == expected


def test_a_path_says_its_drive_by_the_folder_or_by_a_pattern():
    assert parse_path("drive07/cam0/000012.png", None) == PathFields("drive07/cam0", "", 12, None)
    assert parse_path("log.tar!cam0/000012.png", None) == PathFields("log.tar!cam0", "", 12, None)
    assert parse_path("log.zip!000012.png", None) == PathFields("log.zip", "", 12, None)
    assert parse_path("wow!7.png", None) == PathFields("", "", 7, None)
    assert parse_path("d/camera.000012", None) == PathFields("d", "", 12, None)  # as pairs are named
    assert parse_path("d/99999999999999999999.png", None) == PathFields("d", "", None, None)
    assert parse_path("0001TP_006690.png", None) == PathFields("", "", 6690, None)
    pattern = r"(?P<sequence>[^/_]+)_(?P<frame_index>\d+)"
    assert parse_path("train/0001TP_006690.png", pattern) == PathFields("0001TP", "", 6690, None)
    pattern = r"^(?P<sequence>\w+)/(?P<camera>\w+)/(?P<timestamp_ns>\d+)"
    assert parse_path("d1/front/1700000000123456789.png", pattern) == PathFields(
        "d1", "front", None, 1700000000123456789
    )


def test_a_path_that_the_pattern_does_not_match_says_nothing():
    assert parse_path("a/b7.png", "^x(?P<sequence>.)") == PathFields("", "", None, None)
    with pytest.raises(ValueError, match="takes frame_index 'b' from 'a/b.png'; it must be a whole number of 63 bits"):
        parse_path("a/b.png", "/(?P<frame_index>[^.]+)")


def test_several_roots_and_globs_keep_equal_names_apart(tmp_path):
    for drive in ("a", "b"):
        (tmp_path / drive / "cam0").mkdir(parents=True)
        (tmp_path / drive / "cam0" / "1.png").write_bytes(drive.encode())
    two = list_archives([str(tmp_path / "a" / "cam0"), str(tmp_path / "b" / "cam0")]).table
    assert two["frame_id"].to_pylist() == ["a/cam0/1.png", "b/cam0/1.png"]
    matched = list_archives([str(tmp_path / "*" / "cam0")]).table
    assert matched["frame_id"].to_pylist() == ["a/cam0/1.png", "b/cam0/1.png"]
    with pytest.raises(
        ValueError, match="cam0 is given twice: its frames would be labelled twice; give each place once"
    ):
        list_archives([str(tmp_path / "a" / "cam0")] * 2)


def test_a_frame_that_changed_or_vanished_is_no_bytes(tmp_path):
    root = write_folder(tmp_path / "log")
    rows = list_archives([root]).table
    (tmp_path / "log" / IN_ORDER[0]).write_bytes(b"other content")
    (tmp_path / "log" / IN_ORDER[2]).unlink()
    first, second, third = read_frames(rows)
    assert first == FrameGone("changed", f"{root}/{IN_ORDER[0]} has changed since it was listed")
    assert second == b"ten"
    assert third == FrameGone("missing", f"{root}/{IN_ORDER[2]} is gone since it was listed")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gone", "gone: no such folder or file"),
        ("empty", "empty holds nothing; frames are .png, "),
        ("x*", "nothing matches"),
    ],
)
def test_roots_without_frames_are_refused(uri, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        list_archives([uri])


def test_members_that_would_escape_are_refused_by_name(tmp_path):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../up.png", "/root.png", "a/../../up.png"):
            tar.addfile(tarfile.TarInfo(name))
        for kind, name in (
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.LNKTYPE, "hard.png"),
            (tarfile.CHRTYPE, "device.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("good.png"))
    listing = list_archives([str(path)])
    assert listing.table["frame_id"].to_pylist() == ["evil.tar!good.png"]
    assert listing.unlistable == (
        (f"{path}!../up.png", "a name that leaves the archive"),
        (f"{path}!/root.png", "a name that leaves the archive"),
        (f"{path}!a/../../up.png", "a name that leaves the archive"),
        (f"{path}!link.png", "a link, device or sparse file"),
        (f"{path}!hard.png", "a link, device or sparse file"),
        (f"{path}!device.png", "a link, device or sparse file"),
    )


def test_a_tar_that_ends_early_is_unlistable_wherever_it_is_cut(tmp_path):
    whole = Path(write_tar(tmp_path / "whole.tar")).read_bytes()
    end = whole.rstrip(b"\0")
    last_data = (len(end) + 511) // 512 * 512
    for cut in range(256, last_data + 1, 256):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        listing = list_archives([str(path)])
        assert [uri for uri, _ in listing.unlistable] == [str(path)], f"cut at {cut} of {len(whole)}"


@pytest.mark.parametrize("folders", [3, 200])
def test_the_parts_of_a_folder_are_all_of_it(folders, tmp_path):
    for name in (*(f"drive{number}/a/0.png" for number in range(folders)), "own.png", "b.txt", "drive0/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "drive0/loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "drive1")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    parts = storage.list_parts(str(tmp_path))
    assert len(parts) == (1 + folders + 1 if folders == 3 else 1 + 51)
    troubles: list[tuple[str, str]] = []
    whole_troubles: list[tuple[str, str]] = []
    files = [file for part in parts for file in part(lambda uri, error: troubles.append((uri, str(error))))]
    whole = storage.list_files(str(tmp_path), on_unreadable=lambda uri, error: whole_troubles.append((uri, str(error))))
    assert sorted(files, key=lambda file: file.path) == sorted(whole, key=lambda file: file.path)
    assert troubles == whole_troubles and len(troubles) == 1


def test_compressed_tars_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "log.tar.gz").write_bytes(b"\x1f\x8b")
    assert list_archives([str(tmp_path)]).unlistable == (
        (
            str(tmp_path / "log.tar.gz"),
            "a compressed tar cannot be read by range; unpack it, or pack it again as a plain .tar",
        ),
    )


def test_a_zip_bomb_is_not_inflated(tmp_path, monkeypatch):
    monkeypatch.setattr(zip_files, "MAX_FRAME_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(100_000))
    (gone,) = read_frames(list_archives([str(tmp_path / "bomb.zip")]).table)
    assert gone == FrameGone("too_large", "the zip's member inflates to more than 1,000 bytes")


def test_a_compressed_tar_that_is_named_itself_is_a_mistake_of_the_user(tmp_path):
    (tmp_path / "log.TGZ").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match="log.TGZ: a compressed tar cannot be read by range; unpack it, or pack it"):
        list_archives([str(tmp_path / "log.TGZ")])
    (tmp_path / "log.txt").write_text("x")
    with pytest.raises(
        ValueError, match="log.txt is not an archive; give a folder, a tar, zip, Parquet or CSV file, or a"
    ):
        list_archives([str(tmp_path / "log.txt")])


def test_what_cannot_be_looked_at_is_unlistable(tmp_path):
    root = write_folder(tmp_path / "log")
    (tmp_path / "log" / "dangling.png").symlink_to("nowhere")
    with open(os.fsencode(root) + b"/caf\xe9.png", "wb"):
        pass
    assert list_archives([root]).unlistable == (
        (f"{root}/caf\\udce9.png", "a name that is not UTF-8"),
        (f"{root}/dangling.png", "No such file or directory"),
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_an_unreadable_folder_is_unlistable(tmp_path):
    root = write_folder(tmp_path / "log")
    os.chmod(tmp_path / "log" / "drive2", 0)
    try:
        assert list_archives([root]).unlistable == ((f"{root}/drive2", "Permission denied"),)
    finally:
        os.chmod(tmp_path / "log" / "drive2", 0o755)


def test_archives_are_read_at_any_uri(tmp_path):
    fsspec.filesystem("memory").store.clear()
    for path, data in FILES.items():
        storage.write_whole(f"memory://bucket/log/{path}", data)
    rows = list_archives(["memory://bucket/log"]).table
    assert rows["frame_id"].to_pylist() == IN_ORDER
    assert list(read_frames(rows)) == [FILES[path] for path in IN_ORDER]
    assert list_archives(["memory://bucket/lo*"]).table["uri"].equals(rows["uri"])
    pq.write_table(pa.table({"image": [FILES[path] for path in IN_ORDER]}), tmp_path / "log.parquet")
    for archive in (write_tar(tmp_path / "log.tar"), write_zip(tmp_path / "log.zip"), str(tmp_path / "log.parquet")):
        uri = f"memory://bucket/{Path(archive).name}"
        storage.write_whole(uri, Path(archive).read_bytes())
        inside = list_archives([uri])
        assert inside.unlistable == ()
        assert list(read_frames(inside.table)) == [FILES[path] for path in IN_ORDER]


def test_the_archive_of_a_chunk_is_looked_at_once(tmp_path, monkeypatch):
    rows = list_archives([write_tar(tmp_path / "log.tar")]).table
    looks = []
    look = storage.versions
    monkeypatch.setattr(storage, "versions", lambda uris: looks.append(sorted(uris)) or look(uris))
    os.utime(tmp_path / "log.tar", ns=(0, 0))
    message = f"{tmp_path}/log.tar has changed since it was listed"
    assert list(read_frames(rows)) == [FrameGone("changed", message)] * 3
    assert looks == [[str(tmp_path / "log.tar")]]
    (tmp_path / "log.tar").unlink()
    (tmp_path / "another.tar").touch()
    assert {gone.reason for gone in read_frames(rows)} == {"missing"}


@pytest.mark.parametrize(
    ("roots", "gone", "unseen"),
    [
        (["log"], "log/drive10/a.jpg", None),
        (["log"], "log/drive10", None),  # a whole drive, which was deleted after the listing
        (["log"], "log", "log"),
        (["log/*"], "log/drive10", None),
        (["log/*"], "log", "log"),
        (["log", "tars"], "log/drive10", None),
        (["log", "tars"], "log", "log"),
        (["tars/log.tar"], "tars/log.tar", None),
        (["tars/log.tar"], "tars", "tars"),
        (["lists/log.csv"], "lists/1.png", None),
        (["lists/log.csv"], "lists", "lists"),
        (["lists/log.csv"], "elsewhere/2.png", None),
        (["lists/log.csv"], "elsewhere", "elsewhere"),
    ],
)
def test_a_frame_is_missing_only_where_its_archive_is_seen(roots, gone, unseen, tmp_path):
    """Another machine may lack the folder, or have the empty place of a disk that is not mounted there."""
    write_folder(tmp_path / "log")
    for folder in ("tars", "lists", "elsewhere"):
        (tmp_path / folder).mkdir()
    write_tar(tmp_path / "tars" / "log.tar")
    write_tar(tmp_path / "tars" / "more.tar")
    (tmp_path / "lists/log.csv").write_text(f"uri\n1.png\n{tmp_path}/elsewhere/2.png\n")
    for path in ("lists/1.png", "elsewhere/2.png"):
        (tmp_path / path).write_bytes(b"png")
    rows = planned([str(tmp_path / root) for root in roots], tmp_path / "out")
    assert all(isinstance(content, bytes) for content in read_frames(rows))
    (tmp_path / gone).rename(tmp_path / "gone")
    if unseen is None:
        assert {content.reason for content in read_frames(rows) if isinstance(content, FrameGone)} == {"missing"}
        return
    with pytest.raises(storage.StorageError, match=f"does not see {tmp_path}/{unseen}, where it was listed"):
        list(read_frames(rows))
    (tmp_path / unseen).mkdir()
    if unseen == "elsewhere":  # which nobody gave
        assert [isinstance(content, FrameGone) for content in read_frames(rows)] == [False, True]
        return
    with pytest.raises(storage.StorageError, match=f"does not see {tmp_path}/{unseen}, where it was listed"):
        list(read_frames(rows))


def planned(roots: list[str], out: Path) -> pa.Table:
    """The rows as a worker reads them: from the manifest."""
    listing = list_archives(roots, allow_uris=[str(out.parent)])
    plan = plans.plan(str(out), listing, labelled.LINEAGE, labelled.CUTTING, config_yaml="")
    return pa.concat_tables([manifest.read_rows(chunk) for chunk in plan.chunks])


# --- archives that are damaged, or made to do harm ---


def tar_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """One tar header by hand (POSIX ustar), with its checksum."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108], header[124:136], header[156:157] = b"0000644\0", size.ljust(12, b"\0"), kind
    header[257:265], header[148:156] = b"ustar\x0000", b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def unlistable(path: Path, content: bytes) -> list[tuple[str, str]]:
    path.write_bytes(content)
    return [(uri.removeprefix(str(path)), why) for uri, why in list_archives([str(path)]).unlistable]


def test_a_damaged_header_in_the_middle_of_a_tar_is_no_silent_end(tmp_path):
    content = bytearray(Path(write_tar(tmp_path / "a.tar")).read_bytes())
    content[1024 + 10] ^= 1  # the second member's name: its checksum is wrong now
    assert unlistable(tmp_path / "b.tar", bytes(content)) == [("", "ends early, at byte 1,024")]


def test_a_tar_that_leads_in_circles_ends(tmp_path):
    record = b"14 size=-1536\n"
    backwards = tar_header(b"pax", b"%o" % len(record), b"x") + record.ljust(512, b"\0")
    backwards += tar_header(b"1.png", b"0") + bytes(1024)
    ((_, why),) = unlistable(tmp_path / "circle.tar", backwards)
    assert why.startswith(("its headers lead in a circle", "ends early", "has a damaged header"))


def test_sizes_beyond_the_file_are_not_believed(tmp_path):
    for size in (b"77777777777", b"\x80" + (2**62).to_bytes(11, "big"), b"\xff" * 12):
        problems = unlistable(tmp_path / "huge.tar", tar_header(b"1.png", size) + bytes(1024))
        assert [uri for uri, _ in problems] == [""], (size, problems)


def test_a_header_made_to_fill_the_memory_is_not_read(tmp_path):
    path = tmp_path / "pax.tar"
    with open(path, "wb") as file:  # a long name of 150 MB, on a sparse disk
        file.write(tar_header(b"long", b"%o" % (150 * 2**20), b"L"))
        file.truncate(200 * 2**20)
    tracemalloc.start()
    ((_, why),) = list_archives([str(path)]).unlistable
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert why == "headers of 157,286,400 bytes at byte 512; at most 1,048,576 are read"
    assert peak < 5 * 2**20


def test_a_sparse_member_and_a_name_that_is_no_text_are_refused(tmp_path):
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("caf\xe9.png"))
        tar.addfile(tarfile.TarInfo("./cam0//1.png"))
    content = path.read_bytes()[:1024] + tar_header(b"sparse.png", b"0", b"S") + bytes(1024)
    path.write_bytes(content)
    listing = list_archives([str(path)])
    assert listing.table["frame_id"].to_pylist() == ["odd.tar!cam0/1.png"]
    assert listing.unlistable == (
        (f"{path}!caf\\udce9.png", "a name that is not UTF-8"),
        (f"{path}!sparse.png", "a link, device or sparse file"),
    )


def test_hostile_members_of_a_zip_are_refused_by_name(tmp_path):
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        for name in ("../up.png", "/root.png", "C:/x.png", "..\\up.png", "good.png"):
            archive.writestr(name, b"x")
        archive.writestr("lzma.png", b"x", zipfile.ZIP_LZMA)
        archive.writestr("lzma.txt", b"x", zipfile.ZIP_LZMA)
    listing = list_archives([str(path)])
    assert listing.table["frame_id"].to_pylist() == ["evil.zip!good.png"]
    assert listing.ignored == {".txt": 1}
    leaves = "a name that leaves the archive"
    assert listing.unlistable == (
        (f"{path}!link.png", "a link, device or sparse file"),
        *((f"{path}!{name}", leaves) for name in ("../up.png", "/root.png", "C:/x.png", "..\\up.png")),
        (f"{path}!lzma.png", "compressed by method 14; stored and deflated are read"),
    )


def test_a_zip_that_ends_early_or_is_encrypted_is_unlistable(tmp_path):
    whole = Path(write_zip(tmp_path / "whole.zip")).read_bytes()
    for cut in range(1, len(whole), 37):
        assert [uri for uri, _ in unlistable(tmp_path / "cut.zip", whole[:cut])] == [""], cut
    encrypted = bytearray(whole)
    entry = whole.index(b"PK\1\2")
    encrypted[entry + 8] |= 1
    assert unlistable(tmp_path / "secret.zip", bytes(encrypted)) == [("!drive2/cam/frame10.png", "encrypted")]


def test_a_member_with_a_long_extra_field_is_read_whole(tmp_path):
    path = tmp_path / "log.zip"
    info = zipfile.ZipInfo("1.png")
    info.extra = struct.pack("<HH", 0x9999, 3000) + bytes(3000)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, b"content of the frame")
    assert list(read_frames(list_archives([str(path)]).table)) == [b"content of the frame"]


def test_a_damaged_member_of_a_zip_is_a_frame_cut_short(tmp_path):
    path = tmp_path / "log.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("1.png", "2.png"):
            archive.writestr(name, bytes(range(256)))
    rows = list_archives([str(path)]).table
    content, status = bytearray(path.read_bytes()), path.stat()
    content[0:4] = b"oops"
    second = content.index(b"PK\3\4")
    content[second + 30 + 5] = 0xFF
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # damage of the disk, not a new version
    first, other = read_frames(rows)
    assert first == FrameGone("truncated", f"{path}: no local header where the zip's directory says")
    assert isinstance(other, FrameGone) and other.reason == "truncated"


def test_a_frame_of_too_many_bytes_is_not_read(tmp_path):
    with open(tmp_path / "1.png", "wb") as file:
        file.truncate(members.MAX_FRAME_BYTES + 1)
    assert list(read_frames(list_archives([str(tmp_path)]).table)) == [
        FrameGone("too_large", "the frame has 268,435,457 bytes; at most 268,435,456 are read")
    ]


def test_an_answer_that_is_cut_short_is_trouble_with_storage_and_no_row(tmp_path, monkeypatch):
    rows = list_archives([write_folder(tmp_path / "log")]).table
    whole = storage.read_many
    monkeypatch.setattr(storage, "read_many", lambda *spans: [data[:-1] for data in whole(*spans)])
    with pytest.raises(storage.StorageError, match="2 of 3 bytes came; trying again may help"):
        list(read_frames(rows))


# --- Parquet and catalogues ---


def test_images_in_parquet_are_listed_by_row_or_path_and_read_by_row_group(tmp_path):
    images = [f"image {n}".encode() for n in range(23)]
    pq.write_table(pa.table({"image": pa.array(images), "label": range(23)}), tmp_path / "a.parquet", row_group_size=5)
    hugging_face = [{"bytes": data, "path": f"cam0/{n}.png"} for n, data in enumerate(images)]
    pq.write_table(pa.table({"x": range(23), "frame": hugging_face}), tmp_path / "b.parquet", row_group_size=7)
    pq.write_table(pa.table({"mask": pa.array(images)}), tmp_path / "c.parquet")
    listing = list_archives([str(tmp_path)])
    kind = ".parquet with no column 'image' of encoded images (--image-column may be mask)"
    assert listing.ignored == {kind: 1}
    assert listing.table["frame_id"].to_pylist() == [f"a.parquet!{n:06d}" for n in range(23)] + [
        f"b.parquet!cam0/{n}.png" for n in range(23)
    ]
    assert listing.table["sequence"].to_pylist() == ["a.parquet"] * 23 + ["b.parquet!cam0"] * 23
    assert list(read_frames(listing.table)) == images * 2
    assert list(read_frames(listing.table.take([45, 3, 22, 0]))) == [images[22], images[3], images[22], images[0]]
    named = list_archives([str(tmp_path / "c.parquet")], image_column="mask").table
    assert list(read_frames(named)) == images


def test_rows_without_an_image_and_paths_that_repeat(tmp_path):
    values = [{"bytes": b"one", "path": "1.png"}, {"bytes": None, "path": "1.png"}]
    pq.write_table(pa.table({"image": values}), tmp_path / "a.parquet")
    table = list_archives([str(tmp_path / "a.parquet")]).table
    assert table["frame_id"].to_pylist() == ["a.parquet!000000", "a.parquet!000001"]
    first, second = read_frames(table)
    assert first == b"one" and (second.reason, second.error) == (
        "not_an_image",
        "row 1 has no bytes in the column 'image.bytes': the images lie elsewhere; give their folder, or write their "
        "bytes into the column",
    )


def test_a_parquet_file_of_neither_kind_or_none_at_all(tmp_path):
    pq.write_table(pa.table({"x": [1], "y": [2]}), tmp_path / "a.parquet")
    message = "a.parquet has no column 'image' of encoded images, and no column 'uri'; its columns are x, y"
    with pytest.raises(ValueError, match=message):
        list_archives([str(tmp_path / "a.parquet")])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is none PAR1")
    with pytest.raises(ValueError, match=r"bad.parquet is no Parquet file that can be read: "):
        list_archives([str(tmp_path / "bad.parquet")])
    ((uri, why),) = list_archives([str(tmp_path)]).unlistable
    assert uri == str(tmp_path / "bad.parquet") and why.startswith("is no Parquet file that can be read: ")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_catalogue_gives_ids_drives_and_columns_of_its_own(kind, tmp_path):
    write_folder(tmp_path / "log")
    columns = {
        "uri": ["log/drive10/a.jpg", str(tmp_path / "log/drive2/cam/frame10.png"), "log/gone.png"],
        "sequence": ["07", None, "07"],
        "timestamp_ns": [1700000000123456789, 5, None],
        "weather": ["rain", "sun", None],
    }
    catalogue = tmp_path / f"catalogue.{kind}"
    if kind == "parquet":
        table = pa.table({**columns, "__index_level_0__": [0, 1, 2]})
        pq.write_table(table.set_column(3, "weather", table["weather"].dictionary_encode()), catalogue)
    else:
        lines = [columns.keys(), *zip(*columns.values(), strict=True)]
        catalogue.write_text("\n".join(",".join("" if v is None else str(v) for v in line) for line in lines))
    table = list_archives([str(catalogue)]).table
    assert table.schema == pa.schema([*frames.MANIFEST_SCHEMA, ("weather", pa.string())])
    rows = table.select(["frame_id", "sequence", "timestamp_ns", "frame_index", "weather"]).to_pylist()
    absolute = columns["uri"][1]
    assert [tuple(row.values()) for row in rows] == [
        (absolute, absolute.rpartition("/")[0], 5, 10, "sun"),
        ("log/drive10/a.jpg", "07", 1700000000123456789, None, "rain"),
        ("log/gone.png", "07", None, None, None),
    ]
    assert list(read_frames(table)) == [b"ten", b"jpeg", FrameGone("missing", f"{tmp_path}/log/gone.png is not there")]
    (tmp_path / "log/gone.png").write_bytes(b"there again")
    assert list(read_frames(table))[2] == FrameGone(
        "changed", f"{tmp_path}/log/gone.png has changed since it was listed"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("url\na.png\n", "has no column 'uri'; its columns are url"),
        ("uri,x\na.png,1\n,2\n", "row 2 has no uri"),
        ("uri,version\na.png,1\n", "the column's name 'version' is taken; give it another"),
        ("uri,timestamp_ns\na.png,yesterday\n", "is no CSV file that can be read: "),
        ("uri\n", "holds no frame: it has no rows"),
        ("uri,frame_id\na.png,x\nb.png,x\n", "two frames have the id 'x'; "),
        ("uri\ns3://bucket/a.png?token=abc\n", "the URI holds credentials"),
    ],
)
def test_a_catalogue_that_cannot_be_used_is_refused_in_one_line(content, message, tmp_path):
    (tmp_path / "catalogue.csv").write_text(content)
    with pytest.raises(ValueError) as caught:
        list_archives([str(tmp_path / "catalogue.csv")])
    assert message in str(caught.value) and "\n" not in str(caught.value) and "abc" not in str(caught.value)


def test_catalogue_and_folder_together(tmp_path):
    write_folder(tmp_path / "log")
    (tmp_path / "more.csv").write_text("uri,weather\nb.jpg,rain\n")
    (tmp_path / "log/drive10/a.jpg").rename(tmp_path / "b.jpg")
    table = list_archives([str(tmp_path / "log"), str(tmp_path / "more.csv")]).table
    assert table.select(["frame_id", "weather"]).to_pylist() == [
        {"frame_id": "b.jpg", "weather": "rain"},
        {"frame_id": "log/drive2/cam/frame2.PNG", "weather": None},
        {"frame_id": "log/drive2/cam/frame10.png", "weather": None},
    ]


# --- many ---


def test_the_order_does_not_depend_on_how_archives_are_listed(tmp_path):
    for drive in (10, 2, 1):
        write_tar(tmp_path / f"drive{drive}.tar", {f"{n}.png": b"%d" % n for n in (3, 11, 1)})
    listed = list_archives([str(tmp_path)]).table
    assert listed["frame_id"].to_pylist() == [f"drive{d}.tar!{n}.png" for d in (1, 2, 10) for n in (1, 3, 11)]
    assert list_archives([str(tmp_path / "*.tar")]).table.equals(listed)


def test_headers_of_a_tar_are_read_by_range(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "log.tar", {f"{n}.png": bytes(400_000) for n in range(8)})
    sizes = []
    read = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri, offset, size: sizes.append(size) or read(uri, offset, size))
    monkeypatch.setattr(
        storage_files, "read_bytes", lambda uri, offset, size: sizes.append(size) or read(uri, offset, size)
    )
    assert len(list_archives([path]).table) == 8
    assert len(sizes) <= 20 and sum(sizes) < 1_500_000  # of 3.2 MB

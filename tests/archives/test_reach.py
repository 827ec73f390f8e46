"""What a catalogue may name without being asked for: what lies below its own folder or below the job's roots."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unet_ray import storage
from unet_ray.archives.listing import list_archives
from unet_ray.archives.mistakes import require_usable_roots
from unet_ray.archives.reach import Reach
from unet_ray.archives.roots import find_roots


def refusal(catalogue: str, uris: list[str], roots: tuple[str, ...] = (), allowed: tuple[str, ...] = ()) -> str:
    """The end of the one line in which a catalogue is refused; nothing where all that it names may be read."""
    reach = Reach(roots, allowed)
    reach.look(catalogue, pa.array(uris))
    try:
        reach.require()
    except ValueError as error:
        start = f"{catalogue} names "
        assert str(error).startswith(start)
        return str(error).removeprefix(start)
    return ""


@pytest.mark.parametrize(
    ("catalogue", "uri"),
    [
        ("/data/cat.csv", "a/1.png"),
        ("/data/cat.csv", "/data/a/1.png"),
        ("/data/cat.csv", "file:///data/a/1.png"),
        ("/data/cat.csv", "a/../b/1.png"),
        ("/data/cat.csv", "a..b/..c/1.png"),
        ("/data/cat.csv", "s3:/odd/1.png"),
        ("/cat.csv", "/any/1.png"),
        ("s3://drives/lists/cat.csv", "s3://drives/lists/a/1.png"),
        ("s3://drives/lists/cat.csv", "a/100%25/1.png"),
        ("http://host/lists/cat.csv", "a/100%25/1.png"),
        ("simplecache::s3://drives/cat.csv", "a/1.png"),
    ],
)
def test_its_own_folder_needs_no_question(catalogue: str, uri: str) -> None:
    assert refusal(catalogue, [uri]) == ""


@pytest.mark.parametrize(
    ("catalogue", "uri", "asked"),
    [
        ("/data/cat.csv", "/etc/passwd", "/etc"),
        ("/data/cat.csv", "file:///etc/passwd", "/etc"),
        ("/data/cat.csv", "local:///etc/ssh/key", "/etc/ssh"),
        ("/data/cat.csv", "../other/1.png", "/other"),
        ("/data/cat.csv", "a/../../data2/1.png", "/data2"),
        ("/data/cat.csv", "/database/1.png", "/database"),
        ("/data/cat.csv", "/root.png", "/root.png"),
        ("/data/cat.csv", "s3://drives/a/1.png", "s3://drives/a"),
        ("/data/cat.csv", "http://169.254.169.254/latest/meta-data", "http://169.254.169.254/latest"),
        ("/data/cat.csv", "simplecache::file:///etc/passwd", "simplecache::file:///etc"),
        ("/data/cat.csv", "simplecache::s3://drives/1.png", "simplecache::s3://drives"),
        ("s3://drives/lists/cat.csv", "/etc/passwd", "/etc"),
        ("s3://drives/lists/cat.csv", "../1.png", "s3://drives"),
        ("s3://drives/lists/cat.csv", "s3://drives/lists2/1.png", "s3://drives/lists2"),
        ("s3://drives/lists/cat.csv", "gs://drives/lists/1.png", "gs://drives/lists"),
        ("http://host/lists/cat.csv", "../1.png", "http://host"),
        ("http://host/lists/cat.csv", "%2e%2e/secret/1.png", "http://host/secret"),
        ("http://host/lists/cat.csv", r"..\secret\1.png", "http://host/secret/1.png"),
        ("http://host/lists/cat.csv", "a/..%2f..%2fsecret/1.png", "http://host/secret"),
        ("http://host/lists/cat.csv", "https://host/lists/1.png", "https://host/lists"),
        ("/data/cat.csv", "/a b/1.png", "'/a b'"),
    ],
)
def test_any_other_place_is_asked_for_and_the_answer_is_enough(catalogue: str, uri: str, asked: str) -> None:
    prefix = asked.strip("'")
    assert refusal(catalogue, [uri]) == f"1 frame below {prefix}; add --allow-uri {asked}"
    assert refusal(catalogue, [uri], allowed=(prefix,)) == ""
    assert refusal(catalogue, [uri], allowed=(f"{prefix}2",)) != ""


def test_roots_of_the_job_may_be_named() -> None:
    uris = ["../drives/1.png", "/drives/a/2.png", "s3://drives/3.png", "/drives2/4.png"]
    assert refusal("/lists/cat.csv", uris, roots=("/drives", "s3://drives")) == (
        "1 frame below /drives2; add --allow-uri /drives2"
    )


def test_a_prefix_of_all_of_a_store() -> None:
    uris = ["s3://one/1.png", "s3://two/2.png"]
    assert refusal("/lists/cat.csv", uris, allowed=("s3://",)) == ""
    assert refusal("/lists/cat.csv", [*uris, "/etc/passwd"], allowed=("/",)).startswith("1 frame below s3://one, ")


def test_few_prefixes_cover_many_folders_the_largest_first() -> None:
    uris = [f"s3://drives/{n % 700}/{n}.png" for n in range(12_000)]
    uris += ["/mnt/a/b/1.png", "/mnt/a/c/2.png", "/etc/passwd", "s3://other/deep/er/1.png", "s3://other/deep/2.png"]
    assert refusal("/lists/cat.csv", uris) == (
        "12,000 frames below s3://drives, 2 frames below /mnt/a, 2 frames below s3://other/deep, 1 frame below /etc; "
        "add --allow-uri s3://drives /mnt/a s3://other/deep /etc"
    )
    many = [f"s3://bucket{n}/1.png" for n in range(7)]
    assert refusal("/lists/cat.csv", many).endswith(
        " and 2 more; add --allow-uri s3://bucket0 s3://bucket1 s3://bucket2 s3://bucket3 s3://bucket4 and the others"
    )


def test_links_are_followed_and_a_real_path_is_the_linked_one(tmp_path: Path) -> None:
    (tmp_path / "disk/log").mkdir(parents=True)
    (tmp_path / "log").symlink_to("disk/log")
    assert refusal(f"{tmp_path}/log/cat.csv", [f"{tmp_path}/disk/log/1.png"]) == ""
    assert refusal(f"{tmp_path}/cat.csv", ["log/1.png"]) == ""
    (tmp_path / "disk/log/up").symlink_to("/etc")
    assert refusal(f"{tmp_path}/log/cat.csv", ["up/passwd"]) == ""  # as a folder of --frames would be read
    assert refusal(f"{tmp_path}/log/cat.csv", ["/etc/passwd"]) != ""


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_nothing_of_a_catalogue_is_looked_at_before_all_of_it_is_allowed(
    kind: str, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "lists").mkdir()
    uris = [*(f"{n}.png" for n in range(30_000)), "../a.png", "/etc/passwd"]
    path = tmp_path / f"lists/cat.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["uri"], *([uri] for uri in uris)])
    else:
        pq.write_table(pa.table({"uri": uris}), path)
    info, seen = storage.info, []
    monkeypatch.setattr(storage, "info", lambda uri: seen.append(uri) or info(uri))
    roots, message = find_roots([str(path)]), f"{path} names 1 frame below /etc, 1 frame below {tmp_path}; add "
    with pytest.raises(ValueError) as caught:
        require_usable_roots([str(path)], roots, None)
    assert str(caught.value) == f"{message}--allow-uri /etc {tmp_path}"
    with pytest.raises(ValueError) as caught:
        list_archives([str(path)])
    assert set(seen) <= {str(path), *(f"{tmp_path}/lists/{n}.png" for n in range(30_000))}
    require_usable_roots([str(path)], roots, None, allow_uris=["/etc", str(tmp_path)])
    assert len(list_archives([str(path)], allow_uris=["/etc", str(tmp_path)]).table) == len(uris)


def test_several_catalogues_are_one_question(tmp_path: Path) -> None:
    for name, uri in (("a", "/etc/passwd"), ("b", "/etc/shadow"), ("c", "1.png")):
        (tmp_path / f"{name}.csv").write_text(f"uri\n{uri}\n")
    uris = [f"{tmp_path}/{name}.csv" for name in "abc"]
    with pytest.raises(ValueError) as caught:
        require_usable_roots(uris, find_roots(uris), None)
    assert str(caught.value) == f"{uris[0]}, {uris[1]} name 2 frames below /etc; add --allow-uri /etc"

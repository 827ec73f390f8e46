from __future__ import annotations

import json
import os
from collections.abc import Iterator

import fsspec
import pytest
from bad_weather import Proxy, Weather
from s3_server import KEY_ID, SECRET, make_bucket, reach, run_server

from unet_ray import cli, errors, storage
from unet_ray.config import SegmentConfig, VerifyConfig
from unet_ray.options import config_files as options
from unet_ray.storage import filesystems

URIS = ("s3://bucket/log", "/data/log", None)


def test_options_are_plain_for_one_protocol_or_by_protocol():
    plain = {"anon": True, "client_kwargs": {"region_name": "eu-central-1"}}
    assert filesystems.options_by_protocol(plain, URIS) == {"s3": plain}
    assert filesystems.options_by_protocol({"s3": plain, "gs": {"token": "anon"}}, URIS) == {
        "s3": plain,
        "gs": {"token": "anon"},
    }
    assert filesystems.options_by_protocol(None, URIS) == {}
    for uris, among in ((["/data"], "nothing but local paths"), (["s3://a", "gs://b"], "gs:// and s3://")):
        with pytest.raises(ValueError, match=f"for which protocol, and the job has {among}; give them by protocol"):
            filesystems.options_by_protocol(plain, uris)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"key": "hunter2"}, "key"),
        ({"s3": {"secret": "hunter2"}}, "s3.secret"),
        ({"client_kwargs": {"aws_session_token": "hunter2"}}, "client_kwargs.aws_session_token"),
        ({"s3": {"client_kwargs": [{"aws_access_key_id": "hunter2"}]}}, "s3.client_kwargs.aws_access_key_id"),
        ({"password": "hunter2"}, "password"),
        ({"token": "hunter2"}, "token"),
        ({"account_key": "hunter2"}, "account_key"),
        ({"connection_string": "AccountKey=hunter2"}, "connection_string"),
        ({"s3_additional_kwargs": {"SSECustomerKey": "hunter2"}}, "s3_additional_kwargs.SSECustomerKey"),
        ({"endpoint_url": "http://someone:hunter2@host"}, "endpoint_url"),
        ({"client_kwargs": {"endpoint_url": "http://host/?sig=hunter2"}}, "client_kwargs.endpoint_url"),
    ],
)
def test_credentials_in_the_options_are_refused_without_repeating_them(options, where):
    with pytest.raises(ValueError, match=f"--storage-options has '{where}', which may be a credential; give") as caught:
        VerifyConfig(out="s3://bucket/labels", storage_options=options)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:hun/ter2@bucket/log",
        "s3a://AKIA:hunter2@bucket",
        "https://host/log?AWSAccessKeyId=a&Signature=hunter2",
        "https://host/log;token=hunter2?a=1&sig=hunter2",
        "https://host/log#access_token=hunter2",
        "zip://a.png::https://me:hunter2@host/log.zip",
    ],
)
def test_no_way_of_writing_credentials_into_a_uri_is_taken(uri):
    with pytest.raises(ValueError, match="the URI holds credentials") as caught:
        filesystems.resolve(uri)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    ["https://host:8080/a@b/log", "s3://bucket/a:b@c/log", "https://host/log?versionId=3&monkeys=2", "s3://b/key=1"],
)
def test_what_only_looks_like_credentials_is_a_name(uri):
    assert filesystems.resolve(uri) == uri


def test_an_option_is_given_as_json_or_yaml_and_never_written_down(tmp_path, capsys):
    parsed = cli.parse("verify", ["s3://b/labels", "--storage-options", "{anon: true}"])
    assert parsed._storage_options() == {"s3": {"anon": True}}
    file = tmp_path / "mine.yaml"
    file.write_text("model: s3://b/m\nimages: i\nmasks: m\nstorage_options: {s3: {anon: true, profile: null}}\n")
    assert cli.parse("evaluate", ["--config", str(file)])._storage_options() == {"s3": {"anon": True, "profile": None}}
    assert "storage_options" not in options.to_plain(parsed)
    config = SegmentConfig(model="m", frames=("s3://b",), out="o", storage_options={"anon": True})
    assert "anon" not in options.to_yaml(config)
    assert cli.main(["verify", "s3://b/labels", "--storage-options", "[1]"]) == errors.EXIT_USAGE
    assert (
        capsys.readouterr().err
        == "unet-ray: error: --storage-options holds no options; write one `name: value` a line\n"
    )


def test_workers_get_what_says_where_and_no_secret(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://host")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("FSSPEC_S3", json.dumps({"anon": False, "key": KEY_ID, "secret": SECRET}))
    monkeypatch.setenv("FSSPEC_GS_TOKEN", SECRET)
    monkeypatch.setenv("FSSPEC_GS_PROJECT", "logs")
    monkeypatch.setenv(filesystems.RETRY_VARIABLE, "7.0")
    where = {"AWS_ENDPOINT_URL": "http://host", "AWS_REGION": "eu-central-1", "FSSPEC_GS_PROJECT": "logs"}
    where[filesystems.RETRY_VARIABLE] = "7.0"
    assert filesystems.worker_environment(inherited=True) == where
    assert filesystems.worker_environment(inherited=False) == {**where, "FSSPEC_S3": '{"anon": false}'}


@pytest.mark.parametrize("before", [None, '{"anon": true}'])
def test_a_call_without_options_leaves_the_environment_as_it_was_before_there_were_any(before, monkeypatch):
    filesystems.configure({}, 60)
    monkeypatch.delenv("FSSPEC_S3", raising=False)
    if before:
        monkeypatch.setenv("FSSPEC_S3", before)
    environment = filesystems.worker_environment(inherited=True)
    filesystems.configure({"s3": {"endpoint_url": "http://host"}}, 60)
    assert filesystems.worker_environment(inherited=True) != environment
    filesystems.configure({}, 60)
    assert filesystems.worker_environment(inherited=True) == environment


@pytest.fixture
def proxy(tmp_path, monkeypatch) -> Iterator[Proxy]:
    with run_server(str(tmp_path / "recording")) as server, Proxy(server) as proxy, reach(None, monkeypatch, retry_s=5):
        bucket = make_bucket(server)
        fsspec.filesystem("s3", endpoint_url=server).pipe_file(f"{bucket}/x", b"content", ACL="public-read")
        yield proxy
        filesystems.configure({}, 60)


def test_endpoint_profile_and_anonymous_access_by_option_and_by_environment(proxy, monkeypatch, tmp_path):
    credentials = tmp_path / "credentials"
    credentials.write_text("[logs]\naws_access_key_id = OTHERKEY\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    by_option = {
        KEY_ID: {},
        "nobody": {"anon": True},
        "OTHERKEY": {"profile": "logs"},
    }
    for signer, settings in by_option.items():
        proxy.reset_counts(Weather())
        filesystems.configure({"s3": {"endpoint_url": proxy.url, **settings}}, 5)
        assert storage.read_bytes("s3://drives/x") == b"content"
        assert set(proxy.signers) == {signer}
    filesystems.configure({}, 5)  # and what an earlier job was told counts no more
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_PROFILE", "logs")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    proxy.reset_counts(Weather())
    assert storage.read_bytes("s3://drives/x") == b"content"
    assert set(proxy.signers) == {"OTHERKEY"}


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://no-such-bucket/x", "The specified bucket does not exist: 's3://no-such-bucket/x'"),
        ("s3://Not_a_bucket!/x", 'Invalid bucket name "Not_a_bucket!"'),
    ],
)
def test_what_the_store_does_not_allow_is_said_at_once_with_its_uri(proxy, uri, message):
    filesystems.configure({"s3": {"endpoint_url": proxy.url}}, 60)
    proxy.reset_counts(Weather())
    with pytest.raises(OSError, match="bucket") as caught:
        storage.write_whole(uri, b"x")
    assert message in str(caught.value) and uri in str(caught.value)
    assert not isinstance(caught.value, storage.StorageError)
    assert proxy.seen.total() <= 1

"""What a store other than S3 is shown with: both jobs on it, its going away, and the same command afterwards."""

from __future__ import annotations

import contextlib
import io

from bad_weather import Proxy, Weather
from test_s3_jobs import DRIVES, FRAMES, SEGMENT, TRAIN, read_tree

from unet_ray import cli, errors, storage


def run(bucket: str, command: str, *arguments: str) -> tuple[int, str]:
    """Runs a command, in whose arguments `S3` is the bucket; returns its exit code and what it said."""
    output = io.StringIO()
    expanded = (*(argument.replace("S3", bucket) for argument in arguments), "--storage-retry-s", "60")
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        return cli.main([command, *expanded]), output.getvalue()


def train_label_and_go_on(bucket: str, proxy: Proxy, *, dark_on: str, dark_at: int) -> str:
    """Trains, labels, and labels again while the store goes away for good; then the same command ends as the first.

    Args:
        bucket: with the frames of `make_log` in `data/`.
        proxy: before the store.
        dark_on: the requests (`Weather`) of which some are records.
        dark_at: which of them the store does not answer any more.

    Returns:
        The line with which the job ended whose store was away.
    """
    segment = ("segment", *SEGMENT, "--frames", "S3/data/images")
    for arguments in (("train", *TRAIN, "--out", "S3/run"), (*segment, "--out", "S3/labels")):
        code, output = run(bucket, *arguments)
        assert code == 0, output
    code, output = run(bucket, "verify", "S3/labels")
    assert code == 0 and "whole" in output

    proxy.reset_counts(Weather(dark_on=dark_on, dark_at=dark_at, dark_s=10_000))
    code, output = run(bucket, *segment, "--out", "S3/cut")
    proxy.clear_up()
    assert code == errors.EXIT_TRY_AGAIN, output
    (line,) = [line for line in output.splitlines() if "error" in line]
    assert line.startswith("unet-ray: error: ") and "trying again may help" in line
    records = list(storage.list_files(f"{bucket}/cut/_work/records"))
    assert records
    code, output = run(bucket, *segment, "--out", "S3/cut")
    assert code == 0 and f"{DRIVES * FRAMES - 4 * len(records)} in" in output, output
    assert read_tree(f"{bucket}/cut") == read_tree(f"{bucket}/labels")
    return line

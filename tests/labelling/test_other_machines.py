"""An unfinished output that goes on by other means than it was begun with: one line says so. No Ray is started."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import small_output

from unet_ray.labelling.planning import say_other_machines
from unet_ray.output import ledger

SAME = {"device": "cpu", "tensorflow": version("tensorflow"), "pillow": version("pillow")}


@pytest.mark.parametrize(
    ("recorded", "differences"),
    [
        (SAME, None),
        ({}, None),  # of a version that recorded nothing
        ({**SAME, "ray": "2.58.0", "pyarrow": "25.0.0"}, None),  # which decide no pixel
        ({**SAME, "device": "gpu", "gpus": "L4"}, "device was gpu and is cpu"),
        ({**SAME, "tensorflow": "2.20.0"}, f"tensorflow was 2.20.0 and is {version('tensorflow')}"),
    ],
)
def test_what_was_and_what_is_are_in_one_line(recorded, differences, tmp_path, capsys):
    plan = small_output.make_plan(str(tmp_path / "labels"), recorded=recorded)
    small_output.work(plan, chunks=ledger.pending(plan)[:1])
    plan = small_output.make_plan(str(tmp_path / "labels"), recorded={"device": "of the second run"})
    say_other_machines(plan, len(ledger.pending(plan)), "cpu")
    line = (
        f"warning: the labels so far come from another device or other versions: {differences}; between the two, a "
        "mask may differ in a few pixels\n"
    )
    assert capsys.readouterr().out == (line if differences else "")


def test_an_output_without_a_label_has_nothing_to_differ_from(tmp_path, capsys):
    plan = small_output.make_plan(str(tmp_path / "labels"), recorded={"device": "gpu"})
    say_other_machines(plan, len(ledger.pending(plan)), "cpu")
    assert capsys.readouterr().out == ""

"""Class files: each form means what its table says, colours of one's own stay, and errors show an example."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest
import yaml

from unet_ray import PACKAGE, class_files, saved_models
from unet_ray.class_files import EXAMPLE, class_set_of
from unet_ray.classes import IGNORED_ID, PRESETS, ClassSet
from unet_ray.config import load_class_set
from unet_ray.palette import PALETTE, color_distances

SKY, ROAD = (70, 130, 180), (128, 64, 128)


def read(text: str) -> ClassSet:
    return class_set_of(yaml.safe_load(text), source="mine.yaml", name="mine")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("classes: [sky, road]", [0, 1]),
        ("[sky, road]", [0, 1]),
        ("- sky\n- road", [0, 1]),
        ("classes: {0: sky, 1: road}", [0, 1]),
        ("0: sky\n1: road", [0, 1]),
        ("{23: road, 7: sky}", [7, 23]),  # outputs in ascending order of the ids
        ("{sky: 23, road: 7}", [23, 7]),  # in the order of the file
        ("classes: [{name: sky}, {name: road, values: [9]}]", [0, 9]),
        ("classes: [sky, {name: road, values: [9]}]", [0, 9]),
    ],
)
def test_names_get_ids_and_colours(text, ids):
    classes = read(text)
    assert (classes.name, classes.names, classes.ignore) == ("mine", ("sky", "road"), ())
    assert [item.color for item in classes.classes] == list(PALETTE[:2])
    assert classes.encode_ids(np.array([ids], np.uint8)).tolist() == [[0, 1]]
    assert [item.values for item in classes.classes] == [(ids[0],), (ids[1],)]


@pytest.mark.parametrize(
    "text",
    [
        "classes: {sky: [70, 130, 180], road: [128, 64, 128]}",
        "{sky: [70, 130, 180], road: [128, 64, 128]}",
        "sky: [70, 130, 180]\nroad: [128, 64, 128]",
    ],
)
def test_names_with_colours_mean_their_colours_and_their_places(text):
    classes = read(text)
    assert classes.palette_K3.tolist() == [list(SKY), list(ROAD)]
    assert classes.encode_ids(np.array([[1, 0]], np.uint8)).tolist() == [[1, 0]]
    assert classes.encode_colors(np.array([[ROAD, SKY]], np.uint8)).tolist() == [[1, 0]]


def test_ignored_values_stand_beside_any_form():
    classes = read("classes: [sky, road]\nignore: [255, [0, 0, 0]]\nname: two")
    assert classes.name == "two"
    assert classes.encode_ids(np.array([[0, 1, 255]], np.uint8)).tolist() == [[0, 1, IGNORED_ID]]


def test_colours_that_are_given_stay_and_the_others_are_far_from_them():
    ours = "{name: sky, color: [86, 180, 233], values: [1, [0, 158, 115]]}"  # two colours of the palette
    classes = read(f"classes: [road, {ours}, car, tree]\nignore: [[230, 159, 0]]")
    assert classes.classes[1].color == (86, 180, 233)
    assert classes.classes[0].color == PALETTE[3]
    given = np.array([(86, 180, 233), (0, 158, 115), (230, 159, 0)])
    others = np.array([item.color for item in classes.classes if item.name != "sky"])
    assert color_distances(others, given).min() > 10


@pytest.mark.parametrize("n_classes", [1, 254])
def test_any_number_of_classes_gets_colours(n_classes):
    classes = class_set_of([f"c{index}" for index in range(n_classes)], source="names")
    assert classes.palette_K3.tolist() == [list(color) for color in PALETTE[:n_classes]]
    assert ClassSet.from_dict(classes.to_dict()) == classes  # colours are stored, not made again


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_full_form_is_what_it_was(name):
    assert class_set_of(PRESETS[name].to_dict(), source="it") == PRESETS[name]


def test_no_preset_has_changed():
    """Colours, names and values are part of the digests of models, runs and outputs: of these all that exist."""
    digest = hashlib.sha256()
    for name in sorted(PRESETS):
        digest.update(json.dumps(PRESETS[name].to_dict(), sort_keys=True).encode())
    assert digest.hexdigest() == "cb009b1d3e80856dcd4643123b3ecc8474d3bdbaf1ba1f14af3d641571424f8c"


def test_the_palette_has_not_changed():
    digest = hashlib.sha256(np.array(PALETTE, np.uint8).tobytes()).hexdigest()
    assert digest == "889546fff5f8572afea55177424e764179c6599f2a2a720a7fa131263ae7e8c8"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "classes is None, allowed is a list of names, or a mapping of ids or colours"),
        ("classes:", "classes is None, allowed is a list of names, or a mapping of ids or colours"),
        ("classes: {}", "classes is {}, allowed is a list of names, or a mapping of ids or colours"),
        ("sky", "classes is 'sky', allowed is a list of names, or a mapping of ids or colours"),
        ("classes: [sky, 2]", "classes[1] has 2, allowed is a name"),
        (
            "classes: [sky, on]",
            "classes[1] has True, allowed is a name: put the name in quotes, which YAML takes for true or false",
        ),
        ("{0: sky, 1: [1, 2, 3]}", "classes: 1 has [1, 2, 3], allowed is a name"),
        ("{0: sky, road: 1}", "classes has 0, allowed is a name"),
        ("{sky: [1, 2]}", "class sky has [1, 2], allowed are an id or a colour of three numbers"),
        ("class: [sky, road]", "class class has ['sky', 'road'], allowed are an id or a colour of three numbers"),
        ("ignore: [0]", "class set: classes is missing"),
        ("{classes: [sky], colors: []}", "class set: unknown key 'colors', allowed are classes, name, ignore"),
        (
            "classes: [{nam: sky}]",
            "class set: classes[0]: unknown key 'nam', perhaps you meant name; allowed are name, color, values",
        ),
        ("classes: [{color: [1, 2, 3]}]", "class set: classes[0]: name is missing"),
        ("classes: [sky]\nignore: 255", "class set: ignore is 255, allowed is a list"),
        ("classes: [{name: sky, values: 3}]", "class set: classes[0]: values is 3, allowed is a list"),
    ],
)
def test_what_is_no_form_is_said_in_one_line_with_an_example(text, problem):
    with pytest.raises(ValueError) as caught:
        read(text)
    assert str(caught.value) == f"mine.yaml: {problem}; {EXAMPLE}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[sky, sky]", "class set 'mine': name 'sky' stands in class 'sky' and in class 'sky'; it can mean only one"),
        ("classes: [sky]\nignore: [0]", "class set 'mine': value 0 stands in class 'sky' and in ignore"),
        ("{300: sky}", "class set 'mine': class 'sky': values: 300 is neither an id from 0 to 255 nor a colour"),
        ("{sky: [1, 2, 256]}", "class set 'mine': class 'sky': color is (1, 2, 256), allowed are three numbers"),
        ("[Traffic light]", "(it becomes the column pixels_<name>): call it traffic_light"),
        (f"[{', '.join(f'c{index}' for index in range(255))}]", "mine.yaml: 255 classes, allowed are 1 to 254"),
    ],
)
def test_what_no_class_set_may_hold_is_refused_as_ever(text, problem):
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_the_examples_are_class_files():
    for example in re.findall("`(.*?)`", EXAMPLE):
        assert read(example).names == ("sky", "road")
    forms = re.findall(r"^\| `(.*?)` \|", class_files.__doc__ or "", re.MULTILINE)
    assert len(forms) == 6 and forms[0] == "classes"
    for form in forms[1:]:
        assert read(f"classes: {form.replace(', …', '')}").names[0] == "sky"


def test_the_document_has_the_same_table():
    rows = [line for line in (class_files.__doc__ or "").splitlines() if line.startswith("|")]
    assert "\n".join(rows) in (PACKAGE / "README.md").read_text()


def test_files_and_python_take_them_too(tmp_path):
    (tmp_path / "drive.yaml").write_text("- sky\n- road\n")
    classes = load_class_set(str(tmp_path / "drive.yaml"))
    assert (classes.name, classes.names) == ("drive", ("sky", "road"))
    assert saved_models._class_set(["sky", "road"]).names == ("sky", "road")
    (tmp_path / "twice.yaml").write_text("0: sky\n1: car\n0: road\n")
    with pytest.raises(ValueError, match=r"twice\.yaml is neither YAML nor JSON at line 1, column 1: 0 stands twice"):
        load_class_set(str(tmp_path / "twice.yaml"))

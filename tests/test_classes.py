import json
import pickle

import numpy as np
import pytest

from unet_ray.classes import IGNORED_ID, PRESETS, ClassSet, SegmentationClass, UnknownValuesError

ROAD = SegmentationClass(name="road", color=(128, 64, 128), values=(7, 9, (1, 2, 3)))
CAR = SegmentationClass(name="car", color=(0, 0, 142), values=(26,))
SMALL = ClassSet(name="small", classes=(ROAD, CAR), ignore=(0, 255, (0, 0, 0)))


def by_hand(raw, meanings):
    """The encoded mask by a loop over pixels: `meanings` is raw value -> output id."""
    height, width = raw.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    for row in range(height):
        for column in range(width):
            value = raw[row, column]
            mask[row, column] = meanings[tuple(int(v) for v in value) if raw.ndim == 3 else int(value)]
    return mask


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint16])
def test_ids_are_encoded_as_a_loop_over_pixels_does(dtype):
    meanings = {7: 0, 9: 0, 26: 1, 0: IGNORED_ID, 255: IGNORED_ID}
    ids = np.random.default_rng(3).choice(list(meanings), (5, 7)).astype(dtype)
    mask = SMALL.encode_ids(ids)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, by_hand(ids, meanings))


def test_colors_are_encoded_as_a_loop_over_pixels_does():
    meanings = {(128, 64, 128): 0, (1, 2, 3): 0, (0, 0, 142): 1, (0, 0, 0): IGNORED_ID}
    known = np.array(list(meanings), np.uint8)
    colors = known[np.random.default_rng(3).integers(0, len(known), (5, 7))]
    mask = SMALL.encode_colors(colors)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, by_hand(colors, meanings))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_presets_picture_means_the_same_mask_again(name):
    class_set = PRESETS[name]
    mask = np.random.default_rng(1).integers(0, class_set.n_classes, (6, 11)).astype(np.uint8)
    picture = class_set.colorize(mask)
    np.testing.assert_array_equal(picture[2, 5], class_set.classes[mask[2, 5]].color)
    np.testing.assert_array_equal(class_set.encode_colors(picture), mask)


def test_ignored_pixels_are_black_in_a_picture():
    picture = SMALL.colorize(np.array([[0, IGNORED_ID, 1]], np.uint8))
    assert picture.dtype == np.uint8
    assert picture.tolist() == [[[128, 64, 128], [0, 0, 0], [0, 0, 142]]]


def test_unknown_ids_are_named_with_their_pixels():
    ids = np.array([[7, 8, 8], [200, 26, 8]], np.uint8)
    with pytest.raises(UnknownValuesError) as caught:
        SMALL.encode_ids(ids)
    assert caught.value.values == {8: 3, 200: 1}
    assert str(caught.value) == (
        "2 ids outside the class set 'small': 8 (3 pixels), 200 (1 pixel); allowed: ids 0, 7, 9, 26, 255; "
        "add what is missing to a class's values or to ignore, or choose another class set"
    )
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.values) == (str(caught.value), caught.value.values)


def test_ids_beyond_a_byte_are_unknown_and_never_wrap():
    with pytest.raises(UnknownValuesError) as caught:
        SMALL.encode_ids(np.array([[7 + 256, -1, 26]], np.int32))
    assert caught.value.values == {263: 1, -1: 1}


def test_unknown_colors_are_named_and_a_long_list_is_cut():
    colors = np.zeros((2, 10, 3), np.uint8)
    colors[0, :, 2] = np.arange(100, 110)
    with pytest.raises(UnknownValuesError) as caught:
        SMALL.encode_colors(colors)
    assert caught.value.values == {(0, 0, blue): 1 for blue in range(100, 110)}
    assert str(caught.value).startswith("10 colours outside the class set 'small': (0, 0, 100) (1 pixel), ")
    assert "(0, 0, 107) (1 pixel) and 2 more; allowed: the 4 colours of its classes and of ignore; " in str(
        caught.value
    )


def test_an_unknown_color_above_all_known_ones_is_found():
    with pytest.raises(UnknownValuesError) as caught:
        SMALL.encode_colors(np.full((1, 3, 3), 255, np.uint8))
    assert caught.value.values == {(255, 255, 255): 3}


def test_arrays_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match=r"ids are float32 of shape \(2, 3\), allowed are whole numbers \[H, W\]"):
        SMALL.encode_ids(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"colours are uint8 of shape \(2, 3\), allowed are uint8 \[H, W, 3\]"):
        SMALL.encode_colors(np.zeros((2, 3), np.uint8))


def test_presets_count_and_order():
    assert {name: item.n_classes for name, item in PRESETS.items()} == {
        "a2d2": 38,
        "bdd100k": 19,
        "camvid": 11,
        "carla23": 23,
        "carla29": 29,
        "cityscapes": 19,
        "cityscapes_train_ids": 19,
        "kitti": 19,
        "mapillary_v1.2": 65,
        "mapillary_v2.0": 123,
        "nuimages": 26,
        "virtual_kitti_2": 14,
    }
    in_order = (
        "unlabeled building fence other pedestrian pole road_line road sidewalk vegetation vehicle wall traffic_sign"
        " sky ground bridge rail_track guard_rail traffic_light static dynamic water terrain"
    )
    assert " ".join(PRESETS["carla23"].names) == in_order
    for name in ("carla23", "carla29", "camvid"):
        n_classes = PRESETS[name].n_classes
        identity = np.arange(n_classes, dtype=np.uint8)[None]
        np.testing.assert_array_equal(PRESETS[name].encode_ids(identity), identity)


def test_cityscapes_label_ids_become_its_train_ids():
    # trainId of label ids 0 to 33, from the benchmark's own table
    train_ids = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    train_ids += [255, 255, 16, 17, 18]
    mask = PRESETS["cityscapes"].encode_ids(np.arange(34, dtype=np.uint8)[None])
    assert mask[0].tolist() == train_ids


@pytest.mark.parametrize("name", ["cityscapes_train_ids", "bdd100k"])
def test_train_ids_are_the_classes_of_cityscapes_in_its_order(name):
    by_train_id = PRESETS[name]
    assert (by_train_id.names, by_train_id.n_classes) == (PRESETS["cityscapes"].names, 19)
    raw = np.array([[*range(19), 255]], np.uint8)
    assert by_train_id.encode_ids(raw)[0].tolist() == [*range(19), IGNORED_ID]
    np.testing.assert_array_equal(by_train_id.palette_K3, PRESETS["cityscapes"].palette_K3)
    with pytest.raises(UnknownValuesError, match="19"):
        by_train_id.encode_ids(np.array([[19]], np.uint8))


def test_kitti_is_labelled_as_cityscapes():
    kitti, cityscapes = PRESETS["kitti"].to_dict(), PRESETS["cityscapes"].to_dict()
    assert kitti.pop("name") == "kitti" and cityscapes.pop("name") == "cityscapes" and kitti == cityscapes


def test_mapillarys_ids_stand_in_the_order_of_its_configuration():
    first, second = PRESETS["mapillary_v1.2"], PRESETS["mapillary_v2.0"]
    identity = np.arange(256, dtype=np.uint8)[None]
    for class_set, n_classes in ((first, 65), (second, 123)):
        mask = class_set.encode_ids(identity[:, : n_classes + 1])
        assert mask[0].tolist() == [*range(n_classes), IGNORED_ID]
    assert [first.names[index] for index in (0, 13, 19, 48, 55, 64)] == (
        ["bird", "road", "person", "traffic_light", "car", "ego_vehicle"]
    )
    # Not alphabetical, as in some copies of the table.
    assert [second.names[index] for index in (21, 90, 91, 92, 93, 94, 95, 108)] == [
        *("road", "traffic_light_general_single", "traffic_light_pedestrians", "traffic_light_general_upright"),
        *("traffic_light_general_horizontal", "traffic_light_cyclists", "traffic_light_other", "car"),
    ]
    assert first.classes[13].color == second.classes[21].color == (128, 64, 128)


def test_a_palette_of_mapillary_in_which_classes_share_a_colour_is_read_by_its_ids():
    """In a mask of the data set, persons and groups of persons (ids 30, 31) have one colour."""
    class_set = PRESETS["mapillary_v2.0"]
    assert class_set.encode_ids(np.array([[30, 31]], np.uint8)).tolist() == [[30, 31]]
    with pytest.raises(UnknownValuesError):
        class_set.encode_colors(np.array([[[220, 20, 60]]], np.uint8))


def test_neighbours_of_one_category_of_a2d2_are_one_class():
    class_set = PRESETS["a2d2"]
    cars = [(255, 0, 0), (200, 0, 0), (150, 0, 0), (128, 0, 0)]
    colors = np.array([[*cars, (255, 0, 255), (53, 46, 82)]], np.uint8)
    names = [class_set.names[output] for output in class_set.encode_colors(colors)[0]]
    assert names == ["car"] * 4 + ["rd_normal_street", "rain_dirt"]
    assert sum(1 + len(item.values) for item in class_set.classes) == 55  # as class_list.json has them


def test_nuimages_indices_are_the_devkits():
    class_set = PRESETS["nuimages"]
    raw = np.array([[0, 1, 2, 17, 23, 24, 31]], np.uint8)
    names = [class_set.names[output] for output in class_set.encode_ids(raw)[0]]
    assert names == [
        *("background", "animal", "human_pedestrian_adult", "vehicle_car", "vehicle_truck"),
        *("flat_driveable_surface", "vehicle_ego"),
    ]
    categories = class_set.names[1:24]
    assert list(categories) == sorted(categories)


def test_virtual_kittis_colours():
    colors = np.array([[(210, 0, 200), (0, 139, 139), (0, 0, 0)]], np.uint8)
    assert PRESETS["virtual_kitti_2"].encode_colors(colors).tolist() == [[0, 13, IGNORED_ID]]


def test_presets_are_a_mapping_that_reads_what_is_asked_for():
    assert "camvid" in PRESETS and "../recipes/default" not in PRESETS and PRESETS.get("nothing") is None
    assert PRESETS["camvid"] is PRESETS["camvid"]


def test_camvid_void_is_ignored_as_id_and_as_color():
    assert PRESETS["camvid"].encode_ids(np.array([[11, 10]], np.uint8)).tolist() == [[IGNORED_ID, 10]]
    colors = np.array([[[0, 0, 0], [0, 128, 192]]], np.uint8)
    assert PRESETS["camvid"].encode_colors(colors).tolist() == [[IGNORED_ID, 10]]


@pytest.mark.parametrize("class_set", [SMALL, *PRESETS.values()], ids=lambda item: item.name)
def test_a_class_set_survives_json_and_pickle(class_set):
    assert class_set.palette_K3.tolist() == [list(item.color) for item in class_set.classes]
    assert ClassSet.from_dict(json.loads(json.dumps(class_set.to_dict()))) == class_set
    again = pickle.loads(pickle.dumps(class_set))
    assert again == class_set and hash(again) == hash(class_set)


def test_a_mapping_without_values_or_ignore_is_read_by_its_colors():
    class_set = ClassSet.from_dict({"classes": [{"name": "road", "color": [1, 2, 3]}]}, name="mine")
    assert (class_set.name, class_set.ignore) == ("mine", ())
    assert class_set.encode_colors(np.array([[[1, 2, 3]]], np.uint8)).tolist() == [[0]]
    with pytest.raises(
        UnknownValuesError, match=r"1 id outside the class set 'mine': 0 \(1 pixel\); allowed: ids none;"
    ):
        class_set.encode_ids(np.zeros((1, 1), np.uint8))


def road(**changes):
    return {"classes": [{"name": "road", "color": [1, 2, 3], "values": [7]} | changes]}


TWO = [{"name": "a", "color": [1, 1, 1], "values": [1]}, {"name": "b", "color": [2, 2, 2], "values": [2]}]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ([], "class set is [], allowed is a mapping with classes, name, ignore"),
        ({}, "class set: classes is missing"),
        ({"classes": "road"}, "class set: classes is 'road', allowed is a list"),
        ({"classes": []}, "class set 'custom': 0 classes, allowed are 1 to 254"),
        (
            {"classes": [{"name": f"c{n}", "color": [n, 0, 0]} for n in range(255)]},
            "class set 'custom': 255 classes, allowed are 1 to 254",
        ),
        (road() | {"void": 3}, "class set: unknown key 'void', allowed are classes, name, ignore"),
        (road() | {"name": ""}, "class set: name is '', allowed is a text that is not empty"),
        (
            road(colour=1),
            "class set: classes[0]: unknown key 'colour', perhaps you meant color; allowed are name, color, values",
        ),
        ({"classes": [{"name": "road"}]}, "class set: classes[0]: color is missing"),
        (road(values=7), "class set: classes[0]: values is 7, allowed is a list"),
        (
            road(name="Road"),
            "class set 'custom': class 'Road': a class's name is made of lower-case letters, digits and _ and begins"
            " with a letter (it becomes the column pixels_<name>): call it road",
        ),
        (
            road(name="2"),
            "class set 'custom': class '2': a class's name is made of lower-case letters, digits and _ and begins"
            " with a letter (it becomes the column pixels_<name>)",
        ),
        (
            road(color=[1, 2, 256]),
            "class set 'custom': class 'road': color is (1, 2, 256), allowed are three numbers from 0 to 255",
        ),
        (
            road(values=[True]),
            "class set 'custom': class 'road': values: True is neither an id from 0 to 255 nor a colour of three such"
            " numbers",
        ),
        (
            road() | {"ignore": [300]},
            "class set 'custom': ignore: 300 is neither an id from 0 to 255 nor a colour of three such numbers",
        ),
        (
            {"classes": [TWO[0], TWO[1] | {"name": "a"}]},
            "class set 'custom': name 'a' stands in class 'a' and in class 'a'; it can mean only one",
        ),
        (
            {"classes": [TWO[0], TWO[1] | {"color": [1, 1, 1]}]},
            "class set 'custom': color (1, 1, 1) stands in class 'a' and in class 'b'; it can mean only one",
        ),
        (
            {"classes": [TWO[0], TWO[1] | {"values": [2, 1]}]},
            "class set 'custom': value 1 stands in class 'a' and in class 'b'; it can mean only one",
        ),
        (
            {"classes": TWO, "ignore": [[2, 2, 2]]},
            "class set 'custom': value (2, 2, 2) stands in class 'b' and in ignore; it can mean only one",
        ),
    ],
)
def test_what_is_wrong_with_a_class_set_is_said_in_one_line(mapping, message):
    with pytest.raises(ValueError) as caught:
        ClassSet.from_dict(mapping)
    assert str(caught.value) == message


def test_254_classes_are_the_most():
    entries = [{"name": f"c{n}", "color": [n, 0, 0], "values": [n]} for n in range(254)]
    class_set = ClassSet.from_dict({"classes": entries})
    ids = np.arange(254, dtype=np.uint8)[None]
    np.testing.assert_array_equal(class_set.encode_ids(ids), ids)
    with pytest.raises(UnknownValuesError, match="1 id outside the class set 'custom': 254"):
        class_set.encode_ids(np.array([[254]], np.uint8))

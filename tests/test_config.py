from __future__ import annotations

import dataclasses

import pytest
import yaml

from unet_ray import config, config_files
from unet_ray.config import SegmentConfig, TrainConfig
from unet_ray.model.architecture import ModelConfig

TRAIN = {"images": "i", "masks": "m", "classes": "camvid", "out": "o"}
SEGMENT = {"model": "m", "frames": ("f",), "out": "o"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "--batch-size is 0; it must be at least 1"),
        (
            {"workers": 4, "batch_size": 3},
            "--batch-size is 3 for 4 workers; it is the batch of all of them together, so give at least 4",
        ),
        (
            {"image_size": (96, 130)},
            "image width is 130; a network of depth 5 halves it 4 times, so it must be a multiple of 16 up to 8192: "
            "try 128",
        ),
        ({"workers": "4:2"}, "--workers is '4:2'; give N, or MIN:MAX with 1 <= MIN <= MAX"),
        ({"workers": 0}, "--workers is '0'; give N, or MIN:MAX with 1 <= MIN <= MAX"),
        ({"val_fraction": 1.0}, "--val-fraction is 1.0; it must be in [0, 1)"),
        ({"val_images": "v"}, "only one of --val-images and --val-masks was given; give both or neither"),
        ({"scale": (0.8, 0.4)}, "--scale is 0.8 0.4; give two numbers with 0 < smallest <= largest <= 4"),
        (
            {"path_pattern": "(?P<drive>.*)"},
            "--path-pattern has the named groups ['drive']; use some of sequence, camera, frame_index, timestamp_ns: "
            "(?P<sequence>…)",
        ),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0; it must be above 0"),
        ({"out": ""}, "an empty path was given; give a local path or a URI such as s3://bucket/folder"),
    ],
)
def test_a_training_that_cannot_be_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError) as caught:
        TrainConfig(**{**TRAIN, **change})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": ()}, "--frames is empty; give at least one folder, tar file or glob"),
        ({"actors": "2:1"}, "--actors is '2:1'; give N, MIN:MAX with 1 <= MIN <= MAX, or auto"),
        ({"actors": "some"}, "--actors is 'some'; give N, MIN:MAX with 1 <= MIN <= MAX, or auto"),
        ({"max_rejected": 1.5}, "--max-rejected is 1.5; it is a share, 0 to 1"),
    ],
)
def test_a_labelling_that_cannot_be_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError) as caught:
        SegmentConfig(**{**SEGMENT, **change})
    assert str(caught.value) == message


def test_actors_are_a_number_or_a_range():
    ranges = [SegmentConfig(**SEGMENT, actors=actors).actor_range() for actors in ("auto", "3", "1:4")]
    assert ranges == [None, (3, 3), (1, 4)]


def test_workers_are_a_number_or_a_range():
    ranges = [TrainConfig(**TRAIN, workers=workers).worker_range() for workers in (2, "3", "1:4")]
    assert ranges == [(2, 2), (3, 3), (1, 4)]


def test_a_range_in_a_file_is_no_number_to_base_60(tmp_path):
    (tmp_path / "told.yaml").write_text("workers: 1:4\nepochs: 010\nlearning_rate: 1.0e-3\n")
    mapping = config_files.read_yaml(str(tmp_path / "told.yaml"))
    assert mapping == {"workers": "1:4", "epochs": 8, "learning_rate": 0.001}


def test_the_notebooks_network_is_the_default():
    model = TrainConfig(**TRAIN).model_config(n_classes=23)
    assert model == ModelConfig(
        image_height_px=96, image_width_px=128, n_classes=23, n_filters=32, depth=5, dropout=0.3
    )


def test_every_option_has_a_help_text():
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(config))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            body = [statement for statement in node.body if not isinstance(statement, ast.FunctionDef)]
            for statement, following in zip(body, [*body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign):
                    assert isinstance(following, ast.Expr), f"{node.name}.{ast.unparse(statement.target)} has no text"


def test_a_class_set_comes_from_a_yaml_file(tmp_path):
    file = tmp_path / "drive.yaml"
    file.write_text(
        "classes:\n- {name: road, color: [128, 64, 128], values: [7]}\n"
        "- {name: sky, color: [70, 130, 180], values: [10]}\n"
        "ignore: [0]\n"
    )
    classes = config.load_class_set(str(file))
    assert (classes.name, classes.names) == ("drive", ("road", "sky"))


def test_an_unknown_class_set_names_the_presets(tmp_path):
    with pytest.raises(ValueError) as caught:
        config.load_class_set("carla32")
    assert str(caught.value) == (
        "--classes is 'carla32'; give one of carla23, carla29, cityscapes, camvid or the path of a .yaml file"
    )
    with pytest.raises(ValueError, match=r"gone\.yaml: no such file"):
        config.load_class_set(str(tmp_path / "gone.yaml"))
    (tmp_path / "torn.yaml").write_text("classes: [")
    with pytest.raises(ValueError, match=r"torn\.yaml is neither YAML nor JSON at line 1, column \d+: "):
        config.load_class_set(str(tmp_path / "torn.yaml"))


def test_the_written_configuration_reads_back_the_same():
    segment_config = SegmentConfig(**SEGMENT, window=(48, 64), actors="1:4")
    fields = yaml.safe_load(config_files.to_yaml(segment_config))
    again = SegmentConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
    assert again == segment_config
    assert set(fields) == {field.name for field in dataclasses.fields(SegmentConfig)} - {"storage_options"}

from __future__ import annotations

import dataclasses

import pytest
import yaml

from unet_ray import PACKAGE, cli, config
from unet_ray.classes import PRESETS
from unet_ray.config import SegmentConfig, TrainConfig
from unet_ray.model.architecture import ENCODER_PREFIX, IMAGENET_PREPROCESSING, ConvnextConfig, UnetConfig
from unet_ray.options import config_files

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
        ({"accumulate": 0}, "--accumulate is 0; it must be at least 1"),
        (
            {"workers": "1:4", "batch_size": 8, "accumulate": 3},
            "--accumulate is 3; a worker has 2 frames of a step (--batch-size, divided), so give at most that",
        ),
        ({"image_size": (96, 8193)}, "image width is 8193; it must be 1 to 8192"),
        ({"norm": "batch"}, "--norm is 'batch'; it must be none or group"),
        (
            {"network": "segformer"},
            "--network is 'segformer'; it must be unet, unet_convnext, or package.module:function",
        ),
        (
            {"network": "mine:net", "depth": 3},
            "--depth is an option of --network unet; give mine:net its own by --network-arguments",
        ),
        (
            {"network": "unet_convnext", "residual": True},
            "--residual is an option of --network unet; unet_convnext has --n-filters, --drop-path",
        ),
        (
            {"drop_path": 0.2},
            "--drop-path is an option of --network unet_convnext; unet has --n-filters, --depth, --dropout, --norm, "
            "--residual",
        ),
        (
            {"network": "mine:net", "drop_path": 0.2},
            "--drop-path is an option of --network unet_convnext; give mine:net its own by --network-arguments",
        ),
        ({"network": "unet_convnext", "drop_path": 1.0}, "--drop-path is 1.0; it must be in [0, 1)"),
        (
            {"encoder_weights": "c.h5"},
            "--encoder-weights is c.h5, which is for --network unet_convnext; --network is unet",
        ),
        (
            {"network": "mine:net", "encoder_learning_rate": 0.1},
            "--encoder-learning-rate is 0.1, which is for --network unet_convnext; --network is mine:net",
        ),
        (
            {"network": "unet_convnext", "encoder_learning_rate": 2.0},
            "--encoder-learning-rate is 2.0; it must be 0 to 1",
        ),
        (
            {"network": "unet_convnext", "encoder_weights": "c.h5", "init_from": "m"},
            "both --init-from and --encoder-weights were given; a trained model has the encoder's weights, so give one",
        ),
        (
            {"network_arguments": {"width": 8}},
            "--network-arguments are for a --network package.module:function",
        ),
        (
            {"network": "mine:net", "network_arguments": "[8]"},
            "--network-arguments holds no options; write one `name: value` a line",
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
        ({"actors_per_gpu": 0}, "--actors-per-gpu is 0; it must be 1 to 16"),
        ({"actors_per_gpu": 2, "device": "cpu"}, "--actors-per-gpu is 2 and --device is cpu; leave one of them out"),
        ({"batch_size": 0}, "--batch-size is 0; it must be at least 1"),
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
    assert model == UnetConfig(image_height_px=96, image_width_px=128, n_classes=23, n_filters=32, depth=5, dropout=0.3)


def test_an_encoder_learns_slowly_where_its_weights_were_given():
    convnext = {"network": "unet_convnext", "n_filters": 8, "resize": "area"}
    model = TrainConfig(**TRAIN, **convnext).model_config(n_classes=3)
    preprocessing = dataclasses.replace(IMAGENET_PREPROCESSING, resize="area")
    assert model == ConvnextConfig(n_classes=3, n_filters=8, preprocessing=preprocessing)
    factors = [
        TrainConfig(**TRAIN, **convnext, **options).rate_factors()
        for options in (
            {},
            {"encoder_weights": "c.h5"},
            {"encoder_weights": "c.h5", "encoder_learning_rate": 1.0},
            {"encoder_learning_rate": 0.0},
        )
    ]
    assert factors == [{}, {ENCODER_PREFIX: 0.1}, {}, {ENCODER_PREFIX: 0.0}]
    assert TrainConfig(**TRAIN).rate_factors() == {}


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
        "--classes is 'carla32'; perhaps you meant carla29; give one of a2d2, bdd100k, camvid, carla23, carla29, "
        "cityscapes, cityscapes_train_ids, kitti, mapillary_v1.2, mapillary_v2.0, nuimages, virtual_kitti_2 "
        "or the path of a .yaml file"
    )
    with pytest.raises(ValueError, match=r"gone\.yaml: no such file"):
        config.load_class_set(str(tmp_path / "gone.yaml"))
    (tmp_path / "torn.yaml").write_text("classes: [")
    with pytest.raises(ValueError, match=r"torn\.yaml is neither YAML nor JSON at line 1, column \d+: "):
        config.load_class_set(str(tmp_path / "torn.yaml"))


@pytest.mark.parametrize("command", ["check", "train"])
def test_the_help_names_every_preset(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"or one of {', '.join(PRESETS)}." in text


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_file_is_one_that_a_user_may_change(name, tmp_path):
    file = tmp_path / f"{name}.yaml"
    file.write_bytes((PACKAGE / "class_sets" / file.name).read_bytes())
    assert config.load_class_set(str(file)) == PRESETS[name]


def test_the_written_configuration_reads_back_the_same():
    segment_config = SegmentConfig(**SEGMENT, window=(48, 64), actors="1:4")
    fields = yaml.safe_load(config_files.to_yaml(segment_config))
    again = SegmentConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
    assert again == segment_config
    assert set(fields) == {field.name for field in dataclasses.fields(SegmentConfig)} - {"storage_options"}

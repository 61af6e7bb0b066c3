"""--dataset_config TOML: precedence, and every mistake named with its place and the nearest right
key."""

from types import SimpleNamespace

import pytest

from images.dataset_settings import INTERPOLATIONS, DatasetSettings, SubsetSettings, schema, settings_from_toml
from images.selection import load_datasets

MINIMAL = """
[[datasets]]
resolution = 512
[[datasets.subsets]]
image_dir = "x"
"""


def read(tmp_path, text, **values):
    path = tmp_path / "data.toml"
    path.write_text(text, encoding="utf-8")
    return settings_from_toml(path, SimpleNamespace(**values))


def test_precedence_subset_dataset_general_command_line(tmp_path):
    text = """
[general]
keep_tokens = 1
flip_aug = true
batch_size = 3
caption_extension = ".txt"
[[datasets]]
resolution = [512, 768]
keep_tokens = 2
  [[datasets.subsets]]
  image_dir = "a"
  keep_tokens = 3
  num_repeats = 7
  [[datasets.subsets]]
  image_dir = "b"
  flip_aug = false
[[datasets]]
resolution = 64
batch_size = 1
  [[datasets.subsets]]
  image_dir = "c"
  is_reg = true
"""
    flags = {
        "keep_tokens": 9,
        "train_batch_size": 5,
        "shuffle_caption": True,
        "flip_aug": False,
        "caption_extension": ".x",
    }
    first, second = read(tmp_path, text, dataset_repeats=2, face_crop_aug_range="2.0,4.0", **flags)
    a, b = first.subsets
    c = second.subsets[0]
    assert (a.keep_tokens, b.keep_tokens, c.keep_tokens) == (3, 2, 1)
    assert (a.flip_aug, b.flip_aug, c.flip_aug) == (True, False, True)
    assert (a.num_repeats, b.num_repeats, c.num_repeats) == (7, 2, 2)
    assert all(subset.shuffle_caption and subset.caption_extension == ".txt" for subset in (a, b, c))
    assert a.face_crop_aug_range == (2.0, 4.0) and (a.is_reg, c.is_reg) == (False, True)
    assert (first.resolution, second.resolution) == ((512, 768), (64, 64))
    assert (first.batch_size, second.batch_size) == (3, 1)


def test_resolution_from_the_command_line_and_defaults(tmp_path):
    (dataset,) = read(tmp_path, MINIMAL.replace("resolution = 512", ""), resolution="640,512")
    assert dataset.resolution == (640, 512)
    expected = DatasetSettings(resolution=(640, 512), subsets=[SubsetSettings(image_dir="x")])
    assert dataset == expected


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("resolution", "resolutoin", ["[[datasets]] 1", "unknown key resolutoin", "did you mean resolution?"]),
        ("image_dir", "imagedir", ["[[datasets.subsets]] 1", "did you mean image_dir?", "image_dir is missing"]),
        (
            "[[datasets]]",
            "[general]\nimage_dir = 'x'\n[[datasets]]",
            ["[general]", "belongs into [[datasets.subsets]]"],
        ),
        ('image_dir = "x"', 'image_dir = "x"\nresolution = 64', ["resolution belongs into [general] or [[datasets]]"]),
        ('"x"', '"x"\nflip_aug = "true"', ["flip_aug = 'true'", "true or false"]),
        ('"x"', '"x"\nflip_aug = 1', ["flip_aug = 1", "true or false"]),
        ('"x"', '"x"\nnum_repeats = 2.5', ["num_repeats = 2.5", "whole number"]),
        ('"x"', '"x"\nnum_repeats = true', ["num_repeats = True", "whole number"]),
        ('"x"', '"x"\nnum_repeats = 0', ["num_repeats = 0", "at least 1"]),
        ('"x"', '"x"\ncaption_dropout_rate = 1.5', ["caption_dropout_rate = 1.5", "from 0 to 1"]),
        ('"x"', '"x"\ncaption_dropout_rate = nan', ["caption_dropout_rate = nan", "from 0 to 1"]),
        ('"x"', '"x"\ncaption_extension = "txt"', ["caption_extension = 'txt'", "begin with a dot"]),
        ('"x"', "3", ["image_dir = 3", "text in quotes"]),
        ('"x"', '"x"\nface_crop_aug_range = [4.0, 2.0]', ["face_crop_aug_range = [4.0, 2.0]", "rising"]),
        ('"x"', '"x"\nresize_interpolation = "box"', ["resize_interpolation = 'box'", *INTERPOLATIONS]),
        ('"x"', '"x"\ncustom_attributes = {a = 1}', ["custom_attributes is not supported"]),
        ("512", "[512, 512, 3]", ["resolution = [512, 512, 3]", "one or two whole numbers"]),
        ("512", "512.5", ["resolution = 512.5", "whole numbers"]),
        ("512", "512\ncache_info = true", ["cache_info is not supported", "remove this line"]),
        ("[[datasets]]", "[generall]\nx = 1\n[[datasets]]", ["unknown table generall", "did you mean general?"]),
        ("[[datasets.subsets]]", "[datasets.subsets]", ["double brackets: [[datasets.subsets]]"]),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path, old, new, words):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, MINIMAL.replace(old, new, 1))
    assert "data.toml" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_all_mistakes_come_in_one_message(tmp_path):
    text = MINIMAL.replace("512", '"big"\nbatchsize = 2') + "keep_token = 1\nflip_aug = 3\n"
    with pytest.raises(ValueError) as caught:
        read(tmp_path, text, train_batch_size=0)
    message = str(caught.value)
    for words in ("resolution = 'big'", "did you mean batch_size?", "did you mean keep_tokens?", "flip_aug = 3"):
        assert words in message
    assert "--train_batch_size = 0 must be at least 1" in message


@pytest.mark.parametrize(
    "text, words",
    [
        ("[[datasets", "not valid TOML"),
        ("a = = 1", "not valid TOML"),
        ("", "there is no [[datasets]]"),
        ("[[datasets]]\nresolution = 64", "has no [[datasets.subsets]]"),
        (MINIMAL.replace("resolution = 512", ""), "resolution is missing"),
    ],
)
def test_broken_or_incomplete_files(tmp_path, text, words):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, text)
    assert words in str(caught.value)


def test_missing_file_and_data_folders_beside_a_configuration(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="no such file"):
        settings_from_toml(tmp_path / "none.toml", SimpleNamespace())
    (tmp_path / "data.toml").write_text(MINIMAL)
    load_datasets(SimpleNamespace(dataset_config=tmp_path / "data.toml", train_data_dir="other"))
    assert "--train_data_dir is not used" in caplog.text


def test_bad_values_of_the_command_line_are_named_together():
    flags = {"resolution": "big", "keep_tokens": -1, "caption_tag_dropout_rate": 2.0, "caption_extention": "txt"}
    with pytest.raises(ValueError) as caught:
        load_datasets(SimpleNamespace(train_data_dir="x", **flags))
    for words in (
        "--resolution = 'big'",
        "--keep_tokens = -1",
        "--caption_tag_dropout_rate = 2.0",
        "--caption_extention",
    ):
        assert words in str(caught.value)


def test_every_setting_has_a_check():
    names = set(schema(SubsetSettings)) | set(schema(DatasetSettings))
    assert {"flip_aug", "resolution", "validation_split", "keep_tokens_separator"} <= names
    assert set(schema(SubsetSettings)) == set(SubsetSettings.__dataclass_fields__)

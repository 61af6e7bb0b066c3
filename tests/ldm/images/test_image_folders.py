"""Folders, caption files and metadata become records; what a person may have got wrong is said with
its fix."""

import ast
import itertools
import json
import logging
import math
import os
import random
import subprocess
from types import SimpleNamespace
from typing import Optional

import pytest
from image_data import all_records, arguments, make_images

from images.dataset_settings import SubsetSettings
from images.folders import read_records
from images.selection import balance_regularisation, load_datasets, split_validation


def test_repeats_and_captions_from_folder_names_and_files(tmp_path):
    make_images(tmp_path / "10_my cat", ["b.png", "a.jpg"], {"a.jpg": "a cat, sitting\nsecond line"})
    make_images(tmp_path / "3_dog", ["x.PNG"])
    records = all_records(arguments(train_data_dir=str(tmp_path), caption_extension=".txt"))
    found = [(record.path.name, record.caption, record.repeats, record.is_reg) for record in records]
    assert found == [
        ("a.jpg", "a cat, sitting", 10, False), ("b.png", "my cat", 10, False), ("x.PNG", "dog", 3, False)
    ]  # fmt: skip


def test_folder_with_a_number_only(tmp_path):
    make_images(tmp_path / "7", ["a.png"])
    assert [(r.caption, r.repeats) for r in all_records(arguments(train_data_dir=str(tmp_path)))] == [("", 7)]


def test_regularisation_folder(tmp_path):
    make_images(tmp_path / "train" / "1_cat", ["a.png"])
    make_images(tmp_path / "reg" / "2_animal", ["r.png"])
    args = arguments(train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"))
    assert [(r.caption, r.repeats, r.is_reg) for r in all_records(args)] == [("cat", 1, False), ("animal", 2, True)]


def test_other_caption_extension_is_taken_with_a_notice(tmp_path, caplog):
    folder = make_images(tmp_path / "1_cat", ["a.png", "b.png"], {"a.png": "from txt"})
    (folder / "b.caption").write_text("from caption")
    with caplog.at_level(logging.WARNING):
        records = all_records(arguments(train_data_dir=str(tmp_path)))
    assert [record.caption for record in records] == ["from txt", "from caption"]
    assert "1 captions come from .txt files" in caplog.text


def test_images_without_captions_are_counted(tmp_path, caplog):
    make_images(tmp_path / "1_cat", ["a.png", "b.png", "c.png"], {"a.png": "x"}, ".caption")
    with caplog.at_level(logging.WARNING):
        all_records(arguments(train_data_dir=str(tmp_path)))
    assert "2 of 3 images have no caption file (.caption)" in caplog.text and 'caption "cat"' in caplog.text


def test_empty_caption_files_are_counted(tmp_path, caplog):
    make_images(tmp_path / "1_cat", ["a.png"], {"a.png": ""}, ".caption")
    with caplog.at_level(logging.WARNING):
        assert [record.caption for record in all_records(arguments(train_data_dir=str(tmp_path)))] == [""]
    assert "1 caption files are empty" in caplog.text


def test_byte_order_mark_and_wildcard_lines(tmp_path):
    folder = make_images(tmp_path / "1_cat", ["a.png"])
    (folder / "a.caption").write_bytes("\ufeffkatze, süß\n\n zweite ".encode())
    args = arguments(train_data_dir=str(tmp_path))
    assert all_records(args)[0].caption == "katze, süß"
    args.enable_wildcard = True
    assert all_records(args)[0].caption == "katze, süß\nzweite"


def test_caption_that_is_no_utf8_is_named(tmp_path):
    folder = make_images(tmp_path / "1_cat", ["a.png", "b.png"])
    for name in ("a", "b"):
        (folder / f"{name}.caption").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError) as caught:
        all_records(arguments(train_data_dir=str(tmp_path)))
    assert "a.caption" in str(caught.value) and "b.caption" in str(caught.value) and "UTF-8" in str(caught.value)


def test_folder_without_repeats_says_how_to_rename(tmp_path):
    make_images(tmp_path / "mycat", ["a.png"])
    with pytest.raises(ValueError, match='rename "mycat" to "10_mycat"'):
        load_datasets(arguments(train_data_dir=str(tmp_path)))


def test_images_directly_in_the_folder_says_to_make_one(tmp_path):
    make_images(tmp_path, ["a.png"])
    with pytest.raises(ValueError, match="such as 10_mycat: make that folder and move the images into it"):
        load_datasets(arguments(train_data_dir=str(tmp_path)))


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(ValueError, match="it is empty"):
        load_datasets(arguments(train_data_dir=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="--train_data_dir .*nowhere does not exist"):
        load_datasets(arguments(train_data_dir=str(tmp_path / "nowhere")))
    (tmp_path / "5_cat").mkdir()
    with pytest.raises(ValueError, match="5_cat holds no images"):
        all_records(arguments(train_data_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="--resolution is missing"):
        load_datasets(SimpleNamespace(train_data_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="--train_data_dir"):
        load_datasets(arguments())


def test_what_is_not_used_is_said(tmp_path, caplog):
    make_images(tmp_path / "1_cat", ["a.png", "._a.png"])
    make_images(tmp_path / "0_dog", ["a.png"])
    make_images(tmp_path / "bird", ["a.png"])
    make_images(tmp_path, ["loose.png"])
    (tmp_path / "1_cat" / "phone.heic").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        records = all_records(arguments(train_data_dir=str(tmp_path)))
    assert [record.path.name for record in records] == ["a.png"]
    for words in ("0 repeats", "not used: bird", "1 images outside", "1 .heic files are not read"):
        assert words in caplog.text


def test_metadata_jsonl_in_a_folder(tmp_path):
    folder = make_images(tmp_path / "2_cat", ["a.png", "b.png", "c.png"], {"b.png": "own file"}, ".caption")
    lines = [{"file_name": "a.png", "text": "as text"}, {"file_name": "b.png", "caption": "as caption", "tags": "t"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    records = all_records(arguments(train_data_dir=str(tmp_path)))
    assert [record.caption for record in records] == ["as text", "own file", "cat"]


def test_image_folder_with_metadata_at_its_top(tmp_path):
    make_images(tmp_path / "images", ["a.png"])
    line = {"file_name": "images/a.png", "caption": "a cat", "tags": ["one", "two"]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    records = all_records(arguments(train_data_dir=str(tmp_path), dataset_repeats=4))
    assert [(record.caption, record.repeats) for record in records] == [("a cat, one, two", 4)]


def test_in_json_metadata(tmp_path):
    folder = make_images(tmp_path / "images", ["a.png", "b.jpg", "c.png"])
    content = {
        "a": {"caption": "cat", "tags": "x, y"}, "b.jpg": {"tags": "only tags"}, str(folder / "c.png"): {"caption": "z"}
    }  # fmt: skip
    (tmp_path / "meta.json").write_text(json.dumps(content))
    args = arguments(train_data_dir=str(folder), in_json=str(tmp_path / "meta.json"), dataset_repeats=2)
    found = [(record.path.name, record.caption, record.repeats) for record in all_records(args)]
    assert found == [("a.png", "cat, x, y", 2), ("b.jpg", "only tags", 2), ("c.png", "z", 2)]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("m.json", "{", "not valid JSON"),
        ("m.json", "[1]", "must be an object"),
        ("m.json", '{"gone": {"caption": "x"}}', "names 1 images that are not in"),
        ("m.json", "{}", "names no images"),
        ("m.jsonl", '{"file_name": "a.png"}\n{"text": 1}', "line 2 has no"),
        ("m.jsonl", '{"file_name": "a.png"\n', "line 1 is not valid JSON"),
    ],
)
def test_bad_metadata(tmp_path, name, content, words):
    make_images(tmp_path, ["a.png"])
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        read_records(SubsetSettings(image_dir=str(tmp_path), metadata_file=str(tmp_path / name)))


def test_masks_by_name_and_missing_ones(tmp_path):
    make_images(tmp_path / "data" / "1_cat", ["a.jpg", "b.png"])
    masks = make_images(tmp_path / "masks" / "1_cat", ["a.png", "b.png"])
    args = arguments(train_data_dir=str(tmp_path / "data"), conditioning_data_dir=str(tmp_path / "masks"))
    assert [record.mask_path for record in all_records(args)] == [masks / "a.png", masks / "b.png"]
    args.conditioning_data_dir = str(masks)  # one flat folder for all
    assert [record.mask_path for record in all_records(args)] == [masks / "a.png", masks / "b.png"]
    (masks / "b.png").unlink()
    with pytest.raises(ValueError, match="no mask of the same name for 1 images: b.png"):
        all_records(args)


def test_validation_split_is_seeded_and_complete(tmp_path, caplog):
    folder = make_images(tmp_path / "5_cat", [f"{i}.png" for i in range(10)])
    records = read_records(SubsetSettings(image_dir=str(folder), num_repeats=5))
    train, held_out = split_validation(records, 0.25, seed=1)
    assert len(train) == 8 and len(held_out) == 2  # the training part is rounded up
    assert {r.path for r in train} | {r.path for r in held_out} == {r.path for r in records}
    assert all(record.repeats == 1 for record in held_out) and all(record.repeats == 5 for record in train)
    again = split_validation(records, 0.25, seed=1)
    assert [r.path for r in again[1]] == [r.path for r in held_out]
    others = {tuple(r.path.name for r in split_validation(records, 0.25, seed=s)[1]) for s in range(10)}
    assert len(others) > 5
    assert split_validation(records, 0.0, seed=1) == (records, [])
    assert split_validation(records, 0.05, seed=1)[1] == [] and "nothing is held out" in caplog.text


def test_the_pictures_held_out_are_those_of_sd_scripts(tmp_path):
    """Figures of its tests/test_validation.py, v0.10.1: seven paths, a fifth of them, seed 1234."""
    folder = make_images(tmp_path / "5_cat", [f"path{i}.png" for i in range(1, 8)])
    records = read_records(SubsetSettings(image_dir=str(folder), num_repeats=5))
    train, held_out = split_validation(records, 0.2, seed=1234)
    assert [record.path.stem for record in held_out] == ["path7"]
    assert {record.path.stem for record in train} == {f"path{i}" for i in (2, 3, 6, 5, 1, 4)}


def test_larger_splits_are_those_of_sd_scripts(tmp_path):
    """With SD_SCRIPTS_DIR its own function chooses beside ours."""
    repository = os.environ.get("SD_SCRIPTS_DIR")
    if not repository:
        pytest.skip("SD_SCRIPTS_DIR names no sd-scripts repository")
    source = subprocess.check_output(["git", "-C", repository, "show", "v0.10.1:library/train_util.py"], text=True)
    (function,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == "split_train_val"]
    names = {"random": random, "math": math, "logging": logging, "List": list, "Tuple": tuple, "Optional": Optional}
    exec(compile(ast.Module([function], []), "train_util.py", "exec"), names)
    folder = make_images(tmp_path / "1_cat", [f"{i}.png" for i in range(23)] + ["B.png", "a.png", "b 1.png"])
    records = read_records(SubsetSettings(image_dir=str(folder)))
    paths = sorted(str(record.path) for record in records)
    for split, seed in itertools.product((0.1, 0.25, 0.3, 0.5, 0.9), (0, 7, 2**40)):
        theirs = [names["split_train_val"](paths, paths, train, split, seed)[0] for train in (True, False)]
        ours = [[str(record.path) for record in part] for part in split_validation(records, split, seed)]
        assert ours[0] == sorted(theirs[0]) and ours[1] == sorted(set(theirs[1]) - set(theirs[0]))


@pytest.mark.parametrize(
    "train_repeats, reg_repeats, expected",
    [
        ([3, 3], [1, 1, 1], [2, 2, 2]),  # repeated until equal
        ([7], [1, 1, 1], [3, 2, 2]),
        ([2], [1, 1, 1], [1, 1]),  # surplus is dropped
        ([5], [4, 4], [4, 1]),
    ],
)
def test_regularisation_is_balanced(tmp_path, train_repeats, reg_repeats, expected):
    folder = make_images(tmp_path / "x", [f"{i}.png" for i in range(3)])
    reg = read_records(SubsetSettings(image_dir=str(folder), is_reg=True))
    train = read_records(SubsetSettings(image_dir=str(folder)))
    train, reg = train[: len(train_repeats)], reg[: len(reg_repeats)]
    for record, repeats in zip(train + reg, train_repeats + reg_repeats):
        record.repeats = repeats
    balanced = balance_regularisation(train + reg)
    assert [record.repeats for record in balanced if record.is_reg] == expected
    assert [record.repeats for record in balanced if not record.is_reg] == train_repeats

"""Captions reach training as they were written: every reader, every spelling, every line."""

import json
import logging
import random
from types import SimpleNamespace

import pytest
from image_data import all_records, arguments, make_images

from base.sampling import read_prompts
from images.captions import process_caption
from images.dataset_settings import SubsetSettings
from prepare.caption_files import CaptionFiles, MetadataFile, find_pictures
from prepare.resize_images import copy_captions
from prepare.tag_wd14 import read_tags
from settings.toml_files import read_toml

WITHIN_LINES = ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"]


def captions_of(folder, **flags):
    records = all_records(arguments(train_data_dir=str(folder), caption_extension=".txt", **flags))
    return {record.path.name: record.caption for record in records}


@pytest.mark.parametrize("sign", WITHIN_LINES, ids=lambda sign: f"U+{ord(sign):04X}")
def test_signs_that_python_takes_for_line_ends_stay_within_a_line(tmp_path, sign):
    text = f"a cat{sign}on a mat"
    make_images(tmp_path / "1_cat", ["a.png"], {"a.png": text})
    assert captions_of(tmp_path) == {"a.png": text}
    listed = make_images(tmp_path / "listed", ["a.png"])
    line = json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False)
    (listed / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
    assert captions_of(listed) == {"a.png": text}
    assert MetadataFile(listed).get(listed / "a.png") == text
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    assert [prompt.prompt for prompt in read_prompts(tmp_path / "prompts.txt")] == [text]
    (tmp_path / "tags.csv").write_text(f"name,category\n{text},0\n", encoding="utf-8")
    assert [tag.name for tag in read_tags(tmp_path / "tags.csv")] == [text]


def test_a_byte_order_mark_is_no_part_of_any_text(tmp_path):
    folder = make_images(tmp_path / "1_cat", ["a.png"])
    files = {
        folder / "a.txt": "a cat",
        tmp_path / "prompts.txt": "a cat --s 2\r\n",
        tmp_path / "prompts.json": '[{"prompt": "a cat"}]',
        tmp_path / "prompts.toml": '[prompt]\n[[prompt.subset]]\nprompt = "a cat"\n',
        tmp_path / "run.toml": "seed = 3\n",
        tmp_path / "tags.csv": "name,category\r\na cat,0\r\n",
    }
    for path, text in files.items():
        path.write_text(text, encoding="utf-8-sig", newline="")
    assert captions_of(tmp_path) == {"a.png": "a cat"}
    assert CaptionFiles([folder / "a.png"], ".txt").get(folder / "a.png") == "a cat"
    assert {read_prompts(tmp_path / f"prompts.{kind}")[0].prompt for kind in ("txt", "json", "toml")} == {"a cat"}
    assert read_toml(tmp_path / "run.toml", "--config_file") == {"seed": 3}
    assert read_tags(tmp_path / "tags.csv")[0].name == "a cat"


@pytest.mark.parametrize("name", ["1_cat/a.txt", "1_cat/metadata.jsonl"])
def test_captions_in_latin_1_are_refused_with_file_and_line(tmp_path, name):
    make_images(tmp_path / "1_cat", ["a.png"])
    (tmp_path / name).write_bytes(b"a cat\n\xe9\n")
    with pytest.raises(ValueError, match=f"{name}, line 2 is not UTF-8"):
        captions_of(tmp_path)


def test_latin_1_is_refused_with_file_and_line_by_every_reader(tmp_path):
    for name, read in {
        "prompts.txt": read_prompts,
        "prompts.json": read_prompts,
        "prompts.toml": read_prompts,
        "run.toml": lambda path: read_toml(path, "--config_file"),
        "tags.csv": read_tags,
    }.items():
        (tmp_path / name).write_bytes(b"name,category\ncaf\xe9,0\n")
        with pytest.raises(ValueError, match=f"{name}, line 2 is not UTF-8"):
            read(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jfif", "JFIF", "jpe", "pjpeg", "Jpg", "apng", "dib"])
def test_other_spellings_of_known_pictures_are_used(tmp_path, suffix):
    folder = make_images(tmp_path / "1_cat", ["a.png"])
    (folder / "a.png").rename(folder / f"a.{suffix}")
    assert captions_of(tmp_path) == {f"a.{suffix}": "cat"}
    assert find_pictures(folder, recursive=False) == [folder / f"a.{suffix}"]


def test_captions_in_capital_extensions_are_used_by_training_and_by_tools(tmp_path, caplog):
    folder = make_images(tmp_path / "1_cat", ["a.png", "b.png"], {"b.png": "small"})
    (folder / "a.TXT").write_text("a cat")
    with caplog.at_level(logging.WARNING):
        assert captions_of(tmp_path) == {"a.png": "a cat", "b.png": "small"}
    assert caplog.text == ""
    assert CaptionFiles([folder / "a.png"], ".txt").get(folder / "a.png") == "a cat"
    (tmp_path / "out").mkdir()
    copy_captions(folder / "a.png", tmp_path / "out" / "a.png", overwrite=False)
    assert (tmp_path / "out" / "a.txt").read_text() == "a cat"


def test_pictures_in_a_folder_below_are_counted_and_named(tmp_path, caplog):
    folder = make_images(tmp_path / "1_cat", ["a.png"])
    make_images(folder / "closeups", ["b.png", "c.png"])
    (folder / "d.jp2").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert list(captions_of(tmp_path)) == ["a.png"]
    assert "2 images in folders below it are not used (2 in closeups)" in caplog.text
    assert "1 .jp2 files are not read" in caplog.text


def test_the_tools_that_prepare_say_what_they_leave_out(tmp_path, caplog):
    folder = make_images(tmp_path / "1_cat", ["a.png"])
    make_images(folder / "closeups", ["b.png"])
    make_images(folder / "out", ["c.png"])
    (folder / "d.heic").write_bytes(b"x")
    (folder / "e.psd").write_bytes(b"x")
    assert find_pictures(folder, False, (".heic",), folder / "out") == [folder / "a.png", folder / "d.heic"]
    assert "1 pictures in folders below it are left out; --recursive takes them, too" in caplog.text
    assert "1 .psd files are not read" in caplog.text and ".heic files" not in caplog.text
    caplog.clear()
    assert find_pictures(folder, True, output=folder / "out") == [folder / "a.png", folder / "closeups" / "b.png"]
    assert "left out" not in caplog.text and "1 .heic, 1 .psd files are not read" in caplog.text


def test_captions_without_a_picture_are_counted_and_named(tmp_path, caplog):
    folder = make_images(tmp_path / "1_cat", ["a.png", "b.png"], {"a.png": "a cat"})
    (folder / "d.heic").write_bytes(b"x")
    for name in ("b.png.txt", "d.txt", "dog.txt", "old.TXT", "mouse.caption", "notes.md", ".hidden.txt"):
        (folder / name).write_text("a dog")
    with caplog.at_level(logging.WARNING):
        assert captions_of(tmp_path) == {"a.png": "a cat", "b.png": "a dog"}
    told = "3 caption files have no picture of their name and are not used: dog.txt, mouse.caption, old.TXT"
    assert caplog.text.count(told) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        captions_of(make_images(tmp_path / "good" / "1_cat", ["a.png"], {"a.png": "a cat"}).parent)
    assert "no picture" not in caplog.text


def test_later_lines_of_captions_are_said_with_the_flag_that_keeps_them(tmp_path, caplog):
    texts = {"a.png": "a cat\n\nThe light is soft.\r\nIt sleeps.", "b.png": "\n a dog \n"}
    folder = make_images(tmp_path / "1_cat", list(texts), texts)
    with caplog.at_level(logging.WARNING):
        assert captions_of(tmp_path) == {"a.png": "a cat", "b.png": "a dog"}
    assert "1 of 2 captions have several lines (at most 3)" in caplog.text and "--enable_wildcard" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        whole = captions_of(tmp_path, enable_wildcard=True)
    assert whole["a.png"] == "a cat\nThe light is soft.\nIt sleeps." and "several lines" not in caplog.text
    for file in folder.glob("*.txt"):
        file.unlink()
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in texts.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING):
        assert captions_of(tmp_path) == {"a.png": "a cat", "b.png": "a dog"}
    assert "1 of 2 captions have several lines (at most 3)" in caplog.text


def test_the_folder_with_repeats_itself_is_taken_as_data(tmp_path, caplog):
    make_images(tmp_path / "10_cat", ["a.png"])
    with caplog.at_level(logging.WARNING):
        records = all_records(arguments(train_data_dir=str(tmp_path / "10_cat"), reg_data_dir=str(tmp_path / "10_cat")))
    assert [(record.caption, record.repeats, record.is_reg) for record in records] == [
        ("cat", 10, False),
        ("cat", 10, True),
    ]
    assert "is a <repeats>_<name> folder itself" in caplog.text


def test_a_folder_one_level_off_is_refused_with_the_right_one(tmp_path):
    make_images(tmp_path / "data" / "img" / "10_cat", ["a.png"])
    with pytest.raises(ValueError, match=f"give --train_data_dir {tmp_path}/data/img"):
        captions_of(tmp_path / "data")
    with pytest.raises(ValueError, match=f"they lie in {tmp_path}/data/img/10_cat: give that folder"):
        find_pictures(tmp_path / "data", recursive=False)
    (tmp_path / "data.toml").write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path}/data/img'\n"
    )
    with pytest.raises(ValueError, match=f"they lie in {tmp_path}/data/img/10_cat: give that folder"):
        all_records(SimpleNamespace(dataset_config=str(tmp_path / "data.toml")))


def test_folders_of_0_repeats_alone_are_refused(tmp_path):
    make_images(tmp_path / "0_cat", ["a.png"])
    with pytest.raises(ValueError, match="0_cat has 0 repeats"):
        captions_of(tmp_path)


@pytest.mark.parametrize("separator, glue", [(",", ", "), (";", "; "), (" | ", " | "), ("、", "、 ")])
@pytest.mark.parametrize(
    "change", [{"shuffle_caption": True}, {"caption_tag_dropout_rate": 1e-9}, {"token_warmup_step": 1}]
)
def test_the_separator_stays_where_tags_are_shuffled_dropped_or_warmed_up(separator, glue, change):
    subset = SubsetSettings(caption_separator=separator, keep_tokens=1, **change)
    tags = ["a cat, red" if separator != "," else "a cat", "sitting", "on a mat"]
    text = process_caption(separator.join(tags), subset, random.Random(1), epoch=0, step=9, total_steps=9)
    assert sorted(text.split(glue)) == sorted(tags) and text.startswith(tags[0] + glue)


def test_the_separator_joins_trigger_word_and_listed_tags(tmp_path):
    subset = SubsetSettings(caption_separator=";", trigger_word="CUS")
    assert process_caption("a;b", subset, random.Random(1), epoch=0, step=0) == "CUS; a;b"
    listed = make_images(tmp_path / "listed", ["a.png"])
    (listed / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a cat", "tags": ["x", "y"]}))
    assert captions_of(listed, caption_separator=";") == {"a.png": "a cat; x; y"}


def test_pictures_that_a_metadata_file_does_not_name_are_counted(tmp_path, caplog):
    make_images(tmp_path / "pictures", ["a.png", "b.png", "c.png"])
    (tmp_path / "meta.json").write_text(json.dumps({"a": {"caption": "a cat"}}))
    with caplog.at_level(logging.WARNING):
        assert captions_of(tmp_path / "pictures", in_json=str(tmp_path / "meta.json")) == {"a.png": "a cat"}
    assert "does not name 2 images" in caplog.text and "the first is b.png" in caplog.text


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_both_ends_of_lines_end_lines_in_every_reader(tmp_path, end):
    folder = make_images(tmp_path / "1_cat", ["a.png"])
    (folder / "a.txt").write_text(f"one{end}{end}two{end}", newline="")
    assert captions_of(tmp_path, enable_wildcard=True) == {"a.png": "one\ntwo"}
    (tmp_path / "run.toml").write_text(f'[a]{end}seed = 3{end}name = "x"{end}words = [{end}1,{end}2]{end}', newline="")
    assert read_toml(tmp_path / "run.toml", "--config_file") == {"a": {"seed": 3, "name": "x", "words": [1, 2]}}
    (tmp_path / "prompts.txt").write_text(f"one{end}# no{end}two --s 2{end}", newline="")
    assert [prompt.prompt for prompt in read_prompts(tmp_path / "prompts.txt")] == ["one", "two"]
    (tmp_path / "tags.csv").write_text(f"name,category{end}one,0{end}two,4{end}", newline="")
    assert [(tag.name, tag.category) for tag in read_tags(tmp_path / "tags.csv")] == [("one", 0), ("two", 4)]

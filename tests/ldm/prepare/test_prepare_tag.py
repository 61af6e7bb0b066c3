"""tag_wd14.py with a small tagger built here: its outputs are the mean of blue, green and red, so
that the order of the channels, the range, the padding and the batches can be read off the tags."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prepare import tag_wd14
from prepare.tag_wd14 import caption_text, chosen_tags, prepared, read_tags

onnx = pytest.importorskip("onnx", reason="onnx is not installed (requirements-extras.txt)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (requirements-extras.txt)")

SIDE = 16
# name, category, and the weights of the means of (blue, green, red) / 255
TAGS = [
    ("general", 9, (0.2, 0, 0)),
    ("sensitive", 9, (0, 0, 0.5)),
    ("blue_sky", 0, (1, 0, 0)),
    ("green_grass", 0, (0, 1, 0)),
    ("red_hair", 0, (0, 0, 1)),
    (">_<", 0, (1, 0, 0)),
    ("miku_(vocaloid)", 4, (0.8, 0, 0)),
]


def save_tagger(path, tags=TAGS, batch="N", shape=None):
    from onnx import TensorProto, helper, numpy_helper

    weights = np.array([tag[2] for tag in tags], np.float32).T / 255  # (3, tags)
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["output"]),
    ]
    start = helper.make_tensor_value_info("input", TensorProto.FLOAT, shape or [batch, SIDE, SIDE, 3])
    end = helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, len(tags)])
    constants = [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([1, 2]), "axes")]
    graph = helper.make_graph(nodes, "tagger", [start], [end], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(path))
    rows = "\n".join(f"{i},{name},{category},1" for i, (name, category, _) in enumerate(tags))
    path.with_name("selected_tags.csv").write_text("tag_id,name,category,count\n" + rows + "\n")


@pytest.fixture
def workplace(tmp_path):
    (tmp_path / "model").mkdir()
    save_tagger(tmp_path / "model" / "model.onnx")
    folder = tmp_path / "10_x"
    folder.mkdir()
    for name, colour in [("blue", (0, 0, 255)), ("green", (0, 255, 0)), ("red", (255, 0, 0))]:
        Image.new("RGB", (SIDE, SIDE), colour).save(folder / f"{name}.png")
    return tmp_path


def tag(workplace, *flags):
    return tag_wd14.main([str(workplace / "10_x"), "--model", str(workplace / "model" / "model.onnx"), *flags])


def captions(workplace, extension=".txt"):
    return {path.stem: path.read_text().strip() for path in sorted((workplace / "10_x").glob(f"*{extension}"))}


PLAIN = {"blue": "blue_sky, >_<, miku_(vocaloid)", "green": "green_grass", "red": "red_hair"}


@pytest.mark.parametrize("batch_size", ["1", "2", "8"])
def test_channels_come_blue_first_from_0_to_255(workplace, batch_size):
    assert tag(workplace, "--batch_size", batch_size) == 0
    assert captions(workplace) == PLAIN


def test_model_with_a_fixed_batch(workplace):
    save_tagger(workplace / "model" / "model.onnx", batch=2)
    assert tag(workplace, "--batch_size", "3") == 0
    assert captions(workplace) == PLAIN


def test_thresholds(workplace):
    assert tag(workplace, "--general_threshold", "0.9", "--character_threshold", "0.85") == 0
    assert captions(workplace)["blue"] == "blue_sky, >_<"
    assert tag(workplace, "--thresh", "1.1") == 2
    save_tagger(workplace / "model" / "model.onnx", [("a", 0, (0.5, 0, 0)), ("b", 0, (0.4, 0, 0))])
    assert tag(workplace, "--thresh", "0.45", "--overwrite") == 0
    assert captions(workplace) == {"blue": "a", "green": "", "red": ""}


def test_trigger_underscores_order_and_undesired(workplace):
    flags = ["--always_first_tags", "mychar, photo", "--remove_underscore", "--character_tags_first"]
    assert tag(workplace, *flags, "--undesired_tags", "red hair, nothing") == 0
    assert captions(workplace) == {
        "blue": "mychar, photo, miku (vocaloid), blue sky, >_<",
        "green": "mychar, photo, green grass",
        "red": "mychar, photo",
    }


def test_ratings_and_replacements(workplace):
    assert tag(workplace, "--use_rating_tags", "--tag_replacement", "red_hair,ginger;blue_sky,sky") == 0
    assert captions(workplace) == {
        "blue": "general, sky, >_<, miku_(vocaloid)", "green": "sensitive, green_grass", "red": "sensitive, ginger"
    }  # fmt: skip


def test_existing_captions_are_kept_appended_to_or_replaced(workplace, capsys):
    own = workplace / "10_x" / "red.txt"
    own.write_text("my words, red_hair\n")
    assert tag(workplace) == 0
    assert own.read_text() == "my words, red_hair\n" and "1 have captions already" in capsys.readouterr().out
    assert tag(workplace, "--append_tags", "--always_first_tags", "trigger") == 0
    assert captions(workplace)["red"] == "trigger, my words, red_hair"
    assert captions(workplace)["green"] == "trigger, green_grass"
    assert tag(workplace, "--append_tags", "--always_first_tags", "trigger") == 0
    assert captions(workplace)["green"] == "trigger, green_grass"  # nothing twice
    assert tag(workplace, "--overwrite") == 0
    assert captions(workplace) == PLAIN


def test_other_extension_and_frequency(workplace, capsys):
    assert tag(workplace, "--caption_extension", ".caption", "--frequency_tags") == 0
    assert captions(workplace, ".caption") == PLAIN and not captions(workplace)
    assert "1\tgreen_grass" in capsys.readouterr().out


def test_subfolders(workplace):
    (workplace / "10_x" / "more").mkdir()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(workplace / "10_x" / "more" / "a.jpg")
    assert tag(workplace, "--recursive") == 0
    assert (workplace / "10_x" / "more" / "a.txt").read_text() == "red_hair\n"


def test_padding_is_white_and_the_picture_in_the_middle():
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, :, 0] = 200  # red
    square = prepared(wide, 40)
    assert square.shape == (40, 40, 3) and square.dtype == np.float32
    assert (square[:15] == 255).all() and (square[25:] == 255).all()
    assert (square[15:25] == [0, 0, 200]).all()
    assert prepared(wide, 16).shape == (16, 16, 3) and prepared(wide, 100).shape == (100, 100, 3)
    flat = np.full((30, 30, 3), 77, np.uint8)
    assert np.allclose(prepared(flat, 8), 77) and np.allclose(prepared(flat, 64), 77)


def test_transparent_pictures_are_seen_on_white(workplace):
    Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0)).save(workplace / "10_x" / "clear.png")
    assert tag(workplace, "--thresh", "0.9") == 0
    assert captions(workplace)["clear"] == "blue_sky, green_grass, red_hair, >_<"


def test_damaged_pictures_are_named_and_the_rest_is_tagged(workplace, capsys):
    (workplace / "10_x" / "bad.png").write_bytes(b"nothing")
    assert tag(workplace, "--batch_size", "4") == 2
    assert "bad.png cannot be read" in capsys.readouterr().err and captions(workplace) == PLAIN


def test_choice_of_tags_is_by_category():
    tags = [tag_wd14.Tag("a", 0), tag_wd14.Tag("c", 4), tag_wd14.Tag("copyright", 3)]
    args = Namespace(general_threshold=0.5, character_threshold=0.9, character_tags_first=False, use_rating_tags=False)
    vars(args).update(undesired_tags=[], remove_underscore=False, tag_replacement={})
    assert chosen_tags(np.array([0.5, 0.89, 1.0]), tags, args) == ["a"]
    vars(args).update(append_tags=True, caption_separator=", ", always_first_tags=["b"])
    assert caption_text(["a", "b"], None, args) == "b, a"


@pytest.mark.parametrize(
    "content, words",
    [
        ("a,b\n1,2\n", "columns name and category"),
        ("name,category\nx,y\n", "columns name"),
        ("name,category\n", "is empty"),
    ],
)
def test_bad_tag_lists(tmp_path, content, words):
    (tmp_path / "tags.csv").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_tags(tmp_path / "tags.csv")


def test_bad_models_and_arguments(workplace, capsys):
    def message(*flags):
        assert tag(workplace, *flags) == 2
        return capsys.readouterr().err

    model = workplace / "model" / "model.onnx"
    save_tagger(model, TAGS[:3])
    save_tagger(workplace / "other.onnx", TAGS[:2])
    assert "3 outputs, but the csv has 2 tags" in message("--tags", str(workplace / "selected_tags.csv"))
    save_tagger(model, shape=["N", SIDE, 8, 3])
    assert "a WD14 tagger takes (batch, side, side, 3)" in message()
    model.write_bytes(b"nothing")
    assert "cannot be loaded as an ONNX model" in message()
    error = message("--thresh", "2", "--batch_size", "0", "--append_tags", "--overwrite", "--caption_extension", "txt")
    for words in ("--thresh 2.0", "--batch_size 0", "exclude each other", "begin with a dot"):
        assert words in error
    model.unlink()
    assert "there is no such file" in message()
    assert tag_wd14.main([str(workplace / "nowhere")]) == 2


def test_hub_failure_says_how_to_go_on(workplace, capsys, monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert tag_wd14.main([str(workplace / "10_x")]) == 2
    error = capsys.readouterr().err
    assert "cannot be had from the hub (no network)" in error and "--model model.onnx" in error


def test_runs_as_a_script(workplace):
    words = [sys.executable, str(Path(tag_wd14.__file__)), str(workplace / "10_x")]
    words += ["--model", str(workplace / "model" / "model.onnx")]
    result = subprocess.run(words, capture_output=True, text=True, cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert "tagged 3 of 3 pictures" in result.stdout and captions(workplace) == PLAIN

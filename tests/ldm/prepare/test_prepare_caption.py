"""caption_images.py with the real SDKs against a server of this file's own, and with a random BLIP.

Each row of the table of faults in its docstring is a test here.
"""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from caption_stub import COLOURS, CaptionStub
from PIL import Image

from prepare import caption_images

pytest.importorskip("anthropic", reason="anthropic is not installed (requirements-extras.txt)")
pytest.importorskip("openai", reason="openai is not installed (requirements-extras.txt)")

KEY = "sk-very-secret-0123456789"
EVERYTHING = {name: f"A {name} square." for name in COLOURS}


@pytest.fixture
def stub():
    server = CaptionStub()
    yield server
    server.stop()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four pictures in one colour each, and a key in a variable."""
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CAPTION_TEST_KEY", KEY)
    pictures = tmp_path / "10_squares"
    pictures.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 48), colour).save(pictures / f"{name}.png")
    return pictures


def words(folder, stub, captioner="claude", *more):
    address = stub.address + ("/v1" if captioner == "openai" else "")
    flags = ["--captioner", captioner, "--base_url", address, "--model", "m", "--key_env", "CAPTION_TEST_KEY"]
    return [str(folder), *flags, "--yes", "--parallel", "1", "--retries", "1", "--timeout", "5", *more]


def caption(folder, stub, captioner="claude", *more):
    return caption_images.main(words(folder, stub, captioner, *more))


def captions(folder):
    return {path.stem: path.read_text().strip() for path in sorted(folder.glob("*.txt"))}


# ------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("captioner", ["claude", "openai"])
def test_every_picture_gets_its_caption(folder, stub, captioner, capsys):
    assert caption(folder, stub, captioner, "--parallel", "4") == 0
    assert captions(folder) == EVERYTHING
    assert stub.asked() == sorted(COLOURS)
    out = capsys.readouterr().out
    assert f"4 requests, one a picture, to {stub.address}" in out and "(model m)" in out
    assert "400 tokens in and 40 out" in out


def test_settings_reach_the_model_and_the_caption(folder, stub):
    more = ["--instruction", "Say it.", "--max_tokens", "33", "--max_side", "32", "--trigger_word", "CUS statue"]
    assert caption(folder, stub, "claude", *more, "--prefix", "photo of ") == 0
    _, size, headers, request = stub.requests[0]
    assert size == (32, 24) and request["max_tokens"] == 33 and request["model"] == "m"
    assert request["messages"][0]["content"][1]["text"] == "Say it."
    assert headers["authorization"] == f"Bearer {KEY}"
    assert captions(folder)["red"] == "CUS statue, photo of A red square."


def test_another_trigger_word_costs_nothing(folder, stub):
    assert caption(folder, stub) == 0
    assert caption(folder, stub, "claude", "--overwrite", "--trigger", "a BLUE") == 0
    assert captions(folder)["blue"] == "A blue square."  # comes once
    assert captions(folder)["red"] == "a BLUE, A red square." and len(stub.requests) == 4
    assert caption(folder, stub, "claude", "--overwrite", "--instruction", "Other words.") == 0
    assert len(stub.requests) == 8


def test_captions_that_exist_are_kept(folder, stub, capsys):
    (folder / "red.txt").write_text("my own words\n")
    assert caption(folder, stub) == 0
    assert captions(folder) == {**EVERYTHING, "red": "my own words"} and stub.asked() == ["blue", "green", "white"]
    assert "1 had captions already" in capsys.readouterr().out


def test_metadata_file_keeps_other_lines_and_fields(folder, stub):
    lines = [{"file_name": "red.png", "text": "mine", "source": "x"}, {"file_name": "gone.png", "text": "y"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert caption(folder, stub, "openai", "--metadata", "--parallel", "3") == 0
    written = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert written[:2] == lines and not captions(folder)
    assert {line["file_name"]: line["text"] for line in written[2:]} == {
        f"{name}.png": EVERYTHING[name] for name in ("blue", "green", "white")
    }


def test_trainer_reads_the_captions(folder, stub):
    from images.dataset_settings import SubsetSettings
    from images.folders import read_folder_captions

    assert caption(folder, stub, "claude", "--metadata", "--trigger", "CUS") == 0
    found = read_folder_captions(SubsetSettings(image_dir=str(folder)))
    assert {path.stem: text for path, text in found.items()} == {n: f"CUS, {text}" for n, text in EVERYTHING.items()}


def test_review_page_shows_pictures_captions_and_gaps(folder, stub, tmp_path):
    stub.faults = {"green": ["decline"]}
    (folder / "red.txt").write_text("<b>mine</b>\n")
    assert caption(folder, stub, "claude", "--review", str(tmp_path / "look.html")) == 2
    page = (tmp_path / "look.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 and "A white square." in page
    assert "&lt;b&gt;mine" in page and page.count("no caption yet") == 1


# ------------------------------------------------------------------------- before the first request


def test_nothing_is_sent_without_a_yes(folder, stub, capsys, monkeypatch):
    flags = [flag for flag in words(folder, stub) if flag != "--yes"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert caption_images.main(flags) == 2 and "--yes says yes" in capsys.readouterr().err

    class Person(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Person("n\n"))
    assert caption_images.main(flags) == 0 and "nothing was sent" in capsys.readouterr().out
    assert not stub.requests and not captions(folder)
    monkeypatch.setattr(sys, "stdin", Person("y\n"))
    assert caption_images.main(flags) == 0 and captions(folder) == EVERYTHING


def test_estimate_of_cost(folder, stub, capsys):
    assert caption(folder, stub) == 0
    assert "unknown, as the prices" in capsys.readouterr().out
    prices = ["--price_in", "1000000", "--price_out", "0"]
    assert caption(folder, stub, "claude", "--overwrite", "--instruction", "a" * 40, *prices) == 0
    # 4 pictures of 64 x 48 px at 750 px a token, and 10 + 20 tokens of words each
    assert "cost, at most about: 136.3840 US dollars" in capsys.readouterr().out


def test_key_goes_only_to_the_one_it_is_for(folder, stub, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "another-secret")
    flags = words(folder, stub, "openai")
    at = flags.index("--key_env")
    assert caption_images.main(flags[:at] + flags[at + 2 :]) == 0  # a server that wants no key
    assert caption(folder, stub, "claude", "--overwrite") == 0
    seen = [headers for *_, headers, _ in stub.requests]
    assert all(KEY not in str(headers) for headers in seen[:4])
    assert all(headers["authorization"] == f"Bearer {KEY}" and "another" not in str(headers) for headers in seen[4:])


def test_key_from_a_file_is_never_shown_or_written(folder, stub, tmp_path, capsys):
    key_file = tmp_path / "key"
    key_file.write_text(KEY + "\n")
    stub.faults = {"blue": [400], "red": [401]}  # both messages hold the key
    flags = ["--key_file", str(key_file), "--review", str(tmp_path / "look.html")]
    assert caption(folder, stub, "openai", *flags) == 2
    said = capsys.readouterr()
    assert "(key)" in said.err and KEY not in said.out + said.err
    assert stub.requests[0][2]["authorization"] == f"Bearer {KEY}"
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != key_file]
    assert len(written) > 5 and all(KEY.encode() not in path.read_bytes() for path in written)


# ------------------------------------------------------------------------------ the table of faults

ASKED_AGAIN = [(429, "HTTP 429"), (500, "HTTP 500"), ("silence", "no answer within 0.3 s"), ("cut", "the connection")]
NOT_ASKED_AGAIN = [
    ("garbled", "not valid JSON"),
    ("other json", "no caption where one belongs"),
    ("empty", "the answer is empty"),
    (400, "HTTP 400"),
]


@pytest.mark.parametrize("captioner", ["claude", "openai"])
@pytest.mark.parametrize("fault, message", ASKED_AGAIN)
def test_a_passing_fault_is_asked_again(folder, stub, captioner, fault, message):
    stub.faults = {"green": [fault]}
    assert caption(folder, stub, captioner, "--timeout", "0.3") == 0
    assert captions(folder) == EVERYTHING and stub.asked() == ["blue", "green", "green", "red", "white"]


def expect_only_green_missing(folder, stub, captioner, message, err):
    """Green is left out and named, the captions before and after it are there; the next run asks
    about it alone."""
    assert captions(folder) == {name: text for name, text in EVERYTHING.items() if name != "green"}
    assert "green.png" in err and message in err
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.txt")}
    stub.requests.clear()
    stub.faults.clear()
    assert caption(folder, stub, captioner) == 0
    assert captions(folder) == EVERYTHING and stub.asked() == ["green"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize("fault, message", ASKED_AGAIN)
def test_a_lasting_fault_leaves_the_picture_out(folder, stub, fault, message, capsys):
    stub.faults = {"green": [fault] * 2}
    assert caption(folder, stub, "claude", "--timeout", "0.3") == 2
    assert stub.asked().count("green") == 2
    expect_only_green_missing(folder, stub, "claude", message, capsys.readouterr().err)


@pytest.mark.parametrize("captioner", ["claude", "openai"])
@pytest.mark.parametrize("fault, message", NOT_ASKED_AGAIN)
def test_an_answer_without_a_caption_leaves_the_picture_out(folder, stub, captioner, fault, message, capsys):
    stub.faults = {"green": [fault]}
    assert caption(folder, stub, captioner) == 2
    assert stub.asked().count("green") == 1
    expect_only_green_missing(folder, stub, captioner, message, capsys.readouterr().err)


@pytest.mark.parametrize("captioner", ["claude", "openai"])
def test_a_declined_picture_is_named_and_not_paid_for_twice(folder, stub, captioner, capsys):
    stub.faults = {"green": ["decline"]}
    assert caption(folder, stub, captioner) == 2
    assert "green.png: the model declines" in capsys.readouterr().err and len(captions(folder)) == 3
    assert caption(folder, stub, captioner) == 2
    assert "green.png: the model declines" in capsys.readouterr().err and len(stub.requests) == 4


@pytest.mark.parametrize("status", [401, 404])
def test_a_refused_key_or_model_stops_the_run(folder, stub, status, capsys):
    stub.faults = {"green": [status]}
    assert caption(folder, stub) == 2
    err = capsys.readouterr().err
    assert "see --key_file, --key_env, --model and --base_url" in err and f"HTTP {status}" in err
    assert captions(folder)["blue"] == EVERYTHING["blue"] and "white" not in stub.asked()
    assert caption(folder, stub) == 0 and captions(folder) == EVERYTHING and stub.asked().count("blue") == 1


def test_a_dead_service_stops_the_run(folder, stub, capsys):
    for number in range(8):
        Image.new("RGB", (8, 8), COLOURS["red"]).save(folder / f"z{number}.png")
    stub.faults = {"red": [500] * 100}
    assert caption(folder, stub, "claude", "--retries", "0") == 2
    assert "5 failures in a row" in capsys.readouterr().err
    assert sorted(captions(folder)) == ["blue", "green", "white"] and stub.asked().count("red") < 8


def test_a_damaged_picture_is_never_sent(folder, stub, capsys):
    (folder / "green.png").write_bytes(b"nothing")
    assert caption(folder, stub) == 2
    assert "green.png cannot be read" in capsys.readouterr().err and stub.asked() == ["blue", "red", "white"]


@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_that_is_ended_goes_on_where_it_was(folder, stub, how, code):
    stub.faults = {"green": ["silence"]}
    command = [
        sys.executable,
        caption_images.__file__,
        *words(folder, stub, "openai", "--retries", "0", "--timeout", "60"),
    ]
    heard = {
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    }  # also where the tests run in the background
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **heard)
    for _ in range(600):
        if "green" in stub.asked():
            break
        time.sleep(0.1)
    assert captions(folder) == {"blue": EVERYTHING["blue"]}  # on disk while the next is under way
    process.send_signal(how)
    stub.released.set()
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert caption(folder, stub, "openai") == 0
    assert captions(folder) == EVERYTHING and stub.asked() == ["blue", "green", "green", "red", "white"]


def test_an_answer_whose_caption_was_not_written_is_not_asked_for_again(folder, stub):
    assert caption(folder, stub) == 0
    (folder / "red.txt").unlink()
    answers = folder / ".caption_answers.jsonl"
    answers.write_text(answers.read_text() + '{"key": "torn')
    assert caption(folder, stub) == 0
    assert captions(folder) == EVERYTHING and len(stub.requests) == 4
    (folder / "red.txt").unlink()
    assert caption(folder, stub, "claude", "--instruction", "Other words.") == 0  # written after the torn line
    (folder / "red.txt").unlink()
    assert caption(folder, stub, "claude", "--instruction", "Other words.") == 0 and len(stub.requests) == 5


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--parallel", "0", "--timeout", "0", "--price_in", "1"], ["--parallel 0", "--timeout 0", "belong together"]),
        (["--base_url", "127.0.0.1:1"], ["must begin with http://"]),
        (["--key_file", "nowhere"], ["--key_file nowhere does not exist"]),
        (["--key_env", "NOT_SET_HERE"], ["environment variable NOT_SET_HERE is empty"]),
        (["--cache", __file__], ["holds no answer"]),
    ],
)
def test_bad_arguments_send_nothing(folder, stub, flags, message, capsys):
    assert caption(folder, stub, "claude", *flags) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in message) and not stub.requests


def test_bad_folders(folder, stub, tmp_path, capsys):
    def message(where, *flags):
        assert caption(where, stub, "claude", *flags) == 2
        return capsys.readouterr().err

    assert "does not exist" in message(tmp_path / "nowhere")
    Image.new("RGB", (4, 4)).save(folder / "red.jpg")
    assert "would share red.txt: rename one" in message(folder)
    (folder / "metadata.jsonl").write_text('{"file": "red.png"}\n')
    assert 'line 1 is no JSON object with a "file_name"' in message(folder, "--metadata")
    assert not stub.requests


def test_key_of_the_service_is_asked_for(folder, capsys):
    assert caption_images.main([str(folder), "--captioner", "claude", "--yes"]) == 2
    assert "environment variable ANTHROPIC_API_KEY is empty" in capsys.readouterr().err


# -------------------------------------------------------------------------- a model on this machine


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A BLIP of a few thousand random weights, as a folder."""
    import quiet_libraries  # noqa: F401  (before transformers)
    import torch
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    place = tmp_path_factory.mktemp("blip")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"a photo of red green blue cat dog".split()]
    (place / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(str(place / "vocab.txt"), bos_token="[DEC]")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = {**size, **ids, "vocab_size": len(vocabulary), "encoder_hidden_size": 16}
    torch.manual_seed(1)
    config = BlipConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 16}, projection_dim=16)
    BlipForConditionalGeneration(config).save_pretrained(place / "model")
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    BlipProcessor(images, tokenizer).save_pretrained(place / "model")
    return place / "model"


def test_captions_from_a_local_model(folder, blip, capsys):
    flags = [str(folder), "--captioner", "local", "--model", str(blip), "--max_tokens", "6", "--trigger", "CUS"]
    assert caption_images.main(flags) == 0  # nothing is sent, so nothing is asked
    first = captions(folder)
    known = set("a photo of red green blue cat dog".split())
    assert set(first) == set(COLOURS)
    assert all(text.startswith("CUS, ") and set(text[5:].split()) <= known for text in first.values())
    assert caption_images.main([*flags, "--overwrite", "--instruction", "a photo of"]) == 0
    assert all(text.startswith("CUS, a photo of") for text in captions(folder).values())


def test_bad_local_models(folder, tmp_path, capsys):
    def message(*flags):
        assert caption_images.main([str(folder), "--captioner", "local", *flags]) == 2
        return capsys.readouterr().err

    assert "needs the folder of a BLIP or Florence-2" in message()
    assert "needs the folder" in message("--model", "some/name")
    assert "cannot be loaded as a captioning model" in message("--model", str(tmp_path))
    assert "sends nothing" in message("--model", str(tmp_path), "--key_env", "X")


def test_help_holds_the_table_of_faults(capsys):
    with pytest.raises(SystemExit):
        caption_images.main(["--help"])
    assert "connection cut" in capsys.readouterr().out and Path(caption_images.__file__).is_file()

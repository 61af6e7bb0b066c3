"""What stands behind the page: which runs, bases and commands it offers and refuses, what it says
of a run, its pictures."""

import json
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from ldm_runs import TREE, make_base

from demo.run_folders import EXAMPLE, LOG_NAME, ExampleRun, Places, Run, offered

HEADER = {
    "format": "cs-history/1", "cs_interval": 1, "window": 2, "steps_per_epoch": 4, "reduction": "matrix",
    "decided_on": "unet",
    "rule": "second-valley", "valley": 2, "total_steps": 40,
}  # fmt: skip


def make_run(folder, cs=(), result=None, files=()):
    folder.mkdir(parents=True)
    lines = [
        HEADER,
        *({"step": i + 1, "epoch": (i + 1) / 4, "cs": {"unet": value}, "loss": 0.1} for i, value in enumerate(cs)),
    ]
    (folder / "cs_history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    return Run(folder.name, folder)


RESULT = {
    "outcome": "stopped_early", "kept_step": 5, "turning_step": 5, "detection_step": 9, "usable_steps": [5, 9],
    "last_step": 9,
    "total_steps": 40, "reason": "It became steady.", "files": {"kept": "a.safetensors", "last": "a-last.safetensors"},
    "settings": {"calculate_cs": True, "pretrained_model_name_or_path": "BASE"},
}  # fmt: skip


@pytest.fixture
def places(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "pictures").mkdir()
    return Places([tmp_path / "root"], {"small": str(tmp_path / "base")}, {"cats": tmp_path / "pictures"})


# --------------------------------------------------------------------------------------------- runs


def test_runs_below_the_roots_are_found_and_links_out_of_them_are_not_followed(places, tmp_path):
    make_run(tmp_path / "root" / "one")
    make_run(tmp_path / "root" / "group" / "two")
    make_run(tmp_path / "outside" / "three")
    make_run(tmp_path / "root" / "a" / "b" / "c" / "too_deep")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    assert set(places.runs()) == {"one", "group/two"}
    os.utime(tmp_path / "root" / "one", (1, 1))
    assert list(places.runs()) == ["group/two", "one"]  # the newest first
    places.roots.append(tmp_path / "outside")
    assert set(places.runs()) == {"root/one", "root/group/two", "outside/three"}


@pytest.mark.parametrize("name", ["/etc", "..", "../outside", "one/../../outside", "root/one", ""])
def test_a_run_that_was_not_offered_is_refused(places, tmp_path, name):
    make_run(tmp_path / "root" / "one")
    make_run(tmp_path / "outside")
    with pytest.raises(ValueError, match="is no run that this page was started with"):
        places.run(name)


def test_files_of_a_run_stay_inside_its_folder(places, tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    files = {"kept": "../secret.safetensors", "last": str(tmp_path / "secret.safetensors")}
    run = make_run(tmp_path / "root" / "one", result={**RESULT, "files": files})
    (run.folder / "linked.safetensors").symlink_to(tmp_path / "secret.safetensors")
    assert run.weights() == {}


def test_weights_say_what_they_are(tmp_path):
    files = ["a.safetensors", "a-last.safetensors", "a-000003.safetensors"]
    run = make_run(tmp_path / "stopped", result=RESULT, files=files)
    assert {name: path.name for name, path in run.weights().items()} == {
        "turning point": "a.safetensors", "last": "a-last.safetensors", "a-000003": "a-000003.safetensors"
    }  # fmt: skip
    to_the_end = {"kept": "a.safetensors", "turning_point": "a-turning-point.safetensors"}
    result = {**RESULT, "outcome": "budget_reached", "files": to_the_end}
    run = make_run(tmp_path / "whole", result=result, files=to_the_end.values())
    assert {name: path.name for name, path in run.weights().items()} == {
        "last": "a.safetensors", "turning point": "a-turning-point.safetensors"
    }  # fmt: skip


def test_the_average_at_the_end_of_a_budget_stands_beside_the_last_weights(places, tmp_path):
    run = make_run(tmp_path / "root" / "one", result={**RESULT, "outcome": "no_turning_point"})
    for name in RESULT["files"].values():
        (run.folder / name).write_bytes(b"x")
    assert {name: path.name for name, path in run.weights().items()} == {
        "average": "a.safetensors",
        "last": "a-last.safetensors",
    }


def test_previews_in_the_order_of_training(tmp_path):
    parts = ["base", "last", "turning-point", "step00000020", "step00000005", "000000"]
    files = [f"sample/my-lora-{part}_0{number}_7.png" for part in parts for number in (1, 0)] + ["sample/other.png"]
    previews = make_run(tmp_path / "run", files=files).previews()
    assert [preview.moment for preview in previews][::2] == [
        "no LoRA",
        "at first",
        "step 5",
        "step 20",
        "turning point",
        "last",
    ]
    assert [preview.number for preview in previews] == [0, 1] * 6 and {preview.seed for preview in previews} == {7}


def test_verdicts_in_plain_words(tmp_path):
    assert Run("x", tmp_path).verdict() == "Nothing is measured yet."
    steady = [0.01 * step for step in range(4)]
    assert make_run(tmp_path / "new", steady).verdict() == "Step 4 of 40. No evidence of overfitting yet."
    waves = [0.0, 0.5, 0.6, 1.5, 1.4, 2.8, 2.9, 2.95, 2.9, 4.0, 4.1, 4.1, 6.0, 6.2, 6.1, 6.3, 8.0]
    assert "Step 17 of 40. The turning point was step" in make_run(tmp_path / "decided", waves).verdict()
    ended = make_run(tmp_path / "ended", steady, RESULT)
    assert ended.verdict().startswith("Stopped after step 9 of 40: overfitting began at about step 5")
    assert (
        make_run(tmp_path / "nan", result={**RESULT, "outcome": "diverged"}).verdict().startswith("Training diverged")
    )


def test_a_history_that_is_being_written_and_a_torn_result_are_no_error(tmp_path):
    run = make_run(tmp_path / "run", [0.1, 0.2])
    with open(run.folder / "cs_history.jsonl", "a") as file:
        file.write('{"step": 3, "ep')
    (run.folder / "result.json").write_text('{"outcome": ')
    assert run.result() is None and run.history().last_step() == 2
    (run.folder / LOG_NAME).write_bytes(b"start\nsteps: 1\rsteps: 2\rsteps: 3\xff")
    assert run.log_lines() == ["start", "steps: 3\ufffd"] and run.log_lines(1) == ["steps: 3\ufffd"]


def test_base_of_a_run_is_only_one_that_is_offered(places, tmp_path):
    own = {**RESULT, "settings": {"pretrained_model_name_or_path": f"{tmp_path}/root/../base"}}
    assert places.base_of(make_run(tmp_path / "root" / "own", result=own)) == "small"
    assert places.base_of(make_run(tmp_path / "root" / "other", result=RESULT)) is None
    assert offered({"a": 1}, "a", "letter") == 1


# ---------------------------------------------------------------------------------------- trainings


def settings(**changes):
    from demo.process import TrainingSettings

    return TrainingSettings(**{"name": "cat", "base": "small", "images": "cats", **changes})


def test_command_is_accepted_by_the_trainer(places, tmp_path):
    from demo.process import command
    from settings.parsing import parse_arguments

    words = command(
        settings(prompts="a cat --d 1", pictures_every_epochs=2, window=7), places, tmp_path / "root" / "new"
    )
    assert words[:2] == [sys.executable, str(TREE / "es_lora_ldm.py")]
    words[words.index("--sample_prompts") + 1] = str(TREE / "preview_prompts.txt")  # not written before the start
    args = parse_arguments(words[2:])
    assert args.stop.window_size == 7 and args.stop.cs_interval is None
    assert args.stop.early_stop and args.sample_every_n_epochs == 2
    assert args.output_dir == str(tmp_path / "root" / "new") and args.pretrained_model_name_or_path == str(
        tmp_path / "base"
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "../x"}, "letters, digits"),
        ({"name": "x --resume y"}, "letters, digits"),
        ({"name": "-x"}, "letters, digits"),
        ({"base": "/etc"}, "no base that this page was started with"),
        ({"images": "../pictures"}, "no picture folder that this page was started with"),
        ({"epochs": 0, "rank": 10**9}, "epochs 0 must be from 1"),
        ({"seed": "1; ls"}, "seed '1; ls' must be from 0"),
        ({"unet_rate": float("nan")}, "unet_rate nan must be from 0 to 1"),
        ({"precision": "no --config_file x"}, "precision"),
        ({"prompts": "a cat --z 1"}, "--z is unknown"),
        ({"prompts": "a cat --s 151"}, "sample_steps 151 must be from 1 to 150"),
        ({"prompts": "a cat --w 4096"}, "width 4096 must be from 0 to 2048"),
        ({"prompts": "a cat\n" * 21}, "21 prompts: 20 are the most"),
        ({"prompts": "a" * 3000}, "3000 letters: 2000 are the most"),
        ({"rank": 1.5}, "rank 1.5 must be from 1 to 1024, whole"),
        ({"epochs": True}, "epochs True must be from 1"),
        ({"batch_size": float("inf")}, "batch_size inf must be from 1 to 256"),
        ({"alpha": float("nan")}, "alpha nan must be from"),
    ],
)
def test_a_command_of_other_settings_is_refused(places, tmp_path, changes, words):
    from demo.process import command

    with pytest.raises(ValueError, match=words):
        command(settings(**changes), places, tmp_path / "root" / "new")


def test_sdxl_bases_get_the_sdxl_trainer(places, tmp_path):
    from demo.process import command, is_sdxl_base
    from settings.parsing import parse_arguments

    (tmp_path / "base" / "text_encoder_2").mkdir()
    words = command(settings(text_rate=0, precision="fp16"), places, tmp_path / "root" / "new")
    assert words[1] == str(TREE / "es_lora_sdxl.py")
    args = parse_arguments(words[2:], sdxl=True)
    assert args.network_train_unet_only and args.cache_text_encoder_outputs and args.no_half_vae
    assert is_sdxl_base("stabilityai/stable-diffusion-xl-base-1.0") and not is_sdxl_base(
        "stable-diffusion-v1-5/some-name"
    )


def test_a_training_never_writes_into_a_folder_that_is_there(places, tmp_path, monkeypatch):
    from demo import process as module

    monkeypatch.setattr(module, "command", lambda *_: [sys.executable, "-c", "print('hello')"])
    process = module.TrainingProcess(settings(prompts="a cat\n# no prompt\n"), places, tmp_path / "root" / "new")
    assert process.process.wait(60) == 0 == process.exit_code
    assert Run("new", tmp_path / "root" / "new").log_lines() == ["hello"]
    assert (tmp_path / "root" / "new" / "preview_prompts.txt").read_text() == "a cat\n"
    with pytest.raises(FileExistsError):
        module.TrainingProcess(settings(), places, tmp_path / "root" / "new")


def test_stop_is_an_interrupt(places, tmp_path, monkeypatch):
    from demo import process as module

    program = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)"  # as the trainer takes it
    program += "\nprint('ready', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt:"
    program += "\n  print('saved')\n  raise SystemExit(130)"
    monkeypatch.setattr(module, "command", lambda *_: [sys.executable, "-c", program])
    process = module.TrainingProcess(settings(), places, tmp_path / "root" / "new")
    run = Run("new", tmp_path / "root" / "new")
    while not run.log_lines():
        assert process.exit_code is None
        try:
            process.process.wait(0.05)
        except subprocess.TimeoutExpired:
            pass
    process.stop()
    assert process.process.wait(60) == 130 and run.log_lines() == ["ready", "saved"]


def test_a_windows_training_has_a_group_of_its_own_and_is_sent_ctrl_break(places, tmp_path, monkeypatch):
    """There is no Windows here: its names are put in, and what would be done with them is noted."""
    from demo import process as module

    sent, given = [], {}

    def popen(words, **how):
        given.update(how)
        return types.SimpleNamespace(poll=lambda: None, send_signal=sent.append)

    monkeypatch.setattr(module.subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    monkeypatch.setattr(module.signal, "CTRL_BREAK_EVENT", 1, raising=False)
    monkeypatch.setattr(module.subprocess, "Popen", popen)
    monkeypatch.setattr(module, "command", lambda *_: ["trainer"])
    module.TrainingProcess(settings(), places, tmp_path / "root" / "new").stop()
    assert given["creationflags"] == 512 and "start_new_session" not in given and sent == [1]


# ----------------------------------------------------------------------------------------- pictures


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    if request.param == "sd":
        return make_base(folder)
    from tiny_sdxl import tiny_sdxl

    tiny_sdxl(folder).save_pipeline(folder / "base")
    return str(folder / "base")


def test_pictures_of_a_lora_and_the_base_as_before_afterwards(base, tmp_path):
    import torch
    from PIL import Image

    from base.loading import load_base_model
    from base.sampling import Prompt
    from grid.pictures import PictureMaker, png_with_settings
    from network.lora import create_network
    from network.lora_file import save_lora

    network = create_network(load_base_model(base), rank=4, alpha=4)
    for name, tensor in network.tensors().items():
        torch.nn.init.normal_(tensor.data, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    save_lora(tmp_path / "a.safetensors", network.state_for_file())

    maker = PictureMaker(base)
    assert maker.native_px == 32
    weights = {name: value.clone() for name, value in maker.model.unet.state_dict().items()}
    prompt = Prompt("a cat", seed=3, sample_steps=2)
    plain = maker.picture(prompt)
    with_lora = maker.picture(prompt, tmp_path / "a.safetensors")
    assert np.any(np.asarray(with_lora) != np.asarray(plain))
    assert np.any(np.asarray(maker.picture(prompt, tmp_path / "a.safetensors", 0.5)) != np.asarray(with_lora))
    assert np.array_equal(maker.picture(prompt, tmp_path / "a.safetensors", 0.0), plain)
    assert np.array_equal(maker.picture(prompt), plain)
    assert all(torch.equal(value, weights[name]) for name, value in maker.model.unet.state_dict().items())

    (tmp_path / "b.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError):
        maker.picture(prompt, tmp_path / "b.safetensors")
    import io

    assert Image.open(io.BytesIO(png_with_settings(plain, {"seed": 3, "lora": None}))).info == {
        "seed": "3",
        "lora": "None",
    }


# ----------------------------------------------------------------------------------------- the grid


def test_what_a_grid_may_be_asked_for_has_bounds():
    from demo.grid_page import asked_numbers, asked_prompts

    assert [prompt.prompt for prompt in asked_prompts("a cat\n\n a dog --s 3\n")] == ["a cat", "a dog"]
    assert asked_numbers("2, 1,2", "seed", 2) == [2, 1]
    for text, said in (("", "0 prompts: give 1 to 6"), ("a\n" * 7, "7 prompts"), ("a --s 999", "sample_steps 999")):
        with pytest.raises(ValueError, match=said):
            asked_prompts(text)
    for text, name, said in (
        ("1,x", "seed", "seed '1,x'"),
        ("1,2,3", "seed", "3 of seed"),
        ("9", "strength", "from 0"),
    ):
        with pytest.raises(ValueError, match=said):
            asked_numbers(text, name, 2)


def test_training_pictures_are_compared_with_only_where_the_page_offers_them(tmp_path):
    (tmp_path / "offered").mkdir(), (tmp_path / "other").mkdir()
    places = Places([tmp_path], {}, {"mine": tmp_path / "offered"})
    for name, expected in (("offered", tmp_path / "offered"), ("other", None), ("gone", None)):
        run = make_run(tmp_path / f"run-{name}", [0.1])
        result = {"outcome": "x", "verdict": "y", "settings": {"train_data_dir": str(tmp_path / name)}}
        (run.folder / "result.json").write_text(json.dumps(result))
        assert places.images_of(run) == expected


# ---------------------------------------------------------------------------------- the example run


def test_the_default_run_is_offered_until_there_is_a_run_of_ones_own(tmp_path):
    bases, images = {"small": str(TREE / "tiny_base")}, {"ones": TREE.parent / "dataset" / "portraits" / "train"}
    places = Places([tmp_path], bases, images, EXAMPLE)
    (run,) = places.runs().values()
    assert isinstance(run, ExampleRun) and run.damage() == [] and places.base_of(run) == "small"
    assert run.settings()["train_data_dir"] == str(images["ones"])
    assert list(run.weights()) == ["turning point"] and run.verdict().startswith("Stopped early at step")
    assert {preview.moment for preview in run.previews()} == {"no LoRA", "last"}
    assert run.history() is not None
    make_run(tmp_path / "own", [0.1])
    assert list(places.runs()) == ["own"]


def test_the_example_run_fits_the_embedded_base_and_names_no_place_of_a_machine():
    from base.loading import load_base_model
    from network.lora import create_network

    for file in EXAMPLE.rglob("*.json*"):
        assert not re.search(r'"(/|[A-Z]:)[^"]', file.read_text()), file
    model = load_base_model(str(TREE / "tiny_base"))
    for file in EXAMPLE.glob("*.safetensors"):
        assert not re.search(rb'"/(tmp|home|root|work)', file.read_bytes()[:100_000])
        create_network(model, dim_from_weights=True, weights=file)
    assert sum(file.stat().st_size for file in EXAMPLE.rglob("*")) < 2e6


# -------------------------------------------------------------------------------- start of the page


def test_folders_that_the_page_is_started_with(tmp_path):
    pytest.importorskip("streamlit", reason="streamlit is not installed (requirements-extras.txt)")
    from demo_app import parse_places

    places = parse_places(["--root", str(tmp_path), "--base", "models/x", "--images", str(tmp_path)])
    assert places.roots == [tmp_path.resolve()] and places.bases["models/x"] == "models/x"
    assert list(places.images)[0] == str(tmp_path) and places.images["portraits (example)"].is_dir()
    with pytest.raises(ValueError, match="--root .*nowhere does not exist\n--images .*gone does not exist"):
        parse_places(["--root", str(tmp_path / "nowhere"), "--images", str(tmp_path / "gone")])
    with pytest.raises(ValueError, match="--roots is unknown: there are --root"):
        parse_places(["--roots", str(tmp_path)])


def test_curves_follow_the_history(tmp_path):
    pytest.importorskip("streamlit", reason="streamlit is not installed (requirements-extras.txt)")
    from demo_app import curves

    run = make_run(tmp_path / "run", [0.1, 0.2])
    history = run.folder / "cs_history.jsonl"
    first = curves(run.folder, history.stat().st_size)
    with open(history, "a") as file:
        file.write(json.dumps({"step": 3, "epoch": 1, "cs": {"unet": 0.9}, "loss": 0.2}) + "\n")
    assert first.startswith(b"\x89PNG") and curves(run.folder, history.stat().st_size) != first


def test_the_page_started_as_a_program_names_the_command_that_shows_it():
    pytest.importorskip("streamlit", reason="streamlit is not installed (requirements-extras.txt)")
    words = [sys.executable, str(TREE / "demo_app.py"), "--root", "runs"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("demo_app: this is a page, which streamlit shows: streamlit run ")


# ------------------------------------------------------------------------------- what is damaged


DAMAGED = {
    "torn": '{"outcome": ',
    "a list": "[1, 2]",
    "a word": '"x"',
    "nested": "[" * 10_000 + "]" * 10_000,
    "no fields": "{}",
    "files are a list": json.dumps({**RESULT, "files": [1]}),
    "files are numbers": json.dumps({**RESULT, "files": {"kept": {"path": 3}}}),
    "settings are a word": json.dumps({**RESULT, "settings": "x"}),
    "the verdict is a number": json.dumps({"verdict": 1}),
    "the step is a word": json.dumps({**RESULT, "last_step": "nine"}),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_result_is_one_line_and_the_run_is_shown_without_it(places, tmp_path, kind):
    run = make_run(tmp_path / "root/run", [0.1, 0.2])
    (run.folder / "result.json").write_text(DAMAGED[kind])
    (line,) = run.damage()
    assert "result.json is damaged" in line and len(line) < 500
    assert run.result() is None and run.settings() == {} and run.weights() == {}
    assert run.verdict() == "Step 2 of 40. No evidence of overfitting yet." and places.base_of(run) is None


def test_folders_in_place_of_files_and_missing_weights_are_a_line_each(tmp_path):
    run = make_run(tmp_path / "run", [0.1], {**RESULT, "verdict": "Good."})
    assert [line.split(": ")[1] for line in run.damage()] == [
        f"result.json names {name}, which is not there" for name in ("a.safetensors", "a-last.safetensors")
    ]
    for name in ("result.json", "cs_history.jsonl", "train.log"):
        (run.folder / name).unlink(missing_ok=True)
        (run.folder / name).mkdir()
    (run.folder / "sample/x-last_00_1.png").mkdir(parents=True)
    (run.folder / "x.safetensors").mkdir()
    assert [line.split(": ")[1] for line in run.damage()] == [
        f"{name} is a folder, not a file" for name in ("cs_history.jsonl", "result.json")
    ]
    assert run.history() is None and run.log_lines() == [] and run.previews() == [] and run.weights() == {}
    assert run.verdict() == "Nothing is measured yet."


@pytest.mark.parametrize("content", ["[]\n", "{\n{\n", "\x00\x00", json.dumps({**HEADER, "window": None}) + "\n"])
def test_a_damaged_history_is_one_line(tmp_path, content):
    run = make_run(tmp_path / "run")
    (run.folder / "cs_history.jsonl").write_text(content)
    (line,) = run.damage()
    assert line.startswith("run: ") and run.history() is None


def test_a_whole_run_has_no_damage(tmp_path):
    run = make_run(tmp_path / "run", [0.1], RESULT, ["a.safetensors", "a-last.safetensors"])
    assert run.damage() == [] and Run("none", tmp_path).damage() == []


@pytest.mark.parametrize(
    "changes",
    [{"sample_steps": 151}, {"width": 4096}, {"height": -8}, {"scale": float("nan")}, {"seed": 2**40},
     {"strength": 1e9}, {"prompt": "a" * 2001}, {"sample_steps": "20"}],
)  # fmt: skip
def test_a_picture_beyond_what_the_page_makes_is_refused(changes):
    from demo.process import refuse_picture

    usual = {"prompt": "a cat", "negative_prompt": "", "seed": 1, "sample_steps": 20, "scale": 5.0, "width": None}
    refuse_picture({**usual, "strength": 1.0})
    with pytest.raises(ValueError, match="must be from|the most"):
        refuse_picture({**usual, **changes})

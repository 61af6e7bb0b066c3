"""Bad input gets one message that says the value and the fix, exit code 2, and nothing is
written."""

import pytest
import toml
from ldm_runs import make_pictures, run


@pytest.fixture
def images(tmp_path):
    return make_pictures(tmp_path / "images", count=4)


def corrupt_image(tmp_path):
    (tmp_path / "images/1_cat/0.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    return {}


def no_images(tmp_path):
    (tmp_path / "empty/1_cat").mkdir(parents=True)
    return {"train_data_dir": str(tmp_path / "empty")}


def config(text):
    def write(tmp_path):
        (tmp_path / "run.toml").write_text(text)
        return {"config_file": str(tmp_path / "run.toml")}

    return write


def dataset(**subset):
    def write(tmp_path):
        table = {"datasets": [{"resolution": 32, "subsets": [{"image_dir": str(tmp_path / "images/1_cat"), **subset}]}]}
        (tmp_path / "data.toml").write_text(toml.dumps(table))
        return {"dataset_config": str(tmp_path / "data.toml"), "train_data_dir": None}

    return write


def broken_file(flag, name):
    def write(tmp_path):
        (tmp_path / name).write_bytes(b"no safetensors at all")
        return {flag: str(tmp_path / name)}

    return write


def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --width 512\n")
    return {"sample_prompts": str(tmp_path / "prompts.txt")}


def empty_state(tmp_path):
    (tmp_path / "state").mkdir()
    return {"resume": str(tmp_path / "state")}


CASES = {
    "base does not exist": (
        dict(pretrained_model_name_or_path="./no/base"),
        "./no/base: there is no such file or folder",
    ),
    "base is damaged": (broken_file("pretrained_model_name_or_path", "base.safetensors"), "base.safetensors"),
    "no image folder": (dict(train_data_dir="./none"), "--train_data_dir ./none: there is no such folder"),
    "no images in it": (no_images, "no images"),
    "damaged image": (corrupt_image, "1 of 4 images are damaged"),
    "misspelt flag": (dict(netwrok_dim=8), "unknown flag --netwrok_dim; did you mean --network_dim?"),
    "unsupported flag": (dict(deepspeed=True), "--deepspeed is not supported: "),
    "misspelt key in --config_file": (
        config("netwrok_dim = 8"),
        "unknown key 'netwrok_dim'; did you mean network_dim?",
    ),
    "misspelt key in --dataset_config": (dataset(num_repeat=2), "unknown key num_repeat: did you mean num_repeats?"),
    "missing folder in --dataset_config": (dataset(image_dir="./none"), "none"),
    "learning rate is NaN": (dict(learning_rate="nan"), "--learning_rate nan is not allowed"),
    "rank 0": (dict(network_dim=0), "--network_dim 0 is not allowed: it must be above 0"),
    "resolution is a word": (dict(resolution="large"), "large"),
    "unknown optimizer": (dict(optimizer_type="AdamX"), "--optimizer_type AdamX is unknown; did you mean"),
    "unknown optimizer setting": (dict(optimizer_args=["wight_decay=1"]), "AdamW refuses them"),
    "unknown scheduler": (dict(lr_scheduler="cosin"), "--lr_scheduler cosin is unknown; did you mean cosine?"),
    "fp16 without a GPU": (dict(mixed_precision="fp16"), "--mixed_precision fp16 needs a GPU"),
    "unknown network setting": (dict(network_args=["conv_dimm=4"]), "conv_dimm=4"),
    "LoRA file is damaged": (
        broken_file("network_weights", "a.safetensors"),
        "a.safetensors is not a readable safetensors",
    ),
    "prompt option unknown": (prompts, "--width is unknown"),
    "not a state folder": (empty_state, "it is not a state folder of this trainer"),
    "unknown stop rule": (dict(early_stop=True, stop_rule="third-hill"), "stop rule 'third-hill' is unknown"),
    "snapshots do not fit": (
        dict(early_stop=True, snapshot_disk_gb=1e-6),
        "raise --snapshot_disk_gb or lower the rank",
    ),
    "masks are missing": (dict(masked_loss=True), "--masked_loss needs masks"),
    "zero terminal SNR with epsilon": (
        dict(zero_terminal_snr=True),
        "--zero_terminal_snr needs a base that predicts v",
    ),
    "value of the wrong kind": (dict(network_dim="eight"), "argument --network_dim: invalid int value: 'eight'"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, base, images, tmp_path, capsys):
    changes, message = CASES[case]
    changes = changes(tmp_path) if callable(changes) else changes
    settings = {"train_data_dir": images, "pretrained_model_name_or_path": base, **changes}
    out = tmp_path / "out"
    assert run(settings.pop("pretrained_model_name_or_path"), settings.pop("train_data_dir"), out, **settings) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    assert not out.exists() or not list(out.rglob("*.*"))


def test_history_of_another_run_is_not_overwritten(base, images, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/cs_history.jsonl").write_text("{}\n")
    assert run(base, images, tmp_path / "out", calculate_cs=True) == 2
    assert "holds cs_history.jsonl of another run; choose another output folder" in capsys.readouterr().err
    assert (tmp_path / "out/cs_history.jsonl").read_text() == "{}\n"


def test_resume_with_other_data_is_refused(base, images, tmp_path, capsys):
    assert run(base, images, tmp_path / "a", max_train_steps=2, save_state=True) == 0
    more = make_pictures(tmp_path / "more", count=8)
    state = str(tmp_path / "a/lora-state")
    assert run(base, more, tmp_path / "b", resume=state) == 2
    assert "use the same images, batch size and accumulation" in capsys.readouterr().err
    assert run(base, images, tmp_path / "b", resume=state, network_dim=8) == 2
    assert "does not fit this network" in capsys.readouterr().err
    assert run(base, images, tmp_path / "b", resume=state, max_train_steps=1) == 2
    assert "nothing left to train: 2 of 1 steps are done" in capsys.readouterr().err

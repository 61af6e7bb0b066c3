"""Weights that are not finite, not whole or bundled with others: one answer in every tool that
reads them, exit code 2, and nothing is written."""

import shutil
from pathlib import Path

import extract_lora
import merge_lora
import pytest
import sample_images
import torch
from ldm_runs import run
from safetensors.torch import load_file, save_file
from tiny_sd import original_layout

from base.loading import load_base_model
from grid.pictures import PictureMaker, lora_applied
from network.lora import create_network
from network.lora_file import load_lora, save_lora

FIRST = "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"
PREFIXES = {"VAE": "first_stage_model.", "text encoder": "cond_stage_model.", "U-Net": "model.diffusion_model."}


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    """A LoRA of the base as {key: tensor}."""
    network = create_network(load_base_model(base), rank=2)
    for _, weight in sorted(network.tensors().items()):
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return network.state_for_file()


@pytest.fixture(scope="module")
def single_file(base, tmp_path_factory):
    """{key: tensor} of the base in one file, and a folder with its configurations."""
    folder = tmp_path_factory.mktemp("single") / "whole.config"
    for part in ("unet", "vae", "text_encoder", "scheduler", "tokenizer"):
        (folder / part).mkdir(parents=True)
        for file in (Path(base) / part).iterdir():
            if file.suffix in (".json", ".txt"):
                shutil.copy(file, folder / part)
    return original_layout(load_base_model(base)), folder


def write_base(single_file, folder, name, keep=lambda key: True, change=lambda key, value: value):
    tensors, config = single_file
    shutil.copytree(config, folder / f"{name}.config")
    kept = {key: change(key, value).clone() for key, value in tensors.items() if keep(key)}
    save_file(kept, folder / f"{name}.safetensors")
    return str(folder / f"{name}.safetensors")


def tools(base, tuned, lora, folder):
    """{tool: run it on a base, a tuned base and a LoRA; -> exit code}."""
    prompt = ["--prompt", "a cat --s 1 --w 32 --h 32", "--out", str(folder / "pictures"), "--device", "cpu"]
    merge = ["--sd_model", base, "--models", lora, "--save_to", str(folder / "merged")]
    extract = ["--model_org", base, "--model_tuned", tuned, "--save_to", str(folder / "extracted.safetensors")]
    return {
        "merge_lora": lambda: merge_lora.main(merge),
        "extract_lora": lambda: extract_lora.main([*extract, "--device", "cpu"]),
        "sample_images": lambda: sample_images.main(["--base", base, "--lora", lora, *prompt]),
    }


def refused(work, capsys, *words):
    capsys.readouterr()
    assert work() == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_lora_that_is_not_finite_is_refused_by_name_everywhere(base, images, lora, tmp_path, capsys, value):
    path = str(tmp_path / "bad.safetensors")
    save_file({**lora, FIRST: lora[FIRST] * float(value)}, path)
    words = "bad.safetensors", FIRST, "NaN or Inf"
    ways = tools(base, base, path, tmp_path)
    refused(ways["merge_lora"], capsys, *words)
    refused(ways["sample_images"], capsys, *words)
    for flag in ("network_weights", "base_weights"):
        refused(lambda flag=flag: run(base, images, tmp_path / "out", **{flag: path}), capsys, *words)
    with pytest.raises(ValueError, match=FIRST), lora_applied(load_base_model(base), path):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["bad.safetensors"]


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_base_that_is_not_finite_is_refused_by_name_everywhere(base, images, lora, tmp_path, capsys, part):
    save_lora(tmp_path / "lora.safetensors", lora)
    bad = str(shutil.copytree(base, tmp_path / "bad"))
    file = next(Path(bad, part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] * float("nan")}, file)
    words = f"bad/{part}", name, "NaN or Inf"
    for way in tools(bad, base, str(tmp_path / "lora.safetensors"), tmp_path).values():
        refused(way, capsys, *words)
    refused(tools(base, bad, "", tmp_path)["extract_lora"], capsys, *words)
    refused(lambda: run(bad, images, tmp_path / "out"), capsys, *words)
    if part == "vae":
        refused(lambda: run(base, images, tmp_path / "out", vae=f"{bad}/vae"), capsys, *words)
    with pytest.raises(ValueError, match="NaN or Inf"):
        PictureMaker(bad)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad", "lora.safetensors"]


def test_a_single_file_that_is_not_finite_is_refused(base, images, lora, single_file, tmp_path, capsys):
    save_lora(tmp_path / "lora.safetensors", lora)
    name = "model.diffusion_model.out.2.bias"
    path = write_base(single_file, tmp_path, "bad", change=lambda key, value: value + (torch.nan if key == name else 0))
    for way in tools(path, base, str(tmp_path / "lora.safetensors"), tmp_path).values():
        refused(way, capsys, "bad.safetensors", name)
    merge = [
        "--sd_model",
        path,
        "--models",
        str(tmp_path / "lora.safetensors"),
        "--save_to",
        f"{tmp_path}/m.safetensors",
    ]
    refused(lambda: merge_lora.main(merge), capsys, "bad.safetensors", name)
    refused(lambda: run(path, images, tmp_path / "out"), capsys, "bad.safetensors", name)


def test_strengths_and_precisions_that_give_inf_are_refused(base, lora, tmp_path, capsys):
    save_lora(tmp_path / "lora.safetensors", {**lora, FIRST: lora[FIRST] * 1e8})
    path = str(tmp_path / "lora.safetensors")
    merge = ["--sd_model", base, "--models", path, "--save_to", str(tmp_path / "merged")]
    refused(
        lambda: merge_lora.main([*merge, "--save_precision", "fp16"]),
        capsys,
        "fp16",
        "NaN or Inf",
        "--save_precision float",
    )
    refused(lambda: merge_lora.main([*merge, "--ratios", "nan"]), capsys, "--ratios nan must be finite")
    refused(tools(base, base, f"{path}:nan", tmp_path)["sample_images"], capsys, "strength nan")


@pytest.mark.parametrize("part", PREFIXES)
def test_a_checkpoint_without_a_part_is_one_message(base, images, lora, single_file, tmp_path, capsys, part):
    save_lora(tmp_path / "lora.safetensors", lora)
    path = write_base(single_file, tmp_path, "half", keep=lambda key: not key.startswith(PREFIXES[part]))
    words = ["half.safetensors", f"no {part} in it", "--vae" if part == "VAE" else "give the whole checkpoint"]
    for way in tools(path, base, str(tmp_path / "lora.safetensors"), tmp_path).values():
        refused(way, capsys, *words)
    refused(lambda: run(path, images, tmp_path / "out"), capsys, *words)


def test_a_checkpoint_without_a_vae_is_used_with_that_of_the_flag(base, images, single_file, tmp_path):
    path = write_base(single_file, tmp_path, "half", keep=lambda key: not key.startswith("first_stage_model."))
    assert run(path, images, tmp_path / "out", vae=f"{base}/vae", max_train_steps=1) == 0
    lora = str(tmp_path / "out" / "lora.safetensors")
    assert (
        merge_lora.main(
            ["--sd_model", path, "--models", lora, "--save_to", str(tmp_path / "merged"), "--vae", f"{base}/vae"]
        )
        == 0
    )
    folder = shutil.copytree(base, tmp_path / "folder")
    shutil.rmtree(folder / "vae")
    assert load_base_model(folder, vae=f"{base}/vae").vae is not None


def test_a_folder_whose_files_lack_tensors_or_are_torn_is_one_message(base, images, tmp_path, capsys):
    bad = shutil.copytree(base, tmp_path / "bad")
    file = next((bad / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if not name.startswith("conv_in.")}, file)
    refused(lambda: run(str(bad), images, tmp_path / "out"), capsys, "bad/unet lacks 2 tensors", "conv_in.bias")
    save_file(tensors, file)
    for name in ("unet/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        whole = (bad / name).read_bytes()
        for torn in (b"{", b"[]", b"\xff\xfe", *([b'{"beta_start": "x"}'] if "scheduler" in name else [])):
            (bad / name).write_bytes(torn)
            refused(lambda: run(str(bad), images, tmp_path / "out"), capsys, "/bad", name.split("/")[0])
        (bad / name).write_bytes(whole)


def test_text_encoder_names_without_their_level_are_read(base, single_file, tmp_path):
    def rename(tensors):
        return {key.replace("transformer.text_model.", "transformer."): value for key, value in tensors.items()}

    path = write_base((rename(single_file[0]), single_file[1]), tmp_path, "short")
    ours, theirs = load_base_model(path).text_encoders[0], load_base_model(base).text_encoders[0]
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_embeddings_that_onetrainer_bundles_are_left_out_with_a_word(base, images, lora, tmp_path, caplog, capsys):
    save_lora(tmp_path / "plain.safetensors", lora)
    bundled = {f"bundle_emb.{name}.string_to_param.*": torch.ones(1, 16) for name in ("mycat", "style")}
    save_lora(tmp_path / "bundled.safetensors", {**lora, **bundled})
    path = str(tmp_path / "bundled.safetensors")
    tensors = load_lora(path)[0]
    assert tensors.keys() == lora.keys() and "(mycat, style) are left out" in caplog.text
    caplog.clear()
    for tool in ("merge_lora", "sample_images"):
        assert tools(base, base, path, tmp_path)[tool]() == 0
    flags = {"network_weights": path, "dim_from_weights": True, "network_alpha": 1, "max_train_steps": 1}
    assert run(base, images, tmp_path / "out", **flags) == 0
    assert caplog.text.count("(mycat, style) are left out") == 3


@pytest.mark.parametrize(
    "name", ["junk.safetensors", "junk.ckpt", "junk.pt", "junk.gguf", "none.safetensors", "folder"]
)
def test_what_is_no_file_of_weights_is_one_message_everywhere(base, images, tmp_path, capsys, name):
    (tmp_path / "folder").mkdir()
    if name.startswith("junk"):
        (tmp_path / name).write_bytes(b"junk")
    path = str(tmp_path / name)
    refused(tools(base, base, path, tmp_path)["merge_lora"], capsys, name)
    refused(tools(base, base, path, tmp_path)["sample_images"], capsys, name)
    for way in tools(path, base, path, tmp_path).values():
        refused(way, capsys, name)
    for flag in ("pretrained_model_name_or_path", "vae", "network_weights"):
        refused(
            lambda flag=flag: run(**{"base": base, "images": images, "out": tmp_path / "o", flag: path}), capsys, name
        )


def test_a_lora_that_fits_no_layer_is_named_everywhere(base, images, lora, tmp_path, capsys):
    path = str(tmp_path / "stranger.safetensors")
    save_lora(path, {key.replace("lora_unet_", "lora_unet_strange_"): value for key, value in lora.items()})
    words = "stranger.safetensors", "lora_unet_strange_"
    refused(tools(base, base, path, tmp_path)["merge_lora"], capsys, *words, "does not fit the model")
    refused(tools(base, base, path, tmp_path)["sample_images"], capsys, *words, "does not fit the model")
    refused(lambda: run(base, images, tmp_path / "out", base_weights=path), capsys, *words, "does not fit the model")


def test_a_state_that_is_damaged_is_one_message(base, images, tmp_path, capsys):
    assert run(base, images, tmp_path / "out", max_train_steps=2, save_state_on_train_end=True) == 0
    (state,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir() and path.name.endswith("-state"))
    again = {"resume": state, "max_train_steps": 4}
    for name in ("progress.json", "optimizer.pt", "random-0.pt", "lora.safetensors"):
        whole = (state / name).read_bytes()
        for torn in (b"[]", whole[: len(whole) // 2]):
            (state / name).write_bytes(torn)
            refused(lambda: run(base, images, tmp_path / "more", **again), capsys, state.name)
        (state / name).write_bytes(whole)
    weights = load_file(state / "lora.safetensors")
    save_file({**weights, FIRST: weights[FIRST] * float("nan")}, state / "lora.safetensors")
    refused(lambda: run(base, images, tmp_path / "more", **again), capsys, FIRST, "NaN or Inf")


PARTS = (".lora_down.weight", ".lora_up.weight")
HALVES = {
    "no down": (lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(PARTS[0])}, "lora_down.weight"),
    "no up": (lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(PARTS[1])}, "lora_up.weight"),
    "only alphas": (lambda tensors: {k: v for k, v in tensors.items() if k.endswith("alpha")}, "lora_down.weight"),
    "one part gone": (lambda tensors: {k: v for k, v in tensors.items() if k != FIRST}, FIRST),
    "alpha of three": (lambda t: {**t, FIRST.replace("lora_up.weight", "alpha"): torch.ones(3)}, "not one number"),
}


@pytest.mark.parametrize("kind", HALVES)
def test_half_a_lora_is_refused_everywhere_by_name_and_count(base, images, lora, tmp_path, capsys, kind):
    edit, word = HALVES[kind]
    path = str(tmp_path / "half.safetensors")
    save_file(edit(lora), path)
    count = 1 if kind in ("one part gone", "alpha of three") else len(lora) // 3 * (2 if kind == "only alphas" else 1)
    words = "half.safetensors", word, str(count)
    for name in ("merge_lora", "sample_images"):
        refused(tools(base, base, path, tmp_path)[name], capsys, *words)
    for more in ({}, {"dim_from_weights": True}, {"network_module": "lycoris.kohya"}):
        refused(lambda more=more: run(base, images, tmp_path / "out", network_weights=path, **more), capsys, *words)
    with pytest.raises(ValueError, match="half.safetensors"), lora_applied(load_base_model(base), path):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["half.safetensors"]


def strangers(tensors, share):
    names = sorted({key.partition(".")[0] for key in tensors})
    chosen = set(names[: int(len(names) * share)])
    return {("lora_unet_nope_" + key if key.partition(".")[0] in chosen else key): v for key, v in tensors.items()}


def layers(tensors, keep):
    names = sorted({key.partition(".")[0] for key in tensors})
    return {key: value for key, value in tensors.items() if keep(names.index(key.partition(".")[0]))}


MISFITS = {
    "foreign names": (lambda tensors: strangers(tensors, 1), ["do not belong there", "lora_unet_nope_", "it lacks"]),
    "half foreign": (lambda tensors: strangers(tensors, 0.5), ["do not belong there", "lora_unet_nope_"]),
    "every second layer": (lambda tensors: layers(tensors, lambda number: number % 2), ["it lacks", "of 28 layers"]),
    "one layer gone": (lambda tensors: layers(tensors, lambda number: number), ["it lacks 1 of 28 layers"]),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_weights_to_start_from_must_be_those_of_the_network(base, images, lora, tmp_path, capsys, kind):
    edit, words = MISFITS[kind]
    count = len(lora) // 3
    words = [word.replace("28", str(count)) for word in words]
    path = str(tmp_path / "misfit.safetensors")
    save_file(edit(lora), path)
    flags = {"network_weights": path, "network_dim": 2, "network_alpha": 2}
    refused(lambda: run(base, images, tmp_path / "out", **flags), capsys, "misfit.safetensors", *words)
    if "foreign" in kind:
        refused(lambda: run(base, images, tmp_path / "out", **flags, dim_from_weights=True), capsys, "misfit", "nope")
        lycoris = {**flags, "network_module": "lycoris.kohya", "dim_from_weights": True}
        refused(lambda: run(base, images, tmp_path / "out", **lycoris), capsys, "misfit", "nope")
        for name in ("merge_lora", "sample_images"):
            refused(tools(base, base, path, tmp_path)[name], capsys, "misfit", "nope", f"more of {count} layers")
    else:
        assert run(base, images, tmp_path / "out", **flags, dim_from_weights=True, max_train_steps=1) == 0


def test_a_part_that_is_not_trained_is_left_out_of_the_weights_to_start_from(base, images, lora, tmp_path):
    save_lora(tmp_path / "both.safetensors", lora)
    flags = {"network_weights": str(tmp_path / "both.safetensors"), "network_dim": 2, "network_alpha": 2}
    assert run(base, images, tmp_path / "out", **flags, network_train_unet_only=True, max_train_steps=1) == 0
    assert all(key.startswith("lora_unet_") for key in load_lora(tmp_path / "out/lora.safetensors")[0])


def test_an_update_of_another_shape_is_refused_before_it_is_made(base, lora, tmp_path, capsys):
    down, up = torch.ones(1, 3_000_000), torch.ones(3_000_000, 1)  # 36 TB as a product
    name = FIRST.removesuffix(".lora_up.weight")
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "huge.safetensors")
    mixed = {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(16, 3)}
    save_file(mixed, tmp_path / "mixed.safetensors")
    for path in ("huge", "mixed"):
        for tool in ("merge_lora", "sample_images"):
            work = tools(base, base, str(tmp_path / f"{path}.safetensors"), tmp_path)[tool]
            refused(work, capsys, f"{path}.safetensors does not fit the model", name)


@pytest.mark.parametrize("part", PREFIXES)
@pytest.mark.parametrize("every", [2, 1000])
def test_a_single_file_that_lacks_tensors_says_which(base, images, single_file, tmp_path, capsys, part, every):
    names = sorted(key for key in single_file[0] if key.startswith(PREFIXES[part]))
    gone = set(names[3::every])
    path = write_base(single_file, tmp_path, "holes", keep=lambda key: key not in gone)
    refused(lambda: run(path, images, tmp_path / "out"), capsys, "holes.safetensors")

"""Judging a folder of saved adapters: every format decides as the recorded run does, and says when
it cannot."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from judge_checkpoints import main
from safetensors.torch import load_file, save_file

from cs_fluctuation import LoraLayer
from es_lora.history import read_history, redecide
from es_lora.judge.adapter_files import read_adapter
from es_lora.judge.base_index import Base, BlockBuffer, FileWeight, unet_layer_name
from es_lora.monitor import EarlyStopMonitor
from es_lora.settings import StopSettings

JUDGE = Path(__file__).resolve().parents[2] / "lora-llm" / "judge_checkpoints.py"
RANK, STEPS, STEPS_PER_EPOCH = 2, 60, 10

LANGUAGE = {  # path in the model: (out, in)
    "model.layers.0.self_attn.q_proj": (12, 8),
    "model.layers.0.mlp.down_proj": (8, 20),
    "model.layers.1.self_attn.v_proj": (6, 8),
}
# (component, diffusers path, original path, shape): both layouts of a U-Net with one residual layer
# a block.
DIFFUSION = [
    ("unet", "down_blocks.0.attentions.0.proj_in", "input_blocks.1.1.proj_in", (8, 8, 1, 1)),
    ("unet", "down_blocks.1.resnets.0.conv1", "input_blocks.3.0.in_layers.2", (8, 8, 3, 3)),
    ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
     "middle_block.1.transformer_blocks.0.attn2.to_k", (8, 6)),
    ("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
     "output_blocks.2.1.transformer_blocks.0.attn1.to_out.0", (8, 8)),
    ("te", "text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj", (6, 6)),
]  # fmt: skip


def random_walk(shapes, seed=0):
    """One (down, up) a layer and step, like a training: a drift that slows down, and noise. [[(A,
    B), ...], ...]"""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    downs = [noise(RANK, *shape[1:]) for shape in shapes]
    ups = [torch.zeros(shape[0], RANK, *[1] * (len(shape) - 2)) for shape in shapes]
    drifts = [noise(*up.shape) for up in ups]
    steps = []
    for step in range(1, STEPS + 1):
        ups = [up + 0.05 * drift / step + 0.01 * noise(*up.shape) for up, drift in zip(ups, drifts)]
        downs = [down + 0.01 * noise(*down.shape) for down in downs]
        steps.append(list(zip(downs, ups)))
    return steps


def record_history(folder, names, components, weights, walk, reduction, interval=1):
    """What a live run over the same matrices records; returns the history's path."""
    live = [(down.clone(), up.clone()) for down, up in walk[0]]
    layers = [LoraLayer(*row, *pair) for *row, pair in zip(names, components, weights, live)]
    decided_on = components[0]
    stop = StopSettings(
        stop_rule="second-valley", window_size=10, cs_interval=interval, cs_component=decided_on, cs_reduction=reduction
    )
    plan = stop.plan(sorted({layer.component for layer in layers}), STEPS_PER_EPOCH, 1000)
    monitor = EarlyStopMonitor(folder, plan, layers, None)
    for step, pairs in enumerate(walk, start=1):
        for (down, up), (new_down, new_up) in zip(live, pairs):
            down.copy_(new_down), up.copy_(new_up)
        if plan.due(step):
            monitor.measure(step, step / STEPS_PER_EPOCH)
    return monitor.history_path


class ToyRun:
    """A recorded run with its base and its adapters on disk."""

    def __init__(self, root, seed=0):
        self.root, self.folder, self.base, self.recorded = root, root / "adapters", root / "base", root / "recorded"
        self.folder.mkdir(), self.base.mkdir()
        self.seed, self.generator = seed, torch.Generator().manual_seed(99)

    def weights(self, shapes):
        return [torch.randn(*shape, generator=self.generator) for shape in shapes]


def language_run(root, every=1, seed=0, transposed=False):
    run = ToyRun(root, seed)
    weights, walk = run.weights(LANGUAGE.values()), random_walk(list(LANGUAGE.values()), seed)
    stored = [weight.T.contiguous() if transposed else weight for weight in weights]
    names = [f"{path}.weight" for path in LANGUAGE]
    save_file(
        {names[0]: stored[0], "model.norm.weight": torch.ones(8)}, str(run.base / "model-00001-of-00002.safetensors")
    )
    save_file(dict(zip(names[1:], stored[1:])), str(run.base / "model-00002-of-00002.safetensors"))
    weight_map = {name: f"model-0000{1 if name == names[0] else 2}-of-00002.safetensors" for name in names}
    (run.base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    run.history = record_history(run.recorded, list(LANGUAGE), ["lm"] * 3, weights, walk, "row")
    for step in range(every, STEPS + 1, every):
        place = run.folder / f"checkpoint-{step}"
        place.mkdir()
        tensors = {}
        for path, (down, up) in zip(LANGUAGE, walk[step - 1]):
            tensors[f"base_model.model.{path}.lora_A.weight"], tensors[f"base_model.model.{path}.lora_B.weight"] = (
                down,
                up,
            )
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, str(place / "adapter_model.safetensors")
        )
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "fan_in_fan_out": transposed}
        (place / "adapter_config.json").write_text(json.dumps(config))
        state = {"global_step": step, "epoch": step / STEPS_PER_EPOCH}
        (place / "trainer_state.json").write_text(json.dumps(state))
    return run


def diffusion_run(root, layout, base_layout="folder", original_names=False):
    run = ToyRun(root, 3)
    shapes = [shape for *_, shape in DIFFUSION]
    weights, walk = run.weights(shapes), random_walk(shapes, 3)
    parts, file = {"unet": {}, "text_encoder": {}}, {}
    parts["unet"]["down_blocks.0.resnets.0.norm1.weight"] = torch.ones(8)
    file["model.diffusion_model.input_blocks.2.0.op.weight"] = torch.ones(8, 8, 3, 3)
    for (component, path, original, _), weight in zip(DIFFUSION, weights):
        parts["unet" if component == "unet" else "text_encoder"][f"{path}.weight"] = weight
        prefix = "model.diffusion_model." if component == "unet" else "cond_stage_model.transformer."
        file[f"{prefix}{original}.weight"] = weight
    for name, tensors in parts.items():
        (run.base / name).mkdir()
        known = "diffusion_pytorch_model" if name == "unet" else "model"
        save_file(tensors, str(run.base / name / f"{known}.safetensors"))
    if base_layout == "file":
        run.base = root / "base.safetensors"
        save_file(file, str(run.base))
    names, components = [row[1] for row in DIFFUSION], [row[0] for row in DIFFUSION]
    run.history = record_history(run.recorded, names, components, weights, walk, "matrix")
    for step, pairs in enumerate(walk, start=1):
        write = {"kohya": write_kohya, "diffusers": write_diffusers}.get(layout, layout)
        write(run.folder, step, pairs, original_names)
    return run


def write_kohya(folder, step, pairs, original_names):
    tensors = {}
    for (component, path, original, _), (down, up) in zip(DIFFUSION, pairs):
        name = f"lora_{component}_{original if original_names else path}".replace(".", "_")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down.contiguous(), up.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    metadata = {
        "ss_num_batches_per_epoch": str(STEPS_PER_EPOCH),
        "ss_steps": str(step),
        "ss_epoch": str(step // STEPS_PER_EPOCH),
    }
    name = "toy" if step == STEPS else f"toy-step{step:08d}"
    save_file(tensors, str(folder / f"{name}.safetensors"), metadata)
    if step % STEPS_PER_EPOCH == 0 and step < STEPS:
        save_file(tensors, str(folder / f"toy-{step // STEPS_PER_EPOCH:06d}.safetensors"), metadata)


def write_diffusers(folder, step, pairs, original_names):
    tensors = {}
    for (component, path, _, _), (down, up) in zip(DIFFUSION, pairs):
        name = f"{'unet' if component == 'unet' else 'text_encoder'}.{path}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down.contiguous(), up.contiguous()
    (folder / f"checkpoint-{step}").mkdir()
    save_file(tensors, str(folder / f"checkpoint-{step}" / "pytorch_lora_weights.safetensors"))


def judged(run, capsys, *flags):
    code = main([str(run.folder), "--base", str(run.base), "--json", *flags])
    output = capsys.readouterr()
    assert code == 0, output.err
    return json.loads(output.out)


def assert_same_decision(verdict, run):
    replayed = redecide(read_history(run.history), "second-valley")
    assert replayed["stopped"], "the toy run must stop, or the comparison says nothing"
    assert {key: verdict[key] for key in replayed} == replayed
    assert verdict["certainty"].startswith("exact")
    recorded = {record["step"]: record for record in read_history(run.history).records}
    assert len(verdict["checkpoints"]) == len(recorded)
    for row in verdict["checkpoints"]:
        for column in ("cs_row", "cs_matrix"):
            assert row[column] == pytest.approx(recorded[row["step"]][column][verdict["component"]], abs=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_peft_checkpoints_at_every_measurement_decide_as_the_replay(tmp_path, capsys, transposed):
    run = language_run(tmp_path, transposed=transposed)
    verdict = judged(run, capsys)
    assert_same_decision(verdict, run)
    assert verdict["keep"] == f"checkpoint-{verdict['turning_step']}"
    assert verdict["usable"][0] == verdict["keep"] and verdict["usable"][-1] == f"checkpoint-{verdict['stop_step']}"


@pytest.mark.parametrize(
    "base_layout, original_names", [("folder", False), ("file", False), ("folder", True), ("file", True)]
)
def test_kohya_files_decide_as_the_replay_on_either_layout_of_the_base(tmp_path, capsys, base_layout, original_names):
    run = diffusion_run(tmp_path, "kohya", base_layout, original_names)
    verdict = judged(run, capsys)
    assert_same_decision(verdict, run)
    assert verdict["component"] == "unet" and verdict["steps_per_epoch"] == STEPS_PER_EPOCH
    kept_step = int(re.search(r"\d+", verdict["keep"])[0])
    assert kept_step in (verdict["turning_step"], verdict["turning_step"] // STEPS_PER_EPOCH)


def test_diffusers_files_decide_as_the_replay_and_need_the_length_of_an_epoch(tmp_path, capsys):
    run = diffusion_run(tmp_path, "diffusers")
    assert main([str(run.folder), "--base", str(run.base)]) == 2
    assert "--steps_per_epoch" in capsys.readouterr().err
    assert_same_decision(judged(run, capsys, "--steps_per_epoch", "10"), run)


def test_norms_and_stable_rank_are_those_of_the_product(tmp_path, capsys):
    run = language_run(tmp_path)
    row = judged(run, capsys)["checkpoints"][-1]
    tensors = load_file(str(run.folder / row["name"] / "adapter_model.safetensors"))
    products = []
    for path in LANGUAGE:
        down, up = (tensors[f"base_model.model.{path}.lora_{side}.weight"].double() for side in "AB")
        products.append(up @ down)
    stable = [product.norm() ** 2 / torch.linalg.matrix_norm(product, 2) ** 2 for product in products]
    assert row["stable_rank"] == pytest.approx(sum(stable).item() / 3, rel=1e-4)
    norm = sum((4 / RANK * product).norm() ** 2 for product in products) ** 0.5
    assert row["update_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_a_history_beside_the_adapters_gives_interval_window_and_component(tmp_path, capsys):
    run = language_run(tmp_path)
    lines = run.history.read_text().splitlines()
    header = {**json.loads(lines[0]), "window": 7, "cs_interval": 2}
    records = [line for line in lines[1:] if json.loads(line)["step"] % 2 == 0 or "event" in line]
    (run.folder / "cs_history.jsonl").write_text("\n".join([json.dumps(header), *records]) + "\n")
    verdict = judged(run, capsys)
    assert verdict["window"] == 7 and verdict["spacing_steps"] == 2
    replayed = redecide(read_history(run.folder), "second-valley")
    assert {key: verdict[key] for key in replayed} == replayed


def test_the_run_s_own_finer_history_decides_over_few_checkpoints(tmp_path, capsys):
    run = language_run(tmp_path, every=STEPS_PER_EPOCH)
    (run.folder / "cs_history.jsonl").write_text(run.history.read_text())
    verdict, replayed = judged(run, capsys), redecide(read_history(run.history), "second-valley")
    keys = ("rule", "stopped", "stop_step", "turning_step")
    assert [verdict[key] for key in keys] == [replayed[key] for key in keys] and replayed["stopped"]
    kept = replayed["turning_step"] // STEPS_PER_EPOCH * STEPS_PER_EPOCH
    assert verdict["keep"] == f"checkpoint-{max(kept, STEPS_PER_EPOCH)}"
    assert verdict["certainty"] == f"approximate: no checkpoint is of step {replayed['turning_step']}"
    assert f"the {STEPS} measurements of the run itself" in verdict["reason"]


def test_a_history_that_ends_before_the_last_checkpoint_does_not_decide(tmp_path, capsys):
    run = language_run(tmp_path, every=STEPS_PER_EPOCH)
    lines = run.history.read_text().splitlines()
    (run.folder / "cs_history.jsonl").write_text("\n".join(lines[: STEPS - 5]) + "\n")
    assert judged(run, capsys)["certainty"] == "too sparse"


def test_a_corrupt_file_is_named_and_the_others_are_judged(tmp_path, capsys):
    run = language_run(tmp_path)
    (run.folder / "checkpoint-7" / "adapter_model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{broken")
    diverged = run.folder / "checkpoint-60" / "adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(str(diverged)).items()}, str(diverged))
    verdict = judged(run, capsys)
    assert set(verdict["not_judged"]) == {"checkpoint-7", "checkpoint-60"}
    assert "cannot be read" in verdict["not_judged"]["checkpoint-7"] and "NaN" in verdict["not_judged"]["checkpoint-60"]
    assert len(verdict["checkpoints"]) == STEPS - 2 and verdict["keep"]
    assert verdict["missing_steps"] == [7] and verdict["certainty"].startswith("approximate")
    assert (
        abs(verdict["turning_step"] - redecide(read_history(run.history), "second-valley")["turning_step"])
        <= STEPS_PER_EPOCH
    )


def test_one_checkpoint_an_epoch_is_too_sparse_for_a_rule_with_a_window(tmp_path, capsys):
    run = language_run(tmp_path, every=STEPS_PER_EPOCH)
    verdict = judged(run, capsys)
    assert (verdict["certainty"], verdict["keep"], verdict["stopped"]) == ("too sparse", None, False)
    assert "Too sparse to say" in verdict["reason"] and "at least every 2 steps" in verdict["reason"]
    assert [row["epoch"] for row in verdict["checkpoints"]] == [1, 2, 3, 4, 5, 6]
    assert all(abs(row["cs_row"]) > 0 for row in verdict["checkpoints"])


def test_a_rule_without_a_window_that_is_asked_for_judges_one_checkpoint_an_epoch(tmp_path, capsys):
    verdict = judged(language_run(tmp_path, every=STEPS_PER_EPOCH), capsys, "--rule", "fixed-epochs")
    assert verdict["rule"] == "fixed-epochs" and verdict["certainty"] != "too sparse"


def test_a_spacing_in_between_is_judged_and_called_approximate(tmp_path, capsys):
    verdict = judged(language_run(tmp_path, every=2), capsys)
    assert verdict["spacing_steps"] == 2 and verdict["measurement_steps"] == 1 and verdict["window"] == 5
    assert verdict["certainty"].startswith("approximate")


def test_pruned_early_checkpoints_are_too_sparse(tmp_path, capsys):
    run = language_run(tmp_path)
    for step in range(1, 31):
        (run.folder / f"checkpoint-{step}").rename(tmp_path / f"gone-{step}")
    verdict = judged(run, capsys)
    assert verdict["certainty"] == "too sparse" and "30 of 60 checkpoints" in verdict["reason"]


def test_too_short_a_run_is_said_to_be_too_short(tmp_path, capsys):
    run = language_run(tmp_path)
    for step in range(21, STEPS + 1):
        (run.folder / f"checkpoint-{step}").rename(tmp_path / f"gone-{step}")
    verdict = judged(run, capsys)
    assert verdict["certainty"] == "too few" and "step 32" in verdict["reason"] and verdict["keep"] is None


def test_the_table_and_the_page(tmp_path, capsys):
    run = language_run(tmp_path)
    page = tmp_path / "page.html"
    assert main([str(run.folder), "--base", str(run.base), "--html", str(page)]) == 0
    output = capsys.readouterr().out
    assert sum(line.rstrip().endswith("keep") for line in output.splitlines()) == 1
    assert "stable rank" in output and "Certainty: exact" in output
    assert "Checkpoints" in page.read_text() and "<svg" in page.read_text()


def _lose_a_tensor(run):
    file = run.base / "model-00002-of-00002.safetensors"
    tensors = load_file(str(file))
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    save_file(tensors, str(file))


def _quantise(run):
    file = run.base / "model-00002-of-00002.safetensors"
    tensors = load_file(str(file))
    save_file(
        {name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8) for name, tensor in tensors.items()}, str(file)
    )


def _corrupt_base(run):
    (run.base / "model-00002-of-00002.safetensors").write_bytes(b"nothing")


def _corrupt_all(run):
    for file in run.folder.rglob("adapter_model.safetensors"):
        file.write_bytes(b"nothing")


def _empty(run):
    run.folder = run.root / "empty"
    run.folder.mkdir()


def _no_base(run):
    run.base = run.root / "nowhere"


@pytest.mark.parametrize(
    "damage, message",
    [
        (_lose_a_tensor, "no weight for 1 of 3 LoRA layers: lm layer model.layers.1.self_attn.v_proj"),
        (_quantise, "unquantised"),
        (_corrupt_base, "model-00002-of-00002.safetensors cannot be read"),
        (_corrupt_all, "no checkpoint can be read"),
        (_empty, "holds no LoRA checkpoints"),
        (_no_base, "no base at"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(tmp_path, capsys, damage, message):
    run = language_run(tmp_path, every=20)
    damage(run)
    assert main([str(run.folder), "--base", str(run.base)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


def test_two_runs_in_one_folder_are_refused(tmp_path, capsys):
    for name in ("red-000001", "blue-000001"):
        save_file({"lora_unet_a.lora_down.weight": torch.ones(1, 2)}, str(tmp_path / f"{name}.safetensors"))
    assert main([str(tmp_path), "--base", str(tmp_path)]) == 2
    assert "2 runs (blue, red)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "original, name",
    [
        (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        ),
        ("input_blocks_3_0_op", "down_blocks_0_downsamplers_0_conv"),
        ("input_blocks_11_0_out_layers_3", "down_blocks_3_resnets_1_conv2"),
        ("middle_block_2_emb_layers_1", "mid_block_resnets_1_time_emb_proj"),
        ("output_blocks_2_1_conv", "up_blocks_0_upsamplers_0_conv"),
        ("output_blocks_5_2_conv", "up_blocks_1_upsamplers_0_conv"),
        ("output_blocks_11_1_proj_out", "up_blocks_3_attentions_2_proj_out"),
        ("time_embed_2", "time_embedding_linear_2"),
    ],
)
def test_original_unet_names_of_sd_1(original, name):
    assert unet_layer_name(original, 2) == name
    assert unet_layer_name(name, 2) == name


def test_open_clip_rows_of_a_fused_tensor(tmp_path):
    """SD 2.x files keep queries, keys and values of the text encoder in one tensor."""
    fused = torch.randn(18, 6)
    prefix = "cond_stage_model.model.transformer.resblocks.0"
    tensors = {
        f"{prefix}.attn.in_proj_weight": fused,
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 2),
    }
    save_file(tensors, str(tmp_path / "sd2.safetensors"))
    base = Base(tmp_path / "sd2.safetensors")
    key = base.find("te1", "text_model_encoder_layers_0_self_attn_k_proj")
    down = torch.randn(2, 6)
    assert torch.allclose(FileWeight(base.stored[key], 6, 6, False, BlockBuffer()).project(down), fused[6:12] @ down.T)


MEMORY_PROGRAM = """
import resource, sys
import judge_checkpoints
import torch
ones = torch.ones(64, 64)
torch.linalg.svdvals(ones @ torch.linalg.qr(ones, mode="r")[1])  # the libraries' own buffers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert judge_checkpoints.main(sys.argv[1:]) == 0
print("grown", 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_the_base_is_never_in_memory(tmp_path):
    """A base of 96 MB whose largest weight has 16 MB in float32, read in shards."""
    side, layers = 2048, 12
    generator = torch.Generator().manual_seed(0)
    base, adapter = tmp_path / "base", tmp_path / "adapters" / "checkpoint-1"
    base.mkdir(), adapter.mkdir(parents=True)
    weight_map, lora = {}, {}
    weight = torch.randn(side, side, generator=generator).to(torch.bfloat16)
    for layer in range(layers):
        name = f"layers.{layer}.q_proj"
        save_file({f"{name}.weight": weight}, str(base / f"model-{layer}.safetensors"))
        weight_map[f"{name}.weight"] = f"model-{layer}.safetensors"
        for side_name, shape in (("A", (4, side)), ("B", (side, 4))):
            lora[f"base_model.model.{name}.lora_{side_name}.weight"] = torch.randn(*shape, generator=generator)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file(lora, str(adapter / "adapter_model.safetensors"))
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4}))
    command = [sys.executable, "-c", MEMORY_PROGRAM, str(adapter.parent), "--base", str(base), "--steps_per_epoch", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=JUDGE.parent)
    assert result.returncode == 0, result.stderr
    grown_bytes = int(re.search(r"grown (\d+)", result.stdout)[1])
    adapter_bytes = sum(tensor.numel() * 4 for tensor in lora.values())
    assert grown_bytes < 2 * 4 * side * side + adapter_bytes


def test_epochs_in_the_names_are_enough_to_list_them_and_too_sparse_to_judge(tmp_path, capsys):
    """Files without any metadata (--no_metadata): the epochs are the steps."""
    run = diffusion_run(tmp_path, "kohya")
    for file in run.folder.glob("*.safetensors"):
        tensors = load_file(str(file))
        file.unlink()
        if "step" not in file.name:
            save_file(tensors, str(file))
    verdict = judged(run, capsys)
    assert [row["step"] for row in verdict["checkpoints"]] == [1, 2, 3, 4, 5]
    assert verdict["certainty"] == "too sparse"
    assert "at which step" in verdict["not_judged"]["toy.safetensors"]


def test_kept_adapters_count_by_the_step_in_their_metadata(tmp_path, capsys):
    run = language_run(tmp_path)
    last = run.folder / f"checkpoint-{STEPS}"
    last.rename(run.folder / "adapter-last")
    adapter = run.folder / "adapter-last" / "adapter_model.safetensors"
    save_file(load_file(str(adapter)), str(adapter), {"es_lora": json.dumps({"last_step": STEPS, "kept_step": 20})})
    verdict = judged(run, capsys)
    assert verdict["checkpoints"][-1]["name"] == "adapter-last" and verdict["checkpoints"][-1]["step"] == STEPS
    last = last.with_name("adapter-last").rename(run.folder / "adapter")
    assert "at which step" in judged(run, capsys)["not_judged"]["adapter"]  # the kept one, or the last one?
    (run.folder / "adapter-turning-point").mkdir()
    verdict = judged(run, capsys)
    assert verdict["checkpoints"][-1]["name"] == "adapter" and verdict["checkpoints"][-1]["step"] == STEPS
    assert verdict["certainty"].startswith("exact")


def test_a_run_stopped_early_has_its_last_weights_under_last(tmp_path, capsys):
    """es_lora_ldm.py keeps the turning point under the normal name, whose ss_steps is the step of
    the stop."""
    run = diffusion_run(tmp_path, "kohya")
    (run.folder / "toy.safetensors").rename(run.folder / "toy-last.safetensors")
    (run.folder / "toy.safetensors").write_bytes((run.folder / "toy-step00000021.safetensors").read_bytes())
    verdict = judged(run, capsys)
    assert verdict["checkpoints"][-1]["name"] == "toy-last.safetensors"
    assert "toy.safetensors" in verdict["not_judged"]
    assert_same_decision(verdict, run)


def test_a_rule_that_needs_more_than_weights_is_refused(tmp_path, capsys, monkeypatch):
    from es_lora import rules

    class ByLoss(rules.StopRule):
        name, needs = "by-loss", ("loss",)

    monkeypatch.setitem(rules.RULES, "by-loss", ByLoss)
    run = language_run(tmp_path, every=20)
    assert main([str(run.folder), "--base", str(run.base), "--rule", "by-loss"]) == 2
    assert "rule by-loss needs loss" in capsys.readouterr().err


def test_the_scale_of_a_diffusers_file_is_in_its_metadata(tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = {}
    for part in ("unet.a", "text_encoder.b"):
        tensors[f"{part}.lora_A.weight"], tensors[f"{part}.lora_B.weight"] = torch.ones(2, 3), torch.ones(3, 2)
    save_file(tensors, str(file), {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.r": 2})})
    modules = read_adapter(file).modules
    assert modules["unet", "a"].scale == 4 and modules["te1", "b"].scale == 1

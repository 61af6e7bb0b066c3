"""EarlyStopCallback in trainers that are not this project's: transformers' Trainer, TRL's
SFTTrainer, DDP, other callbacks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import quiet_libraries  # noqa: F401
import torch
from early_stop_callback import EarlyStopCallback
from literal_average import is_average
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from es_lora.history import read_history
from es_lora.hugging_face.peft_models import peft_lora_layers, trainable_tensors
from es_lora.settings import StopSettings

TREE = Path(__file__).resolve().parents[3] / "lora-llm"
TARGETS = ["q_proj", "v_proj", "down_proj"]


def samples(count, seed=0):
    """Random token sequences of one length."""
    tokens = torch.randint(5, 400, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


def lora(base, **options):
    set_seed(0)
    loading = options.pop("loading", {"dtype": torch.float32})
    return get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, **loading), LoraConfig(r=4, target_modules=TARGETS, **options)
    )


def trained(model, output, callback=None, others=(), resume=None, **options):
    """A plain Trainer after train(): 24 steps at most, 4 an epoch, a checkpoint at each; M = 2, so
    it stops after 8 or more."""
    settings = {"max_steps": 24, "save_strategy": "steps", "save_steps": 1, "save_only_model": True, "logging_steps": 1}
    settings.update(
        {"per_device_train_batch_size": 4, "learning_rate": 5e-3, "report_to": "none", "use_cpu": True, **options}
    )
    callback = callback or EarlyStopCallback(stop_rule="second-valley", cs_interval=1, window_size=2)
    trainer = Trainer(
        model,
        TrainingArguments(str(output), **settings),
        default_data_collator,
        train_dataset=samples(16),
        eval_dataset=samples(4, seed=1),
        callbacks=[callback, *others],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(output / "final"))
    return trainer


def result_of(output):
    return json.loads((output / "result.json").read_text())


def tensors_of(folder):
    """{file and name: tensor} of all adapters in a folder."""
    files = sorted(Path(folder).rglob("adapter_model.safetensors"))
    assert files
    return {(str(file.relative_to(folder)), name): t for file in files for name, t in load_file(str(file)).items()}


def same(a, b):
    a, b = tensors_of(a), tensors_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_stopped(output):
    """The saved model is bit for bit the checkpoint of the turning step, adapter-last that of the
    last step."""
    result = result_of(output)
    assert result["outcome"] == "stopped_early"
    assert result["held_step"] < result["last_step"] == result["detected_step"] < result["total_steps"]
    assert same(output / "final", output / f"checkpoint-{result['held_step']}")
    assert not same(output / "final", output / f"checkpoint-{result['last_step']}")
    return result


def verdict_in_log(trainer):
    return [entry["early_stop"] for entry in trainer.state.log_history if "early_stop" in entry][-1]


# ------------------------------------------------------------------------ kinds of trainer and LoRA


@pytest.fixture(scope="module", params=["float32", "4-bit"])
def sft_output(request, random_base, text_files, tmp_path_factory):
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    output = tmp_path_factory.mktemp("sft") / "run"
    data = load_dataset("json", data_files=str(text_files["train"]), split="train")
    data = data.rename_columns({"input": "prompt", "output": "completion"})
    loading = {"dtype": torch.float32}
    if request.param == "4-bit":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        loading = {"quantization_config": config, "device_map": {"": "cpu"}, "dtype": torch.float32}
    settings = {
        "max_steps": 24,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_only_model": True,
        "learning_rate": 5e-3,
    }
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(random_base, **loading),
        SFTConfig(str(output), per_device_train_batch_size=4, bf16=False, use_cpu=True, report_to="none", **settings),
        train_dataset=data,
        peft_config=LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
        callbacks=[EarlyStopCallback(stop_rule="second-valley", cs_interval=1, window_size=2)],
    )
    trainer.train()
    trainer.save_model(str(output / "final"))
    return output, trainer


def test_sft_trainer_stops_restores_and_saves_the_turning_point(sft_output):
    output, trainer = sft_output
    result = check_stopped(output)
    assert same(output / "adapter-last", output / f"checkpoint-{result['last_step']}")
    assert verdict_in_log(trainer).startswith(result["verdict"])
    assert "EarlyStopCallback (rule second-valley) stopped the training" in verdict_in_log(trainer)
    assert result["reason"] in [entry.get("early_stop") for entry in trainer.state.log_history]


def test_sft_trainer_run_leaves_history_report_and_no_snapshots(sft_output):
    output, _ = sft_output
    history, result = read_history(output), result_of(output)
    assert [record["step"] for record in history.records] == list(range(1, result["last_step"] + 1))
    assert all(record["cs"]["lm"] != 0 and record["lr"] > 0 for record in history.records)
    assert result["verdict"] in (output / "report.html").read_text()
    assert not (output / "cs_snapshots").exists()


KINDS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_plain_trainer_restores_everything_that_was_trained(random_base, tmp_path, kind):
    output = tmp_path / "run"
    trainer = trained(lora(random_base, **KINDS[kind]), output)
    result = check_stopped(output)
    assert same(output / "adapter-last", output / f"checkpoint-{result['last_step']}")
    names = {name for _, name in tensors_of(output / "final")}
    assert (kind == "dora") == any("lora_magnitude_vector" in name for name in names)
    assert (kind == "modules_to_save") == any("lm_head" in name for name in names)
    losses = [record["loss"] for record in read_history(output).records]
    assert sum(loss is not None for loss in losses) >= len(losses) - 1
    assert all(torch.isfinite(tensor).all() for tensor in trainable_tensors(trainer.model).values())


def test_for_dora_the_cosine_is_that_of_b_a(random_base, tmp_path):
    """Recomputed in float64 from the checkpoint and the base, without the magnitudes."""
    output = tmp_path / "run"
    trained(lora(random_base, use_dora=True), output, max_steps=3)
    base = AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float64)
    saved = load_file(str(output / "checkpoint-3" / "adapter_model.safetensors"))
    values = []
    for name in saved:
        if name.endswith("lora_A.weight"):
            update = saved[name.replace("lora_A", "lora_B")].double() @ saved[name].double()  # (out, in)
            weight = base.get_submodule(name[len("base_model.model.") : -len(".lora_A.weight")]).weight
            values.append(torch.nn.functional.cosine_similarity(weight, update, dim=1).mean().item())
    assert len(values) == 6
    assert read_history(output).records[-1]["cs"]["lm"] == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_with_several_adapters_the_active_one_is_watched_and_restored(random_base, tmp_path):
    model = lora(random_base)
    model.add_adapter("second_one", LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("second_one")
    assert all(layer.down.shape[0] == 2 for layer in peft_lora_layers(model))
    assert all(".second_one." in name for name in trainable_tensors(model))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    output = tmp_path / "run"
    trained(model, output)
    result = check_stopped(output)
    live = dict(model.named_parameters())
    assert frozen and all(torch.equal(live[name], tensor) for name, tensor in frozen.items())
    last = tensors_of(output / "adapter-last")
    assert {file for file, _ in last} == {"second_one/adapter_model.safetensors"}
    checkpoint = tensors_of(output / f"checkpoint-{result['last_step']}")
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in last.items())


def test_an_adapter_that_transformers_itself_has_added(random_base, tmp_path):
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float32)
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS))
    output = tmp_path / "run"
    trained(model, output)
    result = check_stopped(output)
    assert same(output / "adapter-last", output / f"checkpoint-{result['last_step']}")


def test_an_average_is_what_the_model_holds_and_is_saved(random_base, tmp_path):
    output = tmp_path / "run"
    callback = EarlyStopCallback(stop_rule="second-valley", cs_interval=1, window_size=2, average=0.25)
    trained(lora(random_base), output, callback)
    result = result_of(output)
    steps = [tensors_of(output / f"checkpoint-{step}") for step in range(1, result["last_step"] + 1)]
    assert result["outcome"] == "stopped_early"
    assert is_average(tensors_of(output / "final"), steps[: result["keep_step"]], 0.25)
    assert same(output / "adapter-last", output / f"checkpoint-{result['last_step']}")


@pytest.mark.parametrize("load_best", [False, True])
def test_at_the_end_of_the_budget_the_model_holds_its_average_unless_the_best_was_loaded(
    random_base, tmp_path, load_best
):
    output, more = tmp_path / "run", {"max_steps": 5, **(BEST if load_best else {})}
    callback = EarlyStopCallback(cs_interval=1, window_size=2, stop_rule="second-valley", average=0.25)
    trainer = trained(lora(random_base), output, callback, **more)
    if load_best:
        assert same(output / "final", trainer.state.best_model_checkpoint) and not (output / "adapter-last").exists()
        return
    steps = [tensors_of(output / f"checkpoint-{step}") for step in range(1, 6)]
    assert is_average(tensors_of(output / "final"), steps, 0.25) and same(
        output / "adapter-last", output / "checkpoint-5"
    )
    assert "The model holds their average; the weights of the last step, 5, are in adapter-last." in verdict_in_log(
        trainer
    )


def test_without_early_stop_the_turning_point_lies_beside_the_last_weights(random_base, tmp_path):
    output = tmp_path / "run"
    callback = EarlyStopCallback(early_stop=False, stop_rule="second-valley", cs_interval=1, window_size=2)
    trained(lora(random_base), output, callback)
    result = result_of(output)
    assert (result["outcome"], result["held_step"], result["last_step"]) == ("budget_reached", 24, 24)
    assert same(output / "final", output / "checkpoint-24")
    assert same(output / "adapter-turning-point", output / f"checkpoint-{result['keep_step']}")


class Interrupted(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_interrupted_and_resumed_equals_uninterrupted(random_base, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trained(lora(random_base), whole, save_only_model=False)
    with pytest.raises(KeyboardInterrupt):
        trained(lora(random_base), broken, others=[Interrupted()], save_only_model=False)
    assert not (broken / "result.json").exists()
    trained(lora(random_base), broken, save_only_model=False, resume=True)
    assert (broken / "cs_history.jsonl").read_text() == (whole / "cs_history.jsonl").read_text()
    assert check_stopped(broken)["verdict"] == result_of(whole)["verdict"]
    assert same(broken / "final", whole / "final") and same(broken / "adapter-last", whole / "adapter-last")
    kept, steps = result_of(whole)["held_step"], result_of(whole)["last_step"]
    trained(lora(random_base), broken, save_only_model=False, resume=True)  # once more, after its stop
    again = result_of(broken)
    assert (again["outcome"], again["held_step"], again["last_step"]) == ("stopped_early", kept, steps + 1)
    assert same(broken / "final", whole / "final")


# --------------------------------------------------------------------------- beside other callbacks

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
BEST = {**EVALUATED, "load_best_model_at_end": True}


def impatient():
    """Stops at the second evaluation: no improvement is large enough."""
    return EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9)


def test_where_early_stopping_callback_stops_the_weights_are_left_and_it_is_named(random_base, tmp_path, capsys):
    output = tmp_path / "run"
    trainer = trained(lora(random_base), output, others=[impatient()], **EVALUATED)
    result = result_of(output)
    assert (result["outcome"], result["last_step"], result["held_step"]) == ("stopped_by_other", 2, 2)
    assert same(output / "final", output / "checkpoint-2")
    assert "Stopped at step 2 of 24 by EarlyStoppingCallback" in result["verdict"]
    assert verdict_in_log(trainer).startswith(result["verdict"])
    assert result["verdict"] in capsys.readouterr().out
    assert not (output / "adapter-last").exists()


def test_the_best_model_that_another_callback_left_is_not_overwritten(random_base, tmp_path):
    output = tmp_path / "run"
    options = {
        **BEST,
        "greater_is_better": True,
    }  # random tokens are soon learnt by heart: the worst loss is not the last
    trainer = trained(lora(random_base), output, others=[impatient()], **options)
    result, best = result_of(output), trainer.state.best_global_step
    assert result["outcome"] == "stopped_by_other" and result["held_step"] == best
    assert same(output / "final", output / f"checkpoint-{best}")
    assert f"weights of step {best}, loaded by load_best_model_at_end; they are left as they are" in verdict_in_log(
        trainer
    )


def test_where_the_rule_stops_the_turning_point_replaces_the_best_model_and_says_so(random_base, tmp_path):
    output = tmp_path / "run"
    patient = EarlyStoppingCallback(early_stopping_patience=100)
    trainer = trained(lora(random_base), output, others=[patient], **BEST)
    result, best = check_stopped(output), trainer.state.best_global_step
    assert best not in (None, result["held_step"])
    assert f"It replaces step {best}, which load_best_model_at_end had loaded" in verdict_in_log(trainer)
    assert same(output / "adapter-last", output / f"checkpoint-{result['last_step']}")
    heldout = dict(read_history(output).heldout())
    trainer.evaluate()  # of the weights kept: no point of the run's curve
    assert dict(read_history(output).heldout()) == heldout and len(heldout) == result["last_step"]


def test_a_run_to_its_budget_says_so(random_base, tmp_path):
    output = tmp_path / "run"
    trainer = trained(lora(random_base), output, max_steps=3)
    assert result_of(output)["outcome"] == "no_turning_point"
    assert verdict_in_log(trainer).startswith("Trained to its budget of 3 steps. No evidence of overfitting yet")


def test_a_caller_that_reports_itself_finds_the_snapshots_and_no_files(random_base, tmp_path):
    output = tmp_path / "run"
    callback = EarlyStopCallback(stop_rule="second-valley", cs_interval=1, window_size=2, report=False)
    trained(lora(random_base), output, callback)
    assert same(output / "final", output / f"checkpoint-{callback.decision.keep_step}")
    assert not (output / "result.json").exists() and not (output / "report.html").exists()
    assert callback.monitor.load_snapshot(callback.decision.keep_step)


def test_a_flag_that_is_unknown_or_wrong_is_refused_when_the_callback_is_made():
    with pytest.raises(TypeError, match="takes no stop_rul; did you mean stop_rule?"):
        EarlyStopCallback(stop_rul="fixed-epochs")
    with pytest.raises(TypeError, match="takes no shadows"):
        EarlyStopCallback(shadows=2)
    with pytest.raises(ValueError, match="--window_size 0: give a number .*--stop_rule guess: .*choose one of"):
        EarlyStopCallback(stop_rule="guess", window_size=0)
    assert EarlyStopCallback(stop_rule="fixed-epochs", rule_value=2).settings.early_stop
    assert EarlyStopCallback(StopSettings(), valley=3, stop_rule="nth-valley").settings.rule_value == 3


def test_after_a_divergence_the_model_holds_finite_weights(random_base, tmp_path):
    output = tmp_path / "run"
    trained(lora(random_base), output, learning_rate=1e30, max_grad_norm=0.0)
    result = result_of(output)
    assert result["outcome"] == "diverged" and "diverged" in result["verdict"]
    if result["held_step"] is not None:
        assert same(output / "final", output / f"checkpoint-{result['held_step']}")
        assert all(tensor.isfinite().all() for tensor in tensors_of(output / "final").values())


def test_a_model_without_lora_and_a_used_folder_are_refused(random_base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float32)
    with pytest.raises(ValueError, match="no LoRA layer to measure"):
        trained(model, tmp_path / "plain", max_steps=1)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "cs_history.jsonl").write_text("of another run\n")
    with pytest.raises(FileExistsError, match="choose another output folder"):
        trained(lora(random_base), tmp_path / "used", max_steps=1)
    assert (tmp_path / "used" / "cs_history.jsonl").read_text() == "of another run\n"


# ------------------------------------------------------------------------------------ two processes


def test_two_processes_stop_together_and_hold_the_same_weights(random_base, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(TREE), str(Path(__file__).parent), str(TREE.parent / "tests")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*command, __file__, str(random_base), str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = result_of(tmp_path / "run")
    steps = [tensors_of(tmp_path / "run" / f"checkpoint-{step}") for step in range(1, result["last_step"] + 1)]
    assert is_average(tensors_of(tmp_path / "run" / "final"), steps[: result["keep_step"]], 0.25)
    ranks = [load_file(str(tmp_path / f"rank-{rank}.safetensors")) for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys() and all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    assert done.stdout.count(result["verdict"]) == 1


def one_of_two_processes(base, output):
    from safetensors.torch import save_file

    callback = EarlyStopCallback(stop_rule="second-valley", cs_interval=1, window_size=2, average=0.25)
    trainer = trained(lora(base), output, callback, ddp_backend="gloo", per_device_train_batch_size=2)
    tensors = {name: tensor.detach().contiguous() for name, tensor in trainable_tensors(trainer.model).items()}
    save_file(tensors, str(output.parent / f"rank-{trainer.args.process_index}.safetensors"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    one_of_two_processes(Path(sys.argv[1]), Path(sys.argv[2]))

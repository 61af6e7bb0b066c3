"""4-bit weights stay what they were: before and after an evaluation, and where bitsandbytes has
repacked them."""

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from early_stop_callback import EarlyStopCallback
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from base.layers import check_dequantisation
from base.loading import load_base
from es_lora.hugging_face.peft_models import trainable_tensors
from es_lora.weights import dequantised, keep_as_loaded
from settings.parsing import parse_arguments
from training.setup import base_spec

TOKENS = torch.randint(5, 400, (2, 12), generator=torch.Generator().manual_seed(0))  # (B, T)
QUANTISATIONS = [("nf4", True), ("nf4", False), ("fp4", True)]  # (kind, double quantisation)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def adapted(base):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def load(folder, kind="nf4", double=True):
    """As someone else's trainer loads it."""
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=torch.float32)


def repack(model):
    """What bitsandbytes does in a forward pass in evaluation mode, on the processors where it does
    that."""
    for layer in layers_of(model):
        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
        layer.quant_state = layer.weight.quant_state


def gradients(model):
    model.train()
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: tensor.grad.clone() for name, tensor in trainable_tensors(model).items()}


def evaluate(model):
    with torch.no_grad():
        model.eval()(input_ids=TOKENS)


def test_an_evaluation_changes_neither_weights_nor_gradients(random_base, tmp_path):
    words = [
        "--model_name_or_path",
        str(random_base),
        "--output_dir",
        str(tmp_path / "run"),
        "--bits",
        "4",
        "--use_cpu",
    ]
    model = adapted(load_base(base_spec(parse_arguments(words))))
    weights, before = [dequantised(layer).clone() for layer in layers_of(model)], gradients(model)
    evaluate(model)
    assert all(torch.equal(dequantised(layer), weight) for layer, weight in zip(layers_of(model), weights))
    after = gradients(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("kind", "double"), QUANTISATIONS)
def test_a_repacked_weight_is_read_as_what_it_was(random_base, kind, double):
    model = load(random_base, kind, double)
    before = [dequantize_4bit(layer.weight.data, layer.weight.quant_state).clone() for layer in layers_of(model)]
    repack(model)
    for layer, weight in zip(layers_of(model), before):
        read = dequantised(layer)
        assert read.dtype == weight.dtype and (read - weight).norm() < 0.005 * weight.norm()  # scales rounded to bf16
    read = [dequantised(layer).clone() for layer in layers_of(model)]
    keep_as_loaded(model)
    for layer, weight in zip(layers_of(model), read):
        assert not layer.weight.quant_state.packing_format_for_cpu and layer.weight.shape[1] == 1
        assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), weight)
        assert layer.quant_state is layer.weight.quant_state


def test_another_trainer_trains_through_weights_that_an_evaluation_had_repacked(random_base, tmp_path):
    moved = []
    for name in ("as loaded", "repacked"):
        model = adapted(load(random_base))
        before = {name: tensor.detach().clone() for name, tensor in trainable_tensors(model).items()}
        if name == "repacked":
            repack(model)
        options = {
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 1.0,
            "eval_on_start": True,
            "eval_strategy": "epoch",
        }
        arguments = TrainingArguments(
            str(tmp_path / name), use_cpu=True, report_to="none", save_strategy="no", **options
        )
        rows = [{"input_ids": row, "labels": row} for row in TOKENS]
        callback = EarlyStopCallback(cs_interval=1, window_size=2)
        Trainer(
            model, arguments, default_data_collator, train_dataset=rows, eval_dataset=rows, callbacks=[callback]
        ).train()
        moved.append({name: tensor.detach() - before[name] for name, tensor in trainable_tensors(model).items()})
    first = [name for name in moved[0] if "layers.0." in name]  # whose gradient comes through the other layers
    assert first and all((moved[1][name] - moved[0][name]).norm() < 0.05 * moved[0][name].norm() for name in first)


def test_rows_that_are_no_whole_blocks_are_refused_where_this_machine_reads_them_wrongly(tmp_path):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path)
    stored, model = AutoModelForCausalLM.from_pretrained(tmp_path), load(tmp_path)
    names = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    errors = {name: dequantised(model.get_submodule(name)) - stored.get_submodule(name).weight for name in names}
    wrong = [name for name, error in errors.items() if error.norm() > 0.15 * stored.get_submodule(name).weight.norm()]
    assert "model.layers.0.mlp.down_proj" not in wrong  # its rows are a block
    if not wrong:
        return check_dequantisation(model)
    with pytest.raises(
        ValueError, match=f"reads layer {wrong[0]} wrongly.*32 inputs are no multiple of 64; use --bits 8, 16"
    ):
        check_dequantisation(model)

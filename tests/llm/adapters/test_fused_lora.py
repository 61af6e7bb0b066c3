"""The fused pass against PEFT: the same outputs and gradients as adapters trained alone, and
adapters that PEFT reads."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

from adapters.fused_lora import FusedLora
from base.loading import load_base
from cs_fluctuation import measure_layers
from es_lora.hugging_face.peft_models import peft_lora_layers
from settings.parsing import parse_arguments
from training.setup import base_spec

ADAPTERS = {  # name: (rank, alpha, target modules, rows in the batch)
    "small": (2, 16, "attention", 3),
    "large": (8, 4, "all", 1),
    "narrow": (1, 2, "q_proj,down_proj", 2),
}
ROWS = [(name, values[-1]) for name, values in ADAPTERS.items()]


@pytest.fixture
def base_in(random_base, tmp_path):
    """base_in(bits): the random base, frozen, in training mode."""

    def base(bits):
        flags = ["--model_name_or_path", str(random_base), "--bits", str(bits), "--output_dir", str(tmp_path / "run")]
        model = load_base(base_spec(parse_arguments([*flags, "--use_cpu", "--gradient_checkpointing", "False"])))
        return model.requires_grad_(False).train()

    return base


def batch(rows=6, length=10):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 300, (rows, length), generator=generator)  # (rows, T)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0  # one short row
    return {"input_ids": ids, "attention_mask": mask}


def randomise(adapter, seed):
    """B is zero at the start, and so would be most gradients."""
    generator = torch.Generator().manual_seed(seed)
    for up in adapter.up.values():
        up.data.normal_(0, 0.1, generator=generator)
    return adapter


def score(logits):
    """A number that depends on every logit, each row's by itself."""
    return (logits.float() ** 2).mean(dim=(1, 2)).sum()


def add_all(fused, dropout=0.0):
    for index, (name, (rank, alpha, targets, _)) in enumerate(ADAPTERS.items()):
        randomise(fused.add(name, rank=rank, alpha=alpha, target_modules=targets, dropout=dropout, seed=index), index)
    return fused


def part(inputs, name):
    start = sum(count for other, count in ROWS[: list(ADAPTERS).index(name)])
    return {key: tensor[start : start + ADAPTERS[name][-1]] for key, tensor in inputs.items()}


def peft_alone(base, adapter, inputs):
    """(logits, {PEFT's name: gradient}) of PEFT's own forward and backward pass with this adapter
    only."""
    model = get_peft_model(base, adapter.peft_config()).train(base.training)
    for name, parameter in model.named_parameters():
        key = name.replace(".default", "")
        if key in adapter.state_dict():
            parameter.data.copy_(adapter.state_dict()[key])
            parameter.requires_grad_(True)
    logits = model(**inputs).logits
    score(logits).backward()
    grads = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.unload()
    return logits, grads


def fused_gradients(adapter):
    return {key: matrix.grad for key, matrix in zip(adapter.state_dict(), adapter.parameters())}


@pytest.mark.parametrize("bits", (4, 8, 16, 32))
def test_outputs_and_gradients_are_those_of_peft_adapters_alone(base_in, bits):
    base, inputs = base_in(bits), batch()
    fused = add_all(FusedLora(base))
    with fused.rows(ROWS):
        logits = base(**inputs).logits
        score(logits).backward()
    fused.close()
    # In 16 bits PEFT adds in the base's type, and 8-bit rows are rounded by the largest value of
    # their batch.
    tolerance = {4: 1e-5, 8: 3e-2, 16: 3e-2, 32: 1e-5}[bits]
    start = 0
    for name, adapter in fused.adapters.items():
        alone, grads = peft_alone(base, adapter, part(inputs, name))
        own = fused_gradients(adapter)
        assert own.keys() == grads.keys() and len(own) == 2 * len(adapter.down)
        scale = alone.float().abs().max().item()
        torch.testing.assert_close(logits[start : start + len(alone)], alone, rtol=0, atol=tolerance * scale)
        for key, gradient in grads.items():
            torch.testing.assert_close(
                own[key], gradient, rtol=0, atol=tolerance * gradient.abs().max().item(), msg=key
            )
        start += len(alone)
    assert all(parameter.grad is None for parameter in base.parameters())


NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1}
CONFIGS = {
    "opt": lambda: transformers.OPTConfig(vocab_size=300, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, **SHAPE),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_inner=64, n_layer=2, n_head=2, n_positions=64, **NO_DROPOUT
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(vocab_size=300, hidden_size=32, intermediate_size=64, **SHAPE),
}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_layers_that_are_stored_or_called_otherwise(architecture):
    """GPT-2's transposed weights; OPT, which flattens its batch before some layers."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture]()).requires_grad_(False).eval()
    inputs = batch()
    fused = FusedLora(base)
    for index, name in enumerate(ADAPTERS):
        randomise(fused.add(name, rank=4, alpha=8, seed=index), index)
    with fused.rows(ROWS):
        logits = base(**inputs).logits
        score(logits).backward()
    fused.close()
    for name in ADAPTERS:
        alone, grads = peft_alone(base, fused.adapters[name], part(inputs, name))
        start = sum(count for other, count in ROWS[: list(ADAPTERS).index(name)])
        torch.testing.assert_close(logits[start : start + len(alone)], alone, rtol=1e-4, atol=1e-5)
        for key, gradient in fused_gradients(fused.adapters[name]).items():
            torch.testing.assert_close(gradient, grads[key], rtol=1e-4, atol=1e-6)


def test_a_fresh_adapter_changes_nothing_and_leaves_the_random_state(base_in):
    base, inputs = base_in(32), batch()
    plain, state = base(**inputs).logits, torch.get_rng_state()
    fused = FusedLora(base)
    adapter = fused.add("fresh", rank=4, alpha=8, dropout=0.5, seed=3)
    again = fused.add("again", rank=4, alpha=8, seed=3)
    other = fused.add("other", rank=4, alpha=8, seed=4)
    with fused.rows([("fresh", 6)]):
        assert torch.equal(base(**inputs).logits, plain)
    assert torch.equal(torch.get_rng_state(), state)
    first = next(iter(adapter.down))
    assert torch.equal(adapter.down[first], again.down[first]) and not torch.equal(
        adapter.down[first], other.down[first]
    )
    bound = 1 / adapter.down[first].shape[1] ** 0.5  # of Kaiming's uniform distribution with a = sqrt(5)
    assert 0.9 * bound < adapter.down[first].abs().max() <= bound


def test_rows_without_an_adapter_and_batches_outside_the_block_see_the_base(base_in):
    base, inputs = base_in(32), batch()
    plain = base(**inputs).logits
    fused = add_all(FusedLora(base))
    with fused.rows([(None, 2), ("large", 4)]):
        mixed = base(**inputs).logits
    torch.testing.assert_close(mixed[:2], plain[:2], rtol=0, atol=1e-6)
    assert (mixed[2:] - plain[2:]).abs().amax(dim=(1, 2)).min() > 1e-3
    assert torch.equal(base(**inputs).logits, plain)
    fused.close()
    with fused.rows(ROWS):
        assert torch.equal(base(**inputs).logits, plain)


@pytest.mark.parametrize("reentrant", (False, True))
def test_dropout_draws_the_same_masks_again_under_gradient_checkpointing(base_in, reentrant):
    base, inputs = base_in(32), batch()
    kept = []
    for checkpointing in (False, True):
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            base.enable_input_require_grads()
        fused = add_all(FusedLora(base), dropout=0.3)
        with fused.rows(ROWS):
            logits = base(**inputs, use_cache=False).logits
            score(logits).backward()
        fused.close()
        kept.append((logits, [fused_gradients(adapter) for adapter in fused.adapters.values()]))
    assert torch.equal(kept[0][0], kept[1][0])
    for plain, checkpointed in zip(kept[0][1], kept[1][1]):
        for key in plain:
            torch.testing.assert_close(plain[key], checkpointed[key], rtol=1e-6, atol=1e-9)


def test_dropout_is_new_in_every_pass_alone_as_in_company_and_off_in_evaluation(base_in):
    base, inputs = base_in(32), batch()
    fused = add_all(FusedLora(base), dropout=0.5)
    large = fused.adapters["large"]
    with fused.rows(ROWS):
        company = base(**inputs).logits[3:4]
    with fused.rows([("large", 1)]):
        second = base(**part(inputs, "large")).logits
    large.passes = 0  # as a resumed run sets it
    with fused.rows([("large", 1)]):
        alone = base(**part(inputs, "large")).logits
    torch.testing.assert_close(alone, company, rtol=0, atol=1e-5)
    assert (second - alone).abs().max() > 1e-3
    base.eval()
    with fused.rows([("large", 1)]):
        evaluated = base(**part(inputs, "large")).logits
    torch.testing.assert_close(evaluated, peft_alone(base, large, part(inputs, "large"))[0], rtol=0, atol=1e-5)


def test_dropout_keeps_the_gradient_of_what_it_computed():
    """Against finite differences, in float64 (GPT-2 has no float32 inside), of one adapter's A and
    B."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()).requires_grad_(False).double().train()
    inputs = batch(rows=2, length=5)
    fused = FusedLora(base)
    adapter = randomise(fused.add("one", rank=2, alpha=2, target_modules="c_attn", dropout=0.4), 0)
    layer = next(iter(adapter.down))
    for matrices in (adapter.down, adapter.up):
        matrices.update({name: torch.nn.Parameter(matrix.data.double()) for name, matrix in matrices.items()})

    def loss():
        adapter.passes = 0
        with fused.rows([("one", 2)]):
            return (base(**inputs).logits ** 2).mean()

    loss().backward()
    for matrix in (adapter.down[layer], adapter.up[layer]):
        index = matrix.grad.abs().flatten().argmax()
        values = []
        for change in (1e-6, -2e-6):
            matrix.data.view(-1)[index] += change
            values.append(loss().item())
        assert matrix.grad.flatten()[index].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)
        assert abs(matrix.grad.flatten()[index]) > 1e-6


@pytest.mark.parametrize("bits", (4, 32))
def test_inside_a_peft_model_whose_own_adapter_is_disabled(base_in, bits):
    base, inputs = base_in(bits), batch()
    plain = add_all(FusedLora(base))
    with plain.rows(ROWS):
        expected = base(**inputs).logits
    plain.close()
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"]))
    fused = add_all(FusedLora(model))
    assert list(fused.adapters["large"].down) == list(plain.adapters["large"].down)
    with model.disable_adapter(), fused.rows(ROWS):
        logits = model(**inputs).logits
        score(logits).backward()
    torch.testing.assert_close(logits, expected)
    assert all(p.grad is None for p in model.parameters())
    assert all(matrix.grad is not None for adapter in fused.adapters.values() for matrix in adapter.parameters())


@pytest.mark.parametrize("bits", (4, 32))
def test_peft_loads_what_was_saved(base_in, bits, tmp_path):
    base, inputs = base_in(bits), part(batch(), "large")
    fused = add_all(FusedLora(base))
    adapter = fused.adapters["large"]
    with fused.rows([("large", 1)]):
        expected = base(**inputs).logits
    adapter.save_peft(tmp_path / "adapter", {"last_step": 7})
    fused.remove("large")
    fused.close()
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").train()
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert measure_layers(peft_lora_layers(loaded)) == measure_layers(adapter.lora_layers())
    with safe_open(str(tmp_path / "adapter" / "adapter_model.safetensors"), framework="pt") as handle:
        assert json.loads(handle.metadata()["es_lora"]) == {"last_step": 7}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (8, 4, "CAUSAL_LM")


def test_weights_are_taken_back_and_those_of_another_adapter_refused(base_in):
    fused = add_all(FusedLora(base_in(32)))
    large = fused.adapters["large"]
    saved = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    randomise(large, seed=9)
    assert any(not torch.equal(saved[name], tensor) for name, tensor in large.state_dict().items())
    large.load_state_dict(saved)
    assert all(torch.equal(saved[name], tensor) for name, tensor in large.state_dict().items())
    with pytest.raises(ValueError, match="another adapter"):
        large.load_state_dict(fused.adapters["small"].state_dict())


def test_removed_adapters_free_their_name_and_take_no_rows(base_in):
    base = base_in(32)
    fused = add_all(FusedLora(base))
    fused.remove("small")
    with pytest.raises(KeyError, match="small"), fused.rows(ROWS):
        pass
    fused.add("small", rank=3, alpha=3)
    with fused.rows([("small", 6)]):
        base(**batch())


def test_bad_input_is_refused(base_in):
    base = base_in(32)
    fused = add_all(FusedLora(base))
    with pytest.raises(ValueError, match="a name of its own"):
        fused.add("large", rank=1, alpha=1)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        fused.add("new", rank=0, alpha=1)
    with pytest.raises(ValueError, match="no linear layer is called c_attn"):
        fused.add("new", rank=1, alpha=1, target_modules=["c_attn"])
    with pytest.raises(ValueError, match="5 rows"), fused.rows([("large", 5)]):
        base(**batch())
    assert "new" not in fused.adapters

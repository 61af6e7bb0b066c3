"""The base model in 4, 8, 16 and 32 bits, where LoRA lands on it, and its CS, for seven
architectures.

Every model is random, two layers of hidden size 64. Expected layers are spelt out by hand; expected
CS values are computed by the formula from the dense weight and B A.
"""

import shutil
import weakref
from pathlib import Path

import bitsandbytes.functional as bnb_functional
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from adapters.weights import trainable_parameters
from base.layers import lora_target_names
from base.loading import fit_embeddings, load_base, load_tokenizer
from base.spec import BaseSpec
from cs_fluctuation import measure_layers
from es_lora import weights
from es_lora.hugging_face.peft_models import peft_lora_layers, trainable_tensors
from settings.parsing import parse_arguments
from training.setup import base_spec, with_lora

TINY_BASE = Path(__file__).resolve().parents[3] / "lora-llm" / "tiny_base"
LAYERS, HIDDEN, INNER, VOCABULARY = 2, 64, 128, 4096
LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
OPT_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "ffn_dim": INNER}
OPT_SHAPE.update(num_hidden_layers=LAYERS, num_attention_heads=2, max_position_embeddings=64)
NEOX_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
NEOX_SHAPE.update(num_attention_heads=2)
GPT2_SHAPE = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_inner": INNER,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_positions": 64,
}

LLAMA_NAMES = (
    "model.layers.{}.",
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
)
OPT_NAMES = (
    "model.decoder.layers.{}.",
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"],
    ["fc1", "fc2"],
)
NEOX_NAMES = (
    "gpt_neox.layers.{}.",
    ["attention.query_key_value", "attention.dense"],
    ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
)
GPT2_NAMES = ("transformer.h.{}.", ["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"])

# name: (config, (prefix of a block, its attention layers, its other linear layers))
ARCHITECTURES = {
    "llama": (lambda: transformers.LlamaConfig(**LLAMA_LIKE), LLAMA_NAMES),
    "mistral": (lambda: transformers.MistralConfig(**LLAMA_LIKE), LLAMA_NAMES),
    "qwen2": (lambda: transformers.Qwen2Config(**LLAMA_LIKE), LLAMA_NAMES),
    "gemma": (lambda: transformers.GemmaConfig(**LLAMA_LIKE), LLAMA_NAMES),
    "opt": (lambda: transformers.OPTConfig(**OPT_SHAPE), OPT_NAMES),
    "gpt_neox": (lambda: transformers.GPTNeoXConfig(**NEOX_SHAPE), NEOX_NAMES),
    "gpt2": (lambda: transformers.GPT2Config(**GPT2_SHAPE), GPT2_NAMES),
}
BITS = (4, 8, 16, 32)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_bits = pytest.mark.parametrize("bits", BITS)


def expected_names(architecture: str, attention_only: bool = False) -> list[str]:
    prefix, attention, others = ARCHITECTURES[architecture][1]
    short = attention if attention_only else attention + others
    return sorted(prefix.format(index) + name for index in range(LAYERS) for name in short)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """folders(architecture): the saved random model with the embedded base's tokenizer, made on
    first use."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def folder(architecture: str):
        if architecture not in made:
            torch.manual_seed(0)
            path = root / architecture
            transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[architecture][0]()).save_pretrained(path)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(TINY_BASE / name, path / name)
            made[architecture] = path
        return made[architecture]

    return folder


@pytest.fixture(scope="session")
def settings_for(folders, tmp_path_factory):
    """settings_for(architecture, "--flag value ...")."""
    output = tmp_path_factory.mktemp("output") / "run"

    def settings(architecture: str, words: str = ""):
        base = ["--model_name_or_path", str(folders(architecture)), "--output_dir", str(output)]
        return parse_arguments([*base, "--lora_r", "4", *words.split()])

    return settings


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give A and B random values: a fresh LoRA has B = 0, and CS 0. The same ones whichever tests
    have run before."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)


@pytest.fixture(scope="session")
def adapted(settings_for):
    """adapted(architecture, bits): base with a LoRA whose B is random, made once; tests leave its
    weights as they are."""
    made = {}

    def model(architecture: str, bits: int):
        if (architecture, bits) not in made:
            settings = settings_for(architecture, f"--bits {bits}")
            made[architecture, bits] = with_lora(settings, load_base(base_spec(settings)))
            randomise(made[architecture, bits])
        return made[architecture, bits]

    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))  # (B, T)


def literal_weight(layer: torch.nn.Module) -> torch.Tensor:
    """The frozen weight (out, in) in float64, without the code under test."""
    weight = layer.weight
    if getattr(weight, "quant_state", None) is not None:
        return bnb_functional.dequantize_4bit(weight.data, weight.quant_state).double()
    if weight.dtype == torch.int8:
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return weight.data.double() * scales.double()[:, None] / 127
    return (weight.T if isinstance(layer, transformers.pytorch_utils.Conv1D) else weight).detach().double()


def literal_cs(model: torch.nn.Module, adapter: str = "default") -> dict[str, float]:
    """CS by the formula: B A is formed; {"matrix", "row"}, means over the layers."""
    matrix, row = [], []
    for module in model.modules():
        if adapter in getattr(module, "lora_A", {}):
            update = module.lora_B[adapter].weight.detach().double() @ module.lora_A[adapter].weight.detach().double()
            weight = literal_weight(module.get_base_layer())
            matrix.append(torch.nn.functional.cosine_similarity(weight.flatten(), update.flatten(), dim=0, eps=0))
            row.append(torch.nn.functional.cosine_similarity(weight, update, dim=1, eps=0).mean())
    return {"matrix": torch.stack(matrix).mean().item(), "row": torch.stack(row).mean().item()}


def assert_cs_is_literal(model: torch.nn.Module, adapter: str = "default", tolerance: float = 1e-6) -> None:
    measured, expected = measure_layers(peft_lora_layers(model)), literal_cs(model, adapter)
    assert min(abs(expected["matrix"]), abs(expected["row"])) > 2 * tolerance  # not a comparison of zeros
    assert measured["cs_matrix"]["lm"] == pytest.approx(expected["matrix"], abs=tolerance)
    assert measured["cs_row"]["lm"] == pytest.approx(expected["row"], abs=tolerance)


# ------------------------------------------------------------------------------ where LoRA lands


@every_architecture
@every_bits
def test_lora_lands_on_every_linear_layer_but_the_head(adapted, architecture, bits):
    model = adapted(architecture, bits)
    found = [
        name.split("base_model.model.", 1)[1] for name, module in model.named_modules() if hasattr(module, "lora_A")
    ]
    assert sorted(found) == expected_names(architecture)
    assert len(peft_lora_layers(model)) == len(expected_names(architecture))


@every_architecture
def test_attention_layers_only(settings_for, architecture):
    base = load_base(base_spec(settings_for(architecture, "--bits 32")))
    assert sorted(lora_target_names(base, "attention")) == expected_names(architecture, attention_only=True)


def test_layers_by_name(settings_for):
    base = load_base(base_spec(settings_for("llama", "--bits 32")))
    assert sorted(lora_target_names(base, "q_proj,v_proj")) == sorted(
        f"model.layers.{index}.self_attn.{name}_proj" for index in range(LAYERS) for name in "qv"
    )
    assert lora_target_names(base, " mlp.up_proj , ") == [
        f"model.layers.{index}.mlp.up_proj" for index in range(LAYERS)
    ]
    assert lora_target_names(base, "model.layers.1.mlp.up_proj") == ["model.layers.1.mlp.up_proj"]


def test_a_layer_that_is_not_there_is_named_with_those_that_are(settings_for):
    base = load_base(base_spec(settings_for("llama", "--bits 32")))
    with pytest.raises(ValueError, match="called c_attn, lm_head; there are down_proj, gate_proj, k_proj"):
        lora_target_names(base, "c_attn,q_proj,lm_head")
    with pytest.raises(ValueError, match="nothing"):
        lora_target_names(base, ",")


# ------------------------------------------------------------------------------ training on it


@every_bits
def test_gradients_after_an_evaluation_are_those_before_it(settings_for, bits):
    settings = settings_for("llama", f"--bits {bits} --use_cpu")
    model = with_lora(settings, load_base(base_spec(settings)))
    randomise(model)

    def gradients():
        model.train().zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=tokens())
    after = gradients()
    assert all(torch.equal(gradient, after[name]) for name, gradient in before.items())
    assert all(gradient.abs().max() > 0 for name, gradient in before.items())


@every_architecture
@every_bits
def test_a_training_step_has_a_finite_loss_and_moves_only_lora(settings_for, architecture, bits):
    settings = settings_for(architecture, f"--bits {bits}")
    model = with_lora(settings, load_base(base_spec(settings))).train()
    before = {name: tensor.detach().clone() for name, tensor in trainable_tensors(model).items()}
    optimizer = torch.optim.SGD(list(trainable_tensors(model).values()), lr=1.0)
    losses = []
    for _ in range(2):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses))) and losses[0] != losses[1]
    moved = {name for name, tensor in trainable_tensors(model).items() if not torch.equal(tensor, before[name])}
    # With B = 0 at the start, the first step moves B and the second A as well.
    assert moved == set(before) and all("lora_" in name for name in before)


def test_quantised_layers_hold_packed_weights(adapted):
    layer = adapted("llama", 4).get_submodule("base_model.model.model.layers.0.mlp.up_proj").get_base_layer()
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == HIDDEN * INNER // 2
    assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
    assert adapted("llama", 8).get_submodule("base_model.model.model.layers.0.mlp.up_proj").weight.dtype == torch.int8


def test_quantisation_by_flag(settings_for):
    base = load_base(base_spec(settings_for("llama", "--bits 4 --quant_type fp4 --double_quant False")))
    state = base.get_submodule("model.layers.0.mlp.up_proj").weight.quant_state
    assert state.quant_type == "fp4" and not state.nested


def test_a_bf16_base_on_a_cpu_keeps_its_small_parts_and_logits_in_float32(settings_for):
    for architecture in ("llama", "opt"):
        settings = settings_for(architecture, "--bits 16 --bf16 --use_cpu --gradient_checkpointing True")
        model = with_lora(settings, load_base(base_spec(settings)))
        frozen = [(parameter.ndim, parameter.dtype) for parameter in model.parameters() if not parameter.requires_grad]
        assert set(frozen) == {(1, torch.float32), (2, torch.bfloat16)}
        randomise(model)
        model.train()
        inputs = []
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, output, seen=inputs: seen.append(output)
        )
        output = model(input_ids=tokens(), labels=tokens())
        assert output.logits.dtype == torch.float32 and inputs[0].requires_grad  # checkpointing passes the gradient on
        output.loss.backward()
        assert all(tensor.grad.abs().max() > 0 for tensor in trainable_tensors(model).values())
        generated = model.eval().generate(input_ids=tokens()[:, :4], max_new_tokens=3, min_new_tokens=3)
        assert generated.shape == (2, 7)


@pytest.mark.parametrize("words", ["--bits 16", "--bits 16 --fp16", "--bits 32"])
def test_unquantised_bases_have_their_precision(settings_for, words):
    expected = {"--bits 16": torch.bfloat16, "--bits 16 --fp16": torch.float16, "--bits 32": torch.float32}[words]
    base = load_base(base_spec(settings_for("llama", words)))
    assert {parameter.dtype for parameter in base.parameters()} == {expected}


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("choice", ["none", "all", "lora_only"])
def test_lora_bias_chooses_the_trained_biases(settings_for, bits, choice):
    settings = settings_for("opt", f"--bits {bits} --lora_bias {choice} --lora_modules q_proj,fc1")
    model = with_lora(settings, load_base(base_spec(settings)))
    trained = {name.replace("base_model.model.", "", 1).replace(".base_layer", "") for name in trainable_tensors(model)}
    layers = [f"model.decoder.layers.{index}.{name}" for index in range(LAYERS) for name in ("self_attn.q_proj", "fc1")]
    expected = {f"{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}
    if choice == "lora_only":
        expected |= {f"{layer}.bias" for layer in layers}
    if choice == "all":
        blocks = [*OPT_NAMES[1], *OPT_NAMES[2], "self_attn_layer_norm", "final_layer_norm"]
        expected |= {f"model.decoder.layers.{index}.{name}.bias" for index in range(LAYERS) for name in blocks}
        expected |= {"model.decoder.final_layer_norm.bias"}
    assert trained == expected


@every_bits
def test_trainable_parameters_count_the_same_in_any_precision(adapted, bits):
    count = trainable_parameters(adapted("llama", bits))
    sizes = [
        (64, 64),
        (64, 32),
        (64, 32),
        (64, 64),
        (64, 128),
        (64, 128),
        (128, 64),
    ]  # (in, out) of q k v o gate up down
    lora = LAYERS * sum(4 * (inside + outside) for inside, outside in sizes)
    norms = HIDDEN * (2 * LAYERS + 1)
    base = 2 * VOCABULARY * HIDDEN + LAYERS * sum(inside * outside for inside, outside in sizes) + norms
    assert count == {"trainable": lora, "total": base + lora, "percent": round(100 * lora / (base + lora), 3)}


# ---------------------------------------------------------------------------- CS of what PEFT holds


@every_architecture
@every_bits
def test_cs_is_the_literal_one(adapted, architecture, bits):
    assert_cs_is_literal(adapted(architecture, bits), tolerance=1e-5 if bits in (4, 8) else 1e-6)


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_gpt2_s_transposed_weights_are_measured_the_right_way_round(adapted, folders, bits):
    stored = load_file(folders("gpt2") / "model.safetensors")
    for layer in peft_lora_layers(adapted("gpt2", bits)):
        name = layer.name.split("base_model.model.", 1)[1]
        weight = next(
            tensor for key, tensor in stored.items() if key.endswith(f"{name.split('transformer.')[1]}.weight")
        ).T
        assert weight.shape == (layer.up.shape[0], layer.down.shape[1])
        rounding = {4: 0.2, 8: 0.02, 16: 0.005, 32: 1e-6}[bits]
        assert (layer.weight.dense().float() - weight).norm() / weight.norm() < rounding


@pytest.mark.parametrize("bits", [4, 8])
def test_cs_of_a_quantised_base_is_the_same_before_and_after_a_forward(settings_for, bits):
    settings = settings_for("llama", f"--bits {bits}")
    model = with_lora(settings, load_base(base_spec(settings)))
    randomise(model)
    before = measure_layers(peft_lora_layers(model))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert measure_layers(peft_lora_layers(model)) == before


KINDS = {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "rank 1": {"r": 1}, "scaled": {"lora_alpha": 64}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 32])
def test_cs_of_other_kinds_of_lora(settings_for, kind, bits):
    base = load_base(base_spec(settings_for("llama", f"--bits {bits}")))
    config = LoraConfig(
        **{"r": 4, "target_modules": lora_target_names(base, "all"), "task_type": "CAUSAL_LM", **KINDS[kind]}
    )
    model = get_peft_model(base, config)
    randomise(model)
    assert_cs_is_literal(model, tolerance=1e-5 if bits == 4 else 1e-6)
    magnitudes = [name for name in trainable_tensors(model) if "magnitude" in name]
    assert len(magnitudes) == (len(expected_names("llama")) if kind == "dora" else 0)


def test_only_the_active_adapter_is_measured(settings_for):
    settings = settings_for("llama", "--bits 32")
    model = with_lora(settings, load_base(base_spec(settings)))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    randomise(model)
    assert_cs_is_literal(model, "default")
    assert len(peft_lora_layers(model)) == 7 * LAYERS
    model.set_adapter("second")
    assert_cs_is_literal(model, "second")
    assert len(peft_lora_layers(model)) == 2 * LAYERS


def test_modules_to_save_are_trained_and_not_measured(settings_for):
    base = load_base(base_spec(settings_for("llama", "--bits 32")))
    targets = lora_target_names(base, "all")
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=targets, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )
    randomise(model)
    assert_cs_is_literal(model)
    assert len(peft_lora_layers(model)) == len(expected_names("llama"))
    assert sum("lm_head" in name for name in trainable_tensors(model)) == 1


def test_an_embedding_s_lora_is_left_out(settings_for):
    base = load_base(base_spec(settings_for("llama", "--bits 32")))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"))
    assert [layer.name.rsplit(".", 1)[-1] for layer in peft_lora_layers(model)] == ["q_proj"] * LAYERS


@pytest.mark.parametrize("bits", [4, 8])
def test_at_most_one_layer_is_dequantised_at_any_time(adapted, monkeypatch, bits):
    """The dense values lie in a numpy array, which lives as long as any tensor or view that shares
    its memory."""
    dequantise = weights.dequantised
    arrays: list[weakref.ref] = []
    alive_before_each: list[int] = []

    def watched(module):
        alive_before_each.append(sum(reference() is not None for reference in arrays))
        array = dequantise(module).detach().float().numpy().copy()
        arrays.append(weakref.ref(array))
        return torch.from_numpy(array)

    monkeypatch.setattr(weights, "dequantised", watched)
    layers = peft_lora_layers(adapted("llama", bits))
    first = measure_layers(layers)
    assert len(arrays) == 2 * len(layers)  # once for the norms, which are kept, and once for W A^T
    assert measure_layers(layers) == first
    assert len(arrays) == 3 * len(layers)
    assert set(alive_before_each) == {0}
    assert [reference for reference in arrays if reference() is not None] == []


# --------------------------------------------------------------------- loading, and what is refused


def test_tokenizer_pads_on_the_right_with_a_pad_token(folders):
    tokenizer = load_tokenizer(BaseSpec(str(folders("llama"))))
    assert tokenizer.padding_side == "right" and tokenizer.pad_token_id is not None


def test_embeddings_grow_with_the_tokenizer_and_never_shrink(settings_for, folders):
    base, tokenizer = (
        load_base(base_spec(settings_for("llama", "--bits 32"))),
        load_tokenizer(BaseSpec(str(folders("llama")))),
    )
    fit_embeddings(base, tokenizer)
    assert base.get_input_embeddings().weight.shape[0] == VOCABULARY
    tokenizer.add_tokens([f"<new-{index}>" for index in range(VOCABULARY - len(tokenizer) + 3)])
    fit_embeddings(base, tokenizer)
    assert base.get_input_embeddings().weight.shape == (VOCABULARY + 3, HIDDEN)
    assert base.get_output_embeddings().weight.shape == (VOCABULARY + 3, HIDDEN)


def load_from(folder):
    return load_base(
        base_spec(parse_arguments(["--model_name_or_path", str(folder), "--output_dir", str(folder / "run")]))
    )


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_from(tmp_path / "missing")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        load_from(tmp_path)


def test_a_folder_without_weights(tmp_path):
    ARCHITECTURES["llama"][0]().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights there"):
        load_from(tmp_path)


def test_a_model_that_is_no_causal_language_model(tmp_path):
    transformers.T5Config(d_model=HIDDEN, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a t5 model is no causal language model"):
        load_from(tmp_path)

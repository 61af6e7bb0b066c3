"""The hook on toy networks: which layers it sees, what CS they have, which flags it takes."""

import argparse
import dataclasses
import json
from types import SimpleNamespace

import es_lora_hook
import es_lora_layers
import es_lora_run
import pytest
import torch

from cs_fluctuation import layer_cosine, mean_cosine
from es_lora.rules import DEFAULT_RULE
from es_lora.settings import StopSettings
from es_lora.weights import copies, dequantised


class LoraModule(torch.nn.Module):
    """Over its frozen layer as kohya's: only the old forward still knows it."""

    def __init__(self, name, frozen, rank, in_list=False):
        super().__init__()
        self.lora_name = name
        if isinstance(frozen, torch.nn.Conv2d):
            self.lora_down = torch.nn.Conv2d(frozen.in_channels, rank, frozen.kernel_size, bias=False)
            self.lora_up = torch.nn.Conv2d(rank, frozen.out_channels, 1, bias=False)
        else:
            self.lora_down = torch.nn.Linear(frozen.in_features, rank, bias=False)
            self.lora_up = torch.nn.Linear(rank, frozen.out_features, bias=False)
        self.org_forward = frozen.forward
        if in_list:
            self.org_module = [frozen]  # LyCORIS


class LohaModule(torch.nn.Module):
    """A LyCORIS module without down and up; its dropout must not touch the measurement."""

    def __init__(self, name, frozen):
        super().__init__()
        self.lora_name, self.org_module = name, [frozen]
        self.update = torch.nn.Parameter(torch.randn(frozen.weight.shape))
        self.scalar = torch.tensor(1.0)

    def get_diff_weight(self, multiplier=1, shape=None, device=None):
        return torch.nn.functional.dropout(self.update, 0.5, self.training), None


class NormModule(torch.nn.Module):
    def __init__(self, name, frozen):
        super().__init__()
        self.lora_name, self.org_module = name, [frozen]


def network(text=(), unet=()):
    made = torch.nn.Module()
    made.text_encoder_loras, made.unet_loras = list(text), list(unet)
    made.modules_ = torch.nn.ModuleList([*text, *unet])
    return made


def cosine(weight, update):
    return torch.nn.functional.cosine_similarity(weight.double().flatten(), update.double().flatten(), 0).item()


@pytest.mark.parametrize("rank", [1, 3])
def test_linear_and_convolution_have_the_cosine_of_the_formed_update(rank):
    torch.manual_seed(0)
    linear, conv = torch.nn.Linear(6, 5), torch.nn.Conv2d(3, 4, 3)
    modules = LoraModule("lora_unet_a", linear, rank), LoraModule("lora_unet_b", conv, rank, in_list=True)
    layers, left_out = es_lora_layers.network_layers(network(unet=modules))
    assert [layer.name for layer in layers] == ["lora_unet_a", "lora_unet_b"] and left_out == 0
    for layer, module, frozen in zip(layers, modules, (linear, conv)):
        update = module.lora_up.weight.flatten(1) @ module.lora_down.weight.flatten(1)
        assert layer_cosine(layer) == pytest.approx(cosine(frozen.weight.flatten(1), update), abs=1e-6)
    with torch.no_grad():
        modules[0].lora_up.weight.copy_(linear.weight[:, :rank])  # the layers are live, not copies
    update = modules[0].lora_up.weight @ modules[0].lora_down.weight
    assert layer_cosine(layers[0]) == pytest.approx(cosine(linear.weight, update), abs=1e-6)


def test_components_follow_the_names_of_the_text_encoders():
    frozen = torch.nn.Linear(4, 4)
    names = ["lora_te_text_model_x", "lora_te1_x", "lora_te2_x"]
    layers, _ = es_lora_layers.network_layers(
        network([LoraModule(name, frozen, 1) for name in names], [LoraModule("lora_unet_x", frozen, 1)])
    )
    assert [layer.component for layer in layers] == ["te", "te1", "te2", "unet"]


def test_update_without_down_and_up_is_measured_without_dropout_or_random_numbers():
    torch.manual_seed(0)
    frozen = torch.nn.Conv2d(3, 4, 3)
    module = LohaModule("lora_unet_x", frozen).train()
    layers, _ = es_lora_layers.network_layers(network(unet=[module]))
    state = torch.get_rng_state()
    measured = mean_cosine(layers)["unet"], mean_cosine(layers, "row")["unet"]
    assert torch.equal(state, torch.get_rng_state()) and module.training
    rows = torch.nn.functional.cosine_similarity(frozen.weight.double().flatten(1), module.update.double().flatten(1))
    assert measured == pytest.approx((cosine(frozen.weight, module.update), rows.mean().item()), abs=1e-6)
    with torch.no_grad():
        module.update.zero_()
    assert mean_cosine(layers)["unet"] == 0


def test_trained_scalar_turns_the_update_round():
    torch.manual_seed(0)
    frozen = torch.nn.Linear(4, 4)
    module = LohaModule("lora_unet_x", frozen)
    module.scalar = torch.nn.Parameter(torch.tensor(-0.5))
    layers, _ = es_lora_layers.network_layers(network(unet=[module]))
    assert mean_cosine(layers)["unet"] == pytest.approx(-cosine(frozen.weight, module.update), abs=1e-6)


def test_fused_projection_is_measured_block_by_block():
    torch.manual_seed(0)
    frozen = torch.nn.Linear(4, 6)
    module = LoraModule("lora_unet_qkv", frozen, 2)
    module.lora_down = torch.nn.ModuleList([torch.nn.Linear(4, 2, bias=False) for _ in range(2)])
    module.lora_up = torch.nn.ModuleList([torch.nn.Linear(2, rows, bias=False) for rows in (2, 4)])
    layers, _ = es_lora_layers.network_layers(network(unet=[module]))
    second = cosine(frozen.weight[2:], module.lora_up[1].weight @ module.lora_down[1].weight)
    assert [layer.name for layer in layers] == ["lora_unet_qkv.0", "lora_unet_qkv.1"]
    assert layer_cosine(layers[1]) == pytest.approx(second, abs=1e-6)


def test_float8_base_is_widened_for_use():
    torch.manual_seed(0)
    frozen = torch.nn.Linear(4, 4)
    frozen.weight.data = frozen.weight.data.to(torch.float8_e4m3fn)
    module = LoraModule("lora_unet_x", frozen, 2)
    layers, _ = es_lora_layers.network_layers(network(unet=[module]))
    update = module.lora_up.weight @ module.lora_down.weight
    assert layer_cosine(layers[0]) == pytest.approx(cosine(frozen.weight.float(), update), abs=1e-6)


def test_modules_without_an_update_of_a_matrix_are_counted_and_left_out():
    modules = [NormModule("lora_unet_n", torch.nn.LayerNorm(4)), LoraModule("lora_unet_a", torch.nn.Linear(4, 4), 1)]
    layers, left_out = es_lora_layers.network_layers(network(unet=modules))
    assert (len(layers), left_out) == (1, 1)
    with pytest.raises(ValueError, match="CS cannot be measured for the network .*without --calculate_cs"):
        es_lora_layers.network_layers(network(unet=modules[:1]))


# -------------------------------------------------------------------------------- PEFT, old and new


def test_peft_layers_of_the_old_kind_hold_their_own_weight():
    """PEFT 0.4 (qlora's pin): the LoRA layer is the linear layer, and names one active adapter."""
    torch.manual_seed(0)
    old = torch.nn.Linear(4, 6)
    old.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(4, 2, bias=False)})
    old.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 6, bias=False)})
    old.active_adapter = "default"
    layers = es_lora_layers.peft_layers(torch.nn.ModuleDict({"q": old}))
    update = old.lora_B["default"].weight @ old.lora_A["default"].weight
    assert [layer.name for layer in layers] == ["q"]
    assert layer_cosine(layers[0]) == pytest.approx(cosine(old.weight, update), abs=1e-6)


def test_peft_layers_of_the_installed_peft():
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), torch.nn.Sequential(torch.nn.Linear(4, 6))
    )
    (layer,) = es_lora_layers.peft_layers(model)
    update = model[0].lora_B["default"].weight @ model[0].lora_A["default"].weight
    assert layer_cosine(layer) == pytest.approx(cosine(model[0].base_layer.weight, update), abs=1e-6)
    with pytest.raises(ValueError, match="no LoRA layer"):
        es_lora_layers.peft_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("used", [False, True])
def test_eight_bit_weight_before_and_after_its_first_use(used):
    torch.manual_seed(0)
    integers, scales = torch.randint(-127, 128, (3, 4), dtype=torch.int8), torch.rand(3) + 0.5
    weight = SimpleNamespace(data=integers, CB=None if used else integers, SCB=None if used else scales)
    state = SimpleNamespace(CB=integers if used else None, SCB=scales if used else None)
    dense = dequantised(SimpleNamespace(weight=weight, state=state))
    assert torch.allclose(dense, integers.float() * scales[:, None] / 127)


def test_four_bit_weight_is_the_same_after_an_evaluation_and_trains_on():
    """bitsandbytes has a layout for evaluations on some processors, without a gradient; elsewhere
    nothing is to be seen."""
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")).to("cpu")
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), base)
    (layer,) = es_lora_layers.peft_layers(model)
    before, inputs = layer_cosine(layer), torch.ones(3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        model.eval()(inputs)
    assert layer_cosine(layer) == before != 0
    model.train()(inputs.requires_grad_()).sum().backward()
    merged = layer.weight.dense().float() + model[0].get_delta_weight("default").float()
    assert torch.allclose(inputs.grad[0].float(), merged.sum(0), atol=0.1 * merged.sum(0).abs().max().item())


# -------------------------------------------------------------------------------------------- flags


def parsed(*flags, **toml):
    parser = argparse.ArgumentParser()
    es_lora_hook.add_arguments(parser)
    return parser.parse_args(list(flags), namespace=argparse.Namespace(**toml))


def test_off_by_default_and_published_names():
    assert es_lora_run.read_settings(parsed(), "matrix") is None
    assert es_lora_run.read_settings(parsed("--calculate_cs", "False"), "matrix") is None
    measured = es_lora_run.read_settings(parsed("--calculate_cs", "--cs_steps", "5", "--window_size", "7"), "matrix")
    assert (measured.early_stop, measured.cs_interval, measured.window_size) == (False, 5, 7)
    stopping = es_lora_run.read_settings(parsed("--early_stop"), "matrix")
    assert (stopping.early_stop, stopping.cs_interval, stopping.window_size) == (True, None, None)
    assert (stopping.stop_rule, stopping.cs_reduction) == (DEFAULT_RULE, "matrix")


def test_values_of_a_toml_file_are_checked_all_at_once():
    args = parsed(early_stop=True, cs_interval=3, window_size="auto")
    assert es_lora_run.read_settings(args, "row").cs_interval == 3
    assert es_lora_run.read_settings(parsed(early_stop="False"), "matrix") is None
    args = parsed(early_stop="on?", cs_interval=0, window_size="many", stop_rule="best", cs_reduction="sum", valley=0)
    with pytest.raises(ValueError) as error:
        es_lora_run.read_settings(args, "matrix")
    for part in (
        "--early_stop on?: give True or False",
        "--cs_interval 0: give a number of 1 or more, or auto",
        "--window_size many: give a number of 1 or more, or auto",
        "--stop_rule best: stop rule 'best' is unknown",
        "--cs_reduction sum: choose row or matrix",
        "--valley 0: must be at least 1",
    ):
        assert part in str(error.value)


def test_rule_that_needs_what_is_not_recorded_is_refused():
    with pytest.raises(ValueError, match="validation-patience needs heldout_loss, which is not recorded here"):
        es_lora_run.read_settings(parsed("--early_stop", "--stop_rule", "validation-patience"), "matrix")


def test_the_number_of_a_rule_is_checked_against_the_rule():
    assert (
        es_lora_run.read_settings(
            parsed("--early_stop", "--stop_rule", "fixed-epochs", "--rule_value", "3"), "row"
        ).rule_value
        == 3
    )
    with pytest.raises(ValueError, match="--stop_rule second-valley: the rule second-valley has no number to set"):
        es_lora_run.read_settings(parsed("--early_stop", "--stop_rule", "second-valley", "--rule_value", "3"), "row")


def test_truth_values():
    with pytest.raises(ValueError, match="--early_stop perhaps: give True or False"):
        es_lora_run.read_settings(parsed("--early_stop", "perhaps"), "matrix")
    assert es_lora_run.read_settings(parsed("--early_stop", "true"), "matrix").early_stop is True


def test_qlora_fields_are_the_same_flags():
    known = {entry.name for entry in dataclasses.fields(StopSettings)} - set(es_lora_run.LEFT_OUT)
    assert known | {"valley"} == {name for name, _ in __import__("insertion_points").QLORA_FIELDS}
    made = es_lora_hook.training_argument("cs_interval")
    assert made.default == "auto" and made.metadata["aliases"] == ["--cs_steps"] and made.metadata["help"]


# --------------------------------------------------------------------------------- details of a run


def test_old_history_is_put_aside_and_kept(tmp_path):
    history = tmp_path / "cs_history.jsonl"
    for text in ("first", "second"):
        history.write_text(text)
        es_lora_run._put_aside(history)
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {"cs_history.1.jsonl": "first", "cs_history.2.jsonl": "second"}


def make_run(tmp_path, frozen, module, is_main=True, **flags):
    flags = {"early_stop": True, "cs_interval": 1, "window_size": 2, **flags}
    settings = es_lora_run.read_settings(parsed(**flags), "matrix")
    net = network(unet=[module])
    layers, _ = es_lora_layers.network_layers(net)
    tensors = lambda: es_lora_layers.all_tensors(net)  # noqa: E731
    return es_lora_run.EarlyStopRun(settings, tmp_path, layers, tensors, 4, 100, 4, is_main, None, {})


def test_divergence_stops_and_keeps_the_last_finite_weights(tmp_path):
    torch.manual_seed(0)
    frozen = torch.nn.Linear(4, 4)
    module = LoraModule("lora_unet_x", frozen, 1)
    run = make_run(tmp_path, frozen, module)
    run.after_step(torch.tensor(1.0), 0.1, "cpu")
    with torch.no_grad():
        module.lora_up.weight[0] = float("nan")
    run.after_step(torch.tensor(1.0), 0.1, "cpu")
    assert run.stopped and run.outcome().name == "diverged" and run.kept_step() == 1
    outcome = run.outcome()
    outcome.saved("kept", "lora.safetensors", run.kept_step())
    run.finish(outcome)
    assert json.loads((tmp_path / "result.json").read_text())["files"]["kept"]["step"] == 1


@pytest.mark.parametrize(
    "heard, stops", [(es_lora_run.GO_ON, False), (es_lora_run.STOP, True), (es_lora_run.FAILED, None)]
)
def test_other_processes_do_what_the_main_one_says(heard, stops, tmp_path, monkeypatch):
    asked = []

    def broadcast(tensor, source):
        asked.append(source)
        tensor.fill_(heard)

    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_backend", "gloo")):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    frozen = torch.nn.Linear(4, 4)
    run = make_run(tmp_path, frozen, LoraModule("lora_unet_x", frozen, 1), is_main=False, cs_interval=2)
    assert run.monitor is None and not list(tmp_path.iterdir())
    run.after_step(torch.tensor(1.0), 0.1, "cpu")
    assert asked == []  # nothing is due, so nobody waits for anybody
    if stops is None:
        with pytest.raises(RuntimeError, match="failed on the main process"):
            run.after_step(torch.tensor(1.0), 0.1, "cpu")
    else:
        run.after_step(torch.tensor(1.0), 0.1, "cpu")
        assert (run.stopped, asked) == (stops, [0])


def test_unknown_component_is_a_message(tmp_path):
    frozen = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="--cs_component te: trained are unet"):
        make_run(tmp_path, frozen, LoraModule("lora_unet_x", frozen, 1), cs_component="te")


def test_schedule_free_snapshot_is_what_would_be_saved_and_training_goes_on_bit_for_bit():
    torch.manual_seed(0)
    module = LoraModule("lora_unet_x", torch.nn.Linear(4, 4), 2)
    averaged = {name: torch.randn_like(value) for name, value in module.named_parameters()}
    training = copies(dict(module.named_parameters()))

    def mix(factor):
        for name, value in module.named_parameters():
            value.data.lerp_(averaged[name], factor)

    stop = es_lora_hook.NetworkEarlyStop.__new__(es_lora_hook.NetworkEarlyStop)
    stop.network, stop._trained = module, True
    stop.to_evaluation, stop.to_training = lambda: mix(0.7), lambda: mix(-7 / 3)
    saved = stop._tensors_to_save()
    assert all(torch.equal(value, training[name]) for name, value in module.named_parameters())
    mix(0.7)
    assert all(torch.equal(value, saved[name]) for name, value in module.named_parameters())

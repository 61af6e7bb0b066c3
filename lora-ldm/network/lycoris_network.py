"""LyCORIS networks (``--network_module lycoris.kohya``) with the methods of LoraNetwork.

The layers, options and key names are those of the lycoris-lora package. CS can be measured where
the update is added to the weight and the weight is all: lora (locon), loha, lokr."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import quiet_libraries  # noqa: F401  (before lycoris)
import torch
from lycoris.config import PRESET
from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights
from lycoris.kohya import create_network as create_lycoris

from base.memory import refuse_rank
from base.sd import SDModel
from base.tensor_files import differences, first_line
from cs_fluctuation import LoraLayer
from es_lora.command_line import is_out_of_memory
from es_lora.inputs.bounds import MOST
from es_lora.weights import DenseUpdateLayer, without_dropout
from network.lora import RANK_ADVICE, find_modules, rename_modules
from network.lora_file import group_modules, load_lora, rename_text_encoder

MEASURABLE = ("LoConModule", "LohaModule", "LokrModule")
ALGORITHMS = "lora locon loha lokr dylora glora full diag-oft boft ia3 tlora".split()
SWITCHES = """
    use_tucker use_scalar train_norm rescaled dora_wd wd_on_output full_matrix bypass_mode rs_lora
    unbalanced_factorization decompose_both
""".split()
OPTIONS = """
    algo preset conv_dim conv_alpha dropout rank_dropout module_dropout factor block_size constraint
    loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio
""".split()

NUMBERS = "conv_dim conv_alpha dropout rank_dropout module_dropout constraint".split()

# lycoris-lora 4.1.3 lists the layers of Stable Diffusion's time embedding both by name and by the
# class around them, and then fails on the duplicate; the names are enough.
for _preset in PRESET.values():
    if "time_embedding.linear_1" in _preset.get("unet_target_name", ()):
        _preset["unet_target_module"] = [name for name in _preset["unet_target_module"] if name != "TimestepEmbedding"]


class LycorisNetwork:
    """LyCORIS layers in a model. Build it with ``create_lycoris_network``."""

    def __init__(self, network: LycorisNetworkKohya):
        self.network = network
        self.modules = list(network.loras)
        self._layers = None
        network.requires_grad_(True)
        network.train()

    @property
    def components(self) -> list[str]:
        """The adapted parts in order: "te" (or "te1", "te2"), "unet"."""
        return list(dict.fromkeys(_component(module) for module in self.modules))

    @property
    def multiplier(self) -> float:
        return self.network.multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        self.network.multiplier = float(value)
        for module in self.modules:
            module.multiplier = float(value)

    def train(self, mode: bool = True) -> "LycorisNetwork":
        """Switch the dropouts on (the state after creation) or off."""
        self.network.train(mode)
        return self

    def eval(self) -> "LycorisNetwork":
        return self.train(False)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LycorisNetwork":
        """Move or cast the trainable tensors in place."""
        self.network.to(device=device, dtype=dtype)
        return self

    def parameters(self) -> list[torch.Tensor]:
        return list(self.tensors().values())

    def parameter_groups(
        self, learning_rate: float, unet_lr: float | None = None, text_encoder_lr: float | list[float] | None = None
    ) -> list[dict[str, Any]]:
        """Optimizer groups, one a component (two with LoRA+ ratios); rate 0 leaves it out."""
        if isinstance(text_encoder_lr, (list, tuple)):
            if len(set(text_encoder_lr)) > 1:
                raise ValueError("LyCORIS trains both text encoders at one rate: give --text_encoder_lr one value")
            text_encoder_lr = text_encoder_lr[0]
        groups, descriptions = self.network.prepare_optimizer_params(text_encoder_lr, unet_lr, learning_rate)
        names = [description.replace("textencoder", "te") for description in descriptions]
        return [{**group, "params": list(group["params"]), "name": name} for group, name in zip(groups, names)]

    def layers(self) -> list[LoraLayer | DenseUpdateLayer]:
        """What the CS metric looks at, live. Raises ValueError for updates not added to W."""
        if self._layers is None:
            self._layers = [_layer(module) for module in self.modules if type(module).__name__ != "NormModule"]
        return self._layers

    def tensors(self) -> dict[str, torch.Tensor]:
        """{key: live trainable tensor}."""
        return dict(self.network.named_parameters())

    def state_for_file(
        self, dtype: torch.dtype | None = None, tensors: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """{LyCORIS key: copy on the CPU}, alphas too; live weights or a snapshot's ``tensors``."""
        if tensors is not None:  # a trained scalar is multiplied into other tensors, so that the layers must do it
            live = {name: value.detach().clone() for name, value in self.tensors().items()}
            self.load_tensors(tensors)
            try:
                return self.state_for_file(dtype)
            finally:
                self.load_tensors(live)
        return {name: value.detach().to("cpu", dtype, copy=True) for name, value in self.network.state_dict().items()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set the weights from ``tensors()`` or a file. Raises ValueError where they do not fit."""
        mine = self.tensors()
        tensors = rename_text_encoder(tensors, [module.lora_name for module in self.modules])
        alphas = {f"{part.lora_name}.alpha": float(part.alpha) for part in self.modules if hasattr(part, "alpha")}
        problems = []
        for name, value in tensors.items():
            if name in alphas:
                if abs(float(value) - alphas[name]) > 1e-3 * abs(alphas[name]):  # half precision rounds it
                    problems.append(f"{name} is {float(value):g} instead of {alphas[name]:g}")
            elif name not in mine:
                problems.append(f"{name} is not trained here")
            elif mine[name].shape != value.shape:
                problems.append(f"{name} is {tuple(value.shape)} instead of {tuple(mine[name].shape)}")
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            advice = RANK_ADVICE if any(" instead of " in problem for problem in problems) else ""
            raise ValueError(f"the file does not fit this LyCORIS network: {'; '.join(problems[:3])}{more}{advice}")
        for name, target in mine.items():
            if name in tensors:
                target.copy_(tensors[name])
            elif name.endswith(".scalar"):
                target.fill_(1.0)  # files have it multiplied in

    def scale_weight_norms(self, max_norm: float) -> tuple[int, float, float]:
        """Shrink updates with a norm above ``max_norm``. -> (scaled count, mean norm, largest)."""
        device = self.parameters()[0].device
        count, mean, largest = self.network.apply_max_norm_regularization(max_norm, device)
        return int(count), float(mean), float(largest)


def create_lycoris_network(
    model: SDModel,
    *,
    rank: int | None = 4,
    alpha: float | None = 1.0,
    dropout: float | None = 0.0,
    network_args: Sequence[str] | None = None,
    train_unet: bool = True,
    train_text_encoder: bool = True,
    weights: str | Path | None = None,
    dim_from_weights: bool = False,
) -> LycorisNetwork:
    """Put LyCORIS layers into a model, in place.

    network_args: the texts of --network_args, ``["algo=loha", "conv_dim=4", ...]``.
    weights: a LyCORIS file or its tensors; dim_from_weights: build the layers after them.
    Raises ValueError: an unknown option or algorithm, nothing to train, weights of others."""
    options, source = parse_lycoris_args(network_args), "the file"
    if isinstance(weights, (str, Path)):
        source, weights = f"--network_weights {weights}", load_lora(weights)[0]
    if weights is not None:
        weights = rename_modules(weights, find_modules(model, everywhere=True))
    text_encoders = model.text_encoders if len(model.text_encoders) > 1 else model.text_encoders[0]
    text_encoders = text_encoders if train_text_encoder else None
    if dim_from_weights:
        network = _network_like(weights, model, text_encoders)
    else:
        _refuse_ranks(model, text_encoders, train_unet, rank, options)
        options = {"dropout": dropout or 0.0, "warn_on_unmatched": False, **options}
        network = _created(network_args, model, text_encoders, rank, alpha, options)
    names = _unet_names(model)
    for module in network.text_encoder_loras + network.unet_loras:
        module.lora_name = _file_name(names.get(module.lora_name, module.lora_name))
    network.apply_to(text_encoders, model.unet, text_encoders is not None, train_unet)
    if weights is not None:
        weights = {_file_name(name): value for name, value in weights.items()}
        weights = rename_text_encoder(weights, [module.lora_name for module in network.loras])
        _refuse_other_layers(network, weights, source)
    if not network.loras:
        raise ValueError(
            "no layer to train: the U-Net and the text encoder are both switched off, or have no such layers"
        )
    wrapped = LycorisNetwork(network)
    if weights is not None and not dim_from_weights:
        wrapped.load_tensors(weights)
    return wrapped


def _created(network_args, model, text_encoders, rank, alpha, options):
    """LyCORIS' network. Raises ValueError where it stumbles on the options, however it does."""
    try:
        return create_lycoris(1.0, rank, alpha, model.vae, text_encoders, model.unet, **options)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        words = " ".join(network_args or [])
        raise ValueError(f"--network_args {words:.200}: LyCORIS refuses them ({first_line(error)})") from error


def _refuse_ranks(model, text_encoders, train_unet, rank, options):
    """Raise ValueError for a rank that no layer has. A lokr of a large rank is a whole matrix."""
    if options.get("algo", "lora").lower() == "lokr":
        return
    found = find_modules(model, train_unet, text_encoders is not None, everywhere=True)
    sides = [tuple(layer.weight.flatten(1).shape) for _, _, _, layer in found]
    for flag, value in (("--network_dim", rank), ("--network_args conv_dim", options.get("conv_dim"))):
        if sides and value:
            refuse_rank(flag, int(value), sides, found[0][3].weight.device)


def _refuse_other_layers(network, weights, source):
    """Raise ValueError, by the first names, where a file has other layers than are trained."""
    trained = {module.lora_name: () for module in network.loras}
    problems = differences({name: () for name in group_modules(weights)}, trained)
    if problems:
        words = "; ".join(problems).replace("tensors", "layers")
        raise ValueError(f"{source} does not fit this LyCORIS network of {len(trained)} layers: {words}{RANK_ADVICE}")


def parse_lycoris_args(arguments: Sequence[str] | None) -> dict[str, Any]:
    """``["algo=loha", "use_tucker=True"]`` -> {"algo": "loha", "use_tucker": True}.
    Raises ValueError with all problems."""
    parsed, problems = {}, []
    for argument in arguments or []:
        name, separator, text = argument.partition("=")
        if not separator or name not in OPTIONS + SWITCHES:
            near = difflib.get_close_matches(name, OPTIONS + SWITCHES, 1)
            problems.append(f"{argument!r} is unknown" + (f", did you mean {near[0]}=?" if near else ""))
        elif name == "algo" and text.lower() not in ALGORITHMS:
            problems.append(f"algo {text!r} is unknown; allowed are {', '.join(ALGORITHMS)}")
        elif name in SWITCHES and text.lower() not in ("true", "false"):
            problems.append(f"{argument!r}: only True or False is allowed")
        elif name in NUMBERS and (problem := _number_problem(name, text)):
            problems.append(f"{argument!r:.80}: {problem}")
        else:
            parsed[name] = text.lower() == "true" if name in SWITCHES else text
    if problems:
        raise ValueError(f"--network_args: {'; '.join(problems)}")
    return parsed


def _number_problem(name, text):
    """Why a text is no number for this option; None for one that is."""
    try:
        value = float(text)
    except ValueError:
        return "a number is expected"
    most = 1 if name.endswith("dropout") else MOST
    return None if 0 <= value < most else f"it must be at least 0 and below {most}"


def _network_like(weights, model, text_encoders):
    """Layers with the algorithm, rank and alpha of a file's tensors, and their values."""
    if weights is None:
        raise ValueError("--dim_from_weights needs --network_weights, the file whose layers are to be taken")
    own_names, flat = {name: own for own, name in _unet_names(model).items()}, ("lora_te_", "lora_te1_")
    renamed = {}
    for key, value in weights.items():
        module, dot, part = key.partition(".")
        if module.startswith(flat) and not hasattr(model.text_encoders[0], "text_model"):
            module = module.replace("_text_model_", "_", 1)
        renamed[own_names.get(module, module) + dot + part] = value
    along_input = {key: value for key, value in renamed.items() if key.endswith(".dora_scale") and len(value) == 1}
    others = {key: value for key, value in renamed.items() if key not in along_input}
    LycorisNetworkKohya.apply_preset(PRESET["full"])
    network, _ = create_network_from_weights(1.0, "", model.vae, text_encoders, model.unet, weights_sd=others)
    for module in network.unet_loras + network.text_encoder_loras:
        _set_magnitudes(module, along_input.get(f"{module.lora_name}.dora_scale"))
    return network


def _set_magnitudes(module, magnitudes):
    """DoRA's magnitudes of input channels (1, in, ...): lycoris-lora 4.1.3 reads a file's as of
    outputs."""
    if magnitudes is not None:
        module.wd, module.wd_on_out, module.dora_norm_dims = True, False, magnitudes.dim() - 1
        module.dora_scale = torch.nn.Parameter(magnitudes.float().clone())


def _unet_names(model):
    """{LyCORIS' name of a U-Net module, which follows diffusers: its name in kohya's files}."""
    paths = [path for path, _ in model.unet.named_modules()]
    return {
        f"lora_unet_{path}".replace(".", "_"): f"lora_unet_{model.lora_unet_name(path)}".replace(".", "_")
        for path in paths
    }


def _layer(module):
    kind = type(module).__name__
    if kind not in MEASURABLE:
        raise ValueError(
            f"CS cannot be measured for this LyCORIS algorithm ({kind}): its update is not a weight that is added "
            "to the frozen one. Use algo=lora, loha or lokr, or train without --calculate_cs and --early_stop"
        )
    if kind == "LoConModule" and not module.tucker and not isinstance(module.scalar, torch.nn.Parameter):
        weights = module.org_weight, module.lora_down.weight, module.lora_up.weight
        return LoraLayer(module.lora_name, _component(module), *weights)

    def update():
        return module.get_diff_weight() if kind == "LoConModule" else module.get_weight(module.shape) * module.scalar

    layer = module.lora_name, _component(module), module.org_weight
    return DenseUpdateLayer(*layer, lambda: without_dropout(module, update))


def _component(module):
    return module.lora_name.split("_")[1]  # lora_unet_..., lora_te_..., lora_te1_...


def _file_name(name):
    """transformers 5 has no text_model level in CLIPTextModel; the names in the file keep it."""
    prefix, part, rest = name.split("_", 2)
    if part.startswith("te") and not rest.startswith("text_model_"):
        return f"{prefix}_{part}_text_model_{rest}"
    return name

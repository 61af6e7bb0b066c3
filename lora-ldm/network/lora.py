"""LoRA layers in a Stable Diffusion model: PEFT's layers, kohya's modules, names, dropouts.

Modules are found as kohya's ``networks.lora`` does: every linear layer and 1x1 convolution in a
Transformer2DModel of the U-Net, and in the text encoder's attentions and MLPs; with a convolution
rank also all layers of residual, down- and upsampling blocks. They give W x + (alpha / r) B A x."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quiet_libraries  # noqa: F401  (before peft)
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.nn import functional

from base.memory import refuse_rank
from base.sd import SDModel
from base.tensor_files import differences
from cs_fluctuation import LoraLayer
from network.blocks import Size, block_size, rate_groups
from network.lora_file import group_modules, load_lora, rename_text_encoder, rename_unet
from settings.network_args import EQUAL_RATES, Blocks, RateFactors

ADAPTER = "default"
UNET_ATTENTION_BLOCKS = ("Transformer2DModel",)
UNET_CONVOLUTION_BLOCKS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
TEXT_ENCODER_BLOCKS = ("CLIPAttention", "CLIPMLP")
RANK_ADVICE = "; --dim_from_weights takes the ranks and alphas of the file"


@dataclass
class LoraModule:
    """One adapted layer: ``layer`` is PEFT's, around the frozen one."""

    name: str  # in kohya's files, without the part after the dot
    component: str  # "unet", "te", "te1", "te2"
    layer: torch.nn.Module
    rank: int
    alpha: float
    adapter: str = ADAPTER  # PEFT's name of this one among the adapters of the layer

    @property
    def down(self) -> torch.Tensor:
        return self.layer.lora_A[self.adapter].weight  # (r, in) or (r, in, kh, kw)

    @property
    def up(self) -> torch.Tensor:
        return self.layer.lora_B[self.adapter].weight  # (out, r) or (out, r, 1, 1)

    @property
    def weight(self) -> torch.Tensor:
        return self.layer.get_base_layer().weight  # (out, in) or (out, in, kh, kw)


class LoraNetwork:
    """The trainable layers of a model. Build it with ``create_network``."""

    def __init__(
        self,
        modules: list[LoraModule],
        *,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        rates: RateFactors = EQUAL_RATES,
    ):
        self.modules, self.rates = modules, rates
        self.dropout, self.rank_dropout = dropout or 0.0, rank_dropout or 0.0
        self.module_dropout = module_dropout or 0.0
        self.training = True
        self._multiplier = 1.0
        self._layers = None
        for module in modules:
            for weight in (module.down, module.up):
                weight.data = weight.data.float()  # trained in float32 unless .to() says otherwise (full fp16/bf16)
                weight.requires_grad_(True)
        if self.dropout or self.rank_dropout:
            for module in modules:
                module.layer.lora_A[module.adapter].register_forward_hook(self._drop_ranks)
        if self.module_dropout:
            for module in modules:
                module.layer.lora_B[module.adapter].register_forward_hook(self._drop_module)

    @property
    def components(self) -> list[str]:
        """The adapted parts in order: "unet", "te" (or "te1", "te2")."""
        return list(dict.fromkeys(module.component for module in self.modules))

    @property
    def multiplier(self) -> float:
        return self._multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        """Strength of the update in the forward pass; 0 gives the base model's output."""
        self._multiplier = float(value)
        for module in self.modules:
            module.layer.scaling[module.adapter] = self._multiplier * module.alpha / module.rank

    def train(self, mode: bool = True) -> "LoraNetwork":
        """Switch the dropouts on (as created) or off. Independent of unet.train() and .eval()."""
        self.training = mode
        return self

    def eval(self) -> "LoraNetwork":
        return self.train(False)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LoraNetwork":
        """Move or cast the trainable tensors only, in place: references to them stay valid."""
        for weight in self.tensors().values():
            weight.data = weight.data.to(device=device, dtype=dtype)
        return self

    def parameters(self) -> list[torch.Tensor]:
        return list(self.tensors().values())

    def parameter_groups(
        self, learning_rate: float, unet_lr: float | None = None, text_encoder_lr: float | list[float] | None = None
    ) -> list[dict[str, Any]]:
        """Optimizer groups, one a component, or as ``rates`` divide it; ``text_encoder_lr`` may be
        a list, one rate an encoder. Those whose rate is 0 are left out, as by kohya."""
        groups = []
        text_rates = text_encoder_lr if isinstance(text_encoder_lr, (list, tuple)) else [text_encoder_lr] * 2
        for component in self.components:
            specific = unet_lr if component == "unet" else text_rates[min(component == "te2", len(text_rates) - 1)]
            rate = learning_rate if specific is None else specific
            own = [module for module in self.modules if module.component == component]
            groups += rate_groups(component, own, rate, self.rates)
        return groups

    def layers(self) -> list[LoraLayer]:
        """What the CS metric looks at: live tensors, the same objects each time (||W|| is kept)."""
        if self._layers is None:
            self._layers = [LoraLayer(m.name, m.component, m.weight, m.down, m.up) for m in self.modules]
        return self._layers

    def tensors(self) -> dict[str, torch.Tensor]:
        """{kohya key: live trainable tensor}."""
        named = {}
        for module in self.modules:
            named[f"{module.name}.lora_down.weight"] = module.down
            named[f"{module.name}.lora_up.weight"] = module.up
        return named

    def state_for_file(
        self, dtype: torch.dtype | None = None, tensors: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """{kohya key: CPU copy}, alphas included; of live weights or a snapshot's ``tensors``."""
        alphas = {f"{module.name}.alpha": torch.tensor(float(module.alpha)) for module in self.modules}
        state = {**alphas, **self.tensors(), **(tensors or {})}
        return {name: value.detach().to("cpu", dtype, copy=True) for name, value in state.items()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set the weights from {kohya key: tensor}; an ``alpha`` is folded in, not trained.
        Unnamed modules keep their weights. Raises ValueError for modules or shapes that differ."""
        mine = {module.name: module for module in self.modules}
        given = group_modules(rename_text_encoder(tensors, mine))
        problems = []
        for name, parts in given.items():
            problems += _load_module(mine.get(name), name, parts)
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            advice = RANK_ADVICE if any(_other_rank(mine.get(name), parts) for name, parts in given.items()) else ""
            raise ValueError(f"the LoRA does not fit this network: {'; '.join(problems[:3])}{more}{advice}")

    @torch.no_grad()
    def scale_weight_norms(self, max_norm: float) -> tuple[int, float, float]:
        """Shrink updates of norm ||alpha/r B A|| > ``max_norm``. -> (scaled, mean and top norm)."""
        scaled, norms = 0, []
        for module in self.modules:
            down, up = module.down.flatten(1).float(), module.up.flatten(1).float()
            squared = ((down @ down.T) * (up.T @ up)).sum().clamp(min=0)  # ||BA||^2 without forming B A
            norm = (squared.sqrt() * module.alpha / module.rank).item()
            if norm > max_norm:
                factor = (max_norm / norm) ** 0.5
                module.down.mul_(factor)
                module.up.mul_(factor)
                scaled, norm = scaled + 1, max_norm
            norms.append(norm)
        return scaled, sum(norms) / len(norms), max(norms)

    def _drop_ranks(self, _layer, _inputs, hidden):
        """kohya's dropouts act on the r values between down and up: single ones or whole ranks."""
        if not self.training:
            return hidden
        hidden = functional.dropout(hidden, self.dropout)
        if self.rank_dropout:
            is_image = hidden.dim() == 4  # (B, r, h, w); else (B, ..., r)
            shape = [hidden.shape[0]] + [1] * (hidden.dim() - 1)
            shape[1 if is_image else -1] = hidden.shape[1 if is_image else -1]
            kept = torch.rand(shape, device=hidden.device) >= self.rank_dropout
            hidden = hidden * kept / (1 - self.rank_dropout)
        return hidden

    def _drop_module(self, _layer, _inputs, update):
        if self.training and torch.rand(()).item() < self.module_dropout:
            return torch.zeros_like(update)
        return update


def create_network(
    model: SDModel,
    *,
    rank: int | None = 4,
    alpha: float | None = 1.0,
    conv_rank: int | None = None,
    conv_alpha: float | None = None,
    dropout: float | None = 0.0,
    rank_dropout: float | None = 0.0,
    module_dropout: float | None = 0.0,
    train_unet: bool = True,
    train_text_encoder: bool = True,
    blocks: Blocks | None = None,
    rates: RateFactors = EQUAL_RATES,
    weights: str | Path | dict[str, torch.Tensor] | None = None,
    dim_from_weights: bool = False,
) -> LoraNetwork:
    """Put LoRA layers into a model, in place.

    model: SDModel (unet, text_encoders, lora_unet_name).
    rank, alpha: of linear layers and 1x1 convolutions; an alpha of 0 or None means the rank.
    conv_rank, conv_alpha: of 3x3 convolutions; None leaves the convolution blocks alone.
    dropout, rank_dropout, module_dropout: chance that a value inside, a rank, a layer is off.
    blocks: ranks and alphas of the U-Net's blocks. rates: factors of the learning rates.
    weights: a LoRA file or {kohya key: tensor} to start from.
    dim_from_weights: modules, ranks and alphas are those of ``weights``, not rank, alpha, conv_*.
    Raises ValueError: nothing to train, or the weights do not fit."""
    if dim_from_weights and weights is None:
        raise ValueError("--dim_from_weights needs --network_weights, the LoRA whose ranks are to be taken")
    source = f"--network_weights {weights}" if isinstance(weights, (str, Path)) else "the LoRA"
    if isinstance(weights, (str, Path)):
        weights = load_lora(weights)[0]
    with_convolutions = bool(conv_rank or (blocks and blocks.conv_dims))
    candidates = find_modules(model, train_unet, train_text_encoder, with_convolutions, everywhere=dim_from_weights)
    if not candidates:
        raise ValueError(
            "no layer to train: the U-Net and the text encoder are both switched off, or have no such layers"
        )
    if weights is not None:
        weights = rename_modules(weights, candidates)
    if dim_from_weights:
        sizes = sizes_from_weights(weights)
    else:
        linear = (4 if rank is None else rank, alpha or 0)  # kohya's default
        sizes = _sizes(candidates, linear, (conv_rank or 0, conv_alpha), blocks)
    sizes = {name: size for _, _, name, _ in candidates if (size := sizes.get(name))}
    if not sizes and not dim_from_weights:
        raise ValueError("no layer to train: every block of the U-Net has rank 0 or the weight 0")
    if weights is not None:
        weights = _of_trained(weights, sizes, model, candidates, source)
    if not sizes:
        raise ValueError(f"no layer to train: {source} has none of the parts that are switched on")
    if not dim_from_weights:
        _refuse_ranks(candidates, sizes, blocks)
    modules = _inject(model, candidates, sizes)
    dropouts = {"dropout": dropout, "rank_dropout": rank_dropout, "module_dropout": module_dropout}
    network = LoraNetwork(modules, **dropouts, rates=rates)
    if weights is not None:
        network.load_tensors(weights)
    return network


def _sizes(candidates, linear: Size, convolution: Size, blocks: Blocks | None) -> dict[str, Size | None]:
    """{layer: (rank, alpha), None for no LoRA}; an alpha of 0 or None means the rank."""
    if blocks and convolution[1] is None:
        convolution = (convolution[0], 1.0)  # kohya's default
    sizes = {}
    for component, _, name, layer in candidates:
        pointwise = _is_pointwise(layer)
        rank, alpha = common = linear if pointwise else convolution
        if blocks and component == "unet":
            sizes[name] = block_size(blocks, name, common, pointwise)
        else:
            sizes[name] = (rank, float(alpha or rank)) if rank else None
    return sizes


def _refuse_ranks(candidates, sizes, blocks):
    """Raise ValueError where a rank is more than layers have, or than there is room for."""
    own = {True: blocks and blocks.dims, False: blocks and blocks.conv_dims}
    flags = {True: ("--network_dim", "--network_args block_dims")}
    flags[False] = ("--network_args conv_dim", "--network_args conv_block_dims")
    sides: dict[tuple[str, int], list] = {}
    for component, _, name, layer in candidates:
        if name in sizes:
            pointwise = _is_pointwise(layer)
            flag = flags[pointwise][bool(component == "unet" and own[pointwise])]
            sides.setdefault((flag, sizes[name][0]), []).append(tuple(layer.weight.flatten(1).shape))
    for (flag, rank), shapes in sides.items():
        refuse_rank(flag, rank, shapes, candidates[0][3].weight.device)


def _of_trained(weights, sizes, model, candidates, source):
    """The weights of what is trained, which must be all of it; whole untrained parts are left out.
    Raises ValueError, by the first names, for layers that lack, and for those that fit none."""
    given = list(group_modules(weights))
    trained_parts = {component for component, _, _, _ in candidates}
    others = [entry for entry in find_modules(model, everywhere=True) if entry[0] not in trained_parts]
    left_out = {name for _, _, name, _ in others}
    known = rename_modules(weights, candidates + others)
    problems = differences(
        {name: () for name in group_modules(known) if name not in left_out}, {name: () for name in sizes}
    )
    if problems:
        words = "; ".join(problems).replace("tensors", "layers")
        fix = "train the parts that it has (--network_train_unet_only), or --dim_from_weights takes its layers"
        raise ValueError(
            f"{source} does not fit this network of {len(sizes)} layers, it has {len(given)}: {words}; {fix}"
        )
    return {key: value for key, value in known.items() if key.partition(".")[0] in sizes}


def create_network_beside(model: SDModel, network: LoraNetwork, adapter: str, rank: int) -> LoraNetwork:
    """A fresh network ``adapter`` in the layers of ``network``, with its alphas and dropouts.
    A forward pass goes through ``network``; the new one lies in the layers for who calls it."""
    places = {}
    for component, root in component_roots(model).items():
        places.update({id(layer): (component, path) for path, layer in root.named_modules()})
    candidates = [(*places[id(module.layer)], module.name, module.layer) for module in network.modules]
    sizes = {module.name: (rank, module.alpha) for module in network.modules}
    sides = [tuple(module.weight.flatten(1).shape) for module in network.modules]
    refuse_rank("--shadow_rank", rank, sides, network.modules[0].weight.device)
    trained = [weight for module in network.modules for weight in module.layer.parameters() if weight.requires_grad]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is meant here
        modules = _inject(model, candidates, sizes, adapter)
    for module in modules:
        module.layer.set_adapter(ADAPTER)
    for weight in trained:  # PEFT has frozen all but one adapter
        weight.requires_grad_(True)
    dropouts = {
        "dropout": network.dropout,
        "rank_dropout": network.rank_dropout,
        "module_dropout": network.module_dropout,
    }
    return LoraNetwork(modules, **dropouts, rates=network.rates)


def find_modules(
    model: SDModel,
    train_unet: bool = True,
    train_text_encoder: bool = True,
    with_convolutions: bool = False,
    everywhere: bool = False,
) -> list[tuple[str, str, str, torch.nn.Module]]:
    """[(component, path in its root, kohya name, frozen layer)] in the order of the file.
    ``everywhere`` finds all linear and convolution layers: other trainers may have any."""
    found = []
    text_blocks = None if everywhere else TEXT_ENCODER_BLOCKS
    unet_blocks = UNET_ATTENTION_BLOCKS + (UNET_CONVOLUTION_BLOCKS if with_convolutions else ())
    if train_text_encoder:
        several = len(model.text_encoders) > 1
        for index, text_encoder in enumerate(model.text_encoders):
            component = f"te{index + 1}" if several else "te"
            for path, layer in _layers_inside(text_encoder, text_blocks):
                # transformers 5 has no text_model level in CLIPTextModel; the files' names keep it.
                inner = path.startswith(("text_model.", "text_projection"))
                full_path = path if inner else f"text_model.{path}"
                found.append((component, path, f"lora_{component}_{full_path}".replace(".", "_"), layer))
    if train_unet:
        for path, layer in _layers_inside(model.unet, None if everywhere else unet_blocks):
            found.append(("unet", path, f"lora_unet_{model.lora_unet_name(path)}".replace(".", "_"), layer))
    return found


def rename_modules(tensors: dict[str, torch.Tensor], candidates: list[tuple]) -> dict[str, torch.Tensor]:
    """{key of a LoRA file: tensor} under the names that this model's modules have.

    Programs disagree on the first text encoder's prefix and on the layout that names the U-Net.
    candidates: what ``find_modules`` gives."""
    numbers = (re.match(r"down_blocks\.0\.(?:resnets|attentions)\.(\d+)\.", path) for _, path, _, _ in candidates)
    layers_per_block = max((int(match[1]) + 1 for match in numbers if match), default=2)
    renamed = rename_unet(tensors, [name for _, _, name, _ in candidates], layers_per_block)
    return rename_text_encoder(renamed, [name for _, _, name, _ in candidates])


def component_roots(model: SDModel) -> dict[str, torch.nn.Module]:
    """{component: the module that its layers' paths start from}."""
    several = len(model.text_encoders) > 1
    roots = {f"te{index + 1}" if several else "te": encoder for index, encoder in enumerate(model.text_encoders)}
    return {**roots, "unet": model.unet}


def sizes_from_weights(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, float]]:
    """{module: (rank, alpha)} of a LoRA file; without an alpha it is the rank."""
    sizes = {}
    for name, parts in group_modules(tensors).items():
        if "lora_down.weight" in parts:
            rank = parts["lora_down.weight"].shape[0]
            sizes[name] = (rank, float(parts.get("alpha", rank)))
    if not sizes:
        raise ValueError("the LoRA file holds no lora_down.weight, so that no rank can be taken from it")
    return sizes


def _layers_inside(root, block_names):
    found = {}
    for block_path, block in root.named_modules():
        if block_names is not None and type(block).__name__ not in block_names:
            continue
        for path, layer in block.named_modules(prefix=block_path):
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                found[path] = layer
    return found.items()


def _is_pointwise(layer):
    return isinstance(layer, torch.nn.Linear) or layer.kernel_size == (1, 1)


def _inject(model, candidates, sizes, adapter=ADAPTER):
    modules = []
    for component, root in component_roots(model).items():
        chosen = {path: name for part, path, name, _ in candidates if part == component and name in sizes}
        if not chosen:
            continue
        patterns = _patterns(chosen, sizes)
        config = LoraConfig(
            target_modules=list(chosen),
            rank_pattern={pattern: rank for pattern, (rank, _) in patterns.items()},
            alpha_pattern={pattern: alpha for pattern, (_, alpha) in patterns.items()},
        )
        inject_adapter_in_model(config, root, adapter)
        for path, name in chosen.items():
            modules.append(LoraModule(name, component, root.get_submodule(path), *sizes[name], adapter))
    return modules


def _patterns(chosen, sizes):
    """{expression that matches the paths of a size: the size}. One for each path is slow: PEFT
    tries them all for every layer, and compiles them anew beyond the 512 that Python keeps."""
    paths: dict[Size, list[str]] = {}
    for path, name in chosen.items():
        paths.setdefault(tuple(sizes[name]), []).append(re.escape(path))
    return {"|".join(own): size for size, own in paths.items()}


def _other_rank(module, parts):
    """Whether a file's module differs from this one in its rank."""
    return module is not None and "lora_down.weight" in parts and len(parts["lora_down.weight"]) != module.rank


def _load_module(module, name, parts):
    """Copy one module's tensors in; -> the list of what does not fit."""
    if module is None:
        return [f"no module {name} is trained here"]
    unsupported = set(parts) - {"lora_down.weight", "lora_up.weight", "alpha"}
    if unsupported:
        return [f"{name} has {', '.join(sorted(unsupported))}, which is not plain LoRA"]
    problems = []
    for part, target in (("lora_down.weight", module.down), ("lora_up.weight", module.up)):
        if part not in parts:
            continue
        value = parts[part].to(target.dtype)
        if value.flatten(1).shape != target.flatten(1).shape:
            problems.append(f"{name}.{part} is {tuple(value.shape)} instead of {tuple(target.shape)}")
            continue
        if part == "lora_up.weight":
            value = value * (float(parts.get("alpha", module.alpha)) / module.alpha)
        target.copy_(value.reshape(target.shape))
    return problems

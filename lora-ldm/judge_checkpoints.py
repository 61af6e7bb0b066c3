"""Say which of the LoRA adapters that some trainer saved is to be kept, from their weights and those of the base alone.

    python judge_checkpoints.py FOLDER --base BASE [--rule R|recorded] [--steps_per_epoch N] [--json] [--html FILE.html]

FOLDER holds the adapters of one run: PEFT's `checkpoint-500/adapter_model.safetensors`, diffusers'
`checkpoint-500/pytorch_lora_weights.safetensors`, or kohya's `name-000003.safetensors` (epochs),
`name-step00000500.safetensors` (steps) and `name.safetensors` (the last). BASE is a Hugging Face folder, a diffusers
folder, or a Stable Diffusion checkpoint in one .safetensors file. The base is read tensor by tensor, in blocks of rows.
The file stands in both trees, beside cs_fluctuation.py, stop_rules.py and cs_replay.py; Python 3.8, torch 1.13.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from cs_fluctuation import (
    HISTORY_FORMAT,
    HISTORY_NAME,
    Decision,
    DenseWeight,
    FluctuationSeries,
    LoraLayer,
    NonFiniteWeightsError,
    measure_layers,
)
from cs_replay import History, read_history, redecide, settings_for, write_report
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from stop_rules import DEFAULT_RULE, RULES, auto_window, make_rule, replay

PEFT_NAME, DIFFUSERS_NAME = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
# Where only weights are at hand. By the figures of tests/benchmarks/stop_quality no rule on weights that does without a window,
# and so could judge one checkpoint an epoch, beats keeping epoch 2 of any run: there the verdict is "too sparse to say".
RULE_BY_WEIGHTS = "second-valley"
WEIGHT_COLUMNS = {"step", "epoch", "cs", "cs_row", "cs_matrix", "delta_norm", "stable_rank", "fluctuation"}
MEASUREMENTS_PER_EPOCH = 5  # fewer, and the window of at least 5 measurements no longer is about one epoch
MISSING_SHARE = 0.1  # of the measurements that a verdict bears
READ_VALUES = 500_000  # of a weight that are held in float32 at once

Key = Tuple[str, str]  # (component, layer path)


class BaseMismatchError(LookupError):
    """The base is not the model that the adapters were trained on, or is stored in a form that cannot be read."""


# ------------------------------------------------------------------------------------------------ the base, on disk


class Stored(NamedTuple):
    """Where a frozen weight lies: file, tensor name, and its first row where it is a part of a fused tensor."""

    file: Path
    tensor: str
    first_row: int = 0


class BlockBuffer:
    """One float32 block that all weights are read through: allocated and freed anew, such blocks fragment the heap."""

    def __init__(self):
        self._values = torch.empty(0)

    def filled(self, block: torch.Tensor) -> torch.Tensor:
        """`block` in float32, valid until the next call."""
        if self._values.numel() < block.numel():
            self._values = torch.empty(max(READ_VALUES, block.numel()))
        return self._values[: block.numel()].view(block.shape).copy_(block)


class FileWeight(DenseWeight):
    """A frozen weight W (out, in) that stays in its file: read in blocks of rows for one use and dropped.

    transposed: the file holds W^T (in, out), as GPT-2's Conv1D does. The row norms are computed once.
    """

    def __init__(self, stored: Stored, out_rows: int, row_values: int, transposed: bool, buffer: BlockBuffer):
        super().__init__(stored)
        self.out_rows, self.row_values, self.transposed, self.buffer = out_rows, row_values, transposed, buffer
        self._norms: Optional[torch.Tensor] = None

    def _row_blocks(self) -> Iterator[torch.Tensor]:
        rows, first = max(1, READ_VALUES // self.row_values), self.weight.first_row
        # Opened anew for each use: pages of an open file count as the memory of this process.
        with safe_open(str(self.weight.file), framework="pt") as handle:
            stored = handle.get_slice(self.weight.tensor)
            for start in range(0, self.out_rows, rows):
                stop = min(start + rows, self.out_rows)
                block = stored[:, start:stop].T if self.transposed else stored[first + start : first + stop].flatten(1)
                yield self.buffer.filled(block)  # (rows, in)

    def row_norms(self) -> torch.Tensor:
        if self._norms is None:
            self._norms = super().row_norms()
        return self._norms


def _model_files(folder: Path) -> List[Path]:
    """The safetensors files of one model: those that its index names, the one of the usual name, or all there are."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        return sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    for name in ("model", "diffusion_pytorch_model", "model.fp16", "diffusion_pytorch_model.fp16"):
        if (folder / f"{name}.safetensors").is_file():
            return [folder / f"{name}.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file; save the base as safetensors (pickle is not read)")
    return files


def _shapes(file: Path) -> Dict[str, Tuple[int, ...]]:
    """{tensor name: shape} of a base file. Raises ValueError where it is damaged."""
    try:
        with safe_open(str(file), framework="pt") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the base file {file} cannot be read ({error}); fetch it again") from error


OPEN_CLIP = {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}
RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}


def unet_layer_name(name: str, layers_per_block: int) -> str:
    """diffusers' name of a U-Net layer, dots as underscores, from that name or the original latent-diffusion one."""
    name = re.sub(r"_processor(?=_|$)", "", name)
    name = re.sub(r"(attn\d)_to_out$", r"\1_to_out_0", name)
    if name in UNET_ENDS:
        return UNET_ENDS[name]
    match = re.match(r"(input|output)_blocks_(\d+)_(\d+)_(.+)$", name)
    if match:
        side, number, slot, rest = match[1], int(match[2]), match[3], match[4]
        block, index = divmod(number - (1 if side == "input" else 0), layers_per_block + 1)
        prefix = f"{'down' if side == 'input' else 'up'}_blocks_{block}"
        if rest == "op":
            return f"{prefix}_downsamplers_0_conv"
        if rest == "conv":
            return f"{prefix}_upsamplers_0_conv"
        return f"{prefix}_resnets_{index}_{RESNET.get(rest, rest)}" if slot == "0" else f"{prefix}_attentions_{index}_{rest}"
    match = re.match(r"middle_block_(\d)_(.+)$", name)
    if match:
        part = "attentions_0" if match[1] == "1" else f"resnets_{int(match[1]) // 2}"
        return f"mid_block_{part}_{RESNET.get(match[2], match[2])}"
    return name


def text_layer_name(name: str) -> str:
    """transformers' name of a text encoder's layer, dots as underscores, without the `text_model` level."""
    name = re.sub(r"^text_model_", "", name)
    return re.sub(r"self_attn_to_(q|k|v|out)$", r"self_attn_\1_proj", name)


class Base:
    """The frozen model as an index of weights on disk; nothing of it is held.

    Raises FileNotFoundError or ValueError where `path` is no base in a known layout.
    """

    def __init__(self, path: Path):
        self.path, self.layers_per_block = path, 2
        self.stored: Dict[Key, Stored] = {}
        self.shapes: Dict[Key, Tuple[int, ...]] = {}
        if path.is_file():
            self._index_file(path)
        elif (path / "model_index.json").is_file() or (path / "unet").is_dir():
            parts = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2", "transformer": "transformer"}
            self._index_folders({part: path / name for name, part in parts.items() if (path / name).is_dir()})
        elif path.is_dir():
            self._index_folders({"lm": path})
        else:
            raise FileNotFoundError(f"no base at {path}; give a folder or a .safetensors file (nothing is downloaded)")

    def _add(self, component: str, name: str, shape: Tuple[int, ...], stored: Stored) -> None:
        key = (component, self._layer_name(component, name))
        self.stored[key], self.shapes[key] = stored, shape

    def _layer_name(self, component: str, name: str) -> str:
        if component == "lm":
            return name
        flat = name.replace(".", "_")
        if component == "unet":
            return unet_layer_name(flat, self.layers_per_block)
        return text_layer_name(flat) if component.startswith("te") else flat

    def _index_folders(self, folders: Dict[str, Path]) -> None:
        for component, folder in folders.items():
            shapes = {(file, name): shape for file in _model_files(folder) for name, shape in _shapes(file).items()}
            if component == "unet":
                names = " ".join(name for _, name in shapes)
                self.layers_per_block = len(set(re.findall(r"down_blocks\.0\.resnets\.(\d+)", names))) or 2
            for (file, name), shape in shapes.items():
                if name.endswith(".weight"):
                    self._add(component, name[: -len(".weight")], shape, Stored(file, name))

    def _index_file(self, file: Path) -> None:
        if file.suffix != ".safetensors":
            raise ValueError(f"the base {file} is no .safetensors file; convert it (pickle files are not read)")
        shapes = _shapes(file)
        unet = "model.diffusion_model."
        if not any(name.startswith(unet) for name in shapes):
            for name, shape in shapes.items():
                self._add("lm", re.sub(r"\.weight$", "", name), shape, Stored(file, name))
            return
        downsamplers = [re.match(unet + r"input_blocks\.(\d+)\.0\.op\.", name) for name in shapes]
        numbers = [int(match[1]) for match in downsamplers if match]
        self.layers_per_block = min(numbers) - 1 if numbers else 2
        encoders = {
            "cond_stage_model.transformer.": "te1",
            "cond_stage_model.model.": "te1",
            "conditioner.embedders.0.transformer.": "te1",
            "conditioner.embedders.1.model.": "te2",
        }
        for name, shape in shapes.items():
            if name.startswith(unet) and name.endswith(".weight"):
                self._add("unet", name[len(unet) : -len(".weight")], shape, Stored(file, name))
            for prefix, component in encoders.items():
                if name.startswith(prefix):
                    self._add_text(component, name[len(prefix) :], shape, Stored(file, name))

    def _add_text(self, component: str, name: str, shape: Tuple[int, ...], stored: Stored) -> None:
        """A tensor of a text encoder, in transformers' or in OpenCLIP's layout (queries, keys, values in one tensor)."""
        match = re.match(r"transformer\.resblocks\.(\d+)\.(.+)$", name)
        if match is None:
            if name.endswith(".weight"):
                self._add(component, name[: -len(".weight")], shape, stored)
            return
        layer = f"encoder.layers.{match[1]}"
        if match[2] == "attn.in_proj_weight":
            rows = shape[0] // 3
            for index, letter in enumerate("qkv"):
                part = stored._replace(first_row=index * rows)
                self._add(component, f"{layer}.self_attn.{letter}_proj", (rows, *shape[1:]), part)
        elif match[2].endswith(".weight"):
            inner = match[2][: -len(".weight")]
            self._add(component, f"{layer}.{OPEN_CLIP.get(inner, inner)}", shape, stored)

    def component(self, component: str) -> str:
        """The name under which CS is reported: the only text encoder is `te`, as in the trainers."""
        several = any(part == "te2" for part, _ in self.stored)
        return "te" if component == "te1" and not several else component

    def find(self, component: str, path: str) -> Optional[Key]:
        """The base's key of an adapted layer; a language model's outer levels may be missing on either side."""
        key = (component, self._layer_name(component, path))
        if key in self.stored or component != "lm":
            return key if key in self.stored else None
        levels = path.split(".")
        for start in range(1, len(levels)):
            if ("lm", ".".join(levels[start:])) in self.stored:
                return ("lm", ".".join(levels[start:]))
        longer = [known for known in self.stored if known[1].endswith("." + path)]
        return longer[0] if len(longer) == 1 else None


# ------------------------------------------------------------------------------------------------ adapter files


class LoraModule(NamedTuple):
    """down A (r, in, ...), up B (out, r, ...), and the factor (alpha / r) of their product."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


@dataclass
class Adapter:
    modules: Dict[Key, LoraModule]
    transposed: bool = False  # fan_in_fan_out: the base's weights are stored (in, out)


_PEFT_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight$")
_DIFFUSERS_KEY = re.compile(
    r"^(?:(?P<part>unet|text_encoder_2|text_encoder|transformer)\.)?(?P<path>.+?)"
    r"(?:\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<plain>down|up)\.weight|\.alpha)$"
)
_KOHYA_KEY = re.compile(r"^lora_(?P<part>unet|te1|te2|te)_(?P<path>[^.]+)\.(?P<rest>.+)$")
_PARTS = {None: "unet", "unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2", "transformer": "transformer"}
_KOHYA_PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}


def _split_key(name: str, is_peft: bool) -> Optional[Tuple[Key, str]]:
    """((component, path), "down" | "up" | "alpha"), None for a tensor beside the LoRA (DoRA magnitudes, trained heads)."""
    if is_peft:
        match = _PEFT_KEY.match(name)
        return (("lm", match["path"]), "down" if match["side"] == "A" else "up") if match else None
    match = _KOHYA_KEY.match(name)
    if match:
        if match["rest"] in _KOHYA_PARTS:
            return ("te1" if match["part"] == "te" else match["part"], match["path"]), _KOHYA_PARTS[match["rest"]]
        if match["rest"] == "dora_scale":
            return None
        raise ValueError(f"{name} is no part of a plain LoRA (LoHa, LoKr and Tucker convolutions cannot be judged)")
    match = _DIFFUSERS_KEY.match(name)
    if match is None:
        return None
    side = {"A": "down", "B": "up", None: match["plain"] or "alpha"}[match["peft"]]
    return (_PARTS[match["part"]], match["path"]), side


def _peft_scale(config: Dict[str, Any], path: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    given = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)]
    alpha = given[0] if given else config.get("lora_alpha") or rank
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_adapter(file: Path) -> Adapter:
    """The LoRA of one file, in PEFT's, kohya's or diffusers' naming. Raises ValueError where it cannot be used."""
    try:
        tensors = load_file(str(file))
        config_file = file.with_name("adapter_config.json")
        is_peft = file.name == PEFT_NAME
        config = json.loads(config_file.read_text(encoding="utf-8")) if is_peft else {}
        diffusers_config = json.loads(_metadata(file).get("lora_adapter_metadata", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"it cannot be read: {error}") from error
    parts: Dict[Key, Dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        split = _split_key(name, is_peft)
        if split is not None:
            parts.setdefault(split[0], {})[split[1]] = tensor
    if not parts:
        raise ValueError("it holds no LoRA of PEFT's, kohya's or diffusers' naming")
    modules = {}
    for key, sides in parts.items():
        if "down" not in sides or "up" not in sides:
            raise ValueError(f"layer {key[1]} has no {'lora_up' if 'down' in sides else 'lora_down'} matrix")
        down, up, rank = sides["down"], sides["up"], sides["down"].shape[0]
        if up.flatten(1).shape[1] != rank:
            raise ValueError(f"layer {key[1]}: lora_down {tuple(down.shape)} and lora_up {tuple(up.shape)} do not fit")
        # diffusers keeps a PEFT configuration for each part, its names led by the part's.
        part_names = [name for name, component in _PARTS.items() if name and component == key[0]]
        own = {name.partition(".")[2]: value for name, value in diffusers_config.items() if name.partition(".")[0] in part_names}
        scale = float(sides["alpha"]) / rank if "alpha" in sides else _peft_scale(config or own, key[1], rank)
        modules[key] = LoraModule(down, up, scale)
    return Adapter(modules, bool(config.get("fan_in_fan_out")))


# ------------------------------------------------------------------------------------------------ measuring


@torch.no_grad()
def _spectrum(module: LoraModule) -> Tuple[float, float]:
    """(||BA||_F^2, stable rank ||BA||_F^2 / ||BA||_2^2) through the r x r core; 0 and 0 of a zero update."""
    _, up_core = torch.linalg.qr(module.up.flatten(1).float(), mode="r")  # (r, r)
    _, down_core = torch.linalg.qr(module.down.flatten(1).float().T, mode="r")
    squares = torch.linalg.svdvals(up_core @ down_core.T).square()
    total, largest = squares.sum().item(), squares.max().item()
    return total, total / largest if largest > 0 else 0.0


class Measurer:
    """Measures adapters against one base; the frozen weights' norms are computed at the first and kept."""

    def __init__(self, base: Base):
        self.base = base
        self._weights: Dict[Key, FileWeight] = {}
        self._buffer = BlockBuffer()

    def measure(self, adapter: Adapter) -> Dict[str, Any]:
        """The columns cs_row, cs_matrix, delta_norm, stable_rank (mean over layers) and update_norm ({component: value}).

        update_norm is the root of the summed squares of ||scale BA||, what is added to the weights.
        Raises BaseMismatchError where the base lacks a weight or has it in another shape.
        """
        self._find_weights(adapter)
        layers, spectra = [], []
        for key, module in adapter.modules.items():
            component = self.base.component(key[0])
            layers.append(LoraLayer(key[1], component, self._weights[key], module.down, module.up))
        measured = dict(measure_layers(layers))
        for layer, module in zip(layers, adapter.modules.values()):
            spectra.append((layer.component, module.scale, *_spectrum(module)))
        measured["stable_rank"], measured["update_norm"] = {}, {}
        for component in measured["cs_row"]:
            mine = [row for row in spectra if component in ("all", row[0])]
            measured["stable_rank"][component] = math.fsum(row[3] for row in mine) / len(mine)
            measured["update_norm"][component] = math.sqrt(math.fsum(row[1] ** 2 * row[2] for row in mine))
        return measured

    def _find_weights(self, adapter: Adapter) -> None:
        missing, unfit = [], []
        for key, module in adapter.modules.items():
            if key in self._weights:
                continue
            found = self.base.find(*key)
            if found is None:
                missing.append(f"{key[0]} layer {key[1]}")
                continue
            shape, wanted = self.base.shapes[found], (module.up.shape[0], module.down.flatten(1).shape[1])
            flat = (shape[0], math.prod(shape[1:]))
            transposed = len(shape) == 2 and flat == wanted[::-1] and (adapter.transposed or flat != wanted)
            if not transposed and flat != wanted:
                unfit.append(f"{key[1]} is {flat} in the base and {wanted} in the adapter")
                continue
            self._weights[key] = FileWeight(self.base.stored[found], *wanted, transposed, self._buffer)
        if missing:
            raise BaseMismatchError(
                f"the base {self.base.path} has no weight for {len(missing)} of {len(adapter.modules)} LoRA layers: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; is it the model they were trained on?"
            )
        if unfit:
            raise BaseMismatchError(
                f"{len(unfit)} weights of the base {self.base.path} have another shape: {'; '.join(unfit[:3])}; give the "
                "unquantised base that the adapters were trained on"
            )


# ------------------------------------------------------------------------------------------------ the folder


@dataclass
class Checkpoint:
    """One saved adapter. step counts completed optimizer steps; epoch is the number in an epoch checkpoint's name."""

    name: str
    file: Path
    step: Optional[int] = None
    epoch: Optional[int] = None
    metadata: Dict[str, str] = field(default_factory=dict)
    columns: Dict[str, Any] = field(default_factory=dict)


def _metadata(file: Path) -> Dict[str, str]:
    try:
        with safe_open(str(file), framework="pt") as handle:
            return handle.metadata() or {}
    except (SafetensorError, OSError):
        return {}  # named when its tensors are read


def _number(text: Any) -> Optional[int]:
    return int(text) if text is not None and re.match(r"\d+$", str(text)) else None


def _folder_checkpoints(folder: Path, problems: Dict[str, str]) -> List[Checkpoint]:
    """PEFT's and diffusers' folders: checkpoint-N, and other kept adapters whose metadata or state tells their step."""
    found = []
    for place in [folder, *sorted(entry for entry in folder.iterdir() if entry.is_dir())]:
        name = "." if place == folder else place.name
        file = next((place / known for known in (PEFT_NAME, DIFFUSERS_NAME) if (place / known).is_file()), None)
        number = re.match(r"checkpoint-(\d+)$", place.name) if place != folder else None
        if file is None:
            if number or (place / "adapter_config.json").is_file():
                problems[name] = f"it holds no {PEFT_NAME} or {DIFFUSERS_NAME} (pickle files are not read)"
            continue
        metadata = _metadata(file)
        checkpoint = Checkpoint(name, file, int(number[1]) if number else None, None, metadata)
        if checkpoint.step is None:
            facts = json.loads(metadata.get("es_lora", "{}"))
            checkpoint.step = _kept_step(place, facts) if facts else _state(place).get("global_step")
        found.append(checkpoint)
    return found


def _kept_step(place: Path, facts: Dict[str, Any]) -> Optional[int]:
    """The step of an adapter of es_lora_llm.py or its callback, None where it could be of the kept or of the last step.

    A run that stopped early has `adapter-last` beside the kept `adapter`; one that went on has `adapter-turning-point`
    beside the last.
    """
    kept, last = facts.get("kept_step"), facts.get("last_step")
    if place.name.endswith("-last") or kept is None or place.with_name(f"{place.name}-turning-point").is_dir():
        return last
    if place.name.endswith("-turning-point") or place.with_name(f"{place.name}-last").is_dir():
        return kept
    return kept if kept == last else None


def _state(folder: Path) -> Dict[str, Any]:
    try:
        return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _file_checkpoints(folder: Path, problems: Dict[str, str]) -> List[Checkpoint]:
    """kohya's files of one run: NAME-000003 (epoch), NAME-step00000500 (step), NAME or, where it stands, NAME-last."""
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name not in (PEFT_NAME, DIFFUSERS_NAME)]
    named = {file: re.match(r"(.+?)(?:-step(\d{8})|-(\d{6}))?$", file.stem) for file in files}
    runs = sorted({match[1] for match in named.values() if match[2] or match[3]})
    if len(runs) > 1:
        raise ValueError(f"{folder} holds the checkpoints of {len(runs)} runs ({', '.join(runs)}); give a folder of one run")
    last = runs[0] + ("-last" if runs and (folder / f"{runs[0]}-last.safetensors").is_file() else "") if runs else None
    found = []
    for file, match in named.items():
        metadata = _metadata(file)
        step, epoch = _number(match[2]), _number(match[3])
        if step is None and (epoch is not None or file.stem == last or last is None):
            step = _number(metadata.get("ss_steps", metadata.get("ss_max_train_steps") if epoch is None else None))
        if step is None and epoch is None:
            problems[file.name] = "neither its name nor its metadata tells at which step it was saved"
            continue
        found.append(Checkpoint(file.name, file, step, epoch, metadata))
    return found


def _steps_per_epoch(checkpoints: Sequence[Checkpoint]) -> Optional[int]:
    """Optimizer steps an epoch as the newest checkpoint that tells has it, from kohya's metadata or a Trainer's state."""
    for checkpoint in sorted(checkpoints, key=lambda c: (c.step or 0, c.epoch or 0), reverse=True):
        metadata, state = checkpoint.metadata, _state(checkpoint.file.parent)
        if checkpoint.epoch and checkpoint.step:
            return round(checkpoint.step / checkpoint.epoch)
        if _number(metadata.get("ss_num_batches_per_epoch")):
            accumulation = _number(metadata.get("ss_gradient_accumulation_steps")) or 1
            return math.ceil(int(metadata["ss_num_batches_per_epoch"]) / accumulation)
        if state.get("epoch") and state.get("global_step"):
            return max(1, round(state["global_step"] / state["epoch"]))
    return None


@dataclass
class Run:
    """What the folder holds: the checkpoints by step, what was passed over and why, and a recorded history's facts."""

    checkpoints: List[Checkpoint]
    steps_per_epoch: int
    problems: Dict[str, str]
    history: Optional[History]
    counts_epochs: bool = False  # no step is known, so that the numbers of epochs stand for them


def read_run(folder: Path, steps_per_epoch: Optional[int] = None) -> Run:
    """Find a run's checkpoints and their steps. Raises FileNotFoundError or ValueError where nothing can be judged."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the folder that holds the saved adapters")
    problems: Dict[str, str] = {}
    found = _folder_checkpoints(folder, problems)
    found += _file_checkpoints(folder, problems)
    if not found:
        known = f"checkpoint-*/{PEFT_NAME}, checkpoint-*/{DIFFUSERS_NAME}, NAME-000003.safetensors, NAME-step00000500.safetensors"
        named = "".join(f"; {name}: {problem}" for name, problem in problems.items())
        raise FileNotFoundError(f"{folder} holds no LoRA checkpoints; known are {known}{named}")
    history = read_history(folder) if (folder / HISTORY_NAME).is_file() else None
    per_epoch = steps_per_epoch or (history.header["steps_per_epoch"] if history else _steps_per_epoch(found))
    counts_epochs = per_epoch is None and all(checkpoint.step is None for checkpoint in found)
    per_epoch = 1 if counts_epochs else per_epoch
    if per_epoch is None:
        raise ValueError(f"nothing in {folder} tells how many optimizer steps an epoch has; give --steps_per_epoch N")
    by_step: Dict[int, Checkpoint] = {}
    # Numbered checkpoints first: a kept adapter is often the same step again.
    for checkpoint in sorted(found, key=lambda c: not re.search(r"\d", c.name)):
        step = checkpoint.step if checkpoint.step is not None else checkpoint.epoch and checkpoint.epoch * per_epoch
        if step is None:
            problems[checkpoint.name] = "nothing tells at which step it was saved"
        elif step in by_step:
            problems[checkpoint.name] = f"it is of step {step}, as {by_step[step].name} is"
        else:
            checkpoint.step = round(step)
            by_step[step] = checkpoint
    return Run([by_step[step] for step in sorted(by_step)], per_epoch, problems, history, counts_epochs)


def measure_run(run: Run, base: Base, progress: bool = False) -> None:
    """Fill in every checkpoint's columns; one that cannot be read moves to run.problems.

    Raises ValueError where none can be read, BaseMismatchError where the base does not fit.
    """
    measurer, readable, layers = Measurer(base), [], None
    for number, checkpoint in enumerate(run.checkpoints, start=1):
        if progress:
            print(f"\rmeasuring {number} of {len(run.checkpoints)} ", end="", file=sys.stderr, flush=True)
        try:
            adapter = read_adapter(checkpoint.file)
            if layers is not None and set(adapter.modules) != layers:
                raise ValueError("its LoRA layers are not those of the first checkpoint: it is of another run")
            checkpoint.columns = measurer.measure(adapter)
            layers = set(adapter.modules)
            readable.append(checkpoint)
        except (ValueError, NonFiniteWeightsError) as error:
            run.problems[checkpoint.name] = str(error)
        finally:
            adapter = None  # one adapter at a time in memory
    if progress:
        print("\r", end="", file=sys.stderr)
    run.checkpoints = readable
    if not readable:
        raise ValueError("no checkpoint can be read: " + "; ".join(f"{name}: {why}" for name, why in run.problems.items()))


# ------------------------------------------------------------------------------------------------ the verdict


@dataclass
class Spacing:
    """How the checkpoints lie: every `interval` steps; a run measures every `planned` steps, over `window` measurements."""

    interval: int
    planned: int
    window: int
    missing: List[int]
    measured: List[Checkpoint]
    sparse: Optional[str]  # why nothing can be said by a rule that looks at a window


def find_spacing(run: Run) -> Spacing:
    """The measurements that the checkpoints stand for: the multiples of one interval, as near the run's own as can be."""
    header = run.history.header if run.history else {}
    per_epoch = run.steps_per_epoch
    planned = header.get("cs_interval") or max(1, round(per_epoch / 10))
    steps = [checkpoint.step for checkpoint in run.checkpoints]
    gaps = Counter(later - earlier for earlier, later in zip(steps, steps[1:]))
    gap = min(gaps, key=lambda value: (-gaps[value], value)) if gaps else max(1, steps[0])
    interval = gap * max(1, round(planned / gap))
    on_planned = len([step for step in steps if step and step % planned == 0])
    if on_planned >= (1 - MISSING_SHARE) * (steps[-1] // planned) and on_planned:
        interval = planned  # other checkpoints between the measurements do not hide them
    window = header["window"] if header and interval == planned else auto_window(per_epoch, interval)
    measured = [checkpoint for checkpoint in run.checkpoints if checkpoint.step and checkpoint.step % interval == 0]
    present = {checkpoint.step for checkpoint in measured}
    missing = [step for step in range(interval, steps[-1] + 1, interval) if step not in present]
    sparse = None
    if run.counts_epochs:
        sparse = f"the checkpoints lie {interval} epoch{'s' * (interval > 1)} apart"
    elif interval > planned and per_epoch < MEASUREMENTS_PER_EPOCH * interval:
        sparse = f"the checkpoints lie {interval} steps ({interval / per_epoch:.2g} epochs) apart"
    elif len(missing) > max(1, MISSING_SHARE * (len(missing) + len(measured))):
        sparse = f"{len(missing)} of {len(missing) + len(measured)} checkpoints, one every {interval} steps, are missing"
    return Spacing(interval, planned, window, missing, measured, sparse)


def build_history(run: Run, spacing: Spacing) -> History:
    """The run as cs_replay reads it; columns that were recorded in training (loss, ...) stay beside the measured ones."""
    recorded = {record["step"]: record for record in run.history.records} if run.history else {}
    components = list(run.checkpoints[0].columns["cs_row"])
    header = {
        "format": HISTORY_FORMAT,
        "reduction": "row" if "lm" in components else "matrix",
        "decided_on": next((name for name in ("lm", "unet", "transformer", "te") if name in components), "all"),
        "rule": DEFAULT_RULE,
        **(run.history.header if run.history else {}),
        "cs_interval": spacing.interval,
        "window": spacing.window,
        "steps_per_epoch": run.steps_per_epoch,
    }
    if header["decided_on"] not in components:
        raise ValueError(f"the history decides on {header['decided_on']!r}; the checkpoints hold {', '.join(components)}")
    series, records = FluctuationSeries(spacing.window), []
    for checkpoint in spacing.measured:
        cs = checkpoint.columns[f"cs_{header['reduction']}"]
        record = {"step": checkpoint.step, "epoch": checkpoint.step / run.steps_per_epoch, "cs": cs, **checkpoint.columns}
        record["fluctuation"] = series.update(cs[header["decided_on"]]).fluctuation
        records.append({**recorded.get(checkpoint.step, {}), **record})
    return History(header, records, run.history.events if run.history else [])


def choose_rule(history: History, rule: Optional[str]) -> str:
    """The rule asked for; else the default where a history of the run recorded what it needs, else RULE_BY_WEIGHTS.

    Raises ValueError where the rule asked for needs a column that weights alone do not give.
    """
    columns = WEIGHT_COLUMNS | {name for record in history.records for name, value in record.items() if value is not None}
    if rule is not None:
        name = settings_for(history, rule)[0]
        lacking = [column for column in make_rule(*settings_for(history, rule)).needs if column not in columns]
        if lacking:
            raise ValueError(f"rule {name} needs {', '.join(lacking)}, which saved weights do not tell; choose another rule")
        return rule
    return DEFAULT_RULE if columns.issuperset(RULES[DEFAULT_RULE].needs) else RULE_BY_WEIGHTS


def _nearby_windows(history: History, rule: str, window: int) -> List[Optional[int]]:
    """The kept steps with the windows M-1, M and M+1: how much hangs on the choice."""
    return [redecide(history, rule, m)["turning_step"] for m in (max(1, window - 1), window, window + 1)]


def judge(run: Run, rule: Optional[str] = None) -> Tuple[Dict[str, Any], History, Optional[Decision]]:
    """The verdict on a measured run (one JSON object), the history it was taken from, and the rule's Decision."""
    spacing = find_spacing(run)
    history = build_history(run, spacing)
    chosen = choose_rule(history, rule)
    name, settings = settings_for(history, chosen)
    first_answer = make_rule(name, settings).first_answer()
    verdict = {
        **redecide(history, chosen),
        "keep": None,
        "usable": [],
        "certainty": "exact" if spacing.interval == spacing.planned and not spacing.missing else "approximate",
    }
    decision = None
    if spacing.sparse and RULES[name].uses_window:
        need = max(spacing.planned, run.steps_per_epoch // MEASUREMENTS_PER_EPOCH)
        verdict.update(stopped=False, stop_step=None, turning_step=None, certainty="too sparse")
        wanted = f"every {need} steps" if need > 1 else "every step"
        measured = f"every {spacing.planned} steps" if spacing.planned > 1 else "every step"
        if run.counts_epochs:
            wanted, measured = f"{MEASUREMENTS_PER_EPOCH} times an epoch", "10 times an epoch"
        verdict["reason"] = (
            f"Too sparse to say: {spacing.sparse}. The rule {name} needs one at least {wanted}, from the start on; a run "
            f"with early stopping measures {measured}."
        )
    elif len(history.records) < first_answer:
        verdict["certainty"] = "too few"
        verdict["reason"] = (
            f"Too early to say: the rule {name} answers after {first_answer} measurements at the earliest "
            f"(step {first_answer * spacing.interval}), and there are {len(history.records)}."
        )
    else:
        decision = replay(make_rule(name, settings), history.records)
        _name_checkpoints(verdict, run, history, decision)
        nearby = _nearby_windows(history, chosen, spacing.window)
        verdict["turning_steps_of_nearby_windows"] = nearby
        told = [step for step in nearby if step is not None]
        if len(told) not in (0, 3) or (told and max(told) - min(told) > run.steps_per_epoch):
            verdict["certainty"] += ", but a window one larger or smaller decides otherwise"
    if spacing.missing and verdict["certainty"].startswith("approximate"):
        verdict["reason"] += f" Missing: step {', '.join(map(str, spacing.missing[:5]))}."
    return {**verdict, **_facts(run, spacing, history)}, history, decision


def _name_checkpoints(verdict: Dict[str, Any], run: Run, history: History, decision: Optional[Decision]) -> None:
    if decision is None:  # no sign of overfitting: the newest weights are the best known
        verdict["keep"], verdict["usable"] = run.checkpoints[-1].name, [run.checkpoints[-1].name]
        return
    verdict["keep"] = [c.name for c in run.checkpoints if c.step <= decision.keep_step][-1]
    first, last = decision.usable
    verdict["usable"] = [checkpoint.name for checkpoint in run.checkpoints if first <= checkpoint.step <= last]


def _facts(run: Run, spacing: Spacing, history: History) -> Dict[str, Any]:
    component, reduction = history.header["decided_on"], history.header["reduction"]
    rows = []
    for checkpoint in run.checkpoints:
        columns = {name: values[component] for name, values in checkpoint.columns.items() if name != "delta_norm"}
        epoch = checkpoint.step / run.steps_per_epoch
        rows.append({"name": checkpoint.name, "step": checkpoint.step, "epoch": epoch, **columns})
    return {
        "component": component,
        "reduction": reduction,
        "steps_per_epoch": run.steps_per_epoch,
        "spacing_steps": spacing.interval,
        "measurement_steps": spacing.planned,
        "missing_steps": spacing.missing,
        "checkpoints": rows,
        "not_judged": run.problems,
    }


# ------------------------------------------------------------------------------------------------ output

HEAD = ("checkpoint", "step", "epoch", "CS", "update norm", "stable rank", "verdict")


def table_rows(verdict: Dict[str, Any]) -> List[List[str]]:
    """The table of the screen and of the page: one row a checkpoint."""
    rows = []
    for row in verdict["checkpoints"]:
        mark = "keep" if row["name"] == verdict["keep"] else "usable" if row["name"] in verdict["usable"] else ""
        cs = f"{row['cs_' + verdict['reduction']]:+.6f}"
        figures = [cs, f"{row['update_norm']:.4g}", f"{row['stable_rank']:.2f}"]
        rows.append([row["name"], str(row["step"]), f"{row['epoch']:.2f}", *figures, mark])
    return rows


def sentence(verdict: Dict[str, Any]) -> str:
    keep = f"Keep {verdict['keep']}. " if verdict["keep"] else ""
    return f"{keep}{verdict['reason']} Certainty: {verdict['certainty']}."


def print_verdict(verdict: Dict[str, Any]) -> None:
    lines = [list(HEAD), *table_rows(verdict)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
    for name, problem in verdict["not_judged"].items():
        print(f"not judged: {name}: {problem}")
    print(f"\n{verdict['rule']}, window {verdict['window']}: {sentence(verdict)}")


def write_page(path: Path, verdict: Dict[str, Any], history: History, decision: Optional[Decision]) -> None:
    """The report page of cs_replay, with the table of the checkpoints."""
    tables = [("Checkpoints", HEAD, table_rows(verdict))]
    if verdict["not_judged"]:
        tables.append(("Not judged", ("file", "why"), list(verdict["not_judged"].items())))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / HISTORY_NAME
        lines = [history.header, *history.records, *[event for event in history.events if "heldout_loss" in event]]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        write_report(path, file, verdict=sentence(verdict), title="Saved adapters", decision=decision, tables=tables)


def _positive(text: str) -> int:
    if not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of optimizer steps (1 or more)")
    return int(text)


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Say which of a folder's saved LoRAs to keep.", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="the folder with the saved adapters of one run")
    parser.add_argument("--base", type=Path, required=True, help="the model they were trained on: a folder or a file")
    rules = [*RULES, "recorded"]
    parser.add_argument("--rule", choices=rules, help="default: the project's default rule, or one that weights can answer")
    parser.add_argument("--steps_per_epoch", type=_positive, help="optimizer steps an epoch, where the files do not tell")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", type=Path, help="write the report page to this file")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    arguments = parse_arguments(argv)
    try:
        run = read_run(arguments.folder, arguments.steps_per_epoch)
        measure_run(run, Base(arguments.base), progress=sys.stderr.isatty())
        verdict, history, decision = judge(run, arguments.rule)
        if arguments.html:
            write_page(arguments.html, verdict, history, decision)
    except (ValueError, FileNotFoundError, BaseMismatchError) as error:
        print(f"judge_checkpoints: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(verdict))
    else:
        print_verdict(verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The base of saved adapters: where each frozen weight lies on disk, read in blocks of rows."""

import re
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from safetensors import SafetensorError, safe_open

from cs_fluctuation import DenseWeight
from es_lora.files import read_text
from es_lora.inputs.json_text import parsed_json

READ_VALUES = 500_000  # of a weight that are held in float32 at once
Key = Tuple[str, str]  # (component, layer path)


class BaseMismatchError(OSError):
    """The base is not what the adapters were trained on, or is in a form that cannot be read."""


class Stored(NamedTuple):
    """Where a frozen weight lies: file, tensor name, and its first row in a fused tensor."""

    file: Path
    tensor: str
    first_row: int = 0


class BlockBuffer:
    """One float32 block that all weights are read through: a block a weight fragments the heap."""

    def __init__(self):
        self._values = torch.empty(0)

    def filled(self, block: torch.Tensor) -> torch.Tensor:
        """`block` in float32, valid until the next call."""
        if self._values.numel() < block.numel():
            self._values = torch.empty(max(READ_VALUES, block.numel()))
        return self._values[: block.numel()].view(block.shape).copy_(block)


class FileWeight(DenseWeight):
    """A frozen weight W (out, in) that stays in its file: blocks of rows are read for one use.

    transposed: the file holds W^T (in, out), as GPT-2's Conv1D. Row norms are computed once."""

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
            if not bool(torch.isfinite(self._norms).all()):
                raise BaseMismatchError(
                    f"the base file {self.weight.file}: the tensor {self.weight.tensor} holds NaN or infinity; "
                    "fetch it again"
                )
        return self._norms


def _weight_map(index: Path) -> Dict[str, str]:
    """{tensor: file} of an index. Raises ValueError where it is damaged or names no file here."""
    try:
        content = parsed_json(read_text(index))
    except ValueError as error:
        raise ValueError(f"the base's index {index} cannot be read ({error}); fetch it again") from None
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"the base's index {index} has no weight_map of tensors and files; fetch it again")
    missing = sorted({name for name in files.values() if not (index.parent / name).is_file()})
    if missing:
        raise FileNotFoundError(
            f"the base's index {index} names {len(missing)} files that are not there: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}; fetch them"
        )
    return files


def _model_files(folder: Path) -> List[Path]:
    """The safetensors files of a model: those of its index, of the usual name, or all."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        return sorted({folder / name for name in _weight_map(index).values()})
    for name in ("model", "diffusion_pytorch_model", "model.fp16", "diffusion_pytorch_model.fp16"):
        if (folder / f"{name}.safetensors").is_file():
            return [folder / f"{name}.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no .safetensors file; save the base as safetensors (pickle is not read)"
        )
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
    """diffusers' name of a U-Net layer, underscored, from that or the latent-diffusion one."""
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
        if slot == "0":
            return f"{prefix}_resnets_{index}_{RESNET.get(rest, rest)}"
        return f"{prefix}_attentions_{index}_{rest}"
    match = re.match(r"middle_block_(\d)_(.+)$", name)
    if match:
        part = "attentions_0" if match[1] == "1" else f"resnets_{int(match[1]) // 2}"
        return f"mid_block_{part}_{RESNET.get(match[2], match[2])}"
    return name


def text_layer_name(name: str) -> str:
    """transformers' name of a text encoder's layer, underscored, without `text_model`."""
    name = re.sub(r"^text_model_", "", name)
    return re.sub(r"self_attn_to_(q|k|v|out)$", r"self_attn_\1_proj", name)


class Base:
    """The frozen model as an index of weights on disk; nothing of it is held.
    Raises FileNotFoundError or ValueError where `path` is no base in a known layout."""

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
        self.layers_per_block = max(1, min(numbers) - 1) if numbers else 2
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
        """A text encoder's tensor, in transformers' or OpenCLIP's layout (q, k, v in one)."""
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
        """The name under which CS is reported: the only text encoder is `te`, as in trainers."""
        several = any(part == "te2" for part, _ in self.stored)
        return "te" if component == "te1" and not several else component

    def find(self, component: str, path: str) -> Optional[Key]:
        """The base's key of an adapted layer; either may lack a language model's outer levels."""
        key = (component, self._layer_name(component, path))
        if key in self.stored or component != "lm":
            return key if key in self.stored else None
        levels = path.split(".")
        for start in range(1, len(levels)):
            if ("lm", ".".join(levels[start:])) in self.stored:
                return ("lm", ".".join(levels[start:]))
        longer = [known for known in self.stored if known[1].endswith("." + path)]
        return longer[0] if len(longer) == 1 else None

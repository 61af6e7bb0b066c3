"""What the inputs of what_people_bring.py are made of: adapters, bases, pictures, some broken.

python tests/benchmarks/what_people_bring_parts.py llm FOLDER     (in the environment of lora-llm)
python tests/benchmarks/what_people_bring_parts.py ldm FOLDER     (in that of lora-ldm)
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAN = float("nan")


def spoilt(source, target, name_part):
    """A copy of a folder; the first tensor whose name has the part holds a NaN."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    for file in target.rglob("*.safetensors"):
        tensors = load_file(file)
        names = [name for name in sorted(tensors) if name_part in name]
        if names:
            tensors[names[0]].view(-1)[0] = NAN
            save_file(tensors, file, metadata={"format": "pt"})
            return target
    raise ValueError(f"{source} has no tensor {name_part}")


# --------------------------------------------------------------------------------------- lora-llm


def make_llm(folder):
    """adapter, bin, nan_adapter, dora, run, nan_run, qlora, pickles; nan, table, refusing, torn."""
    base = ROOT / "lora-llm" / "tiny_base"
    adapter(base, folder / "adapter", ["q_proj"])
    adapter(base, folder / "dora", ["q_proj"], use_dora=True)
    spoilt(folder / "adapter", folder / "nan_adapter", "lora_A")
    pickled(folder / "adapter", folder / "pickled")
    runs(folder)
    spoilt(base, folder / "nan", "q_proj")
    model_with_a_table(folder / "table")
    adapter(folder / "table", folder / "other_adapter", ["c_attn"])
    shutil.copytree(folder / "table", folder / "refusing")
    template = "{{ raise_exception('roles must alternate') }}"
    (folder / "refusing" / "chat_template.jinja").write_text(template)
    for name, file in (("torn", "model.safetensors"), ("torn_words", "tokenizer.json")):
        shutil.copytree(base, folder / name)
        (folder / name / file).write_bytes((base / file).read_bytes()[:2000])
    shutil.copytree(folder / "adapter", folder / "torn_adapter")
    (folder / "torn_adapter" / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")


def adapter(base, target, modules, **more):
    """A random LoRA over a base, as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM", **more)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(target)


def pickled(source, target):
    """The same adapter in a pickle."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(source, target)
    torch.save(load_file(target / "adapter_model.safetensors"), target / "adapter_model.bin")
    (target / "adapter_model.safetensors").unlink()


def runs(folder):
    """Folders of saved adapters: as PEFT's trainers leave them, with a NaN, and qlora's."""
    kinds = {"run": "adapter", "nan_run": "nan_adapter", "dora_run": "dora", "pickled_run": "pickled"}
    for step in (10, 20, 30):
        for run, kind in kinds.items():
            shutil.copytree(folder / kind, folder / run / f"checkpoint-{step}")
        shutil.copytree(folder / "adapter", folder / "qlora" / f"checkpoint-{step}" / "adapter_model")


def model_with_a_table(target):
    """A random GPT-2 of 64 learnt positions, with the embedded base's tokenizer."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "lora-llm" / "tiny_base")
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(
        GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2, vocab_size=len(tokenizer), **ids)
    ).save_pretrained(target)
    tokenizer.save_pretrained(target)


# --------------------------------------------------------------------------------------- lora-ldm


def make_ldm(folder):
    """pictures, LoRAs in several spellings, bases that are broken."""
    pictures(folder)
    base = ROOT / "lora-ldm" / "tiny_base"
    loras(base, folder)
    spoilt(base, folder / "nan_vae", "conv_in")
    shutil.copytree(base, folder / "no_unet")
    shutil.rmtree(folder / "no_unet" / "unet")
    single_files(base, folder)


def pictures(folder):
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.jpg", "d.jpg"):
        Image.fromarray(draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / name)
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:300])
    (folder / "note.heic").write_bytes(b"no picture")


def loras(base, folder):
    """lora, nan, bundled, short (keys without text_model.), peft's names, wide (rank 8), torn."""
    import torch
    from safetensors.torch import save_file

    from base.loading import load_base_model
    from network.lora import create_network, find_modules
    from network.lora_file import save_lora

    model = load_base_model(str(base))
    paths = {name: path for _, path, name, _ in find_modules(model, everywhere=True)}
    network = create_network(model, rank=4)
    for _, weight in sorted(network.tensors().items()):
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    state = network.state_for_file()
    unet = next(key for key in state if key.startswith("lora_unet") and key.endswith("lora_up.weight"))
    written = {
        "lora": state,
        "nan": {**state, unet: state[unet] * NAN},
        "bundled": {**state, "bundle_emb.mycat.string_to_param.*": torch.ones(1, 16)},
        "short": {key.replace("lora_te_text_model_", "lora_te_"): value for key, value in state.items()},
        "wide": create_network(load_base_model(str(base)), rank=8).state_for_file(),
        "stranger": {key.replace("lora_", "lora_xy_", 1): value for key, value in state.items()},
    }
    for name, tensors in written.items():
        save_lora(folder / f"{name}.safetensors", tensors)
    modules = [module for module in network.modules if module.component == "unet"]
    ends = {"lora_A": "down", "lora_B": "up"}
    peft = {
        f"base_model.model.{paths[m.name]}.{a}.weight": getattr(m, b).detach() for m in modules for a, b in ends.items()
    }
    save_file(peft, folder / "peft.safetensors")
    (folder / "torn.safetensors").write_bytes((folder / "lora.safetensors").read_bytes()[:500])


def single_files(base, folder):
    """whole, no_vae and nan_file, with their configurations beside."""
    from safetensors.torch import save_file
    from tiny_sd import original_layout

    from base.loading import load_base_model

    tensors = original_layout(load_base_model(str(base)))
    name = "model.diffusion_model.out.2.bias"
    files = {
        "whole": tensors,
        "no_vae": {key: value for key, value in tensors.items() if not key.startswith("first_stage_model.")},
        "nan_file": {**tensors, name: tensors[name] * NAN},
    }
    for name, content in files.items():
        save_file({key: value.contiguous().clone() for key, value in content.items()}, folder / f"{name}.safetensors")
        for part in ("unet", "vae", "text_encoder", "scheduler", "tokenizer"):
            kept = shutil.ignore_patterns("*.safetensors")
            shutil.copytree(base / part, folder / f"{name}.config" / part, ignore=kept)


if __name__ == "__main__":
    tree, target = sys.argv[1], Path(sys.argv[2])
    sys.path[:0] = [str(ROOT / f"lora-{tree}"), str(ROOT / "tests" / "ldm")]
    import quiet_libraries  # noqa: F401

    target.mkdir(parents=True)
    {"llm": make_llm, "ldm": make_ldm}[tree](target)

"""Which loader takes which kind of LoRA file: every kind that is written, of SD 1.5's and SDXL's
shapes, through the loaders' own code. It writes the table loaders.md beside this file, and
tests/golden/loader_keys.json, with which tests compare where no loader is at hand.

    COMFYUI_DIR=CHECKOUT A1111_DIR=CHECKOUT SD_SCRIPTS_DIR=CHECKOUT \
        python tests/benchmarks/loaders.py --python_kohya PYTHON [--work FOLDER]

It takes about ten minutes on two cores. --python_kohya: of an environment with sd-scripts' own
requirements. A loader whose checkout is not named is left out of the table."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
LOADERS = ROOT / "tests" / "loaders"
PAGE = Path(__file__).with_suffix(".md")
GOLDEN = ROOT / "tests" / "golden" / "loader_keys.json"
CLOSE = 1e-3  # ||theirs - ours|| / ||ours|| up to which a change is the same
EVERY = 10
LARGEST = "LyCORIS LoCon"  # the kind with the most layers
DAMAGES = ("LoRA, a key renamed", "LoRA, an alpha missing")
FAMILIES = {"sd15": "SD 1.5", "sdxl": "SDXL"}
NEEDS = {"comfyui.py": "COMFYUI_DIR", "automatic1111.py": "A1111_DIR", "kohya.py": "SD_SCRIPTS_DIR"}
ORDER = """ComfyUI|AUTOMATIC1111|diffusers, PEFT|--network_weights|merge_lora.py into a model|merge_lora.py of LoRAs|
resize_lora.py|check_lora_weights.py|lora_interrogator.py|show_metadata.py""".replace("\n", "").split("|")
# What keys a loader leaves because it knows no such thing, by a part of the key.
LIMITS = {
    "dora_scal": "no DoRA, B A alone",
    "hada_": "no LoHa",
    "lokr_": "no LoKr",
    "lora_mid": "no Tucker form",
    "size mismatch": "no Tucker form",
}
OUTSIDE = ("conv_in", "conv_out", "time_embed", "label_emb", "input_blocks_0_0", "unet_out_2", "time_embedding")


def verdict(result: dict, expected: dict) -> str:
    """A cell: "all keys loaded" (or shown, by a tool that loads none), or what is not, in words.
    result: of ``loader_main``; expected: {layer: effect}."""
    if result["refused"]:
        return f"refused: {_limit([result['refused']]) or result['refused'][:80]}"
    unread, effects = result["unread"], result["effects"]
    if unread:
        return f"left: {_limit(unread) or f'{len(unread)} keys'}"
    if not effects:
        return "all keys shown"
    shares = {
        name: float((effects[name] - own).norm() / own.norm()) for name, own in expected.items() if name in effects
    }
    wrong = [name for name, share in shares.items() if share > CLOSE]
    if wrong:
        where = "every layer" if len(wrong) == len(shares) else f"{len(wrong)} of the layers"
        return f"all keys loaded, another change in {where}"
    return "all keys loaded"


def _limit(texts):
    """What the loader does not know, where all of these keys or messages are of that kind."""
    told = " ".join(texts)
    for part, words in LIMITS.items():
        if part in told:
            return words
    if all(any(place in text for place in OUTSIDE) for text in texts):
        return "layers outside the blocks"
    return ""


def run(args: argparse.Namespace, work: Path) -> dict[str, dict]:
    """{file: {tool: result}} of all loaders that are at hand."""
    if not any(work.glob("*.expected.pt")):
        subprocess.run([sys.executable, LOADERS / "shaped_files.py", work, "--every", str(EVERY)], check=True)
    results = {}
    for script in ("comfyui.py", "automatic1111.py", "diffusers_loader.py", "kohya.py"):
        if script in NEEDS and NEEDS[script] not in os.environ:
            continue
        python = args.python_kohya if script == "kohya.py" else sys.executable
        out = work / f"{script}.pt"
        if not out.is_file():
            subprocess.run([python, LOADERS / script, work, "--every", str(EVERY), "--out", out], check=True)
        for file, tools in torch.load(out, weights_only=True).items():
            results.setdefault(file, {}).update(tools)
    return results


def table(results: dict[str, dict], work: Path) -> tuple[list[str], list[str]]:
    """The lines of the table, and the files with what they hold."""
    from safetensors import safe_open

    cells, kinds, sizes = {}, [], {}
    for file, tools in results.items():
        family, kind = file.split(".")[:2]
        expected = torch.load(work / f"{family}.{kind}.expected.pt", weights_only=True)
        with safe_open(work / file, "pt") as handle:
            sizes[kind, family] = len(handle.keys())
        kinds += [] if kind in kinds else [kind]
        for tool, result in tools.items():
            cells.setdefault((kind, tool), {})[family] = verdict(result, expected)
    tools = [tool for tool in ORDER if any(tool == known for _, known in cells)]
    lines = [f"| file | keys | {' | '.join(tools)} |", "|---" * (len(tools) + 2) + "|"]
    for kind in sorted(kinds, key=lambda kind: (kind in DAMAGES, kind)):
        counts = " / ".join(str(sizes[kind, family]) for family in FAMILIES if (kind, family) in sizes)
        lines.append(f"| {kind} | {counts} | {' | '.join(_cell(cells.get((kind, tool), {})) for tool in tools)} |")
    return lines


def accepted(results: dict[str, dict], work: Path) -> dict:
    """What tests compare with where no loader is at hand: by family the layers of the largest file,
    and by tool the layers that it leaves and the parts of a layer that it reads."""
    from safetensors import safe_open

    golden = {"layers": {}, "left": {}, "parts": {}}
    for file, tools in results.items():
        family, kind = file.split(".")[:2]
        if kind in DAMAGES:
            continue
        with safe_open(work / file, "pt") as handle:
            keys = [key.partition(".") for key in handle.keys()]
        if kind == LARGEST:
            golden["layers"][family] = grouped({name for name, _, _ in keys})
        for tool, result in tools.items():
            unread = set() if not result["refused"] else {"".join(key) for key in keys}
            unread |= set(result["unread"])
            parts = golden["parts"].setdefault(tool, set())
            parts |= {part for _, _, part in keys} - {key.partition(".")[2] for key in unread}
            if kind == LARGEST:
                golden["left"].setdefault(tool, {})[family] = sorted({key.partition(".")[0] for key in unread})
    golden["parts"] = {tool: sorted(parts) for tool, parts in golden["parts"].items()}
    return golden


def grouped(names: set[str]) -> dict[str, str]:
    """{name with # for each number: the numbers of all such names}, a short form of many names."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]):
        groups.setdefault(re.sub(r"\d+", "#", name), []).append("-".join(re.findall(r"\d+", name)))
    return {pattern: " ".join(numbers) for pattern, numbers in sorted(groups.items())}


def _cell(by_family):
    """One text where the families agree or only one is known, else both."""
    texts = list(by_family.values())
    if not texts:
        return ""
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(f"{FAMILIES[family]}: {text}" for family, text in by_family.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python_kohya", default=sys.executable)
    parser.add_argument("--work", type=Path, help="keep the files there; what is there is not made again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        results = run(args, work)
        lines = table(results, work)
        GOLDEN.write_text(json.dumps(accepted(results, work), indent=1) + "\n")
    before, _, _ = PAGE.read_text().partition("<!-- table -->") if PAGE.is_file() else ("", "", "")
    PAGE.write_text(f"{before}<!-- table -->\n\n" + "\n".join(lines) + "\n")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()

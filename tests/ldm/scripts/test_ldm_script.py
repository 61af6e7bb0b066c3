"""early_stop_lora_ldm.sh: which trainer its settings start, and with which flags. The trainer is a
stub that shows them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = "early_stop_lora_ldm.sh"


def flags_of(folder, **settings):
    """(exit code, words that the trainer gets) of the script with these settings in place of its
    own."""
    text = (ROOT / SCRIPT).read_text()
    for name, value in settings.items():
        text, replaced = re.subn(rf"^{name}=\S*", f'{name}="{value}"', text, flags=re.MULTILINE)
        assert replaced == 1, name
    (folder / SCRIPT).write_text(text)
    python = folder / ".venv-ldm" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    (folder / "lora-ldm").mkdir(exist_ok=True)
    for name in ("start.py", "starting.py"):
        shutil.copy(ROOT / "lora-ldm" / name, folder / "lora-ldm")
    shutil.copy(ROOT / "requirements-ldm.txt", folder)
    shutil.copy(ROOT / "requirements-ldm.txt", folder / ".venv-ldm" / ".installed")
    done = subprocess.run(["bash", str(folder / SCRIPT), "--flip_aug"], capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def accepted(words, sdxl):
    """The settings as the trainer's own parser reads them: every flag is known to it."""
    from settings.flags import build_parser

    args, unknown = build_parser(sdxl).parse_known_args(words[1:])
    assert unknown == []
    return args


def test_the_default_trains_stable_diffusion(tmp_path):
    code, words = flags_of(tmp_path)
    assert code == 0 and Path(words[0]).name == "es_lora_ldm.py"
    args = accepted(words, sdxl=False)
    assert args.clip_skip == 1 and args.flip_aug and args.early_stop
    assert args.trigger_word is args.num_class_images is args.network_weights is None


def test_sdxl_with_class_pictures_and_extracted_layers(tmp_path):
    dreambooth = dict(trigger_word="CUS statue", reg_data="reg", class_pictures=20, class_prompt="a photo of a statue")
    code, words = flags_of(
        tmp_path, model_type="sdxl", train_parts="unet", cache_text=1, continue_from="first.safetensors", **dreambooth
    )
    assert code == 0 and Path(words[0]).name == "es_lora_sdxl.py"
    args = accepted(words, sdxl=True)
    assert args.clip_skip is None and args.network_train_unet_only and args.cache_text_encoder_outputs
    assert (args.trigger_word, args.num_class_images, args.class_prompt) == ("CUS statue", 20, "a photo of a statue")
    assert args.network_weights == "first.safetensors" and args.dim_from_weights


@pytest.mark.parametrize("kind", ["sd3", ""])
def test_another_kind_of_model_is_refused(tmp_path, kind):
    code, lines = flags_of(tmp_path, model_type=kind)
    assert code == 2 and lines == [f"{SCRIPT}: model_type={kind}: choose sd or sdxl"]

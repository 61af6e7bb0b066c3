"""Train a language model with the settings of early_stop_lora_llm.sh, on any system:

    python lora-llm/start.py                       (Windows: py lora-llm\\start.py)
    python lora-llm/start.py --learning_rate 1e-4  flags of the trainer win over the settings

The environment is made first where it is not there. The shell script does the same."""

import sys
from pathlib import Path, PurePath
from typing import List

from starting import Settings, Tree, run

NAMES = """
    base_model training_data heldout_data general_text output bits rank alpha learning_rate epochs prompt_template
    batch_size accumulation longest_source longest_target precision recompute early_stop window cs_interval
""".split()
TINY = {"bits": "4", "learning_rate": "2e-3", "epochs": "12", "batch_size": "8", "prompt_template": ""}


def words(settings: Settings, root: PurePath) -> List[str]:
    """The trainer and its flags."""
    given = dict(settings)
    if given["base_model"] == "tiny":
        given.update(TINY, base_model=str(root / "lora-llm" / "tiny_base"))
    flags = {
        "model_name_or_path": "base_model",
        "dataset": "training_data",
        "output_dir": "output",
        "bits": "bits",
        "lora_r": "rank",
        "lora_alpha": "alpha",
        "learning_rate": "learning_rate",
        "num_train_epochs": "epochs",
        "per_device_train_batch_size": "batch_size",
        "gradient_accumulation_steps": "accumulation",
        "source_max_len": "longest_source",
        "target_max_len": "longest_target",
        "gradient_checkpointing": "recompute",
        "early_stop": "early_stop",
        "window_size": "window",
        "cs_interval": "cs_interval",
    }
    result = [str(root / "lora-llm" / "es_lora_llm.py")]
    for flag, name in flags.items():
        result += [f"--{flag}", given[name]]
    result += "--logging_steps 10 --save_strategy epoch --save_total_limit 2 --report_to tensorboard".split()
    if given["heldout_data"]:
        result += ["--do_eval", "--eval_dataset", given["heldout_data"], "--eval_strategy", "epoch"]
        result += ["--per_device_eval_batch_size", "16"]
    for flag, name in (("forgetting_data", "general_text"), ("prompt_template", "prompt_template")):
        if given[name]:
            result += [f"--{flag}", given[name]]
    return result + [given["precision"]] * bool(given["precision"])


TREE = Tree("early_stop_lora_llm.sh", "llm", "es_lora_llm.py", NAMES, words)

if __name__ == "__main__":
    sys.exit(run(TREE, Path(__file__).absolute().parent.parent, sys.argv[1:]))

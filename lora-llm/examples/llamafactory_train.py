"""LLaMA-Factory that stops at its turning point; its configuration stays as it is.

    python lora-llm/examples/llamafactory_train.py CONFIG.yaml [name=value ...]

in place of `llamafactory-cli train CONFIG.yaml`, in LLaMA-Factory's own environment."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where early_stop_callback.py lies

from early_stop_callback import EarlyStopCallback  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402

if __name__ == "__main__":
    run_exp(callbacks=[EarlyStopCallback()])

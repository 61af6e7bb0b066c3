"""axolotl that stops at its turning point, by two lines of its configuration:

    plugins:
      - axolotl_plugin.EarlyStopPlugin

    PYTHONPATH=lora-llm/examples axolotl train CONFIG.yaml

in axolotl's own environment."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where early_stop_callback.py lies

from axolotl.integrations.base import BasePlugin  # noqa: E402
from early_stop_callback import EarlyStopCallback  # noqa: E402


class EarlyStopPlugin(BasePlugin):
    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [EarlyStopCallback()]

"""What a run's weights are worth: held-out and general-text loss, before training, kept, last."""

from typing import Optional

from datasets import Dataset
from transformers import Trainer

from training.forgetting import GeneralText


class WeightScores:
    """Scores a trainer's weights as they are, under the names `before`, `kept` and `last`.

    evaluation: the held-out examples, None without. general_text: scored on the main process alone.
    heldout: {name: loss}, None where it is not known. Every process calls its methods alike."""

    def __init__(self, trainer: Trainer, evaluation: Optional[Dataset], general_text: Optional[GeneralText]):
        self.trainer, self.evaluation, self.general_text = trainer, evaluation, general_text
        self.heldout: dict[str, Optional[float]] = {}

    def heldout_loss(self, name: str) -> Optional[float]:
        """Held-out loss of the weights as they are, or None without evaluation examples."""
        if self.evaluation is None:
            return None
        return self.trainer.evaluate(metric_key_prefix=name)[f"{name}_loss"]

    def score_general_text(self, name: str) -> None:
        """Loss on the general text, of the weights as they are."""
        if self.general_text is not None and self.trainer.is_world_process_zero():
            self.general_text.losses[name] = self.general_text.loss(self.trainer.model)

    def score_last(self) -> Optional[float]:
        """Score the last step; its held-out loss, or None where the Trainer knew it already."""
        self.score_general_text("last")
        state = self.trainer.state
        known = self._evaluated_at(state.global_step)
        self.heldout["last"] = self.heldout_loss("last") if known is None else known
        return self.heldout["last"] if known is None else None

    def score_kept(self, alone: bool = False, name: str = "kept") -> None:
        """Score the weights that are kept, or others by their name. alone: on the main process
        only, beside others."""
        if not alone:
            self.heldout[name] = self.heldout_loss(name)
        self.score_general_text(name)

    def kept_is_last(self) -> None:
        """The weights of the turning point are the last ones, which have been scored."""
        if self.heldout.get("last") is not None:
            self.heldout["kept"] = self.heldout["last"]
        if self.general_text is not None and "last" in self.general_text.losses:
            self.general_text.losses["kept"] = self.general_text.losses["last"]

    def note_start(self) -> None:
        """Take the held-out loss before training from the Trainer's evaluation at the start."""
        self.heldout["before"] = self._evaluated_at(0)

    def _evaluated_at(self, step: int) -> Optional[float]:
        logs = [
            log["eval_loss"] for log in self.trainer.state.log_history if log["step"] == step and "eval_loss" in log
        ]
        if not logs:
            return None
        return logs[0] if step == 0 else logs[-1]

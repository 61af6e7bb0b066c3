"""--do_predict: what the weights answer to held-out examples."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm

from base.layers import answer_tokens
from es_lora.files import write_text_whole
from settings.flags import Settings
from text.collator import CausalCollator
from text.conversations import end_tokens
from text.formats import LEARN

PREDICTIONS_NAME = "predictions.jsonl"


def write_predictions(settings: Settings, model: Any, tokenizer: Any, rows: Dataset) -> None:
    """Write {"input", "output", "prediction"} of every row to predictions.jsonl, whole or not."""
    config = settings.generation.config(settings.generation_use_cache)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, end_tokens(tokenizer)
    sources = CausalCollator(tokenizer, settings.data.source_max_len, settings.data.target_max_len, False, True)
    most = config.max_new_tokens
    size, lines = settings.training.per_device_eval_batch_size, []
    model.eval()
    for start in tqdm(range(0, len(rows), size), desc="Predictions"):
        batch = [rows[index] for index in range(start, min(start + size, len(rows)))]
        inputs = {name: tensor.to(model.device) for name, tensor in sources(batch).items()}
        with torch.no_grad():
            config.max_new_tokens = answer_tokens(model, inputs["input_ids"].shape[1], most)
            generated = model.generate(**inputs, generation_config=config)
        answers = tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        lines += [
            {"input": row["input"], "output": _plain_output(tokenizer, row), "prediction": answer.strip()}
            for row, answer in zip(batch, answers)
        ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text_whole(Path(settings.training.output_dir) / PREDICTIONS_NAME, text)


def _plain_output(tokenizer: Any, row: dict[str, Any]) -> str:
    """The output; of a conversation without the tokens that the chat template ends it with."""
    if not row.get(LEARN):
        return row["output"]
    ids = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()

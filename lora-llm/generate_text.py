"""Ask a trained adapter: one prompt from the command line, the answer streamed to the screen.

    python generate_text.py --adapter OUTPUT/adapter --prompt "..." [--max_new_tokens 128] [--do_sample] [--seed 0]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import quiet_libraries  # noqa: F401  (first, before the libraries speak)
import torch
from causal_collator import encode_source
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, TextStreamer, set_seed


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate text with a trained adapter.", allow_abbrev=False)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the adapter, such as OUTPUT/adapter")
    parser.add_argument("--prompt", required=True, help="the input, as in the training data")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer in tokens (default %(default)s)")
    parser.add_argument("--do_sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--temperature", type=float, default=0.8, help="with --do_sample (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    return parser.parse_args(argv)


def load_adapter(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of an adapter folder, on a GPU where there is one. Raises FileNotFoundError where it is none."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        raise FileNotFoundError(f"--adapter {folder} holds no adapter_config.json; give the adapter folder that a run left")
    base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    try:
        model = AutoPeftModelForCausalLM.from_pretrained(str(folder))
    except OSError as error:
        raise FileNotFoundError(f"the adapter's base model {base} cannot be found; put it there again") from error
    tokenizer = AutoTokenizer.from_pretrained(str(folder) if (folder / "tokenizer_config.json").is_file() else base)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


def main(argv: Optional[Sequence[str]] = None) -> int:
    arguments = parse_arguments(argv)
    try:
        model, tokenizer = load_adapter(arguments.adapter)
    except (FileNotFoundError, ValueError) as error:
        print(f"generate_text: {error}", file=sys.stderr)
        return 2
    set_seed(arguments.seed)
    source = torch.tensor([encode_source(tokenizer, arguments.prompt)], device=model.device)  # (1, T)
    sampling = {"do_sample": True, "temperature": arguments.temperature} if arguments.do_sample else {"do_sample": False}
    with torch.no_grad():
        model.generate(
            input_ids=source,
            attention_mask=torch.ones_like(source),
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

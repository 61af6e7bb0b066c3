"""Ask trained adapters: one prompt, a file of prompts, or a chat; answers stream to the screen.

    python generate_text.py --adapter OUTPUT --prompt "..."
    python generate_text.py --adapter OUTPUT --compare --prompt "..."        base, turning point and
        last side by side
    python generate_text.py --adapter RUN1 RUN2 --prompts FILE --output ANSWERS.jsonl
    python generate_text.py --adapter OUTPUT --chat

The generation flags are the trainer's (--do_sample, --temperature, ...). A prompt goes in as in
training: through the chat template after conversations or --prompt_template chat, else as it is.
"""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, Optional

import quiet_libraries  # noqa: F401  (first, before the libraries speak)
import torch
from peft import PeftModel
from transformers import TextStreamer, set_seed

from adapters.fitting import check_adapters, put_adapters_on
from adapters.folders import (
    CHAT,
    PLAIN,
    AdapterFolder,
    OneLineParser,
    base_of,
    load_frozen_base,
    load_tokenizer_of,
    open_adapter,
    prompt_of,
)
from base.layers import answer_tokens, positions_of
from es_lora.command_line import reported
from es_lora.files import read_text, split_lines, write_text_whole
from es_lora.inputs.json_text import parsed_json
from es_lora.outcome import RESULT_NAME
from settings.checks import ABOVE_ZERO, AT_LEAST
from settings.flags import GenerationArguments
from text.collator import encode_source
from text.conversations import Chat, end_tokens
from text.tables import TABLE_SUFFIXES, read_table

BASE = "base"
MOST_PROMPTS = 100_000
CHAT_HELP = (
    "A line is a message. /use NAME answers with another adapter, /new forgets the talk, /quit (or Ctrl-D) ends."
)


def parse_arguments(argv: Optional[Sequence[str]] = None) -> Any:
    parser = OneLineParser(GenerationArguments, description="Generate text with trained adapters.", allow_abbrev=False)
    parser.add_argument("--adapter", nargs="+", default=[], help="adapter folders or runs' folders, on one base")
    parser.add_argument(
        "--base", help="the base model (default: the adapters' own); alone: the base without an adapter"
    )
    parser.add_argument("--bits", type=int, choices=(4, 8, 16, 32), help="the base's bits (default: as in training)")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="the input, as in the training data")
    asked.add_argument("--prompts", type=Path, help="a txt file, a prompt a line, or jsonl with input (and adapter)")
    asked.add_argument("--chat", action="store_true", help="talk to it")
    parser.add_argument("--compare", action="store_true", help="base, turning point and last of a run side by side")
    parser.add_argument("--output", type=Path, help="write the answers to this jsonl file too")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the sampling, set anew for every answer (default %(default)s)"
    )
    how = "a prompt through the chat template, or as it is (default: as in training; of a base alone, chat if it can)"
    parser.add_argument("--prompt_as", choices=(CHAT, PLAIN), help=how)
    arguments = parser.parse(argv)
    problems = list(generation_problems(arguments))
    if not arguments.adapter and not arguments.base:
        problems.append("give --adapter FOLDER, or --base for the model without one")
    if arguments.compare and (arguments.chat or not arguments.adapter):
        problems.append("--compare needs --adapter, and --prompt or --prompts")
    if arguments.output is not None and arguments.chat:
        problems.append("--output keeps the answers of --prompt and --prompts; leave it out with --chat")
    if problems:
        raise ValueError("; ".join(problems))
    return arguments


def generation_problems(arguments: Any) -> Iterator[str]:
    """Values out of the range that the trainer accepts."""
    neutral = {"num_beam_groups": 1, "penalty_alpha": None, "diversity_penalty": 0.0}
    for entry in fields(GenerationArguments):
        value = getattr(arguments, entry.name)
        if value is not None and entry.name in AT_LEAST and not value >= AT_LEAST[entry.name]:
            yield f"--{entry.name} {value}: must be at least {AT_LEAST[entry.name]}"
        if entry.name in ABOVE_ZERO and not value > 0:
            yield f"--{entry.name} {value}: must be above 0"
        if entry.name in neutral and value != neutral[entry.name]:
            yield f"--{entry.name} {value}: transformers has dropped this way of generating; leave it out"


def run_adapters(text: str) -> dict[str, AdapterFolder]:
    """{"turning point", "last"} of the run that an adapter lies in; without a turning point only
    "last", or "average" and "last"."""
    kept = open_adapter(text).path
    result = kept.parent / RESULT_NAME
    outcome = _outcome_of(result) if result.is_file() else "stopped_early"
    names = {"turning point": "adapter", "last": "adapter-last"}
    if outcome != "stopped_early":
        names = {"turning point": "adapter-turning-point", "average": "adapter", "last": "adapter-last"}
    if not (kept.parent / "adapter-last").is_dir():
        names = {"turning point": "adapter-turning-point", "last": "adapter"}
    return {
        name: open_adapter(str(kept.parent / folder))
        for name, folder in names.items()
        if (kept.parent / folder).is_dir()
    }


def _outcome_of(result: Path) -> Any:
    """How a run ended, by its result.json. Raises ValueError where that is damaged."""
    try:
        return dict(parsed_json(read_text(result))).get("outcome")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{result} is damaged ({error}); name the adapters of the run one by one") from None


def named_adapters(texts: Sequence[str]) -> dict[str, AdapterFolder]:
    """{name: adapter}, named by as many of the last parts of the paths as tell them apart."""
    opened = [open_adapter(text) for text in texts]
    paths = list(dict.fromkeys(adapter.path.resolve() for adapter in opened))
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {"/".join(adapter.path.resolve().parts[-depth:]): adapter for adapter in opened}


@dataclass
class Speaker:
    """One base with adapters that take turns.

    `adapters` maps a name to PEFT's name for it, `prompts` to CHAT or PLAIN; `base` is always
    there.
    """

    model: Any
    tokenizer: Any
    adapters: dict[str, Optional[str]]
    prompts: dict[str, str]
    generation: GenerationArguments
    seed: int

    def source(self, text: str, name: str) -> list[int]:
        """Token ids of a prompt as the adapter `name` knows it."""
        if self.prompts[name] == PLAIN:
            return encode_source(self.tokenizer, text)
        return self.talk_source([{"role": "user", "content": text}])

    def talk_source(self, talk: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a talk through the chat template, with the opening of an answer."""
        text = Chat(self.tokenizer).text(talk, prompt=True)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def answer(self, source: Sequence[int], name: str, stream: bool) -> str:
        """The answer to token ids by the adapter `name` (or the base), streamed to the screen if
        asked for."""
        ids = torch.tensor([list(source)], device=self.model.device)  # (1, T)
        config = self.generation.config(use_cache=True)
        config.max_new_tokens = self._answer_tokens(len(source), config.max_new_tokens)
        config.pad_token_id, config.eos_token_id = self.tokenizer.pad_token_id, end_tokens(self.tokenizer)
        can_stream = stream and config.num_beams == 1
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if can_stream else None
        set_seed(self.seed)
        with torch.no_grad(), self._speaking(name):
            mask = torch.ones_like(ids)
            out = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer)
        text = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        if stream and not can_stream:
            print(text)
        return text

    def _answer_tokens(self, prompt_tokens: int, most: int) -> int:
        """How many new tokens there are positions for; what is cut, or beyond them, is said."""
        tokens, positions = answer_tokens(self.model, prompt_tokens, most), positions_of(self.model)
        if tokens < most:
            print(f"The answer ends after {tokens} tokens at most: the base has {positions.count} positions.")
        elif positions is not None and prompt_tokens > positions.count:
            print(f"The prompt has {prompt_tokens} tokens, more than the {positions.count} the base was trained on.")
        return tokens

    def _speaking(self, name: str) -> Any:
        if self.adapters[name] is None:
            return self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()
        self.model.set_adapter(self.adapters[name])
        return nullcontext()


def load_speaker(adapters: dict[str, AdapterFolder], arguments: Any) -> Speaker:
    """Base and adapters, ready to answer. Raises FileNotFoundError or ValueError where something is
    missing or does not fit."""
    folders = list(adapters.values())
    base_name = base_of(folders, arguments.base)
    check_adapters(base_name, folders)
    base, _ = load_frozen_base(base_name, arguments.bits, folders)
    tokenizer = load_tokenizer_of(base_name, folders)
    model = put_adapters_on(base, tokenizer, folders) if folders else base
    names = {BASE: None, **{name: f"adapter{number}" for number, name in enumerate(adapters)}}
    if arguments.prompt_as == CHAT and not tokenizer.chat_template:
        raise ValueError("--prompt_as chat: the tokenizer has no chat template; leave it out")
    told = [arguments.prompt_as or prompt_of(folder.facts, tokenizer) for folder in folders]
    prompts = dict(zip(names, [told[0] if told else arguments.prompt_as or prompt_of({}, tokenizer), *told]))
    generation = GenerationArguments(
        **{entry.name: getattr(arguments, entry.name) for entry in fields(GenerationArguments)}
    )
    return Speaker(model, tokenizer, names, prompts, generation, arguments.seed)


def read_requests(path: Path) -> list[dict[str, Any]]:
    """[{"input", "adapter" (optional)}] of a txt file, a prompt a line, or of a table (jsonl, ...).

    Raises on what it cannot read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path}: there is no such file")
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"--prompts {path} holds no prompt")
    if path.suffix.lower() in TABLE_SUFFIXES:
        rows = read_table(path)
        for number, row in rows:
            if not isinstance(row.get("input"), str):
                raise ValueError(f'--prompts {path}, line {number} needs an input column: {{"input": "..."}}')
        return _bounded([row for _, row in rows], path)
    return _bounded([{"input": line} for line in split_lines(text) if line.strip()], path)


def _bounded(requests: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    if len(requests) > MOST_PROMPTS:
        raise ValueError(f"--prompts {path} holds {len(requests)} prompts; give {MOST_PROMPTS} at most")
    return requests


def side_by_side(titles: Sequence[str], texts: Sequence[str], width: int) -> str:
    """Texts in columns of equal width under their titles; `width` in characters for all of them."""
    column = max(16, (width - 3 * (len(titles) - 1)) // len(titles))
    wrapped = [[line for part in text.splitlines() for line in textwrap.wrap(part, column)] for text in texts]
    rows = [list(titles), ["-" * column] * len(titles), *zip_longest(*wrapped, fillvalue="")]
    return "\n".join(" | ".join(cell.ljust(column) for cell in row).rstrip() for row in rows)


def answer_all(speaker: Speaker, requests: Sequence[dict[str, Any]], compare: bool) -> list[dict[str, Any]]:
    """Every request by its own adapter, else by all of them in turn; [{"input", "adapter",
    "answer"}]."""
    trained = [name for name in speaker.adapters if name != BASE]
    unknown = {request["adapter"] for request in requests if request.get("adapter") not in (None, *speaker.adapters)}
    if unknown:
        raise ValueError(
            f"adapter {', '.join(map(str, sorted(unknown)))} was not given; there are {', '.join(speaker.adapters)}"
        )
    answers = []
    for request in requests:
        names = [BASE, *trained] if compare else [request["adapter"]] if request.get("adapter") else trained or [BASE]
        texts: list[str] = []
        if len(requests) > 1 or compare:
            print(f"\n> {request['input']}")
        for name in names:
            if len(speaker.adapters) > 2 and not compare:
                print(f"[{name}]")
            texts.append(speaker.answer(speaker.source(request["input"], name), name, stream=not compare))
            answers.append({"input": request["input"], "adapter": name, "answer": texts[-1]})
        if compare:
            print(side_by_side(names, texts, shutil.get_terminal_size((120, 24)).columns))
    return answers


def chat(speaker: Speaker, name: str) -> None:
    """Read messages from the standard input and answer them until it ends; a chat template carries
    the talk so far."""
    has_template = bool(speaker.tokenizer.chat_template)
    print(f"Adapters: {', '.join(speaker.adapters)}; {name} answers. {CHAT_HELP}")
    if not has_template:
        print("The tokenizer has no chat template, so every message is a prompt of its own, as in the training data.")
    talk: list[dict[str, str]] = []
    while True:
        try:
            message = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if message == "/quit":
            return
        if message == "/new":
            talk = []
        elif message.startswith("/use"):
            wanted = message[4:].strip()
            name = wanted if wanted in speaker.adapters else name
            print(
                f"{name} answers."
                if wanted == name
                else f"There is no {wanted!r}; choose of {', '.join(speaker.adapters)}."
            )
        elif message:
            talk.append({"role": "user", "content": message})
            if has_template:
                source = speaker.talk_source(talk)
            else:
                source = encode_source(speaker.tokenizer, message)
            talk.append({"role": "assistant", "content": speaker.answer(source, name, stream=True)})


def main(argv: Optional[Sequence[str]] = None) -> int:
    return reported("generate_text", lambda: _generate(argv))


def _generate(argv: Optional[Sequence[str]]) -> int:
    arguments = parse_arguments(argv)
    requests = [{"input": arguments.prompt}] if arguments.prompt is not None else []
    if arguments.prompts is not None:
        requests = read_requests(arguments.prompts)
    one_run = arguments.compare and len(arguments.adapter) == 1
    adapters = run_adapters(arguments.adapter[0]) if one_run else named_adapters(arguments.adapter)
    speaker = load_speaker(adapters, arguments)
    if one_run and "turning point" not in adapters:
        print("This run has no turning point: base and last are compared.")
    if arguments.chat:
        chat(speaker, next((name for name in speaker.adapters if name != BASE), BASE))
        return 0
    answers = answer_all(speaker, requests, arguments.compare)
    if arguments.output is not None:
        write_text_whole(arguments.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers))
    return 0


if __name__ == "__main__":
    sys.exit(main())

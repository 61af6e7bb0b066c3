"""Instruction data in the column layouts people publish it in, converted to one layout: {"input",
"output"}.

A format is a name, the columns it needs and a function from one row to the pair (input, output):
the text the model is given and the text it learns to write. Formats are found by name (`FORMATS`),
by hub name or by a table's columns (`detect_format`). The column layouts and prompt templates are
the published ones of the data sets that carry the name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Callable, Union

from datasets import Dataset

# The two prompts every alpaca-style model was trained on, byte for byte as qlora sends them (with
# the final blank).
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)
ALPACA_PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)
MMLU_LETTERS = "ABCD"
LEARN = "learn"  # the column of what is learnt in a conversation; see text/conversations.py
CONVERSATION_FORMATS = ("lima", "messages")
ASIDE = ("system", "history")  # what LLaMA-Factory's alpaca rows hold beside the instruction

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """One column layout: the columns a row must have, those it may have, and how it becomes (input,
    output).

    A conversation becomes (input, output, what of both is learnt). chats: a chat template writes
    its rows, and an adapter trained on them is asked by it.
    """

    columns: tuple[str, ...]
    convert: Callable[[Row], tuple[Any, ...]]
    optional: tuple[str, ...] = ()
    description: str = ""
    chats: bool = False


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        found = "nothing (null)" if value is None else f"{value!r:.60} ({type(value).__name__})"
        raise ValueError(f"column '{column}' holds {found} where text is needed: write it as a string in quotes")
    return value


def _optional_text(row: Row, column: str) -> str:
    return "" if row.get(column) is None else _text(row, column)


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def system_turn(row: Row) -> list[dict[str, str]]:
    """The text of the column `system` as an opening turn; none where there is no text."""
    system = _optional_text(row, "system")
    return [{"role": "system", "content": system}] if system.strip() else []


def earlier_turns(row: Row) -> list[tuple[str, str]]:
    """The column `history`: [question, answer] of the turns before. Raises ValueError where it is
    none."""
    history = row.get("history") or []
    pairs = isinstance(history, (list, tuple)) and all(isinstance(turn, (list, tuple)) for turn in history)
    if not pairs or not all(len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in history):
        raise ValueError(f"column 'history' holds {history!r:.60}: give a list of [question, answer]")
    return [(question, answer) for question, answer in history]


def turns_of(row: Row) -> list[dict[str, str]]:
    """A dialogue up to its last answer, as [{"role", "content"}], from the column `conversations`
    or `messages`.

    A turn is a text (LIMA: the person and the assistant in turn), {"from", "value"} or {"role",
    "content"}. Raises ValueError where a turn is none of these or nothing is answered.
    """
    turns = row.get("conversations") or row.get("messages")
    if not isinstance(turns, (list, tuple)):
        raise ValueError("a dialogue needs the column conversations (or messages) with a list of turns")
    if all(isinstance(turn, str) for turn in turns):
        dialogue = [
            {"role": "user" if number % 2 == 0 else "assistant", "content": turn} for number, turn in enumerate(turns)
        ]
    else:
        dialogue = [_turn(turn) for turn in turns]
    while dialogue and dialogue[-1]["role"] != "assistant":
        dialogue.pop()
    if len(dialogue) < 2:
        raise ValueError(
            "the dialogue has no answer to learn: it needs a turn of the person and then one of the assistant"
        )
    return dialogue if dialogue[0]["role"] == "system" else [*system_turn(row), *dialogue]


def _turn(turn: Any) -> dict[str, str]:
    given = turn if isinstance(turn, Mapping) else {}
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
        raise ValueError(f"{turn!r:.60} is no turn: write a text, or a role (of {', '.join(ROLES)}) and its content")
    return {"role": ROLES[role], "content": content}


def _from_dialogue(row: Row) -> tuple[str, str]:
    *given, answer = (turn["content"].strip() for turn in turns_of(row))
    return "\n\n".join(given) + "\n\n", answer


def _from_alpaca(row: Row) -> tuple[str, str]:
    instruction, context = _text(row, "instruction"), _optional_text(row, "input")
    template = ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT_WITHOUT_INPUT
    before = [turn["content"] for turn in system_turn(row)]
    before += [ALPACA_PROMPT_WITHOUT_INPUT.format(instruction=asked) + told for asked, told in earlier_turns(row)]
    return "\n\n".join([*before, template.format(instruction=instruction, input=context)]), _text(row, "output")


def _from_chip2(row: Row) -> tuple[str, str]:
    question, separator, answer = _text(row, "text").partition("<bot>:")
    if not separator:
        raise ValueError("column 'text' has no '<bot>:' turn: chip2 needs '<human>: question\\n<bot>: answer'")
    return question.strip().removeprefix("<human>:").strip(), answer.strip()


def _from_mmlu(row: Row) -> tuple[str, str]:
    if isinstance(row.get("choices"), (list, tuple)):
        choices = list(row["choices"])
    else:
        choices = [_text(row, letter) for letter in MMLU_LETTERS]
    answer = row.get("answer")
    letter = MMLU_LETTERS[answer] if answer in (0, 1, 2, 3) else answer
    if len(choices) != 4 or letter not in tuple(MMLU_LETTERS):
        raise ValueError(f"mmlu needs four choices and an answer A-D or 0-3, not {len(choices)} and {answer!r}")
    return mmlu_prompt(_optional_text(row, "subject"), mmlu_question(_text(row, "question"), choices)), letter


def mmlu_question(question: str, choices: Iterable[str], answer: str = "") -> str:
    """One question in the MMLU layout, ending with "Answer:" (and " X" where the answer is given,
    for examples)."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(MMLU_LETTERS, choices)]
    return "\n".join([question, *lines, f"Answer: {answer}" if answer else "Answer:"])


def mmlu_prompt(subject: str, question: str, examples: Iterable[str] = ()) -> str:
    """The published prompt: a header that names the subject (two blanks before it), solved
    examples, the question.

    `question` and `examples` come from `mmlu_question`. Source: Hendrycks et al., "Measuring
    Massive Multitask Language Understanding" (ICLR 2021), evaluation interface.
    """
    header = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}."
    return "\n\n".join([header, *examples, question])


_DIALOGUE = "a dialogue, of which the last answer is learnt"
_ALPACA = Format(
    ("instruction", "output"), _from_alpaca, ("input", *ASIDE), "an instruction, an input or none, the answer"
)

FORMATS: dict[str, Format] = {
    "alpaca": _ALPACA,
    "alpaca-clean": _ALPACA,
    "chip2": Format(("text",), _from_chip2, (), "'<human>: question\\n<bot>: answer' in one text"),
    "self-instruct": Format(
        ("prompt", "completion"), lambda row: (_text(row, "prompt"), _text(row, "completion")), (), "prompt, completion"
    ),
    "hh-rlhf": Format(("chosen",), lambda row: ("", _text(row, "chosen")), (), "the preferred dialogue, learnt whole"),
    "longform": Format(
        ("input", "output"), lambda row: (_text(row, "input"), _text(row, "output")), (), "an instruction, a long text"
    ),
    "oasst1": Format(("text",), lambda row: ("", _text(row, "text")), (), "a dialogue or any text, learnt whole"),
    "lima": Format(("conversations",), _from_dialogue, ("system",), _DIALOGUE),
    "messages": Format(("messages",), _from_dialogue, ("system",), _DIALOGUE),
    "mmlu": Format(("question", "answer"), _from_mmlu, ("choices", "subject", *MMLU_LETTERS), "question, choices"),
    "input-output": Format(
        ("input", "output"), lambda row: (_text(row, "input"), _text(row, "output")), (), "the pair itself"
    ),
}

# Hub repositories whose layout is known; any other is recognised by its columns.
_HUB_FORMATS = {
    "tatsu-lab/alpaca": "alpaca",
    "yahma/alpaca-cleaned": "alpaca-clean",
    "laion/oig": "chip2",
    "yizhongw/self_instruct": "self-instruct",
    "anthropic/hh-rlhf": "hh-rlhf",
    "akoksal/longform": "longform",
    "timdettmers/openassistant-guanaco": "oasst1",
    "cais/mmlu": "mmlu",
    "gair/lima": "lima",
}


def format_named(name: Union[str, Format]) -> Format:
    """The format of that name (or the one given itself); ValueError naming the nearest where there
    is no such one."""
    if isinstance(name, Format):
        return name
    if name in FORMATS:
        return FORMATS[name]
    nearest = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    raise ValueError(f"--dataset_format '{name}' is unknown. Known formats: {', '.join(FORMATS)}{hint}")


def detect_format(columns: Iterable[str], first_row: Row | None = None, dataset_name: str = "") -> str:
    """The format's name, from the name of a data set where that is known, else from its columns.

    `first_row` decides between the two formats that have one column `text`: chip2 opens with
    "<human>:". Raises ValueError that lists the columns found where nothing fits.
    """
    if dataset_name in FORMATS:
        return dataset_name
    if dataset_name.lower() in _HUB_FORMATS:
        return _HUB_FORMATS[dataset_name.lower()]
    present = set(columns)
    if {"question", "answer"} <= present and ("choices" in present or set(MMLU_LETTERS) <= present):
        return "mmlu"
    if {"text"} <= present and str((first_row or {}).get("text", "")).lstrip().startswith("<human>:"):
        return "chip2"
    # alpaca before input-output: it has these two columns and the instruction besides.
    for name in ("alpaca", "input-output", "self-instruct", "hh-rlhf", "oasst1", "lima", "messages"):
        if set(FORMATS[name].columns) <= present:
            return name
    raise ValueError(
        f"no known format has the columns {_listed(present)}{_nearly(present)}. Rename them to 'input' and 'output', "
        "or to those of a format named by --dataset_format: "
        f"{'; '.join(f'{n} ({_listed(f.columns)})' for n, f in FORMATS.items())}"
    )


def _nearly(present: set[str]) -> str:
    """The format that lacks one column only, in words; empty where there is none."""
    lacking = {name: set(known.columns) - present for name, known in FORMATS.items() if len(known.columns) > 1}
    found = next(((name, missing) for name, missing in lacking.items() if len(missing) == 1), None)
    return f": {found[0]} would need {_listed(found[1])} too" if found else ""


def described(format_name: Union[str, Format]) -> str:
    """A format's name, or what it is where it has none."""
    return format_name.description if isinstance(format_name, Format) else f"the format '{format_name}'"


def check_columns(columns: Iterable[str], format_name: Union[str, Format]) -> None:
    """Raises ValueError that lists what is missing and what is there."""
    missing = [column for column in format_named(format_name).columns if column not in set(columns)]
    if missing:
        raise ValueError(
            f"{described(format_name)} needs the column(s) {_listed(missing)}; there are {_listed(columns)}. "
            "Rename the columns or choose another --dataset_format"
        )


def unused_columns(rows: Iterable[Row], format_name: Union[str, Format]) -> list[str]:
    """The columns that hold something and that the format does not read, sorted."""
    used = {*format_named(format_name).columns, *format_named(format_name).optional}
    return sorted({column for row in rows for column, value in row.items() if column not in used and value})


def with_asides(rows: Iterable[Row], format_name: Union[str, Format]) -> str:
    """` with system` and the like: what of ASIDE and tools the rows hold and the format reads."""
    read = [column for column in (*ASIDE, "tools") if column in format_named(format_name).optional]
    held = {column for row in rows for column in read if row.get(column)}
    return f" with {' and '.join(sorted(held))}" if held else ""


def convert_row(row: Row, format_name: Union[str, Format], where: str) -> dict[str, Any]:
    """One row as {"input", "output"}, a conversation with "learn" besides.

    `where` ("x.jsonl, line 3") opens the message of a ValueError.
    """
    try:
        source, target, *learnt = format_named(format_name).convert(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return {"input": source, "output": target, **({LEARN: learnt[0]} if learnt else {})}


def to_input_output(dataset: Dataset, format_name: Union[str, Format]) -> Dataset:
    """A data set with exactly the columns "input" and "output", both text, and "learn" of
    conversations.

    Raises ValueError on an unknown format, a missing column and a cell that is no text.
    """
    check_columns(dataset.column_names, format_name)
    return dataset.map(
        lambda row, index: convert_row(row, format_name, f"row {index + 1}"),
        with_indices=True,
        remove_columns=dataset.column_names,
        desc=f"Reading {described(format_name)}",
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "none"

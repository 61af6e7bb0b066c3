"""--prompt_template: rows of any columns as {"input", "output"}, by a line of text with {column} in
it, or by a name.

The last {column} is what the model learns to write; everything before it is what the model is
given. `chat` puts a dialogue or a pair through the chat template of the base's own tokenizer.
"""

import difflib
import string
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from text.conversations import Chat, tools_of, without_open_thought
from text.formats import ASIDE, FORMATS, Format, detect_format, earlier_turns, system_turn, turns_of

TEMPLATES = {
    "summarise": "Summarise this text in a few sentences.\n\n{text}\n\nSummary: {summary}",
    "rate": "Rate this text.\n\n{text}\n\nRating: {rating}",
    "translate": (
        "Translate this text from {source_language} to {target_language}.\n\n{source}\n\nTranslation: {target}"
    ),
    "classify": "Which label fits this text?\n\n{text}\n\nLabel: {label}",
    "question": "Question: {question}\n\nAnswer: {answer}",
}


def template_format(template: str, tokenizer: Any, conversations: Optional[Format] = None) -> Format:
    """The format of a --prompt_template: a name of TEMPLATES, `chat`, or the text itself (`\\n`
    stands for a new line).

    conversations: what `chat` reads conversations by; None: their last answer alone is learnt.
    Raises ValueError on an unknown name, a text without {column} and broken braces.
    """
    if template == "chat":
        return _chat_format(tokenizer, conversations)
    if "{" not in template and "}" not in template and template not in TEMPLATES:
        nearest = difflib.get_close_matches(template, [*TEMPLATES, "chat"], n=1)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
        names = ", ".join([*TEMPLATES, "chat"])
        raise ValueError(f"--prompt_template '{template}' is no name of {names} and has no {{column}}{hint}")
    pieces = _pieces(TEMPLATES.get(template, template).replace("\\n", "\n"))
    *given, (before_last, last), (after_last, _) = pieces
    columns = tuple(dict.fromkeys(column for _, column in pieces if column is not None))

    def convert(row: Mapping[str, Any]) -> tuple[str, str]:
        source = "".join(literal + _cell(row, column) for literal, column in given) + before_last
        return source, _cell(row, last) + after_last

    return Format(columns, convert, (), f"the template {template!r}")


def _pieces(template: str) -> list[tuple[str, Any]]:
    """[(text, the column after it)], ended by the text after the last column, with None."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"--prompt_template: {error}; write {{{{ and }}}} for braces that are no column") from None
    bad = [
        name or "{}" for _, name, form, conversion in parsed if name is not None and (not name or form or conversion)
    ]
    if bad:
        raise ValueError(
            f"--prompt_template: {', '.join(bad)} is no plain {{column}}; write {{{{ and }}}} for other braces"
        )
    pieces: list[tuple[str, Any]] = []
    text = ""  # {{ and }} come as texts of their own
    for literal, name, _, _ in parsed:
        text += literal
        if name is not None:
            pieces.append((text, name))
            text = ""
    if not pieces:
        raise ValueError("--prompt_template has no {column}: the last one is what the model learns to write")
    return [*pieces, (text, None)]


def _cell(row: Mapping[str, Any], column: str) -> str:
    """A cell as text: numbers are written out, lists joined by commas."""
    value = row.get(column)
    if isinstance(value, (list, tuple)) and value and all(isinstance(entry, (str, int, float)) for entry in value):
        return ", ".join(map(str, value))
    if value is None or not isinstance(value, (str, int, float)):
        raise ValueError(f"column '{column}' holds {value!r:.60} where text or a number is needed")
    return str(value)


def _chat_format(tokenizer: Any, conversations: Optional[Format]) -> Format:
    if conversations is None and not getattr(tokenizer, "chat_template", None):
        raise ValueError("--prompt_template chat: the base's tokenizer has no chat template; choose another template")

    def convert(row: Mapping[str, Any]) -> tuple[Any, ...]:
        is_dialogue = bool({"conversations", "messages"} & set(row))
        if conversations is None:
            return last_answer(turns_of(row) if is_dialogue else _pair_as_turns(row), row)
        return conversations.convert(row) if is_dialogue else (*last_answer(_pair_as_turns(row), row), None)

    def last_answer(turns: Sequence[dict[str, str]], row: Mapping[str, Any]) -> tuple[str, str]:
        chat = Chat(tokenizer, tools_of(row))
        given, whole = without_open_thought(chat.text(turns[:-1], prompt=True)), chat.text(turns)
        if not whole.startswith(given):
            raise ValueError(
                "the tokenizer's chat template writes a dialogue differently once it is answered; use another"
            )
        # Both tokens are added when the pair is encoded.
        answer = whole[len(given) :].rstrip("\n").removesuffix(tokenizer.eos_token or "")
        return given.removeprefix(tokenizer.bos_token or ""), answer

    chats = conversations is not None
    pairs = [column for known in FORMATS.values() for column in (*known.columns, *known.optional)]
    return Format((), convert, ("tools", *pairs), "the tokenizer's chat template", chats)


def _pair_as_turns(row: Mapping[str, Any]) -> Sequence[dict[str, str]]:
    """A pair as a talk, after its system text and the turns before it."""
    question, answer = FORMATS[detect_format(row)].convert({key: row[key] for key in row if key not in ASIDE})
    pairs = [*earlier_turns(row), (question, answer)]
    turns = [[{"role": "user", "content": asked}, {"role": "assistant", "content": told}] for asked, told in pairs]
    return [*system_turn(row), *(turn for pair in turns for turn in pair)]

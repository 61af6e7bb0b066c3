"""The Modelfile that `ollama create` reads: FROM, ADAPTER, TEMPLATE, SYSTEM, PARAMETER, LICENSE.

Ollama does not run a tokenizer's chat template (Jinja) but a template of its own (Go). It is
derived by rendering conversations of known texts and cutting out what stands between them.
Instructions as documented in Ollama's docs/modelfile.md and docs/template.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from adapters.folders import CHAT
from es_lora.files import read_text
from text.conversations import Chat

CONTEXT_TOKENS = 4096  # at most: a longer context costs memory whether it is used or not
_SYSTEM, _USER, _ANSWER, _NEXT = "Ssystemtext", "Uusertext", "Aanswertext", "Nnexttext"
FIX = "write the model without --modelfile, or with --modelfile_prompt plain"


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around the contents of turns.

    opening: before everything. before_answer: after a user's content, up to the answer; where the
    answer is to be generated, the same. default_system: what it puts where none is given; `system`
    is None where there is no such turn.
    """

    opening: str
    user: str
    before_answer: str
    after_answer: str
    system: Optional[tuple[str, str]]
    default_system: Optional[str]


def turns_of_template(tokenizer: Any) -> Turns:
    """Raises ValueError where the chat template is more than one text between turns."""
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    head, to_answer, to_user, tail = _between(tokenizer, [_USER, _ANSWER, _NEXT])
    closed, found, rest = to_user.partition(eos)
    blanks = rest[: len(rest) - len(rest.lstrip("\n"))]
    user = rest[len(blanks) :] if eos and found else ""
    if not user or to_answer != tail or not head.endswith(user):
        raise ValueError(f"the chat template writes turns by other rules than a text between them; {FIX}")
    opening = bos if bos and head.startswith(bos) and not user.startswith(bos) else ""
    system = _system_turn(tokenizer, opening, user, tail)
    default = _default_system(head[len(opening) : len(head) - len(user)], system)
    turns = Turns(opening, user, tail, closed + eos + blanks, system, default)
    _check_three_turns(tokenizer, turns)
    return turns


def _between(tokenizer: Any, contents: Sequence[str]) -> list[str]:
    """The texts before, between and after the contents of a conversation. Raises ValueError."""
    roles = ["system", "user", "assistant"] if contents[0] == _SYSTEM else ["user", "assistant"]
    roles = roles[:1] * (roles[0] == "system") + ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    pieces, rest = [], _rendered(tokenizer, messages)
    for content in contents:
        before, found, rest = rest.partition(content)
        if not found:
            raise ValueError(f"the chat template leaves out what a turn says; {FIX}")
        pieces.append(before)
    return [*pieces, rest]


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    try:
        return Chat(tokenizer).text(messages, prompt=True)
    except ValueError as error:
        raise ValueError(f"{error}; {FIX}") from error


def _system_turn(tokenizer: Any, opening: str, user: str, tail: str) -> Optional[tuple[str, str]]:
    """What stands around a system's content; None where the template has no turn of its own for
    it."""
    try:
        head, middle, end = _between(tokenizer, [_SYSTEM, _USER])
    except ValueError:
        return None
    if not (head.startswith(opening) and middle.endswith(user) and end == tail):
        return None
    return head[len(opening) :], middle[: len(middle) - len(user)]


def _default_system(before_user: str, system: Optional[tuple[str, str]]) -> Optional[str]:
    """The system's text of a conversation without one; "" where it has an empty turn, None where
    none."""
    if not before_user:
        return None
    before, after = system or ("", "")
    whole = len(before_user) >= len(before) + len(after)
    if system is None or not (whole and before_user.startswith(before) and before_user.endswith(after)):
        raise ValueError(f"the chat template opens with {before_user!r:.60}, which is no system turn; {FIX}")
    return before_user[len(before) : len(before_user) - len(after)]


def _check_three_turns(tokenizer: Any, turns: Turns) -> None:
    """Raises ValueError where a longer conversation is not what the turns say."""
    texts = ["one", "two", "three", "four", "five"]
    roles = ["user", "assistant"] * 3
    rendered = _rendered(tokenizer, [{"role": role, "content": text} for role, text in zip(roles, texts)])
    system = "" if turns.default_system is None else turns.default_system.join(turns.system or ("", ""))
    written = turns.opening + system
    for role, text in zip(roles, texts):
        written += turns.user + text + turns.before_answer if role == "user" else text + turns.after_answer
    if rendered != written:
        raise ValueError(f"the chat template writes later turns differently; {FIX}")


def go_template(turns: Turns) -> str:
    """Ollama's template that writes the same text; the messages hold the system's too."""
    system = ""
    if turns.system is not None:
        before, after = map(_literal, turns.system)
        system = '{{ if eq .Role "system" }}' + before + "{{ .Content }}" + after + "{{ else }}"
    user = _literal(turns.user) + "{{ .Content }}" + _literal(turns.before_answer)
    answer = "{{ .Content }}" + _literal(turns.after_answer)
    other = '{{ if eq .Role "user" }}' + user + '{{ else if eq .Role "assistant" }}' + answer + "{{ end }}"
    return _literal(turns.opening) + "{{ range .Messages }}" + system + other + "{{ end }}" * (1 + bool(system))


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def stop_words(tokenizer: Any, turns: Optional[Turns]) -> list[str]:
    """The end token, and the special tokens that open or close a turn."""
    around = "" if turns is None else turns.user + turns.before_answer + turns.after_answer
    special = [
        str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and str(token) in around
    ]
    return list(dict.fromkeys([tokenizer.eos_token, *special]))


def modelfile(
    tokenizer: Any, prompt: str, *, source: str, adapter: Optional[str], adds_bos: bool, context: int, licence: str = ""
) -> str:
    """The text of a Modelfile.

    prompt: CHAT (the tokenizer's chat template) or PLAIN (what is typed, as it is). source: a GGUF
    or a model of Ollama. adapter: a LoRA over it. adds_bos: whether the model puts the bos token
    first by itself. context: the longest the model knows, in tokens. Raises ValueError.
    """
    turns = turns_of_template(tokenizer) if prompt == CHAT else None
    bos = tokenizer.bos_token or ""
    template = bos + "{{ .Prompt }}" if turns is None else go_template(turns)
    template = template.removeprefix(bos) if adds_bos else template
    lines = [f"FROM {_quoted(source)}"] + ([f"ADAPTER {_quoted(adapter)}"] if adapter else [])
    lines.append(f"TEMPLATE {_long(template)}")
    if turns is not None and turns.default_system is not None:
        lines.append(f"SYSTEM {_long(turns.default_system)}")
    lines += [f'PARAMETER stop "{word}"' for word in stop_words(tokenizer, turns)]
    lines.append(f"PARAMETER num_ctx {min(context, CONTEXT_TOKENS)}")
    lines += ["# The likeliest token each time, as generate_text.py answers:"]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    if licence:
        lines.append(f"LICENSE {_long(licence)}")
    return "\n".join(lines) + "\n"


def _quoted(path: str) -> str:
    return f'"{path}"' if " " in path else path


def _long(text: str) -> str:
    """A value of any lines. Raises ValueError where the format cannot hold it."""
    if '"""' in text:
        raise ValueError('a Modelfile cannot hold a text with """ in it')
    return f'"""{text}"""'


def path_from(modelfile_path: Path, file: Path) -> str:
    """A file as the Modelfile names it: relative where it lies beside or below, else absolute."""
    file, folder = file.resolve(), modelfile_path.resolve().parent
    return f"./{file.relative_to(folder)}" if file.is_relative_to(folder) else str(file)


def licence_of(base: str) -> str:
    """The text of the base's licence, where a file of it lies beside."""
    file = Path(base) / "LICENSE"
    return read_text(file).strip() if file.is_file() else ""

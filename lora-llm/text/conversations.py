"""Conversations whole: every turn of the assistant is learnt, written by the base's chat template.

A row has `messages` ({"role", "content", "tool_calls"}) or `conversations` ({"from", "value"}). It
becomes {"input", "output", "learn"}. Input and output together are the text, up to the last answer.
`learn` lists [start, end] of what is learnt, in characters of that text.

What is learnt is what stands in the template's `{% generation %}` blocks. A template without them
tells it by prefixes. The text before an answer, with the prompt to answer, must begin the text
after it. The difference is the answer and the end of its turn.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from es_lora.inputs.json_text import parsed_json
from text.formats import Format, Row, system_turn
from text.rendering import TemplateBoundsError, check_length, check_operators, within_bounds

LEARN_TURNS = ("all", "last")
ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in ("system", "user", "assistant", "tool")}}
Message = dict[str, Any]
Spans = list[list[int]]  # [start, end] in characters

# For a base without a chat template: a heading, the text, a blank line. The end token closes an
# answer, and a tool call is a line of JSON.
PLAIN_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
    {{- '### Tools:\\n' }}
    {%- for tool in tools %}{{- (tool | tojson) + '\\n' }}{%- endfor %}
    {{- '\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- ('' if loop.first else '\\n\\n') + '### ' + (message.role | capitalize) + ':\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {%- set call = call.function or call %}
        {{- '\\n' if message.content or not loop.first }}
        {{- {'name': call.name, 'arguments': call.arguments} | tojson }}
    {%- endfor %}
    {%- if message.role == 'assistant' %}{{- eos_token }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '\\n\\n### Assistant:\\n' }}{%- endif %}"""


# ------------------------------------------------------------------------------------- the messages


def messages_of(row: Row) -> list[Message]:
    """The conversation of a row as [{"role", "content", ...}], up to its last answer.

    Keys such as `tool_calls` and `name` stay. Arguments of a call that are JSON text become an
    object. Raises ValueError on what is no turn, an unknown role, and a row without an answer.
    """
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, (list, tuple)):
        raise ValueError("a conversation needs the column messages (or conversations) with a list of turns")
    if all(isinstance(turn, str) for turn in turns):
        turns = [{"role": "assistant" if number % 2 else "user", "content": turn} for number, turn in enumerate(turns)]
    messages = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
    if messages and messages[0]["role"] != "system":
        messages = [*system_turn(row), *messages]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ValueError(
            f"all labels are masked: none of the {len(turns)} turns is the assistant's; add an answer, or leave it out"
        )
    return messages


def _message(turn: Any, number: int) -> Message:
    given = _without_nulls(turn) if isinstance(turn, Mapping) else {}
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(
            f"turn {number} has {f'the role {role!r:.40}' if role else 'no role'}: "
            "allowed are system, user (human), assistant (gpt) and tool"
        )
    calls = given.get("tool_calls") or []
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"turn {number}: tool_calls holds {calls!r:.60}: give a list of calls")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"turn {number} holds {content!r:.60} where text is needed: write its content as a string")
    others = {key: value for key, value in given.items() if key not in ("from", "value", "tool_calls")}
    called = {"tool_calls": [_call(call, number) for call in calls]} if calls else {}
    return {**others, "role": ROLES[role], "content": content, **called}


def _call(call: Any, number: int) -> dict[str, Any]:
    call = _without_nulls(call)
    function = _without_nulls(call.get("function", call)) if isinstance(call, Mapping) else {}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f'turn {number}: {call!r:.60} is no tool call; write {{"function": {{"name": ..., "arguments": {{...}}}}}}'
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = parsed_json(arguments)
        except json.JSONDecodeError:
            pass  # some templates write text as it is
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _without_nulls(value: Any) -> Any:
    """The same without the nulls that a table adds where its rows have different keys."""
    if not isinstance(value, Mapping):
        return value
    return {key: entry for key, entry in value.items() if entry is not None}


def _without_any_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_any_null(entry) for key, entry in value.items() if entry is not None}
    return [_without_any_null(entry) for entry in value] if isinstance(value, list) else value


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """The column `tools`, as a list or as JSON text. Raises ValueError where it is neither."""
    tools = row.get("tools")
    try:
        tools = parsed_json(tools) if isinstance(tools, str) and tools else tools
    except json.JSONDecodeError as error:
        raise ValueError(f"column 'tools' is no JSON: {error}") from None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise ValueError(f"column 'tools' holds {tools!r:.60}: give a list of tools, each an object")
    return _without_any_null(tools) or None


# ------------------------------------------------------------------------------------- the template


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template with the tools of one row; the plain one where it has none."""

    tokenizer: Any
    tools: Sequence[Mapping[str, Any]] | None = None

    @property
    def template(self) -> str:
        """The template's text; the variant for tools where there are tools and such a one."""
        if not self.tokenizer.chat_template:
            return PLAIN_TEMPLATE
        return self.tokenizer.get_chat_template(tools=self.tools)

    @property
    def has_blocks(self) -> bool:
        """Whether the template says by itself what the assistant writes."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None

    def text(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """The messages as text; prompt: with the opening of an answer."""
        return self._rendered(messages, prompt, marked=False)[0]

    def marked(self, messages: Sequence[Message]) -> tuple[str, Spans]:
        """(the messages as text, what of it is the assistant's).

        Raises ValueError where the template refuses the messages, leaves something out, or does not
        tell what is the assistant's.
        """
        if self.has_blocks:
            text, spans = self._rendered(messages, prompt=False, marked=True)
        else:
            text = self.text(messages)
            spans = [self._difference(messages, at, text) for at in _answers(messages)]
        spans = [[start, end] for start, end in spans if start < end]
        self._check_complete(messages, text, spans)
        return text, spans

    def _rendered(self, messages: Sequence[Message], prompt: bool, marked: bool) -> tuple[str, Spans]:
        options: dict[str, Any] = {"add_generation_prompt": prompt, "return_assistant_tokens_mask": marked}
        options |= {"tools": self.tools, "chat_template": self.template, **self.tokenizer.special_tokens_map}
        try:
            check_operators(self.template)
            rendered: Any = within_bounds(lambda: render_jinja_template([list(messages)], **options))
            check_length(rendered[0][0])
        except TemplateBoundsError as error:
            raise ValueError(f"{self._named} cannot be used: {error}; correct the template") from None
        except Exception as error:  # whatever the template's own code fails with
            raise ValueError(f"{self._named} refuses the conversation: {' '.join(str(error).split())}") from None
        return rendered[0][0], [list(span) for span in rendered[1][0]] if marked else []

    def _difference(self, messages: Sequence[Message], at: int, text: str) -> list[int]:
        """Where the answer messages[at] stands: what it adds to the prompt for it."""
        given = without_open_thought(self.text(messages[:at], prompt=True)) if at else self._opening()
        answered = self.text(messages[: at + 1])
        if answered.startswith(given) and text.startswith(answered):
            return [len(given), len(answered)]
        content = messages[at]["content"].strip()
        followed = given + content + answered[answered.rfind(content) + len(content) :]
        if content and answered.startswith(given) and text.startswith(followed):  # thoughts of the last turn only
            return [len(given), len(followed)]
        raise ValueError(
            f"{self._named} writes turn {at + 1} differently once it is answered or followed, and has no "
            "{% generation %} blocks, so it does not tell what the assistant wrote: put these blocks around the "
            "assistant's turns in the base's chat_template.jinja, or give --learn_turns last"
        )

    def _opening(self) -> str:
        """What stands before an answer that opens a conversation: what two such answers share."""
        return os.path.commonprefix([self.text([{"role": "assistant", "content": letter}]) for letter in "ab"])

    def _check_complete(self, messages: Sequence[Message], text: str, spans: Spans) -> None:
        learnt = "".join(text[start:end] for start, end in spans)
        what = next(self._left_out(messages, text, learnt), None)
        if what is not None:
            raise ValueError(
                f"{self._named} leaves out {what}: write it into the content of a turn, or use a base whose template "
                "writes it"
            )

    def _left_out(self, messages: Sequence[Message], text: str, learnt: str) -> Iterator[str]:
        """What the template has not written, in words. A text may be written as JSON."""
        if self.tools and Chat(self.tokenizer).text(messages) == text:
            yield "the tools"
        for number, message in enumerate(messages, start=1):
            for call in message.get("tool_calls", ()):
                name = call.get("function", call)["name"]
                if name not in learnt:
                    yield f"the tool call {name!r} of turn {number}"
            content = message["content"].strip()
            escaped = json.dumps(content, ensure_ascii=False)[1:-1]
            if message["role"] in ("system", "tool") and content not in text and escaped not in text:
                yield f"turn {number}, of the role {message['role']}"

    @property
    def _named(self) -> str:
        if not self.tokenizer.chat_template:
            return "the plain chat template"
        return f"the chat template of {self.tokenizer.name_or_path or 'the base'}"


def without_open_thought(prompt: str) -> str:
    """A prompt without the thought that a template opens, or opens and closes, for the answer."""
    return re.sub(r"<(think|thinking|thought)>\s*(</\1>\s*)?$", "", prompt)


def _answers(messages: Sequence[Message]) -> list[int]:
    return [at for at, message in enumerate(messages) if message["role"] == "assistant"]


# ------------------------------------------------------------------------------------------- tokens


def encode_learnt(tokenizer: Any, text: str, spans: Spans) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation's text, and whether each is learnt.

    The text is tokenized whole, so that the ids are those of the template. A token that reaches
    across the border of a span is learnt.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learnt = []
    for start, end in encoded["offset_mapping"]:
        start = min(start, end - 1)  # some tokenizers trim blanks: of a blank token only its end is left
        learnt.append(any(start < stop and end > begin for begin, stop in spans))
    return encoded["input_ids"], learnt


def end_tokens(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's end, and the one of its chat template."""
    ends = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        try:
            talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            ids, learnt = encode_learnt(tokenizer, *Chat(tokenizer).marked(talk))
        except (ValueError, NotImplementedError):  # a template that tells no end, or a tokenizer without offsets
            return ends
        special = set(tokenizer.added_tokens_decoder)
        ends += [token for token, own in zip(ids, learnt) if own and token in special][-1:]
    return list(dict.fromkeys(ends))


# --------------------------------------------------------------------------------------------- rows


def conversation_format(tokenizer: Any) -> Format:
    """The format of conversations of which every answer is learnt."""
    written_in = "the base's chat template" if tokenizer.chat_template else "the plain chat template"
    return Format(
        (),
        lambda row: conversation_row(tokenizer, row),
        ("messages", "conversations", "tools", "system"),
        f"conversations in {written_in}, every answer learnt",
        chats=True,
    )


def conversation_row(tokenizer: Any, row: Row) -> tuple[str, str, Spans]:
    """(text up to the last answer, that answer and what follows, what is learnt).

    The output is empty where every answer is. Raises ValueError where nothing would be learnt, and
    for a tokenizer that does not tell which characters a token is of.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"--learn_turns all: the tokenizer {type(tokenizer).__name__} does not tell which characters a token is "
            "of; use a base with a tokenizer.json, or --learn_turns last"
        )
    messages = messages_of(row)
    text, spans = Chat(tokenizer, tools_of(row)).marked(messages)
    if not spans:
        raise ValueError("all labels are masked: the chat template marks no turn as the assistant's; correct it")
    answers = [messages[at] for at in _answers(messages)]
    if not any(answer["content"].strip() or answer.get("tool_calls") for answer in answers):
        return text, "", spans
    start = spans[-1][0]
    return text[:start], text[start:], spans


def with_chat_template(tokenizer: Any) -> Any:
    """The tokenizer; where it has no chat template, a copy that has the plain one."""
    if tokenizer.chat_template:
        return tokenizer
    ready = copy.copy(tokenizer)
    ready.chat_template = PLAIN_TEMPLATE
    return ready

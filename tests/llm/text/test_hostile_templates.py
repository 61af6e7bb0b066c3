"""Chat templates that loop, fill the memory or fail, and rows that are not as declared."""

import random
import time

import pytest
from transformers import AutoTokenizer

from text import rendering
from text.conversations import Chat, conversation_format
from text.formats import FORMATS, convert_row
from text.spec import DataSpec
from text.streams import StreamedRowError, load_streamed_splits
from text.templates import template_format

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PLAIN = "{% for m in messages %}{{ m.role + m.content }}\n{% endfor %}"
DOUBLING = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}"
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"
HOSTILE = {
    "a loop without end": (NESTED.replace("BODY", ""), "has not ended after 2 seconds"),
    "a loop that writes": (NESTED.replace("BODY", "{{ i }}"), "cannot be used: it "),
    "a long range": ("{% for i in range(10000000000) %}{% endfor %}", "Range too big"),
    "a power": ("{{ 10 ** messages | length ** 99 }}", "raises numbers to a power"),
    "a long text": ("{{ messages[0].content * 10000000000 }}", "asks for more than 1000 MB of memory"),
    "a wide text": ("{{ messages[0].content.ljust(10000000000) }}", "asks for more than 1000 MB of memory"),
    "doubling": (DOUBLING, "asks for more than 1000 MB of memory"),
    "more than can be read": ("{{ messages[0].content * 20000000 }}", "it writes 20000000 characters"),
    "a macro in itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a refusal": ("{{ raise_exception('no talk') }}", "refuses the conversation: no talk"),
    "what is not there": ("{{ messages[5].x.y }}", "refuses the conversation"),
    "no syntax": ("{% if %}", "refuses the conversation"),
    "brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "refuses the conversation"),
}


@pytest.fixture
def tokenizer(random_base):
    return AutoTokenizer.from_pretrained(random_base)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_does_not_end_is_refused_in_time(tokenizer, name):
    tokenizer.chat_template, told = HOSTILE[name]
    started = time.process_time()
    with pytest.raises(ValueError, match="the chat template of .*") as refused:
        Chat(tokenizer).text(TALK)
    assert told in str(refused.value) and "\n" not in str(refused.value)
    assert time.process_time() - started < rendering.RENDER_SEC + 3


def test_bounds_are_gone_after_a_rendering(tokenizer):
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)
    tokenizer.chat_template = "**" + PLAIN
    assert Chat(tokenizer).text(TALK) == "**usera\nassistantb\n"
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


# --------------------------------------------------------------------------------------------- rows

ANSWER = {"role": "assistant", "content": "x"}
VALUES = [None, 5, -1.5, float("nan"), "", "x", "3", True, [], {}, [None], [5], ["a"], ["a", "b"], [[1]], {"a": 1}]
VALUES += [[{"role": 5, "content": "x"}], [{"role": "assistant", "content": None}], [ANSWER], "[1]", '{"a": [', b"x"]
VALUES += [[{"from": ["gpt"], "value": "x"}], [{"role": {"a": 1}, "content": "x"}], [["q", "a", "b"]], [["q", None]]]
VALUES += [[TALK[0], {**ANSWER, "tool_calls": calls}] for calls in (5, [5], {"a": 1}, [{"function": 5}], "x")]
VALUES += [[TALK[0], {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}], "[" * 2000, 10**30]


def test_no_value_of_a_row_ends_in_another_error_than_one_that_names_the_row(tokenizer):
    """Every column of every format with every value, and 2,000 rows at random."""
    tokenizer.chat_template = PLAIN
    conversations = conversation_format(tokenizer)
    formats = [*FORMATS.values(), conversations, template_format("{input}: {output}", tokenizer)]
    formats += [template_format("chat", tokenizer), template_format("chat", tokenizer, conversations)]
    generator, used, refused = random.Random(1), 0, 0
    columns = sorted({column for form in formats for column in (*form.columns, *form.optional)} | {"messages"})
    cases = [
        (form, {**dict.fromkeys(form.columns, "x"), column: value})
        for form in formats
        for column in columns
        for value in VALUES
    ]
    for _ in range(2000):
        chosen = generator.sample(columns, generator.randint(1, 5))
        cases.append((generator.choice(formats), {column: generator.choice(VALUES) for column in chosen}))
    for form, row in cases:
        try:
            pair = convert_row(row, form, "x.jsonl, line 3")
            assert isinstance(pair["input"], str) and isinstance(pair["output"], str)
            used += 1
        except ValueError as error:
            assert str(error).startswith("x.jsonl, line 3: ")
            refused += 1
    assert used > 500 and refused > 5000


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[1]", "is no object"),
        ("null", "is no object"),
        ('{"input": "a"}', "column 'output'"),
        ('{"input": "a", "output": null}', "column 'output'"),
        ('{"input": "a", "output": {"b": 1}}', "column 'output'"),
        ('{"input": ["a"], "output": "b"}', "column 'input'"),
        ('{"input": "a", "outp', "broken JSON at line 3"),
        ("[" * 5000, "more than 100 deep"),
        ('{"input": "\\ud800", "output": "b"}', "half a surrogate pair"),
    ],
)
def test_a_damaged_row_of_a_stream_is_named_when_it_comes(tmp_path, line, told):
    good = '{"input": "a", "output": "b"}\n'
    file = tmp_path / "rows.jsonl"
    file.write_text(good + good + line + "\n" + good, encoding="utf-8")
    splits = load_streamed_splits(DataSpec(str(file), None))
    with pytest.raises(StreamedRowError) as refused:
        list(splits.train)
    assert told in str(refused.value) and "3" in str(refused.value) and "\n" not in str(refused.value)

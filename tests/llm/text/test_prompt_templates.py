"""--prompt_template: which text is given, which is learnt, and what is no template."""

import pytest
from transformers import AutoTokenizer

from text.formats import convert_row, detect_format
from text.templates import TEMPLATES, template_format

CHAT = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(random_base):
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.chat_template = CHAT
    return tokenizer


def converted(template, row, tokenizer=None):
    pair = convert_row(row, template_format(template, tokenizer), "row 1")
    return pair["input"], pair["output"]


def test_the_last_column_is_learnt_with_what_follows_it_and_the_rest_is_given():
    row = {"question": "why?", "answer": "because", "name": "x"}
    assert converted(r"Question: {question}\n\nAnswer: {answer}", row) == ("Question: why?\n\nAnswer: ", "because")
    assert converted("{name}: {{{question}}} {answer}!", row) == ("x: {why?} ", "because!")
    assert converted("{answer}", row) == ("", "because")


def test_numbers_and_lists_are_written_out():
    assert converted("{labels}: {rating}", {"labels": ["a", "b"], "rating": 4}) == ("a, b: ", "4")


ROWS = {
    "summarise": {"text": "long", "summary": "short"},
    "rate": {"text": "fine", "rating": 5},
    "translate": {"source": "ja", "target": "yes", "source_language": "German", "target_language": "English"},
    "classify": {"text": "rain", "label": "weather"},
    "question": {"question": "q", "answer": "a"},
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_take_their_columns(name):
    row = ROWS[name]
    source, target = converted(name, row)
    learnt = list(TEMPLATES[name].split("{")[-1].split("}"))[0]
    assert target == str(row[learnt]) and all(str(row[column]) in source for column in row if column != learnt)


BAD = {
    "name": ("sumarise", "did you mean 'summarise'"),
    "no column": ("{{text}}", "has no {column}"),
    "broken": ("{question", "write {{ and }} for braces"),
    "no name": ("{} {answer}", "is no plain {column}"),
    "chat": ("chat", "has no chat template"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_template_is_refused(case, random_base):
    template, message = BAD[case]
    with pytest.raises(ValueError, match="--prompt_template") as caught:
        template_format(template, AutoTokenizer.from_pretrained(random_base))
    assert message in str(caught.value)


def test_a_cell_that_is_no_text_is_named_with_its_row():
    with pytest.raises(ValueError, match="row 1: column 'answer' holds None where text or a number is needed"):
        converted("{answer}", {"answer": None})


# ---------------------------------------------------------------------------------------- dialogues

DIALOGUES = [
    {"conversations": ["hi", "hello", "more?", "no", "bye"]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"},
                       {"from": "human", "value": "more?"}, {"from": "gpt", "value": "no"}]},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
                  {"role": "user", "content": "more?"}, {"role": "assistant", "content": "no"}]},
]  # fmt: skip


@pytest.mark.parametrize("row", DIALOGUES, ids=["lima", "from and value", "role and content"])
def test_of_a_dialogue_the_last_answer_is_learnt(row, tokenizer):
    format_name = detect_format(row, row)
    assert format_name == ("messages" if "messages" in row else "lima")
    assert convert_row(row, format_name, "row 1") == {"input": "hi\n\nhello\n\nmore?\n\n", "output": "no"}
    end = tokenizer.eos_token
    assert converted("chat", row, tokenizer) == (
        f"<user>hi{end}\n<assistant>hello{end}\n<user>more?{end}\n<assistant>",
        "no",
    )


def test_chat_takes_plain_pairs_too(tokenizer):
    row = {"input": "hi", "output": "hello"}
    assert converted("chat", row, tokenizer) == (f"<user>hi{tokenizer.eos_token}\n<assistant>", "hello")


@pytest.mark.parametrize("turns", [["hi"], [], "hi", [{"role": "poet", "content": "hi"}, "x"]], ids=str)
def test_a_dialogue_without_an_answer_is_refused(turns):
    with pytest.raises(ValueError, match="row 1: "):
        convert_row({"conversations": turns}, "lima", "row 1")


def test_lima_is_known_by_its_hub_name():
    assert detect_format([], None, "GAIR/lima") == detect_format([], None, "lima") == "lima"

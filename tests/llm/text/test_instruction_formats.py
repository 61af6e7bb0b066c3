"""Each published column layout becomes the same two columns; what does not fit is refused with its
cause."""

import pytest
from datasets import Dataset

from text import formats

# One row in the layout of each upstream data set, and the pair it becomes.
UPSTREAM_ROWS = {
    "alpaca": (
        {"instruction": "Name a colour.", "input": "", "output": "Blue", "text": "unused"},
        (
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nName a colour.\n\n### Response: ",
            "Blue",
        ),
    ),
    "alpaca-clean": (
        {"instruction": "Translate {this}.", "input": "chat", "output": "cat"},
        (
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n### Instruction:\nTranslate {this}.\n\n### Input:"
            "\nchat\n\n### Response: ",
            "cat",
        ),
    ),
    "chip2": (
        {"text": "<human>: Why?\nReally?\n<bot>: Because.\nYes.", "metadata": "{}"},
        ("Why?\nReally?", "Because.\nYes."),
    ),
    "self-instruct": ({"prompt": "Say hi.", "completion": " Hi."}, ("Say hi.", " Hi.")),
    "hh-rlhf": ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "x"}, ("", "\n\nHuman: a\n\nAssistant: b")),
    "longform": ({"input": "Write.", "output": "Long.", "source": "c4", "subset": "s"}, ("Write.", "Long.")),
    "oasst1": ({"text": "### Human: a### Assistant: b"}, ("", "### Human: a### Assistant: b")),
    "mmlu": (
        {"question": "1+1?", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"], "answer": 1},
        (
            "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
            "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
            "B",
        ),
    ),
    "input-output": ({"input": "q", "output": "a"}, ("q", "a")),
    "lima": ({"conversations": ["q", "a"], "source": "s"}, ("q\n\n", "a")),
    "messages": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        ("q\n\n", "a"),
    ),
}


def test_every_registered_format_is_covered():
    assert set(UPSTREAM_ROWS) == set(formats.FORMATS)


@pytest.mark.parametrize("name", UPSTREAM_ROWS)
def test_upstream_layout_becomes_input_and_output(name):
    row, (source, target) = UPSTREAM_ROWS[name]
    converted = formats.to_input_output(Dataset.from_list([row]), name)
    assert converted.column_names == ["input", "output"]
    assert converted[0] == {"input": source, "output": target}


def test_mmlu_columns_of_a_table_with_letters():
    row = {"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "D"}
    assert formats.convert_row(row, "mmlu", "row 1")["output"] == "D"


@pytest.mark.parametrize("name", [n for n in UPSTREAM_ROWS if n not in ("alpaca-clean", "longform")])
def test_format_is_told_by_the_columns(name):
    row = UPSTREAM_ROWS[name][0]
    assert formats.detect_format(row.keys(), row) == name


def test_known_names_decide_before_the_columns():
    assert formats.detect_format(["text"], {"text": "no turns"}, "chip2") == "chip2"
    assert formats.detect_format(["text"], {"text": "t"}, "timdettmers/openassistant-guanaco") == "oasst1"
    assert formats.detect_format(["input", "output"], None, "akoksal/LongForm") == "longform"


def test_unknown_columns_are_listed():
    with pytest.raises(ValueError, match="'answer_text', 'q'.*--dataset_format"):
        formats.detect_format(["q", "answer_text"])


def test_unknown_format_suggests_the_nearest():
    with pytest.raises(ValueError, match="'alpaka' is unknown.*did you mean 'alpaca'"):
        formats.to_input_output(Dataset.from_list([{"input": "a", "output": "b"}]), "alpaka")


def test_missing_column_says_what_is_there():
    with pytest.raises(ValueError, match="'self-instruct' needs .*'completion'; there are 'prompt', 'reply'"):
        formats.to_input_output(Dataset.from_list([{"prompt": "a", "reply": "b"}]), "self-instruct")


@pytest.mark.parametrize(
    "name, row, cause",
    [
        ("input-output", {"input": "a", "output": 5}, r"row 1: column 'output' holds 5 \(int\)"),
        ("input-output", {"input": None, "output": "b"}, r"row 1: column 'input' holds nothing"),
        ("chip2", {"text": "<human>: alone"}, "no '<bot>:' turn"),
        ("mmlu", {"question": "q", "choices": ["1", "2"], "answer": 0}, "four choices"),
        ("mmlu", {"question": "q", "choices": ["1", "2", "3", "4"], "answer": 7}, "answer A-D or 0-3.*7"),
    ],
)
def test_bad_rows_are_refused(name, row, cause):
    with pytest.raises(ValueError, match=cause):
        formats.to_input_output(Dataset.from_list([row]), name)


def test_alpaca_without_an_input_column_or_with_null():
    without = formats.convert_row({"instruction": "i", "output": "o"}, "alpaca", "row 1")
    null = formats.convert_row({"instruction": "i", "input": None, "output": "o"}, "alpaca", "row 1")
    assert without == null
    assert "### Input:" not in without["input"]

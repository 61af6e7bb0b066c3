"""Nesting without end, and numbers without end, in what parsers read: one message."""

import json

import pytest

from es_lora.inputs.json_text import not_too_deep, parsed_json
from es_lora.inputs.toml_text import parsed_toml


@pytest.mark.parametrize("depth, fits", [(1, True), (100, True), (101, False), (900, False), (50_000, False)])
@pytest.mark.parametrize("opened, closed", [("[", "]"), ('{"a": ', "}")])
def test_json_is_read_to_a_depth_of_100(depth, fits, opened, closed):
    inner = "1" if opened.startswith("{") else ""
    text = opened * depth + inner + closed * depth
    if fits:
        assert parsed_json(text) == json.loads(text)
    else:
        with pytest.raises(json.JSONDecodeError, match="more than 100 deep"):
            parsed_json(text)


def test_a_number_of_5000_digits_is_broken_json():
    with pytest.raises(json.JSONDecodeError, match="Exceeds the limit"):
        parsed_json("9" * 5000)


def test_a_list_that_holds_itself_and_one_that_doubles_forty_times_are_refused():
    endless: list = []
    endless.append(endless)
    with pytest.raises(ValueError, match="more than 100 deep"):
        not_too_deep(lambda text: endless, "")
    doubled: list = [1]
    for _ in range(40):
        doubled = [doubled, doubled]
    with pytest.raises(ValueError, match="more than 1000000000 values"):
        not_too_deep(lambda text: doubled, "")


def test_toml_whose_parser_recurses_is_one_message():
    def parse(text):
        return parse(text)

    with pytest.raises(ValueError, match="--config x.toml is not valid TOML: lists or tables lie in one another"):
        parsed_toml("a = " + "[" * 10_000, "--config x.toml", parse, "")

"""Conversations whole: which tokens are learnt, against TRL on four families of templates, and what
is refused."""

import json
from dataclasses import replace

import pytest
import torch
from chat_families import TEMPLATES, family_tokenizer, plain
from datasets import Dataset
from tokenizers import processors

from text.collator import IGNORE_INDEX, CausalCollator
from text.conversations import (
    PLAIN_TEMPLATE,
    conversation_format,
    end_tokens,
    with_chat_template,
)
from text.formats import convert_row
from text.packing import encode_sample
from text.sources import load_splits
from text.spec import DataSpec
from text.templates import template_format
from text.usable import Cuts, Limit, usable_rows


def said(*turns):
    """Messages of (role, content)."""
    return [{"role": role, "content": content} for role, content in turns]


ASK, ANSWER = ("user", "What is the weather?"), ("assistant", "It is sunny.")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALLED = [*said(ASK), {"role": "assistant", "content": "", "tool_calls": [CALL]}, *said(("tool", "20 degrees"), ANSWER)]
CONVERSATIONS = {
    "two answers": said(ASK, ANSWER, ("user", "And in Paris?"), ("assistant", "20 degrees.")),
    "system first": said(("system", "Be short."), ASK, ANSWER),
    "blanks, new lines and bytes": said(
        ("user", " Hi \n"), ("assistant", "\n\n Hello 🙂\n"), ASK, ("assistant", "été ")
    ),
    "an empty answer between": said(ASK, ("assistant", ""), ("user", "Hi"), ANSWER),
    "a question at the end": said(ASK, ANSWER, ("user", "And in Paris?")),
    "answers in a row": said(ASK, ANSWER, ("assistant", "And warm.")),
    "an answer first": said(("assistant", "Hello!"), ASK, ANSWER),
    "a tool call": CALLED,
}
ALTERNATING = ("answers in a row", "an answer first")  # refused by Mistral's template
WITHOUT_TOOLS = ("smollm2", "llama3")


def written(family):
    """The names of the conversations that a family's template can write."""
    left_out = {"mistral": ALTERNATING, "qwen": ()}.get(family, ("a tool call",))
    return [name for name in CONVERSATIONS if name not in left_out]


CASES = [(family, name) for family in TEMPLATES for name in written(family)]


def row_of(name):
    return {"messages": CONVERSATIONS[name], **({"tools": [TOOL]} if name == "a tool call" else {})}


def converted(tokenizer, row):
    return convert_row(row, conversation_format(tokenizer), "x.jsonl, line 3")


def labels_of(tokenizer, row):
    """(ids, labels) of a conversation, as the collator gives them."""
    batch = CausalCollator(tokenizer, 512, 512)([converted(tokenizer, row)])
    return batch["input_ids"][0].tolist(), batch["labels"][0].tolist()


def learnt_text(tokenizer, row):
    """What is learnt, as text."""
    return tokenizer.decode([label for label in labels_of(tokenizer, row)[1] if label != IGNORE_INDEX])


# -------------------------------------------------------------------------------------- against TRL


def trl_labels(tokenizer, rows, folder):
    """[(ids, labels)] that TRL's SFTTrainer makes of conversations with assistant_only_loss."""
    trl = pytest.importorskip("trl", reason="TRL, whose masks are compared with, is not installed")
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings = {"assistant_only_loss": True, "use_cpu": True, "bf16": False, "report_to": "none"}
    trainer = trl.SFTTrainer(
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)),
        trl.SFTConfig(str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


@pytest.fixture(scope="module")
def of_trl(tmp_path_factory):
    """{(family, conversation): (ids, labels)} by TRL, which needs the blocks."""
    found = {}
    for family, template in TEMPLATES.items():
        tokenizer = family_tokenizer(family, template)
        for names in (written(family)[:-1], written(family)[-1:]):  # a table of tools apart: it adds a column
            rows = [row_of(name) for name in names]
            found.update(
                zip([(family, name) for name in names], trl_labels(tokenizer, rows, tmp_path_factory.mktemp("trl")))
            )
    return found


@pytest.mark.parametrize("blocks", [True, False], ids=["by blocks", "by prefixes"])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_labels_are_those_of_trl(family, name, blocks, of_trl):
    template = TEMPLATES[family] if blocks else plain(TEMPLATES[family])
    assert ("generation %}" in template) is blocks
    ids, labels = labels_of(family_tokenizer(family, template), row_of(name))
    expected_ids, expected = of_trl[family, name]
    assert (ids, labels) == (expected_ids[: len(ids)], expected[: len(ids)])
    assert set(expected[len(ids) :]) <= {IGNORE_INDEX} and (len(ids) == len(expected)) is (
        name != "a question at the end"
    )


@pytest.mark.parametrize(("name", "special", "extra"), [("llama3", "llama3", ""), ("qwen2_5", "qwen", "\n")])
def test_templates_that_trl_marks_itself_differ_by_no_more_than_the_line_end_before_an_answer(
    name, special, extra, tmp_path
):
    """TRL's Qwen learns the end of the line `assistant` too, which a prompt for an answer gives."""
    known = pytest.importorskip("trl.chat_template_utils", reason="TRL is not installed")
    tokenizer = family_tokenizer(special, getattr(known, f"{name}_chat_template"))
    rows = [row_of(conversation) for conversation in ("two answers", "system first")]
    for row, (expected_ids, expected) in zip(rows, trl_labels(tokenizer, rows, tmp_path)):
        ids, labels = labels_of(tokenizer, row)
        differing = [at for at, pair in enumerate(zip(labels, expected)) if pair[0] != pair[1]]
        assert ids == expected_ids and all(labels[at] == IGNORE_INDEX for at in differing)
        answers = sum(message["role"] == "assistant" for message in row["messages"])
        assert tokenizer.decode([expected[at] for at in differing]) == extra * answers


# ----------------------------------------------------------------------------------- what is learnt


def test_every_answer_is_learnt_with_the_end_of_its_turn():
    tokenizer = family_tokenizer("qwen", plain(TEMPLATES["qwen"]))
    assert learnt_text(tokenizer, row_of("two answers")) == "It is sunny.<|im_end|>\n20 degrees.<|im_end|>\n"


def test_a_tool_call_is_learnt_as_the_template_writes_it_and_its_result_is_not():
    tokenizer = family_tokenizer("qwen", plain(TEMPLATES["qwen"]))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call><|im_end|>\n'
    assert learnt_text(tokenizer, row_of("a tool call")) == call + "It is sunny.<|im_end|>\n"


def test_a_tool_call_may_have_json_text_null_content_and_the_nulls_of_a_table():
    tokenizer = family_tokenizer("qwen", plain(TEMPLATES["qwen"]))
    call = {**CALL, "id": None, "function": {"name": "weather", "arguments": '{"city": "Paris", "days": 2}'}}
    turns = [*said(ASK), {"role": "assistant", "content": None, "tool_calls": [call], "name": None}, *CALLED[2:]]
    row = {"messages": [{"tool_calls": None, **turn} for turn in turns], "tools": json.dumps([TOOL])}
    assert labels_of(tokenizer, row) == labels_of(tokenizer, row_of("a tool call"))


def test_sharegpt_and_lists_of_texts_are_read_alike():
    tokenizer = family_tokenizer("llama3", plain(TEMPLATES["llama3"]))
    shared = {"conversations": [{"from": "human", "value": ASK[1]}, {"from": "gpt", "value": ANSWER[1]}]}
    expected = labels_of(tokenizer, {"messages": said(ASK, ANSWER)})
    assert labels_of(tokenizer, shared) == labels_of(tokenizer, {"conversations": [ASK[1], ANSWER[1]]}) == expected


def test_offsets_without_their_blanks_give_the_same_labels():
    """Some byte-level tokenizers trim blanks off: of a token of blanks only its end is left."""
    row = row_of("blanks, new lines and bytes")
    for family in TEMPLATES:
        tokenizer = family_tokenizer(family, plain(TEMPLATES[family]))
        expected = labels_of(tokenizer, row)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(False, trim_offsets=True)
        assert tokenizer(" ", return_offsets_mapping=True)["offset_mapping"] == [(1, 1)]
        assert labels_of(tokenizer, row) == expected


def test_train_on_source_learns_the_whole_conversation():
    tokenizer = family_tokenizer("qwen", TEMPLATES["qwen"])
    batch = CausalCollator(tokenizer, 512, 512, train_on_source=True)([converted(tokenizer, row_of("two answers"))])
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_generation_is_given_the_conversation_up_to_its_last_answer():
    tokenizer = family_tokenizer("llama3", TEMPLATES["llama3"])
    batch = CausalCollator(tokenizer, 512, 512, predict_with_generate=True)(
        [converted(tokenizer, row_of("two answers"))]
    )
    given = CONVERSATIONS["two answers"][:-1]
    expected = tokenizer.apply_chat_template(given, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert batch["input_ids"][0].tolist() == expected


def test_a_packed_conversation_keeps_its_labels_but_the_first():
    tokenizer = family_tokenizer("qwen", TEMPLATES["qwen"])
    row = row_of("two answers")
    packed, (ids, labels) = (
        encode_sample(CausalCollator(tokenizer, 512, 512), converted(tokenizer, row)),
        labels_of(tokenizer, row),
    )
    assert packed["input_ids"] == [*ids, tokenizer.eos_token_id]
    assert packed["labels"] == [*labels, IGNORE_INDEX]


def test_the_tokens_that_end_an_answer_are_those_of_tokenizer_and_template():
    for family, ends in {"llama3": ["<|end_of_text|>", "<|eot_id|>"], "mistral": ["</s>"]}.items():
        tokenizer = family_tokenizer(family, plain(TEMPLATES[family]))
        assert tokenizer.convert_ids_to_tokens(end_tokens(tokenizer)) == ends
        tokenizer.chat_template = None
        assert end_tokens(tokenizer) == [tokenizer.eos_token_id]


# ----------------------------------------------------------------------------------------- the base


def test_a_base_without_a_chat_template_gets_the_plain_one():
    tokenizer = family_tokenizer("mistral", None)
    row = converted(
        tokenizer, {"messages": said(("system", "Be short."), ASK, ANSWER, ("user", "Hi"), ("assistant", "Hello."))}
    )
    assert row["input"] + row["output"] == (
        "<s>### System:\nBe short.\n\n### User:\nWhat is the weather?\n\n### Assistant:\nIt is sunny.</s>"
        "\n\n### User:\nHi\n\n### Assistant:\nHello.</s>"
    )
    assert learnt_text(tokenizer, {"messages": said(ASK, ANSWER)}) == "It is sunny.</s>"


def test_the_plain_template_writes_tools_calls_and_their_results():
    tokenizer = family_tokenizer("mistral", None)
    row = converted(tokenizer, row_of("a tool call"))
    text = row["input"] + row["output"]
    call = '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}'
    assert text.startswith(f"<s>### Tools:\n{json.dumps(TOOL)}\n\n### User:\n")
    assert f"\n\n### Assistant:\n{call}</s>\n\n### Tool:\n20 degrees\n\n### Assistant:\n" in text
    assert learnt_text(tokenizer, row_of("a tool call")) == f"{call}</s>It is sunny.</s>"


def test_a_tokenizer_gets_the_plain_template_where_it_has_none_and_stays_as_it_was():
    tokenizer = family_tokenizer("mistral", None)
    ready = with_chat_template(tokenizer)
    assert tokenizer.chat_template is None and ready.chat_template == PLAIN_TEMPLATE
    assert with_chat_template(ready) is ready
    assert labels_of(ready, {"messages": said(ASK, ANSWER)}) == labels_of(tokenizer, {"messages": said(ASK, ANSWER)})


def test_chat_reads_conversations_whole_and_pairs_by_their_answer():
    tokenizer = family_tokenizer("qwen", TEMPLATES["qwen"])
    chat = template_format("chat", tokenizer, conversation_format(tokenizer))
    assert convert_row(row_of("two answers"), chat, "row 1") == converted(tokenizer, row_of("two answers"))
    pair = convert_row({"input": ASK[1], "output": ANSWER[1]}, chat, "row 1")
    assert pair["learn"] is None and pair["output"] == ANSWER[1] and pair["input"].endswith("<|im_start|>assistant\n")


# ---------------------------------------------------------------------------------- what is refused

THINKS = plain(TEMPLATES["qwen"]).replace("turn.content }}", "'' if loop.last else turn.content }}", 1)
MIDDLE = said(ASK, ANSWER, ("system", "Be short."), ASK, ANSWER)
REFUSED = {
    "an unknown role": ("qwen", said(("poet", "Hi"), ANSWER), "turn 1 has the role 'poet': allowed are system, user"),
    "no role": ("qwen", [{"content": "Hi"}], "turn 1 has no role: allowed are system"),
    "no text": ("qwen", [*said(ASK), {"role": "assistant", "content": 4}], "turn 2 holds 4 where text is needed"),
    "no call": ("qwen", [*said(ASK), {**CALLED[1], "tool_calls": ["go"]}], "turn 2: 'go' is no tool call; write"),
    "no answer": ("qwen", said(ASK), "all labels are masked: none of the 1 turns is the assistant's; add an answer"),
    "no turns": ("qwen", "Hi", "needs the column messages (or conversations) with a list of turns"),
    "a system turn in the middle": ("mistral", MIDDLE, "refuses the conversation: the system turn must be the first"),
    "answers in a row": ("mistral", CONVERSATIONS["answers in a row"], "user and assistant must alternate"),
    "a call that is left out": ("llama3", CALLED, "leaves out the tool call 'weather' of turn 2: write it into"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_conversation_that_cannot_be_learnt_is_refused_by_its_row(case):
    family, messages, message = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        converted(family_tokenizer(family, plain(TEMPLATES[family])), {"messages": messages})
    assert str(caught.value).startswith("x.jsonl, line 3: ") and message in str(caught.value)


def test_a_template_that_does_not_tell_what_the_assistant_wrote_is_named_with_the_fix():
    tokenizer = family_tokenizer("qwen", THINKS)
    tokenizer.name_or_path = "acme/thinker"
    with pytest.raises(
        ValueError, match=r"line 3: the chat template of acme/thinker writes turn 2 differently"
    ) as caught:
        converted(tokenizer, row_of("two answers"))
    assert "{% generation %} blocks" in str(caught.value) and "--learn_turns last" in str(caught.value)


def test_a_turn_that_the_template_leaves_out_is_named():
    template = "{% for turn in messages if turn.role != 'system' %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    tokenizer = family_tokenizer("qwen", template + "{% if add_generation_prompt %}assistant: {% endif %}")
    with pytest.raises(ValueError, match="leaves out turn 1, of the role system: write it into"):
        converted(tokenizer, row_of("system first"))


def test_tools_that_the_template_leaves_out_are_named():
    tokenizer = family_tokenizer("llama3", TEMPLATES["llama3"])
    with pytest.raises(ValueError, match="line 3: .* leaves out the tools: "):
        converted(tokenizer, {**row_of("two answers"), "tools": [TOOL]})


def test_an_argument_that_is_null_stays():
    tokenizer = family_tokenizer("qwen", TEMPLATES["qwen"])
    call = {"function": {"name": "weather", "arguments": {"city": None}}}
    row = {"messages": [*said(ASK), {"role": "assistant", "tool_calls": [call]}]}
    assert '{"city": null}' in learnt_text(tokenizer, row)


def test_blocks_that_mark_no_turn_are_refused():
    template = TEMPLATES["qwen"].replace("turn.role == 'assistant'", "turn.role == 'nobody'")
    with pytest.raises(ValueError, match="line 3: all labels are masked: the chat template marks no turn"):
        converted(family_tokenizer("qwen", template), row_of("two answers"))


def test_a_conversation_whose_answers_are_all_cut_off_is_left_out_and_counted():
    tokenizer = family_tokenizer("qwen", TEMPLATES["qwen"])
    late = {"messages": [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "yes"}]}
    rows = [converted(tokenizer, row) for row in (row_of("two answers"), late)]
    labels = labels_of(tokenizer, row_of("two answers"))[1]
    first = next(at for at, label in enumerate(labels) if label != IGNORE_INDEX)
    cuts = Cuts(CausalCollator(tokenizer, 1024, 1024), sequence_tokens=first + 1)
    kept, _, notices = usable_rows(Dataset.from_list(rows), cuts, "training")
    assert kept["input"] == [rows[0]["input"]]
    assert any(line.startswith("Left out: 1 of 2 training examples") and "--seq_length" in line for line in notices)
    with pytest.raises(ValueError, match="no token of the 2 training examples is learnt: .* raise --seq_length"):
        usable_rows(Dataset.from_list(rows), replace(cuts, sequence_tokens=first), "training")


def test_what_is_cut_is_counted_with_the_flag_that_keeps_it():
    tokenizer = family_tokenizer("qwen", TEMPLATES["qwen"])
    rows = [converted(tokenizer, row_of(name)) for name in ("two answers", "system first")]
    short, long = sorted(len(labels_of(tokenizer, row_of(name))[0]) for name in ("two answers", "system first"))
    collator = CausalCollator(tokenizer, 1024, 1024)

    def notices(limit):
        return usable_rows(Dataset.from_list(rows), Cuts(collator, conversations=limit), "training")[2]

    (notice,) = notices(Limit(short, "--target_max_len"))
    assert "1 of 2 are longer" in notice and f"has {long} tokens; raise --target_max_len" in notice
    assert notices(Limit(long, "--target_max_len")) == notices(None) == []


def test_answers_that_are_all_empty_are_named_by_their_line(tmp_path):
    tokenizer = family_tokenizer("qwen", TEMPLATES["qwen"])
    file = tmp_path / "talk.jsonl"
    rows = [{"messages": said(ASK, ANSWER)}, {"messages": said(ASK, ("assistant", " "))}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="1 row.s. have an empty output, first at line 2"):
        load_splits(DataSpec(str(file), conversations=conversation_format(tokenizer)))


def test_a_tokenizer_that_tells_no_characters_is_refused():
    class Slow:
        is_fast, chat_template = False, None

    with pytest.raises(ValueError, match="the tokenizer Slow does not tell .* or --learn_turns last"):
        converted(Slow(), row_of("two answers"))


def test_conversations_and_pairs_are_mixed(tmp_path):
    tokenizer = family_tokenizer("qwen", TEMPLATES["qwen"])
    talk, pairs = tmp_path / "talk.jsonl", tmp_path / "pairs.jsonl"
    talk.write_text(json.dumps(row_of("two answers")) + "\n")
    pairs.write_text(json.dumps({"input": "Hi", "output": "Hello"}) + "\n")
    splits = load_splits(DataSpec([str(pairs), str(talk)], conversations=conversation_format(tokenizer)))
    assert [bool(row["learn"]) for row in splits.train] == [False, True] and splits.chats
    assert not load_splits(DataSpec(str(pairs), conversations=conversation_format(tokenizer))).chats
    assert CausalCollator(tokenizer, 64, 64)(list(splits.train))["labels"].shape[0] == 2

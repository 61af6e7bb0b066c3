"""Runs on conversations: trained, packed, streamed, shadowed, cut, refused, and talked to
afterwards."""

import io
import json
import shutil

import pytest
import torch
from chat_families import TEMPLATES
from es_lora_llm import main
from generate_text import main as generate
from multi_lora import train_jobs
from safetensors.torch import load_file
from transformers import AutoTokenizer

from jobs.config import Job
from jobs.data import prepare_job
from text.collator import IGNORE_INDEX, CausalCollator
from text.conversations import PLAIN_TEMPLATE, conversation_format
from text.sources import load_splits
from text.spec import DataSpec


def run(base, data, output, *more):
    """The exit code of a run of 4 steps of 4 rows."""
    return main(
        [
            *("--model_name_or_path", str(base), "--dataset", str(data), "--output_dir", str(output)),
            *("--bits", "32", "--lora_r", "4", "--learning_rate", "5e-3", "--per_device_train_batch_size", "4"),
            *("--gradient_accumulation_steps", "1", "--gradient_checkpointing", "False", "--max_steps", "4"),
            *("--save_strategy", "no", "--use_cpu", *more),
        ]
    )


def adapter_of(output):
    return load_file(str(output / "adapter" / "adapter_model.safetensors"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(random_base, conversation_files, tmp_path_factory):
    """A run with held-out conversations and predictions."""
    output = tmp_path_factory.mktemp("runs") / "talk"
    held_out = ["--do_eval", "--eval_dataset", str(conversation_files["heldout"]), "--do_predict"]
    words = ["--predict_with_generate", "--max_new_tokens", "4"]
    assert run(random_base, conversation_files["train"], output, *held_out, *words) == 0
    return output


def test_a_run_on_conversations_scores_every_answer_of_what_is_held_out(trained, random_base, conversation_files):
    from peft import AutoPeftModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(random_base)
    spec = DataSpec(str(conversation_files["heldout"]), conversations=conversation_format(tokenizer))
    batch = CausalCollator(tokenizer, 1024, 256)(list(load_splits(spec).train))
    assert all((row == tokenizer.eos_token_id).sum() == 2 for row in batch["labels"])
    model = AutoPeftModelForCausalLM.from_pretrained(trained / "adapter", dtype=torch.float32)
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert json.loads((trained / "result.json").read_text())["heldout"]["last"] == pytest.approx(loss, rel=1e-3)


def test_predictions_answer_the_last_turn_and_show_it_without_its_end(trained, conversation_files):
    rows = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
    talks = [json.loads(line)["messages"] for line in conversation_files["heldout"].read_text().splitlines()]
    assert [row["output"] for row in rows] == [talk[-1]["content"].strip() for talk in talks]
    assert all(row["input"].endswith("### Assistant:\n") for row in rows)


def test_an_adapter_on_a_base_without_a_template_is_talked_to_in_the_plain_one(trained, monkeypatch, capsys):
    assert AutoTokenizer.from_pretrained(trained / "adapter").chat_template == PLAIN_TEMPLATE
    monkeypatch.setattr("sys.stdin", io.StringIO("how long do beans soak?\nand rice?\n"))
    assert generate(["--adapter", str(trained), "--chat", "--max_new_tokens", "4"]) == 0
    assert "no chat template" not in capsys.readouterr().out


def test_a_prompt_to_an_adapter_of_conversations_is_a_message(random_base, conversation_files, tmp_path):
    assert run(random_base, conversation_files["train"], tmp_path / "run") == 0
    ask = ["--adapter", str(tmp_path / "run"), "--max_new_tokens", "4"]
    message = ["--prompt", "how long do beans soak?"]
    written = ["--prompt", "### User:\nhow long do beans soak?\n\n### Assistant:\n", "--prompt_as", "plain"]
    for name, prompt in (("message", message), ("written", written)):
        assert generate([*ask, *prompt, "--output", str(tmp_path / f"{name}.jsonl")]) == 0
    answers = [json.loads((tmp_path / f"{name}.jsonl").read_text())["answer"] for name in ("message", "written")]
    assert answers[0] == answers[1]


def test_the_last_answer_alone_trains_as_a_pair_of_input_and_output(random_base, conversation_files, tmp_path):
    talks = [json.loads(line)["messages"] for line in conversation_files["train"].read_text().splitlines()]
    texts = [[turn["content"].strip() for turn in talk] for talk in talks]
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"input": "\n\n".join(given) + "\n\n", "output": answer} for *given, answer in texts]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(random_base, conversation_files["train"], tmp_path / "last", "--learn_turns", "last") == 0
    assert run(random_base, pairs, tmp_path / "pairs") == 0
    assert run(random_base, conversation_files["train"], tmp_path / "all") == 0
    last, as_pairs, whole = (adapter_of(tmp_path / name) for name in ("last", "pairs", "all"))
    assert same(last, as_pairs) and not same(last, whole)
    assert AutoTokenizer.from_pretrained(tmp_path / "last" / "adapter").chat_template is None


WAYS = {
    "packed": "--packing --seq_length 128 --group_by_length False",
    "wrapped": "--packing wrapped --seq_length 64 --group_by_length False",
    "shadows": "--shadows 2 --early_stop --do_eval --eval_dataset_size 2",
    "streamed": "--streaming --group_by_length False --calculate_cs False",
    "streamed and packed": "--streaming --packing --seq_length 128 --group_by_length False --calculate_cs False",
}


@pytest.mark.parametrize("way", WAYS)
def test_conversations_are_trained_in_every_way(way, random_base, conversation_files, tmp_path):
    assert run(random_base, conversation_files["train"], tmp_path / "run", *WAYS[way].split()) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").chat_template == PLAIN_TEMPLATE


def test_what_is_cut_is_said_before_the_first_step(random_base, conversation_files, tmp_path, capsys):
    short = ("--source_max_len", "30", "--target_max_len", "10")
    assert run(random_base, conversation_files["train"], tmp_path / "run", *short) == 0
    out = capsys.readouterr().out
    assert "8 of 8 are longer than 40 tokens" in out and "raise --source_max_len or --target_max_len" in out


def test_a_row_without_an_answer_ends_the_run_by_its_line_before_the_base_is_loaded(
    random_base, conversation_files, tmp_path, capsys
):
    base = shutil.copytree(random_base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    data = tmp_path / "talk.jsonl"
    data.write_text(conversation_files["train"].read_text() + '{"messages": [{"role": "user", "content": "hi"}]}\n')
    assert run(base, data, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert f"{data}, line 9: all labels are masked: none of the 1 turns is the assistant's" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        ("--source_max_len 4 --target_max_len 4", "--source_max_len or --target_max_len"),
        ("--packing --seq_length 8 --group_by_length False", "--seq_length"),
    ],
)
def test_conversations_of_which_every_answer_is_cut_off_end_the_run_before_the_first_step(
    random_base, conversation_files, tmp_path, capsys, flags, fix
):
    assert run(random_base, conversation_files["train"], tmp_path / "run", *flags.split()) == 2
    said = capsys.readouterr().err
    assert "no token of the 8 training examples is learnt" in said and f"raise {fix}" in said


def test_a_streamed_row_that_cannot_be_learnt_ends_the_run_by_its_line(
    random_base, conversation_files, tmp_path, capsys
):
    data = tmp_path / "talk.jsonl"
    data.write_text(conversation_files["train"].read_text() + '{"messages": [{"role": "poet", "content": "hi"}]}\n')
    assert run(random_base, data, tmp_path / "run", *WAYS["streamed"].split()) == 2
    assert f"{data}, line 9: turn 1 has the role 'poet'" in capsys.readouterr().err


def test_an_unknown_way_to_learn_turns_is_refused(random_base, conversation_files, tmp_path, capsys):
    assert run(random_base, conversation_files["train"], tmp_path / "run", "--learn_turns", "first") == 2
    assert "--learn_turns first: choose all or last" in capsys.readouterr().err


# ---------------------------------------------------------------------------- many adapters at once


def job(name, file, **values):
    own = {"rank": 4, "batch_size": 4, "accumulation": 1, "max_steps": 2, "learning_rate": 5e-3}
    return Job(name, dataset=str(file), **{**own, **values})


def test_a_job_learns_what_the_single_trainer_learns(random_base, conversation_files):
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.chat_template = TEMPLATES["smollm2"]
    whole, last = (
        prepare_job(job("talk", conversation_files["train"], learn_turns=turns), tokenizer) for turns in ("all", "last")
    )
    spec = DataSpec(str(conversation_files["train"]), conversations=conversation_format(tokenizer))
    rows = list(load_splits(spec).train)
    assert [(example.ids, example.labels) for example in whole.train] == [
        CausalCollator(tokenizer, 1024, 256).labelled(row) for row in rows
    ]
    assert all(
        sum(label != IGNORE_INDEX for label in example.labels) < own.targets
        for example, own in zip(last.train, whole.train)
    )


def test_jobs_on_conversations_and_pairs_save_their_own_tokenizer(
    random_base, conversation_files, text_files, tmp_path
):
    said = []
    jobs = [
        job("talk", conversation_files["train"], source_max_len=30, target_max_len=10),
        job("notes", text_files["train"]),
        job("bad", conversation_files["train"], source_max_len=4, target_max_len=4),
    ]
    results = train_jobs(jobs, str(random_base), tmp_path / "run", bits=32, say=said.append)
    saved = {name: AutoTokenizer.from_pretrained(tmp_path / "run" / name / "adapter") for name in ("talk", "notes")}
    assert saved["talk"].chat_template == PLAIN_TEMPLATE and saved["notes"].chat_template is None
    assert any(
        "8 of 8 are longer than 40 tokens" in line and "source_max_len or target_max_len" in line for line in said
    )
    (refused,) = [result for result in results["jobs"] if result["outcome"] == "refused"]
    assert refused["name"] == "bad" and "no token of the 8 training examples is learnt" in refused["reason"]


def test_a_job_with_an_unknown_way_to_learn_turns_is_refused():
    assert "learn_turns = 'first': choose one of all, last" in job("a", "b.jsonl", learn_turns="first").problems()

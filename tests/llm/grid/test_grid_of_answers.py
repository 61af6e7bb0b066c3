"""judge_checkpoints.py --grid on answers: what the page shows is what each adapter says alone, and
the figures are those of its answers."""

import contextlib
import io
import json
import math

import pytest
from judge_checkpoints import main
from short_runs import flags

TOKENS = 8


@pytest.fixture(scope="module")
def run(random_base, text_files, tmp_path_factory):
    """A run of 24 steps with a checkpoint every 8, beside its kept adapter."""
    from es_lora_llm import main as train

    out = tmp_path_factory.mktemp("run") / "run"
    more = ("--save_strategy", "steps", "--save_steps", "8", "--learning_rate", "5e-2", "--calculate_cs", "False")
    assert train([*flags(random_base, text_files, out), *more]) == 0
    return out


@pytest.fixture(scope="module")
def prompts(text_files, tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    rows = [json.loads(line) for line in text_files["train"].read_text().splitlines()]
    file.write_text("".join(row["input"] + "\n" for row in rows[:2]))
    return file


def judged(run, base, *words):
    """The verdict as --json prints it."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([str(run), "--base", str(base), "--json", "--max_new_tokens", str(TOKENS), *map(str, words)]) == 0
    return json.loads(said.getvalue())


@pytest.fixture(scope="module")
def drawn(run, random_base, prompts, tmp_path_factory):
    """(page, facts) of a greedy grid at two strengths."""
    page = tmp_path_factory.mktemp("page") / "grid.html"
    verdict = judged(run, random_base, "--grid", prompts, "--grid_page", page, "--strength", "0.5,1")
    return page.read_text(), verdict["grid"]


def answers_alone(adapter, base, prompt, tmp_path):
    import generate_text

    out = tmp_path / "answers.jsonl"
    words = ["--adapter", str(adapter), "--base", str(base), "--prompt", prompt, "--max_new_tokens", str(TOKENS)]
    with contextlib.redirect_stdout(io.StringIO()):
        assert generate_text.main([*words, "--output", str(out)]) == 0
    return json.loads(out.read_text())["answer"]


def test_the_page_has_every_checkpoint_and_strength_and_the_base(drawn):
    page, facts = drawn
    names = [f"checkpoint-{step} x {strength}" for step in (8, 16, 24) for strength in ("0.5", "1")]
    assert [row["name"] for row in facts["rows"]] == ["training data, each row to the others", "no LoRA", *names]
    assert page.count('class="answer"') == 2 * 7 and "general_text.jsonl" in page


def test_an_answer_of_the_page_is_what_its_adapter_says_alone(drawn, run, random_base, prompts, tmp_path):
    import html
    import re

    shown = re.findall(r'<div class="answer">(.*?)</div>', drawn[0], re.DOTALL)
    shown = [html.unescape(re.sub("</?mark>", "", text)) for text in shown]
    prompt = prompts.read_text().splitlines()[0]
    for row, step in ((2, 8), (4, 16), (6, 24)):
        alone = answers_alone(run / f"checkpoint-{step}", random_base, prompt, tmp_path)
        assert shown[row] == (alone or "(empty)")
    assert len(set(shown[:7])) > 2


def test_perplexity_is_that_of_the_weights_on_the_file(drawn, run, random_base):
    from adapters.fitting import put_adapters_on
    from adapters.folders import load_frozen_base, load_tokenizer_of, open_adapter
    from grid.drawing import GENERAL_TEXT, MOST_PASSAGES
    from training.forgetting import GeneralText

    folder = open_adapter(str(run / "checkpoint-16"))
    base, _ = load_frozen_base(str(random_base), None, [folder])
    tokenizer = load_tokenizer_of(str(random_base), [folder])
    text, model = (
        GeneralText(str(GENERAL_TEXT), tokenizer, MOST_PASSAGES, 4),
        put_adapters_on(base, tokenizer, [folder]),
    )
    rows = {row["name"]: row["perplexity"] for row in drawn[1]["rows"] if "perplexity" in row}
    assert rows["checkpoint-16 x 1"] == pytest.approx(math.exp(text.loss(model)), rel=1e-4)
    with model.disable_adapter():
        assert rows["no LoRA"] == pytest.approx(math.exp(text.loss(model)), rel=1e-4)
    assert len({round(value, 3) for value in rows.values()}) == 7


def test_with_seeds_answers_are_sampled_and_equal_seeds_give_equal_answers(run, random_base, prompts, tmp_path):
    words = ("--grid", prompts, "--seeds", "1,2", "--temperature", "2", "--grid_checkpoints", "1")
    pages = []
    for name in ("one.html", "two.html"):
        facts = judged(run, random_base, *words, "--grid_page", tmp_path / name)["grid"]
        pages.append((tmp_path / name).read_text().split('class="answer">')[1:])
    cells = [[cell.split("<small>")[0] for cell in page] for page in pages]
    assert cells[0] == cells[1] and cells[0][0] != cells[0][1] and len(facts["rows"]) == 3


def test_copied_runs_are_counted_and_marked(tmp_path):
    from grid.copies import TrainingText

    file = tmp_path / "train.jsonl"
    rows = [
        {"input": "q", "output": "One two three, four five six seven eight nine."},
        {"messages": [{"role": "assistant", "content": "a b c d e f g h"}]},
        {"input": "x", "output": "zero one two three four five six seven eight"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = TrainingText(file)
    assert data.shares(["ONE two three four five six; seven eight ten"]) == 0.5
    assert data.shares(["A, b c d e f g h"]) == 1 and data.shares(["too short"]) is None
    assert data.shares(["seven six five four three two one zero nine"]) == 0
    # Of the 5 runs of the rows, "one ... eight" stands in two.
    assert data.among_itself() == pytest.approx(2 / 5)
    pieces = data.marked("So: one two three four five six seven eight, ten")
    assert pieces == [("So: ", False), ("one two three four five six seven eight", True), (", ten", False)]


def test_what_is_wrong_is_said_before_anything_is_loaded(run, random_base, prompts, tmp_path, capsys, monkeypatch):
    import judge_checkpoints

    monkeypatch.setattr(judge_checkpoints, "measure_run", lambda *_: pytest.fail("it measured"))
    for words, said in (
        (["--grid", tmp_path / "none.txt"], "none.txt: there is no such file"),
        (["--grid", prompts, "--training_data", tmp_path / "gone.jsonl"], "gone.jsonl: there is no such file"),
        (["--grid", prompts, "--unrelated", tmp_path / "gone.txt"], "--unrelated"),
    ):
        assert main([str(run), "--base", str(random_base), *map(str, words)]) == 2
        assert said in capsys.readouterr().err
    assert not (run / "grid.html").exists()

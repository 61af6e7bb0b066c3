"""The grid's page: which checkpoints are drawn, what is refused before anything is loaded, and that
no text of a person gets into it as HTML."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from judge_checkpoints import parse_arguments

from es_lora.judge.grid_page import (
    Figure,
    Grid,
    Row,
    answer_cell,
    chosen_checkpoints,
    grid_facts,
    grid_html,
    page_of,
    picture_cell,
    trained_on,
)
from es_lora.judge.run_folder import Checkpoint

TREE = Path(__file__).resolve().parents[2] / "lora-llm"
VERDICT = {
    "checkpoints": [
        {"name": "a", "step": 5, "epoch": 0.5, "cs_row": 0.25},
        {"name": "b", "step": 10, "epoch": 1, "cs_row": 0.5},
    ],
    "reduction": "row",
    "keep": "b",
    "usable": ["a", "b"],
    "reason": "Because.",
    "certainty": "exact",
}


def checkpoints(count):
    return [Checkpoint(f"c{number}", Path(f"c{number}"), number) for number in range(count)]


@pytest.mark.parametrize("most", [1, 2, 3, 12, 40])
@pytest.mark.parametrize("keep", ["c0", "c17", "c29", None])
def test_no_more_checkpoints_are_drawn_than_asked_for_and_the_kept_one_is_among_them(most, keep):
    drawn = [checkpoint.name for checkpoint in chosen_checkpoints(checkpoints(30), keep, most)]
    assert len(drawn) == min(most, 30) and (keep is None or keep in drawn)
    assert drawn == sorted(drawn, key=lambda name: int(name[1:]))
    assert most < 3 or {"c0", "c29"} <= {*drawn, keep}


def test_what_people_write_is_text_on_the_page_and_the_kept_row_is_marked():
    row = Row("<b>", {"copied": 0.5}, [[answer_cell([("<script>", False), ("a & b", True)], "<i>")]], "b", 1.0)
    plain = Row("no LoRA", {"copied": None}, [[picture_cell(b"x", "png", '"><img>')]])
    grid = Grid(["<prompt>"], ["seed 1"], [Figure("copied", "<says>")], [plain, row], ["<note>"])
    page = grid_html(grid, VERDICT)
    for tag in ("<script>", "<prompt>", "<says>", "<note>", "<b><", "<img>", "<i>"):
        assert tag not in page
    assert "<mark>a &amp; b</mark>" in page and page.count('class="kept"') == 1
    assert "Keep b. Because." in page and "+0.500000" in page and "0.500" in page
    assert grid_facts(grid, Path("p"))["rows"][1] == {"name": "<b>", "checkpoint": "b", "strength": 1.0, "copied": 0.5}


def test_a_page_that_is_there_is_not_written_over(tmp_path):
    assert page_of(tmp_path, None) == tmp_path / "grid.html"
    (tmp_path / "grid.html").write_text("mine")
    with pytest.raises(ValueError, match="grid.html is there already.*--grid_page"):
        page_of(tmp_path, None)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"settings": 3}', '{"settings": {"dataset": 3}}', '{"settings": {"dataset": "gone"}}']
)
def test_training_data_that_a_result_does_not_name_are_not_known(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    assert trained_on(tmp_path, "dataset") is None and trained_on(tmp_path / "none", "dataset") is None


@pytest.mark.parametrize(
    "words, said",
    [
        (["--seeds", "1,x"], "x is no whole number"),
        (["--seeds", ",".join(map(str, range(17)))], "17 values: 16 are the most"),
        (["--strength", "0"], "0 is no number above 0"),
        (["--strength", "1,nan"], "nan is no number"),
        (["--grid_checkpoints", "0"], "0 is no whole number from 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["folder", "--base", "base", *words])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_seeds_and_strengths_are_taken_once_in_their_order():
    arguments = parse_arguments(["folder", "--base", "base", "--seeds", "3,1,3", "--strength", "0.6,1"])
    assert arguments.seeds == [3, 1] and arguments.strength == [0.6, 1.0]


def test_the_judge_without_its_tree_works_and_says_that_it_draws_nothing(tmp_path):
    for name in ("judge_checkpoints.py", "cs_fluctuation.py"):
        shutil.copy(TREE / name, tmp_path / name)
    shutil.copytree(TREE / "es_lora", tmp_path / "es_lora")
    (tmp_path / "run").mkdir()
    shutil.copy(TREE / "tiny_base" / "config.json", tmp_path / "run" / "x-000001.safetensors")
    words = [
        sys.executable,
        str(tmp_path / "judge_checkpoints.py"),
        str(tmp_path / "run"),
        "--base",
        "b",
        "--grid",
        "p",
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "--grid needs the packages of a whole tree" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1

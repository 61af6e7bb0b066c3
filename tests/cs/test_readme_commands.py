"""The READMEs name what exists, and every command in them is run or has a reason not to be."""

import re

import pytest
import readme_commands
from readme_commands import (
    NOT_RUN,
    READMES,
    Command,
    commands,
    main,
    missing_paths,
    reason_not_run,
    strange_blocks,
    unknown_flags,
    unknown_placeholders,
)

COMMANDS = [command for readme in READMES for command in commands(readme)]
NAMES = [f"{command.readme}:{command.line}" for command in COMMANDS]


@pytest.mark.parametrize("readme", READMES)
def test_every_block_is_commands_or_of_another_known_kind(readme):
    assert commands(readme) and strange_blocks(readme) == []


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_a_command_is_run_or_says_why_not_and_names_what_exists(command):
    assert reason_not_run(command) or unknown_placeholders(command) == []
    assert missing_paths(command) == [] and unknown_flags(command) == []


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_every_exception_is_needed(pattern):
    assert any(re.search(pattern, command.text) for command in COMMANDS)


def test_a_wrong_path_flag_test_and_placeholder_would_be_found():
    wrong = "python lora-llm/es_lora_llm.py --early_stopp --eval_strategy --save_steps lora-llm/none.py SOMETHING"
    command = Command("README.md", 1, wrong)
    assert unknown_flags(command) == ["--early_stopp"]
    assert missing_paths(command) == ["lora-llm/none.py"] and unknown_placeholders(command) == ["SOMETHING"]
    assert missing_paths(Command("", 1, "python -m pytest tests/cs/test_readme_commands.py::test_none"))
    assert unknown_flags(Command("", 1, "streamlit run lora-ldm/demo_app.py --any -- --root x --rot y")) == ["--rot"]


def test_a_page_is_read_with_fences_lines_carried_on_and_comments(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("A\n\n    bash a.sh \\\n        --x 1   # why\n\n    other\n\n```\nbash b.sh\n```\n\n    strange\n")
    found = commands(str(page))
    assert [(command.line, command.words) for command in found] == [
        (3, ["bash", "a.sh", "--x", "1"]),
        (9, ["bash", "b.sh"]),
    ]
    assert strange_blocks(str(page)) == ["strange"]


def test_the_table_has_every_command_and_a_failure_is_the_exit_code(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("    bash -c true\n    bash -c 'echo because; exit 3'\n    pip install x\n")
    assert main([str(page)]) == 1
    said = capsys.readouterr()
    assert (
        "`bash -c true` | 0 |" in said.out and "exit 3'` | 3 |" in said.out and "not run: needs a package" in said.out
    )
    assert "because" in said.err


def test_an_earlier_run_is_not_written_into(tmp_path, monkeypatch, capsys):
    (tmp_path / "output" / "law").mkdir(parents=True)
    (tmp_path / "page.md").write_text("    bash -c true --output_dir output/law\n")
    monkeypatch.setattr(readme_commands, "ROOT", tmp_path)
    assert main(["page.md"]) == 2 and "output/law" in capsys.readouterr().err

"""Jobs files and tables that are nested without end: one message that names the file."""

import pytest

from jobs.config import read_jobs
from text.tables import read_table

DEEP = 10_000
TEXTS = {
    "lists.toml": "a = " + "[" * DEEP + "]" * DEEP,
    "tables.toml": ".".join("a" * DEEP) + " = 1",
    "inline.toml": "a = " + "{a = " * DEEP + "1" + "}" * DEEP,
    "lists.json": "[" * DEEP + "]" * DEEP,
    "lists.yaml": "jobs: " + "[" * DEEP + "]" * DEEP,
    "blocks.yaml": "\n".join(" " * number + "a:" for number in range(300)),
    "itself.yaml": "jobs: &a [*a]",
    "doubled.yaml": "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
    "keys.yaml": "? [1, 2]\n: 3",
    "date.yaml": "a: 2024-99-99",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_jobs_file_is_refused_by_its_name(tmp_path, name):
    (tmp_path / name).write_text(TEXTS[name], encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name}") as refused:
        read_jobs(tmp_path / name)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    "text", ["[" * DEEP, '{"input": ' + "[" * DEEP, '[{"input": ' + '{"a": ' * DEEP + "1" + "}" * DEEP]
)
def test_a_table_is_refused_by_its_name_and_line(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name}: broken JSON at line 1: lists or tables lie in one another"):
        read_table(tmp_path / name)

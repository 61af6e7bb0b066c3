"""start.py of both trees: the settings of the shell scripts, the environment, the start; what is
Windows' own is tried with its paths and stand-ins, as there is no Windows here."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest
import starting
from starting import expanded, python_of, read_settings, ready_environment, start

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("llm", "ldm")


def starter(kind):
    spec = importlib.util.spec_from_file_location(f"start_{kind}", ROOT / f"lora-{kind}" / "start.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script_with(folder, kind, **settings):
    """A copy of a tree's shell script with these settings in place of its own."""
    text = (ROOT / f"early_stop_lora_{kind}.sh").read_text()
    for name, value in settings.items():
        text, replaced = re.subn(rf"^{name}=\S*", lambda _: f"{name}={value}", text, flags=re.MULTILINE)  # noqa: B023
        assert replaced == 1, name
    file = folder / f"early_stop_lora_{kind}.sh"
    file.write_text(text)
    return file


def project(folder, kind):
    """A folder like this project, in which the environment's Python shows the words it gets."""
    python = folder / f".venv-{kind}" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    (folder / f"lora-{kind}").mkdir()
    for name in ("start.py", "starting.py"):
        shutil.copy(ROOT / f"lora-{kind}" / name, folder / f"lora-{kind}")
    shutil.copy(ROOT / f"requirements-{kind}.txt", folder)
    shutil.copy(ROOT / f"requirements-{kind}.txt", folder / f".venv-{kind}" / ".installed")
    return folder


def output_of(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, re.sub(r"\d{8}-\d{6}", "NOW", done.stdout + done.stderr)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shell_script_and_the_starter_are_the_same_run(tmp_path, kind):
    root = project(tmp_path / "a folder with blanks", kind)
    script_with(root, kind)
    by_shell = output_of(["bash", str(root / f"early_stop_lora_{kind}.sh"), "--seed", "2"], tmp_path)
    by_python = output_of([sys.executable, str(root / f"lora-{kind}" / "start.py"), "--seed", "2"], tmp_path)
    assert by_shell == by_python and by_shell[0] == 0
    words = by_shell[1].splitlines()
    assert words[0] == str(root / f"lora-{kind}" / f"es_lora_{kind}.py") and words[-2:] == ["--seed", "2"]
    assert str(root / "output" / f"{kind}-NOW") in words


@pytest.mark.parametrize("kind", KINDS)
def test_help_takes_less_than_a_second_and_names_the_settings(kind):
    began = time.perf_counter()
    code, text = output_of([sys.executable, str(ROOT / f"lora-{kind}" / "start.py"), "--help"], ROOT)
    assert time.perf_counter() - began < 1
    assert code == 0 and f"early_stop_lora_{kind}.sh" in text and f"es_lora_{kind}.py" in text


@pytest.mark.parametrize("kind", KINDS)
def test_the_starters_need_no_package_and_no_new_python(kind):
    source = (ROOT / f"lora-{kind}" / "start.py").read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    names = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert names <= {"starting", *sys.stdlib_module_names}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_as_windows_editors_save_it_is_read(tmp_path, kind):
    names = starter(kind).NAMES
    file = script_with(tmp_path, kind, output=r"D:\runs\one  # mine")
    plain = read_settings(file, names)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_settings(file, names) == plain and plain["output"] == r"D:\runs\one"


def test_paths_are_windows_own_there():
    root = PureWindowsPath(r"C:\My Files\es")
    assert expanded('"$here/dataset/a.jsonl"', root, "") == r"C:\My Files\es\dataset\a.jsonl"
    assert python_of(root / ".venv-llm", windows=True) == PureWindowsPath(
        r"C:\My Files\es\.venv-llm\Scripts\python.exe"
    )
    for kind in KINDS:
        module = starter(kind)
        settings = {name: "1" for name in module.NAMES}
        settings.update(base_model="tiny", model_type="sd", train_parts="unet", resume=r"D:\runs\one\a-state")
        words = module.words(settings, root)
        assert words[0] == rf"C:\My Files\es\lora-{kind}\es_lora_{kind}.py"
        assert words[words.index("--output_dir") + 1] == {"llm": "1", "ldm": r"D:\runs\one"}[kind]


@pytest.mark.parametrize(
    "text, value",
    [
        ("16", "16"),
        ('""', ""),
        ('"two words # and a sign"', "two words # and a sign"),
        ("'$here as it stands'", "$here as it stands"),
        ("${ES_LORA_UNKNOWN:-smollm2}", "smollm2"),
        ("${ES_LORA_TEST:-smollm2}", "tiny"),
        ("64,64", "64,64"),
    ],
)
def test_values_are_read_as_the_shell_reads_them(monkeypatch, text, value):
    monkeypatch.setenv("ES_LORA_TEST", "tiny")
    assert expanded(text, Path("/here"), "") == value


@pytest.mark.parametrize(
    "line, message",
    [
        ("rank=$((8 * 2))", r"line \d+: rank=\$\(\(8 \* 2\)\) is not of the form name=value"),
        ("rank=$OTHER", r"line \d+: \$OTHER needs a shell"),
        ("if true; then rank=8; fi", r"line \d+: if true; then .* is not of the form name=value"),
        ("rnak=8", r"line \d+: there is no setting rnak"),
        ("train_data=my pictures", r"line \d+: pictures is not of the form name=value; quote a value"),
        ("# rank", "the settings lack rank: write for instance rank=VALUE"),
    ],
)
def test_what_needs_a_shell_is_refused_by_its_line(tmp_path, capsys, line, message):
    project(tmp_path, "ldm")
    file = script_with(tmp_path, "ldm")
    file.write_text(re.sub(r"^rank=16.*$", lambda _: line, file.read_text(), flags=re.MULTILINE))
    assert starting.run(starter("ldm").TREE, tmp_path, []) == 2
    assert re.fullmatch(rf"early_stop_lora_ldm\.sh: {message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("changes", [{"gpus": "two"}, {"train_parts": "vae"}, {"model_type": "flux"}])
def test_a_setting_that_is_no_choice_is_refused(tmp_path, capsys, changes):
    project(tmp_path, "ldm")
    script_with(tmp_path, "ldm", **changes)
    assert starting.run(starter("ldm").TREE, tmp_path, []) == 2
    ((name, value),) = changes.items()
    assert f"{name}={value}: " in capsys.readouterr().err


class Machine:
    """Stands in for subprocess.run: notes the commands, and makes what they would make."""

    def __init__(self, root, fails=""):
        self.root, self.fails, self.commands = root, fails, []

    def __call__(self, words, check):
        self.commands.append(words[1:3])
        if self.fails and self.fails in words:
            raise subprocess.CalledProcessError(3, words)
        python = python_of(self.root / ".venv-llm")
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()


def test_the_environment_is_made_once_and_renewed_when_its_list_changes(tmp_path, monkeypatch, capsys):
    (tmp_path / "requirements-llm.txt").write_text("torch==1\n")
    machine = Machine(tmp_path)
    monkeypatch.setattr(starting.subprocess, "run", machine)
    for _ in range(2):
        assert ready_environment(tmp_path, "llm") == python_of(tmp_path / ".venv-llm")
    assert machine.commands == [["-m", "venv"], ["-m", "pip"]]
    (tmp_path / "requirements-llm.txt").write_text("torch==2\n")
    ready_environment(tmp_path, "llm")
    assert len(machine.commands) == 4 and capsys.readouterr().out.count("Installing the environment") == 2


def test_an_environment_that_failed_is_not_taken_for_a_whole_one(tmp_path, monkeypatch, capsys):
    project(tmp_path, "llm")
    script_with(tmp_path, "llm")
    shutil.rmtree(tmp_path / ".venv-llm")
    monkeypatch.setattr(starting.subprocess, "run", Machine(tmp_path, fails="pip"))
    assert starting.run(starter("llm").TREE, tmp_path, []) == 3
    assert "the environment is not whole" in capsys.readouterr().err
    assert not (tmp_path / ".venv-llm" / ".installed").exists()


def test_too_old_a_python_is_told_what_is_needed(tmp_path, monkeypatch):
    (tmp_path / "requirements-llm.txt").write_text("torch==1\n")
    monkeypatch.setattr(starting.sys, "version_info", (3, 8, 10))
    with pytest.raises(ValueError, match="Python 3.11 or newer is needed; name one: PYTHON=python3.11 bash"):
        ready_environment(tmp_path, "llm")


def test_where_nothing_can_be_replaced_the_end_is_waited_for_and_ctrl_c_left_to_the_trainer(monkeypatch):
    assert start([sys.executable, "-c", "import sys; sys.exit(7)"], windows=True) == 7
    answers = [KeyboardInterrupt, KeyboardInterrupt, 130]

    def wait():
        answer = answers.pop(0)
        if answer is KeyboardInterrupt:
            raise answer
        return answer

    monkeypatch.setattr(starting.subprocess, "Popen", lambda words: SimpleNamespace(wait=wait))
    assert start(["trainer"], windows=True) == 130 and answers == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no exec")
def test_the_starter_becomes_the_trainer_so_that_signals_reach_it(tmp_path):
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'lora-llm')!r}]; import os, starting; print(os.getpid(), flush=True);"
    )
    code += "starting.start([sys.executable, '-c', 'import os; print(os.getpid())'])"
    first, second = output_of([sys.executable, "-c", code], tmp_path)[1].split()
    assert first == second

"""What both trees' start.py share: the settings of a shell script, the environment, the start.

Standard library and Python 3.8 only: it runs before there is an environment, and an older Python
must still be able to say what is needed."""

import filecmp
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path, PurePath
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

WINDOWS = os.name == "nt"
OLDEST_PYTHON = (3, 11)
# name=value: the value bare, in double quotes, or in single ones and taken as it stands
SETTING = re.compile(r"""([A-Za-z_]\w*)=("[^"]*"|'[^']*'|[^\s"'#;&|<>()`]*)(?=\s|$)\s*""")
FROM_ENVIRONMENT = re.compile(r"\$\{(\w+):-([^{}]*)\}")  # ${name:-value}
TODAY = re.compile(r"\$\(date \+([^()]*)\)")  # $(date +%Y%m%d)
Settings = Dict[str, str]


class Tree(NamedTuple):
    """A tree that can be started. script: whose settings it takes; kind: of its environment.
    words: (settings, folder of the project) -> words that follow the environment's Python."""

    script: str
    kind: str
    trainer: str
    names: Sequence[str]
    words: Callable[[Settings, PurePath], List[str]]


def run(tree: Tree, root: Path, arguments: Sequence[str]) -> int:
    """Start the trainer of a tree; -> the exit code, 2 for settings that cannot be used."""
    script, further = _script(tree, root, list(arguments))
    if further[:1] in (["--help"], ["-h"]):
        print(_help(tree, root, script))
        return 0
    try:
        words = tree.words(read_settings(script, tree.names), script.parent)
        python = ready_environment(root, tree.kind)
    except (ValueError, OSError) as error:
        print(f"{script.name}: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"start.py: the environment is not whole ({error}); start again to go on with it", file=sys.stderr)
        return error.returncode
    return start([str(python), *words, *further])


def _script(tree: Tree, root: Path, arguments: List[str]) -> Tuple[Path, List[str]]:
    """(the file of the settings, the words for the trainer)."""
    if len(arguments) > 1 and arguments[0] == "--settings":
        return Path(os.path.abspath(arguments[1])), arguments[2:]
    return root / tree.script, arguments


def _help(tree: Tree, root: Path, script: Path) -> str:
    python, trainer = python_of(root / f".venv-{tree.kind}"), root / f"lora-{tree.kind}" / tree.trainer
    return (
        f"start.py [--settings FILE] [FLAG ...]\n\nTrains with the settings of {script}.\n"
        f"Makes the environment {python.parent.parent} first where it is not there, or out of date.\n"
        "Edit the settings; flags go to the trainer and win over them.\n\n"
        f'Every flag of the trainer: "{python}" "{trainer}" --help'
    )


def read_settings(script: Path, names: Sequence[str]) -> Settings:
    """{name: value} of the settings block, the lines between two lines that begin with `# ---`.

    $here is the script's folder, ${name:-value} a variable of the environment or that value,
    $(date +FORMAT) the time now. Raises ValueError, by its line, for all other shell, for names
    that are not among `names`, and where one of these lacks; OSError without the file."""
    settings: Settings = {}
    inside = False
    for number, line in enumerate(script.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.startswith("# ---"):
            if inside:
                break
            inside = "settings" in line
        elif inside:
            for name, value in _settings_of(line, f"line {number}"):
                if name not in names:
                    raise ValueError(f"line {number}: there is no setting {name}; there are {', '.join(names)}")
                settings[name] = expanded(value, script.parent, f"line {number}")
    lacking = [name for name in names if name not in settings]
    if lacking:
        raise ValueError(f"the settings lack {', '.join(lacking)}: write for instance {lacking[0]}=VALUE")
    return settings


def _settings_of(line: str, where: str) -> List[Tuple[str, str]]:
    found, rest = [], line.strip()
    while rest and not rest.startswith("#"):
        match = SETTING.match(rest)
        if match is None:
            raise ValueError(f"{where}: {rest:.60} is not of the form name=value; quote a value that holds blanks")
        found.append((match[1], match[2]))
        rest = rest[match.end() :]
    return found


def expanded(text: str, here: PurePath, where: str) -> str:
    """A value without its quotes, what stands for something else replaced; see read_settings."""
    if text.startswith("'"):
        return text[1:-1]
    value = text.strip('"')
    value = FROM_ENVIRONMENT.sub(lambda match: os.environ.get(match[1]) or match[2], value)
    value = TODAY.sub(lambda match: time.strftime(match[1]), value)
    if value == "$here" or value.startswith("$here/"):
        value = str(here.joinpath(*value.split("/")[1:]))
    if "$" in value or "`" in value:
        raise ValueError(f"{where}: {text} needs a shell; give the value itself")
    return os.path.expanduser(value) if value.startswith("~") and not text.startswith('"') else value


def python_of(environment: PurePath, windows: bool = WINDOWS) -> PurePath:
    """The Python of a virtual environment."""
    return environment / "Scripts" / "python.exe" if windows else environment / "bin" / "python"


def ready_environment(root: Path, kind: str) -> PurePath:
    """The Python of .venv-KIND, which is made, or renewed after requirements-KIND.txt has changed.

    Raises ValueError under too old a Python; CalledProcessError where venv or pip fails."""
    environment, requirements = root / f".venv-{kind}", root / f"requirements-{kind}.txt"
    python, installed = python_of(environment), environment / ".installed"
    if os.path.exists(str(python)) and installed.is_file() and filecmp.cmp(str(requirements), str(installed), False):
        return python
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        own = "py -3.11 lora-{}\\start.py" if WINDOWS else "PYTHON=python3.11 bash early_stop_lora_{}.sh"
        raise ValueError(f"Python {oldest} or newer is needed; name one: {own.format(kind)}")
    print(f"Installing the environment of lora-{kind} into {environment} (once) ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)]
    subprocess.run([str(python), *install], check=True)
    aside = installed.with_name(".installed.part")
    shutil.copyfile(str(requirements), str(aside))
    os.replace(str(aside), str(installed))
    return python


def start(words: List[str], windows: bool = WINDOWS) -> int:
    """Become the program of these words. Windows has no such thing: there its end is waited for.

    Ctrl-C reaches the program as well, which saves its state; -> its exit code."""
    sys.stdout.flush()
    if not windows:
        os.execv(words[0], words)
    process = subprocess.Popen(words)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue

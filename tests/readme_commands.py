"""The commands of the READMEs: found, checked against the scripts that they name, and run.

    python tests/readme_commands.py [README ...]

Runs, in order and in this checkout, every command that needs no GPU, hub or service, and prints
command, exit code and seconds, or why a command was not run. Exit codes: 0 all that ran ended with
0; 1 one did not; 2 an earlier run is in the way, or an upstream cannot be cloned. SD_SCRIPTS_DIR
and QLORA_DIR name git repositories of the upstreams, for the commands that need a checkout of one.
"""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rooms import ROOT, imported, modules

# Each README, and the environment that its `python` is of.
READMES = {
    "README.md": "llm",
    "lora-llm/README.md": "llm",
    "lora-ldm/README.md": "ldm",
    "patches/README.md": "llm",
    "tests/README.md": "llm",
}
PROGRAMS = ("bash", "python", "source", "git", "pip", "streamlit", "accelerate")
# How blocks begin that are no commands: Python, a file of jobs, BibTeX, trees of folders and files,
# a row of data and how it is written.
OTHER_BLOCKS = ("from early_stop_callback", "[defaults]", "@inproceedings", "lora-llm/", '{"messages"', "### User:")

CHECKOUTS = {"PATH/TO/sd-scripts": "SD_SCRIPTS_DIR", "PATH/TO/qlora": "QLORA_DIR", "CHECKOUT": "SD_SCRIPTS_DIR"}
PLACEHOLDERS = {
    "OUTPUT": "output/my-text",
    "HISTORY": "output/my-text/cs_history.jsonl",
    "BASE": "lora-ldm/tiny_base",
    "FOLDER": "dataset/stills/train",
    **{word: f"output/{word.rpartition('/')[2]}" for word in CHECKOUTS},
}
NOT_RUN = {
    r"\.\.\.": "shortened: a command of your own with a flag more",
    r"readme_commands\.py": "this script",
    r"^bash tests/run\.sh": "the whole suite, of which the READMEs are a part",
    r"^pip ": "needs a package index; tests/run.sh installs the same file",
    r"^streamlit ": "a server that waits for a browser; tests/ldm/demo starts it",
    r"tag_wd14\.py": "needs a hub; tests/ldm/prepare runs it on a tagger of its own",
    r"--captioner claude": "needs a service; tests/ldm/prepare runs it against a server of its own",
}
# Scripts of other projects, to which a patch adds the flags of early stopping.
UPSTREAMS = ("train_network.py", "src/musubi_tuner/wan_train_network.py", "train_dreambooth_lora_flux.py", "qlora.py")
# What takes the flags of a script: the trainer behind it, or what is put beside an upstream's.
TRAINERS = {
    "early_stop_lora_llm.sh": "lora-llm/es_lora_llm.py",
    "early_stop_lora_ldm.sh": "lora-ldm/es_lora_ldm.py",
    "lora-llm/start.py": "lora-llm/es_lora_llm.py",
    "lora-ldm/start.py": "lora-ldm/es_lora_ldm.py",
    **dict.fromkeys(UPSTREAMS, "lora-llm/es_lora/settings.py"),
}
HUGGING_FACE = ("training_args.py", "training_args_seq2seq.py")  # files of transformers with flags of its own


@dataclass(frozen=True)
class Command:
    """A command of a README. text: one line, as a shell takes it; line: where it begins."""

    readme: str
    line: int
    text: str

    @property
    def ready(self) -> str:
        """The text with values in place of the placeholders."""
        words = sorted(PLACEHOLDERS, key=len, reverse=True)
        pattern = rf"(?<![\w/-])({'|'.join(map(re.escape, words))})(?![\w/])"
        return re.sub(pattern, lambda found: PLACEHOLDERS[found[1]], self.text)

    @property
    def words(self) -> list[str]:
        return shlex.split(self.ready, comments=True)

    @property
    def script(self) -> str:
        """The script that it runs; empty where it runs none."""
        return next((word for word in self.words if word.endswith((".py", ".sh"))), "")


def blocks(text: str) -> Iterator[list[tuple[int, str]]]:
    """The indented and the fenced blocks of a page: [(line number, line without indentation)]."""
    block: list[tuple[int, str]] = []
    fenced = False
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        fence = line.startswith("```")
        fenced ^= fence
        if fenced and not fence:
            block.append((number, line))
        elif not fence and line.startswith("    ") and line.strip():
            block.append((number, line[4:]))
        elif block and (fence or line.strip() or number > len(text.splitlines())):
            yield block
            block = []


def joined(block: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Its lines, with those that a backslash carries on put together."""
    start, text = 0, ""
    for number, line in block:
        start, text = start or number, f"{text} {line.strip()}".strip()
        if text.endswith("\\"):
            text = text[:-1].rstrip()
            continue
        yield start, text
        start, text = 0, ""


def is_command(line: str) -> bool:
    first = line.split()[0].split("=")[0]
    return first in PROGRAMS or first.endswith("/bin/python")


def commands(readme: str) -> list[Command]:
    """The commands of a README, in order. readme: its path, absolute or below the project."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    lines = [line for block in blocks(text) for line in joined(block)]
    return [Command(readme, number, line) for number, line in lines if is_command(line)]


def strange_blocks(readme: str) -> list[str]:
    """First lines of the blocks that are neither commands nor of another known kind."""
    firsts = [block[0][1].strip() for block in blocks((ROOT / readme).read_text(encoding="utf-8"))]
    return [first for first in firsts if not is_command(first) and not first.startswith(OTHER_BLOCKS)]


def reason_not_run(command: Command) -> str:
    """Why it is not run; empty where it is."""
    for pattern, reason in NOT_RUN.items():
        if re.search(pattern, command.text):
            return reason
    missing = [name for word, name in CHECKOUTS.items() if word in command.text and not os.environ.get(name)]
    return f"needs a checkout: {missing[0]} names no git repository" if missing else ""


def unknown_placeholders(command: Command) -> list[str]:
    """Words in capitals that no table gives a value for."""
    return [word for word in command.words if re.fullmatch(r"(PATH/TO/.+|[A-Z][A-Z_/-]{3,})", word)]


def missing_paths(command: Command) -> list[str]:
    """What it names and the project does not have; commands make output/ and the environments."""
    missing = []
    for word in command.words:
        path, _, test = word.partition("::")
        if (
            "/" not in path
            or path in UPSTREAMS
            or path.startswith(("output/", ".venv-", "-"))
            or " " in path
            or "=" in path
        ):
            continue
        if not (ROOT / path).exists() or (test and f"def {test}(" not in (ROOT / path).read_text(encoding="utf-8")):
            missing.append(word)
    return missing


def unknown_flags(command: Command) -> list[str]:
    """Flags that its script does not have. Those before a bare `--` belong to another program."""
    words = command.words
    words = words[words.index("--") + 1 :] if "--" in words else words
    flags = [word for word in words if word.startswith("--")]
    if not flags:
        return []
    known, patterns = script_flags(TRAINERS.get(command.script, command.script))
    return [flag for flag in flags if flag not in known and not any(re.fullmatch(one, flag) for one in patterns)]


@cache
def script_flags(script: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """(flags, patterns of further ones) in the text of a script and of what it imports there."""
    known, patterns = set(), set()
    for file in _with_imports(ROOT / script):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and str(node.value).startswith("--"):
                known.add(node.value)
            elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                start = node.values[0].value
                patterns |= {rf"{start}\w+"} if len(start) > 2 and start.startswith("--") else set()
            elif isinstance(node, ast.ClassDef) and (
                "settings" in file.parts or file.name in ("settings.py", *HUGGING_FACE)
            ):
                known |= {f"--{field.target.id}" for field in node.body if isinstance(field, ast.AnnAssign)}
    return frozenset(known), tuple(patterns)


def _declares_flags(file: Path) -> bool:
    """Whether the fields of its classes are flags."""
    return file.parent.name == "settings" or file.name in ("settings.py", *HUGGING_FACE)


def _with_imports(script: Path) -> set[Path]:
    tree = ROOT / script.relative_to(ROOT).parts[0]
    known, found, open_files = modules(tree), set(), [script]
    while open_files:
        file = open_files.pop()
        found.add(file)
        names = imported(file)
        open_files += [known[name] for name in names if name in known and known[name] not in found]
        if "transformers" in names:
            package = Path(importlib.util.find_spec("transformers").origin).parent
            found |= {package / name for name in HUGGING_FACE}
    return found


def folders_in_the_way(chosen: Iterable[Command]) -> list[str]:
    """Folders below output/ that the commands will make, and that are there already."""
    named = {
        "/".join(word.split("/")[:2]) for command in chosen for word in command.words if word.startswith("output/")
    }
    return sorted(name for name in named if (ROOT / name).exists())


def make_checkouts(chosen: Iterable[Command]) -> None:
    """Clone the upstreams that the commands need. Raises ValueError where one cannot be cloned."""
    text = "\n".join(command.text for command in chosen)
    for word, name in CHECKOUTS.items():
        if word in text:
            target = str(ROOT / PLACEHOLDERS[word])
            done = subprocess.run(["git", "clone", "-q", os.environ[name], target], capture_output=True, text=True)
            if done.returncode:
                raise ValueError(
                    f"{name}={os.environ[name]} cannot be cloned ({done.stderr.strip()}); name a whole clone"
                )


def run(command: Command) -> tuple[int, float, str]:
    """(exit code, seconds, the last lines of what it said)."""
    environment = ROOT / f".venv-{READMES.get(command.readme, 'llm')}" / "bin"
    settings = {"PATH": f"{environment}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        done = subprocess.run(
            ["bash", "-c", command.ready],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        said.seek(0)
        return done.returncode, time.monotonic() - start, "".join(said.readlines()[-15:])


def main(argv: Sequence[str]) -> int:
    """Run the commands of the READMEs that are named, or of all."""
    found = [command for readme in argv or READMES for command in commands(readme)]
    chosen = [command for command in found if not reason_not_run(command)]
    if in_the_way := folders_in_the_way(chosen):
        print(f"{', '.join(in_the_way)}: of an earlier run; delete them, or do this in a fresh clone", file=sys.stderr)
        return 2
    try:
        make_checkouts(chosen)
    except ValueError as error:
        print(f"readme_commands: {error}", file=sys.stderr)
        return 2
    print("| command | exit code | seconds |\n|---|---|---|", flush=True)
    status = 0
    for command in found:
        reason = reason_not_run(command)
        shown = f"{command.readme}:{command.line} `{command.text}`".replace("|", "\\|")
        if reason:
            print(f"| {shown} | not run: {reason} | |", flush=True)
            continue
        code, seconds, said = run(command)
        print(f"| {shown} | {code} | {seconds:.0f} |", flush=True)
        if code:
            status = 1
            print(said, file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

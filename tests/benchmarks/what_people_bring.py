"""What people bring, to every tool: exit code and message of each input, as a table.

    python tests/benchmarks/what_people_bring.py [--only WORD] [--keep FOLDER [--go_on]]

Each input of what_people_bring_inputs.py is a real command in a folder of its own, on the embedded
bases. Exit code 1: an answer differs, a traceback appears, or a library speaks first. Without
--only the page what_people_bring.md is written.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from what_people_bring_inputs import INPUTS, OF_LLM, USUAL, Input, Part

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path(__file__).with_suffix(".md")
LONG = "word " * 100
NEVER = ("Traceback (most recent call last)", "Failed to load CPU", "this is a fault of ES-LoRA")
HUB_SEC = 30  # of a whole command, imports included; the hub itself gets five
KINDS = {
    "A1": "no learnt token", "A2": "line ends", "A3": "byte order marks", "A4": "columns", "A5": "cut without a word",
    "A6": "left out without a word", "A7": "NaN and Inf", "A8": "nothing trained", "A9": "separators",
    "A10": "parts of adapters", "B": "tracebacks", "C": "valid and refused, or misadvised", "D": "frictions",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What a command did. faults: how it differs from what is right."""

    given: Input
    code: int
    message: str
    faults: list[str]


def put(path: Path, content: object, parts: Path) -> None:
    """A file or folder of an input, see Input.files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Part):
        copy = shutil.copytree if (parts / content.name).is_dir() else shutil.copyfile
        copy(parts / content.name, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        lines = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(lines.encode())


def command(given: Input, pythons: dict[str, str], parts: Path) -> list[str]:
    tree = "llm" if given.tool in OF_LLM else "ldm"
    places = {"llm": f"{ROOT}/lora-llm/tiny_base", "sd": f"{ROOT}/lora-ldm/tiny_base", "parts": parts, "long": LONG}
    words = shlex.split(USUAL.get(given.tool, "")) + shlex.split(given.words)
    return [pythons[tree], f"{ROOT}/lora-{tree}/{given.tool}", *(word.format(**places) for word in words)]


def asked(given: Input, pythons: dict[str, str], parts: Path) -> Answer:
    """Run an input in a folder of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["HF_HUB_OFFLINE"] = "0" if given.online else "1"
    environment.pop("OPENAI_API_KEY", None)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for path, content in given.files.items():
            put(folder / path, content, parts)
        words = command(given, pythons, parts)
        options = {"capture_output": True, "text": True, "errors": "replace", "check": False, "timeout": 600}
        done = subprocess.run(words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, **options)
    seconds = time.monotonic() - started
    text = done.stderr + done.stdout
    for place in (parts, ROOT):
        text = text.replace(f"{place}/", "").replace(f"{os.path.relpath(place, folder)}/", "")
    text = text.replace(f"{folder}/", "")
    return judged(given, done.returncode, text, seconds)


def judged(given: Input, code: int, text: str, seconds: float) -> Answer:
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip() and "%|" not in line]
    message = next((line for line in lines if given.says in line), lines[-1] if lines else "")
    faults = [f"exit code {code}, not {given.code}"] if code != given.code else []
    faults += [] if given.says in text else [f"it does not say {given.says!r}"]
    faults += [f"it says {word!r}" for word in NEVER if word in text]
    if given.online and seconds > HUB_SEC:
        faults.append(f"it took {seconds:.0f} seconds")
    return Answer(given, code, message if not faults else "\n".join(lines[-12:]), faults)


def page(answers: list[Answer]) -> str:
    """The table, by kind."""
    counts = Counter(answer.given.kind for answer in answers)
    codes = Counter(answer.code for answer in answers)
    kinds = [f"| {kind} | {KINDS[kind]} | {counts[kind]} |" for kind in KINDS]
    rows = [f"| {cells(answer)} |" for answer in answers]
    return "\n".join([
        "# What people bring", "",
        "Written by `python tests/benchmarks/what_people_bring.py`, without a network. Each row is a real command.", "",
        f"{len(answers)} inputs, of {len({answer.given.tool for answer in answers})} tools. "
        + "Exit codes: " + ", ".join(f"{count} times {code}" for code, count in sorted(codes.items()))
        + ". None ends with a traceback.", "",
        "| kind | | inputs |", "|---|---|---|", *kinds, "",
        "The message is the first line that says what is right to say; long ones are cut.", "",
        "| kind | tool | what is given | code | message |", "|---|---|---|---|---|", *rows, "",
    ])  # fmt: skip


def cells(answer: Answer) -> str:
    message = answer.message if len(answer.message) <= 200 else answer.message[:200].rstrip() + " ..."
    shown = [answer.given.kind, answer.given.tool, answer.given.given, str(answer.code), f"`{message}`"]
    return " | ".join(cell.replace("|", "\\|").replace("``", "") for cell in shown)


def told(answer: Answer, kept: Path) -> Answer:
    """Say how an input was answered, and note it for --go_on."""
    given = answer.given
    print(f"{'WRONG' if answer.faults else 'right'}  {given.kind}  {given.tool}  {given.given}", flush=True)
    if answer.faults:
        print(f"    {'; '.join(answer.faults)}\n    {answer.message}", flush=True)
    with open(kept / "answers.jsonl", "a", encoding="utf-8") as file:
        note = {"given": str(given), "code": answer.code, "message": answer.message, "faults": answer.faults}
        file.write(json.dumps(note) + "\n")
    return answer


def earlier(file: Path) -> dict[str, Answer]:
    """{input: its answer} of those that were answered rightly before."""
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    notes = [json.loads(line) for line in lines if line]
    given = {str(entry): entry for entry in INPUTS}
    known = {note["given"]: note for note in notes if note["given"] in given}
    return {
        name: Answer(given[name], note["code"], note["message"], [])
        for name, note in known.items()
        if not note["faults"]
    }


def make_parts(folder: Path, pythons: dict[str, str]) -> Path:
    for tree, python in pythons.items():
        if not (folder / tree).is_dir():
            maker = Path(__file__).with_name("what_people_bring_parts.py")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run([python, maker, tree, folder / tree], env=environment, capture_output=True, text=True)
            if done.returncode:
                shutil.rmtree(folder / tree, ignore_errors=True)
                raise SystemExit(done.stderr)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for tree in ("llm", "ldm"):
        parser.add_argument(f"--python_{tree}", default=f"{ROOT}/.venv-{tree}/bin/python")
    parser.add_argument("--only", default="", help="inputs whose kind, tool or description has this word")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time")
    parser.add_argument("--keep", type=Path, help="folder in which adapters and bases are kept for the next time")
    parser.add_argument(
        "--go_on", action="store_true", help="with --keep: ask again only what was not answered rightly"
    )
    options = parser.parse_args()
    pythons = {"llm": options.python_llm, "ldm": options.python_ldm}
    chosen = [given for given in INPUTS if options.only in f"{given.kind} {given.tool} {given.given}"]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        kept = (options.keep or Path(scratch)).resolve()
        parts, known = make_parts(kept, pythons), earlier(kept / "answers.jsonl") if options.go_on else {}
        answers = list(
            pool.map(lambda given: known.get(str(given)) or told(asked(given, pythons, parts), kept), chosen)
        )
    wrong = sum(bool(answer.faults) for answer in answers)
    print(f"{len(answers) - wrong} of {len(answers)} inputs are answered rightly")
    if not options.only and not wrong:
        PAGE.write_text(page(answers), encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Kill runs at random moments, go on with them as a person would, compare with undisturbed ones.

    .venv-llm/bin/python tests/faults/kills.py text --rounds 100
    .venv-ldm/bin/python tests/faults/kills.py image --rounds 100
    .venv-llm/bin/python tests/faults/kills.py jobs --rounds 30

A round draws a run's settings by its number, trains it undisturbed, then once more with one or two
kills (SIGKILL, SIGTERM, SIGINT) anywhere in it, a quarter of them in its last part. Compared are
result.json, the history byte by byte, and every LoRA file. Exit code 1 where a round differs."""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

from run_kinds import KINDS, left_over, settings_of
from tqdm import tqdm

SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT]
MOST_ATTEMPTS = 8


def killed_and_resumed(kind, words, folder, length, generator):
    """(what each attempt ended with, signals that were sent)."""
    kills = 2 if generator.random() < 0.35 else 1
    more, trail, sent = [], [], []
    for attempt in range(MOST_ATTEMPTS):
        after, number = None, generator.choice(SIGNALS)
        if attempt < kills:
            after = length * (generator.uniform(0.8, 1.0) if generator.random() < 0.25 else generator.random())
        ended = kind.forked.run(
            kind.program, [*words, "--output_dir", folder, *more], kill_after=after, with_signal=number
        )
        trail.append([ended.code, round(ended.seconds, 2), ended.last_line if ended.code in (1, 2) else ""])
        if ended.killed:
            sent.append(signal.Signals(number).name)
        if ended.code in (0, 3, "hangs"):
            break
        again = kind.anew(ended, folder)
        if again is None and ended.code in (1, 2) and not ended.killed:
            break
        more = kind.resume(folder) if again is None else again
    return trail, sent


def round_of(kind, seed, number, scratch):
    """{"round", "equal", "different", ...} of one round."""
    generator = random.Random(f"{seed}/{number}/kills")
    words = settings_of(kind, seed, number)
    whole, folder = scratch / f"whole-{number}", scratch / f"killed-{number}"
    reference = kind.forked.run(kind.program, [*words, "--output_dir", whole])
    facts = {"round": number, "words": " ".join(map(str, words[-24:]))}
    if reference.code not in (0, 3):
        return {**facts, "equal": False, "different": {"undisturbed": reference.last_line}, "trail": [], "signals": []}
    trail, sent = killed_and_resumed(kind, words, folder, reference.seconds, generator)
    different = {}
    try:
        expected, found = kind.facts(whole), kind.facts(folder)
        different = {key: [expected[key], found[key]] for key in expected if expected[key] != found[key]}
        if left_over(folder):
            different["left over"] = left_over(folder)
    except (OSError, ValueError) as error:
        different["no result"] = str(error)
    if not different:
        shutil.rmtree(whole)
        shutil.rmtree(folder)
    return {**facts, "equal": not different, "different": different, "trail": trail, "signals": sent}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    scratch = Path(tempfile.mkdtemp(prefix=f"kills-{arguments.kind}-"))
    kind = KINDS[arguments.kind](scratch)
    counts, failed = Counter(), 0
    for number in tqdm(range(arguments.first, arguments.first + arguments.rounds), desc="rounds"):
        found = round_of(kind, arguments.seed, number, scratch)
        counts.update(found["signals"])
        counts[f"{len(found['signals'])} signals"] += 1
        failed += not found["equal"]
        print(json.dumps(found) if not found["equal"] else f"round {number}: equal, {found['signals']}", flush=True)
    told = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    print(f"{arguments.rounds - failed} of {arguments.rounds} rounds are equal to the undisturbed run ({told})")
    if not failed:
        shutil.rmtree(scratch, ignore_errors=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

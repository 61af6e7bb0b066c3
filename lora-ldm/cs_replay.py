"""Re-decide a recorded run under any rule, draw it, and write the report page.

    python cs_replay.py HISTORY [--rule R|recorded] [--window M|auto] [--valley N] [--value X] [--component C]
                        [--json] [--plot FILE.png] [--html FILE.html]

HISTORY is a cs_history.jsonl or the run folder that holds one. Python 3.8; matplotlib is needed for pictures only.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Optional, Sequence, Union

from es_lora.files import write_whole
from es_lora.history import HISTORY_NAME, read_history, redecide, replay, settings_for
from es_lora.report import draw, write_report
from es_lora.rules import DEFAULT_RULE, RULES, make_rule

# ------------------------------------------------------------------------------------------------ command line


def _window(text: str) -> Union[int, str]:
    if text != "auto" and not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of measurements (1 or more) nor auto")
    return text if text == "auto" else int(text)


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Re-decide a recorded run under any rule and window.", allow_abbrev=False)
    parser.add_argument("history", help=f"a {HISTORY_NAME} or the folder of a run")
    names = [*RULES, "recorded"]
    parser.add_argument("--rule", default=DEFAULT_RULE, choices=names, help="default: %(default)s; recorded: the run's own")
    parser.add_argument("--window", type=_window, help="M in measurements, or auto: about one epoch (default: the run's)")
    parser.add_argument("--valley", type=int, help="N of the rule nth-valley")
    parser.add_argument("--value", type=float, help="the number of the other rules: epochs, a patience, a threshold")
    parser.add_argument("--component", help="whose CS decides (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, help="draw the run into this PNG file")
    parser.add_argument("--html", type=Path, help="write the report page to this file")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    arguments = parse_arguments(argv)
    try:
        history = read_history(arguments.history)
        choice = (arguments.rule, arguments.window, arguments.valley, arguments.component, arguments.value)
        verdict = redecide(history, *choice)
        name, settings = settings_for(history, *choice)
        decision = replay(make_rule(name, settings), history.records)
        if arguments.plot:
            figure = draw(history, decision, settings.window, settings.component)
            write_whole(arguments.plot, lambda temporary: figure.savefig(temporary, format="png", dpi=140))
        if arguments.html:
            write_report(arguments.html, arguments.history, verdict=verdict["reason"], decision=decision)
    except (ValueError, FileNotFoundError) as error:
        print(f"cs_replay: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(verdict))
    else:
        print(f"{verdict['rule']}, window {verdict['window']}: {verdict['reason']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

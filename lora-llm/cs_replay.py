"""Re-decide a recorded run under any rule, draw it, and write the report page.

    python cs_replay.py HISTORY [--rule R|recorded] [--window M|auto] [--valley N] [--value X]
                        [--component C] [--json] [--plot FILE.png] [--html FILE.html]

HISTORY is a cs_history.jsonl or the run folder that holds one. Pictures need matplotlib.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Optional, Sequence, Union

from es_lora.command_line import reported
from es_lora.files import write_whole
from es_lora.history import HISTORY_NAME, read_history, redecide, replay, rule_for
from es_lora.inputs.bounds import number, whole
from es_lora.report import draw, write_report
from es_lora.rules import DEFAULT_RULE, RULES, value_of_valley


def _window(text: str) -> Union[int, str]:
    try:
        return text if text == "auto" else whole(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error} measurements, nor auto") from None


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Re-decide a recorded run under any rule and window.", allow_abbrev=False
    )
    parser.add_argument("history", help=f"a {HISTORY_NAME} or the folder of a run")
    rules = f"{', '.join(RULES)}, or recorded: the run's own (default: %(default)s)"
    parser.add_argument("--rule", default=DEFAULT_RULE, help=rules)
    parser.add_argument(
        "--window", type=_window, help="M in measurements, or auto: about one epoch (default: the run's)"
    )
    parser.add_argument("--valley", type=whole(1), help="N of the rule nth-valley: another name of its --value")
    parser.add_argument("--value", type=number(), help="the rule's number: epochs, a patience, valleys")
    parser.add_argument("--component", help="whose CS decides (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, help="draw the run into this PNG file")
    parser.add_argument("--html", type=Path, help="write the report page to this file")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    arguments = parse_arguments(argv)
    return reported("cs_replay", lambda: _decide(arguments))


def _decide(arguments: argparse.Namespace) -> int:
    history = read_history(arguments.history)
    value = arguments.value
    if arguments.valley is not None and value is None:
        value = value_of_valley(arguments.rule, arguments.valley)
    choices = {"window": arguments.window, "component": arguments.component, "value": value}
    verdict = redecide(history, arguments.rule, **choices)
    rule = rule_for(history, arguments.rule, **choices)
    decision = replay(rule, history.records)
    if arguments.plot:
        figure = draw(history, decision, rule.settings.window, rule.settings.component)
        write_whole(arguments.plot, lambda temporary: figure.savefig(temporary, format="png", dpi=140))
    if arguments.html:
        write_report(arguments.html, arguments.history, verdict=verdict["reason"], decision=decision)
    if arguments.json:
        print(json.dumps(verdict))
    else:
        print(f"{verdict['rule']}, window {verdict['window']}: {verdict['reason']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Captions in plain sentences from a vision model, beside each picture.

    python lora-ldm/prepare/caption_images.py data/10_statue --captioner claude \
        --trigger_word "CUS statue" --review look.html
    python lora-ldm/prepare/caption_images.py data/10_statue --captioner openai \
        --base_url http://127.0.0.1:8000/v1 --model NAME
    python lora-ldm/prepare/caption_images.py data/10_statue --captioner local --model models/blip

Pictures are made smaller before they are sent. What will be sent where, and what it may cost, is
shown and asked about before the first request. Captions that exist are kept without --overwrite.
Keys come from ANTHROPIC_API_KEY, OPENAI_API_KEY or --key_file, and go to their own service only.

What a fault does; every answer that came before is on disk by then, and the same command goes on
where it was:

    HTTP 429, 408, 409, 5xx   asked again up to --retries times, later each time (as late as the
                              server says); then left out
    no answer in --timeout    the same
    connection cut            the same
    answer is not JSON        left out, named; not asked again by itself, as it may have been paid
    JSON without a caption    the same
    the model declines        left out, named; remembered, so that the refusal is not paid for twice
    HTTP 400, 413, 422        left out, named: this picture is not accepted
    HTTP 401, 402, 403, 404   the run stops at once: no other picture would fare better
    5 of the first three in a row: the run stops, the service is down
    picture damaged           left out, named; never sent
    Ctrl-C                    answers under way are still written; exit code 130
    kill                      what was under way is lost, nothing else

Exit codes: 0 every picture has a caption, 2 bad arguments or pictures left out, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from images.loading import UnreadableImageError, open_image, to_rgb_and_alpha  # noqa: E402
from prepare.caption_cache import AnswerCache, answer_key  # noqa: E402
from prepare.caption_files import CaptionFiles, MetadataFile, find_pictures  # noqa: E402
from prepare.caption_review import write_review  # noqa: E402
from prepare.caption_services import (  # noqa: E402
    ADDRESSES,
    CAPTIONERS,
    DEFAULTS,
    INSTRUCTION,
    Answer,
    NoAnswer,
    PictureFault,
    Service,
    ServiceFault,
    one_line,
)
from settings.entry_point import ended  # noqa: E402

NO_ANSWERS_IN_A_ROW = 5


def parse_arguments(argv: Optional[list[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("train_data_dir", type=Path, help="folder with pictures")
    add("--captioner", choices=list(CAPTIONERS), required=True, help="who writes the captions")
    models = ", ".join(f"{name}: {model}" for name, (model, *_) in DEFAULTS.items())
    add("--model", help=f"model name ({models}); for local the folder of a BLIP or Florence-2 model")
    add("--base_url", help="another server that speaks the same protocol")
    add("--key_file", type=Path, help="file that holds the key alone")
    add(
        "--key_env",
        metavar="NAME",
        help="environment variable that holds the key; needed with --base_url, if it wants one",
    )
    add("--instruction", help="what to ask of the model (local: a beginning for BLIP, a task for Florence-2)")
    add("--prefix", default="", help="put before every caption, as it is")
    add("--trigger_word", "--trigger", default="", help='put first, such as "CUS statue"')
    add("--caption_separator", default=", ", help="between the trigger word and the caption")
    add("--max_tokens", type=int, default=150, help="longest answer, in tokens (default %(default)s)")
    add("--max_side", type=int, default=1024, help="pictures are made smaller to this, in px (default %(default)s)")
    add("--parallel", type=int, default=4, help="requests at a time (default %(default)s)")
    add("--retries", type=int, default=4, help="of a request that failed (default %(default)s)")
    add("--timeout", type=float, default=60, help="seconds to wait for an answer (default %(default)s)")
    add("--price_in", type=float, help="US dollars per million tokens in, for the estimate")
    add("--price_out", type=float, help="US dollars per million tokens out")
    add("--yes", action="store_true", help="do not ask before the first request")
    add("--caption_extension", default=".txt")
    add("--metadata", action="store_true", help="write metadata.jsonl in place of text files")
    add("--overwrite", action="store_true", help="replace captions that exist")
    add("--recursive", action="store_true", help="take subfolders, too")
    add("--cache", type=Path, help="file of answers had before (default: .caption_answers.jsonl in the folder)")
    add("--review", type=Path, metavar="PAGE.html", help="write a page with pictures and captions side by side")
    return parser.parse_args(argv)


def validate(args: argparse.Namespace) -> None:
    """Fills in model, instruction and address: answers depend on them. Raises ValueError."""
    if args.captioner != "local":
        args.own_address = not args.base_url
        args.model = args.model or DEFAULTS[args.captioner][0]
        args.base_url = args.base_url or ADDRESSES[args.captioner]
        args.instruction = args.instruction or INSTRUCTION
    problems = []
    for name, least in (("max_tokens", 1), ("max_side", 32), ("parallel", 1), ("retries", 0)):
        if getattr(args, name) < least:
            problems.append(f"--{name} {getattr(args, name)} must be at least {least}")
    if not args.timeout > 0:
        problems.append(f"--timeout {args.timeout:g} must be more than 0 seconds")
    if not args.caption_extension.startswith("."):
        problems.append(f'--caption_extension {args.caption_extension!r} must begin with a dot, such as ".txt"')
    if args.base_url and not args.base_url.startswith(("http://", "https://")):
        problems.append(f"--base_url {args.base_url!r} must begin with http:// or https://")
    if args.captioner == "local" and (args.base_url or args.key_file or args.key_env):
        problems.append("--captioner local sends nothing: leave --base_url, --key_file and --key_env out")
    if (args.price_in is None) != (args.price_out is None):
        problems.append("--price_in and --price_out belong together")
    if problems:
        raise ValueError("; ".join(problems))


@dataclass
class Plan:
    """pictures: all. cached: {picture: answer had before}. ask: those that need a request."""

    pictures: list[Path]
    captions: Union[CaptionFiles, MetadataFile]
    cache: AnswerCache
    keys: dict[Path, str]
    cached: dict[Path, Answer]
    ask: list[Path]


def make_plan(args: argparse.Namespace) -> Plan:
    pictures = find_pictures(args.train_data_dir, args.recursive)
    captions = MetadataFile(args.train_data_dir) if args.metadata else CaptionFiles(pictures, args.caption_extension)
    cache = AnswerCache(args.cache or args.train_data_dir / ".caption_answers.jsonl")
    settings = [args.captioner, args.model, args.base_url, args.instruction, args.max_tokens, args.max_side]
    todo = [path for path in pictures if args.overwrite or captions.get(path) is None]
    keys = {path: answer_key(path, settings) for path in todo}
    cached = {path: answer for path in todo if (answer := cache.get(keys[path]))}
    return Plan(pictures, captions, cache, keys, cached, [path for path in todo if path not in cached])


def smaller_size(path: Path, max_side_px: int) -> tuple[int, int]:
    """(width, height) in px as it will be sent; (0, 0) for a damaged file, which never is."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0, 0
    scale = min(1.0, max_side_px / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def prices(args: argparse.Namespace) -> Optional[tuple[float, float]]:
    """US dollars per million tokens in and out, None where they are not known."""
    if args.price_in is not None:
        return args.price_in, args.price_out
    model, *known = DEFAULTS[args.captioner]
    return tuple(known) if args.model == model and args.own_address else None


def money(tokens_in: float, tokens_out: float, args: argparse.Namespace) -> str:
    found = prices(args)
    if found is None:
        return "unknown, as the prices of this model are (--price_in, --price_out)"
    dollars = (tokens_in * found[0] + tokens_out * found[1]) / 1e6
    return f"{dollars:.4f} US dollars at {found[0]:g} and {found[1]:g} per million tokens in and out"


def confirm(plan: Plan, service: Service, args: argparse.Namespace) -> bool:
    """Shows how many pictures go where at what cost, and asks. ValueError if nobody answers."""
    sizes = [smaller_size(path, args.max_side) for path in plan.ask]
    words = len(args.instruction) / 4 + 20  # about 4 letters a token
    tokens_in = sum(service.tokens_of(*size) + words for size in sizes)
    tokens_out = len(plan.ask) * args.max_tokens
    print(f"{len(plan.ask)} requests, one a picture, to {service.destination} (model {args.model})")
    print(f"about {tokens_in:.0f} tokens in and at most {tokens_out} out")
    print(f"cost, at most about: {money(tokens_in, tokens_out, args)}")
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise ValueError("nothing was sent: there is nobody to ask; --yes says yes beforehand")
    return input("Send them? [y/N] ").strip().lower() in ("y", "yes")


def caption_text(answer: str, args: argparse.Namespace) -> str:
    """The trigger word, the prefix, the model's words; a trigger word comes once."""
    text = one_line(f"{args.prefix}{answer}")
    if args.trigger_word and not text.lower().startswith(args.trigger_word.lower()):
        text = f"{args.trigger_word}{args.caption_separator}{text}"
    return text


def write_answer(path: Path, answer: Answer, plan: Plan, args: argparse.Namespace) -> None:
    if answer.declined:
        raise PictureFault("the model declines to describe it (write a caption by hand)")
    plan.captions.put(path, caption_text(answer.text, args))


def ask_about(path: Path, plan: Plan, service: Service, args: argparse.Namespace) -> Answer:
    """One request; the answer goes to disk before anything else happens to it."""
    try:
        picture = to_rgb_and_alpha(open_image(path))[0]
    except UnreadableImageError as error:
        raise PictureFault(str(error)) from None
    picture.thumbnail((args.max_side, args.max_side), Image.Resampling.LANCZOS)
    answer = service.caption(picture)
    plan.cache.put(plan.keys[path], answer)
    write_answer(path, answer, plan, args)
    return answer


def ask_about_all(plan: Plan, service: Service, args: argparse.Namespace, failures: dict[Path, str]) -> tuple[int, int]:
    """Requests a few at a time; fills `failures`; -> (tokens in, out). Raises ServiceFault."""
    tokens, in_a_row = (0, 0), 0
    with ThreadPoolExecutor(1 if args.captioner == "local" else args.parallel) as pool:
        futures = {pool.submit(ask_about, path, plan, service, args): path for path in plan.ask}
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="captions", unit="picture"):
                try:
                    answer = future.result()
                    tokens, in_a_row = (tokens[0] + answer.tokens_in, tokens[1] + answer.tokens_out), 0
                except PictureFault as fault:
                    failures[futures[future]] = str(fault)
                    in_a_row += isinstance(fault, NoAnswer)
                    if in_a_row >= NO_ANSWERS_IN_A_ROW:
                        raise ServiceFault(f"{in_a_row} failures in a row, the last one: {fault}") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is under way is waited for, and written
            raise
    return tokens


def caption_folder(args: argparse.Namespace) -> dict[Path, str]:
    """Captions the pictures of a folder; returns {picture left out: reason}."""
    plan, failures = make_plan(args), {}
    service = CAPTIONERS[args.captioner](args) if plan.ask else None
    if plan.ask and args.captioner != "local" and not confirm(plan, service, args):
        print("nothing was sent")
        return {}
    for path, answer in plan.cached.items():
        try:
            write_answer(path, answer, plan, args)
        except PictureFault as fault:
            failures[path] = str(fault)
    try:
        if plan.ask:
            tokens = ask_about_all(plan, service, args, failures)
            if args.captioner != "local":
                print(f"{tokens[0]} tokens in and {tokens[1]} out; cost: {money(*tokens, args)}")
    finally:
        report(plan, args, failures)
    return failures


def report(plan: Plan, args: argparse.Namespace, failures: dict[Path, str]) -> None:
    have = sum(plan.captions.get(path) is not None for path in plan.pictures)
    print(f"{have} of {len(plan.pictures)} pictures in {args.train_data_dir} have captions")
    kept = len(plan.pictures) - len(plan.keys)
    if kept:
        print(f"{kept} had captions already and are kept (--overwrite replaces them)")
    if plan.cached:
        print(f"{len(plan.cached)} answers were there from before and cost nothing")
    for path, message in sorted(failures.items()):
        print(f"left out: {path}: {message}", file=sys.stderr)
    if args.review:
        write_review(args.review, plan.pictures, plan.captions)
        print(f"read them through: {args.review}")


def main(argv: Optional[list[str]] = None) -> int:
    """Exit code 0; 2 for bad arguments or pictures left out; 130 interrupted."""
    args = parse_arguments(argv)

    def work() -> int:
        validate(args)
        return 2 if caption_folder(args) else 0

    return ended("caption_images", work, "interrupted: the same command goes on where this one was")


if __name__ == "__main__":
    sys.exit(main())

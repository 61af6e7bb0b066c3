"""The runs of the suite: which data sets, which half each belongs to, and which settings every run
has.

Halves were drawn by data set, balanced over the kinds, before any rule was tuned. The sets of the
half "new" came later: nobody looks at their runs before the choice of defaults is committed. The
settings of a set's runs are drawn with the set's name as seed: every factor's levels are spread
evenly over the runs and shuffled independently of the others.
"""

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
TRACES = HERE / "traces"  # what results.md is made of
TRACES_ANEW = HERE / "traces_anew"  # the same runs and the new half, with the losses of averages
CACHE = HERE / "cache"

# data set: (kind, half, training examples)
TEXT_SETS = {
    "kitchen_notes": ("style", "tuning", 130),
    "dhammapada": ("style", "tuning", 32),
    "devils_dictionary": ("style", "test", 160),
    "king_james": ("style", "test", 250),
    "law_terms": ("domain", "tuning", 140),
    "strongs_greek": ("domain", "tuning", 500),
    "freebsd_drivers": ("domain", "test", 240),
    "unit_conversions": ("question and answer", "tuning", 100),
    "elements": ("question and answer", "test", 48),
    "emoji_names": ("instructions", "tuning", 60),
    "commit_messages": ("instructions", "test", 125),
    "text_edits": ("instructions", "test", 400),
    "state_addresses": ("style", "new", 220),
    "wits": ("style", "new", 45),
    "eslint_rules": ("domain", "new", 70),
    "nautical_terms": ("domain", "new", 120),
    "country_facts": ("question and answer", "new", 60),
    "media_types": ("question and answer", "new", 80),
    "word_sounds": ("instructions", "new", 300),
    "shell_commands": ("instructions", "new", 50),
}
IMAGE_SETS = {
    "portraits": ("fluent 3d", "tuning", 20),
    "landscape": ("twemoji", "tuning", 18),
    "vehicles": ("fluent 3d", "tuning", 24),
    "stills": ("fluent 3d", "test", 20),
    "architecture": ("twemoji", "test", 20),
    "food": ("twemoji", "test", 12),
    "tools": ("openmoji", "new", 24),
    "flags": ("flag icons", "new", 18),
    "birds": ("photograph", "new", 20),
    "beasts": ("game icons", "new", 12),
}

RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # a factor of 33
RANKS = (4, 16, 64)
BATCHES = (4, 16)
SCHEDULES = ("constant", "cosine")
BITS = (4, 16)
SEEDS = (0, 1, 2)
SMALL_RUNS, LARGER_RUNS, IMAGE_RUNS = 7, 2, 6  # a set
NEW_SMALL_RUNS = 8  # a set of the new half, where smollm2 takes the place of the larger base
ROWS_SEEN, PICTURES_SEEN = 1400, 1000  # about the budget of a run
ROWS_SEEN_WITH_SHADOWS = 600  # each costs more than three runs
LARGEST_SET = 250  # examples, of the sets that the larger base is trained on
SMOLLM2_SETS = (  # sets with few and short rows, so that a run stays short
    *("kitchen_notes", "dhammapada", "law_terms", "unit_conversions", "emoji_names"),
    *("wits", "eslint_rules", "nautical_terms", "country_facts", "media_types", "shell_commands"),
)
SMOLLM2_RUNS = 2  # a set; no two have the same rate, rank, batch, schedule or bits
SMOLLM2_RATES, SMOLLM2_RANKS, SMOLLM2_BATCHES = (1e-4, 3e-4, 1e-3), (8, 16, 32), (4, 8)
SMOLLM2_BITS = (4, 32)  # bfloat16 is several times slower than float32 on a CPU without instructions for it
BUDGETS = {  # base: rows seen in a run, fewest and most epochs
    "embedded": (ROWS_SEEN, 4, 20),
    "larger": (ROWS_SEEN // 4, 3, 6),
    "smollm2": (250, 3, 6),  # about ten minutes on one core
}
TWICE_SHADOWED = (
    "portraits",
    "stills",
)  # image sets with two runs beside which shadows are trained; the others have one


@dataclass(frozen=True)
class RunSpec:
    """One run. model: "text" or "image". base: "embedded", "larger" or "smollm2". purpose: "record"
    (every signal), "shadow" (the same run with shadow adapters beside it) or "validation" (10% of
    the training examples held out as a person would)."""

    name: str
    model: str
    dataset: str
    kind: str
    half: str
    purpose: str
    base: str
    learning_rate: float
    rank: int
    batch: int
    schedule: str
    bits: int
    seed: int
    epochs: int
    repeats: int = 1
    trains_text_encoder: bool = False

    def settings(self):
        return asdict(self)


def spread(levels, count, generator):
    """`count` values, each level as often as the others as far as that goes, in random order."""
    values = [levels[index % len(levels)] for index in range(count)]
    generator.shuffle(values)
    return values


def text_epochs(examples, rate, base, purpose):
    rows, shortest, longest = BUDGETS[base]
    if purpose == "shadow":
        rows, shortest, longest = ROWS_SEEN_WITH_SHADOWS, 2, 12
    epochs = min(longest, max(shortest, round(rows / examples)))
    return max(shortest, round(0.6 * epochs)) if rate == RATES[-1] else epochs


def with_validation(spec):
    """The run, and where it has shadows the same run with validation the usual way."""
    yield spec
    if spec.purpose == "shadow":
        yield replace(spec, name=f"{spec.name}-validation", purpose="validation")


def text_runs():
    for dataset, (kind, half, examples) in TEXT_SETS.items():
        bases = (("embedded", SMALL_RUNS, RATES, 2), ("larger", LARGER_RUNS, RATES[1:3], 0))
        if half == "new":
            bases = (("embedded", NEW_SMALL_RUNS, RATES, 2),)
        for base, count, rates, shadowed in bases:
            if base == "larger" and examples > LARGEST_SET:
                continue
            generator = random.Random(f"{dataset}/{base}")
            factors = zip(
                *(spread(levels, count, generator) for levels in (rates, RANKS, BATCHES, SCHEDULES, BITS, SEEDS))
            )
            for index, (rate, rank, batch, schedule, bits, seed) in enumerate(factors):
                purpose = "shadow" if index < shadowed else "record"
                epochs = text_epochs(examples, rate, base, purpose)
                facts = (kind, half, purpose, base, rate, rank, batch, schedule, bits, seed, epochs)
                yield from with_validation(RunSpec(f"text-{dataset}-{base}-{index}", "text", dataset, *facts))


def smollm2_runs():
    levels = (SMOLLM2_RATES, SMOLLM2_RANKS, SMOLLM2_BATCHES, SCHEDULES, SMOLLM2_BITS, SEEDS)
    for dataset in SMOLLM2_SETS:
        kind, half, examples = TEXT_SETS[dataset]
        generator = random.Random(f"{dataset}/smollm2")
        factors = zip(*(generator.sample(values, SMOLLM2_RUNS) for values in levels))
        for index, (rate, rank, batch, schedule, bits, seed) in enumerate(factors):
            epochs = text_epochs(examples, rate, "smollm2", "record")
            facts = (kind, half, "record", "smollm2", rate, rank, batch, schedule, bits, seed, epochs)
            yield RunSpec(f"text-{dataset}-smollm2-{index}", "text", dataset, *facts)


def image_runs():
    for dataset, (kind, half, pictures) in IMAGE_SETS.items():
        generator = random.Random(dataset)
        levels = (RATES[:3], (4, 32), (2, 4), SCHEDULES, SEEDS, (2, 10), (False, True))
        factors = zip(*(spread(values, IMAGE_RUNS, generator) for values in levels))
        shadowed = 2 if dataset in TWICE_SHADOWED else 1
        for index, (rate, rank, batch, schedule, seed, repeats, text) in enumerate(factors):
            purpose = "shadow" if index < shadowed else "record"
            epochs = max(5, round(PICTURES_SEEN / (pictures * repeats)))
            facts = (kind, half, purpose, "embedded", rate, rank, batch, schedule, 32, seed, epochs, repeats, text)
            yield from with_validation(RunSpec(f"image-{dataset}-{index}", "image", dataset, *facts))


RUNS = {spec.name: spec for spec in [*text_runs(), *smollm2_runs(), *image_runs()]}


def data_folder(spec):
    """The folder of a run's data set: `dataset/` of the project, or one of the sets beside this
    file."""
    bundled = ROOT / "dataset" / spec.dataset
    return bundled if bundled.is_dir() else HERE / f"{spec.model}_sets" / spec.dataset


def trace_path(spec, anew=False):
    return (TRACES_ANEW if anew else TRACES) / f"{spec.name}.jsonl.gz"

"""Where early stopping goes into a trainer, found by structure: no line of any trainer is needed to
know the place.

Each point is a function that looks at the parsed file and gives the places that fit, as (line,
indentation, names): the new lines go after `line`. A point must fit exactly once. The patch files
of the known revisions hold what these points give there (a test compares the two), so a revision
that nobody has seen is treated like one that somebody has.
"""

import ast
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple

HOOK = "es_lora_hook"


class InsertionPointError(ValueError):
    """A point of the trainer does not exist, or exists more than once."""


@dataclass(frozen=True)
class Place:
    """New lines go after `line` (1-based; 0: before the first), indented by `indentation`
    spaces."""

    line: int
    indentation: int
    names: Dict[str, str]  # what the trainer calls the values that the new lines use


@dataclass(frozen=True)
class Point:
    name: str
    description: str
    find: Callable[[ast.Module], List[Place]]
    lines: Sequence[str]


@dataclass(frozen=True)
class Insertion:
    """Ready lines, without line ends, to stand after `after_line` of the file as it is."""

    point: str
    after_line: int
    lines: Tuple[str, ...]


def _called(node: ast.AST) -> str:
    """The name of what an expression statement (or an assignment) calls: "f" for f(...),
    x.f(...)."""
    value = getattr(node, "value", None)
    function = getattr(value, "func", None)
    return getattr(function, "attr", getattr(function, "id", ""))


def _after(node: ast.stmt, **names: str) -> Place:
    return Place(node.end_lineno, node.col_offset, names)


def _before(node: ast.stmt, **names: str) -> Place:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return Place(first - 1, node.col_offset, names)


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def _imports(tree: ast.Module) -> List[Place]:
    found = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return [_after(found[-1])] if found else []


# --------------------------------------------------------------------------------------- sd-scripts


def _steps(tree: ast.Module) -> Iterator[Tuple[ast.FunctionDef, List[ast.For], ast.AugAssign]]:
    """(function, the loops around it, statement) of each `global_step += 1` under a test of
    `sync_gradients`."""

    def walk(node, function, loops, synchronised):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield from walk(child, child, [], False)
            elif isinstance(child, ast.For):
                yield from walk(child, function, [*loops, child], synchronised)
            elif isinstance(child, ast.If):
                tested = any(getattr(part, "attr", "") == "sync_gradients" for part in ast.walk(child.test))
                yield from walk(child, function, loops, synchronised or tested)
            else:
                advances = isinstance(child, ast.AugAssign) and isinstance(child.op, ast.Add)
                if advances and getattr(child.target, "id", "") == "global_step" and synchronised and len(loops) == 2:
                    yield function, loops, child
                yield from walk(child, function, loops, synchronised)

    return walk(tree, None, [], False)


def _parser_return(tree: ast.Module) -> List[Place]:
    found = []
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.name in ("setup_parser", "setup_parser_common"):
            returns = [node for node in function.body if isinstance(node, ast.Return)]
            found += [_before(node, parser=node.value.id) for node in returns if isinstance(node.value, ast.Name)]
    return found


def _after_resume(tree: ast.Module) -> List[Place]:
    found = []
    for function in {step[0] for step in _steps(tree)}:
        calls = [node for node in ast.walk(function) if _called(node) == "resume_from_local_or_hf_if_specified"]
        found += [_after(node) for node in calls if isinstance(node, ast.Expr)]
    return found


def _after_step(tree: ast.Module) -> List[Place]:
    return [_after(statement, step=statement.target.id) for _, _, statement in _steps(tree)]


def _loop_end(which: int) -> Callable[[ast.Module], List[Place]]:
    def find(tree: ast.Module) -> List[Place]:
        loops = {id(step[1][which]): step[1][which] for step in _steps(tree)}
        return [_after(loop.body[-1]) for loop in loops.values()]

    return find


def _before_epochs(tree: ast.Module) -> List[Place]:
    loops = {id(step[1][0]): step[1][0] for step in _steps(tree)}
    return [_before(loop) for loop in loops.values()]


def _last_save(tree: ast.Module) -> List[Place]:
    found = []
    for function, loops, _ in _steps(tree):
        for node in ast.walk(function):
            after_the_loops = isinstance(node, ast.Expr) and node.lineno > loops[0].end_lineno
            if after_the_loops and _called(node) == "save_model" and len(node.value.args) == 4:
                _, network, steps, epochs = (getattr(argument, "id", None) for argument in node.value.args)
                if network and steps and epochs:
                    found.append(_before(node, network=network, steps=steps, epochs=epochs))
    return found


IMPORT = Point("import", "after the last import", _imports, (f"import {HOOK}",))
START = (f"es_lora = {HOOK}.start(args, accelerator, network, optimizer, train_dataloader)",)
LOOP_ENDS = (
    Point("inner loop", "at the end of the loop over batches", _loop_end(1), ("if es_lora.stopped:", "    break")),
    Point("outer loop", "at the end of the loop over epochs", _loop_end(0), ("if es_lora.stopped:", "    break")),
)
STEP = Point(
    "step",
    "after global_step is advanced, inside the sync_gradients branch",
    _after_step,
    ("es_lora.after_step(accelerator, {step}, loss)",),
)
NETWORK_LOOP = (
    STEP,
    *LOOP_ENDS,
    Point(
        "last save",
        "before the last save_model, after the loops",
        _last_save,
        ("{steps}, {epochs} = es_lora.before_last_save(save_model, {network}, metadata, {steps}, {epochs})",),
    ),
)
NETWORK_FLAGS = Point(
    "flags", "before setup_parser returns its parser", _parser_return, (f"{HOOK}.add_arguments({{parser}})",)
)
AFTER_RESUME = Point(
    "monitor", "after a saved state is resumed (resume_from_local_or_hf_if_specified)", _after_resume, START
)
SD_SCRIPTS = (IMPORT, AFTER_RESUME, *NETWORK_LOOP, NETWORK_FLAGS)

# ------------------------------------------------------------------------------------- musubi-tuner

# Its states are resumed outside the function that trains.
MUSUBI_LOOP = (IMPORT, Point("monitor", "before the loop over epochs", _before_epochs, START), *NETWORK_LOOP)
MUSUBI_FLAGS = (IMPORT, NETWORK_FLAGS)

# -------------------------------------------------------------------- diffusers' DreamBooth scripts


UNKNOWN = "?"


def _before_parsing(tree: ast.Module) -> List[Place]:
    """Before the first statement of parse_args that asks its parser for the arguments."""
    found = []
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.name == "parse_args":
            for statement in function.body:
                calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
                parsers = [call.func.value.id for call in calls if getattr(call.func, "attr", "") == "parse_args"]
                if parsers:
                    found.append(_before(statement, parser=parsers[0]))
                    break
    return found


def _after_the_loops(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements of the training function's body that follow its loop over epochs."""
    for function, loops in {id(f): (f, loops) for f, loops, _ in _steps(tree)}.values():
        yield from (statement for statement in function.body if statement.lineno > loops[0].end_lineno)


def _before_collecting(tree: ast.Module) -> List[Place]:
    """After the processes have waited for each other, before the weights are collected."""
    return [_after(statement) for statement in _after_the_loops(tree) if _called(statement) == "wait_for_everyone"]


def _lora_save(tree: ast.Module) -> List[Place]:
    """Before PIPELINE.save_lora_weights, with its arguments but for the folder."""
    found = []
    for statement in _after_the_loops(tree):
        for node in ast.walk(statement):
            if isinstance(node, ast.Expr) and _called(node) == "save_lora_weights":
                given = [keyword for keyword in node.value.keywords if keyword.arg != "save_directory"]
                layers = ", ".join(f"{keyword.arg}={_plain(keyword.value)}" for keyword in given if keyword.arg)
                more = "".join(f", **{_plain(keyword.value)}" for keyword in given if not keyword.arg)
                names = {"pipeline": _plain(node.value.func.value), "layers": layers + more}
                found += [] if UNKNOWN in "".join(names.values()) else [_before(node, **names)]
    return found


def _plain(node: ast.AST) -> str:
    """The text of a name, or of a call with names; UNKNOWN for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call) and not node.keywords:
        return f"{_plain(node.func)}({', '.join(map(_plain, node.args))})"
    return UNKNOWN


DIFFUSERS_HOOK = "es_lora_diffusers_hook"
DIFFUSERS = (
    Point("import", "after the last import", _imports, (f"import {DIFFUSERS_HOOK}",)),
    Point("flags", "before parse_args parses", _before_parsing, (f"{DIFFUSERS_HOOK}.add_arguments({{parser}})",)),
    Point(
        "monitor",
        "before the loop over epochs",
        _before_epochs,
        (f"es_lora = {DIFFUSERS_HOOK}.start(args, accelerator, optimizer, train_dataloader, global_step)",),
    ),
    STEP,
    *LOOP_ENDS,
    Point(
        "kept weights",
        "after the loops, before the LoRA weights are collected",
        _before_collecting,
        ("es_lora.put_in_kept()",),
    ),
    Point(
        "last save",
        "before the last save_lora_weights",
        _lora_save,
        ("es_lora.save_others({pipeline}.save_lora_weights, {layers})",),
    ),
)

# -------------------------------------------------------------------------------------------- qlora


def _first_training_argument(tree: ast.Module) -> List[Place]:
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"]
    fields = [[node for node in found.body if isinstance(node, ast.AnnAssign)] for found in classes]
    return [_before(nodes[0]) for nodes in fields if nodes]


def _after_adapter_callback(tree: ast.Module) -> List[Place]:
    """After the statement of the function's body that registers SavePeftModelCallback, an `if`
    around it included."""
    found = []
    for function in _functions(tree):
        for statement in function.body:
            for node in ast.walk(statement):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_callback":
                    if [getattr(argument, "id", "") for argument in node.args] == ["SavePeftModelCallback"]:
                        found.append(_after(statement, trainer=getattr(node.func.value, "id", "trainer")))
    return found


def _checkpoint_variable(tree: ast.Module) -> List[Place]:
    """The callback's place, with the name of the folder that a previous run left
    (get_last_checkpoint)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and _called(node) == "get_last_checkpoint":
            target = node.targets[0].elts[0] if isinstance(node.targets[0], ast.Tuple) else node.targets[0]
            places = _after_adapter_callback(tree)
            return [Place(p.line, p.indentation, {**p.names, "checkpoint": target.id}) for p in places]
    return []


QLORA_FIELDS = (
    ("calculate_cs", "bool"),
    ("early_stop", "bool"),
    ("cs_interval", "str"),
    ("window_size", "str"),
    ("stop_rule", "str"),
    ("valley", "int"),
    ("rule_value", "float"),
    ("cs_reduction", "str"),
    ("cs_component", "str"),
    ("average", "str"),
    ("snapshot_disk_gb", "float"),
)

QLORA = (
    Point("import", "after the last import", _imports, (f"import {HOOK}",)),
    Point(
        "flags",
        "first in TrainingArguments",
        _first_training_argument,
        tuple(f"{name}: {kind} = {HOOK}.training_argument({name!r})" for name, kind in QLORA_FIELDS),
    ),
    Point(
        "callback",
        "after SavePeftModelCallback is registered",
        _checkpoint_variable,
        (f"{HOOK}.add_callback({{trainer}}, {{checkpoint}})",),
    ),
)

MUSUBI = {"trainer_base.py": MUSUBI_LOOP, "parser_common.py": MUSUBI_FLAGS}  # until v0.2 it was one file


def points_of(upstream: str, file_name: str) -> Tuple[Point, ...]:
    """The points of one of an upstream's files."""
    if upstream == "musubi-tuner":
        return MUSUBI.get(file_name.split("/")[-1], (*MUSUBI_LOOP, NETWORK_FLAGS))
    return {"sd-scripts": SD_SCRIPTS, "qlora": QLORA, "diffusers": DIFFUSERS}[upstream]


def find_insertions(upstream: str, file_name: str, source: str) -> List[Insertion]:
    """All insertions into a trainer's source, in the order of its lines.

    Raises InsertionPointError, naming every point that is missing or found more than once, and
    where.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise InsertionPointError(f"{file_name} cannot be read by this Python: {error}") from error
    problems, insertions = [], []
    points = points_of(upstream, file_name)
    for point in points:
        places = list(dict.fromkeys((p.line, p.indentation, tuple(sorted(p.names.items()))) for p in point.find(tree)))
        if len(places) == 1:
            line, indentation, names = places[0]
            lines = (" " * indentation + text.format(**dict(names)) for text in point.lines)
            insertions.append(Insertion(point.name, line, tuple(lines)))
        else:
            where = f"found {len(places)} times, at lines {[p[0] for p in places]}" if places else "not found"
            problems.append(f"{point.name} ({point.description}): {where}")
    problem = _missing_names(tree, NEEDED.get(upstream, ())) if not problems and LOOP_ENDS[0] in points else None
    if problem:
        problems.append(problem)
    if problems:
        raise InsertionPointError(f"{file_name}: " + "; ".join(problems))
    return sorted(insertions, key=lambda insertion: insertion.after_line)


NETWORK_NAMES = ("args", "accelerator", "network", "optimizer", "train_dataloader", "loss", "save_model", "metadata")
NEEDED = {
    "sd-scripts": NETWORK_NAMES,
    "musubi-tuner": NETWORK_NAMES,
    "diffusers": ("args", "accelerator", "optimizer", "train_dataloader", "global_step", "loss"),
}


def _missing_names(tree: ast.Module, needed: Sequence[str]) -> Optional[str]:
    """The inserted calls use variables of the training function; one that it does not have is a
    problem."""
    function = next(_steps(tree))[0]
    stored = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    stored |= {argument.arg for argument in function.args.args}
    stored |= {node.name for node in ast.walk(function) if isinstance(node, ast.FunctionDef)}
    missing = [name for name in needed if name not in stored]
    return f"variables {', '.join(missing)} of the training function: not found" if missing else None

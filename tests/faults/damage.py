"""Ways to damage a file or a value, drawn by a generator."""

import json
import shutil

# What no number of a setting is.
NO_NUMBERS = ("nan", "inf", "-inf", "1e999", "-1e999", "abc", "", "9" * 400, "0x10", "1,5", "--", "None", "[1]")
NO_VALUES = (float("nan"), float("inf"), -1, -(10**30), 10**30, "x", "", [1], {"a": 1}, None, [], "1e999", True)
REFUSED, EITHER = "refused", "either"


def half(path, generator):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path, generator):
    path.write_bytes(b"")


def gone(path, generator):
    path.unlink()


def a_folder(path, generator):
    path.unlink()
    path.mkdir()


def noise(path, generator):
    path.write_bytes(generator.randbytes(generator.choice((1, 7, 64, 4096))))


def flipped(path, generator):
    content = bytearray(path.read_bytes())
    for _ in range(generator.choice((1, 3, 20))):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(bytes(content))


def text_of_another_kind(path, generator):
    path.write_text(generator.choice(('{"a": 1}', "[]", "null", "[" * 20000, '{"a":' * 20000, "\x00\x00", "1e999")))


BREAKS = (half, empty, gone, a_folder, noise)  # nothing of the file is left to use
BENDS = (flipped, text_of_another_kind)  # something may be


def damaged(path, generator):
    """Damage a file; what is expected of a program that needs it: REFUSED or EITHER."""
    how = generator.choice((*BREAKS, *BENDS))
    how(path, generator)
    return how.__name__, (REFUSED if how in BREAKS else EITHER)


def bent_json(path, generator):
    """Give one field of a JSON file, or of one line of it, a value of another kind."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    place = generator.randrange(len(lines))
    value = json.loads(lines[place])
    inside = value
    while isinstance(inside, dict) and inside and generator.random() < 0.6:
        key = generator.choice(sorted(inside))
        if not isinstance(inside[key], dict) or generator.random() < 0.5:
            break
        inside = inside[key]
    if isinstance(inside, dict) and inside:
        key = generator.choice(sorted(inside))
        if generator.random() < 0.3:
            del inside[key]
        else:
            inside[key] = generator.choice(NO_VALUES)
    lines[place] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")


def bent_tensors(path, generator):
    """Take half of a LoRA's tensors, give them foreign names, other shapes or NaN: all unusable."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(path))
    names = sorted(name for name in tensors if tensors[name].ndim > 1)
    how = generator.choice(("half", "foreign", "shape", "nan"))
    chosen = generator.choice(names)
    if how == "half":
        tensors = {name: tensor for name, tensor in tensors.items() if name not in names[::2]}
    elif how == "foreign":
        tensors = {f"nobody.{name}": tensor for name, tensor in tensors.items()}
    elif how == "shape":
        tensors[chosen] = torch.zeros(tensors[chosen].shape[0] + 1, *tensors[chosen].shape[1:])
    else:
        tensors[chosen][0] = float("nan")
    save_file(tensors, str(path))
    return how


def copied(source, target):
    """A copy of a folder that may be damaged; it takes the place of an earlier one."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target

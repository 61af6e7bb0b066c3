"""How every program of this tree ends: one message for faults of input, a traceback for our own."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

BAD_INPUT, OWN_FAULT, INTERRUPTED = 2, 1, 130
TREE = Path(__file__).resolve().parents[1]
# What a module that is missing is called where packages are installed.
PACKAGES = {"cv2": "opencv-python-headless", "PIL": "pillow", "skimage": "scikit-image", "yaml": "pyyaml"}
OUT_OF_MEMORY = "out of memory"
SAVE_MEMORY = "lower --train_batch_size or --resolution, or add --gradient_checkpointing or --mixed_precision"


def ended(program: str, work: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code of work(): its own, or that of an exception, which is told on stderr.

    program: begins each line. interrupted: what is said after Ctrl-C."""
    try:
        return work()
    except KeyboardInterrupt:
        return say(program, interrupted, INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name is None or _is_own(error.name.partition(".")[0]):
            return own_fault(program)
        return say(program, missing_package(error.name), BAD_INPUT)
    except (ValueError, OSError) as error:
        return say(program, str(error), BAD_INPUT)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and OUT_OF_MEMORY not in str(error).lower():
            return own_fault(program)
        reason = (str(error).strip() or "of the machine").splitlines()[0]
        return say(program, f"{OUT_OF_MEMORY}: {SAVE_MEMORY} ({reason})", BAD_INPUT)
    except Exception:
        return own_fault(program)


def say(program: str, message: str, exit_code: int) -> int:
    """The message on stderr, the program before each line; -> the exit code."""
    for line in message.splitlines() or [""]:
        print(f"{program}: {line}", file=sys.stderr)
    return exit_code


def own_fault(program: str) -> int:
    """The traceback of the exception that is handled, and whose fault it is."""
    traceback.print_exc()
    return say(program, "this is a fault of the program, not of your input: please report the lines above", OWN_FAULT)


def missing_package(module: str) -> str:
    """How to install a package that is not there: with the others of its list, or alone."""
    package = PACKAGES.get(module.partition(".")[0], module.partition(".")[0])
    lists = {
        TREE / "requirements-extras.txt": "-r lora-ldm/requirements-extras.txt",
        TREE.parent / "requirements-ldm.txt": "-r requirements-ldm.txt",
    }
    found = [words for file, words in lists.items() if file.is_file() and _lists(file, package)]
    return f"the package {package} is not installed: pip install {found[0] if found else package}"


def _is_own(module):
    return (TREE / module).exists() or (TREE / f"{module}.py").exists()


def _lists(file, package):
    lines = file.read_text(encoding="utf-8").lower().replace("_", "-").splitlines()
    return any(line.startswith(f"{package.lower().replace('_', '-')}==") for line in lines)

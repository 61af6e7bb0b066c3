"""How every program of this tree ends: one message for faults of input, a traceback for our own."""

from collections.abc import Callable
from pathlib import Path

from es_lora.command_line import fault_of_input, is_out_of_memory, reported

TREE = Path(__file__).resolve().parents[1]
# What a module that is missing is called where packages are installed.
PACKAGES = {"cv2": "opencv-python-headless", "PIL": "pillow", "skimage": "scikit-image", "yaml": "pyyaml"}
SAVE_MEMORY = "lower --train_batch_size or --resolution, or add --gradient_checkpointing or --mixed_precision"


def ended(program: str, work: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code of work(), or that of an exception, which is told on stderr.

    program: begins each line. interrupted: what is said after Ctrl-C."""
    return reported(program, work, interrupted, _of_input)


def _of_input(error):
    """As fault_of_input; missing packages and memory that is used up come with this tree's fix."""
    if isinstance(error, ModuleNotFoundError):
        own = error.name is None or _is_own(error.name.partition(".")[0])
        return None if own else missing_package(error.name)
    if is_out_of_memory(error) or "can't allocate memory" in str(error):  # torch's words on a CPU
        return f"out of memory: {SAVE_MEMORY} ({(str(error).strip() or 'of the machine').splitlines()[0]})"
    return fault_of_input(error)


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

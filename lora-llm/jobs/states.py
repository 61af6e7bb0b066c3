"""Which saved states of the jobs belong together: those of one round, named by one small file.

Rows of several jobs share a pass, and the last bits of a job's sums depend on its company. So a
resumed run begins at one round for all jobs, and what had ended after that round ends once more."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from es_lora.files import read_text, write_text_whole
from es_lora.inputs.json_text import parsed_json
from es_lora.snapshots import SNAPSHOT_FOLDER, clear_snapshots

ROUND_NAME = "states.json"  # in the output folder; of further processes 1-states.json, ...
STATE_NAME = "job_state.json"  # in a state's folder, written last: where it is, the state is whole


@dataclass
class SavedRound:
    """A round that a run can go on from.

    active: {job: number of its state}. ended: jobs whose results count. random: the state of
    torch's generator. passes: what the passes of a round are cut by, to be compared."""

    active: dict[str, int] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    random: list[int] = field(default_factory=list)
    passes: dict[str, Any] = field(default_factory=dict)

    def write(self, output_dir: Path, process: int) -> None:
        write_text_whole(output_dir / _name(process), json.dumps(asdict(self)))


def _name(process: int) -> str:
    return f"{process}-{ROUND_NAME}" if process else ROUND_NAME


def read_round(output_dir: Path, process: int) -> Optional[SavedRound]:
    """The round that the run in a folder goes on from, None where no process has saved one.

    Jobs are those of all processes; random and passes those of this one, or of the first.
    Raises ValueError where a file of them is damaged."""
    files = sorted(output_dir.glob(f"*{ROUND_NAME}"))
    if not files:
        return None
    rounds = {file.name: _read(file) for file in files}
    own = rounds.get(_name(process)) or rounds[files[0].name]
    together = SavedRound(random=own.random, passes=own.passes)
    for saved in rounds.values():
        for job, number in saved.active.items():
            if is_whole_state(state_folder(output_dir / job, number)):
                together.active[job] = max(number, together.active.get(job, 0))
        together.ended += saved.ended
    together.ended = [job for job in dict.fromkeys(together.ended) if job not in together.active]
    return together


def _read(file: Path) -> SavedRound:
    try:
        values = parsed_json(read_text(file))
        saved = SavedRound(**values)
        if not all(isinstance(number, int) for number in saved.active.values()):
            raise ValueError("its states have no numbers")
        return saved
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); delete it to go on from the newest state of every job"
        ) from error


def earlier_round(output_dir: Path, jobs: Iterable[str], results: str) -> SavedRound:
    """What an earlier version left without such a file: the newest whole state of every job."""
    found = SavedRound()
    for job in jobs:
        whole = [folder for folder in state_folders(output_dir / job) if is_whole_state(folder)]
        if (output_dir / job / results).is_file():
            found.ended.append(job)
        elif whole:
            found.active[job] = state_number(whole[-1])
    return found


def state_folder(folder: Path, number: int) -> Path:
    return folder / f"state-{number}"


def state_number(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def is_whole_state(folder: Path) -> bool:
    return (folder / STATE_NAME).is_file()


def state_folders(folder: Path) -> list[Path]:
    """Folders of a job's saved states, whole or not, oldest first."""
    numbered = [path for path in folder.glob("state-*") if path.name.split("-", 1)[1].isdecimal()]
    return sorted(numbered, key=state_number)


def forget_states(folder: Path, but: Optional[Path] = None) -> None:
    """Delete the states of a job, all but one."""
    for state in state_folders(folder):
        if state != but:
            shutil.rmtree(state)


def clear_ended(folder: Path) -> None:
    """Delete what a kill after the end of a job has left in its folder."""
    forget_states(folder)
    clear_snapshots(folder / SNAPSHOT_FOLDER)


def last_state(output_dir: Path) -> str:
    """What is said of the states of a run that the machine has ended; empty where it has none."""
    try:
        saved = read_round(output_dir, 0)
    except ValueError:
        saved = None
    if saved is None or not (saved.active or saved.ended):
        return ""
    places = [str(state_folder(output_dir / job, number)) for job, number in saved.active.items()]
    told = f"{', '.join(places[:3])}{', ...' if len(places) > 3 else ''}" if places else "between two jobs"
    return f"The last whole state is {told}; {len(saved.ended)} jobs have ended before it."

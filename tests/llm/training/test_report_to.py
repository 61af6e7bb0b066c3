"""--report_to: which logs are accepted, and that CS reaches each of them under its published
names."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from es_lora_llm import main

from training.trainer import LoraTrainer

PROGRAM = Path(__file__).resolve().parents[3] / "lora-llm" / "es_lora_llm.py"


def flags(base, files, output, *more):
    return [
        *(
            "--model_name_or_path",
            str(base),
            "--dataset",
            str(files["train"]),
            "--output_dir",
            str(output),
            "--bits",
            "32",
        ),
        *("--lora_r", "4", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--use_cpu"),
        *("--cs_interval", "1", "--window_size", "2", "--save_strategy", "no", "--max_steps", "8", *more),
    ]


def test_a_log_that_is_unknown_or_not_installed_is_refused_before_the_base_is_loaded(
    random_base, text_files, tmp_path, capsys
):
    installed = {"mlflow", "clearml"} - set(
        __import__("transformers").integrations.get_available_reporting_integrations()
    )
    if not installed:
        pytest.skip("mlflow and clearml are both installed, so there is no log to miss")
    missing = sorted(installed)[0]
    assert (
        main(flags(random_base, text_files, tmp_path / "run", "--report_to", f"tensorboard,blackboard,{missing}")) == 2
    )
    said = capsys.readouterr().err
    assert (
        "--report_to blackboard: choose of" in said and f"--report_to {missing}: its package is not installed" in said
    )
    assert len(said.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("attribute", ["_wandb", "_trackio"])
def test_scalars_go_to_a_started_log_on_the_axis_of_the_other_scalars(attribute):
    class Board:
        def __init__(self, started):
            self._initialized, self.rows = started, []
            setattr(self, attribute, self)

        def log(self, row):
            self.rows.append(row)

    started, waiting = Board(True), Board(False)
    trainer = LoraTrainer.__new__(LoraTrainer)
    trainer.callback_handler = type("Handler", (), {"callbacks": [started, waiting]})()
    trainer.log_scalar("cs/steps", 0.25, 7)
    assert started.rows == [{"cs/steps": 0.25, "train/global_step": 7}]
    assert waiting.rows == []


LOGS = {"wandb": "wandb/offline-run-*/run-*.wandb", "trackio": "trackio/*.db*"}


def test_a_real_run_writes_cs_into_each_offline_log(random_base, text_files, tmp_path):
    names = [name for name in LOGS if importlib.util.find_spec(name)]
    if not names:
        pytest.skip("neither wandb nor trackio is installed; they are not needed to train")
    places = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    words = flags(random_base, text_files, tmp_path / "run", "--report_to", ",".join(names))
    command = [sys.executable, str(PROGRAM), *words]
    done = subprocess.run(command, env={**os.environ, **places, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in names:
        written = b"".join(file.read_bytes() for file in tmp_path.glob(LOGS[name]))
        assert b"cs/steps" in written and b"cs_fluctuation/step" in written, name

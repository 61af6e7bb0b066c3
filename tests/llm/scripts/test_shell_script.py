"""early_stop_lora_llm.sh: from any folder, from a path with blanks, with further flags that win
over its settings."""

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def run_script(tmp_path, *flags):
    place = tmp_path / "a folder with blanks"
    place.symlink_to(ROOT)
    command = ["bash", str(place / "early_stop_lora_llm.sh"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "base_model": "tiny"}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)


def test_the_settings_train_and_further_flags_win(tmp_path):
    done = run_script(tmp_path, "--max_steps", "3", "--learning_rate", "1e-4", "--output_dir", str(tmp_path / "my run"))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "my run" / "result.json").read_text())
    assert result["last_step"] == 3
    assert result["settings"]["learning_rate"] == 1e-4 and result["settings"]["bits"] == 4
    assert "a folder with blanks" in result["settings"]["model_name_or_path"]
    assert (tmp_path / "my run" / "report.html").is_file()
    assert done.stdout.strip().splitlines()[-1].startswith("try it: ")


def test_a_mistake_ends_the_script_with_the_trainers_code(tmp_path):
    done = run_script(tmp_path, "--lernrate", "1")
    assert done.returncode == 2
    assert "--lernrate is unknown" in done.stderr

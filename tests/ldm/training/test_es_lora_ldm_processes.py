"""Runs in processes of their own: interruption, a kill at any time, and two processes that stop
together."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from ldm_runs import TREE, command, history_of, result_of, run, words
from two_processes import in_two_processes

from network.lora_file import load_lora

SETTINGS = dict(calculate_cs=True, cs_interval=1, network_dropout=0.1)


def start(arguments, log):
    return subprocess.Popen(arguments, stdout=open(log, "w"), stderr=subprocess.STDOUT)


def wait_for(condition, process, seconds=240):
    """Wait until condition() holds, as long as the process lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < end, "the run did not get that far"
        time.sleep(0.05)


def same_weights(one, other):
    one, other = load_lora(one)[0], load_lora(other)[0]
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_interrupted_run_saves_its_state_and_says_how_to_go_on(base, images, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(command(base, images, out, **SETTINGS, max_train_steps=5000), log)
    wait_for(lambda: (out / "cs_history.jsonl").exists() and len(history_of(out)) >= 4, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=240) == 130
    text = log.read_text()
    assert "everything needed to go on is saved" in text and "Carry on with:" in text
    (state,) = out.glob("lora-step*-state")
    assert f"--resume {state}" in text or state.name in text
    result = result_of(out)
    assert result["outcome"] == "interrupted" and result["exit_code"] == 130
    steps = result["last_step"] + 2
    assert run(base, images, tmp_path / "whole", **SETTINGS, max_train_steps=steps) == 0
    assert run(base, images, out, **SETTINGS, max_train_steps=steps, resume=str(state)) == 0
    assert same_weights(out / "lora.safetensors", tmp_path / "whole/lora.safetensors")
    assert history_of(out) == history_of(tmp_path / "whole")


def test_killed_run_goes_on_from_its_last_state(base, images, tmp_path):
    out = tmp_path / "out"
    settings = {**SETTINGS, "save_every_n_steps": 3, "save_state": True}
    process = start(command(base, images, out, **settings, max_train_steps=5000), tmp_path / "log")
    wait_for(lambda: len(list(out.glob("lora-step*-state"))) >= 2, process)
    process.kill()
    process.wait()
    state = sorted(out.glob("lora-step*-state"))[-1]
    steps = int(state.name.removeprefix("lora-step").removesuffix("-state")) + 2
    assert run(base, images, out, **settings, max_train_steps=steps, resume=str(state)) == 0
    assert run(base, images, tmp_path / "whole", **settings, max_train_steps=steps) == 0
    assert same_weights(out / "lora.safetensors", tmp_path / "whole/lora.safetensors")
    assert history_of(out) == history_of(tmp_path / "whole")


RANKS = """
import sys
sys.path.insert(0, {tree!r})
import torch
from settings.parsing import parse_arguments
from training.loop import train
from training.results import finish
from training.setup import set_up
run = set_up(parse_arguments(sys.argv[2:]))
ending = train(run)
weights = torch.cat([weight.detach().flatten() for weight in run.network.parameters()])
shadows = {{name: value for name, value in run.shadows.training.state_tensors().items() if name != "measurements"}}
facts = {{"step": run.progress.step, "outcome": ending.name, "weights": weights, "shadows": shadows}}
torch.save(facts, f"{{sys.argv[1]}}/{{run.processes.rank}}.pt")
finish(run, ending)
"""


def test_two_processes_share_gradients_and_stop_together(base, images, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(tree=str(TREE)))
    flags = words(
        base, images, tmp_path / "out", early_stop=True, window_size=3, cs_interval=1, max_train_steps=40,
        train_batch_size=1,
        shadows=1,
    )  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    finished = subprocess.run(
        [*launch, str(script), str(tmp_path), *flags], timeout=400, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[:3000]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["outcome"] == two["outcome"] == "stopped_early" and one["step"] == two["step"] < 40
    assert torch.equal(one["weights"], two["weights"])
    assert all(torch.equal(one["shadows"][name], two["shadows"][name]) for name in two["shadows"])
    result = result_of(tmp_path / "out")
    assert result["last_step"] == one["step"] and Path(tmp_path / "out/lora.safetensors").exists()
    header = (tmp_path / "out/cs_history.jsonl").read_text().splitlines()[0]
    assert '"steps_per_epoch": 3' in header  # six pictures, two processes


def test_processes_with_different_captions_are_told_before_the_first_step(base, images, tmp_path):
    others = tmp_path / "others"
    shutil.copytree(images, others)
    next(others.rglob("*.txt")).write_text("another caption")
    script = str(TREE / "es_lora_ldm.py")
    mine, theirs = (words(base, folder, tmp_path / "out", **SETTINGS) for folder in (images, others))
    for code, said in in_two_processes([script, *mine], [script, *theirs]):
        assert code == 2 and "the processes do not have the same training pictures and captions" in said
        assert "Traceback" not in said
    assert not (tmp_path / "out" / "cs_history.jsonl").exists()


def test_a_process_that_dies_is_one_message_on_the_other(base, images, tmp_path):
    flags = words(base, images, tmp_path / "out", **SETTINGS, max_train_steps=20, train_batch_size=1)
    dies = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import es_lora_ldm as program\n"
        "from training.loop import Loop\n"
        "backward = Loop.backward\n"
        "def dying(self, batches):\n"
        "    if self.run.progress.step == 3: os._exit(9)\n"
        "    return backward(self, batches)\n"
        "Loop.backward = dying\n"
        "sys.exit(program.main(sys.argv[2:]))"
    )
    (code, said), (died, _) = in_two_processes([str(TREE / "es_lora_ldm.py"), *flags], ["-c", dies, str(TREE), *flags])
    assert died == 9 and code == 1 and "Traceback" not in said
    told = [line for line in said.splitlines() if line.startswith("es_lora_ldm:")]
    assert len(told) == 1 and "another process of this run has ended" in told[0]

"""A job that fails, in its data, its step or its end, ends alone: it is listed with the reason, and
the others are trained as if it had not been there."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from multi_lora import main, train_jobs
from safetensors.torch import load_file, save_file

from jobs.config import Job
from jobs.run import JobRun


def job(name, data, **values):
    return Job(name, dataset=str(data), **{"rank": 4, "batch_size": 4, "accumulation": 1, "max_steps": 3, **values})


def weights(folder):
    return load_file(str(folder / "adapter" / "adapter_model.safetensors"))


def trained(jobs, base, output):
    said = []
    overview = train_jobs(jobs, base, output, bits=32, use_cpu=True, say=said.append)
    return {result["name"]: result for result in overview["jobs"]}, "\n".join(said)


def test_a_job_beyond_the_positions_is_refused_and_the_other_is_trained(base_with_a_table, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"input": "word " * 90, "output": "answer " * 90}) + "\n")
    (tmp_path / "short.jsonl").write_text(json.dumps({"input": "q", "output": "a"}) + "\n")
    jobs = "".join(f'[[jobs]]\nname = "{name}"\ndataset = "{name}.jsonl"\n' for name in ("long", "short"))
    (tmp_path / "jobs.toml").write_text(f"[defaults]\nmax_steps = 2\nrank = 4\n{jobs}")
    flags = ["--base_model", str(base_with_a_table), "--config", str(tmp_path / "jobs.toml"), "--bits", "32"]
    assert main([*flags, "--output_dir", str(tmp_path / "out"), "--use_cpu"]) == 2
    assert "long: not trained: " in (told := capsys.readouterr().out) and "the base has 64 positions" in told
    assert (tmp_path / "out" / "short" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("where", ["take", "finish", "score_start"])
def test_a_failure_of_one_job_ends_no_other(random_base, text_files, tmp_path, monkeypatch, where):
    jobs = [job("good", text_files["train"]), job("bad", text_files["train"])]
    alone, _ = trained(jobs[:1], random_base, tmp_path / "alone")
    usual = getattr(JobRun, where)

    def failing(self, *args, **kwargs):
        if self.job.name == "bad":
            raise ValueError("its data is broken")
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(JobRun, where, failing)
    results, said = trained(jobs, random_base, tmp_path / "both")
    assert results["bad"]["outcome"] == "refused" and results["bad"]["reason"] == "its data is broken"
    assert "bad: not trained: its data is broken" in said and results["good"]["outcome"] == "no_turning_point"
    kept = weights(tmp_path / "both" / "good")
    assert all(
        torch.allclose(kept[name], value, atol=1e-6) for name, value in weights(tmp_path / "alone" / "good").items()
    )


def test_a_pass_that_fails_for_one_job_is_run_again_for_each(random_base, text_files, tmp_path, monkeypatch):
    """The base fails on the longer rows: a job with a token that it has not."""
    from jobs import loop

    collate = loop.collate

    def out_of_range(examples, pad_id):
        batch = collate(examples, pad_id)
        if any(example in bad for example in examples):
            batch["input_ids"][0, 0] = 10**6
        return batch

    bad = []
    usual = JobRun.micro_batch

    def noted(self):
        batch = usual(self)
        if self.job.name == "bad":
            bad.extend(batch)
        return batch

    monkeypatch.setattr(loop, "collate", out_of_range)
    monkeypatch.setattr(JobRun, "micro_batch", noted)
    jobs = [job("good", text_files["heldout"]), job("bad", text_files["train"])]
    results, said = trained(jobs, random_base, tmp_path / "out")
    assert results["good"]["outcome"] != "refused" and results["bad"]["outcome"] == "refused"
    assert "bad: not trained" in said and weights(tmp_path / "out" / "good")


def test_cuts_and_rows_without_a_learnt_token_are_told_with_the_name_of_the_job(random_base, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input": "q", "output": "answer " * 40}) + "\n")
    _, said = trained([job("notes", tmp_path / "rows.jsonl", target_max_len=8)], random_base, tmp_path / "out")
    assert "notes: Cut off: 1 of 1 training answers after 8 tokens." in said and "raise target_max_len" in said


def test_held_out_rows_of_a_job_are_cut_as_its_own_and_counted(random_base, text_files, tmp_path):
    jobs = [job("notes", text_files["train"], eval_dataset=str(text_files["heldout"]), source_max_len=4)]
    results, said = trained(jobs, random_base, tmp_path / "out")
    assert "held-out prompts after 4 tokens" in said and results["notes"]["heldout"]["last"] is not None


# ------------------------------------------------------------------------------- several processes

# Names of jobs: where each fails, and in which of the two processes.
FAILING = ("take-1", "take-0", "_measure-0", "__init__-1", "collate-1", "finish-1", "finish-0")


def let_jobs_fail(index):
    """Let each job of FAILING fail in its place, if it is this process's."""
    for where in {name.split("-")[0] for name in FAILING} - {"collate"}:
        setattr(JobRun, where, _failing(getattr(JobRun, where), where, index))
    from jobs import loop

    usual, usual_batch, bad = loop.collate, JobRun.micro_batch, []

    def noted(self):
        batch = [replace(example) for example in usual_batch(self)]
        bad.extend(batch if self.job.name == f"collate-{index}" else ())
        return batch

    def collate(examples, pad_id):
        if any(example is other for example in examples for other in bad):
            raise ValueError("broken in collate")
        return usual(examples, pad_id)

    JobRun.micro_batch, loop.collate = noted, collate


def _failing(usual, where, index):
    def failing(self, *args, **kwargs):
        if (args[0].job if where == "__init__" else self.job).name == f"{where}-{index}":
            raise ValueError(f"broken in {where}")
        return usual(self, *args, **kwargs)

    return failing


def test_a_job_that_fails_in_one_of_two_processes_ends_alone_in_both(random_base, text_files, tmp_path):
    values = {"eval_dataset": str(text_files["heldout"]), "cs_interval": 1, "batch_size": 3}
    trained([job("good", text_files["train"], **values)], random_base, tmp_path / "alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    words = [*launcher, __file__, *map(str, (random_base, *text_files.values(), tmp_path / "out"))]
    paths = os.pathsep.join(str(Path(__file__).parents[3] / name) for name in ("lora-llm", "tests", "tests/llm"))
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for name in FAILING:
        reason = f"broken in {name.split('-')[0]}"
        assert done.stdout.count(f"{name}: not trained: {reason}") == 1
        assert json.loads((tmp_path / "out" / name / "failed.json").read_text())["reason"] == reason
    kept = weights(tmp_path / "out" / "good")
    alone = weights(tmp_path / "alone" / "good")
    assert all(torch.allclose(kept[name], value, atol=1e-5) for name, value in alone.items())


def one_of_two(base, train, heldout, output):
    let_jobs_fail(int(os.environ["RANK"]))
    values = {"eval_dataset": heldout, "cs_interval": 1, "batch_size": 3}
    jobs = [job(name, train, **values) for name in ("good", *FAILING)]
    overview = train_jobs(jobs, base, output, bits=32, use_cpu=True, data_parallel=True)
    outcomes = {result["name"]: result["outcome"] for result in overview["jobs"]}
    assert outcomes.pop("good") != "refused" and set(outcomes.values()) == {"refused"}, outcomes
    torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------- states


def test_a_state_with_nan_is_refused_by_the_tensors_name_and_kept(random_base, text_files, tmp_path, monkeypatch):
    from jobs.loop import FusedTraining

    jobs = [job(name, text_files["train"]) for name in ("a", "b")]
    usual = FusedTraining._round

    def interrupted(self):
        usual(self)
        self._save_all()
        raise KeyboardInterrupt

    monkeypatch.setattr(FusedTraining, "_round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(jobs, random_base, tmp_path / "out")
    monkeypatch.setattr(FusedTraining, "_round", usual)
    state = tmp_path / "out/b/state-1/job_state.safetensors"
    tensors = load_file(state)
    name = next(name for name in sorted(tensors) if name.startswith("weight."))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, state)
    said = []
    overview = train_jobs(jobs, random_base, tmp_path / "out", bits=32, use_cpu=True, resume=True, say=said.append)
    results = {result["name"]: result for result in overview["jobs"]}
    assert name in results["b"]["reason"] and "holds NaN or infinity" in results["b"]["reason"]
    assert f"delete the folder {tmp_path / 'out/b'}" in results["b"]["reason"] and state.is_file()
    assert results["a"]["outcome"] != "refused" and weights(tmp_path / "out" / "a")


if __name__ == "__main__":
    one_of_two(*sys.argv[1:])

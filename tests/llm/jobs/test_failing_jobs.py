"""A job that fails, in its data, its step or its end, ends alone: it is listed with the reason, and
the others are trained as if it had not been there."""

import json

import pytest
import torch
from multi_lora import main, train_jobs
from safetensors.torch import load_file

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
    (tmp_path / "jobs.toml").write_text(f"[defaults]\nmax_steps = 2\n{jobs}")
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

"""A disk that is full or closed ends a run in one message, and the run can be gone on with; what a
run writes and says holds no secret of its command line."""

import sys

import pytest
from es_lora_llm import main
from short_runs import flags, result_of
from small_disk import SmallDisk, kilobytes_of

SECRET = "hf_zyxwvutsrqponm"
SAVES = [
    "--early_stop",
    "--save_strategy",
    "steps",
    "--save_steps",
    "2",
    "--save_total_limit",
    "2",
    "--average",
    "0.25",
]


def kept(output):
    files = sorted(output.glob("adapter*/adapter_model.safetensors")) + [output / "cs_history.jsonl"]
    return {str(file.relative_to(output)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def undisturbed(random_base, text_files, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert main(flags(random_base, text_files, output, *SAVES)) == 0
    return output


@pytest.mark.parametrize("share", [0.02, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9])
def test_a_full_disk_is_one_message_and_the_run_goes_on_to_the_same_end(
    undisturbed, random_base, text_files, tmp_path, capsys, share
):
    disk = SmallDisk(tmp_path / "disk", max(8, int(share * kilobytes_of(undisturbed))))
    try:
        output = disk.folder / "run"
        words = flags(random_base, text_files, output, *SAVES)
        assert main(words) == 1
        said = capsys.readouterr().err
        told = [line for line in said.splitlines() if line.startswith("es_lora_llm:")]
        assert len(told) == 1 and "the disk is full" in told[0] and "Traceback" not in said
        whole = sorted(path.name for path in output.glob("checkpoint-*"))
        assert ("--resume_from_checkpoint true" in told[0]) == bool(whole)
        disk.remount("size=64m")
        more = ["--resume_from_checkpoint", "true"] if whole else ["--overwrite_output_dir", "True"]
        assert main([*words, *more]) == 0
        assert kept(output) == kept(undisturbed)
        assert result_of(output)["heldout"] == result_of(undisturbed)["heldout"]
    finally:
        disk.close()


def test_a_disk_that_cannot_be_written_to_is_one_message(random_base, text_files, tmp_path, capsys):
    disk = SmallDisk(tmp_path / "disk", 1000)
    try:
        disk.remount("ro")
        assert main(flags(random_base, text_files, disk.folder / "run")) == 1
        said = capsys.readouterr().err
        assert "nothing can be written there" in said and said.count("es_lora_llm:") == 1 and "Traceback" not in said
    finally:
        disk.close()


@pytest.mark.parametrize("name", ["hub_token", "use_auth_token"])
def test_no_secret_is_written_or_said(random_base, text_files, tmp_path, capsys, monkeypatch, name):
    output = tmp_path / "run"
    more = [*SAVES, "--report_to", "tensorboard", "--logging_dir", str(output / "runs"), f"--{name}", SECRET]
    words = flags(random_base, text_files, output, *more)
    monkeypatch.setattr(sys, "argv", ["es_lora_llm.py", *words])
    if name == "hub_token":
        assert main(words) == 0
    else:  # a yes or no; a token in its place is told to be none
        with pytest.raises(SystemExit, match="2"):
            main(words)
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 20 or name != "hub_token"
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []

"""The page itself, without a browser, over run folders that are damaged: a message each, and no
traceback."""

import json
import sys

import pytest
from ldm_runs import TREE

pytest.importorskip("streamlit", reason="streamlit is not installed (requirements-extras.txt)")
HEADER = {
    "format": "cs-history/1", "cs_interval": 1, "window": 2, "steps_per_epoch": 4, "reduction": "matrix",
    "decided_on": "unet", "rule": "second-valley", "valley": 2, "total_steps": 40,
}  # fmt: skip


def history(**changes):
    records = [{"step": i, "epoch": i / 4, "cs": {"unet": 0.1 * i}, "loss": 0.1} for i in (1, 2, 3)]
    return "".join(json.dumps(line) + "\n" for line in [{**HEADER, **changes}, *records])


# {kind: (cs_history.jsonl, result.json, words that the page says)}; None: a folder of that name.
KINDS = {
    "a result that is a list": (history(), "[1]", "it holds a list"),
    "a torn result": (history(), '{"outcome": ', "result.json is damaged"),
    "a result without an outcome": (history(), '{"verdict": "Good.", "files": {"kept": "x.safetensors"}}', "names x."),
    "a folder for the result": (history(), None, "result.json is a folder"),
    "a folder for the history": (None, '{"verdict": "Good."}', "cs_history.jsonl is a folder"),
    "a torn history": (history()[:-9], "{}", "result.json is damaged"),
    "a history of nothing": ("[]\n", "{}", "line 1"),
    "an unknown rule": (history(rule="nope"), "{}", "stop rule 'nope' is unknown"),
    "a rule without its column": (history(rule="shadow"), "{}", "shadow_loss"),
    "an endless window": (history(window=float("inf")), "{}", "window is inf"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_folder_is_a_message_in_the_page(tmp_path, monkeypatch, kind):
    from streamlit.testing.v1 import AppTest

    run = tmp_path / "runs/run"
    (run / "sample").mkdir(parents=True)
    (run / "train.log").write_text("it began\n")
    (run / "sample/x-last_00_1.png").write_bytes(b"torn")
    for name, content in zip(("cs_history.jsonl", "result.json"), KINDS[kind]):
        if content is None:
            (run / name).mkdir()
        else:
            (run / name).write_text(content)
    monkeypatch.setattr(sys, "argv", ["demo_app.py", "--root", str(tmp_path / "runs")])
    page = AppTest.from_file(str(TREE / "demo_app.py"), default_timeout=120).run()
    assert not page.exception
    said = [element.value for element in (*page.warning, *page.error)]
    assert any(KINDS[kind][2] in text for text in said) and all(len(text) < 500 for text in said), said

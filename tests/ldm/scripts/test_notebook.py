"""The notebook: its committed copy was executed whole, and it executes from top to bottom with
short settings."""

import json
import zipfile

import pytest
from ldm_runs import TREE, result_of

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (requirements-extras.txt)")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (requirements-extras.txt)")
NOTEBOOK = TREE / "SDXL_DreamBooth_LoRA.ipynb"


def text_of(notebook):
    """Everything that the cells printed."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def test_committed_copy_was_executed_from_top_to_bottom():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3  # pictures, curves, comparison
    assert "Stopped early at step" in text_of(notebook)
    raw = NOTEBOOK.read_text(encoding="utf-8")
    assert str(TREE.parent) not in raw and "/home/" not in raw and len(raw) < 2e6


def test_notebook_executes_on_the_embedded_base(tmp_path, monkeypatch):
    monkeypatch.setenv("ES_LORA_NOTEBOOK_SHORT", "1")
    monkeypatch.setenv("ES_LORA_NOTEBOOK_WORK", str(tmp_path / "work"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(TREE)}}
    )
    client.execute()
    assert "20 pictures" in text_of(notebook) and "Stopped early at step" in text_of(notebook)
    result = result_of(tmp_path / "work" / "run")
    assert result["outcome"] == "stopped_early"
    with zipfile.ZipFile(tmp_path / "work" / "portraits.zip") as parcel:
        assert set(parcel.namelist()) == {
            "portraits.safetensors",
            "portraits-last.safetensors",
            "report.html",
            "result.json",
        }
        assert json.loads(parcel.read("result.json"))["keep_step"] == result["keep_step"]

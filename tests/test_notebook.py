"""The notebook, executed from top to bottom in a Jupyter kernel with the tiny settings of its first cell."""

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hub_server import HubServer
from models import save_tiny_model
from nbclient import NotebookClient


NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "sgpo_16gb.ipynb"
# Commands run in the kernel, where imports are shared, and a status other than 0 ends the notebook
IN_KERNEL = """
import shlex
import subprocess

from trl_sgpo.cli.main import main


def system(command):
    words = shlex.split(get_ipython().var_expand(command))
    if words[0] == "trl-sgpo":
        assert main(words[1:]) == 0, command
    else:
        print(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


get_ipython().system = system
"""


def printed(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    work = tmp_path / "work"
    work.mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    left_out = [cell for cell in notebook.cells if "needs: network" in cell.metadata.get("tags", [])]
    assert [cell.source.split()[0] for cell in left_out] == ["%pip"]
    notebook.cells = [cell for cell in notebook.cells if cell not in left_out]
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.source.startswith("TINY = False\n")
    first.source = first.source.replace("TINY = False", "TINY = True", 1)
    with HubServer() as hub:
        for name, value in hub.env.items():
            monkeypatch.setenv(name, value)
        first.source = first.source.replace("USER/", f"{hub.user}/", 1) + IN_KERNEL
        save_tiny_model(work / "HuggingFaceTB" / "SmolLM2-135M-Instruct")  # under the name of the real one
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(work)}}).execute()
        pushed = hub.files(f"{hub.user}/sgpo-qwen")
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert [cell.execution_count for cell in cells.values()] == [*range(1, len(cells) + 1)]
    recipe, trained, inspected, report, solved = (cells[name] for name in ("c04", "c06", "c08", "c09", "c11"))
    assert "model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct" in printed(recipe)
    assert "Model and strategy bank saved to runs/sgpo" in printed(trained) and "unseen problems" in printed(trained)
    state = json.loads((work / "runs/sgpo/checkpoint-2/trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "sgpo/correctness" in log] == [1, 2]
    assert "report.html" in printed(inspected) and (work / "runs/sgpo/report.html").is_file()
    assert "runs/sgpo/report.html" in report.outputs[0]["data"]["text/html"]
    assert len(printed(solved).split()) > 1
    assert {"README.md", "sgpo.json", "model.safetensors"} <= pushed.keys()

"""The notebook runs from its first cell to its last, and shows what it says."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "private_finetuning.ipynb"


def shown(notebook: nbformat.NotebookNode) -> tuple[str, int]:
    """What its cells have printed, and how many pictures they have drawn."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    return printed, sum("image/png" in output.get("data", ()) for output in outputs)


def check(notebook: nbformat.NotebookNode) -> None:
    printed, pictures = shown(notebook)
    assert pictures == 3
    accuracy = {epsilon: float(value) for epsilon, value in re.findall(r"ε = (\S+): accuracy (\S+)", printed)}
    assert list(accuracy) == ["0.25", "0.5", "1", "4", "inf"]
    assert min(accuracy[epsilon] for epsilon in ("1", "4", "inf")) > 0.7  # ten classes
    advantage = dict(re.findall(r"(without privacy|ε = 1): members found .* at best (\S+)", printed))
    assert float(advantage["without privacy"]) > float(advantage["ε = 1"])
    steps, spent = re.search(r"(\d+) private steps in all: ε = (\S+) at", printed).groups()
    # Four trainings at ε = 1 for the clip bound and four for the curve, 55 steps each, and one of 160 on members.
    assert int(steps) == 8 * 55 + 160
    assert 4 < float(spent) < 4 + 5.75 + 1


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the tests beside this one have the other cores
    notebook = nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    check(notebook)


def test_the_notebook_is_kept_with_its_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    check(notebook)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert NOTEBOOK.stat().st_size < 300_000

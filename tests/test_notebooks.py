from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def faults(notebook):
    """List what a committed notebook breaks of the rules for notebooks."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    if len(notebook.cells) > 15:
        found.append(f"{len(notebook.cells)} cells, at most 15")
    if any(line.lstrip().startswith(("%", "!")) for c in code for line in c.source.splitlines()):
        found.append("a magic or a shell command")
    if not code or "assert" not in code[-1].source:
        found.append("the last code cell asserts nothing")
    if any(cell.execution_count is None for cell in code) or not any(c.outputs for c in code):
        found.append("outputs are not committed")
    if any(output.output_type == "error" for cell in code for output in cell.outputs):
        found.append("an error among the outputs")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # it computes more than it compiles
    notebook = nbformat.read(path, as_version=4)
    nbclient.execute(notebook, cwd=tmp_path, timeout=600, kernel_name="python3")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_short_plain_and_committed_with_outputs(path):
    assert faults(nbformat.read(path, as_version=4)) == []


def test_broken_rules_are_found():
    cells = [nbformat.v4.new_code_cell("%time 1") for _ in range(16)]
    assert len(faults(nbformat.v4.new_notebook(cells=cells))) == 4


def test_there_are_notebooks():
    assert NOTEBOOKS

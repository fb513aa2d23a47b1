import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def python_only(text):
    """Blank every line outside the python blocks, so that line numbers stay those of the text."""
    lines, inside = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line.strip() == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines) + "\n"


def run(text, folder):
    """Run the python blocks in order in one new process in an empty folder, warnings as errors."""
    script = folder / "README.py"
    script.write_text(python_only(text))
    command = [sys.executable, "-W", "error", script.name]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_code_in_the_readme_runs(tmp_path):
    text = README.read_text()
    assert "```python" in text
    done = run(text, tmp_path)
    assert done.returncode == 0, done.stderr


def test_links_to_files_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README.read_text())
    assert [target for target in targets if not (README.parent / target).exists()] == []


def test_a_failing_block_is_reported_with_its_line(tmp_path):
    first, text = ["```python", "x = 1", "```"], ["```", "no code", "```"]
    second = ["```python", "assert x == 2", "```"]
    done = run("\n".join(first + text + second), tmp_path)
    assert done.returncode == 1
    assert "line 8" in done.stderr

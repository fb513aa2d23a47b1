import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import timing

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def test_every_benchmark_says_how_many_cores_it_wants():
    with_run = {p.stem for p in FOLDER.glob("*.py") if "\ndef run(size" in p.read_text()}
    found = command.discover()
    assert set(found) == with_run
    assert set(found.values()) <= {1, None}


def test_benchmarks_are_found_by_their_run_and_cores(tmp_path):
    (tmp_path / "one.py").write_text("CORES = 1\ndef run(size): return []\n")
    (tmp_path / "all.py").write_text("CORES = None\ndef run(size): return []\n")
    (tmp_path / "peers.py").write_text("def helper(): ...\n")
    assert command.discover(tmp_path) == {"one": 1, "all": None}


@pytest.fixture
def toy_folder(tmp_path):
    """A copy of the command with one toy benchmark, which asks for one core."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    for name in ("__init__.py", "__main__.py"):
        (package / name).write_text((FOLDER / name).read_text())
    (package / "toy.py").write_text(
        "import os\n"
        "import numpy as np\n"
        "CORES = 1\n"
        "def run(size):\n"
        "    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1\n"
        "    return [{'size_given': size, 'cores_given': cores, 'error': np.float32(0.5),\n"
        "             'threads': os.environ['OMP_NUM_THREADS'], 'xla': os.environ['XLA_FLAGS']}]\n"
    )
    return tmp_path


def test_the_command_pins_a_core_and_writes_json_lines(toy_folder):
    arguments = ["toy", "--size", "full", "--json", "out/toy.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=toy_folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "size_given" in done.stdout
    (line,) = (toy_folder / "out" / "toy.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["benchmark"] == "toy"
    assert (row["size"], row["size_given"]) == ("full", "full")
    assert row["cores_given"] == 1
    assert row["machine"]["cpu"]
    assert row["threads"] == "1"
    assert command.ONE_THREAD_XLA in row["xla"]
    assert row["error"] == 0.5
    assert row["versions"]["jax"]


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["no_such_benchmark"])
    assert "invalid choice" in capsys.readouterr().err


def test_rows_with_equal_columns_share_a_table():
    rows = [{"name": "a", "seconds": 0.123456}, {"name": "bcd", "seconds": 2.0}, {"rounds": 3}]
    assert command.table(rows).splitlines() == [
        "name  seconds",
        "a      0.1235",
        "bcd         2",
        "",
        "rounds",
        "     3",
    ]


def test_cpu_time_counts_work_and_not_waiting():
    def work():
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    calls = []
    measured = timing.measure(
        {
            "work": lambda: (calls.append("work"), work()),
            "wait": lambda: (calls.append("wait"), time.sleep(0.02)),
        },
        repeats=3,
        warmup=1,
    )
    assert calls == ["work", "wait"] * 4
    assert measured["work"].cpu_min >= 0.02
    assert measured["wait"].cpu_median < 0.01
    assert measured["wait"].wall_min >= 0.02
    assert measured["work"].cpu_min <= measured["work"].cpu_median


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="measure: got repeats 0, expected at least 1"):
        timing.measure({}, repeats=0)


def test_compiling_is_timed_every_time():
    def double(x):
        return x + x

    x = np.ones(3)
    assert min(timing.compile_time(double, x) for _ in range(3)) > 1e-4

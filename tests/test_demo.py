import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_demo_writes_its_table_picture_and_figures(tmp_path):
    command = [sys.executable, "-m", "demo", "--out", str(tmp_path), "--size", "24"]
    command += ["--views", "9", "--rank", "6", "--rounds", "12"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    methods = ["FedAvg", "single client", "FIRM", "CompJF 6", "CompRandJF 6"]
    for method in methods:
        assert method in done.stdout
    rows = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert [(row["sigma"], row["method"]) for row in rows] == [
        (sigma, method) for sigma in (0.05, 0.1) for method in methods
    ]
    by_method = {row["method"]: row for row in rows if row["sigma"] == 0.1}
    assert by_method["single client"]["uplink_bytes_per_round"] == 0
    assert by_method["FIRM"]["uplink_bytes_per_round"] == 4 * 4 * 24 * 24
    assert by_method["CompJF 6"]["uplink_bytes_per_round"] == 4 * 4 * (6 * 6 + 2 * 24 * 6)
    for row in rows:
        assert len(row["psnr"]) == 12
        assert row["best_psnr"] == max(row["psnr"])
    assert (tmp_path / "demo.png").stat().st_size > 10_000

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from benchmarks import reconstruction
from demo import __main__ as demo
from fedlr import phantoms

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
    methods = ["FedAvg", "single client", "FIRM", "FIRM + TV", "FullDecomp 6", "CompRandJF 6"]
    methods += ["CompJF 6", "CompJF, growing"]
    for method in methods:
        assert method in done.stdout
    assert "missing samples" in done.stdout
    rows = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert [(row["sigma"], row["method"]) for row in rows] == [
        (sigma, method) for sigma in (0.05, 0.1) for method in methods
    ]
    by_method = {row["method"]: row for row in rows if row["sigma"] == 0.1}
    low_rank = 4 * 4 * (6 * 6 + 2 * 24 * 6)
    sent = {"single client": 0, "FIRM": 4 * 4 * 24 * 24, "FullDecomp 6": low_rank}
    for method, each in (sent | {"CompJF 6": low_rank}).items():
        assert by_method[method]["uplink_bytes"] == [each] * 12
    for row in rows:
        assert len(row["psnr"]) == 12
        assert row["best_psnr"] == max(row["psnr"])
        if row["method"] == "FIRM + TV":
            assert (row["stop_round"], row["stopped_by_rule"]) == (11, False)
            assert row["stop_psnr"] == row["psnr"][-1]
    assert "of FIRM + TV, which runs on, the last round" in done.stdout
    assert (tmp_path / "demo.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("kind", "psnr", "gaussian_window", "uniform_window"),
    [("noisy", 20.0048, 0.18780, 0.19756), ("blurred", 22.1129, 0.88229, 0.88712)],
)
def test_metrics_have_the_stated_values(kind, psnr, gaussian_window, uniform_window):
    truth = phantoms.rasterize(phantoms.modified_shepp_logan(dtype="float32"), 256)
    if kind == "noisy":
        noise = np.random.default_rng(0).standard_normal(truth.shape)
        image = truth + jnp.asarray(0.1 * noise, jnp.float32)
    else:
        image = jnp.asarray(ndimage.gaussian_filter(np.asarray(truth), 2.0))
    image, truth = image[None], truth[None]
    arrays = np.asarray(image), np.asarray(truth)
    assert demo.psnr(*arrays) == pytest.approx(psnr, abs=1e-4)
    assert reconstruction.psnr(image, truth) == pytest.approx(psnr, abs=1e-4)
    # The metric of the plots' package mixes dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        similarity = demo.ssim(image[None], truth)[0]
    assert similarity == pytest.approx(gaussian_window, abs=1e-4)
    assert reconstruction.ssim(*arrays) == pytest.approx(uniform_window, abs=1e-4)

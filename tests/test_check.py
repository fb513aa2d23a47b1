import subprocess
import sys

import jax.numpy as jnp
import pytest

from fedlr import __main__ as command
from fedlr import multilinear, tomography, tucker


@pytest.mark.slow
def test_this_backend_is_right(capsys):
    assert command.main(["check"]) == 0
    printed = capsys.readouterr().out
    for word in ("jax ", "backend ", "#39103", "all right", *command.CHECKS):
        assert word in printed
    assert "WRONG" not in printed


WRONG_KERNELS = {
    "multilinear.mode_dot": (multilinear, "mode_dot", lambda y: y.at[..., -1].multiply(1.001)),
    "multilinear.mttkrp": (multilinear, "mttkrp", lambda y: y.at[0, 0].set(jnp.nan)),
    "tucker.sthosvd": (tucker, "to_dense", lambda y: y.at[0, 0, 0].add(0.01)),
    "tomography.project": (tomography, "project", lambda y: y.at[4].multiply(1.001)),
    "tomography.backproject": (tomography, "backproject", lambda y: y[::-1]),
}


@pytest.mark.parametrize("name", WRONG_KERNELS)
def test_a_wrong_kernel_is_named_and_the_exit_status_says_so(monkeypatch, capsys, name):
    module, attribute, spoil = WRONG_KERNELS[name]
    kernel = getattr(module, attribute)
    monkeypatch.setattr(module, attribute, lambda *args: spoil(kernel(*args)))
    monkeypatch.setattr(command, "CHECKS", {name: command.CHECKS[name]})
    assert command.main(["check"]) == 1
    printed = capsys.readouterr().out
    assert f"WRONG  {name}" in printed
    assert f"  {name}" in printed.split("computes")[1]


def test_a_kernel_that_raises_is_wrong(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(multilinear, "mttkrp", fail)
    name = "multilinear.mttkrp"
    monkeypatch.setattr(command, "CHECKS", {name: command.CHECKS[name]})
    assert command.main(["check"]) == 1
    assert f"{name} (RuntimeError: no such instruction)" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["no_such_command"]])
def test_wrong_usage_exits_with_two(arguments):
    run = [sys.executable, "-m", "fedlr", *arguments]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: python -m fedlr" in done.stderr

import subprocess
import sys
import tomllib
from pathlib import Path

import fedlr

ROOT = Path(__file__).resolve().parents[1]

IMPORT_ALL = """
import importlib, pathlib, sys
before = None
if "jax" in sys.argv:
    import jax
    before = dict(jax.config.values)
import fedlr
folder = pathlib.Path(fedlr.__file__).parent
for path in folder.rglob("*.py"):
    parts = path.relative_to(folder).with_suffix("").parts
    if parts[-1] not in ("__init__", "__main__"):
        importlib.import_module(".".join(("fedlr", *parts)))
if before is not None:
    changed = {name for name, value in before.items() if jax.config.values[name] != value}
    assert not changed, changed
"""


def run(script, *arguments, **environment):
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_importing_everything_changes_no_setting():
    done = run(IMPORT_ALL, "jax")
    assert done.returncode == 0, done.stderr


def test_importing_everything_touches_no_device():
    done = run(IMPORT_ALL, JAX_PLATFORMS="no_such_platform")
    assert done.returncode == 0, done.stderr
    touched = run("import jax.numpy as jnp; jnp.ones(1)", JAX_PLATFORMS="no_such_platform")
    assert touched.returncode != 0


def test_every_public_module_is_reexported():
    names = {path.stem for path in Path(fedlr.__file__).parent.glob("[a-z]*.py")}
    packages = {path.parent.name for path in Path(fedlr.__file__).parent.glob("*/__init__.py")}
    assert set(fedlr.__all__) == names | packages
    assert all(hasattr(fedlr, name) for name in fedlr.__all__)


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert fedlr.__version__ == project["version"]


def test_the_broken_jax_is_refused_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in optional for line in extra)]
    jax_lines = [line for line in lines if line.startswith("jax") and line[3:4] in "l[>"]
    assert len(jax_lines) == 4
    assert all("!=0.10.2" in line for line in jax_lines)

"""Put this package with one of its extras into a virtual environment, once.

Usage: environment.py FOLDER EXTRA. Does nothing if that was done already with the same
`pyproject.toml` and `constraints.txt`. Several calls at a time wait for each other.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(folder: Path, extra: str) -> None:
    """Make the environment where it is missing or broken, and install what has changed."""
    constraints = ROOT / "constraints.txt"
    wanted = hashlib.sha256(bytes(ROOT))
    for path in (ROOT / "pyproject.toml", constraints):
        wanted.update(path.read_bytes())
    python, stamp = folder / "bin" / "python", folder / f".installed-{extra}"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _works(python):
            print(f"making {folder} with Python {sys.version.split()[0]}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            made = subprocess.run([sys.executable, "-m", "venv", str(folder)], check=False)
            if made.returncode:
                sys.exit(
                    f"no virtual environment could be made: {sys.executable} lacks venv or pip"
                )
        if stamp.exists() and stamp.read_text() == wanted.hexdigest():
            return
        print(f"installing fedlr[{extra}] into {folder}", flush=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        package = f"{ROOT}[{extra}]"
        subprocess.run([*install, "--constraint", str(constraints), "-e", package], check=True)
        stamp.write_text(wanted.hexdigest())


def _works(python: Path) -> bool:
    """Whether this interpreter exists, is new enough and has pip."""
    script = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([python, "-c", script], capture_output=True).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except subprocess.CalledProcessError as error:
        sys.exit(f"this failed: {' '.join(map(str, error.cmd))}")

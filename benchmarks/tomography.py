"""Projector and transpose beside ASTRA, SciPy and scico: speed, memory, accuracy, federated rounds.

Speed: the same batch for all, float32, forward and transpose timed in turns. ASTRA's CPU projector
is "linear", which is Joseph's too; the SciPy row multiplies by ASTRA's matrix and its transpose,
both prebuilt in CSR. scico pins an older JAX: it runs in an environment of its own in `out/`, which
the full size makes, and is asked in turns through a pipe. Rounds: gradients of the data misfit of
clients with their own angles, the part of a federated round that the projector is.
"""

import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from fedlr import phantoms, tomography
from tests.reference import blobs

CORES = None
SIZES = {"small": (32, 12, 32, 2), "full": (256, 180, 256, 8)}  # pixels, views, bins, images
ROUNDS = {"small": ((16, 7, 24),), "full": ((128, 51, 182), (250, 100, 354))}
CLIENTS = 4
SCICO = "scico==0.0.7"
SCICO_FOLDER = Path(__file__).resolve().parents[1] / "out" / "venv-scico"
NO_PEER = dict.fromkeys(
    ("forward_cpu", "adjoint_cpu", "forward_wall", "adjoint_wall", "spread", "megabytes", "error"),
)


def run(size: str) -> list[dict[str, Any]]:
    pixels, views, bins, batch = SIZES[size]
    repeats = 2 if size == "small" else 9
    data = make_data(pixels, views, bins, batch)
    geometry = tomography.ParallelBeam((pixels, pixels), bins)
    rows = speed(geometry, data, repeats, with_scico=size == "full")
    rows += accuracy(geometry, data)
    for pixels, views, bins in ROUNDS[size]:
        rows += federated_round(pixels, views, bins, repeats)
    return rows


def make_data(pixels: int, views: int, bins: int, batch: int) -> dict[str, np.ndarray]:
    """Random batches for timing, and the head phantom with its closed-form sinogram."""
    random = np.random.default_rng(0)
    angles = jnp.linspace(0, jnp.pi, views, endpoint=False, dtype=jnp.float32)
    head = phantoms.modified_shepp_logan(dtype=jnp.float32)
    return {
        "images": random.standard_normal((batch, pixels, pixels)).astype(np.float32),
        "sinograms": random.standard_normal((batch, views, bins)).astype(np.float32),
        "angles": np.asarray(angles),
        "phantom": np.asarray(phantoms.rasterize(head, pixels)),
        "reference": np.asarray(phantoms.sinogram(head, angles, bins, pixels)),
    }


def relative_error(sinogram: Any, data: dict[str, np.ndarray]) -> float:
    reference = data["reference"].astype(np.float64)
    return float(np.linalg.norm(sinogram - reference) / np.linalg.norm(reference))


def library(project, geometry, data):
    """Compile the batched forward and transpose of one of the library's projectors."""
    angles = jnp.asarray(data["angles"])
    images, sinograms = jnp.asarray(data["images"]), jnp.asarray(data["sinograms"])

    def forward(images, angles):
        return jax.vmap(lambda image: project(geometry, image, angles))(images)

    def adjoint(sinograms, angles):
        operator = functools.partial(forward, angles=angles)
        return jax.linear_transpose(operator, images)(sinograms)[0]

    first = jax.jit(forward).lower(images, angles).compile()
    second = jax.jit(adjoint).lower(sinograms, angles).compile()
    analyses: list[Any] = [first.memory_analysis(), second.memory_analysis()]
    memory = [analysis.temp_size_in_bytes / 1e6 for analysis in analyses]
    error = relative_error(
        jax.jit(project, static_argnums=0)(geometry, data["phantom"], angles), data
    )
    calls = (lambda: first(images, angles)), (lambda: second(sinograms, angles))
    return calls, {"megabytes": max(memory), "error": error}


def astra_linear(data):
    """Return ASTRA's calls for the batch, what is to be told about it, and its matrix."""
    astra: Any = importlib.import_module("astra")

    views, bins = data["sinograms"].shape[1:]
    rows, columns = data["phantom"].shape
    angles = data["angles"].astype(np.float64)
    geometry = astra.create_proj_geom("parallel", 1.0, bins, angles)
    projector = astra.create_projector("linear", geometry, astra.create_vol_geom(rows, columns))

    def forward(image):
        number, sinogram = astra.create_sino(image, projector)
        astra.data2d.delete(number)
        return sinogram

    def adjoint(sinogram):
        number, image = astra.create_backprojection(sinogram, projector)
        astra.data2d.delete(number)
        return image

    matrix = astra.matrix.get(astra.projector.matrix(projector)).astype(np.float32)
    calls = (
        lambda: [forward(image) for image in data["images"]],
        lambda: [adjoint(sinogram) for sinogram in data["sinograms"]],
    )
    error = relative_error(forward(data["phantom"]), data)
    return calls, {"megabytes": None, "error": error}, matrix.reshape(views * bins, -1)


def csr_pair(matrix, data):
    """Return products with a prebuilt matrix and its prebuilt transpose, and their memory."""
    transpose = matrix.T.tocsr()
    batch = len(data["images"])
    images = np.ascontiguousarray(data["images"].reshape(batch, -1).T)
    sinograms = np.ascontiguousarray(data["sinograms"].reshape(batch, -1).T)
    parts = [part for m in (matrix, transpose) for part in (m.data, m.indices, m.indptr)]
    error = relative_error(
        (matrix @ data["phantom"].ravel()).reshape(data["reference"].shape), data
    )
    calls = (lambda: matrix @ images), (lambda: transpose @ sinograms)
    return calls, {"megabytes": sum(part.nbytes for part in parts) / 1e6, "error": error}


class Worker:
    """scico in a process of its own, asked through a pipe."""

    def __init__(self, python: Path, path: str):
        script = Path(__file__).with_name("scico_worker.py")
        self.process = subprocess.Popen(
            [python, script, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.cpu: dict[str, list[float]] = {"forward": [], "adjoint": []}
        self.about = self.answer()

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, name: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        self.cpu[name].append(self.answer()["cpu"])

    def close(self) -> None:
        self.process.communicate(timeout=60)


def scico_python() -> Path:
    """Make scico's environment if it is not there; its Python."""
    python = SCICO_FOLDER / "bin" / "python"
    if not (SCICO_FOLDER / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", SCICO_FOLDER], check=True)
        install = [python, "-m", "pip", "install", "--quiet", SCICO]
        subprocess.run(install, check=True, capture_output=True, timeout=900)
        (SCICO_FOLDER / "complete").touch()
    return python


def speed(geometry, data, repeats, *, with_scico) -> list[dict[str, Any]]:
    """Time forward and transpose of the batch for all designs in turns."""
    designs, absent = {}, {}
    designs["joseph"] = library(tomography.project, geometry, data)
    designs["fourier"] = library(tomography.fourier_project, geometry, data)
    if importlib.util.find_spec("astra") is None:
        absent |= dict.fromkeys(("astra linear", "scipy csr pair"), "astra-toolbox not installed")
    else:
        calls, about, matrix = astra_linear(data)
        designs["astra linear"] = calls, about
        designs["scipy csr pair"] = csr_pair(matrix, data)
    with tempfile.TemporaryDirectory() as folder:
        worker = None
        if with_scico:
            path = str(Path(folder) / "data.npz")
            np.savez(path, **data)
            try:
                worker = Worker(scico_python(), path)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                absent["scico"] = f"not installable: {type(error).__name__}"
        else:
            absent["scico"] = "full size only"
        if worker is not None:
            calls = (lambda: worker.ask("forward")), (lambda: worker.ask("adjoint"))
            megabytes = max(worker.about["forward_bytes"], worker.about["adjoint_bytes"]) / 1e6
            about = {"megabytes": megabytes, "error": worker.about["error_bins"]}
            designs["scico"] = calls, about
        functions = {}
        for name, (calls, _) in designs.items():
            functions |= {f"{name} forward": calls[0], f"{name} adjoint": calls[1]}
        times = timing.measure(functions, repeats=repeats)
        if worker is not None:
            worker.close()

    rows = []
    for name, (_, about) in designs.items():
        pair = times[f"{name} forward"], times[f"{name} adjoint"]
        cpu = [m.cpu_median for m in pair]
        if name == "scico" and worker is not None:  # its processor time is spent in its own process
            cpu = [float(np.median(worker.cpu[part][1:])) for part in ("forward", "adjoint")]
        rows.append(
            {
                "speed": name,
                "forward_cpu": cpu[0],
                "adjoint_cpu": cpu[1],
                "forward_wall": pair[0].wall_median,
                "adjoint_wall": pair[1].wall_median,
                "spread": max(m.cpu_spread for m in pair),
                **about,
            }
        )
    rows += [{"speed": f"{name} ({reason})", **NO_PEER} for name, reason in absent.items()]
    base = rows[0]
    for row in rows:
        for clock in ("cpu", "wall"):
            row[f"{clock}_ratio"] = None
            if row["forward_cpu"] is not None:
                total, ours = (r[f"forward_{clock}"] + r[f"adjoint_{clock}"] for r in (row, base))
                row[f"{clock}_ratio"] = total / ours
        row["memory_ratio"] = row["megabytes"] and row["megabytes"] / base["megabytes"]
    return rows


def mismatches(geometry, data, dtype) -> tuple[float, float]:
    """|<Ax, y> - <x, A'y>| / (||Ax|| ||y||) over all views, and in the worst single view."""
    image, sinogram, angles = (
        data[name].astype(dtype) for name in ("images", "sinograms", "angles")
    )
    image, sinogram = image[0], sinogram[0]
    forward = jax.jit(functools.partial(tomography.project, geometry))
    adjoint = jax.jit(functools.partial(tomography.backproject, geometry))

    def mismatch(projected, sinogram, angles):
        projected, y = projected.astype(np.float64), sinogram.astype(np.float64)
        back = np.asarray(adjoint(sinogram, angles), np.float64)
        difference = (projected * y).sum() - (image.astype(np.float64) * back).sum()
        return float(abs(difference) / (np.linalg.norm(projected) * np.linalg.norm(y)))

    projected = np.asarray(forward(image, angles))
    single = [
        mismatch(projected[[view]], sinogram[[view]], angles[[view]]) for view in range(len(angles))
    ]
    return mismatch(projected, sinogram, angles), max(single)


def accuracy(geometry, data) -> list[dict[str, Any]]:
    """Adjoint mismatch of Joseph's projector, and both projectors' errors on smooth blobs."""
    rows = []
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype is np.float64):
            everything, worst = mismatches(geometry, data, dtype)
        name = np.dtype(dtype).name
        rows.append({"accuracy": f"adjoint mismatch, all views, {name}", "value": everything})
        rows.append({"accuracy": f"adjoint mismatch, worst view, {name}", "value": worst})
    angles, size = jnp.asarray(data["angles"]), geometry.shape[0]
    exact = blobs.sinogram(blobs.STANDARD, data["angles"], geometry.num_bins, size)
    image = jnp.asarray(blobs.rasterize(blobs.STANDARD, size), jnp.float32)
    for name, project in (
        ("joseph", tomography.project),
        ("fourier", tomography.fourier_project),
    ):
        sinogram = jax.jit(project, static_argnums=0)(geometry, image, angles)
        error = float(np.linalg.norm(sinogram - exact) / np.linalg.norm(exact))
        rows.append({"accuracy": f"error on blobs, {name}", "value": error})
    return rows


def federated_round(pixels, views, bins, repeats) -> list[dict[str, Any]]:
    """Gradients of the data misfit: all clients with own or common angles, and one client."""
    geometry = tomography.ParallelBeam((pixels, pixels), bins)
    random = np.random.default_rng(1)
    images = jnp.asarray(random.standard_normal((CLIENTS, pixels, pixels)), jnp.float32)
    sinograms = jnp.asarray(random.standard_normal((CLIENTS, views, bins)), jnp.float32)
    angles = jnp.asarray(random.uniform(0, np.pi, (CLIENTS, views)), jnp.float32)

    def misfit(image, sinogram, angles):
        return 0.5 * jnp.sum((tomography.project(geometry, image, angles) - sinogram) ** 2)

    gradient = jax.grad(misfit)
    cases = {
        f"{CLIENTS} clients, own angles": (jax.vmap(gradient), (images, sinograms, angles)),
        f"{CLIENTS} clients, common angles": (
            jax.vmap(gradient, (0, 0, None)),
            (images, sinograms, angles[0]),
        ),
        "1 client": (gradient, (images[0], sinograms[0], angles[0])),
    }
    compiled, seconds = {}, {}
    for name, (function, args) in cases.items():
        start = time.perf_counter()
        compiled[name] = jax.jit(function).lower(*args).compile(), args
        seconds[name] = time.perf_counter() - start
    calls = {name: functools.partial(f, *args) for name, (f, args) in compiled.items()}
    times = timing.measure(calls, repeats=repeats)
    return [
        {
            "gradient": f"{name}, {pixels} pixels, {views} views",
            "cpu": times[name].cpu_median,
            "wall": times[name].wall_median,
            "spread": times[name].cpu_spread,
            "megabytes": compiled[name][0].memory_analysis().temp_size_in_bytes / 1e6,
            "compile_seconds": seconds[name],
        }
        for name in cases
    ]

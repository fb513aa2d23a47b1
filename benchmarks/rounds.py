"""Federated rounds beside the peers': speed, memory against the cohort, convolutions, factors.

Peers do the same rounds, in turns with ours: the same clients, cohorts, order of the samples and
initial parameters, 10 steps of plain SGD, and a mean with equal weights, float32, on the same two
cores. Each peer runs in a process and an environment of its own, which the full size makes in the
user's cache; one that cannot be installed is named as such. Start-up and compiling are left out:
the first rounds do not count. The first row is a device of JAX for each core with the cohort spread
over them; the other rows of ours have one device, whose threads share every product.

`difference` is the largest one of a parameter to those of a plain PyTorch loop after some rounds of
the smooth model (tanh and means); `difference_timed` is that of the timed model. Where a value of
that one meets ReLU, or two meet a maximum, within rounding, packages take different branches and
part by far more than rounding, as PyTorch with one thread does from PyTorch with two.

Cohorts: all clients in every round, 5 steps each.
"""

import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import timing
from fedlr import convolution, federated, lowrank
from fedlr.algorithms import fedavg, fedloru
from fedlr.federated import clients as clients_
from fedlr.federated import local, protocol

CORES = None
Rows = list[dict[str, Any]]

SAMPLES, BATCH, RATE = 200, 20, 0.03
NUM_CORES = 2
KEY = 1
CHECKED = 3  # rounds after which parameters are compared
UNTIMED = 2
SECONDS_TO_INSTALL, SECONDS_TO_ANSWER = 900, 300
TORCH = "torch==2.13.0"
PEERS: dict[str, tuple[str, ...]] = {  # what pip is told
    "pytorch": (TORCH, "numpy==2.4.6"),
    "pfl": (TORCH, "pfl==0.6.0"),
    # It asks for Python 3.12, and runs unchanged on 3.11, for which there is one PyTorch for all.
    "blazefl": (
        TORCH,
        "blazefl==2.0.3",
        "numpy==2.4.6",
        "tqdm==4.67.1",
        "--ignore-requires-python",
    ),
    "flower": (TORCH, "flwr[simulation]==1.42.0"),
    # It calls functions that newer versions of JAX no longer have.
    "fedjax": (
        "fedjax==0.0.17",
        "jax==0.4.30",
        "jaxlib==0.4.30",
        "dm-haiku==0.0.12",
        "optax==0.2.3",
        "chex==0.1.86",
        "numpy==1.26.4",
        "scipy==1.12.0",
    ),
}
REFERENCE = "pytorch"
SPREAD = "fedlr, a device per core"
ROOT = Path(__file__).resolve().parents[1]


class Setting(NamedTuple):
    """Size of the comparison with the peers; every client passes once over its samples."""

    clients: int
    cohort_size: int
    samples: int
    side: int
    width: int
    mlp_rounds: int
    cnn_rounds: int


SETTINGS = {
    "small": Setting(6, 3, 3 * BATCH, 8, 12, CHECKED, CHECKED),
    "full": Setting(100, 10, SAMPLES, 28, 200, 40, 10),
}


class Party(NamedTuple):
    """Who does rounds: its name, and `round() -> (cpu, wall)` and `params() -> arrays`."""

    name: str
    round: Callable[[], tuple[float, float]]
    params: Callable[[], list[np.ndarray]]


class Played(NamedTuple):
    """CPU and wall seconds, shape (rounds, 2), and the parameters after `CHECKED` rounds."""

    times: np.ndarray
    params: list[np.ndarray]


def loss(
    params: Sequence[jax.Array], image: jax.Array, label: jax.Array, *, is_smooth: bool = False
) -> jax.Array:
    """Cross entropy of the model that the shapes of its weights describe, for one image.

    Kernels (out, in, k, k) are convolutions of the same size with a pool of 2 and ReLU; matrices
    (out, in) are layers with ReLU in between. The smooth model has tanh and means instead.
    """
    activation, pool = (jnp.tanh, jnp.mean) if is_smooth else (jax.nn.relu, jnp.max)
    hidden, flat = image, False
    for weight, bias in zip(params[::2], params[1::2], strict=True):
        if weight.ndim == 4:
            hidden = lax.conv_general_dilated(hidden[None], weight, (1, 1), "SAME")[0]
            channels, height, width = hidden.shape
            hidden = pool(hidden.reshape(channels, height // 2, 2, width // 2, 2), (2, 4))
            hidden = activation(hidden + bias[:, None, None])
        else:
            hidden = activation(hidden) if flat else hidden.ravel()
            hidden, flat = weight @ hidden + bias, True
    return optax.softmax_cross_entropy_with_integer_labels(hidden, label)


def mlp(side: int, width: int) -> list[np.ndarray]:
    """Draw a perceptron of two hidden layers: 199,210 parameters at side 28 and width 200."""
    return _draw([(width, side**2), (width, width), (10, width)])


def cnn(side: int) -> list[np.ndarray]:
    """Draw two 5 x 5 convolutions, 16 and 32 channels, and a layer of 64: 114,314 at side 28."""
    return _draw([(16, 1, 5, 5), (32, 16, 5, 5), (64, 32 * (side // 4) ** 2), (10, 64)])


def _draw(shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    random = np.random.default_rng(3)
    params = []
    for shape in shapes:
        spread = math.sqrt(2 / math.prod(shape[1:]))
        params.append((spread * random.standard_normal(shape)).astype(np.float32))
        params.append(np.zeros(shape[0], np.float32))
    return params


def federation(count: int, side: int, samples: int = SAMPLES) -> protocol.ClientData:
    """Draw clients with random images and labels."""
    random = np.random.default_rng(0)
    images = random.standard_normal((count, samples, 1, side, side), np.float32)
    labels = random.integers(0, 10, (count, samples), np.int32)
    mask = jnp.ones((count, samples), bool)
    return protocol.ClientData(jnp.asarray(images), jnp.asarray(labels), mask)


@functools.partial(jax.jit, static_argnames=("count", "cohort_size", "samples", "num_rounds"))
def plan(*, count: int, cohort_size: int, samples: int, num_rounds: int) -> tuple[Any, Any]:
    """Replay the cohorts and the orders of the samples that `federated.run` draws.

    Returns:
        Clients of every round, and the order of the samples of each of them.
    """

    def of_round(index):
        cohort_key, round_key = jax.random.split(jax.random.fold_in(jax.random.key(KEY), index))
        cohort = clients_.sample_cohort(count, cohort_size, key=cohort_key)
        client_key = jax.random.split(round_key)[0]

        def order(client):
            key = jax.random.split(jax.random.fold_in(client_key, client))[0]
            return jnp.argsort(jax.random.uniform(key, (samples,), jnp.float32))

        return cohort, jax.vmap(order)(cohort)

    return jax.vmap(of_round)(jnp.arange(num_rounds, dtype=jnp.int32))


def averaging(
    num_steps: int, chunk_size: int | None, loss: Callable = loss
) -> protocol.FederatedAlgorithm:
    update = local.local_sgd(loss, optax.sgd(RATE), num_steps=num_steps, batch_size=BATCH)
    return fedavg.build(update, chunk_size=chunk_size)


def compiled_round(algorithm, params, data, cohort_size):
    """Compile one round of `federated.run`; it, and its first state."""
    state = algorithm.init(params, data, key=jax.random.key(0))

    def one(state, data):
        key = jax.random.key(KEY)
        return federated.run(
            algorithm, state, data, num_rounds=1, cohort_size=cohort_size, key=key
        )[0]

    return jax.jit(one).lower(state, data).compile(), state


def ours(name: str, algorithm, params, data, cohort_size: int) -> Party:
    step, state = compiled_round(algorithm, params, data, cohort_size)
    present = [state]

    def round():
        wall, cpu = time.perf_counter(), time.process_time()
        present[0] = jax.block_until_ready(step(present[0], data))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return cpu, wall

    return Party(name, round, lambda: [np.asarray(leaf) for leaf in present[0].params])


class PeerError(Exception):
    """A peer cannot be installed, does not start, or fails; the message says why."""


class Worker:
    """A peer in a process of its own, asked through a pipe."""

    def __init__(self, python: Path, name: str, task: Path):
        self.path = task.with_name(f"{name}_params.npz")
        self.log = task.with_name(f"{name}.log")
        self.process = subprocess.Popen(
            [python, "-m", f"benchmarks.peers.{name}_worker", task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        try:
            self.answer()
        except PeerError:
            self.close()
            raise

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        watchdog = threading.Timer(SECONDS_TO_ANSWER, self.process.kill)
        watchdog.start()
        try:
            line = self.process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise PeerError(_last_error(self.log.read_text(errors="replace")))
        return json.loads(line)

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what went wrong is in its log
            self.process.stdin.write(f"{command}\n")
            self.process.stdin.flush()
        return self.answer()

    def round(self) -> tuple[float, float]:
        answer = self.ask("round")
        return answer["cpu"], answer["wall"]

    def params(self) -> list[np.ndarray]:
        self.ask(f"params {self.path}")
        with np.load(self.path) as file:
            return [file[name] for name in file.files]

    def close(self) -> None:
        try:
            self.process.communicate(timeout=60)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            self.process.wait()


def _last_error(text: str) -> str:
    """Return the last line that names an error, without the folders it may tell."""
    lines = re.findall(r"^(?:ERROR: |\w*(?:Error|Exception)).*", text, re.MULTILINE)
    return re.sub(r"\S*/", "", lines[-1])[:100] if lines else "no answer in time"


def environment(name: str, requirements: Sequence[str]) -> Path:
    """Make a virtual environment in the user's cache if it is not there; its Python."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "fedlr" / f"venv-{name}"
    python, mark, wanted = folder / "bin" / "python", folder / "complete", " ".join(requirements)
    if not mark.exists() or mark.read_text() != wanted:
        install = [python, "-m", "pip", "install", "--quiet", *requirements]
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            subprocess.run(
                install, check=True, capture_output=True, text=True, timeout=SECONDS_TO_INSTALL
            )
        except subprocess.CalledProcessError as error:
            raise PeerError(_last_error(error.stderr or "")) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PeerError(type(error).__name__) from error
        mark.write_text(wanted)
    return python


def _has_reference(size: str) -> bool:
    return size != "small" or importlib.util.find_spec("torch") is not None


@contextlib.contextmanager
def workers(size: str, task: Path) -> Iterator[tuple[list[Party], dict[str, str]]]:
    """Start the peers: those that run, and why the others do not.

    At the small size nothing is installed: the PyTorch loop runs if PyTorch is there.
    """
    found, absent, started = [], {}, []
    for name, requirements in PEERS.items():
        is_here = size == "small" and name == REFERENCE and _has_reference(size)
        if size == "small" and not is_here:
            absent[name] = "full size only"
            continue
        try:
            python = Path(sys.executable) if is_here else environment(name, requirements)
        except PeerError as error:
            absent[name] = f"not installable: {error}"
            continue
        try:
            worker = Worker(python, name, task)
        except PeerError as error:
            absent[name] = f"does not start: {error}"
            continue
        started.append(worker)
        found.append(Party(name, worker.round, worker.params))
    try:
        yield found, absent
    finally:
        for worker in started:
            worker.close()


def peers(size: str) -> Rows:
    """Time rounds of both models beside the peers, and compare what they compute."""
    setting = SETTINGS[size]
    count, cohort_size, samples = setting.clients, setting.cohort_size, setting.samples
    data = federation(count, setting.side, samples)
    mesh = jax.make_mesh((jax.device_count(),), ("clients",), axis_types=(AxisType.Auto,))
    everywhere = jax.device_put(data, NamedSharding(mesh, PartitionSpec()))
    models = {
        "mlp": (mlp(setting.side, setting.width), setting.mlp_rounds),
        "cnn": (cnn(setting.side), setting.cnn_rounds),
    }
    rows = []
    for model, (params, num_rounds) in models.items():
        cohorts, orders = plan(
            count=count, cohort_size=cohort_size, samples=samples, num_rounds=num_rounds
        )
        arrays: dict[str, Any] = {f"param_{i}": value for i, value in enumerate(params)}
        arrays |= {"num_params": len(params), "batch_size": BATCH, "rate": RATE}
        arrays |= {"images": data.inputs, "labels": np.asarray(data.targets, np.int64)}
        played: dict[bool, Any] = {True: ({}, {})}
        # The smooth rounds serve the comparison alone.
        for is_smooth in (True, False) if _has_reference(size) else (False,):
            form = functools.partial(loss, is_smooth=is_smooth)
            parties = []
            for name, chunk in {"fedlr": None, "fedlr, vmap": cohort_size}.items():
                algorithm = averaging(samples // BATCH, chunk, form)
                parties.append(ours(name, algorithm, params, data, cohort_size))
            with jax.set_mesh(mesh):
                algorithm = averaging(samples // BATCH, None, form)
                parties.insert(0, ours(SPREAD, algorithm, params, everywhere, cohort_size))
            with tempfile.TemporaryDirectory() as folder:
                task = Path(folder) / "task.npz"
                np.savez(task, cohorts=cohorts, orders=orders, is_smooth=is_smooth, **arrays)
                with workers(size, task) as (found, absent):
                    last = CHECKED if is_smooth else num_rounds
                    played[is_smooth] = play(parties + found, absent, last), absent
        rows += compare(model, *played[True], *played[False])
    return rows


def play(parties: Sequence[Party], absent: dict[str, str], num_rounds: int) -> dict[str, Played]:
    """Let all parties do the rounds in turns; one that fails is put among the absent."""
    times: dict[str, list[tuple[float, float]]] = {party.name: [] for party in parties}
    params: dict[str, list[np.ndarray]] = {}
    for index in range(num_rounds):
        for party in parties:
            if party.name in absent:
                continue
            try:
                times[party.name].append(party.round())
                if index == CHECKED - 1:
                    params[party.name] = party.params()
            except PeerError as error:
                absent[party.name] = f"failed in round {index}: {error}"
    return {
        name: Played(np.array(times[name]), params[name]) for name in times if name not in absent
    }


def compare(
    model: str,
    smooth: dict[str, Played],
    smooth_absent: dict[str, str],
    timed: dict[str, Played],
    absent: dict[str, str],
) -> Rows:
    """Make the rows of a model from its smooth rounds and the timed ones."""
    rows = []
    for name, (times, _) in timed.items():
        cpu, wall = times[UNTIMED:].T
        row = {"table": "peers", "model": model, "party": name}
        row |= {"wall_ms": 1e3 * float(np.median(wall)), "wall_min_ms": 1e3 * float(wall.min())}
        row |= {"cpu_ms": 1e3 * float(cpu.mean())}
        row |= {"difference": _to_reference(smooth, name)}
        row |= {"difference_timed": _to_reference(timed, name)}
        rows.append(row)
    none = dict.fromkeys(("wall_ms", "wall_min_ms", "cpu_ms", "difference", "difference_timed"))
    for name, reason in (smooth_absent | absent).items():
        if name not in timed:
            rows.append({"table": "peers", "model": model, "party": f"{name} ({reason})", **none})
    base = rows[0]
    for row in rows:
        for clock in ("wall", "wall_min", "cpu"):
            mine, its = base[f"{clock}_ms"], row[f"{clock}_ms"]
            row[f"{clock}_ratio"] = None if its is None else its / mine
    return rows


def _to_reference(played: dict[str, Played], name: str) -> float | None:
    if name not in played or REFERENCE not in played:
        return None
    return _difference(played[name].params, played[REFERENCE].params)


def _difference(params: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    pairs = zip(params, others, strict=True)
    return max(float(np.max(np.abs(mine - its))) for mine, its in pairs)


def cohorts(size: str) -> Rows:
    """Measure temporary memory and throughput as the cohort grows, for every way to map it."""
    small = size == "small"
    side, steps = (8, 2) if small else (28, 5)
    samples = 2 * BATCH if small else SAMPLES
    models = {"mlp": mlp(side, 12)} if small else {"mlp": mlp(side, 200), "cnn": cnn(side)}
    rows = []
    for count in (3,) if small else (10, 100, 1000):
        data = federation(count, side, samples)
        for model, params in models.items():
            for plan_name, chunk in {"chunk 1": 1, "chunk 10": 10, "vmap": count}.items():
                step, state = compiled_round(averaging(steps, chunk), params, data, None)
                row = {"table": "cohorts", "model": model, "plan": plan_name, "clients": count}
                analysis: Any = step.memory_analysis()
                row["temporary_mb"] = analysis.temp_size_in_bytes / 1e6
                repeats = max(6, 400 // count) if model == "mlp" else 1
                if small or model == "mlp" or (chunk == 1 and count <= 100):
                    call = timing.bind(step, state, data)
                    seconds = timing.measure({"round": call}, repeats=repeats)["round"]
                    row["clients_per_s"] = count / seconds.wall_min
                    row["cpu_ms_per_client"] = 1e3 * seconds.cpu_min / count
                else:
                    row |= dict.fromkeys(("clients_per_s", "cpu_ms_per_client"))
                rows.append(row)
    return rows


def factored(size: str) -> Rows:
    """Time low-rank training with ``W + s U D`` formed, and with the factors applied one by one."""
    small = size == "small"
    width, count, rank = (16, 3, 2) if small else (512, 50, 8)
    samples, steps = 2 * BATCH, 2 if small else 5
    random = np.random.default_rng(0)
    data = protocol.ClientData(
        jnp.asarray(random.standard_normal((count, samples, width), np.float32)),
        jnp.asarray(random.integers(0, 10, (count, samples), np.int32)),
        jnp.ones((count, samples), bool),
    )
    params = _draw([(width, width)] * 3 + [(10, width)])
    settings = fedloru.Settings(rank, None, lambda _, leaf: leaf.shape == (width, width))
    training = local.Training(optax.sgd(RATE), steps, BATCH)
    compiled = {}
    for form in (lowrank.merge, lowrank.apply):
        for chunk in (1, count):
            algorithm = fedloru.assemble(loss, training, settings, form=form, chunk_size=chunk)
            compiled[form.__name__, chunk] = compiled_round(algorithm, params, data, None)
    calls = {
        f"{form}, chunk {chunk}": timing.bind(step, state, data)
        for (form, chunk), (step, state) in compiled.items()
    }
    times = timing.measure(calls, repeats=2 if small else 7)
    base = next(iter(times.values())).wall_min
    rows = []
    for (name, seconds), (step, _) in zip(times.items(), compiled.values(), strict=True):
        analysis: Any = step.memory_analysis()
        rows.append(
            {
                "table": "factored",
                "form": name,
                "width": width,
                "clients": count,
                "rank": rank,
                "wall_min_ms": 1e3 * seconds.wall_min,
                **timing.columns(seconds),
                "gain": base / seconds.wall_min,
                "temporary_mb": analysis.temp_size_in_bytes / 1e6,
            }
        )
    return rows


def convolutions(size: str) -> Rows:
    """Time rounds of the CNN by the library's convolution and by patches, in the same plain loop.

    The loop is written out here, as `local.train` would choose the convolution by itself; `fedlr`
    is its round of the same steps.
    """
    small = size == "small"
    setting = SETTINGS[size]
    count, steps = (2, 2) if small else (10, setting.samples // BATCH)
    data = federation(count, setting.side, setting.samples)
    params = cnn(setting.side)
    forms = {"library": lambda batch_loss: batch_loss, "by patches": convolution.by_patches}
    compiled: dict[str, Any] = {
        f"{name}, {way}": jax.jit(functools.partial(plain_round, form, steps, way == "vmap"))
        .lower(params, data.inputs, data.targets)
        .compile()
        for name, form in forms.items()
        for way in ("scan", "vmap")
    }
    calls = {
        name: timing.bind(call, params, data.inputs, data.targets)
        for name, call in compiled.items()
    }
    compiled["fedlr"], state = compiled_round(averaging(steps, None), params, data, None)
    calls["fedlr"] = timing.bind(compiled["fedlr"], state, data)
    times = timing.measure(calls, repeats=2 if small else 5)
    first = next(iter(times))
    reference = calls[first]()
    rows = []
    for name, seconds in times.items():
        alike = None if name == "fedlr" else _difference(reference, calls[name]())
        rows.append(
            {
                "table": "convolution",
                "form": name,
                "clients": count,
                "steps": steps,
                "wall_min_ms": 1e3 * seconds.wall_min,
                **timing.columns(seconds),
                "gain": times[first].wall_min / seconds.wall_min,
                "temporary_mb": compiled[name].memory_analysis().temp_size_in_bytes / 1e6,
                "difference": alike,
            }
        )
    return rows


def plain_round(form: Callable, steps: int, is_vmapped: bool, params, images, labels):
    """Average the params of all clients after steps of plain SGD on a form of the batch's loss."""

    @form
    def batch_loss(params, rows, targets):
        return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, rows, targets))

    def client(images, labels):
        def step(current, batch):
            slopes = jax.grad(batch_loss)(current, *batch)
            return jax.tree.map(lambda p, g: p - RATE * g, current, slopes), None

        batches = jax.tree.map(
            lambda leaf: leaf[: steps * BATCH].reshape(steps, BATCH, *leaf.shape[1:]),
            (images, labels),
        )
        return lax.scan(step, [jnp.asarray(value) for value in params], batches)[0]

    if is_vmapped:
        return jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(client)(images, labels))

    def add(total, rows):
        return jax.tree.map(jnp.add, total, client(*rows)), None

    total = lax.scan(add, [jnp.zeros_like(value) for value in params], (images, labels))[0]
    return jax.tree.map(lambda leaf: leaf / len(labels), total)


TABLES: dict[str, Callable[[str], Rows]] = {
    "peers": peers,
    "cohorts": cohorts,
    "convolution": convolutions,
    "factored": factored,
}


def run(size: str, only: Sequence[str] | None = None) -> Rows:
    """Run all tables at "small" or "full" size, or those named, and return their rows."""
    if size == "full":  # before JAX sizes its thread pool and makes its devices
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-NUM_CORES:])
        jax.config.update("jax_num_cpu_devices", NUM_CORES)
    return [row for name in only or TABLES for row in TABLES[name](size)]

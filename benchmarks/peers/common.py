"""What the workers of all peers share: the task, the turns with their clocks, and the model.

A worker is started with the path of an .npz file, says {"ready": true}, and answers every line on
standard input with one JSON line: "round" does the next round and tells its CPU and wall seconds,
"params PATH" saves the present parameters there. What else is printed goes to standard error.

Only NumPy is imported here, and PyTorch where it is asked for.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Task",
    "Turns",
    "load",
    "parameters",
    "rows",
    "task_and_model",
    "torch_model",
    "train",
]


class Task(NamedTuple):
    """A federation, and what is to be done in every round.

    Attributes:
        images: Float32, shape (clients, samples, 1, side, side).
        labels: Int64, shape (clients, samples).
        cohorts: Clients of every round, shape (rounds, cohort).
        orders: Order in which each of them reads its samples, shape (rounds, cohort, samples).
        params: Initial weights (out, in, k, k) or (out, in) and biases (out,), in turns.
        batch_size: Examples of a step; a round is one pass over the samples.
        rate: Learning rate of plain SGD.
        is_smooth: Whether tanh and means take the places of ReLU and maxima.
    """

    images: np.ndarray
    labels: np.ndarray
    cohorts: np.ndarray
    orders: np.ndarray
    params: list[np.ndarray]
    batch_size: int
    rate: float
    is_smooth: bool


def load(path: str) -> Task:
    with np.load(path) as file:
        params = [file[f"param_{i}"] for i in range(int(file["num_params"]))]
        return Task(
            images=file["images"],
            labels=file["labels"],
            cohorts=file["cohorts"],
            orders=file["orders"],
            params=params,
            batch_size=int(file["batch_size"]),
            rate=float(file["rate"]),
            is_smooth=bool(file["is_smooth"]),
        )


def rows(task: Task, index: int, place: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples of the cohort's member `place` in the order of round `index`."""
    client, order = task.cohorts[index, place], task.orders[index, place]
    return task.images[client][order], task.labels[client][order]


class Turns:
    """The rounds as they are asked for, with a clock on each.

    `next` ends the round that is running and waits for the next one. It serves loops (`while
    turns.next(): ...`) as well as packages that own the loop, from whatever they call in between.
    """

    def __init__(self, read_params: Callable[[], Sequence[np.ndarray]], *, family: bool = False):
        """Begin to answer; `family` adds the CPU time of the processes this one has started."""
        self.index = -1
        self._read_params = read_params
        self._family = family
        self._clocks: tuple[float, float] | None = None
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._answer({"ready": True})

    def next(self) -> bool:
        """Return whether there is another round, whose number is `index`."""
        if self._clocks is not None:
            wall = time.perf_counter() - self._clocks[0]
            self._answer({"wall": wall, "cpu": self._cpu() - self._clocks[1]})
            self._clocks = None
        while line := sys.stdin.readline():
            command, *rest = line.split(maxsplit=1)
            if command == "round":
                self.index += 1
                cpu = self._cpu()
                self._clocks = time.perf_counter(), cpu
                return True
            np.savez(rest[0].strip(), *self._read_params())
            self._answer({})
        return False

    def _answer(self, values: dict[str, Any]) -> None:
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def _cpu(self) -> float:
        others = _descendants_cpu() if self._family else 0.0
        return time.process_time() + others


def _descendants_cpu() -> float:
    """Add up the CPU seconds of all running processes below this one, in ticks of the kernel."""
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # ended in between
            continue
        number = int(path.parent.name)
        parents[number], ticks[number] = int(fields[1]), int(fields[11]) + int(fields[12])
    total, found = 0, {os.getpid()}
    while found:
        found = {number for number, parent in parents.items() if parent in found}
        total += sum(ticks[number] for number in found)
    return total / os.sysconf("SC_CLK_TCK")


def torch_model(task: Task) -> Any:
    """Build the PyTorch model that the shapes of the params describe, with their values.

    Kernels are convolutions of the same size with a pool of 2 and an activation, matrices are
    layers with activations in between.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]

    activation, pool = (nn.Tanh, nn.AvgPool2d) if task.is_smooth else (nn.ReLU, nn.MaxPool2d)
    layers: list[Any] = []
    for weight in task.params[::2]:
        if weight.ndim == 4:
            out, into, side, _ = weight.shape
            layers += [nn.Conv2d(into, out, side, padding=side // 2), pool(2), activation()]
        else:
            if not any(isinstance(layer, nn.Flatten) for layer in layers):
                layers.append(nn.Flatten())
            layers += [nn.Linear(weight.shape[1], weight.shape[0]), activation()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), task.params, strict=True):
            parameter.copy_(torch.from_numpy(value))
    return model


@functools.cache
def task_and_model(path: str) -> tuple[Task, Any]:
    """Load the task and build its PyTorch model, once in every process."""
    task = load(path)
    return task, torch_model(task)


def parameters(model: Any) -> list[np.ndarray]:
    """Copy the parameters of a PyTorch model."""
    return [parameter.detach().numpy().copy() for parameter in model.parameters()]


def train(model: Any, images: np.ndarray, labels: np.ndarray, task: Task) -> None:
    """Do one pass of plain SGD over the rows in their order, with PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]

    optimizer = torch.optim.SGD(model.parameters(), lr=task.rate)
    inputs, targets = torch.from_numpy(images), torch.from_numpy(labels)
    for first in range(0, len(labels), task.batch_size):
        batch = slice(first, first + task.batch_size)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()

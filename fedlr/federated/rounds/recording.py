"""What a run leaves in a folder: a log to read, and checkpoints to go on from.

``log.jsonl`` has one JSON object a line. The first one says what ran: versions, device, number of
clients, cohort size. Every other one is a round: `round`, the rounds done when it began; `loss`,
the mean over the cohort, and `weighted_loss`, the mean by aggregation weights over the members of
positive weight, both of the state that entered the round; `uplink_bytes` and `downlink_bytes` of
the whole cohort; `seconds`, the wall time of its compiled segment divided by the rounds in it, so
that of the first one includes compiling; `metrics`, the mean over the cohort of every metric with
one number per member, and single numbers as they are; and `evaluation` where there is one. Means
are computed in float64. JSON has no NaN and no Inf: both are written as null.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from fedlr import _checks
from fedlr.federated import checkpoints, protocol

__all__ = ["Output", "Progress", "Run", "begin", "log", "num_done", "rewrite_log", "save", "stack"]

_LOG = "log.jsonl"
_OTHERS = {
    "key": "key",
    "clients": "data of the clients",
    "start": "start state",
    "program": "algorithm, stopping rule or evaluation",
}


class Output(NamedTuple):
    """Where a run writes its log and its checkpoints, and how often.

    The folder belongs to one run. A checkpoint holds the state and all records so far, and a copy
    of the state where there is a stopping rule.

    Attributes:
        folder: Folder, which is made if need be.
        checkpoint_every: Rounds from one checkpoint to the next.
        keep: Number of checkpoints that stay.
    """

    folder: str | os.PathLike[str]
    checkpoint_every: int = 50
    keep: int = 2


class Progress(NamedTuple):
    """How far a run is: what its next round depends on, and what is known of the rounds done.

    Attributes:
        state: State reached.
        memory: Memory of the stopping rule.
        infos: Records, a tuple of pieces whose leaves have a leading axis of rounds.
        seconds: Wall time of every round, a tuple of pieces (rounds,) in float64.
        stopped: Whether the stopping rule has fired, NumPy bool array ().
    """

    state: protocol.FederatedState
    memory: PyTree
    infos: tuple[protocol.RoundInfo, ...]
    seconds: tuple[np.ndarray, ...]
    stopped: np.ndarray


class Run(NamedTuple):
    """What the files of a run say of it.

    Attributes:
        output: Where they are.
        identity: What has to be the same to go on, of types that JSON knows.
        header: First line of the log, of types that JSON knows.
        like: State, memory and record of one round as `jax.ShapeDtypeStruct`.
        first_round: Rounds done in the state that the run started from.
        every: Rounds from one evaluation to the next.
    """

    output: Output
    identity: dict[str, Any]
    header: dict[str, Any]
    like: tuple[PyTree, PyTree, protocol.RoundInfo]
    first_round: int
    every: int


def num_done(progress: Progress) -> int:
    """Return the number of rounds done.

    Args:
        progress: How far a run is.

    Example:
        >>> import numpy as np
        >>> from fedlr.federated.rounds import recording
        >>> pieces = np.ones(3), np.ones(2)
        >>> recording.num_done(recording.Progress((), (), (), pieces, np.array(False)))
        5
    """
    return sum(len(piece) for piece in progress.seconds)


def stack(pieces: tuple[PyTree, ...]) -> PyTree:
    """Join pieces along their leading axis of rounds.

    Args:
        pieces: Pytrees of NumPy arrays, at least one.

    Returns:
        One pytree.

    Example:
        >>> import numpy as np
        >>> from fedlr.federated.rounds import recording
        >>> recording.stack((np.ones((3, 2)), np.ones((1, 2)))).shape
        (4, 2)
    """
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)


def begin(run: Run, start: Progress, num_rounds: int) -> tuple[Run, Progress]:
    """Go on from the last good checkpoint of the folder, or write the first one.

    The log is written anew from the checkpoint, so it has the rounds up to there and no others.

    Args:
        run: The run.
        start: Where it starts if there is no checkpoint.
        num_rounds: Largest number of rounds to do.

    Returns:
        The run, with the header that its log began with, and how far it is.

    Raises:
        ValueError: If the checkpoint is of another run or of more rounds, all are damaged, or the
            folder has a log without checkpoints or cannot be written.
    """
    _checks.check_count("simulate", "checkpoint_every", run.output.checkpoint_every)
    _checks.check_count("simulate", "keep", run.output.keep)
    folder = Path(run.output.folder)
    try:
        found = checkpoints.find_latest(folder, function="simulate")
        if found is not None:
            progress = _restore(run, found, num_rounds)
            run = run._replace(header=found.metadata["header"])
        elif (folder / _LOG).exists():
            got = f"folder {folder} with a {_LOG} but without checkpoints"
            raise _checks.fail("simulate", got, "the checkpoints of that run, or another folder")
        else:
            placed = jax.tree.map(checkpoints.place, (start.state, start.memory), run.like[:2])
            progress = start._replace(state=placed[0], memory=placed[1])
            save(run, progress)
        rewrite_log(run, progress)
    except OSError as error:
        expected = "a folder that can be written"
        raise _checks.fail("simulate", f"folder {folder} ({error})", expected) from error
    return run, progress


def save(run: Run, progress: Progress) -> None:
    """Write a checkpoint.

    Args:
        run: The run.
        progress: How far it is.
    """
    infos = stack((_rows(run.like[2], 0), *progress.infos))
    seconds = stack((np.zeros(0), *progress.seconds))
    checkpoints.save(
        run.output.folder,
        progress._replace(infos=(infos,), seconds=(seconds,)),
        step=num_done(progress),
        metadata={"run": run.identity, "header": run.header},
        keep=run.output.keep,
    )


def log(run: Run, progress: Progress) -> None:
    """Append the last piece of the records to the log.

    Args:
        run: The run.
        progress: How far it is.
    """
    before = num_done(progress) - len(progress.seconds[-1])
    with Path(run.output.folder, _LOG).open("a", encoding="utf-8") as file:
        file.write(_lines(run, before, progress.infos[-1], progress.seconds[-1]))


def rewrite_log(run: Run, progress: Progress) -> None:
    """Write the whole log anew, so that nobody ever sees a part of it under its name.

    Args:
        run: The run.
        progress: How far it is.
    """
    path = Path(run.output.folder, _LOG)
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(run.header) + "\n")
        before = 0
        for infos, seconds in zip(progress.infos, progress.seconds, strict=True):
            file.write(_lines(run, before, infos, seconds))
            before += len(seconds)
    part.replace(path)


def _restore(run: Run, found: checkpoints.Found, num_rounds: int) -> Progress:
    """Read a checkpoint, or refuse it if it is not of this run."""
    saved, wanted = found.metadata["run"], run.identity
    for name in ("num_clients", "cohort_size"):
        if saved[name] != wanted[name]:
            got = f"checkpoint {found.path} of {name} {saved[name]}"
            raise _checks.fail("simulate", got, f"{name} {wanted[name]}, or another folder")
    if found.step > num_rounds:
        got = f"checkpoint {found.path} of {found.step} rounds"
        raise _checks.fail("simulate", got, f"at most num_rounds {num_rounds}, or another folder")
    state, memory, info = run.like
    like = Progress(
        state, memory, (_rows(info, found.step),), (np.zeros(found.step),), np.array(False)
    )
    progress = checkpoints.restore(found, like, function="simulate")
    elsewhere = saved["environment"] != wanted["environment"]
    for name, words in _OTHERS.items():
        # Another version or device makes another program of the same algorithm.
        if saved[name] != wanted[name] and not (elsewhere and name == "program"):
            got = f"checkpoint {found.path} of a run with another {words}"
            raise _checks.fail("simulate", got, "that of this call, or another folder")
    if elsewhere:
        text = (
            f"simulate: {found.path} was written by {saved['environment']}, this is "
            f"{wanted['environment']}: the result may differ from that of an uninterrupted run"
        )
        warnings.warn(text, stacklevel=4)
    return progress


def _rows(like: PyTree, count: int) -> PyTree:
    """Make records of so many rounds, of zeros."""
    return jax.tree.map(lambda leaf: np.zeros((count, *leaf.shape), leaf.dtype), like)


def _lines(run: Run, before: int, infos: protocol.RoundInfo, seconds: np.ndarray) -> str:
    """Write a piece of the records, which begins after `before` rounds of the run."""
    text = ""
    for index, duration in enumerate(seconds):
        number = run.first_round + before + index
        info = jax.tree.map(lambda leaf, index=index: np.asarray(leaf[index]), infos)
        losses, weights = info.losses.astype(float), info.weights.astype(float)
        counted = weights > 0
        total = np.sum(weights[counted])
        weighted = np.sum((weights * losses)[counted]) / total if counted.any() else np.nan
        line = {
            "round": number,
            "loss": _plain(np.mean(losses)),
            "weighted_loss": _plain(weighted),
            "uplink_bytes": int(np.sum(info.uplink_bytes, dtype=np.int64)),
            "downlink_bytes": int(np.sum(info.downlink_bytes, dtype=np.int64)),
            "seconds": float(duration),
            "metrics": {
                name: _plain(np.mean(leaf.astype(float)) if leaf.shape else leaf)
                for name, leaf in _named(info.metrics)
                if leaf.shape in ((), losses.shape)
            },
        }
        if number % run.every == 0:
            found = {name: _plain(leaf) for name, leaf in _named(info.evaluation)}
            # A single array has no name.
            line["evaluation"] = found.get("", found)
        shown = {name: value for name, value in line.items() if value != {}}
        text += json.dumps(shown, allow_nan=False) + "\n"
    return text


def _named(tree: PyTree) -> list[tuple[str, np.ndarray]]:
    """List all leaves with their paths."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _plain(array: np.ndarray | np.floating | float) -> Any:
    """Turn numbers into those of JSON, with None for NaN and Inf."""
    array = np.asarray(array)
    if array.dtype.kind in "biu":
        return array.tolist()
    numbers = array.astype(float).astype(object)
    numbers[~np.isfinite(array)] = None
    return numbers.tolist()

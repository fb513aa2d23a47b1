"""Checkpoints: pytrees of arrays in files that are whole or not there.

A checkpoint is one file: a line with the SHA-256 of all that follows, a line of JSON with the step,
the metadata of the caller and the path, dtype and shape of every leaf, and then the leaves. These
are written by `equinox.tree_serialise_leaves` (one .npy after the other, without pickle), which
gives bool, integer, floating, complex and bfloat16 leaves back bit by bit and is installed with
fedlr anyway, where orbax-checkpoint, made for sharded states of many hosts, brings twelve packages.
"""

import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from fedlr import _checks

__all__ = ["Found", "find_latest", "fingerprint", "place", "restore", "save"]

_FIRST_LINE = re.compile(rb"fedlr checkpoint 1 sha256 ([0-9a-f]{64})\n")
_NAME = re.compile(r"checkpoint-([0-9]+)\.ckpt")


class Found(NamedTuple):
    """A checkpoint whose checksum is right.

    Attributes:
        path: The file.
        step: The step it was saved at.
        metadata: What the caller saved with it.
    """

    path: Path
    step: int
    metadata: dict[str, Any]


def save(
    folder: str | os.PathLike[str],
    tree: PyTree,
    *,
    step: int,
    metadata: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write a checkpoint, and remove those that are older than the last few.

    The file is written under another name, synced to the disk and renamed, so that a process that
    is killed leaves it complete or not at all. Only then older ones are removed. One process writes
    to a folder at a time.

    Args:
        folder: Folder, which is made if need be.
        tree: Pytree of arrays: bool, integer, floating of 16 to 64 bits, or complex. Arrays that
            are spread over devices are gathered.
        step: Number of the checkpoint, not negative. One with the same number is replaced.
        metadata: What else belongs to it, of types that JSON knows.
        keep: Number of checkpoints that stay.

    Returns:
        The file, ``checkpoint-<step>.ckpt`` in the folder.

    Raises:
        ValueError: If `step` is negative, `keep` is not a positive integer, or a leaf is of another
            kind.
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import checkpoints
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = checkpoints.save(folder, {"weights": jnp.ones(3)}, step=7, metadata={})
        ...     found = checkpoints.find_latest(folder)
        ...     tree = checkpoints.restore(found, {"weights": jnp.zeros(3)})
        >>> path.name, found.step, tree
        ('checkpoint-00000007.ckpt', 7, {'weights': Array([1., 1., 1.], dtype=float32)})
    """
    _checks.check_count("save", "step", step, minimum=0)
    _checks.check_count("save", "keep", keep)
    tree = jax.tree.map(_as_array, tree)
    leaves = _describe(tree)
    for name, dtype, _ in leaves:
        if dtype != "bfloat16" and (dtype.startswith("key") or np.dtype(dtype).kind not in "biufc"):
            expected = "bool, integer, floating of 16 to 64 bits, or complex"
            raise _checks.fail("save", f"leaf {name} of dtype {dtype}", expected)
    about = json.dumps({"step": step, "metadata": metadata, "leaves": leaves}, allow_nan=False)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint-{step:08d}.ckpt"
    part = path.with_suffix(".part")
    try:
        with part.open("w+b") as file:
            _write_first_line(file, "0" * 64)
            start = file.tell()
            file.write(about.encode() + b"\n")
            eqx.tree_serialise_leaves(file, tree)
            file.seek(start)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            _write_first_line(file, digest)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(folder)
    older = [other for number, other in _checkpoints(folder) if number < step]
    for useless in (*older[keep - 1 :], *folder.glob("checkpoint-*.part")):
        useless.unlink(missing_ok=True)
    return path


def find_latest(folder: str | os.PathLike[str], *, function: str = "find_latest") -> Found | None:
    """Find the checkpoint of the largest step whose checksum is right.

    Later ones that are damaged are skipped with a warning that names them and the one found.
    Nothing is removed.

    Args:
        folder: Folder, which need not exist.
        function: Name of the caller, for the messages.

    Returns:
        The checkpoint, or None if the folder has none at all.

    Raises:
        ValueError: If there are checkpoints, but all are damaged.

    Example:
        >>> from fedlr.federated import checkpoints
        >>> checkpoints.find_latest("no/such/folder") is None
        True
    """
    damaged = []
    for step, path in _checkpoints(Path(folder)):
        try:
            about = _read_about(path)
        except (OSError, ValueError) as error:
            damaged.append(f"{path.name} ({error})")
            continue
        if damaged:
            skipped = ", ".join(damaged)
            text = f"{function}: skipped damaged {skipped} in {folder}, used is {path.name}"
            warnings.warn(text, stacklevel=2)
        return Found(path, step, about["metadata"])
    if damaged:
        got = f"folder {folder} with only damaged checkpoints: {', '.join(damaged)}"
        raise _checks.fail(function, got, "a good one, or another folder; nothing was removed")
    return None


def restore(found: Found, like: PyTree, *, function: str = "restore") -> PyTree:
    """Read the tree of a checkpoint.

    Args:
        found: What `find_latest` returned.
        like: Pytree of the same structure, shapes and dtypes. Its leaves are JAX arrays or
            `jax.ShapeDtypeStruct` where the result has JAX arrays (see `place`), and NumPy arrays
            where it has those.
        function: Name of the caller, for the message.

    Returns:
        The tree as it was saved, bit by bit.

    Raises:
        ValueError: If a path, shape or dtype differs; the message names the leaf.

    Example:
        >>> import tempfile
        >>> import jax
        >>> import numpy as np
        >>> from fedlr.federated import checkpoints
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = checkpoints.save(folder, (np.arange(3.0), 1), step=0, metadata={"of": "me"})
        ...     found = checkpoints.find_latest(folder)
        ...     like = (np.zeros(3), jax.ShapeDtypeStruct((), "int32"))
        ...     print(found.metadata, checkpoints.restore(found, like))
        {'of': 'me'} (array([0., 1., 2.]), Array(1, dtype=int32))
    """
    with found.path.open("rb") as file:
        file.readline()
        saved = json.loads(file.readline())["leaves"]
        _check_leaves(function, found.path, saved, _describe(like))
        tree = eqx.tree_deserialise_leaves(file, jax.tree.map(_on_disk, like))
    return jax.tree.map(place, tree, like)


def place(array: Array | np.ndarray, like: Any) -> Array | np.ndarray:
    """Give an array the dtype, the weak type and the place of another one.

    Args:
        array: Array.
        like: NumPy array, JAX array or `jax.ShapeDtypeStruct` of the same shape. Where it is a JAX
            array committed to devices, or has a sharding, the result is spread in the same way.

    Returns:
        A NumPy array if `like` is one, else a JAX array.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from fedlr.federated import checkpoints
        >>> checkpoints.place(np.arange(3), jnp.full(3, 0.5)).weak_type
        True
    """
    if isinstance(like, np.ndarray):
        return np.asarray(array, like.dtype)
    array = jnp.asarray(array, like.dtype)
    if getattr(like, "weak_type", False):
        # Conversions give strong types only, but a scatter keeps the weak type of its operand.
        weak = jnp.full(like.shape, np.zeros((), like.dtype).item())
        array = weak.at[...].set(array) if weak.dtype == like.dtype else array
    committed = getattr(like, "committed", True)
    sharding = getattr(like, "sharding", None) if committed else None
    return array if sharding is None else jax.device_put(array, sharding)


def fingerprint(tree: PyTree) -> str:
    """Hash the paths, dtypes, shapes and bits of all leaves.

    Args:
        tree: Pytree of concrete arrays; random keys too.

    Returns:
        A SHA-256 in hexadecimal.

    Example:
        >>> import numpy as np
        >>> from fedlr.federated import checkpoints
        >>> checkpoints.fingerprint(np.zeros(3)) == checkpoints.fingerprint(np.zeros((3, 1)))
        False
    """
    tree = jax.tree.map(_as_array, tree)
    digest = hashlib.sha256(json.dumps(_describe(tree)).encode())
    for leaf in jax.tree.leaves(tree):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        digest.update(np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
    return digest.hexdigest()


def _write_first_line(file, digest: str) -> None:
    file.write(f"fedlr checkpoint 1 sha256 {digest}\n".encode())


def _sync_folder(folder: Path) -> None:
    """Make a rename last; Windows has no such call for folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """List steps and files of the checkpoints of a folder, the latest first."""
    if not folder.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _read_about(path: Path) -> dict[str, Any]:
    """Return the description in a checkpoint, or raise a ValueError that says what is wrong."""
    with path.open("rb") as file:
        match = _FIRST_LINE.fullmatch(file.readline(256))
        if match is None:
            raise ValueError("not the first line of a checkpoint")
        start = file.tell()
        if hashlib.file_digest(file, "sha256").hexdigest() != match[1].decode():
            raise ValueError("another sha256 than written in it")
        file.seek(start)
        return json.loads(file.readline())


def _as_array(leaf):
    """Turn Python numbers into arrays, and NumPy's bfloat16, which .npy does not know, into JAX."""
    if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype != jnp.bfloat16:
        return np.asarray(leaf)
    return jnp.asarray(leaf)


def _on_disk(like):
    """Describe a leaf to equinox: a NumPy array without memory, or the shape of a JAX array."""
    if isinstance(like, np.ndarray) and like.dtype != jnp.bfloat16:
        return np.broadcast_to(np.zeros((), like.dtype), like.shape)
    return jax.ShapeDtypeStruct(like.shape, like.dtype)


def _describe(tree: PyTree) -> list[list]:
    """List path, dtype and shape of all leaves."""
    return [
        [jax.tree_util.keystr(path), str(leaf.dtype), list(leaf.shape)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _check_leaves(function: str, path: Path, saved: list[list], wanted: list[list]) -> None:
    """Refuse a checkpoint with other leaves, and name the first one that differs."""
    got, expected = ({name: f"{dtype}{shape}" for name, dtype, shape in x} for x in (saved, wanted))
    for name in [*expected, *got]:
        if got.get(name) != expected.get(name):
            found = f"checkpoint {path} with {name} of {got.get(name, 'no kind')}"
            raise _checks.fail(function, found, expected.get(name, "no such leaf"))

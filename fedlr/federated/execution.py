"""How a cohort is mapped: chunks of vmapped clients, one after the other.

A chunk of one client is a plain scan, which is the fastest on CPU; a chunk that holds the whole
cohort is a plain vmap. In between, memory grows with the chunk and not with the cohort.

Chunk number j of a cohort of M clients in B chunks holds the clients ``j, j + B, j + 2 B, ...``.
With the client axis spread over devices in contiguous blocks, every chunk then has clients of
every device, and no row has to move (chunk size a multiple of the number of devices). A fold then
reduces over the devices once per chunk, so once per round if one chunk holds the whole cohort.

Within ``jax.set_mesh(mesh)``, where the mesh has an axis "clients" of type Auto, any cohort is
spread over it, a sampled one too, whose rows are gathered from wherever the clients lie; chunks
then have a multiple of the number of devices, to which they are rounded up and padded. On CPU this
is how to use all cores: XLA splits the small products of one client badly. With a device per core
(``jax.config.update("jax_num_cpu_devices", 2)`` at the start) the shortest rounds of a perceptron
on two cores took 17 ms instead of 25, of a convolutional network 295 instead of 313 (medians 24 and
27, 307 and 328). `jax.vmap` over seeds works there, without ``spmd_axis_name="clients"``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, PyTree

from fedlr import _checks

__all__ = ["chunk_length", "default_chunk_size", "fold_clients", "map_clients"]


def default_chunk_size() -> int:
    """Return the chunk size used where the caller sets none: per device 1 on CPU, 64 otherwise.

    The devices are those along the axis "clients" of the mesh in `jax.set_mesh`, without one a
    single one. On CPU the scan over single clients was measured faster than vmap at every cohort
    size.

    Example:
        >>> from fedlr.federated import execution
        >>> execution.default_chunk_size() >= 1
        True
    """
    return _num_devices() * (1 if jax.default_backend() == "cpu" else 64)


def chunk_length(length: int, chunk_size: int | None = None) -> int:
    """Return the number of clients that are worked on at once in a cohort.

    Args:
        length: Clients of the cohort, *static*.
        chunk_size: What the caller sets, *static*; None takes `default_chunk_size`.

    Returns:
        The chunk size, at most the cohort. Within `jax.set_mesh` both are rounded up to a multiple
        of the devices; a cohort is padded where it has fewer clients.

    Raises:
        ValueError: If the chunk size is not a positive integer, or the axis "clients" of the mesh
            is of type Explicit.

    Example:
        >>> from fedlr.federated import execution
        >>> execution.chunk_length(10, 4), execution.chunk_length(3, 4)
        (4, 3)
    """
    chunk_size = default_chunk_size() if chunk_size is None else chunk_size
    _checks.check_count("chunk_length", "chunk_size", chunk_size)
    return _rounded_up(min(chunk_size, length), _num_devices())


def map_clients(
    function: Callable[..., PyTree], *args: PyTree, chunk_size: int | None = None
) -> PyTree:
    """Apply a function of one client to a cohort and stack the results.

    Args:
        function: Function of one client: the arguments without their leading axis.
        *args: Pytrees with leading axis (cohort,).
        chunk_size: Clients worked on at once, *static*; None takes `default_chunk_size`.

    Returns:
        The results, stacked along a leading axis (cohort,). This memory grows with the cohort.

    Raises:
        ValueError: If the leading axes differ or are empty, or the chunk size is not a positive
            integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import execution
        >>> execution.map_clients(lambda x: x.sum(), jnp.ones((3, 4)), chunk_size=2)
        Array([4., 4., 4.], dtype=float32)
    """
    return _map_chunks("map_clients", lambda *rows: (None, function(*rows)), args, chunk_size)[1]


def fold_clients(
    function: Callable[..., tuple[PyTree, PyTree]],
    add: Callable[[Any, PyTree, Float[Array, " chunk"]], Any],
    carry: Any,
    weights: Float[Array, " cohort"],
    *args: PyTree,
    chunk_size: int | None = None,
) -> tuple[Any, PyTree]:
    """Apply a function of one client to a cohort and sum its messages as they come.

    No stack of messages is kept: temporary memory grows with the chunk, not with the cohort. A
    last chunk that is not full is padded with repeated clients of weight zero.

    Args:
        function: Function of one client ``(*rows) -> (message, output)``.
        add: ``(carry, messages, weights) -> carry`` for a chunk with leading axis.
        carry: Value to start from.
        weights: Weight of every client, shape (cohort,).
        *args: Pytrees with leading axis (cohort,).
        chunk_size: Clients worked on at once, *static*; None takes `default_chunk_size`.

    Returns:
        The last carry, and the outputs stacked along a leading axis (cohort,).

    Raises:
        ValueError: If the leading axes differ or are empty, or the chunk size is not a positive
            integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import execution
        >>> total, doubled = execution.fold_clients(
        ...     lambda x: (x, 2 * x),
        ...     lambda carry, messages, weights: carry + jnp.sum(weights * messages),
        ...     jnp.float32(0.0),
        ...     jnp.array([1.0, 0.0, 1.0]),
        ...     jnp.array([1.0, 2.0, 3.0]),
        ...     chunk_size=2,
        ... )
        >>> total, doubled
        (Array(4., dtype=float32), Array([2., 4., 6.], dtype=float32))
    """

    def one(_, *rows):
        return function(*rows)

    def fold(carry, messages, chunk_weights):
        return add(carry, messages, chunk_weights)

    return _map_chunks("fold_clients", one, (weights, *args), chunk_size, fold=fold, carry=carry)


def _map_chunks(name, function, args, chunk_size, *, fold=None, carry=None):
    """Scan over chunks of vmapped clients; `fold` joins messages with the first argument."""
    if chunk_size is not None:
        _checks.check_count(name, "chunk_size", chunk_size)
    shapes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(args)}
    if len(shapes) != 1 or not shapes.isdisjoint({(), (0,)}):
        got = f"leading axes {sorted(shapes)}"
        raise _checks.fail(name, got, "one cohort length, at least 1")
    ((length,),) = shapes
    chunk = chunk_length(length, chunk_size)
    num_chunks = -(-length // chunk)
    padding = num_chunks * chunk - length
    args = jax.tree.map(jnp.asarray, args)
    if padding:
        weights = jax.tree.map(lambda leaf: _pad(leaf, padding, repeat=fold is None), args[0])
        args = (weights, *jax.tree.map(lambda leaf: _pad(leaf, padding, repeat=True), args[1:]))
    if _num_devices() > 1:
        args = lax.with_sharding_constraint(args, PartitionSpec("clients"))

    def step(carry, rows):
        if chunk == 1:
            message, output = function(*jax.tree.map(lambda leaf: leaf[0], rows))
            message, output = jax.tree.map(lambda leaf: leaf[None], (message, output))
        else:
            message, output = jax.vmap(function)(*rows)
        return carry if fold is None else fold(carry, message, rows[0]), output

    if num_chunks == 1:
        carry, outputs = step(carry, args)
        return carry, jax.tree.map(lambda leaf: leaf[:length], outputs) if padding else outputs

    def row(leaf, j):
        # Outside of the scan, and with a new axis of length one, the reshaping would let XLA change
        # the layout of data that has such axes itself, and so copy all of it.
        if chunk == 1:
            return lax.dynamic_slice_in_dim(leaf, j, 1)
        leaf = leaf.reshape(chunk, num_chunks, *leaf.shape[1:])
        return lax.dynamic_index_in_dim(leaf, j, axis=1, keepdims=False)

    def body(carry, j):
        return step(carry, jax.tree.map(lambda leaf: row(leaf, j), args))

    carry, outputs = lax.scan(body, carry, jnp.arange(num_chunks, dtype=jnp.int32))
    outputs = jax.tree.map(
        lambda leaf: leaf.swapaxes(0, 1).reshape(num_chunks * chunk, *leaf.shape[2:])[:length],
        outputs,
    )
    return carry, outputs


def _num_devices():
    """Return the number of devices that a cohort is spread over."""
    mesh = jax.sharding.get_abstract_mesh()
    kind = dict(zip(mesh.axis_names, mesh.axis_types, strict=True)).get("clients")
    if kind == AxisType.Explicit:
        got = 'a mesh with an axis "clients" of type Explicit'
        raise _checks.fail("chunk_length", got, "type Auto")
    # Manual within a shard_map, where every device is alone.
    return mesh.shape["clients"] if kind == AxisType.Auto else 1


def _rounded_up(number, factor):
    return -(-number // factor) * factor


def _pad(leaf, padding, *, repeat):
    """Append rows: the first one repeated, or zeros."""
    filler = jnp.repeat(leaf[:1], padding, axis=0)
    filler = filler if repeat else jnp.zeros_like(filler)
    return jnp.concatenate([leaf, filler])

"""Masks of observed entries: NaN at the border, sums that select before they multiply, padding.

A mask is bool with True = observed. Entries that are not observed are replaced by zero *before*
anything is computed from them, so NaN or Inf in them reaches neither a value nor a gradient.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped
from numpy.typing import ArrayLike

from fedlr import _checks

__all__ = ["from_nan", "masked_mean", "masked_norm", "masked_sum", "spread", "stack_ragged"]


def from_nan(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """Turn NaN into a mask: ``(where(isnan(x), 0, x), ~isnan(x))``.

    Args:
        x: Array of any shape, float32 or float64, with NaN for missing entries. Inf stays: it is
            a fault in the data, not a missing entry.

    Returns:
        The array with zeros for NaN, and the mask of the other entries, both of the shape of `x`.

    Raises:
        ValueError: If the dtype is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import masking
        >>> filled, mask = masking.from_nan(jnp.array([1.0, jnp.nan, 3.0]))
        >>> filled.tolist(), mask.tolist()
        ([1.0, 0.0, 3.0], [True, False, True])
    """
    _checks.check_floating("from_nan", x=x)
    mask = ~jnp.isnan(x)
    return jnp.where(mask, x, 0), mask


def masked_sum(
    x: Float[Array, "..."], mask: Bool[Array, "..."], axis: int | tuple[int, ...] | None = None
) -> Float[Array, "..."]:
    """Sum the observed entries.

    Args:
        x: Array, float32 or float64.
        mask: True = observed; of the shape of `x` or of a leading part of it, (clients, samples)
            for x (clients, samples, features).
        axis: Axis or axes of `x` to sum over, all if None; *static*.

    Returns:
        The sum without those axes; 0 where nothing is observed.

    Raises:
        ValueError: If the mask is not bool or fits no leading part of the shape, or the dtype is
            not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import masking
        >>> float(masking.masked_sum(jnp.array([1.0, jnp.nan]), jnp.array([True, False])))
        1.0
    """
    return jnp.sum(_select("masked_sum", x, mask), axis=axis)


def masked_mean(
    x: Float[Array, "..."], mask: Bool[Array, "..."], axis: int | tuple[int, ...] | None = None
) -> Float[Array, "..."]:
    """Average the observed entries.

    Args:
        x: Array, float32 or float64.
        mask: True = observed; of the shape of `x` or of a leading part of it.
        axis: Axis or axes of `x` to average over, all if None; *static*.

    Returns:
        The mean without those axes; 0, with a zero gradient, where nothing is observed.

    Raises:
        ValueError: If the mask is not bool or fits no leading part of the shape, or the dtype is
            not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import masking
        >>> mask = jnp.array([True, False, True])
        >>> float(masking.masked_mean(jnp.array([1.0, jnp.nan, 3.0]), mask))
        2.0
    """
    selected = _select("masked_mean", x, mask)
    count = jnp.sum(spread(mask, jnp.shape(x)), axis=axis, dtype=x.dtype)
    return jnp.sum(selected, axis=axis) / jnp.maximum(count, 1)


def masked_norm(
    x: Float[Array, "..."], mask: Bool[Array, "..."], axis: int | tuple[int, ...] | None = None
) -> Float[Array, "..."]:
    """Take the Euclidean norm of the observed entries: ``sqrt(sum of their squares)``.

    Args:
        x: Array, float32 or float64.
        mask: True = observed; of the shape of `x` or of a leading part of it.
        axis: Axis or axes of `x` to take the norm over, all if None; *static*.

    Returns:
        The norm without those axes. Where it is 0 its gradient is 0, not NaN.

    Raises:
        ValueError: If the mask is not bool or fits no leading part of the shape, or the dtype is
            not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import masking
        >>> mask = jnp.array([True, False, True])
        >>> float(masking.masked_norm(jnp.array([3.0, jnp.nan, 4.0]), mask))
        5.0
    """
    squares = jnp.sum(_select("masked_norm", x, mask) ** 2, axis=axis)
    is_zero = squares == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)))


def spread(
    mask: Bool[Array, "*leading"], shape: tuple[int, ...], *, function: str = "spread"
) -> Bool[Array, "*shape"]:
    """Give a mask of the leading axes the whole shape, the same along all axes that follow.

    Args:
        mask: True = observed; its shape is a leading part of `shape`.
        shape: Shape of the array it is for; *static*.
        function: Name that the message of the check begins with; *static*.

    Returns:
        The mask, bool, of shape `shape`.

    Raises:
        ValueError: If the mask is not bool or fits no leading part of the shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import masking
        >>> masking.spread(jnp.array([True, False]), (2, 3)).tolist()
        [[True, True, True], [False, False, False]]
    """
    ndim = jnp.ndim(mask)
    _checks.check_mask(function, mask, shape[:ndim])
    trailing = (1,) * (len(shape) - ndim)
    return jnp.broadcast_to(jnp.reshape(mask, (*jnp.shape(mask), *trailing)), shape)


def stack_ragged(
    arrays: Sequence[ArrayLike],
) -> tuple[Shaped[Array, "clients longest ..."], Bool[Array, "clients longest"]]:
    """Stack arrays that differ in the length of their first axis, padding with zeros.

    For the host, before anything is compiled: every client's samples become one row.

    Args:
        arrays: One array (length_c, ...) per client, with equal dtypes and trailing shapes.

    Returns:
        The stack (clients, longest, ...), and the mask (clients, longest), True for what was
        there.

    Raises:
        ValueError: If there are no arrays, one has no axes, or dtypes or trailing shapes differ.

    Example:
        >>> import numpy as np
        >>> from fedlr import masking
        >>> stacked, mask = masking.stack_ragged([np.ones((1, 2)), np.ones((3, 2))])
        >>> stacked.shape, mask.tolist()
        ((2, 3, 2), [[True, False, False], [True, True, True]])
    """
    parts = [np.asarray(array) for array in arrays]
    if not parts:
        raise _checks.fail("stack_ragged", "no arrays", "one for every client")
    for client, part in enumerate(parts):
        name = f"array {client}"
        if part.ndim == 0:
            raise _checks.fail("stack_ragged", f"{name} of shape ()", "one axis or more")
        if part.shape[1:] != parts[0].shape[1:]:
            wanted = f"({', '.join(map(str, ('length', *parts[0].shape[1:])))}) as array 0"
            raise _checks.fail("stack_ragged", f"{name} of shape {part.shape}", wanted)
        if part.dtype != parts[0].dtype:
            wanted = f"{parts[0].dtype} as array 0"
            raise _checks.fail("stack_ragged", f"{name} of dtype {part.dtype}", wanted)
    lengths = np.array([len(part) for part in parts])
    stacked = np.zeros((len(parts), lengths.max(), *parts[0].shape[1:]), parts[0].dtype)
    for row, part in zip(stacked, parts, strict=True):
        row[: len(part)] = part
    mask = np.arange(lengths.max())[None, :] < lengths[:, None]
    return jnp.asarray(stacked), jnp.asarray(mask)


def _select(function: str, x: Array, mask: Array) -> Array:
    """Put zeros for what is not observed, arguments checked."""
    _checks.check_floating(function, x=x)
    return jnp.where(spread(mask, jnp.shape(x), function=function), x, 0)

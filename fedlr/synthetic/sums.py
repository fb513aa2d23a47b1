"""Noise of several formats, and a target that depends on sums of its entries."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from fedlr import _checks

__all__ = ["FusedSums", "fused_sums", "sech_response", "softplus_response", "tanh_response"]


class FusedSums(NamedTuple):
    """Noise of three formats and what depends on a few of its entries.

    Attributes:
        inputs: Image, text and vector: shapes (samples, 3, 32, 32), (samples, 10, 50) and
            (samples, 32).
        targets: Targets, shape (samples,).
        sums: Sum of every tenth entry of each of the inputs, shape (samples, 3).
    """

    inputs: tuple[Float[Array, "samples ..."], ...]
    targets: Float[Array, " samples"]
    sums: Float[Array, "samples 3"]


def tanh_response(sums: Float[Array, "*batch 3"]) -> Float[Array, "*batch"]:
    """Compute ``tanh(0.05 s)``, where s adds up the three sums: S1 of the paper.

    Args:
        sums: Sums A, B and C of the image, the text and the vector on the last axis.

    Returns:
        The response, of the shape without the last axis.
    """
    return jnp.tanh(0.05 * sums.sum(axis=-1))


def softplus_response(sums: Float[Array, "*batch 3"]) -> Float[Array, "*batch"]:
    """Compute ``log(1 + exp(0.1 s + 1e-4 A B))``, where s adds up the three sums: S2 of the paper.

    Args:
        sums: Sums A, B and C of the image, the text and the vector on the last axis.

    Returns:
        The response, of the shape without the last axis.
    """
    return jax.nn.softplus(0.1 * sums.sum(axis=-1) + 1e-4 * sums[..., 0] * sums[..., 1])


def sech_response(sums: Float[Array, "*batch 3"]) -> Float[Array, "*batch"]:
    """Compute ``8 sech(0.02 s)``, where s adds up the three sums: S3 of the paper.

    Args:
        sums: Sums A, B and C of the image, the text and the vector on the last axis.

    Returns:
        The response, of the shape without the last axis.
    """
    return 8 / jnp.cosh(0.02 * sums.sum(axis=-1))


def fused_sums(
    num_samples: int,
    response: Callable[[Float[Array, "*batch 3"]], Float[Array, "*batch"]] = tanh_response,
    *,
    key: Key[Array, ""],
    dtype=jnp.float32,
) -> FusedSums:
    """Draw an image, a text and a vector of noise, and a target that depends on all three.

    All entries are independent N(0, 1), and the target is a function, without noise, of the sums A,
    B and C of every tenth entry of the flattened image, text and vector: 308, 50 and 4 entries, so
    ``s = A + B + C`` is N(0, 362). The modalities share nothing, so there is nothing to align. The
    constant predictor, which a method has to beat, has the mean squared error 0.3762, 1.0753 and
    0.3791 for the three responses.

    Args:
        num_samples: Number of samples, at least 1; 3604 numbers each. *Static.*
        response: Function of the sums on a last axis: `tanh_response`, `softplus_response`,
            `sech_response` or the caller's own. *Static.*
        key: Random key.
        dtype: float32 or float64. *Static.*

    Returns:
        Inputs, targets and sums.

    Raises:
        ValueError: If the number is not a positive integer, or the dtype is another.

    Example:
        >>> import jax
        >>> from fedlr import synthetic
        >>> data = synthetic.fused_sums(5, synthetic.sech_response, key=jax.random.key(0))
        >>> [x.shape for x in data.inputs], data.targets.shape
        ([(5, 3, 32, 32), (5, 10, 50), (5, 32)], (5,))

    Reference: arXiv 2512.02076, the simulated data and their responses S1, S2 and S3.
    """
    _checks.check_count("fused_sums", "num_samples", num_samples)
    if jnp.dtype(dtype) not in (jnp.float32, jnp.float64):
        raise _checks.fail("fused_sums", f"dtype {jnp.dtype(dtype)}", "float32 or float64")
    shapes = ((3, 32, 32), (10, 50), (32,))
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    draws = jnp.split(jax.random.normal(key, (num_samples, ends[-1]), dtype), ends[:-1], axis=1)
    sums = jnp.stack([draw[:, ::10].sum(axis=1) for draw in draws], axis=1)
    inputs = tuple(
        draw.reshape(num_samples, *shape) for draw, shape in zip(draws, shapes, strict=True)
    )
    return FusedSums(inputs, response(sums), sums)

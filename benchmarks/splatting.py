"""Pixel-driven linear splatting: the projector of the reference table at n = 100.

It is not the library's projector: it is kept to compare with figures taken on it.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def num_bins(size: int) -> int:
    """Return the number of unit bins that hold the diagonal of a square image."""
    return math.ceil(math.sqrt(2.0) * size)


def project(
    image: Float[Array, "size size"], angles: Float[Array, " views"]
) -> Float[Array, "views bins"]:
    """Project by giving every pixel to the two bins around its centre, linearly.

    With t = X cos a + Y sin a + (bins - 1) / 2 a pixel goes to the bins floor(t) and floor(t) + 1
    with the weights 1 - frac(t) and frac(t).

    Args:
        image: Square image.
        angles: Viewing angles in radians.

    Returns:
        Sinogram with `num_bins(size)` unit bins a view.
    """
    size = image.shape[0]
    bins = num_bins(size)
    centred = jnp.arange(size, dtype=image.dtype) - (size - 1) / 2

    def view(angle):
        position = (
            centred[None, :] * jnp.cos(angle) - centred[:, None] * jnp.sin(angle) + (bins - 1) / 2
        )
        below = jnp.floor(position)
        right = position - below
        index = below.astype(jnp.int32)
        sums = jnp.zeros(bins, image.dtype)
        sums = sums.at[index].add((1 - right) * image, mode="promise_in_bounds")
        return sums.at[index + 1].add(right * image, mode="promise_in_bounds")

    return jax.lax.map(view, angles)

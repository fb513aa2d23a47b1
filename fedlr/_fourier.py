"""Projection through the Fourier slice theorem, for stacks of images.

The Fourier transform of a view is the slice of the image's transform along the view's direction.
The slices are read off a twice oversampled FFT by `TAPS` x `TAPS` interpolation with the kernel
exp(beta (sqrt(1 - (2 d/TAPS)^2) - 1)), beta = 2.30 TAPS, whose own transform is divided out of the
image beforehand. Pixels are sinc functions here, not boxes or lines: a model independent of
Joseph's. Six taps leave an error of 2e-6 on smooth images, four of 2e-4.

Reference: A. H. Barnett, J. Magland and L. af Klinteberg, "A parallel nonuniform fast Fourier
transform library based on an exponential of semicircle kernel", SIAM Journal on Scientific
Computing 41(5), 2019, eq. (1.8).
"""

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["project"]

TAPS = 6
BETA = 2.30 * TAPS


def _kernel(distance):
    """Evaluate the interpolation kernel; its gradient is finite at the edge too."""
    height = 1 - (2 * distance / TAPS) ** 2
    inside = height > 0
    root = jnp.sqrt(jnp.where(inside, height, 1))
    return jnp.where(inside, jnp.exp(BETA * (root - 1)), 0)


def _roll_off(size, grid):
    """Transform of the kernel at the pixels -(size//2) .. of an FFT of `grid` points."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    values = np.exp(BETA * (np.sqrt(1 - nodes**2) - 1)) * weights * TAPS / 2
    pixels = np.arange(size) - size // 2
    return np.cos(np.pi * TAPS * np.outer(pixels, nodes) / grid) @ values


def _spectrum(image, grid):
    """Oversampled FFT of an image (rows, columns, batch) about the pixel (rows//2, columns//2)."""
    rows, columns, _ = image.shape
    roll_off = np.outer(_roll_off(rows, grid), _roll_off(columns, grid))
    flat = image / jnp.asarray(roll_off, image.dtype)[:, :, None]
    padded = jnp.pad(flat, ((0, grid - rows), (0, grid - columns), (0, 0)))
    centered = jnp.roll(padded, (-(rows // 2), -(columns // 2)), axis=(0, 1))
    return jnp.fft.fft2(centered, axes=(0, 1))


def project(images, angles, num_bins):
    """Project images (groups, rows, columns, batch) along angles (groups, views).

    Returns:
        Sinograms (groups, views, num_bins, batch).
    """
    return jax.vmap(lambda image, angle: _project_group(image, angle, num_bins))(images, angles)


def _project_group(image, angles, num_bins):
    rows, columns, batch = image.shape
    dtype, grid = image.dtype, 2 * max(rows, columns)
    period = 2 * max(rows, columns, num_bins)
    spectrum = _spectrum(image, grid).reshape(grid * grid, batch)

    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    radius = jnp.arange(period // 2 + 1, dtype=dtype)[None, :] / period
    position_x, position_y = grid * radius * cos, -grid * radius * sin
    first_x = jax.lax.stop_gradient(jnp.floor(position_x)) - (TAPS // 2 - 1)
    first_y = jax.lax.stop_gradient(jnp.floor(position_y)) - (TAPS // 2 - 1)

    def add_tap(total, tap):
        down, across = (number.astype(dtype) for number in jnp.divmod(tap, TAPS))
        node_x, node_y = first_x + across, first_y + down
        weight = _kernel(position_x - node_x) * _kernel(position_y - node_y)
        row, column = (jnp.mod(node.astype(jnp.int32), grid) for node in (node_y, node_x))
        value = spectrum.at[row * grid + column].get(mode="promise_in_bounds")
        return total + weight[..., None].astype(value.dtype) * value, None

    total = jnp.zeros((*position_x.shape, batch), spectrum.dtype)
    total, _ = jax.lax.scan(add_tap, total, jnp.arange(TAPS * TAPS, dtype=jnp.int32))

    # from the pixel of the FFT to the image's centre, and from the first bin to the detector's
    shift_x, shift_y = columns // 2 - (columns - 1) / 2, (rows - 1) / 2 - rows // 2
    shift = shift_x * cos + shift_y * sin + (num_bins - 1) / 2
    turn = 2 * jnp.pi * radius * shift
    total = total * jax.lax.complex(jnp.cos(turn), -jnp.sin(turn))[..., None]
    return jnp.fft.irfft(total, period, axis=1)[:, :num_bins]

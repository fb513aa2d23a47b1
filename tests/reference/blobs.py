"""Gaussian blobs a exp(-|x - x0|^2 / (2 g^2)) with closed-form sinograms, in float64.

Smooth objects on which a projector shows its order. Coordinates and units are those of
`fedlr.phantoms`: the square [-1, 1]^2, sinograms in pixel units.
"""

import numpy as np

# a, x0, y0, g
STANDARD = np.array(
    [
        (1.0, 0.2, 0.1, 0.12),
        (0.7, -0.3, -0.25, 0.08),
        (-0.5, 0.1, -0.4, 0.06),
        (0.6, -0.2, 0.45, 0.1),
    ]
)


def turned(blobs, angle):
    """Rotate the blobs about the origin, counter-clockwise, by an angle in radians."""
    amplitude, x, y, width = blobs.T
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([amplitude, cos * x - sin * y, sin * x + cos * y, width], axis=1)


def rasterize(blobs, size):
    """Sample blobs (blobs, 4) at the pixel centres of a square image."""
    centers = (np.arange(size) - (size - 1) / 2) / (size / 2)
    return sum(
        a * np.outer(_profile(-centers - y, g), _profile(centers - x, g)) for a, x, y, g in blobs
    )


def sinogram(blobs, angles, num_bins, size):
    """Integrate blobs (blobs, 4) along the lines through the bins' centres, (views, num_bins).

    A blob has (size/2) a g sqrt(2 pi) exp(-(t - x0 cos theta - y0 sin theta)^2 / (2 g^2)) with the
    detector coordinate t in half widths.
    """
    angles = np.asarray(angles, np.float64)[:, None]
    t = (np.arange(num_bins) - (num_bins - 1) / 2) / (size / 2)
    return sum(
        size
        / 2
        * a
        * g
        * np.sqrt(2 * np.pi)
        * _profile(t - x * np.cos(angles) - y * np.sin(angles), g)
        for a, x, y, g in blobs
    )


def _profile(distance, width):
    return np.exp(-(distance**2) / (2 * width**2))

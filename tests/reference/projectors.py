"""Projection matrices in float64, entry by entry."""

import numpy as np


def joseph_view(shape, num_bins, angle):
    """Build Joseph's matrix of one view, (num_bins, rows * columns), ray by ray."""
    rows, columns = shape
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.zeros((num_bins, rows, columns))
    for b in range(num_bins):
        t = b - (num_bins - 1) / 2
        if abs(cos) >= abs(sin):
            for i in range(rows):
                y = (rows - 1) / 2 - i
                position = (t - y * sin) / cos + (columns - 1) / 2
                j = int(np.floor(position))
                for column, weight in ((j, 1 - (position - j)), (j + 1, position - j)):
                    if 0 <= column < columns:
                        matrix[b, i, column] += weight / abs(cos)
        else:
            for j in range(columns):
                x = j - (columns - 1) / 2
                position = (rows - 1) / 2 - (t - x * cos) / sin
                i = int(np.floor(position))
                for row, weight in ((i, 1 - (position - i)), (i + 1, position - i)):
                    if 0 <= row < rows:
                        matrix[b, row, j] += weight / abs(sin)
    return matrix.reshape(num_bins, rows * columns)


def joseph(shape, num_bins, angles):
    """Stack the views of `joseph_view`: (num_angles, num_bins, rows * columns)."""
    return np.stack([joseph_view(shape, num_bins, angle) for angle in angles])


def splatting(shape, num_bins, angles):
    """Build the pixel-driven matrix, which gives a pixel to the two bins around its centre.

    t = X cos a + Y sin a + (num_bins - 1)/2 goes to the bins floor(t) and floor(t) + 1 with weights
    1 - frac(t) and frac(t): (num_angles, num_bins, rows * columns).
    """
    rows, columns = shape
    matrix = np.zeros((len(angles), num_bins, rows, columns))
    for a, angle in enumerate(angles):
        for i in range(rows):
            for j in range(columns):
                x, y = j - (columns - 1) / 2, (rows - 1) / 2 - i
                t = x * np.cos(angle) + y * np.sin(angle) + (num_bins - 1) / 2
                below = int(np.floor(t))
                for b, weight in ((below, 1 - (t - below)), (below + 1, t - below)):
                    if 0 <= b < num_bins:
                        matrix[a, b, i, j] += weight
    return matrix.reshape(len(angles), num_bins, rows * columns)


def splat(image, num_bins, angles):
    """Project one image by the operator of `splatting` without its matrix."""
    rows, columns = image.shape
    x = np.arange(columns) - (columns - 1) / 2
    y = (rows - 1) / 2 - np.arange(rows)
    sinogram = np.zeros((len(angles), num_bins))
    for view, angle in zip(sinogram, angles, strict=True):
        t = x[None, :] * np.cos(angle) + y[:, None] * np.sin(angle) + (num_bins - 1) / 2
        below = np.floor(t).astype(int)
        for b, weight in ((below, 1 - (t - below)), (below + 1, t - below)):
            seen = (b >= 0) & (b < num_bins)
            np.add.at(view, b[seen], (weight * image)[seen])
    return sinogram

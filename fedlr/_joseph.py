"""Joseph's projector and its transpose for stacks of images, both as gathers.

For one view let c = cos theta, s = sin theta and p the one of larger modulus. Rays march over the
image lines that they cross most steeply, rows if p = c and columns if p = s (a "swapped" view),
interpolate linearly along each line and divide the sum by |p|. In the transpose a pixel at detector
coordinate t lies between two bins i <= t <= i + 1 and receives max(0, 1 - |t - bin|/|p|)/|p| of
each: the entries of the same matrix, since at most these two bins see the pixel when |p| <= 1.

Positions are fixed-point integers: the index of a tap is their upper part and its weight the lower
one. Integer sums are exact, so index and weight belong together however the compiler splits or
repeats the computation, which float positions next to a pixel boundary do not guarantee.

Layout, measured on CPU: the batch is the last axis, so that one position serves the whole batch; a
ray and its mirror image through the centre have mirrored positions, so that half of the bins (or
pixels) are computed for the batch and its mirror image at once; and both taps are one gather of
neighbouring memory. With 8 images these are 32 contiguous numbers, which the compiler turns into
vector loads; fewer it loads one by one, 3.5 times slower, hence `FULL_BATCH`.

Reference: P. M. Joseph, "An improved algorithm for reprojecting rays through pixel images", IEEE
Transactions on Medical Imaging 1(3), 1982.
"""

import jax
import jax.numpy as jnp

__all__ = ["backproject", "interpolate", "interpolate_view", "project", "project_view"]

PAD = 2  # zeros on either side of a line; positions outside it are clipped to them
FULL_BATCH = 8  # a batch from half of it on is filled up with zeros to this


def _march(angles, shape):
    """How the rays of every view cross the image.

    Returns swapped, 1/|p|, the steps along a line per bin and per line, and the centres of a line
    and of the stack of lines.
    """
    across, down = (shape[1] - 1) / 2, (shape[0] - 1) / 2
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    swapped = jnp.abs(cos) < jnp.abs(sin)
    steep = jnp.where(swapped, sin, cos)
    per_bin = jnp.where(swapped, -1, 1) / steep
    per_line = jnp.where(swapped, cos, sin) / steep
    center = jnp.where(swapped, down, across).astype(angles.dtype)
    center_line = jnp.where(swapped, across, down).astype(angles.dtype)
    return swapped, 1 / jnp.abs(steep), per_bin, per_line, center, center_line


def _centered(count, dtype):
    """Coordinates of `count` pixels or bins about their centre, (1, 1, count)."""
    return (jnp.arange(count, dtype=dtype) - (count - 1) / 2)[None, None, :]


def _lines(images):
    """Rows and columns of images (groups, rows, columns, batch) as lines with zeros around.

    Returns an array (groups, 2, size, size + 2 PAD, batch), size the larger side.
    """
    size = max(images.shape[1:3])

    def pad(stack):
        missing = [size - side for side in stack.shape[1:3]]
        return jnp.pad(stack, ((0, 0), (0, missing[0]), (PAD, PAD + missing[1]), (0, 0)))

    return jnp.stack([pad(images), pad(images.swapaxes(1, 2))], axis=1)


def _fixed_point(dtype, largest):
    """Return `encode`, floats up to `largest` to integers, and `decode`, to index and weight."""
    integer = jnp.dtype(f"int{8 * jnp.dtype(dtype).itemsize}")
    bits = jnp.iinfo(integer).bits - 1 - int(largest).bit_length()

    def encode(values):
        return jnp.round(values * 2.0**bits).astype(integer)

    def decode(positions):
        weight = (positions & (2**bits - 1)).astype(dtype) * 0.5**bits
        return positions >> bits, weight

    return encode, decode


def _add_mirrored(stack, axes):
    """Append the mirror images along `axes` to the batch."""
    batch = stack.shape[-1]
    missing = FULL_BATCH - batch if FULL_BATCH // 2 <= batch < FULL_BATCH else 0
    stack = jnp.pad(stack, ((0, 0), (0, 0), (0, 0), (0, missing)))
    return jnp.concatenate([stack, jnp.flip(stack, axes)], axis=-1)


def _complete(total, batch, axes, count):
    """Sum the taps and join the half that was computed with its mirrored counterpart."""
    total = sum(jnp.split(total, 2, axis=-1))
    half, mirrored = (part[..., :batch] for part in jnp.split(total, 2, axis=-1))
    axis = axes[0]
    known = half.shape[axis]
    other = jax.lax.slice_in_dim(jnp.flip(mirrored, axes), 2 * known - count, known, axis=axis)
    return jnp.concatenate([half, other], axis=axis)


def _two_taps(content, index):
    """Read neighbouring entries of `content` (positions, batch) at and after `index` side by side.

    The indices are unsigned, which spares the handling of negative ones.
    """
    batch = content.shape[-1]
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(index.ndim,), collapsed_slice_dims=(), start_index_map=(0,)
    )
    start = (index * batch).astype(jnp.uint32)[..., None]
    return jax.lax.gather(content.ravel(), start, numbers, (2 * batch,), mode="promise_in_bounds")


def _per_tap(left, right, batch):
    """Spread the weights of the two taps over what `_two_taps` reads."""
    second = jnp.repeat(jnp.arange(2, dtype=left.dtype), batch)[None, None, None, :]
    return (1 - second) * left[..., None] + second * right[..., None]


def project(images, angles, num_bins, unroll):
    """Project images (groups, rows, columns, batch) along angles (groups, views).

    All views of all groups advance together, one image line per step, so that what a step reads
    and the running sinogram stay in the cache.

    Returns:
        Sinograms (groups, views, num_bins, batch).
    """
    batch, half = images.shape[-1], -(-num_bins // 2)
    images = _add_mirrored(images, (1, 2))
    groups, rows, columns, lanes = images.shape
    size, dtype = max(rows, columns), images.dtype
    width = size + 2 * PAD
    swapped, length, per_bin, per_line, center, center_line = _march(angles, (rows, columns))
    encode, decode = _fixed_point(dtype, size + num_bins + 2 * PAD)
    start = encode(per_bin[..., None] * _centered(num_bins, dtype)[..., :half])
    start = start + encode(center + PAD)[..., None]
    slab = 2 * jnp.arange(groups, dtype=start.dtype)[:, None] + swapped.astype(start.dtype)
    lines = _lines(images).transpose(2, 0, 1, 3, 4).reshape(size, groups * 2 * width, lanes)

    def add_line(total, line):
        number, content = line
        shift = encode(per_line * (number - center_line))
        index, weight = decode(start + shift[..., None])
        index = jnp.clip(index, 0, size + PAD) + (slab * width)[..., None]
        return total + _per_tap(1 - weight, weight, lanes) * _two_taps(content, index), None

    total = jnp.zeros((groups, angles.shape[1], half, 2 * lanes), dtype)
    numbers = jnp.arange(size, dtype=dtype)
    total, _ = jax.lax.scan(add_line, total, (numbers, lines), unroll=unroll)
    return _complete(total, batch, (2,), num_bins) * length[..., None, None]


def _smear(sinograms, angles, shape, unroll, weigh):
    """Sum two weighted bins of every view into each pixel, one view of every group per step.

    `weigh(index, weight, length)` turns positions into the weights of the bins at and after them.
    """
    batch, half = sinograms.shape[-1], -(-shape[0] // 2)
    sinograms = _add_mirrored(sinograms, (2,))
    groups, _, num_bins, lanes = sinograms.shape
    dtype, (rows, columns) = sinograms.dtype, shape
    width = num_bins + 2 * PAD
    encode, decode = _fixed_point(dtype, rows + columns + num_bins + 2 * PAD)
    center = encode(jnp.asarray((num_bins - 1) / 2 + PAD, dtype))
    x = encode(jnp.cos(angles)[..., None] * _centered(columns, dtype))
    y = encode(jnp.sin(angles)[..., None] * -_centered(rows, dtype)[..., :half])
    slab = jnp.arange(groups, dtype=center.dtype)[:, None, None]
    views = jnp.pad(sinograms, ((0, 0), (0, 0), (PAD, PAD), (0, 0)))

    def add_view(total, view):
        content, across, down, length = view
        index, weight = decode(across[:, None, :] + down[:, :, None] + center)
        left, right = weigh(index - PAD, weight, length[:, None, None])
        index = jnp.clip(index, 0, num_bins + PAD) + slab * width
        taps = _two_taps(content.reshape(groups * width, lanes), index)
        return total + _per_tap(left, right, lanes) * taps, None

    total = jnp.zeros((groups, half, columns, 2 * lanes), dtype)
    length = 1 / jnp.maximum(jnp.abs(jnp.cos(angles)), jnp.abs(jnp.sin(angles)))
    per_view = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), (views, x, y, length))
    total, _ = jax.lax.scan(add_view, total, per_view, unroll=unroll)
    return _complete(total, batch, (1, 2), rows)


def backproject(sinograms, angles, shape, unroll):
    """Transpose `project`: sinograms (groups, views, bins, batch), angles (groups, views).

    Returns:
        Images (groups, rows, columns, batch).
    """

    def weigh(index, weight, length):
        del index
        left = jnp.maximum(1 - weight * length, 0) * length
        return left, jnp.maximum(1 - length + weight * length, 0) * length

    return _smear(sinograms, angles, shape, unroll, weigh)


def interpolate(sinograms, angles, shape, unroll):
    """Sum the linear interpolation of every view, zero off the detector; shapes of `backproject`.

    Returns:
        Images (groups, rows, columns, batch).
    """
    last = sinograms.shape[2] - 1

    def weigh(index, weight, length):
        del length
        on_detector = (index >= 0) & (index.astype(weight.dtype) + weight <= last)
        return jnp.where(on_detector, 1 - weight, 0), jnp.where(on_detector, weight, 0)

    return _smear(sinograms, angles, shape, unroll, weigh)


def project_view(image, angle, num_bins):
    """Project one image (rows, columns) along one angle with float positions.

    The definition, line by line. It is differentiable in the angle, away from the angles and rays
    where a tap changes.
    """
    dtype, size = image.dtype, max(image.shape)
    swapped, length, per_bin, per_line, center, center_line = _march(angle, image.shape)
    by_row, by_column = _lines(image[None, :, :, None])[0, ..., 0]
    lines = jnp.where(swapped, by_column, by_row)
    t = _centered(num_bins, dtype)[0]
    number = jnp.arange(size, dtype=dtype)[:, None]
    position = center + per_bin * t + per_line * (number - center_line)
    position = jnp.clip(position + PAD, 0, size + PAD)
    below = jax.lax.stop_gradient(jnp.floor(position))
    index = below.astype(jnp.int32)
    left = jnp.take_along_axis(lines, index, axis=1, mode="promise_in_bounds")
    right = jnp.take_along_axis(lines, index + 1, axis=1, mode="promise_in_bounds")
    return length * (left + (position - below) * (right - left)).sum(0)


def interpolate_view(view, angle, shape):
    """Interpolate one view (num_bins,) at every pixel's centre with float positions.

    The definition of `interpolate`, differentiable in the angle away from the bins' centres.
    """
    dtype, last = view.dtype, view.size - 1
    across, down = (_centered(count, dtype)[0] for count in (shape[1], shape[0]))
    position = across * jnp.cos(angle) - down.T * jnp.sin(angle) + last / 2
    below = jax.lax.stop_gradient(jnp.floor(jnp.clip(position, 0, last)))
    index = below.astype(jnp.int32)
    left = view.at[index].get(mode="promise_in_bounds")
    right = view.at[jnp.minimum(index + 1, last)].get(mode="promise_in_bounds")
    on_detector = (position >= 0) & (position <= last)
    return jnp.where(on_detector, left + (position - below) * (right - left), 0)

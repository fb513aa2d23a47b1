"""A convolution by patches and a matrix product.

Inside a loop (scan, while_loop, fori_loop), XLA on CPU runs a convolution many times slower than
outside, and vmap over kernels makes it a grouped convolution, slower still. `conv` lays the windows
under the kernel side by side and multiplies matrices, which a loop does not slow down; kernels per
client become a batched product. `by_patches` does so for every convolution of a function, and
`for_loops` does on CPU only.

Measured on a 2-core CPU in float32: ten SGD steps, batch 20, forward and backward, in milliseconds.

    two layers                       clients   library in a scan   in single steps   patches, scan
    28x28x1, 5x5 to 32, 5x5 to 64    1                      1250                83              84
    the same                         5, vmap                6290              1060             545
    8x8x32, 3x3 to 32, twice         1                        84                12              10
    the same                         5, vmap                 421                91              46

So one client in a loop costs what the library takes outside of one, and on CPU clients one after
the other are faster than under vmap. The windows have the channels and offsets first and the places
last, which is copied in long pieces; with the places first, as for a product per place, the same
steps took 1.1 to 1.7 times as long. Along one axis the offsets go to the features instead of the
windows where that copies less: a product gives every entry times every offset, which is shifted and
summed. Other forms were slower in the scan: a gather of the windows, a product per row or offset of
the kernel; `lax.conv_general_dilated_patches` is itself a convolution. A loss of one example under
vmap is slower than one of the batch. The price is memory: the windows are up to as many times
larger than the inputs as the kernel has offsets, and reverse mode keeps them; where offsets go to
the features, the product is larger than the output as many times as there are such offsets.

Pools are left as they are. A maximum by `lax.reduce_window` has a slow gradient on CPU, in loops
and outside: a step of a network of two convolutions with pools of 2 took 8.0 ms, and 4.6 ms with
the maximum over two axes of ``x.reshape(..., height // 2, 2, width // 2, 2)``.
"""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from fedlr import _checks

__all__ = ["conv"]

# Every offset of the kernel is one slice in the program. For larger kernels one gather per axis is
# used, which runs slower, but compiles in a time that does not grow with the kernel.
_MAX_SLICES = 64

# An entry that is copied costs as much time as so many multiply-adds of a matrix product.
_PRODUCTS_PER_MOVE = 16


def conv(
    inputs: Float[Array, "..."],
    kernel: Float[Array, "..."],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Float[Array, "..."]:
    """Convolve as `jax.lax.conv_general_dilated`, by patches and a matrix product.

        out[n, p, o] = sum_{k, c} in[n, stride p + dilation k, c] kernel[k, c, o]

    It takes the arguments of `jax.lax.conv_general_dilated` in their order and means the same by
    them; the dilation of the inputs is done by padding, groups by a batched product. No derivative
    of any order holds a convolution. All arguments but the arrays are *static*.

    Args:
        inputs: Batch of inputs with one or more spatial axes, float32 or float64.
        kernel: Kernel of the dtype of the inputs, with as many axes.
        window_strides: Stride per spatial axis.
        padding: ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"``, or a pair (low, high) per spatial axis,
            which may be negative.
        lhs_dilation: Dilation of the inputs per spatial axis, as in a transposed convolution; None
            is 1.
        rhs_dilation: Dilation of the kernel per spatial axis; None is 1.
        dimension_numbers: Order of the axes, e.g. ``("NHWC", "HWIO", "NHWC")``; None is
            ``("NCHW", "OIHW", "NCHW")`` with as many spatial axes as there are.
        feature_group_count: Number of groups that the channels are divided into.
        batch_group_count: Number of groups that the batch is divided into.
        precision: Precision of the matrix product, as for `jax.lax.dot_general`.
        preferred_element_type: Dtype of the output; None is that of the inputs.

    Returns:
        The convolution, of the shape that `jax.lax.conv_general_dilated` gives.

    Raises:
        ValueError: If an array is not float32 or float64, dtypes, numbers of axes or channels do
            not fit, a stride or dilation is not positive, or a group count does not divide.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import convolution
        >>> signal = jnp.array([[[1.0, 2.0, 4.0, 8.0]]])
        >>> convolution.conv(signal, jnp.array([[[1.0, -1.0]]]), (1,), "VALID")
        Array([[[-1., -2., -4.]]], dtype=float32)

    Reference:
        Chetlur et al. 2014, arXiv 1410.0759: lowering to a matrix product. There the windows are
        not held in memory; here they are.
    """
    inputs, kernel = jnp.asarray(inputs), jnp.asarray(kernel)
    _checks.check_floating("conv", inputs=inputs, kernel=kernel)
    if kernel.dtype != inputs.dtype:
        raise _checks.fail("conv", f"kernel of dtype {kernel.dtype}", f"{inputs.dtype}")
    if inputs.ndim < 3:
        raise _checks.fail("conv", f"inputs of shape {inputs.shape}", "3 axes or more")
    _checks.check_ndim("conv", "kernel", kernel, inputs.ndim)
    numbers = lax.conv_dimension_numbers(inputs.shape, kernel.shape, dimension_numbers)
    strides = _per_axis("window_strides", window_strides, inputs.ndim - 2)
    interior = _per_axis("lhs_dilation", lhs_dilation, inputs.ndim - 2)
    dilations = _per_axis("rhs_dilation", rhs_dilation, inputs.ndim - 2)

    # From here on the axes are (channels, batch, *space) and (*offsets, channels, features).
    batch, channels, *space = numbers.lhs_spec
    x = jnp.transpose(inputs, (channels, batch, *space))
    features, channels, *offsets = numbers.rhs_spec
    w = jnp.transpose(kernel, (*offsets, channels, features))
    groups = (feature_group_count, batch_group_count)
    _check_groups(x.shape, w.shape, *groups)
    lengths, sizes = x.shape[2:], w.shape[:-2]
    spans = list(map(_span, sizes, dilations))
    pads = _pads(padding, lengths, spans, strides, interior)
    axes = list(map(_Axis, lengths, sizes, strides, dilations, pads, interior))
    counts = [axis.count for axis in axes]
    if 0 in counts or 0 in (x.size, w.size):
        shape = (w.shape[-1], x.shape[1] // batch_group_count, *counts)
        y = jnp.zeros(shape, preferred_element_type or x.dtype)
    else:
        product = functools.partial(
            lax.dot_general, precision=precision, preferred_element_type=preferred_element_type
        )
        y = _sum_products(x, w, axes, groups, product)
    batch, channels, *space = numbers.out_spec
    return jnp.moveaxis(y, range(y.ndim), (channels, batch, *space))


class _Axis(NamedTuple):
    """One spatial axis: entries, offsets of the kernel, and how they meet."""

    length: int
    size: int
    stride: int
    dilation: int
    pad: tuple[int, int]
    interior: int

    @property
    def extent(self) -> int:
        """Length with dilation, without padding."""
        return (self.length - 1) * self.interior + 1 if self.length else 0

    @property
    def count(self) -> int:
        """Places of the kernel."""
        free = self.extent + sum(self.pad) - _span(self.size, self.dilation)
        return max(0, free // self.stride + 1)


def _span(size, dilation):
    """Return the entries from the first to the last one that a dilated kernel meets."""
    return (size - 1) * dilation + 1


def _sum_products(x, w, axes, groups, product):
    """Return the convolution of x (channels, batch, *space) and w (*offsets, channels, features).

    Along at most one axis the offsets are moved from the windows to the features: every entry meets
    every offset, and the products are shifted and summed, which copies less.
    """
    *_, channels, features = w.shape
    num_groups = math.prod(groups)
    w = w.reshape(*w.shape[:-1], num_groups, features // num_groups)
    place = _choose_shifted(axes, channels, features // num_groups)
    if place is None:
        y = _multiply(_windows(x, axes), w, groups, product)
    else:
        axis = axes[place]
        w = jnp.moveaxis(w, place, -2)
        alone = axis._replace(size=1, stride=1, dilation=1, pad=(0, 0), interior=1)
        inner = [*axes[:place], alone, *axes[place + 1 :]]
        y = _multiply(_windows(x, inner), w.reshape(*w.shape[:-2], -1), groups, product)
        zero = lax.full_like(y, 0, shape=())
        pieces = []
        for offset, piece in enumerate(lax.split(y, [w.shape[-1]] * axis.size, axis=1)):
            low = axis.pad[0] - offset * axis.dilation
            edges = [(0, 0, 0)] * y.ndim
            edges[3 + place] = (low, axis.count - axis.extent - low, axis.interior - 1)
            pieces.append(lax.pad(piece, zero, edges))
        y = functools.reduce(operator.add, pieces)
    y = y.reshape(features, *y.shape[2:])
    if all(axis.size == 1 for axis in axes):
        return y
    # Backwards, every cotangent of y is read once per offset. XLA would fuse what makes it into
    # these reads and compute it anew for each, but does not fuse across a gather, here the
    # identity. Measured on seven networks: 1.04 to 1.2 times faster.
    order = lax.iota(jnp.int32, features)
    return _take(y, order, 0, unique_indices=True, indices_are_sorted=True)


def _choose_shifted(axes, channels, features):
    """Return the place of the axis whose offsets are best moved to the features, or None."""
    num_entries = channels * math.prod(axis.size for axis in axes)

    def cost(num_places, num_moved):
        return num_places * (num_entries * features + _PRODUCTS_PER_MOVE * num_moved)

    num_places = math.prod(axis.count for axis in axes)
    costs: dict[int | None, int] = {None: cost(num_places, num_entries)}
    for place, axis in enumerate(axes):
        if axis.stride == 1 and 1 < axis.size <= _MAX_SLICES:
            num_moved = num_entries // axis.size + axis.size * features
            costs[place] = cost(num_places // axis.count * axis.length, num_moved)
    return min(costs, key=lambda place: costs[place])


def _windows(x, axes):
    """Return the windows of x (channels, batch, *space), of shape (entries, batch, *counts)."""
    edges = [(*axis.pad, axis.interior - 1) for axis in axes]
    x = lax.pad(x, lax.full_like(x, 0, shape=()), [(0, 0, 0), (0, 0, 0), *edges])
    counts = [axis.count for axis in axes]
    num_offsets = math.prod(axis.size for axis in axes)
    if num_offsets > _MAX_SLICES:
        for place, axis in enumerate(axes):
            first = axis.stride * lax.broadcasted_iota(jnp.int32, (axis.count, axis.size), 0)
            step = axis.dilation * lax.broadcasted_iota(jnp.int32, (axis.count, axis.size), 1)
            x = _take(x, first + step, 2 + 2 * place)
        places = range(2, x.ndim, 2)
        x = jnp.transpose(x, (*(place + 1 for place in places), 0, 1, *places))
        return x.reshape(-1, x.shape[len(axes) + 1], *counts)
    slices = []
    for offsets in itertools.product(*(range(axis.size) for axis in axes)):
        starts = [offset * axis.dilation for offset, axis in zip(offsets, axes, strict=True)]
        limits = [
            start + (axis.count - 1) * axis.stride + 1
            for start, axis in zip(starts, axes, strict=True)
        ]
        strides = [axis.stride for axis in axes]
        slices.append(lax.slice(x, (0, 0, *starts), (*x.shape[:2], *limits), (1, 1, *strides)))
    return lax.concatenate(slices, 0)


def _take(x, places, axis, **promises):
    """Return the entries of x at places along an axis, which must be in bounds."""
    index = (slice(None),) * axis + (places,)
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False, **promises)


def _multiply(windows, w, groups, product):
    """Return the features of windows (entries, batch, *space), of shape (groups, features, ...).

    w has shape (*offsets, channels, groups, features).
    """
    *offsets, channels, num_groups, features = w.shape
    feature_groups, batch_groups = groups
    _, batch, *space = windows.shape
    shape = (num_groups, features, batch // batch_groups, *space)
    # One axis of rows: for more, XLA transposes a whole copy of the cotangents in the gradient.
    num_rows = math.prod(shape[2:])
    if num_groups == 1:
        w, windows = w.reshape(-1, features), windows.reshape(-1, num_rows)
        return product(w, windows, (((0,), (0,)), ((), ()))).reshape(shape)
    # One of the two counts is 1.
    w = w.reshape(math.prod(offsets), channels, num_groups, features)
    windows = windows.reshape(len(w), feature_groups, channels, batch_groups, num_rows)
    grouped = ((2,), (3 if batch_groups > 1 else 1,))
    return product(w, windows, (((0, 1), (0, 2)), grouped)).reshape(shape)


def _per_axis(name, values, num_axes):
    """Return the strides or dilations of all spatial axes."""
    values = (1,) * num_axes if values is None else tuple(values)
    valid = all(isinstance(value, (int, np.integer)) and value > 0 for value in values)
    if len(values) != num_axes or not valid:
        raise _checks.fail("conv", f"{name} {values}", f"{num_axes} positive integers")
    return values


def _pads(padding, lengths, spans, strides, interior):
    """Return the padding (low, high) of all spatial axes."""
    if not isinstance(padding, str):
        pads = [tuple(pair) for pair in padding]
        if len(pads) != len(lengths) or any(len(pair) != 2 for pair in pads):
            raise _checks.fail("conv", f"padding {padding}", f"{len(lengths)} pairs (low, high)")
        return pads
    if any(step != 1 for step in interior):
        got = f"padding {padding!r} with lhs_dilation {interior}"
        raise _checks.fail("conv", got, "pairs (low, high) where the inputs are dilated")
    return lax.padtype_to_pads(lengths, spans, strides, padding)


def _check_groups(shape, kernel_shape, feature_groups, batch_groups):
    """Refuse groups that do not fit x (channels, batch, *space) and its kernel."""
    _checks.check_count("conv", "feature_group_count", feature_groups)
    _checks.check_count("conv", "batch_group_count", batch_groups)
    channels, batch, *_ = shape
    *_, group_channels, num_features = kernel_shape
    if feature_groups > 1 and batch_groups > 1:
        got = f"feature_group_count {feature_groups} and batch_group_count {batch_groups}"
        raise _checks.fail("conv", got, "one of them to be 1")
    if channels != feature_groups * group_channels:
        got = f"{channels} channels of inputs and {group_channels} of kernel"
        raise _checks.fail("conv", got, f"{feature_groups} times those of the kernel")
    if num_features % (feature_groups * batch_groups):
        got = f"{num_features} output features"
        raise _checks.fail("conv", got, f"a multiple of {feature_groups * batch_groups} groups")
    if batch % batch_groups:
        raise _checks.fail("conv", f"a batch of {batch}", f"a multiple of {batch_groups} groups")

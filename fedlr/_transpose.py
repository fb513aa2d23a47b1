"""Linear operators that bring their own transpose and their own layout under vmap."""

import math

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

__all__ = ["batch_last", "with_transpose"]


def batch_last(kernel):
    """Give `kernel(geometry, stack, angles)` a vmap rule.

    `stack` is (groups, ..., batch) and `angles` (groups, views). Mapping over arrays with common
    angles makes the batch longer, so that one computation of positions serves all; mapping over
    angles makes more groups.
    """
    kernel = custom_vmap(kernel)

    @kernel.def_vmap
    def _rule(axis_size, in_batched, geometry, stack, angles):
        _, stack_batched, angles_batched = in_batched
        if not angles_batched:
            *outer, batch = stack.shape[1:]
            folded = jnp.moveaxis(stack, 0, -2).reshape(*outer, axis_size * batch)
            result = kernel(geometry, folded, angles)
            result = result.reshape(*result.shape[:-1], axis_size, batch)
            return jnp.moveaxis(result, -2, 0), True
        if not stack_batched:
            stack = jnp.broadcast_to(stack, (axis_size, *stack.shape))
        groups = stack.shape[1]
        result = kernel(
            geometry,
            stack.reshape(axis_size * groups, *stack.shape[2:]),
            angles.reshape(axis_size * groups, *angles.shape[2:]),
        )
        return result.reshape(axis_size, groups, *result.shape[1:]), True

    return kernel


def with_transpose(forward, transpose, definition, image, views):
    """Compute y = A x such that JAX knows A's transpose and the derivative of A.

    (x, y) solves the unit triangular system (x, y - A x) = (x, 0), whose solution and transposed
    solution cost one forward and one transposed projection. JAX derives jvp, vjp, transpose and
    vmap from these, and takes the derivative of A in its parameters from `definition`. The unknowns
    are one vector, so that they are transposed together; the compiler removes the joining.
    """
    sizes = image.size, math.prod(views)

    def split(vector):
        return vector[: sizes[0]].reshape(image.shape), vector[sizes[0] :].reshape(views)

    def join(x, y):
        return jnp.concatenate([x.ravel(), y.ravel()])

    def system(unknown):
        x, y = split(unknown)
        return join(x, y - definition(x))

    def solve(_, right_side):
        x, y = split(right_side)
        return join(x, y + forward(x))

    def solve_transposed(_, right_side):
        x, y = split(right_side)
        return join(x + transpose(y), y)

    right_side = jnp.pad(image.ravel(), (0, sizes[1]))
    return split(jax.lax.custom_linear_solve(system, right_side, solve, solve_transposed))[1]

"""Critics: small networks that score pairs, for the estimators of `fedlr.information.bounds`.

A critic is a module with ``critic(x, y) -> scores``: x (n, dx) and y (m, dy) give the matrix (n, m)
of T(x_i, y_j). A separable one needs n + m evaluations and suits large batches. A joint one needs
n m and can represent more. Train with any optimizer of optax on the negative of an estimate.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Key

from fedlr import _checks

__all__ = ["JointCritic", "SeparableCritic", "joint_critic", "separable_critic"]


class SeparableCritic(eqx.Module):
    """Scores ``T(x, y) = f(x) . g(y)``.

    Attributes:
        left: f, any module or function of one x (dx,) to (features,).
        right: g, any module or function of one y (dy,) to (features,).
    """

    left: Callable[[Array], Array]
    right: Callable[[Array], Array]

    def __call__(self, x: Float[Array, "n dx"], y: Float[Array, "m dy"]) -> Float[Array, "n m"]:
        """Score all pairs."""
        _check_samples("SeparableCritic", x, y)
        return jax.vmap(self.left)(x) @ jax.vmap(self.right)(y).T


class JointCritic(eqx.Module):
    """Scores ``T(x, y) = network([x, y])``.

    The first layer's product with [x, y] is the sum of one with x and one with y, so it is made
    n + m times; the rest is evaluated for all n m pairs.

    Attributes:
        network: MLP with dx + dy inputs, at least one hidden layer, and "scalar" output.
    """

    network: eqx.nn.MLP

    def __check_init__(self):
        """Refuse a network without hidden layer or with several outputs."""
        if self.network.depth < 1 or self.network.out_size != "scalar":
            got = f"a network of depth {self.network.depth}, out_size {self.network.out_size!r}"
            raise _checks.fail("JointCritic", got, "a hidden layer and 'scalar'")

    def __call__(self, x: Float[Array, "n dx"], y: Float[Array, "m dy"]) -> Float[Array, "n m"]:
        """Score all pairs."""
        _check_samples("JointCritic", x, y)
        size = jnp.shape(x)[1]
        if size + jnp.shape(y)[1] != self.network.in_size:
            got = f"{size} + {jnp.shape(y)[1]} features"
            raise _checks.fail("JointCritic", got, f"{self.network.in_size} of x and y together")
        first = self.network.layers[0]
        from_x = x @ first.weight[:, :size].T
        from_y = y @ first.weight[:, size:].T
        if first.bias is not None:
            from_y = from_y + first.bias[None]
        rest = eqx.tree_at(lambda network: network.layers[0], self.network, eqx.nn.Identity())
        hidden = from_x[:, None] + from_y[None]
        # one axis of pairs: two nested vmaps take twice as long, their products are transposed
        scores = jax.vmap(rest)(jnp.reshape(hidden, (-1, hidden.shape[-1])))
        return jnp.reshape(scores, hidden.shape[:2])


def separable_critic(
    x_size: int,
    y_size: int,
    features: int,
    *,
    width: int = 64,
    depth: int = 2,
    dtype: DTypeLike = float,
    key: Key[Array, ""],
) -> SeparableCritic:
    """Draw a `SeparableCritic` of two MLPs with ReLU.

    Args:
        x_size: Features of x; *static*.
        y_size: Features of y; *static*.
        features: Features of f(x) and g(y), the largest rank of a score matrix; *static*.
        width: Units of a hidden layer; *static*.
        depth: Number of hidden layers; *static*.
        dtype: float32 or float64; *static*. JAX's default float when left out.
        key: Random key.

    Returns:
        The critic.

    Raises:
        ValueError: If a size is not a positive integer.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> critic = information.separable_critic(3, 2, 4, key=jax.random.key(0))
        >>> critic(jnp.ones((5, 3)), jnp.ones((6, 2))).shape
        (5, 6)
    """
    _check_sizes("separable_critic", x_size=x_size, y_size=y_size, width=width, depth=depth)
    _check_sizes("separable_critic", features=features)
    left, right = (
        eqx.nn.MLP(size, features, width, depth, dtype=dtype, key=own)
        for size, own in zip((x_size, y_size), jax.random.split(key), strict=True)
    )
    return SeparableCritic(left, right)


def joint_critic(
    x_size: int,
    y_size: int,
    *,
    width: int = 64,
    depth: int = 2,
    dtype: DTypeLike = float,
    key: Key[Array, ""],
) -> JointCritic:
    """Draw a `JointCritic` of an MLP with ReLU.

    Args:
        x_size: Features of x; *static*.
        y_size: Features of y; *static*.
        width: Units of a hidden layer; *static*.
        depth: Number of hidden layers; *static*.
        dtype: float32 or float64; *static*. JAX's default float when left out.
        key: Random key.

    Returns:
        The critic.

    Raises:
        ValueError: If a size is not a positive integer.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> critic = information.joint_critic(3, 2, key=jax.random.key(0))
        >>> critic(jnp.ones((5, 3)), jnp.ones((6, 2))).shape
        (5, 6)
    """
    _check_sizes("joint_critic", x_size=x_size, y_size=y_size, width=width, depth=depth)
    return JointCritic(eqx.nn.MLP(x_size + y_size, "scalar", width, depth, dtype=dtype, key=key))


def _check_sizes(function: str, **sizes: int) -> None:
    for name, size in sizes.items():
        _checks.check_count(function, name, size)


def _check_samples(function: str, x: Array, y: Array) -> None:
    _checks.check_floating(function, x=x, y=y)
    _checks.check_ndim(function, "x", x, 2)
    _checks.check_ndim(function, "y", y, 2)

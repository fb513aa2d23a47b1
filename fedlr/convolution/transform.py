"""Any function with its convolutions done by patches: its jaxpr is evaluated with others."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from fedlr.convolution import patches

__all__ = ["by_patches", "for_loops"]

P = ParamSpec("P")
R = TypeVar("R")


def by_patches(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function of the same values in which `conv` does every convolution.

    The function is traced to a jaxpr and every `jax.lax.conv_general_dilated` of float32 or float64
    in it replaced, however deep: under jit, vmap, grad, scan, while_loop, cond, checkpoint, and in
    the modules of a library such as equinox. The result works under all transformations that the
    function works under. A function with custom derivatives keeps its rule, and convolutions in
    the rule are replaced as well. A `jax.shard_map` inside the function is left as it is; inside of
    it, `by_patches` works.

    As under jit, the function must not branch on the values of its arrays. Arguments and results
    may be any pytrees; what is no array is passed on as it is. A function without convolutions
    is called itself, after it was traced once to see that.

    Args:
        function: Any function of arrays.

    Returns:
        The function by patches, with the same signature.

    Example:
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import convolution
        >>> layer = eqx.nn.Conv2d(1, 2, kernel_size=3, key=jax.random.key(0))
        >>> patched = convolution.by_patches(layer)
        >>> image = jnp.ones((1, 5, 5))
        >>> "conv_general_dilated" in str(jax.make_jaxpr(layer)(image))
        True
        >>> "conv_general_dilated" in str(jax.make_jaxpr(patched)(image))
        False
        >>> bool(jnp.allclose(patched(image), layer(image), atol=1e-6))
        True
    """

    @functools.wraps(function, updated=())
    def patched(*args: P.args, **kwargs: P.kwargs) -> R:
        jaxpr, shapes, others = eqx.filter_make_jaxpr(function)(*args, **kwargs)
        if not _has_convolution(jaxpr):
            return function(*args, **kwargs)
        arrays = jax.tree.leaves(eqx.filter((args, kwargs), eqx.is_array))
        results = [_as_array(result) for result in _evaluate(jaxpr, *arrays)]
        return eqx.combine(jax.tree.unflatten(jax.tree.structure(shapes), results), others)

    return patched


def for_loops(function: Callable[P, R]) -> Callable[P, R]:
    """Return `by_patches` of a function where JAX computes on CPU, and the function elsewhere.

    Which of them it is shows when the result is called, by `jax.default_backend`.

    Args:
        function: Any function of arrays that is called inside a loop, e.g. a loss.

    Returns:
        A function of the same values, with the same signature.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import convolution
        >>> smooth = convolution.for_loops(lambda x: jnp.convolve(x, jnp.ones(2), mode="valid"))
        >>> smooth(jnp.array([1.0, 2.0, 4.0]))
        Array([3., 6.], dtype=float32)
    """
    patched = by_patches(function)

    @functools.wraps(function, updated=())
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        return (patched if jax.default_backend() == "cpu" else function)(*args, **kwargs)

    return chosen


def _evaluate(closed, *args):
    """Evaluate a closed jaxpr with its convolutions done by `patches.conv`."""
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(closed.jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in closed.jaxpr.eqns:
        with equation.ctx.manager:
            results = _replacement(equation)(*map(read, equation.invars))
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _as_array(result):
    """Return the result of a jaxpr as an array, which a constant in it need not be."""
    is_array = isinstance(result, jax.Array) or jnp.result_type(result) == jax.dtypes.float0
    return result if is_array else jnp.asarray(result)


def _replacement(equation):
    """Return a function from the inputs of an equation to a list of its results, by patches."""
    if _is_convolution(equation):
        params = {name: value for name, value in equation.params.items() if name != "out_sharding"}
        return lambda *inputs: [patches.conv(*inputs, **params)]
    # The body of a shard_map can be traced only inside of its mesh.
    if equation.primitive.name == "shard_map" or not _has_convolution(equation.params):
        return functools.partial(_bind, equation, equation.params)
    if equation.primitive is primitives.custom_jvp_call_p:
        return _with_jvp_rule(equation)
    if equation.primitive is primitives.custom_vjp_call_p:
        return _with_vjp_rule(equation)
    return functools.partial(_bind, equation, _rewrite(equation.params))


def _bind(equation, params, *inputs):
    """Return the results of an equation for other inputs and parameters."""
    primitive = equation.primitive
    results = primitive.bind(*inputs, **primitive.get_bind_params(params))
    return results if primitive.multiple_results else [results]


def _with_jvp_rule(equation):
    """Return the function of a custom_jvp call, with its rule, both by patches."""
    original = functools.partial(_bind, equation, equation.params)
    patched = jax.custom_jvp(functools.partial(_evaluate, equation.params["call_jaxpr"]))

    @patched.defjvp
    def _(primals, tangents):
        return by_patches(functools.partial(jax.jvp, original))(primals, tangents)

    return patched


def _with_vjp_rule(equation):
    """Return the function of a custom_vjp call, with its rule, both by patches."""
    original = functools.partial(_bind, equation, equation.params)
    patched = jax.custom_vjp(functools.partial(_evaluate, equation.params["call_jaxpr"]))
    forward = by_patches(functools.partial(jax.vjp, original))
    patched.defvjp(forward, lambda pullback, cotangents: by_patches(pullback)(cotangents))
    return patched


def _rewrite(item):
    """Return the parameters of an equation with all jaxprs among them by patches."""
    if isinstance(item, dict):
        return {name: _rewrite(value) for name, value in item.items()}
    if isinstance(item, tuple):
        values = map(_rewrite, item)
        return type(item)(*values) if hasattr(item, "_fields") else tuple(values)
    if not isinstance(item, (core.Jaxpr, core.ClosedJaxpr)) or not _has_convolution(item):
        return item
    closed = item if isinstance(item, core.ClosedJaxpr) else core.ClosedJaxpr(item, ())
    avals = [variable.aval for variable in closed.jaxpr.invars]
    rewritten = jax.make_jaxpr(functools.partial(_evaluate, closed))(*avals)
    return rewritten if isinstance(item, core.ClosedJaxpr) else rewritten.jaxpr


def _has_convolution(item):
    """Say whether a jaxpr, or any among the parameters of an equation, has a convolution."""
    if isinstance(item, dict):
        return any(map(_has_convolution, item.values()))
    if isinstance(item, tuple):
        return any(map(_has_convolution, item))
    if not isinstance(item, (core.Jaxpr, core.ClosedJaxpr)):
        return False
    return any(_is_convolution(each) or _has_convolution(each.params) for each in item.eqns)


def _is_convolution(equation):
    """Say whether an equation is a convolution that `patches.conv` can do."""
    if equation.primitive is not primitives.conv_general_dilated_p:
        return False
    aval = equation.invars[0].aval
    is_known = aval.dtype in (jnp.float32, jnp.float64) and aval.ndim > 2
    return is_known and equation.params.get("out_sharding") is None

"""Checks of pytrees of parameters and gradients, and a ratio that may be of zeros."""

import jax
import jax.numpy as jnp

from fedlr import _checks


def check_params(function, tree, name="params"):
    """Refuse a pytree that has no leaves or not one floating dtype; return it as arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise _checks.fail(function, f"{name} without leaves", "at least one array")
    labelled = {f"{name}{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}
    _checks.check_floating(function, **labelled)
    dtypes = sorted({str(jnp.result_type(leaf)) for leaf in labelled.values()})
    if len(dtypes) > 1:
        raise _checks.fail(function, f"{name} of dtypes {' and '.join(dtypes)}", "one dtype")
    return jax.tree.map(jnp.asarray, tree)


def check_like(function, name, tree, like):
    """Refuse a pytree of other structure, shapes or dtype than another; return it as arrays."""
    tree = check_params(function, tree, name)

    def describe(tree):
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(jnp.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves]

    got, expected = describe(tree), describe(like)
    if got[0] != expected[0]:
        raise _checks.fail(function, f"{name} of structure {got[0]}", str(expected[0]))
    if got[1] != expected[1]:
        raise _checks.fail(function, f"{name} of shapes and dtypes {got[1]}", str(expected[1]))
    return tree


def check_stacked(function, tree, name="gradients"):
    """Refuse leaves without a common leading axis; return the pytree as arrays, and its length."""
    tree = check_params(function, tree, name)
    shapes = [leaf.shape for leaf in jax.tree.leaves(tree)]
    if len({shape[:1] for shape in shapes}) > 1 or shapes[0] == ():
        raise _checks.fail(function, f"{name} of shapes {shapes}", "one leading axis of all leaves")
    return tree, shapes[0][0]


def ratio(numerator, denominator):
    """Divide, with zero for a numerator of zero."""
    nothing = numerator == 0
    return jnp.where(nothing, 0, numerator / jnp.where(nothing, 1, denominator))

"""Two instruments measure the same samples: what both see, what one sees, and what is missing."""

from functools import partial

import jax
import jax.numpy as jnp

from fedlr import iteration, linked, masking, synthetic

SHAPES = ((50, 10, 8), (50, 12, 5, 3))
RANK = 7


def show() -> None:
    """Fit linked tensors with gaps and print what was recovered."""
    data_key, mask_key, start_key = jax.random.split(jax.random.key(0), 3)
    design = {"shared_rank": 2, "individual_ranks": (2, 2), "snr": 3.0}
    data = jax.jit(lambda key: synthetic.linked_tensors(SHAPES, key=key, **design))(data_key)
    masks = jax.jit(lambda key: synthetic.missing_masks(SHAPES, key=key))(mask_key)
    fit = _fit(data.tensors, masks, jax.random.split(start_key, 3))
    filled = jax.jit(linked.impute)(fit, data.tensors, masks)
    missing_samples = [_whole_samples(mask) for mask in masks]
    missing_entries = [~mask & ~rows for mask, rows in zip(masks, missing_samples, strict=True)]
    one, two = linked.active_components(fit)
    names = " and ".join(" x ".join(map(str, shape)) for shape in SHAPES)
    print(f"\nlinked tensors {names}, SNR 3, a tenth missing; MULTIFAC, penalty from the noise\n")
    print(
        f"components            {int((one & two).sum())} shared (in truth 2), "
        f"{int((one & ~two).sum())} and {int((two & ~one).sum())} individual (2 and 2)"
    )
    print(
        f"missing entries       relative error {_error(data.signals, filled, missing_entries):.2f}"
    )
    # Of a sample that one instrument missed, the other knows the shared part only.
    missed = _error(data.shared, filled, missing_samples)
    print(
        f"missing samples       relative error {missed:.2f} of what is shared; without the link 1"
    )


def _fit(tensors: tuple, masks: tuple, keys: jax.Array) -> linked.LinkedCP:
    """Follow the penalty up to that of the noise, from the best of several starts."""
    noise = jnp.stack([linked.noise_scale(x) for x in tensors])
    theory = linked.theory_penalty([x.shape for x in tensors], noise)
    penalties = jnp.stack([jnp.zeros_like(theory), jnp.ones_like(theory), theory])

    def follow(key: jax.Array) -> tuple:
        start = linked.random_init(tensors, RANK, key=key)
        options = {"masks": masks, "max_iters": 150, "tol": 1e-6, "extrapolate": True}
        path = partial(linked.penalty_path, tensors, penalties, **options)
        return jax.tree.map(lambda leaf: leaf[-1], path(init=start))

    return iteration.best(*jax.jit(jax.vmap(follow))(keys))[0]


def _whole_samples(mask: jax.Array) -> jax.Array:
    """Mark the entries of samples of which nothing is observed."""
    rows = ~jnp.any(mask, axis=tuple(range(1, mask.ndim)), keepdims=True)
    return jnp.broadcast_to(rows, mask.shape)


def _error(truths: tuple, estimates: tuple, picked: list) -> float:
    """Average the relative error of the picked entries over the tensors."""
    triples = zip(truths, estimates, picked, strict=True)
    errors = [masking.masked_norm(t - e, p) / masking.masked_norm(t, p) for t, e, p in triples]
    return float(jnp.mean(jnp.stack(errors)))

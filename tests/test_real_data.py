"""CP models of measured data, where the files are at hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import cp, datasets, iteration, masking

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    if not FOLDER.exists():
        pytest.skip(f"the data sets are not at {FOLDER}")
    monkeypatch.setenv("FEDLR_DATA", str(FOLDER))


def test_three_components_of_amino_acids_are_the_three_substances():
    data = datasets.amino_acids(dtype=jnp.float64)
    start = cp.svd_init(data.intensity, 3, key=jax.random.key(0))
    fit, info = jax.jit(
        lambda x, start: cp.als(x, init=start, max_iters=500, tol=1e-9, extrapolate=True)
    )(data.intensity, start)
    assert info.converged
    assert cp.relative_error(data.intensity, fit) < 0.03
    assert cp.core_consistency(data.intensity, fit) > 95
    samples, emission, excitation = map(np.asarray, cp.normalize(fit).factors)
    known = np.asarray(data.concentrations)
    cosines = np.abs(
        (samples / np.linalg.norm(samples, axis=0)).T @ (known / np.linalg.norm(known, axis=0))
    )
    order = cosines.argmax(axis=0)
    assert sorted(order) == [0, 1, 2]
    assert cosines.max(axis=0).min() > 0.998
    # The concentrations as a model of the samples: the score against the truth in that mode.
    truth = cp.CPTensor(
        jnp.ones(3), (jnp.asarray(known), jnp.asarray(emission[:, order]),
                      jnp.asarray(excitation[:, order])),
    )  # fmt: skip
    assert cp.factor_match_score(fit, truth) > 0.999
    peaks = np.asarray(data.emission)[np.abs(emission[:, order]).argmax(axis=0)]
    np.testing.assert_allclose(peaks, [360, 303, 286], atol=5)
    peaks = np.asarray(data.excitation)[np.abs(excitation[:, order]).argmax(axis=0)]
    np.testing.assert_allclose(peaks, [274, 274, 255], atol=5)


def test_a_hidden_slice_of_the_response_to_interleukin_is_predicted():
    """Two slices are missing in the file; two more, which are known, are hidden beside them."""
    x, mask = masking.from_nan(datasets.il2_response(dtype=jnp.float64).response)
    assert int((~mask).sum()) == 192
    seen = mask.at[6, 1].set(False).at[9, 2].set(False)

    def fit(x, seen, key):
        start = cp.random_init(x.shape, 6, key=key)
        options = {"ridge": 1e-3, "max_iters": 500, "tol": 1e-7, "extrapolate": True}
        return cp.als(x, init=start, mask=seen, **options)

    starts = jax.random.split(jax.random.key(0), 8)
    found = jax.jit(jax.vmap(fit, in_axes=(None, None, 0)))(x, seen, starts)
    best, _ = iteration.best(*found)
    hidden = mask & ~seen
    error = cp.relative_error(x, best, mask=hidden)
    mean = jnp.sum(jnp.where(seen, x, 0), axis=1) / jnp.sum(seen, axis=1, dtype=x.dtype)
    of_mean = masking.masked_norm(x - mean[:, None], hidden) / masking.masked_norm(x, hidden)
    assert error < 0.2
    assert of_mean > 0.25

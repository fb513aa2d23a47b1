import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from fedlr.federated import execution


def weigh(x, y):
    return x * y, (jnp.sum(x), y)


def add(carry, messages, weights):
    return carry + jnp.sum(messages * weights[:, None], axis=0)


@pytest.fixture
def cohort(rng):
    return rng.normal(size=(5, 3)), rng.normal(size=5), rng.uniform(size=5)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 8])
def test_every_chunk_size_maps_and_folds_the_same(cohort, chunk_size):
    x, y, weights = cohort
    total, (sums, ys) = jax.jit(
        lambda *args: execution.fold_clients(weigh, add, jnp.zeros(3), *args, chunk_size=chunk_size)
    )(weights, x, y)
    np.testing.assert_allclose(total, (weights * y) @ x, rtol=1e-14)
    np.testing.assert_allclose(sums, x.sum(axis=1), rtol=1e-14)
    np.testing.assert_array_equal(ys, y)
    messages, outputs = execution.map_clients(weigh, x, y, chunk_size=chunk_size)
    np.testing.assert_allclose(messages, x * y[:, None], rtol=1e-14)
    np.testing.assert_allclose(outputs[0], sums, rtol=1e-14)


def test_one_client_alone_has_no_batch_axis_and_everyone_needs_no_scan(cohort):
    def program(chunk_size):
        def mapped(x):
            return execution.map_clients(jnp.sin, x, chunk_size=chunk_size)

        return str(jax.make_jaxpr(mapped)(cohort[0]))

    for chunk_size, shape in {1: "3", 2: "2,3", 5: "5,3"}.items():
        assert f"f64[{shape}] = sin" in program(chunk_size)
        assert ("scan" in program(chunk_size)) == (chunk_size < 5)


def test_temporary_memory_of_a_fold_does_not_grow_with_the_cohort():
    def temporary_bytes(size):
        fold = jax.jit(
            lambda seeds: execution.fold_clients(
                lambda seed: (jnp.sin(jnp.arange(10_000.0) * seed), ()),
                add,
                jnp.zeros(10_000),
                jnp.ones(size),
                seeds,
                chunk_size=1,
            )[0]
        )
        compiled = fold.lower(jax.ShapeDtypeStruct((size,), jnp.float64)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(2), temporary_bytes(64)
    assert large < small + 10_000


def test_wrong_chunks_and_lengths_are_refused():
    with pytest.raises(ValueError, match=r"map_clients: got chunk_size 0, expected an integer"):
        execution.map_clients(jnp.sum, jnp.zeros(3), chunk_size=0)
    with pytest.raises(ValueError, match=r"map_clients: got leading axes \[\(2,\), \(3,\)\]"):
        execution.map_clients(jnp.add, jnp.zeros(3), jnp.zeros(2))
    for nobody in (jnp.zeros((0, 3)), jnp.zeros(())):
        with pytest.raises(ValueError, match=r"map_clients: got leading axes .* at least 1"):
            execution.map_clients(jnp.sum, nobody)


def test_default_chunk_is_one_client_on_cpu():
    assert execution.default_chunk_size() == (1 if jax.default_backend() == "cpu" else 64)


def test_a_mesh_without_clients_changes_nothing_and_an_explicit_one_is_refused(cohort):
    x, _, _ = cohort
    for names in ("seeds",), ("clients",):
        mesh = jax.make_mesh((1,), names, axis_types=(AxisType.Auto,))
        with jax.set_mesh(mesh):
            found = execution.map_clients(jnp.sin, x, chunk_size=2)
        np.testing.assert_array_equal(found, execution.map_clients(jnp.sin, x, chunk_size=2))
    explicit = jax.make_mesh((1,), ("clients",), axis_types=(AxisType.Explicit,))
    with (
        jax.set_mesh(explicit),
        pytest.raises(ValueError, match='got a mesh with an axis "clients" of type Explicit'),
    ):
        execution.map_clients(jnp.sin, x)

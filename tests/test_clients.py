import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from fedlr.federated import clients, protocol


def test_stacked_clients_come_back_one_by_one(rng):
    singles = [{"a": rng.normal(size=(3, 4)), "b": rng.normal(size=5)} for _ in range(2)]
    stacked = clients.stack_clients(singles)
    for i, single in enumerate(singles):
        for name, array in single.items():
            np.testing.assert_array_equal(stacked[name][i], array)


def test_ragged_clients_must_be_padded_before_stacking():
    with pytest.raises(ValueError, match=r"stack_clients: got leaves .*, expected one shape"):
        clients.stack_clients([jnp.zeros(3), jnp.zeros(4)])
    with pytest.raises(ValueError, match=r"stack_clients: got structures"):
        clients.stack_clients([(jnp.zeros(3),), jnp.zeros(3)])
    with pytest.raises(ValueError, match=r"stack_clients: got no client"):
        clients.stack_clients([])


@pytest.mark.parametrize("tree", [(), jnp.zeros(()), (jnp.zeros(3), jnp.zeros((2, 3)))])
def test_pytrees_without_one_client_axis_are_refused(tree):
    with pytest.raises(ValueError, match=r"num_clients: got leaves of shapes .*, expected one"):
        clients.num_clients(tree)


def test_examples_are_counted_by_the_mask_in_the_dtype_of_the_targets():
    mask = jnp.array([[True, True, False], [False, False, False]])
    data = protocol.ClientData(jnp.zeros((2, 3)), jnp.zeros((2, 3, 5), jnp.float32), mask)
    counts = clients.num_examples(data)
    np.testing.assert_array_equal(counts, [2, 0])
    assert counts.dtype == jnp.float32
    labels = data._replace(targets=jnp.zeros((2, 3), jnp.int32))
    np.testing.assert_array_equal(clients.num_examples(labels), [2, 0])
    np.testing.assert_array_equal(clients.num_examples({"x": jnp.zeros((4, 2))}), np.ones(4))


def test_masks_that_do_not_fit_are_refused():
    data = protocol.ClientData((), jnp.zeros((2, 3)), jnp.ones((2, 4), bool))
    with pytest.raises(ValueError, match=r"num_examples: got mask of shape \(2, 4\)"):
        clients.num_examples(data)
    with pytest.raises(ValueError, match=r"num_examples: got mask of dtype float64"):
        clients.num_examples(data._replace(mask=jnp.ones((2, 3))))


@pytest.mark.parametrize(
    ("cohort", "message"),
    [
        ([0, 3], r"cohort with index 3, expected client indices from 0 to 2"),
        ([-1], r"cohort with index -1, expected client indices from 0 to 2"),
        ([1, 1], r"cohort \[1, 1\], expected every client at most once"),
        ([0, 1, 2, 0], r"cohort of 4 clients, expected 1 to 3 clients"),
        ([], r"cohort of 0 clients, expected 1 to 3 clients"),
        ([[0]], r"cohort of shape \(1, 1\)"),
    ],
)
def test_cohorts_that_name_no_clients_are_refused(cohort, message):
    with pytest.raises(ValueError, match=f"round: got {message}"):
        clients.check_cohort("round", np.array(cohort, np.int32), 3)


def test_cohorts_of_floats_are_refused():
    with pytest.raises(ValueError, match=r"round: got cohort of shape \(1,\), dtype float64"):
        clients.check_cohort("round", jnp.zeros(1), 3)


def test_traced_cohorts_are_checked_by_length_alone_and_stay_in_range():
    def take_and_put(cohort):
        clients.check_cohort("round", cohort, 3)
        values = jnp.arange(3)
        return clients.take(values, cohort), clients.put(values, cohort, jnp.array([7, 8]))

    taken, put = jax.jit(take_and_put)(jnp.array([1, 99]))
    np.testing.assert_array_equal(taken, [1, 2])
    np.testing.assert_array_equal(put, [0, 7, 2])
    with pytest.raises(ValueError, match=r"round: got cohort of 4 clients"):
        jax.jit(lambda cohort: clients.check_cohort("round", cohort, 3))(jnp.arange(4))


def test_everyone_is_required_where_clients_are_coupled():
    clients.check_everyone("firm", np.array([2, 0, 1]), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"firm: got cohort of 2 clients, expected all 3 clients"):
        clients.check_everyone("firm", np.array([2, 0]), jnp.zeros(3))


def test_put_after_take_changes_nothing(rng):
    tree = (rng.normal(size=(4, 3)), rng.normal(size=4))
    cohort = jnp.array([2, 0])
    back = clients.put(tree, cohort, clients.take(tree, cohort))
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert clients.take((), cohort) == ()


def test_the_whole_federation_in_order_is_taken_without_a_copy():
    tree = jnp.zeros((3, 2))
    assert clients.take(tree, np.arange(3)) is tree
    assert clients.take(tree, np.array([1, 0, 2])) is not tree


def test_sampled_cohorts_are_distinct_and_reach_every_client():
    draw = jax.jit(jax.vmap(lambda key: clients.sample_cohort(5, 2, key=key)))
    cohorts = np.asarray(draw(jax.random.split(jax.random.key(0), 500)))
    assert (cohorts[:, 0] != cohorts[:, 1]).all()
    counts = np.bincount(cohorts.ravel(), minlength=5)
    # Every client is in a cohort with probability 2/5, and 500 draws are independent.
    assert (np.abs(counts - 200) < 5 * np.sqrt(500 * 0.4 * 0.6)).all()
    with pytest.raises(ValueError, match=r"sample_cohort: got cohort_size 6, expected"):
        clients.sample_cohort(5, 6, key=jax.random.key(0))


def test_sharding_needs_a_fitting_mesh():
    explicit = jax.make_mesh((1,), ("clients",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match=r'shard_clients: got mesh axes .* axis "clients"'):
        clients.shard_clients(jnp.zeros((2, 3)), explicit)
    other = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"shard_clients: got mesh axes"):
        clients.shard_clients(jnp.zeros((2, 3)), other)

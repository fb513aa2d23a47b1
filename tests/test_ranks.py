import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import federated
from fedlr.algorithms import comp_jf
from fedlr.federated import protocol, ranks


def make_clients(rng, noise=0.0, count=3):
    """Data of clients whose targets are noise alone."""
    targets = noise * rng.normal(size=(count, 40, 9))
    return protocol.ClientData((), jnp.asarray(targets), jnp.ones((count, 40), bool))


def decide(rule, sizes, memory, residual_norms):
    """Let the rule of the first client see a sequence of residuals and list its ranks."""
    first = jax.tree.map(lambda leaf: leaf[0], memory)
    found, rank = [], sizes[0]
    for residual_norm in residual_norms:
        rank, first = rule.update(rank, jnp.asarray(residual_norm), first)
        found.append(rank.tolist())
    return found


@pytest.mark.parametrize("seed", range(3))
def test_drawn_ranks_are_uniform_in_their_range_and_equal_in_all_modes(seed):
    key = jax.random.key(seed)
    drawn = ranks.draw(3000, 2, 6, num_modes=3, key=key)
    assert drawn.dtype == jnp.int32
    np.testing.assert_array_equal(drawn, np.broadcast_to(drawn[:, :1], (3000, 3)))
    counts = np.bincount(drawn[:, 0], minlength=7)
    assert counts[:2].sum() == 0
    # Five standard deviations of a binomial count.
    np.testing.assert_allclose(counts[2:], 600, atol=5 * np.sqrt(3000 * 0.2 * 0.8))
    np.testing.assert_array_equal(ranks.draw(3000, 2, 6, num_modes=3, key=key), drawn)
    assert (ranks.draw(3000, 2, 6, key=jax.random.key(seed + 9))[:, 0] != drawn[:, 0]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 2), "num_clients 0"),
        ((3, 0, 2), "low 0"),
        ((3, 3, 2), "high 2, expected an integer from 3"),
        ((3, 1.0, 2), "low 1.0"),
    ],
)
def test_ranges_without_a_rank_are_refused(key, arguments, message):
    with pytest.raises(ValueError, match=f"draw: got {message}"):
        ranks.draw(*arguments, key=key)
    with pytest.raises(ValueError, match="draw: got num_modes 0"):
        ranks.draw(3, 1, 2, num_modes=0, key=key)


def test_fixed_ranks_are_those_given_or_the_largest():
    np.testing.assert_array_equal(ranks.fixed("caller", None, (3, 5), 2), [[3, 5], [3, 5]])
    given = np.array([[1, 5], [3, 2]], np.int64)
    found = ranks.fixed("caller", given, (3, 5), 2)
    np.testing.assert_array_equal(found, given)
    assert found.dtype == jnp.int32
    traced = jax.jit(lambda sizes: ranks.fixed("caller", sizes, (3, 5), 2))(given)
    np.testing.assert_array_equal(traced, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.ones((3, 2), int), r"client_ranks of shape \(3, 2\), expected shape \(2, 2\)"),
        (np.ones(2, int), r"client_ranks of shape \(2,\)"),
        (np.ones((2, 2)), "client_ranks of dtype float64, expected integers"),
        (np.array([[1, 1], [0, 1]]), r"client_ranks .*, expected 1 to \(3, 5\)"),
        (np.array([[1, 1], [1, 6]]), r"client_ranks .*, expected 1 to \(3, 5\)"),
    ],
)
def test_fixed_ranks_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=f"caller: got {message}"):
        ranks.fixed("caller", given, (3, 5), 2)


def test_rank_grows_where_a_residual_above_the_noise_is_stuck(rng):
    clients = make_clients(rng)
    rule = ranks.grow(jnp.full(3, 0.1), start=2, step=3, every=1, tolerance=0.05)
    sizes, memory = rule.init(clients, (8, 5))
    np.testing.assert_array_equal(sizes, np.full((3, 2), 2))
    assert sizes.dtype == jnp.int32
    np.testing.assert_allclose(memory.threshold, 0.1 * np.sqrt(360), rtol=1e-14)
    limit = float(memory.threshold[0])
    # first, fell by 6 %, fell by 4 %, rose, at the noise, fell by 50 %.
    norms = [9.0, 8.46, 8.13, 9.0, limit, limit / 2]
    found = decide(rule, sizes, memory, norms)
    assert found == [[2, 2], [2, 2], [5, 5], [8, 8], [8, 8], [8, 8]]
    # Stuck at the level itself is no reason, just above it is.
    assert decide(rule, sizes, memory, [limit] * 3)[-1] == [2, 2]
    assert decide(rule, sizes, memory, [1.0001 * limit] * 3)[-1] == [8, 8]
    looser = ranks.grow(jnp.full(3, 0.1), start=2, step=3, every=1, kappa=1.1)
    assert decide(looser, *looser.init(clients, (8, 5)), [1.09 * limit] * 3)[-1] == [2, 2]


@pytest.mark.parametrize("every", [1, 3])
def test_decisions_fall_every_so_many_rounds_and_the_first_never_grows(rng, every):
    rule = ranks.grow(jnp.zeros(3), start=1, step=1, every=every)
    found = decide(rule, *rule.init(make_clients(rng), (99, 99)), [7.0] * (4 * every))
    decisions = np.arange(1, 4 * every + 1) // every
    expected = 1 + np.maximum(decisions - 1, 0)
    np.testing.assert_array_equal(found, np.stack([expected, expected], axis=1))


def test_progress_is_measured_between_decisions_not_between_rounds(rng):
    """A fall of 3 % in each of two rounds is one of 6 % between decisions."""
    rule = ranks.grow(jnp.zeros(3), start=1, step=1, every=2, tolerance=0.05)
    norms = 9.0 * 0.97 ** np.arange(8)
    assert decide(rule, *rule.init(make_clients(rng), (9, 9)), norms)[-1] == [1, 1]
    slower = 9.0 * 0.98 ** np.arange(8)
    assert decide(rule, *rule.init(make_clients(rng), (9, 9)), slower)[-1] == [4, 4]


@pytest.mark.parametrize("seed", range(3))
def test_noise_levels_are_estimated_from_the_data_that_the_mask_shows(seed):
    rng = np.random.default_rng(seed)
    clients = make_clients(rng, noise=0.3)
    _, memory = ranks.grow().init(clients, (8, 8))
    # The second differences overlap, and half of them count: about 3 / sqrt(number of targets).
    np.testing.assert_allclose(memory.threshold, 0.3 * np.sqrt(360), rtol=5 * 3 / np.sqrt(360))
    mask = clients.mask.at[:, 30:].set(False)
    hidden = clients._replace(mask=mask)
    spoilt = hidden._replace(targets=clients.targets.at[:, 30:].set(1e30))
    expected, found = (ranks.grow().init(data, (8, 8))[1].threshold for data in (hidden, spoilt))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found, 0.3 * np.sqrt(270), rtol=5 * 3 / np.sqrt(270))


def test_thresholds_count_the_present_measurements(rng):
    clients = make_clients(rng)._replace(mask=jnp.arange(40)[None] < jnp.array([[40], [10], [1]]))
    _, memory = ranks.grow(jnp.array([1.0, 2.0, 3.0])).init(clients, (8, 8))
    np.testing.assert_allclose(memory.threshold, np.array([1, 2, 3]) * np.sqrt([360, 90, 9]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0}, "start 0"),
        ({"step": 0}, "step 0"),
        ({"every": 0}, "every 0"),
        ({"every": 2.0}, "every 2.0"),
        ({"noise_levels": jnp.array([0.1, -0.1])}, "noise_levels .*, expected a non-negative"),
        ({"noise_levels": jnp.array([0.1, jnp.nan])}, "noise_levels .*, expected a non-negative"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=f"grow: got {message}"):
        ranks.grow(**options)


def test_rules_that_do_not_fit_the_problem_are_refused(rng):
    clients = make_clients(rng)
    with pytest.raises(ValueError, match=r"grow: got start of mode 1 4, expected .* from 1 to 3"):
        ranks.grow(jnp.ones(3), start=4).init(clients, (8, 3))
    with pytest.raises(ValueError, match=r"grow: got noise_levels of shape \(2,\)"):
        ranks.grow(jnp.ones(2), start=1).init(clients, (8, 3))
    with pytest.raises(ValueError, match=r"grow: got mask of shape"):
        ranks.grow(jnp.ones(3), start=1).init(clients._replace(mask=jnp.ones((3, 2), bool)), (8, 3))


def test_ranks_stop_at_the_largest_inside_a_run():
    """With noise levels of zero they grow whenever the residual is stuck: here from round three."""
    shape, largest = (4, 5), (2, 3)
    rng = np.random.default_rng(0)
    clients = protocol.ClientData(
        jnp.asarray(rng.normal(size=(3, 30, 20))),
        jnp.asarray(rng.normal(size=(3, 30))),
        jnp.ones((3, 30), bool),
    )
    rule = ranks.grow(jnp.zeros(3), start=1, step=1, every=1, tolerance=0.99)
    algorithm = comp_jf.build(
        lambda image, matrix: matrix @ image.ravel(),
        jnp.array([0.5, 0.3]),
        ranks=largest,
        client_ranks=rule,
    )

    @jax.jit
    def run(clients):
        state = algorithm.init(jnp.zeros((3, *shape)), clients, key=jax.random.key(0))
        return federated.run(algorithm, state, clients, num_rounds=4, key=jax.random.key(1))

    state, infos = run(clients)
    expected = [(1, 1), (2, 2), (2, 3), (2, 3)]
    for client in range(3):
        np.testing.assert_array_equal(infos.metrics.ranks[:, client], expected)
    np.testing.assert_array_equal(state.clients.ranks, np.broadcast_to(largest, (3, 2)))
    np.testing.assert_array_equal(
        infos.uplink_bytes[:, 0], [8 * (a * b + 4 * a + 5 * b) for a, b in expected]
    )

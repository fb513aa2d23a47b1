import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import federated, linked
from fedlr.algorithms import vertical_multifac

ROUNDS, RANK, PENALTY, KEY = 8, 3, 0.7, jax.random.key(1)
# Modes and sizes differ between the tensors, and a mode of size 1 is a mode.
SHAPES = {
    "one": ((7, 4, 3),),
    "two": ((6, 4, 3), (6, 5)),
    "three": ((5, 4, 3), (5, 6), (5, 1, 3, 2)),
}


def dense(fit):
    """All tensors of a linked model, by naive sums."""
    shared, found = np.asarray(fit.shared), []
    for own in fit.factors:
        modes = "bcd"[: len(own)]
        columns = ",".join(f"{mode}r" for mode in modes)
        found.append(np.einsum(f"ar,{columns}->a{modes}", shared, *map(np.asarray, own)))
    return found


class Problem:
    """Noisy tensors of a linked model, a start near it, and masks or None."""

    def __init__(self, name, masked, dtype=np.float64):
        rng = np.random.default_rng(0)
        self.shapes = SHAPES[name]
        shared = rng.normal(size=(self.shapes[0][0], RANK))
        own = [[rng.normal(size=(size, RANK)) for size in s[1:]] for s in self.shapes]
        # Tensor k lacks the first k components. One mode of the start says so, all of the clean.
        for k, factors in enumerate(own):
            factors[0][:, :k] = 0
        clean = [
            tuple(factor * (np.arange(RANK) >= k) for factor in factors)
            for k, factors in enumerate(own)
        ]
        self.start = linked.LinkedCP(shared, tuple(map(tuple, own)))
        self.clean = linked.LinkedCP(shared, tuple(clean))
        noisy = [1.5 * x + 0.5 * rng.normal(size=x.shape) for x in dense(self.start)]
        self.tensors = tuple(jnp.asarray(x, dtype) for x in noisy)
        self.start, self.clean = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, dtype), (self.start, self.clean)
        )
        masks = [rng.random(s) < 0.8 for s in self.shapes]
        for k, mask in enumerate(masks):
            mask[k] = False  # another sample is hidden altogether in every tensor
        self.masks = tuple(map(jnp.asarray, masks)) if masked else None
        self.clients = vertical_multifac.stack_tensors(self.tensors, self.masks)
        self.state = self.begin(self.start, self.clients)

    def begin(self, start, clients):
        algorithm = vertical_multifac.build(penalty=PENALTY)
        return algorithm.init(start, clients, key=KEY)

    def cut(self, state):
        return vertical_multifac.unstack(state, self.shapes)

    def impute(self, fit):
        return self.tensors if self.masks is None else impute(fit, self.tensors, self.masks)


impute = jax.jit(linked.impute)
get = functools.cache(Problem)


@jax.jit
def follow(state, clients, penalty):
    algorithm = vertical_multifac.build(penalty=penalty)
    return federated.run(algorithm, state, clients, num_rounds=ROUNDS, key=KEY)


@jax.jit
def pooled(start, tensors, masks, penalty):
    return linked.multifac(
        tensors, init=start, penalty=penalty, masks=masks, max_iters=2 * ROUNDS, tol=0
    )


def objective(fit, filled, penalty):
    """The function that is minimized, from dense tensors: of every client, and in all."""
    shared, own = jax.tree.map(np.asarray, fit)
    misfit = [np.sum((x - y) ** 2) for x, y in zip(filled, dense(fit), strict=True)]
    squares = [sum(np.sum(factor**2) for factor in factors) for factors in own]
    losses = np.array(misfit) + penalty * np.array(squares)
    return misfit, losses, losses.sum() + penalty * np.sum(shared**2)


def check_record(infos, t, fit, filled, penalty):
    misfit, losses, total = objective(fit, filled, penalty)
    np.testing.assert_allclose(infos.metrics.misfit[t], misfit, rtol=1e-10)
    np.testing.assert_allclose(infos.losses[t], losses, rtol=1e-10)
    np.testing.assert_allclose(infos.metrics.objective[t], total, rtol=1e-10)


def assert_close(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), a, b)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(
    params=[("one", False), ("two", False), ("three", False), ("three", True)],
    ids=lambda case: case[0] + ("_masked" if case[1] else ""),
)
def problem(request):
    return get(*request.param)


@pytest.mark.parametrize("penalty", [PENALTY, 0.0])
def test_rounds_equal_the_sweeps_of_the_pooled_fit(problem, penalty):
    """And a run that goes on from a state equals one without a pause."""
    state, infos = follow(problem.state, problem.clients, penalty)
    half_way = problem.cut(state)
    state, more = follow(state, problem.clients, penalty)
    expected, info = pooled(problem.start, problem.tensors, problem.masks, penalty)
    assert_close(problem.cut(state), expected, 1e-10)
    # What a round records is of the factors that entered: the first record has no counterpart.
    found = np.concatenate([infos.metrics.objective, more.metrics.objective])
    np.testing.assert_allclose(found[1:, 0], info.objective[:-1], rtol=1e-10)
    np.testing.assert_array_equal(found, np.repeat(found[:, :1], len(problem.shapes), axis=1))
    filled = problem.impute(half_way)
    check_record(more, 0, half_way, filled, penalty)
    np.testing.assert_array_equal(more.weights, 1)
    if problem.masks is None:
        assert (np.diff(found[:, 0]) <= 1e-13 * found[0, 0]).all()


def test_first_record_is_of_the_start(problem):
    _, infos = follow(problem.state, problem.clients, PENALTY)
    filled = problem.impute(problem.clean)
    check_record(infos, 0, problem.clean, filled, PENALTY)


def test_hidden_entries_begin_at_zero_where_the_start_fits_worse_than_that():
    problem = get("three", True)
    start = problem.clean._replace(shared=-problem.clean.shared)
    state, infos = follow(problem.begin(start, problem.clients), problem.clients, PENALTY)
    filled = [jnp.where(m, x, 0) for m, x in zip(problem.masks, problem.tensors, strict=True)]
    check_record(infos, 0, start, filled, PENALTY)
    state, _ = follow(state, problem.clients, PENALTY)
    expected, _ = pooled(start, problem.tensors, problem.masks, PENALTY)
    assert_close(problem.cut(state), expected, 1e-10)


@pytest.mark.parametrize("penalty", [PENALTY, 0.0])
def test_padding_and_zero_columns_stay_and_absent_modes_never_change(problem, penalty):
    state, _ = follow(problem.state, problem.clients, penalty)
    sizes = np.asarray(problem.clients.sizes)
    for mode, factors in enumerate(state.params.factors):
        for k, factor in enumerate(np.asarray(factors)):
            size = sizes[k, mode] or 1
            np.testing.assert_array_equal(factor[size:], 0)
            if sizes[k, mode] == 0:
                np.testing.assert_array_equal(factor[:size], 1)
            else:
                expected = np.arange(RANK) >= k
                np.testing.assert_array_equal(factor.any(axis=0), expected)


def test_bytes_are_those_of_the_arrays_sent(problem):
    _, infos = follow(problem.state, problem.clients, PENALTY)
    samples, clients = problem.shapes[0][0], len(problem.shapes)
    up = np.zeros((samples, RANK)).nbytes + np.zeros(RANK * (RANK + 1) // 2).nbytes
    down = np.zeros((samples, RANK)).nbytes
    more = np.zeros(2, int)
    if problem.masks is not None:
        up += np.packbits(np.zeros(RANK, bool)).nbytes
        down += np.packbits(np.zeros((clients, RANK), bool)).nbytes
        seen = np.zeros((clients, samples), bool)
        more = np.packbits(seen[0]).nbytes, np.packbits(seen).nbytes
    for found, usual, extra in ((infos.uplink_bytes, up, 0), (infos.downlink_bytes, down, 1)):
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found[0], [usual + more[extra]] * clients)
        np.testing.assert_array_equal(found[1:], np.full((ROUNDS - 1, clients), usual))


def test_what_is_sent_suffices_for_the_update():
    """The server's step from the arrays whose bytes are counted, by naive sums."""
    problem = get("two", False)
    state, _ = follow(problem.state, problem.clients, PENALTY)
    fit = problem.cut(state)
    upper, triangle, total = np.triu_indices(RANK), 0, 0
    for x, own in zip(problem.tensors, fit.factors, strict=True):
        modes = "bc"[: len(own)]
        total += np.einsum(f"a{modes},{','.join(m + 'r' for m in modes)}->ar", x, *own)
        triangle += np.prod([np.asarray(f).T @ f for f in own], axis=0)[upper]
    gram = np.zeros((RANK, RANK))
    gram[upper] = triangle
    gram += np.triu(gram, 1).T + PENALTY * np.eye(RANK)
    algorithm = vertical_multifac.build(penalty=PENALTY)
    after, _ = jax.jit(algorithm.round)(state, problem.clients, np.arange(2), key=KEY)
    assert_close(after.params.shared, np.linalg.solve(gram, total.T).T, 1e-10)


def test_hidden_entries_change_nothing():
    problem = get("three", True)
    clients = problem.clients
    spoilt = clients._replace(tensors=jnp.where(clients.observed, clients.tensors, jnp.nan))
    assert_equal(follow(problem.state, spoilt, PENALTY), follow(problem.state, clients, PENALTY))
    tensors = [
        jnp.where(m, x, jnp.nan) for x, m in zip(problem.tensors, problem.masks, strict=True)
    ]
    assert_equal(vertical_multifac.stack_tensors(tensors, list(problem.masks)), clients)


def test_everything_observed_equals_no_mask():
    problem = get("three", False)
    everything = [jnp.ones(x.shape, bool) for x in problem.tensors]
    clients = vertical_multifac.stack_tensors(problem.tensors, everything)
    found, infos = follow(problem.state, clients, PENALTY)
    expected, records = follow(problem.state, problem.clients, PENALTY)
    assert_close(found.params, expected.params, 1e-11)
    np.testing.assert_allclose(infos.losses, records.losses, rtol=1e-10)


def test_starts_can_be_vmapped():
    problem = get("one", False)
    starts = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf**2, 1 - leaf]), problem.start)

    @jax.jit
    @jax.vmap
    def all_at_once(start):
        return follow(problem.begin(start, problem.clients), problem.clients, PENALTY)

    states, infos = all_at_once(starts)
    fits = problem.cut(states)
    assert fits.shapes == problem.shapes
    for i in range(3):
        start, fit = (jax.tree.map(lambda leaf: leaf[i], tree) for tree in (starts, fits))  # noqa: B023
        alone, info = follow(problem.begin(start, problem.clients), problem.clients, PENALTY)
        assert_close(fit, problem.cut(alone), 1e-10)
        np.testing.assert_allclose(infos.losses[i], info.losses, rtol=1e-10)


def test_simulate_equals_run():
    problem = get("one", False)
    algorithm = vertical_multifac.build(penalty=PENALTY)
    found, infos = federated.simulate(
        algorithm, problem.state, problem.clients, num_rounds=ROUNDS, key=KEY, progress=False
    )
    expected, records = follow(problem.state, problem.clients, PENALTY)
    assert_close(found.params, expected.params, 1e-11)
    np.testing.assert_allclose(infos.losses, records.losses, rtol=1e-10)
    np.testing.assert_array_equal(infos.uplink_bytes, records.uplink_bytes)


def test_permuted_clients_give_the_permuted_result():
    problem, order = get("three", True), np.array([2, 0, 1])
    clients = jax.tree.map(lambda leaf: leaf[order], problem.clients)
    start = problem.start._replace(factors=tuple(problem.start.factors[k] for k in order))
    found, infos = follow(problem.begin(start, clients), clients, PENALTY)
    expected, records = follow(problem.state, problem.clients, PENALTY)
    assert_close(found.params.shared, expected.params.shared, 1e-10)
    for ours, theirs in zip(found.params.factors, expected.params.factors, strict=True):
        assert_close(ours, theirs[order], 1e-10)
    np.testing.assert_allclose(infos.losses, records.losses[:, order], rtol=1e-10)


def test_float32_stays_and_reaches_the_objective():
    coarse, fine = get("one", False, np.float32), get("one", False)
    state, infos = follow(coarse.state, coarse.clients, np.float32(PENALTY))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    _, exact = follow(fine.state, fine.clients, PENALTY)
    np.testing.assert_allclose(infos.metrics.objective, exact.metrics.objective, rtol=1e-4)


def test_stack_and_cut_are_inverse():
    problem = get("three", True)
    np.testing.assert_array_equal(problem.clients.sizes, [[4, 3, 0], [6, 0, 0], [1, 3, 2]])
    assert problem.clients.tensors.shape == (3, 5, 6, 3, 2)
    for k, (x, mask) in enumerate(zip(problem.tensors, problem.masks, strict=True)):
        place = (k, *(slice(size) for size in x.shape), *(0,) * (4 - x.ndim))
        np.testing.assert_array_equal(problem.clients.tensors[place], jnp.where(mask, x, 0))
        np.testing.assert_array_equal(problem.clients.observed[place], mask)
        assert problem.clients.observed[k].sum() == mask.sum()
    assert_equal(problem.cut(problem.state), problem.clean)


def test_bad_input_is_refused():
    problem = get("two", False)
    (x, y), start, clients = problem.tensors, problem.start, problem.clients
    for penalty, message in ((-1.0, "got penalty -1.0"), (jnp.ones(2), r"got penalty of shape")):
        with pytest.raises(ValueError, match=f"^vertical_multifac: {message}"):
            vertical_multifac.build(penalty=penalty)
    first, second = start.factors
    narrow, wide = (first, (second[0][:4],)), (first, (jnp.ones((7, RANK)),))
    coarse = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start)
    for wrong, message in (
        (start._replace(factors=(second, first)), r"got params of shapes .* as the tensors"),
        (
            start._replace(factors=narrow),
            r"got params of shapes .*, expected \(\(6, 4, 3\), \(6, 5\)\) as the tensors",
        ),
        (
            start._replace(factors=wide),
            r"got params of shapes .*, expected 2 that fit within \(6, 5, 3\)",
        ),
        (start._replace(factors=(first,)), "got params of shapes .*, expected 2 that fit"),
        (coarse, "got params of dtype float32, expected float64 as the tensors"),
        (start.shared, "got params of type .*, expected a linked.LinkedCP"),
    ):
        with pytest.raises(ValueError, match=f"^vertical_multifac: {message}"):
            problem.begin(wrong, clients)
    with pytest.raises(ValueError, match="got clients of type tuple, expected those of stack_ten"):
        problem.begin(start, problem.tensors)
    with pytest.raises(ValueError, match=r"^unstack: got shapes .*, expected 2 that fit within"):
        vertical_multifac.unstack(problem.state, problem.shapes[:1])
    for tensors, masks, message in (
        ((), None, "got tensors of type tuple, expected one or more"),
        ((x, y[:5]), None, r"got tensor 1 of shape \(5, 5\), expected 6 samples"),
        ((x, y.astype(jnp.float32)), None, "got tensor 1 of dtype float32"),
        ((x, y), (x > 0,), "got masks of type tuple, expected a tuple of 2"),
        ((x, y), (x > 0, y), "got mask of dtype float64, expected bool"),
    ):
        with pytest.raises(ValueError, match=f"^stack_tensors: {message}"):
            vertical_multifac.stack_tensors(tensors, masks)
    algorithm = vertical_multifac.build(penalty=PENALTY)
    with pytest.raises(ValueError, match=r"^vertical_multifac: got cohort of 1 clients, expected"):
        algorithm.round(problem.state, clients, np.array([1]), key=KEY)

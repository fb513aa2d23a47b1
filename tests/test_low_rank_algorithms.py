"""FedLoRU's rivals and variants: exactness, bytes, and one round in NumPy."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlr import lowrank
from fedlr.algorithms import (
    fedavg,
    fedex_lora,
    fedhm,
    fedlora,
    fedloru,
    fedlrt,
    fedpara,
    ffa_lora,
    flexlora,
    flora,
    mfedloru,
    pfedloru,
    rolora,
)
from fedlr.federated import (
    aggregators,
    clients,
    compressors,
    local,
    products,
    protocol,
    rounds,
    servers,
)
from tests.reference import low_rank as reference

ROWS, COLUMNS, RANK, NUM_CLIENTS, SAMPLES = 6, 7, 3, 3, 5
COUNTS, RANKS = np.array([5, 2, 4]), np.array([1, 2, 3])
RATE, STEPS = 0.05, 2
SIDES, WHOLE, REST = ROWS + COLUMNS, ROWS * COLUMNS, ROWS  # numbers
EVERYONE = np.arange(NUM_CLIENTS)
# Sums of some ten terms, and some ten of them one after the other.
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def loss(params, inputs, target):
    return jnp.sum((params["weight"] @ inputs + params["bias"] - target) ** 2) / 2


def plain(module, **options):
    return module.build(loss, optax.sgd(RATE), **{"rank": RANK, "local_steps": STEPS, **options})


BUILD = {
    "fedlora": lambda **options: plain(fedlora, **options),
    "ffa_lora": lambda **options: plain(ffa_lora, **options),
    "rolora": lambda **options: plain(rolora, **options),
    "flora": lambda **options: plain(flora, **options),
    "flora_ranked": lambda **options: plain(flora, **options),
    "fedex_lora": lambda **options: plain(fedex_lora, **options),
    "flexlora": lambda **options: plain(flexlora, **options),
    "flexlora_ranked": lambda **options: plain(flexlora, **options),
    "fedhm": lambda **options: plain(fedhm, **options),
    "fedpara": lambda **options: plain(fedpara, **{"rank": 1, **options}),
    "fedlrt": lambda **options: plain(fedlrt, **{"threshold": 0.0, **options}),
    "pfedloru": lambda **options: plain(pfedloru, **{"accumulate_every": 2, **options}),
    "mfedloru": lambda **options: plain(mfedloru, **{"accumulate_every": None, **options}),
}
NAMES = list(BUILD)
ADAPTED = [name for name in NAMES if name not in ("fedpara", "fedlrt")]
# Of the others, one of every kind is among the cases of `test_algorithm_contracts`.
BEYOND_CONTRACTS = [
    name for name in NAMES if name not in ("flora", "fedlrt", "pfedloru", "mfedloru")
]


def is_ranked(name):
    return name.endswith("_ranked") or name == "mfedloru"


@functools.cache
def data(name="fedlora", dtype="float64"):
    keys = jax.random.split(jax.random.key(0), 2)
    inputs = jax.random.normal(keys[0], (NUM_CLIENTS, SAMPLES, COLUMNS), "float64").astype(dtype)
    targets = jax.random.normal(keys[1], (NUM_CLIENTS, SAMPLES, ROWS), "float64").astype(dtype)
    mask = jnp.asarray(np.arange(SAMPLES) < COUNTS[:, None])
    everything = protocol.ClientData(inputs, targets, mask)
    if is_ranked(name):
        return clients.RankedClients(everything, jnp.asarray(RANKS, jnp.int32))
    return everything


@functools.cache
def model(dtype="float64"):
    weight = jax.random.normal(jax.random.key(9), (ROWS, COLUMNS), dtype) / 3
    return {"weight": weight, "bias": jnp.linspace(-0.5, 0.5, ROWS, dtype=dtype)}


@functools.cache
def algorithm(name, **options):
    return BUILD[name](**options)


@functools.cache
def step(name):
    """Compile a round with everyone, once: a second trace is an error."""

    def one_round(state, data, cohort, *, key):
        return algorithm(name).round(state, data, cohort, key=key)

    # Traces are counted by names.
    one_round.__name__ = name
    return jax.jit(chex.assert_max_traces(one_round, n=1))


def begin(name, **options):
    return algorithm(name, **options).init(model(), data(name), key=jax.random.key(3))


def moving(name, done=0):
    """Start with factors that both move in the first round, unlike U = 0."""
    state = begin(name)
    keys = jax.random.split(jax.random.key(5))
    up = jax.random.normal(keys[0], (ROWS, RANK), "float64") / 2
    down = jax.random.normal(keys[1], (RANK, COLUMNS), "float64") / 2
    factors = {"weight": lowrank.LowRank(up, down), "bias": None}
    params = state.params._replace(factors=factors, round=jnp.int32(done))
    if name == "fedhm":
        params = params._replace(base=model() | {"weight": jnp.zeros((ROWS, COLUMNS))})
    return state._replace(params=params)


def advance(name, state, cohort=EVERYONE, seed=0, given=None):
    return step(name)(
        state, data(name) if given is None else given, jnp.asarray(cohort), key=jax.random.key(seed)
    )


def merged(state):
    return np.asarray(fedloru.merged_params(state)["weight"])


def shares():
    return COUNTS / COUNTS.sum()


def examples(client):
    present = data()
    count = COUNTS[client]
    return np.asarray(present.inputs[client, :count]), np.asarray(present.targets[client, :count])


def trained(state, *, frozen=(), ranks=None):
    """Train every client in NumPy; return the lists of U_k, D_k and biases."""
    update = state.params.factors["weight"]
    base = np.asarray(state.params.base["weight"])
    bias = np.asarray(state.params.base["bias"])
    results = []
    for k in range(NUM_CLIENTS):
        first = RANK if ranks is None else ranks[k]
        results.append(
            reference.train_factors(
                base,
                bias,
                np.asarray(update.up)[:, :first],
                np.asarray(update.down)[:first],
                *examples(k),
                rate=RATE,
                num_steps=STEPS,
                frozen=frozen,
            )
        )
    return zip(*results, strict=True)


def mean(values):
    return sum(share * value for share, value in zip(shares(), values, strict=True))


def mean_product(ups, downs):
    return mean([up @ down for up, down in zip(ups, downs, strict=True)])


def kinds(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


# What every algorithm promises.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", BEYOND_CONTRACTS)
def test_a_round_preserves_structure_shapes_and_dtypes(name, dtype):
    given, key = data(name, dtype), jax.random.key(0)
    start = jax.eval_shape(algorithm(name).init, model(dtype), given, key=key)
    state, info = jax.eval_shape(algorithm(name).round, start, given, EVERYONE, key=key)
    assert kinds(state) == kinds(start)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.params)} <= {dtype, "int32"}
    assert info.losses.dtype == dtype
    assert info.uplink_bytes.dtype == info.downlink_bytes.dtype == jnp.int32


@pytest.mark.parametrize("name", NAMES)
def test_three_rounds_cause_one_trace_and_learn(name):
    state, losses = begin(name), []
    for t in range(3):
        state, info = advance(name, state, seed=t)
        losses.append(float(info.losses @ shares()))
    assert state.round == 3
    assert losses[2] < losses[0]


@pytest.mark.parametrize("name", BEYOND_CONTRACTS)
def test_the_order_of_the_cohort_does_not_matter(name):
    order = np.array([2, 0, 1])
    state, info = advance(name, begin(name))
    other, other_info = advance(name, begin(name), cohort=order)
    np.testing.assert_array_equal(other_info.losses, info.losses[order])
    np.testing.assert_array_equal(other_info.uplink_bytes, info.uplink_bytes[order])
    chex.assert_trees_all_close(other.params, state.params, **CLOSE)
    chex.assert_trees_all_close(other.clients, state.clients, **CLOSE)


@pytest.mark.parametrize("name", BEYOND_CONTRACTS)
def test_permuting_clients_changes_nothing(name):
    order = np.array([2, 0, 1])

    def permute(tree):
        return jax.tree.map(lambda leaf: leaf[order], tree)

    start = begin(name)
    state, _ = advance(name, start)
    permuted = start._replace(clients=permute(start.clients))
    other, _ = advance(name, permuted, given=permute(data(name)))
    chex.assert_trees_all_close(other.params, state.params, **CLOSE)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (fedlora, {}),
        (ffa_lora, {"accumulate_every": 2}),
        (rolora, {}),
        (flora, {}),
        (fedex_lora, {}),
        (flexlora, {}),
        (fedhm, {}),
        (fedpara, {}),
        (fedlrt, {}),
        (pfedloru, {"accumulate_every": 2}),
    ],
)
def test_ranks_that_save_nothing_are_refused(module, options):
    with pytest.raises(ValueError, match=r"got rank \d+ and leaves of shapes .*, expected a leaf"):
        plain(module, rank=4, **options).init(model(), data(), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"rank 0, expected an integer from 1"):
        plain(module, rank=0, **options).init(model(), data(), key=jax.random.key(0))


@pytest.mark.parametrize("module", [flora, flexlora, fedhm, mfedloru])
def test_ranks_of_clients_out_of_range_are_refused(module):
    options = {"accumulate_every": None} if module is mfedloru else {}
    built = plain(module, **options)
    for wrong, text in (([1, 4, 2], "got rank 4"), ([1, 0, 2], "got rank 0")):
        given = clients.RankedClients(data(), jnp.array(wrong, jnp.int32))
        with pytest.raises(ValueError, match=rf"init: {text}, expected an integer from 1 to 3"):
            built.init(model(), given, key=jax.random.key(0))
    for wrong in (jnp.ones(2, jnp.int32), jnp.ones(3)):
        given = clients.RankedClients(data(), wrong)
        with pytest.raises(ValueError, match=r"init: got ranks of shape .*, expected int32 \(3,\)"):
            built.init(model(), given, key=jax.random.key(0))


# Exactness, against NumPy.


def test_fedlora_averages_factors_and_loses_the_centred_products():
    start = moving("fedlora")
    state, _ = advance("fedlora", start)
    ups, downs, biases = trained(start)
    np.testing.assert_allclose(state.params.factors["weight"].up, mean(ups), **CLOSE)
    np.testing.assert_allclose(state.params.factors["weight"].down, mean(downs), **CLOSE)
    np.testing.assert_allclose(state.params.base["bias"], mean(biases), **CLOSE)
    np.testing.assert_array_equal(state.params.base["weight"], model()["weight"])
    exact, _ = advance("fedex_lora", moving("fedex_lora"))
    centred = mean_product([up - mean(ups) for up in ups], [down - mean(downs) for down in downs])
    assert np.linalg.norm(centred) > 1e-3
    np.testing.assert_allclose(merged(exact) - merged(state), centred, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_exact_methods_average_products(name):
    start = moving(name)
    state, _ = advance(name, start)
    ups, downs, biases = trained(start)
    expected = np.asarray(model()["weight"]) + mean_product(ups, downs)
    np.testing.assert_allclose(merged(state), expected, **CLOSE)
    np.testing.assert_allclose(state.params.base["bias"], mean(biases), **CLOSE)


def test_flora_is_exact_for_clients_of_any_ranks_and_begins_anew():
    start = moving("flora_ranked")
    state, _ = advance("flora_ranked", start)
    ups, downs, _ = trained(start, ranks=RANKS)
    expected = np.asarray(model()["weight"]) + mean_product(ups, downs)
    np.testing.assert_allclose(merged(state), expected, **CLOSE)
    np.testing.assert_array_equal(state.params.factors["weight"].up, 0)
    assert (state.params.factors["weight"].down != start.params.factors["weight"].down).all()


def test_ffa_lora_trains_u_only_and_is_exact():
    start = moving("ffa_lora")
    state, _ = advance("ffa_lora", start)
    ups, downs, _ = trained(start, frozen=("down",))
    expected = np.asarray(model()["weight"]) + mean_product(ups, downs)
    np.testing.assert_allclose(merged(state), expected, **CLOSE)
    np.testing.assert_array_equal(
        state.params.factors["weight"].down, start.params.factors["weight"].down
    )


@pytest.mark.parametrize(("done", "frozen"), [(0, "down"), (1, "up")])
def test_rolora_trains_one_factor_in_turn_and_is_exact(done, frozen):
    start = moving("rolora", done)
    state, _ = advance("rolora", start)
    ups, downs, _ = trained(start, frozen=(frozen,))
    expected = np.asarray(model()["weight"]) + mean_product(ups, downs)
    np.testing.assert_allclose(merged(state), expected, **CLOSE)
    before, after = start.params.factors["weight"], state.params.factors["weight"]
    np.testing.assert_array_equal(getattr(after, frozen), getattr(before, frozen))


@pytest.mark.parametrize(("name", "ranks"), [("flexlora", None), ("flexlora_ranked", RANKS)])
def test_flexlora_truncates_the_exact_average(name, ranks):
    start = moving(name)
    state, _ = advance(name, start)
    ups, downs, _ = trained(start, ranks=ranks)
    found = state.params.factors["weight"]
    expected = reference.truncate(mean_product(ups, downs), RANK)
    np.testing.assert_allclose(found.up @ found.down, expected, **CLOSE)
    np.testing.assert_allclose(found.down @ found.down.T, np.eye(RANK), atol=1e-12)
    for rank in range(1, RANK):
        np.testing.assert_allclose(
            found.up[:, :rank] @ found.down[:rank], reference.truncate(expected, rank), **CLOSE
        )
    np.testing.assert_array_equal(state.params.base["weight"], model()["weight"])


def test_fedhm_trains_truncated_matrices_and_keeps_the_exact_average():
    begun = begin("fedhm")
    update = begun.params.factors["weight"]
    whole = np.asarray(model()["weight"])
    np.testing.assert_allclose(update.up @ update.down, reference.truncate(whole, RANK), **CLOSE)
    np.testing.assert_allclose(merged(begun), whole, **CLOSE)
    np.testing.assert_allclose(update.up.T @ update.up, update.down @ update.down.T, atol=1e-12)
    start = moving("fedhm")
    state, _ = advance("fedhm", start)
    ups, downs, biases = trained(start)
    average = mean_product(ups, downs)
    np.testing.assert_allclose(merged(state), average, **CLOSE)
    found = state.params.factors["weight"]
    np.testing.assert_allclose(found.up @ found.down, reference.truncate(average, RANK), **CLOSE)
    np.testing.assert_allclose(state.params.base["bias"], mean(biases), **CLOSE)
    # What truncation has left out of W does not reach the clients.
    other = start.params._replace(base=start.params.base | {"weight": jnp.ones((ROWS, COLUMNS))})
    again, _ = advance("fedhm", start._replace(params=other))
    np.testing.assert_allclose(merged(again), average, **CLOSE)


def test_identical_clients_lose_nothing_by_averaging_factors():
    one = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), data())
    states = {
        name: advance(name, moving(name), given=one)[0]
        for name in ("fedlora", "fedex_lora", "flora", "flexlora")
    }
    for state in states.values():
        np.testing.assert_allclose(merged(state), merged(states["fedlora"]), **CLOSE)
    base = states["fedex_lora"].params.base["weight"]
    np.testing.assert_allclose(base, model()["weight"], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", ["fedex_lora", "flora"])
def test_exact_methods_are_exact_in_single_precision(name):
    # Sums of some ten terms, of products of size one.
    tolerance = 50 * np.finfo(np.float32).eps

    def single(tree):
        return jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf, tree
        )

    expected, _ = advance(name, moving(name))
    state = jax.jit(algorithm(name).round)(
        single(moving(name)), data(dtype="float32"), jnp.asarray(EVERYONE), key=jax.random.key(0)
    )[0]
    np.testing.assert_allclose(merged(state), merged(expected), rtol=tolerance, atol=tolerance)


def test_fedlora_is_fedloru_without_accumulation():
    training = local.Training(optax.sgd(RATE), STEPS)
    other = fedloru.assemble(loss, training, fedloru.Settings(RANK, None))
    start = other.init(model(), data(), key=jax.random.key(3))
    found = jax.jit(other.round)(start, data(), jnp.asarray(EVERYONE), key=jax.random.key(0))
    expected = advance("fedlora", begin("fedlora"))
    jax.tree.map(np.testing.assert_array_equal, found[0].params, expected[0].params)
    np.testing.assert_array_equal(found[1].uplink_bytes, expected[1].uplink_bytes)
    np.testing.assert_array_equal(found[1].downlink_bytes, expected[1].downlink_bytes)


def test_accumulation_of_ffa_lora_keeps_the_model_and_draws_d_anew():
    waiting, _ = advance("ffa_lora", begin("ffa_lora"))
    built = algorithm("ffa_lora", accumulate_every=1)
    state, _ = jax.jit(built.round)(
        begin("ffa_lora", accumulate_every=1),
        data(),
        jnp.asarray(EVERYONE),
        key=jax.random.key(0),
    )
    np.testing.assert_allclose(merged(state), merged(waiting), **CLOSE)
    before, after = (s.params.factors["weight"].down for s in (waiting, state))
    assert (before != after).all()


# Bytes.


def expected_bytes(name):
    """Numbers that go up and down in rounds 0, 1 and 2 with everyone, per client."""
    pair, up, down = RANK * SIDES, RANK * ROWS, RANK * COLUMNS
    own = RANKS * SIDES
    total = int(RANKS.sum()) * SIDES
    if name in ("fedlora", "flexlora", "fedhm"):
        return [(pair + REST, pair + REST)] * 3
    if name == "ffa_lora":
        return [(up + REST, up + REST)] * 3
    if name == "rolora":
        return [(up + REST, down + REST), (down + REST, up + REST), (up + REST, down + REST)]
    if name in ("flora", "flora_ranked"):
        sent = pair if name == "flora" else own
        stack = min(NUM_CLIENTS * pair if name == "flora" else total, WHOLE)
        return [(sent + REST, REST)] + [(sent + REST, stack + REST)] * 2
    if name == "fedex_lora":
        residual = min((NUM_CLIENTS - 1) * pair, WHOLE)
        return [(pair + REST, pair + REST)] + [(pair + REST, residual + pair + REST)] * 2
    if name == "flexlora_ranked":
        return [(own + REST, own + REST)] * 3
    if name == "fedpara":
        return [(2 * SIDES + REST, 2 * SIDES + REST)] * 3
    if name == "fedlrt":
        # U, S, V and the full leaves down, two gradients up; new columns down, S up. In six rows
        # and after three columns there is room for three.
        up = pair + (2 * RANK) ** 2 + REST
        return [(up, pair + RANK + REST + pair)] * 3
    if name == "pfedloru":
        # In round 2 the merged pair comes instead of the fresh one.
        return [(pair + REST, pair + REST)] * 3
    weak = RANKS * (SIDES + 2 * RANK)
    return [(np.minimum(weak, pair) + REST, pair + REST)] * 3


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_formulas(name):
    state = begin(name)
    for t, (up, down) in enumerate(expected_bytes(name)):
        state, info = advance(name, state, seed=t)
        np.testing.assert_array_equal(info.uplink_bytes, 8 * np.broadcast_to(up, NUM_CLIENTS))
        np.testing.assert_array_equal(info.downlink_bytes, 8 * np.broadcast_to(down, NUM_CLIENTS))


def run_pairs(name, cohorts, **options):
    """Do rounds with two clients each; return the bytes they received as numbers."""
    built = algorithm(name, **options)
    state, found = begin(name, **options), []
    advance_pair = jax.jit(built.round)
    for t, cohort in enumerate(cohorts):
        state, info = advance_pair(state, data(name), jnp.array(cohort), key=jax.random.key(t))
        found.append((info.downlink_bytes // 8).tolist())
    return state, found


@pytest.mark.parametrize("name", ["flora", "fedex_lora", "rolora"])
def test_absent_clients_receive_what_they_missed(name):
    # Client 2 is away in the rounds 0 to 2; of rank 1, W is 42 numbers and a pair 13.
    _, found = run_pairs(name, [(0, 1), (0, 1), (0, 1), (0, 2)], rank=1)
    if name == "flora":
        assert found == [[REST] * 2, [26 + REST] * 2, [26 + REST] * 2, [26 + REST, WHOLE + REST]]
    elif name == "fedex_lora":
        each = 13 + REST
        assert found == [[each] * 2, [13 + each] * 2, [13 + each] * 2, [13 + each, 39 + each]]
    else:
        assert found == [
            [COLUMNS + REST] * 2,
            [ROWS + REST] * 2,
            [COLUMNS + REST] * 2,
            [ROWS + REST, ROWS + COLUMNS + REST],
        ]


def test_accumulations_that_were_missed_cost_as_in_fedloru():
    cohorts = [(0, 1), (0, 1), (1, 2), (0, 2), (0, 1), (1, 2)]
    options = {"rank": 1, "accumulate_every": 1}
    _, found = run_pairs("pfedloru", cohorts, **options)
    other = fedloru.build(loss, optax.sgd(RATE), local_steps=STEPS, **options)
    state, expected = other.init(model(), data(), key=jax.random.key(3)), []
    advance_pair = jax.jit(other.round)
    for t, cohort in enumerate(cohorts):
        state, info = advance_pair(state, data(), jnp.array(cohort), key=jax.random.key(t))
        expected.append((info.downlink_bytes // 8).tolist())
    assert found == expected
    assert max(itertools.chain(*found)) > 13 + REST


# Clients of different ranks.


@functools.cache
def ranked_update(form):
    # It moves everything, gradient or not, as the noise of differential privacy does.
    restless = optax.stateless(
        lambda updates, _: jax.tree.map(lambda slope: 0.01 - RATE * slope, updates)
    )
    training = local.Training(restless, STEPS)
    return jax.jit(products.local_factors(loss, training, form=form))


def test_masked_columns_stay_zero_under_any_optimizer():
    params, given = moving("flexlora").params, data("flexlora_ranked")
    for client, rank in enumerate(RANKS):
        own = jax.tree.map(lambda leaf: leaf[client], given)  # noqa: B023
        values, _, _ = ranked_update(lowrank.merge)(params, (), own, key=jax.random.key(0))
        update = values.factors["weight"]
        assert (np.asarray(update.up) != 0).any(axis=0).tolist() == [i < rank for i in range(RANK)]
        assert (np.asarray(update.down) != 0).any(axis=1).tolist() == [
            i < rank for i in range(RANK)
        ]


def test_merged_and_factored_forms_train_the_same():
    params = moving("flexlora").params
    own = jax.tree.map(lambda leaf: leaf[2], data("flexlora_ranked"))
    found = [
        ranked_update(form)(params, (), own, key=jax.random.key(0))[0]
        for form in (lowrank.merge, lowrank.apply)
    ]
    chex.assert_trees_all_close(*found, **CLOSE)


def test_mfedloru_of_strong_clients_is_fedlora():
    strong = data("mfedloru")._replace(ranks=jnp.full(NUM_CLIENTS, RANK, jnp.int32))
    state, info = advance("mfedloru", moving("mfedloru"), given=strong)
    expected, expected_info = advance("fedlora", moving("fedlora"))
    chex.assert_trees_all_close(state.params, expected.params, **CLOSE)
    np.testing.assert_array_equal(info.uplink_bytes, expected_info.uplink_bytes)


def test_weak_clients_of_mfedloru_move_factors_by_their_rank():
    start = moving("mfedloru")
    one = jax.jit(algorithm("mfedloru").round)
    for client, rank in enumerate(RANKS):
        state, _ = one(start, data("mfedloru"), jnp.array([client]), key=jax.random.key(1))
        before, after = start.params.factors["weight"], state.params.factors["weight"]
        for side in ("up", "down"):
            move = np.asarray(getattr(after, side) - getattr(before, side))
            assert np.linalg.matrix_rank(move, tol=1e-10) == rank
    # Half of the nested factors begin at zero: training goes downhill for all.
    state, first = advance("mfedloru", start)
    _, second = advance("mfedloru", state)
    assert (second.losses < first.losses).all()


def test_mfedloru_needs_ranks():
    with pytest.raises(ValueError, match="clients of type ClientData, expected RankedClients"):
        algorithm("mfedloru").init(model(), data(), key=jax.random.key(0))


# Personal factors.


def test_pfedloru_trains_personal_factors_first_and_sends_the_shared_ones():
    start = moving("pfedloru")
    state, _ = advance("pfedloru", start)
    update, base = start.params.factors["weight"], np.asarray(model()["weight"])
    up, down, bias = np.asarray(update.up), np.asarray(update.down), np.asarray(model()["bias"])
    options = {"rate": RATE, "num_steps": STEPS}
    ups, downs, biases = [], [], []
    for k in range(NUM_CLIENTS):
        own = jax.tree.map(lambda leaf: np.asarray(leaf[k]), start.clients.local.factors["weight"])  # noqa: B023
        own_up, own_down, _ = reference.train_factors(
            base + up @ down, bias, own.up, own.down, *examples(k), **options, frozen=("bias",)
        )
        found = state.clients.local.factors["weight"]
        np.testing.assert_allclose(found.up[k], own_up, **CLOSE)
        np.testing.assert_allclose(found.down[k], own_down, **CLOSE)
        one = reference.train_factors(
            base + own_up @ own_down, bias, up, down, *examples(k), **options
        )
        for values, value in zip((ups, downs, biases), one, strict=True):
            values.append(value)
        personal = pfedloru.personal_params(state, k)["weight"]
        np.testing.assert_allclose(personal, merged(state) + own_up @ own_down, **CLOSE)
    np.testing.assert_allclose(state.params.factors["weight"].up, mean(ups), **CLOSE)
    np.testing.assert_allclose(state.params.factors["weight"].down, mean(downs), **CLOSE)
    np.testing.assert_allclose(state.params.base["bias"], mean(biases), **CLOSE)


def test_personal_factors_survive_absence_and_accumulation():
    start = begin("pfedloru", rank=1, accumulate_every=1)
    assert len(np.unique(start.clients.local.factors["weight"].down[:, 0, 0])) == NUM_CLIENTS
    state, _ = run_pairs("pfedloru", [(0, 1), (1, 0)], rank=1, accumulate_every=1)
    before, after = (s.clients.local.factors["weight"] for s in (start, state))
    np.testing.assert_array_equal(after.up[2], before.up[2])
    np.testing.assert_array_equal(after.down[2], before.down[2])
    assert (np.abs(after.up[:2]) > 0).all()
    assert (state.params.factors["weight"].up == 0).all()
    assert (state.params.base["weight"] != start.params.base["weight"]).all()


# FeDLRT and FedPara.


def mean_bases(state):
    """Do the round of FeDLRT in NumPy; return the average of the clients' weights and biases."""
    bases, bias = state.params["weight"], np.asarray(state.params["bias"])
    left, right = np.asarray(bases.left[:, :RANK]), np.asarray(bases.right[:, :RANK])
    core = np.asarray(bases.core[:RANK, :RANK])
    gradients = [
        reference.basis_gradients(left, core, right, bias, *examples(k)) for k in range(NUM_CLIENTS)
    ]
    lefts, rights = zip(*gradients, strict=True)
    left = np.linalg.qr(np.hstack([left, mean(lefts)]))[0]
    right = np.linalg.qr(np.hstack([right, mean(rights)]))[0]
    old = np.asarray(bases.dense())
    weights, biases = [], []
    for k in range(NUM_CLIENTS):
        core, own_bias = reference.train_core(
            left, left.T @ old @ right, right, bias, *examples(k), rate=RATE, num_steps=STEPS
        )
        weights.append(left @ core @ right.T)
        biases.append(own_bias)
    return mean(weights), mean(biases)


def test_fedlrt_truncates_the_exact_average_in_common_bases():
    start = begin("fedlrt")
    state, _ = advance("fedlrt", start)
    average, bias = mean_bases(start)
    expected = reference.truncate(average, RANK)
    np.testing.assert_allclose(fedlrt.merged_params(state)["weight"], expected, **CLOSE)
    np.testing.assert_allclose(state.params["bias"], bias, **CLOSE)
    bases = state.params["weight"]
    for basis in (bases.left, bases.right):
        np.testing.assert_allclose(
            basis.T @ basis, np.diag([1.0] * RANK + [0.0] * RANK), atol=1e-12
        )
    np.testing.assert_array_equal(bases.core, np.diag(np.diag(bases.core)))
    np.testing.assert_array_equal(bases.left[:, RANK:], 0)


def test_fedlrt_starts_from_the_best_factors_of_the_model():
    expected = reference.truncate(np.asarray(model()["weight"]), RANK)
    found = fedlrt.merged_params(begin("fedlrt"))
    np.testing.assert_allclose(found["weight"], expected, **CLOSE)
    np.testing.assert_array_equal(found["bias"], model()["bias"])


def test_fedlrt_drops_small_singular_values_and_finds_new_directions():
    start = begin("fedlrt")
    values = np.linalg.svd(mean_bases(start)[0], compute_uv=False)
    tails = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1])
    threshold = float((tails[1] + tails[2]) / 2 / tails[0])
    step_once = jax.jit(algorithm("fedlrt", threshold=threshold).round)
    state, _ = step_once(start, data(), jnp.asarray(EVERYONE), key=jax.random.key(0))
    assert fedlrt.effective_rank(state) == {"weight": 2, "bias": None}
    state, info = step_once(state, data(), jnp.asarray(EVERYONE), key=jax.random.key(1))
    # Two columns, as many new ones, and S of four rows and columns.
    up, down = 2 * SIDES + 4**2 + REST, 2 * SIDES + 2 + REST + 2 * SIDES
    np.testing.assert_array_equal(info.uplink_bytes, 8 * up)
    np.testing.assert_array_equal(info.downlink_bytes, 8 * down)
    # Where a full rank is asked for, the dropped direction is found again.
    state, _ = advance("fedlrt", state)
    assert fedlrt.effective_rank(state)["weight"] == RANK


def test_fedlrt_leaves_a_model_of_zeros():
    zeros = jax.tree.map(jnp.zeros_like, model())
    state = algorithm("fedlrt").init(zeros, data(), key=jax.random.key(0))
    # Where there is nothing to learn yet, the bases wait for it.
    silent = data()._replace(targets=jnp.zeros_like(data().targets))
    state, _ = advance("fedlrt", state, given=silent)
    assert fedlrt.effective_rank(state)["weight"] == RANK
    state, info = advance("fedlrt", state)
    later, later_info = advance("fedlrt", state)
    assert (later_info.losses < info.losses).all()
    assert np.linalg.matrix_rank(fedlrt.merged_params(later)["weight"], tol=1e-10) == RANK


def test_fedlrt_refuses_a_threshold_out_of_range():
    with pytest.raises(ValueError, match=r"threshold 1\.5, expected a fraction from 0 to 1"):
        plain(fedlrt, threshold=1.5)


def test_fedpara_is_fedavg_of_hadamard_factors():
    def of_factors(params, inputs, target):
        up, down = params["weight"].up, params["weight"].down
        weight = (up[:, :1] @ down[:1]) * (up[:, 1:] @ down[1:])
        return loss({"weight": weight, "bias": params["bias"]}, inputs, target)

    other = fedavg.build(local.local_sgd(of_factors, optax.sgd(RATE), num_steps=STEPS))
    params = begin("fedpara").params
    start = other.init(params, data(), key=jax.random.key(3))
    expected, _ = jax.jit(other.round)(start, data(), jnp.asarray(EVERYONE), key=jax.random.key(0))
    state, _ = advance("fedpara", begin("fedpara"))
    chex.assert_trees_all_close(state.params, expected.params, **CLOSE)
    weight = fedpara.merged_params(state)["weight"]
    up, down = np.asarray(state.params["weight"].up), np.asarray(state.params["weight"].down)
    np.testing.assert_allclose(weight, (up[:, :1] @ down[:1]) * (up[:, 1:] @ down[1:]), **CLOSE)


@pytest.mark.parametrize("rank", [1, 2])
def test_fedpara_reaches_the_rank_of_its_square_with_the_variance_of_he(rank):
    shape = (11, 3, 2, 2)
    draw = jax.jit(jax.vmap(lambda key: fedpara.factorize(jnp.zeros(shape), rank, key=key).dense()))
    weights = np.asarray(draw(jax.random.split(jax.random.key(0), 4000))).reshape(4000, 11, 12)
    assert np.linalg.matrix_rank(weights[0]) == rank**2
    # One entry of every draw: their squares are independent.
    squares = weights[:, 5, 7] ** 2
    error = squares.std() / np.sqrt(len(squares))
    assert abs(squares.mean() - 2 / 12) < 4 * error


# The measured mean.


def measured():
    training = local.Training(optax.sgd(RATE), STEPS)
    return rounds.with_evaluation(
        rounds.compose(
            local.trained_values(local.local_low_rank(loss, training)),
            compressor=compressors.identity(),
            aggregator=aggregators.measured_factor_mean(),
            server=servers.of_values(servers.accumulate_low_rank(None)),
        ),
        lambda state: state.server.aggregator,
    )


def test_the_measured_mean_is_the_mean_and_keeps_what_it_loses():
    built = measured()
    start = moving("fedlora")
    begun = built.init(start.params, data(), key=jax.random.key(0))
    assert begun.server.aggregator == {"weight": 0.0, "bias": None}
    once = jax.jit(built.round)
    state, _ = once(begun, data(), jnp.asarray(EVERYONE), key=jax.random.key(0))
    expected, _ = advance("fedlora", start)
    chex.assert_trees_all_close(state.params, expected.params, **CLOSE)
    ups, downs, _ = trained(start)
    exact = mean_product(ups, downs)
    lost = np.linalg.norm(exact - mean(ups) @ mean(downs)) / np.linalg.norm(exact)
    assert lost > 1e-4
    np.testing.assert_allclose(state.server.aggregator["weight"], lost, rtol=1e-9)
    _, info = once(state, data(), jnp.asarray(EVERYONE), key=jax.random.key(1))
    np.testing.assert_array_equal(info.evaluation["weight"], state.server.aggregator["weight"])
    one = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), data())
    same, _ = once(begun, one, jnp.asarray(EVERYONE), key=jax.random.key(0))
    np.testing.assert_allclose(same.server.aggregator["weight"], 0, atol=1e-15)

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance

from fedlr.federated import clients, partition, protocol

LABELS = np.array([4, 9, 4, 7, 9, 4, 7, 4, 9, 4, 7])  # 5, 3 and 3 of three classes
SIZES = {
    "dirichlet": partition.dirichlet_sizes(0.3),
    "lognormal": partition.lognormal_sizes(2.0),
    "power law": partition.power_law_sizes(1.5),
}

few = settings(max_examples=60, derandomize=True, deadline=None, database=None)
seeds = st.integers(0, 2**32)
alphas = st.sampled_from([1e-310, 1e-8, 0.1, 1.0, 50.0, 1e300, math.inf])


@st.composite
def problems(draw):
    """Labels, and a number of clients for which they suffice."""
    values = draw(st.lists(st.integers(-2, 4), min_size=1, max_size=40))
    return np.array(values), draw(st.integers(1, len(values)))


def check(parts, num_examples, num_clients):
    """Every example at exactly one client, and the table in its form."""
    assert isinstance(parts, partition.Partition)
    assert (parts.indices.dtype, parts.counts.dtype) == (np.int32, np.int32)
    assert parts.counts.shape == (num_clients,)
    assert parts.indices.shape == (num_clients, parts.counts.max())
    rows = [row[:count] for row, count in zip(parts.indices, parts.counts, strict=True)]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(num_examples))
    for row, used in zip(parts.indices, rows, strict=True):
        assert (np.diff(used) > 0).all()
        assert not row[len(used) :].any()


def naive_histograms(labels, parts):
    values = sorted(set(labels.tolist()))
    table = np.zeros((len(parts.counts), len(values)), int)
    for client, count in enumerate(parts.counts):
        for index in parts.indices[client, :count]:
            table[client, values.index(labels[index])] += 1
    return table


@few
@given(num_examples=st.integers(1, 50), num_clients=st.integers(1, 50), seed=seeds)
def test_iid_is_disjoint_and_complete_and_even(num_examples, num_clients, seed):
    num_clients = min(num_examples, num_clients)
    parts = partition.iid(num_examples, num_clients, seed=seed)
    check(parts, num_examples, num_clients)
    assert np.ptp(parts.counts) <= 1


@few
@given(problem=problems(), alpha=alphas, seed=seeds, data=st.data())
def test_dirichlet_is_disjoint_and_complete_and_keeps_the_minimum(problem, alpha, seed, data):
    labels, num_clients = problem
    min_size = data.draw(st.integers(0, len(labels) // num_clients))
    parts = partition.dirichlet(labels, num_clients, alpha, seed=seed, min_size=min_size)
    check(parts, len(labels), num_clients)
    assert parts.counts.min() >= min_size


@few
@given(problem=problems(), alpha=alphas, seed=seeds)
def test_dirichlet_clients_is_disjoint_and_complete_and_even(problem, alpha, seed):
    labels, num_clients = problem
    parts = partition.dirichlet_clients(labels, num_clients, alpha, seed=seed)
    check(parts, len(labels), num_clients)
    assert np.ptp(parts.counts) <= 1


@few
@given(problem=problems(), seed=seeds, data=st.data())
def test_shards_are_disjoint_and_complete_and_few_classes(problem, seed, data):
    labels, num_clients = problem
    each = data.draw(st.integers(1, len(labels) // num_clients))
    parts = partition.shards(labels, num_clients, each, seed=seed)
    check(parts, len(labels), num_clients)
    assert np.ptp(parts.counts) <= each
    # every shard holds one class more than class borders run through it
    cells = (naive_histograms(labels, parts) > 0).sum()
    assert cells <= num_clients * each + len(set(labels.tolist())) - 1


@few
@given(problem=problems(), classes_per_client=st.integers(1, 8), seed=seeds)
def test_pathological_gives_exactly_so_many_classes_or_says_why_not(
    problem, classes_per_client, seed
):
    labels, num_clients = problem
    sizes = np.unique(labels, return_counts=True)[1]
    places = num_clients * classes_per_client
    possible = classes_per_client <= len(sizes) <= places <= np.minimum(sizes, num_clients).sum()
    if not possible:
        with pytest.raises(ValueError, match=r"^pathological: got .*, expected "):
            partition.pathological(labels, num_clients, classes_per_client, seed=seed)
        return
    parts = partition.pathological(labels, num_clients, classes_per_client, seed=seed)
    check(parts, len(labels), num_clients)
    table = naive_histograms(labels, parts)
    np.testing.assert_array_equal((table > 0).sum(axis=1), classes_per_client)
    for column in table.T:
        assert np.ptp(column[column > 0]) <= 1


@few
@given(
    num_examples=st.integers(1, 50),
    num_clients=st.integers(1, 50),
    law=st.sampled_from(sorted(SIZES)),
    seed=seeds,
    data=st.data(),
)
def test_quantity_skew_is_disjoint_and_complete_and_keeps_the_minimum(
    num_examples, num_clients, law, seed, data
):
    num_clients = min(num_examples, num_clients)
    min_size = data.draw(st.integers(0, num_examples // num_clients))
    parts = partition.quantity_skew(
        num_examples, num_clients, sizes=SIZES[law], seed=seed, min_size=min_size
    )
    check(parts, num_examples, num_clients)
    assert parts.counts.min() >= min_size


@few
@given(groups=st.lists(st.sampled_from(["Bonn", "Oslo", "Rome"]), min_size=1, max_size=30))
def test_groups_are_disjoint_and_complete(groups):
    parts = partition.by_group(np.array(groups))
    check(parts, len(groups), len(set(groups)))
    for row, count, name in zip(parts.indices, parts.counts, sorted(set(groups)), strict=True):
        assert {groups[index] for index in row[:count]} == {name}


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: partition.iid(11, 3, seed=seed),
        lambda seed: partition.dirichlet(LABELS, 3, 0.5, seed=seed),
        lambda seed: partition.dirichlet_clients(LABELS, 3, 0.5, seed=seed),
        lambda seed: partition.shards(LABELS, 3, 2, seed=seed),
        lambda seed: partition.pathological(LABELS, 3, 2, seed=seed),
        *(
            lambda seed, law=law: partition.quantity_skew(11, 3, sizes=law, seed=seed)
            for law in SIZES.values()
        ),
    ],
)
def test_a_seed_decides_everything(make):
    first, again = make(3), make(3)
    np.testing.assert_array_equal(first.indices, again.indices)
    np.testing.assert_array_equal(first.counts, again.counts)
    assert len({make(seed).indices.tobytes() for seed in range(6)}) > 1


def test_labels_of_jax_and_of_other_numbers_give_the_same(rng):
    labels = rng.integers(0, 3, 20)
    expected = partition.dirichlet(labels, 4, 0.5, seed=0).indices
    for same in (jnp.asarray(labels), labels.astype(np.uint8), 10 * labels - 7):
        found = partition.dirichlet(same, 4, 0.5, seed=0).indices
        np.testing.assert_array_equal(found, expected)


def test_examples_of_a_class_are_dealt_at_random():
    labels = np.zeros(40, int)
    for parts in (
        partition.iid(40, 4, seed=0),
        partition.dirichlet(labels, 4, math.inf, seed=0),
        partition.dirichlet_clients(labels, 4, 1.0, seed=0),
        partition.shards(labels, 4, 1, seed=0),
        partition.pathological(labels, 4, 1, seed=0),
        partition.quantity_skew(40, 4, sizes=partition.power_law_sizes(0.0), seed=0),
        # two clients with nothing get their examples from the others
        partition.quantity_skew(40, 4, sizes=lambda *_: [1, 0, 0, 1], seed=0, min_size=10),
    ):
        assert parts.counts.tolist() == [10, 10, 10, 10]
        means = parts.indices.mean(axis=1)
        # ten random of 0 ... 39 have a mean of 19.5 +- 3.2
        assert np.abs(means - 19.5).max() < 10
        assert (np.ptp(parts.indices, axis=1) > 20).all()


# Limits and laws


def test_dirichlet_is_even_in_every_class_for_large_alpha():
    labels = np.repeat([0, 1, 2], [40, 25, 12])
    for alpha in (1e12, math.inf):
        parts = partition.dirichlet(labels, 5, alpha, seed=0)
        table = partition.label_histograms(labels, parts)
        assert np.ptp(table, axis=0).max() <= 1
        assert partition.label_divergence(labels, parts).max() < 0.01


def test_dirichlet_gives_each_class_to_one_client_for_small_alpha():
    labels = np.repeat(np.arange(6), 8)
    for seed in range(5):
        parts = partition.dirichlet(labels, 4, 1e-6, seed=seed, min_size=0)
        table = partition.label_histograms(labels, parts)
        np.testing.assert_array_equal((table > 0).sum(axis=0), 1)


def test_shares_of_the_classes_have_the_variance_of_the_dirichlet_law():
    num_clients, alpha = 3, 0.5
    labels = np.repeat(np.arange(500), 100)
    parts = partition.dirichlet(labels, num_clients, alpha, seed=0)
    shares = partition.label_histograms(labels, parts) / 100
    mean = 1 / num_clients
    expected = mean * (1 - mean) / (num_clients * alpha + 1)
    np.testing.assert_allclose(shares.mean(axis=1), mean, atol=0.04)
    np.testing.assert_allclose(((shares - mean) ** 2).mean(), expected, rtol=0.1)


def test_dirichlet_clients_are_random_examples_for_large_alpha():
    labels = np.repeat([0, 1, 2, 3], [400, 800, 1200, 600])
    parts = partition.dirichlet_clients(labels, 3, math.inf, seed=0)
    assert partition.label_divergence(labels, parts).max() < 0.01


def test_dirichlet_clients_use_one_class_after_the_other_for_small_alpha():
    """A client changes the class only where one is used up, so cells are few."""
    labels = np.repeat(np.arange(5), [9, 14, 8, 20, 12])
    for alpha in (1e-9, 1e-310):
        for seed in range(5):
            parts = partition.dirichlet_clients(labels, 7, alpha, seed=seed)
            table = partition.label_histograms(labels, parts)
            assert (table > 0).sum() <= 7 + 5 - 1
            assert table[0].max() in (8, 9)  # all of its examples, or all of the class


def test_the_first_client_has_the_variance_of_its_law():
    """Before a class is used up the counts are Dirichlet-multinomial, whose variance is known."""
    labels, alpha, draws = np.repeat([0, 1], [30, 60]), 2.0, 20
    first = [
        partition.label_histograms(
            labels, partition.dirichlet_clients(labels, 90 // draws + 1, alpha, seed=seed)
        )[0]
        for seed in range(800)
    ]
    size, share = sum(first[0]), 1 / 3
    expected = size * share * (1 - share) * (size + alpha) / (1 + alpha)
    counts = np.array(first)[:, 0]
    np.testing.assert_allclose(counts.mean(), size * share, rtol=0.1)
    np.testing.assert_allclose(counts.var(), expected, rtol=0.15)


def test_a_client_goes_on_with_its_mix_where_a_class_is_used_up():
    """The rest of a Dirichlet mix is Dirichlet, whatever was drawn of the class that is used up."""
    labels, alpha = np.repeat([0, 1, 2], [6, 24, 24]), 2.0
    tables = [
        partition.label_histograms(labels, partition.dirichlet_clients(labels, 2, alpha, seed=seed))
        for seed in range(2000)
    ]
    counts = np.array([table[0, 1] for table in tables if table[0, 0] == 6])
    assert len(counts) > 200
    rest, concentration = 27 - 6, alpha * 48 / 54
    expected = rest / 4 * (rest + concentration) / (1 + concentration)
    np.testing.assert_allclose(counts.mean(), rest / 2, rtol=0.1)
    np.testing.assert_allclose(counts.var(), expected, rtol=0.15)


def test_laws_of_sizes_are_what_they_are_called(rng):
    weights = partition.power_law_sizes(2.0)(rng, 4)
    np.testing.assert_allclose(np.sort(weights), [1 / 16, 1 / 9, 1 / 4, 1], rtol=1e-15)
    logs = np.log(partition.lognormal_sizes(0.7)(rng, 4000))
    np.testing.assert_allclose(logs.std(), 0.7, rtol=0.05)
    shares = np.stack([partition.dirichlet_sizes(0.5)(rng, 4) for _ in range(1000)])
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(shares.var(axis=0), 1 / 4 * 3 / 4 / 3, rtol=0.15)


def test_no_skew_is_even_sizes():
    for law in (partition.power_law_sizes(0.0), partition.lognormal_sizes(0.0)):
        counts = partition.quantity_skew(14, 4, sizes=law, seed=0).counts
        assert sorted(counts.tolist()) == [3, 3, 4, 4]


# By hand


@pytest.mark.parametrize(
    ("weights", "num_examples", "min_size", "counts"),
    [
        ([0.5, 0.3, 0.2], 7, 0, [4, 2, 1]),  # 3.5, 2.1, 1.4
        ([2, 1, 2], 6, 0, [2, 1, 3]),  # 2.4, 1.2, 2.4: one example, and two remainders of 0.4
        ([5, 1, 0], 6, 0, [5, 1, 0]),
        ([5, 1, 0], 6, 1, [4, 1, 1]),
        ([5, 1, 0], 6, 2, [2, 2, 2]),
        ([6, 3, 0], 9, 2, [4, 3, 2]),
        ([4, 5, 0, 0], 9, 2, [2, 3, 2, 2]),
    ],
)
def test_sizes_are_rounded_and_filled_as_by_hand(weights, num_examples, min_size, counts):
    parts = partition.quantity_skew(
        num_examples, len(weights), sizes=lambda *_: weights, seed=0, min_size=min_size
    )
    if weights == [2, 1, 2]:  # the tie goes to either
        assert parts.counts.tolist() in ([3, 1, 2], counts)
    else:
        assert parts.counts.tolist() == counts


def test_examples_move_at_random_and_only_from_the_largest():
    labels = np.repeat([0, 1, 2], [12, 5, 1])
    parts = partition.dirichlet(labels, 3, 1e-6, seed=0, min_size=0)
    filled = partition.dirichlet(labels, 3, 1e-6, seed=0, min_size=3)
    before = np.zeros(18, int)
    after = np.zeros(18, int)
    for client in range(3):
        before[parts.indices[client, : parts.counts[client]]] = client
        after[filled.indices[client, : filled.counts[client]]] = client
    moved = np.flatnonzero(before != after)
    assert len(moved) == np.maximum(3 - parts.counts, 0).sum() > 0
    assert set(before[moved]) == {parts.counts.argmax()}


def test_two_classes_of_two_clients_are_separated():
    labels = np.array([1, 0, 0, 1, 0])
    for parts in (
        partition.pathological(labels, 2, 1, seed=0),
        partition.dirichlet_clients(labels[:4], 2, 1e-9, seed=0),
        partition.shards(labels[:4], 2, 1, seed=0),
    ):
        zeros = [1, 2, 4] if parts.counts.sum() == 5 else [1, 2]
        rows = [
            row[:count].tolist() for row, count in zip(parts.indices, parts.counts, strict=True)
        ]
        assert sorted(rows) == [[0, 3], zeros]


def test_a_large_class_has_more_clients():
    labels = np.repeat([0, 1, 2], [60, 20, 10])
    table = partition.label_histograms(labels, partition.pathological(labels, 9, 1, seed=0))
    assert (table > 0).sum(axis=0).tolist() == [6, 2, 1]
    np.testing.assert_array_equal(table.sum(axis=1), 10)


# Splitting


def test_split_gathers_pads_and_masks(rng):
    parts = partition.dirichlet(LABELS, 4, 0.3, seed=1)
    assert len(set(parts.counts.tolist())) > 1
    inputs = {"a": rng.standard_normal((11, 2, 3)), "b": rng.standard_normal(11).astype("float32")}
    data = partition.split(parts, inputs, LABELS)
    assert data.targets.shape == data.mask.shape == parts.indices.shape
    assert data.targets.dtype == LABELS.dtype
    for client, count in enumerate(parts.counts):
        rows = parts.indices[client, :count]
        assert data.mask[client].tolist() == [True] * count + [False] * (len(data.mask[0]) - count)
        for found, given_ in (
            (data.inputs["a"], inputs["a"]),
            (data.inputs["b"], inputs["b"]),
            (data.targets, LABELS),
        ):
            assert found.dtype == given_.dtype
            np.testing.assert_array_equal(found[client, :count], given_[rows])
            assert not np.asarray(found[client, count:]).any()
    np.testing.assert_array_equal(clients.num_examples(data), parts.counts)


def test_split_refuses_another_number_of_examples():
    parts = partition.iid(5, 2, seed=0)
    message = r"^split: got an array of shape \(4, 3\), expected 5 examples$"
    with pytest.raises(ValueError, match=message):
        partition.split(parts, np.zeros((4, 3)), np.zeros(5))
    with pytest.raises(ValueError, match=r"^split: got an array of shape \(\), expected 5 exam"):
        partition.split(parts, np.zeros((5, 3)), np.float64(1))


# Diagnostics


@pytest.fixture(scope="module", params=["some", "none"])
def uneven(request):
    """Labels and a partition, in one case with a client without examples."""
    labels = np.random.default_rng(0).integers(0, 5, 60) ** 2
    alpha, min_size = (0.4, 1) if request.param == "some" else (1e-6, 0)
    parts = partition.dirichlet(labels, 6, alpha, seed=2, min_size=min_size)
    assert (parts.counts.min() == 0) == (request.param == "none")
    return labels, parts


def test_histograms_count(uneven):
    labels, parts = uneven
    np.testing.assert_array_equal(
        partition.label_histograms(labels, parts), naive_histograms(labels, parts)
    )


def test_divergence_is_that_of_scipy(uneven):
    labels, parts = uneven
    table = naive_histograms(labels, parts)
    found = partition.label_divergence(labels, parts)
    for client, row in enumerate(table):
        if not row.sum():
            assert np.isnan(found[client])
            continue
        expected = distance.jensenshannon(row, table.sum(axis=0), base=2) ** 2
        np.testing.assert_allclose(found[client], expected, atol=1e-14)


def test_effective_classes_are_the_exponential_of_the_entropy(uneven):
    labels, parts = uneven
    found = partition.effective_classes(labels, parts)
    for client, row in enumerate(naive_histograms(labels, parts)):
        mix = row[row > 0] / row.sum() if row.sum() else np.array([np.nan])
        np.testing.assert_allclose(found[client], np.exp(-(mix * np.log(mix)).sum()), rtol=1e-12)


def test_gini_is_the_mean_difference_of_sizes(uneven):
    counts = uneven[1].counts.astype(float)
    expected = np.abs(counts[:, None] - counts[None]).mean() / (2 * counts.mean())
    np.testing.assert_allclose(partition.size_gini(uneven[1]), expected, rtol=1e-12)


def test_diagnostics_by_hand():
    labels = np.array([0, 0, 1, 1, 1, 1, 0, 0])
    parts = partition.by_group(np.array([0, 0, 1, 1, 2, 2, 2, 2]))
    # one class against half and half: 1.5 - 0.75 log2 3 bits
    one = 1.5 - 0.75 * math.log2(3)
    np.testing.assert_allclose(partition.label_divergence(labels, parts), [one, one, 0], rtol=1e-12)
    np.testing.assert_allclose(partition.effective_classes(labels, parts), [1, 1, 2], rtol=1e-12)
    np.testing.assert_allclose(partition.size_gini(parts), 1 / 6, rtol=1e-12)


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition.iid(4, 5, seed=0), "iid: got num_clients 5, expected an integer from 1"),
        (lambda: partition.iid(4, 0, seed=0), "iid: got num_clients 0, expected"),
        (lambda: partition.iid(0, 1, seed=0), "iid: got num_examples 0, expected"),
        (lambda: partition.iid(4, 2, seed=None), "iid: got seed None, expected an integer from 0"),
        (lambda: partition.dirichlet(LABELS, 12, 1.0, seed=0), "dirichlet: got num_clients 12"),
        (lambda: partition.dirichlet(LABELS, 3, 0.0, seed=0), "dirichlet: got alpha 0.0, expected"),
        (lambda: partition.dirichlet(LABELS, 3, -1.0, seed=0), "dirichlet: got alpha -1.0"),
        (lambda: partition.dirichlet(LABELS, 3, math.nan, seed=0), "dirichlet: got alpha nan"),
        (
            lambda: partition.dirichlet(LABELS, 3, 1.0, seed=0, min_size=4),
            "dirichlet: got min_size 4 of 3 clients with 11 examples, expected at most 3",
        ),
        (
            lambda: partition.dirichlet(LABELS, 3, 1.0, seed=0, min_size=-1),
            "dirichlet: got min_siz",
        ),
        (
            lambda: partition.dirichlet(LABELS + 0.5, 3, 1.0, seed=0),
            "dirichlet: got labels of shape (11,), dtype float64, expected a vector of integers",
        ),
        (
            lambda: partition.shards(LABELS > 4, 3, 1, seed=0),
            "shards: got labels of shape (11,), d",
        ),
        (
            lambda: partition.shards(LABELS[None], 3, 1, seed=0),
            "shards: got labels of shape (1, 11",
        ),
        (lambda: partition.shards(LABELS[:0], 3, 1, seed=0), "shards: got labels of shape (0,)"),
        (
            lambda: partition.shards(LABELS, 3, 4, seed=0),
            "shards: got 3 x 4 shards, expected at most 11, the number of examples",
        ),
        (lambda: partition.shards(LABELS, 3, 0, seed=0), "shards: got shards_per_client 0"),
        (
            lambda: partition.dirichlet_clients(LABELS, 3, 0.0, seed=0),
            "dirichlet_clients: got alpha 0.0, expected a positive number",
        ),
        (
            lambda: partition.dirichlet_clients(LABELS, 12, 1.0, seed=0),
            "dirichlet_clients: got num_clients 12",
        ),
        (
            lambda: partition.pathological(LABELS, 3, 4, seed=0),
            "pathological: got classes_per_client 4, expected an integer from 1 to 3",
        ),
        (
            lambda: partition.pathological(LABELS, 2, 1, seed=0),
            "pathological: got 2 clients of 1 classes, 2 in all, expected 3 to 6 for these labels",
        ),
        (
            lambda: partition.pathological(LABELS, 4, 3, seed=0),
            "pathological: got 4 clients of 3 classes, 12 in all, expected 3 to 10 for these",
        ),
        (
            lambda: partition.quantity_skew(9, 3, sizes=lambda *_: [1, -1, 1], seed=0),
            "quantity_skew: got sizes [ 1. -1.  1.], expected 3 non-negative numbers, not all zero",
        ),
        (
            lambda: partition.quantity_skew(9, 3, sizes=lambda *_: [1, 1], seed=0),
            "quantity_skew: got sizes [1. 1.], expected 3",
        ),
        (
            lambda: partition.quantity_skew(9, 3, sizes=lambda *_: [0, 0, 0], seed=0),
            "quantity_skew: got sizes [0. 0. 0.], expected 3",
        ),
        (
            lambda: partition.quantity_skew(9, 3, sizes=lambda *_: [1, math.inf, 0], seed=0),
            "quantity_skew: got sizes [ 1. inf  0.], expected 3",
        ),
        (lambda: partition.dirichlet_sizes(0.0), "dirichlet_sizes: got beta 0.0, expected a posit"),
        (
            lambda: partition.lognormal_sizes(-1.0),
            "lognormal_sizes: got sigma -1.0, expected a fin",
        ),
        (
            lambda: partition.power_law_sizes(math.inf),
            "power_law_sizes: got exponent inf, expected",
        ),
        (lambda: partition.by_group(np.array([])), "by_group: got groups of shape (0,), dtype flo"),
        (lambda: partition.by_group(np.array([1.0])), "by_group: got groups of shape (1,), dtype"),
        (
            lambda: partition.by_group(np.array([[1]])),
            "by_group: got groups of shape (1, 1), dtype",
        ),
        *(
            (
                lambda diagnose=diagnose: diagnose(LABELS, partition.iid(12, 3, seed=0)),
                f"{diagnose.__name__}: got 11 labels, expected 12",
            )
            for diagnose in (
                partition.label_histograms,
                partition.label_divergence,
                partition.effective_classes,
            )
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert str(caught.value).startswith(message)


def shift_clients(dtype=np.float32, **numbers):
    """Shift two leaves of ten clients with 400 present examples each and 100 hidden ones."""
    random = np.random.default_rng(1)
    mask = np.arange(500) < np.full(10, 400)[:, None]
    inputs = {"a": random.normal(size=(10, 500, 3)), "b": random.normal(size=(10, 500))}
    inputs = {
        name: np.where(mask[..., None] if leaf.ndim == 3 else mask, leaf, np.nan)
        for name, leaf in inputs.items()
    }
    data = protocol.ClientData(
        jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), inputs),
        jnp.zeros((10, 500), jnp.int32),
        jnp.asarray(mask),
    )
    return data, partition.feature_shift(data, seed=0, **numbers)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_client_sees_an_affine_map_of_its_own(dtype):
    data, shifted = shift_clients(dtype, gain=0.5, offset=2.0)
    maps = {}
    for name, leaf in data.inputs.items():
        assert shifted.inputs[name].dtype == dtype
        assert np.isnan(shifted.inputs[name][:, 400:]).all()
        x = np.asarray(leaf[:, :400], np.float64).reshape(10, -1)
        y = np.asarray(shifted.inputs[name][:, :400], np.float64).reshape(10, -1)
        lines = np.array([np.polyfit(*rows, 1) for rows in zip(x, y, strict=True)])
        np.testing.assert_allclose(y, lines[:, :1] * x + lines[:, 1:], atol=1e-5)
        maps[name] = lines
    assert np.abs(np.diff(np.concatenate(list(maps.values()))[:, 0])).min() > 1e-3
    both = np.concatenate(list(maps.values()))
    # Within 3 standard deviations of the spread of 20 draws.
    assert abs(np.std(both[:, 0]) / 0.5 - 1) < 3 / math.sqrt(2 * 20)
    assert abs(np.std(both[:, 1]) / 2.0 - 1) < 3 / math.sqrt(2 * 20)
    assert shifted.targets is data.targets
    assert shifted.mask is data.mask


def test_noise_grows_with_the_number_of_the_client():
    data, shifted = shift_clients(np.float64, noise=0.3)
    added = np.asarray(shifted.inputs["a"] - data.inputs["a"])[:, :400].reshape(10, -1)
    expected = 0.3 * np.arange(1, 11) / 10
    # Four standard deviations of the deviation of 1200 draws.
    np.testing.assert_allclose(added.std(axis=1), expected, rtol=4 / math.sqrt(2 * 1200))


def test_no_shift_changes_nothing_and_a_seed_repeats():
    data, shifted = shift_clients()
    jax.tree.map(np.testing.assert_array_equal, shifted.inputs, data.inputs)
    first, again = (shift_clients(gain=1.0, noise=1.0)[1].inputs for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gain": -1.0}, "got gain -1.0, expected a non-negative number"),
        ({"offset": math.nan}, "got offset nan, expected a non-negative number"),
        ({"noise": math.inf}, "got noise inf, expected a finite number"),
        ({"seed": -1}, "got seed -1, expected an integer"),
        ({"inputs": jnp.zeros((2, 3), jnp.int32)}, "got inputs of dtype int32, expected float32"),
        ({"inputs": jnp.zeros((2, 4))}, r"got mask of shape \(2, 3\), expected shape \(2, 4\)"),
    ],
)
def test_shifts_that_cannot_be_are_refused(changes, message):
    inputs = changes.pop("inputs", jnp.zeros((2, 3)))
    data = protocol.ClientData(inputs, jnp.zeros((2, 3)), jnp.ones((2, 3), bool))
    with pytest.raises(ValueError, match=f"feature_shift: {message}"):
        partition.feature_shift(data, **{"seed": 0, **changes})

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import lowrank
from fedlr.federated import traffic


def model(shape=(8, 6), rank=1):
    params = {"matrix": jnp.zeros(shape, "float32"), "bias": jnp.zeros(shape[0], "float32")}
    return lowrank.adapt(params, rank, key=jax.random.key(0))


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_who_missed_rounds_receives_pairs_or_the_whole_matrix(copies):
    for count in range(6):
        found = traffic.missed(model(), jnp.int32(count), copies=copies)
        assert found == min(count * copies * 4 * 14, 4 * 48)


def test_large_numbers_of_missed_pairs_do_not_leave_int32():
    # W has 16 MiB, a pair 256 KiB.
    params = model((2048, 2048), 16)
    for copies in (1, 1000, 2_000_000_000):
        found = traffic.missed(params, jnp.int32(1_999_999_999), copies=copies)
        assert found == 4 * 2048**2
    assert traffic.missed(params, jnp.int32(3), copies=5) == 15 * 4 * 16 * 2 * 2048


def test_every_client_pays_for_the_merges_since_its_last_round():
    pair = 4 * 14
    for now in range(9):
        for last in range(-1, now):
            params = model()._replace(round=jnp.int32(now))
            merges = sum(1 for t in range(1, now + 1) if t % 3 == 0 and t > max(last, 0))
            expected = min(merges * pair, 4 * 48)
            if merges and now % 3 == 0:
                expected -= pair  # the present pair is a seed
            assert traffic.accumulated(params, jnp.int32(last), 3) == expected
    assert traffic.accumulated(model(), jnp.int32(-1), None) == 0


def test_bytes_of_factors_are_those_of_the_arrays_named():
    params, message = model(rank=2), lowrank.trainable(model(rank=2))
    for sent, numbers in (
        (lambda update: update, 28),
        (lambda update: update.up, 16),
        (lambda update: update.down, 12),
    ):
        bytes_of = traffic.factors(sent)
        assert bytes_of.up(message, params, (), ()) == 4 * (numbers + 8)
        assert bytes_of.down(params, (), ()) == 4 * (numbers + 8)
    np.testing.assert_array_equal(
        traffic.first_columns(params.factors, jnp.arange(3)), [0, 56, 112]
    )

import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from fedlr.federated import checkpoints


class Pair(NamedTuple):
    first: object
    second: object


def bits(array):
    return np.asarray(array).tobytes()


def shapes_of(tree):
    return jax.tree.map(
        lambda x: x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype), tree
    )


def write(folder, step, value=0.0, **options):
    return checkpoints.save(folder, {"w": jnp.full(3, value)}, step=step, metadata={}, **options)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize("module", [np, jnp])
def test_every_kind_of_leaf_comes_back_bit_by_bit(module, tmp_path):
    payload = np.array([0x7FC00001, 0x80000000, 0x7F800000, 1], np.uint32).view(np.float32)
    kinds = ["float16", "bfloat16", "float32", "float64", "int8", "int32", "uint64", "bool"]
    tree = {
        "kinds": [module.asarray(np.array([[0, 1, 3]])).astype(kind) for kind in kinds],
        "nested": Pair(module.asarray(payload), (module.zeros((0, 4)), None)),
        "scalars": (module.asarray(jnp.bfloat16(-0.0)), module.asarray(2**40 + 1)),
        "complex": module.asarray([1 - 2j]),
    }
    path = checkpoints.save(tmp_path, tree, step=3, metadata={"name": "é", "list": [1, None]})
    found = checkpoints.find_latest(tmp_path)
    assert found == (path, 3, {"name": "é", "list": [1, None]})
    restored = checkpoints.restore(found, shapes_of(tree))
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(restored), strict=True):
        assert isinstance(after, np.ndarray if module is np else jax.Array)
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
        assert bits(before) == bits(after)


def test_python_numbers_become_arrays(tmp_path):
    checkpoints.save(tmp_path, (1.5, True), step=0, metadata={})
    like = (jax.ShapeDtypeStruct((), "float64"), np.array(False))
    number, flag = checkpoints.restore(checkpoints.find_latest(tmp_path), like)
    assert number == 1.5
    assert flag.dtype == bool


def test_weak_types_and_places_are_those_of_the_example(tmp_path):
    # float32 times a weak float64 is float32, times a strong one it is not allowed.
    weak = jnp.full(3, 0.1)
    there = jax.device_put(jnp.ones(2), SingleDeviceSharding(jax.devices()[0]))
    tree = (weak, jnp.ones(2), there)
    checkpoints.save(tmp_path, tree, step=0, metadata={})
    restored = checkpoints.restore(checkpoints.find_latest(tmp_path), tree)
    assert [leaf.weak_type for leaf in restored] == [True, False, False]
    assert [leaf.committed for leaf in restored] == [False, False, True]
    np.testing.assert_array_equal(restored[0], weak)
    assert (restored[0] * jnp.float32(1)).dtype == jnp.float32


def test_the_last_few_stay(tmp_path):
    for step in (5, 10, 99_999_999, 100_000_000):
        write(tmp_path, step)
    assert names(tmp_path) == ["checkpoint-100000000.ckpt", "checkpoint-99999999.ckpt"]
    assert checkpoints.find_latest(tmp_path).step == 100_000_000
    write(tmp_path, 100_000_001, keep=1)
    assert names(tmp_path) == ["checkpoint-100000001.ckpt"]


def test_one_of_the_same_step_is_replaced(tmp_path):
    like = {"w": np.zeros(3)}
    for value in (1.0, 2.0):
        write(tmp_path, 4, value)
    found = checkpoints.find_latest(tmp_path)
    np.testing.assert_array_equal(checkpoints.restore(found, like)["w"], [2, 2, 2])
    assert len(names(tmp_path)) == 1


def test_later_ones_are_not_counted_among_the_last_few(tmp_path):
    write(tmp_path, 30).write_bytes(b"damaged")
    for step in (10, 20):
        write(tmp_path, step)
    assert names(tmp_path) == [f"checkpoint-000000{step}.ckpt" for step in (10, 20, 30)]


@pytest.mark.parametrize("part", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_all_as_it_was(part, tmp_path, monkeypatch):
    before = [write(tmp_path, step).read_bytes() for step in (1, 2)]

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(part, full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["checkpoint-00000001.ckpt", "checkpoint-00000002.ckpt"]
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


def test_a_half_written_file_is_not_looked_at_and_goes_with_the_next(tmp_path):
    path = write(tmp_path, 1)
    path.with_name("checkpoint-00000002.part").write_bytes(path.read_bytes()[:40])
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoints.find_latest(tmp_path).step == 1
    write(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-00000001.ckpt", "checkpoint-00000003.ckpt", "notes.txt"]


def spoil(content):
    """Yield files with one changed byte, all kinds of early ends, and one with a tail."""
    for place in range(0, len(content), 5):
        yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        yield content[:place]
    yield content + b"\0"


def test_every_damage_is_noticed(tmp_path):
    good = write(tmp_path, 1, 1.0)
    newest = write(tmp_path, 2, 2.0)
    content = newest.read_bytes()
    versions = list(spoil(content))
    assert len(versions) > 100
    for version in versions:
        newest.write_bytes(version)
        with pytest.warns(UserWarning, match=r"f: skipped damaged checkpoint-00000002.ckpt \("):
            found = checkpoints.find_latest(tmp_path, function="f")
        assert found.path == good
    newest.write_bytes(content)
    with warnings.catch_warnings():
        assert checkpoints.find_latest(tmp_path).path == newest


def test_the_warning_names_what_is_skipped_and_what_is_used(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, keep=3)
    (tmp_path / "checkpoint-00000003.ckpt").write_bytes(b"")
    middle = tmp_path / "checkpoint-00000002.ckpt"
    middle.write_bytes(middle.read_bytes()[:-1])
    text = (
        r"skipped damaged checkpoint-00000003.ckpt \(not the first line of a checkpoint\), "
        r"checkpoint-00000002.ckpt \(another sha256 than written in it\) in .*, "
        r"used is checkpoint-00000001.ckpt"
    )
    with pytest.warns(UserWarning, match=text):
        assert checkpoints.find_latest(tmp_path).step == 1


def test_if_all_are_damaged_they_are_named_and_stay(tmp_path):
    for step in (1, 2):
        write(tmp_path, step).write_bytes(b"fedlr checkpoint 2")
    text = r"f: got folder .* with only damaged checkpoints: checkpoint-00000002.ckpt .*00000001"
    with pytest.raises(ValueError, match=text):
        checkpoints.find_latest(tmp_path, function="f")
    assert len(names(tmp_path)) == 2


def test_folders_without_checkpoints_have_none(tmp_path):
    assert checkpoints.find_latest(tmp_path) is None
    (tmp_path / "checkpoint-1.ckpt.bak").write_text("")
    assert checkpoints.find_latest(tmp_path) is None
    assert checkpoints.find_latest(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            Pair({"w": np.zeros((3, 5))}, np.zeros(2, np.int32)),
            r"with \.first\['w'\] of float64\[3, 4\], expected float64\[3, 5\]",
        ),
        (
            Pair({"w": np.zeros((3, 4), np.float32)}, np.zeros(2, np.int32)),
            r"with \.first\['w'\] of float64\[3, 4\], expected float32\[3, 4\]",
        ),
        (
            Pair({"w": np.zeros((3, 4)), "b": np.zeros(())}, np.zeros(2, np.int32)),
            r"with \.first\['b'\] of no kind, expected float64\[\]",
        ),
        (Pair({"w": np.zeros((3, 4))}, ()), r"with \.second of int32\[2\], expected no such leaf"),
    ],
)
def test_trees_of_another_form_are_refused_and_the_leaf_is_named(like, message, tmp_path):
    tree = Pair({"w": np.zeros((3, 4))}, np.zeros(2, np.int32))
    checkpoints.save(tmp_path, tree, step=0, metadata={})
    found = checkpoints.find_latest(tmp_path)
    with pytest.raises(ValueError, match=r"g: got checkpoint .*00000000.ckpt " + message):
        checkpoints.restore(found, like, function="g")


@pytest.mark.parametrize("leaf", [jax.random.key(0), jnp.zeros(2, jnp.float8_e4m3fn)])
def test_leaves_that_would_not_come_back_are_refused(leaf, tmp_path):
    with pytest.raises(ValueError, match=r"save: got leaf \['x'\] of dtype (key|float8).*expected"):
        checkpoints.save(tmp_path, {"x": leaf}, step=0, metadata={})
    assert names(tmp_path) == []


def test_numbers_that_count_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="save: got step -1, expected an integer from 0"):
        write(tmp_path, -1)
    with pytest.raises(ValueError, match="save: got keep 0, expected an integer from 1"):
        write(tmp_path, 1, keep=0)


def test_fingerprints_tell_paths_dtypes_shapes_bits_and_keys_apart():
    zeros = np.zeros((2, 3))
    different = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.T},
        {"a": zeros.astype(np.float32)},
        {"a": zeros.astype(np.int64)},
        {"a": np.where(np.arange(3) == 1, -0.0, zeros)},
        {"a": zeros, "b": ()},
        (zeros, zeros),
        jax.random.key(0),
        jax.random.key(1),
        jax.random.key(0, impl="rbg"),
    ]
    found = [checkpoints.fingerprint(tree) for tree in different]
    # An empty container has no leaf.
    assert found[6] == found[0]
    assert len(set(found)) == len(found) - 1
    assert checkpoints.fingerprint({"a": jnp.asarray(zeros)}) == found[0]

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from fedlr import convolution

NHWC = ("NHWC", "HWIO", "NHWC")
# Shapes of inputs and kernel, strides, padding, and what else the library takes.
CASES = {
    "line": ((2, 3, 9), (4, 3, 2), (2,), "SAME", {}),
    "plane": ((2, 3, 5, 6), (4, 3, 3, 2), (1, 2), "VALID", {}),
    "pads, one negative": ((2, 3, 5, 6), (4, 3, 3, 2), (2, 1), ((1, 2), (-1, 3)), {}),
    "channels last": ((2, 5, 6, 3), (3, 2, 3, 4), (1, 1), "SAME", {"dimension_numbers": NHWC}),
    "axes in any order": (
        (3, 5, 2, 6),
        (4, 2, 3, 3),
        (1, 2),
        "SAME_LOWER",
        {"dimension_numbers": ("CHNW", "OWIH", "WNCH")},
    ),
    "kernel dilated": ((2, 3, 7, 6), (4, 3, 3, 2), (1, 2), "SAME", {"rhs_dilation": (2, 3)}),
    "inputs dilated": (
        (2, 3, 4, 3),
        (4, 3, 3, 2),
        (1, 2),
        ((1, 2), (-1, 3)),
        {"lhs_dilation": (2, 3), "rhs_dilation": (1, 2)},
    ),
    "groups of channels": ((2, 6, 5, 4), (9, 2, 3, 2), (1, 2), "SAME", {"feature_group_count": 3}),
    "a group per channel": ((2, 3, 5, 4), (6, 1, 3, 2), (1, 1), "SAME", {"feature_group_count": 3}),
    "groups of the batch": ((6, 2, 5, 4), (9, 2, 3, 2), (1, 2), "SAME", {"batch_group_count": 3}),
    "one offset": ((2, 3, 5, 4), (4, 3, 1, 1), (2, 1), "VALID", {}),
    "volume": ((2, 3, 4, 5, 3), (2, 3, 2, 3, 1), (1, 2, 1), "SAME", {}),
    "shifted": ((2, 6, 5, 4), (2, 6, 3, 2), (1, 1), "SAME", {}),
    "shifted, pads and dilations": (
        (2, 6, 5, 4),
        (1, 6, 3, 2),
        (1, 2),
        ((-1, 4), (1, -1)),
        {"lhs_dilation": (2, 1), "rhs_dilation": (2, 1)},
    ),
    "shifted, second axis": ((2, 6, 5, 4), (1, 6, 3, 2), (2, 1), "VALID", {}),
    "shifted, groups of channels": (
        (2, 8, 5, 4),
        (2, 4, 3, 2),
        (1, 1),
        "SAME",
        {"feature_group_count": 2},
    ),
    "shifted, groups of the batch": (
        (4, 6, 5, 4),
        (2, 6, 3, 2),
        (1, 1),
        "SAME",
        {"batch_group_count": 2},
    ),
    "large kernel": ((2, 3, 9, 8), (4, 3, 9, 8), (2, 1), "SAME", {"rhs_dilation": (1, 2)}),
    "large kernel, groups": ((2, 4, 70), (2, 2, 67), (2,), ((0, 3),), {"feature_group_count": 2}),
}


def arrays(*shapes, dtype=np.float64):
    """Return arrays of numbers from -1 to 1."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.uniform(-1.0, 1.0, shape), dtype) for shape in shapes]


def tolerance(dtype, num_terms):
    """Bound the error of a sum of products of numbers from -1 to 1."""
    return num_terms**2 * float(np.finfo(dtype).eps)


def naive(inputs, kernel, strides, padding, options):
    """Sum the definition in NumPy: a place meets an offset at an entry, or nowhere."""
    numbers = options.get("dimension_numbers")
    numbers = lax.conv_dimension_numbers(inputs.shape, kernel.shape, numbers)
    x, w = np.transpose(inputs, numbers.lhs_spec), np.transpose(kernel, numbers.rhs_spec)
    ones = (1,) * len(strides)
    interior = options.get("lhs_dilation", ones)
    dilations = options.get("rhs_dilation", ones)
    lengths = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], interior, strict=True)]
    spans = [(n - 1) * step + 1 for n, step in zip(w.shape[2:], dilations, strict=True)]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lengths, spans, strides, padding)
    meetings = []
    for axis, (low, high) in enumerate(padding):
        count = (lengths[axis] + low + high - spans[axis]) // strides[axis] + 1
        place, offset, entry = np.ogrid[:count, : w.shape[2 + axis], : x.shape[2 + axis]]
        position = place * strides[axis] + offset * dilations[axis] - low
        meetings += [position == entry * interior[axis], [10 + axis, 20 + axis, 30 + axis]]
    count = options.get("feature_group_count", 1) * options.get("batch_group_count", 1)
    parts = zip(
        np.split(x, count, axis=0 if "batch_group_count" in options else 1),
        np.split(w, count),
        strict=True,
    )
    axes = np.arange(len(strides))
    sums = [
        np.einsum(x, [0, 1, *(30 + axes)], w, [2, 1, *(20 + axes)], *meetings, [0, 2, *(10 + axes)])
        for x, w in parts
    ]
    y = np.concatenate(sums, axis=1)
    return np.moveaxis(y, range(y.ndim), numbers.out_spec)


def check_equal(got, expected, atol=1e-12, rtol=1e-10):
    """Check that trees of arrays have the same types and values."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert jax.typeof(one) == jax.typeof(other)
        np.testing.assert_allclose(one, other, atol=atol, rtol=rtol)


def count_convolutions(function, *args):
    """Count the convolutions in the trace of a function."""
    return str(jax.make_jaxpr(function)(*args)).count("conv_general_dilated[")


@functools.cache
def compare(name):
    """Return value, cotangents and tangent of one case, by patches and of the library."""
    shape, kernel_shape, strides, padding, options = CASES[name]
    pair = arrays(shape, kernel_shape)

    def derivatives(conv):
        def function(inputs, kernel):
            return conv(inputs, kernel, strides, padding, **options)

        value, pullback = jax.vjp(function, *pair)
        (cotangent,) = arrays(value.shape)
        return value, pullback(cotangent), jax.jvp(function, pair, pair)[1]

    return jax.jit(lambda: [derivatives(convolution.conv), derivatives(lax.conv_general_dilated)])()


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_sum_that_defines_it(name):
    shape, kernel_shape, strides, padding, options = CASES[name]
    inputs, kernel = map(np.asarray, arrays(shape, kernel_shape))
    expected = naive(inputs, kernel, strides, padding, options)
    got = compare(name)[0][0]
    assert got.dtype == np.float64
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance(np.float64, kernel[0].size))


@pytest.mark.parametrize("name", ["line", "inputs dilated", "groups of channels", "large kernel"])
def test_it_is_that_sum_in_float32(name):
    shape, kernel_shape, strides, padding, options = CASES[name]
    inputs, kernel = arrays(shape, kernel_shape, dtype=np.float32)
    expected = naive(np.float64(inputs), np.float64(kernel), strides, padding, options)
    run = jax.jit(functools.partial(convolution.conv, **options), static_argnums=(2, 3))
    got = run(inputs, kernel, strides, padding)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance(np.float32, kernel[0].size))


@pytest.mark.parametrize("name", CASES)
def test_derivatives_equal_those_of_the_library(name):
    check_equal(*compare(name))


def test_both_ways_are_among_the_cases():
    ways = {}
    for name, (shape, kernel_shape, strides, padding, options) in CASES.items():
        function = functools.partial(
            convolution.conv, window_strides=strides, padding=padding, **options
        )
        ways[name] = "split[" in str(jax.make_jaxpr(function)(*arrays(shape, kernel_shape)))
    shifted = {name for name, is_shifted in ways.items() if is_shifted}
    assert shifted >= {name for name in CASES if name.startswith("shifted")}
    assert shifted >= {"inputs dilated", "volume", "axes in any order", "pads, one negative"}
    assert not shifted & {
        "line",
        "plane",
        "one offset",
        "groups of channels",
        "large kernel, groups",
    }


@pytest.mark.parametrize("axes", [(None, 0), (0, 0), (1, 2), (0, None)])
def test_vmap_equals_a_loop_over_clients(axes):
    inputs, kernels = arrays((2, 5, 4, 3), (3, 2, 3, 4))
    conv = functools.partial(
        convolution.conv, window_strides=(1, 2), padding="SAME", dimension_numbers=NHWC
    )
    copies = [
        array if axis is None else jnp.stack([array, 2 * array, -array], axis)
        for array, axis in zip((inputs, kernels), axes, strict=True)
    ]
    got = jax.jit(jax.vmap(conv, in_axes=axes))(*copies)
    expected = lax.conv_general_dilated(inputs, kernels, (1, 2), "SAME", dimension_numbers=NHWC)
    for client, factor in enumerate((1.0, 2.0, -1.0)):
        factor **= sum(axis is not None for axis in axes)
        np.testing.assert_allclose(got[client], factor * expected, atol=1e-12)


def test_curvature_equals_that_of_the_library():
    inputs, kernel = arrays((2, 3, 5, 4), (4, 3, 3, 2))

    def curvature(conv):
        def loss(kernel):
            return jnp.sum(jnp.sin(conv(inputs, kernel, (1, 1), "SAME")))

        return jax.jvp(jax.grad(loss), (kernel,), (kernel,))[1]

    check_equal(
        *jax.jit(lambda: [curvature(convolution.conv), curvature(lax.conv_general_dilated)])()
    )


@pytest.mark.parametrize("conv", [convolution.conv, lax.conv_general_dilated])
def test_a_loop_over_steps_of_vmapped_clients_compiles_to_no_convolution(conv):
    def train(kernels, inputs):
        def loss(kernels):
            hidden = jnp.tanh(conv(inputs, kernels[0], (1, 1), "SAME", dimension_numbers=NHWC))
            return jnp.sum(conv(hidden, kernels[1], (2, 2), "SAME", dimension_numbers=NHWC) ** 2)

        def step(kernels, _):
            value, gradient = jax.value_and_grad(loss)(kernels)
            return jax.tree.map(lambda w, g: w - 0.01 * g, kernels, gradient), value

        return lax.scan(step, kernels, None, length=3)

    inputs, *kernels = arrays((5, 2, 6, 4, 3), (5, 3, 2, 3, 2), (5, 3, 2, 2, 4))
    text = jax.jit(jax.vmap(train)).lower(kernels, inputs).compile().as_text()
    assert ("convolution(" in text) == (conv is lax.conv_general_dilated)


@pytest.mark.parametrize(("batch", "size"), [(2, 6), (0, 2)])
def test_no_window_gives_the_empty_output_of_the_library(batch, size):
    inputs, kernel = arrays((batch, 3, 5), (4, 3, size))
    got = convolution.conv(inputs, kernel, (1,), "VALID")
    assert got.size == 0
    check_equal(got, lax.conv_general_dilated(inputs, kernel, (1,), "VALID"))


def test_the_output_has_the_preferred_dtype():
    inputs, kernel = arrays((2, 3, 5), (4, 3, 2), dtype=np.float32)
    for shape in (kernel.shape, (4, 3, 6)):
        got = jax.eval_shape(
            lambda x, w: convolution.conv(x, w, (1,), "VALID", preferred_element_type=np.float64),
            inputs,
            jax.ShapeDtypeStruct(shape, np.float32),
        )
        assert got.dtype == np.float64


@pytest.mark.parametrize(
    ("shape", "kernel_shape", "options", "match"),
    [
        ((2, 3), (4, 3), {}, r"conv: got inputs of shape \(2, 3\), expected 3 axes or more"),
        ((2, 3, 5), (4, 3, 2, 2), {}, r"conv: got kernel of shape .*, expected 3 axes"),
        ((2, 3, 5), (4, 2, 2), {}, "conv: got 3 channels of inputs and 2 of kernel, expected 1 "),
        ((2, 3, 5), (4, 3, 2), {"window_strides": (1, 1)}, r"window_strides \(1, 1\), expected 1 "),
        (
            (2, 3, 5),
            (4, 3, 2),
            {"window_strides": (0,)},
            r"window_strides \(0,\), expected 1 posit",
        ),
        (
            (2, 3, 5),
            (4, 3, 2),
            {"rhs_dilation": (1.5,)},
            r"rhs_dilation \(1.5,\), expected 1 posit",
        ),
        ((2, 3, 5), (4, 3, 2), {"lhs_dilation": (2,)}, "padding 'SAME' with lhs_dilation"),
        ((2, 3, 5), (4, 3, 2), {"padding": ((0, 1), (0, 1))}, r"padding .*, expected 1 pairs"),
        (
            (2, 3, 5),
            (4, 3, 2),
            {"feature_group_count": 0},
            "feature_group_count 0, expected an int",
        ),
        (
            (2, 4, 5),
            (3, 2, 2),
            {"feature_group_count": 2},
            "3 output features, expected a multiple",
        ),
        ((3, 4, 5), (4, 4, 2), {"batch_group_count": 2}, "a batch of 3, expected a multiple of 2"),
        (
            (2, 4, 5),
            (4, 2, 2),
            {"feature_group_count": 2, "batch_group_count": 2},
            "feature_group_count 2 and batch_group_count 2, expected one of them to be 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(shape, kernel_shape, options, match):
    inputs, kernel = arrays(shape, kernel_shape)
    options = {"window_strides": (1,), "padding": "SAME"} | options
    with pytest.raises(ValueError, match=match):
        convolution.conv(inputs, kernel, **options)


def test_other_dtypes_are_refused():
    inputs, kernel = arrays((2, 3, 5), (4, 3, 2))
    with pytest.raises(ValueError, match="conv: got inputs of dtype int32, expected float32 or"):
        convolution.conv(inputs.astype(np.int32), kernel, (1,), "SAME")
    with pytest.raises(ValueError, match="conv: got kernel of dtype float32, expected float64"):
        convolution.conv(inputs, kernel.astype(np.float32), (1,), "SAME")


# A convolution that can be repeated, in all that it may stand in.


def blur(x, w):
    """Convolve x (2, 3, 5) with w (3, 3, 2) to the same shape."""
    return lax.conv_general_dilated(x, w, (1,), "SAME")


@jax.custom_jvp
def with_jvp(x, count, w):
    return count.astype(x.dtype) * blur(x, w)


@with_jvp.defjvp
def _(primals, tangents):
    # Not the true derivative, to see that the rule is used.
    x, count, w = primals
    return with_jvp(x, count, w), 7.0 * blur(tangents[0], w) + blur(x, tangents[2])


@jax.custom_vjp
def with_vjp(x, count, w):
    return count.astype(x.dtype) * blur(x, w)


with_vjp.defvjp(
    lambda x, count, w: (with_vjp(x, count, w), (x, w)),
    lambda saved, cotangent: (
        7.0 * jax.vjp(blur, *saved)[1](cotangent)[0],
        None,
        jnp.zeros_like(saved[1]),
    ),
)


def in_scan(x, w):
    def step(carry, scale):
        carry = jnp.tanh(scale * blur(carry, w))
        return carry, jnp.sum(carry)

    return lax.scan(step, x, jnp.array([1.0, 2.0, 3.0]))


def in_while_loop(x, w):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(blur(c[1], w))), (0, x))


def in_linear_solve(x, w):
    def matvec(v):
        return 20.0 * v + blur(v, w)

    return lax.custom_linear_solve(
        matvec,
        x,
        lambda matvec, b: b / 20.0 - matvec(b) / 400.0,
        lambda vecmat, b: b / 20.0 - vecmat(b) / 400.0,
    )


SURROUNDINGS = {
    "nothing": blur,
    "jit": jax.jit(lambda x, w: (jnp.sin(blur(x, w)), w)),
    "checkpoint": jax.checkpoint(lambda x, w: jnp.sin(blur(jnp.sin(blur(x, w)), w))),
    "scan": in_scan,
    "cond": lambda x, w: lax.cond(x[0, 0, 0] > 2.0, lambda x: x, lambda x: blur(x, w), x),
    "vmap": lambda x, w: jax.vmap(blur, in_axes=(None, 0))(x, jnp.stack([w, 2.0 * w])),
    "grad": lambda x, w: jax.value_and_grad(lambda w: jnp.sum(jnp.sin(blur(x, w))))(w),
    "linear solve": in_linear_solve,
    "custom_jvp": lambda x, w: with_jvp(x, jnp.int32(2), w),
    "custom_vjp": lambda x, w: with_vjp(x, jnp.int32(2), w),
    "all": jax.jit(lambda x, w: in_scan(jax.checkpoint(with_jvp)(x, jnp.int32(2), w), w)),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_every_convolution_in_a_function_goes_through_patches(name):
    function = SURROUNDINGS[name]
    patched = convolution.by_patches(function)
    pair = arrays((2, 3, 5), (3, 3, 2))

    def gradients(function):
        def loss(x, w):
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(function(x, w)))

        return lambda *pair: (function(*pair), jax.grad(loss, argnums=(0, 1))(*pair))

    # Counted once for the function and once for its derivative, rules included.
    assert count_convolutions(gradients(function), *pair) >= 2
    assert count_convolutions(gradients(patched), *pair) == 0
    both = jax.jit(lambda *pair: [gradients(patched)(*pair), gradients(function)(*pair)])
    check_equal(*both(*pair))


def test_a_while_loop_goes_through_patches():
    pair = arrays((2, 3, 5), (3, 3, 2))
    patched = convolution.by_patches(in_while_loop)
    assert count_convolutions(in_while_loop, *pair) == 1
    assert count_convolutions(patched, *pair) == 0
    check_equal(jax.jit(patched)(*pair), jax.jit(in_while_loop)(*pair))


def test_forward_mode_and_vmap_pass_through_custom_rules():
    x, w = arrays((2, 3, 5), (3, 3, 2))
    kernels = jnp.stack([w, 2.0 * w])

    def tangents(function):
        def tangent(x, w):
            return jax.jvp(function, (x, w), (2.0 * x, w))

        return jax.vmap(tangent, in_axes=(None, 0))(x, kernels)

    function = SURROUNDINGS["custom_jvp"]
    got, expected = jax.jit(
        lambda: (tangents(convolution.by_patches(function)), tangents(function))
    )()
    check_equal(got, expected)


def test_values_closed_over_may_be_traced():
    x, w = arrays((2, 3, 5), (3, 3, 2))

    def loss(transform, w):
        return jnp.sum(transform(lambda x: in_scan(x, w)[0])(x))

    def gradients(transform):
        gradient = jax.grad(functools.partial(loss, transform))
        return jax.vmap(gradient)(jnp.stack([w, 2.0 * w]))

    got, expected = jax.jit(
        lambda: (gradients(convolution.by_patches), gradients(lambda function: function))
    )()
    check_equal(got, expected)


def test_rules_without_convolution_stay():
    def function(x, w):
        return jax.nn.relu(blur(x, w)), jax.nn.silu(x)

    pair = arrays((2, 3, 5), (3, 3, 2))
    text = str(jax.make_jaxpr(convolution.by_patches(function))(*pair))
    assert text.count("custom_jvp_call") == 1
    assert "name=silu" in text


def test_a_function_without_convolution_is_called_itself():
    calls = []

    def function(x, mode):
        calls.append(type(x))
        return {"sum": jnp.sum(x), mode: 3}

    x = jnp.arange(3.0)
    got = convolution.by_patches(function)(x, mode="mean")
    assert got == {"sum": 3.0, "mean": 3}
    assert calls[-1] is type(x)
    assert str(jax.make_jaxpr(lambda x: convolution.by_patches(jnp.sin)(x))(x)) == str(
        jax.make_jaxpr(jnp.sin)(x)
    )


def test_keys_and_what_is_no_array_pass_through():
    def function(state, w, *, scale):
        keys = jax.random.split(state["key"])
        return scale * blur(state["x"], w), keys, state["name"], jnp.float64(1.0), [2, None]

    x, w = arrays((2, 3, 5), (3, 3, 2))
    state = {"key": jax.random.key(3), "name": "client", "x": x}
    got = convolution.by_patches(function)(state, w, scale=2)
    expected = function(state, w, scale=2)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-12)
    assert got[1].dtype == state["key"].dtype
    assert jnp.array_equal(got[1], expected[1])
    assert got[2:] == ("client", 1.0, [2, None])
    assert isinstance(got[3], jax.Array)


@pytest.mark.parametrize(
    "layer",
    [
        eqx.nn.Conv1d(3, 4, 2, stride=2, groups=1, key=jax.random.key(0), dtype=np.float32),
        eqx.nn.Conv2d(4, 6, 3, padding=1, groups=2, key=jax.random.key(1), dtype=np.float32),
        eqx.nn.ConvTranspose2d(3, 2, 3, stride=2, key=jax.random.key(2), dtype=np.float32),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_equinox_models_train_in_a_loop_without_a_convolution(layer):
    shape = (layer.in_channels, 6, 5)[: layer.num_spatial_dims + 1]
    (inputs,) = arrays((2, *shape), dtype=np.float32)
    kernels, static = eqx.partition(layer, eqx.is_inexact_array)

    def train(transform):
        def loss(kernels, inputs):
            model = eqx.combine(kernels, static)
            return jnp.mean(jax.vmap(lambda image: jax.nn.relu(model(image)) ** 2)(inputs))

        def run(kernels):
            def step(kernels, _):
                value, gradient = jax.value_and_grad(transform(loss))(kernels, inputs)
                return jax.tree.map(lambda w, g: w - 0.1 * g, kernels, gradient), value

            return lax.scan(step, kernels, None, length=3)

        # Two clients that start from different kernels.
        return lambda kernels: jax.vmap(run)(
            jax.tree.map(lambda w: jnp.stack([w, 0.5 * w]), kernels)
        )

    compiled = jax.jit(train(convolution.for_loops)).lower(kernels).compile()
    library = jax.jit(train(lambda function: function)).lower(kernels).compile()
    assert "convolution(" not in compiled.as_text()
    assert "convolution(" in library.as_text()
    # Relative to the parameters, which are of order 1; three steps of a few hundred products.
    eps = float(np.finfo(np.float32).eps)
    check_equal(compiled(kernels), library(kernels), atol=1e3 * eps, rtol=0)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_only_loops_on_cpu_use_patches(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    pair = arrays((2, 3, 5), (3, 3, 2))
    assert count_convolutions(convolution.for_loops(blur), *pair) == (backend != "cpu")


@pytest.mark.parametrize("dtype", [np.int32, np.float16, np.complex64])
def test_convolutions_of_other_dtypes_are_left(dtype):
    pair = [array.astype(dtype) for array in arrays((2, 3, 5), (3, 3, 2))]
    assert count_convolutions(convolution.by_patches(blur), *pair) == 1


def test_weak_types_stay():
    w = lax.full_like(0.5, 0.5, shape=(3, 3, 2))
    x = lax.full_like(0.5, 0.5, shape=(2, 3, 5))
    assert jax.eval_shape(blur, x, w).weak_type
    assert jax.eval_shape(convolution.by_patches(blur), x, w).weak_type
    # A carry of another type would be refused.
    jax.eval_shape(convolution.by_patches(in_scan), x, w)


def test_it_works_inside_a_mesh_and_leaves_what_opens_one():
    mesh = jax.make_mesh((1,), ("clients",), axis_types=(AxisType.Auto,))
    pair = arrays((2, 3, 5), (3, 3, 2))

    def body(x, w):
        w = lax.pcast(w, "clients", to="varying")
        return lax.psum(in_scan(x, w)[0], "clients")

    def sharded(body):
        specs = (PartitionSpec("clients"), PartitionSpec())
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())

    inside = sharded(convolution.by_patches(body))
    assert count_convolutions(inside, *pair) == 0
    check_equal(jax.jit(inside)(*pair), jax.jit(sharded(body))(*pair))
    assert count_convolutions(convolution.by_patches(sharded(body)), *pair) == 1


def test_names_of_mapped_axes_stay():
    x, w = arrays((2, 3, 5), (3, 3, 2))

    def function(x):
        def step(carry, _):
            return blur(carry, w) - lax.pmean(carry, "clients"), None

        return lax.scan(step, x, None, length=2)[0]

    batch = jnp.stack([x, 2.0 * x])
    got, expected = jax.jit(
        lambda: [
            jax.vmap(each, axis_name="clients")(batch)
            for each in (convolution.by_patches(function), function)
        ]
    )()
    check_equal(got, expected)

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import operators, tomography
from fedlr.federated import local, protocol

SHAPES = [(5,), (4, 5), (3, 4, 5)]


@functools.cache
def compiled(function):
    """The jitted forward model of many images, shared by the tests."""
    return jax.jit(jax.vmap(function, (0, None)))


def dense(function, shape, inputs, dtype=np.float64):
    """The matrix of a forward model, column by column from unit images."""
    units = np.eye(int(np.prod(shape)), dtype=dtype).reshape(-1, *shape)
    predictions = compiled(function)(units, inputs)
    return np.asarray(predictions).reshape(len(units), -1).T


def draw_mask(rng, shape):
    return rng.random(shape) < 0.6


def draw_kernel(rng, shape):
    """A kernel of odd and even sizes, as long as the image on its last axis."""
    return rng.standard_normal((*(2 + i % 2 for i in range(len(shape) - 1)), shape[-1]))


MODELS = [
    (operators.sample, draw_mask),
    (operators.blur, draw_kernel),
    (operators.fourier, draw_mask),
]


def cast(inputs, dtype):
    return inputs if inputs.dtype == bool else inputs.astype(dtype)


def naive_blur(image, kernel):
    result = np.zeros(image.shape)
    for pixel in np.ndindex(image.shape):
        for tap in np.ndindex(kernel.shape):
            source = [
                (i - k + size // 2) % whole
                for i, k, size, whole in zip(pixel, tap, kernel.shape, image.shape, strict=True)
            ]
            result[pixel] += kernel[tap] * image[tuple(source)]
    return result


@pytest.mark.parametrize("shape", SHAPES)
def test_sample_keeps_what_the_mask_shows(rng, shape):
    image, mask = rng.standard_normal(shape), draw_mask(rng, shape)
    expected = np.where(mask, image, 0)
    np.testing.assert_array_equal(operators.sample(np.where(mask, image, np.nan), mask), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_blur_is_the_periodic_convolution(rng, shape):
    image, kernel = rng.standard_normal(shape), draw_kernel(rng, shape)
    blurred = operators.blur(image, kernel)
    np.testing.assert_allclose(blurred, naive_blur(image, kernel), atol=1e-13)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_blur_with_an_impulse_at_the_centre_is_the_identity(rng, size):
    image = rng.standard_normal((4, 5))
    kernel = np.zeros((size, size))
    kernel[size // 2, size // 2] = 1
    np.testing.assert_allclose(operators.blur(image, kernel), image, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_fourier_is_the_orthonormal_transform_on_the_mask(rng, shape):
    image, mask = rng.standard_normal(shape), draw_mask(rng, shape)
    indices = [np.arange(size) for size in shape]
    waves = [np.exp(-2j * np.pi * np.outer(i, i) / len(i)) / np.sqrt(len(i)) for i in indices]
    expected = functools.reduce(np.kron, waves) @ image.ravel()
    expected = np.where(mask, expected.reshape(shape), 0)
    samples = operators.fourier(image, mask)
    assert samples.shape == (2, *shape)
    np.testing.assert_allclose(samples, [expected.real, expected.imag], atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("function", "draw"), MODELS)
def test_norm_is_as_stated(rng, function, draw, shape):
    inputs = draw(rng, shape)
    norm = np.linalg.norm(dense(function, shape, inputs), 2)
    if function is operators.blur:
        assert norm == pytest.approx(np.abs(np.fft.fftn(inputs, shape, range(len(shape)))).max())
    else:
        assert norm <= 1 + 1e-12


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("function", "draw"), MODELS)
def test_vjp_is_the_transposed_matrix(rng, function, draw, shape, dtype):
    inputs = cast(draw(rng, shape), dtype)
    matrix = dense(function, shape, inputs, dtype)
    assert matrix.dtype == dtype
    output = compiled(function)(np.zeros((1, *shape), dtype), inputs).shape[1:]
    rows = np.eye(len(matrix), dtype=dtype).reshape(-1, *output)

    def adjoints(row, inputs):
        image = jnp.zeros(shape, dtype)
        by_vjp = jax.vjp(lambda x: function(x, inputs), image)[1](row)[0]
        by_transpose = jax.linear_transpose(lambda x: function(x, inputs), image)(row)[0]
        return by_vjp, by_transpose

    tolerance = 8 * np.finfo(dtype).eps * max(1, np.linalg.norm(matrix, 2))
    for columns in jax.jit(jax.vmap(adjoints, (0, None)))(rows, inputs):
        np.testing.assert_allclose(columns.reshape(matrix.shape), matrix, atol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("function", "draw"), MODELS)
def test_every_operator_passes_the_check(rng, key, function, draw, dtype):
    inputs = cast(draw(rng, (4, 5)), dtype)
    operators.check_adjoint(function, jnp.zeros((4, 5), dtype), inputs, key=key)


@pytest.mark.parametrize(("function", "draw"), MODELS)
def test_mapped_clients_equal_the_loop(rng, function, draw):
    images = rng.standard_normal((3, 4, 5))
    inputs = np.stack([draw(rng, (4, 5)) for _ in range(3)])
    data = np.stack([function(x, i) for x, i in zip(images, inputs, strict=True)]) + 1.0

    def misfit(image, inputs, data):
        return 0.5 * jnp.sum((function(image, inputs) - data) ** 2)

    mapped = jax.jit(jax.vmap(jax.grad(misfit)))(images, inputs, data)
    for gradient, image, own, measured in zip(mapped, images, inputs, data, strict=True):
        matrix = dense(function, (4, 5), own)
        expected = matrix.T @ (matrix @ image.ravel() - measured.ravel())
        np.testing.assert_allclose(gradient.ravel(), expected, atol=1e-12)


@pytest.mark.parametrize("function", [operators.sample, operators.fourier])
def test_mask_of_all_false_gives_zeros(rng, function):
    image, nothing = rng.standard_normal((4, 5)), np.zeros((4, 5), bool)
    prediction, adjoint = jax.vjp(lambda x: function(x, nothing), image)
    assert not prediction.any()
    assert not adjoint(jnp.ones_like(prediction))[0].any()


def test_blur_is_differentiable_in_its_kernel(rng):
    """Convolution is symmetric: the derivative in a kernel of the image's size is a blur too."""
    image, direction = rng.standard_normal((2, 4, 5))
    kernel = rng.standard_normal((4, 5))
    tangent = jax.jvp(lambda k: operators.blur(image, k), (kernel,), (direction,))[1]
    np.testing.assert_allclose(tangent, operators.blur(image, direction), atol=1e-13)


@pytest.mark.parametrize(("function", "draw"), MODELS)
def test_a_reconstruction_takes_every_operator(rng, key, function, draw):
    """At step 1/||A||^2 the misfit of a client never grows."""
    truth = jnp.asarray(rng.random((4, 5)))
    inputs = jnp.asarray(draw(rng, (4, 5)))[None]
    targets = jax.vmap(function, (None, 0))(truth, inputs)
    clients = protocol.ClientData(inputs, targets, jnp.ones(targets.shape, bool))

    @jax.jit
    def run(clients):
        step_size = local.initial_step_size(None, function, clients, truth, key=key)
        data = jax.tree.map(lambda leaf: leaf[0], clients)
        start = jnp.zeros((4, 5))
        moved, before = local.gradient_step(function, start, data, step_size)
        return before, local.gradient_step(function, moved, data, step_size)[1]

    before, after = run(clients)
    assert after <= before * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("size", "ndim"), [(1, 1), (4, 1), (5, 2), (4, 3)])
def test_gaussian_kernel_is_normalised_and_centred(size, ndim, dtype):
    kernel = np.asarray(operators.gaussian_kernel(size, dtype(1.3), ndim))
    assert (kernel.dtype, kernel.shape) == (dtype, (size,) * ndim)
    squares = sum((np.indices(kernel.shape) - size // 2) ** 2)
    expected = np.exp(-squares / (2 * 1.3**2))
    np.testing.assert_allclose(kernel, expected / expected.sum(), rtol=16 * np.finfo(dtype).eps)
    assert np.unravel_index(kernel.argmax(), kernel.shape) == (size // 2,) * ndim


def test_gaussian_blur_keeps_the_mean_and_has_norm_one(rng):
    kernel = operators.gaussian_kernel(4, 0.8)
    image = rng.standard_normal((5, 6))
    assert operators.blur(image, kernel).mean() == pytest.approx(image.mean())
    assert np.linalg.norm(dense(operators.blur, (5, 6), kernel), 2) == pytest.approx(1)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("shape", "num_lines", "num_center"), [((12,), 5, 2), ((3, 9), 4, 3), ((2, 3, 8), 8, 0)]
)
def test_random_lines_are_whole_lines_with_their_centre(shape, num_lines, num_center, seed):
    mask = np.asarray(
        operators.random_lines(shape, num_lines, num_center, key=jax.random.key(seed))
    )
    lines = mask.reshape(-1, shape[-1])
    assert mask.shape == shape
    assert (lines == lines[0]).all()
    assert lines[0].sum() == num_lines
    center = np.sort(np.fft.fftfreq(shape[-1], 1 / shape[-1])).astype(int)
    begin = shape[-1] // 2 - num_center // 2
    assert lines[0][center[begin : begin + num_center]].all()


def test_random_lines_differ_by_key_and_reach_every_frequency():
    keys = jax.random.split(jax.random.key(0), 200)
    masks = jax.vmap(lambda key: operators.random_lines((9,), 4, 3, key=key))(keys)
    counts = np.asarray(masks.sum(0))
    others = counts[2:-1]
    # one of six lines: binomial with mean 200/6 and a standard deviation of 5.3
    assert (np.abs(others - 200 / 6) < 4 * 5.3).all()
    assert counts.sum() == 4 * 200


def matvec(x, matrix):
    return jnp.einsum("ij,j->i", matrix, x)


def rmatvec(y, matrix):
    return jnp.einsum("ij,i->j", matrix, y)


def test_from_pair_has_the_given_adjoint_in_every_transformation(rng):
    matrices = rng.standard_normal((3, 4, 5))
    images, tangents = rng.standard_normal((2, 3, 5))
    cotangents = rng.standard_normal((3, 4))
    model = operators.from_pair(matvec, rmatvec)

    def derivatives(image, tangent, cotangent, matrix):
        def operator(x):
            return model(x, matrix)

        jvp = jax.jvp(operator, (image,), (tangent,))[1]
        vjp = jax.vjp(operator, image)[1](cotangent)[0]
        transpose = jax.linear_transpose(operator, image)
        twice = jax.linear_transpose(lambda y: transpose(y)[0], cotangent)(image)[0]
        gradient = jax.grad(lambda x: 0.5 * ((operator(x) - cotangent) ** 2).sum())(image)
        return jvp, vjp, transpose(cotangent)[0], twice, gradient

    mapped = jax.jit(jax.vmap(derivatives))(images, tangents, cotangents, matrices)
    for result in zip(images, tangents, cotangents, matrices, *mapped, strict=True):
        x, v, y, a, jvp, vjp, transposed, twice, gradient = result
        np.testing.assert_allclose(jvp, a @ v, atol=1e-13)
        np.testing.assert_allclose(vjp, a.T @ y, atol=1e-13)
        np.testing.assert_allclose(transposed, a.T @ y, atol=1e-13)
        np.testing.assert_allclose(twice, a @ x, atol=1e-13)
        np.testing.assert_allclose(gradient, a.T @ (a @ x - y), atol=1e-12)


def test_from_pair_maps_over_either_argument(rng):
    images, matrices = rng.standard_normal((3, 5)), rng.standard_normal((3, 4, 5))
    model = operators.from_pair(matvec, rmatvec)
    gradient = jax.grad(lambda x, a: 0.5 * (model(x, a) ** 2).sum())
    own_image = jax.vmap(gradient, (0, None))(images, matrices[0])
    own_matrix = jax.vmap(gradient, (None, 0))(images[0], matrices)
    np.testing.assert_allclose(own_image, images @ matrices[0].T @ matrices[0], atol=1e-12)
    np.testing.assert_allclose(own_matrix, [a.T @ a @ images[0] for a in matrices], atol=1e-12)


def test_from_pair_works_inside_scan(rng):
    matrices, image = rng.standard_normal((3, 4, 5)), rng.standard_normal(5)
    model = operators.from_pair(matvec, rmatvec)

    def step(x, matrix):
        return x - 0.1 * jax.grad(lambda w: 0.5 * (model(w, matrix) ** 2).sum())(x), None

    def loss(x):
        return jax.lax.scan(step, x, matrices)[0].sum()

    steps = [np.eye(5) - 0.1 * a.T @ a for a in matrices]
    expected = functools.reduce(lambda total, a: a.T @ total, reversed(steps), np.ones(5))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(image), expected, atol=1e-12)


def repeat_double(x, inputs):
    """2^n x by a loop that JAX cannot transpose."""
    return jax.lax.while_loop(
        lambda carry: carry[0] < inputs["count"],
        lambda carry: (carry[0] + 1, 2 * carry[1]),
        (jnp.zeros((), inputs["count"].dtype), x),
    )[1]


def test_from_pair_takes_what_jax_cannot_transpose(rng):
    model = operators.from_pair(repeat_double, repeat_double)
    images, counts = rng.standard_normal((3, 4)), np.array([0, 2, 1])
    gradient = jax.grad(lambda x, n: 0.5 * (model(x, {"count": n}) ** 2).sum())
    mapped = jax.jit(jax.vmap(gradient))(images, counts)
    np.testing.assert_allclose(mapped, images * (4.0**counts)[:, None])


def test_from_pair_takes_numpy_functions(rng):
    def on_host(function, shape):
        def call(x, matrix):
            result = jax.ShapeDtypeStruct(shape, x.dtype)
            return jax.pure_callback(function, result, x, matrix, vmap_method="sequential")

        return call

    model = operators.from_pair(
        on_host(lambda x, a: np.asarray(a) @ np.asarray(x), (4,)),
        on_host(lambda y, a: np.asarray(a).T @ np.asarray(y), (5,)),
    )
    images, matrices = rng.standard_normal((3, 5)), rng.standard_normal((3, 4, 5))
    gradient = jax.grad(lambda x, a: 0.5 * (model(x, a) ** 2).sum())
    mapped = jax.jit(jax.vmap(gradient))(images, matrices)
    expected = np.einsum("cij,cik,ck->cj", matrices, matrices, images)
    np.testing.assert_allclose(mapped, expected, atol=1e-12)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap])
def test_from_pair_refuses_derivatives_it_does_not_know(rng, wrap):
    image = jnp.ones(4)

    def in_inputs(scale):
        model = operators.from_pair(lambda x, s: s * x, lambda y, s: s * y)
        return model(image, scale).sum()

    def in_closure(scale):
        model = operators.from_pair(lambda x, _: scale * x, lambda y, _: scale * y)
        return model(image, ()).sum()

    scale = jnp.ones(2) if wrap is jax.vmap else jnp.array(2.0)
    for function in (in_inputs, in_closure):
        with pytest.raises(ValueError, match="from_pair: got a derivative in the inputs"):
            wrap(jax.grad(function))(scale)


def absolute(x, inputs):
    return jnp.abs(matvec(x, inputs))


def shifted(x, inputs):
    return matvec(x, inputs) + 1e-3


def median(x, inputs):
    return jnp.sort(matvec(x, inputs))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "function", [absolute, shifted, median, lambda x, a: matvec(x, a) ** 2 * 1e-3]
)
def test_check_finds_what_is_not_linear(rng, key, function, dtype):
    matrix = jnp.asarray(rng.standard_normal((4, 5)), dtype)
    message = r"check_adjoint: got a forward model that is not linear: .*, expected at most \d"
    with pytest.raises(ValueError, match=message):
        operators.check_adjoint(function, jnp.zeros(5, dtype), matrix, key=key)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_check_finds_one_wrong_entry(dtype, seed):
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    matrix = rng.uniform(1, 2, (4, 5)).astype(dtype)
    wrong = matrix.copy()
    wrong[2, 3] *= 1.01
    pair = operators.from_pair(lambda x, i: matvec(x, i[0]), lambda y, i: rmatvec(y, i[1]))
    message = (
        r"here: got a forward model whose adjoint does not match: <Ax, y> = \S+, "
        r"<x, A\^T y> = \S+, relative difference \S+, expected at most \d"
    )
    with pytest.raises(ValueError, match=message):
        operators.check_adjoint(pair, matrix[0], (matrix, wrong), key=key, function="here")
    operators.check_adjoint(pair, matrix[0], (matrix, matrix), key=key)


def test_check_finds_one_wrong_tap_of_many_pixels(rng, key):
    kernel = rng.uniform(1, 2, (3, 3)).astype(np.float32)
    wrong = kernel.copy()
    wrong[0, 1] *= 1.01
    image = jnp.zeros((256, 255), np.float32)
    pair = operators.from_pair(
        lambda x, i: operators.blur(x, i[0]),
        lambda y, i: operators.blur(y, jnp.flip(i[1])),
    )
    with pytest.raises(ValueError, match="adjoint does not match"):
        operators.check_adjoint(pair, image, (kernel, wrong), key=key)
    operators.check_adjoint(pair, image, (kernel, kernel), key=key)


def test_check_finds_another_operators_adjoint(rng, key):
    matrix = rng.standard_normal((5, 5))
    pair = operators.from_pair(matvec, matvec)
    with pytest.raises(ValueError, match="adjoint does not match"):
        operators.check_adjoint(pair, jnp.zeros(5), matrix, key=key)
    geometry = tomography.ParallelBeam((8, 8), 8)
    pair = operators.from_pair(
        functools.partial(tomography.project, geometry),
        functools.partial(tomography.interpolating_backproject, geometry),
    )
    with pytest.raises(ValueError, match="adjoint does not match"):
        operators.check_adjoint(pair, jnp.zeros((8, 8)), jnp.linspace(0, 3, 5), key=key)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("shape", "num_bins", "views"), [((1, 1), 1, 1), ((5, 9), 11, 4), ((64, 64), 48, 1)]
)
def test_projector_passes_the_check(rng, key, shape, num_bins, views, dtype):
    project = functools.partial(tomography.project, tomography.ParallelBeam(shape, num_bins))
    angles = rng.uniform(-9, 9, views).astype(dtype)
    operators.check_adjoint(project, jnp.zeros(shape, dtype), angles, key=key)


@pytest.mark.parametrize("function", [operators.sample, operators.fourier])
def test_check_passes_a_client_without_data(key, function):
    operators.check_adjoint(function, jnp.zeros((4, 5)), np.zeros((4, 5), bool), key=key)


def test_check_finds_an_adjoint_that_should_be_zero(key):
    pair = operators.from_pair(lambda x, _: 0 * x, lambda y, _: y)
    with pytest.raises(ValueError, match="adjoint does not match"):
        operators.check_adjoint(pair, jnp.zeros(4), (), key=key)


def test_check_is_silent_where_anything_is_traced(key):
    image, offset = jnp.zeros(4), jnp.ones(2)

    def check(image, offset, key):
        operators.check_adjoint(lambda x, c: x + c, image, offset, key=key)
        return offset

    def check_closure(offset):
        operators.check_adjoint(lambda x, _: x + offset, image, (), key=key)
        return offset

    jax.jit(lambda: check(image, 1.0, key))()
    jax.jit(check)(image, 1.0, key)
    jax.vmap(lambda c: check(image, c, key))(offset)
    jax.vmap(check_closure)(offset)
    jax.vmap(lambda k: check(image, 1.0, k))(jax.random.split(key))
    with pytest.raises(ValueError, match="is not linear"):
        check(image, 1.0, key)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: operators.sample(np.ones((4, 5)), np.ones((5, 4), bool)),
            r"sample: got mask of shape \(5, 4\), expected shape \(4, 5\)",
        ),
        (
            lambda: operators.sample(np.ones((4, 5)), np.ones((4, 5))),
            "sample: got mask of dtype float64, expected bool",
        ),
        (
            lambda: operators.sample(np.ones((4, 5), int), np.ones((4, 5), bool)),
            "sample: got image of dtype int64, expected float32 or float64",
        ),
        (
            lambda: operators.sample(np.ones(()), np.ones((), bool)),
            r"sample: got image of shape \(\), expected at least 1 axis",
        ),
        (
            lambda: operators.fourier(np.ones((4, 5)), np.ones(4, bool)),
            r"fourier: got mask of shape \(4,\), expected shape \(4, 5\)",
        ),
        (
            lambda: operators.blur(np.ones((4, 5)), np.ones(3)),
            r"blur: got kernel of shape \(3,\), expected 2 axes",
        ),
        (
            lambda: operators.blur(np.ones((4, 5)), np.ones((5, 1))),
            r"blur: got kernel of shape \(5, 1\), expected at most \(4, 5\)",
        ),
        (
            lambda: operators.blur(np.ones(4), np.ones(3, np.float32)),
            "blur: got kernel of dtype float32, expected the image's dtype float64",
        ),
        (
            lambda: operators.gaussian_kernel(0, 1.0),
            "gaussian_kernel: got size 0, expected an integer from 1",
        ),
        (
            lambda: operators.gaussian_kernel(3, 1.0, 0),
            "gaussian_kernel: got ndim 0, expected an integer from 1",
        ),
        (
            lambda: operators.gaussian_kernel(3, np.ones(2)),
            r"gaussian_kernel: got sigma of shape \(2,\), expected shape \(\)",
        ),
        (
            lambda: operators.gaussian_kernel(3, 1),
            "gaussian_kernel: got sigma of dtype int64, expected float32 or float64",
        ),
        (
            lambda: operators.random_lines([4, 8], 3, 1, key=jax.random.key(0)),
            r"random_lines: got shape \[4, 8\], expected a tuple",
        ),
        (
            lambda: operators.random_lines((4, 0), 3, 1, key=jax.random.key(0)),
            "random_lines: got size 0, expected an integer from 1",
        ),
        (
            lambda: operators.random_lines((4, 8), 9, 1, key=jax.random.key(0)),
            "random_lines: got num_lines 9, expected an integer from 1 to 8",
        ),
        (
            lambda: operators.random_lines((4, 8), 3, 4, key=jax.random.key(0)),
            "random_lines: got num_center 4, expected at most 3",
        ),
        (
            lambda: operators.from_pair(matvec, rmatvec)(np.ones(5, int), np.ones((4, 5))),
            "from_pair: got image of dtype int64, expected float32 or float64",
        ),
        (
            lambda: operators.from_pair(lambda x, _: (x, x), lambda y, _: y)(np.ones(5), ()),
            r"from_pair: got measurements \(.*\), expected an array of the image's dtype float64",
        ),
        (
            lambda: operators.from_pair(lambda x, _: x, lambda y, _: y > 0)(np.ones(5), ()),
            r"from_pair: got adjoint .*bool.*, expected an array of the image's dtype float64",
        ),
        (
            lambda: operators.from_pair(matvec, lambda y, _: y)(np.ones(5), np.ones((4, 5))),
            r"from_pair: got adjoint of shape \(4,\), expected the image's shape \(5,\)",
        ),
        (
            lambda: operators.check_adjoint(
                lambda x, _: (x, x), np.ones(5), (), key=jax.random.key(0)
            ),
            "check_adjoint: got a prediction .*, expected an array",
        ),
        (
            lambda: operators.check_adjoint(
                lambda x, _: x.astype(complex), np.ones(5), (), key=jax.random.key(0)
            ),
            "check_adjoint: got prediction of dtype complex128, expected float32 or float64",
        ),
        (
            lambda: operators.check_adjoint(
                lambda x, c: c * x, np.ones(5), np.inf, key=jax.random.key(0)
            ),
            "check_adjoint: got prediction with 15 NaN or Inf entries",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

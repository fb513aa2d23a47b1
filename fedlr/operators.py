"""Forward models beside tomography: sampling, blur, Fourier; a user's own; and a test of adjoints.

A forward model is `forward(image, inputs) -> prediction`, linear in the image, for ONE client; its
adjoint is JAX's vjp of it. Images have any number of axes, so volumes are images. `jax.vmap` makes
clients and seeds, each with inputs of its own.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Bool, Float, Key, PyTree

from fedlr import _checks, _precision, _transpose

__all__ = [
    "blur",
    "check_adjoint",
    "fourier",
    "from_pair",
    "gaussian_kernel",
    "random_lines",
    "sample",
]


def _check_image(function, image):
    _checks.check_floating(function, image=image)
    if jnp.ndim(image) == 0:
        raise _checks.fail(function, "image of shape ()", "at least 1 axis")


def sample(image: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Keep the sampled pixels and set the others to zero, the forward model of inpainting.

        (A x)_i = x_i where mask_i, else 0

    Its own adjoint; ||A||_2 = 1 unless no pixel is sampled. NaN and Inf in other pixels vanish.

    Args:
        image: Image, any shape of at least one axis, float32 or float64.
        mask: True = sampled, bool of the image's shape; traced.

    Returns:
        The samples, of the shape and dtype of the image.

    Raises:
        ValueError: If a shape or dtype does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import operators
        >>> operators.sample(jnp.array([1.0, 2.0, 3.0]), jnp.array([True, False, True])).tolist()
        [1.0, 0.0, 3.0]
    """
    image = jnp.asarray(image)
    _check_image("sample", image)
    _checks.check_mask("sample", mask, image.shape)
    return jnp.where(mask, image, 0)


def blur(image: Float[Array, "..."], kernel: Float[Array, "..."]) -> Float[Array, "..."]:
    """Convolve an image periodically with a centred kernel, by FFT.

        (A x)_i = sum_k kernel_k x_(i - k + c),   c = size // 2 on every axis, indices modulo sizes

    The kernel's entry c is the one that a pixel weighs itself with: the middle of an odd size, the
    first after the middle of an even one. The adjoint is the correlation with the kernel, and
    ||A||_2 = max |FFT(kernel)|, which is the sum of a kernel without negative entries.

    Args:
        image: Image, any shape of at least one axis, float32 or float64.
        kernel: Kernel with as many axes as the image, on none of them longer than it, of the
            image's dtype; traced. `gaussian_kernel` makes one.

    Returns:
        The blurred image, of the shape and dtype of the image.

    Raises:
        ValueError: If a shape or dtype does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import operators
        >>> impulse = jnp.array([0.0, 1.0, 0.0, 0.0, 0.0])
        >>> blurred = operators.blur(impulse, jnp.array([1.0, 2.0, 4.0]))
        >>> [round(float(value)) for value in blurred]
        [1, 2, 4, 0, 0]
    """
    image, kernel = jnp.asarray(image), jnp.asarray(kernel)
    _check_image("blur", image)
    _checks.check_ndim("blur", "kernel", kernel, image.ndim)
    if kernel.dtype != image.dtype:
        got, expected = f"kernel of dtype {kernel.dtype}", f"the image's dtype {image.dtype}"
        raise _checks.fail("blur", got, expected)
    pairs = list(zip(kernel.shape, image.shape, strict=True))
    if any(not 1 <= size <= whole for size, whole in pairs):
        raise _checks.fail("blur", f"kernel of shape {kernel.shape}", f"at most {image.shape}")
    padded = jnp.pad(kernel, [(0, whole - size) for size, whole in pairs])
    centred = jnp.roll(padded, [-(size // 2) for size, _ in pairs], range(image.ndim))
    spectrum = jnp.fft.rfftn(centred) * jnp.fft.rfftn(image)
    return jnp.fft.irfftn(spectrum, image.shape)


def gaussian_kernel(
    size: int, sigma: Float[Array, ""] | float, ndim: int = 2
) -> Float[Array, "..."]:
    """Sample a Gaussian around the centre that `blur` takes, with entries that sum to 1.

        kernel_k = exp(-|k - c|^2 / (2 sigma^2)) / Z,   c = size // 2 on every axis

    Args:
        size: Length on every axis, *static*.
        sigma: Standard deviation in pixels, positive, shape (); traced. The kernel has its dtype.
        ndim: Number of axes, *static*.

    Returns:
        Kernel with `ndim` axes of length `size`.

    Raises:
        ValueError: If `size` or `ndim` is not a positive integer or `sigma` is no float scalar.

    Example:
        >>> from fedlr import operators
        >>> kernel = operators.gaussian_kernel(3, 0.5)
        >>> kernel.shape, round(float(kernel.sum()), 5), round(float(kernel[1, 1]), 5)
        ((3, 3), 1.0, 0.61935)
    """
    _checks.check_count("gaussian_kernel", "size", size)
    _checks.check_count("gaussian_kernel", "ndim", ndim)
    sigma = jnp.asarray(sigma)
    _checks.check_floating("gaussian_kernel", sigma=sigma)
    _checks.check_shape("gaussian_kernel", "sigma", sigma, ())
    profile = jnp.exp(-0.5 * ((jnp.arange(size, dtype=sigma.dtype) - size // 2) / sigma) ** 2)
    return functools.reduce(jnp.multiply.outer, [profile / profile.sum()] * ndim)


def fourier(image: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "2 ..."]:
    """Sample the Fourier transform of an image on a grid: MRI, one coil of constant sensitivity.

        A x = mask * F x,   F the orthonormal discrete Fourier transform over all axes

    Real and imaginary part are two real arrays. The adjoint is the real part of F^H of the masked
    complex numbers, and ||A||_2 <= 1.

    Args:
        image: Real image, any shape of at least one axis, float32 or float64.
        mask: True = sampled frequency, bool of the image's shape; traced. Frequencies have the
            order of `jnp.fft.fftfreq`: index 0 is the constant (DC), not the middle.

    Returns:
        Samples of shape (2, *image.shape): real and imaginary part, zero where not sampled.

    Raises:
        ValueError: If a shape or dtype does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import operators
        >>> samples = operators.fourier(jnp.ones(4), jnp.array([True, True, False, True]))
        >>> samples.tolist()
        [[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    image = jnp.asarray(image)
    _check_image("fourier", image)
    _checks.check_mask("fourier", mask, image.shape)
    spectrum = jnp.fft.fftn(image, norm="ortho")
    return jnp.stack([jnp.where(mask, part, 0) for part in (spectrum.real, spectrum.imag)])


def random_lines(
    shape: tuple[int, ...], num_lines: int, num_center: int, *, key: Key[Array, ""]
) -> Bool[Array, "..."]:
    """Draw a mask for `fourier`: random phase-encode lines around a fully sampled centre.

    A line is all frequencies with one index on the last axis. The `num_center` lines about the
    constant (DC, index 0) are always there; the others are drawn uniformly without replacement.

    Args:
        shape: Shape of the image, *static*.
        num_lines: Number of lines, centre included, *static*: shape[-1] / num_lines is the
            acceleration.
        num_center: Number of lines in the centre, *static*; an even number has one more line of
            negative frequency.
        key: Random key.

    Returns:
        Mask, bool of shape `shape`, True = sampled.

    Raises:
        ValueError: If a size is no positive integer or not num_center <= num_lines <= shape[-1].

    Example:
        >>> import jax
        >>> from fedlr import operators
        >>> mask = operators.random_lines((4, 16), 6, 3, key=jax.random.key(0))
        >>> mask.sum().item(), mask[:, [-1, 0, 1]].all().item()
        (24, True)

    Reference:
        Zbontar et al. 2018, arXiv 1811.08839. There every line is drawn on its own
        with a probability; here the number of lines is exact.
    """
    if not isinstance(shape, tuple) or not shape:
        raise _checks.fail("random_lines", f"shape {shape!r}", "a tuple of at least one size")
    for size in shape:
        _checks.check_count("random_lines", "size", size)
    _checks.check_rank("random_lines", num_lines, shape[-1], "num_lines")
    _checks.check_count("random_lines", "num_center", num_center, 0)
    if num_center > num_lines:
        raise _checks.fail("random_lines", f"num_center {num_center}", f"at most {num_lines}")
    center = (np.arange(shape[-1]) + num_center // 2) % shape[-1] < num_center
    order = jnp.argsort(jnp.where(center, -1, jax.random.uniform(key, shape[-1:], jnp.float32)))
    lines = jnp.zeros(shape[-1], bool).at[order[:num_lines]].set(True)
    return jnp.broadcast_to(lines.reshape((1,) * (len(shape) - 1) + (-1,)), shape)


@jax.custom_jvp
def _constant(parameters):
    """Pass parameters on that no derivative may reach."""
    return parameters


@_constant.defjvp
def _refuse_derivative(primals, tangents):
    del primals, tangents
    raise _checks.fail("from_pair", "a derivative in the inputs", "one in the image alone")


def _check_array(name, result, dtype):
    if not isinstance(result, jax.ShapeDtypeStruct) or result.dtype != dtype:
        raise _checks.fail(
            "from_pair", f"{name} {result}", f"an array of the image's dtype {dtype}"
        )


def from_pair(
    forward: Callable[[Array, PyTree], Array], adjoint: Callable[[Array, PyTree], Array]
) -> Callable[[Array, PyTree], Array]:
    """Build a forward model of a linear operator that comes as two functions.

    JAX takes `adjoint` for the transpose of `forward`, and `forward` for the transpose of
    `adjoint`, and derives jvp, vjp, linear_transpose and vmap from these. It looks into neither, so
    that a `while_loop` or a kernel of one's own will do. Whether the two belong together is for
    `check_adjoint` to find out. A function of NumPy arrays comes in by `jax.pure_callback` with
    vmap_method="sequential"; on a single CPU core that can hang (seen with 1500 x 1500 pixels).

    Args:
        forward: ``(image, inputs) -> measurements``, linear in the image.
        adjoint: ``(measurements, inputs) -> image``, its transpose.

    Returns:
        The forward model ``(image, inputs) -> prediction``. While tracing it raises ValueError if
        image or measurements are not one float32 or float64 array of one dtype, if the adjoint does
        not return the image's shape and dtype, or if a derivative in `inputs`, or in what `forward`
        closes over, is asked for: the pair says nothing about it.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import operators
        >>> model = operators.from_pair(lambda x, scale: scale * x, lambda y, scale: scale * y)
        >>> prediction, vjp = jax.vjp(lambda x: model(x, 3.0), jnp.array([1.0, 2.0]))
        >>> prediction.tolist(), vjp(jnp.ones(2))[0].tolist()
        ([3.0, 6.0], [3.0, 3.0])
    """

    def model(image, inputs):
        image = jnp.asarray(image)
        _checks.check_floating("from_pair", image=image)
        applied, parameters = jax.closure_convert(lambda x: forward(x, inputs), image)
        parameters = _constant(parameters)
        measurements = jax.eval_shape(applied, image, *parameters)
        _check_array("measurements", measurements, image.dtype)
        back = jax.eval_shape(adjoint, measurements, inputs)
        _check_array("adjoint", back, image.dtype)
        if back.shape != image.shape:
            got, expected = f"adjoint of shape {back.shape}", f"the image's shape {image.shape}"
            raise _checks.fail("from_pair", got, expected)
        return _transpose.with_transpose(
            lambda x: applied(x, *parameters),
            lambda y: adjoint(y, inputs),
            # Looked at for derivatives in parameters alone, of which there are none.
            lambda x: jnp.zeros(measurements.shape, x.dtype),
            image,
            measurements.shape,
        )

    return model


def _random_products(function, forward, image, inputs, keys):
    """Return (A x, A z, A (2 x + z)), z, y and A^T y for random x and z and y = A z + noise."""
    x, z = (jax.random.normal(k, jnp.shape(image), jnp.result_type(image)) for k in keys[:2])
    # One loop compiles the model once.
    predictions = jax.lax.map(lambda w: forward(w, inputs), jnp.stack([x, z, 2 * x + z]))
    if not isinstance(predictions, jax.Array):
        raise _checks.fail(function, f"a prediction {predictions}", "an array")
    _checks.check_floating(function, prediction=predictions)
    az = predictions[1]
    # A wrong weight shows in <A z, A z> at its full size, a wrong place in the product with noise.
    size = jnp.sqrt(jnp.mean(az**2))
    noise = jax.random.normal(keys[2], az.shape, az.dtype)
    y = az + jnp.where(size > 0, size, 1) * noise
    (aty,) = jax.vjp(lambda w: forward(w, inputs), x)[1](y)
    return predictions, z, y, aty


@_precision.highest
def check_adjoint(
    forward: Callable[[Array, PyTree], Array],
    image: Array,
    inputs: PyTree,
    *,
    key: Key[Array, ""],
    function: str = "check_adjoint",
) -> None:
    """Refuse a forward model that is not linear or whose adjoint, the vjp, is not its transpose.

        A (2 x + z) = 2 A x + A z   and   <A z, y> = <z, A^T y>   for random x, z and y

    For the host, once before a reconstruction: it compiles, and applies, the model of ONE client
    three times and its adjoint once, with matrix products at precision "highest". Where the
    key, the inputs or anything else is traced, it does nothing, as no value is known.

    The first difference, relative to the larger one of ||A (2 x + z)|| and 2 ||A x|| + ||A z||, may
    be (64 + sqrt(size)) eps, with the larger size and the coarser eps of image and prediction; the
    second, relative to the larger one of ||A z|| ||y|| and ||z|| ||A^T y||, 64 eps, in float32
    7.6e-6. Measured on a CPU, in units of eps: `tomography.project` of 1 to 512 x 512 pixels up to
    5 and 1.4, FFTs and dense matrices up to 8 and 2.2, a running sum of 10,000 numbers 65 and 0.5.
    One of the projector's two taps wrong by 1 % in the adjoint made the second at least 270 eps.

    Args:
        forward: ``(image, inputs) -> prediction``.
        image: An image of one client; only its shape and dtype are used.
        inputs: Inputs of one client.
        key: Random key.
        function: Name that the message begins with.

    Raises:
        ValueError: If image or prediction is not float32 or float64, the model is not linear (a
            constant offset, an absolute value), its adjoint is another operator's, or a result is
            not finite.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import operators
        >>> matrix, key = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jax.random.key(0)
        >>> operators.check_adjoint(lambda x, a: a @ x, jnp.zeros(2), matrix, key=key)
        >>> wrong = operators.from_pair(lambda x, a: a @ x, lambda y, a: a @ y)
        >>> try:
        ...     operators.check_adjoint(wrong, jnp.zeros(2), matrix, key=key)
        ... except ValueError as error:
        ...     print(str(error)[:63])
        check_adjoint: got a forward model whose adjoint does not match

    Reference:
        Claerbout, "Earth Soundings Analysis: Processing versus Inversion", 1992: the
        dot-product test.
    """
    _checks.check_floating(function, image=image)
    # Inside a function that is being traced these are traced whatever the key is.
    keys = jax.random.split(key, 3)
    if _is_traced((image, inputs, keys)):
        return
    apply = jax.jit(lambda inputs, keys: _random_products(function, forward, image, inputs, keys))
    products = apply(inputs, keys)
    if _is_traced(products):
        return
    predictions, z, y, aty = products
    _checks.check_finite(function, "prediction", predictions)
    _checks.check_finite(function, "adjoint", aty)
    eps = max(float(jnp.finfo(product.dtype).eps) for product in (y, z))
    # Rounding errors of a long sum grow like the root of its length; in inner products they cancel.
    linear, adjoint = (64 + max(y.size, z.size) ** 0.5) * eps, 64 * eps
    ax, az, together = np.asarray(predictions, np.float64).reshape(3, -1)
    z, y, aty = (np.asarray(product, np.float64).ravel() for product in (z, y, aty))

    norm = np.linalg.norm
    gap, scale = norm(together - 2 * ax - az), max(norm(together), 2 * norm(ax) + norm(az))
    if gap > linear * scale:
        got = (
            "a forward model that is not linear: relative difference of A (2x + z) and 2 Ax + Az "
            f"{gap / scale:.3g}"
        )
        raise _checks.fail(function, got, f"at most {linear:.3g}")
    forth, back = az @ y, z @ aty
    gap, scale = abs(forth - back), max(norm(az) * norm(y), norm(z) * norm(aty))
    if gap > adjoint * scale:
        got = (
            f"a forward model whose adjoint does not match: <Ax, y> = {forth:.9g}, "
            f"<x, A^T y> = {back:.9g}, relative difference {gap / scale:.3g}"
        )
        raise _checks.fail(function, got, f"at most {adjoint:.3g}")


def _is_traced(tree):
    return any(isinstance(leaf, core.Tracer) for leaf in jax.tree.leaves(tree))

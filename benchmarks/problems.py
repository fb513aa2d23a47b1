"""Data to reconstruct from: coupled images or volumes, measured with noise, several draws at once.

The setting of the reference figures (`splatting_problem`) commits the inverse crime, as they do.
All other tomographic data come from closed-form sinograms or, for a photograph, from another
projector than the one that reconstructs.
"""

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks import splatting
from fedlr import operators, phantoms, synthetic, tomography
from fedlr.federated import local, protocol

__all__ = [
    "OPERATORS",
    "Draw",
    "Problem",
    "closed_form_problem",
    "equal_coefficients",
    "hyperspectral_cube",
    "measured_problem",
    "photograph",
    "splatting_problem",
    "volume_problem",
]

REFERENCE_COEFFICIENTS = (0.5, 0.3, 0.2)
# Weights of the total variation in the reference figures, by noise level.
TV_WEIGHTS = {0.05: 0.003, 0.1: 0.005}
# The weights of scikit-image's rgb2gray, which are close to the luminance of ITU-R BT.709.
LUMINANCE = (0.2125, 0.7154, 0.0721)


class Draw(NamedTuple):
    """One noisy set of data; a problem stacks several along a leading axis.

    Attributes:
        clients: Data of all clients.
        noise_levels: Standard deviation of the noise of every client, shape (clients,).
        sigma: Noise level relative to the largest clean value, scalar.
        tv_weight: Weight of the total variation for this noise, scalar.
    """

    clients: protocol.ClientData
    noise_levels: Array
    sigma: Array
    tv_weight: Array


class Problem(NamedTuple):
    """Coupled images measured with noise.

    Attributes:
        forward: Forward model of ONE client.
        truth: Images of all clients, shape (clients, ...).
        coefficients: Coupling coefficients, shape (clients - 1,).
        step_size: Largest gradient step that is stable for all clients.
        draws: A `Draw` whose leaves have a leading axis of draws.
        labels: What the rows of a table say of every draw.
    """

    forward: Callable[[Array, Any], Array]
    truth: Array
    coefficients: Array
    step_size: Array
    draws: Draw
    labels: tuple[dict[str, Any], ...]

    def draw(self, index: int) -> Draw:
        """Return one draw."""
        return jax.tree.map(lambda leaf: leaf[index], self.draws)


def splatting_problem(
    size: int, num_angles: int, sigmas: Sequence[float], seeds: Sequence[int]
) -> Problem:
    """Build the setting of the reference figures: one operator for data and reconstruction.

    Args:
        size: Side of the images.
        num_angles: Number of views.
        sigmas: Noise levels relative to the largest clean value.
        seeds: Seeds of NumPy's generator; every one is drawn at every noise level.
    """
    ellipses = phantoms.reference_set(dtype=jnp.float32)
    truth = jax.vmap(lambda e: phantoms.rasterize(e, size, subsamples=1))(ellipses)
    angles = synthetic.uniform_angles(num_angles)
    clean = np.asarray(jax.vmap(lambda image: splatting.project(image, angles))(truth))
    peaks = clean.max(axis=(1, 2))
    draws, labels = [], []
    for sigma in sigmas:
        for seed in seeds:
            rng = np.random.default_rng(seed)
            noise = np.stack([rng.standard_normal(clean.shape[1:]) for _ in clean])
            noisy = clean + (sigma * peaks)[:, None, None] * noise
            draws.append((sigma, sigma * peaks, noisy))
            labels.append({"sigma": sigma, "seed": seed})
    coefficients = jnp.asarray(REFERENCE_COEFFICIENTS)
    return _problem(splatting.project, truth, coefficients, angles, draws, labels)


@functools.cache
def closed_form_problem(
    size: int,
    num_angles: int,
    sigmas: tuple[float, ...],
    *,
    coefficients: tuple[float, ...] | None = None,
) -> Problem:
    """Build scans from closed-form sinograms, to be reconstructed with the library's projector.

    Several tables share one, which is made once.

    Args:
        size: Side of the images.
        num_angles: Number of views.
        sigmas: Noise levels relative to the largest clean value.
        coefficients: Coefficients of randomly drawn coupled phantoms; None for the four phantoms
            of the reference figures.
    """
    geometry = _geometry(size)
    angles = synthetic.uniform_angles(num_angles)
    if coefficients is None:
        scan = partial(synthetic.multimodal_scans, geometry, angles)
    else:
        weights = jnp.asarray(coefficients, jnp.float32)
        drawn = phantoms.coupled_phantoms(weights, key=jax.random.key(4))
        scan = partial(synthetic.scan_phantoms, geometry, drawn, weights, angles)
    return _scan_problem(partial(tomography.project, geometry), scan, angles, sigmas)


def volume_problem(size: int, num_angles: int, sigma: float, num_clients: int) -> Problem:
    """Build coupled volumes of `size` slices of `size` x `size` pixels, scanned slice by slice.

    Args:
        size: Side of the volumes.
        num_angles: Number of views.
        sigma: Noise level relative to the largest clean value.
        num_clients: Number of clients; the last one has the mean of the others.
    """
    geometry = _geometry(size)
    angles = synthetic.uniform_angles(num_angles)
    scan = jax.jit(
        partial(
            synthetic.multimodal_volumes,
            geometry,
            angles,
            num_slices=size,
            coefficients=jnp.asarray(equal_coefficients(num_clients), jnp.float32),
        )
    )
    return _scan_problem(partial(tomography.project_volume, geometry), scan, angles, (sigma,))


def measured_problem(
    images: Float[Array, "rows columns channels"],
    weights: Sequence[float],
    operator: str,
    sigma: float,
) -> Problem:
    """Measure the channels of a real image, and their weighted sum as the last client.

    Noise is relative to the largest value of a client's image, with tomography of its sinogram.

    Args:
        images: Image with its channels last, values from 0 to 1.
        weights: Weight of every channel.
        operator: A name of `OPERATORS`.
        sigma: Relative noise level.
    """
    truth, coefficients = synthetic.coupled_channels(images, jnp.asarray(weights))
    forward, inputs, present, scan, tv_weight = OPERATORS[operator](truth.shape[1:])
    clean = np.asarray(jax.vmap(lambda image: scan(image, inputs))(truth))
    whole = clean if operator == "tomography" else np.asarray(truth)
    levels = sigma * whole.max(axis=tuple(range(1, whole.ndim)))
    noise = np.random.default_rng(1).standard_normal(clean.shape)
    mask = np.broadcast_to(present, clean.shape)
    noisy = np.where(mask, clean + levels.reshape(-1, *[1] * (clean.ndim - 1)) * noise, 0)
    draws = [(sigma, levels, noisy)]
    labels = [{"operator": operator, "sigma": sigma, "seed": 1}]
    return _problem(
        forward, truth, coefficients, inputs, draws, labels, mask=mask, tv_weight=tv_weight
    )


def photograph(size: int) -> Array:
    """Return a colour photograph as (size, size, 3) means over blocks, from 0 to 1."""
    from skimage import data  # a peer, not needed by the library

    image = data.astronaut().astype(np.float32) / 255
    block = image.shape[0] // size
    cut = image[: block * size, : block * size]
    return jnp.asarray(cut.reshape(size, block, size, block, 3).mean(axis=(1, 3)))


def hyperspectral_cube(num_bands: int, size: int | None = None) -> Array:
    """Return bands spread over the spectrum of the Indian Pines scene, each scaled to [0, 1].

    Args:
        num_bands: Number of bands.
        size: Side of a corner that is cut out; None for all 145 x 145 pixels.
    """
    datasets: Any = importlib.import_module("tensorly.datasets")  # a peer
    scene = np.asarray(datasets.load_indian_pines()["tensor"], np.float32)[:size, :size]
    bands = scene[..., np.linspace(10, scene.shape[-1] - 11, num_bands).round().astype(int)]
    low, high = bands.min(axis=(0, 1)), bands.max(axis=(0, 1))
    return jnp.asarray((bands - low) / (high - low))


def equal_coefficients(num_clients: int) -> tuple[float, ...]:
    """Return the coefficients by which the last of the clients has the mean of the others."""
    return (1.0 / (num_clients - 1),) * (num_clients - 1)


def _geometry(size: int) -> tomography.ParallelBeam:
    return tomography.ParallelBeam(shape=(size, size), num_bins=math.ceil(math.sqrt(2.0) * size))


def _sampling(shape):
    """Half of the pixels."""
    mask = jax.random.bernoulli(jax.random.key(5), 0.5, shape)
    return operators.sample, mask, mask, operators.sample, 0.02


def _blur(shape):
    """A Gaussian of 1.5 pixels."""
    del shape
    kernel = operators.gaussian_kernel(9, 1.5)
    return operators.blur, kernel, True, operators.blur, 0.005


def _fourier(shape):
    """40 % of the lines; the readout comes last, as the estimate of the noise wants it."""
    lines = round(0.4 * shape[-1])
    mask = operators.random_lines(shape, lines, max(1, lines // 5), key=jax.random.key(6))

    def readout_last(image, mask):
        return jnp.swapaxes(operators.fourier(image, mask), 1, 2)

    return readout_last, mask, mask.T, readout_last, 0.02


def _tomography(shape):
    """0.4 n views, measured by the Fourier slice theorem and reconstructed with Joseph's method."""
    geometry = _geometry(shape[0])
    angles = synthetic.uniform_angles(round(0.4 * shape[0]))
    project = partial(tomography.project, geometry)
    return project, angles, True, partial(tomography.fourier_project, geometry), 0.003


OPERATORS: Mapping[str, Callable[[tuple[int, ...]], tuple]] = {
    "sampling": _sampling,
    "blur": _blur,
    "fourier": _fourier,
    "tomography": _tomography,
}
"""Shape -> forward model, its inputs, the measurements that are there, the model that makes the
data, and the weight of the total variation."""


def _scan_problem(forward, scan, angles, sigmas) -> Problem:
    """Scan at every noise level with one key."""
    scans = [scan(sigma=sigma, key=jax.random.key(1)) for sigma in sigmas]
    draws = [(sigma, s.noise_levels, s.sinograms) for sigma, s in zip(sigmas, scans, strict=True)]
    labels = [{"sigma": sigma, "seed": 1} for sigma in sigmas]
    return _problem(forward, scans[0].images, scans[0].coefficients, angles, draws, labels)


def _problem(
    forward, truth, coefficients, inputs, draws, labels, *, mask=None, tv_weight=None
) -> Problem:
    """Stack the draws (sigma, noise levels, data), whose inputs are the same for all clients."""
    sigmas, levels, targets = zip(*draws, strict=True)
    targets = jnp.stack([jnp.asarray(target, jnp.float32) for target in targets])
    leading = targets.shape[:2]
    present = jnp.ones(targets.shape[1:], bool) if mask is None else jnp.asarray(mask)
    clients = protocol.ClientData(
        inputs=jnp.broadcast_to(inputs, (*leading, *inputs.shape)),
        targets=targets,
        mask=jnp.broadcast_to(present, targets.shape),
    )
    weights = [TV_WEIGHTS.get(s, 0.06 * s) if tv_weight is None else tv_weight for s in sigmas]
    stacked = Draw(
        clients,
        jnp.stack([jnp.asarray(level, jnp.float32) for level in levels]),
        jnp.asarray(sigmas, jnp.float32),
        jnp.asarray(weights, jnp.float32),
    )
    norm = jax.jit(
        lambda clients: local.operator_norm(forward, clients, truth[0], key=jax.random.key(0))
    )
    step_size = 1.0 / norm(jax.tree.map(lambda leaf: leaf[0], clients))
    about = {"n": truth.shape[-1], "clients": leading[1]}
    return Problem(
        forward, truth, coefficients, step_size, stacked, tuple({**about, **lab} for lab in labels)
    )

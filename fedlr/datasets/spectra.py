"""Measured spectra: meat and corn in the near infrared."""

import importlib
import io
import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedlr import _checks
from fedlr.datasets import files

__all__ = [
    "TECATOR_NOTE",
    "Corn",
    "Tecator",
    "corn",
    "distinct_samples",
    "spectral_ranges",
    "tecator",
]

TECATOR_NOTE = """\
These data are recorded on a Tecator Infratec Food and Feed Analyzer working in the wavelength range
850 - 1050 nm by the Near Infrared Transmission (NIT) principle. Each sample contains finely chopped
pure meat with different moisture, fat and protein contents.
If results from these data are used in a publication we want you to mention the instrument and
company name (Tecator) in the publication. In addition, please send a preprint of your article to:
Karin Thente, Tecator AB, Box 70, S-263 21 Hoganas, Sweden.
The data are available in the public domain with no responsibility from the original data source.
The data can be redistributed as long as this permission note is attached.
"""
_TECATOR = files.File(
    "tecator.csv", "50e9e9669bbc7516a60bfcb5d4fab2b938d1c8fe74b4398ae079b54635b90995"
)
# The checksum is that of several public loaders of the file, which agree.
_CORN = files.File(
    "corn.mat",
    "e28fd4be274a54ca57b1f2c67ef5a8bf4981f8314bcc73e4c64836fe658c46b5",
    "https://eigenvector.com/data/Corn/corn.mat",
)
_CORN_ARCHIVE = "https://eigenvector.com/wp-content/uploads/2019/06/corn.mat_.zip"
_CORN_SHAPES = {
    "m5spec": (80, 700),
    "mp5spec": (80, 700),
    "mp6spec": (80, 700),
    "m5nbs": (3, 700),
    "mp5nbs": (4, 700),
    "mp6nbs": (4, 700),
    "propvals": (80, 4),
}
# Smallest and largest entry, in six digits.
_CORN_RANGES = {
    "m5spec": (0.0317151, 0.877687),
    "mp5spec": (-0.0221554, 0.80977),
    "mp6spec": (-0.0339424, 0.800767),
    "moisture": (9.377, 10.993),
}
_CORN_MEANS = (10.234, 3.498, 8.668, 64.696)


class Tecator(NamedTuple):
    """Near-infrared spectra of meat and its contents.

    Attributes:
        spectra: Absorbance, -log10 of the transmittance, dimensionless, shape (215, 100).
        contents: Moisture, fat and protein, in this order, in percent, shape (215, 3).
        wavelengths: Wavelengths in nm, shape (100,).
    """

    spectra: Float[Array, "samples wavelengths"]
    contents: Float[Array, "samples contents"]
    wavelengths: Float[Array, " wavelengths"]


def tecator(*, folder: str | os.PathLike[str] | None = None, dtype=jnp.float32) -> Tecator:
    """Load near-infrared spectra of 215 samples of meat with their moisture, fat and protein.

    Two properties decide how the data may be used. 22 samples are exact copies of an earlier one,
    so a random split puts samples beside their copies: `distinct_samples` leaves these out. And the
    contents add up to about 99 %, so none of them may serve to predict another.

    The source gives only the range of the wavelengths; 100 evenly spaced ones over 850-1050 nm are
    a convention.

    Reads ``tecator.csv`` of the project's data folder. There is no download: the public source has
    the data in another format.

    Terms: The permission note `TECATOR_NOTE` stays with the data; it asks that publications mention
    the instrument, Tecator Infratec Food and Feed Analyzer, and the company, Tecator.

    Args:
        folder: Folder to look in first; see `search_folders`.
        dtype: float32 or float64. *Static.*

    Returns:
        The spectra, contents and wavelengths.

    Raises:
        FileNotFoundError: If no folder has the file.
        ValueError: If the file has another checksum, or `dtype` is none of the two.

    Reference:
        Tecator AB, data set "tecator" of the StatLib archive, lib.stat.cmu.edu/datasets/tecator:
        the training, monitoring and test parts, without the two parts for extrapolation.
    """
    files.check_dtype("tecator", dtype)
    content = files.read(
        "tecator",
        [_TECATOR],
        folder,
        advice=files.not_public("lib.stat.cmu.edu/datasets/tecator"),
    )
    table = np.loadtxt(io.BytesIO(content), delimiter=",", skiprows=1)
    return Tecator(
        jnp.asarray(table[:, :100], dtype),
        jnp.asarray(table[:, 100:], dtype),
        jnp.linspace(850, 1050, 100, dtype=dtype),
    )


def distinct_samples(data: Tecator) -> Tecator:
    """Leave out every sample that is an exact copy of an earlier one, in spectrum and contents.

    For the host: the number of samples that are left depends on the values.

    Args:
        data: Spectra, contents and wavelengths.

    Returns:
        The same with the first of equal samples only, in their order; 193 samples of the 215.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import datasets
        >>> spectra = jnp.array([[2.0, 3.0], [1.0, 1.0], [2.0, 3.0]])
        >>> contents = jnp.array([[60.0, 20.0, 19.0], [50.0, 30.0, 19.0], [60.0, 20.0, 19.0]])
        >>> data = datasets.Tecator(spectra, contents, jnp.array([850.0, 1050.0]))
        >>> datasets.distinct_samples(data).spectra.tolist()
        [[2.0, 3.0], [1.0, 1.0]]
    """
    samples = np.concatenate([np.asarray(data.spectra), np.asarray(data.contents)], axis=1)
    first = np.sort(np.unique(samples, axis=0, return_index=True)[1])
    return data._replace(spectra=data.spectra[first], contents=data.contents[first])


class Corn(NamedTuple):
    """Near-infrared spectra of corn on three instruments and its contents.

    Attributes:
        spectra: Spectra of the instruments m5, mp5 and mp6, in this order, shape (80, 700) each.
            The samples are the same ones in the same order, so the instruments are modalities.
        contents: Moisture, oil, protein and starch, in this order, in percent, shape (80, 4).
        wavelengths: Wavelengths in nm, shape (700,).
        standards: Spectra of glass standards on the same instruments, shapes (3, 700), (4, 700) and
            (4, 700).
    """

    spectra: tuple[Float[Array, "samples wavelengths"], ...]
    contents: Float[Array, "samples contents"]
    wavelengths: Float[Array, " wavelengths"]
    standards: tuple[Float[Array, "standards wavelengths"], ...]


def corn(
    *, folder: str | os.PathLike[str] | None = None, download: bool = True, dtype=jnp.float32
) -> Corn:
    """Load near-infrared spectra of 80 samples of corn, each on three instruments.

    The contents tell much of one another: least squares from the other three leave a quarter of the
    variance of starch and a fifth of that of protein. So none may serve to predict another.

    Reads ``corn.mat`` from the folders or, with `download`, from its source into the cache
    (1.4 MB). It is read by SciPy, which JAX brings along. Beside the checksum, the shapes, the
    means of the contents and the ranges of the spectra have to be the known ones.

    That the file holds seven MATLAB objects with a field ``data`` is known from public descriptions
    and other loaders of it; the tests read a file of that form, not the original. The wavelengths
    are the stated ones, every second from 1100 to 2498 nm.

    Terms: The source names none; it thanks Cargill for letting it distribute the data. So the file
    is no part of this package, and everyone gets it there.

    Args:
        folder: Folder to look in first; see `search_folders`.
        download: Whether a file that is nowhere to be found is downloaded. *Static.*
        dtype: float32 or float64. *Static.*

    Returns:
        The spectra, contents, wavelengths and standards.

    Raises:
        FileNotFoundError: If the file is absent and not, or not successfully, downloaded.
        ImportError: If there is no SciPy.
        ValueError: If the file has another checksum or holds other numbers, or `dtype` is none of
            the two.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import datasets
        >>> datasets.corn(dtype=jnp.int32)
        Traceback (most recent call last):
        ValueError: corn: got dtype int32, expected float32 or float64

    Reference:
        Eigenvector Research, "NIR of corn samples for standardization benchmarking", measured at
        Cargill, eigenvector.com/data/Corn.
    """
    files.check_dtype("corn", dtype)
    reader = _import_matlab()
    advice = f"it lies at {_CORN.url} and, as an archive, at {_CORN_ARCHIVE}"
    content = files.read("corn", [_CORN], folder, advice=advice, download=download)
    variables = reader.loadmat(io.BytesIO(content), variable_names=list(_CORN_SHAPES))
    tables = {name: _read_corn(variables, name) for name in _CORN_SHAPES}
    _check_corn(tables)
    *arrays, contents = (jnp.asarray(table, dtype) for table in tables.values())
    wavelengths = jnp.arange(1100, 2500, 2, dtype=dtype)
    return Corn(tuple(arrays[:3]), contents, wavelengths, tuple(arrays[3:]))


def spectral_ranges(
    spectra: Float[Array, "*samples wavelengths"],
    wavelengths: Float[Array, " wavelengths"],
    edges: Sequence[float],
) -> tuple[Float[Array, "*samples channels"], ...]:
    """Cut spectra into ranges of wavelengths, which then serve as modalities.

    Range k has the channels with ``edges[k] <= wavelength < edges[k + 1]``, the last one also that
    at its upper edge. Channels outside all ranges are left out.

    Args:
        spectra: Spectra, the channels on the last axis.
        wavelengths: Wavelength of every channel, in any order; concrete, as shapes depend on it.
        edges: Two or more increasing wavelengths. *Static.*

    Returns:
        The spectra in every range, one fewer than edges, the channels in their order.

    Raises:
        ValueError: If there is not one wavelength for every channel, the edges do not increase, or
            a range has no channel.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import datasets
        >>> spectra = jnp.arange(200.0).reshape(2, 100)
        >>> wavelengths = jnp.linspace(850, 1050, 100)  # those of `tecator`
        >>> short, long = datasets.spectral_ranges(spectra, wavelengths, (850, 950, 1050))
        >>> short.shape, long[:, 0].tolist()
        ((2, 50), [50.0, 150.0])
    """
    spectra, positions = jnp.asarray(spectra), np.asarray(wavelengths)
    if positions.ndim != 1 or spectra.shape[-1:] != positions.shape:
        got = f"wavelengths of shape {positions.shape} for spectra of shape {spectra.shape}"
        raise _checks.fail("spectral_ranges", got, "a wavelength for every channel")
    bounds = np.asarray(edges, np.float64)
    if bounds.ndim != 1 or len(bounds) < 2 or not (np.diff(bounds) > 0).all():
        raise _checks.fail("spectral_ranges", f"edges {edges}", "two or more increasing numbers")
    parts = []
    for k, (low, high) in enumerate(itertools.pairwise(bounds)):
        last = k == len(bounds) - 2
        chosen = (low <= positions) & ((positions <= high) if last else (positions < high))
        if not chosen.any():
            got = f"no wavelength from {low:g} to {high:g}"
            raise _checks.fail("spectral_ranges", got, "a channel in every range")
        parts.append(spectra[..., np.flatnonzero(chosen)])
    return tuple(parts)


def _import_matlab() -> Any:
    """Return SciPy's reader of MATLAB's files, which nothing else here needs."""
    try:
        return importlib.import_module("scipy.io")
    except ImportError as error:
        message = "corn: got no SciPy, expected it for MATLAB's format; pip install scipy"
        raise ImportError(message) from error


def _read_corn(variables: dict[str, Any], name: str) -> Float[np.ndarray, "rows columns"]:
    """Return the numbers of a MATLAB object or struct."""
    try:
        table = np.asarray(variables[name]["data"][0, 0], np.float64)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        expected = f"an object {name} with a field data"
        raise _checks.fail("corn", f"corn.mat with {sorted(variables)}", expected) from error
    if table.shape != _CORN_SHAPES[name]:
        raise _checks.fail("corn", f"{name} of shape {table.shape}", f"{_CORN_SHAPES[name]}")
    return table


def _check_corn(tables: dict[str, Float[np.ndarray, "rows columns"]]) -> None:
    """Refuse numbers that are not those of the set."""
    contents = tables["propvals"]
    means = contents.mean(axis=0)
    if not np.allclose(means, _CORN_MEANS, rtol=0, atol=6e-4):
        raise _checks.fail("corn", f"contents of mean {means}", f"{_CORN_MEANS}")
    tables = tables | {"moisture": contents[:, 0]}
    for name, expected in _CORN_RANGES.items():
        found = tables[name].min(), tables[name].max()
        if not np.allclose(found, expected, rtol=2e-6, atol=0):
            raise _checks.fail("corn", f"{name} from {found[0]} to {found[1]}", f"{expected}")

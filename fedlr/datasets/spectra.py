"""Measured spectra: meat in the near infrared."""

import io
import os
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedlr.datasets import files

__all__ = ["TECATOR_NOTE", "Tecator", "distinct_samples", "tecator"]

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

"""Real data: loaders with checksums.

Everything here runs on the host, before anything is compiled; the numbers come as JAX arrays, ready
for the kernels. A file is taken from the first place that has it: the folder given to the loader,
the folder named in the environment variable FEDLR_DATA, the user's cache, an installed TensorLy
where that ships it, and last its public address where there is one. Wherever it comes from, it is
used only if its sha256 is the one written here.
"""

import hashlib
import http.client
import importlib.util
import io
import os
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedlr import _checks

__all__ = [
    "TECATOR_NOTE",
    "AminoAcids",
    "CovidSerology",
    "Il2Response",
    "Tecator",
    "amino_acids",
    "covid_serology",
    "distinct_samples",
    "il2_response",
    "search_folders",
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


class _File(NamedTuple):
    """A file by its name, its checksum and, where these bytes are public, its address."""

    name: str
    sha256: str
    url: str = ""


_TENSORLY_URL = (
    "https://raw.githubusercontent.com/tensorly/tensorly/"
    "272718888b03faa2241a656783c98dec3cfe7d20/tensorly/datasets/data/"
)
_AMINO_ACIDS = _File(
    "amino_acids.npz", "f2d3b3109bd4b04d5add2c95681aa54fa898e7ff43194a8e2733b2ba3c4ac942"
)
_TECATOR = _File("tecator.csv", "50e9e9669bbc7516a60bfcb5d4fab2b938d1c8fe74b4398ae079b54635b90995")
_IL2_RESPONSE = _File(
    "il2_response.npz", "b1082d8efa34e35cdc68e64504ecbc391579ec9fc7f296664d519a062bad3aaf"
)
_IL2_TENSORLY = _File(
    "IL2_Response_Tensor.npy",
    "c8a8df301c943683104345fc4155061c7fc303d6ccdbad18ca1ce472ee82d7d1",
    _TENSORLY_URL + "IL2_Response_Tensor.npy",
)
_COVID_SEROLOGY = _File(
    "COVID19_data.npy",
    "b1e2f72e0211f556c6c32cd66368a9a3c4ee521aed116d195fdadb07bf498aad",
    _TENSORLY_URL + "COVID19_data.npy",
)


def search_folders(folder: str | os.PathLike[str] | None = None) -> tuple[Path, ...]:
    """Return the folders in which the loaders look for their files, in this order.

    `folder`, the one that the environment variable FEDLR_DATA names at the time of the call, and
    the cache ``~/.cache/fedlr`` or ``$XDG_CACHE_HOME/fedlr``. They need not exist.

    Args:
        folder: Folder to look in before all others; none if None.

    Returns:
        Two folders, or one or three.

    Example:
        >>> from fedlr import datasets
        >>> print(datasets.search_folders("measurements")[0])
        measurements
    """
    named = [place for place in (folder, os.environ.get("FEDLR_DATA")) if place]
    return (*(Path(place).expanduser() for place in named), _cache())


class AminoAcids(eqx.Module):
    """Fluorescence of five mixtures of three amino acids.

    Attributes:
        intensity: Fluorescence in arbitrary units, shape (5, 201, 61): sample, emission,
            excitation.
        emission: Emission wavelengths in nm, shape (201,).
        excitation: Excitation wavelengths in nm, shape (61,).
        concentrations: Concentrations in mol/l, shape (5, 3): sample, amino acid. Each of the first
            three samples holds one substance only.
        names: The three amino acids, in the order of the columns. *Static.*
    """

    intensity: Float[Array, "samples emission excitation"]
    emission: Float[Array, " emission"]
    excitation: Float[Array, " excitation"]
    concentrations: Float[Array, "samples substances"]
    names: tuple[str, ...] = eqx.field(static=True)


def amino_acids(*, folder: str | os.PathLike[str] | None = None, dtype=jnp.float32) -> AminoAcids:
    """Load the fluorescence of five mixtures of tryptophan, tyrosine and phenylalanine.

    The standard real example of the CP decomposition: three components, one for each substance,
    and a multilinear rank of (3, 3, 3) up to noise. The small negative values are noise and stay.

    Reads ``amino_acids.npz`` of the project's data folder. There is no download: the public source
    has the measurements in another format.

    Terms: The source states public use of its data and asks to be cited.

    Args:
        folder: Folder to look in first; see `search_folders`.
        dtype: float32 or float64. *Static.*

    Returns:
        The measurements with their wavelengths and concentrations.

    Raises:
        FileNotFoundError: If no folder has the file.
        ValueError: If the file has another checksum, or `dtype` is none of the two.

    Reference:
        R. Bro, "PARAFAC. Tutorial and applications", Chemometrics and Intelligent Laboratory
        Systems 38, 1997. Data "Amino acids fluorescence" of the chemometrics group, University of
        Copenhagen, ucphchemometrics.com.
    """
    _check_dtype("amino_acids", dtype)
    content = _read("amino_acids", _AMINO_ACIDS, folder, "ucphchemometrics.com")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return AminoAcids(
            jnp.asarray(arrays["X"], dtype),
            jnp.asarray(arrays["emission_nm"], dtype),
            jnp.asarray(arrays["excitation_nm"], dtype),
            jnp.asarray(arrays["Y"], dtype),
            ("tryptophan", "tyrosine", "phenylalanine"),
        )


class Il2Response(eqx.Module):
    """Signalling response of immune cells to interleukin-2 and its variants.

    Attributes:
        response: Response scaled to [0, 1], dimensionless, NaN where missing, shape
            (13, 4, 12, 8): ligand, time, dose, cell type.
        times: Times in hours, latest first, shape (4,).
        doses: Doses, evenly spaced in their logarithm, highest first, shape (12,). The source does
            not state their unit.
        ligands: Names of the 13 ligands; "Biv" and "Mono" are bivalent and monovalent. *Static.*
        cells: Names of the 8 cell types. *Static.*
    """

    response: Float[Array, "ligands times doses cells"]
    times: Float[Array, " times"]
    doses: Float[Array, " doses"]
    ligands: tuple[str, ...] = eqx.field(static=True)
    cells: tuple[str, ...] = eqx.field(static=True)


def il2_response(
    *, folder: str | os.PathLike[str] | None = None, download: bool = True, dtype=jnp.float32
) -> Il2Response:
    """Load the response of eight types of immune cells to 13 variants of interleukin-2.

    Missing entries stay NaN: 192 of 4992, which are all doses and cells of ligands 3 and 4 (from 0)
    at half an hour. ``masking.from_nan(data.response)`` gives the array and the mask that the
    kernels want.

    Reads ``il2_response.npz`` of the project's data folder or TensorLy's
    ``IL2_Response_Tensor.npy``, which hold the same numbers; the latter also from an installed
    TensorLy or, with `download`, from TensorLy's repository into the cache.

    Terms: Copyright 2021 The Regents of the University of California, with permission to use, copy
    and distribute if the notice of the source is kept; part of TensorLy, BSD 3-Clause License.

    Args:
        folder: Folder to look in first; see `search_folders`.
        download: Whether a file that is nowhere to be found is downloaded. *Static.*
        dtype: float32 or float64. *Static.*

    Returns:
        The responses with the labels of their four axes.

    Raises:
        FileNotFoundError: If the file is absent and not, or not successfully, downloaded.
        ValueError: If the file has another checksum, or `dtype` is none of the two.

    Reference:
        B. Orcutt-Jahns, P. C. Emmel, E. M. Snyder, C. Posner, S. M. Carlson and A. S. Meyer,
        "Multivalency enhances the specificity of Fc-cytokine fusions", bioRxiv, 2021.
    """
    _check_dtype("il2_response", dtype)
    files = [_IL2_RESPONSE, _IL2_TENSORLY]
    content = _read_or_download("il2_response", files, folder, download)
    loaded = np.load(io.BytesIO(content), allow_pickle=False)
    return Il2Response(
        jnp.asarray(loaded if isinstance(loaded, np.ndarray) else loaded["X"], dtype),
        jnp.asarray([4.0, 2.0, 1.0, 0.5], dtype),
        jnp.asarray(np.geomspace(84.0, 0.000474, 12), dtype),
        (
            "IL2 (Mono)",
            "IL15 (Mono)",
            "WT N-term (Biv)",
            "H16N N-term (Biv)",
            "R38Q N-term (Biv)",
            "R38Q/H16N (Biv)",
            "WT N-term (Mono)",
            "H16N N-term (Mono)",
            "WT C-term (Mono)",
            "V91K C-term (Mono)",
            "R38Q N-term (Mono)",
            "F42Q N-Term (Mono)",
            "N88D C-term (Mono)",
        ),
        (
            "Treg IL2Ra_hi",
            "Treg",
            "Treg IL2Ra_lo",
            "Thelper IL2Ra_hi",
            "Thelper",
            "Thelper IL2Ra_lo",
            "CD8+",
            "NK",
        ),
    )


class CovidSerology(eqx.Module):
    """Antibodies against SARS-CoV-2 in serum samples.

    Attributes:
        binding: Binding signal, centred over the samples for every antigen and receptor,
            dimensionless, shape (438, 6, 11): sample, antigen, receptor.
        statuses: The patient's status for each sample: "Negative", "Mild", "Moderate", "Severe" or
            "Deceased". *Static.*
        antigens: Names of the 6 antigens. *Static.*
        receptors: Names of the 11 antibody types and Fc receptors. *Static.*
    """

    binding: Float[Array, "samples antigens receptors"]
    statuses: tuple[str, ...] = eqx.field(static=True)
    antigens: tuple[str, ...] = eqx.field(static=True)
    receptors: tuple[str, ...] = eqx.field(static=True)


def covid_serology(
    *, folder: str | os.PathLike[str] | None = None, download: bool = True, dtype=jnp.float32
) -> CovidSerology:
    """Load a systems serology of 438 samples: antibodies against six antigens of SARS-CoV-2.

    Nothing is missing. The samples are sorted by the patients' status: 39 negative, 7 mild, 122
    moderate, 196 severe, 74 deceased.

    Reads TensorLy's ``COVID19_data.npy`` from the folders, from an installed TensorLy or, with
    `download`, from TensorLy's repository into the cache.

    Terms: Copyright 2022 The Regents of the University of California, with permission to use, copy
    and distribute if the notice of the source is kept; part of TensorLy, BSD 3-Clause License.

    Args:
        folder: Folder to look in first; see `search_folders`.
        download: Whether a file that is nowhere to be found is downloaded. *Static.*
        dtype: float32 or float64. *Static.*

    Returns:
        The binding signals with the labels of their three axes.

    Raises:
        FileNotFoundError: If the file is absent and not, or not successfully, downloaded.
        ValueError: If the file has another checksum, or `dtype` is none of the two.

    Reference:
        Z. C. Tan, M. C. Murphy, H. S. Alpay, S. D. Taylor and A. S. Meyer, "Tensor-structured
        decomposition improves systems serology analysis", Molecular Systems Biology 17(9), 2021,
        e10243, with the measurements of T. Zohar et al., "Compromised humoral functional evolution
        tracks with SARS-CoV-2 mortality", Cell 183(6), 2020.
    """
    _check_dtype("covid_serology", dtype)
    content = _read_or_download("covid_serology", [_COVID_SEROLOGY], folder, download)
    counts = {"Negative": 39, "Mild": 7, "Moderate": 122, "Severe": 196, "Deceased": 74}
    return CovidSerology(
        jnp.asarray(np.load(io.BytesIO(content), allow_pickle=False), dtype),
        tuple(status for status, count in counts.items() for _ in range(count)),
        ("S", "RBD", "N", "S1", "S2", "S1 Trimer"),
        (
            "IgG1",
            "IgG2",
            "IgG3",
            "IgA1",
            "IgA2",
            "IgM",
            "FcRalpha",
            "FcR2A",
            "FcR2B",
            "FcR3A",
            "FcR3B",
        ),
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
    _check_dtype("tecator", dtype)
    content = _read("tecator", _TECATOR, folder, "lib.stat.cmu.edu/datasets/tecator")
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


def _check_dtype(function: str, dtype) -> None:
    """Refuse a dtype that is not float32 or float64."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.float64):
        raise _checks.fail(function, f"dtype {jnp.dtype(dtype)}", "float32 or float64")


def _cache() -> Path:
    """Return the folder of what was downloaded, by the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fedlr"


def _tensorly_folders() -> list[Path]:
    """Return where an installed TensorLy keeps its data. It is not imported."""
    spec = importlib.util.find_spec("tensorly")
    locations = spec.submodule_search_locations if spec else None
    return [Path(location, "datasets", "data") for location in locations or ()]


def _check_sha256(function: str, file: _File, content: bytes, origin: str | Path) -> None:
    """Refuse bytes that are not those of the file."""
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise _checks.fail(function, f"sha256 {found} of {origin}", file.sha256)


def _find(function: str, files: Sequence[_File], places: Sequence[Path]) -> bytes | None:
    """Return the checked bytes of one of the files from the first place that has one."""
    for place in places:
        for file in files:
            path = place / file.name
            if path.is_file():
                content = path.read_bytes()
                _check_sha256(function, file, content, path)
                return content
    return None


def _absent(
    function: str, files: Sequence[_File], places: Sequence[Path], advice: str
) -> FileNotFoundError:
    """Build the error that says where was looked and what can be done."""
    names = " or ".join(file.name for file in files)
    return FileNotFoundError(
        f"{function}: got no {names} in {', '.join(map(str, places))}, expected it there or in the "
        f"folder that the environment variable FEDLR_DATA names; {advice}"
    )


def _read(function: str, file: _File, folder: str | os.PathLike[str] | None, source: str) -> bytes:
    """Read a file that is not public in this form."""
    places = search_folders(folder)
    content = _find(function, [file], places)
    if content is None:
        advice = (
            f"the project's data folder has it, and its source, {source}, has the data in another "
            "format, so nothing is downloaded"
        )
        raise _absent(function, [file], places, advice)
    return content


def _read_or_download(
    function: str, files: Sequence[_File], folder: str | os.PathLike[str] | None, download: bool
) -> bytes:
    """Read one of the files, from TensorLy too, or download the last of them into the cache."""
    places = (*search_folders(folder), *_tensorly_folders())
    content = _find(function, files, places)
    if content is not None:
        return content
    file = files[-1]
    advice = (
        f'{file.name} comes with TensorLy from 0.9 on (pip install "fedlr[benchmarks]") and lies '
        f"at {file.url}"
    )
    if not download:
        raise _absent(function, files, places, advice)
    try:
        with urllib.request.urlopen(file.url, timeout=60) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        advice += f"; its download failed: {error!r}"
        raise _absent(function, files, places, advice) from error
    _check_sha256(function, file, content, file.url)
    _store(_cache() / file.name, content)
    return content


def _store(path: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees a part of it under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        written = Path(scratch, path.name)
        written.write_bytes(content)
        written.replace(path)

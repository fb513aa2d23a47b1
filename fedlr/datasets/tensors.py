"""Measured tensors: fluorescence of amino acids, immune signalling, serology."""

import io
import os
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedlr.datasets import files

__all__ = [
    "AminoAcids",
    "CovidSerology",
    "Il2Response",
    "amino_acids",
    "covid_serology",
    "il2_response",
]

_TENSORLY_URL = (
    "https://raw.githubusercontent.com/tensorly/tensorly/"
    "272718888b03faa2241a656783c98dec3cfe7d20/tensorly/datasets/data/"
)
_AMINO_ACIDS = files.File(
    "amino_acids.npz", "f2d3b3109bd4b04d5add2c95681aa54fa898e7ff43194a8e2733b2ba3c4ac942"
)
_IL2_RESPONSE = files.File(
    "il2_response.npz", "b1082d8efa34e35cdc68e64504ecbc391579ec9fc7f296664d519a062bad3aaf"
)
_IL2_TENSORLY = files.File(
    "IL2_Response_Tensor.npy",
    "c8a8df301c943683104345fc4155061c7fc303d6ccdbad18ca1ce472ee82d7d1",
    _TENSORLY_URL + "IL2_Response_Tensor.npy",
)
_COVID_SEROLOGY = files.File(
    "COVID19_data.npy",
    "b1e2f72e0211f556c6c32cd66368a9a3c4ee521aed116d195fdadb07bf498aad",
    _TENSORLY_URL + "COVID19_data.npy",
)


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
    files.check_dtype("amino_acids", dtype)
    content = files.read(
        "amino_acids",
        [_AMINO_ACIDS],
        folder,
        advice=files.not_public("ucphchemometrics.com"),
    )
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
    files.check_dtype("il2_response", dtype)
    candidates = [_IL2_RESPONSE, _IL2_TENSORLY]
    content = _read_tensorly("il2_response", candidates, folder, download)
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
    files.check_dtype("covid_serology", dtype)
    content = _read_tensorly("covid_serology", [_COVID_SEROLOGY], folder, download)
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


def _read_tensorly(
    function: str,
    candidates: Sequence[files.File],
    folder: str | os.PathLike[str] | None,
    download: bool,
) -> bytes:
    """Read one of the files, of which TensorLy ships the last."""
    file = candidates[-1]
    return files.read(
        function,
        candidates,
        folder,
        advice=f'{file.name} comes with TensorLy from 0.9 on (pip install "fedlr[benchmarks]") and '
        f"lies at {file.url}",
        installed=files.installed_folders("tensorly", "datasets", "data"),
        download=download,
    )

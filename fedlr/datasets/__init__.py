"""Real data: loaders with checksums, from a local folder first, then the public source.

Everything here runs on the host, before anything is compiled; the numbers come as JAX arrays, ready
for the kernels. Where the files are looked for says `fedlr.datasets.files`.
"""

from fedlr.datasets.files import search_folders
from fedlr.datasets.images import Images, cifar10, cifar100, digits, fashion_mnist
from fedlr.datasets.spectra import (
    TECATOR_NOTE,
    Corn,
    Tecator,
    corn,
    distinct_samples,
    spectral_ranges,
    tecator,
)
from fedlr.datasets.tensors import (
    AminoAcids,
    CovidSerology,
    Il2Response,
    amino_acids,
    covid_serology,
    il2_response,
)

__all__ = [
    "TECATOR_NOTE",
    "AminoAcids",
    "Corn",
    "CovidSerology",
    "Il2Response",
    "Images",
    "Tecator",
    "amino_acids",
    "cifar10",
    "cifar100",
    "corn",
    "covid_serology",
    "digits",
    "distinct_samples",
    "fashion_mnist",
    "il2_response",
    "search_folders",
    "spectral_ranges",
    "tecator",
]

"""Partitioners: which client holds which examples of a data set that lies in one place.

Host functions in NumPy, for use before anything is traced. Every partition is disjoint and
complete: each example belongs to exactly one client. A set for the test is held out before.
`feature_shift` then lets clients see their inputs differently.

Shares are rounded to whole examples by largest remainders, so that no example is lost; clients
below a minimum size get examples from the largest ones, where drawing again until all are large
enough would hardly end with many clients and small concentrations. A client's examples are in the
order of the data set.
"""

from fedlr.federated.partition._assignment import Partition
from fedlr.federated.partition.diagnostics import (
    effective_classes,
    label_divergence,
    label_histograms,
    size_gini,
)
from fedlr.federated.partition.features import feature_shift
from fedlr.federated.partition.labels import dirichlet, dirichlet_clients, pathological, shards
from fedlr.federated.partition.sizes import (
    Sizes,
    by_group,
    dirichlet_sizes,
    iid,
    lognormal_sizes,
    power_law_sizes,
    quantity_skew,
)
from fedlr.federated.partition.splitting import split

__all__ = [
    "Partition",
    "Sizes",
    "by_group",
    "dirichlet",
    "dirichlet_clients",
    "dirichlet_sizes",
    "effective_classes",
    "feature_shift",
    "iid",
    "label_divergence",
    "label_histograms",
    "lognormal_sizes",
    "pathological",
    "power_law_sizes",
    "quantity_skew",
    "shards",
    "size_gini",
    "split",
]

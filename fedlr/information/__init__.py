"""Mutual-information estimators, their critics, contrastive losses, and Gaussian closed forms."""

from fedlr.information.bounds import (
    barber_agakov,
    club,
    donsker_varadhan,
    info_nce_bound,
    jensen_shannon,
    jensen_shannon_as_nwj,
    jensen_shannon_as_smile,
    mine,
    nwj,
    smile,
    symmetric_info_nce_bound,
)
from fedlr.information.contrast import (
    barlow_twins,
    info_nce,
    model_contrastive,
    symmetric_info_nce,
    vicreg,
)
from fedlr.information.critics import (
    JointCritic,
    SeparableCritic,
    joint_critic,
    separable_critic,
)
from fedlr.information.gaussian import (
    channel_information,
    correlation_club,
    correlation_information,
    gaussian_information,
    gaussian_kl,
    gaussian_scores,
    symmetric_kl,
)

__all__ = [
    "JointCritic",
    "SeparableCritic",
    "barber_agakov",
    "barlow_twins",
    "channel_information",
    "club",
    "correlation_club",
    "correlation_information",
    "donsker_varadhan",
    "gaussian_information",
    "gaussian_kl",
    "gaussian_scores",
    "info_nce",
    "info_nce_bound",
    "jensen_shannon",
    "jensen_shannon_as_nwj",
    "jensen_shannon_as_smile",
    "joint_critic",
    "mine",
    "model_contrastive",
    "nwj",
    "separable_critic",
    "smile",
    "symmetric_info_nce",
    "symmetric_info_nce_bound",
    "symmetric_kl",
    "vicreg",
]

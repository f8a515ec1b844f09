"""Losses as pure functions of a decoder and a micro-batch that return (sum, weight, metrics).

The division by the weight happens once, after accumulation, in `jaxft.train.step`: so neither gradient accumulation nor
sequence packing changes a result. A metric is a sum, or a pair (sum, weight) of which the quotient is logged.
"""

from jaxft.losses.policy import PolicyLoss, advantages, policy
from jaxft.losses.preference import KTOLoss, PreferenceLoss, kto, preference
from jaxft.losses.supervised import sft
from jaxft.losses.tokens import LossOutput

__all__ = [
    "KTOLoss",
    "LossOutput",
    "PolicyLoss",
    "PreferenceLoss",
    "advantages",
    "kto",
    "policy",
    "preference",
    "sft",
]

"""Frozen weights in fewer bits."""

from jaxft.quant.base import QUANTIZATIONS, QTensor
from jaxft.quant.nf4 import NF4Tensor

__all__ = ["QUANTIZATIONS", "NF4Tensor", "QTensor"]

"""Frozen weights in fewer bits."""

from jaxft.quant.base import QUANTIZATIONS, QTensor
from jaxft.quant.mxfp4 import MXFP4Tensor
from jaxft.quant.nf4 import NF4Tensor

__all__ = ["QUANTIZATIONS", "MXFP4Tensor", "NF4Tensor", "QTensor"]

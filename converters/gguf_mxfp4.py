"""MXFP4 weights in GGUF, whose blocks are those of OpenAI's checkpoints in another order of bits.

A block of 32 values is its scale's byte and 16 bytes of codes: byte i holds value i in its low bits and value 16 + i in
its high ones (`block_mxfp4` of ggml's src/ggml-common.h), where `MXFP4Tensor` puts neighbours into a byte.
"""

from __future__ import annotations

import numpy as np

from jaxft.quant import MXFP4Tensor
from jaxft.quant.mxfp4 import BLOCK_SIZE

_HALF = BLOCK_SIZE // 2


def to_blocks(weight: MXFP4Tensor) -> np.ndarray:
    """The file's bytes, uint8 [out, in / 32 * 17]."""
    codes, scales = np.asarray(weight.codes), np.asarray(weight.scales)
    pairs = codes.reshape(*scales.shape, _HALF)
    values = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*scales.shape, 2, _HALF)
    stored = values[..., 0, :] | (values[..., 1, :] << 4)
    return np.concatenate([scales[..., None], stored], axis=-1).reshape(len(codes), -1)


def from_blocks(stored: np.ndarray, shape: tuple[int, int]) -> MXFP4Tensor:
    """The inverse, of the bytes of a weight [out, in]."""
    rows, columns = shape
    blocks = stored.reshape(rows, columns // BLOCK_SIZE, 1 + _HALF)
    values = np.stack([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], axis=-2).reshape(rows, columns // 2, 2)
    codes = values[..., 0] | (values[..., 1] << 4)
    return MXFP4Tensor(codes, np.ascontiguousarray(blocks[..., 0]), shape=shape)

"""Checkpoints whose experts are in MXFP4, as OpenAI stores gpt-oss: read as they are, and written back bit by bit.

A tensor X of experts [E, in, out] (``model.layers.0.mlp.experts.down_proj``) is stored as

    X_blocks   uint8 [E, out, in / 32, 16], two codes a byte, the first in the low bits
    X_scales   uint8 [E, out, in / 32]

(`convert_moe_packed_tensors` of transformers, integrations/mxfp4.py); everything else as in any checkpoint. gate and up
take turns as rows of one X.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np

from converters.checkpoint import Checkpoint, ExpertCheckpoint, TensorInfo
from converters.expert_layout import StackExperts
from converters.hf_export import write_hf
from converters.hf_load import QUANTIZATION_CONFIG, HFCheckpoint
from converters.merge import DerivedCheckpoint
from jaxft.errors import JaxftError
from jaxft.quant import MXFP4Tensor, QTensor
from jaxft.quant.mxfp4 import BLOCK_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCKS, _SCALES = "_blocks", "_scales"
# In the checkpoint: the rows of gate and up in turn, or those of down.
_GATE_UP = ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight")
_STACKS = (
    StackExperts("mlp.experts.gate_up_proj", _GATE_UP, (0, 2, 1, 3)),
    StackExperts("mlp.experts.down_proj", ("mlp.experts.{}.down_proj.weight",), (0, 2, 1, 3)),
)
# What transformers does not quantize in these models.
_NOT_CONVERTED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


class MXFP4Checkpoint:
    """An open Hugging Face folder with experts in MXFP4; implements `Checkpoint` and `ExpertCheckpoint`.

    `tensors` and `read` give the experts decoded, in bfloat16, under their own names; `config` is that of the model
    before it was quantized.

    Raises:
      JaxftError: blocks without their scales, or of a shape that does not fit them.
    """

    def __init__(self, stored: HFCheckpoint) -> None:
        self._stored = stored
        self.config: dict[str, Any] = dict(stored.config)
        self.config.pop(QUANTIZATION_CONFIG)
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in stored.tensors.items():
            base = name.removesuffix(_BLOCKS)
            if base != name:
                experts, rows, columns = self._check(base)
                self.tensors[base] = TensorInfo((experts, columns, rows), np.dtype(ml_dtypes.bfloat16))
            elif not (name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in stored.tensors):
                self.tensors[name] = info
        self._sources = self._expert_sources()

    @property
    def where(self) -> str:
        """The folder's path."""
        return self._stored.where

    def expert(self, name: str) -> MXFP4Tensor | None:
        """The decoder's weight of that name as it is stored, of numpy arrays; None where it is not in MXFP4."""
        if name not in self._sources:
            return None
        fused, rows_of_expert = self._sources[name]
        codes, scales = (np.ascontiguousarray(array[rows_of_expert]) for array in self._parts(fused))
        return MXFP4Tensor(codes, scales, shape=(codes.shape[0], 2 * codes.shape[1]))

    def read(self, name: str) -> np.ndarray:
        """One tensor; what is in MXFP4 comes decoded, [E, in, out] in bfloat16."""
        if name + _BLOCKS not in self._stored.tensors:
            return self._stored.read(name)
        codes, scales = self._parts(name)
        weight = MXFP4Tensor(codes, scales, shape=(codes.shape[1], 2 * codes.shape[2]))
        return np.asarray(weight.dequantize(ml_dtypes.bfloat16)).swapaxes(1, 2)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The folder's tokenizer; None without its files."""
        return self._stored.tokenizer()

    def sidecars(self) -> dict[str, bytes]:
        """generation_config.json, tokenizer files, chat templates, licences."""
        return self._stored.sidecars()

    def _parts(self, fused: str) -> tuple[np.ndarray, np.ndarray]:
        """(codes [E, out, in / 2], scales [E, out, in / 32])."""
        scales = self._stored.read(fused + _SCALES)
        return self._stored.read(fused + _BLOCKS).reshape(*scales.shape[:2], -1), scales

    def _check(self, name: str) -> tuple[int, int, int]:
        """(E, out, in) of a weight whose parts fit each other."""
        blocks, scales = self._stored.tensors[name + _BLOCKS], self._stored.tensors.get(name + _SCALES)
        whole = len(blocks.shape) == 4 and blocks.shape[3] == BLOCK_SIZE // 2 and blocks.dtype == np.uint8
        if not whole or scales != TensorInfo(blocks.shape[:3], np.dtype(np.uint8)):
            found = "missing" if scales is None else f"{scales.dtype} {list(scales.shape)}"
            raise JaxftError(
                f"{self.where}, tensor {name}{_BLOCKS}",
                f"is {blocks.dtype} {list(blocks.shape)}, and its scales are {found}: not MXFP4",
            )
        return blocks.shape[0], blocks.shape[1], blocks.shape[2] * BLOCK_SIZE

    def _expert_sources(self) -> dict[str, tuple[str, tuple[int, slice]]]:
        """Decoder's name -> (the tensor that it is a part of, the expert and its rows)."""
        found: dict[str, tuple[str, tuple[int, slice]]] = {}
        for name in self.tensors:
            stack = next((stack for stack in _STACKS if name.endswith(stack.hf)), None)
            if stack is not None and name + _BLOCKS in self._stored.tensors:
                prefix, parts = name.removesuffix(stack.hf), len(stack.parts)
                for expert in range(self.tensors[name].shape[0]):
                    for index, part in enumerate(stack.parts):
                        found[prefix + part.format(expert)] = name, (expert, slice(index, None, parts))
        return found


def write_mxfp4(checkpoint: Checkpoint, path: Path, *, overwrite: bool = False) -> Path:
    """Writes `checkpoint` with its experts in MXFP4, as they are held, and returns the path.

    Raises:
      JaxftError: the checkpoint does not hold experts in MXFP4, or the folder is not empty or cannot be written to.
    """
    if not isinstance(checkpoint, ExpertCheckpoint):
        raise JaxftError(checkpoint.where, "holds no experts in MXFP4", "Write it in its own dtype")
    return write_hf(_Stored(checkpoint), path, overwrite=overwrite)


class _Part(NamedTuple):
    """One stored tensor: of which experts' weights, how joined, and whether it is their codes."""

    names: tuple[str, ...]
    join: Any
    of_codes: bool


class _Stored(DerivedCheckpoint):
    """The tensors as they are on disk: blocks and scales in the place of every weight in MXFP4."""

    def __init__(self, base: ExpertCheckpoint) -> None:
        super().__init__(base)
        self._experts = base
        self._of: dict[str, _Part] = {}
        self.tensors = {}
        for name, info in base.tensors.items():
            self.tensors |= self._stored(name, info) or {name: info}
        if not self._of:
            raise JaxftError(base.where, "holds no experts in MXFP4", "Write it in its own dtype")
        quantization = {"quant_method": "mxfp4", "modules_to_not_convert": list(_NOT_CONVERTED)}
        self.config = {**base.config, QUANTIZATION_CONFIG: quantization}

    def read(self, name: str) -> np.ndarray:
        """One tensor of the file."""
        if name not in self._of:
            return self._base.read(name)
        names, join, of_codes = self._of[name]
        weights = filter(_is_mxfp4, map(self._experts.expert, names))
        arrays = [np.asarray(weight.codes if of_codes else weight.scales) for weight in weights]
        return join(*arrays).reshape(self.tensors[name].shape)

    def _stored(self, name: str, info: TensorInfo) -> dict[str, TensorInfo]:
        """The parts of an experts' tensor that is held in MXFP4; none of any other."""
        stack = next((stack for stack in _STACKS if name.endswith(stack.hf)), None)
        if stack is None:
            return {}
        experts, columns, rows = info.shape
        prefix, shape = name.removesuffix(stack.hf), (rows // len(stack.parts), columns // 2)
        parts = {f"{prefix}{part.format(e)}": shape for e in range(experts) for part in stack.parts}
        if not all(_is_mxfp4(self._experts.expert(part)) for part in parts):
            return {}
        (source,) = stack.sources(parts)[0].values()
        scales = {part: (rows // len(stack.parts), columns // BLOCK_SIZE) for part in parts}
        (scale_source,) = stack.sources(scales)[0].values()
        self._of[name + _BLOCKS] = _Part(source.names, source.compute, True)
        self._of[name + _SCALES] = _Part(scale_source.names, scale_source.compute, False)
        blocks = (experts, rows, columns // BLOCK_SIZE, BLOCK_SIZE // 2)
        uint8 = np.dtype(np.uint8)
        return {name + _BLOCKS: TensorInfo(blocks, uint8), name + _SCALES: TensorInfo(blocks[:3], uint8)}


def _is_mxfp4(weight: QTensor | None) -> TypeGuard[MXFP4Tensor]:
    return isinstance(weight, MXFP4Tensor)


def is_mxfp4(config: dict[str, Any]) -> bool:
    """Whether a config.json says that its experts are in MXFP4."""
    quantization = config.get(QUANTIZATION_CONFIG)
    return isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"

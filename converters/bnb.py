"""Checkpoints whose linears bitsandbytes quantized to NF4, as transformers saves them and `unsloth/*-bnb-4bit` are.

A linear [out, in] is stored as

    X.weight                                   uint8 [out * in / 2, 1], two codes a byte, the first in the high bits
    X.weight.absmax                            float32 [blocks], or uint8 with double quantization
    X.weight.quant_map                         float32 [16]
    X.weight.nested_absmax, .nested_quant_map  float32 [nested blocks] and [256], with double quantization
    X.weight.quant_state.bitsandbytes__nf4     uint8, the bytes of a JSON object: quant_type, blocksize, dtype, shape
                                               and, doubly quantized, nested_blocksize, nested_dtype, nested_offset

(`QuantState.as_dict(packed=True)` of bitsandbytes, functional.py). Nothing is quantized again: codes, scales and maps
are used, and written, as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from converters.archs import arch_of
from converters.checkpoint import Checkpoint, QuantizedCheckpoint, TensorInfo
from converters.hf_export import write_hf
from converters.hf_files import CONFIG
from converters.hf_load import QUANTIZATION_CONFIG, HFCheckpoint
from converters.load import check
from converters.merge import DerivedCheckpoint
from converters.resume import origin_of
from jaxft.errors import JaxftError
from jaxft.models.params import quantizable_tensors
from jaxft.quant import NF4Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STATE = ".quant_state.bitsandbytes__"
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_FIELDS = {"nested_blocksize", "nested_dtype", "nested_offset"}


class QuantState(NamedTuple):
    """What the JSON object of a weight says.

    Attributes:
      shape: (out, in).
      dtype: of the weight before it was quantized.
      block_size: values an absmax.
      nested_block_size, nested_offset: of double quantization, or None.
    """

    shape: tuple[int, int]
    dtype: np.dtype
    block_size: int
    nested_block_size: int | None = None
    nested_offset: float | None = None


class BnbCheckpoint:
    """An open Hugging Face folder with NF4 weights; implements `converters.checkpoint.Checkpoint` and `quantized`.

    `tensors` and `read` give the weights decoded, under their own names; `config` is that of the model before it was
    quantized.

    Raises:
      JaxftError: another quantization than bitsandbytes' NF4, or tensors that do not fit each other, by file and name.
    """

    def __init__(self, stored: HFCheckpoint) -> None:
        self._stored = stored
        self.config: dict[str, Any] = dict(stored.config)
        _check_method(self.config.pop(QUANTIZATION_CONFIG), Path(stored.where) / CONFIG)
        self._states = {name.partition(_STATE)[0]: self._state(name) for name in self._stored.tensors if _STATE in name}
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(self._states[name].shape, self._states[name].dtype) if name in self._states else info
            for name, info in self._stored.tensors.items()
            if not any(part in self._states for part in _prefixes(name))
        }
        for name in self._states:
            self._check(name)

    @property
    def where(self) -> str:
        """The folder's path."""
        return self._stored.where

    @property
    def quantization(self) -> str:
        """For `converters.checkpoint.quantization_of`."""
        return "bitsandbytes NF4"

    def quantized(self, name: str) -> NF4Tensor | None:
        """The weight of that name as it is stored, or None where it is not quantized."""
        if name not in self._states:
            return None
        state = self._states[name]
        nested = state.nested_block_size is not None
        rows, columns = state.shape
        optional = {"block_size": state.block_size}
        if state.nested_block_size is not None:
            optional["nested_block_size"] = state.nested_block_size
        return NF4Tensor(
            self._part(name, "").reshape(rows, columns // 2),
            self._part(name, ".absmax"),
            self._part(name, ".nested_absmax") if nested else None,
            np.float32(state.nested_offset) if nested else None,
            self._part(name, ".quant_map"),
            self._part(name, ".nested_quant_map") if nested else None,
            shape=state.shape,
            **optional,
        )

    def read(self, name: str) -> np.ndarray:
        """One tensor; what is quantized comes decoded, in the dtype that it had before."""
        weight = self.quantized(name)
        if weight is None:
            return self._stored.read(name)
        return np.asarray(weight.dequantize(np.float32)).astype(self._states[name].dtype)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The folder's tokenizer; None without its files."""
        return self._stored.tokenizer()

    def sidecars(self) -> dict[str, bytes]:
        """generation_config.json, tokenizer files, chat templates, licences."""
        return self._stored.sidecars()

    def _part(self, name: str, suffix: str) -> Any:
        return self._stored.read(name + suffix)

    def _state(self, name: str) -> QuantState:
        where = f"{self.where}, tensor {name}"
        kind = name.partition(_STATE)[2]
        if kind != "nf4":
            raise JaxftError(where, f"is {kind}; only nf4 is supported", "Take a checkpoint with the original weights")
        return decode_state(self._stored.read(name).tobytes(), where)

    def _check(self, name: str) -> None:
        """The parts' shapes and dtypes, against what the state says."""
        state = self._states[name]
        values = state.shape[0] * state.shape[1]
        blocks = -(-values // state.block_size)
        expected = {"": ((values // 2, 1), np.uint8), ".quant_map": ((16,), np.float32)}
        if state.nested_block_size is None:
            expected[".absmax"] = ((blocks,), np.float32)
        else:
            expected[".absmax"] = ((blocks,), np.uint8)
            expected[".nested_absmax"] = ((-(-blocks // state.nested_block_size),), np.float32)
            expected[".nested_quant_map"] = ((256,), np.float32)
        for suffix, (shape, dtype) in expected.items():
            info = self._stored.tensors.get(name + suffix)
            if info != TensorInfo(shape, np.dtype(dtype)):
                found = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
                what = f"is {found} instead of {np.dtype(dtype)} {list(shape)}, which its quant state asks for"
                raise JaxftError(f"{self.where}, tensor {name}{suffix}", what)


def decode_state(content: bytes, where: object) -> QuantState:
    """The quant state behind the bytes of a `quant_state.bitsandbytes__nf4` tensor.

    Raises:
      JaxftError: not JSON, a field that is missing, unknown, or of a value that is not supported.
    """
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise JaxftError(where, f"is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise JaxftError(where, "must be a JSON object")
    nested = "nested_blocksize" in fields
    expected = _FIELDS | (_NESTED_FIELDS if nested else set())
    if set(fields) != expected:
        odd = ", ".join(sorted(set(fields) ^ expected))
        raise JaxftError(where, f"has too many or too few fields: {odd}")
    shape, block_size = fields["shape"], fields["blocksize"]
    good = (
        fields["quant_type"] == "nf4"
        and isinstance(fields["dtype"], str)
        and fields["dtype"] in _DTYPES
        and isinstance(shape, list)
        and len(shape) == 2
        and all(isinstance(n, int) and n > 0 for n in [*shape, block_size, fields.get("nested_blocksize", 1)])
        and shape[1] % 2 == 0
        and fields.get("nested_dtype", "float32") == "float32"
        and _is_float32(fields.get("nested_offset", 0.0))
    )
    if not good:
        raise JaxftError(where, f"holds values that are not supported: {fields}")
    return QuantState(
        (shape[0], shape[1]),
        _DTYPES[fields["dtype"]],
        block_size,
        fields.get("nested_blocksize"),
        fields.get("nested_offset"),
    )


def _is_float32(value: Any) -> bool:
    """Whether it is a number that float32 can hold; NaN is, and a sum that has one shows it."""
    return isinstance(value, float | int) and not abs(value) > float(np.finfo(np.float32).max)


def encode_state(weight: NF4Tensor, dtype: np.dtype) -> bytes:
    """The bytes that bitsandbytes writes for `weight`, whose values had `dtype`: the inverse of `decode_state`."""
    fields: dict[str, Any] = {"quant_type": "nf4", "blocksize": weight.block_size}
    fields |= {"dtype": dtype.name, "shape": list(weight.shape)}
    if weight.nested_offset is not None:
        fields |= {"nested_blocksize": weight.nested_block_size, "nested_dtype": "float32"}
        fields["nested_offset"] = float(np.asarray(weight.nested_offset))
    return json.dumps(fields).encode()


def stored_tensors(name: str, weight: NF4Tensor, dtype: np.dtype) -> dict[str, Any]:
    """The arrays that stand for one weight in a checkpoint, each as it is in `weight`: on the device or not."""
    parts = {
        "": weight.codes.reshape(-1, 1),
        ".absmax": weight.absmax,
        ".nested_absmax": weight.nested_absmax,
        ".nested_quant_map": weight.nested_quant_map,
        ".quant_map": weight.quant_map,
        f"{_STATE}nf4": np.frombuffer(encode_state(weight, dtype), np.uint8),
    }
    return {name + suffix: part for suffix, part in parts.items() if part is not None}


class NF4Checkpoint(DerivedCheckpoint):
    """`base` with the linears of its layers in NF4: as the base holds them, else quantized from its values.

    Raises:
      JaxftError: `base` is not understood (see `converters.load.check`).
    """

    def __init__(self, base: Checkpoint) -> None:
        super().__init__(base)
        config = check(base)
        linears = set(quantizable_tensors(config))
        layout = arch_of(base.config["model_type"], base.where).tensors(config)
        self._names = frozenset(name for name, source in layout.hf.items() if linears.issuperset(source.names))

    def origin(self) -> list[Any] | None:
        """The base's."""
        base = origin_of(self._base)
        return base and ["NF4", base]

    def quantized(self, name: str) -> NF4Tensor | None:
        """The weight in NF4; None for what stays as it is."""
        if name not in self._names:
            return None
        kept = self._base.quantized(name) if isinstance(self._base, QuantizedCheckpoint) else None
        return kept if isinstance(kept, NF4Tensor) else NF4Tensor.quantize(jnp.asarray(self._base.read(name)))

    def read(self, name: str) -> np.ndarray:
        """The base's values."""
        return self._base.read(name)


def write_bnb(checkpoint: Checkpoint, path: Path, *, overwrite: bool = False, card: str = "") -> Path:
    """Writes `checkpoint` as bitsandbytes stores it, the linears of its layers in NF4, and returns the path.

    Weights that are in NF4 already are written bit by bit; others are quantized, double quantization included.
    `card` is the text of a README.md.

    Raises:
      JaxftError: the checkpoint is not understood, or the folder is not empty or cannot be written to.
    """
    return write_hf(_Stored(NF4Checkpoint(checkpoint)), path, overwrite=overwrite, card=card)


class _Stored(DerivedCheckpoint):
    """The tensors as they are on disk: the parts of every NF4 weight in the place of its values."""

    def __init__(self, base: NF4Checkpoint) -> None:
        super().__init__(base)
        self._quantized = base
        self._owners: dict[str, str] = {}
        self._parts: tuple[str, dict[str, Any]] = ("", {})  # of the weight that was asked for last
        self.tensors = {}
        for name, info in base.tensors.items():
            parts = self._parts_of(name) or {name: info}
            self._owners |= dict.fromkeys(parts, name)
            self.tensors |= {
                part: TensorInfo(tuple(value.shape), np.dtype(value.dtype)) for part, value in parts.items()
            }
        double = any(name.endswith(".nested_absmax") for name in self.tensors)
        self.config = {**base.config, QUANTIZATION_CONFIG: quantization_config(double)}

    def origin(self) -> list[Any] | None:
        """The original's."""
        return origin_of(self._quantized)

    def read(self, name: str) -> np.ndarray:
        """One tensor of the file."""
        owner = self._owners[name]
        parts = self._parts_of(owner)
        return np.asarray(parts[name]) if parts else self._base.read(owner)

    def _parts_of(self, name: str) -> dict[str, Any]:
        if self._parts[0] != name:
            weight = self._quantized.quantized(name)
            dtype = self._quantized.tensors[name].dtype
            self._parts = (name, {} if weight is None else stored_tensors(name, weight, dtype))
        return self._parts[1]


def quantization_config(double_quantization: bool) -> dict[str, Any]:
    """What transformers' BitsAndBytesConfig writes into config.json for NF4."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quantization,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }


def _check_method(quantization: Any, where: Path) -> None:
    """Refuses everything but 4-bit NF4 of bitsandbytes."""
    fields = quantization if isinstance(quantization, dict) else {}
    method = fields.get("quant_method")
    if method != "bitsandbytes":
        what = f"{method or quantization} is not supported; bitsandbytes' NF4 is"
    elif not fields.get("load_in_4bit"):
        what = "8-bit weights (load_in_8bit) of bitsandbytes are not supported; NF4 is"
    elif fields.get("bnb_4bit_quant_type") != "nf4":
        what = f"bnb_4bit_quant_type {fields.get('bnb_4bit_quant_type')!r} is not supported; nf4 is"
    elif fields.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        what = f"bnb_4bit_quant_storage {fields['bnb_4bit_quant_storage']!r} is not supported; uint8 is"
    else:
        return
    raise JaxftError(f"{where}, field {QUANTIZATION_CONFIG}", what, "Take the checkpoint with the original weights")


def _prefixes(name: str) -> list[str]:
    """What `name` could be a part of: 'a.weight' for 'a.weight.absmax' and 'a.weight.quant_state.bitsandbytes__nf4'."""
    head, found, _ = name.rpartition(".weight.")
    return [f"{head}.weight"] if found else []

"""Which type each tensor of a GGUF file gets: llama.cpp's mixes, in which some matrices have more bits than the rest.

Source: llama.cpp's src/llama-quant.cpp (`llama_tensor_get_type_impl` and `tensor_type_fallback`,
https://github.com/ggml-org/llama.cpp); the tests compare with what `llama_model_quantize` writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type


class ModelFacts(NamedTuple):
    """What of a model decides about types, beside its tensors' names and shapes."""

    n_layers: int
    queries_per_key: int
    has_importance: bool = False
    n_experts: int = 0


class Choice(NamedTuple):
    """A tensor's type by the mix, and the one it gets: another where its rows are not whole blocks."""

    wanted: Type
    type: Type


_Condition = Callable[[int, ModelFacts], bool]


def _everywhere(_: int, __: ModelFacts) -> bool:
    return True


def _first(n: int) -> _Condition:
    return lambda layer, _: layer < n


def _first_part(n: int) -> _Condition:
    """The first n-th of the layers."""
    return lambda layer, model: layer < model.n_layers // n


def _more_bits(layer: int, model: ModelFacts) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = model.n_layers // 8
    return layer < eighth or layer >= 7 * model.n_layers // 8 or (layer - eighth) % 3 == 2


def _shared_keys(_: int, model: ModelFacts) -> bool:
    """With few key/value heads attn_v is so small that more bits cost little."""
    return model.queries_per_key >= 4


def _first_eighth(importance: bool) -> _Condition:
    """The first eighth of the layers, of files with or without an importance matrix."""
    return lambda layer, model: layer < model.n_layers // 8 and model.has_importance == importance


class _Rule(NamedTuple):
    """Tensors `blk.LAYER.PART.weight` are of this type where the condition holds."""

    part: str
    type: Type
    where: _Condition = _everywhere


class Mix(NamedTuple):
    """A kind of file: the type of most matrices, `general.file_type`, and exceptions, of which the first counts."""

    type: Type
    file_type: LlamaFileType
    rules: tuple[_Rule, ...] = ()


_IQ4_RULES = (_Rule("attn_v", Type.Q5_K, _shared_keys), _Rule("ffn_down", Type.Q5_K, _first_eighth(importance=False)))
_M_RULES = (_Rule("attn_v", Type.Q6_K, _more_bits), _Rule("ffn_down", Type.Q6_K, _more_bits))
_TERNARY_RULES = (_Rule("token_embd", Type.Q4_K),)

MIXES = {
    "f32": Mix(Type.F32, LlamaFileType.ALL_F32),
    "f16": Mix(Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": Mix(Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": Mix(Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": Mix(Type.Q4_0, LlamaFileType.MOSTLY_Q4_0, (_Rule("ffn_down", Type.Q4_1, _first_eighth(importance=True)),)),
    "q4_1": Mix(Type.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q5_0": Mix(Type.Q5_0, LlamaFileType.MOSTLY_Q5_0, (_Rule("ffn_down", Type.Q5_1, _first_eighth(importance=True)),)),
    "q5_1": Mix(Type.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q2_k": Mix(
        Type.Q2_K,
        LlamaFileType.MOSTLY_Q2_K,
        (
            _Rule("attn_v", Type.Q4_K, _shared_keys),
            _Rule("attn_v", Type.Q3_K),
            _Rule("attn_output", Type.Q3_K),
            _Rule("ffn_down", Type.Q3_K),
        ),
    ),
    "q3_k_s": Mix(Type.Q3_K, LlamaFileType.MOSTLY_Q3_K_S),
    "q3_k_m": Mix(
        Type.Q3_K,
        LlamaFileType.MOSTLY_Q3_K_M,
        (
            _Rule("attn_v", Type.Q5_K, _first(2)),
            _Rule("attn_v", Type.Q4_K),
            _Rule("attn_output", Type.Q4_K),
            _Rule("ffn_down", Type.Q5_K, _first_part(16)),
            _Rule("ffn_down", Type.Q4_K),
        ),
    ),
    "q3_k_l": Mix(
        Type.Q3_K,
        LlamaFileType.MOSTLY_Q3_K_L,
        (_Rule("attn_v", Type.Q5_K), _Rule("attn_output", Type.Q5_K), _Rule("ffn_down", Type.Q5_K)),
    ),
    "q4_k_s": Mix(
        Type.Q4_K,
        LlamaFileType.MOSTLY_Q4_K_S,
        (_Rule("attn_v", Type.Q5_K, _first(4)), _Rule("ffn_down", Type.Q5_K, _first_part(8))),
    ),
    "q4_k_m": Mix(Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, _M_RULES),
    "q5_k_s": Mix(Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_S),
    "q5_k_m": Mix(Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_M, _M_RULES),
    "q6_k": Mix(Type.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "iq4_nl": Mix(Type.IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL, _IQ4_RULES),
    "iq4_xs": Mix(Type.IQ4_XS, LlamaFileType.MOSTLY_IQ4_XS, _IQ4_RULES),
    # llama.cpp keeps MXFP4 for the experts of a mixture.
    "mxfp4": Mix(
        Type.Q8_0,
        LlamaFileType.MOSTLY_MXFP4_MOE,
        tuple(_Rule(f"ffn_{part}_exps", Type.MXFP4) for part in ("gate", "up", "down")),
    ),
    "tq1_0": Mix(Type.TQ1_0, LlamaFileType.MOSTLY_TQ1_0, _TERNARY_RULES),
    "tq2_0": Mix(Type.TQ2_0, LlamaFileType.MOSTLY_TQ2_0, _TERNARY_RULES),
}

# Attention is a small part of Mixtral, so its matrices get more bits in llama.cpp's files.
_EIGHT_EXPERTS = 8
_LOW_BITS = (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.IQ4_NL, Type.IQ4_XS)


def _rules_of_eight_experts(mix: Mix) -> tuple[_Rule, ...]:
    rules = (_Rule("attn_v", Type.Q8_0), _Rule("attn_k", Type.Q8_0))
    few = mix.type in _LOW_BITS and mix.file_type != LlamaFileType.MOSTLY_Q3_K_L
    return (*rules, _Rule("attn_output", Type.Q5_K)) if few else rules


_UNQUANTIZED = (Type.F32, Type.F16, Type.BF16)

# For rows that are whole blocks of 32 but not of 256; a type that is not here gives way to float16.
_FALLBACKS = {
    Type.IQ4_XS: Type.IQ4_NL,
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
    Type.TQ1_0: Type.Q4_0,
    Type.TQ2_0: Type.Q4_0,
}


def choose_types(mix: Mix, shapes: Mapping[str, tuple[int, ...]], model: ModelFacts) -> dict[str, Choice]:
    """The type of every tensor of a file.

    Args:
      mix: a row of `MIXES`.
      shapes: GGUF name -> shape [..., columns] of every tensor; without "output.weight" the head is tied.
      model: of the same model.
    """
    tied = "output.weight" not in shapes
    wanted = {name: _wanted(mix, name, shape, model, tied=tied) for name, shape in shapes.items()}
    return {name: Choice(kind, _fitting(kind, shapes[name][-1])) for name, kind in wanted.items()}


def stays_exact(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is in float32 in files of any type: vectors, norms, biases, and what chooses experts."""
    return len(shape) == 1 or not name.endswith(".weight") or name.endswith("_norm.weight") or "ffn_gate_inp" in name


def _wanted(mix: Mix, name: str, shape: tuple[int, ...], model: ModelFacts, *, tied: bool) -> Type:
    if stays_exact(name, shape):
        return Type.F32
    if mix.type in _UNQUANTIZED:
        return mix.type
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        whole = shape[-1] % GGML_QUANT_SIZES[mix.type][0] == 0
        return Type.Q6_K if whole and mix.type != Type.Q8_0 else Type.Q8_0
    return _by_rules(mix, name, model)


def _by_rules(mix: Mix, name: str, model: ModelFacts) -> Type:
    part = name.split(".")[-2]
    layer = re.match(r"blk\.(\d+)\.", name)
    number = int(layer[1]) if layer else 0
    rules = mix.rules
    if model.n_experts == _EIGHT_EXPERTS:
        rules = (*_rules_of_eight_experts(mix), *(rule for rule in rules if rule.part != "attn_output"))
    # Experts' and shared experts' linears are under their MLP's rules, but for those of their own.
    parts = (part, part.removesuffix("_exps").removesuffix("_shexp"))
    kind = next((rule.type for rule in rules if rule.part in parts and rule.where(number, model)), mix.type)
    # llama.cpp's "70B" is 80 layers with shared keys: its attn_v is an eighth of attn_q.
    if part == "attn_v" and model.n_layers == 80 and model.queries_per_key > 1 and kind in (Type.Q3_K, Type.Q4_K):
        return Type.Q5_K
    return kind


def _fitting(kind: Type, columns: int) -> Type:
    for fitting in (kind, _FALLBACKS.get(kind, Type.F16)):
        if columns % GGML_QUANT_SIZES[fitting][0] == 0:
            return fitting
    return Type.F16

"""What an architecture is to the converters: how its HF config reads, and how its tensors are named in GGUF."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from converters.archs.gguf_keys import (
    Facts,
    MetadataReader,
    Row,
    check_fact,
    facts_of,
    usual_facts,
    value_of,
    values_of,
)
from converters.expert_layout import StackExperts
from converters.layout import Layout, LayoutOp, Shape, layout_of
from converters.tensor_ops import TensorOp
from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig, RopeKind
from jaxft.models.params import expected_tensors

# Fields of config.json that say nothing about the forward pass.
IGNORED_FIELDS = frozenset(
    (
        "_name_or_path", "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
        "torch_dtype", "transformers_version", "use_cache", "initializer_range", "name", "model_type",
        "is_llama_config", "rope_interleaved", "attn_implementation", "_attn_implementation_autoset", "unsloth_fixed",
        "unsloth_version", "id2label", "label2id", "task_specific_params", "chunk_size_feed_forward",
        "output_attentions", "output_hidden_states", "return_dict", "problem_type", "transformers.js_config",
    )
)  # fmt: skip

# Of transformers' classes, where a family's has no other.
_DEFAULTS = {"rope_theta": 10_000.0}


class ConfigReader:
    """Reads an HF config so that no field goes unnoticed: each is taken, ignorable, at its default, or refused.

    Args:
      config: as config.json has it.
      where: what errors name.
      defaults: of fields that are missing, as of `ArchSpec`; a null in `config` stays one.
    """

    def __init__(self, config: dict[str, Any], where: object, defaults: Mapping[str, Any] | None = None) -> None:
        self._left = {k: v for k, v in config.items() if k not in IGNORED_FIELDS}
        self._where = where
        self._defaults = defaults or {}

    def take(self, name: str, default: Any = dataclasses.MISSING) -> Any:
        """The field's value; where it is null, or missing and not among `defaults`: `default` (none: it is refused)."""
        value = self._left.pop(name, self._defaults.get(name))
        if value is None:
            if default is dataclasses.MISSING:
                raise JaxftError(f"{self._where}, field {name}", "is missing or null")
            return default
        return value

    def peek(self, name: str) -> Any:
        """The field's value, which is left for whoever takes it; None where it is missing."""
        return self._left.get(name, self._defaults.get(name))

    def refuse(self, name: str, value: Any, supported: str) -> JaxftError:
        """The error for a value that is known to HF but not implemented here."""
        return JaxftError(f"{self._where}, field {name}", f"the value {value!r} is not supported (only {supported})")

    def expect(self, name: str, default: Any) -> None:
        """The field is not implemented: it may only have the value that means 'off'."""
        value = self._left.pop(name, default)
        if value != default and value is not None:
            raise self.refuse(name, value, repr(default))

    def ignore(self, *names: str) -> None:
        """These say nothing of what transformers' class computes, or say again what other fields say."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        """Refuses whatever was not asked for."""
        if self._left:
            fields = ", ".join(f"{k} = {v!r}" for k, v in sorted(self._left.items()))
            raise JaxftError(
                self._where,
                f"unknown config fields: {fields}",
                "They may change what the model computes; teach the family's ArchSpec about them",
            )


# llama.cpp's numbers for what makes scores of a router's logits.
GATING = {"softmax": 1, "sigmoid": 2}


@dataclasses.dataclass(frozen=True)
class GGUFArch:
    """An architecture's facts in GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

    Tensor names are not among them: gguf's own name map knows them.

    Attributes:
      name: `general.architecture`, also the prefix of its keys.
      rows: its keys, and the tensors whose presence says something, in the order of llama.cpp's converter.
      graph: fields of the decoder's config, `moe` and `mla` included, that llama.cpp's graph of the architecture fixes,
        and their values, or functions of the decoder's facts. What neither `rows` nor this name has its default there.
      hf: fields of an HF config that follow from that, and their values, or functions of the fields that were read.
      tensor_ops: reversible changes from HF tensors to GGUF's; none for most tensors.
      gating: the key of `GATING`, where llama.cpp has one name for architectures that differ by it.
      layout: how the tensors of a file differ from those of an HF checkpoint, which are the decoder's side of the ops.
      no_adapters: linears that llama.cpp's graph multiplies without a LoRA adapter, as their names end.
    """

    name: str
    rows: tuple[Row, ...]
    graph: Facts = dataclasses.field(default_factory=dict)
    hf: Facts = dataclasses.field(default_factory=dict)
    tensor_ops: tuple[TensorOp, ...] = ()
    gating: str | None = None
    layout: Callable[[DecoderConfig], Sequence[LayoutOp]] = lambda config: ()
    no_adapters: tuple[str, ...] = ()

    def describes(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a file of this name is of this architecture."""
        experts = any("num_experts" in row.says for row in self.rows)
        if bool(metadata.get(f"{self.name}.expert_count")) != experts:
            return False
        gating = metadata.get(f"{self.name}.expert_gating_func", GATING["softmax"])
        return self.gating is None or GATING[self.gating] == gating

    def read_config(self, reader: MetadataReader) -> dict[str, Any]:
        """The fields of an HF config that are the architecture's own, from a file's keys."""
        fields: dict[str, Any] = {}
        # What a key may only say follows from the others.
        for row in sorted(self.rows, key=lambda row: row.hf is None):
            fields |= row.read(reader, fields)
        return fields | values_of(self.hf, fields)

    def write_metadata(self, config: DecoderConfig) -> dict[str, int | float | str]:
        """The inverse: {key without the prefix: value}.

        Raises:
          JaxftError: a fact that llama.cpp's graph of the architecture does not have.
        """
        facts = facts_of(config)
        said = {name for row in self.rows for name in row.says}
        for name, usual in usual_facts(config).items():
            if name in self.graph or name not in said:
                check_fact(name, facts[name], (value_of(self.graph.get(name, usual), facts),))
        return {key: value for row in self.rows for key, value in row.write(facts).items()}

    def in_file(self, hf_shapes: Mapping[str, Shape], config: DecoderConfig) -> Layout:
        """Of HF's tensors, here `decoder`, and a file's, `hf`: those have HF's names, or what would be theirs."""
        return layout_of(hf_shapes, self.layout(config))

    def to_gguf(self, name: str, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
        """The HF tensor `name` as GGUF stores it; `config` is the HF config."""
        for op in self.tensor_ops:
            if name.endswith(op.suffix):
                array = op.apply(array, config)
        return array

    def from_gguf(self, name: str, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
        """The inverse of `to_gguf`."""
        for op in reversed(self.tensor_ops):
            if name.endswith(op.suffix):
                array = op.invert(array, config)
        return array


@dataclasses.dataclass(frozen=True)
class ArchSpec:
    """One row of the registry: everything that is particular about one HF `model_type`.

    Attributes:
      model_type: as config.json spells it.
      architecture: the HF class, as in config.json's `architectures`.
      read_config: reads a ConfigReader into a DecoderConfig; must consume every field.
      gguf: None when GGUF cannot hold this architecture.
      models: what it covers, in words.
      defaults: what fields of config.json are that it leaves out, where transformers' class says more than that there
        is no such thing.
      layout: how the tensors of an HF checkpoint differ from the decoder's.
      expert_parameters: how transformers' class holds the experts' weights, which peft's target_parameters name, in the
        class's order.
      no_greedy: the kinds of RoPE with which greedy tokens were not compared with transformers'.
    """

    model_type: str
    architecture: str
    read_config: Callable[[ConfigReader], DecoderConfig]
    gguf: GGUFArch | None
    models: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layout: tuple[LayoutOp, ...] = ()
    expert_parameters: tuple[StackExperts, ...] = ()
    no_greedy: tuple[RopeKind, ...] = ()

    def decoder_config(self, config: dict[str, Any], where: object) -> DecoderConfig:
        """The DecoderConfig of an HF config dict; raises JaxftError on any field that is not understood."""
        reader = ConfigReader(config, where, {**_DEFAULTS, **self.defaults})
        try:
            result = self.read_config(reader)
            hash(result)  # a list or an object where there should be one value
        except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
            # A string where a number should be, and the like: which field it is, only its value tells.
            raise JaxftError(
                where, f"a field has a value of the wrong kind: {error}", "Fetch config.json again"
            ) from error
        reader.finish()
        for part in (result, *result.ropes.values(), result.moe):
            _check_kinds(part, where)
        return result

    def tensors(self, config: DecoderConfig) -> Layout:
        """Every tensor of an HF checkpoint and of the decoder of this config."""
        return layout_of(expected_tensors(config), self.layout)


def _check_kinds(config: Any, where: object) -> None:
    """Refuses what is no number, and no true or false, in a dataclass' fields that are one."""
    kinds = {"float": (int, float), "float | None": (int, float, type(None)), "bool": bool}
    for field in dataclasses.fields(config) if config is not None else ():
        value, kind = getattr(config, field.name), kinds.get(str(field.type))
        if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise JaxftError(f"{where}, field {field.name}", f"has a value of the wrong kind: {value!r}")

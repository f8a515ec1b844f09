"""What an architecture is to the converters: how its HF config reads, and how its tensors are named in GGUF."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from converters.tensor_ops import TensorOp
from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig

# Fields of config.json that say nothing about the forward pass.
IGNORED_FIELDS = frozenset(
    """_name_or_path architectures auto_map bos_token_id eos_token_id pad_token_id dtype torch_dtype transformers_version
    use_cache initializer_range name model_type is_llama_config rope_interleaved attn_implementation
    _attn_implementation_autoset unsloth_fixed unsloth_version id2label label2id task_specific_params chunk_size_feed_forward
    output_attentions output_hidden_states return_dict problem_type""".split()
)


class ConfigReader:
    """Reads an HF config so that no field goes unnoticed: each is taken, ignorable, at its default, or refused."""

    def __init__(self, config: dict[str, Any], where: object) -> None:
        self._left = {k: v for k, v in config.items() if k not in IGNORED_FIELDS}
        self._where = where

    def take(self, name: str, default: Any = dataclasses.MISSING) -> Any:
        """The field's value, or `default` where it is missing or null (no default: it must be there)."""
        value = self._left.pop(name, None)
        if value is None:
            if default is dataclasses.MISSING:
                raise JaxftError(f"{self._where}, field {name}", "is missing")
            return default
        return value

    def refuse(self, name: str, value: Any, supported: str) -> JaxftError:
        """The error for a value that is known to HF but not implemented here."""
        return JaxftError(f"{self._where}, field {name}", f"the value {value!r} is not supported (only {supported})")

    def expect(self, name: str, default: Any) -> None:
        """The field is not implemented: it may only have the value that means 'off'."""
        value = self._left.pop(name, default)
        if value != default and value is not None:
            raise self.refuse(name, value, repr(default))

    def finish(self) -> None:
        """Refuses whatever was not asked for."""
        if self._left:
            fields = ", ".join(f"{k} = {v!r}" for k, v in sorted(self._left.items()))
            raise JaxftError(
                self._where,
                f"unknown config fields: {fields}",
                "They may change what the model computes, so they are not ignored; teach the family's ArchSpec about them",
            )


@dataclasses.dataclass(frozen=True)
class GGUFArch:
    """An architecture's facts in GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

    Attributes:
      name: `general.architecture`, also the prefix of its keys.
      read_config: GGUF metadata {key: value} -> HF config dict.
      write_metadata: HF config dict -> {key without the prefix: value} in the order llama.cpp's converter writes.
      tensor_ops: reversible changes from HF tensors to GGUF's; none for most tensors.
    """

    name: str
    read_config: Callable[[dict[str, Any]], dict[str, Any]]
    write_metadata: Callable[[dict[str, Any]], dict[str, Any]]
    tensor_ops: tuple[TensorOp, ...] = ()


@dataclasses.dataclass(frozen=True)
class ArchSpec:
    """One row of the registry: everything that is particular about one HF `model_type`.

    Attributes:
      model_type: as config.json spells it.
      architecture: the HF class, as in config.json's `architectures`.
      read_config: reads a ConfigReader into a DecoderConfig; must consume every field.
      gguf: None when GGUF cannot hold this architecture.
    """

    model_type: str
    architecture: str
    read_config: Callable[[ConfigReader], DecoderConfig]
    gguf: GGUFArch | None

    def decoder_config(self, config: dict[str, Any], where: object) -> DecoderConfig:
        """The DecoderConfig of an HF config dict; raises JaxftError on any field that is not understood."""
        reader = ConfigReader(config, where)
        result = self.read_config(reader)
        reader.finish()
        return result

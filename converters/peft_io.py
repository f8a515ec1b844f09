"""PEFT adapters in and out: adapter_config.json and adapter_model.safetensors, as peft 0.21 writes them.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.checkpoint import TensorInfo
from converters.hf_files import ADAPTER_CONFIG, read_json, write_json
from converters.safetensors_io import SafetensorsFile, write_safetensors
from jaxft.errors import JaxftError
from jaxft.files import new_folder
from jaxft.lora import LoraConfig

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"

# What a plain LoRA adapter says in each field; `make_adapter` fills in what differs.
_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# Fields that are honoured, or that say nothing about what the trained adapter computes. Any other may only say "off".
_FREE = frozenset(
    """alpha_pattern auto_mapping base_model_name_or_path ensure_weight_tying exclude_modules inference_mode
    init_lora_weights layers_pattern lora_alpha lora_dropout megatron_core peft_version qalora_group_size r rank_pattern
    revision target_modules use_rslora""".split()  # noqa: SIM905
)
# Ways to start from that leave the base weights alone; others (PiSSA, OLoRA, LoftQ ...) train against a changed base.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
      config: adapter_config.json, key by key as stored.
      tensors: HF module path + ".lora_A.weight" [r, in] or ".lora_B.weight" [out, r], without PEFT's
        "base_model.model." in front.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def modules(self) -> list[str]:
        """HF paths of the adapted linears: 'model.layers.3.self_attn.q_proj'."""
        return [name.removesuffix(_A) for name in self.tensors if name.endswith(_A)]


def make_adapter(
    config: LoraConfig, tensors: Mapping[str, np.ndarray], *, base_model_name_or_path: str | None
) -> Adapter:
    """An Adapter with every field of adapter_config.json that peft writes."""
    fields = {
        **_DEFAULTS,
        "base_model_name_or_path": base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(config.target_modules),
        "use_rslora": config.use_rslora,
    }
    return Adapter(fields, dict(tensors))


def lora_config_of(adapter: Adapter) -> LoraConfig:
    """The settings of an adapter whose rank and scale are the same everywhere; its targets are what its tensors adapt.

    Raises:
      JaxftError: rank_pattern or alpha_pattern gives modules ranks or scales of their own.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        if adapter.config.get(field):
            raise JaxftError(
                f"{ADAPTER_CONFIG}, field {field}",
                f"{adapter.config[field]!r}: ranks and scales of single modules can be merged, but not trained",
            )
    targets = dict.fromkeys(module.rsplit(".", 1)[-1] for module in adapter.modules)
    return LoraConfig(
        r=_field(adapter.config, "r"),
        lora_alpha=_field(adapter.config, "lora_alpha"),
        lora_dropout=_field(adapter.config, "lora_dropout"),
        target_modules=tuple(targets),
        use_rslora=_field(adapter.config, "use_rslora"),
    )


def rank_of(adapter: Adapter, module: str) -> int:
    """The rank of one module, by r and rank_pattern."""
    return _by_pattern(adapter.config, "rank_pattern", "r", module)


def scale_of(adapter: Adapter, module: str) -> float:
    """What B A x is multiplied by in one module: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
    rank = rank_of(adapter, module)
    alpha = _by_pattern(adapter.config, "alpha_pattern", "lora_alpha", module)
    return alpha / (math.sqrt(rank) if _field(adapter.config, "use_rslora") else rank)


def read_adapter(path: Path | str) -> Adapter:
    """Reads an adapter folder.

    Raises:
      JaxftError: a file is missing or corrupt; a field asks for what is not implemented; tensors that are not LoRA's,
        come without their partner, or have another rank than the config says (all are listed).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise JaxftError(folder, "is not a folder" if folder.exists() else "does not exist")
    config = read_json(folder / ADAPTER_CONFIG)
    _check_config(config, folder / ADAPTER_CONFIG)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise JaxftError(
            folder / "adapter_model.bin",
            "is a pickle, which can run any code when it is opened",
            "Load and save the adapter with peft where you trust it; save_pretrained writes safetensors",
        )
    file = SafetensorsFile(folder / WEIGHTS)
    # Copies, so that the adapter outlives its files.
    adapter = Adapter(config, {name.removeprefix(_PREFIX): np.array(file.read(name)) for name in file.tensors})
    _check_tensors(adapter, folder / WEIGHTS)
    return adapter


def write_adapter(adapter: Adapter, path: Path, *, overwrite: bool = False) -> Path:
    """Writes an adapter folder that peft loads, and returns its path; the folder appears when it is complete.

    Raises:
      JaxftError: the folder is not empty or cannot be written to, or `read_adapter` would refuse the adapter.
    """
    _check_config(adapter.config, ADAPTER_CONFIG)
    _check_tensors(adapter, WEIGHTS)
    tensors = {_PREFIX + name: array for name, array in sorted(adapter.tensors.items())}
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in tensors.items()}
    with new_folder(path, overwrite=overwrite) as folder:
        write_json(folder / ADAPTER_CONFIG, adapter.config, sort_keys=True)
        write_safetensors(folder / WEIGHTS, infos, tensors.__getitem__)
    return path


def _field(config: dict[str, Any], name: str) -> Any:
    """A field's value; peft leaves none out, but older versions lack some."""
    return config.get(name, _DEFAULTS[name])


def _by_pattern(config: dict[str, Any], pattern_field: str, field: str, module: str) -> Any:
    """As peft looks it up: the first pattern that matches the end of the module's path, else the field."""
    for pattern, value in _field(config, pattern_field).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return _field(config, field)


def _check_config(config: dict[str, Any], where: object) -> None:
    """Refuses, all at once, fields that change what the adapter computes and are not implemented."""
    if config.get("peft_type") != "LORA":
        raise JaxftError(f"{where}, field peft_type", f"{config.get('peft_type')!r} is not supported (only 'LORA')")
    active = {name for name, value in config.items() if name not in _FREE and value and value != _DEFAULTS.get(name)}
    problems = [f"{name} = {config[name]!r}" for name in sorted(active)]
    if _field(config, "init_lora_weights") not in _PLAIN_STARTS:
        problems.append(f"init_lora_weights = {config['init_lora_weights']!r}")
    if problems:
        raise JaxftError(where, f"not supported: {', '.join(problems)}", "Only plain LoRA on linears is, for now")
    _check_numbers(config, where)


def _check_numbers(config: dict[str, Any], where: object) -> None:
    patterns = {name: _field(config, name) for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise JaxftError(f"{where}, field {name}", f"must be an object, not {pattern!r}")
    for name, rank in {"r": _field(config, "r"), **patterns["rank_pattern"]}.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise JaxftError(f"{where}, rank of {name}", f"must be a positive integer, not {rank!r}")
    dropout = _field(config, "lora_dropout")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise JaxftError(f"{where}, field lora_dropout", f"must be a number in [0, 1), not {dropout!r}")
    for name, alpha in {"lora_alpha": _field(config, "lora_alpha"), **patterns["alpha_pattern"]}.items():
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise JaxftError(f"{where}, alpha of {name}", f"must be a number, not {alpha!r}")


def _check_tensors(adapter: Adapter, where: object) -> None:
    problems = [f"{name} is not a LoRA matrix" for name in adapter.tensors if not name.endswith((_A, _B))]
    for name in adapter.tensors:
        partner = name.removesuffix(_A) + _B if name.endswith(_A) else name.removesuffix(_B) + _A
        if name.endswith((_A, _B)) and partner not in adapter.tensors:
            problems.append(f"{name} has no {partner}")
    for module in adapter.modules:
        problems += _rank_problems(adapter, module)
    if not adapter.tensors:
        problems.append("there are none")
    if problems:
        raise JaxftError(where, f"its tensors are not those of a LoRA adapter: {'; '.join(problems)}")


def _rank_problems(adapter: Adapter, module: str) -> list[str]:
    rank = rank_of(adapter, module)
    problems = []
    for suffix, axis in ((_A, 0), (_B, 1)):
        array = adapter.tensors.get(module + suffix)
        if array is not None and (array.ndim != 2 or array.shape[axis] != rank):
            problems.append(f"{module}{suffix} is {list(array.shape)}, but its rank should be {rank}")
    return problems

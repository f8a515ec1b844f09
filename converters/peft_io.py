"""PEFT adapters in and out: adapter_config.json and adapter_model.safetensors, as peft 0.21 writes them.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import numpy as np

from converters.checkpoint import TensorInfo
from converters.hf_files import ADAPTER_CONFIG, read_json, write_json
from converters.load import EMBEDDING, HEAD
from converters.model_card import carry_card
from converters.safetensors_io import SafetensorsFile, write_safetensors
from jaxft.errors import JaxftError
from jaxft.files import new_folder
from jaxft.lora import Bias, LoraConfig

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer"  # what peft puts into the names of an adapted module's own parameters
_OWN_PARAMETER = re.compile(rf"\{_BASE_LAYER}\.(?!lora_|base_layer)")
_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
_MAGNITUDE = ".lora_magnitude_vector"
_PARTNERS = {_A: _B, _B: _A, _EMBEDDING_A: _EMBEDDING_B, _EMBEDDING_B: _EMBEDDING_A}
_RANK_AXIS = {_A: 0, _B: 1, _EMBEDDING_A: 0, _EMBEDDING_B: 1}

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
    """alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying exclude_modules inference_mode
    init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core modules_to_save
    peft_version qalora_group_size r rank_pattern revision target_modules target_parameters use_dora
    use_rslora""".split()  # noqa: SIM905
)
# Ways to start from that leave the base weights alone; others (PiSSA, OLoRA, LoftQ ...) train against a changed base.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
_LARGEST_ALPHA = 1e30  # fits a float32


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
      config: adapter_config.json, key by key as stored.
      tensors: by HF module path, without PEFT's "base_model.model." in front. Of an adapted linear ".lora_A.weight"
        [r, in] and ".lora_B.weight" [out, r], of an embedding ".lora_embedding_A" [r, V] and ".lora_embedding_B"
        [D, r]; with DoRA ".lora_magnitude_vector" [out]. Parameters of the base that trained as well (modules_to_save,
        biases) have their own names.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def modules(self) -> list[str]:
        """HF paths of the adapted modules: 'model.layers.3.self_attn.q_proj'."""
        return [_split(name)[0] for name in self.tensors if name.endswith((_A, _EMBEDDING_A))]

    @property
    def whole(self) -> list[str]:
        """Names of the base's parameters that it replaces: 'lm_head.weight'."""
        return [name for name in self.tensors if not _split(name)[1]]


def _split(name: str) -> tuple[str, str]:
    """A tensor's name as (module, which part of its adapter it is); the second is empty for the base's parameters."""
    suffix = next((suffix for suffix in (*_PARTNERS, _MAGNITUDE) if name.endswith(suffix)), "")
    return name.removesuffix(suffix), suffix


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
        "target_modules": _as_json(config.target_modules),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "bias": config.bias,
        "modules_to_save": _as_json(config.modules_to_save) or None,
        "exclude_modules": _as_json(config.exclude_modules) or None,
        "layers_to_transform": _as_json(config.layers_to_transform),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "init_lora_weights": config.init_lora_weights,
        "ensure_weight_tying": config.ensure_weight_tying,
    }
    return Adapter(fields, dict(tensors))


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def lora_config_of(adapter: Adapter) -> LoraConfig:
    """The settings of an adapter; what it targets is what its tensors adapt."""
    settings = _settings(adapter.config)
    targets = dict.fromkeys(module.rsplit(".", 1)[-1] for module in adapter.modules)
    by_name = dataclasses.replace(settings, target_modules=tuple(targets))
    if isinstance(settings.target_modules, str) or not all(map(by_name.is_target, adapter.modules)):
        return dataclasses.replace(settings, target_modules=tuple(adapter.modules), exclude_modules=())
    return by_name


def _settings(config: dict[str, Any]) -> LoraConfig:
    """adapter_config.json as it stands; what A and B started from is past."""
    layers, targets = _field(config, "layers_to_transform"), _field(config, "target_modules")
    return LoraConfig(
        r=_field(config, "r"),
        lora_alpha=_field(config, "lora_alpha"),
        lora_dropout=_field(config, "lora_dropout"),
        target_modules=targets if isinstance(targets, str) else tuple(targets or ()),
        use_rslora=_field(config, "use_rslora"),
        use_dora=_field(config, "use_dora"),
        bias=_field(config, "bias"),
        modules_to_save=tuple(_field(config, "modules_to_save") or ()),
        exclude_modules=_names(_field(config, "exclude_modules")),
        layers_to_transform=(layers,) if isinstance(layers, int) else None if layers is None else tuple(layers),
        rank_pattern=_field(config, "rank_pattern"),
        alpha_pattern=_field(config, "alpha_pattern"),
        ensure_weight_tying=_field(config, "ensure_weight_tying"),
    )


def _names(value: list[str] | str | None) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else tuple(value or ())


def rank_of(adapter: Adapter, module: str) -> int:
    """The rank of one module, by r and rank_pattern."""
    return _settings(adapter.config).rank_of(module)


def scale_of(adapter: Adapter, module: str) -> float:
    """What B A x is multiplied by in one module: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
    return _settings(adapter.config).scale_of(module)


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
    tensors = {name: np.array(file.read(name)) for name in file.tensors}
    names = {name: _OWN_PARAMETER.sub(".", name.removeprefix(_PREFIX)) for name in tensors}
    adapter = _with_tied_head_once(Adapter(config, {names[name]: array for name, array in tensors.items()}))
    _check_tensors(adapter, folder / WEIGHTS)
    return adapter


def write_adapter(adapter: Adapter, path: Path, *, overwrite: bool = False, card: str = "") -> Path:
    """Writes an adapter folder that peft loads, and returns its path; the folder appears when it is complete.

    `card` is the text of a README.md.

    Raises:
      JaxftError: the folder is not empty or cannot be written to, or `read_adapter` would refuse the adapter.
    """
    _check_config(adapter.config, ADAPTER_CONFIG)
    _check_tensors(adapter, WEIGHTS)
    named = dict(adapter.tensors)
    if _keeps_tied(adapter) and EMBEDDING in named:
        named.setdefault(HEAD, named[EMBEDDING])  # peft looks for both
    tensors = {_stored_name(adapter, name): array for name, array in sorted(named.items())}
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in tensors.items()}
    with new_folder(path, overwrite=overwrite) as folder:
        write_json(folder / ADAPTER_CONFIG, adapter.config, sort_keys=True)
        write_safetensors(folder / WEIGHTS, infos, tensors.__getitem__)
        if card:
            carry_card(path, folder, card)
    return path


def _field(config: dict[str, Any], name: str) -> Any:
    """A field's value; peft leaves none out, but older versions lack some."""
    return config.get(name, _DEFAULTS[name])


def _keeps_tied(adapter: Adapter) -> bool:
    return bool(_field(adapter.config, "ensure_weight_tying"))


def _with_tied_head_once(adapter: Adapter) -> Adapter:
    """Without the head where it is the embedding and stays so: peft stores both."""
    embedding, head = (adapter.tensors.get(name) for name in (EMBEDDING, HEAD))
    if not _keeps_tied(adapter) or embedding is None or head is None or not np.array_equal(embedding, head):
        return adapter
    return Adapter(adapter.config, {name: array for name, array in adapter.tensors.items() if name != HEAD})


def _stored_name(adapter: Adapter, name: str) -> str:
    module, _, parameter = name.rpartition(".")
    own = name in adapter.whole and module in adapter.modules
    return f"{_PREFIX}{module}{_BASE_LAYER}.{parameter}" if own else _PREFIX + name


def _check_config(config: dict[str, Any], where: object) -> None:
    """Refuses, all at once, fields that change what the adapter computes and are not implemented."""
    if config.get("peft_type") != "LORA":
        raise JaxftError(f"{where}, field peft_type", f"{config.get('peft_type')!r} is not supported (only 'LORA')")
    active = {name for name, value in config.items() if name not in _FREE and value and value != _DEFAULTS.get(name)}
    problems = [f"{name} = {config[name]!r}" for name in sorted(active)]
    if _field(config, "init_lora_weights") not in _PLAIN_STARTS:
        what = "trained against a changed base (in peft, save with path_initial_model_for_weight_conversion)"
        problems.append(f"init_lora_weights = {config['init_lora_weights']!r}, {what}")
    if problems:
        how = "Only LoRA on linears and embeddings is, with rsLoRA, DoRA, modules_to_save and biases"
        raise JaxftError(where, f"not supported: {', '.join(problems)}", how)
    parameters = _field(config, "target_parameters")
    if parameters and not (isinstance(parameters, list) and all(isinstance(name, str) for name in parameters)):
        raise JaxftError(f"{where}, field target_parameters", f"must be a list of names, not {parameters!r}")
    _check_numbers(config, where)


def _check_numbers(config: dict[str, Any], where: object) -> None:
    for name, (is_right, words) in _KINDS.items():
        if not is_right(_field(config, name)):
            raise JaxftError(f"{where}, field {name}", f"must be {words}, not {config[name]!r}")
    if _field(config, "bias") not in get_args(Bias):
        raise JaxftError(f"{where}, field bias", f"must be one of {', '.join(get_args(Bias))}, not {config['bias']!r}")
    patterns = {name: _field(config, name) for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise JaxftError(f"{where}, field {name}", f"must be an object, not {pattern!r}")
    for name, rank in {"r": _field(config, "r"), **patterns["rank_pattern"]}.items():
        if not _is_number(rank, int) or rank < 1:
            raise JaxftError(f"{where}, rank of {name}", f"must be a positive integer, not {rank!r}")
    dropout = _field(config, "lora_dropout")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise JaxftError(f"{where}, field lora_dropout", f"must be a number in [0, 1), not {dropout!r}")
    for name, alpha in {"lora_alpha": _field(config, "lora_alpha"), **patterns["alpha_pattern"]}.items():
        if not _is_number(alpha) or not -_LARGEST_ALPHA <= alpha <= _LARGEST_ALPHA:
            raise JaxftError(f"{where}, alpha of {name}", f"must be a finite number, not {alpha!r}")
    for pattern in (*patterns["rank_pattern"], *patterns["alpha_pattern"], *_expressions(config)):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise JaxftError(where, f"{pattern!r} is not a regular expression ({error})") from error


def _expressions(config: dict[str, Any]) -> list[str]:
    """The fields that are one text, which peft takes for a regular expression."""
    return [value for name in ("target_modules", "exclude_modules") if isinstance(value := _field(config, name), str)]


def _is_number(value: Any, kinds: type | UnionType = int | float) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _are_names_or_expression(value: Any) -> bool:
    return isinstance(value, str) or _are_names(value)


def _are_layers(value: Any) -> bool:
    return value is None or all(_is_number(layer, int) for layer in (value if isinstance(value, list) else [value]))


def _is_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "target_modules": (_are_names_or_expression, "a list of names, or one regular expression"),
    "exclude_modules": (_are_names_or_expression, "a list of names, or one regular expression"),
    "modules_to_save": (_are_names, "a list of names"),
    "layers_to_transform": (_are_layers, "a number or a list of numbers"),
    "use_rslora": (_is_switch, "true or false"),
    "use_dora": (_is_switch, "true or false"),
    "ensure_weight_tying": (_is_switch, "true or false"),
}


def _check_tensors(adapter: Adapter, where: object) -> None:
    settings, modules = _settings(adapter.config), set(adapter.modules)
    problems = []
    for name in adapter.tensors:
        module, suffix = _split(name)
        if suffix in _PARTNERS and module + _PARTNERS[suffix] not in adapter.tensors:
            problems.append(f"{name} has no {module + _PARTNERS[suffix]}")
        elif suffix == _MAGNITUDE and not (settings.use_dora and module in modules):
            problems.append(f"{name} is not part of a LoRA adapter without use_dora")
        elif not suffix and not _is_explained(name, settings, modules):
            problems.append(f"{name} is not a LoRA matrix, and neither modules_to_save nor bias means it")
    for module in adapter.modules:
        problems += _module_problems(adapter, module, settings)
    if not adapter.tensors:
        problems.append("there are none")
    if problems:
        raise JaxftError(where, f"its tensors are not those of a LoRA adapter: {'; '.join(problems)}")


def _is_explained(name: str, settings: LoraConfig, modules: set[str]) -> bool:
    """Whether a parameter of the base has a place in an adapter; peft adds the weights of adapted embeddings."""
    module = name.rpartition(".")[0]
    biased = name.endswith(".bias") and (settings.bias == "all" or (settings.bias == "lora_only" and module in modules))
    return biased or settings.is_saved(module) or (name.endswith(".weight") and module in modules)


def _is_of_a_parameter(adapter: Adapter, module: str) -> bool:
    """Whether peft's target_parameters mean this adapter, not target_modules."""
    named = [p for p in _field(adapter.config, "target_parameters") or () if not p.endswith(".weight")]
    holders = {parameter.rpartition(".")[0] or "experts" for parameter in named}
    return any(f".{module.replace(_BASE_LAYER, '')}".endswith(f".{holder}") for holder in holders)


def _module_problems(adapter: Adapter, module: str, settings: LoraConfig) -> list[str]:
    """What is wrong with the shapes of one module's adapter."""
    rank, problems = settings.rank_of(module), []
    if _is_of_a_parameter(adapter, module):  # its rank goes with a number of experts that the model knows
        return problems
    parts = {suffix: adapter.tensors.get(module + suffix) for suffix in (*_RANK_AXIS, _MAGNITUDE)}
    for suffix, axis in _RANK_AXIS.items():
        array = parts[suffix]
        if array is not None and (array.ndim != 2 or array.shape[axis] != rank):
            problems.append(f"{module}{suffix} is {list(array.shape)}, but its rank should be {rank}")
    B, magnitude = parts[_B] if parts[_B] is not None else parts[_EMBEDDING_B], parts[_MAGNITUDE]
    if settings.use_dora and magnitude is None:
        problems.append(f"{module} has no {_MAGNITUDE[1:]}")
    elif magnitude is not None and B is not None and magnitude.shape != B.shape[:1]:
        problems.append(f"{module}{_MAGNITUDE} is {list(magnitude.shape)}, but should be {list(B.shape[:1])}")
    return problems

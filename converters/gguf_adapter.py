"""LoRA adapters as llama.cpp keeps them: a GGUF file with A and B of each adapted tensor.

Of a GGUF tensor `T` the file holds `T.lora_a` [r, in] and `T.lora_b` [out, r], of the embedding [V, r] and [D, r], and
one `adapter.lora.alpha` for all: llama.cpp computes W x + alpha / r * B (A x). Where a model's rows are in another
order there (q and k of llama), B's rows are too. Source: llama.cpp's src/llama-adapter.cpp.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from converters.archs import arch_of
from converters.archs.base import GGUFArch
from converters.checkpoint import Checkpoint
from converters.gguf_encode import encode
from converters.gguf_export import architecture_of
from converters.gguf_header import TensorEntry, read_header
from converters.gguf_import import read_entry
from converters.gguf_tensors import gguf_names, is_expert
from converters.load import EMBEDDING, HEAD, check
from converters.merge import MergedCheckpoint
from converters.peft_io import Adapter, make_adapter, rank_of, scale_of
from jaxft.errors import JaxftError
from jaxft.files import new_file
from jaxft.lora import LoraConfig

_KINDS = GGMLQuantizationType
TYPES = {"f32": _KINDS.F32, "f16": _KINDS.F16, "bf16": _KINDS.BF16}
_ALPHA = "adapter.lora.alpha"
_A, _B = ".lora_a", ".lora_b"
_EMBEDDING = EMBEDDING.removesuffix(".weight")


def is_gguf_adapter(path: Path) -> bool:
    """Whether a GGUF file says that it is an adapter; raises JaxftError where it is no sound GGUF file."""
    return read_header(path).metadata.get("general.type") == "adapter"


def write_gguf_adapter(
    adapter: Adapter, base: Checkpoint, path: Path, quantization: str = "f32", *, overwrite: bool = False
) -> Path:
    """Writes an adapter of `base` to the GGUF file `path` and returns it.

    Modules whose scale is not alpha / r for one alpha (rsLoRA, alpha_pattern) have it multiplied into B, in float32.

    Args:
      base: its config says what the tensors are called and how their rows lie; no weight is read.
      quantization: "f32", "f16" or "bf16".

    Raises:
      JaxftError: an adapter for another base, or one that llama.cpp cannot hold: DoRA, parameters that trained whole,
        a head or an embedding that is one with the other; an existing or unwritable `path`.
    """
    if quantization not in TYPES:
        raise JaxftError(f"type {quantization!r}", f"is not one of an adapter ({', '.join(TYPES)})")
    arch = architecture_of(arch_of(base.config.get("model_type"), base.where), base.where)
    _check_that_it_fits(adapter, base, arch)
    names = _names(base, arch)
    alphas = {module: scale_of(adapter, module) * rank_of(adapter, module) for module in adapter.modules}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    tensors: dict[str, np.ndarray] = {}
    for module in adapter.modules:
        hf_name = f"{module}.weight"
        a, b = _pair(adapter, module)
        # What reorders a linear's rows reorders B's; the other changes concern norms, which have no adapter.
        b = arch.to_gguf(hf_name, b if alphas[module] == alpha else b * np.float32(alphas[module] / alpha), base.config)
        tensors |= {names[hf_name] + _A: a, names[hf_name] + _B: b}
    with new_file(path, overwrite=overwrite) as temporary:
        _write(tensors, arch, temporary, TYPES[quantization], alpha, adapter)
    return path


def _check_that_it_fits(adapter: Adapter, base: Checkpoint, arch: GGUFArch) -> None:
    MergedCheckpoint(base, adapter)
    problems = [name for name in adapter.tensors if name in adapter.whole or name.endswith("lora_magnitude_vector")]
    tied = {_EMBEDDING, HEAD.removesuffix(".weight")} if HEAD not in base.tensors else set()
    problems += [f"{module} (head and embedding are one)" for module in adapter.modules if module in tied]
    known = _linears(base)
    problems += [f"{module} (of experts)" for module in adapter.modules if f"{module}.weight" not in known]
    problems += [
        f"{module} (not in this architecture)" for module in adapter.modules if module.endswith(arch.no_adapters)
    ]
    if problems:
        raise JaxftError(
            "adapter",
            "llama.cpp's adapters hold nothing but A and B of weights that are no experts', so there is no place for "
            + ", ".join(problems),
            "Merge it into its base (jaxft-convert merge), and convert that",
        )


def _names(base: Checkpoint, arch: GGUFArch) -> dict[str, str]:
    """HF name -> GGUF name of every matrix of the model, experts left out."""
    return gguf_names(_linears(base), arch.name, check(base).num_hidden_layers)


def _linears(base: Checkpoint) -> list[str]:
    layout = arch_of(base.config["model_type"], base.where).tensors(check(base))
    return [
        name
        for name, info in base.tensors.items()
        if name in layout.hf and len(info.shape) == 2 and not any(map(is_expert, layout.hf[name].names))
    ]


def _pair(adapter: Adapter, module: str) -> tuple[np.ndarray, np.ndarray]:
    """A and B in float32, in GGUF's layout."""
    if f"{module}.lora_embedding_A" in adapter.tensors:
        a, b = adapter.tensors[f"{module}.lora_embedding_A"].T, adapter.tensors[f"{module}.lora_embedding_B"]
    else:
        a, b = (adapter.tensors[f"{module}.lora_{part}.weight"] for part in "AB")
    return np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)


def _write(
    tensors: Mapping[str, np.ndarray],
    arch: GGUFArch,
    path: Path,
    kind: GGMLQuantizationType,
    alpha: float,
    adapter: Adapter,
) -> None:
    writer = GGUFWriter(path, arch.name)
    with contextlib.closing(writer):
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string("adapter.type", "lora")
        writer.add_float32(_ALPHA, alpha)
        base = adapter.config.get("base_model_name_or_path")
        if base:
            writer.add_uint32("general.base_model.count", 1)
            writer.add_string("general.base_model.0.name", str(base))
        for name, array in tensors.items():
            writer.add_tensor(name, encode(array, kind, None, f"adapter, tensor {name}"), array.shape, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def read_gguf_adapter(path: Path, base: Checkpoint, base_name: str) -> Adapter:
    """Reads llama.cpp's adapter for `base` as a PEFT adapter, with A and B in float32.

    Raises:
      JaxftError: no adapter, one of another architecture or kind, or tensors that are not pairs of the base's.
    """
    header = read_header(path)
    arch = architecture_of(arch_of(base.config.get("model_type"), base.where), base.where)
    alpha = _check_metadata(header.metadata, arch, path)
    modules = {name: hf.removesuffix(".weight") for hf, name in _names(base, arch).items()}
    tensors: dict[str, np.ndarray] = {}
    for name, module in _adapted(header.tensors, modules, path).items():
        a, b = (read_entry(path, header.tensors[name + part]).astype(np.float32) for part in (_A, _B))
        if module == _EMBEDDING:
            tensors |= {f"{module}.lora_embedding_A": np.ascontiguousarray(a.T), f"{module}.lora_embedding_B": b}
        else:
            _check_rows(b, base, module, path)
            b = np.ascontiguousarray(arch.from_gguf(f"{module}.weight", b, base.config))
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    adapter = _with_settings(tensors, alpha, base_name)
    MergedCheckpoint(base, adapter)
    return adapter


def _check_metadata(metadata: dict[str, Any], arch: GGUFArch, path: Path) -> float:
    """alpha, after a look at what the file says of itself."""
    expected = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": arch.name}
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise JaxftError(f"{path}, key {key}", f"is {metadata.get(key)!r}, not {value!r}")
    if "adapter.alora.invocation_tokens" in metadata:
        raise JaxftError(path, "is an activated LoRA, which works after certain tokens only; that is not supported")
    alpha = metadata.get(_ALPHA)
    if not isinstance(alpha, float) or not np.isfinite(alpha):
        raise JaxftError(f"{path}, key {_ALPHA}", f"must be a finite number, not {alpha!r}")
    return float(str(np.float32(alpha)))


def _adapted(entries: Mapping[str, TensorEntry], modules: Mapping[str, str], path: Path) -> dict[str, str]:
    """GGUF tensor -> HF module of every pair in the file."""
    found = {name.removesuffix(_A).removesuffix(_B) for name in entries}
    problems = [f"{name} is no tensor of the base" for name in found if name not in modules]
    problems += [f"{name + part} is missing" for name in found for part in (_A, _B) if name + part not in entries]
    problems += [f"{entry.name} is no matrix" for entry in entries.values() if len(entry.shape) != 2]
    if problems or not found:
        raise JaxftError(path, f"does not fit the base: {'; '.join(sorted(problems)) or 'it has no tensors'}")
    return {name: modules[name] for name in modules if name in found}


def _check_rows(b: np.ndarray, base: Checkpoint, module: str, path: Path) -> None:
    rows = base.tensors[f"{module}.weight"].shape[0]
    if len(b) != rows:
        raise JaxftError(path, f"has {len(b)} rows of B for {module}, which has {rows} in {base.where}")


def _with_settings(tensors: dict[str, np.ndarray], alpha: float, base_name: str) -> Adapter:
    """The adapter with r, lora_alpha and target_modules that say what the tensors are; alpha 0 means a scale of 1."""
    suffixes = (".lora_A.weight", ".lora_embedding_A")
    ranks = {name.removesuffix(s): len(a) for name, a in tensors.items() for s in suffixes if name.endswith(s)}
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != r}
    config = LoraConfig(
        r=r,
        lora_alpha=alpha or r,
        target_modules=tuple(dict.fromkeys(module.rsplit(".", 1)[-1] for module in ranks)),
        rank_pattern=others,
        alpha_pattern={} if alpha else others,
    )
    return make_adapter(config, tensors, base_model_name_or_path=base_name)

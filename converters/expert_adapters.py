"""PEFT adapters of linears that a checkpoint names or holds in another way than the decoder: experts above all.

Linears that are the decoder's own under another name are renamed. Experts come in two forms, and both are read:

- One pair for each, under the checkpoint's names: ``mlp.experts.3.up_proj``, or ``block_sparse_moe.experts.3.w3``.
- As transformers' classes hold them: a parameter of all E experts of a layer, and peft's ``target_parameters`` with
  one adapter each. A is [E R, in], expert by expert, and B [out, R E], expert by expert within each rank. Where a
  parameter is of several linears, gate and up, A has the ranks of both and B is block diagonal, as in
  `converters.peft_layout`. peft keeps the adapters of a module's parameters inside each other: the last one's are
  ``mlp.experts.lora_A.weight``, those of the one before ``mlp.experts.base_layer.lora_A.weight``.

The second is written: peft 0.21 makes it of the first, but not for every family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from converters.archs.base import ArchSpec
from converters.expert_layout import StackExperts
from converters.layout import Layout
from converters.peft_io import Adapter, rank_of, scale_of
from converters.peft_layout import block_diagonal, parts_of
from jaxft.console import warn
from jaxft.errors import JaxftError
from jaxft.models.layers import EXPERTS

_A, _B = ".lora_A.weight", ".lora_B.weight"
_BASE_LAYER = ".base_layer"


class _Parameter(NamedTuple):
    """All experts of a layer in transformers' class, with an adapter.

    Attributes:
      op: how it is made of the decoder's linears.
      prefix: 'model.layers.3.'.
      experts: E.
      module: what peft calls the adapted module.
    """

    op: StackExperts
    prefix: str
    experts: int
    module: str

    @property
    def name(self) -> str:
        return self.prefix + self.op.hf

    def linears(self, expert: int) -> list[str]:
        """The decoder's paths."""
        return [self.prefix + part.format(expert).removesuffix(".weight") for part in self.op.parts]


def experts_to_decoder(adapter: Adapter, layout: Layout, spec: ArchSpec) -> Adapter:
    """An adapter of HF's linears as one of the decoder's.

    Raises:
      JaxftError: an adapter of all experts at once whose shapes are not theirs, or of other parameters.
    """
    named = adapter.config.get("target_parameters") or ()
    parameters = _parameters(layout, spec, [name for name in named if not name.endswith(".weight")])
    adapter = _taken_apart(Adapter({**adapter.config, "target_parameters": None}, adapter.tensors), layout, parameters)
    stored = {s.names[0]: name for name, s in layout.decoder.items() if len(layout.hf[s.names[0]].names) == 1}
    adapter = _renamed(adapter, {m: _module(stored.get(f"{m}.weight", m)) for m in adapter.modules})
    return _without_namesakes(adapter, layout) if parameters else adapter


def _without_namesakes(adapter: Adapter, layout: Layout) -> Adapter:
    """`adapter` with linears excluded that are called as experts' are, and are not adapted."""
    adapted = set(adapter.modules)
    ends = {_ending(module, 1) for module in adapted}
    others = (_module(name) for name in layout.decoder if not _is_expert(name) and _ending(_module(name), 1) in ends)
    excluded = list(dict.fromkeys(_ending(module, 2) for module in others if module not in adapted))
    before = adapter.config.get("exclude_modules") or []
    if not excluded or isinstance(before, str):
        return adapter
    return Adapter({**adapter.config, "exclude_modules": [*before, *excluded]}, adapter.tensors)


def experts_to_hf(adapter: Adapter, layout: Layout, spec: ArchSpec) -> Adapter:
    """The inverse, of experts in the second form."""
    adapted = [op for op in spec.expert_parameters if any(_is_part(module, op) for module in adapter.modules)]
    if not adapted:
        return _renamed(adapter, _stored_names(adapter, layout))
    if adapter.config.get("lora_dropout"):
        warn("peft has no dropout for adapters of experts; the adapter that is written says lora_dropout = 0")
    others = {old: new for old, new in _stored_names(adapter, layout).items() if not _is_expert(old)}
    adapter = _renamed(Adapter({**adapter.config, "lora_dropout": 0.0}, adapter.tensors), others)
    return _put_together(adapter, layout, _parameters(layout, spec, [op.hf for op in adapted]))


def taken_apart(adapter: Adapter, layout: Layout, spec: ArchSpec) -> Adapter:
    """HF's adapter with one for each expert, by HF's names or, where HF has one tensor of all, the decoder's."""
    adapter = experts_to_decoder(adapter, layout, spec)
    return _renamed(adapter, _stored_names(adapter, layout))


def _stored_names(adapter: Adapter, layout: Layout) -> dict[str, str]:
    own = [m for m in adapter.modules if f"{m}.weight" in layout.decoder and _is_single(layout, m)]
    return {m: _module(layout.decoder[f"{m}.weight"].names[0]) for m in own}


def _parameters(layout: Layout, spec: ArchSpec, names: Sequence[str]) -> list[_Parameter]:
    """Of every layer, those that `names`, of `target_parameters`, mean."""
    shapes = {name: source.shape for name, source in layout.decoder.items()}
    meant: dict[str, list[tuple[StackExperts, int]]] = {}
    unknown = set(names)
    for op in spec.expert_parameters:
        for prefix, experts in op.layers(shapes).items():
            matching = {name for name in names if f".{prefix}{op.hf}".endswith(f".{name}")}
            unknown -= matching
            if matching:
                meant.setdefault(prefix, []).append((op, experts))
    if unknown:
        known = ", ".join(op.hf for op in spec.expert_parameters) or "none"
        raise JaxftError("adapter, field target_parameters", f"{sorted(unknown)} are not experts' (these are: {known})")
    found = []
    for prefix, ops in meant.items():
        for place, (op, experts) in enumerate(ops):
            inside = _BASE_LAYER * (len(ops) - 1 - place)
            found.append(_Parameter(op, prefix, experts, f"{prefix}{op.hf.rpartition('.')[0]}{inside}"))
    return found


def _taken_apart(adapter: Adapter, layout: Layout, parameters: list[_Parameter]) -> Adapter:
    config, tensors = dict(adapter.config), dict(adapter.tensors)
    patterns = {name: dict(config.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")}
    for parameter in (p for p in parameters if p.module + _A in tensors):
        a, b = tensors.pop(parameter.module + _A), tensors.pop(parameter.module + _B)
        if parameter.op.peft_exchanges and len(a) % parameter.experts == 0 and b.shape[1:] == (len(a),):
            a, b = _exchanged(a, b, parameter.experts)
        shape = layout.decoder[f"{parameter.linears(0)[0]}.weight"].shape
        experts, parts, rank = parameter.experts, len(parameter.op.parts), len(a) // parameter.experts
        if a.shape != (experts * rank, shape[1]) or b.shape != (parts * shape[0], rank * experts):
            what = (
                f"its adapter is {list(a.shape)} and {list(b.shape)}, which does not fit {experts} experts of {shape}"
            )
            raise JaxftError(f"adapter, parameter {parameter.name}", what)
        stack = parameter.op.stack(experts, (shape[0], rank))
        whole = stack.with_rows_first(b.reshape(-1, rank, experts).transpose(2, 0, 1))
        for expert in range(experts):
            bands = [stack.take(expert, part, whole) for part in range(parts)]
            pairs = parts_of(a[expert * rank : (expert + 1) * rank], bands, config["r"])
            for module, (a_part, b_part) in zip(parameter.linears(expert), pairs, strict=True):
                tensors |= {module + _A: a_part, module + _B: np.ascontiguousarray(b_part)}
        # What the parts' rank and scale are where they are not the adapter's.
        own, scale = len(pairs[0][0]), scale_of(adapter, parameter.name)
        alpha = _alpha(scale, own, config)
        for part in parameter.op.parts:
            ending = part.replace(".", r"\.").format(r"\d+").removesuffix(r"\.weight")
            if (own, alpha) != (config["r"], config["lora_alpha"]):
                patterns["rank_pattern"][ending], patterns["alpha_pattern"][ending] = own, alpha
    for parameter in parameters:
        for pattern in patterns.values():
            pattern.pop(parameter.op.hf, None)
    return Adapter({**config, **patterns}, tensors)


def _put_together(adapter: Adapter, layout: Layout, parameters: list[_Parameter]) -> Adapter:
    config, tensors = dict(adapter.config), dict(adapter.tensors)
    patterns = {name: dict(config.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")}
    dtype = next(iter(tensors.values())).dtype
    for parameter in parameters:
        modules = [parameter.linears(expert) for expert in range(parameter.experts)]
        ranks = {rank_of(adapter, module) for of_expert in modules for module in of_expert}
        if ranks != {config["r"]}:
            raise JaxftError("adapter, field rank_pattern", f"gives parts of {parameter.name} other ranks")
        r, shape = config["r"], layout.decoder[f"{modules[0][0]}.weight"].shape
        parts, rank = len(parameter.op.parts), len(parameter.op.parts) * config["r"]
        pairs = [
            (
                [tensors.pop(module + _A, np.zeros((r, shape[1]), dtype)) for module in of_expert],
                [tensors.pop(module + _B, np.zeros((shape[0], r), dtype)) for module in of_expert],
            )
            for of_expert in modules
        ]
        bands = [band for _, bs in pairs for band in np.split(block_diagonal(bs), parts)]
        stack = parameter.op.stack(parameter.experts, (shape[0], rank))
        b = stack.with_rows_first(stack.join(*bands)).transpose(1, 2, 0)
        a, b = np.concatenate([a for As, _ in pairs for a in As]), b.reshape(b.shape[0], -1)
        if parameter.op.peft_exchanges:
            a, b = _exchanged(a, b, parameter.experts)
        tensors |= {parameter.module + _A: a, parameter.module + _B: b}
        if parts > 1:
            scale = scale_of(adapter, modules[0][0])
            patterns["rank_pattern"][parameter.op.hf] = rank
            patterns["alpha_pattern"][parameter.op.hf] = _alpha(scale, rank, config)
    of_parameters = {parameter.module for parameter in parameters}
    others = [module for module in Adapter(config, tensors).modules if module not in of_parameters]
    # peft takes names of experts' linears among target_modules to mean experts only. Other linears of these names, of
    # a shared expert or a dense layer, are named by their parameter, of which an adapter looks the same.
    experts = {_ending(part.removesuffix(".weight"), 1) for p in parameters for part in p.op.parts}
    named = [parameter.op.hf for parameter in parameters]
    named += [f"{_ending(module, 2)}.weight" for module in others if _ending(module, 1) in experts]
    plain = [_ending(module, 1) for module in others if _ending(module, 1) not in experts]
    targets = {"target_modules": list(dict.fromkeys(plain)), "target_parameters": list(dict.fromkeys(named))}
    return Adapter({**config, **patterns, **targets}, tensors)


def _exchanged(a: np.ndarray, b: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """A [E R, in] and B [out, R E] of the transposed product: [E R, out] and [in, R E]; its own inverse."""
    rank = len(a) // experts
    of_b = b.reshape(len(b), rank, experts).transpose(2, 1, 0).reshape(experts * rank, len(b))
    of_a = a.reshape(experts, rank, -1).transpose(2, 1, 0).reshape(-1, rank * experts)
    return of_b, of_a


def _is_expert(name: str) -> bool:
    return f".{EXPERTS}." in name


def _is_part(module: str, op: StackExperts) -> bool:
    return any(f"{module}.weight".endswith(part.split("{}")[-1]) for part in op.parts) and _is_expert(module)


def _is_single(layout: Layout, module: str) -> bool:
    """Whether a linear of the decoder is one of the checkpoint's, by whatever name."""
    names = layout.decoder[f"{module}.weight"].names
    return len(names) == 1 and len(layout.hf[names[0]].names) == 1


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _renamed(adapter: Adapter, names: dict[str, str]) -> Adapter:
    """`adapter` with modules of other names."""
    tensors = {}
    for name, array in adapter.tensors.items():
        old = next((start for start in _prefixes(name) if start in names), None)
        tensors[name if old is None else names[old] + name.removeprefix(old)] = array
    if tensors.keys() == adapter.tensors.keys():
        return adapter
    config = {**adapter.config, "rank_pattern": dict(adapter.config.get("rank_pattern") or {})}
    config["alpha_pattern"] = dict(adapter.config.get("alpha_pattern") or {})
    for old, new in names.items() if config["rank_pattern"] or config["alpha_pattern"] else ():
        rank, scale = rank_of(adapter, old), scale_of(adapter, old)
        if (rank_of(adapter, new), scale_of(adapter, new)) != (rank, scale):  # a pattern meant the old name
            config["rank_pattern"][re.escape(new)] = rank
            config["alpha_pattern"][re.escape(new)] = _alpha(scale, rank, config)
    modules = Adapter(config, tensors).modules
    return Adapter({**config, "target_modules": list(dict.fromkeys(_ending(m, 1) for m in modules))}, tensors)


def _alpha(scale: float, rank: int, config: dict[str, Any]) -> float:
    """lora_alpha of a rank with this scale."""
    return scale * (math.sqrt(rank) if config.get("use_rslora") else rank)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def _ending(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])

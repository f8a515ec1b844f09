"""PEFT adapters of experts: one pair for each expert, under the names that a checkpoint has for their weights.

peft 0.21 reads them (``mlp.experts.3.up_proj.lora_A.weight``, or ``block_sparse_moe.experts.3.w3``) and makes of them
what its own classes need, which hold all experts of a layer in one parameter. What peft itself saves of such a
parameter (``mlp.experts.lora_A``) is not read yet, nor can experts be written that a checkpoint has in one tensor.
"""

from __future__ import annotations

from converters.layout import Layout
from converters.peft_io import Adapter
from jaxft.errors import JaxftError
from jaxft.models.params import EXPERTS

_PARTS = (".lora_A.weight", ".lora_B.weight")


def experts_to_hf(adapter: Adapter, layout: Layout) -> Adapter:
    """An adapter of a decoder's linears with its experts' under HF's names.

    Raises:
      JaxftError: experts that a checkpoint of the family has in one tensor.
    """
    names = {module: module for module in adapter.modules}
    for module in filter(_is_expert, adapter.modules):
        (stored,) = layout.decoder[f"{module}.weight"].names
        if len(layout.hf[stored].names) > 1:
            raise JaxftError(
                "adapter",
                f"cannot be written: {module} is a part of {stored}; adapters of such experts are not supported",
                "Name target_modules without the experts: q_proj, k_proj, v_proj, o_proj",
            )
        names[module] = stored.removesuffix(".weight")
    return _renamed(adapter, names)


def experts_to_decoder(adapter: Adapter, layout: Layout) -> Adapter:
    """The inverse.

    Raises:
      JaxftError: an adapter of all experts of a layer at once, as peft saves it.
    """
    for module in adapter.modules:
        if module.endswith((f".{EXPERTS}", f".{EXPERTS}.base_layer")):
            raise JaxftError(
                f"adapter, module {module}",
                "adapts all experts of a layer at once; only adapters of single experts are read",
                "Save it with jaxft, or adapt the attention's linears only",
            )
    stored = {layout.decoder[name].names[0]: name for name in layout.decoder if _is_expert(name)}
    names = {m: stored.get(f"{m}.weight", f"{m}.weight").removesuffix(".weight") for m in adapter.modules}
    return _renamed(adapter, names)


def _is_expert(name: str) -> bool:
    return f".{EXPERTS}." in name


def _renamed(adapter: Adapter, names: dict[str, str]) -> Adapter:
    experts = [name for name in names.values() if _is_expert(name)]
    if not experts:
        return adapter
    tensors = {f"{new}{part}": adapter.tensors[old + part] for old, new in names.items() for part in _PARTS}
    # peft takes the names of experts' linears to mean experts only, so others of these names (a shared expert's, a
    # dense layer's) are named with the module that they are in.
    of_experts = {_ending(name, 1) for name in experts}
    others = [name for name in names.values() if not _is_expert(name)]
    targets = [_ending(name, 2 if _ending(name, 1) in of_experts else 1) for name in others]
    targets = list(dict.fromkeys([*targets, *(_ending(name, 1) for name in experts)]))
    return Adapter({**adapter.config, "target_modules": targets}, tensors)


def _ending(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])

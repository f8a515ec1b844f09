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
    if all(new == old for old, new in names.items()):
        return adapter
    tensors = {f"{new}{part}": adapter.tensors[old + part] for old, new in names.items() for part in _PARTS}
    targets = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names.values()))
    return Adapter({**adapter.config, "target_modules": targets}, tensors)

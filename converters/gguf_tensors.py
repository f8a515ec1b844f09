"""Which tensors are in a GGUF file: those of an HF checkpoint, but for experts, of which it stacks each linear."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import gguf

from converters.archs.base import GGUFArch
from converters.layout import Layout, Shape, Source
from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig

_ARCHS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


class GGUFTensor(NamedTuple):
    """One tensor of a file.

    Attributes:
      name: in the file.
      hf_name: the HF tensor that it is; of experts, the decoder's name without the expert's number; what HF would call
        it where it is made of others.
      shape: [...], or [E, ...] of experts; a matrix of one row is a vector.
      source: how it is made of HF's tensors; not of experts.
      experts: the decoder's tensors that are stacked in it, in their order; none where it is not of experts.
    """

    name: str
    hf_name: str
    shape: Shape
    source: Source
    experts: tuple[str, ...]


def gguf_tensors(hf_names: Iterable[str], layout: Layout, arch: GGUFArch, config: DecoderConfig) -> list[GGUFTensor]:
    """The file's tensors that hold these HF tensors, in their order.

    Raises:
      JaxftError: GGUF has no name for some of them; all are listed.
    """
    experts: dict[str, list[str]] = {}
    found: dict[str, Source] = {}
    in_file = arch.in_file(layout.hf_shapes, config)
    for hf_name in hf_names:
        for part in layout.hf[hf_name].names:
            stacked = stacked_name(part)
            if stacked == part:
                found |= {name: in_file.hf[name] for name in in_file.decoder[hf_name].names}
            else:
                experts.setdefault(stacked, []).append(part)
                found[stacked] = layout.decoder[part]
    names = gguf_names(found, arch.name, config.num_hidden_layers)
    tensors = []
    for hf_name, source in found.items():
        parts = tuple(sorted(experts.get(hf_name, ()), key=_number))
        shape = (len(parts), *source.shape) if parts else without_single_rows(source.shape)
        tensors.append(GGUFTensor(names[hf_name], hf_name, shape, source, parts))
    return tensors


def gguf_names(hf_names: Iterable[str], arch: str, n_layers: int) -> dict[str, str]:
    """HF name -> GGUF name, from gguf's own map of the architecture `arch` (a `general.architecture`).

    Raises:
      JaxftError: GGUF has no name for some of them; all are listed.
    """
    name_map = gguf.get_tensor_name_map(_ARCHS[arch], n_layers)
    found = {name: name_map.get_name(_as_module(name), try_suffixes=(".weight", ".bias")) for name in hf_names}
    unnamed = [name for name, gguf_name in found.items() if gguf_name is None]
    if unnamed:
        raise JaxftError(f"GGUF architecture {arch}", f"has no name for the tensors {', '.join(unnamed)}")
    # What is a bare parameter in HF is a weight there.
    return {name: n if n.endswith((".weight", ".bias")) else f"{n}.weight" for name, n in found.items() if n}


def _as_module(name: str) -> str:
    """A bare parameter that is a bias, as the bias of a module."""
    return name.removesuffix("_bias") + ".bias" if name.endswith("_bias") else name


def without_single_rows(shape: Shape) -> Shape:
    """The shape as ggml counts dimensions: leading ones are none."""
    return without_single_rows(shape[1:]) if len(shape) > 1 and shape[0] == 1 else shape


def stacked_name(name: str) -> str:
    """A decoder's name without the expert's number, for all of them together."""
    return _EXPERT.sub(".experts.", name)


def is_expert(name: str) -> bool:
    """Whether a decoder's tensor is one expert's."""
    return _EXPERT.search(name) is not None


def _number(name: str) -> int:
    found = _EXPERT.search(name)
    return int(found[1]) if found else 0

"""Which HF tensor is which GGUF tensor."""

from __future__ import annotations

from collections.abc import Iterable

import gguf

from jaxft.errors import JaxftError

_ARCHS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


def gguf_names(hf_names: Iterable[str], arch: str, n_layers: int) -> dict[str, str]:
    """HF name -> GGUF name, from gguf's own map of the architecture `arch` (a `general.architecture`).

    Raises:
      JaxftError: GGUF has no name for some of them; all are listed.
    """
    name_map = gguf.get_tensor_name_map(_ARCHS[arch], n_layers)
    found = {name: name_map.get_name(name, try_suffixes=(".weight", ".bias")) for name in hf_names}
    unnamed = [name for name, gguf_name in found.items() if gguf_name is None]
    if unnamed:
        raise JaxftError(f"GGUF architecture {arch}", f"has no name for the tensors {', '.join(unnamed)}")
    return {name: gguf_name for name, gguf_name in found.items() if gguf_name}

"""Which HF tensor is which GGUF tensor, and whether a checkpoint holds exactly what its config asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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


def check_tensors(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Raises one JaxftError that lists every tensor that is missing, unexpected or of another shape."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if problems:
        raise JaxftError(where, f"its tensors do not fit its config: {'; '.join(problems)}")

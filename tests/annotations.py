"""How annotations are checked while tests run: the type checker that tests/conftest.py gives to jaxtyping's hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# As type checkers have it, an int passes for a float.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its annotations checked by beartype at each call.

    Two things are left alone. Constructors, because JAX rebuilds a pytree with shapes, None or other placeholders where
    the dataclass says array. And the module that only defines a protocol, whose Self has no class there.
    """
    if function.__name__ == "__init__" or function.__module__ == "jaxft.quant.base":
        return function
    return _beartype(function)

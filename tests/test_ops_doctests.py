"""The example in every op's docstring runs as it stands."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import jax
import pytest

import pallas_kernels

MODULES = [f"pallas_kernels.{module.name}" for module in pkgutil.iter_modules(pallas_kernels.__path__)]
PUBLIC = [name for name in pallas_kernels.__all__ if inspect.isfunction(getattr(pallas_kernels, name))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    # A user's session: JAX as it comes, without the tests' strict promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_op_has_an_example(name: str) -> None:
    function = getattr(pallas_kernels, name)
    if name == "explain":
        return
    module = importlib.import_module(function.__module__)
    documented = f"{inspect.getdoc(function)}{inspect.getdoc(module)}"
    assert ">>>" in documented, f"{function.__module__}.{name} has no example"

"""Looking into jaxprs: what arrays a program holds, what its backward pass keeps, which primitives it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def all_equations(jaxpr: ClosedJaxpr | Jaxpr) -> Iterator[JaxprEqn]:
    """Every equation, those of all inner jaxprs (jit, scan, while, remat, custom_vjp, pallas_call ...) included."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for inner in _inner_jaxprs(equation):
            yield from all_equations(inner)


def _inner_jaxprs(equation: JaxprEqn) -> Iterator[ClosedJaxpr | Jaxpr]:
    for param in equation.params.values():
        for value in param if isinstance(param, (tuple, list)) else (param,):
            if isinstance(value, (ClosedJaxpr, Jaxpr)):
                yield value


def all_avals(jaxpr: ClosedJaxpr) -> Iterator[Any]:
    """The aval of every array there is: inputs, constants and the results of all equations."""
    yield from jaxpr.in_avals
    yield from (variable.aval for variable in jaxpr.jaxpr.constvars)
    yield from computed_avals(jaxpr)


def computed_avals(jaxpr: ClosedJaxpr) -> Iterator[Any]:
    """The aval of every equation's result: `all_avals` without the inputs."""
    for equation in all_equations(jaxpr):
        yield from (variable.aval for variable in equation.outvars)


def residual_avals(f: Callable[..., Any], *args: Any) -> list[Any]:
    """What `jax.vjp(f, *args)` keeps for the backward pass, arguments that it needs again included."""
    return jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args))


def max_elements(avals: Iterable[Any]) -> int:
    """Elements of the largest array; 0 if there is none."""
    return max((math.prod(getattr(aval, "shape", ())) for aval in avals), default=0)


def count_primitive(jaxpr: ClosedJaxpr, name: str) -> int:
    """How many equations are of a primitive, a loop's body counted once."""
    return sum(equation.primitive.name == name for equation in all_equations(jaxpr))

"""What an op is: one function of arrays with a reference, other implementations, and the cases that prove them.

A public op such as `rms_norm` is a thin signature over its `Op`. With `implementation=None` the op chooses the fastest
correct implementation for the platform and the shapes, and `explain` says why. A *named* implementation is used or
refused, never replaced. Tests and benchmarks iterate over `OPS` and each op's `cases`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend

REFERENCE = "xla"


class ImplementationError(ValueError):
    """A named implementation does not exist or cannot run these arguments on this platform."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation that an op runs, and why this one."""

    implementation: str
    why: str


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
      function: same arguments and result as the op.
      refuses: `(platform, *args, **kwargs)` -> the reason why it cannot run them there, or None.
    """

    function: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda platform, *args, **kwargs: None


@dataclasses.dataclass(frozen=True)
class Case:
    """One named set of arguments, the same for tests and benchmarks.

    Attributes:
      name: what is special about it.
      make: (random generator, dtype) -> the op's keyword arguments, scaled so that outputs are O(1). The generator is
        numpy's, because compiling JAX's for every shape takes longer than the test.
      reduction: the longest sum behind one element of a result or gradient; sets the tolerance.
      differentiable: names of the arguments to differentiate.
    """

    name: str
    make: Callable[[np.random.Generator, Any], dict[str, Any]]
    reduction: int
    differentiable: tuple[str, ...] = ()


def reference_is_fastest(platform: str, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    """The `rank` of an op for which nothing measured beats XLA."""
    return (Choice(REFERENCE, "XLA's own fusion is the fastest implementation there is"),)


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation, its implementations and its proof.

    Gradients are in reverse mode. Kernels have their analytic gradient as a `jax.custom_vjp`, so `jax.jvp` of them is
    refused with a TypeError that names the op; inside of `jax.jit`, and in the map that `jax.linearize` returns, the
    TypeError is JAX's own.

    Attributes:
      name: the public function's name.
      implementations: by name; always has the reference, "xla".
      cases: arguments for tests and benchmarks, odd sizes among them.
      rank: `(platform, *args, **kwargs)` -> what `implementation=None` would like to run, fastest first. The first
        one that does not refuse runs; where all do, the reference.
      roundings: how many roundings to the storage dtype a result may see; sets the tolerance.
      replaces, saves: in a few words, what the fastest implementation stands in for and what that saves.
    """

    name: str
    implementations: Mapping[str, Implementation]
    cases: tuple[Case, ...]
    rank: Callable[..., tuple[Choice, ...]] = reference_is_fastest
    roundings: int = 2
    replaces: str = ""
    saves: str = ""

    @property
    def reference(self) -> Callable[..., Any]:
        """The plain JAX implementation that the others are compared with."""
        return self.implementations[REFERENCE].function

    def refuses(self, implementation: str, *args: Any, **kwargs: Any) -> str | None:
        """Why an implementation cannot run these arguments (arrays or their shapes) on the platform, or None."""
        return self.implementations[implementation].refuses(backend.platform(), *args, **kwargs)

    def choose(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Choice:
        """Returns the implementation for these arguments, arrays or their shapes, on the platform.

        Raises:
          ImplementationError: the named one is unknown, or refuses the platform or the arguments.
        """
        if implementation is None:
            ranked = self.rank(backend.platform(), *args, **kwargs)
            usable = (choice for choice in ranked if not self.refuses(choice.implementation, *args, **kwargs))
            return next(usable, Choice(REFERENCE, "no faster implementation takes these arguments"))
        if implementation not in self.implementations:
            raise ImplementationError(
                f"{self.name}: unknown implementation {implementation!r}; it has {', '.join(self.implementations)}"
            )
        reason = self.refuses(implementation, *args, **kwargs)
        if reason:
            raise ImplementationError(f"{self.name}: implementation {implementation!r} cannot run this: {reason}")
        return Choice(implementation, "asked for by name")

    def __call__(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        choice = self.choose(*args, implementation=implementation, **kwargs)
        try:
            return self.implementations[choice.implementation].function(*args, **kwargs)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            other = "" if choice.implementation == REFERENCE else f", or take implementation={REFERENCE!r}"
            raise TypeError(
                f"{self.name}: implementation {choice.implementation!r} has reverse mode only, no jax.jvp. "
                f"Use jax.vjp or jax.grad{other}"
            ) from error

    def tolerance(self, case: Case, dtype: Any) -> float:
        """Allowed error, relative to the largest value: storage roundings plus a float32 sum's sqrt(n) growth."""
        storage, accumulator = float(jnp.finfo(dtype).eps), float(jnp.finfo(jnp.float32).eps)
        return self.roundings * storage + 2 * math.sqrt(case.reduction) * accumulator


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
    """Normally distributed values for a case, made in float32 and rounded to `dtype`."""
    return jnp.asarray((scale * rng.standard_normal(shape)).astype(np.float32).astype(dtype))


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Adds an op to `OPS`, which tests and benchmarks iterate over."""
    if op.name in OPS:
        raise ValueError(f"op {op.name!r} is already registered")
    OPS[op.name] = op
    return op


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `implementation=None` runs for some arguments, and why; prints as a few lines of text.

    Attributes:
      op, platform: of the question.
      choice: what would run.
      others: the other implementations, each with the reason why it does not run.
    """

    op: str
    platform: str
    choice: Choice
    others: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.platform}: {self.choice.implementation}, because {self.choice.why}"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.others.items()])


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Says which implementation an op would choose for these arguments, and why not the others.

    Args:
      op: a name of `OPS`.
      args, kwargs: the op's arguments; arrays may be `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: there is no such op.
    """
    if op not in OPS:
        raise ValueError(f"explain: no op {op!r}; there are {', '.join(OPS)}")
    choice = OPS[op].choose(*args, **kwargs)
    others = {
        name: OPS[op].refuses(name, *args, **kwargs) or f"{choice.implementation} is faster here"
        for name in OPS[op].implementations
        if name != choice.implementation
    }
    return Explanation(op, backend.platform(), choice, others)

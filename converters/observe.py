"""What a computation feeds into its weights: sums of squares of every column, for importance matrices.

`observe` makes JAX write down the computation (a jaxpr), and interprets it: values that are a weight, whatever it was
cast or reshaped to on the way, are followed, and where a product with one is computed, the other operand's squares are
summed; of experts, each over the rows that went to it. So nothing in the model knows of it, and every architecture is
covered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Primitives behind which a weight is still that weight, with its last axis the one that is multiplied.
_SAME = frozenset(
    (
        "convert_element_type", "copy", "dynamic_slice", "optimization_barrier", "reshape", "slice", "squeeze",
        "stop_gradient", "transpose",
    )
)  # fmt: skip
# Primitives that call another computation once, and where they keep it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vmap_call": "call",
}

# On a CPU, products are JAX's own; a GPU's kernels could not be looked into. What is written down so runs anywhere.
_NO_KERNELS = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice("cpu", None, "cpu"))


class Observed(NamedTuple):
    """What a weight was multiplied by.

    Attributes:
      squares: float32 [in], the sum over all rows of their squares; [batch, in] of a batched product, [experts, in] of
        a ragged one.
      rows: float32 [] or [batch] or [experts], how many rows that were.
    """

    squares: jax.Array
    rows: jax.Array

    def __add__(self, other: Observed) -> Observed:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Observed(self.squares + other.squares, self.rows + other.rows)


def observe(run: Callable[..., Any], weights: dict[str, jax.Array], *arguments: Any) -> tuple[Any, dict[str, Observed]]:
    """Calls run(weights, *arguments) and gives its result with what it multiplied by the weights.

    Args:
      run: a function of arrays; it may loop with `scan`, over anything but weights.
      weights: [..., in] by name.
      arguments: pytrees of arrays.

    Returns:
      (the result, name -> what that weight was multiplied by).
    """
    with jax.sharding.use_abstract_mesh(_NO_KERNELS):
        jaxpr, shape = jax.make_jaxpr(run, return_shape=True)(weights, *arguments)
    leaves = jax.tree.leaves((weights, *arguments))
    names = list(jax.tree.leaves({name: name for name in weights}))
    watch = _Watch()
    outputs, _ = watch.evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, dict(enumerate(names)))
    return jax.tree.unflatten(jax.tree.structure(shape), outputs), watch.observed


class _Watch:
    """Interprets jaxprs and gathers the sums."""

    def __init__(self) -> None:
        self.observed: dict[str, Observed] = {}

    def evaluate(
        self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], weights: dict[int, str]
    ) -> tuple[list[Any], dict[int, str]]:
        """The outputs; `weights` says which arguments are weights, and the second result which outputs are."""
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
        names = {jaxpr.invars[i]: name for i, name in weights.items()}

        def among(atoms: Sequence[Any]) -> dict[int, str]:
            return {i: names[v] for i, v in enumerate(atoms) if not isinstance(v, Literal) and v in names}

        def values_of(atoms: Sequence[Any]) -> list[Any]:
            return [atom.val if isinstance(atom, Literal) else values[atom] for atom in atoms]

        for eqn in jaxpr.eqns:
            outputs, found = self._step(eqn, values_of(eqn.invars), among(eqn.invars))
            values |= dict(zip(eqn.outvars, outputs, strict=True))
            names |= {eqn.outvars[i]: name for i, name in found.items()}
        return values_of(jaxpr.outvars), among(jaxpr.outvars)

    def _step(self, eqn: Any, inputs: list[Any], weights: dict[int, str]) -> tuple[list[Any], dict[int, str]]:
        """The outputs of one equation, and which of them are weights."""
        primitive = eqn.primitive
        if primitive.name in _CALLS:
            inner = eqn.params[_CALLS[primitive.name]]
            jaxpr, consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
            return self.evaluate(jaxpr, consts, inputs, weights)
        if primitive.name == "scan":
            return self._scan(eqn.params, inputs, weights), {}
        if weights and primitive.name == "dot_general":
            self._note(weights, _dense(eqn.params["dimension_numbers"], inputs, *weights))
        if weights and primitive.name == "ragged_dot_general":
            self._note(weights, _ragged(inputs))
        outputs = primitive.bind(*inputs, **eqn.params)
        same = weights if primitive.name in _SAME else {}
        return list(outputs) if primitive.multiple_results else [outputs], same

    def _scan(self, parameters: dict[str, Any], inputs: list[Any], weights: dict[int, str]) -> list[Any]:
        """The loop, step by step; weights are among its constants or what it carries."""
        n_consts, n_carry = parameters["num_consts"], parameters["num_carry"]
        consts, carry, xs = inputs[:n_consts], inputs[n_consts:][:n_carry], inputs[n_consts + n_carry :]
        body, length = parameters["jaxpr"], parameters["length"]
        ys: list[list[Any]] = []
        for i in reversed(range(length)) if parameters["reverse"] else range(length):
            step_inputs = [*consts, *carry, *(x[i] for x in xs)]
            outputs, _ = self.evaluate(body.jaxpr, body.consts, step_inputs, weights)
            carry = outputs[:n_carry]
            ys.append(outputs[n_carry:])
        if parameters["reverse"]:
            ys.reverse()
        return [*carry, *(jnp.stack(y) for y in zip(*ys, strict=True))]

    def _note(self, weights: dict[int, str], seen: Observed) -> None:
        (name,) = weights.values()
        self.observed[name] = self.observed[name] + seen if name in self.observed else seen


def _dense(dimensions: Any, inputs: list[Any], at: int) -> Observed:
    """Of the operand that is not the weight: over all but the batch and the multiplied axes."""
    contracted, batch = (axes[1 - at] for axes in dimensions)
    kept = (*batch, *contracted)
    x = jnp.square(inputs[1 - at].astype(jnp.float32))
    total = jnp.sum(x, axis=tuple(axis for axis in range(x.ndim) if axis not in kept))
    total = jnp.transpose(total, [sorted(kept).index(axis) for axis in kept])
    rows = x.size // total.size
    return Observed(total, jnp.full([x.shape[axis] for axis in batch], rows, jnp.float32))


def _ragged(inputs: list[Any]) -> Observed:
    """Of rows that are sorted by expert: over those of each; rows beyond the last group are nobody's."""
    x, _, group_sizes = inputs
    x = jnp.square(x.astype(jnp.float32))
    ends = jnp.cumsum(group_sizes)
    expert = jnp.searchsorted(ends, jnp.arange(x.shape[0], dtype=ends.dtype), side="right")
    totals = jax.ops.segment_sum(x, expert, len(group_sizes) + 1, indices_are_sorted=True)
    return Observed(totals[:-1], group_sizes.astype(jnp.float32))

"""The gate of a gated MLP (Shazeer 2020, arXiv:2002.05202).

    y = act(gate) * up        gate, up, y [..., F]

Computed in float32, returned in the dtype of `up`. SwiGLU is "silu", GeGLU "gelu" (erf) or "gelu_pytorch_tanh".
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.op import Case, Implementation, Op, normal, register

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def gated_activation(
    gate: jax.Array, up: jax.Array, *, activation: str = "silu", implementation: str | None = None
) -> jax.Array:
    """Returns act(gate) * up, [..., F], in the dtype of `up`.

    Raises:
      ValueError: the activation is not one of `ACTIVATIONS`.
      ImplementationError: the named implementation does not exist or cannot run these arguments.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    return GATED_ACTIVATION(gate, up, activation=activation, implementation=implementation)


def _reference(gate: jax.Array, up: jax.Array, *, activation: str = "silu") -> jax.Array:
    activated = ACTIVATIONS[activation](gate.astype(jnp.float32))
    return (activated * up.astype(jnp.float32)).astype(up.dtype)


def _case(name: str, shape: tuple[int, ...], activation: str) -> Case:
    def make(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
        return {
            "gate": normal(rng, shape, dtype),
            "up": normal(rng, shape, dtype),
            "activation": activation,
        }

    return Case(name, make, reduction=1, differentiable=("gate", "up"))


GATED_ACTIVATION = register(
    Op(
        name="gated_activation",
        implementations={"xla": Implementation(_reference)},
        cases=tuple(_case(name, (3, 7, 65), name) for name in ACTIVATIONS),
    )
)

"""Optimizers and learning-rate schedules by the names that people write in a config."""

from __future__ import annotations

from typing import Literal, get_args

import optax

from jaxft.errors import JaxftError

Scheduler = Literal["linear", "cosine", "constant"]


def schedule(kind: Scheduler | str, learning_rate: float, *, total_steps: int, warmup_steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 over `warmup_steps`, then down to 0 at `total_steps` (or constant).

    Raises:
      JaxftError: an unknown kind.
    """
    decay_steps = max(total_steps - warmup_steps, 1)
    if kind == "linear":
        decay = optax.linear_schedule(learning_rate, 0.0, decay_steps)
    elif kind == "cosine":
        decay = optax.cosine_decay_schedule(learning_rate, decay_steps)
    elif kind == "constant":
        decay = optax.constant_schedule(learning_rate)
    else:
        raise JaxftError(
            "lr_scheduler_type", f"{kind!r} is not known", f"Choose one of {', '.join(get_args(Scheduler))}"
        )
    if warmup_steps == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), decay], [warmup_steps])


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) after clipping by the global norm (None or 0: none)."""
    update = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), update) if max_grad_norm else update

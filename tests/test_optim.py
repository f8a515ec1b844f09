"""Schedules as Hugging Face computes them, and AdamW with clipping against its own formulas in numpy."""

from __future__ import annotations

import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.errors import JaxftError
from jaxft.optim import Scheduler, adamw, schedule


def huggingface(kind: str, step: int, total: int, warmup: int) -> float:
    """The factor of transformers.optimization's get_{kind}_schedule_with_warmup."""
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


@pytest.mark.parametrize(("total", "warmup"), [(11, 0), (11, 3), (7, 7), (5, 9), (1, 0), (1, 1)])
@pytest.mark.parametrize("kind", get_args(Scheduler))
def test_schedules(kind: Scheduler, total: int, warmup: int):
    found = schedule(kind, 3e-4, total_steps=total, warmup_steps=warmup)
    expected = [3e-4 * huggingface(kind, step, total, warmup) for step in range(total)]
    np.testing.assert_allclose([float(found(step)) for step in range(total)], expected, rtol=1e-5, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", get_args(Scheduler))
def test_the_formulas_are_transformers(kind: Scheduler):
    """What `huggingface` above says, against transformers itself."""
    import torch
    from transformers import get_scheduler

    name = "constant_with_warmup" if kind == "constant" else kind
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=11)
    for step in range(11):
        assert theirs.get_last_lr()[0] == pytest.approx(huggingface(kind, step, 11, 3))
        optimizer.step()
        theirs.step()


def test_an_unknown_schedule_is_named():
    with pytest.raises(JaxftError, match=r"lr_scheduler_type: 'polynomial' is not known.*linear, cosine, constant"):
        schedule("polynomial", 1e-3, total_steps=3, warmup_steps=0)


def numpy_adamw(w: np.ndarray, gradients: list[np.ndarray], rate: float, clip: float | None) -> np.ndarray:
    """Algorithm 2 of arXiv:1711.05101 with b1 0.8, b2 0.95, eps 1e-6, weight decay 0.1, in float64."""
    w, m, v = w.astype(np.float64), np.zeros(w.shape), np.zeros(w.shape)
    for t, g in enumerate(gradients, 1):
        g = g.astype(np.float64)
        if clip:
            g = g * min(1.0, clip / np.linalg.norm(g))
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        w = w - rate * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6) + 0.1 * w)
    return w


@pytest.mark.parametrize("clip", [1.0, 100.0, 0.0, None])
def test_adamw(clip: float | None):
    rng = np.random.default_rng(0)
    w, *gradients = rng.standard_normal((4, 5, 3), np.float32)
    # The sizes differ, because what clips every gradient alike leaves Adam's steps as they are.
    gradients = [g * size for g, size in zip(gradients, (1.0, 5.0, 0.1), strict=True)]
    tx = adamw(1e-2, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, max_grad_norm=clip)
    params, state = jnp.asarray(w), tx.init(jnp.asarray(w))
    for gradient in gradients:
        with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
            updates, state = tx.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, numpy_adamw(w, gradients, 1e-2, clip), rtol=1e-5, atol=1e-6)
    other = numpy_adamw(w, gradients, 1e-2, None if clip == 1.0 else 1.0)
    assert np.abs(params - other).max() > 1e-4, "clipping does nothing here"

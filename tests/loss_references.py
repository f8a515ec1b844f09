"""Preference and policy losses as their papers write them: completions one by one, numpy in complex128.

Every function takes complex log-probabilities and compares real parts only, so that the imaginary part of f(x + ih) is
h times its derivative, exact to rounding (Squire and Trapp 1998, "Using complex variables to estimate derivatives").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

STEP = 1e-150
Completion = np.ndarray  # complex [n], its tokens' log-probabilities


def gradient(f: Callable[[np.ndarray], complex], x: np.ndarray) -> np.ndarray:
    """df/dx float64 of a real x of any shape."""
    result = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        moved = x.astype(np.complex128)
        moved[index] += 1j * STEP
        result[index] = np.imag(f(moved)) / STEP
    return result


def completions(values: np.ndarray, segment_ids: np.ndarray, loss_mask: np.ndarray) -> list[list[np.ndarray]]:
    """For each row of [B, T], the learnt values of each of its segments."""
    return [
        [row[(ids == s) & (mask != 0)] for s in range(1, ids.max(initial=0) + 1)]
        for row, ids, mask in zip(values, segment_ids, loss_mask, strict=True)
    ]


def sigma(x):
    return 1 / (1 + np.exp(-x))


def maximum(a, b):
    return a if np.real(a) > np.real(b) else b


def minimum(a, b):
    return a if np.real(a) < np.real(b) else b


def mean(x: np.ndarray):
    return np.sum(x) / len(x) if len(x) else 0.0


def pair_loss(kind: str, c: Completion, r: Completion, c_ref: Completion, r_ref: Completion, s) -> complex:
    """One pair's loss without the negative log-likelihood; `s` has beta, label_smoothing, simpo_gamma."""
    beta, eps = s.beta, s.label_smoothing
    log_pi_c, log_pi_r, log_ref_c, log_ref_r = (np.sum(x) for x in (c, r, c_ref, r_ref))
    h = np.log(np.exp(log_pi_c - log_ref_c) / np.exp(log_pi_r - log_ref_r))
    if kind == "sigmoid":
        return -(1 - eps) * np.log(sigma(beta * h)) - eps * np.log(sigma(-beta * h))
    if kind == "robust":
        loss = lambda sign: -np.log(sigma(sign * beta * h))  # noqa: E731
        return ((1 - eps) * loss(1) - eps * loss(-1)) / (1 - 2 * eps)
    if kind == "hinge":
        return maximum(0, 1 - beta * h)
    if kind == "ipo":
        return (mean(c) - mean(c_ref) - mean(r) + mean(r_ref) - 1 / (2 * beta)) ** 2
    if kind == "simpo":
        margin = beta * mean(c) - beta * mean(r) - s.simpo_gamma
        return -(1 - eps) * np.log(sigma(margin)) - eps * np.log(1 - sigma(margin))
    if kind == "cpo":
        margin = beta * log_pi_c - beta * log_pi_r
        return -(1 - eps) * np.log(sigma(margin)) - eps * np.log(1 - sigma(margin))
    odds = [np.exp(mean(x)) / (1 - np.exp(mean(x))) for x in (c, r)]
    return -beta * np.log(sigma(np.log(odds[0] / odds[1])))


def kto_loss(y: Completion, y_ref: Completion, liked: bool, z: float, s) -> complex:
    """lambda_y - v(x, y)."""
    reward, z0 = np.sum(y) - np.sum(y_ref), max(0.0, z)
    if liked:
        return s.desirable_weight * (1 - sigma(s.beta * (reward - z0)))
    return s.undesirable_weight * (1 - sigma(s.beta * (z0 - reward)))


def token_losses(new: Completion, old: np.ndarray, ref: np.ndarray, advantage: float, s) -> np.ndarray:
    """Each token's loss of one completion; `s` is a PolicyLoss."""
    ratios = np.exp(new - old)
    if s.importance_sampling_level == "sequence":
        ratios = np.full(len(new), np.prod(ratios) ** (1 / len(new))) if len(new) else ratios
    high = s.epsilon if s.epsilon_high is None else s.epsilon_high
    losses = []
    for ratio, log_pi, log_ref in zip(ratios, new, ref, strict=True):
        if s.loss_type == "cispo":
            loss = -min(ratio.real, high) * advantage * log_pi
        else:
            clipped = minimum(maximum(ratio, 1 - s.epsilon), 1 + high)
            loss = -minimum(minimum(ratio, s.delta or np.inf) * advantage, clipped * advantage)
        q = np.exp(log_ref) / np.exp(log_pi)
        losses.append(loss + s.beta * (q - np.log(q) - 1))
    return np.array(losses, np.complex128)


def policy_loss(losses: Sequence[np.ndarray], s) -> complex:
    """The step's loss from each completion's token losses."""
    if s.loss_type == "grpo":
        return sum(mean(x) for x in losses) / len(losses)
    total = sum(np.sum(x) for x in losses)
    if s.loss_type == "dr_grpo":
        return total / (len(losses) * s.max_completion_length)
    return total / sum(len(x) for x in losses)

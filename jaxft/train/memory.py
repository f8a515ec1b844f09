"""The step and the device's memory: the fastest policy that fits, and words for a step that does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import optax

from jaxft import console
from jaxft.errors import JaxftError
from jaxft.models import labels
from jaxft.models.decoded import frozen_for
from jaxft.models.decoder import Decoder
from jaxft.plan import GIB, plan
from jaxft.train import auto_remat
from jaxft.train.step import LossFunction, make_train_step


def fitting_step(
    decoder: Decoder, loss: LossFunction, tx: optax.GradientTransformation, arguments: Any, budget_gib: float | None
) -> Any:
    """The compiled step of the fastest policy that fits, which becomes the decoder's."""

    def compile_step(policy: str) -> Any:
        decoder.remat = policy
        step: Any = make_train_step(labels.split(decoder)[0], loss, tx, remat=policy)
        trainable, frozen, *rest = arguments
        frozen = jax.eval_shape(lambda frozen: frozen_for(decoder, frozen), frozen)
        return step.lower(trainable, frozen, *rest).compile()

    budget = auto_remat.device_budget() if budget_gib is None else int(budget_gib * GIB)
    if budget is None:
        return compile_step("none")
    rows, length = _shape(arguments[-1])
    decision = auto_remat.choose(decoder, tx, compile_step, rows=rows, length=length, budget=budget)
    console.console.print(decision.table)
    return decision.step


def _shape(batch: Any) -> tuple[int, int]:
    """(rows, tokens a row) of a micro-batch: its first leaf is the tokens, [A, B, T]."""
    _, rows, length = jax.tree.leaves(batch)[0].shape
    return rows, length


@contextlib.contextmanager
def explained_memory(decoder: Decoder, tx: optax.GradientTransformation, batch: Any) -> Iterator[None]:
    """Says of a step that the device's memory was too little for what takes most of it, and what to change.

    Raises:
      JaxftError: in place of the device's own error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        rows, length = _shape(batch)
        found = plan(decoder, tx, rows=rows, length=length)
        part, size = max(found.per_step().items(), key=lambda item: item[1])
        raise JaxftError(
            f"a step of {rows} x {length} tokens",
            f"ran out of device memory: of the planned {found.peak / GIB:.1f} GiB the largest part that grows with "
            f"the step is {part.replace('_', ' ')}, {size / GIB:.1f} GiB (remat {decoder.remat!r})",
            _REMEDIES[part],
        ) from error


_REMEDIES = {
    "kept": 'use_gradient_checkpointing="auto" or "offload" keeps less on the device',
    "working_set": "Lower per_device_train_batch_size or max_seq_length, or take tiles: offload,tile=2048",
    "loss": "Lower per_device_train_batch_size or max_seq_length",
    "gradients": "Lower r, or train fewer modules",
    "optimizer": 'optim="adamw_8bit" takes a quarter',
}

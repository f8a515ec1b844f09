"""Optimizers and learning-rate schedules by the names that people write in a config."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from jaxft.errors import JaxftError
from jaxft.models import labels
from pallas_kernels import adamw_8bit as quantized

Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"]
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw",
    "paged_adamw_32bit",
    "lion",
    "lion_32bit",
    "adafactor",
    "sgd",
]

MIN_8BIT_SIZE = 4096  # values; bitsandbytes' min_8bit_size
MIN_PAGED_BYTES = 2**16  # smaller leaves of a paged state stay on the device


def schedule(kind: Scheduler | str, learning_rate: float, *, total_steps: int, warmup_steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 over `warmup_steps`, then what `kind` says.

    linear and cosine end at 0 after `total_steps`; inverse_sqrt is proportional to 1 / sqrt(step), from step
    `warmup_steps` (10,000 without a warm-up) on, as in transformers; both constants stay.

    Raises:
      JaxftError: an unknown kind.
    """
    decay_steps = max(total_steps - warmup_steps, 1)
    if kind == "linear":
        decay = optax.linear_schedule(learning_rate, 0.0, decay_steps)
    elif kind == "cosine":
        decay = optax.cosine_decay_schedule(learning_rate, decay_steps)
    elif kind in ("constant", "constant_with_warmup"):
        decay = optax.constant_schedule(learning_rate)
    elif kind == "inverse_sqrt":
        timescale = warmup_steps or 10_000

        def decay(step: Any, /) -> Any:
            return learning_rate * jnp.sqrt(timescale / (jnp.asarray(step, jnp.float32) + timescale))
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
    return _clipped(optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay), max_grad_norm)


def lion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 0.0,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, arXiv:2302.06675) after clipping by the global norm; it has no epsilon."""
    return _clipped(optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay), max_grad_norm)


def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    **_: float,
) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) after clipping; its second moments decay by its own rule."""
    update = optax.adafactor(learning_rate, weight_decay_rate=weight_decay or None, multiply_by_parameter_scale=False)
    return _clipped(update, max_grad_norm)


def sgd(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0, max_grad_norm: float | None = 1.0, **_: float
) -> optax.GradientTransformation:
    """Gradient descent without momentum, after clipping by the global norm."""
    update = optax.sgd(learning_rate)
    return _clipped(optax.chain(optax.add_decayed_weights(weight_decay), update), max_grad_norm)


def _clipped(update: optax.GradientTransformation, max_grad_norm: float | None) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), update) if max_grad_norm else update


class Moments(NamedTuple):
    """Both moments of a small parameter, float32 [...]."""

    m: jax.Array
    v: jax.Array


class AdamW8bitState(NamedTuple):
    """What `adamw_8bit` keeps.

    Attributes:
      count: int32, the steps done.
      moments: the parameters' tree with `pallas_kernels.adamw_8bit.State` or `Moments` for each leaf.
    """

    count: jax.Array
    moments: Any


def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW with 8-bit moments (Dettmers et al. 2022, arXiv:2110.02861) after clipping by the global norm.

    In blocks of 256 values a moment is a code a value and an absmax a block, 2.03 bytes a parameter for both; leaves
    of fewer than 4096 values keep them in float32, as in bitsandbytes. Each step, with t counted from 1, decodes them,

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        update = -lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps) - lr weight_decay p

    in float32, and encodes the new ones. Updates are float32 whatever the parameter's dtype, so `optax.apply_updates`
    rounds a bfloat16 parameter once. The state is bit for bit that of `pallas_kernels.adamw_8bit.update`; the parameter
    is its to a float32 rounding or two, because a compiler may contract its product and difference into one operation.

    Args:
      learning_rate: a float, a traced scalar, or a schedule, called with the number of steps done.
      b1, b2, eps, weight_decay: AdamW's.
      max_grad_norm: None or 0: no clipping.
    """

    def init(params: optax.Params) -> AdamW8bitState:
        return AdamW8bitState(jnp.zeros((), jnp.int32), jax.tree.map(_init, params))

    def update(
        gradients: optax.Updates, state: AdamW8bitState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdamW8bitState]:
        if params is None:
            raise ValueError("adamw_8bit: update needs params")
        rate = jnp.asarray(learning_rate(state.count) if callable(learning_rate) else learning_rate, jnp.float32)
        count = jnp.asarray(optax.safe_increment(state.count))
        leaves, tree = jax.tree.flatten(gradients)
        updates, moments = [], []
        for g, old, p in zip(leaves, tree.flatten_up_to(state.moments), tree.flatten_up_to(params), strict=True):
            step, new = _step(g, old, step=count, learning_rate=rate, b1=b1, b2=b2, eps=eps)
            updates.append(step - rate * jnp.float32(weight_decay) * p.astype(jnp.float32) if weight_decay else step)
            moments.append(new)
        return tree.unflatten(updates), AdamW8bitState(count, tree.unflatten(moments))

    transformation = optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
    return _clipped(transformation, max_grad_norm)


def _init(parameter: jax.Array) -> quantized.State | Moments:
    if parameter.size >= MIN_8BIT_SIZE:
        return quantized.init(parameter)
    return Moments(*(jnp.zeros(parameter.shape, jnp.float32) for _ in Moments._fields))


def _step(
    gradient: jax.Array,
    moments: quantized.State | Moments,
    *,
    step: jax.Array,
    learning_rate: jax.Array,
    b1: float,
    b2: float,
    eps: float,
) -> tuple[jax.Array, quantized.State | Moments]:
    """(update without weight decay, float32 [...]; the new moments)."""
    if isinstance(moments, quantized.State):
        # What a step makes of a parameter of zeros is the update itself.
        zeros = jnp.zeros(gradient.shape, jnp.float32)
        return quantized.update(zeros, gradient, moments, step=step, learning_rate=learning_rate, b1=b1, b2=b2, eps=eps)
    g = gradient.astype(jnp.float32)
    m = b1 * moments.m + (1 - b1) * g
    v = b2 * moments.v + (1 - b2) * g * g
    mean, mean_square = m / quantized.bias_correction(b1, step), v / quantized.bias_correction(b2, step)
    return -learning_rate * mean / (jnp.sqrt(mean_square) + eps), Moments(m, v)


def paged(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with its state in pinned host memory: it is on the device for the time of an update only.

    The same updates, bit for bit. Leaves under 64 KiB stay on the device. `update` returns the state to the memory
    space in which it was given, so a caller that works on it further fetches it first and puts it back last, as the
    train step does. Memory plans count the state as if it were on the device.
    """

    def init(params: optax.Params) -> optax.OptState:
        return jax.tree.map(_to_host, tx.init(params))

    def update(
        gradients: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, new = tx.update(gradients, fetched(state), params)
        return updates, put_back(new, state)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _to_host(leaf: jax.Array) -> jax.Array:
    return leaf if leaf.nbytes < MIN_PAGED_BYTES else jax.device_put(leaf, jax.memory.Space.Host)


def fetched(state: optax.OptState) -> optax.OptState:
    """An optimizer's state with its leaves in host memory copied to the device; of use inside of jit."""
    return jax.tree.map(lambda leaf: _move(leaf, jax.memory.Space.Device), state)


def put_back(state: optax.OptState, like: optax.OptState) -> optax.OptState:
    """`state` with each leaf in the memory space of the leaf of `like`."""
    return jax.tree.map(lambda leaf, old: _move(leaf, jax.typeof(old).memory_space), state, like)


def _move(leaf: jax.Array, space: Any) -> jax.Array:
    return leaf if jax.typeof(leaf).memory_space == space else jax.device_put(leaf, space)


def _paged(make: Callable[..., optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
    return lambda *arguments, **settings: paged(make(*arguments, **settings))


_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw_torch": adamw,
    "adamw_torch_fused": adamw,
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
    "adamw_bnb_8bit": adamw_8bit,
    "paged_adamw_8bit": _paged(adamw_8bit),
    "paged_adamw": _paged(adamw),
    "paged_adamw_32bit": _paged(adamw),
    "lion": lion,
    "lion_32bit": lion,
    "adafactor": adafactor,
    "sgd": sgd,
}


def optimizer(
    name: Optimizer | str, learning_rate: optax.ScalarOrSchedule, **settings: Any
) -> optax.GradientTransformation:
    """The optimizer behind a name of TRL's `optim` setting; `settings` are the keywords of `adamw`.

    Raises:
      JaxftError: an unknown name.
    """
    if name not in _OPTIMIZERS:
        raise JaxftError("optim", f"{name!r} is not known", f"Choose one of {', '.join(_OPTIMIZERS)}")
    return _OPTIMIZERS[name](learning_rate, **settings)


def by_kind(
    tx: optax.GradientTransformation, embedding: optax.GradientTransformation | None, *, max_grad_norm: float | None
) -> optax.GradientTransformation:
    """`tx` for a decoder's trainable parameters and `embedding` for its embedding and head, where that is given.

    Both see gradients clipped by the norm of all of them together (None or 0: none).
    """
    if embedding is None:
        return _clipped(tx, max_grad_norm)
    kinds: dict[Hashable, optax.GradientTransformation] = {
        kind: embedding if kind in ("embedding", "head") else tx for kind in labels.KINDS
    }
    return _clipped(optax.partition(kinds, labels.labels), max_grad_norm)

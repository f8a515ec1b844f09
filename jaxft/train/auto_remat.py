"""remat="auto": the fastest policy whose compiled step fits a memory budget.

Candidates are ranked by what they cost beyond the step that keeps everything: products and attention that are computed
again, bytes that a scan copies into its stacks, bytes to host memory and back that nothing hides. Those whose memory
plan does not fit are left out; of the rest the fastest are compiled, in order, until one fits by the compiler's own
account. The choice is kept on disk for the same model, shapes, budget, device and versions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from jaxft import console
from jaxft.errors import JaxftError
from jaxft.fetch import cache_dir
from jaxft.models import labels
from jaxft.models.config import DecoderConfig
from jaxft.models.decoded import decoded_bytes
from jaxft.models.decoder import Decoder
from jaxft.models.remat import keeps_weights, spans
from jaxft.plan import GIB, MemoryPlan, plan

# Bytes that a step needs beside what the compiler counts: allocator rounding, the libraries' own.
HEADROOM = GIB // 8
MAX_COMPILED = 4
# By how much a plan may be wrong: what it puts this far over the budget is not compiled.
PLAN_ERROR = 1.1

# Rates of an H100, which only rank the candidates: operations and bytes a second.
_PRODUCTS, _ATTENTION, _MEMORY, _HOST_LINK = 720e12, 400e12, 2.8e12, 48e9
_UNHIDDEN = 0.25  # of what moves to the host beyond one array a layer, the share that computation does not hide
_DECODED = 2.5  # bytes that decoding a weight reads and writes
_TILES = 0.04  # of the MLP's time, what smaller products cost


class Candidate(NamedTuple):
    """A policy, what it costs beyond keeping everything in seconds a step, and its memory plan."""

    policy: str
    cost: float
    plan: MemoryPlan


class Decision(NamedTuple):
    """The policy that was chosen, its compiled step, and the table of all that was considered."""

    policy: str
    step: Any
    table: Any


def policies(num_layers: int) -> list[str]:
    """What is tried, in no order."""
    some = sorted({num_layers * eighths // 8 for eighths in range(1, 8)} - {0})
    mixed = [f"{rest}+all*{count}" for rest in ("full", "offload") for count in some]
    tiles = [f"offload,tile={tile}" for tile in (8192, 4096, 2048, 1024)]
    attention = "layer_input@host,attn_out@host,attn_lse@host"
    long = [f"{attention},tile={tile},prefetch=0" for tile in (8192, 4096)]
    straight = ["all,weights", "all,unroll=all"]
    return [*straight, "all", "attn_out,attn_lse", "full", "offload", attention, *mixed, *tiles, *long]


def candidates(decoder: Decoder, tx: optax.GradientTransformation, *, rows: int, length: int) -> list[Candidate]:
    """Every policy with its cost and plan, the fastest first."""
    c = decoder.config
    found = [
        Candidate(policy, cost(c, policy, rows, length), plan(decoder, tx, rows=rows, length=length, remat=policy))
        for policy in policies(c.num_hidden_layers)
    ]
    return sorted(found, key=lambda candidate: candidate.cost)


def cost(config: DecoderConfig, policy: str, rows: int, length: int) -> float:
    """Seconds a step that `policy` costs beyond keeping everything."""
    c, tokens = config, rows * length
    heads, kv_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    width = {"layer_input": c.hidden_size, "q": heads, "k": kv_heads, "v": kv_heads, "attn_out": heads}
    width |= {"mid": c.hidden_size, "gate": c.mlp_width, "up": c.mlp_width}
    products = 2 * tokens * c.hidden_size / _PRODUCTS  # seconds for each output column
    attention = 2 * rows * length**2 * heads / _ATTENTION
    total = 0.0
    for span in spans(policy, c.num_hidden_layers):
        here, seconds = span.policy, 0.0
        saved = {*here.kept, *here.offloaded}
        if not here.weights:  # decoded in every pass
            passes = 3 if here.recomputes_mlp else 2
            seconds += passes * _DECODED * c.hidden_size * (2 * (heads + kv_heads) + 3 * c.mlp_width) / _MEMORY
        if not here.everything:
            seconds += products * sum(width[name] for name in ("q", "k", "v", "gate", "up") if name not in saved)
            seconds += products * heads * ("mid" not in saved) + attention * ("attn_out" not in saved)
        if here.tile:
            seconds += _TILES * 8 * products * c.intermediate_size
        columns = sum(width.get(name, 0) for name in here.kept)
        copies = 0 if here.unroll is None or here.weights else 2  # written to the scan's stack and read back
        seconds += copies * 2 * columns * tokens * 2 / _MEMORY
        moved = sorted(width.get(name, 0) * tokens * 2 / _HOST_LINK for name in here.offloaded)
        share = _UNHIDDEN if here.prefetch else 2 * _UNHIDDEN
        seconds += 2 * share * sum(moved[:-1]) + (0.02 if here.prefetch else share) * sum(moved[-1:])
        total += (span.stop - span.start) * seconds
    return total


def choose(
    decoder: Decoder,
    tx: optax.GradientTransformation,
    compile_step: Callable[[str], Any],
    *,
    rows: int,
    length: int,
    budget: int,
) -> Decision:
    """The fastest policy whose step fits, compiled.

    Args:
      decoder: with its adapters; arrays or shapes.
      tx: the optimizer.
      compile_step: policy -> a compiled step, with a `memory_analysis`.
      rows, length: of a micro-batch.
      budget: bytes of the device's memory.

    Raises:
      JaxftError: nothing fits; the error has the table of what each would need.
    """
    every = candidates(decoder, tx, rows=rows, length=length)
    remembered = _memory_file(decoder, tx, rows, length, budget)
    known = json.loads(remembered.read_text())["policy"] if remembered.is_file() else None
    hopeful = [c for c in every if c.plan.peak <= PLAN_ERROR * budget]
    least = min(every, key=lambda candidate: candidate.plan.peak)
    first = [c for c in hopeful if c.policy == known]
    verdicts: dict[str, tuple[str, str]] = {}
    for candidate in dict.fromkeys([*first, *hopeful[:MAX_COMPILED], least]):
        step = compile_step(candidate.policy)
        # Where a step takes decoded weights, what they were decoded from is on the device beside it.
        beside = _replaced_bytes(decoder) if keeps_weights(candidate.policy) else 0
        needed = compiled_bytes(step) + beside + HEADROOM
        fits = needed <= budget
        verdicts[candidate.policy] = (f"{needed / GIB:.2f}", "chosen" if fits else "too large")
        if fits:
            _remember(remembered, candidate.policy)
            return Decision(candidate.policy, step, _table(every, verdicts, budget))
    smallest = sorted(every, key=lambda candidate: candidate.plan.peak)[:6]
    lines = "; ".join(f"{c.policy}: {c.plan.peak / GIB:.2f} GiB" for c in smallest)
    raise JaxftError(
        "memory budget",
        f"{budget / GIB:.2f} GiB is too little for {rows} x {length} tokens. The least that policies need: {lines}",
        "Take fewer or shorter rows, an 8-bit optimizer, or a larger memory_budget_gib",
    )


def compiled_bytes(step: Any) -> int:
    """What the compiler says that a step needs on the device."""
    found = step.memory_analysis()
    arrays = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return arrays + found.temp_size_in_bytes


def _replaced_bytes(decoder: Decoder) -> int:
    """Of the stacks that a step does not take where it takes decoded weights."""
    frozen = labels.split(decoder)[2]
    return decoded_bytes(decoder.config, frozen, decoder.model.embed_tokens.dtype)[1]


def device_budget() -> int | None:
    """Bytes that the device's allocator may give; None on a CPU, whose memory nobody needs to save."""
    statistics = jax.devices()[0].memory_stats()
    return int(0.97 * statistics["bytes_limit"]) if statistics and "bytes_limit" in statistics else None


def _table(every: list[Candidate], verdicts: dict[str, tuple[str, str]], budget: int) -> Any:
    rows = []
    for candidate in every:
        compiled, verdict = verdicts.get(candidate.policy, ("", ""))
        verdict = verdict or ("" if candidate.plan.peak <= PLAN_ERROR * budget else "does not fit")
        peak = f"{candidate.plan.peak / GIB:.2f}"
        rows.append((candidate.policy, f"+{candidate.cost * 1e3:.0f}", peak, compiled, verdict))
    columns = ("policy", "ms a step", "planned GiB", "compiled GiB", "")
    return console.table(f"remat for {budget / GIB:.1f} GiB", columns, rows)


def _memory_file(decoder: Decoder, tx: Any, rows: int, length: int, budget: int) -> Path:
    """Where the choice for these circumstances is kept."""
    _, trainable, frozen = labels.split(decoder)
    shapes = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves((trainable, frozen))]
    state = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(jax.eval_shape(tx.init, trainable))]
    device = jax.devices()[0].device_kind
    facts = (decoder.config, shapes, state, rows, length, budget, device, jax.__version__, policies(1))
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    return cache_dir() / "remat" / f"{name}.json"


def _remember(path: Path, policy: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"policy": policy}))
    os.replace(temporary, path)

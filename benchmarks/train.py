"""`python -m benchmarks.train --model llama-3.1-8b --quant nf4 --shape 2x2048 --remat offload`: one train step, timed.

Random weights of the real shapes, LoRA on all linears (experts too), random tokens, one document a row. Prints one JSON
line with the peers' field names; --profile adds what the device spends a step on, kernel by kernel.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft import console, lora, losses, optim
from jaxft.data.batch import Batch, PolicyBatch
from jaxft.models import labels, remat
from jaxft.models.config import DecoderConfig, MoEConfig, RopeConfig
from jaxft.models.decoded import frozen_for
from jaxft.models.decoder import Decoder, abstract_decoder
from jaxft.models.layers import EXPERTS, is_quantizable
from jaxft.models.params import parameters
from jaxft.quant import MXFP4Tensor, NF4Tensor
from jaxft.train import auto_remat
from jaxft.train.step import LossFunction, make_train_step
from pallas_kernels import nf4
from pallas_kernels.timing import busy, device_events

GIB = 2**30
_ROPE = RopeConfig(theta=500000.0, kind="llama3", factor=8.0)
MODELS = {
    "llama-3.1-8b": DecoderConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=_ROPE,
    ),
    "llama-3.2-1b": DecoderConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope=dataclasses.replace(_ROPE, factor=32.0),
    ),
    "smollm2-135m": DecoderConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope=RopeConfig(theta=1e5),
    ),
    "qwen3-4b": DecoderConfig(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        qk_norm="head",
        tie_word_embeddings=True,
        rope=RopeConfig(theta=1e6),
    ),
    "qwen2.5-7b": DecoderConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=32768,
        qkv_bias=True,
        rope=RopeConfig(theta=1e6),
    ),
    "gemma-2-9b": DecoderConfig(
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        max_position_embeddings=8192,
        hidden_act="gelu_pytorch_tanh",
        norm_placement="sandwich",
        norm_weight_offset=1.0,
        tie_word_embeddings=True,
        layer_types=("sliding_attention", "full_attention") * 21,
        sliding_window=4096,
        attention_scale=256**-0.5,
        attention_soft_cap=50.0,
        logit_soft_cap=30.0,
        embedding_multiplier=3584**0.5,
    ),
    "mistral-7b": DecoderConfig(  # v0.3, which has no window
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1e6),
    ),
    "phi-4": DecoderConfig(
        vocab_size=100352,
        hidden_size=5120,
        intermediate_size=17920,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=10,
        head_dim=128,
        max_position_embeddings=16384,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=250000.0),
    ),
    "qwen3-30b-a3b": DecoderConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=40960,
        qk_norm="head",
        rope=RopeConfig(theta=1000000.0),
        moe=MoEConfig(
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
            router_aux_loss_coef=0.001,
        ),
    ),
    "gpt-oss-20b": DecoderConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        qkv_bias=True,
        o_bias=True,
        layer_types=("sliding_attention", "full_attention") * 12,
        sliding_window=128,
        attention_sinks=True,
        rope=RopeConfig(
            theta=150000.0,
            kind="yarn",
            factor=32.0,
            truncate=False,
            original_max_position_embeddings=4096,
            attention_factor=1.3465735902799727,
        ),
        moe=MoEConfig(
            num_experts=32,
            num_experts_per_tok=4,
            moe_intermediate_size=2880,
            norm_topk_prob=True,
            router_bias=True,
            expert_bias=True,
            expert_act="clamped_swiglu",
            router_aux_loss_coef=0.9,
        ),
    ),
    "tiny-moe": DecoderConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        moe=MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, expert_bias=True),
        mlp_layer_types=("dense", "sparse", "sparse", "sparse"),
    ),
    "tiny": DecoderConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope=_ROPE,
    ),
}


LOSSES: dict[str, LossFunction] = {
    "sft": losses.sft,
    "policy": functools.partial(losses.policy, settings=losses.PolicyLoss()),
    "policy_kl": functools.partial(losses.policy, settings=losses.PolicyLoss(beta=0.04)),
}


class Prepared(NamedTuple):
    """A compiled train step and what it takes."""

    step: Any
    state: list[Any]  # what trains and the optimizer's state; donated, so the next step takes what this one returns
    frozen: Any
    batch: Batch | PolicyBatch


def main() -> None:
    arguments = parse_arguments()
    rows, length = map(int, arguments.shape.split("x"))
    names = ("model", "quant", "remat", "lora", "lora_dtype", "optim", "loss", "accumulation")
    settings = {name: getattr(arguments, name) for name in names}
    record: dict[str, Any] = {
        "kind": "train",
        "job": "jaxft",
        **settings,
        "layers": arguments.layers,
        "batch": rows,
        "seq": length,
    }
    prepared = prepare(arguments, rows, length, record)
    measure(prepared, arguments, arguments.accumulation * rows * length, record)
    record |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    print(json.dumps(record), flush=True)
    if arguments.out:
        with open(arguments.out, "a") as file:
            file.write(json.dumps(record) + "\n")
    if arguments.hlo:
        Path(arguments.hlo).write_text(prepared.step.as_text())
    if arguments.profile:
        print_profile(prepared, arguments.profile)


def prepare(arguments: argparse.Namespace, rows: int, length: int, record: dict[str, Any]) -> Prepared:
    """Makes the model and compiles its step; what that took goes into the record."""
    config = first_layers(MODELS[arguments.model], arguments.layers)
    start = time.perf_counter()
    decoder = random_decoder(config, arguments.quant)
    adapter = lora.LoraConfig(**{"r": 16, **arguments.lora})
    lora.attach(decoder, adapter, key=jax.random.key(0), dtype=jnp.dtype(arguments.lora_dtype))
    _, trainable, frozen = labels.split(decoder)
    jax.block_until_ready((trainable, frozen))
    record |= {"load_s": round(time.perf_counter() - start, 1), "after_load_gib": memory("bytes_in_use")}
    tx = optim.optimizer(arguments.optim, 1e-3)
    batch = random_batch(config, rows, length, arguments.accumulation)
    if arguments.loss != "sft":
        batch = policy_batch(batch)
    opt_state = tx.init(trainable)
    start = time.perf_counter()
    inputs = (trainable, frozen, opt_state, batch)
    if arguments.remat == remat.AUTO:
        step = choose(decoder, tx, inputs, rows, length, arguments, record)
    else:
        step = compiled(decoder, tx, inputs, LOSSES[arguments.loss], arguments.remat)
    analysis = step.memory_analysis()
    record |= {
        "compile_s": round(time.perf_counter() - start, 1),
        "temp_gib": round(analysis.temp_size_in_bytes / GIB, 3),
        "host_gib": round(analysis.host_temp_size_in_bytes / GIB, 3),
    }
    return Prepared(step, [trainable, opt_state], frozen_for(decoder, frozen), batch)


def first_layers(config: DecoderConfig, layers: int | None) -> DecoderConfig:
    """The model without its later layers; None leaves all."""
    layers = layers or config.num_hidden_layers
    kinds = {name: getattr(config, name)[:layers] for name in ("layer_types", "mlp_layer_types")}
    return dataclasses.replace(config, num_hidden_layers=layers, **kinds)


def compiled(decoder: Decoder, tx: Any, inputs: Any, loss: Callable[..., Any], policy: str) -> Any:
    """The step of one policy."""
    decoder.remat = policy
    loss = functools.partial(loss, dropout_key=jax.random.key(0))  # of use only where adapters drop something
    step: Any = make_train_step(labels.split(decoder)[0], loss, tx, remat=policy)
    trainable, frozen, *rest = inputs
    frozen = jax.eval_shape(lambda frozen: frozen_for(decoder, frozen), frozen)
    return step.lower(trainable, frozen, *rest).compile()


def choose(
    decoder: Decoder,
    tx: Any,
    inputs: Any,
    rows: int,
    length: int,
    arguments: argparse.Namespace,
    record: dict[str, Any],
) -> Any:
    """The step of the fastest policy that fits; the choice goes into the record."""
    budget_gib = arguments.budget_gib
    budget = auto_remat.device_budget() if budget_gib is None else int(budget_gib * GIB)
    if budget is None:
        raise SystemExit("--remat auto needs --budget-gib on a CPU")
    compile_step = functools.partial(compiled, decoder, tx, inputs, LOSSES[arguments.loss])
    decision = auto_remat.choose(decoder, tx, compile_step, rows=rows, length=length, budget=budget)
    console.console.print(decision.table)
    record |= {"remat": decision.policy, "budget_gib": budget / GIB, "auto": True}
    return decision.step


def run_step(prepared: Prepared) -> dict[str, jax.Array]:
    """One step; returns its metrics."""
    trainable, opt_state = prepared.state
    prepared.state[0], prepared.state[1], metrics = prepared.step(trainable, prepared.frozen, opt_state, prepared.batch)
    return metrics


def measure(prepared: Prepared, arguments: argparse.Namespace, tokens: int, record: dict[str, Any]) -> None:
    """Times synchronized steps; speed, memory and losses go into the record."""
    times, found = [], []
    for _ in range(arguments.warmup + arguments.steps):
        start = time.perf_counter()
        found.append(float(run_step(prepared)["loss"]))
        times.append(time.perf_counter() - start)
    median = statistics.median(times[arguments.warmup :])
    record |= {
        "first_step_s": round(record["compile_s"] + times[0], 1),
        "tok_s": round(tokens / median, 1),
        "step_ms": round(median * 1e3, 2),
        "peak_alloc_gib": memory("peak_bytes_in_use"),
        "losses": [round(x, 4) for x in found],
    }


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.train", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="so many of the model's layers")
    parser.add_argument("--quant", choices=("nf4", "mxfp4", "none"), default="nf4", help="mxfp4: of experts alone")
    parser.add_argument("--shape", default="2x2048", help="rows x tokens")
    parser.add_argument("--remat", default="offload", help="a policy of jaxft.models.remat, or auto")
    parser.add_argument("--budget-gib", type=float, help="of --remat auto; what the device has if not given")
    parser.add_argument("--lora", type=json.loads, default={}, help='fields of LoraConfig: {"lora_dropout": 0.05}')
    parser.add_argument("--lora-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--optim", choices=get_args(optim.Optimizer), default="adamw_8bit")
    parser.add_argument("--loss", choices=LOSSES, default="sft", help="policy: GRPO's; _kl: with its reference pass")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of --shape in a step")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N most expensive kernels")
    parser.add_argument("--out", help="append the JSON line to this file")
    parser.add_argument("--hlo", help="write the compiled program to this file")
    return parser.parse_args(argv)


def memory(name: str) -> float | None:
    """A statistic of the device's allocator in GiB; None on a CPU, which has none."""
    statistics_of_device = jax.devices()[0].memory_stats()
    return round(statistics_of_device[name] / GIB, 3) if statistics_of_device else None


def random_decoder(config: DecoderConfig, quant: str) -> Decoder:
    """A decoder of random bfloat16 weights, drawn on the device; quantized ones as codes, never decoded."""
    decoder = abstract_decoder(config, jnp.bfloat16)
    for index, (path, variable) in enumerate(parameters(decoder)):
        shape = variable.get_value().shape
        key = jax.random.fold_in(jax.random.key(1), index)
        if str(path[-2]).endswith("norm"):
            variable.set_value(jnp.full(shape, 1 - config.norm_weight_offset, jnp.bfloat16))
        elif quant == "nf4" and is_quantizable(path):
            variable.set_value(random_nf4(key, shape))
        elif quant == "mxfp4" and EXPERTS in path and path[-1] == "weight":
            variable.set_value(random_mxfp4(key, shape))
        else:
            variable.set_value(random_normal(key, shape))
    nnx.update(decoder, nnx.from_flat_state(parameters(decoder)))
    return decoder


@functools.partial(jax.jit, static_argnums=1)
def random_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard deviation 0.02, layer by layer or some rows at a time, so that no float32 copy of the whole exists."""
    keys = jax.random.split(key, shape[0])
    some = math.gcd(shape[0], 256) if len(shape) == 2 else None  # a divisor: what is left over would be a copy
    return jax.lax.map(
        lambda one: (0.02 * jax.random.normal(one, shape[1:])).astype(jnp.bfloat16), keys, batch_size=some
    )


def random_bytes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint8, layer by layer: JAX draws 32 bits for each byte, and peak memory is to be the step's."""
    keys = jax.random.split(key, shape[0])
    return jax.lax.map(lambda one: jax.random.bits(one, shape[1:], jnp.uint8), keys)


@functools.partial(jax.jit, static_argnums=1)
def random_nf4(key: jax.Array, shape: tuple[int, int, int]) -> NF4Tensor:
    """A stack of NF4 weights whose values have a standard deviation of about 0.02."""
    layers, rows, columns = shape
    blocks = rows * columns // nf4.BLOCK_SIZE
    nested = -(-blocks // nf4.NESTED_BLOCK_SIZE)
    codes_key, absmax_key = jax.random.split(key)
    return NF4Tensor(
        random_bytes(codes_key, (layers, rows, columns // 2)),
        random_bytes(absmax_key, (layers, blocks)),
        jnp.full((layers, nested), 0.01, jnp.float32),
        jnp.full((layers,), 0.04, jnp.float32),
        jnp.broadcast_to(jnp.asarray(nf4.QUANT_MAP), (layers, 16)),
        jnp.broadcast_to(jnp.asarray(nf4.NESTED_QUANT_MAP), (layers, 256)),
        shape=(rows, columns),
    )


@functools.partial(jax.jit, static_argnums=1)
def random_mxfp4(key: jax.Array, shape: tuple[int, int, int, int]) -> MXFP4Tensor:
    """A stack of experts' MXFP4 weights whose values have a standard deviation of about 0.02."""
    *stack, rows, columns = shape
    return MXFP4Tensor(
        random_bytes(key, (*stack, rows, columns // 2)),
        jnp.full((*stack, rows, columns // 32), 120, jnp.uint8),
        shape=(rows, columns),
    )


def random_batch(config: DecoderConfig, rows: int, length: int, accumulation: int = 1) -> Batch:
    """Micro-batches of rows that are one document each."""
    shape = (accumulation, rows, length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (*shape[:2], length + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    arrays = (tokens[..., :-1], tokens[..., 1:], np.ones(shape, np.float32), None, positions)
    return Batch(*(None if array is None else jnp.asarray(array) for array in arrays))


def policy_batch(text: Batch) -> PolicyBatch:
    """The rows as sampled completions: advantages of both signs, log-probabilities from the rollout near chance."""
    shape = text.tokens.shape
    rng = np.random.default_rng(1)
    advantages = rng.standard_normal((*shape[:2], 1)).astype(np.float32)
    old_log_probs = rng.normal(-12.0, 0.1, shape).astype(np.float32)
    return PolicyBatch(text, *map(jnp.asarray, (np.ones_like(advantages), advantages, old_log_probs)))


def print_profile(prepared: Prepared, top: int, steps: int = 3) -> None:
    """The device's kernels by the milliseconds that a step spends on them."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with jax.profiler.trace(folder):
            for _ in range(steps):
                metrics = run_step(prepared)
            jax.block_until_ready(metrics)
            wall = time.perf_counter() - start
        events = sorted(device_events(Path(folder)), key=lambda event: event[1])
    totals: dict[str, list[float]] = collections.defaultdict(list)
    for name, begin, end in events:
        totals[name].append((end - begin) / 1e6 / steps)
    every = sum(map(sum, totals.values()))
    busy_ms = busy([(begin, end) for _, begin, end in events]) / 1e6 / steps
    print(f"a step: {wall / steps * 1e3:.1f} ms, device busy {busy_ms:.1f}, kernels and copies {every:.1f}")
    print(f"{'ms a step':>10} {'calls':>6}  kernel")
    for name, each in sorted(totals.items(), key=lambda item: -sum(item[1]))[:top]:
        print(f"{sum(each):10.2f} {len(each) / steps:6.0f}  {name[:110]}")


if __name__ == "__main__":
    main()

"""`python -m benchmarks.sft_loop --model llama-3.2-1b`: packed rows against padded batches, and what the loop adds.

Random weights of the real shapes, LoRA on all seven linears, a synthetic instruction mix (60 % of the documents under
256 tokens, 40 % up to 1,024). Two numbers, one JSON line:

- tokens/s without padding of packed rows against batches of 8 documents padded to the longest (their lengths rounded up
  to 64, so that not every batch compiles anew; compilation is not counted);
- the time of a step in the trainer with loader, logging and checkpoints on, against the bare step on one batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.train import MODELS, random_decoder
from jaxft import lora, losses
from jaxft.data.batch import Example
from jaxft.data.loader import BatchLoader
from jaxft.models import labels
from jaxft.models.decoder import Decoder
from jaxft.train import trainer
from jaxft.train.arguments import TrainingArguments
from jaxft.train.step import make_train_step

PADDED_ROWS, PADDED_MULTIPLE = 8, 64


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    decoder = random_decoder(MODELS[arguments.model], arguments.quant)
    lora.attach(decoder, lora.LoraConfig(r=16), key=jax.random.key(0))
    decoder.remat = arguments.remat
    examples = documents(arguments.documents, MODELS[arguments.model].vocab_size, arguments.seq)
    packed = BatchLoader(examples, batch_size=arguments.rows, max_seq_length=arguments.seq, epochs=1000)
    padded = BatchLoader(
        examples, batch_size=PADDED_ROWS, max_seq_length=arguments.seq, packing=False,
        pad_to_multiple_of=PADDED_MULTIPLE,
    )  # fmt: skip
    record: dict[str, Any] = {
        "kind": "sft_loop",
        "model": arguments.model,
        "rows": arguments.rows,
        "seq": arguments.seq,
    }
    record |= {"utilisation": packed.report.utilisation, "padded_utilisation": padded.report.utilisation}
    rates = {name: bare(decoder, loader, arguments) for name, loader in (("packed", packed), ("padded", padded))}
    record |= {f"{name}_tok_s": rate for name, (rate, _) in rates.items()}
    record["packed_over_padded"] = rates["packed"][0] / rates["padded"][0]
    in_loop = looped(decoder, packed, arguments)
    record |= {"bare_step_ms": 1e3 * rates["packed"][1], "loop_step_ms": 1e3 * in_loop}
    record["loop_overhead"] = in_loop / rates["packed"][1] - 1
    record |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    print(json.dumps(record), flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.sft_loop")
    parser.add_argument("--model", choices=MODELS, default="llama-3.2-1b")
    parser.add_argument("--quant", choices=("nf4", "none"), default="none")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--rows", type=int, default=4, help="packed rows of a step")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=60, help="timed, of each kind")
    parser.add_argument("--save-steps", type=int, default=20)
    return parser.parse_args(argv)


def documents(n: int, vocab_size: int, longest: int) -> list[Example]:
    """The instruction mix: random tokens, all trained on."""
    rng = np.random.default_rng(0)
    short = rng.random(n) < 0.6
    lengths = np.where(short, rng.integers(16, 256, n), rng.integers(256, 1025, n)).clip(max=longest)
    return [
        Example(f"document {i}", rng.integers(0, vocab_size, length).astype(np.int32), np.ones(length, bool))
        for i, length in enumerate(lengths)
    ]


def bare(decoder: Decoder, loader: BatchLoader, arguments: argparse.Namespace) -> tuple[float, float]:
    """(tokens/s without padding, median seconds a step) of steps one after the other, without a loop around them.

    Batches of the steps are made and every shape is compiled before the clock starts; each step is waited for.
    """
    graphdef, trainable, frozen = labels.split(decoder)
    tx = settings(arguments, "").optimizer(1000)
    step = make_train_step(graphdef, losses.sft, tx, remat=decoder.remat)
    state = (jax.tree.map(lambda x: x.copy(), trainable), tx.init(trainable))
    batches = [jax.device_put(loader[i]) for i in range(min(arguments.steps, len(loader)))]
    for batch in {batch.tokens.shape: batch for batch in batches}.values():
        *state, metrics = step(state[0], frozen, state[1], batch)
    jax.block_until_ready(metrics)
    times, tokens = [], 0.0
    for batch in batches:
        start = time.perf_counter()
        *state, metrics = step(state[0], frozen, state[1], batch)
        tokens += float(metrics["tokens"])
        times.append(time.perf_counter() - start)
    return tokens / sum(times), statistics.median(times)


def looped(decoder: Decoder, loader: BatchLoader, arguments: argparse.Namespace) -> float:
    """Mean seconds a step in the trainer, over whole intervals between checkpoints after the first of them."""
    with tempfile.TemporaryDirectory() as folder:
        total = arguments.steps + arguments.save_steps
        trainer.run(trainer.Job(decoder, losses.sft, loader, total), settings(arguments, folder))
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return statistics.fmean(row["step_time_s"] for row in rows[arguments.save_steps :])


def settings(arguments: argparse.Namespace, output_dir: str) -> TrainingArguments:
    """Logging of every step, and checkpoints."""
    return TrainingArguments(
        output_dir=output_dir, optim="adamw_8bit", learning_rate=1e-4, save_steps=arguments.save_steps,
        save_total_limit=1, logging_steps=1,
    )  # fmt: skip


if __name__ == "__main__":
    main()

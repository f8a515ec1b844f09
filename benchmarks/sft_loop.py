"""`python -m benchmarks.sft_loop --model llama-3.2-1b`: packed rows against padded batches, and what the loop adds.

Random weights of the real shapes, LoRA on all seven linears, a synthetic instruction mix (60 % of the documents under
256 tokens, 40 % up to 1,024). Two numbers, one JSON line:

- tokens/s without padding of packed rows against batches of 8 documents padded to their longest. Few programs are
  compiled: padded batches are timed at multiples of --padded-multiple tokens, and an epoch's time is the sum over its
  batches of the time at each one's own length, between the two nearest timed ones. Compilation is not counted;
- the time of a step in the trainer with loader, logging and checkpoints on, against the bare step on the same batches;
  the loader needs grain, --no-loop leaves this part out.

On a CPU, where bfloat16 is slow, and few lengths must do:
--model smollm2-135m --dtype float32 --rows 1 --steps 1 --padded-multiple 512 --no-loop.
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
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.train import MODELS, random_batch, random_decoder
from jaxft import lora, losses
from jaxft.compilation_cache import enable_compilation_cache
from jaxft.data.batch import Batch, Example
from jaxft.data.loader import BatchLoader
from jaxft.models import labels
from jaxft.models.decoder import Decoder
from jaxft.train import trainer
from jaxft.train.arguments import TrainingArguments
from jaxft.train.step import make_train_step

PADDED_ROWS = 8


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    enable_compilation_cache()
    config = MODELS[arguments.model]
    decoder = random_decoder(config, arguments.quant)
    if arguments.dtype == "float32":
        nnx.update(decoder, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(decoder)))
    lora.attach(decoder, lora.LoraConfig(r=16), key=jax.random.key(0))
    decoder.remat = arguments.remat
    examples = documents(arguments.documents, config.vocab_size, arguments.seq)
    packed = BatchLoader(examples, batch_size=arguments.rows, max_seq_length=arguments.seq, epochs=1000)
    longest, tokens = longest_of_each(examples), sum(len(example.tokens) for example in examples)
    record: dict[str, Any] = {
        "kind": "sft_loop",
        **{name: getattr(arguments, name) for name in ("model", "quant", "dtype", "remat", "rows", "seq", "documents")},
        "utilisation": packed.report.utilisation,
        "padded_utilisation": tokens / (PADDED_ROWS * longest.sum()),
    }
    bare = Bare(decoder, arguments)
    lengths = range(arguments.padded_multiple, longest.max() + arguments.padded_multiple, arguments.padded_multiple)
    batches = [jax.device_put(packed[i]) for i in range(arguments.steps)]
    times, trained = bare.times(
        [batches, *([random_batch(config, PADDED_ROWS, length)] * arguments.steps for length in lengths)]
    )
    record |= {"compile_s": bare.compile_s, "packed_step_ms": 1e3 * statistics.median(times[0])}
    record["padded_step_ms"] = {n: 1e3 * statistics.median(t) for n, t in zip(lengths, times[1:], strict=True)}
    record["packed_tok_s"] = sum(trained[0]) / sum(times[0])
    record["padded_tok_s"] = 1e3 * tokens / between(longest, record["padded_step_ms"]).sum()
    record["packed_over_padded"] = record["packed_tok_s"] / record["padded_tok_s"]
    if arguments.loop:
        alone = statistics.fmean(bare.times([batches])[0][0])
        in_loop = looped(decoder, packed, arguments)
        record |= {"bare_step_ms": 1e3 * alone, "loop_step_ms": 1e3 * in_loop, "loop_overhead": in_loop / alone - 1}
    record |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    print(json.dumps(record), flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.sft_loop")
    parser.add_argument("--model", choices=MODELS, default="llama-3.2-1b")
    parser.add_argument("--quant", choices=("nf4", "none"), default="none")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of --quant none")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--rows", type=int, default=4, help="packed rows of a step")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--padded-multiple", type=int, default=256, help="tokens between the timed padded lengths")
    parser.add_argument("--steps", type=int, default=60, help="timed, of each kind")
    parser.add_argument("--save-steps", type=int, default=20)
    parser.add_argument("--loop", action=argparse.BooleanOptionalAction, default=True, help="time the trainer, too")
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


def longest_of_each(examples: Sequence[Example]) -> np.ndarray:
    """The length of the longest of each PADDED_ROWS documents, in a random order."""
    lengths = np.random.default_rng(1).permutation([len(example.tokens) for example in examples])
    return lengths[: len(lengths) // PADDED_ROWS * PADDED_ROWS].reshape(-1, PADDED_ROWS).max(axis=1)


def between(lengths: np.ndarray, times: dict[int, float]) -> np.ndarray:
    """The time of each length from those of a few, on straight lines from (0, 0) through them."""
    return np.interp(lengths, [0, *times], [0.0, *times.values()])


class Bare:
    """Train steps one after the other, without a loop around them; each is waited for. Nothing is trained for good."""

    def __init__(self, decoder: Decoder, arguments: argparse.Namespace) -> None:
        graphdef, trainable, self.frozen = labels.split(decoder)
        tx = settings(arguments, "").optimizer(1000)
        self.step: Any = make_train_step(graphdef, losses.sft, tx, remat=decoder.remat)
        self.state = [jax.tree.map(lambda x: x.copy(), trainable), tx.init(trainable)]
        self.programs: dict[tuple[int, ...], Any] = {}
        self.compile_s = 0.0

    def times(self, kinds: Sequence[Sequence[Batch]]) -> tuple[list[list[float]], list[list[float]]]:
        """(seconds, tokens) of each step of each kind, in turn, so that what else the machine does meets all alike."""
        for batches in kinds:
            self._compile(batches[0])
        found = [[self._run(batch) for batch in batches] for batches in zip(*kinds, strict=True)]
        seconds, tokens = np.moveaxis(np.array(found), -1, 0)  # [steps, kinds] each
        return seconds.T.tolist(), tokens.T.tolist()

    def _compile(self, batch: Batch) -> None:
        if shapes(batch) not in self.programs:
            start = time.perf_counter()
            self.programs[shapes(batch)] = self.step.lower(self.state[0], self.frozen, self.state[1], batch).compile()
            self.compile_s += time.perf_counter() - start

    def _run(self, batch: Batch) -> tuple[float, float]:
        start = time.perf_counter()
        *self.state, metrics = self.programs[shapes(batch)](self.state[0], self.frozen, self.state[1], batch)
        tokens = float(metrics["tokens"])
        return time.perf_counter() - start, tokens


def shapes(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """What a program is compiled for."""
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))


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

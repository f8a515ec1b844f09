"""`python -m benchmarks.grpo_memory`: rollouts and optimisation steps of GRPO in one process, and their peak of memory.

Llama-3.1-8B's shapes in NF4 with random weights and an adapter of rank 16; completions that never end, so that all of
them are as long as they may be. `GRPOTrainer` runs two steps: the first compiles. Prints a JSON line after each, and
one at the end. Most of the time goes into drawing tokens, one at a time, with a program for each size of the cache: a
long prompt (`--prompt 3000` of 4,000) needs the same memory in a fraction of it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.train import MODELS, memory, random_decoder
from jaxft import GRPOConfig, GRPOTrainer, LanguageModel, lora
from jaxft.train.trainer import TrainState


class Bytes:
    """A tokenizer as far as GRPO needs one: a token for each byte of a prompt; completions stay numbers."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def batch_decode(self, rows: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]

    def get_vocab(self) -> dict[str, int]:
        return {chr(byte): byte for byte in range(256)}


class Endless(LanguageModel):
    """A model whose completions are ended by their length only."""

    def eos_token_ids(self) -> list[int]:
        """None."""
        return []


def small_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Some reward that differs between completions."""
    return [-float(np.mean(ids)) for ids in completion_ids]


def main() -> None:
    arguments = parse_arguments()
    config = MODELS[arguments.model]
    decoder = random_decoder(config, arguments.quant)
    adapter = lora.LoraConfig(r=16)
    lora.attach(decoder, adapter, key=jax.random.key(0))
    decoder.remat = arguments.remat
    model: Any = Endless(decoder, Bytes(), None, arguments.model, arguments.length, adapter)  # pyright: ignore
    shown = {name: getattr(arguments, name) for name in ("model", "quant", "remat", "completions", "length", "prompt")}
    started = time.perf_counter()
    found: list[dict[str, Any]] = []

    def note(state: TrainState) -> None:
        seconds = round(time.perf_counter() - started, 1)
        in_use, peak = memory("bytes_in_use"), memory("peak_bytes_in_use")
        found.append({"seconds": seconds, "peak_alloc_gib": peak, "in_use_gib": in_use})
        print(json.dumps({"kind": "grpo_memory_step", **shown, "step": state.step, **found[-1]}), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=arguments.completions,
            num_generations=arguments.completions,
            max_completion_length=arguments.length - arguments.prompt,
            max_seq_length=arguments.length,
            max_steps=arguments.steps,
            optim="adamw_8bit",
            beta=arguments.beta,
            save_strategy="no",
            num_completions_to_print=0,
        )
        rows = [{"prompt": letter * arguments.prompt} for letter in "abcdefgh"]
        loaded = memory("peak_bytes_in_use")
        result = GRPOTrainer(model, small_tokens, settings, rows, callbacks=[note]).train()
    record = {
        "kind": "grpo_memory",
        **shown,
        "beta": arguments.beta,
        "peak_after_load_gib": loaded,
        "after_steps": found,
        "peak_alloc_gib": memory("peak_bytes_in_use"),
        "seconds": round(result.metrics["train_runtime"], 1),
        "losses": [row["loss"] for row in result.rows],
    }
    print(json.dumps(record | {"jax": jax.__version__, "device": jax.devices()[0].device_kind}), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.grpo_memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--quant", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--remat", default="offload,tile=4096", help="a policy of jaxft.models.remat")
    parser.add_argument("--completions", type=int, default=8, help="of one prompt, each a micro-batch")
    parser.add_argument("--length", type=int, default=4000, help="tokens of prompt and completion")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--beta", type=float, default=0.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()

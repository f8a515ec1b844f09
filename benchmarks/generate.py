"""`python -m benchmarks.generate --model llama-3.1-8b --quant nf4 --slots 64 --new 256`: decoding, timed.

Random weights of the real shapes, LoRA r=16 on all seven linears, unmerged, random prompts. "tok_s" is of whole calls,
"decode_tok_s" of the second half of the tokens: a call's time less that of a call for the first half. Its floor is the
time to read the weights and the cache's filled part once a token at --bandwidth. --ragged draws each completion's
length from 50 to 2,000, refills slots and leaves those out that are not needed any more, and compares that with running
every batch to its longest: every row of it, as a batch without refilling does. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.train import MODELS, memory, random_decoder
from jaxft import lora
from jaxft.generate import Completions, Sampling, complete
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.params import parameters

SHORTEST, LONGEST = 50, 2000


def main() -> None:
    arguments = parse_arguments()
    config = MODELS[arguments.model]
    decoder = random_decoder(config, arguments.quant)
    lora.attach(decoder, lora.LoraConfig(r=16), key=jax.random.key(0))
    rng = np.random.default_rng(0)
    rows = arguments.rows or arguments.slots
    prompts = rng.integers(0, config.vocab_size, (rows, arguments.prompt)).tolist()
    limits = rng.integers(SHORTEST, LONGEST + 1, rows).tolist() if arguments.ragged else [arguments.new] * rows

    def run(
        prompts: list[list[int]] = prompts, limits: int | list[int] = limits, *, compact: bool = True
    ) -> Completions:
        return complete(
            decoder,
            prompts,
            max_new_tokens=limits,
            batch_size=arguments.slots,
            sampling=Sampling(arguments.temperature),
            compact=compact,
        )

    def to_the_longest() -> None:
        for start in range(0, rows, arguments.slots):
            part = slice(start, start + arguments.slots)
            run(prompts[part], max(limits[part]), compact=False)

    compile_s, _ = timed(run)
    seconds, found = timed(run)
    tokens = sum(limits)
    record: dict[str, Any] = {
        "kind": "generate",
        **{name: getattr(arguments, name) for name in ("model", "quant", "slots", "prompt", "temperature", "ragged")},
        "rows": rows,
        "tokens": tokens,
        "first_s": round(compile_s, 1),
        "tok_s": round(tokens / seconds, 1),
        "utilisation": round(found.utilisation, 3),
        "peak_alloc_gib": memory("peak_bytes_in_use"),
    }
    if arguments.ragged:
        without = [timed(to_the_longest)[0] for _ in range(2)][-1]  # the first one compiles
        record |= {"seconds": round(seconds, 1), "to_the_longest_s": round(without, 1)}
        record["speed_up_of_refilling"] = round(without / seconds, 3)
    else:
        half = arguments.new // 2
        half_seconds = min(timed(lambda: run(limits=half))[0] for _ in range(2))
        decode = rows * (arguments.new - half) / (seconds - half_seconds)
        step_bytes = bytes_of_a_step(decoder, config, arguments.slots, arguments.prompt + (half + arguments.new) / 2)
        floor = arguments.slots * arguments.bandwidth / step_bytes
        record |= {"decode_tok_s": round(decode, 1), "floor_tok_s": round(floor, 1)}
        record["of_floor"] = round(decode / floor, 3)
    print(json.dumps(record | {"jax": jax.__version__, "device": jax.devices()[0].device_kind}), flush=True)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def bytes_of_a_step(decoder: Decoder, config: DecoderConfig, slots: int, position: float) -> float:
    """What one token of every slot reads: each weight once (of the embedding only the head's use), and the cache."""
    weights = sum(leaf.nbytes for _, variable in parameters(decoder) for leaf in jax.tree.leaves(variable.get_value()))
    embedding = decoder.model.embed_tokens.weight.get_value()
    unread = 0 if config.tie_word_embeddings else embedding.nbytes
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * embedding.dtype.itemsize
    return weights - unread + slots * position * cached


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.generate", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--quant", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--slots", type=int, default=1, help="completions that are decoded at once")
    parser.add_argument("--rows", type=int, default=0, help="completions; as many as slots if not given")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument(
        "--new",
        type=int,
        default=512,
        help="tokens of each completion (512: each half long enough to copy plain weights apart)",
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--ragged", action="store_true", help=f"completions of {SHORTEST} to {LONGEST} tokens")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes/s of the device's memory")
    return parser.parse_args()


if __name__ == "__main__":
    main()

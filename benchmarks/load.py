"""`python -m benchmarks.load --form bnb --folder DIR`: how long a model's weights take to load, and what they hold.

Writes a checkpoint of random weights into the folder (once), then loads it in a process of its own for each of the
`--repeats`, and prints one JSON line for each: seconds, bytes on the device after loading and at the highest, and the
highest anonymous host memory (without the pages of files). Forms: "bf16", plain weights that are quantized while they
load, and from the second time on come from the converted copy; "bnb", NF4 as bitsandbytes stores it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import jax
import ml_dtypes
import numpy as np

from benchmarks.train import GIB, MODELS, memory
from converters.bnb import write_bnb
from converters.checkpoint import TensorInfo
from converters.converted import load_nf4
from converters.hf_export import write_hf
from converters.open import open_checkpoint
from jaxft.fetch import cache_dir
from jaxft.models.config import DecoderConfig
from jaxft.models.params import expected_tensors, quantizable_tensors
from jaxft.quant import NF4Tensor
from pallas_kernels import nf4

BF16 = np.dtype(ml_dtypes.bfloat16)


class RandomCheckpoint:
    """Random weights of a config, made as they are read; implements `converters.checkpoint.QuantizedCheckpoint`."""

    def __init__(self, config: DecoderConfig, quantized: bool) -> None:
        self.where = "random weights"
        self.config: dict[str, Any] = hf_config(config)
        self.tensors = {name: TensorInfo(shape, BF16) for name, shape in expected_tensors(config).items()}
        self._quantized = frozenset(quantizable_tensors(config)) if quantized else frozenset()
        self._rng = np.random.default_rng(0)

    def read(self, name: str) -> np.ndarray:
        """Values of about 0.01: random mantissas and signs under a fixed exponent."""
        shape = self.tensors[name].shape
        bits = self._bytes(2 * int(np.prod(shape))).view(np.uint16)
        return ((bits & 0x807F) | 0x3C00).view(BF16).reshape(shape)

    def quantized(self, name: str) -> NF4Tensor | None:
        """Random codes and scales."""
        if name not in self._quantized:
            return None
        rows, columns = self.tensors[name].shape
        blocks = rows * columns // nf4.BLOCK_SIZE
        return NF4Tensor(
            self._bytes(rows * columns // 2).reshape(rows, columns // 2),
            self._bytes(blocks),
            np.full(-(-blocks // nf4.NESTED_BLOCK_SIZE), 0.01, np.float32),
            np.float32(0.04),
            np.asarray(nf4.QUANT_MAP, np.float32),
            np.asarray(nf4.NESTED_QUANT_MAP, np.float32),
            shape=(rows, columns),
        )

    def tokenizer(self) -> None:
        """There is none."""

    def sidecars(self) -> dict[str, bytes]:
        """None either."""
        return {}

    def _bytes(self, count: int) -> np.ndarray:
        return np.frombuffer(self._rng.bytes(count), np.uint8)


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a llama with these sizes."""
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    same += ("num_key_value_heads", "max_position_embeddings", "hidden_act", "rms_norm_eps", "tie_word_embeddings")
    rope, llama3 = config.rope, ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        **{name: getattr(config, name) for name in same},
        "rope_parameters": {"rope_type": rope.kind, "rope_theta": rope.theta, **{n: getattr(rope, n) for n in llama3}},
    }


def make(config: DecoderConfig, form: str, folder: Path) -> None:
    """Writes the checkpoint, unless it is there."""
    if not folder.exists():
        write = {"bf16": write_hf, "bnb": write_bnb}[form]
        write(RandomCheckpoint(config, quantized=form == "bnb"), folder)


def load(folder: Path) -> dict[str, Any]:
    """Loads it as `FastLanguageModel.from_pretrained` does; gives the figures."""
    jax.devices()  # the device's own start is not the loader's
    with HostMemory() as host:
        start = time.perf_counter()
        decoder = load_nf4(open_checkpoint(folder), dtype=jax.numpy.bfloat16, cache=cache_dir() / "nf4")
        jax.block_until_ready(jax.tree.leaves(decoder))
        seconds = time.perf_counter() - start
    return {
        "load_s": round(seconds, 2),
        "live_gib": memory("bytes_in_use"),
        "peak_gib": memory("peak_bytes_in_use"),
        "host_anonymous_gib": round(host.highest / GIB, 3),
    }


class HostMemory:
    """While it is entered, `highest` follows this process' anonymous memory, looked at 50 times a second."""

    def __enter__(self) -> Self:
        self.highest, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.look()

    def look(self) -> None:
        """Once."""
        self.highest = max(self.highest, memory_of(os.getpid())["RssAnon"])


def memory_of(pid: int) -> dict[str, int]:
    """The memory of a process in bytes, by Linux's names."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("Rss", "VmRSS"))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.load", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--form", choices=("bf16", "bnb"), default="bnb")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--once", action="store_true", help="load in this process")
    arguments = parser.parse_args()
    if arguments.once:
        facts = {"kind": "load", "model": arguments.model, "form": arguments.form, "jax": jax.__version__}
        print(json.dumps(facts | load(arguments.folder) | {"device": jax.devices()[0].device_kind}), flush=True)
        return
    make(MODELS[arguments.model], arguments.form, arguments.folder)
    for _ in range(arguments.repeats):
        subprocess.run([sys.executable, "-m", "benchmarks.load", *sys.argv[1:], "--once"], check=True)


if __name__ == "__main__":
    main()

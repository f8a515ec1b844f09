"""`python benchmarks/peer_grpo.py --model llama-3.1-8b --completions 8 --length 20000`: Unsloth's GRPO step, timed.

The peer of `python -m benchmarks.train --loss policy`: loss, backward pass and optimizer of one group of completions.
TRL's trainer as Unsloth rewrites it, whose `rollout_func` hands out random tokens, so that nothing is generated; NF4,
r=16 on all linears, 8-bit AdamW, no reference model, what else there is to choose as Unsloth has it. The first step
(--warmup) compiles, and checks packed rows against single ones. A step's seconds are the trainer's less the rollout's;
log_probs_s of them went into old or reference log-probabilities, of which there should be none; a step whose ooms grew
fell back to another path inside Unsloth. `UNSLOTH_GRPO_*` variables and --config choose paths. Needs unsloth, trl and
bitsandbytes, a GPU for figures, and no network. Writes a checkpoint first, as benchmarks/peer_steps.py does, and prints
one JSON line, with "error" in it if something failed, an allocation for instance.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peer_steps import MODELS, OFFLINE, _model, loaded, memory, model_of, report, write_checkpoint

_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS["llama-3.1-8b"] = _model(
    *("llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072),
    theta=500000.0,
    rope_parameters=_ROPE | {"original_max_position_embeddings": 8192},
)
PACKING = {"packed": "_unsloth_seq_packing_grad_ok", "packed_below": "_unsloth_seq_packing_grad_unsafe_T"}


class Clock:
    """Synchronized seconds of what runs inside a step, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)

    def now(self) -> float:
        """The time, once the device has done its work."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name: str, function: Callable[..., Any], counts: Callable[[], bool] = lambda: True) -> Any:
        """The function, its seconds added up where `counts` says so."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if not counts():
                return function(*args, **kwargs)
            start = self.now()
            result = function(*args, **kwargs)
            self.seconds[name] += self.now() - start
            return result

        return run


def canned(vocabulary: int, arguments: argparse.Namespace) -> Callable[..., dict[str, Any]]:
    """A `rollout_func`: random tokens that are neither padding nor the end, and no log-probabilities of them."""
    rng = np.random.default_rng(0)

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        tokenizer = trainer.processing_class
        shape = (len(prompts), arguments.length)
        tokens = rng.integers(len(tokenizer), vocabulary, shape)  # special ones come last in the tokenizer
        return {
            "prompt_ids": tokenizer(prompts)["input_ids"],
            "completion_ids": tokens.tolist(),
            "logprobs": None,
        }

    return rollout


def alternating(completions: list[Any], **_: Any) -> list[float]:
    """Rewards of both signs."""
    return [float(i + 1) * (-1) ** i for i in range(len(completions))]


def callback(clock: Clock, steps: list[dict[str, Any]]) -> Any:
    """Notes what each optimisation step took, as it ends."""
    import torch
    from transformers import TrainerCallback

    class Note(TrainerCallback):
        """Between a step's first micro-batch and its update."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.seconds.clear()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.start = clock.now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            log_probs = clock.seconds["log_probs"]
            rollout = clock.seconds["rollout"] - log_probs
            found = {
                "step_s": clock.now() - self.start - rollout,
                "log_probs_s": log_probs,
                "rollout_s": rollout,
                "forward_s": clock.seconds["forward"],
            }
            steps.append({name: round(seconds, 3) for name, seconds in found.items()} | peaks())
            print(steps[-1], file=sys.stderr, flush=True)

    return Note()


def peaks() -> dict[str, Any]:
    """What the allocator held at most since the last reset, in GiB; how often it could not get more."""
    import torch

    ooms = torch.cuda.memory_stats().get("num_ooms") if torch.cuda.is_available() else None
    return {
        "peak_alloc_gib": memory("max_memory_allocated"),
        "peak_reserved_gib": memory("max_memory_reserved"),
        "ooms": ooms,
    }


def make_trainer(peer: Any, tokenizer: Any, folder: str, arguments: argparse.Namespace, steps: list[Any]) -> Any:
    """The trainer: all completions of one prompt in a step, whose parts are timed."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": arguments.micro,
        "gradient_accumulation_steps": arguments.completions // arguments.micro,
        "num_generations": arguments.completions,
        "max_completion_length": arguments.length,
        "max_steps": arguments.warmup + arguments.steps,
        "beta": 0.0,
        "optim": "adamw_8bit",
        "bf16": True,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
    }
    clock = Clock()
    trainer = GRPOTrainer(
        model=peer,
        processing_class=tokenizer,
        reward_funcs=[alternating],
        args=GRPOConfig(**settings | arguments.config),
        train_dataset=Dataset.from_list([{"prompt": "a" * arguments.prompt}] * settings["max_steps"]),
        rollout_func=canned(peer.config.vocab_size, arguments),
        callbacks=[callback(clock, steps)],
    )
    parts = {"rollout": "_generate_and_score_completions", "forward": "compute_loss"}
    for part, name in parts.items():
        setattr(trainer, name, clock.timed(part, getattr(trainer, name)))
    name = "_get_per_token_logps_and_entropies"  # with gradients it is a part of the loss
    setattr(trainer, name, clock.timed("log_probs", getattr(trainer, name), lambda: not torch.is_grad_enabled()))
    return trainer


def measure(peer: Any, tokenizer: Any, arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """Trains for some steps; what they took goes into the record, also where one of them fails."""
    steps = record["steps"] = []
    trainable = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    record |= {
        "after_load_gib": memory("memory_allocated"),
        "trainable": sum(parameter.numel() for parameter in trainable),
        "lora_dtypes": sorted({str(parameter.dtype) for parameter in trainable}),
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(peer, tokenizer, folder, arguments, steps)
        record |= {"trainer": type(trainer).__name__, "loss_type": trainer.args.loss_type}
        if record["after_load_gib"] and "Unsloth" not in record["trainer"]:  # on a CPU it leaves TRL's as it is
            raise RuntimeError("Unsloth did not rewrite TRL's trainer")
        try:
            trainer.train()
        finally:
            logs = [row for row in trainer.state.log_history if "loss" in row]
            record |= {"losses": [row["loss"] for row in logs], "grad_norms": [row.get("grad_norm") for row in logs]}
            record |= {name: getattr(trainer.model, mark, None) for name, mark in PACKING.items()} | peaks()
    timed = steps[arguments.warmup :]
    median = statistics.median(step["step_s"] for step in timed)
    record |= {
        "tok_s": round(arguments.completions * arguments.length / median, 1),
        "step_ms": round(median * 1e3, 1),
        "first_step_s": steps[0]["step_s"],
    }
    for name in ("peak_alloc_gib", "peak_reserved_gib"):
        record[name] = max((step[name] for step in timed if step[name] is not None), default=None)


def run(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """Writes, loads and trains the model."""
    import torch
    import unsloth  # before transformers and trl, as its documentation asks
    import trl  # isort: skip
    from transformers import AutoTokenizer, __version__ as transformers  # isort: skip

    record |= {"unsloth": unsloth.__version__, "trl": trl.__version__, "transformers": transformers}
    record |= {"torch": torch.__version__}
    record["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    model = model_of(arguments.model, arguments.layers)
    record["layers"] = model.config["num_hidden_layers"]
    folder = arguments.folder or Path(tempfile.mkdtemp()) / "checkpoint"
    try:
        if not folder.exists():
            write_checkpoint(model.config, folder, "cuda" if torch.cuda.is_available() else "cpu")
        start = time.perf_counter()
        peer = loaded(model, folder, arguments.prompt + arguments.length)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        record["load_s"] = round(time.perf_counter() - start, 1)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    measure(peer, tokenizer, arguments, record)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="so many of the model's layers")
    parser.add_argument("--completions", type=int, default=8, help="of one prompt: what a step trains on")
    parser.add_argument("--length", type=int, default=20000, help="tokens of a completion")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--micro", type=int, help="completions in a micro-batch; all if not given")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--config", type=json.loads, default={}, help='of GRPOConfig: {"unsloth_grpo_mini_batch": 8}')
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes, such as a folder in memory")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there; one that is there is used")
    parser.add_argument("--out", help="append the JSON line to this file")
    arguments = parser.parse_args(argv)
    arguments.micro = arguments.micro or arguments.completions
    if arguments.completions % arguments.micro:
        parser.error("--micro has to divide --completions")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    for name in OFFLINE:
        os.environ.setdefault(name, "1")
    names = ("model", "completions", "length", "prompt", "micro", "config")
    record: dict[str, Any] = {"kind": "grpo", "job": "unsloth"} | {name: getattr(arguments, name) for name in names}
    record["environment"] = {name: value for name, value in os.environ.items() if name.startswith("UNSLOTH_GRPO_")}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the libraries print
            run(arguments, record)
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"[:500]
        raise
    finally:
        report(record, arguments.out)


if __name__ == "__main__":
    main()

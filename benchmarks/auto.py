"""`python -m benchmarks.auto --model llama-3.1-8b --shape 2x2048 --budgets 8 10 14`: is "auto" the fastest that fits?

For each budget, `--remat auto` chooses; then its choice and the next policies of its ranking that fit by the compiler's
account are timed. Prints a table and one JSON line a budget: the choice, its milliseconds a step, the fastest and its.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.train import GIB, MODELS, Prepared, compiled, random_batch, random_decoder, run_step
from jaxft import console, lora, losses, optim
from jaxft.models import labels
from jaxft.train import auto_remat


class Policies:
    """Compiled steps of one model and shape by policy, and what each takes; both are made once."""

    def __init__(self, model: str, quant: str, rows: int, length: int, steps: int) -> None:
        config = MODELS[model]
        self.rows, self.length, self.steps = rows, length, steps
        self.decoder = random_decoder(config, quant)
        lora.attach(self.decoder, lora.LoraConfig(r=16), key=jax.random.key(0), dtype=jnp.float32)
        self.tx = optim.optimizer("adamw_8bit", 1e-3)
        self.batch = random_batch(config, rows, length)
        _, trainable, self.frozen = labels.split(self.decoder)
        self.state = [trainable, self.tx.init(trainable)]
        self.compile = functools.cache(self._compile)
        self.milliseconds = functools.cache(self._milliseconds)

    def _compile(self, policy: str) -> Any:
        trainable, opt_state = self.state
        return compiled(self.decoder, self.tx, (trainable, self.frozen, opt_state, self.batch), losses.sft, policy)

    def _milliseconds(self, policy: str) -> float:
        """The median of synchronized steps, after two."""
        prepared = Prepared(self.compile(policy), self.state, self.frozen, self.batch)
        times = []
        for _ in range(2 + self.steps):
            start = time.perf_counter()
            float(run_step(prepared)["loss"])
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times[2:])

    def compare(self, budget_gib: float, rivals: int) -> dict[str, Any]:
        """The choice of "auto" within a budget beside the `rivals` best-ranked other policies that fit it."""
        budget = int(budget_gib * GIB)
        shape = {"rows": self.rows, "length": self.length}
        decision = auto_remat.choose(self.decoder, self.tx, self.compile, **shape, budget=budget)
        ranked = auto_remat.candidates(self.decoder, self.tx, **shape)
        fitting = (c.policy for c in ranked if c.policy != decision.policy and self.fits(c, budget))
        times = {policy: self.milliseconds(policy) for policy in [decision.policy, *itertools.islice(fitting, rivals)]}
        console.console.print(console.table(f"{budget_gib:g} GiB", ("policy", "ms"), list(times.items())))
        fastest = min(times, key=times.__getitem__)
        record = {"budget_gib": budget_gib, "auto": decision.policy, "auto_ms": times[decision.policy]}
        return record | {"fastest": fastest, "fastest_ms": times[fastest], "compared": len(times)}

    def fits(self, candidate: auto_remat.Candidate, budget: int) -> bool:
        """By the compiler's account; what the plan puts far over the budget is not compiled, as "auto" does it."""
        if candidate.plan.peak > auto_remat.PLAN_ERROR * budget:
            return False
        return auto_remat.compiled_bytes(self.compile(candidate.policy)) + auto_remat.HEADROOM <= budget


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.auto", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--quant", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--shape", default="2x2048", help="rows x tokens")
    parser.add_argument("--budgets", type=float, nargs="+", default=[8, 10, 14], help="GiB")
    parser.add_argument("--rivals", type=int, default=4, help="policies to time beside the choice")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args(argv)
    rows, length = map(int, arguments.shape.split("x"))
    found = Policies(arguments.model, arguments.quant, rows, length, arguments.steps)
    facts = {"kind": "auto", "model": arguments.model, "quant": arguments.quant, "batch": rows, "seq": length}
    facts |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    for budget in arguments.budgets:
        print(json.dumps(facts | found.compare(budget, arguments.rivals)), flush=True)


if __name__ == "__main__":
    main()

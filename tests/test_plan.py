"""The memory plan against the bytes of real arrays, and against peaks that were measured on an H100."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks.train import MODELS
from jaxft import cli, lora, optim
from jaxft.models import labels
from jaxft.plan import GIB, MemoryPlan, abstract_model, plan
from models import decoder_config, decoder_of, with_adapter
from tiny import hf_config

ADAMW = optim.optimizer("adamw_8bit", 1e-3)
ATTENTION = "layer_input@host,attn_out@host,attn_lse"

# model, quantization, policy, rows, tokens a row, the allocator's peak in GiB: one H100, jax 0.11.2, LoRA r=16 in
# float32 on all seven linears, 8-bit AdamW, `python -m benchmarks.train`.
MEASURED = [
    ("llama-3.1-8b", "nf4", "offload", 2, 2048, 6.713),
    ("llama-3.1-8b", "nf4", "offload", 4, 2048, 7.358),
    ("llama-3.1-8b", "nf4", "full", 2, 2048, 7.795),
    ("llama-3.1-8b", "nf4", "offload,tile=1024", 2, 2048, 6.56),
    ("llama-3.1-8b", "nf4", "all", 2, 2048, 18.26),
    ("llama-3.1-8b", "nf4", "all,unroll=all", 2, 2048, 20.295),
    ("llama-3.1-8b", "nf4", "all,unroll=all", 4, 2048, 29.86),
    ("llama-3.1-8b", "nf4", ATTENTION, 1, 8192, 7.39),
    ("llama-3.1-8b", "nf4", f"{ATTENTION}@host,tile=4096,prefetch=0", 1, 32768, 8.361),
    ("llama-3.1-8b", "nf4", f"{ATTENTION},tile=4096", 1, 65536, 11.09),
    ("llama-3.2-1b", None, "full", 4, 2048, 3.773),
    ("llama-3.2-1b", None, "all,unroll=all", 4, 2048, 9.129),
]


def planned(model: str, quantization: str | None, policy: str, rows: int, length: int) -> MemoryPlan:
    decoder = abstract_model(MODELS[model], jnp.bfloat16, lora.LoraConfig(r=16), quantization)
    return plan(decoder, ADAMW, rows=rows, length=length, remat=policy)


@pytest.mark.parametrize(("model", "quantization", "policy", "rows", "length", "measured"), MEASURED)
def test_within_a_tenth_of_what_was_measured(model, quantization, policy, rows, length, measured):
    assert planned(model, quantization, policy, rows, length).peak / GIB == pytest.approx(measured, rel=0.1)


def test_what_lives_all_through_the_run_is_exact():
    decoder = with_adapter(decoder_of(quantization="nf4"))
    _, trainable, frozen = labels.split(decoder)
    config = decoder_config(hf_config())
    found = plan(decoder, ADAMW, rows=2, length=16)
    abstract = plan(abstract_model(config, jnp.float32, lora.LoraConfig(), "nf4"), ADAMW, rows=2, length=16)

    def nbytes(tree) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    assert found.weights == abstract.weights == nbytes(frozen)
    assert (found.adapters, found.gradients) == (nbytes(trainable), nbytes(trainable))
    assert found.optimizer == nbytes(ADAMW.init(trainable))


def test_a_policy_moves_bytes_where_it_says():
    full, offload, one_kept = (
        planned("llama-3.1-8b", "nf4", policy, 2, 2048) for policy in ("full", "offload", "offload+full*1")
    )
    inputs = 32 * 2 * 2048 * 4096 * 2
    assert (full.kept, full.host) == (inputs, 0)
    assert (offload.kept, offload.host) == (0, inputs)
    assert (one_kept.kept, one_kept.host) == (inputs // 32, inputs - inputs // 32)


def test_the_command_prints_parts_or_bytes(tiny_hf_dir, capsys):
    arguments = ["plan", "--model", str(tiny_hf_dir), "--batch", "3", "--seq", "32", "--dtype", "float32"]
    assert cli.main(arguments) == 0
    assert "peak on the device" in capsys.readouterr().err
    assert cli.main([*arguments, "--json", "True"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak"] > found["weights"] > 0
    assert cli.main([*arguments, "--remat", "some"]) == 2

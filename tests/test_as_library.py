"""The modules in somebody else's program: the README's research code as it stands, and a whole-tree variant of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxft import Decoder, lora
from jaxft.models import labels
from jaxft.quant import QTensor
from readme import code_blocks

RESEARCH_CODE, LOADING_CODE = code_blocks("For research code", "python")


@pytest.fixture(autouse=True)
def _as_users_run_it() -> Iterator[None]:
    """With jax's own defaults: optax needs its promotion of dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(code: str) -> dict[str, Any]:
    """The names that a block of the README leaves behind."""
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_it_needs_neither_trainer_nor_api():
    assert not re.search(r"FastLanguageModel|Trainer|jaxft\.(api|train)", RESEARCH_CODE + LOADING_CODE)


def test_research_code(capsys: pytest.CaptureFixture[str]):
    names = run(RESEARCH_CODE)
    losses = [float(number) for number in re.findall(r"^loss (\S+)$", capsys.readouterr().out, re.MULTILINE)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.05
    assert names["step"]._cache_size() == 1, "it compiled more than one program"
    base = Decoder(names["config"], rngs=nnx.Rngs(0))
    for path, weight in nnx.to_flat_state(nnx.state(base)):
        kept = dict(nnx.to_flat_state(nnx.state(names["decoder"])))[path]
        np.testing.assert_array_equal(kept.get_value(), weight.get_value(), str(path))
    adapter = lora.adapter_tensors(names["decoder"])
    assert all(np.any(array) for name, array in adapter.items() if "lora_B" in name)


def test_all_parameters_in_one_tree():
    """The same with `lora.masked` instead of a split: weight decay and all, only the adapters move."""
    names = run(RESEARCH_CODE.partition("graphdef, trainable")[0])
    graphdef, params = nnx.split(names["decoder"])
    tokens = jax.random.randint(jax.random.key(2), (4, 32), 0, names["config"].vocab_size)
    tx = lora.masked(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1)))

    def loss(params):
        decoder = nnx.merge(graphdef, params)
        logits = decoder.logits(decoder(tokens[:, :-1]))
        return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    @jax.jit
    def step(params, opt_state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    before, opt_state, values = params, tx.init(params), []
    for _ in range(5):
        params, opt_state, value = step(params, opt_state)
        values.append(float(value))
    assert values[-1] < values[0] - 0.05
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, params)
    assert jax.tree.leaves(moved) == jax.tree.leaves(lora.optimizer_mask(before))


def test_loading_code(make_tiny_hf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (name,) = re.findall(r'open_checkpoint\("(.*?)"\)', LOADING_CODE)
    make_tiny_hf(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    decoder = run(LOADING_CODE)["decoder"]
    assert isinstance(decoder.model.layers.mlp.up_proj.weight.get_value(), QTensor)
    assert decoder(jnp.arange(5, dtype=jnp.int32)[None]).shape == (1, 5, 64)
    lora.attach(decoder, lora.LoraConfig(), key=jax.random.key(0))
    assert jax.tree.leaves(labels.split(decoder)[1])

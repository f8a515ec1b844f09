"""Whole runs compared: packed with unpacked, remat policies with a plain float32 loop, a LoRA run with TRL's (slow)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alpaca_cases as cases
from jaxft import FastLanguageModel, SFTConfig, SFTTrainer, lora, losses
from jaxft.data.loader import BatchLoader
from jaxft.data.packing import pack
from jaxft.models import labels
from jaxft.models.decoder import Decoder
from jaxft.train.step import make_train_step
from language_models import loaded
from models import batch_of, decoder_of, random_examples, relative_l2, with_adapter
from pinned import LLAMAFACTORY
from test_train_step import naive_sft

pytestmark = pytest.mark.slow
STEPS = 50


def losses_of(decoder: Decoder, batches: Iterator[Any], loss: Any = losses.sft) -> tuple[list[float], list[np.ndarray]]:
    """AdamW's loss of each step, and what trained at the end."""
    graphdef, trainable, frozen = labels.split(decoder)
    tx = optax.adamw(1e-3)
    step: Any = make_train_step(graphdef, loss, tx, remat=decoder.remat)
    state = tx.init(trainable)
    trainable = jax.tree.map(jnp.copy, trainable)
    found = []
    for batch in batches:
        trainable, state, metrics = step(trainable, frozen, state, batch)
        found.append(float(metrics["loss"]))
    return found, [np.asarray(leaf) for leaf in jax.tree.leaves(trainable)]


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_packed_equals_unpacked(accumulation: int) -> None:
    """The same documents in the same step, several a row or one: each loss to 1e-5 relative, in float32."""
    rng = np.random.default_rng(accumulation)
    length, rows = 48, 2 * accumulation
    packed, unpacked = [], []
    for seed in range(STEPS):
        examples = random_examples(rng.integers(3, 25, 3 * rows).tolist(), seed=seed)
        lengths = [len(example.tokens) for example in examples]
        together = pack(lengths, length)[:rows]
        together += [[]] * (rows - len(together))
        used = [i for row in together for i in row]
        alone = [[i] for i in used] + [[]] * (3 * rows - len(used))
        packed.append(batch_of(examples, together, length, accumulation))
        unpacked.append(batch_of(examples, alone, 24, accumulation))
    (one, weights), (two, others) = (losses_of(with_adapter(decoder_of()), iter(b)) for b in (packed, unpacked))
    worst = np.abs(np.array(one) / np.array(two) - 1).max()
    apart = max(relative_l2(a, b) for a, b in zip(weights, others, strict=True))
    print(f"accumulation {accumulation}: losses {worst:.1e} apart, weights after {STEPS} steps {apart:.1e}")
    assert worst < 1e-5
    assert one[-1] != one[0]


POLICIES = ("none", "full", "offload", "all", "attn_out,attn_lse", "full+all*1", "full,tile=16")


def test_remat_policies_follow_a_plain_loop() -> None:
    """50 steps: each policy's losses to 1e-3 of a float32 loop with all logits at once, and to 1e-5 of each other."""
    batches = [batch_of(random_examples([30, 20, 28, 16], seed=s), [[0], [1], [2], [3]], 32) for s in range(STEPS)]
    reference, _ = losses_of(with_adapter(decoder_of()), iter(batches), naive_sft)
    found = {policy: losses_of(with_adapter(decoder_of(remat=policy)), iter(batches))[0] for policy in POLICIES}
    for policy, ours in found.items():
        to_reference, to_none = (np.abs(np.array(ours) / np.array(x) - 1).max() for x in (reference, found["none"]))
        print(f"{policy}: {to_reference:.1e} to the reference, {to_none:.1e} to none")
        assert to_reference < 1e-3
        assert to_none < 1e-4


class InOrder(SFTTrainer):
    """Takes the rows as they come, one document a row, as the reference does."""

    def _loader(self, examples: Any, epochs: int, batch_size: int | None = None, accumulation: Any = None) -> Any:
        size = batch_size or self.args.per_device_train_batch_size
        return BatchLoader(
            examples, batch_size=size, max_seq_length=self._max_seq_length, packing=False, shuffle=False, epochs=epochs
        )


def test_the_eval_curve_is_trls(smollm2_gguf: Path, unpacked: Callable[[Any], Path], tmp_path: Path) -> None:
    """SmolLM2 on alpaca_en_demo: the evaluation loss every few steps within 1 % of TRL and PEFT's."""
    theirs = json.loads((Path(__file__).parent / "vectors" / "trl_alpaca_curve.json").read_text())
    model = loaded(smollm2_gguf)
    train, held_out = cases.rows(unpacked(LLAMAFACTORY), model.tokenizer)
    FastLanguageModel.get_peft_model(
        model, r=cases.R, lora_alpha=cases.ALPHA, target_modules=cases.TARGETS, use_gradient_checkpointing=False
    )
    values = lora.adapter_tensors(model.decoder)
    for name, array in values.items():
        if "lora_A" in name:
            values[name] = cases.first_values(array.shape, name.split(".lora_A")[0])
    lora.load_adapter_tensors(model.decoder, values)
    settings: dict[str, Any] = {
        **cases.TRAINING, "eval_strategy": "steps", "eval_steps": cases.EVAL_STEPS, "save_strategy": "no",
        "max_seq_length": cases.MAX_LENGTH, "output_dir": str(tmp_path / "run"), "assistant_only_loss": True,
    }  # fmt: skip
    trainer = InOrder(model, None, train, SFTConfig(**settings), held_out)
    before = trainer.evaluate()
    assert before["eval_tokens"] == theirs["eval_tokens"]
    rows = trainer.train().rows
    ours = {"0": before["eval_loss"], **{str(r["step"]): r["eval_loss"] for r in rows if "eval_loss" in r}}
    for step, loss in theirs["eval_loss"].items():
        print(f"step {step}: {ours[step]:.5f}, TRL {loss:.5f}, {ours[step] / loss - 1:+.2%}")
    assert ours.keys() == theirs["eval_loss"].keys()
    expected = theirs["eval_loss"]
    np.testing.assert_allclose([ours[step] for step in expected], list(expected.values()), rtol=0.01)
    ours_train = [row["loss"] for row in rows if "loss" in row]
    np.testing.assert_allclose(ours_train, theirs["loss"], rtol=0.02)
    assert theirs["eval_loss"]["24"] < theirs["eval_loss"]["0"] - 0.03, "nothing was learnt"

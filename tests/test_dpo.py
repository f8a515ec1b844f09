"""DPOTrainer: it learns preferences, the reference stays, and rows that cannot be compared are refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import dpo_cases
from alpaca_cases import first_values
from jaxft import DPOConfig, DPOTrainer, FastLanguageModel, LanguageModel, lora
from jaxft.data.preference import PairLoader, read_pairs
from jaxft.errors import JaxftError
from jaxft.train.dpo import precompute
from language_models import adapter_of, loaded
from pinned import LLAMAFACTORY

TEXTS = [{"prompt": f"Is {i} even?", "chosen": " It is fine.", "rejected": " No, and do not ask."} for i in range(6)]
MESSAGES = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in TEXTS
]
SETTINGS = DPOConfig(
    max_seq_length=128, per_device_train_batch_size=2, max_steps=6, learning_rate=3e-3, packing=False, beta=0.5
)


@pytest.fixture
def model(tiny_hf_dir: Path) -> LanguageModel:
    return FastLanguageModel.get_peft_model(loaded(tiny_hf_dir), r=4, use_gradient_checkpointing=False)


def trainer_of(model: LanguageModel, output_dir: Path, rows: Any = TEXTS, **settings: Any) -> DPOTrainer:
    args = dataclasses.replace(SETTINGS, output_dir=str(output_dir), **settings)
    return DPOTrainer(model, train_dataset=rows, args=args)


@pytest.mark.parametrize("rows", [TEXTS, MESSAGES], ids=["texts", "messages"])
def test_it_learns_what_is_preferred(model: LanguageModel, tmp_path: Path, rows: Any) -> None:
    result = trainer_of(model, tmp_path / "run", rows).train()
    first, last = result.rows[0], result.rows[-1]
    # A fresh adapter is the reference itself.
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert first["weight"] == 2
    assert last["loss"] < 0.4
    assert last["rewards/accuracies"] == 1
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-5)
    assert last["rewards/margins"] > 0.8
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]) == last
    found = trainer_of(model, tmp_path).evaluate(rows)
    assert found["eval_rewards/accuracies"] == 1
    assert found["eval_loss"] < 0.4


@pytest.mark.slow
def test_the_reference_once_or_in_every_step(tiny_hf_dir: Path, tmp_path: Path) -> None:
    """The same losses; and packed rows hold the same pairs."""
    losses = []
    for settings in ({}, {"precompute_ref_log_probs": True}, {"packing": True, "per_device_train_batch_size": 6}):
        model = FastLanguageModel.get_peft_model(loaded(tiny_hf_dir), r=4, use_gradient_checkpointing=False)
        both = {"max_steps": 3, "per_device_train_batch_size": 6, **settings}
        losses.append([row["loss"] for row in trainer_of(model, tmp_path / str(len(losses)), **both).train().rows])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)


def test_pairs_share_a_row_and_each_is_used_once(model: LanguageModel) -> None:
    pairs, report = read_pairs(TEXTS, model.tokenizer, max_seq_length=128)
    assert str(report).startswith("6 pairs, ")
    loader = PairLoader(pairs, batch_size=1, max_seq_length=200, accumulation=2, epochs=2)
    used = [loader.indices(step) for step in range(len(loader))]
    half = len(used) // 2
    for epoch in (used[:half], used[half:]):
        assert sorted(i for places in epoch for i in places.ravel() if i >= 0) == list(range(6))
    batch = loader[0]
    places = loader.indices(0)
    for a, b, p in zip(*np.nonzero(places >= 0), strict=True):
        for segment, document in zip((2 * p + 1, 2 * p + 2), pairs[places[a, b, p]], strict=True):
            here = batch.text.segment_ids[a, b] == segment
            np.testing.assert_array_equal(batch.text.tokens[a, b][here], document.tokens)
    nll_tokens = sum(pairs[i].chosen.loss_mask.sum() for i in places.ravel() if i >= 0)
    np.testing.assert_allclose(batch.nll_weight.max(), (places >= 0).sum() / nll_tokens, rtol=1e-6)
    assert jax.tree.leaves(batch)[0] is batch.text.tokens, "the trainer takes its shape from the first leaf"


def test_precomputed_values_stand_at_their_pairs(model: LanguageModel) -> None:
    pairs, _ = read_pairs(TEXTS, model.tokenizer, max_seq_length=128)
    packed, alone = (PairLoader(pairs, batch_size=2, max_seq_length=200, packing=p) for p in (True, False))
    for one, two in zip(precompute(model.decoder, packed), precompute(model.decoder, alone), strict=True):
        assert (one < 0).all()
        np.testing.assert_allclose(one, two, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["hinge", "ipo", "robust", "simpo", "cpo", "orpo"])
def test_every_loss_learns(model: LanguageModel, tmp_path: Path, loss_type: Any) -> None:
    rows = trainer_of(model, tmp_path / "run", loss_type=loss_type, max_steps=8).train().rows
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, "row 2: has no 'rejected'"),
        ("text", "row 2: has no 'prompt'"),
        ({**TEXTS[0], "chosen": 3}, "row 2, chosen: 'completion' is a number"),
        ({**TEXTS[0], "rejected": TEXTS[0]["chosen"]}, "row 2: 'chosen' and 'rejected' are the same"),
        ({**TEXTS[0], "chosen": "long " * 100}, "row 2: its two texts have .* max_seq_length is 128"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(model: LanguageModel, row: Any, words: str) -> None:
    with pytest.raises(JaxftError, match=words):
        read_pairs([TEXTS[1], row], model.tokenizer, max_seq_length=128)


def test_long_pairs_are_dropped_and_counted(model: LanguageModel) -> None:
    long = {**TEXTS[0], "chosen": "long " * 100}
    pairs, report = read_pairs([long, TEXTS[1]], model.tokenizer, max_seq_length=128, on_overlong="drop")
    assert len(pairs) == 1
    assert str(report).endswith("1 too long and dropped")
    with pytest.raises(JaxftError, match="no pairs left: 1 were too long"):
        read_pairs([long], model.tokenizer, max_seq_length=128, on_overlong="drop")
    with pytest.raises(JaxftError, match="on_overlong: is 'truncate'"):
        read_pairs(TEXTS, model.tokenizer, max_seq_length=128, on_overlong="truncate")


def test_a_reference_needs_an_adapter(tiny_hf_dir: Path) -> None:
    model = loaded(tiny_hf_dir)
    with pytest.raises(JaxftError, match="without its adapter, and there is none"):
        DPOTrainer(model, train_dataset=TEXTS, args=SETTINGS)
    DPOTrainer(model, train_dataset=TEXTS, args=dataclasses.replace(SETTINGS, loss_type="orpo"))
    with pytest.raises(JaxftError, match="beta"):
        DPOConfig(beta=0)


@pytest.mark.slow
def test_dpo_follows_trl(smollm2_gguf: Path, unpacked: Any, tmp_path: Path) -> None:
    """Losses and reward margins of TRL's run in tests/vectors/trl_dpo_curve.json, step by step."""
    model = loaded(smollm2_gguf, dtype="float32")
    model = FastLanguageModel.get_peft_model(model, **dpo_cases.LORA, use_gradient_checkpointing=False)
    shapes = {name: array.shape for name, array in adapter_of(model).items()}
    first = {
        name: first_values(shape, name.split(".lora_A")[0]) if ".lora_A" in name else np.zeros(shape, np.float32)
        for name, shape in shapes.items()
    }
    lora.load_adapter_tensors(model.decoder, first)
    args = DPOConfig(
        output_dir=str(tmp_path), beta=dpo_cases.BETA, max_seq_length=dpo_cases.MAX_LENGTH, packing=False, seed=0,
        save_strategy="no", **dpo_cases.TRAINING,
    )  # fmt: skip
    pairs = dpo_cases.rows(unpacked(LLAMAFACTORY), model.tokenizer)
    rows = DPOTrainer(model, train_dataset=pairs, args=args).train().rows
    curve = json.loads((Path(__file__).parent / "vectors" / "trl_dpo_curve.json").read_text())
    for name in dpo_cases.METRICS:
        ours, theirs = np.array([row[name] for row in rows]), np.array(curve[name])
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        print(f"{name}: {error:.2e} of the largest")
        assert error < 0.02, name
    assert np.abs(curve["rewards/margins"]).max() > 0.1, "there is something to follow"

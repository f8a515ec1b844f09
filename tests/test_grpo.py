"""GRPOTrainer: it learns from rewards, its steps agree with the rollout, and failing reward functions are named."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import grpo_learning
from jaxft import FastLanguageModel, GRPOConfig, GRPOTrainer, LanguageModel
from jaxft.errors import JaxftError
from jaxft.losses.tokens import token_log_probs
from jaxft.train import rewards
from language_models import adapter_of, loaded
from tiny import hf_config, write_tiny_hf, write_tokenizer

ROWS = [{"prompt": f"Say {word}", "answer": word} for word in ("yes", "no", "maybe", "so")]
SETTINGS = GRPOConfig(
    max_seq_length=64,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    num_generations=4,
    max_completion_length=6,
    max_steps=8,
    learning_rate=2e-2,
    num_completions_to_print=0,
)


def low_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of tokens below 150: about half of them to begin with."""
    return [float(np.mean(np.asarray(ids) < 150)) for ids in completion_ids]


@pytest.fixture
def model(tiny_hf_dir: Path) -> LanguageModel:
    return FastLanguageModel.get_peft_model(loaded(tiny_hf_dir), r=4, use_gradient_checkpointing=False)


def trainer_of(model: LanguageModel, output_dir: Path, functions: Any = low_tokens, rows: Any = ROWS, **settings: Any):
    args = dataclasses.replace(SETTINGS, output_dir=str(output_dir), **settings)
    return GRPOTrainer(model, functions, args, rows)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_it_learns_what_is_rewarded(model: LanguageModel, tmp_path: Path) -> None:
    result = trainer_of(model, tmp_path / "run", beta=0.01).train()
    rollouts = lines(tmp_path / "run" / "rollouts.jsonl")
    assert [row["step"] for row in rollouts] == list(range(1, 9))
    first, last = (np.mean([row["reward"] for row in part]) for part in (rollouts[:2], rollouts[-2:]))
    assert 0.3 < first < 0.7
    assert last > first + 0.2
    assert rollouts[-1]["rewards/low_tokens"] == rollouts[-1]["reward"]
    assert {"entropy", "kl", "clip_ratio/low", "clip_ratio/high"} <= set(result.rows[0])
    assert result.rows[0]["kl"] == pytest.approx(0, abs=1e-6), "a fresh adapter is the reference"
    assert result.rows[-1]["kl"] > 1e-3
    assert result.rows[0]["entropy"] > 4
    samples = lines(tmp_path / "run" / "completions.jsonl")
    assert len(samples) == 8 * 16
    assert set(samples[0]) == {"step", "row", "completion", "reward"}
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.slow
def test_several_steps_on_a_rollout(model: LanguageModel, tmp_path: Path) -> None:
    """The first has ratios of 1, later ones have not; a rollout's log-probabilities are a training forward's."""
    result = trainer_of(model, tmp_path / "run", max_steps=5, num_iterations=2, epsilon=1e-4).train()
    assert [row["step"] for row in lines(tmp_path / "run" / "rollouts.jsonl")] == [1, 3, 5]
    clipped = [row["clip_ratio/low"] + row["clip_ratio/high"] for row in result.rows]
    assert clipped[0] < 0.01 < clipped[1]

    trainer = trainer_of(model, tmp_path, num_iterations=2, temperature=0.8)
    rollout = trainer.rollout(model.decoder, trainer.prompts, seed=0)
    batch = jax.tree.map(lambda x: jax.numpy.asarray(x[0]), trainer.batch(rollout))
    found = token_log_probs(model.decoder, batch.text, temperature=0.8).log_prob
    np.testing.assert_allclose(batch.old_log_probs, found, atol=1e-4)


@pytest.mark.slow
def test_equal_rewards_teach_nothing_and_are_counted(model: LanguageModel, tmp_path: Path, capsys: Any) -> None:
    before = adapter_of(model)
    settings = {"max_steps": 2, "num_completions_to_print": 1}
    trainer_of(model, tmp_path / "run", lambda completions, **_: [1.0] * len(completions), **settings).train()
    shown = capsys.readouterr().err
    assert "reward" in shown
    assert "train_dataset" in shown
    rows = lines(tmp_path / "run" / "rollouts.jsonl")
    assert [row["frac_reward_zero_std"] for row in rows] == [1, 1]
    for name, array in adapter_of(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_truncated_completions_and_several_functions(model: LanguageModel, tmp_path: Path) -> None:
    def right(completions: list[Any], answer: list[str], prompts: list[Any], **_: Any) -> list[float]:
        assert all(completion[0]["role"] == "assistant" for completion in completions)
        assert [prompt[0]["content"] for prompt in prompts] == [f"Say {word}" for word in answer]
        return [float(len(word)) for word in answer]

    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    settings = {"reward_weights": (1.0, 0.5), "mask_truncated_completions": True}
    trainer = trainer_of(model, tmp_path, [low_tokens, right], rows, **settings)
    rollout = trainer.rollout(model.decoder, trainer.prompts, seed=1)
    assert rollout.rewards is not None
    np.testing.assert_array_equal(rollout.rewards[:, 1], np.repeat([3, 2, 5, 2], 4))
    finished = np.asarray(rollout.drawn.finished)
    assert not finished.all()
    text = trainer.batch(rollout).text
    np.testing.assert_array_equal(text.loss_mask.reshape(16, -1).any(axis=1), finished)
    assert text.segment_ids is None, "a row is one completion"


def fails(answer: list[str], **_: Any) -> list[float]:
    if "maybe" in answer:
        raise ValueError("no such word")
    return [0.0] * len(answer)


def sleeps(completions: list[str], **_: Any) -> list[float]:
    time.sleep(0.5)
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (fails, "reward function fails: raised ValueError at row c: no such word"),
        (lambda answer, **_: [float("nan") if a == "no" else 0.0 for a in answer], "returned nan for row b"),
        (lambda **_: [0.0], r"returned 1 values for 4 completions \(row a to row d\)"),
        (lambda **_: None, "returned a NoneType for 4 completions"),
        (lambda answer, **_: ["good"] * 4, "returned 'good' for row a"),
        (sleeps, "reward function sleeps: took longer than 0.05 s for 4 completions"),
    ],
)
def test_a_failing_reward_function_is_named_with_its_row(function: Any, words: str) -> None:
    arguments = {"completions": list("wxyz"), "answer": [row["answer"] for row in ROWS]}
    with pytest.raises(JaxftError, match=words):
        rewards.call(function, arguments, [f"row {letter}" for letter in "abcd"], timeout_s=0.05)


def test_a_failing_reward_function_stops_the_run_or_not(model: LanguageModel, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(JaxftError, match="reward function fails: raised ValueError at train_dataset row 3"):
        trainer_of(model, tmp_path / "stop", fails).train()
    before = adapter_of(model)
    result = trainer_of(model, tmp_path / "skip", fails, max_steps=1, on_reward_error="skip").train()
    assert result.steps == 1
    assert "Nothing is learnt from this rollout" in capsys.readouterr().err
    assert lines(tmp_path / "skip" / "rollouts.jsonl")[0]["reward"] is None
    for name, array in adapter_of(model).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"answer": "a"}], "row 1: has no 'prompt'"),
        ([ROWS[0], {"prompt": "a"}], "row 2: has no 'answer', as the first row has"),
        ([{"prompt": "long " * 60, "answer": "a"}], "row 1: its prompt has .* leaves 58 beside the completion"),
        ([{"prompt": "a"}], "reward function fails: requires 'answer', which is no column"),
        ([{"prompt": 3, "answer": "a"}], "row 1: 'prompt' is neither a string nor"),
    ],
)
def test_rows_that_do_not_fit_are_refused(model: LanguageModel, tmp_path: Path, rows: Any, words: str) -> None:
    with pytest.raises(JaxftError, match=words):
        trainer_of(model, tmp_path, fails, rows)


def test_settings_that_do_not_fit_are_refused(tiny_hf_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(JaxftError, match=r"num_generations.* divide the 16 completions"):
        dataclasses.replace(SETTINGS, num_generations=5)
    with pytest.raises(JaxftError, match="temperature"):
        dataclasses.replace(SETTINGS, temperature=0.0)
    base = loaded(tiny_hf_dir)
    with pytest.raises(JaxftError, match="without its adapter"):
        trainer_of(base, tmp_path, beta=0.1)
    with pytest.raises(JaxftError, match="has 2 for 1 reward functions"):
        trainer_of(base, tmp_path, reward_weights=(1.0, 2.0))


@pytest.mark.slow
def test_ids_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    """Vocabularies are padded: such an id has no text, is counted, and trains like any other."""
    folder = write_tiny_hf(tmp_path / "hf", hf_config(vocab_size=600))
    write_tokenizer(folder, 300)
    model = FastLanguageModel.get_peft_model(loaded(folder), r=4, use_gradient_checkpointing=False)
    seen: list[tuple[str, list[int]]] = []

    def note(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(zip(completions, completion_ids, strict=True))
        return [float(len(text)) for text in completions]

    result = trainer_of(model, tmp_path / "run", note, max_steps=2).train()
    assert all(np.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in result.rows)
    unknown = [[token for token in ids if token >= 300] for _, ids in seen]
    assert sum(map(bool, unknown)) > len(seen) / 2
    counted = [row["completions/unknown_ids"] for row in lines(tmp_path / "run" / "rollouts.jsonl")]
    assert sum(counted) == sum(map(len, unknown))
    for text, ids in seen:
        assert text == model.text_of([token for token in ids if token < 300])
    pieces: list[str] = []
    settings: dict[str, Any] = {"chat": False, "max_new_tokens": 20, "do_sample": True, "stop_strings": ["zzz"]}
    (answer,) = model.answer(["The answer"], on_text=lambda _, text: pieces.append(text), **settings)
    assert "".join(pieces).strip() == answer.rstrip("\ufffd").strip()


@pytest.mark.slow
def test_smollm2_learns_to_answer_shortly(smollm2_dir: Path, tmp_path: Path) -> None:
    """A real model under NF4: the reward is how far a completion stays below its limit."""
    limit = 24

    def short(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [1 - len(ids) / limit for ids in completion_ids]

    cities = ("France", "Italy", "Spain", "Japan", "Peru", "Egypt", "Kenya", "Chile")
    rows = [{"prompt": [{"role": "user", "content": f"What is the capital of {name}?"}]} for name in cities]
    model, _ = FastLanguageModel.from_pretrained(smollm2_dir, 128, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=16, use_gradient_checkpointing=False)
    settings = {"max_seq_length": 128, "max_completion_length": limit, "learning_rate": 2e-3, "max_steps": 10}
    trainer_of(model, tmp_path / "run", short, rows, **settings, beta=0.02).train()
    found = [row["reward"] for row in lines(tmp_path / "run" / "rollouts.jsonl")]
    assert np.mean(found[-3:]) > np.mean(found[:2]) + 0.15


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_learns_to_add(smollm2_gguf: Path, tmp_path: Path) -> None:
    """benchmarks/grpo_learning.py in small: held-out accuracy at least doubles, and the saved adapter keeps it."""
    size = grpo_learning.SIZES["small"]
    settings = dataclasses.replace(size.settings, output_dir=str(tmp_path / "run"))
    found = grpo_learning.learn(smollm2_gguf, grpo_learning.Problems.make(size), settings)
    print(found)
    assert found["before"] > 0
    assert found["after"] >= 2 * found["before"]
    assert found["reloaded"] == found["after"]

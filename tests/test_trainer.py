"""SFTTrainer: what a run does, leaves on disk and hands to callbacks, however it ends, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxft import FastLanguageModel, LanguageModel, SFTConfig, SFTTrainer
from jaxft.data.chat import tokenize_row
from jaxft.data.formats import read_rows
from jaxft.errors import JaxftError
from jaxft.train import trainer
from jaxft.train.trainer import TrainResult, TrainState
from language_models import adapter_of, loaded, logits_of, sums
from models import relative_l2

ROWS = sums(8)
KEYS = {"step", "loss", "weight", "tokens", "grad_norm", "learning_rate", "step_time_s", "tokens/s", "peak_memory_gib"}
UNKNOWN = {"mfu", "eta_s"}  # on a CPU, and in a first row
# One shape and one schedule for most runs, so that they compile one program.
SETTINGS = SFTConfig(max_seq_length=64, max_steps=4, learning_rate=3e-3, warmup_ratio=0.3, packing=False)


@pytest.fixture
def model(tiny_hf_dir: Path) -> LanguageModel:
    """With a fresh adapter."""
    return fresh(tiny_hf_dir)


def fresh(folder: Path, **settings: Any) -> LanguageModel:
    model = loaded(folder)
    return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False, **settings)


def train(
    model: LanguageModel, output_dir: Path, rows: Any = ROWS, callbacks: Any = (), **settings: Any
) -> TrainResult:
    args = dataclasses.replace(SETTINGS, output_dir=str(output_dir), **settings)
    return SFTTrainer(model, train_dataset=rows, args=args, callbacks=callbacks).train()


def assert_valid_and_changed(model: LanguageModel) -> None:
    """The adapter's values can be read, are finite, and B is no longer zero."""
    values = adapter_of(model)
    assert all(np.isfinite(array).all() for array in values.values())
    assert all(array.any() for name, array in values.items())
    assert np.isfinite(logits_of(model)).all()


def test_a_run(model: LanguageModel, tmp_path: Path):
    """Learns, logs, plots, and hands callbacks the arrays that it ends with."""
    states: list[tuple[int, dict[str, Any] | None, dict[str, np.ndarray]]] = []

    def note(state: TrainState) -> None:
        now = dataclasses.replace(model, decoder=state.decoder)
        states.append((state.step, state.metrics, adapter_of(now)))

    before = SFTTrainer(model, args=SETTINGS).evaluate(ROWS)["eval_loss"]
    result = train(model, tmp_path / "out", callbacks=[note], logging_steps=3)
    after = SFTTrainer(model, args=SETTINGS).evaluate(ROWS)["eval_loss"]
    assert after < before - 0.1
    assert (result.steps, result.interrupted) == (4, False)

    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows == result.rows
    assert [row["step"] for row in rows] == [1, 4]  # every third, the first and the last
    assert all(set(row) == KEYS | UNKNOWN for row in rows)
    assert all(math.isfinite(row[key]) for row in rows for key in KEYS)
    assert [(row["mfu"], row["eta_s"]) for row in rows] == [(None, None), (None, 0)]
    assert result.metrics["train_loss"] == pytest.approx((rows[0]["loss"] + rows[1]["loss"]) / 2)
    assert rows[0]["loss"] == pytest.approx(before, abs=0.5)
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["loss.png", "metrics.jsonl"]

    assert [step for step, _, _ in states] == [1, 2, 3, 4]
    assert [metrics for _, metrics, _ in states] == [rows[0], None, None, rows[1]]
    final = adapter_of(model)
    for (_, _, earlier), (_, _, later) in itertools.pairwise(states[1:]):
        assert all((earlier[name] != later[name]).any() for name in final)
    for name, array in states[-1][2].items():
        np.testing.assert_array_equal(final[name], array)


def test_no_learning_rate_is_computed_between_steps(model: LanguageModel, tmp_path: Path, monkeypatch):
    """A device would get to it behind the step that it was given before, and the host would wait for that one, too."""
    asked: list[int] = []
    make = trainer.TrainingArguments.schedule

    def schedule(self: Any, *arguments: Any) -> Callable[[Any], Any]:
        made = make(self, *arguments)
        return lambda step: asked.append(0) or made(step)

    monkeypatch.setattr(trainer.TrainingArguments, "schedule", schedule)
    so_far: list[int] = []
    result = train(model, tmp_path, callbacks=[lambda state: so_far.append(len(asked))])
    assert len(so_far) == 4
    assert so_far[0] == so_far[-1] > 0
    rates = [float(make(SETTINGS, 4)(step)) for step in range(4)]
    assert [row["learning_rate"] for row in result.rows] == pytest.approx(rates)


@pytest.mark.slow
def test_remat_auto_takes_what_fits_and_changes_no_loss(tiny_hf_dir: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    plain = train(fresh(tiny_hf_dir), tmp_path / "plain")
    model = FastLanguageModel.get_peft_model(loaded(tiny_hf_dir), r=4, use_gradient_checkpointing="auto")
    assert np.isfinite(logits_of(model)).all(), "before there is a choice"
    chosen = train(model, tmp_path / "auto", memory_budget_gib=1)
    assert "chosen" in capsys.readouterr().err
    assert model.decoder.remat == "all,weights"
    losses = [[row["loss"] for row in result.rows] for result in (plain, chosen)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_too_little_memory_at_run_time_names_the_part_and_the_setting(model, tmp_path, monkeypatch):
    def step(*arguments: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

    monkeypatch.setattr(trainer, "make_train_step", lambda *arguments, **settings: step)
    with pytest.raises(JaxftError, match=r"2 x 64 tokens: ran out of device memory.* is working set, .*'none'.*tiles"):
        train(model, tmp_path / "run")


def test_steps_epochs_and_the_learning_rate(model: LanguageModel, tmp_path: Path):
    """8 documents in rows of their own, 2 a batch: an epoch is 4 steps, and its warm-up 2, rounded up from 1.2."""
    result = train(model, tmp_path / "epoch", max_steps=-1)
    assert [row["step"] for row in result.rows] == [1, 2, 3, 4]
    rates = [row["learning_rate"] for row in result.rows]
    np.testing.assert_allclose(rates, [0, 1.5e-3, 3e-3, 1.5e-3], rtol=1e-6)
    # The same seed and settings give the same run, step by step.
    again = train(fresh(Path(model.name)), tmp_path / "again", max_steps=4)
    assert [row["loss"] for row in again.rows] == [row["loss"] for row in result.rows]


def test_more_steps_than_an_epoch_start_again(model: LanguageModel, tmp_path: Path):
    result = train(model, tmp_path / "out", rows=ROWS[:3])  # of which two batches make an epoch
    assert result.steps == 4
    weights = [row["weight"] for row in result.rows]
    assert weights[0] + weights[1] == weights[2] + weights[3]


def test_an_exception_in_a_callback(model: LanguageModel, tmp_path: Path):
    seen: dict[str, np.ndarray] = {}

    def fail(state: TrainState) -> None:
        if state.step == 3:
            seen.update(adapter_of(dataclasses.replace(model, decoder=state.decoder)))
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        train(model, tmp_path / "out", callbacks=[fail])
    assert_valid_and_changed(model)
    for name, array in adapter_of(model).items():
        np.testing.assert_array_equal(array, seen[name])
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.fixture
def python_handles_interrupts() -> Iterator[None]:
    """As in a program of its own; processes that run tests side by side ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_interrupts")
def test_one_interrupt_ends_a_run_and_two_end_it_at_once(model: LanguageModel, tmp_path: Path):
    def interrupt(state: TrainState) -> None:
        if state.step >= 2:
            signal.raise_signal(signal.SIGINT)

    result = train(model, tmp_path / "one", callbacks=[interrupt])
    assert (result.steps, result.interrupted) == (2, True)
    assert [row["step"] for row in result.rows] == [1, 2]
    assert (tmp_path / "one" / "loss.png").is_file()
    assert_valid_and_changed(model)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path / "two", callbacks=[interrupt, interrupt])
    assert_valid_and_changed(model)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


INTERRUPTED = """
import json, sys
import numpy as np
from jaxft import FastLanguageModel, SFTConfig, SFTTrainer, lora

folder, output_dir = sys.argv[1:]
model, _ = FastLanguageModel.from_pretrained(folder, load_in_4bit=False)
FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
rows = [{"prompt": "What is 2", "completion": " plus 3?"}] * 4
args = SFTConfig(output_dir=output_dir, max_seq_length=32, max_steps=1_000_000)
result = SFTTrainer(model, train_dataset=rows, args=args).train()
values = lora.adapter_tensors(model.decoder).values()
print(json.dumps({
    "interrupted": result.interrupted,
    "steps": result.steps,
    "finite": all(np.isfinite(v).all().item() for v in values),
    "changed": all(v.any().item() for v in values),
}))
"""


@pytest.mark.slow
def test_ctrl_c_in_a_process(tiny_hf_dir: Path, tmp_path: Path):
    """SIGINT from outside, at whatever moment of a step: the model is whole and the process goes on."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tiny_hf_dir), str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    with process:
        try:
            log, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 120
            while not (log.exists() and log.read_text().count("\n") > 3):
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, err
    found = json.loads(out)
    assert found == {"interrupted": True, "steps": found["steps"], "finite": True, "changed": True}
    assert found["steps"] == len(log.read_text().splitlines()) >= 4
    assert "stopping after this step (Ctrl-C again to stop at once)" in err


@pytest.mark.slow
def test_packing_changes_nothing(tiny_hf_dir: Path, tmp_path: Path):
    """An epoch of one step, with and without. A large epsilon makes AdamW linear in the gradient, which it would
    otherwise only take the sign of."""
    found = []
    for packing in (False, True):
        model = fresh(tiny_hf_dir)
        (row,) = train(
            model, tmp_path / str(packing), ROWS[:2], packing=packing, max_steps=-1, warmup_ratio=0.0, adam_epsilon=1.0,
            max_grad_norm=0.0,
        ).rows  # fmt: skip
        found.append((row, {name: array for name, array in adapter_of(model).items() if "lora_B" in name}))
    (alone, expected), (packed, values) = found
    for key in ("loss", "grad_norm", "weight", "tokens"):
        assert packed[key] == pytest.approx(alone[key], rel=1e-5)
    assert max(relative_l2(values[name], array) for name, array in expected.items()) < 1e-5


def test_dropout(tiny_hf_dir: Path, tmp_path: Path):
    """Other seeds drop other values, which shows once B is not zero; evaluation drops none."""
    found: list[list[float]] = []
    for seed in (1, 2):
        model = fresh(tiny_hf_dir, lora_dropout=0.5, target_modules=["down_proj"])
        result = train(model, tmp_path / str(seed), ROWS[:2], seed=seed)  # one batch: the order changes nothing
        found.append([row["loss"] for row in result.rows])
    one, two = found
    assert one[:2] == pytest.approx(two[:2], rel=1e-6)  # the warm-up's first rate is 0
    assert one[2:] != pytest.approx(two[2:], rel=1e-3)
    evaluated = [SFTTrainer(model, args=SETTINGS).evaluate(ROWS) for _ in range(2)]
    assert evaluated[0] == evaluated[1]


def test_noise_on_embeddings_is_for_training_only(tiny_hf_dir: Path, tmp_path: Path):
    """It changes the loss by its size, by its seed, and evaluation not at all; nothing is learnt here."""
    model = fresh(tiny_hf_dir)

    def losses(alpha: float | None, seed: int) -> list[float]:
        settings = {"neftune_noise_alpha": alpha, "seed": seed, "learning_rate": 0.0, "max_steps": 1}
        return [row["loss"] for row in train(model, tmp_path / f"{alpha}-{seed}", ROWS[:2], **settings).rows]

    evaluated = SFTTrainer(model, args=SETTINGS).evaluate(ROWS)
    without, little, much, other = losses(None, 1), losses(0.01, 1), losses(50.0, 1), losses(50.0, 2)
    assert little == pytest.approx(without, rel=1e-3)
    assert little != without
    assert much != pytest.approx(without, rel=1e-3)
    assert much != pytest.approx(other, rel=1e-3)
    noisy = dataclasses.replace(SETTINGS, neftune_noise_alpha=50.0)
    assert SFTTrainer(model, args=noisy).evaluate(ROWS) == evaluated


def direct_loss(model: LanguageModel, rows: list[dict[str, Any]]) -> tuple[float, int]:
    """Mean -log p of the trained tokens, one row at a time in numpy, and how many there are."""
    total, count = 0.0, 0
    for row in read_rows(rows):
        _, tokens, mask = tokenize_row(row, model.tokenizer)
        padded = np.pad(tokens, (0, 64 - len(tokens)))
        logits = logits_of(model, padded[None])[0, : len(tokens) - 1].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= log_p[np.arange(len(tokens) - 1), tokens[1:]][mask[1:]].sum()
        count += int(mask[1:].sum())
    return total / count, count


@pytest.mark.parametrize("packing", [True, False])
def test_evaluate_equals_a_direct_computation(model: LanguageModel, packing: bool):
    args = dataclasses.replace(SETTINGS, packing=packing)
    found = SFTTrainer(model, args=args, eval_dataset=ROWS[:5]).evaluate()
    loss, count = direct_loss(model, ROWS[:5])
    assert found == {"eval_loss": pytest.approx(loss, rel=1e-5), "eval_tokens": count}


LONG_ANSWER = [
    {"role": "user", "content": "What is the answer?"},
    {"role": "assistant", "content": "is the sum of numbers " * 12},
]
LONG = [*ROWS[:2], {"messages": LONG_ANSWER}]


def test_overlong_rows(model: LanguageModel):
    def evaluated(rows: Any, on_overlong: Any) -> dict[str, float]:
        return SFTTrainer(model, args=dataclasses.replace(SETTINGS, on_overlong=on_overlong)).evaluate(rows)

    with pytest.raises(JaxftError, match=r"eval_dataset row 3: has \d+ tokens; max_seq_length is 64"):
        evaluated(LONG, "error")
    assert evaluated(LONG, "drop") == evaluated(LONG[:2], "error")
    assert evaluated(LONG, "truncate")["eval_tokens"] > evaluated(LONG, "drop")["eval_tokens"] + 40
    with pytest.raises(JaxftError, match="nothing to train on: every row was dropped as too long"):
        evaluated(LONG[2:], "drop")
    with pytest.raises(JaxftError, match="on_overlong: is 'cut'"):
        evaluated(LONG, "cut")


QUESTION = {"messages": [{"role": "user", "content": "What is 2 plus 3?"}]}
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no rows": ([], "train_dataset: has no rows"),
    "other keys": (
        [ROWS[0], {"question": "2?", "answer": "3"}],
        "train_dataset row 2: has the form question/answer, and",
    ),
    "wrong type": ([{"prompt": "a", "completion": 3}], "train_dataset row 1: 'completion' is a number"),
    "unknown role": ([{"messages": [{"role": "robot", "content": ""}]}], r"row 1, messages\[0\]: has the unknown role"),
    "all masked": ([ROWS[0], QUESTION], "train_dataset row 2: has every label masked"),
    "too long": (LONG, r"train_dataset row 3: has \d+ tokens; max_seq_length is 64"),
    "none": (None, "train_dataset: is missing"),
    "no such file": ("rows.jsonl", "rows.jsonl: does not exist"),
    "other file": ("rows.csv", "rows.csv: is not a known kind of data file"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(case: str, model: LanguageModel, tmp_path: Path):
    rows, words = BAD_ROWS[case]
    with pytest.raises(JaxftError, match=words):
        train(model, tmp_path / "out", rows=rows)
    assert not list(tmp_path.glob("out/*"))


def test_a_file_names_its_line(model: LanguageModel, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + '{"text": 1}\n')
    with pytest.raises(JaxftError, match=r"rows\.jsonl row 3: 'text' is a number"):
        train(model, tmp_path / "out", rows=path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"logging_steps": 0}, "logging_steps: must be at least 1"),
        ({"per_device_train_batch_size": 0}, "batch_size: must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "accumulation: must be at least 1"),
        ({"num_train_epochs": 0, "max_steps": -1}, "epochs: must be at least 1"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type: 'polynomial' is not known"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str, model: LanguageModel, tmp_path: Path):
    with pytest.raises(JaxftError, match=words):
        train(model, tmp_path / "out", **settings)
    assert not list(tmp_path.glob("out/*"))


def test_bad_models(tiny_hf_dir: Path, make_tiny_hf: Callable[..., Path], model: LanguageModel, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(JaxftError, match=r"nothing in the model is trainable. Call get_peft_model first"):
        train(loaded(tiny_hf_dir), out)
    bare = fresh(make_tiny_hf(tmp_path / "bare", with_tokenizer=False))
    with pytest.raises(JaxftError, match=r"tokenizer: the model has none. Pass one to SFTTrainer"):
        train(bare, out)
    assert SFTTrainer(bare, model.tokenizer, args=SETTINGS).evaluate(ROWS)["eval_tokens"] > 0
    small = fresh(make_tiny_hf(tmp_path / "small", with_tokenizer=False, vocab_size=100))
    with pytest.raises(JaxftError, match=r"row 1: has the token id \d+, and the model has only 100 embeddings"):
        SFTTrainer(small, model.tokenizer, args=SETTINGS).evaluate(ROWS)
    model.tokenizer.chat_template = None
    with pytest.raises(JaxftError, match="train_dataset row 1: has messages, but the tokenizer has no chat template"):
        train(model, out)
    assert not list(tmp_path.glob("out/*"))


def test_bad_output_folders(model: LanguageModel, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    for name, words in (("file", "is a file"), ("file/out", "cannot be written to"), ("full", "is not empty")):
        with pytest.raises(JaxftError, match=f"{name}: {words}"):
            train(model, tmp_path / name)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "full", "notes"}
    assert not any(array.any() for name, array in adapter_of(model).items() if "lora_B" in name), "trained all the same"

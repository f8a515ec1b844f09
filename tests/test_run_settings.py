"""What a run is told and what it tells: settings' names, strict JSON lines, rates, other logs, best evaluations."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import DPOConfig, GRPOConfig, SFTConfig, lora
from jaxft.data.batch import Batch
from jaxft.errors import JaxftError
from jaxft.models import labels
from jaxft.train import metrics, reporting
from jaxft.train.arguments import TrainingArguments
from jaxft.train.metrics import Meter, MetricsLog, attention_pairs, operations_per_token
from jaxft.train.noise import document_lengths
from jaxft.train.trainer import best_step, evaluations_since_best
from models import decoder_of

# Names.


@pytest.mark.parametrize(
    ("cls", "name", "words"),
    [
        (SFTConfig, "learning_rte", "learning_rte: is no setting of SFTConfig. The nearest there is: learning_rate"),
        (SFTConfig, "num_epochs", "The nearest there is: num_train_epochs"),
        (DPOConfig, "betta", "betta: is no setting of DPOConfig. The nearest there is: beta"),
        (GRPOConfig, "num_generation", "The nearest there is: num_generations"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(cls: Any, name: str, words: str) -> None:
    with pytest.raises(JaxftError, match=words):
        cls(**{name: 3})


def test_other_trainers_names(capfd: pytest.CaptureFixture[str]) -> None:
    assert SFTConfig(max_length=99, evaluation_strategy="steps") == SFTConfig(max_seq_length=99, eval_strategy="steps")
    with pytest.raises(JaxftError, match="max_length: is another name of max_seq_length, which is given too"):
        SFTConfig(max_length=99, max_seq_length=98)
    capfd.readouterr()
    assert SFTConfig(bf16=True, dataset_num_proc=2) == SFTConfig()
    said = capfd.readouterr().err
    assert "bf16 has no effect: the dtype is from_pretrained's" in said
    assert "dataset_num_proc has no effect" in said
    assert dataclasses.replace(SFTConfig(max_length=9), seed=1).max_seq_length == 9


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"streaming": True}, "streaming: needs max_steps"),
        ({"save_steps": 0}, "save_steps: must be at least 1"),
        ({"eval_strategy": "sometimes"}, "eval_strategy: 'sometimes' is not known. Choose one of no, steps, epoch"),
        ({"on_nonfinite": "pray"}, "on_nonfinite: 'pray' is not known"),
        ({"early_stopping_patience": 2}, "early_stopping_patience: needs evaluations"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end: needs equal strategies"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 2},
            "needs a checkpoint of every evaluation: eval_steps is 3, save_steps 2",
        ),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(JaxftError, match=words):
        SFTConfig(**settings)


# Optimizers.


def test_embedding_and_head_have_their_own_rate_and_all_are_clipped_together() -> None:
    """SGD shows it: the update is -rate * gradient, and the norm is of all leaves."""
    decoder = decoder_of()
    labels.set_trainable(decoder, {"norm", "embedding", "head"})
    _, trainable, _ = labels.split(decoder)
    ones = jax.tree.map(jnp.ones_like, trainable)
    norm = float(optax.tree.norm(ones))
    args = TrainingArguments(
        optim="sgd", lr_scheduler_type="constant", learning_rate=1.0, embedding_learning_rate=0.1, max_grad_norm=1.0
    )
    tx = args.optimizer(10)
    updates, _ = tx.update(ones, tx.init(trainable), trainable)
    kinds = jax.tree.leaves(labels.labels(trainable))
    for kind, update in zip(kinds, jax.tree.leaves(updates), strict=True):
        rate = 0.1 if kind in ("embedding", "head") else 1.0
        np.testing.assert_allclose(update, -rate / norm, rtol=1e-5)
    assert set(kinds) == {"norm", "embedding", "head"}


# JSON lines.


def test_lines_are_strict_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"step": 1, "loss": float("nan"), "more": [float("inf"), 2.0]})
    log.close()
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "step": 1,
        "loss": None,
        "more": [None, 2],
    }


def test_a_run_that_goes_on_keeps_the_rows_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')  # killed inside a line
    log = MetricsLog(path, resume_at=2)
    log.write({"step": 3, "new": True})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "new": True},
    ]


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"step": 1})
    disk = log._file

    class Full:
        """Takes four bytes, and then no more."""

        def write(self, data: bytes) -> int:
            return disk.write(data[:4])

        def __getattr__(self, name: str) -> Any:
            return getattr(disk, name)

    log._file = Full()  # pyright: ignore[reportAttributeAccessIssue]
    for step in (2, 3):
        log.write({"step": step})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1}\n'
    assert capfd.readouterr().err.count("was not written (No space left on device)") == 1
    log._file = disk
    log.write({"step": 4})
    log.close()
    assert (tmp_path / "m.jsonl").read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))


# Rates.


def batch_of(segment_ids: list[list[int]], positions: list[list[int]]) -> Batch:
    shape = np.shape(positions)
    segments, places = np.array(segment_ids, np.int32), np.array(positions, np.int32)
    return Batch(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.ones(shape, np.float32), segments, places)


def test_attention_pairs_and_document_lengths() -> None:
    """Documents of 3, 2 and 4 tokens, and padding: 6 + 3 + 10 pairs."""
    batch = batch_of([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]], [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]])
    assert attention_pairs((batch, np.ones(3))) == 19
    lengths = document_lengths(Batch(*map(jnp.asarray, batch)))
    np.testing.assert_array_equal(lengths, [[3, 3, 3, 2, 2, 1], [4, 4, 4, 4, 2, 2]])


@pytest.mark.slow
def test_operations_and_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand for the tiny model, frozen in NF4 or trained; a step that needs all of the peak has an MFU of 1."""
    config = decoder_of().config
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size)
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    assert operations_per_token(decoder_of()) == 4 * weights
    assert operations_per_token(decoder_of(quantization="nf4")) == 4 * weights
    adapted = decoder_of()
    lora.attach(adapted, lora.LoraConfig(r=2, target_modules=("q_proj",)), key=jax.random.key(0))
    factors = config.num_hidden_layers * 2 * (config.hidden_size + q)
    assert operations_per_token(adapted) == 4 * weights + 6 * factors
    trained = decoder_of()
    labels.set_trainable(trained, {"base", "head"})
    assert operations_per_token(trained) == 6 * weights

    monkeypatch.setattr(metrics, "peak_flops", lambda: 1e9)
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    meter = Meter(decoder_of(), start=4, total_steps=10)
    meter.count(batch_of([[1, 1]], [[0, 1]]))
    row = meter.row(5, {"tokens": jnp.float32(100)}, 0.1)
    pairs = 12 * config.num_hidden_layers * q * 3
    assert row["mfu"] == pytest.approx((100 * 4 * weights + pairs) / 2.0 / 1e9)
    assert (row["tokens/s"], row["step_time_s"], row["eta_s"]) == (50, 2, None)


# Evaluations.

FALLING = [{"step": step, "eval_loss": loss} for step, loss in ((2, 1.0), (4, 0.8), (6, None), (8, 0.79), (10, 0.9))]


def test_best_and_patience() -> None:
    args = TrainingArguments()
    assert best_step(FALLING, args) == 8
    assert evaluations_since_best(FALLING, args) == 1
    coarse = TrainingArguments(early_stopping_threshold=0.05)
    assert evaluations_since_best(FALLING, coarse) == 3
    rewards = [{"step": 1, "eval_margin": 0.1}, {"step": 2, "eval_margin": 0.3}]
    assert best_step(rewards, TrainingArguments(metric_for_best_model="margin")) == 2
    assert best_step(rewards, TrainingArguments(metric_for_best_model="margin", greater_is_better=False)) == 1
    assert best_step([], args) is None
    with pytest.raises(JaxftError, match=r"evaluation gives no 'eval_loss'. There are: eval_margin"):
        best_step(rewards, args)


# Other logs.


def recorder(calls: list[tuple[str, Any]], called: str) -> Any:
    return lambda *args, **kwargs: calls.append((called, args or kwargs))


def test_trackers_get_settings_and_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, Any]] = []
    tracker = types.ModuleType("trackio")
    tracker.__spec__ = types.SimpleNamespace(name="trackio")  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("init", "log", "finish"):
        setattr(tracker, name, recorder(calls, name))
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    args = SFTConfig(output_dir=str(tmp_path / "mine"), report_to=("trackio",), seed=5)
    (sink,) = reporting.open_sinks(args)
    sink.log({"step": 3, "loss": 1.5, "mfu": None})
    sink.close()
    assert [name for name, _ in calls] == ["init", "log", "finish"]
    assert calls[0][1]["name"] == "mine"
    assert calls[0][1]["config"]["seed"] == 5
    assert calls[1][1] == ({"loss": 1.5},)


def test_logs_that_are_not_there() -> None:
    assert reporting.open_sinks(SFTConfig()) == []
    with pytest.raises(JaxftError, match=r"report_to: 'paper' is not known. Choose none, all, tensorboard"):
        reporting.open_sinks(SFTConfig(report_to=("paper",)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(JaxftError, match=r"report_to: wandb is not installed. Install it: pip install wandb"):
        reporting.open_sinks(SFTConfig(report_to="wandb"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a program cannot tell its own peak from its parent's")
def test_peak_memory_is_of_this_program_alone() -> None:
    report = "from jaxft.train.metrics import peak_memory; print(peak_memory())"
    large = f"import subprocess, sys; kept = b'1' * (1 << 30); subprocess.run([sys.executable, '-c', {report!r}])"
    done = subprocess.run([sys.executable, "-c", large], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1 << 30

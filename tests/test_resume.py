"""Runs that end early and go on: bit for bit, at a checkpoint that is whole, and only with what they began with."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxft import FastLanguageModel, LanguageModel, SFTConfig, SFTTrainer, losses
from jaxft.errors import JaxftError
from jaxft.train import checkpoint
from jaxft.train.trainer import TrainResult, TrainState
from language_models import adapter_of, loaded, sums

pytestmark = pytest.mark.slow

ROWS = sums(8)
# With dropout and noise: what they draw must not depend on where a run was interrupted.
SETTINGS = SFTConfig(
    max_seq_length=64, max_steps=6, learning_rate=3e-3, packing=False, save_steps=2, neftune_noise_alpha=5.0,
    gradient_accumulation_steps=2,
)  # fmt: skip
VOLATILE = {"step_time_s", "tokens/s", "peak_memory_gib", "eta_s", "mfu"}


def fresh(folder: Path, **settings: Any) -> LanguageModel:
    return FastLanguageModel.get_peft_model(
        loaded(folder), use_gradient_checkpointing=False, **{"r": 4, "lora_dropout": 0.1, **settings}
    )


def train(
    model: LanguageModel, output_dir: Path, resume: Any = None, callbacks: Any = (), rows: Any = ROWS, **settings: Any
) -> TrainResult:
    args = dataclasses.replace(SETTINGS, output_dir=str(output_dir), **settings)
    return SFTTrainer(model, train_dataset=rows, args=args, callbacks=callbacks).train(resume)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def learnt(result: TrainResult) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in VOLATILE} for row in result.rows]


@pytest.fixture(scope="module")
def undisturbed(tiny_hf_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """(folder, result, adapter) of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    model = fresh(tiny_hf_dir)
    return folder, train(model, folder), adapter_of(model)


def assert_equal(model: LanguageModel, expected: dict[str, np.ndarray]) -> None:
    for name, array in adapter_of(model).items():
        np.testing.assert_array_equal(array, expected[name])


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(undisturbed, tiny_hf_dir: Path, tmp_path: Path, capfd):
    folder, result, adapter = undisturbed
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]

    def terminate(state: TrainState) -> None:
        if state.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        train(fresh(tiny_hf_dir), tmp_path / "run", resume=True, callbacks=[terminate])
    assert caught.value.code == 0
    said = capfd.readouterr().err.replace("\n", " ")
    assert "has no checkpoint: the run starts from the beginning" in said
    assert "terminated: saving a checkpoint after this step" in said
    assert checkpoints(tmp_path / "run") == ["checkpoint-2", "checkpoint-3"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    model = fresh(tiny_hf_dir)
    (tmp_path / "run" / "checkpoint-9.orbax-checkpoint-tmp").mkdir()  # as a killed process leaves it
    again = train(model, tmp_path / "run", resume=True)
    assert_equal(model, adapter)
    assert learnt(again) == learnt(result)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert checkpoints(tmp_path / "run") == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-6"]


def test_a_finished_run_has_nothing_left_to_do(undisturbed, tiny_hf_dir: Path, tmp_path: Path):
    folder, result, adapter = undisturbed
    shutil.copytree(folder, tmp_path / "run")
    model = fresh(tiny_hf_dir)
    assert learnt(train(model, tmp_path / "run", resume=True)) == learnt(result)
    assert_equal(model, adapter)


@pytest.mark.parametrize(
    ("model_settings", "settings", "words"),
    [
        ({}, {"learning_rate": 1e-3}, "settings.learning_rate: 0.003 in the checkpoint, 0.001 now"),
        ({}, {"max_steps": 7}, "settings.max_steps: 6 in the checkpoint, 7 now"),
        ({"lora_alpha": 5}, {}, "is of another run: adapter.lora_alpha: 16 in the checkpoint, 5 now. Resume with"),
        ({"target_modules": ["q_proj"]}, {}, "adapter.target_modules: "),
    ],
)
def test_another_run_is_refused(undisturbed, tiny_hf_dir, tmp_path, model_settings, settings, words):
    folder, _, _ = undisturbed
    model = fresh(tiny_hf_dir, **model_settings)
    before = adapter_of(model)
    with pytest.raises(JaxftError, match=words):
        train(model, tmp_path / "run", resume=folder / "checkpoint-4", **settings)
    assert_equal(model, before)


def test_another_model_other_data_and_no_checkpoint_are_refused(
    undisturbed, tiny_hf_dir, make_tiny_hf, tmp_path, monkeypatch
):
    folder, _, _ = undisturbed
    path = folder / "checkpoint-4"
    with pytest.raises(JaxftError, match=r"model.num_hidden_layers: 3 in the checkpoint, 2 now"):
        train(fresh(make_tiny_hf(tmp_path / "small", num_hidden_layers=2)), tmp_path / "a", resume=path)
    with pytest.raises(JaxftError, match=r"is of another run: weights: \w+ in the checkpoint, \w+ now. Resume"):
        train(fresh(make_tiny_hf(tmp_path / "hf", seed=1)), tmp_path / "b", resume=path)
    with pytest.raises(JaxftError, match="data position: is of a run with other batches"):
        train(fresh(tiny_hf_dir), tmp_path / "c", resume=path, rows=sums(9, start=5))
    with pytest.raises(JaxftError, match="nonesuch: is no checkpoint of a run"):
        train(fresh(tiny_hf_dir), tmp_path / "d", resume=tmp_path / "nonesuch")
    broken = tmp_path / "checkpoint-4"
    shutil.copytree(path, broken)
    for file in (broken / "arrays").rglob("*"):
        if file.is_file() and file.stat().st_size > 2000:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(JaxftError, match="checkpoint-4: cannot be read"):
        train(fresh(tiny_hf_dir), tmp_path / "e", resume=broken)


def test_a_full_disk_leaves_the_previous_checkpoint_and_the_run_goes_on(
    undisturbed, tiny_hf_dir, tmp_path, monkeypatch, capfd
):
    _, result, adapter = undisturbed
    real = shutil.disk_usage

    def usage(path: Any) -> Any:
        full = (tmp_path / "run" / "checkpoint-2").exists()
        return real(path)._replace(free=1000) if full else real(path)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)
    model = fresh(tiny_hf_dir)
    again = train(model, tmp_path / "run")
    assert learnt(again) == learnt(result)
    said = capfd.readouterr().err.replace("\n", " ")
    assert "checkpoint-4 was not written (No space left on device" in said
    assert "checkpoint-2 is whole. The run goes on" in said
    assert [path.name for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name] == ["checkpoint-2"]
    monkeypatch.undo()
    model = fresh(tiny_hf_dir)
    train(model, tmp_path / "run", resume=True)
    assert_equal(model, adapter)


class Planned(SFTTrainer):
    """Evaluates to given losses."""

    def __init__(self, *args: Any, planned: list[float], **others: Any) -> None:
        super().__init__(*args, **others)
        self.planned = iter(planned)

    def _evaluated(self, decoder: Any, loader: Any) -> dict[str, float]:
        return {"eval_loss": next(self.planned)}


def test_the_best_is_kept_and_loaded_and_patience_ends(tiny_hf_dir: Path, tmp_path: Path, capfd):
    args = dataclasses.replace(
        SETTINGS, output_dir=str(tmp_path / "run"), eval_strategy="steps", eval_steps=1, save_steps=1,
        save_total_limit=2, load_best_model_at_end=True, early_stopping_patience=3,
    )  # fmt: skip
    model = fresh(tiny_hf_dir)
    trainer = Planned(model, None, ROWS, args, ROWS, planned=[3.0, 1.0, 2.0, 2.0, 2.0])
    result = trainer.train()
    assert result.steps == 5
    assert checkpoints(tmp_path / "run") == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert [row["eval_loss"] for row in result.rows if "eval_loss" in row] == [3, 1, 2, 2, 2]
    said = capfd.readouterr().err.replace("\n", " ")
    assert "stopping: 3 evaluations without a better eval_loss" in said
    assert "loaded the best model" in said
    at_two = fresh(tiny_hf_dir)
    stopped = train(at_two, tmp_path / "two", callbacks=[lambda state: state.step == 2])
    assert stopped.steps == 2
    assert_equal(model, adapter_of(at_two))


class Faulty(SFTTrainer):
    """The loss of a batch of fewer than 5 trained tokens is not a number."""

    @property
    def _loss_function(self) -> Any:
        return faulty


def faulty(decoder: Any, batch: Any, dropout_key: Any = None):
    total, weight, metrics = losses.sft(decoder, batch, dropout_key)
    short = batch.loss_mask.sum() < 5
    return total / (1 - short.astype(total.dtype)), weight, metrics


SHORT = {"prompt": "a", "completion": "b"}


def test_a_batch_that_is_not_finite(tiny_hf_dir: Path, tmp_path: Path, capfd):
    """Stops with the batch saved and the weights as they were, or leaves it out."""
    long = {"prompt": "What", "completion": "is the sum of the numbers and so on?" * 1}
    rows = [SHORT, *[long] * 7]
    args = SFTConfig(
        output_dir=str(tmp_path / "run"), max_seq_length=64, max_steps=8, packing=False, per_device_train_batch_size=1,
        learning_rate=3e-3, save_strategy="no",
    )  # fmt: skip
    model = fresh(tiny_hf_dir, lora_dropout=0.0)
    with pytest.raises(JaxftError, match=r"step \d: the loss is (inf|nan) .* the batch is in .*nonfinite-step-\d.npz"):
        Faulty(model, None, rows, args).train()
    assert all(np.isfinite(array).all() for array in adapter_of(model).values())
    (path,) = (tmp_path / "run").glob("nonfinite-step-*.npz")
    batch = dict(np.load(path))
    assert batch[".tokens"].shape == (1, 1, 64)
    assert batch[".loss_mask"].sum() < 5

    again = fresh(tiny_hf_dir, lora_dropout=0.0)
    skipping = dataclasses.replace(args, output_dir=str(tmp_path / "skip"), on_nonfinite="skip")
    result = Faulty(again, None, rows, skipping).train()
    assert "It was left out" in capfd.readouterr().err.replace("\n", " ")
    assert [row["loss"] is None for row in result.rows].count(True) == 1
    assert result.steps == 8
    assert all(np.isfinite(array).all() for array in adapter_of(again).values())
    more = dataclasses.replace(skipping, output_dir=str(tmp_path / "all"), max_steps=20)
    with pytest.raises(JaxftError, match="It is the 10th in a row"):
        Faulty(fresh(tiny_hf_dir, lora_dropout=0.0), None, [SHORT], more).train()


def test_a_stream_goes_on_bit_for_bit(tiny_hf_dir: Path, tmp_path: Path, capfd):
    """Rows read as they are needed, again and again until max_steps; a packed buffer holds several steps."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings: dict[str, Any] = {"streaming": True, "packing": True, "gradient_accumulation_steps": 1}
    model, again = fresh(tiny_hf_dir), fresh(tiny_hf_dir)
    result = train(model, tmp_path / "whole", rows=path, **settings)
    assert result.steps == 6
    assert "train_dataset: rows: " in capfd.readouterr().err
    stopped = train(again, tmp_path / "run", rows=path, callbacks=[lambda state: state.step == 4], **settings)
    assert stopped.steps == 4
    gone_on = train(fresh(tiny_hf_dir), tmp_path / "run", resume=True, rows=path, **settings)
    assert learnt(gone_on) == learnt(result)
    path.write_text(path.read_text() * 2)
    with pytest.raises(JaxftError, match=r"data position: is of a run with other batches: data \['rows.jsonl', \d+\]"):
        train(fresh(tiny_hf_dir), tmp_path / "run", resume=tmp_path / "run" / "checkpoint-2", rows=path, **settings)

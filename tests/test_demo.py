"""The demo's parts without a model: its task, held-out items, scores, plot and report; and, slow, all of it once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from jaxft import console, demo
from jaxft.demo import HELD_OUT_SEED, TRAIN_SEED, Budget, Score, Task
from jaxft.errors import JaxftError
from language_models import loaded

BEFORE = Score(loss=2.5, accuracy=0.0, standard_error=0.0, answers=["apple [pear]", "no"])
AFTER = Score(loss=0.5, accuracy=0.5, standard_error=0.35, answers=["pear, apple", "no"])


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.make(HELD_OUT_SEED, 40)


def words_of(task: Task) -> list[str]:
    return [", ".join(item["metadata"]["words"]) for item in task.items]


def test_rows_ask_for_the_reversed_list(task: Task):
    rows = task.rows()
    assert len(rows) == 40
    for row, words in zip(rows, words_of(task), strict=True):
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"] == f"Reverse this list of words, answer with the list only: {words}"
        assert assistant["content"].split(", ") == words.split(", ")[::-1]
        assert 3 <= len(words.split(", ")) <= 5


def test_scores_count_exact_answers(task: Task):
    right = [row["messages"][1]["content"] for row in task.rows()]
    assert task.score(right) == (1.0, 0.0)
    assert task.score(words_of(task)) == (0.0, 0.0)
    assert task.score(["", *(answer.split(",")[0] for answer in right[1:])]) == (0.0, 0.0)
    quarter = right[:10] + words_of(task)[10:]
    assert task.score(quarter) == (0.25, pytest.approx(math.sqrt(0.25 * 0.75 / 40)))
    with pytest.raises(ValueError, match="longer"):
        task.score(right[:-1])


def test_items_are_the_same_every_time(task: Task):
    assert Task.make(HELD_OUT_SEED, 40).rows() == task.rows()
    assert Task.make(HELD_OUT_SEED + 1000, 40).rows() != task.rows()


def test_held_out_items_are_never_trained_on():
    """For the whole budget; and an item that is drawn twice is left out of training."""
    budget = Budget()
    held_out = Task.make(HELD_OUT_SEED, budget.held_out_items)
    train = Task.make(TRAIN_SEED, budget.train_items, without=words_of(held_out))
    assert set(words_of(train)).isdisjoint(words_of(held_out))
    assert len(held_out.items) == budget.held_out_items >= 200
    assert len(train.items) > 0.95 * budget.train_items
    again = Task.make(TRAIN_SEED, 10, without=words_of(train)[:3])
    assert words_of(again) == words_of(train)[3:10]


def test_without_reasoning_gym(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(JaxftError, match=r"needs reasoning-gym. Install it: pip install 'jaxft\[demo\]'"):
        Task.make(0, 1)


def test_plot_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console.console, "width", 200)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": i, "loss": 3.0 / i}) + "\n" for i in range(1, 4)))
    demo.plot(metrics, BEFORE, AFTER, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    items = Task.make(HELD_OUT_SEED, 2)
    demo.report(items, BEFORE, AFTER, {"adapter": metrics, "gguf": metrics}, seconds=61.4)
    output = capsys.readouterr()
    assert output.out == ""
    for text in (
        *("2 held-out lists", "2.500", "0.500", "0.0% +- 0.0%", "50.0% +- 35.0%", "apple [pear]", "pear, apple"),
        *(words_of(items)[0], words_of(items)[1], f"--model-name {metrics}", f"llama-cli -m {metrics}", "took 61 s"),
    ):
        assert text in output.err, text


def test_a_full_folder_is_refused_before_anything_else(tmp_path: Path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(JaxftError, match="is not empty"):
        demo.run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.slow
def test_the_whole_demo_on_a_small_budget(tmp_path: Path):
    """Learns a little and writes everything; a second run overwrites it."""
    for train_items in (24, 8):
        budget = Budget(train_items=train_items, held_out_items=6, max_seq_length=256)
        results = demo.run(tmp_path / "demo", overwrite=True, budget=budget)
        assert json.loads((tmp_path / "demo" / "results.json").read_text()) == results
        assert results["train_items"] == train_items
        assert results["loss_after"] < results["loss_before"] - 0.3
        assert 0 <= results["accuracy_after"] <= 1
    files = {path.relative_to(tmp_path / "demo").as_posix() for path in (tmp_path / "demo").rglob("*")}
    assert files >= {"demo.png", "run/metrics.jsonl", "run/loss.png", "adapter/adapter_model.safetensors",
                     "merged/model.safetensors", "merged/tokenizer.json", "gguf/model.Q8_0.gguf"}  # fmt: skip
    assert loaded(results["outputs"]["adapter"]).answer(["Hello"], max_new_tokens=2)

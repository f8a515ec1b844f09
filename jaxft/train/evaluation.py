"""Evaluation: the mean loss of batches, a text's perplexity, and how many answers to verifiable questions are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft import console, losses
from jaxft.data.batch import Example
from jaxft.data.loader import BatchLoader
from jaxft.data.sources import read_objects
from jaxft.errors import JaxftError
from jaxft.models.decoder import Decoder

if TYPE_CHECKING:
    from jaxft.api import LanguageModel


def mean_loss(decoder: Decoder, loader: Any, loss: Callable[..., losses.LossOutput]) -> dict[str, float]:
    """The mean over all of a loader's batches.

    Args:
      decoder: the model; nothing is dropped and no noise added.
      loader: see `jaxft.data.iteration.Loader`.
      loss: (decoder, micro-batch) -> (sum, weight, metrics); compiled once for each function.

    Returns:
      {"eval_loss", "eval_weight": sum of the weights}, and "eval_..." for each metric that is a mean.
    """
    graphdef, params = nnx.split(decoder)
    sums: Any = None
    for batch in console.track(loader, "evaluating", loader.steps_per_epoch):
        found = jax.device_get(_sums(graphdef, params, batch, loss))
        found = jax.tree.map(np.float64, found)
        sums = found if sums is None else jax.tree.map(np.add, sums, found)
    if sums is None:
        raise JaxftError("eval_dataset", "gave no batch")
    means = {f"eval_{name}": float(total / weight) for name, (total, weight) in sums.items()}
    return {**means, "eval_weight": float(sums["loss"][1])}


@partial(jax.jit, static_argnames=("graphdef", "loss"))
def _sums(graphdef: nnx.GraphDef, params: nnx.State, batch: Any, loss: Callable[..., Any]) -> dict[str, Any]:
    """(sum, weight) of the loss and of each metric that is a mean, over a batch [A, ...]."""

    def one(micro: Any) -> dict[str, Any]:
        total, weight, metrics = loss(nnx.merge(graphdef, params), micro)
        return {"loss": (total, weight), **{name: x for name, x in metrics.items() if isinstance(x, tuple)}}

    return jax.tree.map(partial(jnp.sum, axis=0), jax.lax.map(one, batch))


class Perplexity(NamedTuple):
    """exp of the mean negative log-likelihood, that mean in nats a token, and over how many tokens."""

    perplexity: float
    loss: float
    tokens: int


def text_perplexity(model: LanguageModel, text: str, where: str, *, window: int, stride: int) -> Perplexity:
    """The perplexity of a text of any length.

    It is read in windows that begin `stride` tokens after each other; each token but the first counts once, in the
    first window that holds it, so with a stride smaller than the window it has at least window - stride tokens before
    it, apart from those of the first window.

    Raises:
      JaxftError: no tokenizer, a text of fewer than two tokens, or a stride that is not in 1 to window - 1.
    """
    if model.tokenizer is None:
        raise JaxftError(model.name, "has no tokenizer", "Load a checkpoint that has tokenizer files")
    if not 1 <= stride < window:
        raise JaxftError("stride", f"is {stride}: it must be at least 1 and less than the window's {window} tokens")
    ids = np.asarray(model.tokenizer(text)["input_ids"], np.int32)
    if len(ids) < 2:
        raise JaxftError(where, f"has {len(ids)} tokens; a perplexity needs two")
    examples, counted = [], 1
    for start in range(0, len(ids), stride):
        stop = min(start + window, len(ids))
        if stop > counted:
            examples.append(Example(where, ids[start:stop], np.arange(start, stop) >= counted))
            counted = stop
    loader = BatchLoader(examples, batch_size=1, max_seq_length=window, packing=False, shuffle=False)
    found = mean_loss(model.decoder, loader, losses.sft)
    return Perplexity(math.exp(found["eval_loss"]), found["eval_loss"], int(found["eval_weight"]))


class Question(NamedTuple):
    """A question and what judges an answer to it: a score from 0 to 1, where 1 is right."""

    question: str
    score: Callable[[str], float]


class Accuracy(NamedTuple):
    """The share of exactly right answers, its standard error, how many there were, and the answers."""

    accuracy: float
    standard_error: float
    questions: int
    answers: list[str]


def accuracy(model: LanguageModel, questions: Sequence[Question], **settings: Any) -> Accuracy:
    """Answers every question and counts those that are right.

    Args:
      model: the model.
      questions: at least one.
      settings: of `LanguageModel.answer`.
    """
    answers = model.answer([question.question for question in questions], **settings)
    right = sum(question.score(answer) == 1 for question, answer in zip(questions, answers, strict=True))
    share = right / len(questions)
    return Accuracy(share, math.sqrt(share * (1 - share) / len(questions)), len(questions), answers)


def task_questions(task: str, size: int, seed: int) -> list[Question]:
    """Items of one of reasoning-gym's generators, which judges the answers, too.

    Raises:
      JaxftError: reasoning-gym is not installed, or has no such task.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise JaxftError("task", "needs reasoning-gym", "Install it: pip install 'jaxft[demo]'") from error
    if task not in DATASETS:
        raise JaxftError("task", f"reasoning-gym has no {task!r}", f"There are: {', '.join(sorted(DATASETS))}")
    dataset = reasoning_gym.create_dataset(task, seed=seed, size=size)
    return [Question(item["question"], partial(_score, dataset, item)) for item in dataset]


def rewarded(questions: Sequence[Question]) -> tuple[list[dict[str, Any]], Callable[..., list[float]]]:
    """Rows for a `GRPOTrainer`, {"prompt", "item": the question's number}, and the reward function for them."""
    rows = [{"prompt": [{"role": "user", "content": q.question}], "item": i} for i, q in enumerate(questions)]

    def score(completions: list[Any], item: list[int], **_: Any) -> list[float]:
        return [questions[i].score(done[0]["content"]) for done, i in zip(completions, item, strict=True)]

    return rows, score


def _score(dataset: Any, item: Any, answer: str) -> float:
    return dataset.score_answer(answer, item)


def file_questions(rows: str | Path | Iterable[Mapping[str, Any]], name: str = "data") -> list[Question]:
    """Rows of "question" (or "prompt", or "instruction") and "answer" (or "output"): right is the same text.

    Space around an answer, and what stands before the last "####" of a reference as in GSM8K, do not count.

    Raises:
      JaxftError: rows that cannot be read or lack one of them, named by file and row.
    """
    found = []
    for where, row in read_objects(rows, name):
        question = _text(row, where, ("question", "prompt", "instruction"))
        reference = _text(row, where, ("answer", "output")).rsplit("####", 1)[-1].strip()
        found.append(Question(question, lambda answer, reference=reference: float(answer.strip() == reference)))
    if not found:
        raise JaxftError(name, "has no rows")
    return found


def _text(row: Any, where: str, names: Sequence[str]) -> str:
    for name in names:
        if isinstance(row, Mapping) and isinstance(row.get(name), str):
            return row[name]
    raise JaxftError(where, f"has no text {' or '.join(map(repr, names))}", 'Expected {"question": ..., "answer": ...}')

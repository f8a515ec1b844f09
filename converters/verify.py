"""Compares what two checkpoints compute: the logits of the same tokens, each checkpoint read layer by layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from converters.checkpoint import Checkpoint, quantization_of
from converters.streamed import StreamedDecoder
from jaxft.console import console, table
from jaxft.errors import JaxftError

# Mean KL divergences up to which a conversion passes: what rounding to 16 bits, and quantization, may cost.
MAX_KL = 0.01
MAX_KL_QUANTIZED = 0.5


@dataclasses.dataclass(frozen=True)
class Verification:
    """How the logits of two checkpoints differ, over `tokens` tokens.

    Attributes:
      identical: every logit is the same, bit by bit.
      largest: the largest absolute difference of two logits.
      rms: the root of the mean squared difference.
      kl: mean KL divergence KL(source || converted) of the next token's distributions, in nats.
      same_top: the share of tokens after which both find the same token the most likely.
      nll: mean negative log-likelihood of the next token by source and by converted, in nats.
      max_kl: up to which `kl` passes.
      same_tokenizer: whether both tokenize the text alike; None where there is no text or no tokenizer.
    """

    tokens: int
    identical: bool
    largest: float
    rms: float
    kl: float
    same_top: float
    nll: tuple[float, float]
    max_kl: float
    same_tokenizer: bool | None

    @property
    def passed(self) -> bool:
        """Whether the conversion computes what its source does."""
        return self.kl <= self.max_kl and self.same_tokenizer is not False

    def as_json(self) -> dict[str, Any]:
        """Everything as one JSON object."""
        return {**dataclasses.asdict(self), "passed": self.passed}

    def show(self) -> None:
        """Prints the same for people to read."""
        rows = [(name, value) for name, value in self.as_json().items() if value is not None]
        console.print(table("Logits", ["measure", "value"], rows))
        console.print("passed" if self.passed else f"failed: KL {self.kl:.3g}, at most {self.max_kl:g} passes")


def verify(source: Checkpoint, converted: Checkpoint, text: str | None = None, *, length: int = 256,
           max_kl: float | None = None) -> Verification:  # fmt: skip
    """Runs both checkpoints in float32 on the same tokens.

    Args:
      source: what is taken to be right.
      converted: what was made of it.
      text: its first `length` tokens are run; without one, random token ids.
      length: tokens, at most.
      max_kl: None takes MAX_KL_QUANTIZED where one of the two is quantized, else MAX_KL.

    Raises:
      JaxftError: one of them is not understood; they have other vocabularies; a text without a tokenizer.
    """
    a, b = StreamedDecoder(source), StreamedDecoder(converted)
    vocab_size = a.config.vocab_size
    if vocab_size != b.config.vocab_size:
        raise JaxftError(
            converted.where, f"has a vocabulary of {b.config.vocab_size} tokens, and {source.where} one of {vocab_size}"
        )
    tokens, same_tokenizer = _tokens(source, converted, text, length, vocab_size)
    sums, start = _Sums(), 0
    for pair in zip(a.logits(a.hidden(tokens)), b.logits(b.hidden(tokens)), strict=True):
        sums.add(*pair, tokens[0, start + 1 :])
        start += len(pair[0])
    if max_kl is None:
        quantized = any(quantization_of(checkpoint) for checkpoint in (source, converted))
        max_kl = MAX_KL_QUANTIZED if quantized else MAX_KL
    return sums.result(max_kl, same_tokenizer)


def _tokens(
    source: Checkpoint, converted: Checkpoint, text: str | None, length: int, vocab_size: int
) -> tuple[np.ndarray, bool | None]:
    """int32 [1, T], and whether the converted checkpoint's tokenizer gives them, too."""
    if text is None:
        return np.random.default_rng(0).integers(0, vocab_size, (1, length), dtype=np.int32), None
    tokenizer, other = source.tokenizer(), converted.tokenizer()
    if tokenizer is None:
        raise JaxftError(source.where, "has no tokenizer for the text", "Leave the text out, for random tokens")
    ids: list[int] = list(tokenizer(text)["input_ids"])
    return np.array([ids[:length]], np.int32), None if other is None else list(other(text)["input_ids"]) == ids


class _Sums:
    """What is summed over tokens."""

    def __init__(self) -> None:
        self._tokens = self._predicted = 0
        self._identical = True
        self._largest = self._squares = self._kl = 0.0
        self._same_top = self._values = 0
        self._nll = np.zeros(2)

    @np.errstate(invalid="ignore")  # infinite logits make sums of NaN, which agree with nothing
    def add(self, source: np.ndarray, converted: np.ndarray, following: np.ndarray) -> None:
        """Logits [t, V] of both, and the tokens that follow the first of them."""
        self._identical &= bool(np.array_equal(source, converted, equal_nan=True))
        difference = converted.astype(np.float64) - source
        self._largest = float(np.fmax(self._largest, np.abs(difference).max()))
        self._squares += float(np.square(difference).sum())
        self._values += source.size
        logs = [_log_softmax(logits) for logits in (source, converted)]
        self._kl += float((np.exp(logs[0]) * (logs[0] - logs[1])).sum())
        self._same_top += int((source.argmax(axis=1) == converted.argmax(axis=1)).sum())
        self._tokens += len(source)
        following = following[: len(source)]
        self._predicted += len(following)
        self._nll -= [log[np.arange(len(following)), following].sum() for log in logs]

    def result(self, max_kl: float, same_tokenizer: bool | None) -> Verification:
        """The means."""
        nll = self._nll / max(1, self._predicted)
        return Verification(
            tokens=self._tokens,
            identical=self._identical,
            largest=self._largest,
            rms=float(np.sqrt(self._squares / self._values)),
            kl=self._kl / self._tokens,
            same_top=self._same_top / self._tokens,
            nll=(float(nll[0]), float(nll[1])),
            max_kl=max_kl,
            same_tokenizer=same_tokenizer,
        )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

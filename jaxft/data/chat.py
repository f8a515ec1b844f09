"""Rows to token ids and loss masks: conversations, prompts and completions, texts.

Masks are found by characters in the rendered text and carried to tokens by the tokenizer's offsets, so that the ids are
always those of the whole text tokenized once.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxft.data.batch import Example
from jaxft.data.formats import ChatRow, Row, TextRow
from jaxft.data.turns import Markers, Span, Turns
from jaxft.errors import JaxftError

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase
else:  # the run-time type checker of the tests looks these names up; transformers is slow to import
    Text = PreTrainedTokenizerBase = Any


def tokenize_row(row: Row, tokenizer: PreTrainedTokenizerBase, *, assistant_only_loss: bool = True) -> Example:
    """Tokenizes one row as `RowTokenizer` does, which is the faster for many."""
    return RowTokenizer(tokenizer, assistant_only_loss)(row)


class RowTokenizer:
    """Tokenizes rows and marks the tokens to be learnt.

    - Messages: rendered by the tokenizer's chat template; trained on are the assistant's turns (with their tool calls)
      and end-of-turn tokens, or with assistant_only_loss=False everything. `jaxft.data.turns` finds the turns.
    - Prompt and completion: trained on is the completion, with the end-of-sequence token or, if they are messages, the
      assistant's turns in it, whatever assistant_only_loss says.
    - Text: everything, with the end-of-sequence token, if it does not end with that already.
    - Messages and text, where `markers` are given: what follows the markers of responses.

    A token that holds characters from both sides of a border is trained on. The beginning-of-sequence token is added
    if the tokenizer adds one and the text does not start with it.

    Raises:
      JaxftError: naming the row. The tokenizer has no chat template, no end-of-sequence token or no offsets; the
        template refuses the row, or its rendering does not show where a turn lies; no token would be trained on.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        assistant_only_loss: bool = True,
        markers: Markers | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise JaxftError(
                "tokenizer", "gives no offsets; the loss mask needs them", "Use one with a tokenizer.json."
            )
        self.tokenizer = tokenizer
        self.assistant_only_loss = assistant_only_loss
        self.markers = markers
        self.turns = Turns(tokenizer)

    def __call__(self, row: Row) -> Example:
        ids, loss_mask = self._text(row) if isinstance(row, TextRow) else self._chat(row)
        loss_mask[:1] = False
        if not loss_mask.any():
            raise JaxftError(
                row.where, "has every label masked: there is nothing to learn from it", self._why_masked(row)
            )
        return Example(row.where, np.array(ids, np.int32), loss_mask)

    def _text(self, row: TextRow) -> tuple[list[int], np.ndarray]:
        bos, eos, eos_id = (getattr(self.tokenizer, name) for name in ("bos_token", "eos_token", "eos_token_id"))
        if eos_id is None:
            raise JaxftError("tokenizer", "has no end-of-sequence token to end texts with", "Set tokenizer.eos_token.")
        text = row.prompt + row.completion
        marked = self.markers is not None and row.form == "text"
        spans = self.turns.marked_spans(text, self.markers) if marked else [(len(row.prompt), len(text))]
        has_bos = bos is not None and text.startswith(str(bos))
        ids, loss_mask = self._encode(row, text, spans, add_special_tokens=not has_bos)
        ended = text.rstrip().endswith(str(eos))  # also with white space after it, as templates put it
        if marked or not row.completion or (ended and ids[-1:] != [eos_id]):
            return ids, loss_mask
        if ids[-1:] != [eos_id]:
            ids, loss_mask = [*ids, eos_id], np.append(loss_mask, True)
        loss_mask[-1] = True
        return ids, loss_mask

    def _chat(self, row: ChatRow) -> tuple[list[int], np.ndarray]:
        text = self.turns.render(row)
        if self.markers is not None and row.n_prompt == 0:
            return self._encode(row, text, self.turns.marked_spans(text, self.markers))
        if row.n_prompt == 0 and not self.assistant_only_loss:
            return self._encode(row, text, [(0, len(text))])
        return self._encode(row, text, self.turns.assistant_spans(row, text))

    def _encode(
        self, row: Row, text: str, spans: list[Span], add_special_tokens: bool = False
    ) -> tuple[list[int], np.ndarray]:
        """Token ids of `text`, and bool [n]: which tokens hold a character of one of the spans."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise JaxftError(
                row.where, f"holds what is no character: {error.reason}", "Leave such rows out."
            ) from error
        encoding = self.tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
        )
        offsets = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
        stops = offsets[:, 1]
        # Some tokenizers leave leading spaces out of a token's offsets: a token starts where the one before ended, or
        # earlier, when several tokens share one character.
        previous_stops = np.maximum.accumulate(np.concatenate([[0], stops]))[:-1]
        starts = np.minimum(offsets[:, 0], previous_stops)
        loss_mask = np.zeros(len(offsets), bool)
        for start, stop in spans:
            loss_mask |= (starts < stop) & (stops > start)
        return encoding["input_ids"], loss_mask

    def _why_masked(self, row: Row) -> str:
        if self.markers is not None and not (isinstance(row, TextRow) and row.form != "text"):
            return f"It has no text after {self.markers.response!r}."
        if isinstance(row, TextRow):
            return "Its text or completion is empty."
        if all(message["role"] != "assistant" for message in row.messages[row.n_prompt :]):
            return "It has no assistant message to train on."
        return "The chat template renders none of its assistant messages for training."


def preview(example: Example, tokenizer: PreTrainedTokenizerBase, longest_run: int = 200) -> Text:
    """The example's text in colour: trained tokens bold green, the others dim.

    Of a run of equally coloured tokens that is longer than `longest_run`, the middle is left out, saying so.
    """
    from rich.text import Text

    text = Text()
    borders = [0, *(np.flatnonzero(np.diff(example.loss_mask)) + 1).tolist(), len(example.tokens)]
    for start, stop in itertools.pairwise(borders):
        style = "bold green" if example.loss_mask[start] else "dim"
        left_out = stop - start - longest_run
        head = stop if left_out <= 0 else start + longest_run // 2
        text.append(_decoded(example, start, head, tokenizer), style=style)
        if left_out > 0:
            text.append(f" [{left_out:,} tokens] ", style="italic")
            text.append(_decoded(example, head + left_out, stop, tokenizer), style=style)
    return text


def _decoded(example: Example, start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(example.tokens[start:stop].tolist(), skip_special_tokens=False))

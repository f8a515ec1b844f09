"""Rows to token ids and loss masks: chat templates, where the assistant's turns lie in them, prompts and completions.

Masks are found by characters in the rendered text and carried to tokens by the tokenizer's offsets, so that the ids are
always those of the whole text tokenized once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from jaxft.data.batch import Example
from jaxft.data.formats import ChatRow, Message, Row, TextRow
from jaxft.errors import JaxftError

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase
else:  # the run-time type checker of the tests looks these names up; transformers is slow to import
    Text = PreTrainedTokenizerBase = Any

OnOverlong = Literal["error", "truncate", "drop"]
Span = tuple[int, int]  # of characters

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "JAXFTTURN"


@dataclasses.dataclass
class TokenizedRows:
    """The examples of a data set, and what happened to its rows.

    Attributes:
      examples: one for each row that was kept.
      forms: rows read, by the name of their form.
      tokens, trained_tokens: over `examples`.
      truncated: rows cut to max_seq_length.
      dropped: rows left out because they were too long, or because nothing to learn was left after the cut.
    """

    examples: list[Example] = dataclasses.field(default_factory=list)
    forms: Counter[str] = dataclasses.field(default_factory=Counter)
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        forms = ", ".join(f"{count:,} {form}" for form, count in self.forms.items())
        text = f"rows: {forms}; {self.tokens:,} tokens, {self.trained_tokens:,} trained"
        if self.truncated or self.dropped:
            text += f"; too long: {self.truncated:,} truncated, {self.dropped:,} dropped"
        return text


def tokenize_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int,
    assistant_only_loss: bool = True,
    on_overlong: OnOverlong | str = "error",
) -> TokenizedRows:
    """Tokenizes every row (see `RowTokenizer`) and holds them to max_seq_length.

    Args:
      on_overlong: what becomes of a row that is longer than max_seq_length. "truncate" cuts its end off, and drops it
        if no target is left; "drop" leaves it out. Both are counted in the result.

    Raises:
      JaxftError: as RowTokenizer; a row that is too long under "error"; no row is left.
    """
    if on_overlong not in get_args(OnOverlong):
        raise JaxftError("on_overlong", f"is {on_overlong!r}", f"Known values: {', '.join(get_args(OnOverlong))}.")
    tokenize, result = RowTokenizer(tokenizer, assistant_only_loss), TokenizedRows()
    for row in rows:
        result.forms[row.form] += 1
        example = tokenize(row)
        if len(example.tokens) > max_seq_length:
            example = _shorten(example, max_seq_length, on_overlong)
            if example is None:
                result.dropped += 1
                continue
            result.truncated += 1
        result.examples.append(example)
        result.tokens += len(example.tokens)
        result.trained_tokens += int(np.count_nonzero(example.loss_mask))
    if not result.examples:
        what = "every row was dropped as too long" if result.dropped else "no rows"
        raise JaxftError("data set", f"nothing to train on: {what}", "Raise max_seq_length." if result.dropped else "")
    return result


def tokenize_row(row: Row, tokenizer: PreTrainedTokenizerBase, *, assistant_only_loss: bool = True) -> Example:
    """Tokenizes one row as `RowTokenizer` does, which is the faster for many."""
    return RowTokenizer(tokenizer, assistant_only_loss)(row)


class RowTokenizer:
    """Tokenizes rows and marks the tokens to be learnt.

    - Messages: rendered by the tokenizer's chat template; trained on are the assistant's turns with their end-of-turn
      token, or with assistant_only_loss=False everything. The turns are where the template's generation tags say, or,
      if it has none, from where the prompt for the turn ends to where the turn's own rendering ends.
    - Prompt and completion: trained on is the completion, with the end-of-sequence token or, if they are messages, the
      assistant's turns in it, whatever assistant_only_loss says.
    - Text: everything, with the end-of-sequence token.

    A token that holds characters from both sides of a border is trained on. The beginning-of-sequence token is added
    if the tokenizer adds one and the text does not start with it.

    Raises:
      JaxftError: naming the row. The tokenizer has no chat template, no end-of-sequence token or no offsets; the
        template refuses the row, or its rendering does not show where a turn lies; no token would be trained on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_only_loss: bool = True) -> None:
        if not tokenizer.is_fast:
            raise JaxftError(
                "tokenizer", "gives no offsets; the loss mask needs them", "Use one with a tokenizer.json."
            )
        self.tokenizer = tokenizer
        self.assistant_only_loss = assistant_only_loss

    def __call__(self, row: Row) -> Example:
        ids, loss_mask = self._text(row) if isinstance(row, TextRow) else self._chat(row)
        loss_mask[:1] = False
        if not loss_mask.any():
            raise JaxftError(row.where, "has every label masked: there is nothing to learn from it", _why_masked(row))
        return Example(row.where, np.array(ids, np.int32), loss_mask)

    def _text(self, row: TextRow) -> tuple[list[int], np.ndarray]:
        bos, eos_id = self.tokenizer.bos_token, self.tokenizer.eos_token_id
        if eos_id is None:
            raise JaxftError("tokenizer", "has no end-of-sequence token to end texts with", "Set tokenizer.eos_token.")
        text = row.prompt + row.completion
        has_bos = bos is not None and text.startswith(str(bos))
        ids, loss_mask = self._encode(text, [(len(row.prompt), len(text))], add_special_tokens=not has_bos)
        if not row.completion:
            return ids, loss_mask
        if ids[-1:] != [eos_id]:
            ids, loss_mask = [*ids, eos_id], np.append(loss_mask, True)
        loss_mask[-1] = True
        return ids, loss_mask

    def _chat(self, row: ChatRow) -> tuple[list[int], np.ndarray]:
        if not self.tokenizer.chat_template:
            raise JaxftError(
                row.where,
                "has messages, but the tokenizer has no chat template",
                "Use an instruct model's tokenizer, set its chat_template, or give text or prompt/completion rows.",
            )
        text = self._render(row, row.messages)
        if row.n_prompt == 0 and not self.assistant_only_loss:
            return self._encode(text, [(0, len(text))])
        if row.n_prompt == 0 and _GENERATION_TAG.search(self.tokenizer.get_chat_template()):
            return self._encode(text, self._tagged_spans(row))
        return self._encode(text, list(self._assistant_spans(row, text)))

    def _encode(self, text: str, spans: list[Span], add_special_tokens: bool = False) -> tuple[list[int], np.ndarray]:
        """Token ids of `text`, and bool [n]: which tokens hold a character of one of the spans."""
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

    def _render(self, row: ChatRow, messages: list[Message], add_generation_prompt: bool = False) -> str:
        with _template_errors(row):
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )

    def _tagged_spans(self, row: ChatRow) -> list[Span]:
        """The characters of the whole row's rendering that the template's generation tags enclose.

        The same as apply_chat_template's return_assistant_tokens_mask, except that its mask stops at the first turn
        that starts with a space which the tokenizer leaves out of its offsets.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        template: dict[str, Any] = {
            "chat_template": self.tokenizer.get_chat_template(),
            **self.tokenizer.special_tokens_map,
        }
        with _template_errors(row):
            rendered: Any = render_jinja_template([row.messages], return_assistant_tokens_mask=True, **template)
        _, (spans,) = rendered
        return spans

    def _assistant_spans(self, row: ChatRow, text: str) -> Iterator[Span]:
        """The characters of `text`, the whole row's rendering, that each assistant turn after the prompt takes."""
        for turn, message in enumerate(row.messages):
            if message["role"] == "assistant" and turn >= row.n_prompt:
                yield self._turn_start(row, text, turn), self._turn_stop(row, text, turn)

    def _turn_start(self, row: ChatRow, text: str, turn: int) -> int:
        """Where the prompt for a turn ends, with the header that the template opens an assistant turn with."""
        if turn == 0:
            raise JaxftError(
                row.where,
                "starts with an assistant message, which the chat template has no prompt for",
                "Put a user message before it, or use a chat template with {% generation %} tags.",
            )
        prompt = self._render(row, row.messages[:turn], add_generation_prompt=True)
        if not text.startswith(prompt):
            raise _not_a_prefix(row, turn)
        return len(prompt)

    def _turn_stop(self, row: ChatRow, text: str, turn: int) -> int:
        """Where a turn ends, with its end-of-turn token but without white space that the template puts after that."""
        until_turn = self._render(row, row.messages[: turn + 1])
        if text.startswith(until_turn):
            ending = re.search(rf"{self._special_token}(\s*)\Z", until_turn)
            return ending.start(1) if ending else len(until_turn)
        return self._past_turn_stop(row, text, turn)

    def _past_turn_stop(self, row: ChatRow, text: str, turn: int) -> int:
        """Where a turn ends if the template renders past turns otherwise than the last one.

        Qwen3 leaves out their thinking, gpt-oss ends them with another token. A stand-in for the turn's content shows
        what comes after it in the whole row: the end-of-turn token, if the turn ends with one when it is the last.
        """
        stand_in = {**row.messages[turn], "content": _STAND_IN}
        messages = [*row.messages[:turn], stand_in, *row.messages[turn + 1 :]]
        _, _, after = self._render(row, messages).partition(_STAND_IN)
        _, _, after_last = self._render(row, messages[: turn + 1]).partition(_STAND_IN)
        end_of_turn = re.match(rf"\s*{self._special_token}", after)
        if not end_of_turn or not re.match(rf"\s*{self._special_token}", after_last) or not text.endswith(after):
            raise _not_a_prefix(row, turn)
        return len(text) - len(after) + end_of_turn.end()

    @functools.cached_property
    def _special_token(self) -> str:
        """A regular expression for any special token."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        tokens = sorted(added | set(self.tokenizer.all_special_tokens))
        return f"(?:{'|'.join(map(re.escape, tokens))})" if tokens else "(?!)"


def preview(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The example's text in colour: trained tokens bold green, the others dim."""
    from rich.text import Text

    text = Text()
    borders = [0, *(np.flatnonzero(np.diff(example.loss_mask)) + 1).tolist(), len(example.tokens)]
    for start, stop in itertools.pairwise(borders):
        piece = tokenizer.decode(example.tokens[start:stop].tolist(), skip_special_tokens=False)
        text.append(str(piece), style="bold green" if example.loss_mask[start] else "dim")
    return text


def _shorten(example: Example, max_seq_length: int, on_overlong: str) -> Example | None:
    if on_overlong == "error":
        raise JaxftError(
            example.where,
            f"has {len(example.tokens)} tokens; max_seq_length is {max_seq_length}",
            'Raise max_seq_length, or set on_overlong to "truncate" or "drop".',
        )
    if on_overlong == "drop" or not example.loss_mask[:max_seq_length].any():
        return None
    return Example(example.where, example.tokens[:max_seq_length], example.loss_mask[:max_seq_length])


def _why_masked(row: Row) -> str:
    if isinstance(row, TextRow):
        return "Its text or completion is empty."
    if all(message["role"] != "assistant" for message in row.messages[row.n_prompt :]):
        return "It has no assistant message to train on."
    return "The chat template renders none of its assistant messages for training."


@contextlib.contextmanager
def _template_errors(row: ChatRow) -> Iterator[None]:
    """What a template raises, on its own account or because it cannot work with the row, as a JaxftError."""
    import jinja2

    try:
        yield
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise JaxftError(row.where, f"the chat template refuses it: {error}") from error


def _not_a_prefix(row: ChatRow, turn: int) -> JaxftError:
    return JaxftError(
        row.where,
        f"the chat template renders what leads to messages[{turn}] otherwise than in the whole conversation, "
        "so where that assistant turn lies in it cannot be told",
        "Use a chat template with {% generation %} tags, end the row at that turn, or set assistant_only_loss=False.",
    )

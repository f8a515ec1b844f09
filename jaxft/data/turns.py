"""What a chat template makes of a conversation, and which characters of that the assistant's turns take.

Nothing is known about any template. Turns are where its {% generation %} tags say; without tags they are found by
rendering what leads to a turn, and what ends with it, and comparing that with the whole.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxft.data.formats import ChatRow, Message
from jaxft.errors import JaxftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:  # the run-time type checker of the tests looks this name up; transformers is slow to import
    PreTrainedTokenizerBase = Any

Span = tuple[int, int]  # of characters

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "JAXFTTURN"


class Markers(NamedTuple):
    """The texts that open turns, for data whose conversations were rendered already.

    Attributes:
      instruction: opens a user's turn.
      response: opens an assistant's turn.
    """

    instruction: str
    response: str


class Turns:
    """Conversations as a tokenizer's chat template renders them.

    Raises:
      JaxftError: naming the row; the tokenizer has no template, it refuses the row, or its rendering does not show
        where a turn lies.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def render(self, row: ChatRow, messages: list[Message] | None = None, add_generation_prompt: bool = False) -> str:
        """The text of the row, or of other messages in its place."""
        if not self.tokenizer.chat_template:
            raise JaxftError(
                row.where,
                "has messages, but the tokenizer has no chat template",
                "Use an instruct model's tokenizer, give this one a template with "
                "jaxft.chat_templates.get_chat_template, or give text or prompt/completion rows.",
            )
        with _template_errors(row):
            return str(
                self.tokenizer.apply_chat_template(
                    row.messages if messages is None else messages,
                    tools=row.tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )

    def assistant_spans(self, row: ChatRow, text: str) -> list[Span]:
        """The characters of `text`, the row's rendering, that the assistant's turns after the prompt take.

        With each turn comes its end-of-turn token, without the white space that a template puts after it.
        """
        if row.n_prompt == 0 and _GENERATION_TAG.search(self._template(row)):
            return self._tagged_spans(row)
        turns = (i for i, m in enumerate(row.messages) if m["role"] == "assistant" and i >= row.n_prompt)
        return [(self._start(row, text, turn), self._stop(row, text, turn)) for turn in turns]

    def marked_spans(self, text: str, markers: Markers) -> list[Span]:
        """What follows each response marker in `text`, up to the next instruction marker or the end."""
        spans, at = [], 0
        while (found := text.find(markers.response, at)) >= 0:
            start = found + len(markers.response)
            at = text.find(markers.instruction, start)
            at = len(text) if at < 0 else at
            spans.append((start, start + self._without_trailing_space(text[start:at])))
        return spans

    def markers(self) -> Markers:
        """How the template opens turns.

        Raises:
          JaxftError: it has no header for the assistant's turns, or it changes from turn to turn.
        """
        row = ChatRow("chat template", "messages", [])
        user, answer = ({"role": role, "content": _STAND_IN} for role in ("user", "assistant"))
        prompt = self.render(row, [user])
        end_of_user = prompt.partition(_STAND_IN)[2]
        response = self.render(row, [user], add_generation_prompt=True).removeprefix(prompt)
        pieces = self.render(row, [user, answer, user]).split(_STAND_IN)
        between = pieces[2] if len(pieces) == 4 else ""  # the answer and the next question
        instruction = between.removeprefix(end_of_user)
        if not response.strip() or not instruction.strip() or instruction == between:
            raise JaxftError(
                "chat template", "does not show what opens a turn", "Give instruction_part and response_part."
            )
        return Markers(instruction, response)

    @functools.cached_property
    def special_token(self) -> str:
        """A regular expression for any special token."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        tokens = sorted(added | set(self.tokenizer.all_special_tokens), key=len, reverse=True)
        return f"(?:{'|'.join(map(re.escape, tokens))})" if tokens else "(?!)"

    def _template(self, row: ChatRow) -> str:
        return self.tokenizer.get_chat_template(tools=row.tools)  # pyright: ignore[reportArgumentType]

    def _tagged_spans(self, row: ChatRow) -> list[Span]:
        """The characters that the template's generation tags enclose.

        The same as apply_chat_template's return_assistant_tokens_mask, except that its mask stops at the first turn
        that starts with a space which the tokenizer leaves out of its offsets.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        template: dict[str, Any] = {"chat_template": self._template(row), **self.tokenizer.special_tokens_map}
        with _template_errors(row):
            rendered: Any = render_jinja_template(
                [row.messages], tools=row.tools, return_assistant_tokens_mask=True, **template
            )
        _, (spans,) = rendered
        return spans

    def _start(self, row: ChatRow, text: str, turn: int) -> int:
        """Where the prompt for a turn ends, with the header that the template opens an assistant turn with."""
        if turn > 0:
            prompt = self.render(row, row.messages[:turn], add_generation_prompt=True)
            if text.startswith(prompt):
                return len(prompt)
        before, after = self._around(row, turn)
        if before is None or not (text.startswith(before) and text.endswith(after)):
            raise _not_located(row, turn)
        return len(before)

    def _stop(self, row: ChatRow, text: str, turn: int) -> int:
        """Where a turn ends, with its end-of-turn token but without white space that the template puts after that."""
        until_turn = self.render(row, row.messages[: turn + 1])
        if text.startswith(until_turn):
            return self._without_trailing_space(until_turn)
        return self._past_stop(row, text, turn)

    def _past_stop(self, row: ChatRow, text: str, turn: int) -> int:
        """Where a turn ends if the template renders past turns otherwise than the last one.

        Qwen3 leaves out their thinking, gpt-oss ends them with another token. A stand-in for the turn's content shows
        what comes after it in the whole row: the same as when it is the last, or at least an end-of-turn token.
        """
        _, after = self._around(row, turn)
        _, after_last = self._around(row._replace(messages=row.messages[: turn + 1]), turn)
        if after is None or after_last is None or not text.endswith(after):
            raise _not_located(row, turn)
        start = len(text) - len(after)
        if after_last.strip() and after.startswith(after_last):
            return start + self._without_trailing_space(after_last)
        end_of_turn = re.match(rf"\s*{self.special_token}", after)
        if not end_of_turn or not re.match(rf"\s*{self.special_token}", after_last):
            raise _not_located(row, turn)
        return start + end_of_turn.end()

    def _around(self, row: ChatRow, turn: int) -> tuple[str, str] | tuple[None, None]:
        """What the row's rendering has before and after a turn's content; None if it does not show the content."""
        stand_in = {**row.messages[turn], "content": _STAND_IN}
        whole = self.render(row, [*row.messages[:turn], stand_in, *row.messages[turn + 1 :]])
        before, found, after = whole.partition(_STAND_IN)
        return (before, after) if found else (None, None)

    def _without_trailing_space(self, text: str) -> int:
        """The length of `text` up to its last special token if only white space follows that, else of all of it."""
        ending = re.search(rf"{self.special_token}(\s*)\Z", text)
        return ending.start(1) if ending else len(text)


@contextlib.contextmanager
def _template_errors(row: ChatRow) -> Iterator[None]:
    """What a template raises, on its own account or because it cannot work with the row, as a JaxftError."""
    import jinja2

    try:
        yield
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise JaxftError(row.where, f"the chat template refuses it: {error}") from error


def _not_located(row: ChatRow, turn: int) -> JaxftError:
    return JaxftError(
        row.where,
        f"the chat template renders what leads to messages[{turn}] otherwise than in the whole conversation, "
        "so where that assistant turn lies in it cannot be told",
        "Use a chat template with {% generation %} tags, end the row at that turn, or set assistant_only_loss=False.",
    )

"""Where completions meet text: stop strings, and text as it arrives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

INCOMPLETE = "\ufffd"  # what tokenizers make of a character of which some bytes are still to come


class StopStrings:
    """Finds the token with which a completion's text first holds one of some strings.

    Args:
      strings: any of them ends a completion.
      decode: token ids -> text.
    """

    def __init__(self, strings: Sequence[str], decode: Decode) -> None:
        self._strings = tuple(strings)
        self._decode = decode

    def __call__(self, tokens: list[int], new: int) -> int | None:
        """How many tokens there are up to that one, or None; all but the last `new` tokens were asked about before."""
        if not self._found(tokens):
            return None
        return next(n for n in range(len(tokens) - new + 1, len(tokens) + 1) if self._found(tokens[:n]))

    def _found(self, tokens: list[int]) -> bool:
        text = self._decode(tokens)
        return any(string in text for string in self._strings)


class TextStream:
    """Turns the tokens of completions into text as they arrive; `jaxft.generate.complete` calls it as `on_tokens`.

    Args:
      decode: token ids -> text.
      write: gets a completion's number and its next piece of text.
    """

    def __init__(self, decode: Decode, write: Callable[[int, str], None]) -> None:
        self._decode = decode
        self._write = write
        self._tokens: defaultdict[int, list[int]] = defaultdict(list)
        self._written: defaultdict[int, int] = defaultdict(int)

    def __call__(self, row: int, tokens: list[int]) -> None:
        self._tokens[row] += tokens
        text = self._decode(self._tokens[row]).rstrip(INCOMPLETE)
        if len(text) > self._written[row]:
            self._write(row, text[self._written[row] :])
            self._written[row] = len(text)

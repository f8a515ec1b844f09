"""The project's one error class: where it went wrong, what is wrong, and how to mend it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

EXIT_STATUS = 2


class JaxftError(Exception):
    """A problem in what the user gave us, told in words that are enough to mend it.

    Attributes:
      where: the file, field, row or tensor that is at fault.
      what: what is wrong with it.
      how: what to do about it; may be empty.
    """

    def __init__(self, where: object, what: str, how: str = "") -> None:
        self.where = str(where)
        self.what = what
        self.how = how
        super().__init__(self.where, what, how)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}"
        return f"{text}. {self.how}" if self.how else text


def refuse_unknown(where: str, unknown: Iterable[str], *functions: Callable[..., Any]) -> None:
    """Raises JaxftError for arguments that none of the functions has, with the nearest that there is."""
    parameters = [item for function in functions for item in inspect.signature(function).parameters.items()]
    known = [name for name, p in parameters if p.kind is not p.VAR_KEYWORD]
    for name in unknown:
        nearest = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {nearest[0]}?" if nearest else f"There are: {', '.join(known)}"
        raise JaxftError(where, f"has no argument {name!r}", hint)

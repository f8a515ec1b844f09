"""Reward functions: called with a time limit, their answers checked, and what is wrong told by function and row."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.errors import JaxftError

RewardFunction = Callable[..., Sequence[float]]
GIVEN = ("prompts", "completions", "completion_ids")


def name_of(function: RewardFunction) -> str:
    """What to call a reward function in messages and logs."""
    return getattr(function, "__name__", type(function).__name__)


def check_columns(functions: Sequence[RewardFunction], columns: Sequence[str]) -> None:
    """Raises JaxftError where a function requires an argument that is no column of the data set."""
    for function in functions:
        for parameter in inspect.signature(function).parameters.values():
            by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if by_name and parameter.default is parameter.empty and parameter.name not in (*GIVEN, *columns):
                raise JaxftError(
                    f"reward function {name_of(function)}",
                    f"requires {parameter.name!r}, which is no column of the data set",
                    f"Columns: {', '.join(sorted(columns)) or 'none beside the prompt'}",
                )


def call(
    function: RewardFunction, arguments: Mapping[str, Sequence[Any]], rows: Sequence[str], timeout_s: float | None
) -> np.ndarray:
    """float64 [N], a function's rewards of N completions.

    Args:
      function: takes lists of N by keyword (prompts, completions, completion_ids and the columns), returns N numbers.
      arguments: these lists.
      rows: the names of the completions' rows, for messages.
      timeout_s: how long the call may take; None has no limit. A call that is given up goes on in its thread.

    Raises:
      JaxftError: naming the function, and the row where it can be told; the function raises, takes too long, or returns
        something else than N finite numbers.
    """
    where = f"reward function {name_of(function)}"
    try:
        found = _in_time(function, arguments, timeout_s, where)
    except JaxftError:
        raise
    except Exception as error:  # whatever a user's function raises, told with its place
        row = _culprit(function, arguments, rows, timeout_s)
        raise JaxftError(where, f"raised {type(error).__name__} at {row}: {error}") from error
    if not isinstance(found, (Sequence, np.ndarray)) or len(found) != len(rows):
        count = f"{len(found)} values" if hasattr(found, "__len__") else f"a {type(found).__name__}"
        raise JaxftError(where, f"returned {count} for {len(rows)} completions ({rows[0]} to {rows[-1]})")
    for value, row in zip(found, rows, strict=True):
        if not _is_finite(value):
            raise JaxftError(where, f"returned {value!r} for {row}", "Return a finite number for each completion")
    return np.asarray(found, np.float64)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def _in_time(function: RewardFunction, arguments: Mapping[str, Any], timeout_s: float | None, where: str) -> Any:
    """The function's result, from a thread of its own where there is a limit."""
    if timeout_s is None:
        return function(**arguments)
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = function(**arguments)
        except BaseException as error:  # raised again in the caller's thread
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        rows = f"{len(arguments['completions'])} completions"
        raise JaxftError(where, f"took longer than {timeout_s:g} s for {rows}", "Raise reward_timeout_s, or mend it")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _culprit(
    function: RewardFunction, arguments: Mapping[str, Sequence[Any]], rows: Sequence[str], timeout_s: float | None
) -> str:
    """The first row that raises on its own, or all of them."""
    for i, row in enumerate(rows):
        try:
            _in_time(function, {name: values[i : i + 1] for name, values in arguments.items()}, timeout_s, row)
        except Exception:  # this is the one looked for; the caller tells what it raised
            return row
    return f"one of {rows[0]} to {rows[-1]}"

"""Commands that look at checkpoints and write nothing: `inspect`, `diff`, `verify`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tyro.conf import Positional

from jaxft.errors import JaxftError

# As diff(1) has it: the checkpoints were compared, and they differ.
DIFFERS = 1


@runtime_checkable
class _Result(Protocol):
    def as_json(self) -> dict[str, Any]: ...

    def show(self) -> None: ...


def _give(result: _Result, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        result.show()


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Shows config, tensors, dtypes and sizes of a checkpoint in any format, or of a PEFT adapter.

    Attributes:
      path: a folder, a .gguf file, or a name on the Hugging Face hub.
      hashes: read everything, and show the sha256 of each tensor's bytes as they are stored.
      json: print one JSON object to standard output instead of tables to standard error.
    """

    path: Positional[str]
    hashes: bool = False
    json: bool = False

    def run(self) -> None:
        """Shows it."""
        from converters.summary import summarize

        _give(summarize(self.path, hashes=self.hashes), self.json)


@dataclasses.dataclass(frozen=True)
class Diff:
    """Compares two checkpoints or adapters of any format, tensor by tensor; exit status 1 where they differ.

    Attributes:
      a: a folder, a .gguf file, or a name on the Hugging Face hub.
      b: the other; quantized weights of both are decoded first.
      json: print one JSON object to standard output instead of tables to standard error.
    """

    a: Positional[str]
    b: Positional[str]
    json: bool = False

    def run(self) -> int:
        """Compares."""
        from converters.diff import diff

        difference = diff(self.a, self.b)
        _give(difference, self.json)
        return 0 if difference.equal else DIFFERS


@dataclasses.dataclass(frozen=True)
class Verify:
    """Runs a converted checkpoint and its source on the same tokens; exit status 1 where the logits are too far apart.

    Attributes:
      source: what was converted: a folder, a .gguf file, or a name on the Hugging Face hub.
      converted: what was made of it.
      text: a text file whose first tokens are run, and which both tokenizers must cut alike; without it, random tokens.
      length: how many tokens, at most.
      max_kl: mean KL divergence, in nats, up to which the converted checkpoint passes; without it, 0.01, and 0.5 where
        one of the two is quantized.
      json: print one JSON object to standard output instead of tables to standard error.
    """

    source: Positional[str]
    converted: Positional[str]
    text: Path | None = None
    length: int = 256
    max_kl: float | None = None
    json: bool = False

    def run(self) -> int:
        """Verifies."""
        from converters.open import open_checkpoint
        from converters.verify import verify

        if self.length < 2:
            raise JaxftError("length", f"must be at least 2, not {self.length}")
        sides = (open_checkpoint(self.source), open_checkpoint(self.converted))
        text = None if self.text is None else read_text(self.text)
        verification = verify(*sides, text, length=self.length, max_kl=self.max_kl)
        _give(verification, self.json)
        return 0 if verification.passed else DIFFERS


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
      JaxftError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise JaxftError(path, f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise JaxftError(path, "is not UTF-8 text") from error
    if not text.strip():
        raise JaxftError(path, "holds no text")
    return text

"""The small files of a Hugging Face folder: config.json, the tokenizer, and what travels along unchanged."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.checkpoint import Checkpoint
from jaxft.errors import JaxftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
CARD = "README.md"
# Marks the folder of an Orbax checkpoint, which holds the same small files.
ORBAX_MANIFEST = "jaxft_checkpoint.json"
# What is carried over byte for byte. Model cards are not: they describe the checkpoint that they came with.
SIDECARS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
_NOT_SIDECARS = (
    CONFIG,
    "*.safetensors.index.json",
    "*.bin.index.json",
    ADAPTER_CONFIG,
    "trainer_state.json",
    ORBAX_MANIFEST,
)
_TEMPLATES = "additional_chat_templates"
# Files that hold a vocabulary; without any of them there is no tokenizer to load.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "*.tiktoken",
)
# What else belongs to a tokenizer.
_OF_TOKENIZERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "*.jinja")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      JaxftError: the file is missing or unreadable, is not JSON, or holds something else than an object.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise JaxftError(path, "is not a file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JaxftError(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise JaxftError(path, f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise JaxftError(path, f"must hold a JSON object, not {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any], *, sort_keys: bool = False) -> None:
    """Writes a JSON object as Hugging Face's programs indent it."""
    path.write_text(json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n", encoding="utf-8")


def read_sidecars(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files of `folder` that travel along, also its additional chat templates."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and _is_sidecar(path.name)]
    files += sorted((folder / _TEMPLATES).glob("*.jinja"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `folder`; None without a vocabulary file.

    Raises:
      JaxftError: its files cannot be understood.
    """
    if not has_tokenizer(path.name for path in folder.iterdir()):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a bad file
        raise JaxftError(folder, f"its tokenizer files cannot be loaded: {error}") from error


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether one of the file names holds a vocabulary."""
    return any(_matches(name, _VOCABULARIES) for name in names)


def without_tokenizer(sidecars: dict[str, bytes]) -> dict[str, bytes]:
    """The sidecars that belong to no tokenizer."""
    patterns = (*_VOCABULARIES, *_OF_TOKENIZERS)
    return {name: content for name, content in sidecars.items() if not _matches(Path(name).name, patterns)}


def write_small_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes config.json, the sidecars, and the tokenizer's files where the sidecars have none."""
    write_json(folder / CONFIG, checkpoint.config)
    sidecars = checkpoint.sidecars()
    for name, content in sidecars.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    tokenizer = None if has_tokenizer(sidecars) else checkpoint.tokenizer()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _is_sidecar(name: str) -> bool:
    return _matches(name, SIDECARS) and not _matches(name, _NOT_SIDECARS)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

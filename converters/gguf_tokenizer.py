r"""Tokenizers in GGUF, both ways: byte-level BPE with the pre-tokenizers that llama.cpp knows by name.

GGUF stores tokens, their types and merges, but only the *name* of how text is split before merging
(`tokenizer.ggml.pre`). llama.cpp's src/llama-vocab.cpp says what each name means; `PRE_TOKENIZERS` says the same in
the terms of Hugging Face's tokenizer.json. llama.cpp never normalizes text; a row's normalizer is the one that its
model family has in HF.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import TokenType

from jaxft.errors import JaxftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _tiktoken_regex(digits: str) -> str:
    """The split of tiktoken's cl100k and its descendants; `digits` says how numbers are cut."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before BPE merges.

    Attributes:
      names: what `tokenizer.ggml.pre` may say for it; exports write the first.
      steps: HF pre-tokenizers as in tokenizer.json, one after the other.
      ignore_merges: a piece that is a token as a whole is taken as that token, whatever the merges say.
      add_bos: whether llama.cpp begins with BOS where the file does not say.
      normalizer: HF's normalizer.
    """

    names: tuple[str, ...]
    steps: tuple[dict[str, Any], ...]
    ignore_merges: bool = False
    add_bos: bool = False
    normalizer: dict[str, Any] | None = None


PRE_TOKENIZERS = (
    PreTokenizer(("smollm", "starcoder", "refact"), ({"type": "Digits", "individual_digits": True}, _byte_level(True))),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3"),
        (_split(_tiktoken_regex(r"\p{N}{1,3}")), _byte_level(False)),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(("gpt-2", "phi-2"), (_byte_level(True),)),
    PreTokenizer(("qwen2",), (_split(_tiktoken_regex(r"\p{N}")), _byte_level(False)), normalizer={"type": "NFC"}),
    PreTokenizer(
        ("default",),
        (
            _split(r"[\p{P}\$\+<=>\^~\|]+"),
            _split(_GPT2_REGEX),
            _split(r"\p{N}+"),
            _split(r"[0-9][0-9][0-9]"),
            _byte_level(False),
        ),
    ),
)

# GGUF key -> attribute of HF tokenizers; "seperator" is GGUF's own spelling.
_SPECIAL_TOKENS = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",
    "padding": "pad_token",
    "cls": "cls_token",
    "mask": "mask_token",
}
_PREFIX = "tokenizer.ggml."
# Keys that do not change which ids a text has: scores are SentencePiece's, the rest helps llama.cpp stop and infill.
_MARKERS = (
    "eot",
    "eom",
    "fim_pre",
    "fim_suf",
    "fim_mid",
    "fim_pad",
    "fim_rep",
    "fim_sep",
    "prefix",
    "suffix",
    "middle",
)
_WITHOUT_EFFECT = frozenset(
    [f"{_PREFIX}{name}_token_id" for name in _MARKERS]
    + [_PREFIX + "scores", _PREFIX + "token_type_count", "tokenizer.huggingface.json"]
)
_READ = frozenset(
    [f"{_PREFIX}{name}_token_id" for name in _SPECIAL_TOKENS]
    + [_PREFIX + name for name in ("model", "pre", "tokens", "token_type", "merges", "add_bos_token", "add_eos_token")]
)
# Nothing here does what these ask for, so they may only be false.
_OFF = frozenset(
    _PREFIX + name for name in ("add_space_prefix", "add_sep_token", "normalizer.lowercase", "normalizer.strip_accents")
)


def special_token_ids(metadata: dict[str, Any], where: object) -> dict[str, int]:
    """The config.json fields bos_token_id, eos_token_id and pad_token_id, as far as the file has them."""
    fields = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    ids = {field: _token_id(metadata, name, where) for name, field in fields.items()}
    return {field: token_id for field, token_id in ids.items() if token_id is not None}


def read_tokenizer(metadata: dict[str, Any], max_length: int, where: object) -> PreTrainedTokenizerBase | None:
    """The HF tokenizer that a GGUF file's metadata describes; `max_length` becomes its model_max_length.

    Raises:
      JaxftError: no byte-level BPE (SentencePiece is not supported yet), an unknown pre-tokenizer, or facts that
        contradict each other.
    """
    model = metadata.get(_PREFIX + "model")
    if model in ("none", "no_vocab"):
        return None
    if model != "gpt2":
        kind = {"llama": "SentencePiece", "bert": "WordPiece", "t5": "Unigram"}.get(str(model), "another")
        raise JaxftError(
            f"{where}, key {_PREFIX}model",
            f"{model!r} ({kind} tokenizer) is not supported yet (only 'gpt2', byte-level BPE)",
            "Convert from the Hugging Face checkpoint, which has the tokenizer's own files",
        )
    _refuse_unknown_keys(metadata, where)
    # Imported here: transformers takes seconds, and most of this package runs without it.
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    row = _row_by_name(metadata.get(_PREFIX + "pre", "default"), where)
    tokens = _tokens(metadata, where)
    special = {
        attribute: tokens[token_id]
        for name, attribute in _SPECIAL_TOKENS.items()
        if (token_id := _token_id(metadata, name, where)) is not None
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(_tokenizer_json(metadata, tokens, row, where))),
        add_bos_token=_flag(metadata, "add_bos_token", row.add_bos, "bos", where),
        add_eos_token=_flag(metadata, "add_eos_token", False, "eos", where),
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        **special,
    )
    tokenizer.chat_template = _chat_template(metadata, where)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def tokenizer_metadata(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, where: object) -> dict[str, Any]:
    """The GGUF keys that describe `tokenizer`, its vocabulary padded to `vocab_size` (the embedding's rows).

    Raises:
      JaxftError: a tokenizer that is not byte-level BPE or whose steps llama.cpp has no name for, an id beyond
        `vocab_size`, or special tokens around a text other than one BOS and one EOS.
    """
    if tokenizer is None:
        return {_PREFIX + "model": "none"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise JaxftError(f"{where}, tokenizer", f"{type(tokenizer).__name__} has no tokenizer.json; only fast ones do")
    facts = json.loads(backend.to_str())
    _check_bpe(facts["model"], where)
    row = _row_by_steps(facts, where)
    tokens, types = _padded_vocabulary(facts, vocab_size, where)
    add_bos, add_eos = _added_around_text(tokenizer, where)
    ids = {
        f"{_PREFIX}{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, attribute in _SPECIAL_TOKENS.items()
        if (token := getattr(tokenizer, attribute)) is not None
    }
    return {
        _PREFIX + "add_space_prefix": False,
        _PREFIX + "model": "gpt2",
        _PREFIX + "pre": row.names[0],
        _PREFIX + "tokens": tokens,
        _PREFIX + "token_type": types,
        _PREFIX + "merges": _merges(facts["model"]["merges"], where),
        **ids,
        _PREFIX + "add_bos_token": add_bos,
        _PREFIX + "add_eos_token": add_eos,
        **_chat_template_metadata(tokenizer.chat_template),
    }


# Reading


def _refuse_unknown_keys(metadata: dict[str, Any], where: object) -> None:
    for key, value in metadata.items():
        if not key.startswith("tokenizer.") or key.startswith("tokenizer.chat_template"):
            continue
        if key not in _READ | _WITHOUT_EFFECT and not (key in _OFF and value is False):
            raise JaxftError(f"{where}, key {key}", f"the value {value!r} is not supported")


def _row_by_name(name: object, where: object) -> PreTokenizer:
    for row in PRE_TOKENIZERS:
        if name in row.names:
            return row
    known = ", ".join(name for row in PRE_TOKENIZERS for name in row.names)
    raise JaxftError(f"{where}, key {_PREFIX}pre", f"the pre-tokenizer {name!r} is not known (known: {known})")


def _string_list(metadata: dict[str, Any], name: str, where: object) -> list[str]:
    value = metadata.get(_PREFIX + name)
    if not isinstance(value, list):
        raise JaxftError(f"{where}, key {_PREFIX}{name}", "must be a list of strings")
    return value


def _tokens(metadata: dict[str, Any], where: object) -> list[str]:
    tokens = _string_list(metadata, "tokens", where)
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise JaxftError(f"{where}, key {_PREFIX}tokens", f"has the token {twice!r} twice")
    return tokens


def _token_types(metadata: dict[str, Any], n_tokens: int, where: object) -> list[int]:
    types = metadata.get(_PREFIX + "token_type", np.full(n_tokens, TokenType.NORMAL))
    if not isinstance(types, np.ndarray) or len(types) != n_tokens:
        raise JaxftError(f"{where}, key {_PREFIX}token_type", f"must hold one number for each of the {n_tokens} tokens")
    return types.tolist()


def _token_id(metadata: dict[str, Any], name: str, where: object) -> int | None:
    """A special token's id, None where the file names none."""
    key = f"{_PREFIX}{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    n_tokens = len(metadata.get(_PREFIX + "tokens", ()))
    if not isinstance(value, int) or not 0 <= value < n_tokens:
        raise JaxftError(f"{where}, key {key}", f"must be the id of one of the {n_tokens} tokens, not {value!r}")
    return value


def _flag(metadata: dict[str, Any], name: str, default: bool, token: str, where: object) -> bool:
    value = metadata.get(_PREFIX + name, default)
    if not isinstance(value, bool):
        raise JaxftError(f"{where}, key {_PREFIX}{name}", f"must be true or false, not {value!r}")
    if value and _token_id(metadata, token, where) is None:
        raise JaxftError(f"{where}, key {_PREFIX}{name}", f"is true, but {_PREFIX}{token}_token_id is missing")
    return value


def _tokenizer_json(metadata: dict[str, Any], tokens: list[str], row: PreTokenizer, where: object) -> dict[str, Any]:
    """The contents of a tokenizer.json."""
    types = _token_types(metadata, len(tokens), where)
    # What pads a vocabulary to the embedding's rows is in no HF tokenizer.
    vocab = {
        token: i for i, token in enumerate(tokens) if not (types[i] == TokenType.UNUSED and token == _padding_token(i))
    }
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": types[i] == TokenType.CONTROL}
        for token, i in vocab.items() if types[i] in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]  # fmt: skip
    model = {"type": "BPE", "vocab": vocab, "merges": _merge_pairs(metadata, vocab, where)}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": row.normalizer,
        "pre_tokenizer": row.steps[0] if len(row.steps) == 1 else {"type": "Sequence", "pretokenizers": row.steps},
        "post_processor": None,
        "decoder": _byte_level(True),
        "model": {**model, "ignore_merges": row.ignore_merges},
    }


def _merge_pairs(metadata: dict[str, Any], vocab: dict[str, int], where: object) -> list[list[str]]:
    pairs = []
    for i, merge in enumerate(_string_list(metadata, "merges", where)):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise JaxftError(f"{where}, key {_PREFIX}merges", f"item {i}, {merge!r}, does not join two tokens into one")
        pairs.append([left, right])
    return pairs


def _chat_template(metadata: dict[str, Any], where: object) -> str | dict[str, str] | None:
    """The template, or {name: template} where the file has several."""
    names = metadata.get("tokenizer.chat_templates", [])
    keys = {"default": "tokenizer.chat_template", **{name: f"tokenizer.chat_template.{name}" for name in names}}
    templates = {name: metadata[key] for name, key in keys.items() if key in metadata}
    for name, template in templates.items():
        if not isinstance(template, str):
            raise JaxftError(f"{where}, key {keys[name]}", "must be a string")
    return templates if set(templates) - {"default"} else templates.get("default")


# Writing


def _check_bpe(model: dict[str, Any], where: object) -> None:
    plain = {"byte_fallback": False, "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    wrong = [name for name, value in plain.items() if (model.get(name) or None) != (value or None)]
    if model["type"] != "BPE" or wrong:
        raise JaxftError(
            f"{where}, tokenizer",
            f"its model is {model['type']}{' with ' + ', '.join(wrong) if wrong else ''}; only byte-level BPE can be "
            "written to GGUF yet",
        )


def _row_by_steps(facts: dict[str, Any], where: object) -> PreTokenizer:
    """Recognises the pre-tokenizer. llama.cpp never normalizes; NFC is let through, it leaves nearly all text alone."""
    steps, normalizer = _flat(facts["pre_tokenizer"]), facts["normalizer"]
    if normalizer not in (None, {"type": "NFC"}):
        raise JaxftError(f"{where}, tokenizer", f"llama.cpp does not have its normalizer {json.dumps(normalizer)}")
    for row in PRE_TOKENIZERS:
        if steps == _flat({"type": "Sequence", "pretokenizers": row.steps}):
            _check_ignore_merges(facts["model"], row, where)
            return row
    known = ", ".join(row.names[0] for row in PRE_TOKENIZERS)
    raise JaxftError(
        f"{where}, tokenizer",
        f"its pre-tokenizer is none of llama.cpp's known ones ({known}): {json.dumps(facts['pre_tokenizer'])}",
        "converters/gguf_tokenizer.py holds the list",
    )


def _check_ignore_merges(model: dict[str, Any], row: PreTokenizer, where: object) -> None:
    if bool(model.get("ignore_merges")) != row.ignore_merges:
        raise JaxftError(
            f"{where}, tokenizer",
            f"its ignore_merges is {not row.ignore_merges}, but llama.cpp's {row.names[0]!r} has {row.ignore_merges}",
        )


def _flat(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Nested sequences as one list, without the fields that change offsets but no tokens."""
    if node is None:
        return []
    if node["type"] == "Sequence":
        return [step for part in node["pretokenizers"] for step in _flat(part)]
    return [{name: value for name, value in node.items() if name != "trim_offsets"}]


def _padding_token(token_id: int) -> str:
    """What llama.cpp's converter calls an id that no token has."""
    return f"[PAD{token_id}]"


def _padded_vocabulary(facts: dict[str, Any], size: int, where: object) -> tuple[list[str], list[int]]:
    """Tokens and their types in id order."""
    tokens, types = [_padding_token(i) for i in range(size)], [int(TokenType.UNUSED)] * size
    added = {entry["id"]: entry for entry in facts["added_tokens"]}
    by_id = {i: token for token, i in facts["model"]["vocab"].items()}
    for i, token in {**by_id, **{i: entry["content"] for i, entry in added.items()}}.items():
        if i >= size:
            raise JaxftError(f"{where}, tokenizer", f"token {token!r} has the id {i}, the embedding only {size} rows")
        tokens[i], types[i] = token, int(_token_type(added.get(i)))
    return tokens, types


def _token_type(added: dict[str, Any] | None) -> TokenType:
    if added is None:
        return TokenType.NORMAL
    return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED


def _merges(pairs: Sequence[Sequence[str] | str], where: object) -> list[str]:
    """'left right', as GGUF has them; tokenizer.json has pairs, or (older) that same form."""
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    if bad := next((merge for merge in merges if merge.count(" ") != 1), None):
        raise JaxftError(f"{where}, tokenizer", f"the merge {bad!r} holds a space, which byte-level BPE never does")
    return merges


def _added_around_text(tokenizer: PreTrainedTokenizerBase, where: object) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS after a text, seen on a text."""
    bare, full = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (False, True))
    for add_bos in (False, True):
        for add_eos in (False, True):
            if full == [tokenizer.bos_token_id] * add_bos + bare + [tokenizer.eos_token_id] * add_eos:
                return add_bos, add_eos
    raise JaxftError(
        f"{where}, tokenizer",
        f"it makes {full} of a text with the ids {bare}; GGUF can only say BOS before and EOS after",
    )


def _chat_template_metadata(template: str | dict[str, str] | None) -> dict[str, Any]:
    if not template:
        return {}
    templates = {"default": template} if isinstance(template, str) else template
    named = [name for name in templates if name != "default"]
    keys = {f"tokenizer.chat_template.{name}": templates[name] for name in named}
    default = {"tokenizer.chat_template": templates["default"]} if "default" in templates else {}
    return {**({"tokenizer.chat_templates": named} if named else {}), **keys, **default}

"""Tokenizers of GGUF files: the ids are llama.cpp's own, both ways lose nothing, the rest is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from converters.gguf_header import read_header
from converters.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer, tokenizer_metadata
from jaxft.errors import JaxftError
from probe_strings import PROBES

VECTORS = Path(__file__).parent / "vectors"
PREFIX = "tokenizer.ggml."


@pytest.fixture(scope="module")
def smollm2_metadata(smollm2_gguf: Path) -> dict[str, Any]:
    """What the file says of its tokenizer."""
    metadata = read_header(smollm2_gguf).metadata
    return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_metadata: dict[str, Any]) -> Any:
    """Our reading of it."""
    tokenizer = read_tokenizer(smollm2_metadata, 8192, "smollm2")
    assert tokenizer
    return tokenizer


@pytest.fixture
def tiny_tokenizer(tiny_hf_dir: Path) -> PreTrainedTokenizerFast:
    """The tiny model's, fresh for each test; GPT-2's pre-tokenizer."""
    return AutoTokenizer.from_pretrained(tiny_hf_dir)


def test_ids_are_llamacpps(smollm2_tokenizer: Any) -> None:
    rows = json.loads((VECTORS / "smollm2_tokens.json").read_text())
    assert [row["text"] for row in rows] == list(PROBES)
    assert len(rows) == 20
    for row in rows:
        assert smollm2_tokenizer(row["text"])["input_ids"] == row["ids"], row["text"]
        assert smollm2_tokenizer.decode(row["ids"]) == row["text"]


def test_digits_trap(smollm2_tokenizer: Any) -> None:
    """Without the Digits step, which transformers' own import loses, the ids are others."""
    assert smollm2_tokenizer("x =  12 y")["input_ids"] == [104, 446, 256, 33, 34, 329]
    without = Tokenizer.from_str(smollm2_tokenizer.backend_tokenizer.to_str())
    without.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    assert without.encode("x =  12 y").ids != [104, 446, 256, 33, 34, 329]


def test_chat_template_and_special_tokens(smollm2_tokenizer: Any) -> None:
    text = smollm2_tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")
    special = [getattr(smollm2_tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")]
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"]
    assert smollm2_tokenizer.decode([1, 28120, 2], skip_special_tokens=True) == smollm2_tokenizer.decode([28120])
    assert smollm2_tokenizer.model_max_length == 8192


def test_smollm2_metadata_written_again(smollm2_tokenizer: Any, smollm2_metadata: dict[str, Any]) -> None:
    written = tokenizer_metadata(smollm2_tokenizer, 49152, "smollm2")
    assert written.pop(PREFIX + "add_eos_token") is False  # the one key that the file leaves to its default
    as_lists = {key: value.tolist() if key.endswith("token_type") else value for key, value in smollm2_metadata.items()}
    assert written == as_lists


def test_vocabulary_is_padded_to_the_embedding(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    n = len(tiny_tokenizer)
    tiny_tokenizer.add_tokens(["<tool>"])
    metadata = tokenizer_metadata(tiny_tokenizer, n + 4, "tiny")
    assert metadata[PREFIX + "tokens"][n:] == ["<tool>", f"[PAD{n + 1}]", f"[PAD{n + 2}]", f"[PAD{n + 3}]"]
    assert metadata[PREFIX + "token_type"][n:] == [4, 5, 5, 5]
    assert metadata[PREFIX + "token_type"][:4] == [3, 3, 3, 1]
    again = reread(metadata)
    assert again.get_vocab() == tiny_tokenizer.get_vocab()
    assert again.all_special_ids == tiny_tokenizer.all_special_ids
    assert again("a <tool> [PAD9]")["input_ids"] == tiny_tokenizer("a <tool> [PAD9]")["input_ids"]


def reread(metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that this metadata describes, once it has been through a file."""
    import numpy as np

    types = np.array(metadata[PREFIX + "token_type"], np.int32)
    tokenizer = read_tokenizer({**metadata, PREFIX + "token_type": types}, 64, "tiny")
    assert tokenizer
    return tokenizer


@pytest.mark.parametrize("row", PRE_TOKENIZERS, ids=lambda row: row.names[0])
def test_each_pre_tokenizer_is_recognised(row: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    metadata = tokenizer_metadata(tiny_tokenizer, 300, "tiny")
    ours = reread({**metadata, PREFIX + "pre": row.names[-1]})
    written = tokenizer_metadata(ours, 300, "ours")
    assert written[PREFIX + "pre"] == row.names[0]
    assert [reread(written)(text)["input_ids"] for text in PROBES] == [ours(text)["input_ids"] for text in PROBES]


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, False), (False, True), (True, True)])
def test_bos_and_eos_around_text(
    add_bos: bool, add_eos: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """They are seen in what the tokenizer does, and stay after the folder is written and read."""
    plain = tiny_tokenizer("a b")["input_ids"]
    single = f"{'<|im_start|> ' * add_bos}$A{' <|im_end|>' * add_eos}"
    tiny_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    metadata = tokenizer_metadata(tiny_tokenizer, 300, "tiny")
    assert (metadata[PREFIX + "add_bos_token"], metadata[PREFIX + "add_eos_token"]) == (add_bos, add_eos)
    reread(metadata).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a b")["input_ids"] == [1] * add_bos + plain + [2] * add_eos


def test_add_bos_defaults_to_llamacpps(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    metadata = tokenizer_metadata(tiny_tokenizer, 300, "tiny")
    del metadata[PREFIX + "add_bos_token"]
    starts = {pre: reread({**metadata, PREFIX + "pre": pre})("a")["input_ids"][0] for pre in ("gpt-2", "llama-bpe")}
    assert starts["llama-bpe"] == 1
    assert starts["gpt-2"] != 1


def test_several_chat_templates(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tiny_tokenizer.chat_template = templates
    metadata = tokenizer_metadata(tiny_tokenizer, 300, "tiny")
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    assert reread(metadata).chat_template == templates


def test_no_tokenizer() -> None:
    metadata = tokenizer_metadata(None, 300, "tiny")
    assert metadata == {PREFIX + "model": "none"}
    assert read_tokenizer(metadata, 64, "tiny") is None


REFUSED_FILES = {
    "sentencepiece": ({"model": "llama"}, r"'llama' \(SentencePiece tokenizer\) is not supported yet"),
    "wordpiece": ({"model": "bert"}, "WordPiece"),
    "no_model": ({"model": None}, r"None \(another tokenizer\)"),
    "pre": ({"pre": "viking"}, r"the pre-tokenizer 'viking' is not known \(known: smollm, .*qwen2"),
    "tokens": ({"tokens": None}, r"tokenizer.ggml.tokens: must be a list of strings"),
    "duplicate": ({"tokens": ["a", "b", "a"], "token_type": None, "merges": []}, "has the token 'a' twice"),
    "types": ({"token_type": None, "merges": ["a"]}, "item 0, 'a', does not join two tokens into one"),
    "merge": ({"merges": ["a 9"]}, "item 0, 'a 9', does not join two tokens into one"),
    "space_prefix": ({"add_space_prefix": True}, "add_space_prefix: the value True is not supported"),
    "unknown": ({"dropout": 0.5}, "tokenizer.ggml.dropout: the value 0.5 is not supported"),
    "bos": ({"bos_token_id": None, "add_bos_token": True}, "is true, but tokenizer.ggml.bos_token_id is missing"),
    "flag": ({"add_bos_token": "yes"}, "must be true or false, not 'yes'"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_FILES.values(), ids=REFUSED_FILES)
def test_refused_when_read(changes: dict[str, Any], message: str, smollm2_metadata: dict[str, Any]) -> None:
    changed = {**smollm2_metadata, **{PREFIX + name: value for name, value in changes.items()}}
    special = {key: 0 for key in changed if key.endswith("_token_id") and changed[key] is not None}
    metadata = {key: value for key, value in {**changed, **special}.items() if value is not None}
    with pytest.raises(JaxftError, match=message) as caught:
        read_tokenizer(metadata, 64, "some.gguf")
    assert caught.value.where.startswith("some.gguf")


def _unknown_steps(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def _prefix_space(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _lowercase(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.Lowercase()


def _ignore_merges(backend: Tokenizer) -> None:
    backend.model.ignore_merges = True


def _byte_fallback(backend: Tokenizer) -> None:
    backend.model.byte_fallback = True


def _other_template(backend: Tokenizer) -> None:
    backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])


REFUSED_TOKENIZERS: dict[str, tuple[Callable[[Tokenizer], None], str]] = {
    "steps": (_unknown_steps, "its pre-tokenizer is none of llama.cpp's known ones .*WhitespaceSplit"),
    "prefix_space": (_prefix_space, "its pre-tokenizer is none of llama.cpp's known ones"),
    "normalizer": (_lowercase, 'llama.cpp does not have its normalizer {"type": "Lowercase"}'),
    "ignore_merges": (_ignore_merges, "its ignore_merges is True, but llama.cpp's 'gpt-2' has False"),
    "byte_fallback": (_byte_fallback, "its model is BPE with byte_fallback; only byte-level BPE"),
    "template": (_other_template, "GGUF can only say BOS before and EOS after"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED_TOKENIZERS.values(), ids=REFUSED_TOKENIZERS)
def test_refused_when_written(
    change: Callable[[Tokenizer], None], message: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    change(tiny_tokenizer.backend_tokenizer)
    with pytest.raises(JaxftError, match=message):
        tokenizer_metadata(tiny_tokenizer, 300, "tiny")


def test_vocabulary_larger_than_the_embedding(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(JaxftError, match=r"has the id \d+, the embedding only 100 rows"):
        tokenizer_metadata(tiny_tokenizer, 100, "tiny")

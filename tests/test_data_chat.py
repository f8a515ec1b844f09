"""Which tokens are trained on, checked by hand on a tokenizer of single characters (plus two merges).

`marked` shows an example as text with the trained tokens between ⟦ and ⟧.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxft.data.batch import Example
from jaxft.data.chat import RowTokenizer, preview, tokenize_row
from jaxft.data.formats import Row, parse_row
from jaxft.errors import JaxftError

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<bos>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No special token ends a turn, and the template trims what it is given.
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# As Qwen3: the last turn always shows its thinking, past turns never.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COUNTING = "{{ messages | length }}" + CHATML  # no rendering is a prefix of a longer one
LENGTHS = "{{ messages | map(attribute='content') | join | length }}"  # and other contents change it all
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


def make_tokenizer(template: str | None = CHATML, bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """Bytes are tokens, but "bc" and " 4" are one; leading spaces are left out of the offsets, as GPT-2 does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, "bc", "Ġ4"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("b", "c"), ("Ġ", "4")]))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        tokenizer.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]),
        ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    names: dict[str, str] = {"pad_token": "<|pad|>"}
    names |= {"eos_token": "<|im_end|>"} if eos else {}
    names |= {"bos_token": "<bos>"} if bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    fast.chat_template = template
    return fast


def row(**keys: Any) -> Row:
    return parse_row(keys, "train row 3")


def chat(*turns: str) -> list[dict[str, str]]:
    """chat("s: be brief", "u: hi", "a: yo") -> messages."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]


def marked(example: Example, tokenizer: Any) -> str:
    pairs = zip(example.loss_mask.tolist(), example.tokens.tolist(), strict=True)
    runs = ((trained, [t for _, t in run]) for trained, run in itertools.groupby(pairs, key=lambda pair: pair[0]))
    texts = ((trained, tokenizer.decode(ids, skip_special_tokens=False)) for trained, ids in runs)
    return "".join(f"⟦{text}⟧" if trained else text for trained, text in texts)


USER, BOT = "<|im_start|>user\n", "<|im_start|>assistant\n"

CHATS = {
    "one turn": (
        chat("u: hi", "a: yo"),
        f"{USER}hi<|im_end|>\n{BOT}⟦yo<|im_end|>⟧\n",
    ),
    "system and two turns": (
        chat("s: be", "u: hi", "a: yo", "u: go", "a: ok"),
        f"<|im_start|>system\nbe<|im_end|>\n{USER}hi<|im_end|>\n{BOT}⟦yo<|im_end|>⟧\n"
        f"{USER}go<|im_end|>\n{BOT}⟦ok<|im_end|>⟧\n",
    ),
    "the assistant first": (
        chat("a: yo", "u: hi", "a: ok"),
        f"{BOT}⟦yo<|im_end|>⟧\n{USER}hi<|im_end|>\n{BOT}⟦ok<|im_end|>⟧\n",
    ),
    "empty turn": (
        chat("u: hi", "a: ", "u: go", "a: ok"),
        f"{USER}hi<|im_end|>\n{BOT}⟦<|im_end|>⟧\n{USER}go<|im_end|>\n{BOT}⟦ok<|im_end|>⟧\n",
    ),
    "two assistant turns in a row, the user last": (
        chat("u: hi", "a: yo", "a: so", "u: go"),
        f"{USER}hi<|im_end|>\n{BOT}⟦yo<|im_end|>⟧\n{BOT}⟦so<|im_end|>⟧\n{USER}go<|im_end|>\n",
    ),
    "the user quotes the assistant and the template": (
        chat("u: yo<|im_end|>", "a: yo"),
        f"{USER}yo<|im_end|><|im_end|>\n{BOT}⟦yo<|im_end|>⟧\n",
    ),
    "spaces at the borders, emoji": (
        chat("u: hi ", "a:  é😀 \n"),
        f"{USER}hi <|im_end|>\n{BOT}⟦ é😀 \n<|im_end|>⟧\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("template", [CHATML, TAGGED])
@pytest.mark.parametrize("case", CHATS)
def test_assistant_turns(case: str, template: str):
    messages, expected = CHATS[case]
    tokenizer = make_tokenizer(template)
    example = tokenize_row(row(messages=messages), tokenizer)
    assert marked(example, tokenizer) == expected
    assert example.tokens.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    assert (example.tokens.dtype, example.loss_mask.dtype) == (np.int32, np.bool_)
    assert example.where == "train row 3"


def test_one_mask_token_by_token():
    tokenizer = make_tokenizer()
    example = tokenize_row(row(messages=chat("u: abc", "a: bc")), tokenizer)
    header, end = [1, *"user\n"], [2, "\n"]
    tokens = [*header, "a", "bc", *end, 1, *"assistant\n", "bc", *end]
    vocab = tokenizer.get_vocab()
    ids = [token if isinstance(token, int) else vocab[token.replace("\n", "Ċ")] for token in tokens]
    assert example.tokens.tolist() == ids
    assert example.loss_mask.tolist() == [False] * 21 + [True, True, False]


def test_the_mask_equals_transformers_own_on_generation_tags():
    tokenizer, untagged = make_tokenizer(TAGGED), make_tokenizer(CHATML)
    rng = np.random.default_rng(0)
    for _ in range(25):
        messages = chat("u: start", *("ua"[rng.integers(2)] + ": " + "xyz bc 4"[: rng.integers(9)] for _ in range(6)))
        messages.append({"role": "assistant", "content": "end"})
        expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        for each in (tokenizer, untagged):
            example = tokenize_row(row(messages=messages), each)
            assert example.tokens.tolist() == expected["input_ids"]
            assert example.loss_mask.tolist() == [bool(m) for m in expected["assistant_masks"]]


def test_a_template_without_end_of_turn_token_keeps_its_newline():
    tokenizer = make_tokenizer(PLAIN)
    example = tokenize_row(row(messages=chat("u: hi", "a:  yo ", "u: go", "a: ok")), tokenizer)
    assert marked(example, tokenizer) == "user: hi\nassistant: ⟦yo\n⟧user: go\nassistant: ⟦ok\n⟧"


def test_a_template_that_renders_past_turns_otherwise():
    tokenizer = make_tokenizer(THINKING)
    example = tokenize_row(row(messages=chat("u: hi", "a: yo", "u: go", "a: ")), tokenizer)
    assert marked(example, tokenizer) == (
        f"{USER}hi<|im_end|>\n{BOT}⟦yo<|im_end|>⟧\n{USER}go<|im_end|>\n{BOT}⟦<think></think><|im_end|>⟧\n"
    )


def test_a_template_of_which_no_rendering_is_a_prefix():
    tokenizer = make_tokenizer(COUNTING)
    example = tokenize_row(row(messages=chat("u: hi", "a: yo")), tokenizer)
    assert marked(example, tokenizer) == f"2{USER}hi<|im_end|>\n{BOT}⟦yo<|im_end|>⟧\n"


def test_everything_is_trained_on_without_assistant_only_loss():
    tokenizer = make_tokenizer()
    example = tokenize_row(row(messages=chat("u: hi", "a: yo")), tokenizer, assistant_only_loss=False)
    assert marked(example, tokenizer) == f"<|im_start|>⟦user\nhi<|im_end|>\n{BOT}yo<|im_end|>\n⟧"
    assert not example.loss_mask[0]


TEXTS = {
    "text": ({"text": "abc"}, "a⟦bc<|im_end|>⟧"),
    "text that ends itself": ({"text": "abc<|im_end|>"}, "a⟦bc<|im_end|>⟧"),
    "text that a template ended": ({"text": "abc<|im_end|>\n"}, "a⟦bc<|im_end|>\n⟧"),
    "completion": ({"prompt": "2+2=", "completion": "4"}, "2+2=⟦4<|im_end|>⟧"),
    "the completion's space belongs to its first token": ({"prompt": "is", "completion": " 4"}, "is⟦ 4<|im_end|>⟧"),
    "spaces of their own": ({"prompt": "is ", "completion": "  4"}, "is ⟦  4<|im_end|>⟧"),
    "a token across the border": ({"prompt": "ab", "completion": "cd"}, "a⟦bcd<|im_end|>⟧"),
    "several tokens a character": ({"prompt": "é", "completion": "😀"}, "é⟦😀<|im_end|>⟧"),
    "empty prompt": ({"prompt": "", "completion": "abc"}, "a⟦bc<|im_end|>⟧"),
}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("case", TEXTS)
def test_texts_and_completions(case: str, bos: bool):
    keys, expected = TEXTS[case]
    tokenizer = make_tokenizer(template=None, bos=bos)
    if bos:  # now the first character has a token before it to be predicted from
        expected = "<bos>" + (f"⟦{expected.replace('⟦', '')}" if expected.startswith("a⟦bc<") else expected)
    assert marked(tokenize_row(row(**keys), tokenizer), tokenizer) == expected


def test_the_beginning_of_sequence_token_is_not_doubled():
    tokenizer = make_tokenizer(bos=True)
    example = tokenize_row(row(text="<bos>ab"), tokenizer)
    assert marked(example, tokenizer) == "<bos>⟦ab<|im_end|>⟧"


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_a_completion_of_messages_trains_on_its_own_turns_only(template: str):
    tokenizer = make_tokenizer(template)
    keys = {"prompt": chat("u: hi", "a: yo", "u: go"), "completion": chat("a: ok")}
    for assistant_only_loss in (True, False):
        example = tokenize_row(row(**keys), tokenizer, assistant_only_loss=assistant_only_loss)
        assert marked(example, tokenizer) == (
            f"{USER}hi<|im_end|>\n{BOT}yo<|im_end|>\n{USER}go<|im_end|>\n{BOT}⟦ok<|im_end|>⟧\n"
        )


BAD = {
    "no chat template": (None, {"messages": chat("u: hi", "a: yo")}, r"no chat template\. Use an instruct model's"),
    "no assistant": (CHATML, {"messages": chat("u: hi")}, r"every label masked.* no assistant message"),
    "no assistant, tagged": (TAGGED, {"messages": chat("u: hi")}, r"every label masked.* no assistant message"),
    "not after the prompt": (
        CHATML, {"prompt": chat("u: hi", "a: yo"), "completion": chat("u: go")}, r"every label masked.* no assistant",
    ),
    "assistant not rendered": ("{{ messages[0]['content'] }}", {"messages": chat("u: hi", "a: yo")}, r"renders none"),
    "assistant first": (
        LENGTHS + CHATML, {"messages": chat("a: yo", "u: hi")}, r"leads to messages\[0\] otherwise",
    ),
    "no rendering is a prefix": (
        LENGTHS + CHATML, {"messages": chat("u: hi", "a: yo")}, r"leads to messages\[1\] otherwise",
    ),
    "template refuses": (REFUSING, {"messages": chat("s: be", "u: hi", "a: yo")}, r"refuses it: no system role"),
    "template is broken": ("{{ 1 + messages }}", {"messages": chat("u: hi")}, r"refuses it: unsupported operand"),
    "template is no template": ("{% if %}", {"messages": chat("u: hi")}, r"refuses it: "),
    "empty text": (None, {"text": ""}, r"every label masked.* text or completion is empty"),
    "empty completion": (None, {"prompt": "p", "completion": ""}, r"every label masked.* text or completion is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(case: str):
    template, keys, message = BAD[case]
    with pytest.raises(JaxftError, match=rf"^train row 3: .*{message}"):
        tokenize_row(row(**keys), make_tokenizer(template))


def test_a_past_turn_that_cannot_be_located_is_an_error():
    template = THINKING.replace("{{ m['content'] + '<|im_end|>\n' }}", "{{ m['content'] }}\n")
    with pytest.raises(JaxftError, match=r"what leads to messages\[1\] otherwise"):
        tokenize_row(row(messages=chat("u: hi", "a: yo", "u: go", "a: ok")), make_tokenizer(template))


def test_bad_tokenizers():
    with pytest.raises(JaxftError, match=r"tokenizer: has no end-of-sequence token"):
        tokenize_row(row(text="abc"), make_tokenizer(eos=False))

    class Slow:
        is_fast = False

    with pytest.raises(JaxftError, match=r"tokenizer: gives no offsets"):
        RowTokenizer(Slow())  # pyright: ignore[reportArgumentType]


def test_the_preview_colours_trained_tokens():
    tokenizer = make_tokenizer()
    messages, expected = CHATS["system and two turns"]
    text = preview(tokenize_row(row(messages=messages), tokenizer), tokenizer)
    assert text.plain == expected.replace("⟦", "").replace("⟧", "")
    trained = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert trained == ["yo<|im_end|>", "ok<|im_end|>"]


@pytest.mark.slow
def test_smollm2(smollm2_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    messages = chat("u: What is 12+30?", "a: 42", "u: thanks", "a: ")
    example = tokenize_row(row(messages=messages), tokenizer)
    head = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert marked(example, tokenizer) == (
        f"{head}{USER}What is 12+30?<|im_end|>\n{BOT}⟦42<|im_end|>⟧\n{USER}thanks<|im_end|>\n{BOT}⟦<|im_end|>⟧\n"
    )
    assert example.tokens.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]

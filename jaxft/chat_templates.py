"""Chat templates by name for base models, and the helpers around them that users of Unsloth know.

The templates are `jaxft/data/templates/*.jinja`, written from the formats' documentation. Each marks the assistant's
turns with {% generation %} tags and says in its first line what it is called and which token ends a turn, if that is
another than the tokenizer's end-of-sequence token. A new template is one file.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from jaxft.data.turns import Markers, Turns
from jaxft.errors import JaxftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:  # the run-time type checker of the tests looks this name up; transformers is slow to import
    PreTrainedTokenizerBase = Any

T = TypeVar("T")

_HEAD = re.compile(r"\{#- names: (?P<names>[^;]*?)(?:; end of turn: (?P<end>\S+))? -#\}\n")
_PLAIN = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}


class Template(NamedTuple):
    """A chat template of ours.

    Attributes:
      names: what it is called.
      text: in Jinja.
      end_of_turn: the token that ends a turn; None: the tokenizer's end-of-sequence token.
    """

    names: tuple[str, ...]
    text: str
    end_of_turn: str | None


@functools.cache
def templates() -> tuple[Template, ...]:
    """All of them."""
    folder = resources.files("jaxft.data").joinpath("templates")
    texts = [file.read_text("utf-8") for file in sorted(folder.iterdir(), key=lambda file: file.name)]
    heads = [_HEAD.match(text) for text in texts]
    return tuple(
        Template(tuple(head["names"].split(", ")), text[head.end() :], head["end"])
        for head, text in zip(heads, texts, strict=True)
        if head
    )


def get_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] = _PLAIN,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> PreTrainedTokenizerBase:
    """Gives a tokenizer a chat template, and the template's end-of-turn token as its end of sequence.

    Args:
      tokenizer: changed in place.
      chat_template: a name, with or without dashes and dots ("llama-3.1", "llama31"), or (Jinja, end-of-turn token).
      mapping: what the keys "role" and "content", and the roles "user" and "assistant", are called in conversations
        that are given to apply_chat_template; the usual names are understood as well.
      map_eos_token: where the tokenizer does not have the end-of-turn token, use its end-of-sequence token instead.
      system_message: stands first in conversations that have no system message.

    Returns:
      The tokenizer.

    Raises:
      JaxftError: a template or a key of the mapping that is not known; a tokenizer without the end-of-turn token
        (map_eos_token=False), or without any token to end a turn with.
    """
    if unknown := sorted(set(mapping) - set(_PLAIN)):
        raise JaxftError("mapping", f"has the unknown keys {unknown}", f"Known: {', '.join(_PLAIN)}.")
    text, end = _find(chat_template)
    if end is not None and end in tokenizer.get_vocab():
        tokenizer.eos_token = end
    elif tokenizer.eos_token is None or not (end is None or map_eos_token):
        what = "end-of-sequence token" if end is None else f"token {end!r} to end turns with"
        raise JaxftError("tokenizer", f"has no {what}", "Choose another template, or set tokenizer.eos_token.")
    elif end is not None:
        text = text.replace(end, str(tokenizer.eos_token))
    tokenizer.chat_template = _prelude({**_PLAIN, **mapping}, system_message) + text
    return tokenizer


def standardize_sharegpt(
    dataset: T,
    tokenizer: Any = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output"),
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> T:
    """Turns ShareGPT's {"from", "value"} into {"role", "content"} in the conversations of a data set.

    Training needs no such step (`jaxft.data.formats` reads both); this is for code that renders the rows itself.

    Args:
      dataset: a list of rows or a `datasets.Dataset`, with the column "conversations" or "messages".
      tokenizer: not used.
      aliases_for_system, aliases_for_user, aliases_for_assistant: names of the three roles.
      batch_size, num_proc: of `datasets.Dataset.map`.

    Returns:
      A new data set of the same kind.

    Raises:
      JaxftError: naming the row: no conversation, or an unknown role.
    """
    groups = {"system": aliases_for_system, "user": aliases_for_user, "assistant": aliases_for_assistant}
    roles = {alias: role for role, aliases in groups.items() for alias in aliases}
    rows: Any = dataset
    if hasattr(rows, "column_names"):
        return rows.map(lambda row, i: _standard(row, i, roles), with_indices=True, num_proc=num_proc)
    return [_standard(row, i, roles) for i, row in enumerate(rows)]  # pyright: ignore[reportReturnType]


def train_on_responses_only(
    trainer: T, instruction_part: str | None = None, response_part: str | None = None, **unused: Any
) -> T:
    """Makes a trainer learn what follows `response_part` only, up to the next `instruction_part`.

    This is for texts that a chat template has rendered. Of rows with messages the trainer learns the assistant's turns
    only without being told (assistant_only_loss), wherever the template puts them.

    Args:
      trainer: an SFTTrainer that has not begun; changed in place.
      instruction_part, response_part: the texts that open a user's and an assistant's turn; None: as the tokenizer's
        chat template opens them.
      unused: force_match, tokenizer, return_function and num_proc of other programs' function, without effect.

    Returns:
      The trainer.

    Raises:
      JaxftError: only one part is given, or none and the template does not show them; an unknown argument.
    """
    known = {"force_match", "tokenizer", "return_function", "num_proc"}
    if unknown := sorted(set(unused) - known):
        raise JaxftError("train_on_responses_only", f"has no argument {', '.join(unknown)}")
    target: Any = trainer
    if instruction_part and response_part:
        target.response_markers = Markers(instruction_part, response_part)
    elif instruction_part or response_part:
        raise JaxftError("train_on_responses_only", "has one part of two", "Give both, or none of them.")
    else:
        target.response_markers = Turns(target.tokenizer).markers()
    return trainer


def _find(chat_template: str | tuple[str, str]) -> tuple[str, str | None]:
    """(Jinja, end-of-turn token)."""
    if isinstance(chat_template, tuple):
        return chat_template
    for template in templates():
        if _plain_name(chat_template) in map(_plain_name, template.names):
            return template.text, template.end_of_turn
    known = ", ".join(name for template in templates() for name in template.names)
    raise JaxftError("chat_template", f"{chat_template!r} is not known", f"Known: {known}; or give (Jinja, end token).")


def _plain_name(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.lower())


def _prelude(mapping: dict[str, str], system_message: str | None) -> str:
    """Jinja that brings `messages` to the usual keys and roles, and puts the system message first."""
    if mapping == _PLAIN and system_message is None:
        return ""
    role, content = json.dumps(mapping["role"]), json.dumps(mapping["content"])
    roles = json.dumps({mapping["user"]: "user", mapping["assistant"]: "assistant"})
    first = json.dumps([{"role": "system", "content": system_message}])
    system = (
        "{%- if not ns.all or ns.all[0]['role'] != 'system' -%}{%- set ns.all = " + first + " + ns.all -%}{%- endif -%}"
    )
    return (
        "{%- set ns = namespace(all=[]) -%}{%- for m in messages -%}"
        f"{{%- set role = m[{role}] if {role} in m else m['role'] -%}}"
        f"{{%- set content = m[{content}] if {content} in m else m['content'] -%}}"
        f"{{%- set ns.all = ns.all + [dict(m, role={roles}.get(role, role), content=content)] -%}}"
        f"{{%- endfor -%}}{'' if system_message is None else system}{{%- set messages = ns.all -%}}"
    )


def _standard(row: Mapping[str, Any], index: int, roles: Mapping[str, str]) -> dict[str, Any]:
    where = f"dataset row {index + 1}"
    column = next((name for name in ("conversations", "messages") if name in row), None)
    if column is None:
        raise JaxftError(where, f"has neither conversations nor messages, only {sorted(map(str, row))}")
    turns = []
    for turn in row[column]:
        role, text = (next((turn[key] for key in keys if key in turn), None) for keys in _KEYS)
        if not isinstance(role, str) or role not in roles:
            raise JaxftError(where, f"has the unknown role {role!r}", f"Known: {', '.join(roles)}.")
        turns.append({"role": roles[role], "content": text})
    return {**row, column: turns}


_KEYS: tuple[tuple[str, str], tuple[str, str]] = (("role", "from"), ("content", "value"))

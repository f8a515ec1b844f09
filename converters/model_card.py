"""README.md of what is written: a model card with the Hub's front matter, and how the weights came about.

The front matter's fields are the Hub's (https://huggingface.co/docs/hub/model-cards). The card says what is known and
nothing else; one that somebody wrote or edited is never replaced.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from converters.checkpoint import Checkpoint
from converters.gguf_header import read_header
from converters.hf_files import CARD
from jaxft.files import new_file

_MARK = "<!-- written by jaxft, replaced by it until somebody edits it: {} -->\n"
_MARK_AT_END = re.compile(_MARK.format("([0-9a-f]{16})") + r"\Z")
_FRONT_MATTER = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# What the Hub knows about the licence, carried over from the base.
_LICENCE = ("license", "license_name", "license_link")
FORCED_4BIT = (
    "The merged weights were quantized to bitsandbytes' NF4 after merging. **This loses quality**: the rounding errors "
    "can be as large as what the training changed. A merge in 16 bits loses neither."
)


# What is written -> (what it is, the Hub's relation to the base, the program that loads it, tags).
KINDS = {
    "lora": ("a LoRA adapter", "adapter", "peft", ("lora",)),
    "merged": ("a fine-tuned model in the dtypes of its base", "finetune", "transformers", ()),
    "merged_16bit": ("a fine-tuned model in 16 bits", "finetune", "transformers", ()),
    "merged_4bit": ("a fine-tuned model in 4 bits", "finetune", "transformers", ("4-bit", "bitsandbytes")),
    "gguf": ("GGUF files", "quantized", "gguf", ("gguf", "llama.cpp")),
}


@dataclasses.dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
      kind: a row of `KINDS`.
      base: the base model, a name on the hub or a path.
      licence: the Hub's fields about it; see `licence_of`.
      weights: sentences about how the weights came about.
      training: "trainer", "settings" and "figures" of a run; empty where nothing is known about it.
      training_text: the same as a section of an earlier card.
    """

    kind: str
    base: str
    licence: Mapping[str, str] = dataclasses.field(default_factory=dict)
    weights: Sequence[str] = ()
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training_text: str = ""

    def text(self, name: str) -> str:
        """The whole README.md of a model called `name`."""
        what = KINDS[self.kind][0]
        base = Path(self.base).name if self._hub_name is None else f"[{self.base}](https://huggingface.co/{self.base})"
        front_matter = yaml.safe_dump(self._front_matter(), sort_keys=True, allow_unicode=True)
        parts = [
            f"---\n{front_matter}---\n",
            f"# {name}\n",
            f"{what[0].upper()}{what[1:]} of {base}, made with jaxft.\n",
            *(["## Weights\n", *(f"{sentence}\n" for sentence in self.weights)] if self.weights else ()),
            self.training_text or _training(self.training),
        ]
        return marked("\n".join(part for part in parts if part))

    @property
    def _hub_name(self) -> str | None:
        return self.base if _HUB_NAME.fullmatch(self.base) and not Path(self.base).exists() else None

    def _front_matter(self) -> dict[str, Any]:
        trainer = str(self.training.get("trainer", "")).removesuffix("Trainer").lower()
        _, relation, library, of_kind = KINDS[self.kind]
        tags = {*of_kind, "jaxft", *([trainer] if trainer else ())}
        fields: dict[str, Any] = {**self.licence, "library_name": library, "pipeline_tag": "text-generation"}
        if self._hub_name is not None:
            fields |= {"base_model": self.base, "base_model_relation": relation}
            tags.add(f"base_model:{relation}:{self.base}")
        return fields | {"tags": sorted(tags)}


def sentences(kind: str, adapter: Mapping[str, Any] | None, quantizations: Sequence[str], into: str) -> list[str]:
    """How the weights of a model in memory came about, whose base is held in `quantizations`.

    Args:
      kind: a row of `KINDS`.
      adapter: settings of its adapter, under the names of adapter_config.json.
      into: what the adapter is merged into, "original" or "loaded".
    """
    found = [of_adapter(adapter)] if adapter else []
    forms = " and ".join(name.upper() for name in quantizations)
    if adapter and forms:
        found.append(f"While it trained, weights of the base were held in {forms}.")
    if adapter and kind != "lora":
        decoded = f"the base's weights as they were loaded{f', decoded from {forms}' if forms else ''}"
        found.append(of_merge("the base's own weights" if into == "original" else decoded))
    if kind == "merged_4bit":
        found.append(FORCED_4BIT)
    return found


def of_adapter(config: Mapping[str, Any]) -> str:
    """A sentence about an adapter, from its adapter_config.json."""
    targets = config.get("target_modules")
    names = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
    variants = [name for field, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if config.get(field)]
    kind = f" ({', '.join(variants)})" if variants else ""
    return f"LoRA{kind} of rank {config.get('r')}, lora_alpha {config.get('lora_alpha')}, on {names}."


def of_merge(weights: str) -> str:
    """A sentence about a merge into `weights`."""
    return f"The adapter was merged as W + scale * B A in float32, into {weights}."


def _training(training: Mapping[str, Any]) -> str:
    """The section about a run."""
    if not training:
        return ""
    tables = [
        f"| {title} | value |\n| --- | --- |\n"
        + "".join(f"| {_cell(k)} | {_cell(v)} |\n" for k, v in training[part].items())
        for title, part in (("figure", "figures"), ("setting", "settings"))
        if training.get(part)
    ]
    return "\n".join([f"## Training\n\nWith jaxft's {training['trainer']}.\n", *tables])


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else ", ".join(value) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def marked(text: str) -> str:
    """The text with a last line by which `is_ours` knows it, until somebody edits it."""
    return f"{text}\n{_MARK.format(_digest(text))}"


def is_ours(text: str) -> bool:
    """Whether a card is as we wrote it."""
    found = _MARK_AT_END.search(text)
    return found is not None and found.group(1) == _digest(text[: found.start() - 1])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_card(folder: Path, text: str) -> Path | None:
    """Writes README.md into `folder`, and returns its path; None where somebody's own stands there."""
    path = folder / CARD
    if path.exists() and not is_ours(_read(path)):
        return None
    with new_file(path, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def carry_card(earlier: Path, folder: Path, text: str) -> None:
    """Writes README.md into `folder`, which is to replace the folder `earlier`: what somebody wrote there stays."""
    if (earlier / CARD).is_file():
        (folder / CARD).write_bytes((earlier / CARD).read_bytes())
    write_card(folder, text)


def licence_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The Hub's fields about the licence of a checkpoint: of its model card, or of GGUF's metadata."""
    path = Path(checkpoint.where)
    if path.suffix == ".gguf":
        metadata = read_header(path).metadata
        found = {name: metadata.get(f"general.{name.replace('_', '.')}") for name in _LICENCE}
    else:
        found = front_matter_of(path)
    return {name: str(found[name]) for name in _LICENCE if isinstance(found.get(name), str)}


def front_matter_of(folder: Path) -> dict[str, Any]:
    """Of the folder's README.md; empty where there is none, or none that can be read."""
    found = _FRONT_MATTER.match(_read(folder / CARD))
    try:
        fields = yaml.safe_load(found.group(1)) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a 13th month
        return {}
    return fields if isinstance(fields, dict) else {}


def training_section_of(folder: Path) -> str:
    """The section "Training" of the folder's README.md with its heading; empty without one."""
    found = re.search(r"^## Training\n.*?(?=^## |^<!--|\Z)", _read(folder / CARD), re.DOTALL | re.MULTILINE)
    return found.group(0).rstrip() + "\n" if found else ""


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

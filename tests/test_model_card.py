"""Model cards: their whole text, as the Hub reads it, and that nobody's own README.md is replaced."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from converters.gguf_export import write_gguf
from converters.gguf_import import GGUFCheckpoint
from converters.hf_load import HFCheckpoint
from converters.model_card import (
    CARD,
    FORCED_4BIT,
    Card,
    is_ours,
    licence_of,
    sentences,
    training_section_of,
    write_card,
)
from converters.peft_io import make_adapter, write_adapter
from jaxft.lora import LoraConfig

BASE = "somebody/model-1B"
RUN = {
    "trainer": "SFTTrainer",
    "settings": {"learning_rate": 2e-4, "packing": True, "optim": "adamw_8bit", "a|b": None},
    "figures": {"steps": 30, "loss at the end": 0.12345678},
}
ADAPTER = dataclasses.asdict(LoraConfig(r=8, lora_alpha=16, target_modules=("up_proj", "q_proj"), use_dora=True))
CARD_OF_AN_ADAPTER = """---
base_model: somebody/model-1B
base_model_relation: adapter
library_name: peft
license: apache-2.0
pipeline_tag: text-generation
tags:
- base_model:adapter:somebody/model-1B
- jaxft
- lora
- sft
---

# my-adapter

A LoRA adapter of [somebody/model-1B](https://huggingface.co/somebody/model-1B), made with jaxft.

## Weights

LoRA (DoRA) of rank 8, lora_alpha 16, on q_proj, up_proj.

While it trained, weights of the base were held in NF4.

## Training

With jaxft's SFTTrainer.

| figure | value |
| --- | --- |
| steps | 30 |
| loss at the end | 0.123457 |

| setting | value |
| --- | --- |
| learning_rate | 0.0002 |
| packing | True |
| optim | adamw_8bit |
| a\\|b | None |
"""


def card(kind: str = "lora", base: str = BASE) -> Card:
    return Card(kind, base, {"license": "apache-2.0"}, sentences(kind, ADAPTER, ["nf4"], "original"), RUN)


def test_the_whole_text(tmp_path: Path):
    text = card().text("my-adapter")
    assert text.startswith(CARD_OF_AN_ADAPTER)
    assert len(text.splitlines()) == len(CARD_OF_AN_ADAPTER.splitlines()) + 2
    write_card(tmp_path, text)
    data = ModelCard.load(tmp_path / CARD).data
    assert (data.base_model, data.license, data.library_name) == (BASE, "apache-2.0", "peft")


def test_what_a_merge_says():
    original, loaded = (sentences("merged_16bit", ADAPTER, ["nf4"], into) for into in ("original", "loaded"))
    assert original[2].endswith("W + scale * B A in float32, into the base's own weights.")
    assert loaded[2].endswith("into the base's weights as they were loaded, decoded from NF4.")
    four = card("merged_4bit").text("x")
    assert FORCED_4BIT in four
    assert "loses quality" in FORCED_4BIT
    assert FORCED_4BIT not in card("merged_16bit").text("x")
    assert "base_model_relation: finetune\n" in four
    assert "\n- 4-bit\n" in four


def test_a_base_on_this_machine(tmp_path: Path):
    """Its path is nobody's business, and no name on the hub."""
    (tmp_path / "base").mkdir()
    text = card(base=str(tmp_path / "base")).text("x")
    assert "A LoRA adapter of base, made" in text
    assert "base_model" not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("change", [lambda text: text.replace("rank", "Rank"), lambda text: text + "\nmine", str.upper])
def test_whose_it_is(change, tmp_path: Path):
    text = card().text("x")
    assert is_ours(text)
    assert not is_ours(change(text))
    (tmp_path / CARD).write_text(change(text))
    assert write_card(tmp_path, text) is None
    assert (tmp_path / CARD).read_text() == change(text)


@pytest.mark.parametrize("mine", [True, False])
def test_overwriting_a_folder_keeps_what_somebody_wrote(mine: bool, tmp_path: Path):
    ones = {f"model.layers.0.mlp.up_proj.lora_{part}.weight": np.ones((2, 2), "f4") for part in "AB"}
    adapter = make_adapter(LoraConfig(r=2), ones, base_model_name_or_path=BASE)
    old, new = (card().text(name) for name in ("old", "new"))
    out = write_adapter(adapter, tmp_path / "out", card=old)
    assert (out / CARD).read_text() == old
    if mine:
        (out / CARD).write_text("my own words")
    write_adapter(adapter, out, overwrite=True, card=new)
    assert (out / CARD).read_text() == ("my own words" if mine else new)


@pytest.mark.parametrize("text", ["a: [", "a: 2024-13-01", "a: " + "[" * 100_000, "- a", "license: 3", "license: [a]"])
def test_front_matter_that_says_nothing(text: str, tiny_hf_dir: Path, tmp_path: Path):
    source = HFCheckpoint(shutil.copytree(tiny_hf_dir, tmp_path / "hf"))
    (tmp_path / "hf" / CARD).write_text(f"---\n{text}\n---\n")
    assert licence_of(source) == {}


def test_licence_and_training_travel(tiny_hf_dir: Path, tmp_path: Path):
    assert licence_of(HFCheckpoint(tiny_hf_dir)) == {}
    source = HFCheckpoint(shutil.copytree(tiny_hf_dir, tmp_path / "hf"))
    (tmp_path / "hf" / CARD).write_text("---\nlicense: other\nlicense_name: mine\ntags: [x]\n---\n# A model\n")
    assert licence_of(source) == {"license": "other", "license_name": "mine"}
    gguf = GGUFCheckpoint(write_gguf(source, tmp_path / "x.gguf", "f32"))
    assert licence_of(gguf) == {"license": "other", "license_name": "mine"}
    assert training_section_of(tmp_path) == ""
    (tmp_path / CARD).write_text(card().text("x"))
    section = training_section_of(tmp_path)
    assert section == CARD_OF_AN_ADAPTER[CARD_OF_AN_ADAPTER.index("## Training") :]
    assert section in Card("merged", BASE, training_text=section).text("y")

"""Slow: what a config.json leaves out, or says is null, is read as transformers' own class reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from arch_cases import CASES, arch_config
from converters.archs import ARCHS
from converters.archs.base import ArchSpec
from jaxft.errors import JaxftError

pytestmark = pytest.mark.slow


def class_reads(config: dict[str, Any]) -> dict[str, Any] | None:
    """All fields of transformers' class made of this config; None where it refuses it."""
    from transformers import CONFIG_MAPPING

    try:
        fields = CONFIG_MAPPING[config["model_type"]](**config).to_dict()
    except Exception:  # whatever a class does with a field of the wrong kind
        return None
    return {name: value for name, value in fields.items() if name in config or name not in _of_any_class()}


def _of_any_class() -> set[str]:
    """Fields that have nothing to do with the decoder."""
    from transformers import PretrainedConfig

    return set(PretrainedConfig().to_dict()) - {"tie_word_embeddings"}


def configs(family: str) -> dict[str, dict[str, Any]]:
    """Of all its cases, and what its class has without any field."""
    from transformers import CONFIG_MAPPING

    plain = class_reads(CONFIG_MAPPING[family](num_experts_per_tok=2).to_dict())
    assert plain is not None
    return {"the class": plain, **{case: arch_config(family, case) for case in CASES[family]}}


def variants(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The config, and without one of its fields, and with null for one of them."""
    yield "whole", config
    for name in config.keys() - {"model_type"}:
        yield name, {field: value for field, value in config.items() if field != name}
        yield name, {**config, name: None}


def compare(spec: ArchSpec) -> tuple[list[str], int]:
    """(what is read otherwise than the class reads it, how many configs were compared)."""
    found, compared = [], 0
    for case, config in configs(spec.model_type).items():
        for name, variant in variants(config):
            theirs = class_reads(variant)
            try:
                expected = spec.decoder_config(theirs or {}, "theirs")
            except JaxftError:  # the class refuses it, or makes of it what is no model
                continue
            compared += 1
            try:
                if spec.decoder_config(variant, "ours") != expected:
                    found.append(f"{case}, {name} {'null' if name in variant else 'missing'}")
            except JaxftError as error:  # what no config leaves out may be refused, if it is by name
                if f"field {name}: is missing" not in str(error):
                    found.append(f"{case}, {name}: {error}")
    return found, compared


@pytest.mark.parametrize("family", CASES)
def test_a_missing_field_or_null_is_read_as_transformers_reads_it(family: str) -> None:
    found, compared = compare(ARCHS[family])
    assert not found
    assert compared > 40


def test_a_wrong_default_is_noticed() -> None:
    """Negative control."""
    found, _ = compare(dataclasses.replace(ARCHS["gemma2"], defaults={**ARCHS["gemma2"].defaults, "head_dim": 128}))
    assert "small, head_dim missing" in found

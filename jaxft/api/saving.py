"""How a `LanguageModel` is written: as an adapter, as a merged checkpoint, as GGUF; each with a model card."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import jax
import numpy as np

from jaxft import console, lora
from jaxft.errors import JaxftError
from jaxft.files import prepare_output_dir
from jaxft.models import labels
from jaxft.quant import QUANTIZATIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from converters.checkpoint import Checkpoint
    from converters.peft_io import Adapter
    from jaxft.api.model import LanguageModel

SaveMethod = Literal["merged", "merged_16bit", "merged_4bit", "lora"]
BaseWeights = Literal["original", "loaded"]


def save_adapter(model: LanguageModel, folder: Path, *, overwrite: bool) -> Path:
    """See `LanguageModel.save_pretrained`."""
    from converters.peft_io import write_adapter

    write_adapter(_adapter(model), folder, overwrite=overwrite, card=_card(model, "lora", folder))
    console.wrote(folder, "PEFT adapter")
    return folder


def save_merged(
    model: LanguageModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    method: SaveMethod | str,
    base: BaseWeights | str,
    *,
    overwrite: bool,
) -> Path:
    """See `LanguageModel.save_pretrained_merged`."""
    from converters.bnb import write_bnb
    from converters.hf_export import write_hf
    from converters.merge import CastCheckpoint

    if method == "lora":
        return save_adapter(model, folder, overwrite=overwrite)
    if method not in get_args(SaveMethod):
        known = ", ".join(get_args(SaveMethod))
        raise JaxftError("save_method", f"{method!r} is not known", f"Choose one of {known}")
    merged = _merged(model, base, tokenizer)
    if method == "merged_16bit":
        merged = CastCheckpoint(merged)
    write = write_bnb if method == "merged_4bit" else write_hf
    write(merged, folder, overwrite=overwrite, card=_card(model, method, folder, base))
    console.wrote(folder, f"Hugging Face checkpoint, {method}, from the {base} weights")
    return folder


def save_gguf(
    model: LanguageModel,
    save_directory: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    methods: Sequence[str],
    base: BaseWeights | str,
    *,
    overwrite: bool,
) -> list[Path]:
    """See `LanguageModel.save_pretrained_gguf`; each weight is merged once, whatever the number of files."""
    from converters.gguf_export import write_ggufs
    from converters.model_card import CARD, write_card
    from converters.modelfile import write_modelfile

    check_gguf_quantizations(methods)
    folder = prepare_output_dir(save_directory, overwrite=True)
    targets = {method: folder / f"model.{method.upper()}.gguf" for method in methods}
    modelfiles = [path.with_suffix(".Modelfile") for path in targets.values()]
    for path in (*targets.values(), *modelfiles):
        if path.exists() and not overwrite:
            raise JaxftError(path, "exists already", "Choose another folder, or ask for overwriting")
    merged = _merged(model, base, tokenizer)
    write_ggufs(merged, targets, overwrite=overwrite)
    for path in targets.values():
        console.wrote(path, f"GGUF, from the {base} weights")
        write_modelfile(merged, path, overwrite=overwrite)
    if overwrite or not (folder / CARD).exists():
        write_card(folder, _card(model, "gguf", folder, base))
    return list(targets.values())


def check_gguf_quantizations(methods: Sequence[str]) -> None:
    """Raises JaxftError for a GGUF quantization that is not known, before any work starts."""
    from converters.gguf_export import check_quantization

    for method in methods:
        check_quantization(method)


def _adapter(
    model: LanguageModel, make: Callable[..., tuple[lora.LoraConfig, dict[str, np.ndarray]]] = lora.to_save
) -> Adapter:
    """The adapter as `make` gives it, of (decoder, lora_config)."""
    from converters.archs import arch_of
    from converters.expert_adapters import experts_to_hf
    from converters.peft_io import make_adapter
    from converters.peft_layout import to_hf

    if model.lora_config is None:
        raise JaxftError("save_pretrained", "the model has no adapter", "Call FastLanguageModel.get_peft_model first")
    adapter = make_adapter(*make(model.decoder, model.lora_config), base_model_name_or_path=model.name)
    spec = arch_of(model.source.config["model_type"], model.name)
    layout = spec.tensors(model.decoder.config)
    return experts_to_hf(to_hf(adapter, layout, spec.layout), layout, spec)


def _card(model: LanguageModel, kind: str, path: Path, base: BaseWeights | str = "original") -> str:
    """The text of the model card of what is written into the folder `path`."""
    from converters.model_card import Card, licence_of, sentences

    adapter = None if model.lora_config is None else dataclasses.asdict(model.lora_config)
    weights = sentences(kind, adapter, _quantizations(model), into=base)
    return Card(kind, model.name, licence_of(model.source), weights, model.training).text(path.resolve().name)


def _quantizations(model: LanguageModel) -> list[str]:
    """The forms in which the decoder holds weights."""
    leaves = jax.tree.leaves(labels.split(model.decoder)[2], is_leaf=lambda leaf: hasattr(leaf, "dequantize"))
    return [name for name, form in QUANTIZATIONS.items() if any(isinstance(leaf, form) for leaf in leaves)]


def _merged(model: LanguageModel, base: BaseWeights | str, tokenizer: PreTrainedTokenizerBase | None) -> Checkpoint:
    from converters.merge import DecoderCheckpoint, DerivedCheckpoint, MergedCheckpoint

    if base not in ("original", "loaded"):
        raise JaxftError("base", f"{base!r} is not known", "Choose original or loaded")
    # Without an adapter, weights that train are no longer those of the checkpoint; with one, it holds them.
    original = base == "original" and (model.lora_config is not None or not labels.trained_kinds(model.decoder))
    weights = model.source if original else DecoderCheckpoint(model.decoder, model.source)
    if model.lora_config is not None:
        weights = MergedCheckpoint(weights, _adapter(model, lora.from_original if original else lora.as_it_is))
    if isinstance(weights, DerivedCheckpoint) and _talk_otherwise(tokenizer, model.source.tokenizer()):
        weights.new_tokenizer = tokenizer
    return weights


def _talk_otherwise(new: PreTrainedTokenizerBase | None, own: PreTrainedTokenizerBase | None) -> bool:
    """Whether a tokenizer is to replace a checkpoint's own."""
    if new is None or own is None:
        return new is not None
    return (new.chat_template, new.eos_token) != (own.chat_template, own.eos_token)

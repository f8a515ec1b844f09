"""`FastLanguageModel`: loads models and attaches adapters; and what a checkpoint is, before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft import console, lora
from jaxft.api.model import LanguageModel
from jaxft.errors import JaxftError, refuse_unknown
from jaxft.fetch import cache_dir
from jaxft.models import labels
from jaxft.models.config import DecoderConfig
from jaxft.models.remat import parse_remat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from converters.peft_io import Adapter


class FastLanguageModel:
    """Loads models and attaches adapters; the names are those that Unsloth's users know."""

    @staticmethod
    def from_pretrained(
        model_name: str | Path,
        max_seq_length: int = 2048,
        dtype: DTypeLike | None = None,
        load_in_4bit: bool = True,
        load_experts_in_4bit: bool = False,
        full_finetuning: bool = False,
        use_gradient_checkpointing: str | bool = "full",
        *,
        load_in_8bit: bool = False,
        **unknown: Any,
    ) -> tuple[LanguageModel, PreTrainedTokenizerBase | None]:
        """Loads a model and its tokenizer.

        Args:
          model_name: a folder (Hugging Face, plain or in bitsandbytes' NF4, Orbax, or a PEFT adapter), a .gguf file, or
            a name on the hub.
          max_seq_length: default length of training rows.
          dtype: of activations and of what is not quantized; None is bfloat16 on a GPU and float32 on a CPU.
          load_in_4bit: keep the linears of the layers in NF4 with double quantization, experts left out; weights that
            are stored in NF4 or MXFP4 stay as they are. From 1 GiB on, the converted weights are kept in jaxft's cache
            folder for the next time.
          load_experts_in_4bit: keep the experts' linears in MXFP4; with a warning, since it costs accuracy.
          full_finetuning: every weight trains, in `dtype`, without an adapter; needs load_in_4bit=False.
          use_gradient_checkpointing: with full_finetuning, what `get_peft_model` calls so.
          load_in_8bit: is not there yet.

        Returns:
          (model, tokenizer); an adapter's tokenizer is its base's where its folder has none; it is None, with a
          warning, where there is none at all.

        Raises:
          JaxftError: a checkpoint that cannot be read or is not understood, a GPU that is too old, full_finetuning of a
            quantized model or of an adapter, load_in_8bit, or an unknown argument.
        """
        refuse_unknown("from_pretrained", unknown, FastLanguageModel.from_pretrained)
        if load_in_8bit:
            raise JaxftError("load_in_8bit", "is not supported", "Set load_in_4bit=True, or neither")
        from converters.converted import load_nf4
        from converters.hf_files import load_tokenizer
        from converters.load import load_decoder
        from converters.open import base_of, is_adapter, open_checkpoint
        from converters.peft_io import read_adapter

        dtype = default_dtype() if dtype is None else dtype
        adapter = read_adapter(Path(model_name)) if is_adapter(model_name) else None
        name = base_of(adapter.config, model_name) if adapter else str(model_name)
        source = open_checkpoint(name)
        decoder = (
            load_nf4(source, dtype=dtype, cache=cache_dir() / "nf4")
            if load_in_4bit and not load_experts_in_4bit
            else load_decoder(
                source,
                dtype=dtype,
                quantization="nf4" if load_in_4bit else None,
                expert_quantization="mxfp4" if load_experts_in_4bit else None,
            )
        )
        if load_experts_in_4bit and not decoder.config.moe:
            raise JaxftError("load_experts_in_4bit", f"{name} has no experts", "Leave it out")
        if decoder.config.moe and (load_in_4bit or load_experts_in_4bit):
            _warn_of_experts(load_experts_in_4bit)
        tokenizer = (load_tokenizer(Path(model_name)) if adapter else None) or source.tokenizer()
        if tokenizer is None:
            console.warn(f"{source.where} has no tokenizer files; the tokenizer is None")
        model = LanguageModel(decoder, tokenizer, source, name, max_seq_length)
        if full_finetuning:
            if adapter:
                raise JaxftError("full_finetuning", f"{model_name} is an adapter", "Merge it first, and load that")
            decoder.remat = parse_remat(use_gradient_checkpointing)
            labels.set_trainable(decoder, labels.base_kinds(decoder))
        if adapter:
            _load_adapter(model, adapter)
        return model, tokenizer

    @staticmethod
    def for_inference(model: LanguageModel) -> LanguageModel:
        """Changes nothing and says so: a model here generates and trains without being switched."""
        console.console.print("for_inference has no effect: the model can generate as it is")
        return model

    @staticmethod
    def for_training(model: LanguageModel) -> LanguageModel:
        """Changes nothing and says so; see `for_inference`."""
        console.console.print("for_training has no effect: the model can train as it is")
        return model

    @staticmethod
    def get_peft_model(
        model: LanguageModel,
        r: int = 16,
        target_modules: Sequence[str] | str = lora.ALL_LINEAR,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: lora.Bias | str = "none",
        use_gradient_checkpointing: str | bool = "offload",
        random_state: int = 3407,
        use_rslora: bool = False,
        *,
        use_dora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        exclude_modules: Sequence[str] | str | None = None,
        layers_to_transform: Sequence[int] | int | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        init_lora_weights: bool | str = True,
        ensure_weight_tying: bool = False,
        loftq_config: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> LanguageModel:
        """Attaches a fresh LoRA adapter to `model`, in place, and returns it.

        Args:
          r, lora_alpha, lora_dropout, bias, use_rslora, use_dora, modules_to_save, exclude_modules,
            layers_to_transform, rank_pattern, alpha_pattern, init_lora_weights, ensure_weight_tying: see
            `jaxft.lora.LoraConfig`.
          target_modules: see there; but embed_tokens and lm_head among the names train whole, as for Unsloth's users.
          use_gradient_checkpointing: a policy of `jaxft.models.remat`; True is "full", "unsloth" is "offload".
          random_state: seed of the initial values.
          loftq_config: must be empty or None: init_lora_weights="loftq" needs no settings.

        Raises:
          JaxftError: a target that matches nothing, a setting that is not supported, or an unknown one.
        """
        refuse_unknown("get_peft_model", unknown, FastLanguageModel.get_peft_model)
        if loftq_config:
            raise JaxftError("loftq_config", f"is {dict(loftq_config)}", 'Set init_lora_weights="loftq" alone')
        names, whole = _split_targets(target_modules)
        layers = (layers_to_transform,) if isinstance(layers_to_transform, int) else layers_to_transform
        config = lora.LoraConfig(
            r,
            lora_alpha,
            lora_dropout,
            names,
            use_rslora,
            use_dora=use_dora,
            bias=bias,
            modules_to_save=tuple(dict.fromkeys((*(modules_to_save or ()), *whole))),
            exclude_modules=exclude_modules if isinstance(exclude_modules, str) else tuple(exclude_modules or ()),
            layers_to_transform=None if layers is None else tuple(layers),
            rank_pattern=dict(rank_pattern or {}),
            alpha_pattern=dict(alpha_pattern or {}),
            init_lora_weights=init_lora_weights,
            ensure_weight_tying=ensure_weight_tying,
        )
        remat = parse_remat(use_gradient_checkpointing)
        lora.attach(model.decoder, config, key=jax.random.key(random_state), weights=model.source.read)
        model.decoder.remat = remat
        model.lora_config = lora.resolved(model.decoder, config)
        return model


def default_dtype() -> DTypeLike:
    """bfloat16 on GPUs from sm80 on, float32 on the CPU.

    Raises:
      JaxftError: a GPU older than sm80, which has no bfloat16 arithmetic.
    """
    if jax.default_backend() == "cpu":
        return jnp.float32
    device = jax.devices()[0]
    capability = float(getattr(device, "compute_capability", "0"))
    if device.platform == "gpu" and capability < 8.0:
        raise JaxftError(
            f"GPU {device.device_kind}",
            f"has compute capability {capability:g}, and jaxft needs 8.0 (Ampere) or newer",
            "Run on a newer GPU, or on the CPU with JAX_PLATFORMS=cpu",
        )
    return jnp.bfloat16


def is_bfloat16_supported() -> bool:
    """Whether `from_pretrained` takes bfloat16 when no dtype is given."""
    return default_dtype() == jnp.bfloat16


def checkpoint_config(name: str | Path) -> DecoderConfig:
    """The decoder's facts of a checkpoint (folder, file or hub name), without its weights.

    Raises:
      JaxftError: it cannot be found or read.
    """
    from converters.archs import arch_of
    from converters.open import open_checkpoint

    config = open_checkpoint(name).config
    return arch_of(config.get("model_type"), str(name)).decoder_config(config, str(name))


def supported_models() -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Column titles and rows of the supported architectures, and the same as a Markdown table."""
    from converters.archs import models_markdown, models_table

    return *models_table(), models_markdown()


def _split_targets(target_modules: Sequence[str] | str) -> tuple[tuple[str, ...] | str, tuple[str, ...]]:
    """(names to adapt, names of embeddings among them, to train whole)."""
    if isinstance(target_modules, str):
        return target_modules, ()
    whole = tuple(name for name in target_modules if name in ("embed_tokens", "lm_head"))
    if whole:
        console.warn(f"{' and '.join(whole)} train whole, as modules_to_save, not by an adapter")
    return tuple(name for name in target_modules if name not in whole), whole


def _load_adapter(model: LanguageModel, adapter: Adapter) -> None:
    from converters.archs import arch_of
    from converters.expert_adapters import experts_to_decoder
    from converters.peft_io import lora_config_of
    from converters.peft_layout import to_decoder

    spec = arch_of(model.source.config["model_type"], model.name)
    layout = spec.tensors(model.decoder.config)
    adapter = to_decoder(experts_to_decoder(adapter, layout, spec), layout, spec.layout)
    config = lora_config_of(adapter)
    lora.attach(model.decoder, config, key=jax.random.key(0))
    lora.load_adapter_tensors(model.decoder, adapter.tensors)
    model.lora_config = config


def _warn_of_experts(quantized: bool) -> None:
    is_so = "are in MXFP4" if quantized else "stay as they are stored; only the other linears are in NF4"
    how = "" if quantized else " (load_experts_in_4bit=True quantizes them all the same)"
    console.warn(
        f"the experts {is_so}. A router that was trained with exact experts sends tokens elsewhere when their outputs"
        f" change, and few tokens train each expert: LoRA over experts in bfloat16 is what works{how}"
    )

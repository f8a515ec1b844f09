"""The public face, as Unsloth's users know it: load, attach an adapter, generate, save.

`LanguageModel` only holds what belongs together; every method is one call into another module. This is the one module
of jaxft that imports `converters`, and it does so inside functions.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxft import console, lora
from jaxft.errors import JaxftError
from jaxft.fetch import cache_dir
from jaxft.files import prepare_output_dir
from jaxft.generate import Sampling, generate
from jaxft.generation.text import StopStrings, TextStream
from jaxft.models import labels
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.remat import parse_remat
from jaxft.quant import QUANTIZATIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from converters.checkpoint import Checkpoint
    from converters.peft_io import Adapter

SaveMethod = Literal["merged", "merged_16bit", "merged_4bit", "lora"]
BaseWeights = Literal["original", "loaded"]
TokenIds = Sequence[Sequence[int]] | np.ndarray | jax.Array


@dataclasses.dataclass
class LanguageModel:
    """A decoder with its tokenizer, the checkpoint it came from, and its adapter's settings.

    Attributes:
      decoder: the Flax module; research code can use it alone.
      tokenizer: None where the checkpoint has none.
      source: the open checkpoint, which merged exports read again.
      name: what the model was loaded as; adapters name it as their base.
      max_seq_length: the default length of training rows.
      lora_config: None without an adapter.
      training: what model cards say of the last run; see `jaxft.train.reporting.record`.
    """

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    source: Checkpoint
    name: str
    max_seq_length: int
    lora_config: lora.LoraConfig | None = None
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(
        self, input_ids: TokenIds, segment_ids: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """float32 logits [B, T, V] for token ids int32 [B, T].

        segment_ids None means one document a row; positions None are derived from segment_ids.
        """
        graphdef, params = nnx.split(self.decoder)
        return _logits(graphdef, params, jnp.asarray(input_ids, jnp.int32), segment_ids, positions)

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        num_return_sequences: int = 1,
        seed: int | Sequence[int] = 0,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        batch_size: int = 64,
        on_tokens: Callable[[int, list[int]], None] | None = None,
        streamer: Any = None,
        **unused: Any,
    ) -> list[list[int]]:
        """Each row's prompt followed by its new tokens, up to and including what ended it.

        Args:
          input_ids: token ids, rows of any lengths, an array or tensor [B, T], or what a tokenizer gives for them,
            which has the attention mask, too.
          attention_mask: 0 where an array's row is padding, left or right; the padding is dropped.
          max_new_tokens: at most so many.
          do_sample: draw with temperature, top_k, top_p and min_p; otherwise take the most likely token.
          temperature, top_k, top_p, min_p, repetition_penalty: see `jaxft.generate.Sampling`.
          num_return_sequences: how many rows each prompt gets.
          seed: noise depends on it and on the row and position only; or one for each row.
          eos_token_id: None takes `eos_token_ids`.
          stop_strings: texts that end a row, too.
          batch_size: rows that are generated at once.
          on_tokens: is called with a row's number and its next tokens, as they are drawn.
          streamer: an object with `put` and `end`, as transformers' TextStreamer, which gets a single row: its prompt
            and then its tokens.
          unused: use_cache and pad_token_id, which have no effect: there always is a cache, and never padding.

        Raises:
          JaxftError: a setting that is unknown or out of range, a prompt that does not fit the model, stop strings
            without a tokenizer, or a streamer with several rows.
        """
        refuse_unknown("generate", unused.keys() - {"use_cache", "pad_token_id"}, LanguageModel.generate)
        if isinstance(input_ids, Mapping):
            input_ids, attention_mask = input_ids["input_ids"], input_ids.get("attention_mask", attention_mask)
        rows = np.asarray(input_ids) if isinstance(input_ids, jax.Array) else input_ids
        prompts = [[int(token) for token in row] for row in rows]
        if attention_mask is not None:
            if [len(row) for row in attention_mask] != [len(prompt) for prompt in prompts]:
                raise JaxftError("attention_mask", "has another shape than input_ids")
            prompts = [
                [t for t, keep in zip(*pair, strict=True) if keep] for pair in zip(prompts, attention_mask, strict=True)
            ]
        if streamer is not None:
            on_tokens = _streamed(streamer, prompts, num_return_sequences)
        eos = self.eos_token_ids() if eos_token_id is None else np.atleast_1d(eos_token_id).tolist()
        drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p} if do_sample else {}
        new = generate(
            self.decoder,
            prompts,
            max_new_tokens=max_new_tokens,
            num_return_sequences=num_return_sequences,
            eos_token_ids=eos,
            stop=StopStrings(stop_strings, self.text_of) if stop_strings else None,
            sampling=Sampling(**drawing, repetition_penalty=repetition_penalty),
            seed=seed,
            batch_size=batch_size,
            on_tokens=on_tokens,
        )
        if streamer is not None:
            streamer.end()
        return [prompts[row // num_return_sequences] + tokens for row, tokens in enumerate(new)]

    @property
    def device(self) -> str:
        """Where `generate` takes token ids from: "cpu", the host's memory, for `inputs.to(model.device)`."""
        return "cpu"

    def answer(
        self,
        prompts: Sequence[str],
        *,
        chat: bool = True,
        on_text: Callable[[int, str], None] | None = None,
        **settings: Any,
    ) -> list[str]:
        """The model's text for each prompt.

        Args:
          prompts: texts.
          chat: put each into the tokenizer's chat template as the user's turn; False continues the text itself.
          on_text: is called with a prompt's number and its next piece of text, as it is made.
          settings: see `generate`, but for num_return_sequences and on_tokens.

        Raises:
          JaxftError: no tokenizer, or no chat template where `chat` asks for one.
        """
        tokenizer = self._tokenizer()
        if chat and not tokenizer.chat_template:
            raise JaxftError(self.name, "its tokenizer has no chat template", "Pass chat=False to continue plain text")
        if chat:
            rows: list[Any] = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
                )
                for prompt in prompts
            ]
        else:
            rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        on_tokens = TextStream(self.text_of, on_text) if on_text else None
        outputs = self.generate(rows, on_tokens=on_tokens, **settings)
        new = [output[len(row) :] for row, output in zip(rows, outputs, strict=True)]
        return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    def text_of(self, tokens: list[int]) -> str:
        """The text of token ids, without special tokens.

        Raises:
          JaxftError: no tokenizer.
        """
        return str(self._tokenizer().decode(tokens, skip_special_tokens=True))

    def eos_token_ids(self) -> list[int]:
        """What ends a generated row: the eos_token_id (one or several) of generation config, config and tokenizer."""
        generation_config = json.loads(self.source.sidecars().get("generation_config.json", b"{}"))
        stated = [fields.get("eos_token_id") for fields in (generation_config, self.source.config)]
        if self.tokenizer is not None:
            stated.append(self.tokenizer.eos_token_id)
        return sorted({int(token) for ids in stated if ids is not None for token in np.atleast_1d(ids)})

    def trainable_parameters(self) -> int:
        """How many values train."""
        return sum(leaf.size for leaf in jax.tree.leaves(labels.split(self.decoder)[1]))

    def save_pretrained(self, save_directory: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the adapter as PEFT does: adapter_config.json, adapter_model.safetensors and a model card.

        It fits the base as `from_pretrained` loads it. One that started as PiSSA or OLoRA comes as plain LoRA of twice
        the rank (`jaxft.lora.from_original`).
        """
        from converters.peft_io import write_adapter

        path = Path(save_directory)
        write_adapter(self._adapter(), path, overwrite=overwrite, card=self._card("lora", path))
        console.wrote(path, "PEFT adapter")
        return path

    def save_pretrained_merged(
        self,
        save_directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        save_method: SaveMethod | str = "merged_16bit",
        *,
        base: BaseWeights | str = "original",
        overwrite: bool = False,
    ) -> Path:
        """Writes a Hugging Face checkpoint with the adapter merged in: W + scale * B A, one shard at a time.

        A model card (README.md) says what it is; one that somebody wrote there stays.

        Args:
          save_directory: must be empty or not exist, unless `overwrite`.
          tokenizer: written where its chat template or end-of-sequence token is another than the checkpoint's, whose
            own files are carried over otherwise.
          save_method: "merged" keeps every tensor's stored dtype; "merged_16bit" makes wider ones bfloat16;
            "merged_4bit" keeps the linears of the layers in NF4, as bitsandbytes stores it; "lora" writes the adapter
            alone, as `save_pretrained`.
          base: W is the "original" checkpoint's, or the weight as "loaded", that is, through its quantization.
        """
        from converters.bnb import write_bnb
        from converters.hf_export import write_hf
        from converters.merge import CastCheckpoint

        if save_method == "lora":
            return self.save_pretrained(save_directory, overwrite=overwrite)
        if save_method not in get_args(SaveMethod):
            known = ", ".join(get_args(SaveMethod))
            raise JaxftError("save_method", f"{save_method!r} is not known", f"Choose one of {known}")
        merged = self._merged(base, tokenizer)
        if save_method == "merged_16bit":
            merged = CastCheckpoint(merged)
        write = write_bnb if save_method == "merged_4bit" else write_hf
        path = Path(save_directory)
        write(merged, path, overwrite=overwrite, card=self._card(save_method, path, base))
        console.wrote(path, f"Hugging Face checkpoint, {save_method}, from the {base} weights")
        return path

    def save_pretrained_gguf(
        self,
        save_directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        quantization_method: str | Sequence[str] = "q8_0",
        *,
        base: BaseWeights | str = "original",
        overwrite: bool = False,
    ) -> list[Path]:
        """Writes the merged model as GGUF, one file for each quantization (a name in `converters.gguf_mixes.MIXES`).

        Beside each file comes a Modelfile for Ollama, and a model card unless the folder has one. The folder may hold
        other files, as a merged checkpoint's. See `save_pretrained_merged` for the other arguments.
        """
        from converters.gguf_export import write_gguf
        from converters.model_card import CARD, write_card
        from converters.modelfile import write_modelfile

        methods = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
        check_gguf_quantizations(methods)
        folder = prepare_output_dir(save_directory, overwrite=True)
        paths = [folder / f"model.{method.upper()}.gguf" for method in methods]
        for path in (*paths, *(path.with_suffix(".Modelfile") for path in paths)):
            if path.exists() and not overwrite:
                raise JaxftError(path, "exists already", "Choose another folder, or ask for overwriting")
        for path, method in zip(paths, methods, strict=True):
            merged = self._merged(base, tokenizer)
            write_gguf(merged, path, method, overwrite=overwrite)
            console.wrote(path, f"GGUF, from the {base} weights")
            write_modelfile(merged, path, overwrite=overwrite)
        if overwrite or not (folder / CARD).exists():
            write_card(folder, self._card("gguf", folder, base))
        return paths

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise JaxftError(self.name, "has no tokenizer", "Load a checkpoint that has tokenizer files")
        return self.tokenizer

    def _adapter(self, make: Callable[..., tuple[lora.LoraConfig, dict[str, np.ndarray]]] = lora.to_save) -> Adapter:
        """The adapter as `make` gives it, of (decoder, lora_config)."""
        from converters.archs import arch_of
        from converters.expert_adapters import experts_to_hf
        from converters.peft_io import make_adapter
        from converters.peft_layout import to_hf

        if self.lora_config is None:
            raise JaxftError(
                "save_pretrained", "the model has no adapter", "Call FastLanguageModel.get_peft_model first"
            )
        adapter = make_adapter(*make(self.decoder, self.lora_config), base_model_name_or_path=self.name)
        spec = arch_of(self.source.config["model_type"], self.name)
        layout = spec.tensors(self.decoder.config)
        return experts_to_hf(to_hf(adapter, layout, spec.layout), layout, spec)

    def _card(self, kind: str, path: Path, base: BaseWeights | str = "original") -> str:
        """The text of the model card of what is written into the folder `path`."""
        from converters.model_card import Card, licence_of, sentences

        adapter = None if self.lora_config is None else dataclasses.asdict(self.lora_config)
        weights = sentences(kind, adapter, self._quantizations(), into=base)
        return Card(kind, self.name, licence_of(self.source), weights, self.training).text(path.resolve().name)

    def _quantizations(self) -> list[str]:
        """The forms in which the decoder holds weights."""
        leaves = jax.tree.leaves(labels.split(self.decoder)[2], is_leaf=lambda leaf: hasattr(leaf, "dequantize"))
        return [name for name, form in QUANTIZATIONS.items() if any(isinstance(leaf, form) for leaf in leaves)]

    def _merged(self, base: BaseWeights | str, tokenizer: PreTrainedTokenizerBase | None) -> Checkpoint:
        from converters.merge import DecoderCheckpoint, DerivedCheckpoint, MergedCheckpoint

        if base not in ("original", "loaded"):
            raise JaxftError("base", f"{base!r} is not known", "Choose original or loaded")
        # Without an adapter, weights that train are no longer those of the checkpoint; with one, it holds them.
        original = base == "original" and (self.lora_config is not None or not labels.trained_kinds(self.decoder))
        weights = self.source if original else DecoderCheckpoint(self.decoder, self.source)
        if self.lora_config is not None:
            weights = MergedCheckpoint(weights, self._adapter(lora.from_original if original else lora.as_it_is))
        if isinstance(weights, DerivedCheckpoint) and _talk_otherwise(tokenizer, self.source.tokenizer()):
            weights.new_tokenizer = tokenizer
        return weights


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


def refuse_unknown(where: str, unknown: Iterable[str], function: Callable[..., Any]) -> None:
    """Raises JaxftError for arguments that a function does not have, with the nearest that it has."""
    known = [name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD]
    for name in unknown:
        nearest = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {nearest[0]}?" if nearest else f"There are: {', '.join(known)}"
        raise JaxftError(where, f"has no argument {name!r}", hint)


def _split_targets(target_modules: Sequence[str] | str) -> tuple[tuple[str, ...] | str, tuple[str, ...]]:
    """(names to adapt, names of embeddings among them, to train whole)."""
    if isinstance(target_modules, str):
        return target_modules, ()
    whole = tuple(name for name in target_modules if name in ("embed_tokens", "lm_head"))
    if whole:
        console.warn(f"{' and '.join(whole)} train whole, as modules_to_save, not by an adapter")
    return tuple(name for name in target_modules if name not in whole), whole


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


def checkpoint_config(name: str | Path) -> DecoderConfig:
    """The decoder's facts of a checkpoint (folder, file or hub name), without its weights.

    Raises:
      JaxftError: it cannot be found or read.
    """
    from converters.archs import arch_of
    from converters.open import open_checkpoint

    config = open_checkpoint(name).config
    return arch_of(config.get("model_type"), str(name)).decoder_config(config, str(name))


def check_gguf_quantizations(methods: Sequence[str]) -> None:
    """Raises JaxftError for a GGUF quantization that is not known, before any work starts."""
    from converters.gguf_export import check_quantization

    for method in methods:
        check_quantization(method)


def _warn_of_experts(quantized: bool) -> None:
    is_so = "are in MXFP4" if quantized else "stay as they are stored; only the other linears are in NF4"
    how = "" if quantized else " (load_experts_in_4bit=True quantizes them all the same)"
    console.warn(
        f"the experts {is_so}. A router that was trained with exact experts sends tokens elsewhere when their outputs"
        f" change, and few tokens train each expert: LoRA over experts in bfloat16 is what works{how}"
    )


def supported_models() -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Column titles and rows of the supported architectures, and the same as a Markdown table."""
    from converters.archs import models_markdown, models_table

    return *models_table(), models_markdown()


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


def is_bfloat16_supported() -> bool:
    """Whether `from_pretrained` takes bfloat16 when no dtype is given."""
    return default_dtype() == jnp.bfloat16


def _talk_otherwise(new: PreTrainedTokenizerBase | None, own: PreTrainedTokenizerBase | None) -> bool:
    """Whether a tokenizer is to replace a checkpoint's own."""
    if new is None or own is None:
        return new is not None
    return (new.chat_template, new.eos_token) != (own.chat_template, own.eos_token)


def _streamed(streamer: Any, prompts: list[list[int]], num_return_sequences: int) -> Callable[[int, list[int]], None]:
    """Gives the streamer the only prompt; what it returns gives it the tokens."""
    if len(prompts) * num_return_sequences != 1:
        raise JaxftError("streamer", "shows one row while it is made", "Give one prompt")
    streamer.put(np.array(prompts[0]))
    return lambda _, tokens: streamer.put(np.array(tokens))


@partial(jax.jit, static_argnames="graphdef")
def _logits(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: jax.Array,
    segment_ids: jax.Array | None,
    positions: jax.Array | None,
) -> jax.Array:
    decoder = nnx.merge(graphdef, params)
    return decoder.logits(decoder(tokens, segment_ids=segment_ids, positions=positions))

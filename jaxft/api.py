"""The public face, as Unsloth's users know it: load, attach an adapter, generate, save.

`LanguageModel` only holds what belongs together; every method is one call into another module. This is the one module
of jaxft that imports `converters`, and it does so inside functions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.labels import split
from jaxft.models.remat import parse_remat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from converters.checkpoint import Checkpoint
    from converters.peft_io import Adapter

SaveMethod = Literal["merged", "merged_16bit"]
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
    """

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    source: Checkpoint
    name: str
    max_seq_length: int
    lora_config: lora.LoraConfig | None = None

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
        input_ids: TokenIds,
        attention_mask: np.ndarray | None = None,
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
    ) -> list[list[int]]:
        """Each row's prompt followed by its new tokens, up to and including what ended it.

        Args:
          input_ids: token ids, rows of any lengths, or an array [B, T].
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

        Raises:
          JaxftError: a setting out of range, a prompt that does not fit the model, or stop strings without a tokenizer.
        """
        rows = [[int(token) for token in row] for row in np.asarray(input_ids)] if _is_array(input_ids) else input_ids
        prompts = [list(map(int, row)) for row in rows]
        if attention_mask is not None:
            if [len(row) for row in attention_mask] != [len(prompt) for prompt in prompts]:
                raise JaxftError("attention_mask", "has another shape than input_ids")
            prompts = [
                [t for t, keep in zip(*pair, strict=True) if keep] for pair in zip(prompts, attention_mask, strict=True)
            ]
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
        return [prompts[row // num_return_sequences] + tokens for row, tokens in enumerate(new)]

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
        return sum(leaf.size for leaf in jax.tree.leaves(split(self.decoder)[1]))

    def save_pretrained(self, save_directory: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the adapter as PEFT does: adapter_config.json and adapter_model.safetensors."""
        from converters.peft_io import write_adapter

        path = write_adapter(self._adapter(), Path(save_directory), overwrite=overwrite)
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

        Args:
          save_directory: must be empty or not exist, unless `overwrite`.
          tokenizer: accepted for the sake of the usual call; the checkpoint's own files are carried over.
          save_method: "merged" keeps every tensor's stored dtype; "merged_16bit" makes wider ones bfloat16.
          base: W is the "original" checkpoint's, or the weight as "loaded", that is, through its quantization.
        """
        from converters.hf_export import write_hf
        from converters.merge import CastCheckpoint

        if save_method not in ("merged", "merged_16bit"):
            raise JaxftError("save_method", f"{save_method!r} is not known", "Choose merged or merged_16bit")
        merged = self._merged(base)
        if save_method == "merged_16bit":
            merged = CastCheckpoint(merged)
        path = write_hf(merged, Path(save_directory), overwrite=overwrite)
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

        See `save_pretrained_merged` for the other arguments.
        """
        from converters.gguf_export import write_gguf

        methods = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
        check_gguf_quantizations(methods)
        folder = prepare_output_dir(save_directory, overwrite=overwrite)
        paths = [folder / f"model.{method.upper()}.gguf" for method in methods]
        for path, method in zip(paths, methods, strict=True):
            write_gguf(self._merged(base), path, method, overwrite=overwrite)
            console.wrote(path, f"GGUF, from the {base} weights")
        return paths

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise JaxftError(self.name, "has no tokenizer", "Load a checkpoint that has tokenizer files")
        return self.tokenizer

    def _adapter(self) -> Adapter:
        from converters.peft_io import make_adapter

        if self.lora_config is None:
            raise JaxftError(
                "save_pretrained", "the model has no adapter", "Call FastLanguageModel.get_peft_model first"
            )
        return make_adapter(self.lora_config, lora.adapter_tensors(self.decoder), base_model_name_or_path=self.name)

    def _merged(self, base: BaseWeights | str) -> Checkpoint:
        from converters.merge import DecoderCheckpoint, MergedCheckpoint

        if base not in ("original", "loaded"):
            raise JaxftError("base", f"{base!r} is not known", "Choose original or loaded")
        weights = self.source if base == "original" else DecoderCheckpoint(self.decoder, self.source)
        return MergedCheckpoint(weights, self._adapter()) if self.lora_config else weights


class FastLanguageModel:
    """Loads models and attaches adapters; the names are those that Unsloth's users know."""

    @staticmethod
    def from_pretrained(
        model_name: str | Path,
        max_seq_length: int = 2048,
        dtype: DTypeLike | None = None,
        load_in_4bit: bool = True,
    ) -> tuple[LanguageModel, PreTrainedTokenizerBase | None]:
        """Loads a model and its tokenizer.

        Args:
          model_name: a folder (Hugging Face, plain or in bitsandbytes' NF4, Orbax, or a PEFT adapter), a .gguf file, or
            a name on the hub.
          max_seq_length: default length of training rows.
          dtype: of activations and of what is not quantized; None is bfloat16 on a GPU and float32 on a CPU.
          load_in_4bit: keep the linears of the layers in NF4 with double quantization; weights that are stored in NF4
            stay as they are. From 1 GiB on, the converted weights are kept in jaxft's cache folder for the next time.

        Returns:
          (model, tokenizer); the tokenizer is None, with a warning, where the checkpoint has none.

        Raises:
          JaxftError: a checkpoint that cannot be read or is not understood, or a GPU that is too old.
        """
        from converters.converted import load_nf4
        from converters.load import load_decoder
        from converters.open import base_of, is_adapter, open_checkpoint
        from converters.peft_io import read_adapter

        dtype = default_dtype() if dtype is None else dtype
        adapter = read_adapter(Path(model_name)) if is_adapter(model_name) else None
        name = base_of(adapter.config, model_name) if adapter else str(model_name)
        source = open_checkpoint(name)
        decoder = (
            load_nf4(source, dtype=dtype, cache=cache_dir() / "nf4")
            if load_in_4bit
            else load_decoder(source, dtype=dtype)
        )
        tokenizer = source.tokenizer()
        if tokenizer is None:
            console.warn(f"{source.where} has no tokenizer files; the tokenizer is None")
        model = LanguageModel(decoder, tokenizer, source, name, max_seq_length)
        if adapter:
            _load_adapter(model, adapter)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: LanguageModel,
        r: int = 16,
        target_modules: Sequence[str] = lora.ALL_LINEAR,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: str | bool = "offload",
        random_state: int = 3407,
        use_rslora: bool = False,
    ) -> LanguageModel:
        """Attaches a fresh LoRA adapter to `model`, in place, and returns it.

        Args:
          r, lora_alpha, lora_dropout, target_modules, use_rslora: see `jaxft.lora.LoraConfig`.
          bias: only "none".
          use_gradient_checkpointing: a policy of `jaxft.models.remat`; True is "full", "unsloth" is "offload".
          random_state: seed of the initial values.

        Raises:
          JaxftError: a target that matches nothing, or a setting that is not supported.
        """
        if bias != "none":
            raise JaxftError("bias", f"{bias!r} is not supported", 'Only "none" is')
        config = lora.LoraConfig(r, lora_alpha, lora_dropout, tuple(target_modules), use_rslora)
        remat = parse_remat(use_gradient_checkpointing)
        lora.attach(model.decoder, config, key=jax.random.key(random_state))
        model.decoder.remat = remat
        model.lora_config = config
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


def _load_adapter(model: LanguageModel, adapter: Adapter) -> None:
    from converters.peft_io import lora_config_of

    config = lora_config_of(adapter)
    lora.attach(model.decoder, config, key=jax.random.key(0))
    lora.load_adapter_tensors(model.decoder, adapter.tensors)
    model.lora_config = config


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, jax.Array))


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

"""`LanguageModel`: what belongs together of a model, and what people ask of it.

It only holds; every method is one call into another module.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft import lora
from jaxft.api import saving
from jaxft.api.saving import BaseWeights, SaveMethod
from jaxft.errors import JaxftError, refuse_unknown
from jaxft.generate import generate
from jaxft.generation.sampling import GenerationConfig
from jaxft.generation.text import StopStrings, TextStream
from jaxft.models import labels
from jaxft.models.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from converters.checkpoint import Checkpoint

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
        num_return_sequences: int = 1,
        eos_token_id: int | Sequence[int] | None = None,
        batch_size: int = 64,
        on_tokens: Callable[[int, list[int]], None] | None = None,
        streamer: Any = None,
        **settings: Any,
    ) -> list[list[int]]:
        """Each row's prompt followed by its new tokens, up to and including what ended it.

        Args:
          input_ids: token ids, rows of any lengths, an array or tensor [B, T], or what a tokenizer gives for them,
            which has the attention mask, too.
          attention_mask: 0 where an array's row is padding, left or right; the padding is dropped.
          num_return_sequences: how many rows each prompt gets.
          eos_token_id: None takes `eos_token_ids`.
          batch_size: rows that are generated at once.
          on_tokens: is called with a row's number and its next tokens, as they are drawn.
          streamer: an object with `put` and `end`, as transformers' TextStreamer, which gets a single row: its prompt
            and then its tokens.
          settings: those of `GenerationConfig`: max_new_tokens, do_sample, temperature, ...; use_cache and pad_token_id
            have no effect, as there always is a cache and never padding.

        Raises:
          JaxftError: a setting that is unknown or out of range, a prompt that does not fit the model, stop strings
            without a tokenizer, or a streamer with several rows.
        """
        known = {field.name for field in dataclasses.fields(GenerationConfig)}
        unknown = settings.keys() - known - {"use_cache", "pad_token_id"}
        refuse_unknown("generate", unknown, LanguageModel.generate, GenerationConfig)
        config = GenerationConfig(**{name: value for name, value in settings.items() if name in known})
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
        new = generate(
            self.decoder,
            prompts,
            max_new_tokens=config.max_new_tokens,
            num_return_sequences=num_return_sequences,
            eos_token_ids=eos,
            stop=StopStrings(config.stop_strings, self.text_of) if config.stop_strings else None,
            sampling=config.sampling(),
            seed=config.seed,
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
        return saving.save_adapter(self, Path(save_directory), overwrite=overwrite)

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
        return saving.save_merged(self, Path(save_directory), tokenizer, save_method, base, overwrite=overwrite)

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
        methods = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
        return saving.save_gguf(self, Path(save_directory), tokenizer, methods, base, overwrite=overwrite)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise JaxftError(self.name, "has no tokenizer", "Load a checkpoint that has tokenizer files")
        return self.tokenizer


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

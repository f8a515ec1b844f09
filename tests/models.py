"""Decoders for tests, built from the same random tensors as the torch vectors, and batches for them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters.archs import arch_of
from jaxft import lora
from jaxft.data.batch import Batch, Example, lay_out
from jaxft.models import labels
from jaxft.models.attention import KVCache
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.params import build_decoder, hf_names, stack_shape, unstack
from llama_cases import ALPHA, RANK, adapter
from tiny import hf_config, random_tensors


def decoder_of(hf: dict[str, Any] | None = None, quantization: str | None = None, **settings: Any) -> Decoder:
    """A float32 decoder with `random_tensors(hf)`; `settings` are its attributes (remat)."""
    hf = hf_config() if hf is None else hf
    config, tensors = decoder_config(hf), random_tensors(hf)
    sources = arch_of(hf["model_type"], "test").tensors(config).decoder
    decoder = build_decoder(
        config,
        lambda name: sources[name].read(tensors.__getitem__),
        dtype=jnp.float32,
        quantization=quantization,
    )
    for name, value in settings.items():
        setattr(decoder, name, value)
    return decoder


def decoder_config(hf: dict[str, Any]) -> DecoderConfig:
    """The DecoderConfig of an HF config dict."""
    return arch_of(hf["model_type"], "test").decoder_config(hf, "test")


def with_adapter(
    decoder: Decoder, hf: dict[str, Any] | None = None, rank: int = RANK, alpha: float = ALPHA, **settings: Any
) -> Decoder:
    """`decoder` with the cases' non-zero adapter attached."""
    lora.attach(decoder, lora.LoraConfig(r=rank, lora_alpha=alpha, **settings), key=jax.random.key(0))
    lora.load_adapter_tensors(decoder, adapter(hf_config() if hf is None else hf, rank))
    return decoder


def hidden_states(decoder: Decoder, tokens: Any, **kwargs: Any) -> jax.Array:
    """``decoder(tokens, **kwargs)``, jitted: run eagerly, a scan compiles at every call."""
    graphdef, params = nnx.split(decoder)
    return _hidden_states(graphdef, params, jnp.asarray(tokens, jnp.int32), kwargs)


@partial(jax.jit, static_argnums=0)
def _hidden_states(graphdef: Any, params: Any, tokens: jax.Array, kwargs: dict[str, Any]) -> jax.Array:
    return nnx.merge(graphdef, params)(tokens, **kwargs)


def random_examples(lengths: list[int], vocab_size: int = 300, seed: int = 3) -> list[Example]:
    """Documents of random tokens; about half of the tokens are targets."""
    rng = np.random.default_rng(seed)
    examples = []
    for i, n in enumerate(lengths):
        mask = rng.random(n) < 0.5
        mask[0], mask[-1] = False, True
        examples.append(Example(f"row {i}", rng.integers(0, vocab_size, n).astype(np.int32), mask))
    return examples


def batch_of(examples: list[Example], rows: list[list[int]], length: int, accumulation: int = 1) -> Batch:
    """[A, B, T] with these documents in these rows."""
    batch = lay_out(examples, rows, length)
    return Batch(*(array.reshape(accumulation, -1, length) for array in batch))


def plain_examples(tokens: np.ndarray) -> list[Example]:
    """Each row a document of which every next token is a target."""
    return [Example(f"row {i}", row.astype(np.int32), np.ones(len(row), bool)) for i, row in enumerate(tokens)]


def plain_batch(tokens: np.ndarray) -> Batch:
    """[1, B, T]: each row one document, every next token a target."""
    return batch_of(plain_examples(tokens), [[i] for i in range(len(tokens))], tokens.shape[1])


def train_everything(decoder: Decoder) -> Decoder:
    """`decoder` with all its parameters trainable."""
    kinds = {labels.kind_of(path, variable) for path, variable in nnx.to_flat_state(nnx.state(decoder))}
    labels.set_trainable(decoder, kinds)
    return decoder


def hf_gradients(gradients: nnx.State, hf: dict[str, Any]) -> dict[str, np.ndarray]:
    """Gradients of a decoder's parameters under the names and in the layout of the HF checkpoint."""
    config = decoder_config(hf)
    found: dict[str, np.ndarray] = {}
    for path, variable in nnx.to_flat_state(gradients):
        values = unstack(np.asarray(variable.get_value()), len(stack_shape(path, config)))
        found |= dict(zip(hf_names(path, config), values, strict=True))
    layout = arch_of(hf["model_type"], "test").tensors(config)
    return {name: source.read(found.__getitem__) for name, source in layout.hf.items()}


def through_cache(decoder: Decoder, tokens: jax.Array, prefill: int) -> jax.Array:
    """Hidden states of a prefill of `prefill` tokens followed by steps of one."""
    batch, length = tokens.shape
    graphdef, params = nnx.split(decoder)

    extend = jax.jit(lambda params, *args: nnx.merge(graphdef, params).extend(*args))
    cache = KVCache.zeros(decoder.config, batch, length, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    lengths = jnp.full(batch, length, jnp.int32)
    parts = []
    for start, stop in [(0, prefill), *((i, i + 1) for i in range(prefill, length))]:
        hidden, cache = extend(params, tokens[:, start:stop], positions[:, start:stop], cache, lengths)
        parts.append(hidden)
    return jnp.concatenate(parts, axis=1)


def relative_l2(ours: Any, reference: Any) -> float:
    """||ours - reference|| / ||reference||, in float64."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))

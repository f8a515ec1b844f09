"""A checkpoint's forward pass with the weights of one layer in memory at a time.

For looking at checkpoints (`verify`, importance matrices), also at those that are larger than memory; training and
generation load whole decoders (`converters.load`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters.checkpoint import Checkpoint
from converters.load import EMBEDDING, check
from jaxft.console import track
from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.params import build_decoder, expected_tensors

# run(layer's number, decoder of that one layer, hidden [B, T, D], positions [B, T]) -> hidden [B, T, D]
RunLayer = Callable[[int, Decoder, jax.Array, jax.Array], jax.Array]

_FIRST_LAYER = "model.layers.0."
# Logits that are in memory at a time, in values.
_LOGITS = 1 << 24


class StreamedDecoder:
    """The decoder of a checkpoint, computed in float32.

    Raises:
      JaxftError: see `converters.load.check`.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = check(checkpoint)
        self._checkpoint = checkpoint

    def hidden(self, tokens: np.ndarray, run_layer: RunLayer | None = None, *, batch_size: int = 8) -> np.ndarray:
        """Hidden states after the last layer, before the final norm: float32 [B, T, D].

        Args:
          tokens: int32 [B, T], one document a row.
          run_layer: takes the place of the plain computation of a layer.
          batch_size: rows that are computed at a time.

        Raises:
          JaxftError: a token that is not in the vocabulary.
        """
        run_layer = run_layer or _run_layer
        hidden = self._embed(tokens)
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        batches = [slice(start, start + batch_size) for start in range(0, len(tokens), batch_size)]
        for layer in track(range(self.config.num_hidden_layers), "running layers"):
            decoder = self._layer(layer)
            for rows in batches:
                hidden[rows] = run_layer(layer, decoder, jnp.asarray(hidden[rows]), jnp.asarray(positions[rows]))
        return hidden

    def logits(self, hidden: np.ndarray) -> Iterator[np.ndarray]:
        """float32 logits [t, V] of consecutive tokens of hidden states [..., D], a few tokens at a time."""
        decoder = self._build(_only(self.config, 0), {})
        rows = hidden.reshape(-1, hidden.shape[-1])
        step = max(1, _LOGITS // self.config.vocab_size)
        for start in range(0, len(rows), step):
            graphdef, params = nnx.split(decoder)
            yield np.asarray(_logits(graphdef, params, jnp.asarray(rows[None, start : start + step])))[0]

    def _embed(self, tokens: np.ndarray) -> np.ndarray:
        """What the first layer reads; of the embedding only the rows that are used are kept."""
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise JaxftError(
                self._checkpoint.where, f"has no token {tokens.max()}: its vocab_size is {self.config.vocab_size}"
            )
        used, index = np.unique(tokens, return_inverse=True)
        rows = self._checkpoint.read(EMBEDDING)[used]
        config = dataclasses.replace(_only(self.config, 0), vocab_size=len(used))
        decoder = self._build(config, {EMBEDDING: lambda: rows})
        return np.array(decoder.embed(jnp.asarray(index.reshape(tokens.shape), jnp.int32)))

    def _layer(self, layer: int) -> Decoder:
        config = dataclasses.replace(_only(self.config, layer), vocab_size=1)
        names = [name for name in expected_tensors(config) if name.startswith(_FIRST_LAYER)]
        prefix = _FIRST_LAYER.replace("0", str(layer))
        sources = {name: partial(self._checkpoint.read, prefix + name.removeprefix(_FIRST_LAYER)) for name in names}
        return self._build(config, sources)

    def _build(self, config: DecoderConfig, sources: dict[str, Callable[[], np.ndarray]]) -> Decoder:
        """A decoder of `config` with some tensors of the checkpoint; without sources, those outside of the layers."""
        shapes = expected_tensors(config)
        if not sources:
            sources = {n: partial(self._checkpoint.read, n) for n in shapes if not n.startswith(_FIRST_LAYER)}

        def read(name: str) -> np.ndarray:
            return sources[name]() if name in sources else np.zeros(shapes[name], np.float32)

        return build_decoder(config, read, dtype=jnp.float32)


def _only(config: DecoderConfig, layer: int) -> DecoderConfig:
    """The config of one layer by itself: tuples with one entry a layer keep that layer's."""
    n_layers = config.num_hidden_layers
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    by_layer = {name: (v[layer],) for name, v in values.items() if isinstance(v, tuple) and len(v) == n_layers}
    return dataclasses.replace(config, num_hidden_layers=1, **by_layer)


def _run_layer(_: int, decoder: Decoder, hidden: jax.Array, positions: jax.Array) -> jax.Array:
    graphdef, params = nnx.split(decoder)
    return _layer(graphdef, params, hidden, positions)


@partial(jax.jit, static_argnames="graphdef")
def _layer(graphdef: nnx.GraphDef, params: nnx.State, hidden: jax.Array, positions: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params).run_layers(hidden, positions)[0]


@partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef: nnx.GraphDef, params: nnx.State, hidden: jax.Array) -> jax.Array:
    decoder = nnx.merge(graphdef, params)
    return decoder.logits(decoder.model.norm(hidden))

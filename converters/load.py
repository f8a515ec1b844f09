"""From any open checkpoint to a Decoder, refusing whatever is not understood."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from converters.archs import arch_of
from converters.checkpoint import Checkpoint, QuantizedCheckpoint, check_tensors
from jaxft.console import progress
from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.params import build_decoder, expected_tensors, quantizable_tensors
from jaxft.quant import QTensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that older checkpoints carry and that are computed from the config.
_BUFFERS = ("rotary_emb.inv_freq",)
_FLOATS = {np.dtype(dtype) for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}


def load_decoder(checkpoint: Checkpoint, *, dtype: DTypeLike, quantization: str | None = None) -> Decoder:
    """A Decoder with the checkpoint's weights, one tensor at a time.

    Args:
      dtype: of every parameter that is not quantized.
      quantization: a name in `jaxft.quant.QUANTIZATIONS` for the linears of the layers, or None.

    Raises:
      JaxftError: see `check`.
    """
    config = check(checkpoint)
    kept = checkpoint if quantization is not None and isinstance(checkpoint, QuantizedCheckpoint) else None
    if kept is not None:
        _check_all_quantized(kept, config)
    with progress("loading weights", len(expected_tensors(config))) as advance:

        def read(name: str) -> np.ndarray | QTensor:
            advance(note=name)
            stored = None if kept is None else kept.quantized(name)
            return checkpoint.read(name) if stored is None else jax.tree.map(jnp.asarray, stored)

        return build_decoder(config, read, dtype=dtype, quantization=quantization)


def _check_all_quantized(checkpoint: QuantizedCheckpoint, config: DecoderConfig) -> None:
    """Layers are stacked, so a checkpoint that leaves some linears unquantized cannot be kept as it is."""
    names = quantizable_tensors(config)
    plain = [name for name in names if checkpoint.quantized(name) is None]
    if plain:
        raise JaxftError(
            checkpoint.where,
            f"leaves {len(plain)} of {len(names)} linears unquantized, the first of them {', '.join(plain[:4])}",
            "Load it with load_in_4bit=False",
        )


def check(checkpoint: Checkpoint) -> DecoderConfig:
    """The checkpoint's DecoderConfig, after everything in it was understood.

    Raises:
      JaxftError: an unknown model_type; an unknown config field; tensors that are missing, not expected, of another
        shape, or not floating point, all of them listed; a tied head that is not the embedding.
    """
    spec = arch_of(checkpoint.config.get("model_type"), checkpoint.where)
    config = spec.decoder_config(checkpoint.config, checkpoint.where)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items() if not name.endswith(_BUFFERS)}
    if config.tie_word_embeddings and HEAD in shapes:
        _check_tied_head(checkpoint)
        del shapes[HEAD]
    check_tensors(shapes, expected_tensors(config), checkpoint.where)
    _check_dtypes({name: checkpoint.tensors[name].dtype for name in shapes}, checkpoint.where)
    return config


def _check_dtypes(dtypes: dict[str, np.dtype], where: object) -> None:
    problems = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in _FLOATS]
    if problems:
        raise JaxftError(where, f"its tensors must be floating-point numbers of 16 bits or more: {'; '.join(problems)}")


def _check_tied_head(checkpoint: Checkpoint) -> None:
    """Some checkpoints store a tied head all the same: it must be the embedding, bit by bit."""
    same = checkpoint.tensors.get(EMBEDDING) == checkpoint.tensors[HEAD]
    if not same or not np.array_equal(_bytes(checkpoint, EMBEDDING), _bytes(checkpoint, HEAD)):
        raise JaxftError(
            f"{checkpoint.where}, tensor {HEAD}",
            f"differs from {EMBEDDING}, though the config says tie_word_embeddings",
        )


def _bytes(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.read(name).view(np.uint8)

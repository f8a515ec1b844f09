"""PEFT adapters of models whose HF checkpoint keeps several of the decoder's linears as one (`converters.layout.Fuse`).

HF's y = W x with W = [W_1; ...; W_P] has one adapter: A [r, in], and B [out, r] in P bands of rows. The decoder has an
adapter for each part. In: A goes to every part, with its band of B. Out: A is [A_1; ...; A_P], of rank P r, and B is
block diagonal; `rank_pattern` and `alpha_pattern` say so, with the same scale. Both compute the same, and what went out
comes in again as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from converters.layout import Fuse, Layout, LayoutOp
from converters.peft_io import Adapter, rank_of, scale_of
from jaxft.errors import JaxftError

_A, _B = "lora_A.weight", "lora_B.weight"


def to_decoder(adapter: Adapter, layout: Layout, ops: Sequence[LayoutOp]) -> Adapter:
    """An adapter of HF's linears as one of the decoder's; raises JaxftError where a part would not be a linear's."""
    if not _fuses(ops):
        return adapter
    config, tensors = _copy(adapter, [op.hf for op in _fuses(ops)])
    for op in _fuses(ops):
        for module in [module for module in adapter.modules if module.endswith(f".{op.hf}")]:
            prefix = module.removesuffix(op.hf)
            a, b = (tensors.pop(f"{module}.{part}") for part in (_A, _B))
            sizes = [_rows(layout, f"{prefix}{part}") for part in op.parts]
            if b.shape[0] != sum(sizes):
                raise JaxftError(f"adapter, tensor {module}.{_B}", f"has {b.shape[0]} rows, not {sum(sizes)}")
            bands = np.split(b, np.cumsum(sizes)[:-1])
            for part, (a_part, b_part) in zip(op.parts, parts_of(a, bands, config.get("r")), strict=True):
                tensors |= {f"{prefix}{part}.{_A}": a_part, f"{prefix}{part}.{_B}": b_part}
        if rank_of(adapter, f"model.layers.0.{op.hf}") == len(op.parts) * config.get("r", 0):
            for pattern in ("rank_pattern", "alpha_pattern"):
                config[pattern].pop(_last(op.hf), None)
    config["target_modules"] = list(dict.fromkeys(_last(module) for module in Adapter(config, tensors).modules))
    return Adapter(config, tensors)


def to_hf(adapter: Adapter, layout: Layout, ops: Sequence[LayoutOp]) -> Adapter:
    """The inverse of `to_decoder`; parts without an adapter get one that adds nothing."""
    if not _fuses(ops):
        return adapter
    config, tensors = _copy(adapter, [part for op in _fuses(ops) for part in op.parts])
    for op in _fuses(ops):
        prefixes = dict.fromkeys(
            module.removesuffix(part) for part in op.parts for module in adapter.modules if module.endswith(f".{part}")
        )
        for prefix in prefixes:
            pairs = [_pair(tensors, f"{prefix}{part}", layout, adapter) for part in op.parts]
            tensors[f"{prefix}{op.hf}.{_A}"] = np.concatenate([a for a, _ in pairs])
            tensors[f"{prefix}{op.hf}.{_B}"] = block_diagonal([b for _, b in pairs])
        if any(rank_of(adapter, f"{prefix}{part}") != config["r"] for prefix in prefixes for part in op.parts):
            raise JaxftError(
                "adapter, field rank_pattern", f"gives parts of {op.hf}, which HF keeps as one, other ranks"
            )
        if prefixes and len(op.parts) > 1:
            rank = len(op.parts) * config["r"]
            scale = scale_of(adapter, next(iter(prefixes)))
            config["rank_pattern"][_last(op.hf)] = rank
            config["alpha_pattern"][_last(op.hf)] = scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
    config["target_modules"] = list(dict.fromkeys(_last(module) for module in Adapter(config, tensors).modules))
    return Adapter(config, tensors)


def _copy(adapter: Adapter, modules: Sequence[str]) -> tuple[dict, dict[str, np.ndarray]]:
    """The adapter's config and tensors, after a check that all there is of `modules` is A and B."""
    adapted = [name for name in adapter.tensors if any(f".{m}." in name for m in modules)]
    others = [name for name in adapted if not name.endswith((_A, _B))]
    if others:
        what = (
            f"{others[0]} belongs to a linear that HF keeps together with others; of those only A and B can be carried"
        )
        raise JaxftError("adapter", what, "Train plain LoRA on this model, without DoRA and biases")
    patterns = {name: dict(adapter.config.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")}
    return {**adapter.config, **patterns}, dict(adapter.tensors)


def _fuses(ops: Sequence[LayoutOp]) -> list[Fuse]:
    return [op for op in ops if isinstance(op, Fuse)]


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _rows(layout: Layout, module: str) -> int:
    return layout.decoder[f"{module}.weight"].shape[0]


def parts_of(a: np.ndarray, bands: list[np.ndarray], r: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """(A, B) of each part: blocks where B is block diagonal as `to_hf` writes it, else all of A for each."""
    blocks = [slice(i * (r or 0), (i + 1) * (r or 0)) for i in range(len(bands))]
    diagonal = r is not None and len(a) == len(bands) * r and len(bands) > 1
    if diagonal and all(not np.delete(band, block, axis=1).any() for band, block in zip(bands, blocks, strict=True)):
        return [(a[block], band[:, block]) for band, block in zip(bands, blocks, strict=True)]
    return [(a, band) for band in bands]


def _pair(
    tensors: dict[str, np.ndarray], module: str, layout: Layout, adapter: Adapter
) -> tuple[np.ndarray, np.ndarray]:
    """Takes the pair of a part out of `tensors`; zeros where it has none."""
    if f"{module}.{_A}" in tensors:
        return tensors.pop(f"{module}.{_A}"), tensors.pop(f"{module}.{_B}")
    out, inputs = layout.decoder[f"{module}.weight"].shape
    dtype, r = next(iter(adapter.tensors.values())).dtype, adapter.config["r"]
    return np.zeros((r, inputs), dtype), np.zeros((out, r), dtype)


def block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    """The matrix with these blocks along its diagonal."""
    rows, columns = (sum(block.shape[axis] for block in blocks) for axis in (0, 1))
    result = np.zeros((rows, columns), blocks[0].dtype)
    row = column = 0
    for block in blocks:
        result[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return result

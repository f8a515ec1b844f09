"""The difference of two checkpoints as a LoRA adapter: a truncated singular value decomposition of each weight's.

W' - W = U S V^T; the adapter with B = U_r sqrt(S_r) and A = sqrt(S_r) V_r^T is the nearest of rank r in the Frobenius
norm (Eckart and Young 1936). Large matrices take the randomized method (Halko, Martinsson and Tropp 2011,
arXiv:0909.4061), which is exact up to rounding where the difference has rank r.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from converters.checkpoint import Checkpoint
from converters.diff import compare_arrays
from converters.load import check
from converters.peft_io import Adapter, make_adapter
from jaxft.console import track
from jaxft.errors import JaxftError
from jaxft.lora import LoraConfig
from jaxft.models.params import quantizable_tensors

# Matrices whose smaller side is at most this are decomposed whole.
_WHOLE = 512
_OVERSAMPLING, _POWER_ITERATIONS = 16, 3


@dataclasses.dataclass(frozen=True)
class Extraction:
    """An adapter, and what it does not hold.

    Attributes:
      adapter: lora_alpha is r, so that its scale is 1.
      kept: module -> the share of the difference's squared norm that rank r keeps.
      left_out: tensors that differ and that no adapter on linears can hold: norms, embeddings, biases.
    """

    adapter: Adapter
    kept: dict[str, float]
    left_out: list[str]


def extract_lora(base: Checkpoint, tuned: Checkpoint, r: int) -> Extraction:
    """The adapter of rank `r` that turns `base` into `tuned` as nearly as possible, one weight at a time.

    Modules without any difference get no pair.

    Raises:
      JaxftError: a checkpoint that is not understood, two that do not have the same tensors, or no difference at all.
    """
    linears = set(quantizable_tensors(check(base)))
    check(tuned)
    problems = [name for name in base.tensors if name in linears and _shape(tuned, name) != _shape(base, name)]
    if problems:
        raise JaxftError(tuned.where, f"is not a fine-tuned {base.where}: other shapes of {', '.join(problems)}")
    tensors: dict[str, np.ndarray] = {}
    kept: dict[str, float] = {}
    left_out: list[str] = []
    for name in track([name for name in base.tensors if name in tuned.tensors], "extracting"):
        old, new = base.read(name), tuned.read(name)
        if compare_arrays(old, new)[0]:
            continue
        if name not in linears:
            left_out.append(name)
            continue
        module = name.removesuffix(".weight")
        pair = _nearest(new.astype(np.float32) - old.astype(np.float32), r)
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"], kept[module] = pair
    if not kept:
        raise JaxftError(tuned.where, f"has the linears of {base.where}: there is no difference to extract")
    targets = dict.fromkeys(module.rsplit(".", 1)[-1] for module in kept)
    config = LoraConfig(r=r, lora_alpha=r, target_modules=tuple(targets))
    return Extraction(make_adapter(config, tensors, base_model_name_or_path=base.where), kept, left_out)


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...] | None:
    info = checkpoint.tensors.get(name)
    return None if info is None else info.shape


def _nearest(difference: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray, float]:
    """A [r, in], B [out, r] and the share of the squared norm that they keep; ranks beyond the matrix's are zeros."""
    u, s, vt = _decompose(difference, r)
    u, s, vt = u[:, :r], s[:r], vt[:r]
    root = np.sqrt(s)
    a, b = (np.zeros((n, size), np.float32) for n, size in ((r, difference.shape[1]), (r, difference.shape[0])))
    a[: len(s)] = root[:, None] * vt
    b[: len(s)] = (u * root).T
    total = float(np.square(difference.astype(np.float64)).sum())
    return a, np.ascontiguousarray(b.T), float(np.square(s.astype(np.float64)).sum() / total)


def _decompose(x: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, S, V^T; of large matrices the first r + _OVERSAMPLING."""
    if min(x.shape) <= _WHOLE or r + _OVERSAMPLING >= min(x.shape):
        return np.linalg.svd(x, full_matrices=False)
    probe = np.random.default_rng(0).standard_normal((x.shape[1], r + _OVERSAMPLING), np.float32)
    basis = np.linalg.qr(x @ probe)[0]
    for _ in range(_POWER_ITERATIONS):
        basis = np.linalg.qr(x @ np.linalg.qr(x.T @ basis)[0])[0]
    u, s, vt = np.linalg.svd(basis.T @ x, full_matrices=False)
    return basis @ u, s, vt

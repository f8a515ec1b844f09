"""Going on with a conversion to several files that was killed: how to know that it is the same one.

A conversion is the same where it reads the same files, by size and time, and computes the same with the same code. Only
while the machine runs: after a crash of the system, what was written last may not be on the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.checkpoint import Checkpoint

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def resume_key(checkpoint: Checkpoint, layout: Any) -> str:
    """Names what a conversion writes; empty where that cannot be known.

    Args:
      checkpoint: what is written. A computed one says in `origin` what it is computed from.
      layout: how it is written, JSON-able.
    """
    origin = origin_of(checkpoint)
    if origin is None or not _BOOT.exists():
        return ""
    tensors = {name: [info.shape, info.dtype.name] for name, info in checkpoint.tensors.items()}
    code = max(file.stat().st_mtime_ns for file in Path(__file__).parent.rglob("*.py"))
    facts = [code, _BOOT.read_text(), origin, checkpoint.config, tensors, layout]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def origin_of(checkpoint: Checkpoint) -> list[Any] | None:
    """What the values of a checkpoint come from, JSON-able; None where that cannot be known."""
    if hasattr(checkpoint, "origin"):
        return checkpoint.origin()  # pyright: ignore[reportAttributeAccessIssue]
    path = Path(checkpoint.where)
    if not path.exists():
        return None
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [(file.as_posix(), file.stat()) for file in files]
    return [str(path.absolute()), [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]


def hash_of(tensors: Mapping[str, np.ndarray]) -> str:
    """Of all names and values."""
    digest = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()

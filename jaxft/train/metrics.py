"""What a run measures: rows with rates, written as one JSON line each, and the loss as a plot."""

from __future__ import annotations

import json
import math
import re
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft import console
from jaxft.data.batch import Batch
from jaxft.files import new_file
from jaxft.models import labels
from jaxft.models.decoder import Decoder
from jaxft.models.params import parameters
from jaxft.plan import GIB

# Dense bfloat16 operations a second of NVIDIA's data sheets, by the beginning of the device's name.
PEAK_FLOPS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


class MetricsLog:
    """Strict JSON, one object a line; each line is complete on disk before the next step starts.

    A number that is not finite is null. What a full disk does not take is kept, and written when there is room.

    Args:
      path: the file.
      resume_at: a run goes on after this step: the rows up to it are kept, later ones were of steps that come again.
    """

    def __init__(self, path: Path, resume_at: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= resume_at] if resume_at else []
        with new_file(path, overwrite=True) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._warned = False

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row."""
        self._waiting += (json.dumps(strict(row), allow_nan=False) + "\n").encode()
        start = self._file.tell()
        try:
            done = self._file.write(self._waiting)
            if done < len(self._waiting):
                raise OSError("No space left on device")
        except OSError as error:
            self._file.truncate(start)  # no half line
            self._file.seek(start)
            if not self._warned:
                console.warn(f"{self.path} was not written ({error}); its rows are kept until there is room")
            self._warned = True
        else:
            self._waiting, self._warned = b"", False

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def strict(value: Any) -> Any:
    """`value` with null for each number that is not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: strict(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a log; the last line of a process that was killed may be half."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


class Meter:
    """Turns a step's device metrics into a row with rates; the first row's time includes compilation.

    Args:
      decoder: what trains; counts the operations that a step needs.
      start: steps that were done before.
      total_steps: of the whole run.
    """

    def __init__(self, decoder: Decoder, start: int, total_steps: int) -> None:
        self._operations = operations_per_token(decoder)
        config = decoder.config
        # Scores and sums of a causal pair, forward and backward, 2 operations each.
        self._operations_per_pair = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        self._peak = peak_flops()
        self._time = time.perf_counter()
        self._step = start
        self._total = total_steps
        self._pairs = 0.0
        self._step_time: float | None = None

    def count(self, batch: Any) -> None:
        """Notes the attention of a batch that is trained on; it costs time only where the device's peak is known."""
        if self._peak is not None:
            self._pairs += attention_pairs(batch)

    def row(self, step: int, metrics: Mapping[str, jax.Array], learning_rate: float) -> dict[str, Any]:
        """The row of `step`: metrics, learning_rate, step_time_s, tokens/s, mfu, peak_memory_gib, eta_s.

        tokens/s are without padding; mfu is null where the device's peak is not known.
        """
        values = {name: float(value) for name, value in metrics.items()}  # waits for the device
        now = time.perf_counter()
        steps = step - self._step
        step_time = (now - self._time) / steps
        pairs, self._pairs = self._pairs / steps, 0.0
        self._time, self._step = now, step
        tokens = values.get("tokens", 0.0)
        operations = tokens * self._operations + pairs * self._operations_per_pair
        # The first row's time has the compilation in it, and says nothing of the steps to come.
        eta = None if self._step_time is None else (self._total - step) * step_time
        self._step_time = step_time
        return {
            "step": step,
            **values,
            "learning_rate": learning_rate,
            "step_time_s": step_time,
            "tokens/s": tokens / step_time,
            "mfu": None if self._peak is None else operations / step_time / self._peak,
            "peak_memory_gib": peak_memory() / GIB,
            "eta_s": eta,
        }

    def restart(self) -> None:
        """Leaves out the time since the last row: it went into something else than steps."""
        self._time = time.perf_counter()


def operations_per_token(decoder: Decoder) -> float:
    """What the products of a training step need for each token, without recomputation.

    2 for each weight forward and 2 for the gradient of its input; 2 more where the weight trains. Looking up an
    embedding costs none, but a tied one is the head too.
    """
    config = decoder.config
    total = 0.0
    for path, variable in parameters(decoder):
        value = variable.get_value()
        names = [str(part) for part in path]
        if "embed_tokens" in names and not config.tie_word_embeddings:
            continue
        size = math.prod(value.shape) if isinstance(value, jax.Array) else _quantized_size(value)
        if getattr(value, "ndim", 2) >= 2 and not any(name.endswith("norm") for name in names):
            total += (6.0 if labels.is_trainable(path, variable) else 4.0) * size
    return total


def _quantized_size(value: Any) -> int:
    layers = jax.tree.leaves(value)[0].shape[0]
    return layers * math.prod(value.shape[-2:])


def attention_pairs(batch: Any) -> float:
    """Pairs of a query and a key that it sees, over all documents of a batch."""
    texts = jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, Batch))
    found = 0.0
    for text in (x for x in texts if isinstance(x, Batch)):
        found += float((np.asarray(text.positions) + 1.0)[np.asarray(text.present)].sum())
    return found


def peak_flops() -> float | None:
    """The device's dense bfloat16 peak; None where it is not known."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name)), None)


def peak_memory() -> int:
    """Bytes: the device allocator's peak, on a CPU the process's resident peak."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    # Of this program alone, where Linux says it: ru_maxrss begins at what the program had that started this one.
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * (int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def plot_loss(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the losses and the learning rate over the steps of `rows` ("step", "loss", "learning_rate") as a PNG."""
    from matplotlib.figure import Figure

    train = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if row.get("eval_loss") is not None]
    steps = [row["step"] for row in train]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    losses = [math.nan if row["loss"] is None else row["loss"] for row in train]
    axes.plot(steps, losses, color="tab:blue", marker="." if len(train) < 60 else None, label="training")
    if held_out:
        points = [row["step"] for row in held_out], [row["eval_loss"] for row in held_out]
        axes.plot(*points, color="tab:orange", marker="o", label="held out")
        axes.legend()
    axes.set(xlabel="step", ylabel="training loss (nats per target token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(steps, [row["learning_rate"] for row in train], color="tab:gray", linewidth=1, linestyle="--")
    rate.set(ylabel="learning rate (dashed)", ylim=(0, None))
    with new_file(path, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=120, format="png")

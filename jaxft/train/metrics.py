"""What a run leaves behind to look at: one JSON line a logged step, and the loss as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft.files import new_file


class MetricsLog:
    """Appends one JSON object a line; each line is complete on disk before the next step starts."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("w", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def plot_loss(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the loss and the learning rate over the steps of `rows` ("step", "loss", "learning_rate") as a PNG."""
    from matplotlib.figure import Figure

    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [row["loss"] for row in rows], color="tab:blue", marker="." if len(rows) < 60 else None)
    axes.set(xlabel="step", ylabel="training loss (nats per target token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(steps, [row["learning_rate"] for row in rows], color="tab:gray", linewidth=1, linestyle="--")
    rate.set(ylabel="learning rate (dashed)", ylim=(0, None))
    with new_file(path, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=120, format="png")

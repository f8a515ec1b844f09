"""`python benchmarks/kernel_report.py kernels.json`: the README's table of kernels and its bar chart, from one run.

`kernels.json` is what `python -m pallas_kernels.bench --peers FILE` wrote. The table goes between the README's two
marker comments, the chart to docs/kernels.svg.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pallas_kernels import OPS

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- kernels: start -->", "<!-- kernels: end -->"
COLUMNS = ("operation, size, direction", "replaces", "saves", "runs", "ms", "of the ceiling", "XLA / ours")
PEER_COLUMN = "best peer / ours"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line for each benchmark, with what `implementation=None` chooses."""
    with_peers = any(row["peer"] for row in rows)
    columns = (*COLUMNS, PEER_COLUMN) if with_peers else COLUMNS
    lines = [_cells(row, rows)[: len(columns)] for row in rows if row["chosen"]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *lines])


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    op = OPS[row["benchmark"].split(",")[0]]
    xla = next(
        (r["milliseconds"] for r in rows if r["benchmark"] == row["benchmark"] and r["implementation"] == "xla"), None
    )
    peer = row["peer_milliseconds"]
    return [
        row["benchmark"],
        op.replaces,
        op.saves,
        row["implementation"],
        f"{row['milliseconds']:.4f}",
        f"{row['fraction']:.0%} ({row['rate']:,.0f} {row['unit']})",
        "" if xla is None else f"{xla / row['milliseconds']:.2f}",
        "" if peer is None else f"{peer / row['milliseconds']:.2f} ({row['peer']})",
    ]


def draw(rows: list[dict[str, Any]], device: str, file: Path) -> None:
    """Bars of time relative to ours: XLA's and the fastest peer's, one group for each benchmark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [row for row in rows if row["chosen"]]
    xla = {row["benchmark"]: row["milliseconds"] for row in rows if row["implementation"] == "xla"}
    figure, axes = plt.subplots(figsize=(10, 0.42 * len(chosen) + 1.5), layout="constrained")
    for i, row in enumerate(chosen):
        for offset, time, colour in (
            (-0.2, xla.get(row["benchmark"]), "tab:gray"),
            (0.2, row["peer_milliseconds"], "tab:orange"),
        ):
            if time is not None:
                ratio = time / row["milliseconds"]
                axes.barh(i + offset, min(ratio, 3), 0.38, color=colour)
                axes.text(min(ratio, 3) + 0.02, i + offset, f"{ratio:.2f}", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(chosen)), [row["benchmark"] for row in chosen], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time relative to ours (right of the line: we are faster; bars end at 3)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in ("tab:gray", "tab:orange")]
    axes.legend(handles, ["compiled XLA", "fastest peer"], loc="lower right")
    axes.set_title(device, fontsize=9)
    plt.rcParams["svg.hashsalt"] = "kernels"
    figure.savefig(file, metadata={"Date": None})


def write_between(start: str, end: str, text: str, file: Path) -> None:
    """Replaces what stands between two marker comments of a file."""
    before, rest = file.read_text().split(start)
    _, after = rest.split(end)
    file.write_text(f"{before}{start}\n{text}\n{end}{after}")


def main() -> None:
    """Reads the results, writes table and chart, says where."""
    results = json.loads(Path(sys.argv[1]).read_text())
    text, chart = table(results["rows"]), ROOT / "docs" / "kernels.svg"
    write_between(START, END, text, ROOT / "README.md")
    draw(results["rows"], results["device"], chart)
    print(f"wrote the table of {results['device']} into {ROOT / 'README.md'}, the chart to {chart}")


if __name__ == "__main__":
    main()

"""`python -m benchmarks.compare --out DIR --peers 'python peers.py --out DIR ...'`: peers and jaxft, side by side.

Runs the peers' command (any program that writes JSON lines of `kind: train` with job, batch, seq, tok_s and
peak_alloc_gib into DIR/peers.jsonl), then every row of `CASES` with `benchmarks.train`, one process each, and writes
the ratio table into the README (between its marker comments) and the charts to docs/step.svg. Without --peers and with
--no-run it only draws what DIR holds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.kernel_report import ROOT, write_between

START, END = "<!-- step: start -->", "<!-- step: end -->"
PEERS, OURS = "peers.jsonl", "jaxft.jsonl"


class Case(NamedTuple):
    """A step of ours, beside the peer's job of the same model, shape and dtype of the base."""

    model: str
    quant: str
    shape: str
    settings: tuple[str, ...]
    peer: str

    @property
    def batch_and_seq(self) -> tuple[int, int]:
        """(rows, tokens a row)."""
        rows, length = map(int, self.shape.split("x"))
        return rows, length


_LONG = "layer_input@host,attn_out@host,attn_lse"
_QLORA = ("llama-3.1-8b", "nf4")
_LORA = ("llama-3.2-1b", "none", "4x2048")
CASES = (
    Case(*_QLORA, "2x2048", ("--remat", "offload"), "unsloth_8b_qlora"),
    Case(*_QLORA, "2x2048", ("--remat", "auto", "--budget-gib", "24"), "unsloth_8b_qlora"),
    Case(*_QLORA, "2x2048", ("--remat", "offload,tile=1024", "--lora-dtype", "bfloat16"), "unsloth_8b_qlora"),
    Case(*_QLORA, "4x2048", ("--remat", "offload"), "unsloth_8b_qlora"),
    Case(*_QLORA, "4x2048", ("--remat", "auto"), "unsloth_8b_qlora"),
    Case(*_QLORA, "1x8192", ("--remat", _LONG), "unsloth_8b_qlora"),
    Case(*_QLORA, "1x8192", ("--remat", "auto"), "unsloth_8b_qlora"),
    Case(*_QLORA, "1x32768", ("--remat", f"{_LONG},tile=4096,prefetch=0", "--steps", "3"), "unsloth_8b_qlora"),
    Case(
        *_QLORA,
        "1x65536",
        ("--remat", f"{_LONG},tile=4096,prefetch=0", "--warmup", "1", "--steps", "1"),
        "unsloth_8b_qlora",
    ),
    Case(*_LORA, ("--remat", "full"), "unsloth_1b_lora"),
    Case(*_LORA, ("--remat", "auto", "--budget-gib", "10"), "unsloth_1b_lora"),
)


class Row(NamedTuple):
    """One line of the table: our record and the peer's, None where it has none of this shape."""

    ours: dict[str, Any]
    peer: dict[str, Any] | None

    @property
    def ratio(self) -> float | None:
        """Our tokens/s over the peer's."""
        return None if self.peer is None else self.ours["tok_s"] / self.peer["tok_s"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; none of a file that is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pair(ours: list[dict[str, Any]], peers: list[dict[str, Any]]) -> list[Row]:
    """Each of our records with the peer's newest of the same job and shape."""
    found = {(p["job"], p["batch"], p["seq"]): p for p in peers if p.get("kind") == "train"}
    return [Row(record, found.get((record["peer"], record["batch"], record["seq"]))) for record in ours]


def table(rows: list[Row]) -> str:
    """Markdown, one line a row."""
    lines = [
        "| model | rows x tokens | policy | tokens/s | GiB | Unsloth: tokens/s | GiB | ratio |",
        "| --- " * 8 + "|",
    ]
    for row in rows:
        ours, peer = row.ours, row.peer
        theirs = ["", ""] if peer is None else [f"{peer['tok_s']:,.0f}", f"{peer['peak_alloc_gib']:.2f}"]
        speed, peak = f"{ours['tok_s']:,.0f}", f"{ours['peak_alloc_gib'] or 0:.2f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        shape = f"{ours['batch']} x {ours['seq']}"
        cells = [ours["model"], shape, f"`{ours['remat']}`", speed, peak, *theirs, ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[Row], file: Path) -> None:
    """Three charts: speed, memory, and memory against the length of one row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, memory, length) = plt.subplots(1, 3, figsize=(15, 0.4 * len(rows) + 2), layout="constrained")
    for axes, field, title in ((speed, "tok_s", "tokens/s"), (memory, "peak_alloc_gib", "peak memory, GiB")):
        for i, row in enumerate(rows):
            for offset, record, colour in ((-0.2, row.ours, "tab:blue"), (0.2, row.peer, "tab:orange")):
                if record is not None:
                    axes.barh(i + offset, record[field] or 0, 0.38, color=colour)
        axes.set_title(title)
        axes.invert_yaxis()
    labels = [f"{r.ours['model'][-2:]} {r.ours['batch']}x{r.ours['seq']} {r.ours['remat']}" for r in rows]
    speed.set_yticks(range(len(rows)), labels, fontsize=7)
    memory.set_yticks([])
    _draw_length(length, rows)
    plt.rcParams["svg.hashsalt"] = "step"
    figure.savefig(file, metadata={"Date": None})


def _draw_length(axes: Any, rows: list[Row]) -> None:
    """Peak against tokens, of the rows of one document; ours is the least of each length."""
    ours: dict[int, float] = {}
    peers: dict[int, float] = {}
    for row in rows:
        if row.ours["batch"] == 1 and row.ours["peak_alloc_gib"]:
            seq = row.ours["seq"]
            ours[seq] = min(ours.get(seq, float("inf")), row.ours["peak_alloc_gib"])
            if row.peer is not None:
                peers[seq] = row.peer["peak_alloc_gib"]
    for found, name, colour in ((ours, "jaxft", "tab:blue"), (peers, "Unsloth", "tab:orange")):
        axes.plot(sorted(found), [found[seq] for seq in sorted(found)], marker="o", color=colour, label=name)
    axes.set_title("peak memory, GiB, against tokens of one row")
    axes.legend()


def run_cases(out: Path) -> None:
    """Runs every case in a process of its own; a case that fails is named and the others go on."""
    (out / OURS).unlink(missing_ok=True)
    for case in CASES:
        single = out / "one.jsonl"
        single.unlink(missing_ok=True)
        arguments = ["--model", case.model, "--quant", case.quant, "--shape", case.shape, *case.settings]
        command = [sys.executable, "-m", "benchmarks.train", *arguments, "--out", str(single)]
        if subprocess.run(command, check=False).returncode:
            print(f"failed: {shlex.join(command)}", file=sys.stderr)
            continue
        record = read_lines(single)[0] | {"peer": case.peer}
        with (out / OURS).open("a") as file:
            file.write(json.dumps(record) + "\n")
        single.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder of both sides' JSON lines")
    parser.add_argument("--peers", help="the command that runs the peers; it writes OUT/peers.jsonl")
    parser.add_argument("--no-run", action="store_true", help="only draw what the folder holds")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md and the charts into docs/")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.peers:
        subprocess.run(shlex.split(arguments.peers), check=True)
    if not arguments.no_run:
        run_cases(arguments.out)
    rows = pair(read_lines(arguments.out / OURS), read_lines(arguments.out / PEERS))
    text, chart = table(rows), (ROOT / "docs" if arguments.readme else arguments.out) / "step.svg"
    print(text)
    draw(rows, chart)
    print(f"wrote the charts to {chart}")
    if arguments.readme:
        write_between(START, END, text, ROOT / "README.md")
        print("wrote the table into README.md")


if __name__ == "__main__":
    main()

"""What both command lines and the trainer print: progress bars, tables, 'wrote X', and errors as one line.

Everything goes to standard error, so that standard output holds only results (``--json``, generated text).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from jaxft.errors import EXIT_STATUS, JaxftError

console = Console(stderr=True)
T = TypeVar("T")


@contextlib.contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Shows progress and yields ``advance(n=1, note="")``: a bar in a terminal or notebook, else a line every tenth."""
    if not (console.is_terminal or console.is_jupyter):
        yield _progress_lines(description, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(n: int = 1, note: str = "") -> None:
            bar.update(task, advance=n, note=note)

        yield advance


def _progress_lines(description: str, total: int | None) -> Callable[..., None]:
    done = 0

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done
        tenth = done * 10 // total if total else 0
        done += n
        if total and done * 10 // total > tenth:
            console.print(escape(f"{description} {done}/{total} {note}".rstrip()), soft_wrap=True)

    return advance


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields `items` under a progress bar."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # pyright: ignore[reportArgumentType]
    with progress(description, total) as advance:
        for item in items:
            yield item
            advance()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A rich table of `rows`, each cell shown as ``str``."""
    result = Table(title=title, title_justify="left")
    for column in columns:
        result.add_column(column, overflow="fold")
    for row in rows:
        result.add_row(*(escape(str(cell)) for cell in row))
    return result


def size(n_bytes: int | float) -> str:
    """Bytes in words: 98362432 -> '93.8 MiB'."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def tree_bytes(path: Path) -> int:
    """Bytes in a file or in all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def wrote(path: Path | str, note: str = "") -> None:
    """Says what was written and where, with its size."""
    path = Path(path)
    suffix = f", {note}" if note else ""
    console.print(f"wrote {escape(str(path))} ({size(tree_bytes(path))}{escape(suffix)})", soft_wrap=True)


def warn(text: str) -> None:
    """One warning line for the person who runs the command."""
    console.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True)


def run_command(command: Callable[[], int | None]) -> int:
    """Runs a command and gives its exit status, 0 for None; a JaxftError becomes one line on standard error and
    exit status 2, Ctrl-C status 130."""
    try:
        return command() or 0
    except JaxftError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return EXIT_STATUS
    except KeyboardInterrupt:
        console.print("interrupted", soft_wrap=True)
        return 130

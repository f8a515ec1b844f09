"""`jaxft-convert`: between Hugging Face, JAX (Orbax), bitsandbytes and GGUF checkpoints, and what can be asked of them.

Each command is a dataclass whose fields are its arguments. Its imports wait until it runs, so that ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from converters.commands.adapters import ExtractLora, Merge
from converters.commands.checks import Diff, Inspect, Verify
from converters.commands.formats import FromGguf, HfToJax, Imatrix, JaxToHf, ToBnb, ToGguf
from jaxft.console import run_command

Command = HfToJax | JaxToHf | ToGguf | Imatrix | FromGguf | ToBnb | Merge | ExtractLora | Inspect | Diff | Verify


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives the exit status: 0, 2 for what the user has to mend, 1 where checkpoints differ."""
    command = tyro.cli(Command, args=argv, prog="jaxft-convert", description=__doc__)
    return run_command(command.run)


if __name__ == "__main__":
    raise SystemExit(main())

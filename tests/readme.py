"""The code of README.md, by section, so that tests run what readers copy."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def code_blocks(heading: str, language: str) -> list[str]:
    """The fenced blocks of one language under a heading of the README, in order; there must be at least one."""
    (section,) = re.findall(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", README.read_text(), re.DOTALL | re.MULTILINE
    )
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert blocks, f"no {language} block under {heading!r}"
    return blocks

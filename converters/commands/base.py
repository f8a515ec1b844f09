"""What commands that write something have in common: two flags, and how they say what they wrote."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.console import tree_bytes, wrote


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writes:
    """A command that writes files.

    Attributes:
      overwrite: replace what is there already.
      json: print what was written as one JSON object to standard output, too.
    """

    overwrite: bool = False
    json: bool = False

    def report(self, written: Mapping[Path, str], **facts: Any) -> None:
        """Says what was written (path -> what it is), with its size; `facts` go into the JSON object only."""
        for path, note in written.items():
            wrote(path, note)
        if self.json:
            files = [{"path": str(path), "bytes": tree_bytes(path), "note": note} for path, note in written.items()]
            print(json.dumps({"wrote": files, **facts}, indent=2))

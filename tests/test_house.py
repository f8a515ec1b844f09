"""Rules of the house that no linter knows: import arrows, no architecture names in the model, links, quick imports."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import jaxft

ROOT = Path(__file__).parent.parent
OURS = ("jaxft", "pallas_kernels", "converters")


def sources(*packages: str) -> Iterator[tuple[str, str]]:
    """(path from the root, text) of every Python file of the packages."""
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def tracked_texts() -> Iterator[tuple[Path, str]]:
    """(path, text) of every text file that git tracks; in a copy without git, there is nothing to check."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    for path in (ROOT / name for name in listing.stdout.split("\0") if name):
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content:
            yield path, content.decode()


def imports(text: str) -> Iterator[tuple[str, bool]]:
    """(absolute name of an imported thing, whether the import waits for a call or is for type checkers only)."""

    def visit(node: ast.AST, deferred: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrows"
            # `from jaxft import api` imports the package jaxft.api.
            yield from ((f"{node.module}.{alias.name}", deferred) for alias in node.names)
        deferred = (
            deferred
            or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deferred)

    return visit(ast.parse(text), False)


def within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


KERNELS_MAY_IMPORT = ("jax", "numpy", "pallas_kernels", *sorted(sys.stdlib_module_names))
CONVERTERS_MAY_IMPORT = (
    "converters",
    "jaxft.models",
    "jaxft.quant",
    "jaxft.lora",
    "jaxft.data.chat",
    "jaxft.errors",
    "jaxft.console",
    "jaxft.files",
)


def wrong_arrows(path: str, text: str) -> list[str]:
    """The imports of one file that DESIGN's arrows forbid."""
    package = path.split("/")[0]
    wrong = []
    for name, deferred in imports(text):
        if package == "pallas_kernels":
            allowed = within(name, KERNELS_MAY_IMPORT)
        elif package == "converters":
            allowed = not within(name, OURS) or within(name, CONVERTERS_MAY_IMPORT)
        else:
            allowed = not within(name, ("converters",)) or (path.startswith("jaxft/api/") and deferred)
        if not allowed:
            wrong.append(f"{path} imports {name}")
    return wrong


def test_import_arrows():
    found = [wrong for path, text in sources(*OURS) for wrong in wrong_arrows(path, text)]
    assert found == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("pallas_kernels/nf4.py", "import jaxft"),
        ("pallas_kernels/nf4.py", "def f():\n    from jaxft.errors import JaxftError"),
        ("pallas_kernels/nf4.py", "import flax"),
        ("converters/hf_load.py", "from jaxft import api"),
        ("converters/hf_load.py", "from jaxft.train.sft import SFTTrainer"),
        ("converters/cli.py", "def main():\n    import jaxft.cli"),
        ("converters/hf_load.py", "from jaxft import FastLanguageModel"),
        ("jaxft/train/sft.py", "def f():\n    import converters.hf_load"),
        ("jaxft/lora.py", "if TYPE_CHECKING:\n    import converters.hf_load"),
        ("jaxft/cli.py", "from converters import cli"),
        ("jaxft/api_more.py", "def f():\n    import converters.hf_load"),
        ("jaxft/api/__init__.py", "import converters.hf_load"),
        ("jaxft/api/saving.py", "class A:\n    from converters import hf_load"),
    ],
)
def test_import_arrows_catch(path: str, text: str):
    assert len(wrong_arrows(path, text)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("pallas_kernels/nf4.py", "import functools\nfrom jax.experimental import pallas as pl\nimport numpy as np"),
        ("converters/hf_load.py", "from jaxft.models.decoder import Decoder\nfrom jaxft import lora\nimport gguf"),
        ("jaxft/models/layers.py", "from pallas_kernels import rms_norm"),
        ("jaxft/api/loading.py", "def f():\n    from converters import hf_load"),
        ("jaxft/api/model.py", "if TYPE_CHECKING:\n    from converters.checkpoint import Checkpoint"),
    ],
)
def test_import_arrows_allow(path: str, text: str):
    assert wrong_arrows(path, text) == []


def architecture_names(path: str, text: str) -> list[str]:
    """String constants that name an architecture: the start of a branch on its name."""
    from converters.archs import ARCHS

    names = {name for spec in ARCHS.values() for name in (spec.model_type, spec.architecture)}
    constants = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return [f"{path}:{node.lineno} {node.value!r}" for node in constants if node.value in names]


def test_no_architecture_is_named_in_the_model():
    found = [name for path, text in sources("jaxft", "pallas_kernels") for name in architecture_names(path, text)]
    assert found == []


def test_architecture_names_are_caught():
    assert architecture_names("x.py", "a = 1\nif config.model_type == 'llama': pass") == ["x.py:2 'llama'"]
    assert architecture_names("x.py", "match a:\n    case 'LlamaForCausalLM': pass") != []
    assert architecture_names("x.py", "'a llama would be scaled by llama3 RoPE'") == []


# What every family shares; each other module of converters/archs is a family's, or of a few that are alike.
SHARED = ("__init__", "base", "common", "gguf_keys", "gguf_rope", "mla", "moe", "rope")
FAMILY_LINES = 60


def long_families(path: str, text: str) -> list[str]:
    """The module, where it is a family's and more than data: what it adds then belongs into what families share."""
    lines = text.count("\n")
    family = path.startswith("converters/archs/") and Path(path).stem not in SHARED
    return [f"{path} has {lines} lines"] if family and lines > FAMILY_LINES else []


def test_families_are_short():
    assert [found for path, text in sources("converters") for found in long_families(path, text)] == []


def test_long_families_are_caught():
    from converters.archs import ARCHS

    for spec in ARCHS.values():
        path = spec.read_config.__module__.replace(".", "/") + ".py"
        assert long_families(path, "x = 1\n" * 61) == [f"{path} has 61 lines"]
        assert long_families(path, "x = 1\n" * 60) == []
    assert long_families("converters/archs/base.py", "x = 1\n" * 61) == []
    assert long_families("converters/layout.py", "x = 1\n" * 61) == []


# Assembled, so that this file does not hold what it forbids.
HOSTS = re.compile("|".join([r"py" + r"pi\.org", r"python" + r"hosted\.org", r"npm" + r"js\.(com|org)"]))
MACHINE_PATHS = re.compile(r"(?<![\w.$}])/(work|root|home|tmp)" + r"/\w")


def machine_facts(text: str) -> list[str]:
    return [match.group() for pattern in (HOSTS, MACHINE_PATHS) for match in pattern.finditer(text)]


def test_no_registry_host_and_no_path_of_a_machine():
    found = {path.relative_to(ROOT): facts for path, text in tracked_texts() if (facts := machine_facts(text))}
    assert found == {}


def test_hosts_and_paths_are_caught():
    assert machine_facts("pip --index-url https://py" + "pi.org/simple")
    assert machine_facts("npm --registry=https://registry.npm" + "js.org")
    assert machine_facts("path = '/" + "work/main'")
    assert machine_facts("see /" + "root/x")
    assert machine_facts("https://example.com/tmp" + "/x and ./home" + "/x and our/work" + "/x") == []


def broken_links(path: Path, text: str, exists: Callable[[Path], bool]) -> list[str]:
    """Relative links of a Markdown text that lead to no file."""
    targets = re.findall(r"\]\(<?([^)\s>]+)>?(?:\s[^)]*)?\)", text)
    files = (target.split("#")[0] for target in targets if not re.match(r"[a-z]+:", target))
    return [f"{path.relative_to(ROOT)}: {file}" for file in files if file and not exists(path.parent / file)]


def test_links_lead_to_files():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert pages
    assert [link for page in pages for link in broken_links(page, page.read_text(), Path.exists)] == []


def test_broken_links_are_caught():
    text = "[a](gone.md) [b](https://example.com/x.md) [c](#below) [d](gone.md#part) ![e](docs/gone.png 'title')"
    broken = broken_links(ROOT / "README.md", text, Path.exists)
    assert broken == ["README.md: gone.md", "README.md: gone.md", "README.md: docs/gone.png"]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_quick():
    code = "import time; start = time.perf_counter(); import jaxft; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_import_imports_nothing_heavy():
    modules = set(python("import jaxft, sys; print(*sys.modules)").split())
    assert modules.isdisjoint({"jax", "numpy", "flax", "transformers", "rich", "converters"})


def test_every_export_is_there():
    assert sorted(jaxft.__all__) == jaxft.__all__
    for name in jaxft.__all__:
        assert getattr(jaxft, name).__name__ == name
        assert name in dir(jaxft)
    with pytest.raises(AttributeError, match="no attribute 'FastVisionModel'"):
        _ = jaxft.FastVisionModel


def test_the_installed_version_is_ours():
    assert importlib.metadata.version("jaxft") == jaxft.__version__


@pytest.mark.parametrize("package", OURS)
def test_types_are_published(package: str):
    assert (ROOT / package / "py.typed").exists()


def test_ci_script_can_be_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)

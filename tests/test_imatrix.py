"""Importance matrices: what is collected is what the linears read; the file is llama.cpp's; quantized with it, a model
predicts better."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.cli import main
from converters.gguf_export import write_gguf
from converters.gguf_header import read_header
from converters.gguf_import import GGUFCheckpoint
from converters.hf_load import HFCheckpoint
from converters.imatrix import ImportanceMatrix, collect, read_imatrix, write_imatrix
from converters.load import load_decoder
from converters.observe import observe
from jaxft.errors import EXIT_STATUS, JaxftError
from jaxft.fetch import Pinned
from jaxft.models import layers
from llamacpp import LlamaCpp
from pinned import LLAMA_CPP, LLAMA_CPP_DECLARATIONS, LLAMAFACTORY

TEXT = "What is 2 plus 3? The answer is the sum of the numbers, and the sum is the answer. " * 4


@pytest.fixture(scope="module")
def collected(tiny_hf_dir: Path) -> ImportanceMatrix:
    return collect(HFCheckpoint(tiny_hf_dir), TEXT, dataset="text.txt", chunk_size=24, max_chunks=5, batch_size=2)


def test_sums_are_those_of_what_the_linears_read(
    collected: ImportanceMatrix, tiny_hf_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of o_proj, the one linear that is a call of its own here; q, k and v read the norm's output, gate and up too."""
    checkpoint = HFCheckpoint(tiny_hf_dir)
    decoder = load_decoder(checkpoint, dtype=jnp.float32)
    decoder.remat = "none,unroll=all"
    seen: dict[str, list[np.ndarray]] = {"o": [], "norm": []}
    plain, norm = layers.Linear.__call__, layers.RMSNorm.__call__

    def note(kind: str, value: jax.Array) -> None:
        jax.debug.callback(lambda x: seen[kind].append(np.square(np.asarray(x, np.float64)).sum((0, 1))), value)

    def linear(self, x, *rest):
        note("o", x)
        return plain(self, x, *rest)

    def normed(self, x):
        result = norm(self, x)
        note("norm", result)
        return result

    monkeypatch.setattr(layers.Linear, "__call__", linear)
    monkeypatch.setattr(layers.RMSNorm, "__call__", normed)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    tokens = jnp.asarray(tokenizer(TEXT)["input_ids"][: 5 * 24], jnp.int32).reshape(5, 24)
    jax.block_until_ready(decoder(tokens))
    jax.effects_barrier()
    for layer in range(3):
        np.testing.assert_allclose(collected.sums[f"blk.{layer}.attn_output.weight"][0], seen["o"][layer], rtol=1e-4)
        for part in "qkv":
            found = collected.sums[f"blk.{layer}.attn_{part}.weight"][0]
            np.testing.assert_allclose(found, seen["norm"][layer], rtol=1e-4)
    assert collected.chunks == 5
    assert all(counts.tolist() == [5.0 * 24] for counts in collected.counts.values())
    assert collected.counts.keys() == collected.sums.keys()
    assert len(collected.sums) == 7 * 3


def test_observe_follows_weights():
    """Through casts, slices, transposes, calls and loops; batched products give a row for each of the batch."""
    rng = np.random.default_rng(0)
    x, w, e = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((5, 3), (2, 4, 3), (2, 4, 3)))

    def run(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        once = jax.jit(lambda w, x: x @ w[1].T)(weights["plain"], x)

        def body(total, x):
            return total + jnp.einsum("i,oi->o", x, weights["looped"][0].astype(jnp.float32)), x

        total, xs = jax.lax.scan(body, jnp.zeros(4), x, reverse=True)
        experts = jnp.einsum("eti,eoi->eto", jnp.stack([x, 2 * x]), weights["experts"])
        return once.sum() + total.sum() + experts.sum() + xs[0, 0]

    weights = {"plain": w, "looped": w, "experts": e, "unused": w}
    result, squares = jax.jit(lambda weights, x: observe(run, weights, x))(weights, x)
    np.testing.assert_allclose(result, run(weights, x), rtol=1e-5)
    expected = np.square(np.asarray(x)).sum(0)
    assert set(squares) == {"plain", "looped", "experts"}
    np.testing.assert_allclose(squares["plain"], expected, rtol=1e-6)
    np.testing.assert_allclose(squares["looped"], expected, rtol=1e-6)
    np.testing.assert_allclose(squares["experts"], np.stack([expected, 4 * expected]), rtol=1e-6)


def test_files(collected: ImportanceMatrix, tmp_path: Path):
    path = write_imatrix(collected, tmp_path / "imatrix.gguf")
    header = read_header(path)
    assert header.metadata.keys() == {
        "general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
    }  # fmt: skip
    assert header.tensors["blk.0.ffn_down.weight.in_sum2"].shape == (1, 160)
    assert header.tensors["blk.0.ffn_down.weight.counts"].shape == (1, 1)
    again = read_imatrix(path)
    assert (again.dataset, again.chunk_size, again.chunks) == ("text.txt", 24, 5)
    for name, sums in collected.sums.items():
        np.testing.assert_array_equal(again.sums[name], sums)
        np.testing.assert_array_equal(again.of(name, (64, sums.shape[1]), path), sums[0] / np.float32(120))
    legacy = tmp_path / "old.dat"
    name = b"blk.0.ffn_up.weight"
    legacy.write_bytes(struct.pack("<2i", 1, len(name)) + name + struct.pack("<2i3f", 4, 3, 4, 8, 0))
    assert read_imatrix(legacy).of(name.decode(), (9, 3), legacy).tolist() == [1, 2, 0]


def test_an_expert_without_tokens_counts_evenly():
    matrix = ImportanceMatrix({"e": np.array([[2, 4], [0, 0]], "f4")}, {"e": np.array([2, 0], "f4")}, "", 0, 0)
    assert matrix.of("e", (2, 3, 2), "x").tolist() == [[1, 2], [1, 1]]
    assert matrix.of("other", (3, 2), "x") is None
    with pytest.raises(JaxftError, match="It is another model's"):
        matrix.of("e", (3, 2), "x")


def test_the_commands(tiny_hf_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "text.txt").write_text(TEXT)
    imatrix, out = tmp_path / "imatrix.gguf", tmp_path / "model.gguf"
    arguments = ["imatrix", tiny_hf_dir, imatrix, "--text", tmp_path / "text.txt", "--chunk-size", 24]
    assert main([*map(str, arguments), "--max-chunks", "5", "--json"]) == 0
    assert (
        "importance matrix of 21 tensors, from 5 rows of 24" in json.loads(capfd.readouterr().out)["wrote"][0]["note"]
    )
    assert main(["to-gguf", str(tiny_hf_dir), str(out), "--type", "q4_0", "--imatrix", str(imatrix)]) == 0
    header = read_header(out)
    assert header.metadata["quantize.imatrix.file"] == "imatrix.gguf"
    assert header.metadata["quantize.imatrix.entries_count"] == 21
    assert header.metadata["quantize.imatrix.chunks_count"] == 5
    (tmp_path / "bad.dat").write_bytes(b"\1\0\0\0\xff\xff\xff\x7f")
    for imatrix, words in ((tmp_path / "gone", "cannot be read"), (tmp_path / "bad.dat", "neither a GGUF file")):
        capfd.readouterr()
        other = ["to-gguf", str(tiny_hf_dir), str(tmp_path / "no.gguf"), "--imatrix", str(imatrix)]
        assert main(other) == EXIT_STATUS
        assert words in capfd.readouterr().err
        assert not (tmp_path / "no.gguf").exists()


@pytest.mark.slow
def test_the_file_is_llamacpps(collected: ImportanceMatrix, tmp_path: Path):
    """Read by libgguf, as llama.cpp's quantize reads it."""
    libgguf = pytest.importorskip("libgguf")
    found = libgguf.load_imatrix(write_imatrix(collected, tmp_path / "imatrix.gguf"))
    assert found.keys() == collected.sums.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, collected.sums[name][0] / 120, rtol=1e-6)


def negative_log_likelihood(model: Any, ids: list[int]) -> float:
    logits = model.logits(ids)[:-1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -float(logs[np.arange(len(logs)), ids[1:]].mean())


@pytest.mark.slow
def test_smollm2_predicts_better_with_one(
    smollm2_gguf: Path, unpacked: Callable[[Pinned], Path], tmp_path: Path
) -> None:
    """In llama.cpp, on web texts that the matrix was not collected from: q2_k, q3_k_m and q4_k_m."""
    folder = unpacked(LLAMAFACTORY)
    lines = next(folder.rglob("c4_demo.jsonl")).read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    checkpoint = GGUFCheckpoint(smollm2_gguf)
    importance = collect(checkpoint, "\n\n".join(texts[:60]), dataset="c4", max_chunks=12)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    held = [tokenizer(text)["input_ids"][:512] for text in texts[100:116]]
    llama = LlamaCpp(unpacked(LLAMA_CPP), unpacked(LLAMA_CPP_DECLARATIONS))
    found: dict[str, list[float]] = {}
    for mix in ("f16", "q2_k", "q3_k_m", "q4_k_m"):
        for kind in (None, (tmp_path / "imatrix.gguf", importance)):
            path = write_gguf(checkpoint, tmp_path / "model.gguf", mix, importance=kind, overwrite=True)
            with llama.open(path) as model:
                nll = np.average([negative_log_likelihood(model, ids) for ids in held], weights=[len(i) for i in held])
            found.setdefault(mix, []).append(float(nll))
    print({mix: [round(nll, 4) for nll in pair] for mix, pair in found.items()})
    assert found["f16"][0] == found["f16"][1]
    for mix in ("q2_k", "q3_k_m", "q4_k_m"):
        assert found[mix][1] < found[mix][0], mix

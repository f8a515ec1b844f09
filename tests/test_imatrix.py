"""Importance matrices: what is collected is what the linears read; the file is llama.cpp's; quantized with it, a model
predicts better."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pallas_kernels as pk
from arch_cases import arch_config
from converters.cli import main
from converters.gguf_export import write_gguf
from converters.gguf_header import read_header
from converters.gguf_import import GGUFCheckpoint
from converters.hf_load import HFCheckpoint
from converters.imatrix import ImportanceMatrix, collect, collect_rows, read_imatrix, write_imatrix
from converters.load import load_decoder
from converters.observe import observe
from converters.verify import verify
from jaxft.errors import EXIT_STATUS, JaxftError
from jaxft.fetch import Pinned
from jaxft.models import layers, moe
from llamacpp import LlamaCpp
from pinned import LLAMA_CPP, LLAMA_CPP_DECLARATIONS, LLAMAFACTORY
from tiny import write_tiny_hf

GPU = jax.sharding.AbstractMesh(
    (), (), abstract_device=jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
)
TEXT = "What is 2 plus 3? The answer is the sum of the numbers, and the sum is the answer. " * 4


@pytest.fixture(scope="module")
def collected(tiny_hf_dir: Path) -> ImportanceMatrix:
    return collect(HFCheckpoint(tiny_hf_dir), TEXT, dataset="text.txt", chunk_size=24, max_chunks=5, batch_size=2)


@pytest.mark.slow
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
        batched = jnp.einsum("eti,eoi->eto", jnp.stack([x, 2 * x]), weights["batched"])
        experts = pk.grouped_matmul(x, weights["experts"], jnp.array([1, 0, 3], jnp.int32))
        return once.sum() + total.sum() + batched.sum() + experts.sum() + xs[0, 0]

    weights = {"plain": w, "looped": w, "batched": e, "experts": jnp.ones((3, 4, 3)), "unused": w}
    result, seen = jax.jit(lambda weights, x: observe(run, weights, x))(weights, x)
    np.testing.assert_allclose(result, run(weights, x), rtol=1e-5)
    squares = np.square(np.asarray(x))
    expected = {
        "plain": (squares.sum(0), 5),
        "looped": (squares.sum(0), 5),
        "batched": (np.stack([squares.sum(0), 4 * squares.sum(0)]), [5, 5]),
        "experts": (np.stack([squares[0], np.zeros(3), squares[1:4].sum(0)]), [1, 0, 3]),
    }
    assert seen.keys() == expected.keys()
    for name, (sums, rows) in expected.items():
        np.testing.assert_allclose(seen[name].squares, sums, rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(seen[name].rows, rows, err_msg=name)
    # A GPU's kernel would multiply by the experts there.
    with jax.sharding.use_abstract_mesh(GPU):
        assert jax.eval_shape(lambda *arguments: observe(run, *arguments), weights, x)[1].keys() == expected.keys()


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


def test_experts_are_those_of_the_tokens_that_went_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Against a computation in numpy, from what the router reads on; without the router's weights, as in llama.cpp."""
    config = arch_config("mixtral", "experts") | {"num_hidden_layers": 1}
    source = HFCheckpoint(write_tiny_hf(tmp_path / "hf", config))
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (4, 16)).astype(np.int32)
    seen: list[np.ndarray] = []
    plain = moe.MoE.__call__

    def note(self, x, *rest, **more):
        jax.debug.callback(lambda x: seen.append(np.asarray(x, np.float64)), x)
        return plain(self, x, *rest, **more)

    monkeypatch.setattr(moe.MoE, "__call__", note)
    found = collect_rows(source, tokens, dataset="random", batch_size=2)
    jax.effects_barrier()
    block = "model.layers.0.block_sparse_moe"
    x = np.concatenate(seen).reshape(tokens.size, -1)
    logits = x @ source.read(f"{block}.gate.weight").astype(np.float64).T
    chosen = np.argsort(-logits, axis=1)[:, : config["num_experts_per_tok"]]
    for expert in range(config["num_local_experts"]):
        rows, _ = np.nonzero(chosen == expert)
        gate, up = (x[rows] @ source.read(f"{block}.experts.{expert}.{w}.weight").T for w in ("w1", "w3"))
        hidden = gate / (1 + np.exp(-gate)) * up
        for name, read in (("gate", x[rows]), ("up", x[rows]), ("down", hidden)):
            sums = found.sums[f"blk.0.ffn_{name}_exps.weight"][expert]
            np.testing.assert_allclose(sums, np.square(read).sum(0), rtol=1e-4, err_msg=f"{name} {expert}")
            assert found.counts[f"blk.0.ffn_{name}_exps.weight"][expert] == len(rows)
    path = write_imatrix(found, tmp_path / "imatrix.gguf")
    header, (n, columns) = read_header(path), found.sums["blk.0.ffn_down_exps.weight"].shape
    assert header.tensors["blk.0.ffn_down_exps.weight.in_sum2"].shape == (n, columns)
    assert header.tensors["blk.0.ffn_down_exps.weight.counts"].shape == (n, 1)


def test_files_of_experts_in_older_forms(tmp_path: Path):
    """llama.cpp's .dat keeps all experts' in a row; its GGUF files may have one count for several matrices."""
    name, path = b"blk.0.ffn_up_exps.weight", tmp_path / "old.dat"
    path.write_bytes(struct.pack("<2i", 1, len(name)) + name + struct.pack("<2i4f", 4, 4, 4, 8, 0, 2))
    assert read_imatrix(path).of(name.decode(), (2, 9, 2), path).tolist() == [[1, 2], [0, 0.5]]
    matrix = ImportanceMatrix({"e": np.array([[2, 4], [6, 0]], "f4")}, {"e": np.array([2], "f4")}, "", 0, 0)
    again = read_imatrix(write_imatrix(matrix, tmp_path / "one_count.gguf"))
    assert again.of("e", (2, 3, 2), "x").tolist() == [[1, 2], [3, 0]]


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
def test_experts_are_quantized_better_with_one(tmp_path: Path) -> None:
    """q2_k of a model whose columns matter unevenly, as a trained one's do: the KL to the source, which is what a text
    of the source's own is predicted worse by. Without any, with one of all but experts, with one of all."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_local_experts": 4, "num_hidden_layers": 1}
    folder = write_tiny_hf(tmp_path / "hf", arch_config("mixtral", "experts") | sizes)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(1)
    for name, values in tensors.items():
        if name.endswith("layernorm.weight"):
            scales = rng.lognormal(0, 1, values.shape)
            tensors[name] = (scales / np.sqrt(np.mean(scales**2))).astype(values.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = HFCheckpoint(folder)
    tokens = rng.integers(0, source.config["vocab_size"], (8, 128)).astype(np.int32)
    full = collect_rows(source, tokens, dataset="random")
    dense = dataclasses.replace(full, sums={name: sums for name, sums in full.sums.items() if "_exps" not in name})
    found = []
    for importance in (None, dense, full):
        known = importance and (tmp_path / "imatrix.gguf", importance)
        path = write_gguf(source, tmp_path / "model.gguf", "q2_k", importance=known, overwrite=True)
        found.append(verify(source, GGUFCheckpoint(path), length=128).kl)
    print("KL", [round(kl, 4) for kl in found])
    assert found[2] < found[1] < found[0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_predicts_better_with_one(
    smollm2_gguf: Path, unpacked: Callable[[Pinned], Path], tmp_path: Path
) -> None:
    """In llama.cpp, on web texts that the matrix was not collected from: q2_k, q3_k_m and q4_k_m."""
    folder = unpacked(LLAMAFACTORY)
    lines = next(folder.rglob("c4_demo.jsonl")).read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    checkpoint = GGUFCheckpoint(smollm2_gguf)
    importance = collect(checkpoint, "\n\n".join(texts[:60]), dataset="c4", chunk_size=256, max_chunks=12)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    held = [tokenizer(text)["input_ids"][:256] for text in texts[100:124]]
    llama = LlamaCpp(unpacked(LLAMA_CPP), unpacked(LLAMA_CPP_DECLARATIONS))
    found: dict[str, list[float]] = {}
    for mix in ("q2_k", "q3_k_m", "q4_k_m"):
        for kind in (None, (tmp_path / "imatrix.gguf", importance)):
            path = write_gguf(checkpoint, tmp_path / "model.gguf", mix, importance=kind, overwrite=True)
            with llama.open(path) as model:
                nll = np.average([negative_log_likelihood(model, ids) for ids in held], weights=[len(i) for i in held])
            found.setdefault(mix, []).append(float(nll))
    print({mix: [round(nll, 4) for nll in pair] for mix, pair in found.items()})
    for mix, (without, with_importance) in found.items():
        assert with_importance < without, mix

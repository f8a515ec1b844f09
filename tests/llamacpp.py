"""llama.cpp as the judge of GGUF files: what it tokenizes, computes and generates. For slow tests only (needs cffi).

The shared libraries come from one package and matching cffi declarations from another (see tests/pinned.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_PROBLEMS = (3, 4)  # ggml_log_level: warnings and errors


class LlamaCpp:
    """The library: `LlamaCpp(unpacked(LLAMA_CPP), unpacked(LLAMA_CPP_DECLARATIONS))`."""

    def __init__(self, libraries: Path, declarations: Path) -> None:
        self.ffi = _load_declarations(declarations).get_ffi()
        self.ffi.cdef("void ggml_backend_load_all_from_path(const char *);")
        folder = libraries / "package/bins/linux-x64"
        everywhere = self.ffi.RTLD_GLOBAL | self.ffi.RTLD_NOW
        self._base = self.ffi.dlopen(str(folder / "libggml-base.so"), everywhere)
        self._ggml = self.ffi.dlopen(str(next(folder.glob("libggml.v*.so"))), everywhere)
        self.lib = self.ffi.dlopen(str(next(folder.glob("libllama.v*.so"))), everywhere)
        self.messages: list[str] = []
        self._keep_messages()
        self._ggml.ggml_backend_load_all_from_path(str(folder).encode())
        self.lib.llama_backend_init()

    def _keep_messages(self) -> None:
        """llama.cpp's warnings and errors go to `messages` instead of stderr."""

        @self.ffi.callback("void(enum ggml_log_level, const char *, void *)")
        def log(level: int, text: Any, _: Any) -> None:
            if level in _PROBLEMS:
                self.messages.append(self.ffi.string(text).decode(errors="replace").strip())

        self._log = log
        self.lib.llama_log_set(log, self.ffi.NULL)

    @contextmanager
    def open(self, path: Path, *, vocab_only: bool = False) -> Iterator[LlamaModel]:
        """The model in a GGUF file; fails with llama.cpp's own words where it does not load."""
        parameters = self.lib.llama_model_default_params()
        parameters.vocab_only = vocab_only
        self.messages.clear()
        model = self.lib.llama_model_load_from_file(str(path).encode(), parameters)
        assert model != self.ffi.NULL, self.messages
        try:
            yield LlamaModel(self, model)
        finally:
            self.lib.llama_model_free(model)

    def quantize(
        self, source: Path, target: Path, file_type: int, importance: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """llama.cpp's own quantization of a GGUF file; `file_type` is a `gguf.LlamaFileType`, `importance` mean squares
        by tensor."""
        parameters = self.lib.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread, parameters.allow_requantize = file_type, 2, True
        entries = self.ffi.new("struct llama_model_imatrix_data[]", len(importance or {}) + 1)
        kept = []  # what the entries point to
        for entry, (name, values) in zip(entries, (importance or {}).items(), strict=False):
            kept += [self.ffi.new("char[]", name.encode()), self.ffi.from_buffer("float[]", values)]
            entry.name, entry.data, entry.size = *kept[-2:], values.size
        if importance:
            parameters.imatrix = entries
        self.messages.clear()
        assert (
            self.lib.llama_model_quantize(str(source).encode(), str(target).encode(), self.ffi.addressof(parameters))
            == 0
        ), self.messages


def _load_declarations(package: Path) -> Any:
    """The declarations alone: the package itself would load its own libraries."""
    spec = importlib.util.spec_from_file_location("declarations", package / "llama_cpp_py_sync/_cffi_bindings.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class LlamaModel:
    """An open model."""

    def __init__(self, llama: LlamaCpp, model: Any) -> None:
        self._lib, self._ffi, self._model = llama.lib, llama.ffi, model
        self._vocab = self._lib.llama_model_get_vocab(model)
        self.n_tokens: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.add_bos: bool = self._lib.llama_vocab_get_add_bos(self._vocab)

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of a text; special tokens in it are recognised unless `parse_special` is off."""
        raw = text.encode()
        ids = self._ffi.new("llama_token[]", len(raw) + 8)
        n = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), add_special, parse_special)
        assert n >= 0, text
        return list(ids[0:n])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 logits [T, V] after each of the ids."""
        with self._context(len(ids)) as context:
            return self._decode(context, ids, every=True)

    def generate(self, ids: Sequence[int], n_tokens: int, stop: Sequence[int] = ()) -> list[int]:
        """Up to `n_tokens` greedy tokens after `ids`; ends with the first one that is in `stop`."""
        output: list[int] = []
        with self._context(len(ids) + n_tokens) as context:
            step: Sequence[int] = ids
            while len(output) < n_tokens and not (output and output[-1] in stop):
                output.append(int(self._decode(context, step, every=False)[-1].argmax()))
                step = output[-1:]
        return output

    @contextmanager
    def _context(self, n_tokens: int) -> Iterator[Any]:
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = n_tokens
        # A key/value cache in float32 and no fused attention: as exact as llama.cpp gets.
        parameters.type_k = parameters.type_v = self._lib.GGML_TYPE_F32
        parameters.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.n_threads = parameters.n_threads_batch = 2
        context = self._lib.llama_init_from_model(self._model, parameters)
        assert context != self._ffi.NULL
        try:
            yield context
        finally:
            self._lib.llama_free(context)

    def _decode(self, context: Any, ids: Sequence[int], *, every: bool) -> np.ndarray:
        """Runs the ids after what the context holds: logits [T, V] of all of them, or of the last one."""
        start = self._lib.llama_memory_seq_pos_max(self._lib.llama_get_memory(context), 0) + 1
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = token, start + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = every or i == len(ids) - 1
            assert self._lib.llama_decode(context, batch) == 0
        finally:
            self._lib.llama_batch_free(batch)
        n_rows = len(ids) if every else 1
        raw = self._ffi.buffer(self._lib.llama_get_logits(context), n_rows * self.n_tokens * 4)
        return np.frombuffer(raw, np.float32).reshape(n_rows, -1).copy()

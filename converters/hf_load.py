"""Opens a Hugging Face folder as a checkpoint: config.json with model.safetensors, whole or in shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.checkpoint import TensorInfo
from converters.hf_files import ADAPTER_CONFIG, CONFIG, load_tokenizer, read_json, read_sidecars
from converters.safetensors_io import SafetensorsFile
from jaxft.errors import JaxftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTIZATION_CONFIG = "quantization_config"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class HFCheckpoint:
    """A Hugging Face folder; implements `converters.checkpoint.Checkpoint`.

    Opening reads config.json and the header of every shard. `read` gives a read-only view of the tensor on disk, so
    that a tensor that nobody keeps takes no memory.

    Raises:
      JaxftError: the folder, a file or an entry of the index is missing, corrupt or not what its neighbours say; a
        checkpoint of pickles; a quantized checkpoint, unless that is accepted (`converters.bnb` reads those).
    """

    def __init__(self, path: Path | str, *, accept_quantized: bool = False) -> None:
        self._folder = Path(path)
        if not self._folder.is_dir():
            raise JaxftError(path, "is not a folder" if self._folder.exists() else "does not exist")
        self._files = _open_shards(self._folder)
        self.config: dict[str, Any] = read_json(self._folder / CONFIG)
        if self.is_quantized and not accept_quantized:
            raise _is_quantized(self.config[QUANTIZATION_CONFIG], self._folder / CONFIG)
        self.tensors: dict[str, TensorInfo] = {name: file.tensors[name] for name, file in self._files.items()}

    @property
    def is_quantized(self) -> bool:
        """Whether the tensors are the parts of quantized weights."""
        return bool(self.config.get(QUANTIZATION_CONFIG))

    @property
    def where(self) -> str:
        """The folder's path."""
        return str(self._folder)

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype, a read-only view of the file."""
        return self._files[name].read(name)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The folder's tokenizer; None without its files."""
        return load_tokenizer(self._folder)

    def sidecars(self) -> dict[str, bytes]:
        """generation_config.json, tokenizer files, chat templates, licences."""
        return read_sidecars(self._folder)


def _open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> the open file that holds it."""
    if (folder / WEIGHTS).exists():
        file = SafetensorsFile(folder / WEIGHTS)
        return dict.fromkeys(file.tensors, file)
    if (folder / INDEX).exists():
        return _open_indexed(folder)
    raise _no_weights(folder)


def _open_indexed(folder: Path) -> dict[str, SafetensorsFile]:
    weight_map = _read_index(folder / INDEX)
    shards = sorted(set(weight_map.values()))
    # Not Path.is_file, which raises for names that no file can have.
    missing = [shard for shard in shards if not os.path.isfile(folder / shard)]
    if missing:
        raise JaxftError(folder / INDEX, f"names shards that are missing: {', '.join(missing)}", "Fetch them too")
    files = {shard: SafetensorsFile(folder / shard) for shard in shards}
    problems = [f"{name} is not in {shard}" for name, shard in weight_map.items() if name not in files[shard].tensors]
    problems += [
        f"{name} in {shard} is not in the index"
        for shard, file in files.items()
        for name in file.tensors
        if weight_map.get(name) != shard
    ]
    if problems:
        raise JaxftError(folder / INDEX, f"does not fit its shards: {'; '.join(problems)}")
    return {name: files[shard] for name, shard in weight_map.items()}


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name; only plain file names are taken, so that no index reaches outside its folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise JaxftError(f"{path}, field weight_map", "must be an object of tensor names and file names")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise JaxftError(f"{path}, tensor {name}", f"{shard!r} is not the name of a file in the same folder")
    return weight_map


def _no_weights(folder: Path) -> JaxftError:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if not names:
        return JaxftError(folder, "is an empty folder")
    if pickles:
        return JaxftError(
            folder,
            f"has its weights only as pickles ({', '.join(pickles)}), which can run any code when they are opened",
            "Convert it where you trust it: transformers' AutoModelForCausalLM.from_pretrained(folder)"
            f".save_pretrained(new_folder) writes {WEIGHTS}",
        )
    if ADAPTER_CONFIG in names:
        return JaxftError(folder, "is a PEFT adapter, not a model", "Name the folder of its base model")
    return JaxftError(folder, f"has neither {WEIGHTS} nor {INDEX}")


def _is_quantized(quantization: Any, where: Path) -> JaxftError:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    return JaxftError(
        f"{where}, field {QUANTIZATION_CONFIG}",
        f"the checkpoint is quantized ({method}), and its original tensors are asked for",
        "Take the checkpoint with the original weights",
    )

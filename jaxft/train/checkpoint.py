"""Checkpoints of a run: what trains, the optimizer's state and where the run is, in one folder that is whole or absent.

`output_dir/checkpoint-{step}` holds `arrays`, an Orbax PyTree of the trainable leaves and the optimizer's, and `run`, a
JSON object of the rest. The run waits only until the arrays are copied to host memory. A thread writes them with Orbax,
under another name that becomes the folder's when all is on disk, so a process may be killed at any moment. Frozen
weights are not held: the fingerprint says of which model and settings the checkpoint is, and another one is refused by
the first differences.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from jaxft import console
from jaxft.errors import JaxftError
from jaxft.train.arguments import MAY_CHANGE, TrainingArguments, jsonable

FORMAT = "jaxft-run-1"
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = "checkpoint-*.orbax-checkpoint-tmp*"
_ERRORS = (OSError, ValueError, KeyError, TypeError)  # what Orbax and TensorStore raise
_SHOWN = 4  # differences in a message


@dataclasses.dataclass
class Progress:
    """Where a run is; all of it is JSON.

    Attributes:
      step: steps done.
      skipped: how many of them left their batch out, because it was not finite.
      data: the state of the data's iterator.
      evaluations: {"step", "eval_loss", ...} so far.
    """

    step: int = 0
    skipped: int = 0
    data: Any = None
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: the run's output_dir.
      fingerprint: JSON-able facts that a run which goes on must share with the one that wrote the checkpoint.
      limit: how many to keep; None keeps all.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], limit: int | None = None) -> None:
        self._folder = folder.absolute()
        self._fingerprint = dict(fingerprint)
        self._limit = limit
        handlers = {"run": ocp.JsonCheckpointHandler(), "arrays": ocp.PyTreeCheckpointHandler(use_compression=False)}
        self._orbax = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[Path, Future[None]] | None = None
        for left_over in self._folder.glob(_UNFINISHED):  # of a process that was killed
            shutil.rmtree(left_over)

    def save(self, progress: Progress, trainable: Any, opt_state: Any, *, best: int | None = None) -> None:
        """Begins to write a checkpoint, after the previous one is whole; says what went wrong, and the run goes on.

        Args:
          progress: where the run is.
          trainable, opt_state: may be donated as soon as this returns.
          best: the step whose checkpoint is kept beside the latest.
        """
        self.wait()
        path = self._folder / f"checkpoint-{progress.step}"
        run = {"format": FORMAT, "fingerprint": self._fingerprint, "progress": dataclasses.asdict(progress)}
        self._writing = path, self._thread.submit(self._write, path, run, _on_host(_named(trainable, opt_state)), best)

    def _write(self, path: Path, run: dict[str, Any], arrays: dict[str, np.ndarray], best: int | None) -> None:
        """Writes a checkpoint, then removes what is over the limit."""
        shutil.rmtree(path, ignore_errors=True)  # a run that goes on from an earlier one writes it anew
        self._require_space(sum(array.nbytes for array in arrays.values()))
        args = {"run": ocp.args.JsonSave(run), "arrays": ocp.args.PyTreeSave(arrays)}
        self._orbax.save(path, args=ocp.args.Composite(**args))
        self._remove_old(best)

    def wait(self) -> bool:
        """Waits for what is being written; False where nothing was written."""
        if self._writing is None:
            return False
        (path, written), self._writing = self._writing, None
        try:
            written.result()
        except _ERRORS as error:
            self._failed(path, error)
            return False
        return True

    def close(self) -> None:
        """Waits and frees the threads."""
        self.wait()
        self._thread.shutdown()
        self._orbax.close()

    def steps(self) -> list[int]:
        """The steps that there are whole checkpoints of."""
        found = (_NAME.fullmatch(path.name) for path in self._folder.glob("checkpoint-*"))
        return sorted(int(match[1]) for match in found if match)

    def find(self, resume: str | bool | Path | None) -> Path | None:
        """The checkpoint that `resume_from_checkpoint` means; None where the run starts from the beginning.

        Raises:
          JaxftError: a path that is no checkpoint.
        """
        if str(resume).lower() in ("none", "false"):
            return None
        if str(resume).lower() != "true":
            path = Path(str(resume))
            if not (path / "run").is_dir():
                raise JaxftError(path, "is no checkpoint of a run", "Give a folder called checkpoint-...")
            return path.absolute()
        steps = self.steps()
        if not steps:
            console.warn(f"{self._folder} has no checkpoint: the run starts from the beginning")
            return None
        return self._folder / f"checkpoint-{steps[-1]}"

    def restore(self, path: Path, trainable: Any, opt_state: Any) -> tuple[Any, Any, Progress]:
        """(trainable, opt_state, progress) of a checkpoint, the arrays placed as those given.

        Raises:
          JaxftError: it cannot be read, or is of another model or other settings: the differences are named.
        """
        try:
            run = self._orbax.restore(path, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
            found, progress = run["fingerprint"], Progress(**run["progress"])
            if run["format"] != FORMAT:
                raise JaxftError(path, f"is of format {run['format']!r}; this version reads {FORMAT!r}")
        except _ERRORS as error:
            raise JaxftError(path, f"cannot be read: {error}") from error
        different = list(differences(found, self._fingerprint))
        if different:
            more = f", and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
            how = "Resume with the model and settings that the run began with, or start a new run"
            raise JaxftError(path, f"is of another run: {'; '.join(different[:_SHOWN])}{more}", how)
        wanted = _named(trainable, opt_state)
        try:
            every = ocp.args.PyTreeRestore(
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
            )
            arrays = self._orbax.restore(path, args=ocp.args.Composite(arrays=every)).arrays
            for name, like in wanted.items():
                if (arrays[name].shape, arrays[name].dtype) != (like.shape, like.dtype):
                    raise JaxftError(path, f"holds {name} as {arrays[name].dtype}{list(arrays[name].shape)}")
        except _ERRORS as error:
            raise JaxftError(path, f"cannot be read: {error}") from error
        leaves, tree = jax.tree.flatten((trainable, opt_state))
        placed = [jax.device_put(arrays[n], like.sharding) for n, like in zip(wanted, leaves, strict=True)]
        return *jax.tree.unflatten(tree, placed), progress

    def _require_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < 1.1 * needed:
            raise OSError(
                f"No space left on device: it needs {console.size(needed)}, and {console.size(free)} are free"
            )

    def _remove_old(self, best: int | None) -> None:
        for step in self.steps()[: -self._limit] if self._limit else []:
            old = self._folder / f"checkpoint-{step}"
            try:
                if step != best:
                    shutil.rmtree(old)
            except OSError as error:
                console.warn(f"{old}, which is over save_total_limit, was not removed: {error}")

    def _failed(self, path: Path, error: Exception) -> None:
        """Says that a checkpoint was not written, and which one is the last that is whole."""
        for left_over in self._folder.glob(f"{path.name}.orbax-checkpoint-tmp*"):
            shutil.rmtree(left_over, ignore_errors=True)
        reason = "No space left on device" if "No space left" in str(error) else str(error).splitlines()[0]
        steps = self.steps()
        last = f"checkpoint-{steps[-1]} is whole" if steps else "there is none before it"
        console.warn(f"{path} was not written ({reason}); {last}. The run goes on")


def _named(trainable: Any, opt_state: Any) -> dict[str, Any]:
    """Every leaf by its path, in the order of the flattened pair."""
    paths = jax.tree_util.tree_leaves_with_path((trainable, opt_state))
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def _on_host(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """numpy arrays of their own, so that a checkpoint does not depend on the devices it was made on."""
    found = jax.device_get(arrays)
    # What lies in host memory, on a CPU or of a paged optimizer, comes as a view of what the next step overwrites.
    return {name: np.array(a) if _in_host_memory(arrays[name]) else a for name, a in found.items()}


def _in_host_memory(array: jax.Array) -> bool:
    return jax.default_backend() == "cpu" or array.sharding.memory_kind != "device"


def differences(found: Any, expected: Any, where: str = "") -> Iterator[str]:
    """What differs between two JSON trees, one text for each leaf: 'lora.r: 8 there, 16 here'."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for name in sorted({*found, *expected}):
            here = f"{where}.{name}" if where else str(name)
            yield from differences(found.get(name), expected.get(name), here)
    elif found != expected:
        yield f"{where}: {found} in the checkpoint, {expected} now"


def digest(frozen: nnx.State) -> str:
    """A hash of a few values of each frozen array: tells models of one shape apart without reading all of them."""
    corners = [leaf[(0,) * (leaf.ndim - 1)][:64] if leaf.ndim else leaf for leaf in jax.tree.leaves(frozen)]
    found = hashlib.sha256()
    for corner in jax.device_get(corners):
        found.update(np.ascontiguousarray(corner).tobytes())
    return found.hexdigest()[:16]


def fingerprint(config: Any, frozen: nnx.State, args: TrainingArguments, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a run that goes on from a checkpoint must share with the run that wrote it; JSON-able.

    Args:
      config: the decoder's.
      frozen: the weights that do not train.
      args: those settings that may change when resuming are left out.
      facts: more of the kind.
    """
    settings = {name: value for name, value in jsonable(args).items() if name not in MAY_CHANGE}
    return {"model": jsonable(config), "weights": digest(frozen), "settings": settings, **jsonable(facts)}

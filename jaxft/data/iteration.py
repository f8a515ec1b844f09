"""Going through batches so that a run can be killed and go on: grain reads ahead, and its state says where it is.

A loader is whatever has `steps_per_epoch`, `report` and an `__iter__` that gives a `BatchIterator`. Its state is small
and JSON-able: a checkpoint holds it, and an iterator of the same data that is set to it goes on with the next batch.
"""

from __future__ import annotations

import json
from typing import Any, Protocol, runtime_checkable

from jaxft.errors import JaxftError

READ_AHEAD = 2  # batches


@runtime_checkable
class Loader(Protocol):
    """Batches for the trainer.

    Attributes:
      steps_per_epoch: None where the length of the data is not known before it was read once.
      report: says in words how documents fill rows.
    """

    steps_per_epoch: int | None
    report: Any

    def __iter__(self) -> BatchIterator:
        """The batches from the first on."""
        ...


@runtime_checkable
class RandomAccess(Protocol):
    """Batches by step number.

    Attributes:
      order: JSON-able; what decides which batch a step has. A state is refused where these differ.
    """

    @property
    def order(self) -> dict[str, object]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Any: ...


def iterate(batches: RandomAccess) -> BatchIterator:
    """An iterator over batches[0], batches[1], ...; a thread of grain's makes the next ones in the meantime."""
    import grain  # imports jax

    source: Any = batches
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD)
    return BatchIterator(grain.MapDataset.source(source).to_iter_dataset(options), batches.order)


class BatchIterator:
    """Batches in order, from one of grain's datasets.

    Args:
      dataset: a grain.IterDataset.
      order: what decides which batch comes when, JSON-able.
    """

    def __init__(self, dataset: Any, order: dict[str, object]) -> None:
        self._iterator = iter(dataset)
        self._order = json.loads(json.dumps(order))  # as it reads in a checkpoint: lists for tuples

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Any:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Where it is, after the batches that were taken from it; JSON-able."""
        return {"position": self._iterator.get_state(), "order": self._order}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where the iterator was that gave `state`.

        Raises:
          JaxftError: it was over other data or in another order, naming what differs.
        """
        found, expected = state["order"], self._order
        differing = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
        if differing:
            what = ", ".join(f"{name} {found.get(name)} (now {expected.get(name)})" for name in differing)
            how = "Resume with the data and the settings that the run began with"
            raise JaxftError("data position", f"is of a run with other batches: {what}", how)
        self._iterator.set_state(state["position"])

"""Sequence packing: which documents share a row. Where the tokens then go is `batch.lay_out`'s part."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from jaxft.errors import JaxftError


def pack(lengths: Sequence[int] | np.ndarray, max_seq_length: int, max_segments: int = 64) -> list[list[int]]:
    """Packs documents into rows by best fit, the longest first; no document is split.

    Each document goes into the row that it leaves the least room in, and opens a new row where none has room; among
    equal rows the one last added to is taken. This is best-fit decreasing (Johnson et al. 1974: at most 11/9 of the
    fewest rows possible, plus 4, when max_segments does not bind), O(n log n) for a given max_seq_length.

    Args:
      lengths: int [n], tokens of each document.
      max_seq_length: tokens that a row holds.
      max_segments: documents that a row holds at most. Attention kernels need it to be static.

    Returns:
      For each row, the indices of its documents. The same lengths always give the same rows, and reordered documents
      rows of the same lengths.

    Raises:
      JaxftError: a document is longer than a row, naming its index.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size and lengths.max() > max_seq_length:
        index = int(lengths.argmax())
        raise JaxftError(f"document {index}", f"has {lengths[index]} tokens; max_seq_length is {max_seq_length}")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> rows with exactly that
    rooms: list[int] = []  # its keys, sorted
    order = np.argsort(-lengths, kind="stable")
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), max_seq_length
            rows.append([])
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        rows[row].append(index)
        room -= length
        if room and len(rows[row]) < max_segments:
            if room not in open_rows:
                open_rows[room] = []
                insort(rooms, room)
            open_rows[room].append(row)
    return rows


def arrange(
    lengths: np.ndarray, max_seq_length: int, packing: bool, max_segments: int, rng: np.random.Generator | None
) -> list[list[int]]:
    """The rows of an epoch, or of a buffer: packed or one document each, in an order that `rng` decides.

    Args:
      lengths, max_seq_length, max_segments: see `pack`.
      packing: several documents a row.
      rng: None keeps the order that packing gives, or without packing that of the documents.

    Returns:
      For each row, the indices of its documents.
    """
    order = np.arange(len(lengths))
    if rng is not None:
        rng.shuffle(order)
    if not packing:
        return order[:, None].tolist()
    # Packing sorts by length, stably: this shuffle decides which of the equally long documents come together, and the
    # rows, which come out with the longest documents first, need one of their own.
    rows = [order[row].tolist() for row in pack(lengths[order], max_seq_length, max_segments)]
    if rng is not None:
        rng.shuffle(rows)
    return rows

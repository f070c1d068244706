"""Many tensors are updated in one compiled call: a call costs the host about as much as a small update."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from .rule import Scalars

LARGEST = 16
MOST_SETS = 8


class KnownSets:
    """Which sets of tensors come again, and may have a compiled function of their own: the first few that do.

    A model is one such set. Where the tensors that have a gradient change from step to step, their sets are without
    number, and each new one would be compiled.
    """

    def __init__(self) -> None:
        self._known: set[Hashable] = set()
        self._seen: list[Hashable] = []

    def __contains__(self, kinds: Hashable) -> bool:
        if kinds in self._known:
            return True
        if len(self._known) < MOST_SETS and kinds in self._seen:
            self._known.add(kinds)
            return True
        self._seen = [kinds, *self._seen[: MOST_SETS - 1]]
        return False


def split(kinds: Sequence[Hashable], sets: KnownSets) -> list[Sequence[int]]:
    """Cut tensors into batches: by 16 as they come where their set is known, else those of one kind.

    Args:
        kinds: What tells apart tensors that differ in shape or dtype.
        sets: The sets that the compiled function knows.

    Returns:
        The places of the tensors of each batch, a range where they follow each other.
    """
    count = len(kinds)
    if len({*kinds}) == 1:
        return _of_one_kind(range(count))
    if (*kinds,) in sets:
        return [range(at, min(at + LARGEST, count)) for at in range(0, count, LARGEST)]
    by_kind: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(i)
    return [part for places in by_kind.values() for part in _of_one_kind(places)]


def _of_one_kind(places: Sequence[int]) -> list[Sequence[int]]:
    """By 16, 8, 4, 2 and 1: as many functions are compiled for a kind, and no more."""
    parts, size, done = [], LARGEST, 0
    while done < len(places):
        while size > len(places) - done:
            size //= 2
        parts.append(places[done : done + size])
        done += size
    return parts


def pick(column: Any, places: Sequence[int]) -> Any:
    """What stands at these places of a column; a number for all of them as it is."""
    if not isinstance(column, list | tuple):
        return column
    if isinstance(places, range):
        return column[places.start : places.stop]
    return type(column)([column[i] for i in places])


class Batch(NamedTuple):
    """Tensors of one dtype with one rule, in columns.

    Args:
        ws: Parameters.
        gs: Their gradients.
        vs: Their accumulators.
        scalars: The numbers of the step; a list in place of an array holds one for each tensor.
        kinds: What tells apart the tensors that differ in shape, or in the dtype of their gradients.
    """

    ws: Sequence[mx.array]
    gs: Sequence[mx.array]
    vs: Sequence[mx.array]
    scalars: Scalars
    kinds: Sequence[Any]

    def part(self, places: Sequence[int]) -> Batch:
        """The tensors at these places."""
        scalars = self.scalars
        if any([isinstance(s, list) for s in scalars]):
            scalars = Scalars(*[pick(s, places) for s in scalars])
        ws, gs, vs, kinds = (pick(column, places) for column in (self.ws, self.gs, self.vs, self.kinds))
        return Batch(ws, gs, vs, scalars, kinds)

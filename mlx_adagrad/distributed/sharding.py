"""Which parameters of a model are parts of larger ones, and along which axis they were cut.

MLX's own modules tell: those of ``nn.layers.distributed.shard_linear``, ``nn.fully_shard`` and this package's
:class:`~mlx_adagrad.distributed.ShardedEmbedding`. ``shard_inplace`` leaves no trace, so its predicate must be given.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
from mlx.nn import Module
from mlx.nn.layers import distributed as layers

from ..trees import Keys, children, dotted
from .embedding import ShardedEmbedding

OWNER = "distributed"

# A module whose parts tell, or a predicate like those of mlx.nn.layers.distributed.shard_inplace: (path, array) to None
# (whole), True (sharded), an axis, or (axis, segments).
Predicate: TypeAlias = Callable[[str, Any], Any]
Sharded: TypeAlias = "Module | Predicate"

ALL_TO_SHARDED = (layers.AllToShardedLinear, layers.QuantizedAllToShardedLinear)
SHARDED_TO_ALL = (layers.ShardedToAllLinear, layers.QuantizedShardedToAllLinear)


class Cut(NamedTuple):
    """How a parameter was cut into parts.

    Args:
        axis: The axis along which each process has a part.
        segments: How many pieces were cut each (a fused QKV matrix: 3), or where MLX's ``segments`` say.
        rows: The length of the axis before, where it was filled up to be divisible; None: it was divisible.
    """

    axis: int
    segments: Any = 1
    rows: int | None = None


def cuts(model: Module, predicate: Predicate | None = None) -> dict[Keys, Cut]:
    """The sharded parameters of a model, frozen ones too, by their keys."""
    found = dict(_cuts(model, (), False))
    if predicate is not None:
        arrays = [(keys, w) for keys, w in _arrays(model, ()) if _says(predicate, keys, w)]
        found |= {keys: _cut(predicate(dotted(keys), w), w) for keys, w in arrays}
    return found


class LastCuts:
    """The :func:`cuts` of the model that was asked for last, which a training loop asks for in every step."""

    def __init__(self) -> None:
        self._last: tuple[Any, dict[Keys, Cut]] = (lambda: None), {}  # a weak reference to the model, and its cuts

    def of(self, parameters: Any) -> dict[Keys, Cut]:
        """The cuts of a module; a tree of arrays tells of none."""
        if not isinstance(parameters, Module):
            return {}
        model, found = self._last
        if model() is not parameters:
            found = cuts(parameters)
            self._last = weakref.ref(parameters), found
        return found

    def check_rows(self, parameters: Any) -> None:
        """Raise ValueError for a parameter of whose rows each process has a part: none knows the mean of a row."""
        for keys, cut in self.of(parameters).items():
            if cut.axis > 0:
                raise ValueError(
                    f"[RowWise] '{dotted(keys)}' is sharded along axis {cut.axis}, so no process has a whole row: use "
                    "Dense() for the accumulator."
                )


def is_sharded(sharded: Sharded | None) -> Callable[[Keys, Any], bool]:
    """A function of the keys and the array (or gradient) that tells whether it is a part.

    Raises:
        TypeError: If ``sharded`` is neither a module nor callable.
    """
    if sharded is None:
        return lambda keys, array: False
    if isinstance(sharded, Module):
        found = cuts(sharded)
        return lambda keys, array: keys in found
    if callable(sharded):
        return lambda keys, array: _says(sharded, keys, array)
    given = type(sharded).__name__
    raise TypeError(f"[{OWNER}] 'sharded' must be a module or a predicate (path, array) but got {given}.")


def _says(predicate: Predicate, keys: Keys, array: Any) -> bool:
    answer = predicate(dotted(keys), array)
    return answer is not None and answer is not False


def _cut(answer: Any, array: mx.array) -> Cut:
    if isinstance(answer, tuple):
        return Cut(answer[0] % array.ndim, answer[1])
    return Cut(0 if answer is True else answer % array.ndim)


def _cuts(tree: Any, keys: Keys, fully: bool) -> Iterator[tuple[Keys, Cut]]:
    for key, child in children(tree):
        below = (*keys, key)
        if isinstance(child, mx.array):
            cut = _cut_in(tree, key, child, fully)
            if cut is not None:
                yield below, cut
        elif isinstance(child, dict | list | tuple):
            yield from _cuts(child, below, fully or isinstance(tree, layers.FullyShardedModule))


def _cut_in(module: Any, key: Any, array: mx.array, fully: bool) -> Cut | None:
    """How the array that stands in ``module`` was cut."""
    if isinstance(module, ShardedEmbedding):
        return Cut(0, rows=module.num_embeddings) if module.group.size() > 1 else None
    if fully:
        return Cut(0)
    if isinstance(module, ALL_TO_SHARDED + SHARDED_TO_ALL) and module.group.size() == 1:
        return None
    if isinstance(module, ALL_TO_SHARDED):
        return Cut(0 if key == "bias" else max(array.ndim - 2, 0))
    if isinstance(module, SHARDED_TO_ALL) and key != "bias":
        return Cut(array.ndim - 1)
    return None


def _arrays(tree: Any, keys: Keys) -> Iterator[tuple[Keys, mx.array]]:
    for key, child in children(tree):
        if isinstance(child, mx.array):
            yield (*keys, key), child
        elif isinstance(child, dict | list | tuple):
            yield from _arrays(child, (*keys, key))

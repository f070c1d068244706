"""Which parameters of a model are parts of larger ones, and along which axis they were cut.

MLX's own modules tell: those of ``nn.layers.distributed.shard_linear``, ``nn.fully_shard`` and this package's
:class:`~mlx_adagrad.distributed.ShardedEmbedding`. ``shard_inplace`` leaves no trace, so its predicate must be given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
from mlx.nn import Module
from mlx.nn.layers import distributed as layers

from ..trees import Keys, children, dotted

OWNER = "distributed"

# A module whose parts tell, or a predicate like those of mlx.nn.layers.distributed.shard_inplace: (path, array) to None
# (whole), True (sharded), an axis, or (axis, segments).
Predicate: TypeAlias = Callable[[str, Any], Any]
Sharded: TypeAlias = "Module | Predicate"

ALL_TO_SHARDED = (layers.AllToShardedLinear, layers.QuantizedAllToShardedLinear)
SHARDED_TO_ALL = (layers.ShardedToAllLinear, layers.QuantizedShardedToAllLinear)
TABLES: list[type] = []  # ShardedEmbedding, once its module is imported, which few programs need
SEGMENTS = "_mlx_adagrad_segments"  # the attribute of a layer that says what shard_linear was given


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


def cuts_of(parameters: Any) -> dict[Keys, Cut]:
    """The :func:`cuts` of a module; a tree of arrays tells of none.

    They are looked up in every step, since layers may have been replaced since the last one.
    """
    return cuts(parameters) if isinstance(parameters, Module) and _has_parts(parameters) else {}


def _has_parts(tree: Any) -> bool:
    """Whether a layer of the model is of a sharded class: quicker than :func:`cuts`, for models that have none."""
    kinds = (*ALL_TO_SHARDED, *SHARDED_TO_ALL, layers.FullyShardedModule, *TABLES)
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, kinds):
            return True
        below = node.values() if isinstance(node, dict) else node
        waiting.extend(child for child in below if isinstance(child, dict | list | tuple))
    return False


def check_rows(parameters: Any) -> None:
    """Raise ValueError for a parameter of whose rows each process has a part: none knows the mean of a row."""
    for keys, cut in cuts_of(parameters).items():
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


def note_segments() -> None:
    """Let the layers that ``shard_linear`` makes keep its ``segments``, which MLX forgets; called once, at import.

    Without them the parts of a fused QKV matrix would be put together in another order than that of the whole matrix.
    """
    for layer in (*ALL_TO_SHARDED, *SHARDED_TO_ALL):
        for name in ("from_linear", "from_quantized_linear"):
            if name in vars(layer):
                setattr(layer, name, classmethod(_noting(vars(layer)[name].__func__)))


def _noting(make: Callable) -> Callable:
    @wraps(make)
    def made(cls: type, linear: Module, *, segments: Any = 1, group: mx.distributed.Group | None = None) -> Module:
        layer = make(cls, linear, segments=segments, group=group)
        object.__setattr__(layer, SEGMENTS, segments)  # not among the parameters, where a module keeps lists
        return layer

    return made


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
    if isinstance(module, tuple(TABLES)):
        return Cut(0, rows=module.num_embeddings) if module.group.size() > 1 else None
    if fully:
        return Cut(0)
    if isinstance(module, ALL_TO_SHARDED + SHARDED_TO_ALL) and module.group.size() == 1:
        return None
    segments = getattr(module, SEGMENTS, 1)
    if isinstance(module, ALL_TO_SHARDED):
        return Cut(0 if key == "bias" else max(array.ndim - 2, 0), segments)
    if isinstance(module, SHARDED_TO_ALL) and key != "bias":
        return Cut(array.ndim - 1, segments)
    return None


def _arrays(tree: Any, keys: Keys) -> Iterator[tuple[Keys, mx.array]]:
    for key, child in children(tree):
        if isinstance(child, mx.array):
            yield (*keys, key), child
        elif isinstance(child, dict | list | tuple):
            yield from _arrays(child, (*keys, key))

"""``average_gradients``: MLX's, for trees that hold row-sparse gradients too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import checks
from ..sparse.gradient import RowSparse, canonical
from ..trees import Keys, mapped, present
from ..update.tracing import evaluate
from .groups import group_or_global
from .sharding import Sharded, is_sharded

OWNER = "average_gradients"
Group = mx.distributed.Group


def average_gradients(
    gradients: Any,
    group: Group | None = None,
    all_reduce_size: int = 32 * 1024**2,
    communication_stream: mx.Stream | None = None,
    *,
    sharded: Sharded | None = None,
    equal_rows: bool = False,
) -> Any:
    r"""Average gradients across the processes of a group: ``mlx.nn.average_gradients`` that knows row-sparse ones.

    The rows that all processes name are gathered and summed in the order of the ranks, so that every process gets the
    same bits: :math:`g = \frac{1}{N} \sum_r g_r`. What is sent grows with the rows that are named, not with the table.

    Args:
        gradients: A tree of arrays and :class:`~mlx_adagrad.RowSparse`, of the same structure in each process.
        group: The processes. Default: ``None``, the global group.
        all_reduce_size: Small arrays are sent together until they have this many bytes; 0 or less: each alone.
            Default: ``32 MiB``.
        communication_stream: The stream to communicate on. Default: ``None``, that of the back-end.
        sharded: A module, or a predicate (path, array): what it shards is left as it is, since each process has its
            own part, whose gradient is averaged already. Default: ``None``, nothing.
        equal_rows: A promise that each table has the same number of rows in the gradients of all processes, as with
            batches of one shape. Without it the processes first tell each other their numbers, in one small exchange
            for all tables, which waits for the others. Inside ``mx.compile`` nothing can wait: there the numbers must
            be equal. Default: ``False``.

    Returns:
        The tree of averages; a row-sparse one is coalesced.
    """
    group = group_or_global(OWNER, group)
    checks.boolean(OWNER, "equal_rows", equal_rows)
    kept = is_sharded(sharded)
    if group.size() == 1:
        return gradients
    leaves = [(keys, g) for keys, g in present(gradients) if not kept(keys, g)]
    new: dict[Keys, Any] = {}
    dense = [(keys, g) for keys, g in leaves if not isinstance(g, RowSparse)]
    if dense:  # a list: MLX takes the paths of other trees apart at dots and digits
        arrays: Any = nn.average_gradients([g for _, g in dense], group, all_reduce_size, communication_stream)
        new |= dict(zip((keys for keys, _ in dense), arrays, strict=True))
    tables = [(keys, g) for keys, g in leaves if isinstance(g, RowSparse)]
    counts = _largest_counts([g for _, g in tables], group, equal_rows)
    for (keys, g), count in zip(tables, counts, strict=True):
        new[keys] = _average_rows(g, count, group, communication_stream)
    return mapped(lambda keys, g: new.get(keys, g), gradients)


def _largest_counts(gradients: Sequence[RowSparse], group: Group, equal: bool) -> list[int]:
    """How many rows each gradient has in the process where it has most."""
    own = [len(g.indices) for g in gradients]
    if equal or not own or not evaluate([[g.indices, g.values] for g in gradients]):
        return own
    largest: Any = mx.distributed.all_max(mx.array(own, mx.int32), group=group, stream=mx.cpu)
    return largest.tolist()


def _average_rows(gradient: RowSparse, count: int, group: Group, stream: mx.Stream | None) -> RowSparse:
    indices, values = canonical(gradient.indices, gradient.num_rows), gradient.values
    missing = count - len(indices)
    if missing > 0:  # what is sent must have the same shape everywhere; num_rows names no row
        indices = mx.concatenate([indices, mx.full((missing,), gradient.num_rows, mx.int32)])
        values = mx.concatenate([values, mx.zeros((missing, *values.shape[1:]), values.dtype)])
    if count == 0:
        return gradient
    indices = mx.distributed.all_gather(indices, group=group, stream=stream)
    values = mx.distributed.all_gather(values, group=group, stream=stream)
    mean = (RowSparse(indices, values, gradient.num_rows) / group.size()).coalesce()
    limited_in = getattr(gradient, "limited_in", None)
    if limited_in is not None:
        limited_in.renorm(_of_others(indices, mean, group))
    return mean


def _of_others(gathered: mx.array, mean: RowSparse, group: Group) -> mx.array:
    """The rows that other processes have looked up, and this one has not: it has scaled down its own, and once only,
    since to do so again may change the last bit.
    """
    place = mx.arange(len(gathered)) // (len(gathered) // group.size())
    here = RowSparse(gathered, (place == group.rank())[:, None].astype(mx.float32), mean.num_rows).coalesce()
    return mx.where(here.values[:, 0] > 0, mean.num_rows, mean.indices)  # num_rows names no row

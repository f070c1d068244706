"""A table whose rows are spread over the processes of a group: look-ups and their gradients travel, rows never do."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..sparse.embedding import SparseEmbedding
from ..sparse.gradient import named
from .groups import group_or_global
from .sharding import TABLES

OWNER = "shard_embedding"


class ShardedEmbedding(SparseEmbedding):
    """A :class:`~mlx_adagrad.SparseEmbedding` of which each process holds a part of the rows; made by
    :func:`shard_embedding`.

    Process r of N holds the rows from r c on, with c = ceil(V / N); the last part is filled up with rows of 0. In a
    look-up all processes gather the indices of all, read the rows that they hold, and sum: with K indices of D
    columns a process this takes N K (4 + 4 D) bytes, and K D more for the gradient, whatever V is (MLX has no
    all-to-all, which would take 1 / N of the rows). All processes must look up the same number of indices at once.

    The gradient is that of the mean of the losses of all processes, as ``nn.fully_shard`` has it: do not average it
    once more (``average_gradients(..., sharded=model)``).
    """

    num_embeddings: int
    group: mx.distributed.Group

    def __call__(self, x: mx.array) -> mx.array:
        """The rows of the indices ``x``, an integer array of any shape that is the same in each process."""
        x = mx.stop_gradient(mx.array(x))
        flat, here = x.reshape(-1), self.weight.shape[0]
        # an index that names no row must not name one that fills up the last part
        own = mx.where(named(flat, self.num_embeddings), flat, self.group.size() * here).astype(mx.int32)
        indices = mx.distributed.all_gather(own, group=self.group) - self.group.rank() * here
        rows = super().__call__(indices)  # 0 for those that other processes hold
        return self._exchange(rows, flat.size).reshape(*x.shape, self.weight.shape[1])

    def _exchange(self, rows: mx.array, count: int) -> mx.array:
        """Of the rows for all processes, this one's, summed over the processes that hold them."""
        group, first = self.group, self.group.rank() * count
        last = first + count
        exchange: Any = mx.custom_function(lambda rows: mx.distributed.all_sum(rows, group=group)[first:last])

        @exchange.vjp
        def back(_primal: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
            return mx.distributed.all_gather(cotangent, group=group) / group.size()

        return exchange(rows)

    def as_linear(self, x: mx.array) -> mx.array:
        """Refused: it would need every row.

        Raises:
            ValueError: Always.
        """
        raise ValueError("[ShardedEmbedding] as_linear needs the whole table, of which each process holds a part.")

    def _extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"{self.num_embeddings}, {columns}, rows here={rows}"


TABLES.append(ShardedEmbedding)


def shard_embedding(embedding: nn.Embedding, group: mx.distributed.Group | None = None) -> ShardedEmbedding:
    """A :class:`ShardedEmbedding` that holds this process's part of the rows of ``embedding``.

    Like ``shard_linear`` of MLX it makes a new layer: ``model.table = shard_embedding(model.table)``.

    Args:
        embedding: An ``nn.Embedding`` or :class:`~mlx_adagrad.SparseEmbedding`, the same in each process.
        group: The processes. Default: ``None``, the global group.

    Raises:
        TypeError: For any other layer, quantised embeddings and subclasses included, and for what is no group.
        ValueError: For a table with a ``padding_idx`` or a ``max_norm``.
    """
    if type(embedding) not in (nn.Embedding, SparseEmbedding):
        given = type(embedding).__name__
        raise TypeError(f"[{OWNER}] only an nn.Embedding or a SparseEmbedding can be sharded, not {given}.")
    for option in ("padding_idx", "max_norm"):
        if getattr(embedding, option, None) is not None:
            raise ValueError(f"[{OWNER}] a sharded table knows no '{option}', which this SparseEmbedding has.")
    group = group_or_global(OWNER, group)
    rows = len(embedding.weight)
    sharded = ShardedEmbedding(1, 1)
    sharded.weight = part_of(embedding.weight, rows, group)
    nn.Module.__setattr__(sharded, "num_embeddings", rows)
    nn.Module.__setattr__(sharded, "group", group)
    return sharded


def part_of(table: mx.array, rows: int, group: mx.distributed.Group) -> mx.array:
    """The rows of ``table`` that this process holds, filled up with 0 where there are too few."""
    size = -(-rows // group.size())
    part = table[group.rank() * size : (group.rank() + 1) * size]
    missing = size - len(part)
    return mx.contiguous(mx.concatenate([part, mx.zeros((missing, *part.shape[1:]), part.dtype)]) if missing else part)

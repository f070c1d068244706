"""The layer whose gradient is row-sparse: torch's ``nn.Embedding`` with ``sparse=True``."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .gradient import canonical
from .look_ups import rows_of, table_of
from .norms import check_norm, limited, renormed


class SparseEmbedding(nn.Embedding):
    """An ``mlx.nn.Embedding`` whose gradient is a :class:`~mlx_adagrad.RowSparse` if taken with
    :func:`mlx_adagrad.value_and_grad`.

    Parameters, files and results are those of ``nn.Embedding``, and with ``nn.value_and_grad`` so is the gradient. An
    index outside ``[0, num_embeddings)``, a negative one too, names no row: its embedding is 0 and has no gradient.

    Args:
        num_embeddings (int): Rows of the table.
        dims (int): Columns of the table.
        padding_idx (int, optional): A row that starts as 0 and whose look-ups have no gradient; a negative one counts
            from the end, as in torch. Default: ``None``.
        max_norm (float, optional): Rows are looked up as if they were scaled down to a norm of at most this one, and
            the gradient is taken as if they had been so before, as in torch. :func:`mlx_adagrad.value_and_grad` then
            stores them so (torch: every forward pass); in a trace it does not, see :meth:`renorm`. Default: ``None``.
        norm_type (float): p of that p-norm, positive; ``math.inf`` is the maximum norm. Default: ``2.0``.

    Raises:
        ValueError: For a ``padding_idx`` outside the table, a ``max_norm`` or ``norm_type`` that is not positive.
        TypeError: For numbers that are none.
    """

    # kept on the class too, for layers that became sparse where they stood, and for pickles of version 0.1
    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0

    def __init__(
        self,
        num_embeddings: int,
        dims: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
    ):
        padding_idx = padding(self._name, padding_idx, num_embeddings)
        check_norm(self._name, max_norm, norm_type)
        super().__init__(num_embeddings, dims)
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, max_norm, norm_type
        if padding_idx is not None:
            self["weight"][padding_idx] = 0

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, padding_idx: int | None = None) -> SparseEmbedding:
        """Turn an ``nn.Embedding`` into a ``SparseEmbedding`` where it stands in its model, and return it.

        Args:
            embedding: The layer.
            padding_idx: As in the constructor; the row stays as it is, as in torch's ``from_pretrained``. Default:
                ``None``.

        Raises:
            TypeError: For any other class, quantised embeddings and subclasses included.
            ValueError: For a ``padding_idx`` outside the table.
        """
        if type(embedding) not in (nn.Embedding, SparseEmbedding):
            raise TypeError(f"[SparseEmbedding] only an nn.Embedding can be converted, not {type(embedding).__name__}.")
        row = padding("SparseEmbedding", padding_idx, len(embedding.weight))
        embedding.__class__ = SparseEmbedding
        if row is not None:
            embedding.padding_idx = row
        return embedding  # type: ignore[return-value]

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _extra_repr(self) -> str:
        options = {"padding_idx": self.padding_idx, "max_norm": self.max_norm}
        return super()._extra_repr() + "".join(f", {k}={v}" for k, v in options.items() if v is not None)

    def __call__(self, x: mx.array) -> mx.array:
        """The rows of the indices ``x``, an integer array of any shape.

        Raises:
            TypeError: If ``x`` holds no integers.
        """
        x = mx.stop_gradient(indices(self._name, x))  # mx.checkpoint asks for a gradient of indices too
        if self.padding_idx is None:
            return self._look_up(x)
        pad = mx.stop_gradient(self["weight"][self.padding_idx])
        pad = pad if self.max_norm is None else limited(pad, self.max_norm, self.norm_type)
        return mx.where((x == self.padding_idx)[..., None], pad, self._look_up(self._counted(x)))

    def _look_up(self, x: mx.array) -> mx.array:
        table = table_of(self)
        rows = rows_of(self["weight"], x) if table is None else table.look_up(self["weight"], x)
        return rows if self.max_norm is None else limited(rows, self.max_norm, self.norm_type)

    def _counted(self, x: mx.array) -> mx.array:
        """The indices in int32, with the number of rows for each that names no row and for padding."""
        x = canonical(x, len(self["weight"]))
        return x if self.padding_idx is None else mx.where(x == self.padding_idx, len(self["weight"]), x)

    def renorm(self, x: mx.array) -> None:
        """Scale the rows that ``x`` names down to ``max_norm``, in the table: what torch does in each forward pass.

        :func:`mlx_adagrad.value_and_grad` does so by itself, unless something is tracing or the gradient is dense. Call
        it in a compiled step, with the state of the model among its outputs, before the gradient is taken or after the
        update (FBGEMM's way): the rows are the same where they are looked up next.

        Raises:
            TypeError: If ``x`` holds no integers.
            ValueError: If there is no ``max_norm``.
        """
        if self.max_norm is None:
            raise ValueError(f"[{self._name}] there is no 'max_norm' to scale rows down to.")
        self["weight"] = renormed(self["weight"], indices(self._name, x), self.max_norm, self.norm_type)

    def __setattr__(self, key: str, val: Any) -> None:
        table = table_of(self) if key == "weight" else None
        if table is not None:
            table.replaced = True
        super().__setattr__(key, val)


def indices(owner: str, x: Any, name: str = "x") -> mx.array:
    """``x`` as an array, which must hold integers."""
    x = x if isinstance(x, mx.array) else mx.array(x)
    if not mx.issubdtype(x.dtype, mx.integer):
        fix = "cast it by astype(mx.int32)" if x.size else "an empty array needs a dtype, mx.array([], mx.int32)"
        raise TypeError(f"[{owner}] '{name}' must hold integers, the numbers of rows, but is {x.dtype}: {fix}.")
    return x


def padding(owner: str, padding_idx: Any, num_rows: int) -> int | None:
    """``padding_idx`` as a row of a table of ``num_rows``, or raise ValueError or TypeError."""
    if padding_idx is None:
        return None
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, Integral):
        raise TypeError(f"[{owner}] 'padding_idx' must be an integer or None but got {padding_idx!r}.")
    row = int(padding_idx)
    if not -num_rows <= row < num_rows:
        raise ValueError(f"[{owner}] 'padding_idx' must be a row of a table of {num_rows} but got {row}.")
    return row % num_rows

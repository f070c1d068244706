"""Sums, means and maxima of the rows in bags of indices: torch's ``nn.EmbeddingBag`` with row-sparse gradients."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .. import checks
from ..update.tracing import evaluate
from .layers import SparseEmbedding, indices
from .look_ups import differentiates_plainly, table_of
from .pooling import BagSums, limits_of

MODES = ("sum", "mean", "max")


class SparseEmbeddingBag(SparseEmbedding):
    r"""The sum, mean or maximum of the rows of each bag of indices, with a row-sparse gradient.

    .. math:: y_b = \sum_i \alpha_{bi} w_{x_{bi}} \quad \text{or} \quad
        y_b = \frac{1}{n_b} \sum_i w_{x_{bi}} \quad \text{or} \quad y_b = \max_i w_{x_{bi}}

    over the :math:`n_b` indices of bag :math:`b` that name a row other than ``padding_idx``; 0 for a bag without any.
    Sums are computed in fp32 (fp64 for a table in fp64), a block of rows at a time, as are their gradients: no array
    holds a row for every index. For ``"max"`` one does.

    Args:
        num_embeddings (int): Rows of the table.
        dims (int): Columns of the table.
        mode (str): ``"sum"``, ``"mean"`` or ``"max"``. Default: ``"mean"``.
        padding_idx (int, optional): The row that stands for padding: it starts as 0, counts in no bag, and has no
            gradient; a negative one counts from the end. Default: ``None``.
        include_last_offset (bool): ``offsets`` end with the end of the last bag. Default: ``False``.
        max_norm (float, optional): As in :class:`SparseEmbedding`. Default: ``None``.
        norm_type (float): As in :class:`SparseEmbedding`. Default: ``2.0``.

    Raises:
        ValueError: For a ``mode`` that is none of these, a ``padding_idx`` outside the table, a ``max_norm`` or
            ``norm_type`` that is not positive.
        TypeError: For numbers that are none.

    Differs from torch's: an index outside the table counts in no bag (torch raises), sums of half precision are in
    fp32, and there are no ``scale_grad_by_freq`` and ``sparse`` (:func:`mlx_adagrad.value_and_grad` gives row-sparse
    gradients, ``nn.value_and_grad`` dense ones).
    """

    def __init__(
        self,
        num_embeddings: int,
        dims: int,
        mode: str = "mean",
        padding_idx: int | None = None,
        *,
        include_last_offset: bool = False,
        max_norm: float | None = None,
        norm_type: float = 2.0,
    ):
        checks.one_of(self._name, "mode", mode, MODES)
        checks.boolean(self._name, "include_last_offset", include_last_offset)
        super().__init__(num_embeddings, dims, padding_idx, max_norm, norm_type)
        self.mode, self.include_last_offset = mode, include_last_offset

    @property
    def to_quantized(self) -> Any:
        """None: a quantised embedding does not sum, so ``nn.quantize`` leaves a bag as it is."""
        raise AttributeError(f"[{self._name}] there is no quantised form of it.")

    def _extra_repr(self) -> str:
        return f"{super()._extra_repr()}, mode={self.mode!r}"

    def __call__(  # type: ignore[override]
        self, x: mx.array, offsets: mx.array | None = None, per_sample_weights: mx.array | None = None
    ) -> mx.array:
        """One row for each bag.

        Args:
            x: Indices, integers: of shape (B, L), a bag in each row; or (N,), all bags one after another.
            offsets: Where in the latter case each bag begins, of shape (B,), ascending from 0; with
                ``include_last_offset`` (B + 1,), and the last bag ends at its last entry. Default: ``None``.
            per_sample_weights: A factor on each row, of the shape of ``x``, for ``mode="sum"`` only; has a gradient.
                Default: ``None``.

        Returns:
            An array of shape (B, dims) in the dtype of the table.

        Raises:
            TypeError: If ``x`` or ``offsets`` hold no integers, or ``per_sample_weights`` no floats.
            ValueError: For shapes that do not fit, and (not in a trace) for offsets that do not ascend from 0.
        """
        x, offsets = self._checked(x, offsets, per_sample_weights)
        bags, bag = self._bags(x, offsets)
        x = self._counted(x)
        counted = x < len(self["weight"])
        if self.mode == "max":
            return self._maximum(x.reshape(-1), bag.reshape(-1), bags)
        weights = mx.broadcast_to(mx.array(1.0), x.shape) if per_sample_weights is None else per_sample_weights
        sums = self._sums(bags, x, bag, weights)
        if self.mode == "mean":
            ones = counted.astype(sums.dtype)
            counts = ones.sum(axis=1) if x.ndim == 2 else mx.zeros((bags + 1,), sums.dtype).at[bag].add(ones)[:bags]
            sums = sums / mx.maximum(counts, 1)[:, None]
        return sums.astype(self["weight"].dtype)

    def _sums(self, bags: int, x: mx.array, bag: mx.array, weights: mx.array) -> mx.array:
        table, sums = table_of(self), BagSums(bags)
        arrays = x, bag, weights, self._limits(x)
        if table is not None:
            return table.read(sums, self["weight"], *arrays)
        # a graph for inference, or one that is to be exported, must be free of custom functions
        plainly = not self.training or differentiates_plainly()
        return sums(self["weight"], *arrays) if plainly else sums.alone(self["weight"], *arrays)

    def _limits(self, x: mx.array) -> mx.array:
        """What scales each row down to ``max_norm``; ones without one."""
        if self.max_norm is None:
            return mx.broadcast_to(mx.array(1.0), x.shape)
        return mx.stop_gradient(limits_of(self["weight"], x, self.max_norm, self.norm_type))

    def _maximum(self, x: mx.array, bag: mx.array, bags: int) -> mx.array:
        rows = self._look_up(x)
        if not x.size:
            return mx.zeros((bags, rows.shape[1]), rows.dtype)
        counted = mx.logical_and(x < len(self["weight"]), bag < bags)[:, None]
        seen, target = mx.stop_gradient(rows), mx.minimum(bag, bags)
        best = mx.full((bags + 1, rows.shape[1]), -mx.inf, rows.dtype)
        best = best.at[target].maximum(mx.where(counted, seen, -mx.inf))
        # as in torch the first of equal ones has the gradient
        is_best = mx.logical_and(counted, mx.logical_or(seen == best[target], mx.isnan(seen)))
        places = mx.where(is_best, mx.arange(len(x), dtype=mx.int32)[:, None], len(x))
        first = mx.full(best.shape, len(x), mx.int32).at[target].minimum(places)[:bags]
        largest = mx.take_along_axis(rows, mx.minimum(first, len(x) - 1), axis=0)
        return mx.where(first < len(x), largest, mx.zeros((), rows.dtype))

    def _bags(self, x: mx.array, offsets: mx.array | None) -> tuple[int, mx.array]:
        """How many bags there are, and the bag of each index, their number for those in none."""
        if offsets is None:
            return len(x), mx.broadcast_to(mx.arange(len(x), dtype=mx.int32)[:, None], x.shape)
        bags = len(offsets) - self.include_last_offset
        begins = mx.zeros((len(x) + 1,), mx.int32).at[mx.clip(offsets, 0, len(x))].add(mx.array(1, mx.int32))
        bag = mx.cumsum(begins)[: len(x)] - 1
        return bags, mx.where(bag < 0, bags, mx.minimum(bag, bags))

    def _checked(self, x: Any, offsets: Any, weights: Any) -> tuple[mx.array, mx.array | None]:
        x = mx.stop_gradient(indices(self._name, x))
        if x.ndim not in (1, 2) or (x.ndim == 1) != (offsets is not None):
            fix = "of shape (B, L) without 'offsets', or (N,) with them"
            given = "without" if offsets is None else "with"
            raise ValueError(f"[{self._name}] 'x' must be {fix}, but got {x.shape} {given} 'offsets'.")
        if offsets is not None:
            offsets = mx.stop_gradient(indices(self._name, offsets, "offsets"))
            self._check_offsets(offsets, len(x))
        if weights is not None:
            self._check_weights(weights, x)
        return x, offsets

    def _check_offsets(self, offsets: mx.array, length: int) -> None:
        if offsets.ndim != 1 or (self.include_last_offset and not offsets.size):
            wanted = "(B + 1,)" if self.include_last_offset else "(B,)"
            raise ValueError(f"[{self._name}] 'offsets' must have shape {wanted} but got {offsets.shape}.")
        if not offsets.size:
            return
        whole = offsets.astype(mx.int64)
        right = mx.all(mx.concatenate([whole[:1] == 0, whole[1:] >= whole[:-1], whole[-1:] <= length]))
        if evaluate(right) and not right.item():
            raise ValueError(f"[{self._name}] 'offsets' must ascend from 0 to at most {length}, the length of 'x'.")

    def _check_weights(self, weights: Any, x: mx.array) -> None:
        if self.mode != "sum":
            fix = "scale the rows yourself, or take mode='sum'"
            raise ValueError(f"[{self._name}] 'per_sample_weights' are for mode='sum', not {self.mode!r}: {fix}.")
        if not isinstance(weights, mx.array) or not mx.issubdtype(weights.dtype, mx.floating):
            got = weights.dtype if isinstance(weights, mx.array) else type(weights).__name__
            raise TypeError(f"[{self._name}] 'per_sample_weights' must be an array of floats but got {got}.")
        if weights.shape != x.shape:
            shapes = f"{x.shape}, but got {weights.shape}"
            raise ValueError(f"[{self._name}] 'per_sample_weights' must have the shape of 'x', {shapes}.")

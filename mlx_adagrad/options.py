"""What an optimizer was made with that decides which code runs, and whether there is a kernel for an array."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from . import checks
from .checks import shown
from .groups import Groups
from .leaves import Leaf
from .sparse import kernels as row_kernels
from .sparse.gradient import RowSparse
from .trees import dotted
from .update import kernels
from .update.accumulators import Dense
from .update.storage import Storage


@dataclass
class Options:
    """What decides which code runs, fixed for the life of an optimizer.

    Args:
        accumulator: How ``v`` is stored.
        groups: The rule of each parameter.
        fused: Whether kernels run: where they can (None), never, or else an error.
        differentiable: Let gradients flow through kernels too.
        lazy: A row-sparse gradient changes only the rows that it names.
        rounding: How new weights in half precision are rounded.
    """

    accumulator: Dense
    groups: Groups
    fused: bool | None
    differentiable: bool
    lazy: bool
    rounding: str = "nearest"

    @classmethod
    def checked(
        cls, accumulator: Any, groups: Groups, fused: Any, differentiable: Any, lazy: Any, rounding: Any = "nearest"
    ) -> Options:
        """The options as a user gives them.

        Raises:
            TypeError: For what is no accumulator or no bool.
            ValueError: For an unknown way of rounding.
        """
        if accumulator is not None and not isinstance(accumulator, Dense):
            kinds = "Dense(), RowWise() or Quantized()"
            raise TypeError(f"[Adagrad] 'accumulator' must be {kinds} but got {shown(accumulator)}.")
        if fused is not None:
            checks.boolean("Adagrad", "fused", fused)
        checks.boolean("Adagrad", "differentiable", differentiable)
        checks.boolean("Adagrad", "lazy", lazy)
        accumulator = accumulator or Dense()
        return cls(accumulator, groups, fused, differentiable, lazy, Storage(accumulator, rounding).rounding)

    @cached_property
    def storage(self) -> Storage:
        """How weights and state are kept."""
        return Storage(self.accumulator, self.rounding)

    def use_kernels(self) -> bool:
        """Whether kernels run on the default device, asked at each call; raises RuntimeError where they have to."""
        if self.fused:
            kernels.require()
        return kernels.available() if self.fused is None else self.fused

    @property
    def leaf_check(self) -> Callable[[Leaf], None] | None:
        """What refuses a leaf that no kernel takes, where kernels have to run."""
        return self._require_kernel if self.fused else None

    def _require_kernel(self, leaf: Leaf) -> None:
        g, w, _, keys = leaf
        if self.has_kernel(g, w):
            return
        sparse = " row-sparse" if isinstance(g, RowSparse) else ""
        raise RuntimeError(
            f"[Adagrad] 'fused=True' but no kernel takes '{dotted(keys)}': {w.dtype} parameters with "
            f"{g.dtype}{sparse} gradients in {self.accumulator}. Use fused=None to fall back by itself."
        )

    def has_kernel(self, gradient: Any, parameter: mx.array) -> bool:
        """Whether there is a kernel for these arrays."""
        if not self.storage.is_plain(parameter):
            from .update import narrow_kernels  # here for import time: dense fp32 state does not need it

            return narrow_kernels.supports(self.storage, parameter, gradient, self.differentiable, self.lazy)
        accumulator = self.accumulator.at(parameter)
        if isinstance(gradient, RowSparse) and self.lazy:
            return not self.differentiable and row_kernels.supports(accumulator, parameter, gradient.dtype)
        return kernels.supports(accumulator, parameter, gradient)  # of a RowSparse it asks for the dtype only

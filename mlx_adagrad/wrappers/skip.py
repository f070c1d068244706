"""Steps whose gradients are not finite, left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer

from ..checks import shown
from ..distributed.sharding import Sharded
from ..update.modifiers import Modifiers
from ..update.tracing import read
from . import reductions
from .agreement import ALONE, Agreement
from .base import Wrapper
from .loss_scale import DynamicLossScale


class SkipNonFinite(Wrapper):
    """A step in which a gradient holds an Inf or a NaN changes nothing inside: weights, state and step counts stay.

    So does one whose square would be infinite (from 1.8e19 on in fp32), which would make ``v`` infinite and keep its
    weight where it is for ever.

    It stands outermost, since it holds back everything inside it: averages, accumulated gradients and call counts too.

    Args:
        optimizer: The optimizer inside.
        on_skip: Called with the number of steps skipped so far, an int, after each step that was skipped; it may raise.
            Reads whether a step was skipped, which waits for the gradients; inside ``mx.compile`` it is not called.
            Default: ``None``.
        group: Processes that each have a part of some gradients, or might see a NaN alone: all of them decide alike.
            Default: ``None``, this process decides alone.
        sharded: Which parameters each process has a part of: a module, or a predicate (path, array). Default: ``None``,
            the model that is updated tells (``fully_shard``, ``shard_linear``, ``shard_embedding``).

    Raises:
        TypeError: If ``on_skip`` cannot be called.
        ValueError: If a :class:`DynamicLossScale` is inside, which could then never be halved.
    """

    _agreement = ALONE

    def __init__(
        self,
        optimizer: Optimizer,
        on_skip: Callable[[int], Any] | None = None,
        *,
        group: mx.distributed.Group | None = None,
        sharded: Sharded | None = None,
    ):
        if on_skip is not None and not callable(on_skip):
            raise TypeError(f"[{self._name}] 'on_skip' must be None or callable with a count but got {shown(on_skip)}.")
        inner: Any = optimizer
        while isinstance(inner, Wrapper):
            if isinstance(inner, DynamicLossScale):
                raise ValueError(f"[{self._name}] DynamicLossScale skips such steps by itself: leave {self._name} out.")
            inner = inner.optimizer
        self.on_skip = on_skip
        self._agreement = Agreement(self._name, group, sharded)
        super().__init__(optimizer)

    def _fresh(self) -> dict[str, Any]:
        return {"skipped_steps": mx.array(0, mx.uint64)}

    @property
    def skipped_steps(self) -> mx.array:
        """How many steps were skipped so far, 0-d uint64."""
        return self._own["skipped_steps"]

    def apply_modified(self, gradients: dict, parameters: dict, modifiers: Modifiers) -> dict:
        if modifiers.apply is False or modifiers.flush:
            return super().apply_modified(gradients, parameters, modifiers)
        self._agreement.check(parameters)
        gradients = reductions.coalesced(self._name, gradients)
        finite, modifiers = self._agreement.finite(gradients, parameters, modifiers, self._norms_inside)
        new = super().apply_modified(gradients, parameters, modifiers.guarding(finite))
        self._keep(modifiers, skipped_steps=self.skipped_steps + mx.logical_not(finite).astype(mx.uint64))
        if self.on_skip is not None and read(finite) is False:
            self.on_skip(read(self.skipped_steps))
        return new
